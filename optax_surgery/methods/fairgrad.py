"""FairGrad: the update whose gains are shared fairly between the tasks."""

from optax_surgery import checks, core
from optax_surgery.algebra import solvers


def fairgrad(alpha: float = 2.0) -> core.Surgery:
    r"""FairGrad: weights the task gradients so that their gains are alpha-fair.

    With the gains :math:`u_i = g_i \cdot d`, the update maximises
    :math:`\sum_i u_i^{1-\alpha} / (1 - \alpha)` in a ball. Its weights solve

    .. math:: G w = w^{-1/\alpha}, \qquad w > 0.

    alpha = 1 is Nash-MTL, alpha towards 0 the mean gradient's direction, and alpha towards
    infinity helps the task that gains the least.

    Args:
      alpha: fairness, above 0; 2 in the authors' experiments.

    Returns:
      A `Surgery` from leaves `(T, *shape)` to leaves `(*shape)`.
      The update is homogeneous of degree (1 - alpha) / (1 + alpha) in the gradients, -1/3 for
      alpha = 2: it grows as gradients shrink. Its state is a `SolverReport`.

    Raises:
      ValueError: at trace time, from `update`, if the gradients are not stacked; at once, for an
        argument out of its range.

    Note:
      With an optimiser that is not invariant to scale, clip: the authors multiply by T and
      clip to norm 1, `optax.chain(fairgrad(), optax.scale(T), optax.clip_by_global_norm(1.0))`.
      Where a combination of gradients with weights >= 0 vanishes there is no solution: the
      state says so (`converged` is False), and weights are the best that came by.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_surgery as surgery
      >>> tx = surgery.fairgrad()
      >>> task_grads = jnp.array([[1.0, 0.0], [0.0, 8.0]])
      >>> updates, state = tx.update(task_grads, tx.init(jnp.zeros(2)))
      >>> print(jnp.array_str(updates, precision=3, suppress_small=True))
      [1.  0.5]

    References:
      Ban and Ji, `Fair Resource Allocation in Multi-Task Learning
      <https://arxiv.org/abs/2402.15638>`_, ICML 2024, Equation 6 and Algorithm 1.
    """
    name = checks.arguments(fairgrad, locals(), alpha="(0, inf)")

    def update(tasks, state):
        solution = solvers.fair_weights(tasks.gramian, alpha, tasks.task_mask)
        return solution.weights, solution.report()

    return core.gradient_surgery(core.Weighting(solvers.initial_report, update), name=name)
