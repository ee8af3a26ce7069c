"""A detector of two layers, a loss that is easy to differentiate by hand, and batches for them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from ml_collections import ConfigDict

from configs.base import base
from deperceiver_jax.models.layers.initializers import lecun_normal, zeros
from deperceiver_jax.sharding import make_mesh
from deperceiver_jax.structures import Batch, Predictions
from deperceiver_jax.training.build import build_training


class Fixed(nnx.Variable):
    """Not an nnx.Param: never trained."""


class TinyDetector(nnx.Module):
    """Mean colour -> a hidden layer with dropout -> two logits and a box for each query."""

    def __init__(self, *, rngs: nnx.Rngs, width: int, dropout: float, queries: int):
        start = dict(kernel_init=lecun_normal(), bias_init=zeros)
        self.backbone = nnx.Linear(3, width, **start, rngs=rngs)
        self.head = nnx.Linear(width, 6 * queries, **start, rngs=rngs)
        self.gain = nnx.Param(jnp.full((width,), 1.0))  # weakly typed
        self.scale = Fixed(jnp.full((3,), 2.0))
        self.dropout = dropout

    def __call__(self, image, pixel_valid, *, targets=None, dropout_key=None):
        del targets
        x = (image * self.scale[...][None, None, None, :]).mean((1, 2))
        x = jnp.tanh(self.backbone(x)) * self.gain[...][None]
        if dropout_key is not None:
            x = jnp.where(jax.random.bernoulli(dropout_key, self.dropout, x.shape), 0.0, x)
        answer = self.head(x).reshape(1, x.shape[0], -1, 6)
        return Predictions(logits=answer[..., :2], boxes=jax.nn.sigmoid(answer[..., 2:]))


def tiny_loss(predictions, batch, *, whole):
    """Squared error of every query to the image's first box, over the number of boxes in `whole`."""
    error = jnp.square(predictions.boxes - batch.boxes[None, :, :1]).sum((0, 2, 3))
    bbox = jnp.where(batch.box_valid[:, 0], error, 0.0).sum() / jnp.maximum(whole.box_valid.sum(), 1)
    logit = jnp.square(predictions.logits).sum() / whole.labels.shape[0]
    return 5.0 * bbox + logit, {"loss_bbox": bbox, "loss_logit": logit}


def tiny_batch(seed: int, size: int = 8, height: int = 6, width: int = 4) -> Batch:
    rng = np.random.default_rng(seed)
    count = rng.integers(0, 3, size)
    return Batch(
        image=rng.integers(0, 256, (size, height, width, 3), np.uint8),
        size=np.full((size, 2), (height, width), np.int32),
        original_size=np.full((size, 2), (height, width), np.int32),
        example=np.arange(size, dtype=np.int32),
        boxes=rng.random((size, 2, 4), np.float32),
        labels=np.zeros((size, 2), np.int32),
        box_valid=np.arange(2)[None] < count[:, None],
    )


class Tiny:
    """The tiny detector, planned and with its step, on a mesh of `devices`; with `backend`, its loss is set_loss."""

    def __init__(
        self,
        devices: int = 1,
        *,
        width: int = 8,
        dropout: float = 0.5,
        queries: int = 1,
        backend: str = "",
        **optimizer,
    ):
        self.config = base()
        self.config.data.batch_size = 8
        for name, value in optimizer.items():
            self.config.optimizer[name] = value
        self.mesh = make_mesh(devices=jax.devices()[:devices])
        if backend:
            self.config.model = ConfigDict({"num_classes": 1})
            self.config.matcher.backend = backend
        self.plan, _, _, self.step = build_training(
            self.config,
            self.mesh,
            steps_per_epoch=10,
            num_steps=100,
            detector=lambda rngs: TinyDetector(rngs=rngs, width=width, dropout=dropout, queries=queries),
            loss=None if backend else tiny_loss,
        )

    def train(self, state, first: int, last: int):
        """Steps `first`..`last` - 1, each on its own batch -> (state, metrics of all)."""
        rows = []
        for i in range(first, last):
            state, metrics = self.step(state, tiny_batch(i))
            rows.append(jax.device_get(metrics))
        return state, rows


@pytest.fixture(scope="session")
def tiny():
    return Tiny


@pytest.fixture
def batch_of():
    return tiny_batch


@pytest.fixture
def same():
    """Holds two pytrees equal, bit by bit."""

    def check(a, b):
        assert jax.tree.structure(a) == jax.tree.structure(b)
        for path, (x, y) in zip(
            jax.tree.leaves_with_path(a), zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True), strict=True
        ):
            np.testing.assert_array_equal(x, y, err_msg=str(path[0]))

    return check
