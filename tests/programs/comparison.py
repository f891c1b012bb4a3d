"""What exact surgery finds for a program, and what the stack of its gradients says."""

from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from optax_surgery import checks
from optax_surgery.programs import outer_products, own_data, shared_data


class Found(NamedTuple):
    """What both ways return for one program: ours, and that of the stack.

    Attributes:
      gramian: (T, T) ours.
      sums: ours of given weights, by what was kept (None where nothing was) and by another pass.
      rows: (T, N) of the stack.
    """

    gramian: np.ndarray
    sums: dict[str, np.ndarray]
    rows: np.ndarray

    @property
    def weights(self):
        return weights_for(len(self.rows))


def weights_for(num_tasks):
    return np.cos(np.arange(num_tasks)) + 0.1


def by_rows(tree, num_rows):
    leaves = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(tree)]
    return np.concatenate([leaf.reshape(num_rows, -1) for leaf in leaves], axis=1)


def both_ways(losses_fn, params):
    num_leaves = len(jax.tree.leaves(params))

    def losses_of(params: Any):
        return checks.losses(losses_fn(params))

    @jax.jit
    def run(params):
        passes = shared_data.Backward(lambda params: (losses_of(params), None), params)
        return *_found(passes, num_leaves), jax.jacrev(losses_of)(params)

    return _as_found(*run(params))


def both_ways_of_own_data(loss_fn, params, args, chunk_size=None):
    num_leaves = len(jax.tree.leaves(params))

    @jax.jit
    def run(params):
        def loss_of(params, args):
            return loss_fn(params, *args), None

        passes = own_data.Backward(loss_of, params, args, chunk_size)
        stack = jax.vmap(jax.grad(lambda params, args: loss_fn(params, *args)), (None, 0))
        return *_found(passes, num_leaves), stack(params, args)

    return _as_found(*run(params))


def _found(passes, num_leaves):
    gramian, kept = passes.gramian([True] * num_leaves)
    weights = [jnp.asarray(weights_for(passes.num_tasks), gramian.dtype)] * num_leaves
    sums = {"another pass": passes.update(weights, None)}
    if kept is not None:
        sums["what was kept"] = passes.update(weights, kept)
    return gramian, sums


def _as_found(gramian, sums, stack):
    sums = {way: by_rows(found, 1)[0] for way, found in sums.items()}
    return Found(np.asarray(gramian, np.float64), sums, by_rows(stack, len(gramian)))


def multiplied():
    """Within this, parameters go by products wherever a program multiplies them."""
    return mock.patch.object(outer_products, "product_cost", return_value=0)


def assert_gramian(found, tolerance):
    lengths = np.linalg.norm(found.rows, axis=1)
    error = np.abs(found.gramian - found.rows @ found.rows.T)
    assert np.all(error <= tolerance * np.outer(lengths, lengths))


def assert_sums(found, tolerance):
    lengths = np.linalg.norm(found.rows, axis=1)
    for total in found.sums.values():
        error = np.linalg.norm(total - found.weights @ found.rows)
        assert error <= tolerance * (np.abs(found.weights) @ lengths)


def inner_programs(eqn):
    """The programs within an equation."""
    for value in eqn.params.values():
        for each in value if isinstance(value, tuple | list) else (value,):
            inner = getattr(each, "jaxpr", each)
            if hasattr(inner, "eqns"):
                yield inner
