"""Small detectors for the built-in dataset, trained from scratch in minutes on two CPU cores.

    python train.py --config=configs/demo.py:deperceiver_plus --workdir=runs/demo

`make demo` runs this. The images are about 128 pixels a side, so everything is narrow; `deperceiver` here uses remedies
that the published model lacks: latents and queries with places, small initial latents, repeated input cross-attentions,
residuals, several heads, auxiliary losses and the focal loss.
"""

from ml_collections import ConfigDict

from configs import deformable_detr, deperceiver, deperceiver_plus, detr, smca
from configs.base import base

VARIANTS = ("deperceiver", "deperceiver_plus", "detr", "deformable_detr", "smca")


def get_config(variant: str = "deperceiver_plus") -> ConfigDict:
    """One of VARIANTS, at demo size."""
    if variant not in VARIANTS:
        raise ValueError(f"configs/demo.py has no variant {variant!r}; it has {', '.join(VARIANTS)}.")
    config = base()
    models = {
        "deperceiver": deperceiver_model,
        "deperceiver_plus": deperceiver_plus_model,
        "detr": detr_model,
        "deformable_detr": deformable_detr_model,
        "smca": smca_model,
    }
    config.model = models[variant]()
    config.model.no_object_logit = False
    config.model.backbone.update(depth=18, width=16, norm="group_norm", frozen_stages=0, weights="")

    config.data.name = "shapes"
    config.data.scales = (88, 96, 104, 112)
    config.data.max_size = 128
    config.data.crop_probability = 0.0
    config.data.eval_scale = 112
    config.data.eval_max_size = 152
    config.data.buckets = 1  # each further size takes longer to compile than it saves
    config.data.eval_buckets = 1
    config.data.num_workers = 0

    config.loss.classification = "sigmoid_iou_aware" if variant == "deperceiver_plus" else "sigmoid_focal"
    config.loss.weight_class = 2.0
    config.matcher.cost_class = 2.0
    config.optimizer.learning_rate = 2e-3 if variant == "deperceiver_plus" else 1e-3
    config.optimizer.groups.backbone.multiplier = 1.0  # nothing is pretrained
    config.optimizer.clip_norm = 1.0
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 100

    config.train.num_steps = 500 if variant == "deperceiver_plus" else 1600  # the others learn more slowly
    config.train.eval_every = -1
    config.train.checkpoint_every = 500
    config.eval.batch_size = 40
    return config


def deperceiver_model() -> ConfigDict:
    """DePerceiver with places: 64 latents read the image three times, 64 queries read the latents twice."""
    m = deperceiver.model()
    m.update(num_queries=64, embed_dim=128, relative_boxes=True, strides=(8,))
    m.position.use = "keys"
    m.encoder.update(
        num_latents=64,
        latent_dim=128,
        latent_init="truncated_normal",
        latent_scale=0.02,
        num_blocks=3,
        layers_per_block=1,
        share_blocks=False,
        num_cross_attentions=3,
        cross_heads=8,
        mlp_ratio=2.0,
        anchors=True,
        anchor_width=0.06,
    )
    m.decoder.update(
        num_layers=2,
        self_attention=True,
        self_attention_value="content",
        residual="content",
        final_norm=True,
        cross_heads=8,
        self_heads=8,
        mlp_ratio=2.0,
        anchors=True,
        anchor_width=0.06,
    )
    return m


def deperceiver_plus_model() -> ConfigDict:
    """DePerceiver+ on strides 8 and 16, three layers of 48 latents."""
    m = deperceiver_plus.model()
    m.update(num_queries=48, embed_dim=96, strides=(8, 16))
    m.neck_blocks = 0  # on two cores its convolutions would take a third of every step
    m.decoder.update(num_layers=3, num_heads=4, mlp_dim=256, least_width=0.03)
    return m


def detr_model() -> ConfigDict:
    """DETR at stride 16, two layers each. It needs many more steps than DePerceiver with places does."""
    m = detr.model()
    m.update(num_queries=64, embed_dim=128, dropout=0.0, strides=(16,))
    m.encoder.update(num_layers=2, mlp_dim=256)
    m.decoder.update(num_layers=2, mlp_dim=256)
    return m


def deformable_detr_model() -> ConfigDict:
    """Deformable DETR on strides 8 and 16, two layers each."""
    m = deformable_detr.model()
    m.update(num_queries=64, embed_dim=128, dropout=0.0, strides=(8, 16), extra_levels=0)
    m.encoder.update(num_layers=2, mlp_dim=256)
    m.decoder.update(num_layers=2, mlp_dim=256)
    return m


def smca_model() -> ConfigDict:
    """SMCA on strides 8, 16 and 32: one layer within each, one across, then two decoder layers."""
    m = smca.model()
    smca.multiscale(m)
    m.update(num_queries=64, embed_dim=128, dropout=0.0, strides=(8, 16))
    m.encoder.update(layout=("intra", "multi"), mlp_dim=256)
    m.decoder.update(num_layers=2, mlp_dim=256)
    return m
