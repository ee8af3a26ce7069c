r"""Deformable DETR: transformers that look at a few points of several feature maps.

Zhu et al., "Deformable DETR: Deformable Transformers for End-to-End Object Detection" (arXiv:2010.04159), the recipe of
its released code:

    python train.py --config=configs/deformable_detr.py:r50 --workdir=runs/deformable \
        --config.data.directory=/data/coco

50 epochs of COCO in batches of 32, learning rate dropped after 40. The released models (COCO val2017) have AP 39.4
(r50_single_scale), 41.5 (r50_single_scale_dc5), 44.5 (r50), 46.2 (r50_refine) and 46.9 (r50_two_stage). On test-dev the
paper has 48.7 (r101_two_stage), 49.0 (x101_two_stage, a ResNeXt-101 64x4d) and 50.1 (x101_dcn_two_stage, the same with
deformable convolutions). SMCA's paper (arXiv:2101.07448) quotes 45.3 for r50_150ep, not when its rate drops; here that
is after the same share of it, 120 epochs. All figures are the authors', not measured with this code.
"""

from ml_collections import ConfigDict

from configs.base import base, resnet, resnext101

_RELEASED = ("r50_single_scale", "r50_single_scale_dc5", "r50", "r50_refine", "r50_two_stage")
VARIANTS = (*_RELEASED, "r101_two_stage", "x101_two_stage", "x101_dcn_two_stage", "r50_150ep")


def get_config(variant: str = "r50") -> ConfigDict:
    """One of VARIANTS: one level or four, boxes refined layer by layer or not, queries learned or proposed."""
    if variant not in VARIANTS:
        raise ValueError(f"configs/deformable_detr.py has no variant {variant!r}; it has {', '.join(VARIANTS)}.")
    config = base()
    config.model = model()
    if variant.startswith("r50_single_scale"):
        config.model.strides = (32,)
        config.model.extra_levels = 0
    config.model.backbone = resnext101() if variant.startswith("x101") else resnet(int(variant[1:].split("_")[0]))
    if variant == "r50_single_scale_dc5":
        config.model.strides = (16,)
        config.model.backbone.dilation = True
    if "_dcn" in variant:
        config.model.backbone.deformable_stages = 3
    config.model.two_stage = variant.endswith("_two_stage")
    config.model.refine = config.model.two_stage or variant == "r50_refine"

    config.data.batch_size = 32
    config.loss.classification = "sigmoid_focal"
    config.loss.weight_class = 2.0
    config.matcher.cost_class = 2.0
    config.optimizer.learning_rate = 2e-4
    long = variant.endswith("_150ep")
    config.optimizer.drop_epochs = (120,) if long else (40,)
    config.optimizer.groups = ConfigDict(
        {
            "backbone": {"pattern": r"^backbone/", "multiplier": 0.1},
            "points": {"pattern": r"(^|/)(reference_points|sampling_offsets)/", "multiplier": 0.1},
            "rest": {"pattern": r"^(?!backbone/)(?!(.*/)?(reference_points|sampling_offsets)/)", "multiplier": 1.0},
        }
    )
    config.train.num_epochs = 150 if long else 50
    return config


def model() -> ConfigDict:
    """The published multi-scale model without refinement; the paper's ablations are other values of these fields."""
    m = ConfigDict()
    m.name = "deformable_detr"
    m.num_classes = 91  # class slots; train.py sets it from the data set
    m.no_object_logit = False  # the focal loss asks of every class on its own
    m.num_queries = 300  # and proposals, with two stages
    m.embed_dim = 256  # width of tokens and queries; a multiple of 32
    m.dropout = 0.1  # attention probabilities among queries, sublayer outputs, inside the MLP
    m.refine = False  # each decoder layer corrects the boxes of the one before
    m.two_stage = False  # the best proposals of the encoder are the queries; needs refine
    m.places = "cells"  # of tokens, as shares of: cells (whole ones, as released) | pixels (exact, as boxes are)
    m.strides = (8, 16, 32)  # of the backbone's feature maps that become levels
    m.extra_levels = 1  # further levels, each of half the size, below the last
    m.neck = "none"  # none | fpn | bifpn: what mixes the backbone's maps before they become levels
    m.neck_layers = 3  # of a bifpn

    m.backbone = resnet()

    m.encoder = ConfigDict()
    m.encoder.num_layers = 6
    m.encoder.num_heads = 8
    m.encoder.num_points = 4  # of each head and level
    m.encoder.across_levels = True  # False: a token looks at its own level alone; queries look at all of them anyway
    m.encoder.sampling = "auto"  # how points are read: gather, or auto: a kernel on TPUs, else gather
    m.encoder.mlp_dim = 1024

    m.decoder = ConfigDict()
    m.decoder.num_layers = 6
    m.decoder.num_heads = 8
    m.decoder.num_points = 4
    m.decoder.sampling = "auto"
    m.decoder.mlp_dim = 1024
    return m
