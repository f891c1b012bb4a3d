"""Geometric median: the vector with the least sum of distances to the task gradients."""

import jax.numpy as jnp

from optax_surgery import checks, core
from optax_surgery.algebra import median, solvers


def geometric_median(preference: core.PerTask | None = None) -> core.Surgery:
    r"""Geometric median: takes the vector with the least sum of distances to the task gradients.

    .. math:: d = \arg\min_d \sum_i p_i \|d - g_i\|

    Up to half of the gradients may be anything without carrying it off.

    Args:
      preference: p, (T,) or a tree of numbers above 0, such as clients' numbers of examples; equal
        by default.

    Returns:
      A `Surgery` from leaves `(T, *shape)` to leaves `(*shape)`.
      The update is a weighted mean of the task gradients. Its state is a `SolverReport`: not
      converged where rounding hides where the median is.

    Raises:
      ValueError: at once, for a `preference` that is not above 0; at trace time, from `update`, if
        the gradients are not stacked or `preference` has not one entry per task.

    Note:
      Weiszfeld's iteration, and Newton's where it is faster, on the differences of the gradients
      from one near to the median: what they have in common takes no part. A median that is one of
      the gradients, or several of them, is found beforehand. Two tasks have all points between them
      for medians, of which this takes the middle. Of a Gramian that the caller passes no
      differences can be had, only what it leaves of them.

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
    name = checks.arguments(geometric_median, locals(), preference="per task (0, inf)")

    def update(tasks, state):
        shares = tasks.preference(preference)
        shares = shares / jnp.maximum(jnp.max(shares), jnp.finfo(shares.dtype).tiny)
        solution = median.geometric_median(tasks.differences, shares)
        return solution.weights, solution.report()

    return core.gradient_surgery(core.Weighting(solvers.initial_report, update), name=name)
