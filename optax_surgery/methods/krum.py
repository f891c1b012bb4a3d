"""Krum and Multi-Krum: the gradients that lie closest to most others."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from optax_surgery import checks, core, trees
from optax_surgery.algebra import solvers

# Scores are told apart if they differ by more than this many times the machine epsilon.
_TOLERANCE = 512


class _Known(NamedTuple):
    """What is known of the (T, T) distances, and (T,) from which tasks they have been measured."""

    nearest: jax.Array
    distances: jax.Array
    farthest: jax.Array
    measured: jax.Array


def krum_weights(
    differences: Callable[[jax.Array], trees.Differences],
    num_byzantine: int,
    num_selected: int,
    task_mask: jax.Array,
) -> solvers.Solution:
    """Multi-Krum's weights: equal for the selected tasks, zero for all others.

    Distances are right relative to those from the task that they are measured from. So they are
    measured from tasks that may be selected, until the scores of those are known: mostly from one
    task, or from a second one if the first was no good.

    Args:
      differences: see `Tasks.differences`.
      num_byzantine: number of gradients that may be anything.
      num_selected: number of gradients to average.
      task_mask: (T,) bool, the tasks that are there.

    Returns:
      (T,) weights that add up to 1. The residual is how much of the scores of those that may be
      selected is uncertain, 0 if it is known which they are; more than 512 eps is not converged.
    """
    num_active = jnp.sum(task_mask)
    most_selected = jnp.minimum(num_selected, num_active)
    apart = task_mask[:, None] & task_mask[None, :] & ~jnp.eye(task_mask.size, dtype=bool)
    num_neighbours = jnp.clip(num_active - num_byzantine - 2, 1, jnp.maximum(num_active - 1, 1))

    def candidates(known):
        """The bounds of the scores, their relative widths, and which tasks may be selected."""
        unit = _least_radius(known.farthest, apart, num_neighbours)
        least, most = (
            _scores(each / unit, apart, num_neighbours) for each in (known.nearest, known.farthest)
        )
        width = jnp.where(most > 0, (most - least) / jnp.where(most > 0, most, 1), 0)
        last = jnp.sort(jnp.where(task_mask, most, jnp.inf))[jnp.maximum(most_selected - 1, 0)]
        return least, width, task_mask & (least <= last)

    def undecided(known):
        _, width, possible = candidates(known)
        return possible & (width > tolerance) & ~known.measured

    def measure(known):
        least, _, _ = candidates(known)
        base = jnp.argmin(jnp.where(undecided(known), least, jnp.inf))
        found = differences(base).distances()
        narrower = found[2] - found[0] < known.farthest - known.nearest
        return _Known(
            jnp.maximum(known.nearest, found[0]),
            jnp.where(narrower, found[1], known.distances),
            jnp.minimum(known.farthest, found[2]),
            known.measured | (jnp.arange(task_mask.size) == base),
        )

    dtype = jax.eval_shape(differences, jnp.zeros((), jnp.int32)).lengths.dtype
    tolerance = _TOLERANCE * jnp.finfo(dtype).eps
    nothing = jnp.where(apart, trees.longest(dtype), 0).astype(dtype)
    start = _Known(jnp.zeros_like(nothing), nothing, nothing, jnp.zeros_like(task_mask))
    known = lax.while_loop(lambda known: jnp.any(undecided(known)), measure, start)

    unit = _least_radius(known.distances, apart, num_neighbours)
    scores = _scores(known.distances / unit, apart, num_neighbours)
    ranks = jnp.argsort(jnp.argsort(jnp.where(task_mask, scores, jnp.inf)))
    selected = (task_mask & (ranks < most_selected)).astype(dtype)
    _, width, possible = candidates(known)
    is_known = jnp.sum(possible) <= most_selected
    residual = jnp.where(is_known, 0, jnp.max(jnp.where(possible, width, 0)))
    weights = selected / jnp.maximum(jnp.sum(selected), 1)
    return solvers.Solution(weights, residual <= tolerance, residual)


def _least_radius(distances, apart, num_neighbours):
    """The least distance within which a task has its neighbours, for a unit; not zero."""
    ordered = jnp.sort(jnp.where(apart, distances, jnp.inf), axis=1)
    radii = jnp.take(ordered, num_neighbours - 1, axis=1)
    radius = jnp.min(radii)
    return jnp.where((radius > 0) & jnp.isfinite(radius), radius, 1)


def _scores(distances, apart, num_neighbours):
    """The sums of the squared distances to the nearest tasks; those far off count as that."""
    squares = jnp.minimum(distances, 2.0**40) ** 2
    ordered = jnp.sort(jnp.where(apart, squares, jnp.inf), axis=1)
    near = jnp.arange(apart.shape[0])[None, :] < num_neighbours
    return jnp.sum(jnp.where(near & jnp.isfinite(ordered), ordered, 0), axis=1)


def krum(
    num_byzantine: int, num_selected: int = 1, preference: core.PerTask | None = None
) -> core.Surgery:
    r"""Krum: takes the mean of the task gradients that lie closest to most others.

    The score of a task is the sum of the squared distances from its gradient to the
    :math:`T - f - 2` nearest ones; the m tasks of least score are averaged. With m = 1 this is
    Krum, else Multi-Krum. Up to f gradients may be anything, if :math:`T \ge 2 f + 3`: that is what
    the paper guarantees, and no condition on the arguments.

    Args:
      num_byzantine: f, number of gradients that may be anything, in [0, T). Up to (T - 3) / 2 of
        them cannot carry the update off; beyond that there is no guarantee.
      num_selected: m, number of gradients to average, in [1, T].
      preference: (T,) or a tree of numbers above 0, the weights in that average, such as clients'
        numbers of examples; equal by default. Who is selected does not depend on them.

    Returns:
      A `Surgery` from leaves `(T, *shape)` to leaves `(*shape)`.
      The update is a mean of task gradients. Its state is a `SolverReport`: not converged where
      rounding hides which gradients these are.

    Raises:
      ValueError: at trace time, from `update`, if the gradients are not stacked, or there are
        fewer of them than the arguments need, or `preference` has not one entry per task; at once,
        for an argument out of its range.

    Note:
      Distances are squared, as in the paper; some code takes them as they are. With
      too few tasks for T - f - 2 neighbours, the nearest one counts. Of equal scores the first
      task wins, so that it is equivariant to permutations only where scores differ.
      Distances are those of the differences, whatever the gradients have in common. Of a Gramian
      that the caller passes no differences can be had, only what it leaves of them.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_surgery as surgery
      >>> tx = surgery.krum(num_byzantine=1, num_selected=2)
      >>> task_grads = jnp.array([[1.0], [1.5], [1.2], [1.3], [-900.0]])
      >>> updates, state = tx.update(task_grads, tx.init(jnp.zeros(1)))
      >>> updates
      Array([1.25], dtype=float32)

    References:
      Blanchard et al., `Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent
      <https://arxiv.org/abs/1703.02757>`_, NeurIPS 2017, Section 4.
    """
    name = checks.arguments(
        krum,
        locals(),
        num_byzantine="int [0, T)",
        num_selected="int [1, T]",
        preference="per task (0, inf)",
    )

    def update(tasks, state):
        solution = krum_weights(tasks.differences, num_byzantine, num_selected, tasks.task_mask)
        weights = solution.weights
        if preference is not None:
            shares = tasks.preference(preference)
            weights = weights * (
                shares / jnp.maximum(jnp.max(shares), jnp.finfo(shares.dtype).tiny)
            )
            weights = weights / jnp.maximum(jnp.sum(weights), jnp.finfo(shares.dtype).tiny)
        return weights, solution.report()

    return core.gradient_surgery(core.Weighting(solvers.initial_report, update), name=name)
