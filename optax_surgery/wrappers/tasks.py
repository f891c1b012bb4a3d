"""What is done task by task: `on_tasks`, `per_task`, `normalize_tasks`, `clip_tasks`."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_surgery import checks, core, trees


def on_tasks(surgery: core.Surgery, tasks: Sequence[str] | Sequence[int]) -> core.Surgery:
    """Operates on some of the tasks, as if there were no others.

    Where the losses of several modules stand together, each module's surgery in an
    `optax.partition` is to see its own: rows, losses, mask and number of tasks of the subset.

    Args:
      surgery: what to do with these tasks; one that is made for a number of tasks is made for
        theirs. Its arguments with one entry per task have those of the subset.
      tasks: their names, as `task_names(losses)` gives them, or their numbers, which are at least
        0. Their order is that of the stack, whatever the order here.

    Returns:
      A `Surgery` from leaves `(T, *shape)` to leaves `(*shape)`. Its state is that of the surgery.

    Raises:
      ValueError: for what is no surgery, and for no tasks; at trace time, from `update`, if there
        is no such task, or names are given and neither losses nor mask have them.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_surgery as surgery
      >>> tx = surgery.on_tasks(surgery.mean(), ["image", "reward"])
      >>> losses = {"actor": -3.0, "image": 1.0, "reward": 2.0}
      >>> updates, state = tx.update(jnp.eye(3), tx.init(jnp.zeros(3)), losses=losses)
      >>> updates
      Array([0. , 0.5, 0.5], dtype=float32)
    """
    name = checks.arguments(on_tasks, locals(), surgery=core.Surgery)
    checks.subset(tasks)

    def init(params):
        return surgery.init(params)

    def update(task_updates, state, params, extra_args):
        num_tasks = checks.stacked(task_updates)
        rows = checks.rows_of(tasks, extra_args, num_tasks)
        of_tasks = {
            argument: _subset(rows, extra_args[argument])
            for argument in ("losses", "task_mask")
            if argument in extra_args
        }
        if "gramian" in extra_args:
            of_tasks["gramian"] = _sub_gramian(rows, num_tasks, extra_args["gramian"])
        part = jax.tree.map(lambda leaf: jnp.take(leaf, rows, axis=0), task_updates)
        return surgery.update(part, state, params, **extra_args | of_tasks)

    return core.transformation(init, update, name=name)


def _subset(rows: np.ndarray, value: core.PerTask) -> core.PerTask:
    if not checks.is_tree(value):
        return jnp.asarray(value)[rows]
    named = list(zip(checks.tree_names(value), jax.tree.leaves(value), strict=True))
    return OrderedDict(named[row] for row in rows)


def _sub_gramian(rows: np.ndarray, num_tasks: int, gramian: Any) -> Any:
    def part(full):
        return jnp.asarray(full)[rows[:, None], rows[None, :]]

    if isinstance(gramian, core.MadeGramian):
        whole = gramian.relative

        def of_some(relative):
            full, scales = relative()
            return part(full), scales[rows]

        relative = None if whole is None else lambda: of_some(whole)
        find = gramian.differences
        differences = None if find is None else lambda: _sub_differences(rows, num_tasks, find())
        return core.MadeGramian(lambda: part(gramian()), gramian.scale, relative, differences)
    return (lambda: part(gramian())) if callable(gramian) else part(gramian)


def _sub_differences(
    rows: np.ndarray, num_tasks: int, find: Callable[..., trees.Differences]
) -> Callable[..., trees.Differences]:
    def find_part(base, factors=None):
        if factors is not None:
            factors = jnp.zeros(num_tasks, factors.dtype).at[rows].set(factors)
        found = find(jnp.asarray(rows)[base], factors=factors)
        cosines = found.cosines[rows[:, None], rows[None, :]]
        return trees.Differences(cosines, found.lengths[rows], found.sizes[rows])

    return find_part


class PerTaskState(NamedTuple):
    """State of `per_task`.

    Attributes:
      task_states: the state of the transformation, each leaf with a leading axis of T.
    """

    task_states: Any


def per_task(
    tx: optax.GradientTransformation, num_tasks: int
) -> optax.GradientTransformationExtraArgs:
    """Transforms the gradient of each task by itself, before a surgery.

    For momentum (`optax.trace`), averages (`optax.ema`) and the like, which without it would take
    the stack for one gradient and the task axis for a dimension of the parameters. What only
    changes the length of each gradient needs no stack of its own: `clip_tasks`,
    `normalize_tasks`.

    Args:
      tx: a transformation of one gradient. It gets the parameters, and extra arguments other
        than `losses`, `task_mask` and `key`.
      num_tasks: number of tasks T, at least 1.

    Returns:
      An `optax.GradientTransformationExtraArgs` from leaves `(T, *shape)` to leaves `(T, *shape)`.
      Its state is that of `tx`, T times. A masked task keeps its state.

    Raises:
      ValueError: for what is no transformation; at trace time, from `update`, if the gradients are
        not those of `num_tasks` tasks, or if a `gramian` is given, which is that of the gradients
        before.

    Note:
      Where `tx` draws random numbers, from a PRNG key in its state, each task draws its own. Where
      it counts its steps, as `optax.ema` and Adam do, its state has one `count` per task, and
      `optax.tree.get(state, "count")` finds more than one; with
      `filtering=lambda path, _: "PerTaskState" not in str(path)` it finds the optimiser's.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import optax_surgery as surgery
      >>> momentum = surgery.per_task(optax.trace(0.9), num_tasks=2)
      >>> tx = optax.chain(momentum, surgery.sum())
      >>> task_grads, state = jnp.array([[1.0, 0.0], [0.0, 1.0]]), tx.init(jnp.zeros(2))
      >>> updates, state = tx.update(task_grads, state)
      >>> updates, state = tx.update(task_grads, state)
      >>> print(updates)
      [1.9 1.9]
    """
    name = checks.arguments(
        per_task, locals(), tx=optax.GradientTransformation, num_tasks="int [1, inf)"
    )
    checks.one_gradient("tx", tx, core.Surgery)
    tx = optax.with_extra_args_support(tx)

    def init(params):
        states = jax.vmap(tx.init, in_axes=None, axis_size=num_tasks)(params)
        return PerTaskState(jax.tree.map(_draws_apart, states))

    def update(task_updates, state, params, extra_args):
        checks.no_gramian(name, extra_args.get("gramian"))
        tasks = core.tasks_of(name, task_updates, extra_args)
        checks.leading_axis(name, num_tasks, state)
        checks.state(name, jax.eval_shape(init, core.rows(task_updates)), state)
        of_all = {"losses", "task_mask", "key"}
        extra_args = {key: value for key, value in extra_args.items() if key not in of_all}
        is_masked = "task_mask" in tasks.extra_args
        if is_masked:
            task_updates = trees.mask_tasks(tasks.task_mask, task_updates)

        def update_one(task_update, task_state):
            return tx.update(task_update, task_state, params, **extra_args)

        updates, states = jax.vmap(update_one)(task_updates, state.task_states)
        if is_masked:
            states = jax.tree.map(
                lambda new, old: jnp.where(trees.along_tasks(tasks.task_mask, new), new, old),
                states,
                state.task_states,
            )
        return updates, PerTaskState(states)

    kind = optax.GradientTransformationExtraArgs
    return core.transformation(
        init, update, name=name, num_tasks=num_tasks, kind=kind, state_kind=PerTaskState
    )


def _draws_apart(leaf: jax.Array) -> jax.Array:
    """T copies of a PRNG key, typed or of two words, made different; anything else as it is."""
    is_raw = leaf.dtype == jnp.uint32 and leaf.shape[1:] == (2,)
    if not is_raw and not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return leaf
    return jax.vmap(jax.random.fold_in)(leaf, jnp.arange(leaf.shape[0]))


# What changes the lengths of the task gradients, and so their Gramian and the weights


class NormalizeTasksState(NamedTuple):
    """State of `normalize_tasks`.

    Attributes:
      norms: (T,) bias-corrected averages of the norms of the task gradients; of no task for "l2".
      num_gradients: (T,) int32, how many gradients are in each.
      inner_state: the state of the surgery.
    """

    norms: jax.Array
    num_gradients: jax.Array
    inner_state: Any


def normalize_tasks(
    surgery: core.Surgery,
    kind: Literal["l2", "ema"] = "l2",
    num_tasks: int | None = None,
    decay: float = 0.99,
) -> core.Surgery:
    r"""Divides the gradient of each task by its norm, or by a running average of its norms.

    It takes the scale of the losses out of a surgery. With "ema", gradient :math:`t_i` of task i
    is divided by

    .. math:: a_i = \frac{1 - \beta}{1 - \beta^{t_i}} \sum_{s \le t_i} \beta^{t_i - s} \|g_{i,s}\|

    so that a gradient which is longer than usual for its task stays so. The gradients themselves
    are not copied: the surgery sees the Gramian of the divided gradients, and its weights are
    divided in turn.

    Args:
      surgery: what to do with the divided gradients; it has to work on the Gramian or the losses.
      kind: one of "l2" (the norm of this step) and "ema" (the average).
      num_tasks: number of tasks T, at least 1; needed for "ema".
      decay: beta, in [0, 1).

    Returns:
      A `Surgery` from leaves `(T, *shape)` to leaves `(*shape)`. A gradient of zero stays zero. A
      masked task keeps its average.

    Raises:
      ValueError: for what is no surgery, for another `kind`, for "ema" without `num_tasks`, for a
        `decay` outside of [0, 1); at trace time, from `update`, if the surgery works on
        coordinates.

    Note:
      At norms of 1e30 and at 1e-30, and if both occur in one stack, it is right.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_surgery as surgery
      >>> tx = surgery.normalize_tasks(surgery.sum())
      >>> task_grads = jnp.array([[0.0, 400.0], [0.1, 0.0]])
      >>> updates, state = tx.update(task_grads, tx.init(jnp.zeros(2)))
      >>> print(updates.round(3))
      [1. 1.]
    """
    name = checks.arguments(
        normalize_tasks,
        locals(),
        surgery=core.Surgery,
        kind=("l2", "ema"),
        num_tasks="int [1, inf)",
        decay="[0, 1)",
    )
    if kind == "ema" and num_tasks is None:
        checks.missing(name, "num_tasks", "Averages are kept for each task", kind=kind)
    num_averages = num_tasks if kind == "ema" and num_tasks is not None else 0

    def init():
        counts = jnp.zeros(num_averages, jnp.int32)
        return NormalizeTasksState(jnp.zeros(num_averages), counts, surgery.init(()))

    def update(tasks, state):
        gramian, scales = tasks.relative_gramian
        lengths = jnp.sqrt(jnp.diagonal(gramian))
        if kind == "l2":
            weights, inner_state = _rescaled(surgery, tasks, _inverse(lengths), state.inner_state)
            return weights, state._replace(inner_state=inner_state)
        num_gradients = state.num_gradients + tasks.task_mask.astype(jnp.int32)
        # An average with its bias corrected is one whose rate falls from 1.
        complete = 1 - decay ** jnp.maximum(num_gradients, 1).astype(lengths.dtype)
        rates = jnp.where(tasks.task_mask, (1 - decay) / complete, 0)
        norms = jnp.minimum(lengths / scales, jnp.finfo(lengths.dtype).max)
        norms = trees.move_tasks(rates, state.norms.astype(norms.dtype), norms)
        factors = _inverse(norms * scales)
        weights, inner_state = _rescaled(surgery, tasks, factors, state.inner_state)
        return weights, NormalizeTasksState(jnp.asarray(norms), num_gradients, inner_state)

    return core.gradient_surgery(core.Weighting(init, update), name=name, num_tasks=num_tasks)


class ClipTasksState(NamedTuple):
    """State of `clip_tasks`.

    Attributes:
      inner_state: the state of the surgery.
    """

    inner_state: Any


def clip_tasks(surgery: core.Surgery, max_norm: float) -> core.Surgery:
    """Shortens the gradient of each task to a norm, where it is longer.

    The gradients themselves are not copied: the surgery sees the Gramian of the shortened
    gradients, and its weights are shortened in turn.

    Args:
      surgery: what to do with the shortened gradients; it has to work on the Gramian or the
        losses.
      max_norm: the largest norm, above 0.

    Returns:
      A `Surgery` from leaves `(T, *shape)` to leaves `(*shape)`.

    Raises:
      ValueError: for what is no surgery, and for a `max_norm` of 0 or less; at trace time, from
        `update`, if the surgery works on coordinates.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_surgery as surgery
      >>> tx = surgery.clip_tasks(surgery.sum(), max_norm=1.0)
      >>> task_grads = jnp.array([[300.0, 400.0], [0.5, 0.0]])
      >>> updates, state = tx.update(task_grads, tx.init(jnp.zeros(2)))
      >>> print(updates.round(3))
      [1.1 0.8]
    """
    name = checks.arguments(clip_tasks, locals(), surgery=core.Surgery, max_norm="(0, inf)")

    def init():
        return ClipTasksState(surgery.init(()))

    def update(tasks, state):
        gramian, scales = tasks.relative_gramian
        lengths = jnp.sqrt(jnp.diagonal(gramian))
        longest = jnp.asarray(max_norm, scales.dtype)
        # 1 or max_norm / norm, of rows that are times `scales`.
        factors = jnp.minimum(1 / scales, longest * _inverse(lengths))
        factors = jnp.where(lengths > 0, factors, 0)
        weights, inner_state = _rescaled(surgery, tasks, factors, state.inner_state)
        return weights, ClipTasksState(inner_state)

    return core.gradient_surgery(core.Weighting(init, update), name=name)


class OnLogLossesState(NamedTuple):
    """State of `on_log_losses`.

    Attributes:
      inner_state: the state of the surgery.
    """

    inner_state: Any


def on_log_losses(surgery: core.Surgery) -> core.Surgery:
    r"""Operates on the gradients of the logarithms of the losses.

    The surgery sees :math:`\nabla \log L_i = g_i / L_i` in the place of :math:`g_i`, so that the
    units of the losses play no part. The gradients themselves are not copied: the surgery sees
    the Gramian of the divided gradients, and its weights are divided in turn.

    Args:
      surgery: what to do with the divided gradients; it has to work on the Gramian or the losses.

    Returns:
      A `Surgery` from leaves `(T, *shape)` to leaves `(*shape)`. The update is one of gradients of
      log losses: of no unit, and independent of the scales of the losses.

    Raises:
      ValueError: for what is no surgery; at trace time, from `update`, if `losses` are missing, or
        if the surgery works on coordinates.

    Note:
      A loss that is not above zero has no logarithm: its task has weight zero in that step, and
      its gradient counts as zero. `on_log_losses(sum())` is `scale_invariant()`.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_surgery as surgery
      >>> tx = surgery.on_log_losses(surgery.mean())
      >>> task_grads, losses = jnp.array([[4.0, 0.0], [0.0, 0.1]]), jnp.array([2.0, 0.1])
      >>> updates, _ = tx.update(task_grads, tx.init(jnp.zeros(2)), losses=losses)
      >>> print(updates)
      [1.  0.5]

    References:
      Logarithms of the losses in front of MGDA, CAGrad, IMTL-G and others are in the authors' code
      of `FairGrad <https://arxiv.org/abs/2402.15638>`_ and of `FAMO
      <https://arxiv.org/abs/2306.03792>`_.
    """
    name = checks.arguments(on_log_losses, locals(), surgery=core.Surgery)

    def init():
        return OnLogLossesState(surgery.init(()))

    def update(tasks, state):
        losses, scales = tasks.losses, tasks.relative_gramian[1]
        # Of the rows that the Gramian was gathered of, which are the gradients times the scales.
        factors = jnp.where(losses > 0, 1 / jnp.where(losses > 0, losses, 1), 0) / scales
        weights, inner_state = _rescaled(surgery, tasks, factors, state.inner_state)
        return weights, OnLogLossesState(inner_state)

    weighting = core.Weighting(init, update, usable=lambda tasks: tasks.losses > 0)
    return core.gradient_surgery(weighting, name=name)


def _rescaled(
    surgery: core.Surgery, tasks: core.Tasks, factors: jax.Array, state: Any
) -> tuple[jax.Array, Any]:
    """The weights, for the gradients as they are, of a surgery of gradients times factors.

    Args:
      surgery: the surgery.
      tasks: of this step.
      factors: (T,) of the rows of the relative Gramian, which are the gradients times its scales.
      state: of the surgery.
    """
    scales = tasks.relative_gramian[1]

    def rescale():
        return tasks.relative_gramian[0] * factors[:, None] * factors[None, :]

    others = {key: value for key, value in tasks.extra_args.items() if key != "gramian"}
    made = core.MadeGramian(rescale, differences=lambda: _rescaled_differences(tasks, factors))
    weights, state = core.identity_update(
        surgery, state, tasks.num_tasks, tasks.dtype, others, made
    )
    return weights * (factors * scales), state


def _rescaled_differences(
    tasks: core.Tasks, of_rows: jax.Array
) -> Callable[..., trees.Differences]:
    """What finds the differences of the gradients of `_rescaled`, and how exact they are."""
    gramian, scales = tasks.relative_gramian
    norms, find = jnp.sqrt(jnp.diagonal(gramian)) * of_rows, tasks.differences

    def find_rescaled(base, factors=None):
        others = jnp.ones_like(scales) if factors is None else factors
        found = find(base, factors=of_rows * scales * others)
        # What is rounded is the product with a factor, before it is subtracted.
        rounded = norms * others
        rounded = (rounded + jnp.take(rounded, base)) * (1 / trees.ROUNDING)
        lengths = jnp.sqrt(found.lengths) * jnp.sqrt(found.lengths + rounded)
        return found._replace(sizes=jnp.maximum(found.sizes, lengths))

    return find_rescaled


def _inverse(numbers: jax.Array) -> jax.Array:
    """1 / numbers, 0 for 0."""
    return jnp.where(numbers > 0, 1 / jnp.where(numbers > 0, numbers, 1), 0)


# A state for other tasks


def move_state(state: Any, new_state: Any, tasks: Sequence[int | None]) -> Any:
    """Takes over what a state knows of tasks that go on, where the number of tasks changes.

    Args:
      state: the state so far, of any chain with surgeries.
      new_state: the one to fill, as `init(params)` of the chain for the new number of tasks makes
        it.
      tasks: for each new task the number of the old task that it continues, at least 0, or None if
        it is new.

    Returns:
      `new_state` with the entries of `state`, except those of tasks that are new.

    Raises:
      ValueError: if the states are not alike but for the number of tasks.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_surgery as surgery
      >>> params, losses = jnp.zeros(2), jnp.array([1.0, 2.0])
      >>> old, new = surgery.imtl_l(num_tasks=2), surgery.imtl_l(num_tasks=3)
      >>> _, state = old.update(jnp.eye(2), old.init(params), losses=losses)
      >>> state = surgery.move_state(state, new.init(params), tasks=[1, 0, None])
      >>> print(state.weighting_state.log_scales.round(3))
      [-0.025  0.     0.   ]
    """
    checks.movable(state, new_state, tasks)
    rows = jnp.array([0 if task is None else task for task in tasks])
    known = jnp.array([task is not None for task in tasks])

    def move(old, new):
        old, new = jnp.asarray(old), jnp.asarray(new)
        axes = [axis for axis in range(old.ndim) if old.shape[axis] != new.shape[axis]]
        if not axes:
            return old
        taken, kept = old, jnp.ones(new.shape, bool)
        for axis in axes:
            taken = jnp.take(taken, rows, axis=axis)
            around = [other for other in range(new.ndim) if other != axis]
            kept &= jnp.expand_dims(known, around)
        return jnp.where(kept, taken, new)

    return jax.tree.map(move, state, new_state)
