"""MGDA: the shortest vector in the convex hull of the task gradients."""

import typing
from typing import Literal

import jax.numpy as jnp
import optax

from optax_surgery import core, metrics, solvers

Normalize = Literal["none", "l2", "loss", "loss+"]


def mgda(normalize: Normalize = "none") -> optax.GradientTransformationExtraArgs:
    r"""MGDA: takes the shortest vector in the convex hull of the task gradients.

    .. math:: w = \arg\min_{w \ge 0,\ \sum_i w_i = 1} \|J^\top w\|^2, \qquad d = J^\top w

    The update conflicts with no task, and it is zero where no direction is left that helps all.
    With `normalize`, w is found for the gradients :math:`g_i / c_i`, and applied to the gradients
    as they are.

    Args:
      normalize: c_i is 1 for "none", the gradient's norm for "l2", the loss for "loss" and the
        product of both for "loss+". The last two need positive `losses`.

    Returns:
      An `optax.GradientTransformationExtraArgs` from leaves (T, *shape) to leaves (*shape).
      The update is a weighted mean, in the mode "none" no longer than the shortest gradient. Its
      state is a `SolverReport`.

    Raises:
      ValueError: for an unknown `normalize`; at trace time, from `update`, if the gradients are
        not stacked, or if `losses` are needed and missing.

    Note:
      The authors iterate Frank-Wolfe steps; this solves the problem to the precision of the
      dtype. As in their code, normalisation chooses the weights and does not scale the gradients;
      where a gradient or loss is zero, its c_i is 1. With normalisation the update may
      conflict.

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
    if normalize not in typing.get_args(Normalize):
        raise ValueError(
            f"Expected one of {typing.get_args(Normalize)}, got {normalize!r} at 'normalize'. "
            "Do take 'none' for the plain method."
        )

    def update(gramian, state, /, *, key, losses, task_mask):
        del key, state
        scales = jnp.ones_like(jnp.diagonal(gramian))
        if normalize in ("l2", "loss+"):
            scales = metrics.task_norms(gramian)
        if normalize in ("loss", "loss+"):
            scales = scales * core.needed(f"mgda('{normalize}')", losses=losses)
        scales = jnp.where(scales == 0, 1, scales)
        normalized = gramian / scales[:, None] / scales[None, :]
        solution = solvers.min_norm_point(normalized, task_mask)
        return solution.weights, solution.report()

    return core.gradient_surgery(core.Weighting(init=solvers.initial_report, update=update))
