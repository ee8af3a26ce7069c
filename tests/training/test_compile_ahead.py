"""The step of every size, compiled before it is needed: the same numbers, compiled once, and whose error it was."""

import threading
from types import SimpleNamespace

import jax
import pytest

from deperceiver_jax.errors import UserError
from deperceiver_jax.training.compile_ahead import compile_sizes, order_for

BATCHES = SimpleNamespace(buckets=[(6, 4), (4, 6)], box_slots=2)
SIZE = 8  # images


def test_it_is_the_step_and_compiles_nothing_later(tiny, batch_of, same, capsys):
    run = tiny(2)
    ahead = compile_sizes(run.step, run.plan.abstract, BATCHES, SIZE, run.mesh)
    begun, *lines = capsys.readouterr().out.splitlines()
    assert begun == "compiling the step for 2 sizes"
    assert [line.split(" (")[0] for line in lines] == [f"compiled the step for {n}/2 sizes" for n in (1, 2)]
    assert {line.split("(")[1].split(")")[0] for line in lines} == {"6x4", "4x6"}

    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, seconds, **_: compiled.append(name) if name.endswith("backend_compile_duration") else None
    )
    state, metrics = run.plan.initialize(), []
    del compiled[:]
    for step, (height, width) in enumerate([(4, 6), (6, 4), (4, 6)]):
        state, found = ahead(state, batch_of(step, SIZE, height, width))
        metrics.append(found)
    assert compiled == [] and run.step._cache_size() == 0

    expected = run.plan.initialize()
    for step, (height, width) in enumerate([(4, 6), (6, 4), (4, 6)]):
        expected, numbers = run.step(expected, batch_of(step, SIZE, height, width))
        same(jax.device_get(numbers), jax.device_get(metrics[step]))
    same(jax.device_get(expected), jax.device_get(state))


class Broken:
    """A step of which the second size does not compile, while the first one waits for that to happen."""

    def __init__(self, error):
        self.error, self.failed, self.traced = error, threading.Event(), []

    def lower(self, state, batch):
        size = batch.image.shape[1:3]
        self.traced.append(size)
        return SimpleNamespace(compile=lambda: self.compile(size))

    def compile(self, size):
        if size == (4, 6):
            self.failed.set()
            raise self.error
        assert self.failed.wait(30)


def test_memory_that_is_too_small_is_a_sentence(tiny):
    run = tiny()
    error = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Used 20G of 16G hbm.\nMore.")
    sentence = r"for images of 4x6 does not fit into memory \(Used 20G of 16G hbm\): a smaller config.data.batch_size"
    with pytest.raises(UserError, match=sentence):
        compile_sizes(Broken(error), run.plan.abstract, BATCHES, SIZE, run.mesh, threads=2)


def test_any_other_error_names_the_size_and_stops_the_rest(tiny):
    run, broken = tiny(), Broken(ValueError("no such operation"))
    many = SimpleNamespace(buckets=[*BATCHES.buckets, *((8 + n, 8) for n in range(1, 500))], box_slots=2)
    with pytest.raises(ValueError, match="no such operation") as caught:
        compile_sizes(broken, run.plan.abstract, many, SIZE, run.mesh, threads=2)
    assert caught.value.__notes__ == ["While the training step was compiled for images of 4x6."]
    assert len(broken.traced) < 500
    assert not any(thread.name.startswith("compile") for thread in threading.enumerate())


def test_large_images_on_a_cpu_are_ordered_for_memory():
    """The option is one that XLA knows, and takes nothing from the result."""
    assert order_for((800, 1088), "tpu") == order_for((128, 128), "cpu") == {}
    options = order_for((800, 1088), "cpu")
    doubled = jax.jit(lambda x: 2 * x).lower(3.0).compile(**options)
    assert doubled(3.0) == 6.0
    with pytest.raises(jax.errors.JaxRuntimeError, match="CPU_SCHEDULER_TYPE_NONE"):
        jax.jit(lambda x: 3 * x).lower(3.0).compile(
            {name: "CPU_SCHEDULER_TYPE_NONE" for name in options["compiler_options"]}
        )
