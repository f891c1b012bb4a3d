"""Surgeries among the other parts of a program: keys, scales, clipping, losses of either sign."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_surgery as surgery
from tests.cases import METHODS
from tests.common import PARAMS, described, same, task_gradients
from tests.wrappers import cases as wrappers

NUM_TASKS = 3
GRADS = task_gradients(NUM_TASKS)
LOSSES = jnp.array([1.0, 2.0, 3.0])
every_method = pytest.mark.parametrize("case", METHODS.values(), ids=METHODS)


def first_update(tx, task_grads=GRADS, **extra_args):
    return tx.update(task_grads, tx.init(PARAMS), **extra_args)[0]


def assert_close(left, right, atol=1e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol), left, right)


# How `update` is called


def test_gradients_by_position_and_by_keyword_as_optax_names_them():
    for tx in (
        surgery.pcgrad(),
        surgery.every(surgery.pcgrad(), 2, NUM_TASKS),
        surgery.per_task(optax.trace(0.9), NUM_TASKS),
    ):
        state = tx.init(PARAMS)
        by_name = tx.update(updates=GRADS, state=state, params=PARAMS, losses=LOSSES)
        assert same(by_name, tx.update(GRADS, state, PARAMS, losses=LOSSES))


def test_none_is_as_if_it_were_not_given():
    tx = surgery.pcgrad()
    nothing = {"losses": None, "task_mask": None, "gramian": None, "key": None}
    assert same(first_update(tx, **nothing), first_update(tx))


# Keys

RANDOM = {
    "pcgrad": lambda: surgery.pcgrad(),
    "gradvac": lambda: surgery.gradvac(8),
    "random_weighting": lambda: surgery.random_weighting(),
    "graddrop": lambda: surgery.graddrop(),
    "every": lambda: surgery.every(surgery.random_weighting(), 2, 8),
    "on_nonfinite": lambda: surgery.on_nonfinite(surgery.random_weighting()),
    "leafwise": lambda: surgery.leafwise(surgery.random_weighting()),
    "accumulate": lambda: surgery.accumulate(surgery.random_weighting(), 1, 8),
}


@pytest.mark.parametrize("name", RANDOM)
def test_a_key_for_each_step_decides_what_is_drawn(name):
    """One surgery outside of a `vmap` over seeds: equal keys draw alike, and others apart."""
    tx, task_grads = RANDOM[name](), task_gradients(8, params=jnp.zeros(5))
    state = tx.init(jnp.zeros(5))
    keys = jax.random.split(jax.random.key(1), 3)[jnp.array([0, 1, 2, 0])]
    update = jax.jit(
        jax.vmap(lambda key: tx.update(task_grads, state, losses=jnp.ones(8), key=key))
    )
    draws, _ = update(keys)
    assert np.array_equal(draws[0], draws[3])
    assert len(np.unique(draws.round(5), axis=0)) == 3
    alone, _ = tx.update(task_grads, state, losses=jnp.ones(8), key=keys[1])
    np.testing.assert_allclose(alone, draws[1], atol=1e-5)


def test_without_a_key_the_step_decides():
    tx, task_grads = surgery.random_weighting(), jnp.eye(3)
    first, state = tx.update(task_grads, tx.init(None))
    second, _ = tx.update(task_grads, state)
    assert not np.allclose(first, second)
    assert same(first, tx.update(task_grads, tx.init(None))[0])


@pytest.mark.parametrize("key", [7, jax.random.key(7), jax.random.PRNGKey(7)], ids=repr)
def test_a_key_may_be_a_seed_a_typed_key_or_two_words(key):
    tx = surgery.random_weighting()
    expected = first_update(tx, jnp.eye(3), key=jax.random.key(7))
    assert same(first_update(tx, jnp.eye(3), key=key), expected)


# Scale of the update


def test_sum_and_mean_differ_where_the_norm_is_clipped_before_adam():
    """Adam takes out a common scale; a clip to norm 1 before it, as in all RL code, does not."""
    clip = optax.clip_by_global_norm(1.0)
    lengths = [0.125, 0.25, 0.5, 1.0]

    def clipped_lengths(tx):
        equal = [jnp.full((10, 1), length) for length in lengths]
        updates = [clip.update(tx.update(g, tx.init(None))[0], clip.init(None))[0] for g in equal]
        return [float(update[0]) for update in updates]

    np.testing.assert_allclose(clipped_lengths(surgery.mean()), lengths, rtol=1e-6)
    np.testing.assert_allclose(clipped_lengths(surgery.pcgrad()), np.ones(4), rtol=1e-6)


# Losses of either sign

TAKE_LOGARITHMS = {
    "scale_invariant": lambda: surgery.scale_invariant(),
    "gls": lambda: surgery.gls(),
    "stch of logarithms": lambda: surgery.stch(0.5, log_losses=True),
    "famo": lambda: surgery.famo(2),
    "imtl_l": lambda: surgery.imtl_l(2),
    "gradnorm": lambda: surgery.gradnorm(2),
    "go4align": lambda: surgery.go4align(2, num_groups=2),
    "mgda of losses": lambda: surgery.mgda("loss"),
}


@pytest.mark.parametrize("name", TAKE_LOGARITHMS)
def test_a_negative_loss_has_weight_zero_and_is_counted(name):
    """Not weights of 1e20, after which a second moment is infinite and nothing moves again."""
    tx, params = TAKE_LOGARITHMS[name](), jnp.array([5.0, 5.0])
    chain = optax.chain(tx, optax.adam(0.1))
    state = chain.init(params)
    steps = [jnp.array([-3.0, 1.0]), jnp.array([-2.0, 1.0]), jnp.array([2.0, 1.0])]
    moved, update = [], jax.jit(chain.update)
    for losses in [*steps, *steps]:
        updates, state = update(jnp.eye(2), state, params, losses=losses)
        moved.append(np.asarray(updates))
    assert np.isfinite(moved).all()
    assert all(step[1] < -0.01 for step in moved)
    assert all(step[0] == 0 for step in moved[:2])
    assert moved[2][0] < -0.01  # it comes back, and moves
    assert surgery.scalars(state)["unusable_losses"] == 4


def test_an_actor_with_adam_keeps_moving():
    tx = optax.chain(surgery.scale_invariant(), optax.adam(0.1))
    params = jnp.ones(2)
    state, losses = tx.init(params), jnp.array([-3.0, 1.0])
    for _ in range(3):
        updates, state = tx.update(jnp.eye(2), state, params, losses=losses)
    np.testing.assert_allclose(updates, [0.0, -0.1], atol=1e-4)
    later, _ = tx.update(jnp.eye(2), state, params, losses=jnp.array([3.0, 1.0]))
    assert later[0] < -0.01


def test_where_no_loss_can_be_used_the_step_is_zero_and_counted():
    tx = surgery.famo(2)
    before = tx.init(None)
    updates, state = tx.update(jnp.eye(2), before, losses=jnp.array([-3.0, -1.0]))
    np.testing.assert_array_equal(updates, np.zeros(2))
    assert same(state.weighting_state, before.weighting_state)
    assert (state.unusable_losses, state.surgery_step) == (2, 0)


# Strict settings of JAX


def strictly(function):
    """Calls it with every setting of JAX that finds mistakes."""
    with (
        jax.numpy_dtype_promotion("strict"),
        jax.numpy_rank_promotion("raise"),
        jax.debug_nans(True),
        jax.check_tracer_leaks(),
    ):
        return function()


@every_method
def test_strict_promotion_and_leaks(case):
    """Undefined numbers are looked for among those of the methods, which compile the programs."""
    for extra_args in ({}, {"task_mask": np.array([True, True, False])}):
        step = functools.partial(case.step, **extra_args)
        updates, _ = strictly(lambda step=step: jax.eval_shape(step, GRADS))
        assert described(updates) == described(PARAMS)


OPTIONS = {
    **{f"aligned_mtl {mode}": surgery.aligned_mtl(scale_mode=mode) for mode in ("median", "rmse")},
    **{f"mgda {kind}": surgery.mgda(kind) for kind in ("l2", "loss", "loss+")},
    "cagrad 1+c^2": surgery.cagrad(0.9, rescale="1+c^2"),
    "stch of logarithms": surgery.stch(0.5, log_losses=True),
    "krum of some": surgery.krum(num_byzantine=0, num_selected=2),
    "preference": surgery.dualproj({"a": 1, "b": 0, "c": 2}),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_strict_promotion_and_leaks_with_other_options(name):
    """Numbers of users may be integers."""
    tx, losses = OPTIONS[name], {"a": 1, "b": 2.0, "c": 3}
    for extra_args in ({}, {"task_mask": jnp.array([True, True, False])}):
        update = functools.partial(tx.update, losses=losses, **extra_args)
        strictly(lambda update=update: jax.eval_shape(update, GRADS, tx.init(PARAMS)))


WITH_ADAM = ("per_task", "accumulate", "on_nonfinite, mask", "all at once")  # which is not strict


@pytest.mark.parametrize("name", [name for name in wrappers.WRAPPERS if name not in WITH_ADAM])
def test_strict_promotion_and_leaks_in_wrappers(name):
    tx, (task_grads,) = wrappers.transformation(name), wrappers.gradients(1)

    def update():
        extra_args = {"losses": wrappers.LOSSES, "task_mask": wrappers.NAN_ROW}
        update = functools.partial(tx.update, **extra_args)
        return jax.eval_shape(update, task_grads, tx.init(wrappers.PARAMS), wrappers.PARAMS)

    updates, _ = strictly(update)
    assert described(updates) == described(wrappers.PARAMS)


OF_SGD = {
    "per_task": lambda sgd: optax.chain(surgery.per_task(sgd, NUM_TASKS), surgery.pcgrad()),
    "accumulate": lambda sgd: surgery.accumulate(
        optax.chain(surgery.clip_tasks(surgery.pcgrad(), 1.0), sgd), 2, NUM_TASKS
    ),
    "on_nonfinite": lambda sgd: surgery.on_nonfinite(
        surgery.accumulate(
            optax.chain(surgery.monitor(NUM_TASKS), surgery.moco(NUM_TASKS), sgd), 2, NUM_TASKS
        )
    ),
}


@pytest.mark.parametrize("name", OF_SGD)
def test_strict_promotion_and_undefined_numbers_around_an_optimiser(name):
    tx = OF_SGD[name](optax.sgd(0.1, momentum=0.9))
    update = functools.partial(tx.update, losses=LOSSES, task_mask=LOSSES > 1)
    updates, _ = strictly(lambda: jax.jit(update)(GRADS, tx.init(PARAMS), PARAMS))
    assert described(updates) == described(PARAMS)
