"""SoftAdapt: weigh each task by how its loss has changed since the last step."""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from optax_surgery import checks, core


class SoftAdaptState(NamedTuple):
    """State of `softadapt`.

    Attributes:
      last_losses: (T,) the losses of a task's last step.
      seen: (T,) bool, whether a task has had a step yet.
    """

    last_losses: jax.Array
    seen: jax.Array


def softadapt(
    num_tasks: int,
    focus: float = 0.1,
    kind: Literal["plain", "normalized", "loss_weighted"] = "plain",
) -> core.Surgery:
    r"""SoftAdapt: more weight for the tasks whose losses rise, or fall more slowly.

    With the changes of the losses since the last step, :math:`s_i = L_i(t) - L_i(t - 1)`,

    .. math:: w_i = \frac{e^{\beta s_i}}{\sum_j e^{\beta s_j}}.

    Args:
      num_tasks: number of tasks T, at least 1.
      focus: beta, in [0, inf); 0.1 in the paper. With 0 all tasks count alike.
      kind: one of "plain", "normalized" (with :math:`s_i / \sum_j |s_j|` in the place of
        :math:`s_i`, so that the unit of the losses plays no part) and "loss_weighted" (with
        :math:`L_i` before each exponential, so that large losses count more).

    Returns:
      A `Surgery` from leaves `(T, *shape)` to leaves `(*shape)`.
      The update is a weighted mean: weights are above zero and add up to 1.

    Raises:
      ValueError: at trace time, from `update`, if `losses` are missing or the gradients are not
        those of `num_tasks` tasks; at once, for an argument out of its range.

    Note:
      In the first step of a task its loss counts as unchanged. A masked task keeps the loss of its
      last step. The authors' code takes the change over up to five steps.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_surgery as surgery
      >>> tx = surgery.softadapt(num_tasks=2, focus=1.0)
      >>> task_grads, state = jnp.array([[1.0, 0.0], [0.0, 1.0]]), tx.init(jnp.zeros(2))
      >>> for losses in jnp.array([[2.0, 2.0], [1.0, 2.0]]):
      ...     updates, state = tx.update(task_grads, state, losses=losses)
      >>> print(jnp.array_str(updates, precision=3))
      [0.269 0.731]

    References:
      Heydari, Thompson and Mehmood, `SoftAdapt: Techniques for Adaptive Loss Weighting of Neural
      Networks with Multi-Part Loss Functions <https://arxiv.org/abs/1912.12355>`_, 2019.
    """
    name = checks.arguments(
        softadapt,
        locals(),
        num_tasks="int [1, inf)",
        focus="[0, inf)",
        kind=("plain", "normalized", "loss_weighted"),
    )

    def init():
        return SoftAdaptState(jnp.zeros(num_tasks), jnp.zeros(num_tasks, bool))

    def update(tasks, state):
        task_mask, dtype = tasks.task_mask, state.last_losses.dtype
        losses = tasks.losses.astype(dtype)
        changes = jnp.where(task_mask & state.seen, losses - state.last_losses, 0)
        if kind == "normalized":
            total = jnp.sum(jnp.abs(changes))
            changes = changes / jnp.where(total > 0, total, 1)
        logits = jnp.asarray(focus, dtype) * changes
        if kind == "loss_weighted":
            logits = logits + jnp.log(losses)  # above zero, or that of a masked task, 1
        weights = jax.nn.softmax(jnp.where(task_mask, logits, jnp.finfo(dtype).min))
        last_losses = jnp.where(task_mask, losses, state.last_losses)
        return weights, SoftAdaptState(last_losses, state.seen | task_mask)

    usable = (lambda tasks: tasks.losses > 0) if kind == "loss_weighted" else None
    weighting = core.Weighting(init, update, usable=usable)
    return core.gradient_surgery(weighting, name=name, num_tasks=num_tasks)
