"""UPGrad: project every task gradient so that it conflicts with none, and add them up."""

import jax
import jax.numpy as jnp

from optax_surgery import checks, core
from optax_surgery.algebra import solvers


def upgrad(preference: core.PerTask | None = None) -> core.Surgery:
    r"""UPGrad: projects each task gradient on the dual cone of all, and takes the weighted mean.

    The dual cone holds the vectors that conflict with no task. The projection of
    :math:`p_i g_i` on it has the weights

    .. math:: w_i = \arg\min_{v \ge p_i e_i} v^\top G v, \qquad d = J^\top \sum_i w_i.

    The update conflicts with no task, is linear in the scale of every gradient, and has weights
    above zero. For two tasks it is half of PCGrad's.

    Args:
      preference: weights p of the tasks, (T,) or a tree of numbers, each above 0; 1/T each by
        default (over the tasks that are not masked).

    Returns:
      A `Surgery` from leaves `(T, *shape)` to leaves `(*shape)`.
      The update has the scale of the weighted mean; weights are at least p. Its state is a
      `SolverReport`, the worst of T problems.

    Raises:
      ValueError: at trace time, from `update`, if the gradients are not stacked or `preference`
        has not one entry per task; at once, for an argument out of its range.

    Note:
      TorchJD adds 1e-4 to the diagonal of the normalised Gramian; this does not.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_surgery as surgery
      >>> tx = surgery.upgrad()
      >>> task_grads = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
      >>> updates, state = tx.update(task_grads, tx.init(jnp.zeros(3)))
      >>> print(jnp.array_str(updates, precision=3, suppress_small=True))
      [0.292 1.901 1.901]

    References:
      Quinton and Rey, `Jacobian Descent for Multi-Objective Optimization
      <https://arxiv.org/abs/2406.16232>`_, 2024, Equation 4.
    """
    name = checks.arguments(upgrad, locals(), preference="per task (0, inf)")

    def update(tasks, state):
        project = jax.vmap(solvers.dual_cone_projection, in_axes=(None, 0, None))
        chosen = jnp.diag(tasks.preference(preference))
        solutions = project(tasks.gramian, chosen, tasks.task_mask)
        return jnp.sum(solutions.weights, axis=0), solutions.report()

    return core.gradient_surgery(core.Weighting(solvers.initial_report, update), name=name)
