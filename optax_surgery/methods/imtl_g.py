"""IMTL-G: the update has the same projection on every task gradient."""

import jax
import jax.numpy as jnp

from optax_surgery import core
from optax_surgery.algebra import linear


def imtl_g_weights(gramian: jax.Array) -> jax.Array:
    """Weights that add up to 1, with which the update projects equally on all gradients.

    Args:
      gramian: (T, T) inner products; rows of absent tasks are zero.

    Returns:
      (T,) weights, possibly negative.
    """
    weights = linear.least_squares_of_cosines(gramian, jnp.ones(gramian.shape[0], gramian.dtype))
    total = jnp.sum(weights)
    return weights / jnp.where(total == 0, 1, total)


def imtl_g() -> core.Surgery:
    r"""IMTL-G: weights the task gradients so that the update projects equally on each.

    With the norms in :math:`D`, the cosines :math:`C = D^{-1} G D^{-1}` and
    :math:`v = D^{-1} C^{+} \mathbf 1`, the weights are :math:`w = v / \mathbf 1^\top v`: the only
    ones with :math:`\sum_i w_i = 1` and

    .. math:: d \cdot \frac{g_i}{\|g_i\|} = d \cdot \frac{g_j}{\|g_j\|} \quad \text{for all } i, j.

    The direction does not depend on the lengths of the gradients.

    Returns:
      A `Surgery` from leaves `(T, *shape)` to leaves `(*shape)`.
      The update is a weighted mean: weights add up to 1 and may be negative.

    Raises:
      ValueError: at trace time, from `update`, if the gradients are not stacked.

    Note:
      Where the sum of v is negative the constraint turns the direction round, and the update
      conflicts with every task; that is the paper's rule. `conflict_free` has the same
      direction without that turn. For linearly dependent gradients, where equal projections
      may not exist, ours are the nearest in least squares; the authors' formula, with
      differences to task 1, is singular there. If all gradients are zero, so are the weights.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_surgery as surgery
      >>> tx = surgery.imtl_g()
      >>> task_grads = jnp.array([[1.0, 0.0], [0.0, 3.0]])
      >>> updates, state = tx.update(task_grads, tx.init(jnp.zeros(2)))
      >>> updates
      Array([0.75, 0.75], dtype=float32)

    References:
      Liu et al., `Towards Impartial Multi-task Learning
      <https://openreview.net/forum?id=IMPnRXEWpvr>`_, ICLR 2021, Equation 6.
    """

    def update(tasks, state):
        return imtl_g_weights(tasks.gramian), state  # a masked row is zero: it gets no weight

    return core.gradient_surgery(core.Weighting(tuple, update), name="imtl_g")
