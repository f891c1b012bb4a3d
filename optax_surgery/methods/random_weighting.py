"""Random loss weighting: weights drawn anew in every step."""

import jax
import jax.numpy as jnp

from optax_surgery import core


def random_weighting(*, key: jax.Array | int = 0) -> core.Surgery:
    r"""Random loss weighting (RLW): weights each task gradient at random.

    In every step, with independent standard normal :math:`z_i`,

    .. math:: w_i = \frac{e^{z_i}}{\sum_j e^{z_j}}.

    The update is the mean gradient on average over the draws: a litmus test that a method for
    several tasks should pass.

    Args:
      key: seed or PRNG key of the draws.

    Returns:
      A `Surgery` from leaves `(T, *shape)` to leaves `(*shape)`.
      The update is a weighted mean: weights are above zero and add up to 1.

    Raises:
      ValueError: at trace time, from `update`, if the gradients are not stacked.

    Note:
      Of the distributions in the paper this is the standard normal one, which the authors'
      code has. What a task draws depends on its number among the tasks that take part.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_surgery as surgery
      >>> tx = surgery.random_weighting(key=7)
      >>> updates, state = tx.update(jnp.array([[1.0, 0.0], [0.0, 1.0]]), tx.init(jnp.zeros(2)))
      >>> print(updates.sum().round(5))
      1.0

    References:
      Lin et al., `Reasonable Effectiveness of Random Weighting: A Litmus Test for Multi-Task
      Learning <https://arxiv.org/abs/2111.10603>`_, TMLR 2022.
    """

    def update(tasks, state):
        task_mask = tasks.task_mask
        draws = jax.random.normal(tasks.key, task_mask.shape, jnp.float32).astype(tasks.dtype)
        # The k-th of the tasks that take part has the k-th draw, as if they were alone.
        draws = draws[jnp.maximum(jnp.cumsum(task_mask) - 1, 0)]
        return jax.nn.softmax(jnp.where(task_mask, draws, jnp.finfo(draws.dtype).min)), state

    return core.gradient_surgery(core.Weighting(tuple, update), name="random_weighting", key=key)
