"""GO4Align: one weight for each group of tasks that stand alike."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from optax_surgery import checks, core

# Losses of less than this share of the largest one count as this share.
LEAST_SHARE = 1e-8
# What a softmax can take without the rounding of a fused product making it overflow.
LARGEST_LOG_SHARE = 1e6


class GO4AlignState(NamedTuple):
    """State of `go4align`.

    Attributes:
      log_shares: (T,) logarithms of the shares p of the tasks, up to a common constant.
    """

    log_shares: jax.Array


def group_means(values: jax.Array, task_mask: jax.Array, num_groups: int) -> jax.Array:
    """Puts in the place of each value the mean of its group, in the best split into groups.

    The best split of k-means, with the least sum of squared distances to the means, is one
    into intervals of the sorted values: dynamic programming finds it.

    Args:
      values: (T,) numbers.
      task_mask: (T,) bool, False for the values that belong to no group.
      num_groups: number of groups; where there are fewer values, each is its own group.

    Returns:
      (T,) means; anything for masked tasks.
    """
    order = jnp.argsort(jnp.where(task_mask, values, jnp.inf))
    active = task_mask[order]
    ranked = jnp.where(active, values[order], 0)

    # Interval (i, j) holds ranks i, ..., j - 1.
    edges, ranks = jnp.arange(values.size + 1), jnp.arange(values.size)
    after = edges[:, None] <= ranks[None, :]
    members = (after[:, None, :] & ~after[None, :, :]) & active[None, None, :]
    sizes = jnp.maximum(jnp.sum(members, axis=-1), 1).astype(ranked.dtype)
    means = jnp.sum(jnp.where(members, ranked[None, None, :], 0), axis=-1) / sizes
    deviations = jnp.where(members, ranked[None, None, :] - means[:, :, None], 0)
    costs = jnp.sum(deviations**2, axis=-1)
    costs = jnp.where(edges[:, None] <= edges[None, :], costs, jnp.inf)

    def add_group(best, _):
        totals = best[:, None] + costs
        return jnp.min(totals, axis=0), jnp.argmin(totals, axis=0)

    def take_group(end, starts):
        start = starts[end]
        return start, jnp.where((start <= ranks) & (ranks < end), means[start, end], 0)

    best = jnp.where(edges == 0, 0, jnp.inf).astype(costs.dtype)
    _, starts = lax.scan(add_group, best, length=num_groups)
    _, groups = lax.scan(take_group, jnp.asarray(values.size, starts.dtype), starts, reverse=True)
    return jnp.sum(groups, axis=0)[jnp.argsort(order)]


def go4align(num_tasks: int, num_groups: int, learning_rate: float = 1e-4) -> core.Surgery:
    r"""GO4Align: evens out the losses, with one weight for each group of tasks.

    With shares p that begin even, in every step

    .. math::
      p_i \propto p_i e^{-\eta L_i}, \qquad
      r_i = p_i \frac{\sum_j L_j}{L_i}, \qquad
      w_i = \text{mean of } r \text{ in the group of } i,

    where the groups are those of k-means on :math:`r_1, \dots, r_T`.

    Args:
      num_tasks: number of tasks T, at least 1.
      num_groups: number of groups, at least 1. With 1 all weights are equal, and with T none is
        shared.
      learning_rate: eta, at least 0; the `robust_step_size` of the authors' code.

    Returns:
      A `Surgery` from leaves `(T, *shape)` to leaves `(*shape)`.
      The update is a weighted sum: for equal losses weights are 1, else their sum is larger.
      They are above zero.

    Raises:
      ValueError: at trace time, from `update`, if `losses` are missing or the gradients are not
        those of `num_tasks` tasks; at once, for an argument out of its range.

    Note:
      This is what the authors' code means to do. As released it has one group by default, and
      with more it stops, as the import of its k-means is commented out. That k-means begins at
      random; ours is the exact optimum for numbers on a line. For masked tasks: p moves by each
      task's loss less the mean loss of those that take part, which without masks is the same.
      Losses have to be above zero: the task of one that is not has weight zero in that step,
      and is counted in the state. Losses of less than 1e-8 times the largest count as that in r.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_surgery as surgery
      >>> tx = surgery.go4align(num_tasks=3, num_groups=2)
      >>> task_grads, losses = jnp.eye(3), jnp.array([1.0, 1.25, 5.0])
      >>> updates, state = tx.update(task_grads, tx.init(jnp.zeros(3)), losses=losses)
      >>> print(updates.round(2))
      [2.18 2.18 0.48]

    References:
      Shen et al., `GO4Align: Group Optimization for Multi-Task Alignment
      <https://arxiv.org/abs/2404.06486>`_, NeurIPS 2024.
    """
    name = checks.arguments(
        go4align,
        locals(),
        num_tasks="int [1, inf)",
        num_groups="int [1, inf)",
        learning_rate="[0, inf)",
    )

    def init():
        return GO4AlignState(jnp.zeros(num_tasks))

    def update(tasks, state):
        task_mask, dtype = tasks.task_mask, state.log_shares.dtype
        losses, evenly = tasks.losses.astype(dtype), tasks.preference(None).astype(dtype)
        lowest = jnp.finfo(dtype).min

        moves = -jnp.asarray(learning_rate, dtype) * (losses - jnp.sum(evenly * losses))
        log_shares = jnp.clip(state.log_shares + moves, -LARGEST_LOG_SHARE, LARGEST_LOG_SHARE)
        log_shares = jnp.where(task_mask, log_shares, state.log_shares)
        shares = jax.nn.softmax(jnp.where(task_mask, log_shares, lowest))

        peak = jnp.max(jnp.where(task_mask, losses, 0))
        relative = jnp.clip(losses / jnp.where(peak > 0, peak, 1), LEAST_SHARE, 1)
        ratios = shares * jnp.sum(jnp.where(task_mask, relative, 0)) / relative
        return group_means(ratios, task_mask, num_groups), GO4AlignState(log_shares)

    weighting = core.Weighting(init, update, usable=lambda tasks: tasks.losses > 0)
    return core.gradient_surgery(weighting, name=name, num_tasks=num_tasks)
