"""Parameters, random gradients for them, and comparisons, for many tests."""

import jax
import jax.numpy as jnp
import numpy as np

NUM_TASKS = 4
PARAMS = {"dense": {"kernel": jnp.ones((5, 3)), "bias": jnp.ones(3)}, "scale": jnp.ones(())}


def task_gradients(num_tasks=NUM_TASKS, seed=0, params=PARAMS):
    generator = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(generator.normal(size=(num_tasks, *leaf.shape)), leaf.dtype),
        params,
    )


def same(left, right):
    return jax.tree.all(jax.tree.map(np.array_equal, left, right))


def described(tree):
    return jax.tree.map(lambda leaf: (jnp.shape(leaf), jnp.result_type(leaf)), tree)
