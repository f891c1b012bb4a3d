"""Aligned-MTL: make the principal components of the task gradients equally long."""

import typing
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from optax_surgery import checks, core
from optax_surgery.algebra import eigen

ScaleMode = Literal["min", "median", "rmse"]


class AlignedMTLState(NamedTuple):
    """State of `aligned_mtl`.

    Attributes:
      num_components: () int32, how many principal components the last step kept; fewer than
        tasks where gradients depend on each other.
    """

    num_components: jax.Array


def aligned_mtl_weights(
    gramian: jax.Array, preference: jax.Array, scale_mode: ScaleMode
) -> tuple[jax.Array, jax.Array]:
    """Aligned-MTL's weights, alpha = B w in the paper, and the number of components kept.

    Args:
      gramian: (T, T) inner products of the task gradients; rows of absent tasks are zero.
      preference: (T,) weights of the tasks, w in the paper.
      scale_mode: the common singular value: the least, the (lower) median or the root
        mean square of those that are not zero.

    Returns:
      (T,) weights, possibly negative; () int32.
    """
    values, inverse_root, _ = eigen.spectrum(gramian)
    kept = values != 0
    rank = jnp.sum(kept, dtype=jnp.int32)
    if scale_mode == "min":
        scale = jnp.min(jnp.where(kept, values, jnp.inf))
    elif scale_mode == "median":
        # values ascend, so those kept are the last `rank`
        scale = values[values.size - rank + (rank - 1) // 2]
    else:
        longest = jnp.where(rank > 0, values[-1], 1)
        mean_square = jnp.sum((values / longest) ** 2) / jnp.maximum(rank, 1).astype(values.dtype)
        scale = longest * jnp.sqrt(jnp.where(rank > 0, mean_square, 1))

    balance = jnp.where(rank > 0, scale, 1) * inverse_root
    aligned = jnp.matmul(balance, preference, precision=jax.lax.Precision.HIGHEST)
    return jnp.where(rank > 0, aligned, preference), rank


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
      A `Surgery` from leaves `(T, *shape)` to leaves `(*shape)`.
      The update has norm sigma times that of `preference` (for full rank): with the default,
      the least singular value over sqrt(T). Its state is an `AlignedMTLState`.

    Raises:
      ValueError: for an unknown `scale_mode`; at trace time, from `update`, if the
        gradients are not stacked or `preference` has not one entry per task.

    Note:
      The authors' code has w = 1 for each task: its update is T times ours with w = 1/T,
      which the paper states; pass `preference=jnp.ones(T)` for theirs. It also drops all
      components shorter than 1/2,000 (in float32) of the longest, and with them the tasks of
      small gradients. Here only directions are dropped that the cosines between the gradients
      cannot tell from those of others, however long the gradients are: the condition number of
      the matrix of unit gradients is then about 1,000 in float32. Where all gradients are zero
      the weights are `preference`.

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
        weights, rank = aligned_mtl_weights(tasks.gramian, chosen, scale_mode)
        return weights, AlignedMTLState(rank)

    def init():
        return AlignedMTLState(jnp.zeros((), jnp.int32))

    return core.gradient_surgery(core.Weighting(init, update), name=name)
