"""What is not finite: `on_nonfinite`."""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_surgery import checks, core, trees
from optax_surgery.wrappers import schedule


class OnNonfiniteState(NamedTuple):
    """State of `on_nonfinite`.

    Attributes:
      nonfinite_steps: () int32, the number of steps with anything that was not finite.
      nonfinite_tasks: () int32, the number of tasks in them that were not finite, added up.
      inner_state: the state of the transformation.
    """

    nonfinite_steps: jax.Array
    nonfinite_tasks: jax.Array
    inner_state: Any


def on_nonfinite(
    tx: optax.GradientTransformation, action: Literal["mask", "skip", "propagate"] = "mask"
) -> optax.GradientTransformationExtraArgs:
    """Drops tasks, or steps, whose gradient or loss is not finite, and counts them.

    Wrap surgery and optimiser in it, and what goes before them:
    `on_nonfinite(optax.chain(pcgrad(), optax.adam(1e-3)))`. With "mask" and "skip", nothing that
    is not finite enters the state of any of them.

    Args:
      tx: what is to be protected.
      action: one of "mask", "skip", "propagate". "mask": a task with an infinite or undefined
        gradient or loss is masked in this step; where no task is left, the step is skipped.
        "skip": a step with such a task has an update of zero, and leaves the state of `tx` as it
        was. "propagate": only count.

    Returns:
      A transformation of the kind of `tx` from leaves `(T, *shape)` to leaves `(*shape)`, of a
      surgery a `Surgery`, with the counts in its state. What a masked task holds is not looked at.

    Raises:
      ValueError: for another `action`; at trace time, from `update`, if the gradients are not
        stacked.

    Note:
      A step is skipped, too, and counted, if finite gradients make the update or the state of `tx`
      infinite or undefined: by a sum in float16, or a square of 1e30 in Adam. In a step in which
      `every` or `start_after` do not look at the gradients one by one, this does neither: a bad
      loss masks its task, and a bad update skips the step.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import optax_surgery as surgery
      >>> tx = surgery.on_nonfinite(optax.chain(surgery.sum(), optax.sgd(1.0)))
      >>> task_grads = jnp.array([[1.0, 2.0], [jnp.nan, 0.0]])
      >>> updates, state = tx.update(task_grads, tx.init(jnp.zeros(2)))
      >>> updates, state.nonfinite_tasks
      (Array([-1., -2.], dtype=float32), Array(1, dtype=int32))
    """
    name = checks.arguments(
        on_nonfinite,
        locals(),
        tx=optax.GradientTransformation,
        action=("mask", "skip", "propagate"),
    )
    kind = core.kind_of(tx)
    tx = optax.with_extra_args_support(tx)

    def init(params):
        return OnNonfiniteState(
            nonfinite_steps=jnp.zeros((), jnp.int32),
            nonfinite_tasks=jnp.zeros((), jnp.int32),
            inner_state=tx.init(params),
        )

    def update(task_updates, state, params, extra_args):
        tasks = core.tasks_of(name, task_updates, extra_args)
        active = tasks.task_mask
        # Twice looked at, by this and by a surgery, it is made once.
        if callable(extra_args.get("gramian")) and not isinstance(
            extra_args["gramian"], core.MadeGramian
        ):
            extra_args = extra_args | {"gramian": core.Once(extra_args["gramian"])}
        finite = core.branch(
            jnp.asarray(schedule.rests(state.inner_state)),
            lambda: _finite_losses(tasks),
            lambda: _finite_losses(tasks) & _finite_gradients(task_updates, extra_args),
        )
        num_bad = jnp.sum(active & ~finite, dtype=jnp.int32)

        good = jnp.ones((), bool)
        if action == "mask":
            kept = active & finite
            good = jnp.any(kept) | (num_bad == 0)
            names = extra_args.get("losses", extra_args.get("task_mask"))
            extra_args = extra_args | {"task_mask": trees.like(names, kept)}
        elif action == "skip":
            good = num_bad == 0

        def run():
            return tx.update(task_updates, state.inner_state, params, **extra_args)

        def skip():
            return core.zeros(run), state.inner_state

        updates, inner_state = run() if action == "propagate" else core.branch(good, run, skip)
        sound = _all_finite(updates) & _stays_finite(inner_state, state.inner_state)
        if action != "propagate":
            updates, inner_state = jax.tree.map(
                lambda new, old: jnp.where(sound, new, old),
                (updates, inner_state),
                (optax.tree.zeros_like(updates), state.inner_state),
            )
        return updates, OnNonfiniteState(
            state.nonfinite_steps + ((num_bad > 0) | ~sound).astype(jnp.int32),
            state.nonfinite_tasks + num_bad,
            inner_state,
        )

    return core.transformation(init, update, name=name, kind=kind, state_kind=OnNonfiniteState)


def _finite_losses(tasks: core.Tasks) -> jax.Array:
    """(T,) whether the loss of a task is finite, if there are losses."""
    if "losses" not in tasks.extra_args:
        return jnp.ones(tasks.num_tasks, bool)
    return jnp.isfinite(tasks.losses)


def _finite_gradients(task_updates: optax.Updates, extra_args: dict[str, Any]) -> jax.Array:
    """(T,) whether the gradient of a task is finite, and its length in a Gramian that was given."""
    gramian = extra_args.get("gramian")
    gramian = gramian() if callable(gramian) else gramian
    lengths = None if gramian is None else jnp.diagonal(jnp.asarray(gramian))
    finite = jax.tree.map(
        lambda leaf: jnp.all(jnp.isfinite(leaf), axis=tuple(range(1, jnp.ndim(leaf)))),
        (task_updates, lengths),
    )
    return jax.tree.reduce(jnp.logical_and, finite)


def _all_finite(tree: Any) -> jax.Array:
    return _stays_finite(tree, jax.tree.map(jnp.zeros_like, tree))


def _stays_finite(new: Any, old: Any) -> jax.Array:
    """Whether whatever was finite still is."""
    checks = [
        jnp.all(jnp.isfinite(new_leaf) | ~jnp.isfinite(old_leaf))
        for new_leaf, old_leaf in zip(jax.tree.leaves(new), jax.tree.leaves(old), strict=True)
        if jnp.issubdtype(jnp.result_type(new_leaf), jnp.inexact)
    ]
    return jnp.all(jnp.stack(checks)) if checks else jnp.ones((), bool)
