"""The inner abstraction: a rule from the Gramian to weights, made a transformation.

A `Weighting` is all that the author of a method writes. `gradient_surgery` makes an
`optax.GradientTransformationExtraArgs` of it and takes care of pytrees, dtypes,
masks, randomness and state.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax

from optax_surgery import trees


class WeightingUpdateFn(Protocol):
    """The rule of a method: from the Gramian of the task gradients to their weights."""

    def __call__(
        self,
        gramian: jax.Array,
        state: Any,
        /,
        *,
        key: jax.Array,
        losses: jax.Array | None,
        task_mask: jax.Array,
    ) -> tuple[jax.Array, Any]:
        """Returns the weights and the next state.

        Args:
          gramian: (T, T) inner products, float32 or float64. Rows and columns of
            masked tasks are zero.
          state: what `init` returned, or the state of the last step.
          key: a PRNG key, new in every step.
          losses: (T,) task losses, 1 for masked tasks; None if the caller gave none.
          task_mask: (T,) bool, False where a task takes no part in this step.

        Returns:
          (T,) weights, of which those of masked tasks are ignored, and the state,
          of the same structure, shapes and dtypes as before.
        """
        ...


class Weighting(NamedTuple):
    """A method of gradient surgery, as a pure rule on a (T, T) matrix.

    Attributes:
      init: () -> state, a pytree of arrays of fixed shapes; `tuple` for none.
      update: see `WeightingUpdateFn`.
    """

    init: Callable[[], Any]
    update: WeightingUpdateFn


class SurgeryState(NamedTuple):
    """State of a surgery.

    Attributes:
      surgery_step: () int32, the number of updates so far, from which the key of the
        next one follows.
      weighting_state: the state of the `Weighting`, or of a method on coordinates.
    """

    surgery_step: jax.Array
    weighting_state: Any


def gradient_surgery(
    weighting: Weighting, *, key: jax.Array | int = 0
) -> optax.GradientTransformationExtraArgs:
    """Makes a weighting an optax transformation of stacked task gradients.

    The update is the sum of the task gradients with the weights that the rule finds in
    their Gramian. Its `update` takes

    - `task_updates`: pytree whose leaves have shape (T, *param.shape). T may change from
      call to call unless the weighting keeps one number per task.
    - `params`: optional, the parameters. With them, unstacked gradients are told for certain.
    - `losses`: (T,) task losses, for the methods that use them.
    - `task_mask`: (T,) bool, False where a task takes no part in this step. Its gradient
      and its loss may hold anything, NaN too. If all are False, the update is zero and
      the state stays as it was.
    - `gramian`: (T, T) inner products to use instead of those of `task_updates`. With
      `task_updates=jnp.eye(T)` the update is then the weights themselves.

    and ignores other extra arguments.

    Where gradients are so large or small that their squares do not fit the dtype (norms
    of 1e30 or 1e-30 in float32), the rule sees the Gramian of the gradients times a power
    of two. Rules that do not depend on the common scale of the gradients, which are most,
    do not notice.

    Args:
      weighting: the rule.
      key: seed or PRNG key of a random rule. Step t uses `jax.random.fold_in(key, t)`.

    Returns:
      An `optax.GradientTransformationExtraArgs` whose updates have the parameters' shapes
      and the dtypes of the gradients.

    Raises:
      ValueError: at trace time, if gradients, losses, mask or Gramian do not fit together.

    Examples:
      Weights that are inverse to the norms of the gradients:

      >>> import jax.numpy as jnp
      >>> import optax_surgery as surgery
      >>> def normalised(gramian, state, *, key, losses, task_mask):
      ...     return 1 / jnp.maximum(surgery.task_norms(gramian), 1e-12), state
      >>> tx = surgery.gradient_surgery(surgery.Weighting(init=tuple, update=normalised))
      >>> task_grads = jnp.array([[3.0, 4.0], [0.0, 100.0]])
      >>> updates, state = tx.update(task_grads, tx.init(jnp.zeros(2)))
      >>> updates
      Array([0.6, 1.8], dtype=float32)
    """

    def init_fn(params: optax.Params) -> SurgeryState:
        del params
        return SurgeryState(jnp.zeros((), jnp.int32), weighting.init())

    def update_fn(
        task_updates: optax.Updates,
        state: SurgeryState,
        params: optax.Params | None = None,
        *,
        losses: jax.Array | None = None,
        task_mask: jax.Array | None = None,
        gramian: jax.Array | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, SurgeryState]:
        del extra_args
        num_tasks = trees.check_task_updates(task_updates, params)
        if not num_tasks:  # a group of `optax.partition` that holds no leaf
            return task_updates, state
        return operate(task_updates, state, losses, task_mask, gramian)

    @jax.jit  # outside of the user's `jit`, loops would be compiled anew in every call
    def operate(task_updates, state, losses, task_mask, gramian):
        gramian, active = masked_gramian(task_updates, task_mask, gramian)
        losses = _active_losses(losses, active, gramian.dtype)

        weights, weighting_state = weighting.update(
            gramian,
            state.weighting_state,
            key=jax.random.fold_in(_prng_key(key), state.surgery_step),
            losses=losses,
            task_mask=active,
        )
        next_step = jnp.asarray(optax.safe_increment(state.surgery_step))
        new_state = _next_state(active, SurgeryState(next_step, weighting_state), state)
        return trees.combine(weights, task_updates, task_mask), new_state

    # optax calls the first argument `updates`; ours are per task, and say so.
    return optax.GradientTransformationExtraArgs(init_fn, update_fn)  # pyright: ignore[reportArgumentType]


def stacked_surgery(
    method: str,
    init: Callable[[optax.Params], Any],
    update: Callable[..., tuple[optax.Updates, Any]],
    *,
    num_tasks: int | None = None,
    key: jax.Array | int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Makes a rule on the stacked gradients an optax transformation.

    For methods that are no function of the Gramian of one step. Masks, randomness, state and
    errors are those of `gradient_surgery`, except that a Gramian is refused.

    Args:
      method: its name, for messages.
      init: params -> state, a pytree of arrays of fixed shapes.
      update: `(task_updates, state, *, key, step, losses, task_mask) -> (updates, state)`.
        Gradients of masked tasks are zero, their losses 1; `step` is () int32, 0 at first.
        There is at least one task that takes part: where the caller masks all, the rule sees
        all of them with gradients of zero, and what it returns is dropped. Updates may be in
        float32 whatever the dtype of the gradients.
      num_tasks: number of tasks that the state is made for, if it is.
      key: seed or PRNG key of a random rule. Step t uses `jax.random.fold_in(key, t)`.

    Returns:
      An `optax.GradientTransformationExtraArgs` whose updates have the parameters' shapes
      and the dtypes of the gradients.
    """

    def init_fn(params: optax.Params) -> SurgeryState:
        return SurgeryState(jnp.zeros((), jnp.int32), init(params))

    def update_fn(
        task_updates: optax.Updates,
        state: SurgeryState,
        params: optax.Params | None = None,
        *,
        losses: jax.Array | None = None,
        task_mask: jax.Array | None = None,
        gramian: jax.Array | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, SurgeryState]:
        del extra_args
        refuse_gramian(method, gramian)
        got = trees.check_task_updates(task_updates, params)
        if not got:  # a group of `optax.partition` that holds no leaf
            return task_updates, state
        if num_tasks is not None:
            check_num_tasks(method, num_tasks, got)
        return operate(task_updates, state, losses, task_mask)

    @jax.jit  # outside of the user's `jit`, loops would be compiled anew in every call
    def operate(task_updates, state, losses, task_mask):
        task_updates, active = masked_task_updates(task_updates, task_mask)
        losses = _active_losses(losses, active, trees.gramian_dtype(task_updates))
        updates, rule_state = update(
            task_updates,
            state.weighting_state,
            key=jax.random.fold_in(_prng_key(key), state.surgery_step),
            step=state.surgery_step,
            losses=losses,
            task_mask=active | ~jnp.any(active),
        )
        updates = jax.tree.map(
            lambda update, leaf: jnp.where(jnp.any(active), update, 0).astype(leaf.dtype),
            updates,
            task_updates,
        )
        next_step = jnp.asarray(optax.safe_increment(state.surgery_step))
        return updates, _next_state(active, SurgeryState(next_step, rule_state), state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)  # pyright: ignore[reportArgumentType]


def coordinate_surgery(
    method: str, rule: Callable[..., jax.Array], *, key: jax.Array | int = 0
) -> optax.GradientTransformationExtraArgs:
    """Makes a rule on each coordinate, without a state, an optax transformation.

    Args:
      method: its name, for messages.
      rule: `(rows, *, key, task_mask) -> update`, from a leaf's gradients of shape (T, *shape),
        float32 or float64 and zero where a task is masked, to the leaf's update. The key
        differs from leaf to leaf and from step to step.
      key: seed or PRNG key of a random rule.

    Returns:
      An `optax.GradientTransformationExtraArgs`, as of `stacked_surgery`.
    """

    def update(task_updates, state, *, key, step, losses, task_mask):
        del step, losses
        return trees.map_rows(rule, task_updates, key=key, task_mask=task_mask), state

    return stacked_surgery(method, lambda params: (), update, key=key)


def with_gramian(
    method: str, tx: optax.GradientTransformationExtraArgs
) -> optax.GradientTransformationExtraArgs:
    """Makes `gramian` a needed argument, for methods of two independent batches."""

    def update_fn(task_updates, state, params=None, *, gramian=None, **extra_args):
        gramian = needed(method, gramian=gramian)
        return tx.update(task_updates, state, params, gramian=gramian, **extra_args)

    return optax.GradientTransformationExtraArgs(tx.init, update_fn)  # pyright: ignore[reportArgumentType]


def masked_task_updates(
    task_updates: optax.Updates, task_mask: jax.Array | None
) -> tuple[optax.Updates, jax.Array]:
    """The gradients that a rule may see, zero where a task is masked, and the (T,) mask."""
    active = active_tasks(task_updates, task_mask)
    return (task_updates if task_mask is None else trees.mask_tasks(active, task_updates)), active


def masked_gramian(
    task_updates: optax.Updates, task_mask: jax.Array | None, gramian: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """The Gramian that a rule may see, zero where a task is masked, and the (T,) mask.

    Other than `masked_task_updates`, it makes no copy of the gradients.
    """
    active = active_tasks(task_updates, task_mask)
    mask = None if task_mask is None else active
    if gramian is None:
        return trees.gramian_in_range(task_updates, mask), active
    gramian = trees.check_shape("gramian", gramian, (active.size, active.size))
    return trees.mask_gramian(mask, gramian.astype(trees.gramian_dtype(gramian))), active


def active_tasks(task_updates: optax.Updates, task_mask: jax.Array | None) -> jax.Array:
    """The (T,) mask of the tasks that take part in the step, all if the caller gave none."""
    num_tasks = trees.check_task_updates(task_updates)
    if task_mask is None:
        return jnp.ones(num_tasks, bool)
    return trees.check_task_mask(task_mask, num_tasks)


def task_preference(preference: jax.Array | None, task_mask: jax.Array) -> jax.Array:
    """The preference of the tasks that take part: 1/T each unless the user chose one."""
    if preference is None:
        return task_mask / jnp.maximum(jnp.sum(task_mask), 1)
    preference = trees.check_shape("preference", preference, task_mask.shape)
    return jnp.where(task_mask, preference, 0.0)


def random_orders(key: jax.Array, num_tasks: int) -> jax.Array:
    """For each task an independent, uniformly random order of the others, (T, T - 1)."""
    tasks = jnp.arange(num_tasks)[:, None]
    others = jnp.arange(num_tasks - 1)[None, :]
    others = others + (others >= tasks)
    return jax.random.permutation(key, others, axis=1, independent=True)


def check_num_tasks(method: str, expected: int, num_tasks: int) -> None:
    """Refuses the gradients of more or fewer tasks than a method keeps numbers for."""
    if num_tasks != expected:
        raise ValueError(
            f"Expected the gradients of {expected} tasks, got {num_tasks} at 'num_tasks'. "
            f"Make it `{method}({num_tasks})`."
        )


def needed(method: str, **argument: Any) -> Any:
    """Returns an extra argument of `update`, given by name, or says that it is missing."""
    ((name, value),) = argument.items()
    if value is None:
        raise ValueError(
            f"Expected the extra argument `{name}`, got None at '{method}'. "
            f"Pass it: `update(task_updates, state, params, {name}=...)`."
        )
    return value


def refuse_gramian(method: str, gramian: jax.Array | None) -> None:
    """For methods that are no function of the Gramian."""
    if gramian is not None:
        raise ValueError(
            f"Expected no Gramian, got one at '{method}', which works on the coordinates of the "
            "gradients. Pass the stacked task gradients alone."
        )


def unnamed_state(tx: optax.GradientTransformation, params: Any) -> optax.GradientTransformation:
    """The optimiser of a method's own parameters, with a state that has no field names.

    `optax.tree.get(state, "count")` should find the step of the user's optimiser, and not a
    second one inside a surgery.
    """
    structure = jax.tree.structure(jax.eval_shape(tx.init, params))

    def update(updates, state, params=None):
        updates, new_state = tx.update(updates, jax.tree.unflatten(structure, state), params)
        return updates, tuple(jax.tree.leaves(new_state))

    return optax.GradientTransformation(
        init=lambda params: tuple(jax.tree.leaves(tx.init(params))), update=update
    )


def _active_losses(
    losses: jax.Array | None, active: jax.Array, dtype: jnp.dtype
) -> jax.Array | None:
    if losses is None:
        return None
    losses = trees.check_shape("losses", losses, active.shape).astype(dtype)
    return jnp.where(active, losses, 1)


def _next_state(active: jax.Array, new: SurgeryState, old: SurgeryState) -> SurgeryState:
    """The new state, with the dtypes of the old one; the old one if no task takes part."""
    return jax.tree.map(
        lambda new, old: jnp.where(jnp.any(active), new, old).astype(old.dtype), new, old
    )


def _prng_key(key: jax.Array | int) -> jax.Array:
    if isinstance(key, jax.Array) and (
        jnp.issubdtype(key.dtype, jax.dtypes.prng_key) or key.shape == (2,)
    ):
        return key
    return jax.random.key(key)
