"""Which leaves a surgery sees: `on_shared` and `leafwise`."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from optax_surgery import checks, core, trees

Shared = Any  # a function of a path, paths, or a tree of booleans; see `on_shared`


def on_shared(
    surgery: core.Surgery, shared: Shared, others: Literal["sum", "weighted"] = "sum"
) -> core.Surgery:
    """Operates on the parameters that the tasks share, and combines the gradients of the others.

    The head of one task has a gradient of that task only. In the Gramian it would make the
    gradients look more orthogonal, and longer, than they are where tasks meet.

    Args:
      surgery: what to do with the shared parameters.
      shared: which leaves are shared: a function of a leaf's path ('encoder/layer_0/kernel') that
        returns a boolean; a path, of a leaf or of what leaves are in, or a list of them; a tree of
        booleans like the parameters, as `infer_shared` finds it; or a list of a boolean per leaf.
      others: one of "sum" (the other leaves get their summed gradient, which for a head of one
        task is its own) and "weighted" (they are summed with the weights that the surgery finds
        for the shared ones).

    Returns:
      A `Surgery` from leaves `(T, *shape)` to leaves `(*shape)`. Its state is that of the surgery.

    Raises:
      ValueError: for what is no surgery, and for another value of `others`; at trace time, if no
        leaf is shared, or with "weighted" and a surgery that works on coordinates; and where a
        surgery around it has made the Gramian: what makes one goes inside.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_surgery as surgery
      >>> tx = surgery.on_shared(surgery.pcgrad(), lambda path: path.startswith("trunk"))
      >>> params = {"trunk": jnp.zeros(2), "head": jnp.zeros(())}
      >>> task_grads = {"trunk": jnp.array([[1.0, 0.0], [-1.0, 1.0]]), "head": jnp.array([0.0, 5])}
      >>> updates, state = tx.update(task_grads, tx.init(params), params)
      >>> updates
      {'head': Array(5., dtype=float32), 'trunk': Array([0.5, 1.5], dtype=float32)}
    """
    name = checks.arguments(on_shared, locals(), surgery=core.Surgery, others=("sum", "weighted"))

    def parts(tree):
        mask = checks.chosen("shared", shared, tree)
        return mask, *trees.split(mask, tree)

    def init(params):
        return surgery.init(parts(params)[1] if jax.tree.leaves(params) else params)

    def update(task_updates, state, params, extra_args):
        checks.outermost(name, isinstance(extra_args.get("gramian"), core.MadeGramian))
        mask, operated, rest = parts(task_updates)
        task_mask = extra_args.get("task_mask")
        if others == "weighted":
            tasks = core.tasks_of(name, operated, extra_args)
            weights, state = core.weights_of(surgery, tasks, state)
            return trees.combine(weights, task_updates, task_mask), state
        shared_params = None if params is None else parts(params)[1]
        updates, state = surgery.update(operated, state, shared_params, **extra_args)
        if jax.tree.leaves(rest):
            rest = trees.combine(jnp.ones(checks.stacked(rest)), rest, task_mask)
        return trees.merge(mask, updates, rest, task_updates), state

    return core.transformation(init, update, name=name)


class LeafwiseState(NamedTuple):
    """State of `leafwise`.

    Attributes:
      group_states: dict from the name of a group to the state of its surgery.
    """

    group_states: dict[str, Any]


def leafwise(surgery: core.Surgery, group_of: Callable[[str], str] | None = None) -> core.Surgery:
    """Operates on every leaf, or on every group of leaves, by itself.

    Each group has a Gramian and a state of its own: gradients that agree as a whole may
    conflict in a layer. Memory and reads are those of one surgery.

    Args:
      surgery: what to do in each group.
      group_of: from a leaf's path ('encoder/layer_0/kernel') to the name of its group, such as
        `lambda path: path.split("/")[0]`; each leaf is a group by default.

    Returns:
      A `Surgery` from leaves `(T, *shape)` to leaves `(*shape)`, with a dict from groups to states
      as its state.

    Raises:
      ValueError: for what is no surgery; at trace time, if `group_of` returns no string, or, from
        `update`, if a `gramian` is given, as there are several: what makes one goes inside.

    Note:
      Random surgeries draw the same in every group: PCGrad's orders, say. The groups are known
      with the parameters only: `optax.tree.map_params`, which does without them, is not supported.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_surgery as surgery
      >>> tx = surgery.leafwise(surgery.pcgrad())
      >>> task_grads = {"a": jnp.array([[1.0], [-1.0]]), "b": jnp.array([[3.0], [3.0]])}
      >>> updates, state = tx.update(task_grads, tx.init({"a": jnp.zeros(1), "b": jnp.zeros(1)}))
      >>> updates
      {'a': Array([0.], dtype=float32), 'b': Array([6.], dtype=float32)}
      >>> sorted(state.group_states)
      ['a', 'b']
    """
    name = checks.arguments(leafwise, locals(), surgery=core.Surgery)
    if group_of is not None:
        checks.function("group_of", group_of)

    def groups(tree):
        """From the name of each group to the mask of its leaves."""
        of_leaves = checks.groups(group_of, tree)
        return {
            group: [other == group for other in of_leaves] for group in dict.fromkeys(of_leaves)
        }

    def init(params):
        return LeafwiseState(
            {
                group: surgery.init(trees.split(mask, params)[0])
                for group, mask in groups(params).items()
            }
        )

    def update(task_updates, state, params, extra_args):
        checks.outermost(name, "gramian" in extra_args)
        masks, group_states = groups(task_updates), {}
        checks.state_of_leaves(name, masks, state.group_states)
        updates: list[Any] = jax.tree.leaves(task_updates)
        for group, mask in masks.items():
            of_group = trees.split(mask, task_updates)[0]
            group_params = None if params is None else trees.split(mask, params)[0]
            group_updates, group_states[group] = surgery.update(
                of_group, state.group_states[group], group_params, **extra_args
            )
            found = iter(jax.tree.leaves(group_updates))
            updates = [
                next(found) if take else old for take, old in zip(mask, updates, strict=True)
            ]
        structure = jax.tree.structure(task_updates)
        return jax.tree.unflatten(structure, updates), LeafwiseState(group_states)

    return core.transformation(init, update, name=name, state_kind=LeafwiseState)
