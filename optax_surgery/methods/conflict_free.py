"""ConFIG: the direction with chosen, positive cosines to all task gradients."""

from typing import Literal

import jax
import jax.numpy as jnp

from optax_surgery import checks, core
from optax_surgery.algebra import linear
from optax_surgery.algebra.arithmetic import or_one

Length = Literal["projections", "minimum", "harmonic", "geometric", "arithmetic"]


def conflict_free_weights(
    gramian: jax.Array, preference: jax.Array, length: Length = "projections"
) -> jax.Array:
    """ConFIG's weights.

    Args:
      gramian: (T, T) inner products; rows of absent tasks are zero.
      preference: (T,) products with the unit gradients, up to a common factor.
      length: what stands for the norm of each gradient in the length of the update.

    Returns:
      (T,) weights, possibly negative.
    """
    direction = linear.least_squares_of_cosines(gramian, preference)
    products = jnp.matmul(gramian, direction, precision=jax.lax.Precision.HIGHEST)
    squared_length = direction @ products
    safe = jnp.where(squared_length > 0, squared_length, 1)
    if length == "projections":
        total = jnp.sum(products)
    else:
        squared_norms = jnp.diagonal(gramian)
        norms = jnp.sqrt(jnp.where(squared_norms > 0, squared_norms, 1))
        present = squared_norms > 0
        total = typical_norm(norms, present, length) * jnp.sum(products / norms)
    return jnp.where(squared_length > 0, direction * (total / safe), 0)


def typical_norm(norms: jax.Array, present: jax.Array, length: Length) -> jax.Array:
    """The least norm of the gradients that are not zero, or a mean of them."""
    if length == "minimum":
        # Of no gradient it is zero, as an infinite one times zero would be NaN.
        return jnp.where(jnp.any(present), jnp.min(norms, where=present, initial=jnp.inf), 0)
    count = or_one(jnp.sum(present).astype(norms.dtype))

    def mean(numbers):
        return jnp.sum(numbers, where=present) / count

    if length == "harmonic":
        return 1 / or_one(mean(1 / norms))
    return jnp.exp(mean(jnp.log(norms))) if length == "geometric" else mean(norms)


def conflict_free(
    preference: core.PerTask | None = None, length: Length = "projections"
) -> core.Surgery:
    r"""ConFIG: the direction with chosen, positive cosines to all task gradients.

    With the unit gradients in the rows of U and the preference p, :math:`u = U^{+} p` and

    .. math:: d = \Big( \sum_i g_i \cdot \hat u \Big)\, \hat u, \qquad \hat u = u / \|u\|.

    On the Gramian, with norms D and cosines C: :math:`v = D^{-1} C^{+} p`, weights
    :math:`v\, (\mathbf 1^\top G v) / (v^\top G v)`. The update conflicts with no task if the
    gradients are linearly independent.

    Args:
      preference: products of u with the unit gradients, the paper's weights, (T,) or a tree of
        numbers, each above 0; equal by default.
      length: of the update, one of "projections" (the rule above), and of "minimum", "harmonic",
        "geometric" and "arithmetic" (:math:`\|d\| = m \sum_i \cos(g_i, d)` with the least norm of
        the gradients, or that mean of their norms, for m).

    Returns:
      A `Surgery` from leaves `(T, *shape)` to leaves `(*shape)`.
      The update has the length of the summed gradient's projections on it, so the scale of a
      sum; with "minimum" and "harmonic" a long gradient does not lengthen it much.

    Raises:
      ValueError: at trace time, from `update`, if the gradients are not stacked or `preference`
        has not one entry per task; at once, for an argument out of its range.

    Note:
      The pseudo-inverse counts eigenvalues of C of at most T times the machine epsilon times
      the largest as zero. The authors' code solves a least-squares problem on U, on CUDA with a
      driver that needs full rank; and it has a shortcut for two tasks which gives the same. Where
      the update cannot be told from zero, it is zero.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_surgery as surgery
      >>> tx = surgery.conflict_free()
      >>> task_grads = jnp.array([[1.0, 0.0], [0.0, 3.0]])
      >>> updates, state = tx.update(task_grads, tx.init(jnp.zeros(2)))
      >>> updates
      Array([2., 2.], dtype=float32)

    References:
      Liu et al., `ConFIG: Towards Conflict-free Training of Physics Informed Neural Networks
      <https://arxiv.org/abs/2408.11104>`_, ICLR 2025, Equation 2.
    """
    name = checks.arguments(
        conflict_free,
        locals(),
        preference="per task (0, inf)",
        length=("projections", "minimum", "harmonic", "geometric", "arithmetic"),
    )

    def update(tasks, state):
        return conflict_free_weights(tasks.gramian, tasks.preference(preference), length), state

    return core.gradient_surgery(core.Weighting(tuple, update), name=name)
