r"""DETR: end-to-end detection with a transformer.

Carion et al., "End-to-End Object Detection with Transformers" (arXiv:2005.12872), the recipe of its released code:

    python train.py --config=configs/detr.py:r50 --workdir=runs/detr_r50 --config.data.directory=/data/coco

300 epochs of COCO, learning rate dropped after 200. The released models (500 epochs, COCO val2017) have AP 42.0 (r50),
43.3 (r50_dc5), 43.5 (r101) and 44.9 (r101_dc5). The variants with _50ep drop the rate after 33 of 50 epochs: the
baseline of the DePerceiver paper, which reports AP 34.1 for r50_50ep. r50_dc5_plus is the DETR-DC5+ of Deformable
DETR's paper (arXiv:2010.04159, table 1), r50_dc5 with the focal loss and 300 queries: 36.2 after 50 epochs where
r50_dc5 has 35.3; when these dropped the rate is not told. All figures are the papers', not measured with this code.
"""

from ml_collections import ConfigDict

from configs.base import base, resnet

_BACKBONES = tuple(f"{net}{dilation}" for net in ("r50", "r101") for dilation in ("", "_dc5"))
_MODELS = (*_BACKBONES, "r50_dc5_plus")
VARIANTS = _MODELS + tuple(f"{model}_50ep" for model in _MODELS)


def get_config(variant: str = "r50") -> ConfigDict:
    """One of VARIANTS: a backbone, dilated or not, and the long or the short schedule; `plus` has the focal loss."""
    if variant not in VARIANTS:
        raise ValueError(f"configs/detr.py has no variant {variant!r}; it has {', '.join(VARIANTS)}.")
    config = base()
    config.model = model()
    config.model.backbone = resnet(101 if variant.startswith("r101") else 50)
    if "_dc5" in variant:
        config.model.backbone.dilation = True
        config.model.strides = (16,)
    if "_plus" in variant:
        config.model.num_queries = 300
        config.model.no_object_logit = False
        config.loss.classification = "sigmoid_focal"
        config.loss.weight_class = 2.0
        config.matcher.cost_class = 2.0
    # The official rule asks for "backbone" in the name, and its learned position tables are called backbone.1.
    config.optimizer.groups.backbone.pattern = r"^(backbone/|position/(row|column)$)"
    config.optimizer.groups.rest.pattern = r"^(?!backbone/|position/(row|column)$)"
    if variant.endswith("_50ep"):
        config.train.num_epochs = 50
        config.optimizer.drop_epochs = (33,)
    return config


def model() -> ConfigDict:
    """The published DETR; the ablations of its paper are other values of these fields (and of `config.loss`)."""
    m = ConfigDict()
    m.name = "detr"
    m.num_classes = 91  # class slots; train.py sets it from the data set
    m.no_object_logit = True  # one more logit after the class slots
    m.num_queries = 100
    m.embed_dim = 256  # width of tokens and queries
    m.dropout = 0.1  # attention probabilities, sublayer outputs, inside the MLP
    m.pre_norm = False  # norms before each sublayer rather than after each residual sum
    m.strides = (32,)  # of the one feature map that becomes tokens; 16 with dilation

    m.backbone = resnet()

    m.position = ConfigDict()
    m.position.encoding = "sine"  # sine | learned | fourier
    m.position.encoder = "attention"  # attention (queries and keys of every layer) | input (once, to the tokens) | none
    m.position.decoder = "attention"  # attention (keys of every layer) | input (once, to the memory) | none
    m.position.fourier_bands = 64
    m.position.learned_size = 50  # cells along a side that learned tables hold

    m.encoder = ConfigDict()
    m.encoder.num_layers = 6  # 0: the decoder looks at the projected features
    m.encoder.num_heads = 8
    m.encoder.mlp_dim = 2048  # 0: no MLP

    m.decoder = ConfigDict()
    m.decoder.num_layers = 6
    m.decoder.num_heads = 8
    m.decoder.mlp_dim = 2048  # 0: no MLP
    m.decoder.query_position = "attention"  # attention (queries and keys of every layer) | input (once, at the start)
    return m
