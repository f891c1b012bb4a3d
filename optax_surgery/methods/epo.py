"""EPO: weighted losses are made equal, and then no task is left behind on the way down."""

import jax
import jax.numpy as jnp

from optax_surgery import checks, core
from optax_surgery.algebra import linear, linear_program, solvers
from optax_surgery.algebra.arithmetic import dot, or_one


def non_uniformity(
    losses: jax.Array, preference: jax.Array, task_mask: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """How far the weighted losses are from being equal, and what would make them equal.

    Args:
      losses: (T,) above zero.
      preference: (T,) above zero, r in the paper.
      task_mask: (T,) bool.

    Returns:
      () the Kullback-Leibler divergence of the shares r_i L_i / sum_j r_j L_j from equal ones,
      mu_r in the paper, and (T,) the weights of the balancing direction, a; 0 for masked tasks.
    """
    weighted = jnp.where(task_mask, preference * losses, 0)
    shares = weighted / or_one(jnp.sum(weighted))
    num_active = jnp.sum(task_mask.astype(losses.dtype))
    logs = jnp.log(jnp.where(shares > 0, shares * num_active, 1))
    divergence = jnp.sum(shares * logs)
    return divergence, jnp.where(task_mask, preference * (logs - divergence), 0)


def epo_weights(
    gramian: jax.Array,
    losses: jax.Array,
    preference: jax.Array,
    task_mask: jax.Array,
    tolerance: float | jax.Array,
) -> solvers.Solution:
    """EPO's weights, beta in the paper: the solution of a linear program on the simplex.

    Args:
      gramian: (T, T) inner products of the task gradients; rows of masked tasks are zero.
      losses: (T,) above zero.
      preference: (T,) above zero.
      task_mask: (T,) bool.
      tolerance: the non-uniformity up to which losses count as balanced.

    Returns:
      A `Solution`. Its residual is that of `linear_program.maximise`.
    """
    cosines, inverse_norms = linear.unit_gradients(gramian)
    present = inverse_norms > 0
    longest_inverse = jnp.max(inverse_norms)
    # Gradients in units of the shortest, and variables w_i ||g_i||: what is left are cosines.
    simplex = jnp.where(present, inverse_norms / or_one(longest_inverse), 1)
    simplex = jnp.where(task_mask, simplex, 0)
    norms = jnp.where(present, 1 / jnp.where(present, simplex, 1), 0)

    weighted = jnp.where(task_mask, preference * losses, 0)
    divergence, adjustments = non_uniformity(losses, preference, task_mask)
    balances = divergence > tolerance
    # What each task loses along the balancing direction, per length of its gradient.
    gains = dot(cosines, norms * adjustments)
    helped = gains > 0
    worst = weighted == jnp.max(weighted)
    may_rise = balances & jnp.any(helped) & ~worst
    floors = jnp.where(may_rise, jnp.where(helped, -1, gains), 0)
    unconstrained = may_rise & helped

    objective = jnp.where(balances, gains, dot(cosines, norms))
    size = or_one(jnp.max(jnp.abs(gains)))
    keeps_balance = jnp.where(balances, 0, gains / size)
    most = jnp.max(jnp.where(task_mask, norms * gains, -jnp.inf), initial=-jnp.inf)
    most = jnp.where(jnp.any(task_mask), most, 0)
    floor = jnp.where(balances, -1, jnp.minimum(most, 0) / size)
    solution = linear_program.maximise(
        objective,
        jnp.concatenate([jnp.where(unconstrained[:, None], 0, cosines), keeps_balance[None, :]]),
        jnp.append(floors, floor),
        simplex,
    )
    return solution._replace(weights=simplex * solution.weights)


def epo(preference: core.PerTask | None = None, tolerance: float = 1e-4) -> core.Surgery:
    r"""Exact Pareto optimal search (EPO): towards equal weighted losses, then down together.

    With the shares :math:`\hat l_i = r_i L_i / \sum_j r_j L_j`, their divergence from equal ones
    :math:`\mu = \sum_i \hat l_i \log (T \hat l_i)` and the balancing weights
    :math:`a_i = r_i (\log (T \hat l_i) - \mu)`,

    .. math::
      w = \arg\max_{w \ge 0,\ \sum_i w_i = 1} w^\top G c, \qquad
      c = \begin{cases} a & \mu > \epsilon \\ 1 & \mu \le \epsilon. \end{cases}

    While the losses are balanced (:math:`\mu > \epsilon`) and some task gains by it, with
    :math:`(G a)_i > 0`, the worst task must not rise, :math:`(G w)_i \ge 0`, and those that lose
    by it may rise by no more than it would have them, :math:`(G w)_i \ge (G a)_i`. Otherwise no
    task may rise, and once losses are balanced, nor may the non-uniformity.

    Args:
      preference: r in the paper, (T,) or a tree of numbers above 0; 1/T each by default (over the
        tasks that are not masked). Training goes to where all :math:`r_i L_i` are equal.
      tolerance: epsilon in the authors' code, at least 0: the non-uniformity up to which losses
        count as balanced.

    Returns:
      A `Surgery` from leaves `(T, *shape)` to leaves `(*shape)`.
      The update is a weighted mean of the task gradients. Its state is a `SolverReport`.

    Raises:
      ValueError: at trace time, from `update`, if `losses` are missing, the gradients are not
        stacked, or `preference` has not one entry per task; at once, for an argument out of its
        range.

    Note:
      Losses have to be above zero: the task of one that is not has weight zero in that step, and
      is counted in the state. The authors' code solves the same program with GLPK; this is a
      simplex method without a callback. For networks it multiplies the weights by T, and takes
      `preference` where the program has no solution, which three tasks that are balanced can
      bring about; here the state says so, and the constraints are violated as little as possible.
      A vertex of the simplex often has a single task: weights jump from step to step. A larger
      `preference` makes the program allow more ascent.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_surgery as surgery
      >>> tx = surgery.epo()
      >>> task_grads, losses = jnp.array([[1.0, 0.0], [-0.6, 0.8]]), jnp.array([3.0, 1.0])
      >>> updates, state = tx.update(task_grads, tx.init(jnp.zeros(2)), losses=losses)
      >>> print(jnp.array_str(updates + 0.0, precision=3, suppress_small=True))
      [0.894 0.053]

    References:
      Mahapatra and Rajan, `Multi-Task Learning with User Preferences: Gradient Descent with
      Controlled Ascent in Pareto Optimization
      <https://proceedings.mlr.press/v119/mahapatra20a.html>`_, ICML 2020.
    """
    name = checks.arguments(epo, locals(), preference="per task (0, inf)", tolerance="[0, inf)")

    def update(tasks, state):
        chosen = tasks.preference(preference)
        solution = epo_weights(tasks.gramian, tasks.losses, chosen, tasks.task_mask, tolerance)
        return solution.weights, solution.report()

    def usable(tasks):
        return tasks.losses > 0

    weighting = core.Weighting(solvers.initial_report, update, usable)
    return core.gradient_surgery(weighting, name=name)
