"""What Flax's training states cannot do alone: extra arguments, checks, a loss scale per task.

`nnx.Optimizer` passes extra arguments on by itself. It takes every surgery as it is.
"""

from __future__ import annotations  # `help` shows them as they are written

import dataclasses
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

import jax
import jax.numpy as jnp
import optax
from flax.training import train_state
from flax.training.dynamic_scale import DynamicScale, DynamicScaleResult

from optax_surgery import checks

Params = TypeVar("Params")
P = ParamSpec("P")


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
          grads: task gradients, with leaves of shape `(T, *param.shape)`.
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
            checks.unstacked(name, value, getattr(self, name))
        update = optax.with_extra_args_support(self.tx).update

        def checked_update(updates, state, params=None):
            updates, state = update(updates, state, params, **extra_args)
            checks.updates(updates, params)
            return updates, state

        checked = self.replace(tx=optax.GradientTransformation(self.tx.init, checked_update))
        new_state = train_state.TrainState.apply_gradients(checked, grads=grads, **replaced)
        return new_state.replace(tx=self.tx)  # pyright: ignore[reportReturnType]


def task_dynamic_scale(num_tasks: int, scale: float = 2.0**15, **kwargs: Any) -> DynamicScale:
    """A dynamic loss scale for each task, to start with.

    Args:
      num_tasks: number of tasks T, at least 1.
      scale: what each loss is multiplied by at first, above 0. The largest power of two in float16.
      **kwargs: `growth_factor`, `backoff_factor`, `growth_interval` and `minimum_scale` of
        `flax.training.dynamic_scale.DynamicScale`.

    Returns:
      A `DynamicScale` whose `scale` and `fin_steps` have shape (T,).

    Raises:
      ValueError: at once, for an argument out of its range.
    """
    checks.arguments(task_dynamic_scale, locals(), num_tasks="int [1, inf)", scale="(0, inf)")
    return DynamicScale(
        fin_steps=jnp.zeros(num_tasks, jnp.int32),  # pyright: ignore[reportArgumentType]
        scale=jnp.full(num_tasks, scale, jnp.float32),  # pyright: ignore[reportArgumentType]
        **kwargs,
    )


def scaled_task_value_and_grad(
    losses_fn: Callable[Concatenate[Params, P], Any], has_aux: bool = False
) -> Callable[Concatenate[DynamicScale, Params, P], DynamicScaleResult]:
    """`task_value_and_grad` for float16, with a dynamic loss scale for each task.

    Losses are scaled before the backward pass, gradients are divided by the scale in
    float32 after it. A task whose gradient overflows halves its scale; the others keep theirs.
    Wrap surgery and optimiser in `on_nonfinite(tx, "mask")`: it masks that task in this step, and
    counts it.

    Args:
      losses_fn: `losses_fn(params, *args, **kwargs)` returns losses of shape (T,), or a tree of
        scalar losses; with `has_aux` a pair of those and anything. Losses in float32 leave room
        for the scale.
      has_aux: whether `losses_fn` returns a pair.

    Returns:
      `fn(dynamic_scale, params, *args, **kwargs)` giving Flax's `DynamicScaleResult`: the next
      `dynamic_scale`, which begins with `task_dynamic_scale(num_tasks)`; `finite`, of shape (T,);
      `aux`, which is what `losses_fn` returned, unscaled; and `grad`, the stacked gradients in
      float32, not finite where `finite` is False.

    Raises:
      ValueError: at once, for an argument out of its range; at trace time, if there is not one
        scale per task, or if the losses are not one floating-point scalar per task.

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
    call = checks.arguments(scaled_task_value_and_grad, locals(), has_aux=bool)
    checks.function("losses_fn", losses_fn)

    def fn(
        dynamic_scale: DynamicScale, params: Params, /, *args: P.args, **kwargs: P.kwargs
    ) -> DynamicScaleResult:
        checks.differentiable(params)

        def stacked(params):
            value = losses_fn(params, *args, **kwargs)
            return checks.losses(checks.before_aux(value, has_aux, call)), value

        def one_task(dynamic_scale, task):
            def loss_fn(params):
                losses, value = stacked(params)
                return losses[task], value

            result = dynamic_scale.value_and_grad(loss_fn, has_aux=True)(params)
            _, value = result.aux
            return (result.dynamic_scale, result.finite, result.grad), value

        num_tasks = jax.eval_shape(lambda params: stacked(params)[0], params).size
        checks.per_task("dynamic_scale", dynamic_scale.scale, num_tasks)
        (dynamic_scale, finite, grads), value = jax.vmap(one_task, out_axes=(0, None))(
            dynamic_scale, jnp.arange(num_tasks)
        )
        return DynamicScaleResult(dynamic_scale, finite, value, grads)

    return fn
