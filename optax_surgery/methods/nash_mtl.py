"""Nash-MTL: the update on which the tasks agree in a bargaining game."""

from optax_surgery import core
from optax_surgery.algebra import solvers


def nash_mtl() -> core.Surgery:
    r"""Nash-MTL: weights the task gradients so that their relative gains are balanced.

    The solution of Nash's bargaining game is :math:`d = J^\top w` with

    .. math:: G w = 1 / w, \qquad w > 0,

    the minimum of the convex function :math:`\tfrac12 w^\top G w - \sum_i \log w_i`. The
    update does not depend on the scale of any loss and conflicts with no task.

    Returns:
      A `Surgery` from leaves `(T, *shape)` to leaves `(*shape)`.
      The update always has norm sqrt(T), however small the gradients are. Its state is a
      `SolverReport`.

    Raises:
      ValueError: at trace time, from `update`, if the gradients are not stacked.

    Note:
      Where a combination of gradients with weights >= 0 vanishes the game has no solution:
      the state says so (`converged` is False), and weights are the best that came by. The authors'
      code clips the update to norm 1, which as its norm is constant is a factor of the learning
      rate; chain `optax.clip_by_global_norm(1.0)` for it. It also reuses weights for some steps:
      wrap in `every`. Their stop test uses a normalised Gramian and may return a wrong point;
      this is Newton's method on the convex problem. Beyond norms of 1e15 and below 1e-15 (in
      float32) the length is not sqrt(T), only the direction is right.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_surgery as surgery
      >>> tx = surgery.nash_mtl()
      >>> task_grads = jnp.array([[0.1, 0.0], [0.0, 50.0]])
      >>> updates, state = tx.update(task_grads, tx.init(jnp.zeros(2)))
      >>> print(jnp.array_str(updates, precision=3, suppress_small=True))
      [1. 1.]

    References:
      Navon et al., `Multi-Task Learning as a Bargaining Game
      <https://arxiv.org/abs/2202.01017>`_, ICML 2022, Claim 3.1 and Algorithm 1.
    """

    def update(tasks, state):
        solution = solvers.fair_weights(tasks.gramian, 1.0, tasks.task_mask)
        return solution.weights, solution.report()

    return core.gradient_surgery(core.Weighting(solvers.initial_report, update), name="nash_mtl")
