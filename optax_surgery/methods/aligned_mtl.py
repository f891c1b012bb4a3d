"""Aligned-MTL: make the principal components of the task gradients equally long."""

import typing
from typing import Literal

import jax
import jax.numpy as jnp

from optax_surgery import checks, core

ScaleMode = Literal["min", "median", "rmse"]


def aligned_mtl_weights(
    gramian: jax.Array, preference: jax.Array, num_active: jax.Array | int, scale_mode: ScaleMode
) -> jax.Array:
    """Aligned-MTL's weights, alpha = B w in the paper.

    Args:
      gramian: (T, T) inner products of the task gradients; rows of absent tasks are zero.
      preference: (T,) weights of the tasks, w in the paper.
      num_active: number of tasks present, which the tolerance of the rank depends on.
      scale_mode: the common singular value: the least, the (lower) median or the root
        mean square of those that are not zero.

    Returns:
      (T,) weights, possibly negative.
    """
    # Weights do not depend on the scale of the Gramian; its squares might not fit.
    peak = jnp.max(jnp.diagonal(gramian))
    eigenvalues, eigenvectors = jnp.linalg.eigh(gramian / jnp.where(peak > 0, peak, 1))
    num_active = jnp.asarray(num_active, gramian.dtype)
    tolerance = eigenvalues[-1] * num_active * jnp.finfo(gramian.dtype).eps
    kept = eigenvalues > tolerance
    rank = jnp.sum(kept)

    safe_eigenvalues = jnp.where(kept, eigenvalues, 1)
    if scale_mode == "min":
        scale = jnp.min(jnp.where(kept, eigenvalues, jnp.inf))
    elif scale_mode == "median":
        # eigenvalues ascend, so those kept are the last `rank`
        scale = eigenvalues[eigenvalues.size - rank + (rank - 1) // 2]
    else:
        total = jnp.sum(jnp.where(kept, eigenvalues, 0))
        scale = total / jnp.maximum(rank, 1).astype(total.dtype)

    components = jnp.where(kept, eigenvectors.T @ preference / jnp.sqrt(safe_eigenvalues), 0)
    aligned = jnp.sqrt(jnp.where(rank > 0, scale, 1)) * (eigenvectors @ components)
    return jnp.where(rank > 0, aligned, preference)


def aligned_mtl(
    preference: core.PerTask | None = None, scale_mode: ScaleMode = "min"
) -> core.Surgery:
    r"""Aligned-MTL: replaces the task gradients by the nearest orthogonal ones of equal length.

    With the eigendecomposition :math:`M = V \Lambda V^\top` of the Gramian (of the R
    eigenvalues that are not zero), the balance matrix and the weights are

    .. math:: B = \sigma V \Lambda^{-1/2} V^\top, \qquad \alpha = B w

    with :math:`\sigma = \sqrt{\lambda_R}`, the least singular value, in the mode "min". The
    condition number of the gradient matrix becomes 1, and training converges to a point
    that is stationary for the weighted loss :math:`\sum_i w_i L_i`.

    Args:
      preference: weights of the tasks, w in the paper, (T,) or a tree of any numbers; 1/T each by
        default (over the tasks that are not masked).
      scale_mode: what the singular values become, one of "min" (the least one), "median" (the
        lower median), "rmse" (the root mean square), all over those that are not zero.

    Returns:
      A `Surgery` from leaves (T, *shape) to leaves (*shape).
      The update has norm sigma times that of `preference` (for full rank): with the default,
      the least singular value over sqrt(T).

    Raises:
      ValueError: for an unknown `scale_mode`; at trace time, from `update`, if the
        gradients are not stacked or `preference` has not one entry per task.

    Note:
      The authors' code has w = 1 for each task: its update is T times ours with w = 1/T,
      which the paper states; pass `preference=jnp.ones(T)` for theirs. Eigenvalues of at most
      T times the machine epsilon times the largest count as zero, as in their code; in float32
      this bounds the condition number of the gradient matrix by about 2,000. Where all
      gradients are zero the weights are `preference`.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_surgery as surgery
      >>> tx = surgery.aligned_mtl()
      >>> task_grads = jnp.array([[1.0, 0.0], [0.0, 4.0]])
      >>> updates, state = tx.update(task_grads, tx.init(jnp.zeros(2)))
      >>> updates
      Array([0.5, 0.5], dtype=float32)

    References:
      Senushkin et al., `Independent Component Alignment for Multi-Task Learning
      <https://arxiv.org/abs/2305.19000>`_, CVPR 2023, Algorithm 1.
    """
    name = checks.arguments(
        aligned_mtl,
        locals(),
        preference="per task (-inf, inf)",
        scale_mode=typing.get_args(ScaleMode),
    )

    def update(tasks, state):
        chosen = tasks.preference(preference)
        num_active = jnp.sum(tasks.task_mask)
        return aligned_mtl_weights(tasks.gramian, chosen, num_active, scale_mode), state

    return core.gradient_surgery(core.Weighting(tuple, update), name=name)
