"""A leaf has one path everywhere: in messages, and where users choose leaves by it."""

from typing import NamedTuple

import equinox
import flax.core
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import optax_surgery as surgery


class Params(NamedTuple):
    trunk: dict
    head: jax.Array


class Network(equinox.Module):
    layers: list
    scale: jax.Array

    def __call__(self, inputs):
        return self.scale * self.layers[1](self.layers[0](inputs))


class Attention(equinox.Module):
    query: jax.Array
    value: equinox.nn.Linear


class Model(nnx.Module):
    def __init__(self):
        self.encoder = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
        self.value = nnx.Linear(2, 1, rngs=nnx.Rngs(1))


def linear(number):
    return equinox.nn.Linear(2, 2, key=jax.random.key(number))


STATE = nnx.state(Model(), nnx.Param)
OF_MODEL = ["encoder/bias", "encoder/kernel", "value/bias", "value/kernel"]
AS_PURE = getattr(nnx, "as_pure", lambda state: nnx.State(nnx.to_pure_dict(state)))
LAYER = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}

TREES = {
    "a dict": (
        {"encoder": {"layer_0": LAYER}, "head": jnp.ones(2)},
        ["encoder/layer_0/bias", "encoder/layer_0/kernel", "head"],
    ),
    "a named tuple": (Params(LAYER, jnp.ones(2)), ["trunk/bias", "trunk/kernel", "head"]),
    "a list": ([LAYER, jnp.ones(2)], ["0/bias", "0/kernel", "1"]),
    "a tuple": ((jnp.ones(1), (jnp.ones(2), LAYER)), ["0", "1/0", "1/1/bias", "1/1/kernel"]),
    "an nnx.State of Param": (STATE, OF_MODEL),
    "an nnx.State of arrays": (AS_PURE(STATE), OF_MODEL),
    "a dict of nnx.Param": (
        nnx.to_pure_dict(STATE) | {"a": nnx.Param(jnp.ones(2))},
        ["a", *OF_MODEL],
    ),
    "an Equinox module": (
        Network([linear(0), linear(1)], jnp.ones(())),
        ["layers/0/weight", "layers/0/bias", "layers/1/weight", "layers/1/bias", "scale"],
    ),
    "an Equinox module with a field called value": (
        Attention(jnp.ones(2), linear(0)),
        ["query", "value/weight", "value/bias"],
    ),
    "a frozen dict": (
        flax.core.FrozenDict({"params": {"dense": LAYER}}),
        ["params/dense/bias", "params/dense/kernel"],
    ),
    "keys with slashes": (
        {"mlp/~/linear_0": {"w": jnp.ones(2)}, "mlp/~/linear_1": {"w": jnp.ones(2)}},
        ["mlp/~/linear_0/w", "mlp/~/linear_1/w"],
    ),
    "keys with slashes that would have one path": (
        {"a": {"b/c": jnp.ones(2), "d": jnp.ones(2)}, "a/b": {"c": jnp.ones(2)}},
        ["a/'b/c'", "a/d", "'a/b'/c"],
    ),
    "a bare array": (jnp.ones(2), ["updates"]),
}


@pytest.fixture(params=TREES)
def tree(request):
    return TREES[request.param]


def stacked(params):
    return jax.tree.map(lambda leaf: jnp.stack([leaf, -leaf, 2 * leaf]), params)


def losses_fn(params):
    leaves = [jnp.sum(leaf) for leaf in jax.tree.leaves(params)]
    return [sum(leaves), 2 * leaves[0]]


class Seen(list):
    """A choice of all leaves, which remembers their paths."""

    def __call__(self, path):
        self.append(path)
        return path

    def take(self):
        seen = list(self)
        self.clear()
        return seen


def with_leaf(params, number, leaf):
    leaves, structure = jax.tree.flatten(params)
    leaves[number] = leaf
    return jax.tree.unflatten(structure, leaves)


def test_in_messages(tree):
    params, paths = tree
    tx = surgery.pcgrad()
    task_grads = stacked(params)
    for number, path in enumerate(paths):
        leaf = jax.tree.leaves(task_grads)[number]
        for wrong in (leaf.astype(int), leaf[:0], jnp.ones((3, 7, 7))):
            with pytest.raises(ValueError, match="^Expected ") as caught:  # noqa: RUF043
                tx.update(with_leaf(task_grads, number, wrong), tx.init(params), params)
            assert f" at '{path}'. " in str(caught.value)
        with pytest.raises(ValueError, match="^Expected an update of shape") as caught:  # noqa: RUF043
            surgery.apply_updates(params, with_leaf(params, number, jnp.ones((7, 7))))
        assert f" at '{path}'. " in str(caught.value)


def test_where_leaves_are_chosen_by_a_function(tree):
    params, paths = tree
    task_grads, seen = stacked(params), Seen()
    for tx in (
        surgery.on_shared(surgery.mean(), seen),
        surgery.leafwise(surgery.mean(), seen),
        surgery.on_shared(surgery.on_shared(surgery.mean(), seen), lambda path: True),
        surgery.leafwise(surgery.on_shared(surgery.mean(), seen), lambda path: "all"),
    ):
        state = tx.init(params)
        assert seen.take() == paths
        tx.update(task_grads, state)
        assert seen.take() == paths
        tx.update(task_grads, state, params)
        assert set(seen.take()) == set(paths)
    fn = surgery.surgery_value_and_grad(losses_fn, surgery.mean(), shared=seen)
    jax.eval_shape(fn, params, surgery.mean().init(params))
    assert seen.take() == paths
    assert list(surgery.leafwise(surgery.mean()).init(params).group_states) == paths


def test_where_leaves_are_chosen_by_their_path(tree):
    params, paths = tree
    task_grads = stacked(params)
    for number, path in enumerate(paths):
        tx = surgery.on_shared(surgery.constant([1.0, 0.0, 0.0]), path)
        updates, _ = tx.update(task_grads, tx.init(params), params)
        for other, leaf in enumerate(jax.tree.leaves(updates)):
            expected = jax.tree.leaves(params)[other] * (1 if other == number else 2)
            np.testing.assert_allclose(leaf, expected, rtol=1e-6)


def test_where_leaves_are_chosen_by_what_infer_shared_finds(tree):
    params, paths = tree
    found = surgery.infer_shared(losses_fn, params)
    assert jax.tree.leaves(found) == [True] + [False] * (len(paths) - 1)
    tx = surgery.on_shared(surgery.constant([1.0, 0.0, 0.0]), found)
    by_path = surgery.on_shared(surgery.constant([1.0, 0.0, 0.0]), paths[0])
    fn = surgery.surgery_value_and_grad(losses_fn, surgery.constant([1.0, 0.0]), shared=found)
    _, state = fn(params, tx.init(params))
    assert jax.tree.structure(state) == jax.tree.structure(tx.init(params))
    jax.tree.map(
        np.testing.assert_array_equal,
        *(each.update(stacked(params), each.init(params), params)[0] for each in (tx, by_path)),
    )


@pytest.mark.parametrize("choice", ["a function", "a path", "infer_shared"])
def test_within_an_nnx_optimizer(choice):
    """It makes states of `Param`s, and updates arrays: what is chosen is the same."""
    model, seen = Model(), Seen()
    found = surgery.infer_shared(losses_fn, nnx.state(model, nnx.Param))
    shared = {"a function": seen, "a path": "encoder", "infer_shared": found}[choice]
    tx = optax.chain(surgery.on_shared(surgery.pcgrad(), shared), optax.sgd(0.1))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    optimizer.update(model, stacked(nnx.state(model, nnx.Param)))
    if choice == "a function":
        assert set(seen) == set(OF_MODEL)


def test_a_part_of_a_partition_has_the_paths_of_the_whole():
    params, seen = {"encoder": LAYER, "head": {"kernel": jnp.ones(2)}}, Seen()
    labels = {"encoder": "shared", "head": "own"}
    tx = optax.partition(
        {"shared": surgery.leafwise(surgery.mean(), seen), "own": surgery.sum()}, labels
    )
    tx.update(stacked(params), tx.init(params), params)
    assert set(seen) == {"encoder/bias", "encoder/kernel"}


def test_what_is_in_a_choice_of_paths():
    """A path chooses a leaf, or all that is in it, and nothing that only begins like it."""
    params = {"head": jnp.ones(1), "head_2": jnp.ones(1), "heads": {"a": jnp.ones(1)}}
    for choice, expected in {
        "head": [True, False, False],
        "heads": [False, False, True],
        "heads/a": [False, False, True],
    }.items():
        for shared in (choice, [choice], (choice, choice)):
            tx = surgery.on_shared(surgery.constant([1.0, 0.0, 0.0]), shared)
            updates, _ = tx.update(stacked(params), tx.init(params), params)
            assert [float(leaf[0]) == 1 for leaf in jax.tree.leaves(updates)] == expected


def test_names_of_tasks_are_paths_too():
    losses = {"b": {"x": 1.0}, "a": [1.0, 2.0]}
    assert surgery.task_names(losses) == ["a/0", "a/1", "b/x"]
    tx = surgery.on_tasks(surgery.mean(), ["a/1", "b/x"])
    updates, _ = tx.update(jnp.eye(3), tx.init(jnp.ones(3)), losses=losses)
    np.testing.assert_array_equal(updates, [0, 0.5, 0.5])
