"""What is done task by task: `on_tasks`, `per_task`, `normalize_tasks`, `clip_tasks`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_surgery as surgery
from optax_surgery.flax import SurgeryTrainState
from tests import cases
from tests.common import same
from tests.core.test_contract import filled
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


def first_update(tx, task_grads, **extra_args):
    return tx.update(task_grads, tx.init(None), **extra_args)[0]


# per_task


def test_clipping_of_each_task():
    """Of norms 4, 3 and 0.5, the joint clip leaves less than one in all."""
    task_grads = jnp.array([[4.0, 0.0], [0.0, 3.0], [0.3, 0.4]])
    clip = optax.clip_by_global_norm(1.0)
    tx = surgery.per_task(clip, NUM_TASKS)
    clipped, _ = tx.update(task_grads, tx.init(jnp.zeros(2)))
    np.testing.assert_allclose(clipped, [[1.0, 0.0], [0.0, 1.0], [0.3, 0.4]], atol=1e-6)
    joint, _ = clip.update(task_grads, clip.init(None))
    assert np.linalg.norm(joint) < 1.001


def test_momentum_of_each_task_equals_a_loop_over_tasks():
    tx = surgery.per_task(optax.trace(0.9), NUM_TASKS)
    steps = gradients(4)
    state = tx.init(PARAMS)
    for task_grads in steps:
        got, state = jax.jit(tx.update)(task_grads, state, PARAMS)
    for task in range(NUM_TASKS):
        momentum = optax.trace(0.9)
        alone = momentum.init(PARAMS)
        for task_grads in steps:
            row, alone = momentum.update(jax.tree.map(lambda g, t=task: g[t], task_grads), alone)
        assert_close(jax.tree.map(lambda leaf, t=task: leaf[t], got), row)


def test_transformations_that_use_the_parameters():
    tx, (task_grads,) = surgery.per_task(optax.add_decayed_weights(0.1), NUM_TASKS), gradients(1)
    updates, _ = tx.update(task_grads, tx.init(PARAMS), PARAMS)
    expected = jax.tree.map(lambda leaf, param: leaf + 0.1 * param[None], task_grads, PARAMS)
    assert_close(updates, expected)


def test_a_masked_task_keeps_its_momentum():
    tx = surgery.per_task(optax.trace(0.9), NUM_TASKS)
    first, second = gradients(2)
    _, state = tx.update(first, tx.init(PARAMS))
    updates, new_state = tx.update(with_nan_row(second), state, task_mask=NAN_ROW)
    rows = functools.partial(jax.tree.map, lambda leaf: leaf[1])
    assert same(rows(new_state.task_states), rows(state.task_states))
    assert all_finite((updates, new_state))


def test_a_transformation_with_a_random_key_in_its_state():
    noise = surgery.per_task(optax.add_noise(0.1, 0.5, key=0), NUM_TASKS)
    tx = surgery.on_nonfinite(optax.chain(noise, surgery.pcgrad()))
    first, second = gradients(2)
    update = jax.jit(tx.update)
    _, state = update(first, tx.init(PARAMS), PARAMS)
    _, state = update(with_nan_row(second), state, PARAMS)
    counts = state.inner_state[0].task_states.count
    np.testing.assert_array_equal(counts, [2, 1, 2])
    assert (state.nonfinite_steps, state.nonfinite_tasks) == (1, 1)


def test_each_task_draws_noise_of_its_own():
    """One draw for all would be sqrt(T) times as large in their mean."""
    keys = (0, jax.random.key(0))
    for key in keys:
        tx = surgery.per_task(optax.add_noise(1.0, 0.0, key=key), NUM_TASKS)
        params = jnp.zeros(1000)
        state = tx.init(params)
        noise, state = tx.update(jnp.zeros((NUM_TASKS, 1000)), state)
        later, _ = tx.update(jnp.zeros((NUM_TASKS, 1000)), state)
        draws = np.concatenate([noise, later])
        np.testing.assert_allclose(np.corrcoef(draws), np.eye(2 * NUM_TASKS), atol=0.15)
        np.testing.assert_allclose(draws.std(axis=1), 1, rtol=0.15)


# normalize_tasks and clip_tasks

LENGTHS = jnp.array([0.5, 20.0, 3.0])
# By draws, by an eigendecomposition, by a quadratic program, and with a state of pairs of tasks.
OF_THE_GRAMIAN = ["pcgrad", "aligned_mtl", "upgrad", "gradvac"]


def vectors(lengths=LENGTHS):
    """Three gradients of these lengths, which conflict, in two leaves."""
    units = jnp.array([[0.6, 0.8, 0.0, 0.0], [0.0, -0.8, 0.6, 0.0], [0.64, 0.0, -0.48, 0.6]])
    rows = units * lengths[:, None]
    return {"a": rows[:, :3], "b": rows[:, 3]}


def clipped(lengths=LENGTHS):
    return vectors(jnp.minimum(lengths, 1.0))


@pytest.mark.parametrize("name", OF_THE_GRAMIAN)
def test_a_surgery_of_rescaled_gradients(name):
    """Of gradients divided or clipped each for itself beforehand, by the method and its draws."""
    inner = cases.METHODS[name].surgery(NUM_TASKS)
    plain, params = jax.jit(inner.update), {"a": jnp.zeros(3), "b": jnp.zeros(())}
    for tx, expected in [
        (surgery.normalize_tasks(inner), vectors(jnp.ones(3))),
        (surgery.clip_tasks(inner, 1.0), clipped()),
        (surgery.on_log_losses(inner), vectors(LENGTHS / LOSSES)),
    ]:
        update = functools.partial(jax.jit(tx.update), losses=LOSSES)
        updates, state = update(vectors(), tx.init(params))
        expected, inner_state = plain(expected, inner.init(params), losses=LOSSES)
        assert_close(updates, expected, 1e-5)
        assert_close(state.weighting_state.inner_state, inner_state, 1e-5)


RESCALED = {
    "normalize_tasks": (surgery.normalize_tasks, vectors(jnp.ones(3))),
    "normalize_tasks, ema": (
        lambda inner: surgery.normalize_tasks(inner, "ema", NUM_TASKS),
        vectors(jnp.ones(3)),
    ),
    "clip_tasks": (lambda inner: surgery.clip_tasks(inner, 1.0), clipped()),
}
AROUND = {
    "alone": lambda tx: tx,
    "monitor": lambda tx: surgery.monitor(NUM_TASKS, tx),
    "every of on_tasks": lambda tx: surgery.every(
        surgery.on_tasks(tx, range(NUM_TASKS)), 2, NUM_TASKS
    ),
}


@functools.cache
def pcgrad_of_rescaled(name, around):
    """A state, and an update that is compiled once for all tests."""
    wrap, _ = RESCALED[name]
    tx = AROUND[around](wrap(surgery.pcgrad()))
    return tx.init(None), jax.jit(tx.update)


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("name", RESCALED)
def test_rescaling_is_the_same_stacked_streamed_and_of_the_identity(name, around):
    state, update = pcgrad_of_rescaled(name, around)
    expected = first_update(surgery.pcgrad(), RESCALED[name][1])
    gramian = surgery.gramian(vectors())
    assert_close(update(vectors(), state)[0], expected, 1e-5)
    assert_close(update(vectors(), state, gramian=gramian)[0], expected, 1e-5)
    weights, _ = update(jnp.eye(NUM_TASKS), state, gramian=gramian)
    assert_close(surgery.combine(weights, vectors()), expected, 1e-5)


def test_rescaling_without_a_stack_of_gradients():
    def losses_fn(params):
        return vectors()["a"] @ params["a"] + vectors()["b"] * params["b"]

    for wrap, stack in RESCALED.values():
        tx = wrap(surgery.pcgrad())
        fn = surgery.surgery_value_and_grad(losses_fn, tx)
        (_, grads), _ = fn({"a": jnp.ones(3), "b": jnp.ones(())}, tx.init(None))
        assert_close(grads, first_update(surgery.pcgrad(), stack), 1e-5)


@pytest.mark.parametrize("name", OF_THE_GRAMIAN)
@pytest.mark.parametrize("units", [1.0, 1e-15, 1e15])
def test_the_units_of_the_losses_play_no_part_in_log_losses(name, units):
    """Stacked, from a Gramian, and without a stack; one loss and its gradient in other units."""
    factors = jnp.array([1.0, units, 1.0])
    tx = surgery.on_log_losses(cases.METHODS[name].surgery(NUM_TASKS))
    state, update = tx.init(None), jax.jit(tx.update)
    expected, _ = update(vectors(), state, losses=LOSSES)
    found, _ = update(vectors(LENGTHS * factors), state, losses=LOSSES * factors)
    assert_close(found, expected, 1e-4)

    def losses_fn(params):
        slopes = vectors(LENGTHS * factors)
        of_params = slopes["a"] @ params["a"] + slopes["b"] * params["b"]
        return of_params + LOSSES * factors

    fn = surgery.surgery_value_and_grad(losses_fn, tx)
    (_, grads), _ = fn({"a": jnp.zeros(3), "b": jnp.zeros(())}, state)
    assert_close(grads, expected, 1e-4)


def test_the_sum_of_log_losses_is_the_scale_invariant_method():
    found = first_update(surgery.on_log_losses(surgery.sum()), vectors(), losses=LOSSES)
    assert_close(found, first_update(surgery.scale_invariant(), vectors(), losses=LOSSES), 1e-6)


def test_a_loss_without_a_logarithm_has_no_weight_and_is_counted():
    tx = surgery.on_log_losses(surgery.pcgrad())
    losses = LOSSES.at[1].set(-1.0)
    update, state = tx.update(vectors(), tx.init(None), losses=losses)
    mask = jnp.array([True, False, True])
    expected, _ = tx.update(vectors(), tx.init(None), losses=LOSSES, task_mask=mask)
    assert_close(update, expected, 1e-6)
    assert state.unusable_losses == 1


FAR_APART = jnp.array([1e30, 1.0, 1e-30])


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("name", RESCALED)
def test_norms_of_1e30_and_1e_minus_30_in_one_stack(name, around):
    """Squares of neither fit float32; the surgery within sees lengths of 1, or of 1 and 1e-30."""
    state, update = pcgrad_of_rescaled(name, around)
    updates, _ = update(vectors(FAR_APART), state)
    stack = clipped(FAR_APART) if name == "clip_tasks" else vectors(jnp.ones(3))
    assert_close(updates, first_update(surgery.pcgrad(), stack), 1e-5)


@pytest.mark.parametrize("length", [1e30, 1e-30])
def test_clipping_where_no_square_fits(length):
    """A length of 1e30 is above 1, and one of 1e-30 below, whoever makes the Gramian."""
    lengths, unit = jnp.full(3, length), 1 / min(length, 1.0)
    for around in AROUND.values():
        tx = around(surgery.clip_tasks(surgery.sum(), 1.0))
        updates, _ = tx.update(vectors(lengths), tx.init(None))
        total = first_update(surgery.sum(), vectors(jnp.minimum(lengths, 1.0)))
        assert_close(optax.tree.scale(unit, updates), optax.tree.scale(unit, total))


def test_a_zero_gradient_stays_zero():
    task_grads = jnp.array([[0.0, 0.0], [3.0, 4.0]])
    for wrap in (
        surgery.normalize_tasks,
        lambda inner: surgery.normalize_tasks(inner, "ema", 2),
        lambda inner: surgery.clip_tasks(inner, 1.0),
    ):
        tx = wrap(surgery.sum())
        state = tx.init(jnp.zeros(2))
        for _ in range(2):
            updates, state = tx.update(task_grads, state)
        np.testing.assert_allclose(updates, [0.6, 0.8], atol=1e-6)


def test_averages_of_norms_with_their_bias_corrected():
    decay, norms = 0.8, np.array([[1.0, 10.0], [3.0, 5.0], [2.0, 1.0], [8.0, 7.0]])
    tx = surgery.normalize_tasks(surgery.sum(), "ema", num_tasks=2, decay=decay)
    seen = np.array([[True, True], [True, False], [False, True], [True, True]])
    state, average, number = tx.init(jnp.zeros(2)), np.zeros(2), np.zeros(2)
    update = jax.jit(tx.update)
    for step_norms, mask in zip(norms, seen, strict=True):
        task_grads = np.diag(step_norms)
        task_grads[~mask] = np.nan
        lengths, state = update(jnp.asarray(task_grads, "f4"), state, task_mask=mask)
        average = np.where(mask, decay * average + (1 - decay) * step_norms, average)
        number += mask
        corrected = average / (1 - decay**number)
        np.testing.assert_allclose(lengths[mask], (step_norms / corrected)[mask], rtol=1e-5)
        np.testing.assert_allclose(state.weighting_state.norms, corrected, rtol=1e-5)
    assert all_finite(state)


# on_tasks

WORLD_MODEL = {"actor": -3.0, "image": 1.0, "kl": 0.1, "reward": 2.0}  # rows in this order
MODULES = {"actor": ["actor"], "model": ["reward", "image", "kl"]}
ON_THEIR_OWN = {  # by losses with a state and without one, and by the Gramian
    "famo": surgery.famo,
    "gls": lambda num_tasks: surgery.gls(),
    "aligned_mtl": lambda num_tasks: surgery.aligned_mtl(),
    "upgrad": lambda num_tasks: surgery.upgrad(),
}


@pytest.mark.parametrize("name", ON_THEIR_OWN)
def test_each_module_of_a_partition_is_operated_on_as_if_it_were_alone(name):
    """A world model and an actor with all their losses in one dict, negative ones too."""
    make = ON_THEIR_OWN[name]
    generator = np.random.default_rng(0)
    rows = {"actor": [0], "model": [1, 2, 3]}
    params = {module: {"w": jnp.ones(5), "b": jnp.ones(())} for module in MODULES}
    task_grads = jax.tree.map(lambda leaf: jnp.zeros((4, *leaf.shape)), params)
    for module, own in rows.items():
        for leaf in ("w", "b"):
            full = task_grads[module][leaf]
            noise = jnp.asarray(generator.normal(size=(len(own), *full.shape[1:])), "f4")
            task_grads[module][leaf] = full.at[jnp.array(own)].set(noise)
    tx = optax.partition(
        {
            module: surgery.on_tasks(make(len(tasks)), tasks)
            if module == "model"
            else surgery.on_tasks(surgery.sum(), tasks)
            for module, tasks in MODULES.items()
        },
        {module: module for module in MODULES},
    )
    updates, state = jax.jit(tx.update)(task_grads, tx.init(params), params, losses=WORLD_MODEL)
    assert_close(updates["actor"], jax.tree.map(lambda leaf: leaf[0], task_grads["actor"]))

    alone = make(3)
    own = jax.tree.map(lambda leaf: leaf[1:], task_grads["model"])
    losses = jnp.array([1.0, 0.1, 2.0])
    expected, own_state = alone.update(own, alone.init(params["model"]), losses=losses)
    assert_close(updates["model"], expected)
    # A partition of n groups keeps their states by name.
    assert_close(jax.tree.leaves(state.inner_states["model"]), jax.tree.leaves(own_state))


def test_tasks_by_number_or_by_name_in_any_order_keep_the_order_of_the_rows():
    task_grads, losses = jnp.eye(4), WORLD_MODEL
    mask = {name: name != "kl" for name in WORLD_MODEL}
    expected = [0.0, 1.0, 0.0, 3.0]
    by_name = {"image": 1.0, "kl": 2.0, "reward": 3.0}
    for tasks in (["reward", "kl", "image"], [3, 1, 2]):
        for weights in (by_name, jnp.array([1.0, 2.0, 3.0])):
            tx = surgery.on_tasks(surgery.constant(weights), tasks)
            updates, _ = tx.update(task_grads, tx.init(None), losses=losses, task_mask=mask)
            np.testing.assert_allclose(updates, expected)


def test_a_gramian_of_all_tasks_gives_that_of_some():
    gramian = surgery.gramian(vectors())
    tx = surgery.on_tasks(surgery.pcgrad(), [0, 1])
    first = jax.tree.map(lambda leaf: leaf[:2], vectors())
    expected = first_update(surgery.pcgrad(), first)
    for given in (None, gramian, lambda: gramian):
        updates, _ = tx.update(vectors(), tx.init(None), gramian=given)
        assert_close(updates, expected)
    streamed = surgery.every(tx, 2, NUM_TASKS)
    assert_close(streamed.update(vectors(), streamed.init(None))[0], expected)


def test_tasks_that_are_not_there_are_refused():
    tx = surgery.on_tasks(surgery.pcgrad(), ["image", "policy"])
    with pytest.raises(ValueError, match=r"Expected tasks among .*'actor', .*, got 'policy' at"):
        tx.update(jnp.eye(4), tx.init(None), losses=WORLD_MODEL)
    with pytest.raises(ValueError, match="Expected a tree of losses or of a mask, with names"):
        tx.update(jnp.eye(4), tx.init(None), losses=jnp.ones(4))


# move_state


def test_what_a_method_learnt_of_a_task_goes_on_where_a_task_is_added():
    old, new = surgery.famo(2), surgery.famo(3)
    state, losses = old.init(None), {"a": 1.0, "c": 2.0}
    for step in range(3):
        _, state = old.update(jnp.eye(2), state, losses={"a": 1.0, "c": 2.0 + step})
    moved = surgery.move_state(state, new.init(None), [0, None, 1])
    logits = state.weighting_state.logits
    np.testing.assert_array_equal(moved.weighting_state.logits, [logits[0], 0.0, logits[1]])
    assert moved.surgery_step == 3
    new.update(jnp.eye(3), moved, losses=losses | {"b": 1.0})


def test_a_chain_with_an_optimiser_moves_as_a_whole():
    def chain(num_tasks):
        return optax.chain(surgery.monitor(num_tasks, surgery.famo(num_tasks)), optax.adam(1e-3))

    (task_grads,) = gradients(1)
    _, state = chain(3).update(task_grads, chain(3).init(PARAMS), PARAMS, losses=LOSSES)
    moved = surgery.move_state(state, chain(2).init(PARAMS), [2, 0])
    assert same(moved[1], state[1])
    gramian = optax.tree.get(state, "gramian")
    np.testing.assert_array_equal(
        optax.tree.get(moved, "gramian"), gramian[jnp.array([2, 0])][:, jnp.array([2, 0])]
    )


def test_a_state_without_anything_of_single_tasks_moves_as_it_is():
    state = filled(surgery.pcgrad().init(PARAMS))
    assert same(surgery.move_state(state, surgery.pcgrad().init(PARAMS), [4, None]), state)


MISMOVED = {
    "tasks": lambda state: surgery.move_state(state, surgery.famo(2).init(None), [0, 3]),
    "new_state": lambda state: surgery.move_state(state, surgery.imtl_l(2).init(None), [0, 1]),
    r".*logits": lambda state: surgery.move_state(state, surgery.famo(2).init(None), [0, 1, 2]),
}


@pytest.mark.parametrize("where", MISMOVED)
def test_states_that_do_not_fit_are_not_moved(where):
    with pytest.raises(ValueError, match=rf"Expected .*, got .* at '{where}'. "):
        MISMOVED[where](surgery.famo(3).init(None))


def test_the_state_that_moves_is_that_of_the_optimiser():
    states = [
        SurgeryTrainState.create(apply_fn=None, params=PARAMS, tx=surgery.famo(num_tasks))
        for num_tasks in (2, 3)
    ]
    with pytest.raises(ValueError, match=r"Pass `state\.opt_state` and"):
        surgery.move_state(*states, [0, 1, None])
