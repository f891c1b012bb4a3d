"""MGDA: the shortest vector in the convex hull of the task gradients."""

import typing
from typing import Literal

import jax.numpy as jnp

from optax_surgery import checks, core
from optax_surgery.algebra import solvers

Normalize = Literal["none", "l2", "loss", "loss+"]


def mgda(normalize: Normalize = "none") -> core.Surgery:
    r"""MGDA: takes the shortest vector in the convex hull of the task gradients.

    .. math:: w = \arg\min_{w \ge 0,\ \sum_i w_i = 1} \|J^\top w\|^2, \qquad d = J^\top w

    The update conflicts with no task, and it is zero where no direction is left that helps all.
    With `normalize`, w is found for the gradients :math:`g_i / c_i`, and applied to the gradients
    as they are.

    Args:
      normalize: one of "none", where c_i is 1, "l2", the gradient's norm, "loss", the loss, and
        "loss+", the product of both. The last two need positive `losses`.

    Returns:
      A `Surgery` from leaves `(T, *shape)` to leaves `(*shape)`.
      The update is a weighted mean, in the mode "none" no longer than the shortest gradient. Its
      state is a `SolverReport`.

    Raises:
      ValueError: at trace time, from `update`, if the gradients are not stacked, or if `losses` are
        needed and missing; at once, for an argument out of its range.

    Note:
      The authors iterate Frank-Wolfe steps; this solves the problem to the precision of the
      dtype. As in their code, normalisation chooses the weights and does not scale the gradients;
      where a gradient is zero, its c_i is 1. With normalisation the update may conflict. Where
      losses are needed, a task whose loss is not above zero has weight zero in that step, and is
      counted in the state.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_surgery as surgery
      >>> tx = surgery.mgda()
      >>> task_grads = jnp.array([[1.0, 1.0], [1.0, -3.0]])
      >>> updates, state = tx.update(task_grads, tx.init(jnp.zeros(2)))
      >>> print(jnp.array_str(updates + 0.0, precision=3, suppress_small=True))
      [1. 0.]

    References:
      Désidéri, `Multiple-gradient descent algorithm for multiobjective optimization
      <https://doi.org/10.1016/j.crma.2012.03.014>`_, 2012; Sener and Koltun, `Multi-Task Learning
      as Multi-Objective Optimization <https://arxiv.org/abs/1810.04650>`_, NeurIPS 2018,
      Algorithm 2.
    """
    name = checks.arguments(mgda, locals(), normalize=typing.get_args(Normalize))
    by_losses = normalize in ("loss", "loss+")

    def update(tasks, state):
        scales = jnp.ones(tasks.num_tasks, tasks.dtype)
        if normalize in ("l2", "loss+"):
            squared_norms = jnp.diagonal(tasks.gramian)
            # not the root of zero, which has no derivative
            scales = jnp.sqrt(jnp.where(squared_norms == 0, 1, squared_norms))
        if by_losses:
            scales = scales * tasks.losses
        scales = jnp.where(scales == 0, 1, scales)
        normalized = tasks.gramian / scales[:, None] / scales[None, :]
        solution = solvers.min_norm_point(normalized, tasks.task_mask)
        return solution.weights, solution.report()

    usable = (lambda tasks: tasks.losses > 0) if by_losses else None
    weighting = core.Weighting(solvers.initial_report, update, usable)
    return core.gradient_surgery(weighting, name=name)
