"""What the compilation cache keeps of a program that calls back to the host, as the `scipy` matcher does."""

import json
import os
import subprocess
import sys

import jax

PROGRAM = """
import json, os, sys
import jax, jax.numpy as jnp, numpy as np
from deperceiver_jax.losses.matcher import match
from deperceiver_jax.program.compilation_cache import keep_compiled
from deperceiver_jax.sharding import make_mesh

keep_compiled(sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
cost = jnp.asarray(np.random.default_rng(0).normal(size=(1, 2, 5, 3)), jnp.float32)

@jax.jit
def matched(cost):
    return match(cost, jnp.ones((2, 3), bool), backend="scipy", mesh=make_mesh())

query = np.asarray(matched(cost).query).tolist()
kept = [name for name in os.listdir(sys.argv[1]) if name.startswith("jit_matched-") and name.endswith("-cache")]
print(json.dumps([query, len(kept)]))
"""


def test_a_program_that_calls_the_host_is_kept_from_jax_0_11_on(tmp_path):
    """docs/devices.md says so. The second process gets the same answer, from the cache where there is one."""
    environment = os.environ | {"XLA_FLAGS": "", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    answers = []
    for _ in range(2):
        finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        assert not finished.returncode, finished.stderr[-2000:]
        answers.append(json.loads(finished.stdout))
    (first, kept), (second, kept_then) = answers
    assert first == second
    assert kept == kept_then == (jax.version.__version_info__ >= (0, 11))
