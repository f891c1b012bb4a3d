"""Solvers: the convex problems of T variables that several methods share.

Each takes a (T, T) Gramian and returns a `Solution`, whose `converged` and `residual` say
how far it can be trusted. There are three algorithms, and all begin alike: the Gramian is
divided by the norms of the task gradients, so that a matrix of cosines is left. That costs
nothing, as x >= 0 means the same for rescaled variables, and it takes out row norms that
are spread over many orders of magnitude.

- A primal-dual interior point method for a convex quadratic over the nonnegative orthant,
  cut by at most one plane: the min-norm point, the projection on the dual cone. It takes
  7 to 20 Cholesky factorisations, whatever the condition number. For the min-norm point in a box
  there is one more slack for each upper bound, and as many factorisations.
- CAGrad's problem is a one-parameter family of such quadratics. Between changes of the
  active set the solution is linear in the parameter, so that 2 to 6 of them suffice.
- The fairness equations of Nash-MTL, FairGrad and PIVRG are the minimum of a smooth convex
  function, to which Newton's method goes in 5 to 20 steps.

The weights have derivatives, forward and reverse, in all that they are made of: those of the
optimality conditions, which hold with equality for the variables that are not at their bound.
Where a constraint is about to bind, it is the derivative on one of the sides. Reports have none.

`optax.nnls` solves such quadratics by projected gradients. It wants a square root of the
Gramian, and is not used: in float32, at a condition number of 1e6 and with ten tasks that
conflict, it leaves 30 to 70 per cent of the objective after 1,000 iterations and 0.1 to 0.3
per cent after 10,000, the time of 80 solves here; without the scaling, row norms that are
spread over six orders of magnitude keep it from the solution for 100,000 and more.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from optax_surgery.algebra import factor
from optax_surgery.algebra.arithmetic import dot, or_one

_MAX_NEWTON_STEPS = 50
_MAX_PATH_STEPS = 20
# What sums of thousands of products leave of opposite gradients, in units of eps: 25 was seen.
_CANCELLATION = 64


class SolverReport(NamedTuple):
    """What a method keeps of its last solve in its state.

    Attributes:
      converged: () bool.
      residual: () of the default float dtype, see `Solution`.
    """

    converged: jax.Array
    residual: jax.Array


class Solution(NamedTuple):
    """What a solver found, and how good it is.

    Attributes:
      weights: (T,), zero for masked tasks.
      converged: () bool, whether the residual is at most 4 sqrt(eps) of the dtype, which is
        1.4e-3 in float32 and 6e-8 in float64, unless the solver says otherwise. Where it is
        not, the weights are the best iterate, not a substitute.
      residual: () the largest violation of an optimality condition, without a unit: it does
        not change if all task gradients are multiplied by the same number. Not finite if the
        Gramian is not.
    """

    weights: jax.Array
    converged: jax.Array
    residual: jax.Array

    def report(self) -> SolverReport:
        """The worst of what may be a batch of solutions, for a method's state."""
        return SolverReport(
            converged=jnp.all(self.converged),
            residual=jnp.max(self.residual).astype(jnp.result_type(float)),
        )


def initial_report() -> SolverReport:
    """The report of a method that has solved nothing yet."""
    return SolverReport(converged=jnp.ones((), bool), residual=jnp.zeros(()))


def min_norm_point(gramian: jax.Array, task_mask: jax.Array) -> Solution:
    r"""The shortest vector in the convex hull of the task gradients.

    .. math:: \min_w w^\top G w \quad \text{over} \quad w \ge 0,\ \textstyle\sum_i w_i = 1

    Where several weights give that vector (duplicate tasks, say), they are shared between
    the tasks.

    Args:
      gramian: (T, T) inner products of the task gradients.
      task_mask: (T,) bool, False for tasks to leave out.

    Returns:
      A `Solution` whose weights sum to 1. Its residual is the largest
      :math:`(d \cdot d - g_i \cdot d) / (\|g_i\| \|d\|)`: how much nearer to zero one could
      get by going towards task i, as a cosine. Where d vanishes, its length is counted as
      sqrt(eps) of the gradients it is made of.

    References:
      Desideri, `Multiple-gradient descent algorithm
      <https://hal.inria.fr/inria-00389811>`_, 2009; Sener and Koltun, `Multi-Task Learning
      as Multi-Objective Optimization <https://arxiv.org/abs/1810.04650>`_, NeurIPS 2018.
    """
    tasks = _scale(gramian, task_mask)
    x = _minimum(tasks.cosines, jnp.zeros_like(tasks.norms), task_mask, tasks.simplex)
    x = x / or_one(_inner(tasks.simplex, x))
    weights = tasks.simplex * x

    tasks, x = lax.stop_gradient((tasks, x))
    image = dot(tasks.cosines, x)
    squared_length = _inner(x, image)
    eps = jnp.finfo(gramian.dtype).eps
    length = jnp.sqrt(jnp.maximum(squared_length, 0) + eps * jnp.sum(x) ** 2)
    violation = jnp.where(task_mask, squared_length * tasks.simplex - image, 0)
    return _solution(weights, jnp.max(violation) / or_one(length))


def min_norm_in_box(cosines: jax.Array, lower: jax.Array, upper: jax.Array) -> Solution:
    r"""The shortest combination of unit gradients whose weights are in a box.

    .. math:: \min_w w^\top C w \quad \text{over} \quad l \le w \le u,\ \textstyle\sum_i w_i = 1

    Args:
      cosines: (T, T) C, zero in the rows and columns of tasks to leave out.
      lower: (T,) l, 1 in sum at most, 0 for tasks to leave out.
      upper: (T,) u, not below l, 1 in sum at least, 0 for tasks to leave out.

    Returns:
      A `Solution`. Its residual is how much more the update has in common with a unit gradient
      whose weight could be less than with one whose weight could be more, as a difference of
      cosines. Where the update vanishes, its length is counted as sqrt(eps).
    """
    lower, upper = lower.astype(cosines.dtype), upper.astype(cosines.dtype)
    weights = _box_point(cosines, lower, upper)

    cosines, lower, upper, w = lax.stop_gradient((cosines, lower, upper, weights))
    image = dot(cosines, w)
    length = jnp.sqrt(jnp.maximum(_inner(w, image), 0) + jnp.finfo(w.dtype).eps)
    most = jnp.max(jnp.where(w > lower, image, -jnp.inf), initial=-jnp.inf)
    least = jnp.min(jnp.where(w < upper, image, jnp.inf), initial=jnp.inf)
    return _solution(weights, jnp.maximum(most - least, 0) / length)


def nonnegative_quadratic(
    quadratic: jax.Array, linear: jax.Array, task_mask: jax.Array
) -> Solution:
    r"""The minimum of a convex quadratic over nonnegative variables.

    .. math:: \min_x \tfrac12 x^\top Q x + q^\top x \quad \text{over} \quad x \ge 0

    It projects on a polyhedron: the shortest e with :math:`g_i \cdot e \ge h_i` for all i is
    :math:`J^\top x` for :math:`Q = J J^\top, q = -h`. If there is no such e, the quadratic
    has no lower bound, and the solution has not converged.

    Args:
      quadratic: (T, T) Q, positive semidefinite.
      linear: (T,) q. A variable whose row of Q is zero stays at zero, whatever q is.
      task_mask: (T,) bool, False for variables to hold at zero.

    Returns:
      A `Solution` with x as its weights. Its residual is the largest of the negative slopes
      :math:`-(Qx + q)_i / (\sqrt{Q_{ii}} s)` and of the duality gap
      :math:`|x^\top (Qx + q)| / s^2`, where s is the larger of :math:`\sqrt{x^\top Q x}`
      and of the :math:`|q_i| / \sqrt{Q_{ii}}`.

    References:
      Lawson and Hanson, Solving Least Squares Problems, 1974, chapter 23, for the projection.
    """
    tasks = _scale(quadratic, task_mask)
    linear = jnp.where(tasks.nonzero, linear, 0).astype(quadratic.dtype)
    x, residual = _nonnegative(tasks.cosines, linear / tasks.norms, tasks.nonzero, 0.0)
    return _solution(x / tasks.norms, residual)


def dual_cone_projection(
    gramian: jax.Array, preference: jax.Array, task_mask: jax.Array
) -> Solution:
    r"""Weights of the vector nearest to :math:`J^\top p` that conflicts with no task.

    .. math:: \min_v v^\top G v \quad \text{over} \quad v \ge p

    At the minimum :math:`J J^\top v \ge 0`: the vector lies in the dual cone of the task
    gradients. `jax.vmap(dual_cone_projection, in_axes=(None, 0, None))` projects several.

    Args:
      gramian: (T, T) inner products of the task gradients.
      preference: (T,) p, the weights of the vector to project.
      task_mask: (T,) bool, False for tasks to leave out.

    Returns:
      A `Solution` with v as its weights. Its residual is that of `nonnegative_quadratic`
      for v - p, so that lengths count relative to :math:`\|J^\top (v - p)\|`, by which the
      projection moves the vector.

    References:
      Lopez-Paz and Ranzato, `Gradient Episodic Memory
      <https://arxiv.org/abs/1706.08840>`_, NeurIPS 2017, equation 11; Quinton and Rey,
      `Jacobian Descent for Multi-Objective Optimization
      <https://arxiv.org/abs/2406.16232>`_, 2024.
    """
    tasks = _scale(gramian, task_mask)
    preference = jnp.where(task_mask, preference, 0).astype(gramian.dtype)
    start, unit = _scaled_weights(preference, tasks)
    # Where J^T p vanishes but for rounding, there is nothing to project.
    rounding = 16 * jnp.finfo(gramian.dtype).eps * jnp.sum(jnp.abs(start))
    x, residual = _nonnegative(tasks.cosines, dot(tasks.cosines, start), tasks.nonzero, rounding)
    return _solution(preference + x * unit / tasks.norms, residual)


def cagrad_dual(
    gramian: jax.Array, mean_weights: jax.Array, c: jax.Array | float, task_mask: jax.Array
) -> Solution:
    r"""How far CAGrad departs from the mean gradient :math:`g_0 = J^\top w_0`.

    The paper minimises over the simplex

    .. math:: F(w) = w^\top G w_0 + c\, \|g_0\| \sqrt{w^\top G w}

    and updates with :math:`g_0 + c \|g_0\| J^\top w / \|J^\top w\|`. Here the last factor is
    part of the solution, :math:`x = c \|g_0\| w / \|J^\top w\|`, for two reasons: the update
    is :math:`J^\top (w_0 + x)` without a division, and x exists where :math:`J^\top w = 0`,
    which a task without a gradient is enough for. There the update is, of all that reach the
    optimum :math:`\max_d \min_i g_i \cdot d = 0`, the one nearest to :math:`g_0`.

    For s > 0 let w(s) minimise :math:`\tfrac12 w^\top G w + s\, w^\top G w_0` over the
    simplex. It is the minimiser of F where :math:`\|J^\top w(s)\| = s c \|g_0\|`, and the
    ratio of the two sides falls with s. While the active set stays, w(s) is linear in s and
    its squared length is a + b s^2, which gives the next s in closed form.

    Args:
      gramian: (T, T) inner products of the task gradients.
      mean_weights: (T,) w_0, in the paper 1/T each.
      c: radius of the ball around g_0, relative to its norm; at least 0.
      task_mask: (T,) bool, False for tasks to leave out.

    Returns:
      A `Solution` with x as its weights; w is x / sum(x). For the update d, its residual is
      the largest violation of :math:`g_i \cdot d \ge \nu` with equality where :math:`x_i > 0`,
      relative to :math:`\|g_i\| \|g_0\|`, and of :math:`\|J^\top x\| = c \|g_0\|`, relative
      and beyond rounding errors.

    References:
      Liu et al., `Conflict-Averse Gradient Descent for Multi-task Learning
      <https://arxiv.org/abs/2110.14048>`_, NeurIPS 2021, equation 3 and Algorithm 1.
    """
    tasks = _scale(gramian, task_mask)
    eps = jnp.finfo(gramian.dtype).eps
    start, unit = _scaled_weights(mean_weights.astype(gramian.dtype), tasks)
    image = dot(tasks.cosines, start)
    squared_norm = _inner(start, image)
    # A mean gradient below the rounding errors of the Gramian is none, and has no ball.
    has_ball = ~(squared_norm <= eps * jnp.sum(jnp.abs(start)) ** 2) & (jnp.asarray(c) > 0)
    norm = jnp.sqrt(jnp.where(has_ball, squared_norm, 1))
    radius = jnp.where(has_ball, c, 1).astype(gramian.dtype)
    cosines_to_mean = image / norm

    rounding = lax.stop_gradient(16 * eps * jnp.sum(jnp.abs(start)) / norm)
    x, on_floor = _cagrad_point(tasks, cosines_to_mean, task_mask, radius, rounding)
    weights = jnp.where(has_ball, x * norm * unit / tasks.norms, 0)

    tasks, x, cosines_to_mean, radius = lax.stop_gradient((tasks, x, cosines_to_mean, radius))
    image = dot(tasks.cosines, x)
    alignment = image + cosines_to_mean
    level = jnp.where(on_floor, 0, _inner(x, alignment) / or_one(_inner(tasks.simplex, x)))
    excess = jnp.where(task_mask, alignment - level * tasks.simplex, 0)
    rounding = 4 * eps * jnp.sum(jnp.where(tasks.nonzero, x, 0)) ** 2
    overshoot = jnp.where(on_floor, 0, jnp.abs(_inner(x, image) - radius**2) - rounding)
    residual = jnp.maximum(
        jnp.maximum(-jnp.min(excess), jnp.abs(_inner(x, excess)) / radius),
        overshoot / (2 * radius**2),
    )
    return _solution(weights, jnp.where(has_ball, residual, 0))


def fair_weights(
    gramian: jax.Array,
    fairness: jax.Array | float,
    task_mask: jax.Array,
    factors: jax.Array | None = None,
) -> Solution:
    r"""Weights under which the gains of the tasks are fair.

    .. math:: (G w)_i = (p_i / w_i)^{1/a}, \qquad w > 0

    It is Nash-MTL's equation for a = 1 and p = 1, FairGrad's for p = 1, PIVRG's for a = 2. The
    solution is the minimum of the convex function :math:`\tfrac12 w^\top G w - \sum_i
    p_i^{1/a} w_i^{1-1/a} / (1 - 1/a)` (for a = 1 the power becomes a logarithm). There is
    none where a combination of the gradients with weights :math:`\ge 0` vanishes, as at a
    Pareto stationary point: the weights of those tasks grow without bound, and the residual
    stays near 1. The weights returned are then those of the least residual that came by.
    (For a < 1 the function still falls to a limit; where other tasks are part of the problem,
    it may be reached within the tolerance, and counts as converged.)

    Newton's method gets there in 5 to 20 steps. In float32 the rounding of the Gramian alone
    moves the minimum by about 1e-3 of the objective where the condition number is 1e6 and the
    gradients conflict so strongly that they nearly cancel.

    Args:
      gramian: (T, T) inner products of the task gradients.
      fairness: a > 0, FairGrad's alpha.
      task_mask: (T,) bool, False for tasks to leave out.
      factors: (T,) p > 0, or None for 1. Those of masked tasks may be anything.

    Returns:
      A `Solution`. Its residual is the Newton decrement over the root of
      :math:`w^\top G w`; half its square is the error of the function above relative to
      :math:`w^\top G w`. It counts as converged below 3 eps^(1/3), 0.015 in float32 and 2e-5
      in float64. A task without a gradient has weight 0 and makes the residual at least 1, and
      so does :math:`w^\top G w \le 64\, eps\, (\sum_i w_i \|g_i\|)^2`: the gradients cancel up
      to rounding.

    References:
      Navon et al., `Multi-Task Learning as a Bargaining Game
      <https://arxiv.org/abs/2202.01017>`_, ICML 2022, claim 3.1; Ban and Ji, `Fair Resource
      Allocation in Multi-Task Learning <https://arxiv.org/abs/2402.15638>`_, ICML 2024.
    """
    tasks = _scale(gramian, task_mask)
    active = tasks.nonzero
    fairness = jnp.asarray(fairness, gramian.dtype)
    log_norms = jnp.log(tasks.norms)
    # w_i = y_i unit / norm_i turns G into cosines; the unit makes the largest first y one.
    log_load = (1 - fairness) * log_norms
    if factors is not None:
        log_load = log_load + jnp.log(jnp.where(active, factors, 1).astype(gramian.dtype))
    log_start = log_load / (1 + fairness)
    log_unit = jnp.max(jnp.where(active, log_start, -jnp.inf), initial=-jnp.inf)
    log_unit = lax.stop_gradient(jnp.where(jnp.any(active), log_unit, 0))
    log_start = jnp.where(active, log_start - log_unit, 0)

    y, residual = _fair_point(tasks.cosines, log_start, fairness, active)
    cancels = _cancels(*lax.stop_gradient((tasks.cosines, jnp.where(active, y, 0))))
    unsolved = jnp.any(task_mask & ~active) | cancels
    residual = jnp.where(unsolved, jnp.maximum(residual, 1), residual)
    weights = jnp.where(active, jnp.exp(jnp.log(y) + log_unit - log_norms), 0)
    return Solution(weights, residual <= _fair_tolerance(gramian.dtype), residual)


class _Tasks(NamedTuple):
    """The Gramian, factored into cosines and norms.

    Attributes:
      cosines: (T, T), zero for masked tasks and for those without a gradient.
      norms: (T,) positive. Tasks without a gradient pass for the shortest of the others.
      nonzero: (T,) bool, the tasks that take part and have a gradient.
      simplex: (T,) what a scaled weight counts for, w_i = simplex_i x_i, relative to the
        shortest gradient; zero for masked tasks.
    """

    cosines: jax.Array
    norms: jax.Array
    nonzero: jax.Array
    simplex: jax.Array


class _Solved(NamedTuple):
    """Where the interior point method stopped.

    Attributes:
      x: (T,) the variables, zero where not active.
      curvature: (T,) slack_i / x_i, damped: nearly zero for variables that are free, huge for
        those at their bound, 1 where not active.
    """

    x: jax.Array
    curvature: jax.Array


def _scale(gramian: jax.Array, task_mask: jax.Array) -> _Tasks:
    squared_norms = jnp.where(task_mask, jnp.diagonal(gramian), 0)
    nonzero = squared_norms != 0  # a NaN is not zero, and goes through to the residual
    norms = jnp.sqrt(jnp.where(nonzero, squared_norms, 1))
    shortest = jnp.min(jnp.where(nonzero, norms, jnp.inf), initial=jnp.inf)
    shortest = lax.stop_gradient(jnp.where(jnp.any(nonzero), shortest, 1))
    norms = jnp.where(nonzero, norms, shortest)
    pairs = nonzero[:, None] & nonzero[None, :]
    cosines = jnp.where(pairs, gramian, 0) / norms[:, None] / norms[None, :]
    return _Tasks(cosines, norms, nonzero, jnp.where(task_mask, shortest / norms, 0))


def _scaled_weights(weights: jax.Array, tasks: _Tasks) -> tuple[jax.Array, jax.Array]:
    """The coefficients of J^T weights in unit gradients, and the unit they are measured in."""
    scaled = jnp.where(tasks.nonzero, tasks.norms * weights, 0)
    unit = lax.stop_gradient(or_one(jnp.max(jnp.abs(scaled))))
    return scaled / unit, unit


def _nonnegative(
    quadratic: jax.Array, linear: jax.Array, active: jax.Array, rounding: jax.Array | float
) -> tuple[jax.Array, jax.Array]:
    """Minimises 1/2 x'Qx + q'x over x >= 0, for Q with a unit diagonal; x and its residual.

    q is zero where not active, and not told from zero below `rounding`.
    """
    unit = lax.stop_gradient(or_one(jnp.maximum(jnp.max(jnp.abs(linear)), rounding)))
    linear = linear / unit
    found = _minimum(quadratic, linear, active, jnp.zeros_like(linear))
    quadratic, linear, x = lax.stop_gradient((quadratic, linear, found))
    image = dot(quadratic, x)
    slope = jnp.where(active, image + linear, 0)
    # less what may be rounding: an x without bound must not make itself look small
    rounding = 4 * jnp.finfo(x.dtype).eps * jnp.sum(x) ** 2
    squared_size = jnp.maximum(_inner(x, image) - rounding, 1)
    residual = jnp.maximum(
        -jnp.min(slope) / jnp.sqrt(squared_size), jnp.abs(_inner(x, slope)) / squared_size
    )
    return found * unit, residual


def _interior_point(
    quadratic: jax.Array, linear: jax.Array, active: jax.Array, normal: jax.Array
) -> _Solved:
    """Minimises 1/2 x'Qx + q'x over x >= 0 and, unless the normal n is zero, n'x = 1.

    Mehrotra's predictor-corrector method from an infeasible start. With slacks z, Newton's
    method is applied to Qx + q - multiplier n = z, n'x = 1 and x_i z_i = mu, where mu falls.

    Singular Q and solution sets without bound are part of the job. The factored matrix is
    damped at the level of rounding, which leaves fixed points where they are. Once x z and
    the equation for z are down to rounding errors, iterates along a null direction are a
    random walk: the loop ends when x grows, or at the fifth step in which mu does not halve.
    """
    dtype = quadratic.dtype
    eps = jnp.finfo(dtype).eps
    least = jnp.finfo(dtype).tiny ** 0.5
    mask = active.astype(dtype)
    count = jnp.maximum(jnp.sum(mask), 1)
    scale = jnp.maximum(1, jnp.max(jnp.abs(linear)))
    damping = 2 * eps * jnp.sqrt(count)

    def step(state):
        x, slack, multiplier, mu, stalls, reach, _, num_steps = state
        gap = mask * (dot(quadratic, x) + linear - multiplier * normal - slack)
        solve = _newton_solver(quadratic, slack / x + damping)
        affine, column = solve(jnp.stack([-mask * (gap + slack), normal], axis=1)).T
        slope = or_one(_inner(normal, column))

        def direction(dx, centring):
            shift = (1 - _inner(normal, x + dx)) / slope
            dx = dx + shift * column
            return dx, -mask * (slack + slack / x * dx + centring), shift

        dx, dslack, _ = direction(affine, 0)
        length = _longest_step(dx / x, dslack / slack, 0.99)
        affine_mu = _inner(mask * (x + length * dx), slack + length * dslack) / count
        # With the usual cube, and with all of the second-order term where the first step is
        # short, one in a thousand Gramians of condition 1e6 makes the method cycle.
        target = jnp.minimum((affine_mu / mu) ** 2, 1) * mu
        centring = mask * (length**2 * dx * dslack - target) / x
        dx, dslack, shift = direction(affine - solve(centring), centring)
        length = _longest_step(dx / x, dslack / slack, 0.99)
        new_x = jnp.maximum(x + length * dx, least)
        new_slack = jnp.maximum(slack + length * dslack, least)
        new_mu = _inner(mask * new_x, new_slack) / count

        total = _inner(mask, x)
        rounding = 8 * eps * (scale + total)
        settled = (jnp.max(jnp.abs(gap)) <= rounding) & (count * mu <= rounding * jnp.max(x))
        stalls = stalls + (settled & (new_mu > mu / 2)).astype(stalls.dtype)
        reach = jnp.where(settled, jnp.minimum(reach, total), jnp.inf)
        goes_on = jnp.isfinite(new_mu) & (stalls < 5) & (_inner(mask, new_x) <= 4 * reach)
        new = (new_x, new_slack, multiplier + length * shift, new_mu)
        old = (x, slack, multiplier, mu)
        kept = [jnp.where(goes_on, after, before) for after, before in zip(new, old, strict=True)]
        return *kept, stalls, reach, goes_on, num_steps + 1

    def unfinished(state):
        mu, goes_on, num_steps = state[3], state[6], state[7]
        return goes_on & (mu > scale * eps**2) & (num_steps < _MAX_NEWTON_STEPS)

    x = jnp.full(mask.shape, 1 / or_one(jnp.sum(normal)), dtype)
    slack = jnp.full(mask.shape, scale, dtype)
    mu = _inner(mask * x, slack) / count
    zero, infinity, none = jnp.zeros((), dtype), jnp.asarray(jnp.inf, dtype), jnp.int32(0)
    state = (x, slack, zero, mu, none, infinity, jnp.any(active), none)
    x, slack = lax.while_loop(unfinished, step, state)[:2]
    # Where the slack outweighs it, the variable is on its way to zero, and what is left of it
    # less than what the slack would lose without it.
    at_bound = slack > x
    return _Solved(jnp.where(at_bound, 0, mask * x), jnp.where(active, slack / x + damping, 1))


@jax.custom_jvp
def _minimum(
    quadratic: jax.Array, linear: jax.Array, active: jax.Array, normal: jax.Array
) -> jax.Array:
    """The x of `_interior_point`, with a derivative.

    The optimality conditions hold with equality for the variables that are above zero: the
    derivative is that of the system they solve while the others stay at zero.
    """
    return _interior_point(quadratic, linear, active, normal).x


@_minimum.defjvp
def _minimum_jvp(primals, tangents):
    quadratic, linear, active, normal = primals
    dquadratic, dlinear, _, dnormal = tangents
    x = _minimum(*primals)
    multiplier = _inner(x, dot(quadratic, x) + linear)
    pull = multiplier * dnormal - dot(dquadratic, x) - dlinear
    solve = _free_solver(quadratic, active & (x > 0) & (jnp.diagonal(quadratic) > 0))
    base, column = solve(pull), solve(normal)
    shift = (_inner(dnormal, x) + _inner(normal, base)) / or_one(_inner(normal, column))
    return x, base - shift * column


@jax.custom_jvp
def _box_point(cosines: jax.Array, lower: jax.Array, upper: jax.Array) -> jax.Array:
    """The weights of `min_norm_in_box`, by the method of `_interior_point`.

    Both distances to the bounds have a slack. The start is feasible: all weights have gone the same
    share of their way from the lower to the upper bound.
    """
    dtype = cosines.dtype
    eps = jnp.finfo(dtype).eps
    least = jnp.finfo(dtype).tiny ** 0.5
    width = upper - lower
    active = width > 0
    mask = active.astype(dtype)
    count = jnp.maximum(jnp.sum(mask), 1)
    room = 1 - jnp.sum(lower)
    share = jnp.clip(room / or_one(jnp.sum(width)), 0, 1)
    is_forced = jnp.minimum(share, 1 - share) <= 8 * eps * count
    damping = 2 * eps * jnp.sqrt(count)

    def mean_product(distances, slacks):
        return jnp.sum(mask[None] * distances * slacks) / (2 * count)

    # Distances and slacks are (2, T): to the lower bounds, and to the upper ones.
    def step(state):
        distances, slacks, level, mu, stalls, _, num_steps = state
        slope = mask * (dot(cosines, lower + distances[0]) - level)
        ratios = slacks / distances
        solve = _newton_solver(cosines, jnp.where(active, jnp.sum(ratios, axis=0) + damping, 1))
        affine, column = solve(jnp.stack([-slope, mask], axis=1)).T

        def direction(dx, pushes):
            shift = (room - _inner(mask, distances[0] + dx)) / or_one(_inner(mask, column))
            dx = mask * (dx + shift * column)
            moves = jnp.stack([dx, -dx])
            return moves, mask[None] * (pushes - slacks - ratios * moves), shift

        moves, dslacks, _ = direction(affine, jnp.zeros_like(slacks))
        length = _longest_step(moves / distances, dslacks / slacks, 0.99)
        affine_mu = mean_product(distances + length * moves, slacks + length * dslacks)
        target = jnp.minimum((affine_mu / mu) ** 2, 1) * mu
        pushes = mask[None] * (target - length**2 * moves * dslacks) / distances
        moves, dslacks, shift = direction(affine + solve(pushes[0] - pushes[1]), pushes)
        length = _longest_step(moves / distances, dslacks / slacks, 0.99)
        new_distances = jnp.maximum(distances + length * moves, least)
        new_slacks = jnp.maximum(slacks + length * dslacks, least)
        new_mu = mean_product(new_distances, new_slacks)

        gap = slope - mask * (slacks[0] - slacks[1])
        settled = (jnp.max(jnp.abs(gap)) <= 16 * eps) & (count * mu <= 16 * eps)
        stalls = stalls + (settled & (new_mu > mu / 2)).astype(stalls.dtype)
        goes_on = jnp.isfinite(new_mu) & (stalls < 5)
        new = (new_distances, new_slacks, level + length * shift, new_mu)
        kept = [
            jnp.where(goes_on, after, before) for after, before in zip(new, state[:4], strict=True)
        ]
        return *kept, stalls, goes_on, num_steps + 1

    def unfinished(state):
        mu, goes_on, num_steps = state[3], state[5], state[6]
        return goes_on & (mu > eps**2) & (num_steps < _MAX_NEWTON_STEPS)

    start = jnp.where(active[None], jnp.stack([share * width, (1 - share) * width]), 1)
    slacks = jnp.ones_like(start)
    state = (start, slacks, jnp.zeros((), dtype), mean_product(start, slacks), jnp.int32(0))
    distances, slacks = lax.while_loop(
        unfinished, step, (*state, jnp.any(active) & ~is_forced, jnp.int32(0))
    )[:2]
    at_bound = (slacks > distances) & ~is_forced
    inside = lower + jnp.where(active, distances[0], 0)
    return jnp.where(at_bound[0], lower, jnp.where(at_bound[1], upper, inside))


@_box_point.defjvp
def _box_point_jvp(primals, tangents):
    """Cw = level for the weights within their bounds, while the others move with their bounds."""
    cosines, lower, upper = primals
    dcosines, dlower, dupper = tangents
    w = _box_point(*primals)
    at_lower, at_upper = w <= lower, w >= upper
    free = ~(at_lower | at_upper)
    moved = jnp.where(at_lower, dlower, jnp.where(at_upper, dupper, 0))
    solve = _free_solver(cosines, free)
    base = solve(-dot(dcosines, w) - dot(cosines, moved))
    column = solve(jnp.ones_like(w))
    shift = (jnp.sum(moved) + jnp.sum(base)) / or_one(jnp.sum(column))
    return w, moved + base - shift * column


def _free_solver(quadratic: jax.Array, free: jax.Array):
    """What solves with Q for the free variables and leaves the others at zero.

    It is damped far above rounding, and one refinement makes up for it: where Q is singular the
    derivative has no bound, and a smaller number would turn the update's into rounding errors.
    """
    pairs = free[:, None] & free[None, :]
    quadratic = jnp.where(pairs, quadratic, 0)
    damping = float(jnp.finfo(quadratic.dtype).eps) ** (2 / 3)
    damped = factor.positive_definite_solver(quadratic + jnp.diag(jnp.where(free, damping, 1)))

    def solve(right_side):
        right_side = jnp.where(free, right_side, 0)
        x = damped(right_side)
        return x + damped(right_side - dot(quadratic, x))

    return solve


@jax.custom_jvp
def _cagrad_point(
    tasks: _Tasks,
    cosines_to_mean: jax.Array,
    task_mask: jax.Array,
    radius: jax.Array,
    rounding: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """The scaled x of `cagrad_dual` for a mean of norm 1, and whether it is on the floor.

    On the floor s vanishes, and with it J^T w: a combination of gradients is zero, so that no
    level above zero can be reached. The nearest update of level zero is a projection.
    """
    path_x, on_floor = _cagrad_path(tasks, cosines_to_mean, task_mask, radius)
    floor_x, _ = _nonnegative(tasks.cosines, cosines_to_mean, tasks.nonzero, rounding)
    on_floor = on_floor & (_length(tasks.cosines, floor_x) <= radius)
    return jnp.where(on_floor, floor_x, path_x), on_floor


@_cagrad_point.defjvp
def _cagrad_point_jvp(primals, tangents) -> Any:
    """Cx + m = level n for the variables above zero and, off the floor, x'Cx = radius^2."""
    tasks, cosines_to_mean, _, radius, _ = primals
    dtasks, dmean, _, dradius, _ = tangents
    x, on_floor = _cagrad_point(*primals)
    image = dot(tasks.cosines, x)
    level = _inner(x, image + cosines_to_mean) / or_one(_inner(tasks.simplex, x))
    level = jnp.where(on_floor, 0, level)
    dimage = dot(dtasks.cosines, x)
    solve = _free_solver(tasks.cosines, tasks.nonzero & (x > 0))
    base, column = solve(level * dtasks.simplex - dimage - dmean), solve(tasks.simplex)
    missing = radius * dradius - _inner(x, dimage) / 2 - _inner(image, base)
    shift = jnp.where(on_floor, 0, missing / or_one(_inner(image, column)))
    dfloor = np.zeros(on_floor.shape, jax.dtypes.float0)
    return (x, on_floor), (base + shift * column, dfloor)


def _cagrad_path(
    tasks: _Tasks, cosines_to_mean: jax.Array, active: jax.Array, radius: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Follows w(s) of `cagrad_dual` to the s where its length is s times the radius.

    Returns:
      x = w(s) / s, and whether the search ended on the floor: the root is where w(s) is
      shorter than sqrt(eps) of the shortest gradient, and no longer told from zero.
    """
    cosines, simplex = tasks.cosines, tasks.simplex
    eps = float(jnp.finfo(cosines.dtype).eps)
    floor = math.log(eps**0.5) - jnp.log(radius)

    def step(state):
        log_s, low, high, _, _, num_steps = state
        s = jnp.exp(log_s)
        solved = _interior_point(cosines, s * cosines_to_mean, active, simplex)
        solve = _newton_solver(cosines, solved.curvature)
        column, pull = solve(jnp.stack([simplex, cosines_to_mean], axis=1)).T
        slope = column * _inner(simplex, pull) / or_one(_inner(simplex, column)) - pull
        slope = jnp.where(jnp.isfinite(slope), slope, 0)
        base = solved.x - s * slope  # on this face of the simplex w(s) is base + s slope

        squared_length = jnp.maximum(_inner(solved.x, dot(cosines, solved.x)), eps**2)
        excess = jnp.log(squared_length) / 2 - log_s - jnp.log(radius)
        base_length = jnp.maximum(_inner(base, dot(cosines, base)), eps**2)
        room = radius**2 - _inner(slope, dot(cosines, slope))
        root = jnp.log(base_length / jnp.where(room > 0, room, 1)) / 2
        # without room w(s) is longer than s radius all over this face: on to a larger s
        root = jnp.where(room > 0, root, log_s + 3)
        rounding = 4 * eps * jnp.sum(jnp.where(tasks.nonzero, solved.x, 0)) ** 2 / squared_length
        exact = jnp.abs(excess) <= jnp.minimum(rounding, _tolerance(cosines.dtype) / 2)
        root = jnp.where(exact, log_s, root)

        low = jnp.where(excess > 0, log_s, low)
        high = jnp.where(excess > 0, high, log_s)
        found = jnp.abs(root - log_s) <= 1e-4
        inside = (low < root) & (root < high)
        middle = (jnp.maximum(low, log_s - 6) + jnp.minimum(high, log_s + 6)) / 2
        goal = jnp.where(found | inside, jnp.clip(root, log_s - 3, log_s + 3), middle)
        goal = jnp.maximum(goal, floor)
        moved = jnp.where(solved.x > 0, jnp.maximum(base / jnp.exp(goal) + slope, 0), 0)
        x = jnp.where(found, moved, solved.x / s)
        return goal, low, high, x, jnp.abs(goal - log_s), num_steps + 1

    def unfinished(state):
        return (state[4] > 1e-4) & (state[5] < _MAX_PATH_STEPS)

    infinity = jnp.full((), jnp.inf, cosines.dtype)
    # the first s is the root if w(s) is as long as the shortest gradient
    state = (-jnp.log(radius), -infinity, infinity, jnp.zeros_like(simplex), infinity, 0)
    goal, _, _, x, _, _ = lax.while_loop(unfinished, step, state)
    return x, goal <= floor


@jax.custom_jvp
def _fair_point(
    cosines: jax.Array, log_start: jax.Array, fairness: jax.Array, active: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Solves log y + a log(Cy) = (1 + a) log_start for y; returns y and its residual.

    Newton's method on the convex function of `fair_weights`, from the solution for C = 1. No
    variable loses more than nine tenths of its value in a step.
    """
    dtype = cosines.dtype
    eps = jnp.finfo(dtype).eps
    mask = active.astype(dtype)
    log_load = (1 + fairness) * log_start

    def step(state):
        y, best_y, least, stalls, _, num_steps = state
        fair_gains = jnp.exp((log_load - jnp.log(y)) / fairness)
        gradient = mask * (dot(cosines, y) - fair_gains)
        descent = -_newton_solver(cosines, fair_gains / (fairness * y))(gradient)
        size = or_one(_inner(mask * y, fair_gains))
        residual = jnp.sqrt(jnp.maximum(-_inner(gradient, descent), 0) / size)
        residual = jnp.where(jnp.isfinite(residual), residual, jnp.inf)

        stalls = jnp.where(residual < least / 2, 0, stalls + 1)
        best_y = jnp.where(residual < least, y, best_y)
        least = jnp.minimum(residual, least)
        at_rounding = (least <= _fair_tolerance(dtype)) & (stalls > 3)
        goes_on = jnp.isfinite(residual) & (residual > 4 * eps) & ~at_rounding
        new_y = jnp.where(goes_on, jnp.maximum(y + descent, y / 10), y)
        return new_y, best_y, least, stalls, goes_on, num_steps + 1

    def unfinished(state):
        return state[4] & (state[5] < _MAX_NEWTON_STEPS)

    start = jnp.exp(log_start)
    state = (start, start, jnp.full((), jnp.inf, dtype), 0, jnp.bool_(True), 0)
    _, y, residual, _, _, _ = lax.while_loop(unfinished, step, state)
    return y, residual


@_fair_point.defjvp
def _fair_point_jvp(primals, tangents):
    cosines, log_start, fairness, _ = primals
    dcosines, dlog_start, dfairness, _ = tangents
    y, residual = _fair_point(*primals)
    log_gains = ((1 + fairness) * log_start - jnp.log(y)) / fairness
    fair_gains = jnp.exp(log_gains)
    dlog_load = (1 + fairness) * dlog_start + dfairness * log_start
    pull = fair_gains * (dlog_load - dfairness * log_gains) / fairness - dot(dcosines, y)
    damping = 2 * float(jnp.finfo(y.dtype).eps) * y.size**0.5
    solve = _newton_solver(cosines, fair_gains / (fairness * y) + damping)
    return (y, residual), (solve(pull), jnp.zeros_like(residual))


def _cancels(cosines: jax.Array, y: jax.Array) -> jax.Array:
    """Whether nothing but rounding is left of a combination of gradients with weights y >= 0."""
    rounding = _CANCELLATION * jnp.finfo(y.dtype).eps * jnp.sum(y) ** 2
    return (_inner(y, dot(cosines, y)) <= rounding) & (rounding > 0)


def _newton_solver(quadratic: jax.Array, curvature: jax.Array):
    """Factors Q + diag(curvature); returns what solves with it."""
    return factor.positive_definite_solver(quadratic + jnp.diag(curvature))


def _longest_step(dx: jax.Array, dy: jax.Array, fraction: float) -> jax.Array:
    """The step, at most 1, that goes this fraction of the way to zero of x or y.

    `dx` and `dy` are relative to x and y.
    """
    return fraction / jnp.maximum(jnp.max(jnp.maximum(-dx, -dy)), fraction)


def _solution(weights: jax.Array, residual: jax.Array) -> Solution:
    return Solution(weights, residual <= _tolerance(weights.dtype), residual)


def _tolerance(dtype: jnp.dtype) -> float:
    return 4 * float(jnp.finfo(dtype).eps) ** 0.5


def _fair_tolerance(dtype: jnp.dtype) -> float:
    return 3 * float(jnp.finfo(dtype).eps) ** (1 / 3)


def _inner(left: jax.Array, right: jax.Array) -> jax.Array:
    return jnp.sum(left * right)


def _length(gramian: jax.Array, weights: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.maximum(_inner(weights, dot(gramian, weights)), 0))
