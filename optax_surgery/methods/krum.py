"""Krum and Multi-Krum: the gradients that lie closest to most others."""

import jax
import jax.numpy as jnp

from optax_surgery import checks, core


def krum_weights(
    gramian: jax.Array, num_byzantine: int, num_selected: int, task_mask: jax.Array
) -> jax.Array:
    """Multi-Krum's weights: equal for the selected tasks, zero for all others.

    Args:
      gramian: (T, T) inner products.
      num_byzantine: number of gradients that may be anything.
      num_selected: number of gradients to average.
      task_mask: (T,) bool, the tasks that are there.

    Returns:
      (T,) weights that add up to 1.
    """
    num_active = jnp.sum(task_mask)
    # Squared distances do not depend on where the origin is, and weights not on the scale.
    peak = jnp.max(jnp.diagonal(gramian))
    scaled = gramian / jnp.where(peak > 0, peak, 1)
    squared_norms = jnp.diagonal(scaled)
    distances = jnp.maximum(squared_norms[:, None] + squared_norms[None, :] - 2 * scaled, 0)
    apart = task_mask[:, None] & task_mask[None, :] & ~jnp.eye(task_mask.size, dtype=bool)

    sorted_distances = jnp.sort(jnp.where(apart, distances, jnp.inf), axis=1)
    num_neighbours = jnp.clip(num_active - num_byzantine - 2, 1, jnp.maximum(num_active - 1, 1))
    near = jnp.arange(task_mask.size)[None, :] < num_neighbours
    scores = jnp.sum(jnp.where(near, sorted_distances, 0), axis=1)

    ranks = jnp.argsort(jnp.argsort(jnp.where(task_mask, scores, jnp.inf)))
    selected = (task_mask & (ranks < num_selected)).astype(gramian.dtype)
    return selected / jnp.maximum(jnp.sum(selected), 1)


def krum(num_byzantine: int, num_selected: int = 1) -> core.Surgery:
    r"""Krum: takes the mean of the task gradients that lie closest to most others.

    The score of a task is the sum of the squared distances from its gradient to the
    :math:`T - f - 2` nearest ones; the m tasks of least score are averaged. With m = 1 this is
    Krum, else Multi-Krum. Up to f gradients may be anything, if :math:`T \ge 2 f + 3`: that is what
    the paper guarantees, and no condition on the arguments.

    Args:
      num_byzantine: f, number of gradients that may be anything, in [0, T). Up to (T - 3) / 2 of
        them cannot carry the update off; beyond that there is no guarantee.
      num_selected: m, number of gradients to average, in [1, T].

    Returns:
      A `Surgery` from leaves (T, *shape) to leaves (*shape).
      The update is a mean of task gradients.

    Raises:
      ValueError: at trace time, from `update`, if the gradients are not stacked, or there are
        fewer of them than the arguments need; at once, for an argument out of its range.

    Note:
      Distances are squared, as in the paper; some code takes them as they are. With
      too few tasks for T - f - 2 neighbours, the nearest one counts. Of equal scores the first
      task wins, so that it is equivariant to permutations only where scores differ.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_surgery as surgery
      >>> tx = surgery.krum(num_byzantine=1, num_selected=2)
      >>> task_grads = jnp.array([[1.0], [1.5], [1.2], [1.3], [-900.0]])
      >>> updates, state = tx.update(task_grads, tx.init(jnp.zeros(1)))
      >>> updates
      Array([1.25], dtype=float32)

    References:
      Blanchard et al., `Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent
      <https://arxiv.org/abs/1703.02757>`_, NeurIPS 2017, Section 4.
    """
    name = checks.arguments(krum, locals(), num_byzantine="int [0, T)", num_selected="int [1, T]")

    def update(tasks, state):
        return krum_weights(tasks.gramian, num_byzantine, num_selected, tasks.task_mask), state

    return core.gradient_surgery(core.Weighting(tuple, update), name=name)
