"""What was done, for everyone to see: `monitor` and `scalars`."""

import typing
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_surgery import checks, core, metrics, trees


class MonitorState(NamedTuple):
    """State of `monitor`.

    Attributes:
      gramian: (T, T) inner products of the latest task gradients times `scale`.
      scale: () the power of two that the gradients were multiplied by; 1 unless their squares
        would not fit the dtype.
      weights: (T,) the weights that the surgery found, None without a surgery.
      inner_state: the state of the surgery, None without one.
    """

    gramian: jax.Array
    scale: jax.Array
    weights: jax.Array | None
    inner_state: Any


@typing.overload
def monitor(num_tasks: int, surgery: core.Surgery) -> core.Surgery: ...


@typing.overload
def monitor(num_tasks: int, surgery: None = None) -> optax.GradientTransformationExtraArgs: ...


def monitor(
    num_tasks: int, surgery: core.Surgery | None = None
) -> optax.GradientTransformationExtraArgs:
    """Keeps the Gramian of the task gradients in its state, and the weights of a surgery.

    Around a surgery it does what the surgery does, with one Gramian and one solve for both.
    Without one it passes the gradients through: chained before `mean()`, it shows conflicts before
    anyone treats them. All of `optax_surgery.metrics` follows from the Gramian, and `scalars` makes
    numbers for a logger of the state.

    Args:
      num_tasks: number of tasks T, at least 1.
      surgery: what to operate with; it has to work on the Gramian or the losses.

    Returns:
      With a surgery a `Surgery` from leaves `(T, *shape)` to leaves `(*shape)`, else an
      `optax.GradientTransformationExtraArgs` from leaves `(T, *shape)` to the same leaves. A
      `MonitorState` with `gramian`, `scale` and `weights` is in its state: zero before the first
      step, and in the rows of masked tasks, in the default float dtype.

    Raises:
      ValueError: for what is no surgery; at trace time, from `update`, if the gradients are not
        those of `num_tasks` tasks, or if the surgery works on coordinates and so has no weights.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import optax_surgery as surgery
      >>> tx = optax.chain(surgery.monitor(2, surgery.pcgrad()), optax.sgd(0.1))
      >>> task_grads = jnp.array([[1.0, 0.0], [-1.0, 1.0]])
      >>> updates, state = tx.update(task_grads, tx.init(jnp.zeros(2)))
      >>> optax.tree.get(state, "weights")
      Array([2. , 1.5], dtype=float32)
      >>> print(surgery.conflict_fraction(optax.tree.get(state, "gramian")))
      1.0
    """
    name = checks.arguments(monitor, locals(), num_tasks="int [1, inf)", surgery=core.Surgery)
    if surgery is None:
        return _look(name, num_tasks)

    def init():
        state = _initial_state(num_tasks)
        return state._replace(weights=jnp.zeros(num_tasks), inner_state=surgery.init(()))

    def update(tasks, state):
        weights, inner_state = core.weights_of(surgery, tasks, state.inner_state)
        return weights, MonitorState(tasks.gramian, tasks.gramian_scale, weights, inner_state)

    return core.gradient_surgery(core.Weighting(init, update), name=name, num_tasks=num_tasks)


def _initial_state(num_tasks: int) -> MonitorState:
    return MonitorState(jnp.zeros((num_tasks, num_tasks)), jnp.ones(()), None, None)


def _look(name: str, num_tasks: int) -> optax.GradientTransformationExtraArgs:
    def init(params):
        del params
        return _initial_state(num_tasks)

    def update(task_updates, state, params, extra_args):
        del params
        checks.state(name, jax.eval_shape(lambda: _initial_state(num_tasks)), state)
        tasks = core.tasks_of(name, task_updates, extra_args)
        new = MonitorState(tasks.gramian, tasks.gramian_scale, None, None)
        return task_updates, jax.tree.map(lambda leaf, old: leaf.astype(old.dtype), new, state)

    kind = optax.GradientTransformationExtraArgs
    return core.transformation(
        init, update, name=name, num_tasks=num_tasks, kind=kind, state_kind=MonitorState
    )


# For a logger


def scalars(state: Any, names: Any = None) -> dict[str, jax.Array]:
    """Makes numbers for a logger of an optimiser's state.

    Of each part of the state that has them:

    - from `monitor`: `conflict_share`, the share of pairs of tasks with a negative inner product;
      `least_cosine` and `mean_cosine` over the pairs (1 if there is none); `condition_number`;
      `norm/NAME` of each task's gradient, and `weight/NAME` with a surgery;
    - from a method with a solver: `converged` and `residual`;
    - from `aligned_mtl`: `num_components`, how many principal components it kept;
    - from `on_nonfinite`: `tasks_masked`, how many tasks were not finite so far;
    - from every surgery: `unusable_losses`, how many losses it could not use so far.

    Args:
      state: of any optimiser; or a Flax `TrainState` or `nnx.Optimizer`, of which it is the
        `opt_state`; or several in a dict, whose names come before theirs, 'actor/weight/left'.
      names: T names of the tasks, or the losses, a tree with their names. By default '0', '1', ...

    Returns:
      A flat dict from names to () arrays, also under `jit`, and in a `scan`, which makes curves of
      them. What is in a group of `leafwise` or `optax.partition` has its name before it,
      'encoder/conflict_share'; what would have the name of another has a number before it.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import optax_surgery as surgery
      >>> tx = optax.chain(surgery.monitor(2, surgery.pcgrad()), optax.sgd(0.1))
      >>> task_grads = jnp.array([[1.0, 0.0], [-1.0, 1.0]])
      >>> updates, state = tx.update(task_grads, tx.init(jnp.zeros(2)))
      >>> for name, number in surgery.scalars(state, ["fit", "decay"]).items():
      ...     print(name, f"{number:.3f}")
      unusable_losses 0.000
      conflict_share 1.000
      least_cosine -0.707
      mean_cosine -0.707
      condition_number 2.618
      norm/fit 1.000
      norm/decay 1.414
      weight/fit 2.000
      weight/decay 1.500
    """
    if names is not None and not all(isinstance(name, str) for name in jax.tree.leaves(names)):
        names = trees.task_names(names)
    found: dict[str, jax.Array] = {}
    for path, node in _nodes(state, ()):
        for name, number in _numbers(node, names):
            key, copy = "/".join([*path, name]), 0
            if name in _COUNTS and key in found:
                found[key] += number
                continue
            while key in found:
                copy += 1
                key = "/".join([*path, str(copy), name])
            found[key] = number
    return found


def _nodes(tree: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The named tuples in a state, and the names of the groups that each is in."""
    if isinstance(tree, Mapping):
        for name, child in tree.items():
            yield from _nodes(child, (*path, str(name)))
    elif isinstance(tree, tuple | list):
        if hasattr(tree, "_fields"):
            yield path, tree
        for child in tree:
            yield from _nodes(child, path)
    elif hasattr(tree, "opt_state"):
        yield from _nodes(tree.opt_state, path)


def _numbers(node: Any, names: list[str] | None) -> Iterator[tuple[str, jax.Array]]:
    fields = node._fields
    if "gramian" in fields:
        gramian, scale = jnp.asarray(node.gramian), jnp.asarray(node.scale)
        if gramian.ndim > 2:
            remedy = "Map over seeds or steps: `jax.vmap(scalars)(state)`."
            checks.refuse("a (T, T) Gramian", f"one of shape {gramian.shape}", "state", remedy)
        names = trees.task_names(jnp.diagonal(gramian)) if names is None else names
        if len(names) != len(gramian):
            remedy = "Pass the losses, or one name per task in their order."
            checks.refuse(f"{len(gramian)} names of tasks", list(names), "names", remedy)
        yield "conflict_share", metrics.conflict_fraction(gramian)
        least, mean = _cosines_of_pairs(gramian)
        yield "least_cosine", least
        yield "mean_cosine", mean
        yield "condition_number", metrics.condition_number(gramian)
        norms = metrics.task_norms(gramian) / scale
        yield from ((f"norm/{name}", norm) for name, norm in zip(names, norms, strict=True))
        if node.weights is not None:
            weights = jnp.asarray(node.weights)
            yield from ((f"weight/{name}", one) for name, one in zip(names, weights, strict=True))
    for field, name in _REPORTED.items():
        if field in fields:
            yield name, jnp.asarray(getattr(node, field))


_REPORTED = {
    "converged": "converged",
    "residual": "residual",
    "num_components": "num_components",
    "nonfinite_tasks": "tasks_masked",
    "unusable_losses": "unusable_losses",
}
# Of a surgery within a surgery, which count both, there is one number.
_COUNTS = ("tasks_masked", "unusable_losses")


def _cosines_of_pairs(gramian: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The least and the mean cosine over pairs of gradients that are not zero, 1 without any."""
    present = jnp.diagonal(gramian) > 0
    pairs = jnp.triu(present[:, None] & present[None, :], k=1)
    cosines = metrics.cosine_similarities(gramian)
    total = jnp.sum(jnp.where(pairs, cosines, jnp.zeros_like(cosines)))
    number = jnp.sum(pairs).astype(cosines.dtype)
    mean = jnp.where(number > 0, total / jnp.maximum(number, 1), 1)
    return jnp.min(cosines, where=pairs, initial=1), mean
