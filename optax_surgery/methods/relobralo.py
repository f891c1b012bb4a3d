"""ReLoBRaLo: weigh each task by its progress, since the last step or since the first."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from optax_surgery import checks, core

_LARGEST_LOGIT = 1e6  # beyond, all others have weight zero anyway


class ReLoBRaLoState(NamedTuple):
    """State of `relobralo`.

    Attributes:
      first_losses: (T,) the losses of a task's first step.
      last_losses: (T,) those of its last step.
      mean_weights: (T,) averages of the weights, 1 before the first step.
      seen: (T,) bool, whether a task has had a step yet.
    """

    first_losses: jax.Array
    last_losses: jax.Array
    mean_weights: jax.Array
    seen: jax.Array


def relobralo(
    num_tasks: int,
    temperature: float = 0.1,
    decay: float = 0.999,
    lookback: float = 0.999,
    *,
    key: jax.Array | int = 0,
) -> core.Surgery:
    r"""ReLoBRaLo (relative loss balancing with random lookback): the slowest tasks count more.

    With balances against the losses of an earlier step :math:`t'`,

    .. math::
      b_i(t, t') = T\, \mathrm{softmax}_i \frac{L_i(t)}{\tau L_i(t')}, \qquad
      w_i(t) = \alpha\, [\rho\, w_i(t - 1) + (1 - \rho)\, b_i(t, 0)] + (1 - \alpha)\, b_i(t, t - 1)

    where :math:`\rho` is drawn anew in every step: mostly 1, and now and then 0, when the weights
    forget their past and look back at the beginning.

    Args:
      num_tasks: number of tasks T, at least 1.
      temperature: tau, above 0; a higher one makes weights more even.
      decay: alpha, in [0, 1].
      lookback: the mean of rho, in [0, 1]: the probability that the past is kept.
      key: seed or PRNG key of the draws.

    Returns:
      A `Surgery` from leaves `(T, *shape)` to leaves `(*shape)`.
      The update is a weighted sum; weights are above zero and add up to T.

    Raises:
      ValueError: at trace time, from `update`, if `losses` are missing or the gradients are not
        those of `num_tasks` tasks; at once, for an argument out of its range.

    Note:
      A loss that is not above zero has no ratio: its task has weight zero in that step. A
      masked task keeps what is known of it. In the first step all weights are 1.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_surgery as surgery
      >>> tx = surgery.relobralo(num_tasks=2, temperature=1.0, decay=0.0)
      >>> task_grads, state = jnp.array([[1.0, 0.0], [0.0, 1.0]]), tx.init(jnp.zeros(2))
      >>> for losses in jnp.array([[2.0, 2.0], [1.0, 2.0]]):
      ...     updates, state = tx.update(task_grads, state, losses=losses)
      >>> print(jnp.array_str(updates, precision=3))
      [0.755 1.245]

    References:
      Bischof and Kraus, `Multi-Objective Loss Balancing for Physics-Informed Deep Learning
      <https://arxiv.org/abs/2110.09813>`_, 2021.
    """
    name = checks.arguments(
        relobralo,
        locals(),
        num_tasks="int [1, inf)",
        temperature="(0, inf)",
        decay="[0, 1]",
        lookback="[0, 1]",
    )

    def init():
        zeros, ones = jnp.zeros(num_tasks), jnp.ones(num_tasks)
        return ReLoBRaLoState(zeros, jnp.zeros_like(zeros), ones, jnp.zeros(num_tasks, bool))

    def update(tasks, state):
        dtype = state.mean_weights.dtype
        present, losses = tasks.task_mask, tasks.losses.astype(dtype)
        num_present = jnp.sum(present).astype(dtype)

        def balances(earlier):
            compared = present & state.seen
            ratios = jnp.where(compared, losses / jnp.where(compared, earlier, 1), 1)
            logits = jnp.minimum(ratios / jnp.asarray(temperature, dtype), _LARGEST_LOGIT)
            logits = jnp.where(present, logits, jnp.finfo(dtype).min)
            return num_present * jax.nn.softmax(logits)

        keeps = jax.random.bernoulli(tasks.key, lookback)
        past = jnp.where(keeps, state.mean_weights, balances(state.first_losses))
        rate = jnp.asarray(decay, dtype)
        weights = rate * past + (1 - rate) * balances(state.last_losses)
        new_state = ReLoBRaLoState(
            first_losses=jnp.where(state.seen, state.first_losses, losses),
            last_losses=losses,
            mean_weights=weights,
            seen=jnp.ones_like(state.seen),
        )
        new_state = jax.tree.map(lambda new, old: jnp.where(present, new, old), new_state, state)
        return weights, new_state

    weighting = core.Weighting(init, update, usable=lambda tasks: tasks.losses > 0)
    return core.gradient_surgery(weighting, name=name, num_tasks=num_tasks, key=key)
