"""DualProj: the vector nearest to the mean gradient that conflicts with no task."""

import jax
import optax

from optax_surgery import core, solvers


def dualproj(preference: jax.Array | None = None) -> optax.GradientTransformationExtraArgs:
    r"""DualProj: projects the weighted mean of the task gradients on their dual cone.

    The dual cone holds the vectors that conflict with no task. The projection of
    :math:`J^\top p` on it is :math:`d = J^\top w` with

    .. math:: w = \arg\min_{v \ge p} v^\top G v.

    Args:
      preference: (T,) non-negative weights p of the mean; 1/T each by default (over the tasks that
        are not masked).

    Returns:
      An `optax.GradientTransformationExtraArgs` from leaves (T, *shape) to leaves (*shape).
      The update has the scale of the weighted mean; weights are at least p. Its state is a
      `SolverReport`.

    Raises:
      ValueError: at trace time, from `update`, if the gradients are not stacked or `preference`
        has not one entry per task.

    Note:
      GEM projects the gradient of the current task on the dual cone of past ones: pass 1 for that
      task and 0 for the others. TorchJD adds 1e-4 to the diagonal of the normalised Gramian; this
      does not.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_surgery as surgery
      >>> tx = surgery.dualproj()
      >>> task_grads = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
      >>> updates, state = tx.update(task_grads, tx.init(jnp.zeros(3)))
      >>> print(jnp.array_str(updates, precision=3, suppress_small=True))
      [0.556 1.111 1.111]

    References:
      Lopez-Paz and Ranzato, `Gradient Episodic Memory for Continual Learning
      <https://arxiv.org/abs/1706.08840>`_, NeurIPS 2017, Equation 11.
    """

    def update(gramian, state, /, *, key, losses, task_mask):
        del key, losses, state
        weights = core.task_preference(preference, task_mask).astype(gramian.dtype)
        solution = solvers.dual_cone_projection(gramian, weights, task_mask)
        return solution.weights, solution.report()

    return core.gradient_surgery(core.Weighting(init=solvers.initial_report, update=update))
