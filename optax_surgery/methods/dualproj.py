"""DualProj: the vector nearest to the mean gradient that conflicts with no task."""

from optax_surgery import checks, core
from optax_surgery.algebra import solvers


def dualproj(preference: core.PerTask | None = None) -> core.Surgery:
    r"""DualProj: projects the weighted mean of the task gradients on their dual cone.

    The dual cone holds the vectors that conflict with no task. The projection of
    :math:`J^\top p` on it is :math:`d = J^\top w` with

    .. math:: w = \arg\min_{v \ge p} v^\top G v.

    Args:
      preference: weights p of the mean, (T,) or a tree of numbers, each at least 0; 1/T each by
        default (over the tasks that are not masked).

    Returns:
      A `Surgery` from leaves `(T, *shape)` to leaves `(*shape)`.
      The update has the scale of the weighted mean; weights are at least p. Its state is a
      `SolverReport`.

    Raises:
      ValueError: at trace time, from `update`, if the gradients are not stacked or `preference`
        has not one entry per task; at once, for an argument out of its range.

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
    name = checks.arguments(dualproj, locals(), preference="per task [0, inf)")

    def update(tasks, state):
        chosen = tasks.preference(preference)
        solution = solvers.dual_cone_projection(tasks.gramian, chosen, tasks.task_mask)
        return solution.weights, solution.report()

    return core.gradient_surgery(core.Weighting(solvers.initial_report, update), name=name)
