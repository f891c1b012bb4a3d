"""Micro-batches: `accumulate`."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_surgery import checks, core, trees


class AccumulateState(NamedTuple):
    """State of `accumulate`.

    Attributes:
      micro_step: () int32, the number of micro-batches since the latest update.
      ready: () bool, whether the latest call made an update.
      averages: pytree of leaves `(T, *param.shape)`, float32 or float64: the mean gradients over
        the latest micro-batches.
      losses: (T,) mean losses over the same.
      num_gradients: (T,) int32, over how many micro-batches; 0 for a task masked in all of them.
      inner_state: the state of the transformation.
    """

    micro_step: jax.Array
    ready: jax.Array
    averages: optax.Updates
    losses: jax.Array
    num_gradients: jax.Array
    inner_state: Any


def accumulate(
    tx: optax.GradientTransformation, every_k: int, num_tasks: int
) -> optax.GradientTransformationExtraArgs:
    """Averages the task gradients over k micro-batches, and makes one update of them.

    The update is that of one batch k times as large. `tx`, surgery and optimiser, runs in every
    k-th step only; in the others the update is zero. `optax.MultiSteps` cannot stand in for it: it
    has no room for the stack, and runs the surgery on every micro-batch.

    Args:
      tx: what is to run on the averages: a surgery, or `optax.chain(surgery, optimiser)`.
      every_k: number of micro-batches per update, at least 1.
      num_tasks: number of tasks T, at least 1.

    Returns:
      A transformation of the kind of `tx` from leaves `(T, *shape)` to leaves `(*shape)`; of a
      surgery a `Surgery`. `tx` gets the averages of gradients and losses, and the other extra
      arguments as they are in the k-th step. A task is averaged over the micro-batches in which it
      is not masked, and masked if there is none. The state holds one number per coordinate and
      task.

    Raises:
      ValueError: for an `every_k` below 1; at trace time, from `update`, if the gradients are not
        those of `num_tasks` tasks, or if a `gramian` is given, as averages of Gramians are not
        those of averages.

    Note:
      Pass `losses` in every step or in none. As the aggregator of
      `optax.experimental.aggregating.process`, put `accumulate(surgery, ...)`: `ready` in the
      state tells it when to run the optimiser.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import optax_surgery as surgery
      >>> tx = optax.chain(surgery.pcgrad(), optax.sgd(1.0))
      >>> tx = surgery.accumulate(tx, every_k=2, num_tasks=2)
      >>> task_grads = jnp.array([[2.0, 0.0], [-1.0, 1.0]])
      >>> updates, state = tx.update(task_grads, tx.init(jnp.zeros(2)))
      >>> updates
      Array([0., 0.], dtype=float32)
      >>> task_grads = jnp.array([[0.0, 0.0], [-1.0, 1.0]])
      >>> updates, state = tx.update(task_grads, state)
      >>> updates
      Array([-0.5, -1.5], dtype=float32)
    """
    name = checks.arguments(
        accumulate,
        locals(),
        tx=optax.GradientTransformation,
        every_k="int [1, inf)",
        num_tasks="int [1, inf)",
    )
    kind = core.kind_of(tx)
    tx = optax.with_extra_args_support(tx)

    def init(params):
        return AccumulateState(
            micro_step=jnp.zeros((), jnp.int32),
            ready=jnp.zeros((), bool),
            averages=trees.zeros_per_task(params, num_tasks),
            losses=jnp.zeros(num_tasks),
            num_gradients=jnp.zeros(num_tasks, jnp.int32),
            inner_state=tx.init(params),
        )

    def update(task_updates, state, params, extra_args):
        instead = " Or average the losses over micro-batches where they are computed, in a scan."
        checks.no_gramian(name, extra_args.get("gramian"), instead)
        checks.leading_axis(name, num_tasks, (state.averages, state.losses, state.num_gradients))
        checks.state_of_leaves(name, checks.paths(task_updates), checks.paths(state.averages))
        tasks = core.tasks_of(name, task_updates, extra_args)
        active, given = tasks.task_mask, extra_args.get("losses")
        if "task_mask" in extra_args:
            task_updates = trees.mask_tasks(active, task_updates)

        averages, mean_losses, num_gradients = jax.tree.map(
            lambda leaf: jnp.where(state.micro_step == 0, jnp.zeros_like(leaf), leaf),
            (state.averages, state.losses, state.num_gradients),
        )
        num_gradients = num_gradients + active.astype(jnp.int32)
        dtype = trees.gramian_dtype((averages, mean_losses))
        rates = active.astype(dtype) / jnp.maximum(num_gradients, 1).astype(dtype)
        averages = trees.move_tasks(rates, averages, task_updates)
        if given is not None:
            mean_losses = jnp.asarray(trees.move_tasks(rates, mean_losses, tasks.losses))
            extra_args = extra_args | {"losses": trees.like(given, mean_losses)}
        extra_args = extra_args | {"task_mask": trees.like(given, num_gradients > 0)}

        def run():
            return tx.update(
                jax.tree.map(lambda mean, leaf: mean.astype(leaf.dtype), averages, task_updates),
                state.inner_state,
                params,
                **extra_args,
            )

        micro_step = (state.micro_step + 1) % every_k
        ready = micro_step == 0
        updates, inner_state = core.branch(ready, run, lambda: (core.zeros(run), state.inner_state))
        return updates, AccumulateState(
            micro_step, ready, averages, mean_losses, num_gradients, inner_state
        )

    return core.transformation(
        init, update, name=name, num_tasks=num_tasks, kind=kind, state_kind=AccumulateState
    )
