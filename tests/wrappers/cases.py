"""The one table of wrappers, and what its tests share: a tree of parameters, gradients, steps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_surgery as surgery
from tests.common import task_gradients

NUM_TASKS = 3
PARAMS = {"trunk": {"kernel": jnp.ones((5, 3)), "bias": jnp.ones(3)}, "head": jnp.ones(())}
LOSSES = jnp.array([1.0, 2.0, 3.0])
NAN_ROW = jnp.array([True, False, True])


def in_trunk(path):
    return path.startswith("trunk")


def module(path):
    return path.split("/")[0]


def clip():
    return optax.clip_by_global_norm(1.0)


def all_at_once(num_tasks):
    inner = surgery.normalize_tasks(surgery.pcgrad(), "ema", num_tasks)
    inner = surgery.monitor(num_tasks, surgery.clip_tasks(inner, 1.0))
    inner = surgery.start_after(surgery.every(inner, 2, num_tasks), 1)
    inner = surgery.on_tasks(surgery.on_shared(inner, in_trunk), range(num_tasks))
    chain = optax.chain(surgery.per_task(clip(), num_tasks), inner, optax.adam(1e-2))
    return surgery.on_nonfinite(surgery.accumulate(chain, 2, num_tasks))


# From T to a wrapper of a surgery or of a chain.
WRAPPERS = {
    "monitor": lambda num: surgery.monitor(num, surgery.famo(num)),
    "monitor, before": lambda num: optax.chain(surgery.monitor(num), surgery.pcgrad()),
    "leafwise": lambda num: surgery.leafwise(surgery.pcgrad()),
    "leafwise by group": lambda num: surgery.leafwise(surgery.moco(num), module),
    "on_shared": lambda num: surgery.on_shared(surgery.moco(num), in_trunk),
    "on_shared, weighted": lambda num: surgery.on_shared(surgery.famo(num), in_trunk, "weighted"),
    "on_tasks": lambda num: surgery.on_tasks(surgery.gradvac(num), range(num)),
    "per_task": lambda num: optax.chain(
        surgery.per_task(optax.scale_by_adam(), num), surgery.pcgrad()
    ),
    "normalize_tasks, l2": lambda num: surgery.normalize_tasks(surgery.pcgrad()),
    "normalize_tasks, ema": lambda num: surgery.normalize_tasks(surgery.pcgrad(), "ema", num),
    "clip_tasks": lambda num: surgery.clip_tasks(surgery.pcgrad(), 1.0),
    "every": lambda num: surgery.every(surgery.famo(num), 3, num),
    "start_after": lambda num: surgery.start_after(surgery.gradvac(num), 2),
    "accumulate": lambda num: surgery.accumulate(
        optax.chain(surgery.famo(num), optax.adam(1e-2)), 2, num
    ),
    "on_nonfinite, mask": lambda num: surgery.on_nonfinite(
        optax.chain(surgery.moco(num), optax.adam(1e-2)), "mask"
    ),
    "on_nonfinite, skip": lambda num: surgery.on_nonfinite(
        optax.chain(surgery.famo(num), optax.trace(0.9)), "skip"
    ),
    "on_nonfinite, propagate": lambda num: surgery.on_nonfinite(
        optax.chain(surgery.famo(num), optax.trace(0.9)), "propagate"
    ),
    "all at once": all_at_once,
}
every_wrapper = pytest.mark.parametrize("name", WRAPPERS)


@functools.cache
def transformation(name):
    return WRAPPERS[name](NUM_TASKS)


@functools.cache
def compiled(name):
    """A step of a chain with a gradient step at its end, compiled once in the whole run."""
    tx = transformation(name)

    def step(params, state, task_grads, **extra_args):
        updates, state = tx.update(task_grads, state, params, **extra_args)
        return jax.tree.map(lambda param, update: param - 0.1 * update, params, updates), state

    return jax.jit(step)


def run(name, steps, **extra_args):
    params, state = PARAMS, transformation(name).init(PARAMS)
    for task_grads in steps:
        params, state = compiled(name)(params, state, task_grads, **extra_args)
    return params, state


def gradients(num_steps, seed=0):
    return [task_gradients(NUM_TASKS, seed=seed + i, params=PARAMS) for i in range(num_steps)]


def stack(trees):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def scaled(task_grads, factors):
    """The gradient of each task times its factor."""
    return jax.tree.map(
        lambda leaf: leaf * jnp.reshape(factors, (-1, *[1] * (leaf.ndim - 1))), task_grads
    )


def with_nan_row(task_grads, task=1):
    return jax.tree.map(lambda leaf: leaf.at[task].set(jnp.nan), task_grads)


def all_finite(tree):
    return all(np.isfinite(np.asarray(leaf, float)).all() for leaf in jax.tree.leaves(tree))


def assert_close(left, right, atol=1e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol, rtol=0), left, right)
