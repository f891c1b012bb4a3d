"""When a surgery runs: `every` and `start_after`."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from optax_surgery import checks, core, trees


class EveryState(NamedTuple):
    """State of `every`.

    Attributes:
      age: () int32, for how many steps the weights have been in use; 0 if they are due.
      weights_in_use: (T,).
      inner_state: the state of the surgery.
    """

    age: jax.Array
    weights_in_use: jax.Array
    inner_state: Any


def every(surgery: core.Surgery, k: int, num_tasks: int) -> core.Surgery:
    """Finds new weights in every k-th step, and uses them until the next ones.

    In between the Gramian is not computed, and the surgery and its state rest.

    Args:
      surgery: a surgery that works on the Gramian or the losses.
      k: after how many steps the weights are renewed, at least 1.
      num_tasks: number of tasks T, at least 1.

    Returns:
      A `Surgery` from leaves `(T, *shape)` to leaves `(*shape)`, with the weights in use in its
      state.

    Raises:
      ValueError: for what is no surgery, and for a `k` below 1; at trace time, from `update`, if
        the gradients are not those of `num_tasks` tasks, if the surgery works on coordinates, or
        if it needs the Gramian of two batches and the caller gave none.

    Note:
      A task that is masked when the weights are renewed keeps the weight that it had, zero at
      first. Under `vmap`, as over seeds, a step in which no seed renews costs as little as without.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_surgery as surgery
      >>> tx = surgery.every(surgery.pcgrad(), k=2, num_tasks=2)
      >>> task_grads = jnp.array([[1.0, 0.0], [-1.0, 1.0]])
      >>> updates, state = tx.update(task_grads, tx.init(jnp.zeros(2)))
      >>> updates, state = tx.update(jnp.eye(2), state)  # nothing to be computed anew
      >>> updates
      Array([2. , 1.5], dtype=float32)
    """
    name = checks.arguments(
        every, locals(), surgery=core.Surgery, k="int [1, inf)", num_tasks="int [1, inf)"
    )

    def init():
        return EveryState(jnp.zeros((), jnp.int32), jnp.zeros(num_tasks), surgery.init(()))

    def update(tasks, state):
        due = state.age == 0
        kept = state.weights_in_use, state.inner_state

        def renew():
            weights, inner_state = core.weights_of(surgery, tasks, state.inner_state)
            weights = weights.astype(state.weights_in_use.dtype)
            weights = jnp.where(tasks.task_mask, weights, state.weights_in_use)
            return jax.tree.map(
                lambda new, old: jnp.where(due, new, old), (weights, inner_state), kept
            )

        weights, inner_state = lax.cond(trees.everywhere(~due), lambda: kept, renew)
        return weights, EveryState((state.age + 1) % k, weights, inner_state)

    return core.gradient_surgery(core.Weighting(init, update), name=name, num_tasks=num_tasks)


class StartAfterState(NamedTuple):
    """State of `start_after`.

    Attributes:
      num_updates: () int32, the number of updates so far.
      operates: () bool, whether the next update is the surgery's.
      inner_state: the state of the surgery.
    """

    num_updates: jax.Array
    operates: jax.Array
    inner_state: Any


def start_after(surgery: core.Surgery, step: int) -> core.Surgery:
    """Takes the mean of the task gradients at first, and operates after a number of steps.

    Before, the Gramian is not computed, and the surgery's state stays as it was.

    Args:
      surgery: the surgery that comes later.
      step: after how many updates, at least 0.

    Returns:
      A `Surgery` from leaves `(T, *shape)` to leaves `(*shape)`.

    Raises:
      ValueError: for what is no surgery, and for a negative `step`; at trace time, from `update`,
        if the gradients are not stacked.

    Note:
      The mean is that of the tasks which are not masked. An update that is a sum, as PCGrad's,
      is about T times as long: with SGD, scale it by 1/T. Under `vmap`, as over seeds, every step
      costs as much as one in which the surgery runs.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_surgery as surgery
      >>> tx = surgery.start_after(surgery.pcgrad(), step=1)
      >>> task_grads = jnp.array([[1.0, 0.0], [-1.0, 1.0]])
      >>> updates, state = tx.update(task_grads, tx.init(jnp.zeros(2)))
      >>> updates
      Array([0. , 0.5], dtype=float32)
      >>> updates, state = tx.update(task_grads, state)
      >>> updates
      Array([0.5, 1.5], dtype=float32)
    """
    name = checks.arguments(start_after, locals(), surgery=core.Surgery, step="int [0, inf)")

    def init(params):
        return StartAfterState(jnp.zeros((), jnp.int32), jnp.array(step == 0), surgery.init(params))

    def update(task_updates, state, params, extra_args):
        equal = core.tasks_of(name, task_updates, extra_args).preference(None)

        def operate():
            return surgery.update(task_updates, state.inner_state, params, **extra_args)

        def average():
            mean = trees.combine(equal, task_updates, extra_args.get("task_mask"))
            return mean, state.inner_state

        updates, inner_state = core.branch(state.operates, operate, average)
        num_updates = jnp.asarray(optax.safe_increment(state.num_updates))
        return updates, StartAfterState(num_updates, num_updates >= step, inner_state)

    return core.transformation(init, update, name=name, state_kind=StartAfterState)


def rests(state: Any) -> jax.Array | bool:
    """Whether the next update looks at no task's gradient by itself.

    That is so if all surgeries in a state are within an `every` or a `start_after` that rests.
    """
    kinds = (EveryState, StartAfterState, core.SurgeryState)

    def of(node):
        if isinstance(node, EveryState):
            return node.age != 0
        if isinstance(node, StartAfterState):
            return ~node.operates
        if isinstance(node, core.SurgeryState) and isinstance(node.weighting_state, EveryState):
            return of(node.weighting_state)
        return False

    nodes = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, kinds))
    found = [of(node) for node in nodes if isinstance(node, kinds)]
    if not found or any(resting is False for resting in found):
        return False
    return jnp.all(jnp.stack(found))
