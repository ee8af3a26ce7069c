r"""DePerceiver+: DePerceiver whose latents have places in the image, so that answers are local at a cost still linear.

    python train.py --config=configs/deperceiver_plus.py:r50_8 --workdir=runs/plus --config.data.directory=/data/coco

Ours, not published; docs/deperceiver_plus.md says what led to it and what was measured. No AP on COCO is known.
"""

from ml_collections import ConfigDict

from configs.base import base, resnet, resnext101

_STRIDES = {"16": (16,), "8": (8,), "multiscale": (8, 16, 32)}
_MODELS = ("r50_16", "r50_8", "r50_multiscale", "r101_multiscale", "x101_multiscale")
_EPOCHS = {"12ep": (12, 11), "24ep": (24, 20), "50ep": (50, 40)}  # those after the second are at a tenth
VARIANTS = (*_MODELS, *(f"{model}_{epochs}" for model in _MODELS for epochs in _EPOCHS))


def get_config(variant: str = "r50_multiscale") -> ConfigDict:
    """One of VARIANTS: backbone, strides of the tokens and, if not 50, epochs."""
    if variant not in VARIANTS:
        raise ValueError(f"configs/deperceiver_plus.py has no variant {variant!r}; it has {', '.join(VARIANTS)}.")
    net, scale, epochs = (*variant.split("_"), "50ep")[:3]
    config = base()
    config.model = model()
    config.model.backbone = resnext101() if net == "x101" else resnet(int(net[1:]))
    config.model.strides = _STRIDES[scale]

    config.loss.classification = "sigmoid_iou_aware"
    config.loss.weight_class = 2.0
    config.matcher.cost_class = 2.0
    config.optimizer.learning_rate = 2e-4
    config.train.num_epochs, drop = _EPOCHS[epochs]
    config.optimizer.drop_epochs = (drop,)
    return config


def model() -> ConfigDict:
    """The chosen parts on; each field below is one effect."""
    m = ConfigDict()
    m.name = "deperceiver_plus"
    m.num_classes = 91  # class slots; train.py sets it from the data set
    m.no_object_logit = False  # the focal loss asks of every class on its own
    m.num_queries = 300  # latents: each answers for one object
    m.embed_dim = 256  # width of tokens and latents
    m.dropout = 0.0
    m.strides = (8, 16, 32)  # of the maps whose cells are the tokens
    m.top_down = True  # deeper maps of the backbone are mixed into the finer ones
    m.neck_blocks = 2  # residual blocks of two 3x3 convolutions on each map, after mixing
    m.start = "proposals"  # proposals (the best tokens of the image) | learned (the same for every image)
    m.box_deltas = "scaled"  # scaled (by the box they move, as in R-CNN) | logits (as in Deformable DETR)

    m.backbone = resnet()

    m.denoising = ConfigDict()  # in training, noisy copies of each box that latents learn to correct (DN-DETR)
    m.denoising.copies = 2  # 0: none
    m.denoising.noise = 0.4  # at most: shares of the box for its centre, exponents for its sides

    m.decoder = ConfigDict()
    m.decoder.num_layers = 6
    m.decoder.num_heads = 8
    m.decoder.mlp_dim = 1024
    m.decoder.gaussian = True  # a latent looks around its box first
    m.decoder.separate_levels = False  # a softmax and a predicted weight for each level rather than one over all tokens
    m.decoder.refine = True  # each layer corrects the boxes of the one before
    m.decoder.look_forward_twice = True  # whose loss moves the deltas of the one before, too (DINO)
    m.decoder.least_width = 0.01  # half of a box counts as at least this share of the image in the Gaussians
    return m
