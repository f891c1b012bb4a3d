"""Linen training states: extra arguments, checks, batch statistics, float16 with loss scaling."""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.dynamic_scale import DynamicScale
from flax.training.train_state import TrainState

import optax_surgery as surgery
from optax_surgery.flax import (
    SurgeryTrainState,
    scaled_task_value_and_grad,
    task_dynamic_scale,
)
from tests.common import same

NUM_TASKS = 3
INPUTS = jax.random.normal(jax.random.key(0), (16, 5))
TARGETS = jax.random.normal(jax.random.key(1), (16, NUM_TASKS))
PARAMS = {"w": jnp.ones((5, 3)), "b": jnp.ones(3)}
TASK_GRADS = jax.tree.map(
    lambda leaf: jax.random.normal(jax.random.key(2), (NUM_TASKS, *leaf.shape)), PARAMS
)
LOSSES = jnp.array([1.0, 2.0, 3.0])


def assert_close(left, right, atol=1e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol), left, right)


def create(tx, cls=SurgeryTrainState, params=PARAMS, **fields):
    return cls.create(apply_fn=None, params=params, tx=tx, **fields)


class BatchNormState(SurgeryTrainState):
    """A training state with a field of its own, as in Flax's examples."""

    batch_stats: Any = None


# apply_gradients


def test_losses_and_masks_reach_the_surgery():
    tx = optax.chain(surgery.famo(NUM_TASKS), optax.sgd(0.1))
    mask = jnp.array([True, True, False])
    step = jax.jit(
        lambda state: state.apply_gradients(grads=TASK_GRADS, losses=LOSSES, task_mask=mask)
    )
    state = step(create(tx))
    updates, opt_state = tx.update(
        TASK_GRADS, tx.init(PARAMS), PARAMS, losses=LOSSES, task_mask=mask
    )
    assert_close(state.params, optax.apply_updates(PARAMS, updates))
    assert_close(state.opt_state, opt_state)
    assert state.step == 1
    assert state.tx is tx


def test_flax_s_own_state_cannot_pass_them():
    state = create(optax.chain(surgery.famo(NUM_TASKS), optax.sgd(0.1)), cls=TrainState)
    with pytest.raises((TypeError, ValueError), match="losses"):
        state.apply_gradients(grads=TASK_GRADS, losses=LOSSES)


def test_updates_that_are_still_stacked_are_refused():
    message = r"Expected an update of shape \(3,\), got shape \(3, 3\) at 'b'. Combine the"
    for update in (SurgeryTrainState.apply_gradients, jax.jit(SurgeryTrainState.apply_gradients)):
        with jax.numpy_rank_promotion("allow"), pytest.raises(ValueError, match=message):
            update(create(optax.adam(1e-3)), grads=TASK_GRADS)


def test_one_gradient_is_taken_as_by_flax():
    grads = jax.tree.map(lambda leaf: leaf[0], TASK_GRADS)
    ours, flaxs = create(optax.adam(1e-3)), create(optax.adam(1e-3), cls=TrainState)
    ours, flaxs = ours.apply_gradients(grads=grads), flaxs.apply_gradients(grads=grads)
    assert same((ours.params, ours.opt_state), (flaxs.params, flaxs.opt_state))


def test_fields_are_replaced_and_the_rest_goes_to_optax():
    seen = {}

    def look(updates, state, params=None, **extra_args):
        seen.update(extra_args)
        return surgery.mean().update(updates, state)

    tx = optax.GradientTransformationExtraArgs(surgery.mean().init, look)
    state = create(tx, BatchNormState, batch_stats={"mean": jnp.zeros(4)})
    state = state.apply_gradients(grads=TASK_GRADS, batch_stats={"mean": jnp.ones(4)}, value=2.0)
    assert seen == {"value": 2.0}
    np.testing.assert_array_equal(state.batch_stats["mean"], np.ones(4))
    assert "batch_stats" in {field.name for field in dataclasses.fields(state)}


def test_transformations_without_extra_arguments_are_not_given_any():
    grads = jax.tree.map(lambda leaf: leaf[0], TASK_GRADS)
    assert create(optax.sgd(0.1)).apply_gradients(grads=grads, losses=LOSSES).step == 1


def test_stacked_batch_statistics_are_refused():
    state = create(surgery.mean(), BatchNormState, batch_stats={"norm": {"mean": jnp.zeros(4)}})
    stacked = {"norm": {"mean": jnp.zeros((NUM_TASKS, 4))}}
    message = r"Expected batch_stats of shape \(4,\), got shape \(3, 4\) at 'batch_stats/norm/mean'"
    with pytest.raises(ValueError, match=message):
        state.apply_gradients(grads=TASK_GRADS, batch_stats=stacked)


def test_a_state_scans_and_goes_through_bytes():
    tx = optax.chain(surgery.famo(NUM_TASKS), optax.adam(1e-2))

    def step(state, _):
        return state.apply_gradients(grads=TASK_GRADS, losses=LOSSES), None

    run = jax.jit(lambda state: jax.lax.scan(step, state, length=3)[0])
    start = create(tx).replace(step=jnp.zeros((), jnp.int32))
    state = run(start)
    restored = flax.serialization.from_bytes(start, flax.serialization.to_bytes(state))
    assert same(run(restored), run(state))
    assert state.step == 3


# Batch normalisation


class Normalised(nn.Module):
    """A trunk with batch normalisation, and heads in one layer."""

    @nn.compact
    def __call__(self, inputs, train):
        # A bias would have no gradient but rounding, of which Adam makes whole steps.
        hidden = nn.Dense(8, use_bias=False)(inputs)
        hidden = nn.BatchNorm(use_running_average=not train, name="norm")(hidden)
        return nn.Dense(NUM_TASKS)(nn.relu(hidden))


def test_batch_statistics_keep_their_shape_and_evaluation_works():
    network = Normalised()
    variables = network.init(jax.random.key(0), INPUTS, train=False)
    tx = optax.chain(surgery.pcgrad(), optax.adam(3e-2))
    state = create(tx, BatchNormState, variables["params"], batch_stats=variables["batch_stats"])

    def losses_fn(params, batch_stats):
        predictions, new = network.apply(
            {"params": params, "batch_stats": batch_stats},
            INPUTS,
            train=True,
            mutable="batch_stats",
        )
        return jnp.mean((predictions - TARGETS) ** 2, axis=0), new["batch_stats"]

    @jax.jit
    def step(state):
        fn = surgery.task_value_and_grad(losses_fn, has_aux=True)
        (losses, batch_stats), task_grads = fn(state.params, state.batch_stats)
        state = state.apply_gradients(grads=task_grads, losses=losses, batch_stats=batch_stats)
        return state, losses

    def evaluate(state):
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        return jnp.mean((network.apply(variables, INPUTS, train=False) - TARGETS) ** 2)

    shapes = jax.tree.map(jnp.shape, state.batch_stats)
    before = evaluate(state)
    for _ in range(150):
        state, _ = step(state)
    assert jax.tree.map(jnp.shape, state.batch_stats) == shapes
    assert evaluate(state) < 0.5 * before
    _, one_update = network.apply(
        {"params": state.params, "batch_stats": state.batch_stats},
        INPUTS, train=True, mutable="batch_stats",
    )  # fmt: skip
    assert_close(step(state)[0].batch_stats, one_update["batch_stats"])  # one, not one per task


# float16 with loss scaling

SIZES = jnp.array([1.0, 1.0, 1000.0])  # of the losses: the last one overflows at first


def half_losses(params, inputs):
    """Losses in float32 of a linear model that computes in float16."""
    predictions = inputs.astype(jnp.float16) @ params["w"].astype(jnp.float16)
    predictions = predictions + params["b"].astype(jnp.float16)[None]
    return SIZES * jnp.mean((predictions.astype(jnp.float32) - TARGETS) ** 2, axis=0)


def test_gradients_are_unscaled_in_float32():
    def losses_fn(params, inputs):
        return jnp.mean((inputs @ params["w"] + params["b"][None] - TARGETS) ** 2, axis=0)

    result = scaled_task_value_and_grad(losses_fn)(task_dynamic_scale(3), PARAMS, INPUTS)
    assert_close(result.grad, jax.jacrev(losses_fn)(PARAMS, INPUTS))
    assert_close(result.aux, losses_fn(PARAMS, INPUTS))
    assert result.finite.all()


def test_small_gradients_that_float16_loses_are_kept():
    def losses_fn(params):
        return 1e-7 * params.astype(jnp.float16).astype(jnp.float32) * jnp.array([1.0, 2.0])

    def stretched(params):  # a cotangent of 1e-9 is zero in float16
        return losses_fn(params * jnp.float16(0.01))

    params = jnp.ones(2, jnp.float16)
    assert (jnp.diagonal(jax.jacrev(stretched)(params)) == 0).all()
    result = scaled_task_value_and_grad(stretched)(task_dynamic_scale(2), params)
    np.testing.assert_allclose(jnp.diagonal(result.grad), [1e-9, 2e-9], rtol=0.01)


def test_an_overflow_in_one_task_masks_it_and_training_goes_on():
    tx = surgery.on_nonfinite(optax.chain(surgery.pcgrad(), optax.adam(1e-2)), "mask")
    chain = optax.chain(surgery.pcgrad(), optax.adam(1e-2))
    fn = scaled_task_value_and_grad(half_losses)

    @jax.jit
    def step(state, scale):
        result = fn(scale, state.params, INPUTS)
        state = state.apply_gradients(grads=result.grad, losses=result.aux)
        return state, result

    state, scale = create(tx), task_dynamic_scale(NUM_TASKS, scale=1024.0)
    after, result = step(state, scale)

    np.testing.assert_array_equal(result.finite, [True, True, False])
    np.testing.assert_array_equal(result.dynamic_scale.scale, [1024.0, 1024.0, 512.0])
    masked, _ = chain.update(
        result.grad, chain.init(PARAMS), PARAMS, losses=result.aux, task_mask=result.finite
    )
    assert_close(after.params, optax.apply_updates(PARAMS, masked))
    assert (after.opt_state.nonfinite_steps, after.opt_state.nonfinite_tasks) == (1, 1)

    overflows = 0
    for _ in range(60):
        state, result = step(state, scale)
        scale = result.dynamic_scale
        overflows += int(jnp.sum(~result.finite))
    assert 1 <= overflows < 20
    assert state.opt_state.nonfinite_tasks == overflows
    assert scale.scale[2] < scale.scale[0]
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(state))
    assert (half_losses(state.params, INPUTS) < half_losses(PARAMS, INPUTS)).all()


def test_the_scale_of_a_task_grows_again():
    scale = task_dynamic_scale(NUM_TASKS, scale=4.0, growth_interval=2)
    fn = jax.jit(scaled_task_value_and_grad(half_losses))
    for _ in range(4):
        scale = fn(scale, PARAMS, INPUTS).dynamic_scale
    np.testing.assert_array_equal(scale.scale, [8.0, 8.0, 8.0])


def test_scales_live_in_the_training_state():
    class ScaledState(SurgeryTrainState):
        dynamic_scale: DynamicScale | None = None

    tx = surgery.on_nonfinite(optax.chain(surgery.pcgrad(), optax.sgd(1e-4)))
    start = create(tx, ScaledState, dynamic_scale=task_dynamic_scale(NUM_TASKS))
    start = start.replace(step=jnp.zeros((), jnp.int32))

    def step(state, _):
        result = scaled_task_value_and_grad(half_losses)(state.dynamic_scale, state.params, INPUTS)
        state = state.apply_gradients(grads=result.grad, dynamic_scale=result.dynamic_scale)
        return state, result.finite

    run = jax.jit(functools.partial(jax.lax.scan, step, length=10))
    state, finite = run(start)
    assert state.opt_state.nonfinite_tasks == jnp.sum(~finite)
    restored = flax.serialization.from_bytes(start, flax.serialization.to_bytes(state))
    assert same(run(restored)[0], run(state)[0])


def test_arguments_by_keyword_go_to_the_function_of_the_losses():
    def losses_fn(params, inputs, *, mode):
        assert mode == "half"
        return half_losses(params, inputs)

    fn, scale = scaled_task_value_and_grad(losses_fn), task_dynamic_scale(NUM_TASKS, scale=1.0)
    result = fn(scale, PARAMS, inputs=INPUTS, mode="half")
    assert same(result, scaled_task_value_and_grad(half_losses)(scale, PARAMS, INPUTS))


def test_wrong_arguments_are_refused():
    for kwargs in ({"num_tasks": 0}, {"num_tasks": 3, "scale": 0.0}, {"num_tasks": "3"}):
        with pytest.raises(ValueError, match=r"`task_dynamic_scale\(num_tasks=[13].*\)`\.$"):
            task_dynamic_scale(**kwargs)
    with pytest.raises(ValueError, match="Expected True or False, got 'yes' at 'has_aux'"):
        scaled_task_value_and_grad(half_losses, has_aux="yes")
    fn = scaled_task_value_and_grad(lambda params, inputs: (half_losses(params, inputs), inputs))
    with pytest.raises(
        ValueError, match=r"`scaled_task_value_and_grad\(losses_fn, has_aux=True\)`"
    ):
        fn(task_dynamic_scale(NUM_TASKS), PARAMS, INPUTS)


def test_there_is_one_copy_of_aux():
    def losses_fn(params, inputs):
        return half_losses(params, inputs), {"stats": inputs.mean(axis=0)}

    fn = scaled_task_value_and_grad(losses_fn, has_aux=True)
    losses, aux = fn(task_dynamic_scale(NUM_TASKS), PARAMS, INPUTS).aux
    assert losses.shape == (NUM_TASKS,)
    assert aux["stats"].shape == (5,)


def test_scaling_costs_no_second_forward_pass():
    def losses_fn(params):
        hidden = INPUTS
        for _ in range(4):
            hidden = jnp.tanh(hidden @ params)
        return jnp.mean((hidden[:, :NUM_TASKS] - TARGETS) ** 2, axis=0)

    def flops(fn, *args):
        return jax.jit(fn).lower(*args).compile().cost_analysis()["flops"]

    params = jnp.eye(5)
    scaled = flops(scaled_task_value_and_grad(losses_fn), task_dynamic_scale(NUM_TASKS), params)
    assert scaled < 1.1 * flops(surgery.task_value_and_grad(losses_fn), params)


def test_a_scale_for_each_task_is_needed():
    for scale in (DynamicScale(), task_dynamic_scale(2)):
        with pytest.raises(ValueError, match=r"Expected dynamic_scale of shape \(3,\), got shape"):
            scaled_task_value_and_grad(half_losses)(scale, PARAMS, INPUTS)
