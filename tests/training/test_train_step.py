"""The step: against the same step written out, over devices, in parts, with averages and broken numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from deperceiver_jax.images import normalize_images
from deperceiver_jax.models.layers.by_platform import traced_for
from deperceiver_jax.training.train_step import accumulate, non_finite_term
from tests.meshes import mesh_on
from tests.training.conftest import Tiny


def assert_close(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), jax.device_get(a), jax.device_get(b))


def test_the_step_is_the_one_written_out(tiny, batch_of):
    """Loss, gradient norm, rate and new parameters of one step without dropout."""
    run = tiny(dropout=0.0, clip_norm=0.1, learning_rate=1e-2)
    state, batch = run.plan.initialize(), batch_of(0)

    def total(params):
        detector = run.plan.skeleton.merge({**state.frozen, **params})
        boxes = detector(*normalize_images(jnp.asarray(batch.image), jnp.asarray(batch.size)))
        error = ((boxes.boxes[0, :, 0] - batch.boxes[:, 0]) ** 2).sum(-1)[batch.box_valid[:, 0]].sum()
        return 5.0 * error / batch.box_valid.sum() + (boxes.logits**2).sum() / 8

    loss, gradients = jax.device_get(jax.jit(jax.value_and_grad(total))(state.params))
    params = jax.device_get(state.params)
    norm = np.sqrt(sum(np.square(g).sum() for g in gradients.values()))
    decayed = {}
    for path, g in gradients.items():  # the first Adam step is the gradient over its size
        g = g * min(1.0, 0.1 / (norm + 1e-6))
        rate = 1e-3 if path.startswith("backbone") else 1e-2
        decayed[path] = params[path] - rate * (g / (np.abs(g) + 1e-8) + 1e-4 * params[path])
    new, metrics = run.step(state, batch)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], 5.0 * metrics["loss_bbox"] + metrics["loss_logit"], rtol=1e-6)
    assert metrics["lr"] == np.float32(1e-2)
    assert new.step == 1
    assert_close(new.params, decayed, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("devices", "backend"), [(8, "scipy"), (8, "device")])
def test_eight_devices_equal_one(tiny, devices, backend):
    """With dropout, with images without boxes, and matched by each device for itself."""
    settings = dict(ema_decay=0.9, learning_rate=1e-2, queries=3)
    assert_same_training(on_one_device(**settings), tiny(devices, backend=backend, **settings))


@pytest.mark.parametrize("backend", ["", "scipy", "device"])
def test_parts_add_up_to_the_whole(tiny, backend):
    """Some parts of these batches have no boxes; all are normalised by the boxes of the whole batch."""
    settings = dict(dropout=0.0, learning_rate=1e-2, queries=3)
    one = on_one_device(backend=backend and "scipy", **settings)
    assert_same_training(one, tiny(2, accumulate_steps=4, backend=backend, **settings))


@pytest.mark.parametrize(("platform", "loops"), [("cpu", False), ("tpu", True)])
def test_parts_are_a_loop_but_on_cpus(platform, loops, batch_of):
    """Of the platform that is compiled for: preflight compiles for TPUs on a CPU."""

    def gradient_of_part(params, part, index):
        return (params["a"], {}), params

    @traced_for(mesh_on(platform))
    def whole(params, batch):
        return accumulate(gradient_of_part, params, jax.tree.map(lambda x: x[:, None], batch))

    program = jax.make_jaxpr(whole)({"a": 1.0}, batch_of(0))
    (scan,) = (equation for equation in program.eqns if equation.primitive.name == "scan")
    assert (scan.params["length"], scan.params["unroll"]) == (8, 1 if loops else 8)


@functools.cache
def on_one_device(backend="scipy", **settings):
    """(the state, the metrics of every step) after three steps."""
    run = Tiny(1, backend=backend, **settings)
    return jax.device_get(run.train(run.plan.initialize(), 0, 3))


def assert_same_training(one, other):
    a, rows_a = one
    b, rows_b = other.train(other.plan.initialize(), 0, 3)
    for row_a, row_b in zip(rows_a, rows_b, strict=True):
        row_b |= {"class_error": row_a["class_error"]} if "class_error" in row_a else {}  # a mean over parts of means
        assert_close(row_a, row_b, rtol=1e-4, atol=1e-6)
    assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_one_compile_serves_all_steps(tiny):
    run = tiny(2, ema_decay=0.9)
    run.train(run.plan.initialize(), 0, 3)
    assert run.step._cache_size() == 1


def test_dropout_depends_on_the_step_alone(tiny, batch_of, same):
    run = tiny()
    first = jax.device_get(run.step(run.plan.initialize(), batch_of(0))[1])
    again = jax.device_get(run.step(run.plan.initialize(), batch_of(0))[1])
    same(first, again)
    later = run.plan.initialize()._replace(step=jax.device_put(jnp.int32(5), run.plan.abstract.step.sharding))
    assert run.step(later, batch_of(0))[1]["loss"] != first["loss"]


def test_the_average_follows_the_parameters(tiny):
    run = tiny(ema_decay=0.75, learning_rate=1e-2)
    start = jax.device_get(run.plan.initialize().params)
    middle, _ = run.train(run.plan.initialize(), 0, 1)
    one = jax.device_get(middle)
    two, _ = run.train(middle, 1, 2)
    expected = {path: 0.75 * (0.75 * start[path] + 0.25 * one.params[path]) for path in start}
    expected = {path: x + 0.25 * two.params[path] for path, x in expected.items()}
    assert_close(two.ema, expected, rtol=1e-5, atol=1e-7)


def test_the_first_broken_term_is_named(tiny, batch_of):
    run = tiny()
    state = run.plan.initialize()
    broken = batch_of(0)
    broken.boxes[:, 0] = np.nan
    _, metrics = run.step(state, broken)
    metrics = {name: float(value) for name, value in jax.device_get(metrics).items()}
    assert np.isfinite(metrics["loss_logit"])
    assert non_finite_term(metrics) == "loss_bbox"
    assert non_finite_term({"loss": 1.0, "grad_norm": float("inf"), "lr": 0.1}) == "grad_norm"
    assert non_finite_term({"loss": 1.0, "grad_norm": 0.0}) is None


def test_optimizer_state_counts_with_the_step(tiny):
    run = tiny()
    state, _ = run.train(run.plan.initialize(), 0, 2)
    counts = [s.count for s in state.opt_state if isinstance(s, (optax.ScaleByAdamState, optax.ScaleByScheduleState))]
    assert [int(count) for count in counts] == [2, 2] and int(state.step) == 2
