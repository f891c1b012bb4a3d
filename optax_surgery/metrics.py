"""What a Gramian says about a set of task gradients.

All are pure functions of a (T, T) Gramian, as `gramian` and the state of `monitor`
hold it; `jax.vmap` them over a history. A task whose gradient is zero, as that of a
masked task is, takes no part.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from optax_surgery import checks, trees
from optax_surgery.algebra import eigen


def task_norms(gramian: ArrayLike) -> jax.Array:
    """The norms of the task gradients.

    Args:
      gramian: (T, T) inner products.

    Returns:
      (T,) norms.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_surgery as surgery
      >>> surgery.task_norms(jnp.array([[4.0, -1.0], [-1.0, 9.0]]))
      Array([2., 3.], dtype=float32)
    """
    return jnp.sqrt(jnp.diagonal(checks.square("task_norms", gramian)))


def cosine_similarities(gramian: ArrayLike) -> jax.Array:
    """The cosines of the angles between the task gradients.

    Args:
      gramian: (T, T) inner products.

    Returns:
      (T, T) cosines in [-1, 1]; 0 with a gradient that is zero.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_surgery as surgery
      >>> surgery.cosine_similarities(jnp.array([[4.0, -3.0], [-3.0, 9.0]]))
      Array([[ 1. , -0.5],
             [-0.5,  1. ]], dtype=float32)
    """
    gramian = checks.square("cosine_similarities", gramian)
    norms = task_norms(gramian)
    norms = jnp.where(norms > 0, norms, 1)
    return jnp.clip(gramian / norms[:, None] / norms[None, :], -1, 1)


def conflict_fraction(gramian: ArrayLike) -> jax.Array:
    """The share of pairs of tasks whose gradients conflict: a negative inner product.

    For random, nearly orthogonal gradients it is close to a half: read it together with
    the size of the cosines.

    Args:
      gramian: (T, T) inner products.

    Returns:
      () in [0, 1], over the pairs of gradients that are not zero; 0 if there is none.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_surgery as surgery
      >>> gramian = jnp.array([[1.0, -0.5, 0.1], [-0.5, 1.0, 0.2], [0.1, 0.2, 1.0]])
      >>> print(f"{surgery.conflict_fraction(gramian):.3f}")
      0.333
    """
    gramian = checks.square("conflict_fraction", gramian)
    present = jnp.diagonal(gramian) > 0
    pairs = jnp.triu(present[:, None] & present[None, :], k=1)
    num_conflicts, num_pairs = jnp.sum(pairs & (gramian < 0)), jnp.sum(pairs)
    return num_conflicts.astype(gramian.dtype) / jnp.maximum(num_pairs, 1).astype(gramian.dtype)


def magnitude_similarities(gramian: ArrayLike) -> jax.Array:
    r"""How alike in length the task gradients are, pair by pair.

    .. math:: \Phi(g_i, g_j) = \frac{2 \|g_i\| \|g_j\|}{\|g_i\|^2 + \|g_j\|^2}

    Args:
      gramian: (T, T) inner products.

    Returns:
      (T, T) in [0, 1]: 1 for equal norms, 0 with a gradient that is zero.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_surgery as surgery
      >>> similarities = surgery.magnitude_similarities(jnp.array([[1.0, 0.0], [0.0, 9.0]]))
      >>> print(f"{similarities[0, 1]:.1f}")
      0.6

    References:
      Yu et al., `Gradient Surgery for Multi-Task Learning
      <https://arxiv.org/abs/2001.06782>`_, NeurIPS 2020, Definition 2.
    """
    norms = task_norms(checks.square("magnitude_similarities", gramian))
    larger = jnp.maximum(norms[:, None], norms[None, :])
    ratio = jnp.minimum(norms[:, None], norms[None, :]) / jnp.where(larger > 0, larger, 1)
    return 2 * ratio / (1 + ratio**2)


def condition_number(gramian: ArrayLike) -> jax.Array:
    """The condition number of the gradient matrix: its largest singular value over its least.

    It is 1 for orthogonal gradients of equal norm; the paper finds good optima where it
    stays below 10.

    Args:
      gramian: (T, T) inner products.

    Returns:
      () at least 1, over the gradients that are not zero; infinite where they are linearly
      dependent: where the sine of the angle between one and all others is below about
      2 sqrt(T eps), however much their lengths differ; 1 if there is no gradient, and NaN if one
      is not finite.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_surgery as surgery
      >>> print(surgery.condition_number(jnp.array([[1.0, 0.0], [0.0, 9.0]])))
      3.0

    References:
      Senushkin et al., `Independent Component Alignment for Multi-Task Learning
      <https://arxiv.org/abs/2305.19000>`_, CVPR 2023, Section 3.
    """
    gramian = checks.square("condition_number", gramian)
    present = jnp.sum(~(jnp.diagonal(gramian) <= 0))  # a NaN is there, and shows
    values = eigen.spectrum(gramian).values
    least = jnp.min(jnp.where(values == 0, jnp.inf, values))
    dependent = jnp.sum(values != 0) < present
    ratio = values[-1] / jnp.where(present > 0, least, 1)
    return jnp.where(present > 0, jnp.where(dependent, jnp.inf, ratio), 1)


def update_alignment(gramian: ArrayLike, weights: trees.PerTask) -> jax.Array:
    """The inner product of the update with each task gradient.

    Where it is negative, a small step along the update makes that task's loss larger.

    Args:
      gramian: (T, T) inner products.
      weights: (T,) weights of the tasks in the update, or a tree of them; any numbers.

    Returns:
      (T,) inner products, in the unit of a squared gradient.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_surgery as surgery
      >>> gramian = jnp.array([[1.0, -2.0], [-2.0, 9.0]])
      >>> surgery.update_alignment(gramian, jnp.array([1.0, 1.0]))
      Array([-1.,  7.], dtype=float32)
    """
    gramian = checks.square("update_alignment", gramian, "weights")
    weights = checks.per_task("weights", weights, len(gramian)).astype(gramian.dtype)
    return jnp.matmul(gramian, weights, precision=jax.lax.Precision.HIGHEST)
