"""Surgery in groups of leaves, for many seeds at once, ends: no library's threads hang."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import sys
import jax, jax.numpy as jnp
import optax_surgery as surgery

num_tasks, method = int(sys.argv[1]), getattr(surgery, sys.argv[2])
keys = jax.random.split(jax.random.key(0), 16)
task_grads = {str(i): jax.random.normal(keys[i], (16, num_tasks, 40)) for i in range(16)}
tx = surgery.leafwise(method())
step = jax.jit(jax.vmap(lambda grads: tx.update(grads, tx.init(grads))[0]))
for _ in range(100):
    updates = jax.block_until_ready(step(task_grads))
assert all(jnp.isfinite(leaf).all() for leaf in updates.values())
"""


@pytest.mark.parametrize(
    ("num_tasks", "method"), [(4, "aligned_mtl"), (32, "aligned_mtl"), (16, "mgda")]
)
def test_many_groups_of_many_lanes_end(num_tasks, method):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "OPENBLAS_NUM_THREADS": "2"}
    environment.pop("XLA_FLAGS", None)  # as users run it, and faster
    subprocess.run(
        [sys.executable, "-c", PROGRAM, str(num_tasks), method],
        check=True,
        timeout=120,
        env=environment,
    )
