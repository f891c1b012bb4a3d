"""What all T-sized problems are written with."""

import jax
import jax.numpy as jnp
from jax import lax


def dot(left: jax.Array, right: jax.Array) -> jax.Array:
    """A product of matrices or vectors at the precision of their dtype, on every platform."""
    return jnp.matmul(left, right, precision=lax.Precision.HIGHEST)


def or_one(numbers: jax.Array) -> jax.Array:
    """Divisors: 1 in the place of 0."""
    return jnp.where(numbers == 0, 1, numbers)
