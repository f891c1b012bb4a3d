"""Which leaves a surgery sees: `on_shared` and `leafwise`."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_surgery as surgery
from tests.common import same
from tests.wrappers.cases import NUM_TASKS, PARAMS, assert_close, gradients, in_trunk, module


def test_leafwise_is_a_surgery_of_each_leaf():
    tx, (task_grads,) = surgery.leafwise(surgery.pcgrad()), gradients(1)
    updates, state = tx.update(task_grads, tx.init(PARAMS), PARAMS)
    pcgrad = surgery.pcgrad()
    for got, leaf in zip(jax.tree.leaves(updates), jax.tree.leaves(task_grads), strict=True):
        np.testing.assert_allclose(got, pcgrad.update(leaf, pcgrad.init(None))[0], atol=1e-6)
    assert sorted(state.group_states) == ["head", "trunk/bias", "trunk/kernel"]


def test_groups_of_leaves_have_a_gramian_each():
    tx, (task_grads,) = surgery.leafwise(surgery.pcgrad(), module), gradients(1)
    updates, state = tx.update(task_grads, tx.init(PARAMS), PARAMS)
    pcgrad = surgery.pcgrad()
    for name in ("head", "trunk"):
        alone, _ = pcgrad.update(task_grads[name], pcgrad.init(None))
        assert_close(updates[name], alone)
    assert sorted(state.group_states) == ["head", "trunk"]
    whole, _ = pcgrad.update(task_grads, pcgrad.init(None))
    assert not same(updates, whole)


def test_one_group_of_all_leaves_is_the_surgery():
    tx, (task_grads,) = surgery.leafwise(surgery.pcgrad(), lambda path: "all"), gradients(1)
    updates, _ = tx.update(task_grads, tx.init(PARAMS), PARAMS)
    assert_close(updates, surgery.pcgrad().update(task_grads, surgery.pcgrad().init(None))[0])


def test_a_group_without_a_name_is_refused():
    tx = surgery.leafwise(surgery.pcgrad(), lambda path: "trunk" if in_trunk(path) else None)
    message = "Expected the name of a group, got None at 'head'. Return a string"
    with pytest.raises(ValueError, match=message):
        tx.init(PARAMS)


MASKS = {
    "tree": {"trunk": {"kernel": True, "bias": True}, "head": False},
    "prefix": {"trunk": True, "head": False},
    "path": in_trunk,
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("others", ["sum", "weighted"])
def test_the_gramian_is_that_of_the_shared_leaves(mask, others):
    tx, (task_grads,) = surgery.on_shared(surgery.pcgrad(), MASKS[mask], others), gradients(1)
    task_mask = jnp.array([True, True, False])
    updates, _ = jax.jit(tx.update)(task_grads, tx.init(PARAMS), PARAMS, task_mask=task_mask)

    pcgrad = surgery.pcgrad()
    trunk, _ = pcgrad.update(task_grads["trunk"], pcgrad.init(None), task_mask=task_mask)
    assert_close(updates["trunk"], trunk)
    weights = jnp.ones(NUM_TASKS)
    if others == "weighted":
        hook = {"gramian": surgery.gramian(task_grads["trunk"]), "task_mask": task_mask}
        weights, _ = pcgrad.update(jnp.eye(NUM_TASKS), pcgrad.init(None), **hook)
    expected = jnp.sum(jnp.where(task_mask, weights, 0) * task_grads["head"])
    np.testing.assert_allclose(updates["head"], expected, atol=1e-6)


def test_a_given_gramian_decides_for_the_shared_leaves():
    gramian, (task_grads,) = jnp.eye(NUM_TASKS), gradients(1)
    tx = surgery.on_shared(surgery.pcgrad(), in_trunk)
    updates, _ = tx.update(task_grads, tx.init(PARAMS), PARAMS, gramian=gramian)
    assert_close(updates, jax.tree.map(lambda leaf: leaf.sum(axis=0), task_grads))


def test_all_leaves_may_be_shared():
    tx, (task_grads,) = surgery.on_shared(surgery.pcgrad(), lambda path: True), gradients(1)
    updates, _ = tx.update(task_grads, tx.init(PARAMS), PARAMS)
    assert_close(updates, surgery.pcgrad().update(task_grads, surgery.pcgrad().init(None))[0])


def test_a_mask_that_matches_no_leaf_is_refused():
    tx = surgery.on_shared(surgery.pcgrad(), lambda path: path == "encoder")
    with pytest.raises(ValueError, match=r"Expected a choice that holds a leaf, .*'trunk/kernel'"):
        tx.init(PARAMS)


def test_weights_for_other_leaves_cannot_come_from_coordinates():
    tx = surgery.on_shared(surgery.graddrop(), in_trunk, "weighted")
    with pytest.raises(
        ValueError, match="Expected stacked gradients alone, got a Gramian at 'graddrop'"
    ):
        tx.update(*gradients(1), tx.init(PARAMS), PARAMS)


def test_infer_shared_finds_the_mask():
    def losses_fn(params):
        kernel = jnp.sum(params["trunk"]["kernel"])
        return jnp.stack([kernel * params["head"], kernel + jnp.sum(params["trunk"]["bias"])])

    shared = surgery.infer_shared(lambda params: list(losses_fn(params)), PARAMS)
    tx, task_grads = surgery.on_shared(surgery.pcgrad(), shared), jax.jacrev(losses_fn)(PARAMS)
    updates, _ = tx.update(task_grads, tx.init(PARAMS), PARAMS)
    assert_close(updates["head"], task_grads["head"].sum())


def test_leaves_with_equal_joined_paths_are_groups_of_their_own():
    """Haiku's keys hold slashes."""
    params = {"a/b": {"c": jnp.ones(2)}, "a": {"b/c": jnp.ones(2)}}
    conflict = jnp.array([[1.0, 0.0], [-1.0, 1.0]])
    task_grads = {"a/b": {"c": conflict}, "a": {"b/c": jnp.array([[1.0, 0.0], [1.0, 0.0]])}}
    tx, pcgrad = surgery.leafwise(surgery.pcgrad()), surgery.pcgrad()
    updates, state = tx.update(task_grads, tx.init(params), params)
    assert len(state.group_states) == 2
    assert_close(updates["a/b"]["c"], pcgrad.update(conflict, pcgrad.init(None))[0])
    assert_close(updates["a"]["b/c"], jnp.array([2.0, 0.0]))
    of_first = surgery.on_shared(surgery.pcgrad(), lambda path: path == "'a/b'/c")
    assert_close(of_first.update(task_grads, of_first.init(params))[0], updates)


INSIDE = {
    "on_shared": lambda inner: surgery.on_shared(inner, ["trunk", "head"]),
    "leafwise": surgery.leafwise,
    "leafwise by group": lambda inner: surgery.leafwise(inner, module),
    "start_after": lambda inner: surgery.start_after(inner, 0),
    "on_nonfinite": surgery.on_nonfinite,
    "on_tasks": lambda inner: surgery.on_tasks(inner, [0, 1]),
    "accumulate": lambda inner: surgery.accumulate(inner, 1, NUM_TASKS),
}


@pytest.mark.parametrize("name", INSIDE)
def test_leaves_keep_their_paths_within_other_wrappers(name):
    seen = set()

    def look(path):
        seen.add(path)
        return True

    tx = INSIDE[name](surgery.on_shared(surgery.mean(), look))
    jax.eval_shape(tx.update, *gradients(1), tx.init(PARAMS), PARAMS)
    assert seen == {"head", "trunk/bias", "trunk/kernel"}


@pytest.mark.parametrize(
    "around",
    [
        lambda tx: surgery.every(tx, 2, NUM_TASKS),
        lambda tx: surgery.monitor(NUM_TASKS, tx),
        surgery.normalize_tasks,
        lambda tx: surgery.clip_tasks(tx, 1.0),
    ],
)
@pytest.mark.parametrize("name", ["on_shared", "leafwise"])
def test_what_makes_one_gramian_for_all_leaves_goes_inside(name, around):
    inside = around(INSIDE[name](surgery.pcgrad()))
    with pytest.raises(ValueError, match=f"one Gramian for all of them at '{name}'. Put it outer"):
        inside.update(*gradients(1), inside.init(PARAMS), PARAMS)
    outside = INSIDE[name](around(surgery.pcgrad()))
    jax.eval_shape(outside.update, *gradients(1), outside.init(PARAMS), PARAMS)


class Model(eqx.Module):
    """A model with `__call__`, as every one has, so that a mask like it is callable, too."""

    trunk: eqx.nn.Linear
    head: eqx.nn.Linear

    def __call__(self, inputs):
        return self.head(self.trunk(inputs))


def test_an_equinox_model_and_a_mask_that_can_be_called():
    keys = jax.random.split(jax.random.key(0))
    model = Model(eqx.nn.Linear(2, 2, key=keys[0]), eqx.nn.Linear(2, 1, key=keys[1]))

    def losses_fn(model):
        hidden = model.trunk(jnp.ones(2))
        return [model.head(hidden)[0], jnp.sum(hidden**2)]

    found = surgery.infer_shared(losses_fn, model)
    assert callable(found)
    _, task_grads = surgery.task_value_and_grad(losses_fn)(model)
    updates = [
        surgery.on_shared(surgery.mgda(), mask).update(task_grads, surgery.mgda().init(None), model)
        for mask in (found, "trunk", lambda path: path.startswith("trunk/"))
    ]
    for update, _ in updates:
        assert_close(update, updates[0][0])
        assert_close(update.head.weight, task_grads.head.weight.sum(axis=0))
