"""DWA: weigh each task by how slowly its loss has been falling."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_surgery import core

# What a softmax can take without the rounding of a fused quotient making it overflow.
LARGEST_RATIO = 1e6


class DWAState(NamedTuple):
    """State of `dwa`.

    Attributes:
      task_steps: (T,) int32, the number of steps in which a task took part.
      means: (T,) mean losses in the window that is not full yet.
      last_means: (T,) mean losses in the last full window.
      earlier_means: (T,) mean losses in the full window before that.
    """

    task_steps: jax.Array
    means: jax.Array
    last_means: jax.Array
    earlier_means: jax.Array


def dwa(
    num_tasks: int, window: int, temperature: float = 2.0
) -> optax.GradientTransformationExtraArgs:
    r"""Dynamic weight average (DWA): more weight for the tasks whose losses fall more slowly.

    With the mean losses :math:`\bar L(t - 1)` and :math:`\bar L(t - 2)` of the last two windows,

    .. math::
      r_i = \frac{\bar L_i(t - 1)}{\bar L_i(t - 2)}, \qquad
      w_i = T\, \mathrm{softmax}(r / \tau)_i.

    Weights are 1 until two windows are full.

    Args:
      num_tasks: number of tasks T.
      window: number of steps to take the mean losses of, at least 1. The paper has one epoch.
      temperature: tau, above zero; T = 2 in the paper. A higher one makes weights more even.

    Returns:
      An `optax.GradientTransformationExtraArgs` from leaves (T, *shape) to leaves (*shape).
      The update is a weighted sum; weights are above zero and add up to T.

    Raises:
      ValueError: for a `window` below 1; at trace time, from `update`, if `losses` are missing or
        the gradients are not those of `num_tasks` tasks.

    Note:
      A window is full when its task has taken part in that many steps: masked steps do not count
      for it. A ratio to a mean loss of zero counts as 1, and none as more than a million. Other
      code has windows of 25 steps that slide, and the mean of the weighted losses.

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
    if window < 1:
        raise ValueError(
            f"Expected a window of at least 1 step, got {window} at 'window'. "
            "Pass the number of steps of an epoch for the paper's method."
        )

    def init():
        means = jnp.zeros((3, num_tasks), jnp.float32)
        return DWAState(jnp.zeros(num_tasks, jnp.int32), *means)

    def update(gramian, state, /, *, key, losses, task_mask):
        del gramian, key
        losses = core.needed("dwa", losses=losses)
        core.check_num_tasks("dwa", num_tasks, task_mask.size)

        known = (state.task_steps >= 2 * window) & (state.earlier_means != 0)
        ratios = state.last_means / jnp.where(known, state.earlier_means, 1)
        ratios = jnp.where(known, jnp.clip(ratios, -LARGEST_RATIO, LARGEST_RATIO), 1)
        logits = jnp.where(task_mask, ratios / temperature, jnp.finfo(ratios.dtype).min)
        weights = jnp.sum(task_mask) * jax.nn.softmax(logits)

        place = state.task_steps % window
        means = state.means + (losses - state.means) / (place + 1)
        full = place + 1 == window
        new_state = DWAState(
            task_steps=state.task_steps + 1,
            means=jnp.where(full, 0, means),
            last_means=jnp.where(full, means, state.last_means),
            earlier_means=jnp.where(full, state.last_means, state.earlier_means),
        )
        return weights, jax.tree.map(
            lambda new, old: jnp.where(task_mask, new, old), new_state, state
        )

    return core.gradient_surgery(core.Weighting(init=init, update=update))
