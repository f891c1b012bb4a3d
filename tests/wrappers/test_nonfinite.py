"""What is not finite: `on_nonfinite`."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_surgery as surgery
from tests.common import same
from tests.wrappers.cases import (
    LOSSES,
    NAN_ROW,
    NUM_TASKS,
    PARAMS,
    all_finite,
    assert_close,
    gradients,
    with_nan_row,
)

BAD_TASKS = {
    "a gradient": lambda g, losses: (jax.tree.map(lambda leaf: leaf.at[1].set(jnp.inf), g), losses),
    "a coordinate": lambda g, losses: ({**g, "head": g["head"].at[1].set(jnp.nan)}, losses),
    "a loss": lambda g, losses: (g, losses.at[1].set(jnp.nan)),
}
SURGERIES = {"famo": surgery.famo, "moco": surgery.moco, "gradvac": surgery.gradvac}


@pytest.mark.parametrize("name", SURGERIES)
def test_a_task_that_is_not_finite_is_masked_and_counted(name):
    chain = optax.chain(SURGERIES[name](NUM_TASKS), optax.adam(1e-2))
    tx = surgery.on_nonfinite(chain, "mask")
    guarded, plain = jax.jit(tx.update), jax.jit(chain.update)
    state, expected_state = tx.init(PARAMS), chain.init(PARAMS)
    spoil = dict(zip((1, 2, 4), BAD_TASKS.values(), strict=True))
    for number, task_grads in enumerate(gradients(5)):
        task_mask = jnp.ones(NUM_TASKS, bool).at[1].set(number not in spoil)
        expected, expected_state = plain(
            task_grads, expected_state, PARAMS, losses=LOSSES, task_mask=task_mask
        )
        losses = LOSSES
        if number in spoil:
            task_grads, losses = spoil[number](task_grads, losses)
        updates, state = guarded(task_grads, state, PARAMS, losses=losses)
        assert_close(updates, expected, 1e-5)
    assert_close(state.inner_state, expected_state, 1e-5)
    assert all_finite(state)
    assert (state.nonfinite_steps, state.nonfinite_tasks) == (3, 3)


def test_a_step_that_is_not_finite_is_skipped_and_counted():
    chain = optax.chain(surgery.moco(NUM_TASKS), optax.adam(1e-2))
    tx = surgery.on_nonfinite(chain, "skip")
    update = jax.jit(tx.update)
    first, second = gradients(2)
    _, state = update(first, tx.init(PARAMS), PARAMS, losses=LOSSES)
    for count, spoil in enumerate(BAD_TASKS.values(), start=1):
        bad, losses = spoil(second, LOSSES)
        updates, new_state = update(bad, state, PARAMS, losses=losses)
        assert_close(updates, optax.tree.zeros_like(PARAMS))
        assert same(new_state.inner_state, state.inner_state)
        assert (new_state.nonfinite_steps, new_state.nonfinite_tasks) == (count, count)
        state = new_state


def test_propagate_only_counts():
    chain = optax.chain(surgery.sum(), optax.adam(1e-2))
    tx, (task_grads,) = surgery.on_nonfinite(chain, "propagate"), gradients(1)
    updates, state = tx.update(with_nan_row(task_grads), tx.init(PARAMS), PARAMS)
    assert not all_finite(updates)
    assert (state.nonfinite_steps, state.nonfinite_tasks) == (1, 1)


@pytest.mark.parametrize("action", ["mask", "skip", "propagate"])
def test_finite_steps_are_as_without(action):
    chain = optax.chain(surgery.moco(NUM_TASKS), optax.adam(1e-2))
    tx, (task_grads,) = surgery.on_nonfinite(chain, action), gradients(1)
    updates, state = tx.update(task_grads, tx.init(PARAMS), PARAMS)
    assert_close(updates, chain.update(task_grads, chain.init(PARAMS), PARAMS)[0])
    assert (state.nonfinite_steps, state.nonfinite_tasks) == (0, 0)


@pytest.mark.parametrize("action", ["mask", "skip"])
def test_where_all_tasks_are_bad_the_step_is_skipped(action):
    chain = optax.chain(surgery.moco(NUM_TASKS), optax.adam(1e-2))
    tx, (first, second) = surgery.on_nonfinite(chain, action), gradients(2)
    _, state = tx.update(first, tx.init(PARAMS), PARAMS)
    nan = jax.tree.map(lambda leaf: leaf * jnp.nan, second)
    updates, new_state = jax.jit(tx.update)(nan, state, PARAMS)
    assert_close(updates, optax.tree.zeros_like(PARAMS))
    assert same(new_state.inner_state, state.inner_state)
    assert (new_state.nonfinite_steps, new_state.nonfinite_tasks) == (1, NUM_TASKS)


@pytest.mark.parametrize("action", ["mask", "skip", "propagate"])
def test_masked_tasks_are_not_counted(action):
    tx, (task_grads,) = surgery.on_nonfinite(surgery.pcgrad(), action), gradients(1)
    updates, state = tx.update(with_nan_row(task_grads), tx.init(PARAMS), task_mask=NAN_ROW)
    assert all_finite(updates)
    assert (state.nonfinite_steps, state.nonfinite_tasks) == (0, 0)


OVERFLOWS = {
    "a sum in float16": (surgery.sum(), jnp.float16, 60_000.0),
    "a square in Adam": (optax.chain(surgery.sum(), optax.adam(1e-2)), jnp.float32, 1e30),
}


@pytest.mark.parametrize("action", ["mask", "skip"])
@pytest.mark.parametrize("name", OVERFLOWS)
def test_finite_gradients_that_overflow_later_are_skipped(name, action):
    inner, dtype, size = OVERFLOWS[name]
    params = {"w": jnp.ones(4, dtype)}
    tx = surgery.on_nonfinite(inner, action)
    state = tx.init(params)
    task_grads = {"w": jnp.full((2, 4), size, dtype)}
    updates, new_state = jax.jit(tx.update)(task_grads, state, params)
    assert_close(updates, optax.tree.zeros_like(params))
    assert same(new_state.inner_state, state.inner_state)
    assert (new_state.nonfinite_steps, new_state.nonfinite_tasks) == (1, 0)


def test_infinities_that_a_state_begins_with_are_kept():
    plateau = optax.contrib.reduce_on_plateau()
    chain = optax.chain(surgery.sum(), optax.sgd(0.1), plateau)
    assert not all_finite(chain.init(PARAMS))
    tx, (task_grads,) = surgery.on_nonfinite(chain), gradients(1)
    updates, state = tx.update(task_grads, tx.init(PARAMS), PARAMS, value=1.0)
    assert_close(updates, jax.tree.map(lambda leaf: -0.1 * leaf.sum(axis=0), task_grads))
    assert state.nonfinite_steps == 0


def test_a_bad_micro_batch_is_left_out_of_the_average():
    tx = surgery.on_nonfinite(surgery.accumulate(surgery.sum(), 2, NUM_TASKS))
    first, second = gradients(2)
    _, state = tx.update(first, tx.init(PARAMS))
    updates, state = tx.update(with_nan_row(second), state)
    expected = jax.tree.map(
        lambda a, b: (a[0] + b[0]) / 2 + a[1] + (a[2] + b[2]) / 2, first, second
    )
    assert_close(updates, expected)


def test_a_gramian_that_is_not_finite_masks_its_task():
    tx = surgery.on_nonfinite(surgery.sum())
    gramian = jnp.eye(NUM_TASKS).at[1].set(jnp.nan).at[:, 1].set(jnp.nan)
    weights, state = tx.update(jnp.eye(NUM_TASKS), tx.init(jnp.zeros(3)), gramian=gramian)
    np.testing.assert_allclose(weights, [1.0, 0.0, 1.0])
    assert state.nonfinite_tasks == 1
