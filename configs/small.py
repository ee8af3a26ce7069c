"""Detectors that are trained from nothing, on a folder of your own: some hundred to five thousand pictures.

    python train.py --config=configs/small.py:deperceiver_plus --workdir=runs/mine --config.data.directory=/data/mine

For whoever has no weights to start from. Pictures have 256 to 640 pixels a side, or are scaled to that. The backbone is
a ResNet-18 of half the width with group norm, all of it trained. 10,000 steps in batches of 8 are 100 epochs of 800
pictures; they want a GPU. Where there are published weights, starting from them needs fewer pictures:
docs/finetuning.md.

`deperceiver_plus_narrow` is for two CPU cores: at 320 pixels it learns a thousand photographs of circuit boards in half
an hour to two, and docs/experiments/real_objects.md says what to expect by minutes of training. The others are its like
made wider, and no AP was measured with them; take them as a start. DePerceiver+ and Deformable DETR have the optimizer
and rate that were best for narrow models, the rest AdamW and the rates of docs/experiments/rates.md.
"""

from ml_collections import ConfigDict

from configs import deformable_detr, demo, deperceiver_plus, detr, smca
from configs.base import base

VARIANTS = ("deperceiver_plus", "deperceiver_plus_narrow", "deformable_detr", "deperceiver", "smca", "detr")


def get_config(variant: str = "deperceiver_plus") -> ConfigDict:
    """One of VARIANTS, those first that learn fastest from few pictures."""
    if variant not in VARIANTS:
        raise ValueError(f"configs/small.py has no variant {variant!r}; it has {', '.join(VARIANTS)}.")
    if variant == "deperceiver_plus_narrow":
        return narrow()
    config = base()
    models = {
        "deperceiver_plus": deperceiver_plus_model,
        "deformable_detr": deformable_detr_model,
        "deperceiver": deperceiver_model,
        "smca": smca_model,
        "detr": detr_model,
    }
    config.model = models[variant]()
    config.model.update(num_queries=100, embed_dim=128, no_object_logit=False)
    config.model.backbone.update(depth=18, width=32, norm="group_norm", frozen_stages=0, weights="")

    config.data.batch_size = 8
    config.data.scales = (320, 352, 384, 416, 448)
    config.data.max_size = 640
    config.data.crop_scales = (320, 384, 448)
    config.data.crop_min = 256
    config.data.crop_max = 384
    config.data.buckets = 4
    config.data.eval_scale = 416
    config.data.eval_max_size = 640
    config.data.eval_buckets = 2

    config.loss.classification = "sigmoid_iou_aware" if variant == "deperceiver_plus" else "sigmoid_focal"
    config.loss.weight_class = 2.0
    config.matcher.cost_class = 2.0
    config.optimizer.learning_rate = 3e-4 if variant == "detr" else 1e-3
    if variant in ("deperceiver_plus", "deformable_detr"):
        config.optimizer.name = "muon"
        config.optimizer.learning_rate = 3e-3
    config.optimizer.groups.backbone.multiplier = 1.0  # nothing is pretrained
    config.optimizer.clip_norm = 1.0
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 200
    config.optimizer.ema_decay = 0.999

    config.train.num_steps = 10_000
    config.train.eval_every = 500
    config.train.checkpoint_every = 500
    config.train.patience = 8
    return config


def narrow() -> ConfigDict:
    """The demo's DePerceiver+ with blocks in its neck, for small objects at 320 pixels."""
    config = demo.get_config("deperceiver_plus")
    config.model.neck_blocks = 2
    config.model.decoder.least_width = 0.01  # half of most boxes is less than the demo's 0.03

    config.data.name = "coco_directory"
    config.data.batch_size = 2
    config.data.scales = (320,)
    config.data.max_size = 640
    config.data.eval_scale = 320
    config.data.eval_max_size = 640
    config.data.eval_buckets = 2

    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 2e-3

    config.train.num_steps = 14_000
    config.train.eval_every = 2000
    config.train.checkpoint_every = 1000
    return config


def deperceiver_plus_model() -> ConfigDict:
    """DePerceiver+ on strides 8 and 16, three layers."""
    m = deperceiver_plus.model()
    m.strides = (8, 16)
    m.decoder.update(num_layers=3, num_heads=4, mlp_dim=512)
    return m


def deformable_detr_model() -> ConfigDict:
    """Two-stage Deformable DETR with exact places on strides 8, 16 and 32, three layers each."""
    m = deformable_detr.model()
    m.update(refine=True, two_stage=True, places="pixels", extra_levels=0)
    m.encoder.update(num_layers=3, mlp_dim=512)
    m.decoder.update(num_layers=3, mlp_dim=512)
    return m


def deperceiver_model() -> ConfigDict:
    """DePerceiver with places, as in the demo, with more latents."""
    m = demo.deperceiver_model()
    m.encoder.num_latents = 128
    return m


def smca_model() -> ConfigDict:
    """SMCA on strides 16, 32 and 64: one layer within each, one across, then three decoder layers."""
    m = smca.model()
    smca.multiscale(m)
    m.encoder.update(layout=("intra", "multi"), mlp_dim=512)
    m.decoder.update(num_layers=3, mlp_dim=512)
    return m


def detr_model() -> ConfigDict:
    """DETR at stride 16, three layers each. It needs the longest training of all."""
    m = detr.model()
    m.strides = (16,)
    m.encoder.update(num_layers=3, mlp_dim=512)
    m.decoder.update(num_layers=3, mlp_dim=512)
    return m
