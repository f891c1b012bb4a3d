"""Micro-batches: `accumulate`."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_surgery as surgery
from tests.common import same
from tests.wrappers.cases import NUM_TASKS, PARAMS, all_finite, assert_close, gradients


def regression(num_examples=24):
    """Losses of three tasks on a linear model, their data, and a mask of examples."""
    generator = np.random.default_rng(0)
    inputs = jnp.asarray(generator.normal(size=(num_examples, 5)), "f4")
    targets = jnp.asarray(generator.normal(size=(num_examples, 3)), "f4")

    def losses_fn(params, inputs, targets):
        predictions = jnp.tanh(inputs @ params["trunk"]["kernel"]) * params["head"]
        return jnp.mean((predictions + params["trunk"]["bias"][None] - targets) ** 2, axis=0)

    return losses_fn, inputs, targets


@pytest.mark.parametrize("make", [surgery.pcgrad, lambda: surgery.famo(NUM_TASKS)])
def test_k_micro_batches_equal_one_big_batch_under_scan(make):
    losses_fn, inputs, targets = regression()
    value_and_grad = surgery.task_value_and_grad(losses_fn)
    num_updates, k, size = 2, 3, 4
    chain = optax.chain(make(), optax.adam(1e-2))

    def train(tx, params, batches):
        def step(carry, batch):
            params, state = carry
            losses, task_grads = value_and_grad(params, *batch)
            updates, state = tx.update(task_grads, state, params, losses=losses)
            return (optax.apply_updates(params, updates), state), params

        carry, history = jax.lax.scan(step, (params, tx.init(params)), batches)
        return carry, history

    big = [data.reshape(num_updates, k * size, -1) for data in (inputs, targets)]
    micro = [data.reshape(num_updates * k, size, -1) for data in (inputs, targets)]
    (expected, expected_state), _ = train(chain, PARAMS, big)
    tx = surgery.accumulate(chain, k, NUM_TASKS)
    (params, state), history = train(tx, PARAMS, micro)
    assert_close(params, expected)
    assert_close(state.inner_state, expected_state)
    assert state.inner_state[0].surgery_step == num_updates  # once in k
    assert optax.tree.get(state, "count") == num_updates
    for start in (0, k):  # parameters rest between two updates
        window = jax.tree.map(lambda leaf, s=start: leaf[s : s + k], history)
        assert same(window, jax.tree.map(lambda leaf: jnp.stack([leaf[0]] * k), window))


def test_a_task_is_averaged_over_the_micro_batches_in_which_it_takes_part():
    masks = jnp.array([[True, True, False], [True, False, False], [False, True, False]])
    seen = []

    def look(task_updates, state, params=None, *, losses, task_mask, **extra_args):
        seen.append((task_updates, losses, task_mask, extra_args))
        return surgery.sum().update(task_updates, state, task_mask=task_mask)

    inner = optax.GradientTransformationExtraArgs(surgery.sum().init, look)
    tx = surgery.accumulate(inner, 3, NUM_TASKS)
    state, steps = tx.init(PARAMS), gradients(3)
    losses = jnp.arange(9.0).reshape(3, 3)
    for number, task_grads in enumerate(steps):
        mask = masks[number]
        nan = jax.tree.map(
            lambda leaf, mask=mask: jnp.where(
                mask.reshape(NUM_TASKS, *[1] * (leaf.ndim - 1)), leaf, jnp.nan
            ),
            task_grads,
        )
        step_losses = jnp.where(mask, losses[number], jnp.nan)
        extra = {"losses": step_losses, "task_mask": mask, "value": number}
        updates, state = tx.update(nan, state, PARAMS, **extra)
        assert state.ready == (number == 2)
        assert state.micro_step == (number + 1) % 3
    averages, mean_losses, mask, extra = seen[-1]
    first, second, third = steps
    expected = jax.tree.map(
        lambda a, b, c: jnp.stack([(a[0] + b[0]) / 2, (a[1] + c[1]) / 2]), first, second, third
    )
    assert_close(jax.tree.map(lambda leaf: leaf[:2], averages), expected)
    np.testing.assert_allclose(mean_losses[:2], [(0 + 3) / 2, (1 + 7) / 2])
    np.testing.assert_array_equal(mask, [True, True, False])
    assert extra == {"value": 2}
    assert_close(updates, jax.tree.map(lambda leaf: leaf.sum(axis=0), expected))
    assert all_finite(state)


def test_the_next_window_starts_afresh():
    tx = surgery.accumulate(surgery.sum(), 2, NUM_TASKS)
    state = tx.init(PARAMS)
    inf = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.inf), gradients(1)[0])
    for _ in range(2):
        _, state = jax.jit(tx.update)(inf, state)
    first, second = gradients(2)
    _, state = jax.jit(tx.update)(first, state)
    updates, state = jax.jit(tx.update)(second, state)
    assert_close(updates, jax.tree.map(lambda a, b: (a + b).sum(axis=0) / 2, first, second))


def test_averages_are_in_float32_for_low_precision():
    params = {"w": jnp.ones(4, jnp.bfloat16)}
    tx = surgery.accumulate(surgery.sum(), 300, 2)
    state = tx.init(params)
    assert state.averages["w"].dtype == jnp.float32
    task_grads = {"w": jnp.ones((2, 4), jnp.bfloat16)}

    def step(state, scale):
        updates, state = tx.update({"w": task_grads["w"] * scale}, state, params)
        return state, updates

    scales = jnp.linspace(0.5, 1.5, 300).astype(jnp.bfloat16)
    state, updates = jax.lax.scan(step, state, scales)
    np.testing.assert_allclose(state.averages["w"], scales.astype("f4").mean(), rtol=1e-5)
    assert updates["w"].dtype == jnp.bfloat16


def test_one_micro_batch_is_the_transformation():
    chain = optax.chain(surgery.pcgrad(), optax.adam(1e-2))
    tx, (task_grads,) = surgery.accumulate(chain, 1, NUM_TASKS), gradients(1)
    updates, state = tx.update(task_grads, tx.init(PARAMS), PARAMS)
    assert_close(updates, chain.update(task_grads, chain.init(PARAMS), PARAMS)[0])
    assert state.ready
