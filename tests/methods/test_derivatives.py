"""Derivatives of the update by the task gradients: those of finite differences, or a reason."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.cases import CASES, losses_of

NUM_TASKS, SIZE = 4, 6


def update_of(case):
    """The update as a function of a flat array of task gradients, all else given."""
    tx = case.surgery(NUM_TASKS)
    losses = losses_of(NUM_TASKS).astype("f8")

    def update(numbers):
        task_grads = numbers.reshape(NUM_TASKS, SIZE)
        given = {"gramian": task_grads @ task_grads.T} if case.needs_gramian else {}
        state = jax.lax.stop_gradient(tx.init(task_grads[0]))
        return tx.update(task_grads, state, losses=losses, **given)[0]

    return update


def directions(seed):
    random = np.random.default_rng(seed)
    task_grads = random.normal(size=NUM_TASKS * SIZE)
    return task_grads, random.normal(size=task_grads.shape)


@pytest.mark.parametrize("name", CASES)
def test_derivatives_are_those_of_finite_differences(name):
    probe = np.linspace(1, 2, SIZE)
    with jax.enable_x64(True):
        update = jax.jit(update_of(CASES[name]))
        for seed in range(2):
            task_grads, change = directions(seed)
            step = 1e-6
            expected = (update(task_grads + step * change) - update(task_grads - step * change)) / (
                2 * step
            )
            _, forward = jax.jvp(update, (task_grads,), (change,))
            scale = np.abs(expected).max()
            np.testing.assert_allclose(forward, expected, rtol=2e-5, atol=2e-5 * scale)
            gradient = jax.grad(lambda numbers: update(numbers) @ probe)(jnp.asarray(task_grads))
            np.testing.assert_allclose(
                gradient @ change, expected @ probe, rtol=2e-5, atol=2e-5 * scale
            )
