"""The config of the run in golden/stored_0_1_0: a narrow SMCA of three scales on the `rectangles` fixture."""

from ml_collections import ConfigDict

from configs.smca import get_config as smca


def get_config() -> ConfigDict:
    """`data.directory`, `data.prepared_directory` and `train.compilation_cache` are for the test to set."""
    config = smca("r50_multiscale")
    data = config.data
    data.train_split = "validation"  # the fixture has no other
    data.batch_size, data.num_workers, data.buckets, data.eval_buckets = 8, 0, 1, 1
    data.scales, data.max_size, data.eval_scale, data.eval_max_size = (64,), 96, 64, 96
    data.crop_probability = 0.0
    model = config.model
    model.backbone.update(depth=18, width=2, frozen_stages=0)
    model.update(strides=(8, 16), embed_dim=8, num_queries=5)
    model.encoder.update(layout=("intra", "multi"), num_heads=2, mlp_dim=8)
    model.decoder.update(num_layers=1, num_heads=2, mlp_dim=8)
    config.matcher.backend = "device"
    config.optimizer.ema_decay = 0.5
    config.optimizer.learning_rate = 1e-3
    config.train.update(num_steps=2, log_every=1, eval_every=-1, checkpoint_every=2)
    return config
