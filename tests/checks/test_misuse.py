"""Every misuse is said at trace time: what was expected, what came, where, what to do."""

import jax
import jax.numpy as jnp
import optax
import pytest

import optax_surgery as surgery
from tests.checks.hints import execute

PARAMS = {"dense": {"kernel": jnp.ones((3, 4)), "bias": jnp.ones(3)}}
STACKED = jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), PARAMS)

MISUSES = {
    "unstacked gradients": (
        PARAMS,
        {"params": PARAMS},
        r"Expected task gradients of shape \(T, 3\) with T >= 1, got shape \(3,\) at 'dense/bias'. "
        r"Stack the gradients",
    ),
    "unstacked gradients, parameters unknown": (
        {"dense": {"kernel": jnp.ones((5, 4)), "bias": jnp.ones(3)}},
        {},
        r"Expected a leading axis of 3 tasks as at 'dense/bias', got shape \(5, 4\) at "
        r"'dense/kernel'. Stack",
    ),
    "a scalar gradient": (
        {"scale": jnp.ones(())},
        {},
        r"Expected task gradients of shape \(T\) with T >= 1, got shape \(\) at 'scale'. Stack",
    ),
    "no tasks": (
        {"scale": jnp.ones((0, 2))},
        {},
        r"Expected task gradients of shape \(T, 2\) with T >= 1, got shape \(0, 2\) at 'scale'",
    ),
    "leaves that disagree on T": (
        {"dense": {"kernel": jnp.ones((2, 3, 4)), "bias": jnp.ones((3, 3))}},
        {"params": PARAMS},
        r"Expected a leading axis of 3 tasks as at 'dense/bias', got shape \(2, 3, 4\) at "
        r"'dense/kernel'. Stack",
    ),
    "a list of trees": (
        [PARAMS, PARAMS],
        {"params": PARAMS},
        r"Expected one tree of stacked gradients, got a list of 2 trees.*"
        r"jax.tree.map\(lambda \*grads: jnp.stack\(grads\), \*updates\)",
    ),
    "a wrong trailing shape": (
        {"dense": {"kernel": jnp.ones((3, 4, 3)), "bias": jnp.ones((3, 3))}},
        {"params": PARAMS},
        r"Expected task gradients of shape \(T, 3, 4\) with T >= 1, got shape \(3, 4, 3\) at "
        r"'dense/kernel'",
    ),
    "a missing leaf": (
        {"dense": {"kernel": jnp.ones((2, 3, 4))}},
        {"params": PARAMS},
        r"Expected a gradient for every parameter, got none at 'dense/bias'. Differentiate",
    ),
    "an additional leaf": (
        {**STACKED, "head": jnp.ones((3, 1))},
        {"params": PARAMS},
        r"Expected the tree structure of the parameters, got another one at 'head'",
    ),
    "complex gradients": (
        {"wave": jnp.ones((2, 3), complex)},
        {},
        r"Expected real floating-point gradients, got complex64 at 'wave'. Wrap the whole chain.*"
        r"split_real_and_imaginary",
    ),
    "integer gradients": (
        {"steps": jnp.ones((2, 3), int)},
        {},
        r"Expected real floating-point gradients, got int32 at 'steps'. Differentiate",
    ),
    "a mask of the wrong shape": (
        STACKED,
        {"task_mask": jnp.ones(2, bool)},
        r"Expected task_mask of shape \(3,\), got shape \(2,\) at 'task_mask'. Pass one",
    ),
    "a mask of numbers": (
        STACKED,
        {"task_mask": jnp.ones(3)},
        r"Expected a task_mask of booleans, got float32 at 'task_mask'. Pass True",
    ),
    "a Gramian of the wrong shape": (
        STACKED,
        {"gramian": jnp.ones((3, 2))},
        r"Expected a Gramian of shape \(3, 3\), got shape \(3, 2\) at 'gramian'",
    ),
    "losses of the wrong shape": (
        STACKED,
        {"losses": jnp.ones(())},
        r"Expected losses of shape \(3,\), got shape \(\) at 'losses'",
    ),
}


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("misuse", MISUSES)
def test_a_surgery_says_what_is_wrong(misuse, jit):
    task_grads, kwargs, message = MISUSES[misuse]
    tx = surgery.pcgrad()
    update = jax.jit(tx.update) if jit else tx.update
    with pytest.raises(ValueError, match=message) as caught:
        update(task_grads, tx.init(PARAMS), **kwargs)
    execute(caught.value, updates=task_grads, params=PARAMS)


def test_weights_of_the_wrong_length_are_refused():
    tx = surgery.constant(jnp.ones(2))
    message = r"Expected weights of shape \(3,\), got shape \(2,\) at 'weights'"
    with pytest.raises(ValueError, match=message):
        tx.update(STACKED, tx.init(PARAMS))
    with pytest.raises(ValueError, match=message):
        surgery.combine(jnp.ones(2), STACKED)


def test_a_preference_of_the_wrong_length_is_refused():
    tx = surgery.aligned_mtl(jnp.ones(4))
    with pytest.raises(ValueError, match=r"Expected preference of shape \(3,\), got shape \(4,\)"):
        tx.update(STACKED, tx.init(PARAMS))


def test_a_monitor_of_another_number_of_tasks_is_refused():
    tx = surgery.monitor(2)
    message = r"Expected the gradients of 2 tasks, got 3 .*`monitor\(num_tasks=3\)`"
    with pytest.raises(ValueError, match=message):
        tx.update(STACKED, tx.init(PARAMS))


def test_a_bare_array_has_a_path():
    tx = surgery.pcgrad()
    message = (
        r"Expected task gradients of shape \(T, 3\) with T >= 1, got shape \(3,\) at 'updates'"
    )
    with pytest.raises(ValueError, match=message):
        tx.update(jnp.ones(3), tx.init(jnp.ones(3)), jnp.ones(3))


def test_the_error_comes_through_a_chain_and_names_the_leaf():
    tx = optax.chain(surgery.pcgrad(), optax.adam(1e-3))
    with pytest.raises(ValueError, match=r"at 'dense/bias'"):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS)
