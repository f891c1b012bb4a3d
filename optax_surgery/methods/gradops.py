"""GradOPS: of each task gradient, keep what is orthogonal to the span of all others."""

import jax
import jax.numpy as jnp

from optax_surgery import checks, core
from optax_surgery.algebra import linear


def gradops_weights(gramian: jax.Array, preference: jax.Array) -> jax.Array:
    """GradOPS's weights.

    The part of g_i that is orthogonal to all others is sum_j (G^-1)_ij / (G^-1)_ii g_j. It is
    zero for a gradient in the span of the others, which the null space of the cosines tells.

    Args:
      gramian: (T, T) inner products; rows of absent tasks are zero.
      preference: (T,) weights of the orthogonal parts.

    Returns:
      (T,) weights, possibly negative.
    """
    cosines, inverse_norms = linear.unit_gradients(gramian)
    inverse, independence = linear.pseudo_inverse(cosines)
    dependent = 1 - independence >= jnp.sqrt(jnp.finfo(gramian.dtype).eps)
    independent = (inverse_norms > 0) & ~dependent
    parts = jnp.where(independent, preference / jnp.where(independent, jnp.diagonal(inverse), 1), 0)
    norms = jnp.sqrt(jnp.diagonal(gramian))
    return inverse_norms * (inverse @ (norms * parts))


def gradops(preference: core.PerTask | None = None) -> core.Surgery:
    r"""GradOPS: keeps of each task gradient what is orthogonal to the span of all others.

    .. math::
      g_i' = \sum_j \frac{(G^{-1})_{ij}}{(G^{-1})_{ii}}\, g_j, \qquad d = \sum_i w_i\, g_i'

    No g_i' conflicts with any task gradient (its product with all others is zero), whatever
    the weights w >= 0 are, so w chooses among updates that conflict with no task.

    Args:
      preference: weights of the orthogonal parts, w in the paper, (T,) or a tree of numbers, each
        at least 0; 1 each by default.

    Returns:
      A `Surgery` from leaves `(T, *shape)` to leaves `(*shape)`.
      The update is a sum of parts that are each no longer than the task's gradient.

    Raises:
      ValueError: at trace time, from `update`, if the gradients are not stacked or `preference`
        has not one entry per task; at once, for an argument out of its range.

    Note:
      A gradient in the span of the others has no orthogonal part: as gradients become linearly
      dependent, and always with more tasks than parameters, the update goes to zero. The paper
      also derives w from one trade-off number; we could not confirm that formula and leave the
      weights to you.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_surgery as surgery
      >>> tx = surgery.gradops()
      >>> task_grads = jnp.array([[1.0, 0.0], [-1.0, 1.0]])
      >>> updates, state = tx.update(task_grads, tx.init(jnp.zeros(2)))
      >>> print(jnp.array_str(updates, precision=3, suppress_small=True))
      [0.5 1.5]

    References:
      Zhu et al., `Gradient Deconfliction via Orthogonal Projections onto Subspaces For
      Multi-task Learning <https://arxiv.org/abs/2503.03438>`_, WSDM 2025.
    """
    name = checks.arguments(gradops, locals(), preference="per task [0, inf)")

    def update(tasks, state):
        chosen = jnp.ones(tasks.num_tasks, tasks.dtype)  # and not 1/T: the update is a sum
        if preference is not None:
            chosen = tasks.read("preference", preference)
        return gradops_weights(tasks.gramian, chosen), state

    return core.gradient_surgery(core.Weighting(tuple, update), name=name)
