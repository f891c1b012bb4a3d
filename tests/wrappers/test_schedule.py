"""When a surgery runs: `every` and `start_after`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_surgery as surgery
from tests.common import same
from tests.wrappers.cases import (
    LOSSES,
    NAN_ROW,
    NUM_TASKS,
    PARAMS,
    assert_close,
    gradients,
    with_nan_row,
)


def in_use(state):
    return state.weighting_state


def test_weights_are_found_once_in_k_steps():
    tx = surgery.every(surgery.pcgrad(), 3, NUM_TASKS)
    state, weights = tx.init(PARAMS), []
    steps = gradients(7)
    for number, task_grads in enumerate(steps):
        updates, state = jax.jit(tx.update)(task_grads, state, PARAMS)
        weights.append(in_use(state).weights_in_use)
        assert_close(updates, surgery.combine(weights[number // 3 * 3], task_grads), 1e-5)
        assert in_use(state).inner_state.surgery_step == number // 3 + 1
    assert same(weights[0], weights[2])
    assert not same(weights[2], weights[3])
    pcgrad = surgery.pcgrad()
    first, _ = pcgrad.update(steps[0], pcgrad.init(None))
    assert_close(first, surgery.combine(weights[0], steps[0]))


def test_the_gramian_is_in_a_branch_of_its_own():
    tx, (task_grads,) = surgery.every(surgery.pcgrad(), 3, NUM_TASKS), gradients(1)
    lowered = jax.jit(tx.update).lower(task_grads, tx.init(PARAMS)).as_text()
    (call,) = [line for line in lowered.splitlines() if "call @gramian_and_scale(" in line]
    assert " = func.call " in call  # within a region, which a call at the top level is not


def test_every_step_is_the_surgery():
    tx, famo = surgery.every(surgery.famo(NUM_TASKS), 1, NUM_TASKS), surgery.famo(NUM_TASKS)
    state, expected_state = tx.init(PARAMS), famo.init(PARAMS)
    for task_grads in gradients(3):
        updates, state = tx.update(task_grads, state, PARAMS, losses=LOSSES)
        expected, expected_state = famo.update(task_grads, expected_state, PARAMS, losses=LOSSES)
        assert_close(updates, expected)


def test_a_task_that_is_masked_at_renewal_keeps_its_weight():
    tx = surgery.every(surgery.constant(LOSSES), 2, NUM_TASKS)
    (task_grads,) = gradients(1)
    _, state = tx.update(task_grads, tx.init(PARAMS), task_mask=NAN_ROW)
    np.testing.assert_allclose(in_use(state).weights_in_use, [1.0, 0.0, 3.0])
    updates, state = tx.update(task_grads, state)
    assert_close(updates, surgery.combine(jnp.array([1.0, 0.0, 3.0]), task_grads))
    _, state = tx.update(task_grads, state)
    _, state = tx.update(task_grads, state)
    _, state = tx.update(with_nan_row(task_grads), state, task_mask=NAN_ROW)
    np.testing.assert_allclose(in_use(state).weights_in_use, LOSSES)


def test_every_needs_a_surgery_with_weights():
    tx = surgery.every(surgery.graddrop(), 2, NUM_TASKS)
    with pytest.raises(
        ValueError, match="Expected stacked gradients alone, got a Gramian at 'graddrop'"
    ):
        tx.update(*gradients(1), tx.init(PARAMS))


def test_weights_are_reused_in_surgery_value_and_grad():
    tx = surgery.every(surgery.pcgrad(), 2, 2)
    targets = jnp.array([[1.0, 0.0], [-1.0, 1.0]])
    fn = surgery.surgery_value_and_grad(lambda params, scale: scale * targets @ params, tx)
    state = tx.init(jnp.ones(2))
    _, state = fn(jnp.ones(2), state, jnp.ones((2, 1)))
    (_, second), state = fn(jnp.ones(2), state, jnp.array([[5.0], [1.0]]))
    np.testing.assert_allclose(
        second, jnp.array([5.0, 1.0]) * in_use(state).weights_in_use @ targets, atol=1e-6
    )


@pytest.mark.parametrize("name", ["on_nonfinite", "start_after", "every"])
def test_a_wrapped_surgery_of_the_identity_is_its_weights(name):
    make = {
        "on_nonfinite": lambda inner: surgery.on_nonfinite(inner),
        "start_after": lambda inner: surgery.start_after(inner, 0),
        "every": lambda inner: surgery.every(inner, 2, NUM_TASKS),
    }[name]
    tx, (task_grads,) = make(surgery.ntkmtl()), gradients(1)
    gramian = surgery.gramian(task_grads)
    weights, _ = tx.update(jnp.eye(NUM_TASKS), tx.init(None), gramian=gramian)
    updates, _ = tx.update(task_grads, tx.init(PARAMS), PARAMS)
    assert_close(surgery.combine(weights, task_grads), updates, 1e-5)


def test_the_mean_before_and_the_surgery_after():
    tx = surgery.start_after(surgery.gradvac(NUM_TASKS), 2)
    gradvac = surgery.gradvac(NUM_TASKS)
    state, expected_state = tx.init(PARAMS), gradvac.init(PARAMS)
    for number, task_grads in enumerate(gradients(4)):
        updates, state = jax.jit(tx.update)(task_grads, state, PARAMS)
        if number < 2:
            expected = jax.tree.map(lambda leaf: leaf.mean(axis=0), task_grads)
            assert same(state.inner_state, gradvac.init(PARAMS))
        else:
            expected, expected_state = gradvac.update(task_grads, expected_state)
            assert_close(state.inner_state, expected_state, 1e-5)
        assert_close(updates, expected, 1e-5)


def test_the_mean_before_is_that_of_the_tasks_with_data():
    tx, (task_grads,) = surgery.start_after(surgery.pcgrad(), 5), gradients(1)
    updates, _ = tx.update(with_nan_row(task_grads), tx.init(PARAMS), task_mask=NAN_ROW)
    assert_close(updates, jax.tree.map(lambda leaf: (leaf[0] + leaf[2]) / 2, task_grads))


def test_under_vmap_a_step_in_which_no_copy_renews_its_weights_finds_no_gramian():
    tx = surgery.every(surgery.pcgrad(), 2, NUM_TASKS)
    looks = []

    def step(task_grads, state):
        def gramian():
            jax.debug.callback(lambda: looks.append(1))
            return surgery.gramian(task_grads)

        return tx.update(task_grads, state, gramian=gramian)

    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *gradients(3))
    state = jax.vmap(lambda _: tx.init(PARAMS))(jnp.arange(3))
    looked = []
    for _ in range(4):
        _, state = jax.block_until_ready(jax.jit(jax.vmap(step))(stack, state))
        jax.effects_barrier()
        looked.append(len(looks))
        looks.clear()
    assert [bool(number) for number in looked] == [True, False, True, False]
