"""CR-MOGM: average the weights of another method over the steps."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optax_surgery import checks, core


class CRMOGMState(NamedTuple):
    """State of `cr_mogm`.

    Attributes:
      mean_weights: (T,) averages of the weights.
      seen: (T,) bool, whether a task has had a weight yet.
      inner_state: the state of the surgery that finds the weights.
    """

    mean_weights: jax.Array
    seen: jax.Array
    inner_state: Any


def cr_mogm(
    inner: core.Surgery,
    num_tasks: int,
    decay: float = 0.9,
    initial_weights: core.PerTask | None = None,
) -> core.Surgery:
    r"""CR-MOGM: weights the task gradients by averages of the weights of another method.

    .. math:: \lambda_k = \alpha \lambda_{k-1} + (1 - \alpha) \hat\lambda_k

    with the weights :math:`\hat\lambda_k` that `inner` finds in step k, beginning with
    :math:`\lambda_1 = \hat\lambda_1`. Averaging makes up for the correlation between weights and
    gradients of one mini-batch, which biases `inner`.

    Args:
      inner: a surgery that works on the Gramian or the losses, such as `mgda()`.
      num_tasks: number of tasks T, at least 1.
      decay: alpha in the paper, in [0, 1]. The paper lets it fall with the learning rate; use
        `optax.inject_hyperparams` for a schedule.
      initial_weights: what the averages begin with, (T,) or a tree of numbers, each any number, in
        the scale of the inner method's; its weights of the first step by default.

    Returns:
      A `Surgery` from leaves `(T, *shape)` to leaves `(*shape)`.
      The update has the scale of the inner method's.

    Raises:
      ValueError: at trace time, from `update`, if the gradients are not those of `num_tasks`
        tasks, or if `inner` works on coordinates; at once, for an argument out of its range, and
        for an `inner` that is no surgery.

    Note:
      A task that is masked keeps its average; one that is seen for the first time starts from
      its own weight. A loss that `inner` cannot use goes into its average with weight zero.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_surgery as surgery
      >>> tx = surgery.cr_mogm(surgery.ntkmtl(), num_tasks=2)
      >>> task_grads = jnp.array([[3.0, 0.0], [0.0, 4.0]])
      >>> updates, state = tx.update(task_grads, tx.init(jnp.zeros(2)))
      >>> print(jnp.array_str(updates, precision=3, suppress_small=True))
      [5. 5.]

    References:
      Zhou et al., `On the Convergence of Stochastic Multi-Objective Gradient Manipulation and
      Beyond <https://openreview.net/forum?id=ScwfQ7hdwyP>`_, NeurIPS 2022, Algorithm 1.
    """
    name = checks.arguments(
        cr_mogm,
        locals(),
        inner=core.Surgery,
        num_tasks="int [1, inf)",
        decay="[0, 1]",
        initial_weights="per task (-inf, inf)",
    )

    def init():
        return CRMOGMState(
            mean_weights=jnp.zeros(num_tasks),
            seen=jnp.zeros(num_tasks, bool),
            inner_state=inner.init(()),
        )

    def update(tasks, state):
        weights, inner_state = core.weights_of(inner, tasks, state.inner_state)
        weights = weights.astype(state.mean_weights.dtype)
        rate, before = jnp.asarray(decay, weights.dtype), weights
        if initial_weights is not None:
            before = tasks.read("initial_weights", initial_weights).astype(weights.dtype)
        before = jnp.where(state.seen, state.mean_weights, before)
        averages = rate * before + (1 - rate) * weights
        averages = jnp.where(tasks.task_mask, averages, state.mean_weights)
        return averages, CRMOGMState(averages, state.seen | tasks.task_mask, inner_state)

    return core.gradient_surgery(core.Weighting(init, update), name=name, num_tasks=num_tasks)
