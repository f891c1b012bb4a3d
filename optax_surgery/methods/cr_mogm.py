"""CR-MOGM: average the weights of another method over the steps."""

from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax

from optax_surgery import core


class CRMOGMState(NamedTuple):
    """State of `cr_mogm`.

    Attributes:
      weights: (T,) averages of the weights.
      seen: (T,) bool, whether a task has had a weight yet.
      inner_state: the state of the surgery that finds the weights.
    """

    weights: jax.Array
    seen: jax.Array
    inner_state: Any


def cr_mogm(
    inner: optax.GradientTransformationExtraArgs, num_tasks: int, decay: float = 0.9
) -> optax.GradientTransformationExtraArgs:
    r"""CR-MOGM: weights the task gradients by averages of the weights of another method.

    .. math:: \lambda_k = \alpha \lambda_{k-1} + (1 - \alpha) \hat\lambda_k

    with the weights :math:`\hat\lambda_k` that `inner` finds in step k, beginning with
    :math:`\lambda_1 = \hat\lambda_1`. Averaging makes up for the correlation between weights and
    gradients of one mini-batch, which biases `inner`.

    Args:
      inner: a surgery that works on the Gramian or the losses, such as `mgda()`.
      num_tasks: number of tasks T.
      decay: alpha in the paper, in [0, 1]. The paper lets it fall with the learning rate; use
        `optax.inject_hyperparams` for a schedule.

    Returns:
      An `optax.GradientTransformationExtraArgs` from leaves (T, *shape) to leaves (*shape).
      The update has the scale of the inner method's.

    Raises:
      ValueError: at trace time, from `update`, if the gradients are not those of `num_tasks`
        tasks, or if `inner` works on coordinates.

    Note:
      A task that is masked keeps its average; one that is seen for the first time starts from
      its own weight.

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

    def init():
        return CRMOGMState(
            weights=jnp.zeros(num_tasks, jnp.float32),
            seen=jnp.zeros(num_tasks, bool),
            inner_state=inner.init(()),
        )

    def update(gramian, state, /, *, key, losses, task_mask):
        del key  # `inner` has its own
        core.check_num_tasks("cr_mogm", num_tasks, task_mask.size)
        # A surgery of the identity is its weights.
        weights, inner_state = inner.update(
            jnp.eye(num_tasks, dtype=gramian.dtype),
            state.inner_state,
            losses=losses,
            task_mask=task_mask,
            gramian=gramian,
        )
        weights = cast(jax.Array, weights)
        averages = jnp.where(state.seen, decay * state.weights + (1 - decay) * weights, weights)
        averages = jnp.where(task_mask, averages, state.weights)
        return averages, CRMOGMState(averages, state.seen | task_mask, inner_state)

    return core.gradient_surgery(core.Weighting(init=init, update=update))
