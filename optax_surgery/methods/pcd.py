"""PCD: follow a primary task, as nearly as the progress of the others allows."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from optax_surgery import checks, core
from optax_surgery.algebra import solvers


class PCDState(NamedTuple):
    """State of `pcd`.

    Attributes:
      mean_squares: (T,) running averages of the squared norms, not corrected for their start.
      num_seen: (T,) int32, the number of steps in which a task took part.
      report: how well the last problem was solved.
    """

    mean_squares: jax.Array
    num_seen: jax.Array
    report: solvers.SolverReport


def pcd_weights(
    gramian: jax.Array,
    inverse_scales: jax.Array,
    primary: int,
    margin: jax.Array,
    task_mask: jax.Array,
) -> tuple[jax.Array, solvers.Solution]:
    """PCD's weights.

    Args:
      gramian: (T, T) inner products; rows of absent tasks are zero.
      inverse_scales: (T,) what each gradient is multiplied by.
      primary: index of the primary task.
      margin: (T,) share of its own progress that each other task is to make.
      task_mask: (T,) bool, the tasks that are there.

    Returns:
      (T,) weights of the gradients as they are, and the solution that they come from.
    """
    scaled = gramian * inverse_scales[:, None] * inverse_scales[None, :]
    is_primary = jnp.arange(task_mask.size) == primary
    others = task_mask & ~is_primary
    # The step e from the primary gradient p is the shortest with
    # g_j . (p + e) >= margin |g_j|^2 for all others.
    slope = scaled[:, primary] - margin * jnp.diagonal(scaled)
    solution = solvers.nonnegative_quadratic(scaled, slope, others)
    feasible = jnp.where(solution.converged, solution.weights, 0)
    weights = feasible + is_primary.astype(feasible.dtype)
    squared_length = weights @ jnp.matmul(scaled, weights, precision=jax.lax.Precision.HIGHEST)
    squared_norm = gramian[primary, primary]
    # Opposite gradients may leave nothing but rounding errors.
    magnitude = jnp.sum(weights * jnp.sqrt(jnp.diagonal(scaled))) ** 2
    nonzero = squared_length > 10 * jnp.finfo(gramian.dtype).eps * magnitude
    nonzero = nonzero & (squared_norm > 0)  # the root of zero has no derivative
    ratio = jnp.sqrt(jnp.where(nonzero, squared_norm / jnp.where(nonzero, squared_length, 1), 1))
    return jnp.where(nonzero, weights * inverse_scales * ratio, 0), solution


def pcd(
    primary: int,
    num_tasks: int,
    margin: float | core.PerTask = 0.02,
    decay: float = 0.999,
    epsilon: float = 1e-8,
) -> core.Surgery:
    r"""PCD: turns the primary task's gradient until every other task makes some progress.

    With :math:`\tilde g_i = g_i / \sqrt{\hat v_i + \epsilon}`, where :math:`\hat v_i` is the
    running average of :math:`\|g_i\|^2`, and task 1 for the primary one,

    .. math::
      \tilde d = \arg\min_d \|d - \tilde g_1\|^2 \quad \text{subject to} \quad
      \tilde g_j \cdot d \ge \tau \|\tilde g_j\|^2 \text{ for } j \ne 1,

    and the update is :math:`\tilde d` with the length of :math:`g_1`.

    Args:
      primary: index of the primary task, in [0, num_tasks).
      num_tasks: number of tasks T, at least 1.
      margin: tau in the paper, in [0, 1]: one number for all tasks, or one for each, (T,) or a tree
        of numbers, of which the primary task's is not looked at.
      decay: beta in the paper, in [0, 1).
      epsilon: epsilon in the paper, at least 0, in the unit of a squared gradient.

    Returns:
      A `Surgery` from leaves `(T, *shape)` to leaves `(*shape)`.
      The update is as long as the primary task's gradient. The state holds the averages and a
      `SolverReport`.

    Raises:
      ValueError: at trace time, from `update`, if the gradients are not those of `num_tasks`
        tasks; at once, for an argument out of its range.

    Note:
      Where no direction meets the constraints the update is the primary gradient, as in the
      paper, and the state says so: `converged` is False. Where the primary task is masked or its
      gradient zero, the update is zero. Averages of very small or large gradients are taken
      from a Gramian that may be scaled (see `gradient_surgery`).

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_surgery as surgery
      >>> tx = surgery.pcd(primary=0, num_tasks=2)
      >>> task_grads = jnp.array([[1.0, 0.0], [-1.0, 1.0]])
      >>> updates, state = tx.update(task_grads, tx.init(jnp.zeros(2)))
      >>> print(jnp.array_str(updates, precision=2, suppress_small=True))
      [0.69 0.73]

    References:
      Priority-constrained descent, `arXiv 2606.29521 <https://arxiv.org/abs/2606.29521>`_, TMLR
      2026; as in TorchJD 0.18.
    """
    name = checks.arguments(
        pcd,
        locals(),
        primary="int [0, num_tasks)",
        num_tasks="int [1, inf)",
        margin="per task [0, 1]",
        decay="[0, 1)",
        epsilon="[0, inf)",
    )

    def init():
        return PCDState(
            mean_squares=jnp.zeros(num_tasks),
            num_seen=jnp.zeros(num_tasks, jnp.int32),
            report=solvers.initial_report(),
        )

    def update(tasks, state):
        dtype = state.mean_squares.dtype
        rate, floor = jnp.asarray(decay, dtype), jnp.asarray(epsilon, dtype)
        squared_norms = jnp.diagonal(tasks.gramian).astype(dtype)
        mean_squares = rate * state.mean_squares + (1 - rate) * squared_norms
        mean_squares = jnp.where(tasks.task_mask, mean_squares, state.mean_squares)
        num_seen = state.num_seen + tasks.task_mask.astype(state.num_seen.dtype)
        unbiased = mean_squares / jnp.where(num_seen > 0, 1 - rate ** num_seen.astype(dtype), 1)
        scales = jnp.sqrt(unbiased + floor)
        inverse_scales = jnp.where(scales > 0, 1 / jnp.where(scales > 0, scales, 1), 0)
        weights, solution = pcd_weights(
            tasks.gramian,
            inverse_scales.astype(tasks.dtype),
            primary,
            tasks.spread("margin", margin),
            tasks.task_mask,
        )
        return weights, PCDState(mean_squares, num_seen, solution.report())

    return core.gradient_surgery(core.Weighting(init, update), name=name, num_tasks=num_tasks)
