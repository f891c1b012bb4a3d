"""Weights on the simplex: not negative, 1 in sum over the tasks that take part.

Methods that carry such weights from step to step keep them as relative weights, T numbers of
mean 1. The weights of a step are the shares of the tasks that take part; tasks that do not keep
their relative weight, and the others share what they had among them.
"""

import jax
import jax.numpy as jnp


def shares(relative_weights: jax.Array, task_mask: jax.Array) -> jax.Array:
    """The weights of the tasks that take part; equal ones if all of theirs are zero.

    Args:
      relative_weights: (T,) not negative.
      task_mask: (T,) bool.

    Returns:
      (T,) weights on the simplex, 0 for masked tasks.
    """
    active = jnp.where(task_mask, relative_weights, 0)
    active = jnp.where(jnp.sum(active) > 0, active, task_mask.astype(active.dtype))
    return active / jnp.maximum(jnp.sum(active), jnp.finfo(relative_weights.dtype).tiny)


def redistribute(
    relative_weights: jax.Array, weights: jax.Array, task_mask: jax.Array
) -> jax.Array:
    """The relative weights after a step whose weights on the simplex were `weights`."""
    held = jnp.sum(jnp.where(task_mask, relative_weights, 0))
    return jnp.where(task_mask, held * weights.astype(held.dtype), relative_weights)


def project(values: jax.Array, task_mask: jax.Array) -> jax.Array:
    """The nearest point of the simplex of the tasks that take part.

    Args:
      values: (T,) any finite numbers.
      task_mask: (T,) bool.

    Returns:
      (T,) weights on the simplex, 0 for masked tasks.
    """
    # A common shift changes nothing, and what lies 1 below the largest is projected on zero: in
    # this range sums are exact to rounding, and masked tasks need no infinite values.
    largest = jnp.max(values, where=task_mask, initial=-jnp.inf)
    largest = jnp.where(jnp.any(task_mask), largest, 0)
    shifted = jnp.where(task_mask, jnp.maximum(values - largest, -2), -2)
    # `optax.projections.projection_simplex` does the same, but divides floats by integers.
    counts = jnp.arange(1, values.size + 1).astype(values.dtype)
    descending = jnp.sort(shifted)[::-1]
    thresholds = (jnp.cumsum(descending) - 1) / counts
    last = jnp.sum(descending > thresholds) - 1
    return jnp.where(task_mask, jnp.maximum(shifted - thresholds[last], 0), 0)
