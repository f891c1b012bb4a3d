"""What Flax's training states cannot do alone: extra arguments, checks, a loss scale per task.

`nnx.Optimizer` passes extra arguments on by itself. It takes every surgery as it is.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Self

import jax
import jax.numpy as jnp
import optax
from flax.training import train_state
from flax.training.dynamic_scale import DynamicScale, DynamicScaleResult

from optax_surgery import trees, wrappers


class SurgeryTrainState(train_state.TrainState):
    """A linen `TrainState` that passes `losses`, `task_mask` and the like to optax.

    It is used, subclassed and created like `flax.training.train_state.TrainState`.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import optax_surgery as surgery
      >>> from optax_surgery.flax import SurgeryTrainState
      >>> tx = optax.chain(surgery.famo(num_tasks=2), optax.sgd(0.1))
      >>> params = {"w": jnp.ones(2)}
      >>> state = SurgeryTrainState.create(apply_fn=None, params=params, tx=tx)
      >>> task_grads = {"w": jnp.array([[1.0, 0.0], [0.0, 1.0]])}
      >>> state = state.apply_gradients(grads=task_grads, losses=jnp.array([1.0, 1.0]))
      >>> print(state.params["w"])
      [0.95 0.95]
    """

    def apply_gradients(self, *, grads: optax.Updates, **kwargs: Any) -> Self:
        """Updates `step`, `params` and `opt_state`, and the fields named in `kwargs`.

        Args:
          grads: task gradients, with leaves of shape (T, *param.shape).
          **kwargs: those that are fields of the state, such as `batch_stats` of a subclass,
            replace them; all others (`losses`, `task_mask`, `value`, ...) go to `tx.update`, where
            optax ignores what nobody asks for, a misspelt field too.

        Returns:
          The next state.

        Raises:
          ValueError: at trace time, if the updates are still stacked, as without a surgery, or if
            a field is replaced by one that is stacked: the batch statistics of every task.
        """
        fields = {field.name for field in dataclasses.fields(self)}
        replaced = {name: value for name, value in kwargs.items() if name in fields}
        extra_args = {name: value for name, value in kwargs.items() if name not in fields}
        for name, value in replaced.items():
            _check_unstacked(name, value, getattr(self, name))
        update = optax.with_extra_args_support(self.tx).update

        def checked_update(updates, state, params=None):
            updates, state = update(updates, state, params, **extra_args)
            wrappers.check_updates(updates, params)
            return updates, state

        checked = self.replace(tx=optax.GradientTransformation(self.tx.init, checked_update))
        new_state = train_state.TrainState.apply_gradients(checked, grads=grads, **replaced)
        return new_state.replace(tx=self.tx)  # pyright: ignore[reportReturnType]


def task_dynamic_scale(num_tasks: int, scale: float = 2.0**15, **kwargs: Any) -> DynamicScale:
    """A dynamic loss scale for each task, to start with.

    Args:
      num_tasks: number of tasks T.
      scale: what each loss is multiplied by at first. The largest power of two in float16.
      **kwargs: `growth_factor`, `backoff_factor`, `growth_interval` and `minimum_scale` of
        `flax.training.dynamic_scale.DynamicScale`.

    Returns:
      A `DynamicScale` whose `scale` and `fin_steps` have shape (T,).
    """
    return DynamicScale(
        fin_steps=jnp.zeros(num_tasks, jnp.int32),  # pyright: ignore[reportArgumentType]
        scale=jnp.full(num_tasks, scale, jnp.float32),  # pyright: ignore[reportArgumentType]
        **kwargs,
    )


def scaled_task_value_and_grad(
    losses_fn: Callable[..., Any], has_aux: bool = False
) -> Callable[..., DynamicScaleResult]:
    """`task_value_and_grad` for float16, with a dynamic loss scale for each task.

    Losses are scaled before the backward pass, gradients are divided by the scale in
    float32 after it. A task whose gradient overflows halves its scale; the others keep theirs.
    Wrap surgery and optimiser in `on_nonfinite(tx, "mask")`: it masks that task in this step, and
    counts it.

    Args:
      losses_fn: `losses_fn(params, *args)` returns losses of shape (T,), or a tree of scalar
        losses; with `has_aux` a pair of those and anything. Losses in float32 leave room for the
        scale.
      has_aux: whether `losses_fn` returns a pair.

    Returns:
      `fn(dynamic_scale, params, *args)` giving Flax's `DynamicScaleResult`: the next
      `dynamic_scale`, which begins with `task_dynamic_scale(num_tasks)`; `finite`, of shape (T,);
      `aux`, which is what `losses_fn` returned, unscaled; and `grad`, the stacked gradients in
      float32, not finite where `finite` is False.

    Raises:
      ValueError: at trace time, if there is not one scale per task, or if the losses are not one
        floating-point scalar per task.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_surgery as surgery
      >>> from optax_surgery.flax import scaled_task_value_and_grad, task_dynamic_scale
      >>> def losses_fn(params):
      ...     return jnp.float16(params) * jnp.array([1.0, 3.0], jnp.float16)
      >>> fn = scaled_task_value_and_grad(losses_fn)
      >>> result = fn(task_dynamic_scale(2), jnp.ones(2))
      >>> result.finite, result.dynamic_scale.scale
      (Array([ True, False], dtype=bool), Array([32768., 16384.], dtype=float32))
      >>> result.aux
      Array([1., 3.], dtype=float16)
    """

    def fn(dynamic_scale: DynamicScale, params: optax.Params, *args: Any) -> DynamicScaleResult:
        def stacked(params):
            value = losses_fn(params, *args)
            return trees.stack_losses(value[0] if has_aux else value), value

        def one_task(dynamic_scale, task):
            def loss_fn(params):
                losses, value = stacked(params)
                return losses[task], value

            result = dynamic_scale.value_and_grad(loss_fn, has_aux=True)(params)
            _, value = result.aux
            return (result.dynamic_scale, result.finite, result.grad), value

        losses, _ = jax.eval_shape(stacked, params)
        trees.check_shape("dynamic_scale", dynamic_scale.scale, losses.shape)
        (dynamic_scale, finite, grads), value = jax.vmap(one_task, out_axes=(0, None))(
            dynamic_scale, jnp.arange(losses.size)
        )
        return DynamicScaleResult(dynamic_scale, finite, value, grads)

    return fn


def _check_unstacked(field: str, new: Any, old: Any) -> None:
    """Refuses a field that has become one per task."""
    if jax.tree.structure(new) != jax.tree.structure(old):
        return
    new_leaves = jax.tree.leaves_with_path(new)
    for (path, leaf), old_leaf in zip(new_leaves, jax.tree.leaves(old), strict=True):
        shape, old_shape = getattr(leaf, "shape", None), getattr(old_leaf, "shape", None)
        if shape and shape[1:] == old_shape:
            raise ValueError(
                f"Expected {field} of shape {old_shape}, got shape {shape} at "
                f"'{'/'.join(filter(None, [field, trees.leaf_path(path)]))}'. Keep one copy for "
                "all tasks, as `task_value_and_grad(losses_fn, has_aux=True)` does, or average "
                "over the leading axis."
            )
