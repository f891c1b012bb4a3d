"""Mean, sum and constant weights: what every method has to be compared with."""

from optax_surgery import checks, core


def mean() -> core.Surgery:
    """The mean of the task gradients, over the tasks that are not masked.

    Returns:
      A `Surgery` from leaves `(T, *shape)` to leaves `(*shape)`.

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

    def update(tasks, state):
        return tasks.preference(None), state

    return core.gradient_surgery(core.Weighting(tuple, update), name="mean")


def sum() -> core.Surgery:
    """The sum of the task gradients, which is the gradient of the summed losses.

    Returns:
      A `Surgery` from leaves `(T, *shape)` to leaves `(*shape)`.

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

    def update(tasks, state):
        return tasks.task_mask.astype(tasks.dtype), state

    return core.gradient_surgery(core.Weighting(tuple, update), name="sum")


def constant(weights: core.PerTask) -> core.Surgery:
    """A fixed weighted sum of the task gradients: linear scalarisation.

    Args:
      weights: weights of the tasks, (T,) or a tree of any numbers.

    Returns:
      A `Surgery` from leaves `(T, *shape)` to leaves `(*shape)`.

    Raises:
      ValueError: at trace time, from `update`, if the gradients are not stacked or `weights`
        has not one entry per task; at once, for an argument out of its range.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_surgery as surgery
      >>> tx = surgery.constant(jnp.array([0.1, 1.0]))
      >>> updates, state = tx.update(jnp.array([[1.0, 0.0], [3.0, 4.0]]), tx.init(jnp.zeros(2)))
      >>> updates
      Array([3.1, 4. ], dtype=float32)
    """

    name = checks.arguments(constant, locals(), weights="per task (-inf, inf)")

    def update(tasks, state):
        return tasks.read("weights", weights), state

    return core.gradient_surgery(core.Weighting(tuple, update), name=name)
