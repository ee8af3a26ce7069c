"""A config that trains in seconds: a small DePerceiver on the ten images of the `rectangles` fixture."""

from ml_collections import ConfigDict

from configs.deperceiver import get_config as deperceiver


def get_config() -> ConfigDict:
    """`data.directory`, `data.prepared_directory` and `train.compilation_cache` are for the test to set."""
    config = deperceiver("r50_16")
    data = config.data
    data.train_split = "validation"  # the fixture has no other
    data.batch_size, data.num_workers, data.buckets, data.eval_buckets = 4, 0, 1, 1
    data.scales, data.max_size, data.eval_scale, data.eval_max_size = (48, 64), 96, 64, 96
    data.crop_scales, data.crop_min, data.crop_max = (48, 56), 32, 64
    model = config.model
    model.backbone.update(depth=18, width=8, norm="group_norm", frozen_stages=0, weights="")
    model.update(strides=(8,), embed_dim=32, num_queries=5, dropout=0.1)
    model.encoder.update(num_latents=8, latent_dim=32, num_blocks=1, layers_per_block=1, self_heads=2)
    config.matcher.backend = "device"  # compiled code that calls back to Python is not kept by the compilation cache
    config.optimizer.ema_decay = 0.9
    config.optimizer.learning_rate = 1e-3
    config.train.update(num_steps=6, log_every=4, eval_every=-1, checkpoint_every=3)
    return config
