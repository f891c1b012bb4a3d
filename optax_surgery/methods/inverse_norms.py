"""Inverse gradient norms: weigh each task so that all gradients become equally long."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from optax_surgery import checks, core
from optax_surgery.algebra.arithmetic import or_one


class InverseNormsState(NamedTuple):
    """State of `inverse_norms`.

    Attributes:
      mean_weights: (T,) averages of the weights, 1 before the first step.
    """

    mean_weights: jax.Array


def inverse_norms(num_tasks: int, decay: float = 0.9) -> core.Surgery:
    r"""Weighs each task by the inverse of the norm of its gradient, averaged over steps.

    .. math::
      \hat\lambda_i = \frac{\frac{1}{T} \sum_j \|g_j\|}{\|g_i\|}, \qquad
      \lambda_i \leftarrow \alpha \lambda_i + (1 - \alpha) \hat\lambda_i, \qquad
      d = \sum_i \lambda_i g_i.

    It is how physics-informed networks balance their losses. There, weights are renewed every
    1,000 steps or so: `every(inverse_norms(num_tasks), k, num_tasks)`.

    Args:
      num_tasks: number of tasks T, at least 1.
      decay: alpha, in [0, 1); with 0 weights are those of this step.

    Returns:
      A `Surgery` from leaves `(T, *shape)` to leaves `(*shape)`.
      The update is a weighted sum: weights are above zero, and 1 where all norms are alike.

    Raises:
      ValueError: at trace time, from `update`, if the gradients are not those of `num_tasks`
        tasks; at once, for an argument out of its range.

    Note:
      A masked task, and one whose gradient is zero, keeps its average. The paper has the sum of
      the norms in the place of their mean, T times ours; the authors' code has the mean.
      `normalize_tasks(sum())` makes all gradients of length 1 in each step.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_surgery as surgery
      >>> tx = surgery.inverse_norms(num_tasks=2, decay=0.0)
      >>> updates, _ = tx.update(jnp.array([[3.0, 0.0], [0.0, 1.0]]), tx.init(jnp.zeros(2)))
      >>> print(updates.round(3))
      [2. 2.]

    References:
      Wang et al., `An Expert's Guide to Training Physics-informed Neural Networks
      <https://arxiv.org/abs/2308.08468>`_, 2023, Section 5.1.
    """
    name = checks.arguments(inverse_norms, locals(), num_tasks="int [1, inf)", decay="[0, 1)")

    def init():
        return InverseNormsState(jnp.ones(num_tasks))

    def update(tasks, state):
        dtype = state.mean_weights.dtype
        gramian, scales = tasks.relative_gramian
        largest = jnp.finfo(scales.dtype).max
        norms = jnp.minimum(jnp.sqrt(jnp.diagonal(gramian)) / scales, largest)
        present = norms > 0
        # Relative to the longest, as a sum of norms need not fit the dtype.
        peak = jnp.where(jnp.any(present), jnp.max(norms), 1)
        mean = jnp.sum(norms / peak) / or_one(jnp.sum(present).astype(norms.dtype))
        weights = jnp.minimum(peak / jnp.where(present, norms, peak), largest) * mean
        rate = jnp.asarray(decay, dtype)
        averages = rate * state.mean_weights + (1 - rate) * weights.astype(dtype)
        averages = jnp.where(present, averages, state.mean_weights)
        return averages, InverseNormsState(averages)

    return core.gradient_surgery(core.Weighting(init, update), name=name, num_tasks=num_tasks)
