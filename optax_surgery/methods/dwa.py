"""DWA: weigh each task by how slowly its loss has been falling."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from optax_surgery import checks, core

# What a softmax can take without the rounding of a fused quotient making it overflow.
LARGEST_RATIO = 1e6


class DWAState(NamedTuple):
    """State of `dwa`.

    Attributes:
      task_steps: (T,) int32, the number of steps in which a task took part.
      means: (T,) mean losses in the window that is not full yet.
      last_means: (T,) mean losses in the last full window, 0 before.
      earlier_means: (T,) mean losses in the full window before that, 0 before.
    """

    task_steps: jax.Array
    means: jax.Array
    last_means: jax.Array
    earlier_means: jax.Array


def dwa(num_tasks: int, window: int, temperature: float = 2.0) -> core.Surgery:
    r"""Dynamic weight average (DWA): more weight for the tasks whose losses fall more slowly.

    With the mean losses :math:`\bar L(t - 1)` and :math:`\bar L(t - 2)` of the last two windows,

    .. math::
      r_i = \frac{\bar L_i(t - 1)}{\bar L_i(t - 2)}, \qquad
      w_i = T\, \mathrm{softmax}(r / \tau)_i.

    Weights are 1 until two windows are full.

    Args:
      num_tasks: number of tasks T, at least 1.
      window: number of steps to take the mean losses of, at least 1. The paper has one epoch.
      temperature: tau, above 0; T = 2 in the paper. A higher one makes weights more even.

    Returns:
      A `Surgery` from leaves `(T, *shape)` to leaves `(*shape)`.
      The update is a weighted sum; weights are above zero and add up to T.

    Raises:
      ValueError: at trace time, from `update`, if `losses` are missing or the gradients are not
        those of `num_tasks` tasks; at once, for an argument out of its range.

    Note:
      A window is full when its task has taken part in that many steps: masked steps do not count
      for it. Where one of the two mean losses is not above zero, their ratio says nothing and
      counts as 1; none counts as more than a million. Other code has windows of 25 steps that
      slide, and the mean of the weighted losses.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_surgery as surgery
      >>> tx = surgery.dwa(num_tasks=2, window=1)
      >>> task_grads, state = jnp.array([[1.0, 0.0], [0.0, 1.0]]), tx.init(jnp.zeros(2))
      >>> for losses in jnp.array([[1.0, 1.0], [0.5, 1.0], [0.5, 1.0]]):
      ...     updates, state = tx.update(task_grads, state, losses=losses)
      >>> print(updates.round(4))
      [0.8756 1.1244]

    References:
      Liu et al., `End-to-End Multi-Task Learning with Attention
      <https://arxiv.org/abs/1803.10704>`_, CVPR 2019, Equation 7.
    """
    name = checks.arguments(
        dwa,
        locals(),
        num_tasks="int [1, inf)",
        window="int [1, inf)",
        temperature="(0, inf)",
    )

    def init():
        return DWAState(jnp.zeros(num_tasks, jnp.int32), *jnp.zeros((3, num_tasks)))

    def update(tasks, state):
        task_mask, dtype = tasks.task_mask, state.means.dtype
        known = (state.last_means > 0) & (state.earlier_means > 0)
        ratios = state.last_means / jnp.where(known, state.earlier_means, 1)
        ratios = jnp.where(known, jnp.minimum(ratios, LARGEST_RATIO), 1)
        logits = ratios / jnp.asarray(temperature, dtype)
        shares = jax.nn.softmax(jnp.where(task_mask, logits, jnp.finfo(dtype).min))
        weights = jnp.sum(task_mask).astype(dtype) * shares

        num_seen = state.task_steps % window + 1
        moves = (tasks.losses.astype(dtype) - state.means) / num_seen.astype(dtype)
        means = state.means + moves
        full = num_seen == window
        new_state = DWAState(
            task_steps=state.task_steps + 1,
            means=jnp.where(full, 0, means),
            last_means=jnp.where(full, means, state.last_means),
            earlier_means=jnp.where(full, state.last_means, state.earlier_means),
        )
        return weights, jax.tree.map(
            lambda new, old: jnp.where(task_mask, new, old), new_state, state
        )

    return core.gradient_surgery(core.Weighting(init, update), name=name, num_tasks=num_tasks)
