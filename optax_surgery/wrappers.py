"""Transformations of stacked task gradients that go before, around or after a surgery."""

from collections.abc import Callable, Hashable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from optax_surgery import core, trees


class MonitorState(NamedTuple):
    """State of `monitor`.

    Attributes:
      gramian: (T, T) inner products of the latest task gradients.
    """

    gramian: jax.Array


def monitor(num_tasks: int) -> optax.GradientTransformationExtraArgs:
    """Passes the task gradients through, and keeps their Gramian in its state.

    Chained before a surgery, or before `mean()`, it shows conflicts before anyone treats
    them. All of `optax_surgery.metrics` follows from the Gramian. In one `jit` with a
    surgery the Gramian is computed once.

    Args:
      num_tasks: number of tasks T.

    Returns:
      An `optax.GradientTransformationExtraArgs` from leaves (T, *shape) to the same
      leaves. Its state has one field, `gramian`, of shape (T, T), float32 (float64 for
      float64 parameters): zero before the first step, and in the rows of masked tasks.

    Raises:
      ValueError: at trace time, from `update`, if the gradients are not those of
        `num_tasks` tasks.

    Note:
      Where squares of the gradients do not fit the dtype (norms of 1e30, say) this is the
      Gramian of the gradients times a power of two, as `gradient_surgery` uses it:
      cosines and conflicts are right, norms are not.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import optax_surgery as surgery
      >>> tx = optax.chain(surgery.monitor(2), surgery.mean(), optax.sgd(0.1))
      >>> task_grads = jnp.array([[1.0, 0.0], [-1.0, 1.0]])
      >>> updates, state = tx.update(task_grads, tx.init(jnp.zeros(2)))
      >>> print(surgery.conflict_fraction(optax.tree.get(state, "gramian")))
      1.0
    """

    def init(params):
        return MonitorState(jnp.zeros((num_tasks, num_tasks), trees.gramian_dtype(params)))

    def update(task_updates, state, params, extra_args):
        del params
        task_mask, gramian = extra_args.get("task_mask"), extra_args.get("gramian")
        gramian, _ = core.masked_gramian(task_updates, task_mask, gramian)
        return task_updates, MonitorState(gramian.astype(state.gramian.dtype))

    return _transformation("monitor", init, update, num_tasks=num_tasks)


# Which leaves a surgery sees


class LeafwiseState(NamedTuple):
    """State of `leafwise`.

    Attributes:
      group_states: dict from the name of a group to the state of its surgery.
    """

    group_states: dict[str, Any]


def leafwise(
    surgery: optax.GradientTransformation, group_of: Callable[[str], str] | None = None
) -> optax.GradientTransformationExtraArgs:
    """Operates on every leaf, or on every group of leaves, by itself.

    Each group has a Gramian and a state of its own: gradients that agree as a whole may
    conflict in a layer. Memory and reads are those of one surgery.

    Args:
      surgery: what to do in each group.
      group_of: from a leaf's path ('encoder/layer_0/kernel') to the name of its group, such as
        `lambda path: path.split("/")[0]`; each leaf is a group by default.

    Returns:
      An `optax.GradientTransformationExtraArgs` from leaves (T, *shape) to leaves (*shape), with
      a dict from groups to states as its state.

    Raises:
      ValueError: at trace time, if `group_of` returns no string, or, from `update`, if a
        `gramian` is given, as there are several.

    Note:
      Random surgeries draw the same in every group: PCGrad's orders, say. The groups are known
      with the parameters only: `optax.tree.map_params`, which does without them, is not supported.

      On a CPU, XLA (jax 0.10.2) hangs where it has more batches of matrices to factor at once
      than threads, as in `jax.vmap` of the update with many groups and a surgery that factors its
      Gramian (`aligned_mtl`, the solvers). The environment variable NPROC sets the number of
      threads.

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
    surgery = optax.with_extra_args_support(surgery)

    def init(params):
        leaves = jax.tree.leaves(params)
        groups = _groups(group_of, params)
        return LeafwiseState(
            {
                name: surgery.init([leaves[number] for number in numbers])
                for name, numbers in groups.items()
            }
        )

    def update(task_updates, state, params, extra_args):
        leaves, structure = jax.tree.flatten(task_updates)
        param_leaves = jax.tree.leaves(params)
        group_states = {}
        for name, numbers in _groups(group_of, task_updates).items():
            group_updates, group_states[name] = surgery.update(
                [leaves[number] for number in numbers],
                state.group_states[name],
                None if params is None else [param_leaves[number] for number in numbers],
                **extra_args,
            )
            for number, leaf in zip(numbers, jax.tree.leaves(group_updates), strict=True):
                leaves[number] = leaf
        return jax.tree.unflatten(structure, leaves), LeafwiseState(group_states)

    return _transformation("leafwise", init, update, takes_gramian=False)


def on_shared(
    surgery: optax.GradientTransformation,
    shared: Any,
    others: Literal["sum", "weighted"] = "sum",
) -> optax.GradientTransformationExtraArgs:
    """Operates on the parameters that the tasks share, and combines the gradients of the others.

    The head of one task has a gradient of that task only. In the Gramian it would make the
    gradients look more orthogonal, and longer, than they are where tasks meet.

    Args:
      surgery: what to do with the shared parameters.
      shared: which leaves are shared: a tree of booleans like the parameters, as `infer_shared`
        finds it, or a function of a leaf's path ('encoder/layer_0/kernel') that returns a boolean.
      others: "sum": the other leaves get their summed gradient, which for a head of one task is
        its own; "weighted": they are summed with the weights that the surgery finds for the
        shared ones.

    Returns:
      An `optax.GradientTransformationExtraArgs` from leaves (T, *shape) to leaves (*shape). Its
      state is that of the surgery.

    Raises:
      ValueError: for another value of `others`; at trace time, if no leaf is shared, or with
        "weighted" and a surgery that works on coordinates.

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
    _check_choice("others", others, ("sum", "weighted"))
    surgery = optax.with_extra_args_support(surgery)

    def shared_mask(tree):
        if not callable(shared):
            return trees.path_mask(shared, tree)
        chosen = jax.tree.map_with_path(lambda path, _: bool(shared(_path(path))), tree)
        return trees.path_mask(chosen, tree)

    def shared_leaves(tree):
        return trees.split(shared_mask(tree), tree)[0]

    def init(params):
        return surgery.init(shared_leaves(params) if jax.tree.leaves(params) else params)

    def update(task_updates, state, params, extra_args):
        mask = shared_mask(task_updates)
        operated, rest = trees.split(mask, task_updates)
        if others == "weighted":
            weights, state = _weights(surgery, operated, state, extra_args)
            return trees.combine(weights, task_updates, extra_args.get("task_mask")), state
        shared_params = None if params is None else shared_leaves(params)
        updates, state = surgery.update(operated, state, shared_params, **extra_args)
        if rest:
            num_tasks = trees.check_task_updates(rest)
            rest = jax.tree.leaves(
                trees.combine(jnp.ones(num_tasks), rest, extra_args.get("task_mask"))
            )
        return trees.merge(mask, jax.tree.leaves(updates), rest, task_updates), state

    return _transformation("on_shared", init, update)


# Before a surgery


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

    For clipping (`optax.clip_by_global_norm`), momentum (`optax.trace`), averages
    (`optax.ema`) and the like, which without it would take the stack for one gradient and the
    task axis for a dimension of the parameters.

    Args:
      tx: a transformation of one gradient. It gets the parameters, and extra arguments other
        than `losses` and `task_mask`.
      num_tasks: number of tasks T.

    Returns:
      An `optax.GradientTransformationExtraArgs` from leaves (T, *shape) to leaves (T, *shape).
      Its state is that of `tx`, T times. A masked task keeps its state.

    Raises:
      ValueError: at trace time, from `update`, if the gradients are not those of `num_tasks`
        tasks, or if a `gramian` is given, which is that of the gradients before.

    Note:
      Where `tx` counts its steps, as `optax.ema` and Adam do, its state has one `count` per task,
      and `optax.tree.get(state, "count")` finds more than one; with
      `filtering=lambda path, _: "PerTaskState" not in str(path)` it finds the optimiser's.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import optax_surgery as surgery
      >>> clip = surgery.per_task(optax.clip_by_global_norm(1.0), num_tasks=2)
      >>> tx = optax.chain(clip, surgery.sum())
      >>> task_grads = jnp.array([[300.0, 400.0], [0.5, 0.0]])
      >>> updates, state = tx.update(task_grads, tx.init(jnp.zeros(2)))
      >>> print(updates.round(3))
      [1.1 0.8]
    """
    tx = optax.with_extra_args_support(tx)

    def init(params):
        return PerTaskState(jax.vmap(tx.init, in_axes=None, axis_size=num_tasks)(params))

    def update(task_updates, state, params, extra_args):
        task_mask, extra_args = _own(extra_args, "task_mask")
        _, extra_args = _own(extra_args, "losses")
        task_updates, active = core.masked_task_updates(task_updates, task_mask)

        def update_one(task_update, task_state):
            return tx.update(task_update, task_state, params, **extra_args)

        updates, states = jax.vmap(update_one)(task_updates, state.task_states)
        if task_mask is not None:
            states = jax.tree.map(
                lambda new, old: jnp.where(trees.along_tasks(active, new), new, old),
                states,
                state.task_states,
            )
        return updates, PerTaskState(states)

    return _transformation("per_task", init, update, num_tasks=num_tasks, takes_gramian=False)


class NormalizeTasksState(NamedTuple):
    """State of `normalize_tasks("ema")`.

    Attributes:
      norms: (T,) bias-corrected averages of the norms of the task gradients.
      num_gradients: (T,) int32, how many gradients are in each.
    """

    norms: jax.Array
    num_gradients: jax.Array


def normalize_tasks(
    kind: Literal["l2", "ema"] = "l2", num_tasks: int | None = None, decay: float = 0.99
) -> optax.GradientTransformationExtraArgs:
    r"""Divides the gradient of each task by its norm, or by a running average of its norms.

    Chained before a surgery, it takes the scale of the losses out of it. With "ema", gradient
    :math:`t_i` of task i is divided by

    .. math:: a_i = \frac{1 - \beta}{1 - \beta^{t_i}} \sum_{s \le t_i} \beta^{t_i - s} \|g_{i,s}\|

    so that a gradient which is longer than usual for its task stays so.

    Args:
      kind: "l2" for the norm of this step, "ema" for the average.
      num_tasks: number of tasks T; needed for "ema".
      decay: beta, in [0, 1).

    Returns:
      An `optax.GradientTransformationExtraArgs` from leaves (T, *shape) to leaves (T, *shape). A
      gradient of zero stays zero. A masked task keeps its average.

    Raises:
      ValueError: for another `kind`, for "ema" without `num_tasks`, for a `decay` outside of
        [0, 1); at trace time, from `update`, if a `gramian` is given, which is that of the
        gradients before.

    Note:
      Norms are taken in float32 at least, of each gradient divided by its largest coordinate: at
      1e30 and at 1e-30, and if both occur in one stack, they are right.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import optax_surgery as surgery
      >>> tx = optax.chain(surgery.normalize_tasks("l2"), surgery.sum())
      >>> task_grads = jnp.array([[0.0, 400.0], [0.1, 0.0]])
      >>> updates, state = tx.update(task_grads, tx.init(jnp.zeros(2)))
      >>> updates
      Array([1., 1.], dtype=float32)
    """
    _check_choice("kind", kind, ("l2", "ema"))
    if kind == "ema" and num_tasks is None:
        raise ValueError(
            "Expected the number of tasks, got None at 'num_tasks'. Averages are kept for each: "
            'make it `normalize_tasks("ema", num_tasks=T)`.'
        )
    if isinstance(decay, int | float) and not 0 <= decay < 1:
        raise ValueError(
            f"Expected a decay in [0, 1), got {decay} at 'decay'. It is the share that an average "
            "keeps in a step: take 0.99."
        )

    def init(params):
        if kind == "l2":
            return optax.EmptyState()
        return NormalizeTasksState(
            norms=jnp.zeros(num_tasks, trees.gramian_dtype(params)),
            num_gradients=jnp.zeros(num_tasks, jnp.int32),
        )

    def update(task_updates, state, params, extra_args):
        del params
        task_updates, active = core.masked_task_updates(task_updates, extra_args.get("task_mask"))
        largest = _largest_coordinates(task_updates)
        lengths = _relative_norms(task_updates, largest)
        if kind == "l2":
            return _divide_tasks(_divide_tasks(task_updates, largest), lengths), state
        num_gradients = state.num_gradients + active
        # An average with its bias corrected is one whose rate falls from 1.
        complete = 1 - decay ** jnp.maximum(num_gradients, 1).astype(largest.dtype)
        rates = jnp.where(active, (1 - decay) / complete, 0)
        norms = jnp.minimum(largest * lengths, jnp.finfo(largest.dtype).max)
        norms = jnp.asarray(trees.move_tasks(rates, state.norms, norms))
        return _divide_tasks(task_updates, norms), NormalizeTasksState(norms, num_gradients)

    return _transformation(
        "normalize_tasks", init, update, num_tasks=num_tasks, takes_gramian=False
    )


# Around a surgery: when it runs


class EveryState(NamedTuple):
    """State of `every`.

    Attributes:
      age: () int32, for how many steps the weights have been in use; 0 if they are due.
      weights: (T,) the weights in use.
      inner_state: the state of the surgery.
    """

    age: jax.Array
    weights: jax.Array
    inner_state: Any


def every(
    surgery: optax.GradientTransformation, k: int, num_tasks: int
) -> optax.GradientTransformationExtraArgs:
    """Finds new weights in every k-th step, and uses them until the next ones.

    In between the Gramian is not computed, and the surgery and its state rest.

    Args:
      surgery: a surgery that works on the Gramian or the losses.
      k: after how many steps the weights are renewed, at least 1.
      num_tasks: number of tasks T.

    Returns:
      An `optax.GradientTransformationExtraArgs` from leaves (T, *shape) to leaves (*shape), with
      the weights in use in its state.

    Raises:
      ValueError: for a `k` below 1; at trace time, from `update`, if the gradients are not those
        of `num_tasks` tasks, or if the surgery works on coordinates.

    Note:
      A task that is masked when the weights are renewed keeps the weight that it had, zero at
      first.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_surgery as surgery
      >>> tx = surgery.every(surgery.pcgrad(), k=2, num_tasks=2)
      >>> task_grads = jnp.array([[1.0, 0.0], [-1.0, 1.0]])
      >>> _, state = tx.update(task_grads, tx.init(jnp.zeros(2)))
      >>> state.weights
      Array([2. , 1.5], dtype=float32)
      >>> updates, state = tx.update(jnp.eye(2), state)  # nothing to be computed anew
      >>> updates
      Array([2. , 1.5], dtype=float32)
    """
    _check_at_least_1("k", k)
    surgery = optax.with_extra_args_support(surgery)

    def init(params):
        return EveryState(
            age=jnp.zeros((), jnp.int32),
            weights=jnp.zeros(num_tasks, trees.gramian_dtype(params)),
            inner_state=surgery.init(params),
        )

    def update(task_updates, state, params, extra_args):
        del params
        active = _active(num_tasks, extra_args)

        def renew():
            weights, inner_state = _weights(surgery, task_updates, state.inner_state, extra_args)
            weights = jnp.where(active, weights.astype(state.weights.dtype), state.weights)
            return weights, inner_state

        weights, inner_state = _cond(
            state.age == 0, renew, lambda: (state.weights, state.inner_state)
        )
        updates = trees.combine(weights, task_updates, extra_args.get("task_mask"))
        return updates, EveryState((state.age + 1) % k, weights, inner_state)

    return _transformation("every", init, update, num_tasks=num_tasks)


class StartAfterState(NamedTuple):
    """State of `start_after`.

    Attributes:
      num_updates: () int32, the number of updates so far.
      inner_state: the state of the surgery.
    """

    num_updates: jax.Array
    inner_state: Any


def start_after(
    surgery: optax.GradientTransformation, step: int
) -> optax.GradientTransformationExtraArgs:
    """Takes the mean of the task gradients at first, and operates after a number of steps.

    Before, the Gramian is not computed, and the surgery's state stays as it was.

    Args:
      surgery: the surgery that comes later.
      step: after how many updates, at least 0.

    Returns:
      An `optax.GradientTransformationExtraArgs` from leaves (T, *shape) to leaves (*shape).

    Raises:
      ValueError: at trace time, from `update`, if the gradients are not stacked.

    Note:
      The mean is that of the tasks which are not masked. An update that is a sum, as PCGrad's,
      is about T times as long: with SGD, scale it by 1/T.

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
    surgery = optax.with_extra_args_support(surgery)

    def init(params):
        return StartAfterState(jnp.zeros((), jnp.int32), surgery.init(params))

    def update(task_updates, state, params, extra_args):
        num_tasks = trees.check_task_updates(task_updates)
        equal = core.task_preference(None, _active(num_tasks, extra_args))
        updates, inner_state = _cond(
            state.num_updates >= step,
            lambda: surgery.update(task_updates, state.inner_state, params, **extra_args),
            lambda: (
                trees.combine(equal, task_updates, extra_args.get("task_mask")),
                state.inner_state,
            ),
        )
        num_updates = jnp.asarray(optax.safe_increment(state.num_updates))
        return updates, StartAfterState(num_updates, inner_state)

    return _transformation("start_after", init, update)


# Around a surgery and an optimiser


class AccumulateState(NamedTuple):
    """State of `accumulate`.

    Attributes:
      micro_step: () int32, the number of micro-batches since the latest update.
      ready: () bool, whether the latest call made an update.
      averages: pytree of leaves (T, *param.shape), float32 or float64: the mean gradients over
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
      tx: what is to run on the averages: `optax.chain(surgery, optimiser)`.
      every_k: number of micro-batches per update, at least 1.
      num_tasks: number of tasks T.

    Returns:
      An `optax.GradientTransformationExtraArgs` from leaves (T, *shape) to leaves (*shape). `tx`
      gets the averages of gradients and losses, and the other extra arguments as they are in the
      k-th step. A task is averaged over the micro-batches in which it is not masked, and
      masked if there is none. The state holds one number per coordinate and task.

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
    _check_at_least_1("every_k", every_k)
    tx = optax.with_extra_args_support(tx)

    def init(params):
        return AccumulateState(
            micro_step=jnp.zeros((), jnp.int32),
            ready=jnp.zeros((), bool),
            averages=trees.zeros_per_task(params, num_tasks),
            losses=jnp.zeros(num_tasks, trees.gramian_dtype(params)),
            num_gradients=jnp.zeros(num_tasks, jnp.int32),
            inner_state=tx.init(params),
        )

    def update(task_updates, state, params, extra_args):
        task_mask, extra_args = _own(extra_args, "task_mask")
        losses, extra_args = _own(extra_args, "losses")
        task_updates, active = core.masked_task_updates(task_updates, task_mask)

        averages, mean_losses, num_gradients = jax.tree.map(
            lambda leaf: jnp.where(state.micro_step == 0, jnp.zeros_like(leaf), leaf),
            (state.averages, state.losses, state.num_gradients),
        )
        num_gradients = num_gradients + active
        rates = jnp.where(active, 1 / jnp.maximum(num_gradients, 1), 0)
        averages = trees.move_tasks(rates, averages, task_updates)
        if losses is not None:
            mean_losses = jnp.asarray(trees.move_tasks(rates, mean_losses, losses))
            extra_args = extra_args | {"losses": mean_losses}

        def run():
            return tx.update(
                jax.tree.map(lambda mean, leaf: mean.astype(leaf.dtype), averages, task_updates),
                state.inner_state,
                params,
                task_mask=num_gradients > 0,
                **extra_args,
            )

        micro_step = (state.micro_step + 1) % every_k
        ready = micro_step == 0
        updates, inner_state = _cond(ready, run, lambda: (_zeros(run), state.inner_state))
        return updates, AccumulateState(
            micro_step, ready, averages, mean_losses, num_gradients, inner_state
        )

    return _transformation("accumulate", init, update, num_tasks=num_tasks, takes_gramian=False)


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
      action: "mask": a task with an infinite or undefined gradient or loss is masked in
        this step; where no task is left, the step is skipped. "skip": a step with such a task has
        an update of zero, and leaves the state of `tx` as it was. "propagate": only count.

    Returns:
      An `optax.GradientTransformationExtraArgs` from leaves (T, *shape) to leaves (*shape), with
      the counts in its state. What a masked task holds is not looked at.

    Raises:
      ValueError: for another `action`; at trace time, from `update`, if the gradients are not
        stacked.

    Note:
      A step is skipped, too, and counted, if finite gradients make the update or the state of `tx`
      infinite or undefined: by a sum in float16, or a square of 1e30 in Adam.

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
    _check_choice("action", action, ("mask", "skip", "propagate"))
    tx = optax.with_extra_args_support(tx)

    def init(params):
        return OnNonfiniteState(
            nonfinite_steps=jnp.zeros((), jnp.int32),
            nonfinite_tasks=jnp.zeros((), jnp.int32),
            inner_state=tx.init(params),
        )

    def update(task_updates, state, params, extra_args):
        finite = _finite_tasks(task_updates, extra_args)
        active = _active(finite.size, extra_args)
        num_bad = jnp.sum(active & ~finite, dtype=jnp.int32)

        good = jnp.ones((), bool)
        if action == "mask":
            kept = active & finite
            good = jnp.any(kept) | (num_bad == 0)
            extra_args = extra_args | {"task_mask": kept}
        elif action == "skip":
            good = num_bad == 0

        def run():
            return tx.update(task_updates, state.inner_state, params, **extra_args)

        def skip():
            return _zeros(run), state.inner_state

        updates, inner_state = run() if action == "propagate" else _cond(good, run, skip)
        sound = _all_finite(updates) & _stays_finite(inner_state, state.inner_state)
        if action != "propagate":
            updates, inner_state = jax.tree.map(
                lambda new, old: jnp.where(sound, new, old),
                (updates, inner_state),
                (optax.tree.zeros_like(updates), state.inner_state),
            )
        return updates, OnNonfiniteState(
            state.nonfinite_steps + ((num_bad > 0) | ~sound),
            state.nonfinite_tasks + num_bad,
            inner_state,
        )

    return _transformation("on_nonfinite", init, update)


# After the optimiser


def apply_updates(params: optax.Params, updates: optax.Updates) -> optax.Params:
    """`optax.apply_updates`, which refuses updates that are still stacked.

    Without a surgery, optimisers take stacked gradients as they are, and the parameters silently
    become (T, *shape) when the updates are added to them.

    Args:
      params: pytree of parameters.
      updates: pytree of updates of the same shapes.

    Returns:
      The new parameters.

    Raises:
      ValueError: at trace time, if an update has not the shape of its parameter.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import optax_surgery as surgery
      >>> params, tx = {"w": jnp.zeros(2)}, optax.sgd(0.1)
      >>> updates, state = tx.update({"w": jnp.ones((3, 2))}, tx.init(params))
      >>> surgery.apply_updates(params, updates)
      Traceback (most recent call last):
      ...
      ValueError: Expected an update of shape (2,), got shape (3, 2) at 'w'. Chain a surgery, ...
    """
    check_updates(updates, params)
    return optax.apply_updates(params, updates)


def check_updates(updates: Any, params: Any) -> None:
    """Refuses updates that have not the shapes of the parameters."""

    def check(path, param, update):
        if jnp.shape(update) != jnp.shape(param):
            raise ValueError(
                f"Expected an update of shape {jnp.shape(param)}, got shape {jnp.shape(update)} at "
                f"'{_path(path)}'. Chain a surgery, or `mean()`, before the optimiser, as it has "
                "to combine the gradients of the tasks."
            )

    jax.tree.map_with_path(check, params, updates)


# Shared by the wrappers

Update = Callable[
    [optax.Updates, Any, optax.Params | None, dict[str, Any]], tuple[optax.Updates, Any]
]


def _transformation(
    name: str,
    init: Callable[[optax.Params], Any],
    update: Update,
    *,
    num_tasks: int | None = None,
    takes_gramian: bool = True,
) -> optax.GradientTransformationExtraArgs:
    """Makes a transformation that checks what it is given, as every surgery does.

    `update(task_updates, state, params, extra_args)` gets the extra arguments that are not None.
    """

    def update_fn(
        task_updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, Any]:
        got = trees.check_task_updates(task_updates, params)
        if not got:  # a group of `optax.partition` that holds no leaf
            return task_updates, state
        if num_tasks is not None:
            core.check_num_tasks(name, num_tasks, got)
        extra_args = {key: value for key, value in extra_args.items() if value is not None}
        if "losses" in extra_args:
            extra_args["losses"] = trees.check_shape("losses", extra_args["losses"], (got,))
        if not takes_gramian:
            gramian, extra_args = _own(extra_args, "gramian")
            core.refuse_gramian(name, gramian)
        return update(task_updates, state, params, extra_args)

    return optax.GradientTransformationExtraArgs(init, update_fn)  # pyright: ignore[reportArgumentType]


def _own(extra_args: dict[str, Any], name: str) -> tuple[Any, dict[str, Any]]:
    """An extra argument that is not handed on, None if it was not given, and the others."""
    others = {other: value for other, value in extra_args.items() if other != name}
    return extra_args.get(name), others


def _active(num_tasks: int, extra_args: dict[str, Any]) -> jax.Array:
    """The (T,) mask of the tasks that take part in the step."""
    return core.active_tasks(jnp.zeros(num_tasks), extra_args.get("task_mask"))


def _weights(
    surgery: optax.GradientTransformationExtraArgs,
    task_updates: optax.Updates,
    state: Any,
    extra_args: dict[str, Any],
) -> tuple[jax.Array, Any]:
    """The weights that a surgery finds: a surgery of the identity."""
    gramian, _ = core.masked_gramian(
        task_updates, extra_args.get("task_mask"), extra_args.get("gramian")
    )
    identity = jnp.eye(len(gramian), dtype=gramian.dtype)
    weights, state = surgery.update(identity, state, None, **extra_args | {"gramian": gramian})
    return jnp.asarray(weights), state


def _cond(condition: jax.Array, run: Callable[[], Any], rest: Callable[[], Any]) -> Any:
    """`lax.cond`; outside of `jit`, where that compiles anew in every call, the branch itself."""
    try:
        chosen = run if condition else rest
    except jax.errors.TracerBoolConversionError:
        return lax.cond(condition, run, rest)
    return chosen()


def _zeros(run: Callable[[], tuple[optax.Updates, Any]]) -> optax.Updates:
    """Zeros like the updates that a call would return."""
    return optax.tree.zeros_like(jax.eval_shape(run)[0])


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


def _finite_tasks(task_updates: optax.Updates, extra_args: dict[str, Any]) -> jax.Array:
    """(T,) whether the gradient and the loss of a task are finite."""
    gramian = extra_args.get("gramian")
    of_tasks = (
        task_updates,
        extra_args.get("losses"),
        None if gramian is None else jnp.diagonal(gramian),
    )
    finite = jax.tree.map(
        lambda leaf: jnp.all(jnp.isfinite(leaf), axis=tuple(range(1, jnp.ndim(leaf)))), of_tasks
    )
    return jax.tree.reduce(jnp.logical_and, finite)


def _largest_coordinates(task_updates: optax.Updates) -> jax.Array:
    """(T,) the largest absolute value in each gradient."""
    dtype = trees.gramian_dtype(task_updates)
    largest = jax.tree.map(
        lambda leaf: jnp.max(
            jnp.abs(leaf).astype(dtype), axis=tuple(range(1, jnp.ndim(leaf))), initial=0
        ),
        task_updates,
    )
    return jax.tree.reduce(jnp.maximum, largest)


def _relative_norms(task_updates: optax.Updates, units: jax.Array) -> jax.Array:
    """(T,) the norms of the gradients, in units that keep their squares in range."""
    squares = jax.tree.map(jnp.square, _divide_tasks(task_updates, units, keep_dtype=False))
    return jnp.sqrt(trees.sum_coordinates(squares))


def _divide_tasks(
    task_updates: optax.Updates, divisors: jax.Array, keep_dtype: bool = True
) -> optax.Updates:
    """The gradient of each task divided by its number, in float32 at least; 0 if that is 0."""
    safe = jnp.where(divisors > 0, divisors, 1)

    def divide_leaf(leaf):
        rows = jnp.asarray(leaf).astype(trees.gramian_dtype(leaf))
        rows = rows / trees.along_tasks(safe.astype(rows.dtype), rows)
        return rows.astype(leaf.dtype) if keep_dtype else rows

    return jax.tree.map(divide_leaf, task_updates)


def _groups(group_of: Callable[[str], str] | None, tree: Any) -> dict[str, list[int]]:
    """From the name of each group to the numbers of its leaves."""
    groups: dict[str, list[int]] = {}
    for number, (path, _) in enumerate(jax.tree.leaves_with_path(tree)):
        name = _path(path) if group_of is None else group_of(_path(path))
        if not isinstance(name, str):
            raise ValueError(
                f"Expected the name of a group, got {name!r} at '{_path(path)}'. Return a string "
                "from `group_of` for every leaf."
            )
        groups.setdefault(name, []).append(number)
    return groups


def _path(path: jax.tree_util.KeyPath) -> str:
    """A leaf's path, the same for an `nnx.Variable` as for the array in it."""
    if path and isinstance(path[-1], jax.tree_util.GetAttrKey) and path[-1].name == "value":
        path = path[:-1]
    return trees.leaf_path(path)


def _check_at_least_1(name: str, value: int) -> None:
    if isinstance(value, int) and value < 1:
        raise ValueError(
            f"Expected a number of steps of at least 1, got {value} at '{name}'. "
            "With 1, every step counts."
        )


def _check_choice(name: str, value: Hashable, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(
            f"Expected one of {', '.join(map(repr, choices))}, got {value!r} at '{name}'. "
            "Choose one of them."
        )
