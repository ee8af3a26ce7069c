r"""DePerceiver: DETR with its transformer replaced by Perceiver IO.

Edward Li and Aditya Kannan, "DePerceiver: Improving Small Object Detection in DeTR" (2021), the published recipe:

    python train.py --config=configs/deperceiver.py:r50_16 --workdir=runs/r50_16 --config.data.directory=/data/coco

50 epochs of COCO, learning rate dropped after 33. The paper reports (COCO val2017, AP / APs) 10.5 / 4.3 at stride 32,
15.3 / 7.1 at 16 and 11.4 / 3.6 at 8; those figures are the paper's, not measured with this code.
"""

from ml_collections import ConfigDict

from configs.base import base, resnet

_STRIDES = {"32": (32,), "16": (16,), "8": (8,), "4": (4,), "multiscale": (8, 16, 32)}
VARIANTS = tuple(f"{net}_{scale}" for net in ("r50", "r101") for scale in _STRIDES)


def get_config(variant: str = "r50_16") -> ConfigDict:
    """One of VARIANTS: a backbone and the strides whose features Perceiver IO reads."""
    if variant not in VARIANTS:
        raise ValueError(f"configs/deperceiver.py has no variant {variant!r}; it has {', '.join(VARIANTS)}.")
    net, scale = variant.split("_")

    config = base()
    config.model = model()
    config.model.backbone = resnet(int(net[1:]))
    config.model.strides = _STRIDES[scale]
    config.loss.auxiliary = False
    config.train.num_epochs = 50
    config.optimizer.drop_epochs = (33,)
    return config


def model() -> ConfigDict:
    """The published DePerceiver. Each field below is one effect; the remedies its paper asks for are other values."""
    m = ConfigDict()
    m.name = "deperceiver"
    m.num_classes = 91  # class slots; train.py sets it from the data set
    m.no_object_logit = True  # one more logit after the class slots
    m.num_queries = 100
    m.embed_dim = 256  # width of tokens, queries and decoder
    m.dropout = 0.0
    m.relative_boxes = False  # centres as offsets from the queries' anchors
    m.strides = (16,)  # one level, or several concatenated
    m.level_dim = 4  # of the tokens' channels, that tell several strides apart; unused with one

    m.backbone = resnet()

    m.position = ConfigDict()
    m.position.encoding = "sine"  # sine | learned | fourier
    m.position.use = "add"  # add (to the tokens, once) | keys (alone, at every cross-attention)
    m.position.fourier_bands = 64
    m.position.learned_size = 50  # cells along a side that learned tables hold

    m.encoder = ConfigDict()
    m.encoder.num_latents = 2048  # the paper's text; its code and its figure 2 used 1024
    m.encoder.latent_dim = 256
    m.encoder.latent_init = "normal"  # normal | truncated_normal (cut at 2 standard deviations)
    m.encoder.latent_scale = 1.0  # standard deviation (before the cut)
    m.encoder.num_blocks = 3
    m.encoder.layers_per_block = 6
    m.encoder.share_blocks = True  # the same layers in every block
    m.encoder.num_cross_attentions = 1  # of the image tokens: before the first so many blocks
    m.encoder.cross_heads = 1
    m.encoder.self_heads = 8
    m.encoder.mlp_ratio = 1.0
    m.encoder.gated_mlp = False  # GEGLU rather than GELU
    m.encoder.anchors = False  # each latent has a learned place, and looks near it first
    m.encoder.anchor_width = 0.1  # of the narrowest Gaussian at the start, as a share of the image's side

    m.decoder = ConfigDict()
    m.decoder.num_layers = 1  # 0: the latents are the queries, and answer themselves
    m.decoder.self_attention = False  # among queries, before each cross-attention
    m.decoder.self_attention_value = "query"  # query (content + query position) | content
    m.decoder.residual = "none"  # around the cross-attention: none | content | query (content + query position)
    m.decoder.final_norm = False  # one LayerNorm shared by the outputs of all layers
    m.decoder.cross_heads = 1
    m.decoder.self_heads = 1
    m.decoder.mlp_ratio = 1.0
    m.decoder.dropout = 0.0  # self-attention probabilities, attention output and MLP output
    m.decoder.anchors = False  # each query has a learned place, and looks at the latents near it first
    m.decoder.anchor_width = 0.1
    return m
