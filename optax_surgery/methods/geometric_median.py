"""Geometric median: the vector with the least sum of distances to the task gradients."""

import jax
import jax.numpy as jnp
from jax import lax

from optax_surgery import core
from optax_surgery.algebra import solvers

_MAX_ITERATIONS = 1000


def geometric_median_weights(gramian: jax.Array, task_mask: jax.Array) -> solvers.Solution:
    """Weiszfeld's iteration on the Gramian, unless a task gradient is the median itself.

    The distance from J^T w to g_i follows from G. Weights inverse to the distances minimise a
    quadratic that bounds their sum from above, so that the sum falls in every iteration.

    Args:
      gramian: (T, T) inner products.
      task_mask: (T,) bool, the tasks that are there.

    Returns:
      Weights on the simplex. The residual is how much the last iteration moved a weight.
    """
    dtype = gramian.dtype
    peak = jnp.max(jnp.diagonal(gramian))
    scaled = gramian / jnp.where(peak > 0, peak, 1)
    # Distances below the rounding errors of the Gramian count as that: no division by zero.
    floor = jnp.finfo(dtype).eps

    def step(state):
        weights, _, num_steps = state
        products = jnp.matmul(scaled, weights, precision=lax.Precision.HIGHEST)
        squares = jnp.diagonal(scaled) - 2 * products + weights @ products
        pull = jnp.where(task_mask, 1 / jnp.sqrt(jnp.maximum(squares, 0) + floor), 0)
        new = pull / jnp.sum(pull, where=task_mask, initial=jnp.finfo(dtype).tiny)
        return new, jnp.max(jnp.abs(new - weights)), num_steps + 1

    def unfinished(state):
        return (state[1] > 4 * jnp.finfo(dtype).eps) & (state[2] < _MAX_ITERATIONS)

    medians = _gradients_that_are_medians(scaled, task_mask)
    found = jnp.any(medians)
    start = jnp.where(found, medians, task_mask).astype(dtype)
    start = start / jnp.maximum(jnp.sum(start), 1)
    moved = jnp.where(found, 0, 1).astype(dtype)
    weights, moved, _ = lax.while_loop(unfinished, step, (start, moved, 0))
    return solvers.Solution(weights, moved < 1e-4, moved)


def _gradients_that_are_medians(gramian: jax.Array, task_mask: jax.Array) -> jax.Array:
    """Where the unit vectors towards all other gradients add up to at most one vector's length.

    Weiszfeld's iteration comes near such a gradient only as slowly as one over the steps.
    """
    squared_norms = jnp.diagonal(gramian)
    squares = squared_norms[:, None] + squared_norms[None, :] - 2 * gramian
    eps = jnp.finfo(gramian.dtype).eps
    pairs = task_mask[:, None] & task_mask[None, :]
    apart = pairs & (squares > 8 * eps * (squared_norms[:, None] + squared_norms[None, :]))
    # Row i holds the coefficients of the sum of unit vectors from g_i to all others.
    pull = jnp.where(apart, 1 / jnp.sqrt(jnp.where(apart, squares, 1)), 0)
    pull = pull - jnp.diag(jnp.sum(pull, axis=1))
    products = jnp.matmul(pull, gramian, precision=lax.Precision.HIGHEST)
    length = jnp.sqrt(jnp.maximum(jnp.sum(pull * products, axis=1), 0))
    multiplicity = jnp.sum(pairs & ~apart, axis=1, dtype=gramian.dtype)
    return task_mask & (length <= multiplicity * (1 + 8 * jnp.sqrt(eps)))


def geometric_median() -> core.Surgery:
    r"""Geometric median: takes the vector with the least sum of distances to the task gradients.

    .. math:: d = \arg\min_d \sum_i \|d - g_i\|

    Up to half of the gradients may be anything without carrying it off.

    Returns:
      A `Surgery` from leaves (T, *shape) to leaves (*shape).
      The update is a weighted mean of the task gradients. Its state is a `SolverReport`.

    Raises:
      ValueError: at trace time, from `update`, if the gradients are not stacked.

    Note:
      Weiszfeld's iteration, on the Gramian and with distances smoothed by the root of the
      machine epsilon times the longest gradient; a median that is one of the gradients, or several
      of them, is found beforehand. Two tasks have all points between them for medians, of
      which this takes the middle.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_surgery as surgery
      >>> tx = surgery.geometric_median()
      >>> task_grads = jnp.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
      >>> updates, state = tx.update(task_grads, tx.init(jnp.zeros(2)))
      >>> print(jnp.array_str(updates + 0.0, precision=3, suppress_small=True))
      [0. 0.]

    References:
      Weiszfeld and Plastria, `On the point for which the sum of the distances to n given points is
      minimum <https://doi.org/10.1007/s10479-008-0352-z>`_, 1937 and 2009; Pillutla et al., `Robust
      Aggregation for Federated Learning <https://arxiv.org/abs/1912.13445>`_, 2022.
    """

    def update(tasks, state):
        solution = geometric_median_weights(tasks.gramian, tasks.task_mask)
        return solution.weights, solution.report()

    weighting = core.Weighting(solvers.initial_report, update)
    return core.gradient_surgery(weighting, name="geometric_median")
