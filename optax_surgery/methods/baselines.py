"""Mean, sum and constant weights: what every method has to be compared with."""

import jax
import optax

from optax_surgery import core, trees


def mean() -> optax.GradientTransformationExtraArgs:
    """The mean of the task gradients, over the tasks that are not masked.

    Returns:
      An `optax.GradientTransformationExtraArgs` from leaves (T, *shape) to leaves (*shape).

    Raises:
      ValueError: at trace time, from `update`, if the gradients are not stacked.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_surgery as surgery
      >>> tx = surgery.mean()
      >>> updates, state = tx.update(jnp.array([[1.0, 0.0], [3.0, 4.0]]), tx.init(jnp.zeros(2)))
      >>> updates
      Array([2., 2.], dtype=float32)
    """

    def update(gramian, state, /, *, key, losses, task_mask):
        del gramian, key, losses
        return core.task_preference(None, task_mask), state

    return core.gradient_surgery(core.Weighting(init=tuple, update=update))


def sum() -> optax.GradientTransformationExtraArgs:
    """The sum of the task gradients, which is the gradient of the summed losses.

    Returns:
      An `optax.GradientTransformationExtraArgs` from leaves (T, *shape) to leaves (*shape).

    Raises:
      ValueError: at trace time, from `update`, if the gradients are not stacked.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_surgery as surgery
      >>> tx = surgery.sum()
      >>> updates, state = tx.update(jnp.array([[1.0, 0.0], [3.0, 4.0]]), tx.init(jnp.zeros(2)))
      >>> updates
      Array([4., 4.], dtype=float32)
    """

    def update(gramian, state, /, *, key, losses, task_mask):
        del key, losses
        return task_mask.astype(gramian.dtype), state

    return core.gradient_surgery(core.Weighting(init=tuple, update=update))


def constant(weights: jax.Array) -> optax.GradientTransformationExtraArgs:
    """A fixed weighted sum of the task gradients: linear scalarisation.

    Args:
      weights: (T,) weights of the tasks, any numbers.

    Returns:
      An `optax.GradientTransformationExtraArgs` from leaves (T, *shape) to leaves (*shape).

    Raises:
      ValueError: at trace time, from `update`, if the gradients are not stacked or `weights`
        has not one entry per task.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_surgery as surgery
      >>> tx = surgery.constant(jnp.array([0.1, 1.0]))
      >>> updates, state = tx.update(jnp.array([[1.0, 0.0], [3.0, 4.0]]), tx.init(jnp.zeros(2)))
      >>> updates
      Array([3.1, 4. ], dtype=float32)
    """

    def update(gramian, state, /, *, key, losses, task_mask):
        del key, losses
        chosen = trees.check_shape("weights", weights, task_mask.shape)
        return chosen.astype(gramian.dtype), state

    return core.gradient_surgery(core.Weighting(init=tuple, update=update))
