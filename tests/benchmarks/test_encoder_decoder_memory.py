"""The figure of the paper comes out of our models; the counter of matrix products, and the line, by hand."""

import jax
import jax.numpy as jnp
import pytest

from benchmarks.encoder_decoder_memory import PAPER, matrix_outputs, measure, r_squared, without


@pytest.mark.parametrize("model, stride", [("DETR", "32"), ("DETR", "16"), ("DePerceiver", "16")])
def test_the_papers_figure(model, stride):
    row = measure(model, "plain", (800, 800), stride)
    assert row["outputs"] == pytest.approx(PAPER[model][stride], rel=0.006)  # it was read from a drawing


def test_blocks_and_rematerialisation_keep_less():
    kept = [measure("DePerceiver", kind, (256, 256), "16")["kept"] for kind in ("plain", "rematerialised layers")]
    assert kept[1] < kept[0] / 10


def test_rematerialised_deperceiver_keeps_less_than_detr_at_its_best():
    ours, theirs = (measure(m, "rematerialised layers", (800, 800), "16")["kept"] for m in ("DePerceiver", "DETR"))
    assert ours < theirs


def test_products_in_loops_count_as_often_as_they_run():
    def program(x):
        return jax.lax.scan(lambda x, _: (jnp.tanh(x @ x), None), x @ x, length=3)[0]

    assert matrix_outputs(jax.make_jaxpr(program)(jnp.ones((4, 4)))) == 4 * 16


def test_parameters_are_not_counted():
    small, large = jax.ShapeDtypeStruct((2,), jnp.float32), jax.ShapeDtypeStruct((3,), jnp.float32)
    assert without([small, large, small], [small]) == [large, small]


def test_r_squared():
    assert r_squared([(1, 3), (2, 5), (4, 9)]) == pytest.approx(1)
    assert r_squared([(0, 0), (1, 1), (2, 0)]) == pytest.approx(0)
