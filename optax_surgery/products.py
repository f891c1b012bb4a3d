"""The two products that touch the stacked gradients of one leaf, in the form each platform reads best.

Whatever the form, the sums are in the dtype of the arguments, at the highest precision.
"""

import jax
from jax import lax


def leaf_gramian(left: jax.Array, right: jax.Array) -> jax.Array:
    """The inner products of the rows of one leaf, over all its coordinates.

    Args:
      left: (T, *shape) float32 or float64.
      right: the same shape and dtype; often the same array.

    Returns:
      (T, T), entry (i, j) is left_i . right_j.
    """
    return lax.platform_dependent(
        left, right, cpu=_gramian_cpu, tpu=_gramian_tpu, cuda=_gramian_gpu, default=_gramian_dot
    )


def leaf_combination(weights: jax.Array, rows: jax.Array) -> jax.Array:
    """The weighted sum of the rows of one leaf.

    Args:
      weights: (T,) of the dtype of the rows.
      rows: (T, *shape) float32 or float64.

    Returns:
      (*shape), sum_i weights_i rows_i.
    """
    return lax.platform_dependent(
        weights, rows, cpu=_combination_cpu, tpu=_combination_tpu, default=_combination_dot
    )


def _gramian_dot(left, right):
    axes = tuple(range(1, left.ndim))
    return lax.dot_general(left, right, ((axes, axes), ((), ())), precision=lax.Precision.HIGHEST)


def _gramian_cpu(left, right):
    return _gramian_dot(left, right)


def _gramian_tpu(left, right):
    return _gramian_dot(left, right)


def _gramian_gpu(left, right):
    return _gramian_dot(left, right)


def _combination_dot(weights, rows):
    axes = (((0,), (0,)), ((), ()))
    return lax.dot_general(weights, rows, axes, precision=lax.Precision.HIGHEST)


def _combination_cpu(weights, rows):
    return _combination_dot(weights, rows)


def _combination_tpu(weights, rows):
    return _combination_dot(weights, rows)
