"""The inner abstraction: a rule from what is known of the tasks to their weights.

A `Weighting` is all that the author of a method writes. It sees the `Tasks` of one step and finds
their weights; `gradient_surgery` makes a `Surgery` of it, an optax transformation, and takes care
of pytrees, dtypes, masks, randomness and state. Where the update is no weighted sum of the task
gradients, a `StackedRule` sees the gradients themselves, and `stacked_surgery` does the same.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from optax_surgery import checks, trees

PyTree = Any
PerTask = Any  # an array of shape (T,), or a tree of T scalars in the order of `jax.tree.leaves`


class SurgeryUpdateFn(Protocol):
    """The `update` of a surgery; see `gradient_surgery` for what it takes."""

    def __call__(
        self,
        updates: PyTree,
        state: PyTree,
        params: PyTree | None = None,
        *,
        losses: PerTask | None = None,
        task_mask: PerTask | None = None,
        gramian: Any = None,
        key: jax.Array | int | None = None,
        **extra_args: Any,
    ) -> tuple[PyTree, PyTree]:
        """Returns the update, of leaves `(*shape)`, and the next state."""
        ...


class Surgery(optax.GradientTransformationExtraArgs):
    """An optax transformation of stacked task gradients, of leaves `(T, *shape)` to `(*shape)`.

    It adds nothing but its name to `optax.GradientTransformationExtraArgs`: what needs a surgery
    knows one by its type. `Surgery(*tx)` says of a transformation that it is one:

    Examples:
      >>> import optax
      >>> import optax_surgery as surgery
      >>> clip = surgery.per_task(optax.clip_by_global_norm(1.0), num_tasks=3)
      >>> clipped = surgery.Surgery(*optax.chain(clip, surgery.pcgrad()))
      >>> tx = optax.chain(surgery.every(clipped, k=1, num_tasks=3), optax.adam(1e-3))
    """

    update: SurgeryUpdateFn  # pyright: ignore[reportIncompatibleVariableOverride]


class SurgeryState(NamedTuple):
    """State of a surgery.

    Attributes:
      surgery_step: () int32, the number of updates so far, from which the key of the next one
        follows.
      unusable_losses: () int32, how many losses the method could not use so far, such as negative
        ones of which it takes the logarithm. Their tasks had weight zero in that step.
      weighting_state: the state of the `Weighting` or `StackedRule`.
    """

    surgery_step: jax.Array
    unusable_losses: jax.Array
    weighting_state: Any


# What a rule sees


class Once:
    """A function without arguments that is called when it is first needed, and only then.

    What it returns is kept for the trace in which this object was made, and may be used in all
    within. Nothing is kept of a call within a branch of a `cond` or under `vmap`, where a value
    may not outlive the branch: there a second call traces the same again, and the compiler merges
    both.
    """

    def __init__(self, function: Callable[[], Any]):
        self._function = function
        self._trace = _trace()
        self._found: list[Any] = []

    @property
    def found(self) -> Any:
        """The value of the function, None if it was not called in the trace of this object."""
        return self._found[0] if self._found else None

    def __call__(self) -> Any:
        """The value of the function."""
        if self._found:
            return self._found[0]
        value = self._function()
        if _trace() == self._trace:
            self._found.append(value)
        return value


class MadeGramian(Once):
    """The Gramian of one batch, made by a surgery for the one inside of it.

    A rule that needs the Gramian of two batches refuses it.

    Attributes:
      scale: as `Tasks.gramian_scale`, or None for 1.
      relative: as `Tasks.relative_gramian`, or None where that is all the same.
      differences: as `Tasks.differences`, or None where the Gramian is all that is known.
    """

    def __init__(
        self,
        gramian: Callable[[], jax.Array],
        scale: Callable[[], jax.Array] | None = None,
        relative: Callable[[], tuple[jax.Array, jax.Array]] | None = None,
        differences: Callable[[], Callable[..., trees.Differences]] | None = None,
    ):
        super().__init__(gramian)
        self.scale, self.relative, self.differences = scale, relative, differences


class Tasks:
    """What a rule may look at in one step.

    Gramian, losses and key are gathered when they are first looked at: a rule that does not look
    does not pay, and needs nothing from the caller. A rule may look in one branch of a `cond`, in
    both, and afterwards.

    Attributes:
      num_tasks: T.
      step: () int32, the number of updates before this one.
      task_mask: (T,) bool, False where a task takes no part in this step.
      dtype: of the Gramian and the losses, float32 or float64.
      extra_args: what the caller of `update` gave by keyword, for a surgery within this one.
    """

    def __init__(
        self,
        name: str,
        updates: optax.Updates,
        task_mask: jax.Array,
        *,
        step: jax.Array,
        key: jax.Array | int,
        extra_args: dict[str, Any],
    ):
        given = extra_args.get("gramian")
        self._name = name
        self.num_tasks, self.step, self.task_mask = task_mask.size, step, task_mask
        self.extra_args = extra_args
        self.dtype = trees.gramian_dtype((updates, None if callable(given) else given))
        self._names = {
            argument: checks.tree_names(extra_args[argument])
            for argument in ("losses", "task_mask")
            if argument in extra_args and checks.is_tree(extra_args[argument])
        }
        num_tasks, dtype, names = self.num_tasks, self.dtype, self._names
        # A mask only where there is one: without it nothing has to be chosen.
        mask = task_mask if "task_mask" in extra_args else None

        # No function holds this object, which would keep what was traced alive.
        def draw():
            if "key" in extra_args:
                return _prng_key(extra_args["key"])
            return jax.random.fold_in(_prng_key(key), step)

        def gather():
            if given is None:
                return trees.gramian_and_scale(updates, mask)
            gramian = checks.gramian(given() if callable(given) else given, num_tasks)
            scale = jnp.ones((), dtype)
            if isinstance(given, MadeGramian) and given.scale is not None:
                scale = given.scale().astype(dtype)
            return trees.mask_gramian(mask, gramian.astype(dtype)), scale

        def losses():
            losses = checks.needed(name, "losses", extra_args.get("losses"))
            losses = checks.per_task("losses", losses, num_tasks, names).astype(dtype)
            return losses if mask is None else jnp.where(task_mask, losses, 1)

        def gather_relative():
            if given is None:
                return trees.relative_gramian(updates, mask)
            if not isinstance(given, MadeGramian) or given.relative is None:
                gramian, scale = gathered()
                return gramian, jnp.broadcast_to(scale, num_tasks)
            gramian, scales = given.relative()
            return trees.mask_gramian(mask, gramian.astype(dtype)), scales.astype(dtype)

        def differences():
            if given is None:
                return lambda base, factors=None: trees.differences(updates, base, mask, factors)
            if isinstance(given, MadeGramian) and given.differences is not None:
                find = given.differences()
            else:
                find = functools.partial(trees.differences_by_gramian, *relative())
            return lambda base, factors=None: _without(mask, find(base, factors=factors))

        gathered, relative = Once(gather), Once(gather_relative)
        self._differences = differences
        self._key, self._gathered, self._losses = Once(draw), gathered, Once(losses)
        self._relative = relative

    @property
    def key(self) -> jax.Array:
        """A PRNG key, new in every step."""
        return self._key()

    @property
    def losses(self) -> jax.Array:
        """(T,) task losses, 1 for masked tasks; refused if the caller gave none."""
        return self._losses()

    @property
    def gramian(self) -> jax.Array:
        """(T, T) inner products, rows and columns of masked tasks zero.

        Where squares of gradients do not fit the dtype (norms of 1e30 or 1e-30 in float32), this
        is the Gramian of the gradients times `gramian_scale`.
        """
        return self._gathered()[0]

    @property
    def gramian_scale(self) -> jax.Array:
        """() the power of two that the gradients were multiplied by for the Gramian; mostly 1."""
        return self._gathered()[1]

    @property
    def relative_gramian(self) -> tuple[jax.Array, jax.Array]:
        """The Gramian, and (T,) powers of two that the gradients were multiplied by for it.

        For what looks at norms and cosines: right where norms of 1e30 and 1e-30 stand side by side.
        """
        return self._relative()

    @property
    def differences(self) -> Callable[..., trees.Differences]:
        """What gathers the differences of the gradients from that of one task.

        It is called with the number of that task, which may be traced, and perhaps with (T,)
        `factors` of the gradients, and returns `trees.Differences`. For what looks at distances:
        where gradients have a large part in common, the Gramian holds nothing else. A call costs as
        much as the Gramian, and is not remembered. Look outside of a loop, and call within.
        """
        return self._differences()

    @property
    def given_gramian(self) -> jax.Array:
        """(T, T) the Gramian that the caller passed, of two batches, which need not be symmetric.

        Refused if the caller passed none, or one that another surgery made of one batch.
        """
        given = checks.needed(self._name, "gramian", self.extra_args.get("gramian"))
        if isinstance(given, MadeGramian):
            checks.given_gramian(self._name)
        return self.gramian

    def read(self, name: str, value: PerTask) -> jax.Array:
        """A factory's argument with one entry per task, as (T,) numbers in the rows' order."""
        return checks.per_task(name, value, self.num_tasks, self._names).astype(self.dtype)

    def spread(self, name: str, value: float | PerTask) -> jax.Array:
        """The same of an argument that may also be one number for all tasks."""
        if not checks.is_tree(value) and jnp.ndim(value) == 0:
            return jnp.full(self.num_tasks, value, self.dtype)
        return self.read(name, value)

    def preference(self, value: PerTask | None) -> jax.Array:
        """(T,) the preference of the tasks that take part: 1/T each unless the user chose one."""
        if value is None:
            active = self.task_mask.astype(self.dtype)
            return active / jnp.maximum(jnp.sum(active), 1)
        return jnp.where(self.task_mask, self.read("preference", value), 0)


# What the author of a method writes


class WeightingUpdateFn(Protocol):
    """The rule of a method: from what is known of the tasks to their weights."""

    def __call__(self, tasks: Tasks, state: Any, /) -> tuple[jax.Array, Any]:
        """Returns the weights and the next state.

        Args:
          tasks: what there is to look at.
          state: what `init` returned, or the state of the last step.

        Returns:
          (T,) weights, of which those of masked tasks are ignored, and the state, of the same
          structure, shapes and dtypes as before.
        """
        ...


class Weighting(NamedTuple):
    """A method of gradient surgery, as a rule from `Tasks` to weights.

    Attributes:
      init: () -> state, a pytree of arrays of fixed shapes; `tuple` for none.
      update: see `WeightingUpdateFn`.
      usable: (tasks) -> (T,) bool, the tasks whose losses the rule can use, where it cannot use
        all, as their logarithms. The others are masked in this step, and counted in the state.
    """

    init: Callable[[], Any]
    update: WeightingUpdateFn
    usable: Callable[[Tasks], jax.Array] | None = None


class StackedRule(NamedTuple):
    """A method that is no function of the Gramian of one step, as a rule on stacked gradients.

    Attributes:
      init: params -> state, a pytree of arrays of fixed shapes.
      update: (tasks, task_updates, state) -> (update, state). Gradients of masked tasks are zero.
        At least one task takes part: where the caller masks all, the rule sees all of them with
        gradients of zero, and what it returns is dropped. Updates may be in float32 whatever the
        dtype of the gradients.
      usable: as of `Weighting`.
    """

    init: Callable[[optax.Params], Any]
    update: Callable[[Tasks, optax.Updates, Any], tuple[optax.Updates, Any]]
    usable: Callable[[Tasks], jax.Array] | None = None


def gradient_surgery(
    weighting: Weighting, *, name: str, num_tasks: int | None = None, key: jax.Array | int = 0
) -> Surgery:
    """Makes a weighting a surgery.

    The update is the sum of the task gradients with the weights that the rule finds. Its `update`
    takes

    - `updates`: pytree whose leaves have shape `(T, *param.shape)`. T may change from call to call
      unless `num_tasks` says what it is.
    - `params`: optional, the parameters. With them, unstacked gradients are told for certain.
    - `losses`: (T,) task losses or a tree of them, for the methods that use them.
    - `task_mask`: (T,) bool or a tree of booleans, False where a task takes no part in this step.
      Its gradient and its loss may hold anything, NaN too. If all are False, the update is zero
      and the state stays as it was.
    - `gramian`: (T, T) inner products to use instead of those of `updates`, or a function without
      arguments that returns them, which is called only if the rule looks. With
      `updates=jnp.eye(T)` the update is then the weights themselves.
    - `key`: a PRNG key for this step, in place of the one that follows from the step.

    and ignores other extra arguments.

    Where gradients are so large or small that their squares do not fit the dtype (norms of 1e30
    or 1e-30 in float32), the rule sees the Gramian of the gradients times a power of two. Rules
    that do not depend on the common scale of the gradients, which are most, do not notice.

    Args:
      weighting: the rule.
      name: of the method, for messages.
      num_tasks: T, at least 1, where the rule keeps a number per task; by default any.
      key: seed or PRNG key of a random rule. Step t uses `jax.random.fold_in(key, t)`.

    Returns:
      A `Surgery` whose updates have the parameters' shapes and the dtypes of the gradients.

    Raises:
      ValueError: at once, for an argument out of its range; at trace time, if gradients, losses,
        mask, Gramian or state do not fit together.

    Examples:
      Weights that are inverse to the norms of the gradients:

      >>> import jax.numpy as jnp
      >>> import optax_surgery as surgery
      >>> def normalised(tasks, state):
      ...     return 1 / jnp.maximum(surgery.task_norms(tasks.gramian), 1e-12), state
      >>> weighting = surgery.Weighting(init=tuple, update=normalised)
      >>> tx = surgery.gradient_surgery(weighting, name="normalised")
      >>> task_grads = jnp.array([[3.0, 4.0], [0.0, 100.0]])
      >>> updates, state = tx.update(task_grads, tx.init(jnp.zeros(2)))
      >>> updates
      Array([0.6, 1.8], dtype=float32)
    """

    checks.arguments(
        gradient_surgery, locals(), weighting=Weighting, name=str, num_tasks="int [1, inf)"
    )

    def update(tasks, task_updates, state):
        weights, state = weighting.update(tasks, state)
        mask = tasks.task_mask if "task_mask" in tasks.extra_args else None
        return trees.combine(weights, task_updates, mask), state

    rule = StackedRule(lambda params: weighting.init(), update, weighting.usable)
    return _surgery(rule, name=name, num_tasks=num_tasks, key=key, masks=False)


def stacked_surgery(
    rule: StackedRule, *, name: str, num_tasks: int | None = None, key: jax.Array | int = 0
) -> Surgery:
    """Makes a rule on the stacked gradients a surgery.

    For methods whose update is no function of the Gramian of one step. Checks, masks, randomness
    and state are those of `gradient_surgery`, except that a Gramian is refused.

    Args:
      rule: the rule.
      name: of the method, for messages.
      num_tasks: T, at least 1, where the rule keeps a number per task; by default any.
      key: seed or PRNG key of a random rule. Step t uses `jax.random.fold_in(key, t)`.

    Returns:
      A `Surgery` whose updates have the parameters' shapes and the dtypes of the gradients.

    Raises:
      ValueError: at once, for an argument out of its range; at trace time, if gradients, losses,
        mask or state do not fit together, or if a Gramian is given.

    Examples:
      The largest gradient at each coordinate:

      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optax_surgery as surgery
      >>> def largest(tasks, task_updates, state):
      ...     return jax.tree.map(lambda leaf: jnp.max(leaf, axis=0), task_updates), state
      >>> rule = surgery.StackedRule(init=lambda params: (), update=largest)
      >>> tx = surgery.stacked_surgery(rule, name="largest")
      >>> task_grads = jnp.array([[3.0, 4.0], [0.0, 100.0]])
      >>> updates, state = tx.update(task_grads, tx.init(jnp.zeros(2)))
      >>> updates
      Array([  3., 100.], dtype=float32)
    """
    checks.arguments(
        stacked_surgery, locals(), rule=StackedRule, name=str, num_tasks="int [1, inf)"
    )
    return _surgery(rule, name=name, num_tasks=num_tasks, key=key, masks=True)


def _surgery(
    rule: StackedRule, *, name: str, num_tasks: int | None, key: jax.Array | int, masks: bool
) -> Surgery:
    """What both factories share; `masks` says that the rule looks at the gradients themselves."""
    checks.key(key)

    def init(params):
        zero = jnp.zeros((), jnp.int32)
        return SurgeryState(zero, jnp.copy(zero), rule.init(params))

    def update(task_updates, state, params, extra_args):
        if masks:
            checks.no_gramian(name, extra_args.get("gramian"))
        known = {
            argument: value
            for argument, value in extra_args.items()
            if argument in _OURS or _are_arrays(value)
        }
        # Outside of the user's `jit`, loops would be compiled anew in every call.
        run = compiled if _are_arrays(known) else operate
        return run(task_updates, state, known)

    def operate(task_updates, state, extra_args):
        checks.state(name, jax.eval_shape(rule.init, rows(task_updates)), state.weighting_state)

        def look(task_mask, extra_args):
            return Tasks(
                name,
                task_updates,
                task_mask,
                step=state.surgery_step,
                key=key,
                extra_args=extra_args,
            )

        active = trees.active_tasks(checks.stacked(task_updates), extra_args)
        num_unusable = jnp.zeros((), jnp.int32)
        if rule.usable is not None:
            usable = rule.usable(look(active, extra_args))
            num_unusable = jnp.sum(active & ~usable, dtype=jnp.int32)
            active &= usable
            extra_args = extra_args | {"task_mask": trees.like(extra_args.get("losses"), active)}

        any_active = jnp.any(active)
        if masks and "task_mask" in extra_args:
            task_updates = trees.mask_tasks(active, task_updates)
        tasks = look(active | ~any_active if masks else active, extra_args)
        updates, rule_state = rule.update(tasks, task_updates, state.weighting_state)
        if masks:
            updates = jax.tree.map(
                lambda update, leaf: jnp.where(any_active, update, 0).astype(leaf.dtype),
                updates,
                task_updates,
            )
        next_step = jnp.asarray(optax.safe_increment(state.surgery_step))
        count = state.unusable_losses + num_unusable
        # Where no task takes part, all but this count stays as it was.
        new_state = jax.tree.map(
            lambda new, old: jnp.where(any_active, jnp.asarray(new, old.dtype), old),
            SurgeryState(next_step, count, rule_state),
            state._replace(unusable_losses=count),
        )
        return updates, new_state

    compiled = jax.jit(operate)
    return transformation(init, update, name=name, num_tasks=num_tasks, state_kind=SurgeryState)


def transformation(
    init: Callable[[optax.Params], Any],
    update: Callable[..., tuple[optax.Updates, Any]],
    *,
    name: str,
    num_tasks: int | None = None,
    kind: type = Surgery,
    state_kind: type = object,
) -> Any:
    """Makes a transformation that checks what it is given, as every surgery does.

    Args:
      init: params -> state.
      update: (task_updates, state, params, extra_args) -> (updates, state). `extra_args` holds
        what is not None.
      name: for messages.
      num_tasks: T, if it is made for so many tasks.
      kind: of what comes back; not a `Surgery` if updates are still stacked, or are steps.
      state_kind: of the state, if it is one's own.
    """

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        losses: PerTask | None = None,
        task_mask: PerTask | None = None,
        gramian: Any = None,
        key: jax.Array | int | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, Any]:
        checks.state_kind(name, state_kind, state)
        got = checks.stacked(updates, params)
        if not got:  # a group of `optax.partition` that holds no leaf
            return updates, state
        checks.num_tasks(name, num_tasks, got)
        extra_args |= {"losses": losses, "task_mask": task_mask, "gramian": gramian, "key": key}
        given = {argument: value for argument, value in extra_args.items() if value is not None}
        checks.beside(given, got)
        return update(updates, state, params, given)

    return kind(init, update_fn)


def weights_of(surgery: Surgery, tasks: Tasks, state: Any) -> tuple[jax.Array, Any]:
    """The weights that a surgery finds for these tasks: its update of the identity."""
    made = MadeGramian(
        lambda: tasks.gramian,
        lambda: tasks.gramian_scale,
        lambda: tasks.relative_gramian,
        lambda: tasks.differences,
    )
    return identity_update(surgery, state, tasks.num_tasks, tasks.dtype, tasks.extra_args, made)


def identity_update(
    surgery: Surgery,
    state: Any,
    num_tasks: int,
    dtype: jnp.dtype,
    extra_args: dict[str, Any],
    gramian: Callable[[], jax.Array],
) -> tuple[jax.Array, Any]:
    """The weights that a surgery finds for a Gramian, which is made when it is looked at.

    A Gramian that the caller of `update` passed goes on as it is.
    """
    made = gramian if isinstance(gramian, MadeGramian) else MadeGramian(gramian)
    extra_args = {"gramian": made} | extra_args
    identity = jnp.eye(num_tasks, dtype=dtype)
    weights, state = surgery.update(identity, state, None, **extra_args)
    return jnp.asarray(weights), state


# What several methods and wrappers need


def tasks_of(name: str, task_updates: optax.Updates, extra_args: dict[str, Any]) -> Tasks:
    """The tasks of one step, for a wrapper that looks at them without a step of its own."""
    num_tasks = checks.stacked(task_updates)
    return Tasks(
        name,
        task_updates,
        trees.active_tasks(num_tasks, extra_args),
        step=jnp.zeros((), jnp.int32),
        key=0,
        extra_args=extra_args,
    )


def branch(condition: jax.Array, run: Callable[[], Any], rest: Callable[[], Any]) -> Any:
    """`lax.cond`; outside of `jit`, where that compiles anew in every call, the branch itself."""
    try:
        chosen = run if condition else rest
    except jax.errors.TracerBoolConversionError:
        return lax.cond(condition, run, rest)
    return chosen()


def zeros(run: Callable[[], tuple[optax.Updates, Any]]) -> optax.Updates:
    """Zeros like the updates that a call would return."""
    return optax.tree.zeros_like(jax.eval_shape(run)[0])


def kind_of(tx: optax.GradientTransformation) -> type:
    """What a wrapper of surgeries and optimisers alike makes of one."""
    return Surgery if isinstance(tx, Surgery) else optax.GradientTransformationExtraArgs


def random_orders(key: jax.Array, num_tasks: int) -> jax.Array:
    """For each task an independent, uniformly random order of the others, (T, T - 1)."""
    tasks = jnp.arange(num_tasks)[:, None]
    others = jnp.arange(num_tasks - 1)[None, :]
    others = jnp.where(others >= tasks, others + 1, others)
    return jax.random.permutation(key, others, axis=1, independent=True)


def unnamed_state(tx: optax.GradientTransformation, num_tasks: int) -> optax.GradientTransformation:
    """The optimiser of T numbers of a method, with a state that has no field names.

    `optax.tree.get(state, "count")` should find the step of the user's optimiser, and not a
    second one inside a surgery.
    """
    checks.one_gradient("optimizer", tx, Surgery)
    structure = jax.tree.structure(jax.eval_shape(tx.init, jnp.zeros(num_tasks)))

    def update(updates, state, params=None):
        state = jax.tree.unflatten(structure, state)
        with jax.numpy_dtype_promotion("standard"):  # Adam itself cannot do without
            updates, new_state = tx.update(updates, state, params)
        return updates, tuple(jax.tree.leaves(new_state))

    return optax.GradientTransformation(
        init=lambda params: tuple(jax.tree.leaves(tx.init(params))), update=update
    )


def rows(task_updates: optax.Updates) -> optax.Updates:
    """The shapes and dtypes of one task's gradient."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf)[1:], jnp.result_type(leaf)), task_updates
    )


def _without(mask: jax.Array | None, found: trees.Differences) -> trees.Differences:
    """The differences, with zeros for masked tasks."""
    if mask is None:
        return found
    cosines = trees.mask_gramian(mask, found.cosines)
    lengths, sizes = (jnp.where(mask, each, 0) for each in (found.lengths, found.sizes))
    return trees.Differences(cosines, lengths, sizes)


def _prng_key(key: jax.Array | int) -> jax.Array:
    if isinstance(key, jax.Array) and (
        jnp.issubdtype(key.dtype, jax.dtypes.prng_key) or key.shape == (2,)
    ):
        return key
    return jax.random.key(key)


# What every surgery knows; of other arguments, those that are arrays go on to what is inside.
_OURS = ("losses", "task_mask", "gramian", "key")


def _are_arrays(tree: Any) -> bool:
    arrays = (jax.Array, np.ndarray, np.generic, bool, int, float, complex)
    return all(isinstance(leaf, arrays) for leaf in jax.tree.leaves(tree))


def _trace() -> Any:
    """What identifies the trace that is under way; two of them can be compared."""
    find = getattr(jax.extend.core, "get_opaque_trace_state", None)
    if find is None:  # where jax 0.8 has it
        find = jax.core.get_opaque_trace_state  # pyright: ignore[reportAttributeAccessIssue]
    return find(convention="nnx")
