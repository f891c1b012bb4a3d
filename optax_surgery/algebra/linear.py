"""Linear systems in the cosines of the task gradients."""

import jax
import jax.numpy as jnp

from optax_surgery.algebra import eigen
from optax_surgery.algebra.arithmetic import dot


def unit_gradients(gramian: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What is left of a Gramian without the lengths, which may differ by any factor.

    Args:
      gramian: (T, T) inner products; rows of absent tasks are zero.

    Returns:
      (T, T) cosines and (T,) inverse norms of the gradients, 0 for zero gradients.
    """
    squared_norms = jnp.diagonal(gramian)
    present = ~(squared_norms <= 0)
    inverse_norms = jnp.where(present, 1 / jnp.sqrt(jnp.where(present, squared_norms, 1)), 0)
    return gramian * inverse_norms[:, None] * inverse_norms[None, :], inverse_norms


def pseudo_inverse(cosines: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The pseudo-inverse of a matrix of cosines, and `Spectrum.independence`."""
    found = eigen.spectrum(cosines)
    return dot(found.inverse_root, found.inverse_root), found.independence


def least_squares_of_cosines(gramian: jax.Array, targets: jax.Array) -> jax.Array:
    """Weights whose combination has given products with the unit gradients.

    With C the cosines and D the norms, this is v = D^-1 C^+ targets: J^T v has the product
    targets[i] with g_i / ||g_i|| where that is possible, and else the nearest in least squares.

    Args:
      gramian: (T, T) inner products; rows of absent tasks are zero.
      targets: (T,) products.

    Returns:
      (T,) weights, 0 for zero gradients; all 0 where no combination has products with a share
      of the targets, as of two opposite gradients with equal targets.
    """
    cosines, inverse_norms = unit_gradients(gramian)
    inverse, _ = pseudo_inverse(cosines)
    weights = dot(inverse, targets)
    reached = dot(cosines, weights)
    noise = targets.size * jnp.finfo(gramian.dtype).eps
    some = jnp.sum(reached**2) > noise * jnp.sum(targets**2)
    return jnp.where(some, inverse_norms * weights, 0)
