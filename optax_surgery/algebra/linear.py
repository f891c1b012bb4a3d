"""Linear systems in the cosines of the task gradients."""

import jax
import jax.numpy as jnp


def cosine_eigh(gramian: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Eigendecomposition of the matrix of cosines.

    Cosines do not depend on the lengths of the gradients, which may differ by many orders of
    magnitude: the Gramian's own small eigenvalues are then lost in rounding.

    Args:
      gramian: (T, T) inner products; rows of absent tasks are zero.

    Returns:
      (T,) inverse norms of the gradients, 0 for zero gradients; (T,) ascending eigenvalues, (T, T)
      eigenvectors in columns; (T,) bool, whether an eigenvalue counts as above zero.
    """
    norms = jnp.sqrt(jnp.diagonal(gramian))
    inverse_norms = jnp.where(norms > 0, 1 / jnp.where(norms > 0, norms, 1), 0)
    cosines = gramian * inverse_norms[:, None] * inverse_norms[None, :]
    eigenvalues, eigenvectors = jnp.linalg.eigh(cosines)
    present = jnp.sum(norms > 0, dtype=norms.dtype)
    kept = eigenvalues > eigenvalues[-1] * present * jnp.finfo(gramian.dtype).eps
    return inverse_norms, eigenvalues, eigenvectors, kept


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
    inverse_norms, eigenvalues, eigenvectors, kept = cosine_eigh(gramian)
    reached = jnp.where(kept, eigenvectors.T @ targets, 0)
    noise = targets.size * jnp.finfo(gramian.dtype).eps
    reached = jnp.where(jnp.sum(reached**2) > noise * jnp.sum(targets**2), reached, 0)
    return inverse_norms * (eigenvectors @ (reached / jnp.where(kept, eigenvalues, 1)))
