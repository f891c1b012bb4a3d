"""A task without a derivative takes part in no other's, and tasks pay for their own data alone."""

import contextlib
from functools import partial
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import optax_surgery as surgery
from optax_surgery.programs import plan
from tests.programs import comparison
from tests.programs.programs import normal

PARAMS = {"w": normal(5, 3), "v": normal(3, 2), "table": normal(6, 5), "layers": normal(2, 3, 3)}
INPUTS, TOKENS, LABELS = normal(4, 5), jnp.array([1, 5, 1, 2]), jnp.zeros(4)


def features(params):
    """Through a matrix, a table, and a loop."""
    hidden = jnp.tanh((INPUTS + params["table"][TOKENS]) @ params["w"])
    return lax.scan(lambda h, w: (jnp.tanh(h @ w), None), hidden, params["layers"])[0]


def defined(params):
    return jnp.sum(jnp.sin((features(params) @ params["v"])[:, 0]))


def undefined_root(params):
    return jnp.sqrt(jnp.sum((0 * features(params)) ** 2))


def undefined_mean(params):
    """Over the samples that have a label, of which there are none."""
    return jnp.sum(features(params) * LABELS[:, None]) / jnp.sum(LABELS)


def pair(undefined, params):
    return {"first": defined(params), "second": undefined(params)}


def columns(params):
    outputs = features(params) @ params["v"]
    return jnp.sqrt(jnp.sum((outputs * jnp.array([1.0, 0.0])[None]) ** 2, axis=0))


def first_column(params):
    return jnp.sqrt(jnp.sum((features(params) @ params["v"])[:, 0] ** 2))


# From a name to losses of which the second has no derivative, and to the first alone.
LOSSES = {
    "the root of zero": (partial(pair, undefined_root), defined),
    "a mean of nothing": (partial(pair, undefined_mean), defined),
    "a column of a vector of losses": (columns, first_column),
}
every_kind = pytest.mark.parametrize("kind", LOSSES)
ONLY_FIRST = {"task_mask": jnp.array([True, False])}


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-6 * np.abs(other).max())


def update(kind, tx, extra_args=None):
    losses_fn, _ = LOSSES[kind]
    fn = surgery.surgery_value_and_grad(losses_fn, tx)
    (_, grads), state = jax.jit(fn)(PARAMS, tx.init(PARAMS), extra_args=extra_args)
    return grads, state


@every_kind
def test_the_stacked_rows_of_others_stay_what_they_are(kind):
    losses_fn, first = LOSSES[kind]
    _, task_grads = jax.jit(surgery.task_value_and_grad(losses_fn))(PARAMS)
    assert_same(jax.tree.map(lambda leaf: leaf[0], task_grads), jax.grad(first)(PARAMS))
    assert not np.isfinite(task_grads["w"][1]).all()


@every_kind
@pytest.mark.parametrize("way", ["products", "stacks", "another pass"])
def test_a_masked_task_takes_no_part(kind, way):
    tx = surgery.every(surgery.mgda(), 2, 2) if way == "another pass" else surgery.pcgrad()
    with comparison.multiplied() if way == "products" else contextlib.nullcontext():
        grads, _ = update(kind, tx, ONLY_FIRST)
    assert_same(grads, jax.grad(LOSSES[kind][1])(PARAMS))


@every_kind
def test_a_task_without_a_gradient_is_masked_alone(kind):
    grads, state = update(kind, surgery.on_nonfinite(surgery.pcgrad(), "mask"))
    assert_same(grads, jax.grad(LOSSES[kind][1])(PARAMS))
    assert state.nonfinite_tasks == 1


@every_kind
def test_a_step_with_a_task_without_a_gradient_is_skipped(kind):
    grads, state = update(kind, surgery.on_nonfinite(surgery.pcgrad(), "skip"))
    assert_same(grads, jax.tree.map(jnp.zeros_like, PARAMS))
    assert state.nonfinite_steps == 1


def test_an_overflow_of_a_scaled_loss_in_float16_stays_its_own():
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float16), PARAMS["w"])
    scales = jnp.array([8.0, 2.0**15], jnp.float16)

    def losses_fn(params):
        outputs = jnp.tanh(INPUTS.astype(jnp.float16) @ params)
        return jnp.stack([jnp.sum(outputs), jnp.sum(outputs * 60)]) * scales

    _, task_grads = jax.jit(surgery.task_value_and_grad(losses_fn))(params)
    first = jax.jit(jax.grad(lambda params: losses_fn(params)[0]))(params)
    np.testing.assert_array_equal(task_grads[0], first)
    assert not np.isfinite(task_grads[1]).all()
    tx = surgery.on_nonfinite(surgery.pcgrad(), "mask")
    fn = jax.jit(surgery.surgery_value_and_grad(losses_fn, tx))
    (_, grads), state = fn(params, tx.init(params))
    np.testing.assert_allclose(grads, first, rtol=2e-3)
    assert state.nonfinite_tasks == 1


# Data of their own


def mean_of_labelled(params, inputs, labels):
    outputs = jnp.tanh(inputs @ params["w"])
    return jnp.sum(outputs**2 * labels[:, None]) / jnp.sum(labels)


@pytest.mark.parametrize("way", ["products", "stacks", "another pass", "on_nonfinite"])
def test_a_task_without_labels_leaves_the_others_their_data(way):
    params, inputs = {"w": PARAMS["w"]}, normal(3, 4, 5)
    labels = jnp.array([[1.0, 0, 1, 1], [0, 0, 0, 0], [1, 1, 0, 0]])
    tx, extra_args = surgery.pcgrad(), {"task_mask": jnp.array([True, False, True])}
    if way == "on_nonfinite":
        tx, extra_args = surgery.on_nonfinite(tx, "mask"), None
    fn = surgery.per_task_surgery_value_and_grad(mean_of_labelled, tx)
    with contextlib.ExitStack() as changes:
        if way == "another pass":
            changes.enter_context(mock.patch.multiple(plan, _KEPT_BYTES=-1, _KEPT_TIMES=0))
        if way == "products":
            changes.enter_context(comparison.multiplied())
        step = jax.jit(
            lambda params: fn(params, tx.init(params), inputs, labels, extra_args=extra_args)
        )
        (_, grads), _ = step(params)
    one, three = (jax.grad(mean_of_labelled)(params, inputs[task], labels[task]) for task in (0, 2))
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), one, three)
    inner = surgery.pcgrad()
    assert_same(grads, inner.update(stack, inner.init(params))[0])


def test_a_step_in_which_all_tasks_are_masked_is_none():
    params, fn = {"w": PARAMS["w"]}, surgery.per_task_surgery_value_and_grad
    tx = surgery.sum()
    args = (normal(2, 4, 5), jnp.zeros((2, 4)))
    extra_args = {"task_mask": jnp.zeros(2, bool)}
    (_, grads), _ = fn(mean_of_labelled, tx)(params, tx.init(params), *args, extra_args=extra_args)
    assert_same(grads, {"w": jnp.zeros((5, 3))})


def flops(fn, *args):
    return jax.jit(fn).lower(*args).compile().cost_analysis()["flops"]


def test_tasks_with_data_of_unequal_shapes_cost_their_own_data_alone():
    num_tasks, width = 4, 48
    data = {str(task): normal(32 + task, width) for task in range(num_tasks)}
    params = [normal(width, width, seed=layer) for layer in range(2)]

    def loss_fn(params, inputs):
        for kernel in params:
            inputs = jnp.tanh(inputs @ kernel)
        return jnp.mean(inputs**2)

    def losses_fn(params):
        return {task: loss_fn(params, inputs) for task, inputs in data.items()}

    def by_hand(params):
        return [jax.value_and_grad(loss_fn)(params, inputs) for inputs in data.values()]

    least = flops(by_hand, params)
    assert flops(surgery.task_value_and_grad(losses_fn), params) < 1.2 * least
    tx = surgery.mgda()
    step = surgery.surgery_value_and_grad(losses_fn, tx)
    assert_same(
        jax.jit(surgery.task_value_and_grad(losses_fn))(params)[1],
        [jnp.stack(rows) for rows in zip(*(grads for _, grads in by_hand(params)), strict=True)],
    )
    inner_products = 2 * num_tasks * (num_tasks + 1) * sum(leaf.size for leaf in params)
    assert flops(step, params, tx.init(params)) < 1.2 * least + inner_products
