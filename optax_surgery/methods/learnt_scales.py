"""Uncertainty weighting, IMTL-L and IMTL: a learnt scale for the loss of each task."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_surgery import checks, core
from optax_surgery.algebra import linear

# Scales stay between exp(-60) and exp(60), and their gradients within what Adam can square.
LARGEST_LOG_SCALE = 60.0
LARGEST_SLOPE = 1e15


class LearntScalesState(NamedTuple):
    """State of `uncertainty_weighting`, `imtl_l` and `imtl`.

    Attributes:
      log_scales: (T,) the learnt number of each task, s.
      optimizer_state: the leaves of the optimiser's state.
    """

    log_scales: jax.Array
    optimizer_state: optax.OptState


def uncertainty_loss(losses: jax.Array, log_scales: jax.Array) -> jax.Array:
    """The total loss of uncertainty weighting, log_scales being logarithms of variances."""
    return jnp.sum(0.5 * jnp.exp(-log_scales) * losses + 0.5 * log_scales)


def impartial_loss(losses: jax.Array, log_scales: jax.Array) -> jax.Array:
    """The total loss of IMTL-L."""
    return jnp.sum(jnp.exp(log_scales) * losses - log_scales)


def impartial_weights(gramian: jax.Array, scales: jax.Array) -> jax.Array:
    """IMTL's weights: those of IMTL-G for gradients times `scales`, times `scales`.

    Args:
      gramian: (T, T) inner products; rows of absent tasks are zero.
      scales: (T,) scales of the gradients, above zero.

    Returns:
      (T,) weights, possibly negative.
    """
    # Scales leave cosines as they are. IMTL-G would divide this by them, and normalise.
    weights = linear.least_squares_of_cosines(gramian, jnp.ones_like(scales, gramian.dtype))
    total = jnp.sum(weights / scales)
    return weights / jnp.where(total == 0, 1, total)


def uncertainty_weighting(
    num_tasks: int, optimizer: optax.GradientTransformation | None = None
) -> core.Surgery:
    r"""Uncertainty weighting: weights each task by the inverse of its learnt variance.

    The total loss with a learnt :math:`s_i = \log \sigma_i^2` for each task is

    .. math::
      \sum_i \tfrac12 e^{-s_i} L_i + \tfrac12 s_i, \qquad
      w_i = \tfrac12 e^{-s_i}, \qquad
      \frac{\partial}{\partial s_i} = \tfrac12 (1 - e^{-s_i} L_i).

    All s begin at 0, and each step updates them by their gradient after its weights are taken.
    They tend to :math:`\log L_i`, where the update is half that of `scale_invariant`.

    Args:
      num_tasks: number of tasks T, at least 1.
      optimizer: what steps s; `optax.adam(0.025)` by default.

    Returns:
      A `Surgery` from leaves `(T, *shape)` to leaves `(*shape)`.
      The update is a weighted sum, at first half the sum of the gradients; weights are above
      zero.

    Raises:
      ValueError: at trace time, from `update`, if `losses` are missing or the gradients are not
        those of `num_tasks` tasks; at once, for an argument out of its range.

    Note:
      The paper steps s with the network's own optimiser; the rate here is that of this method
      in the paper of `gradnorm`. For a cross-entropy the paper has :math:`e^{-s} L`: double that
      loss. s stays within 60 of zero.
      Losses have to be above zero: the task of one that is not has weight zero in that step,
      and is counted in the state.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_surgery as surgery
      >>> tx = surgery.uncertainty_weighting(num_tasks=2)
      >>> task_grads, losses = jnp.array([[1.0, 0.0], [0.0, 1.0]]), jnp.array([0.1, 10.0])
      >>> updates, state = tx.update(task_grads, tx.init(jnp.zeros(2)), losses=losses)
      >>> updates, state = tx.update(task_grads, state, losses=losses)
      >>> print([round(float(weight), 3) for weight in updates])
      [0.513, 0.488]

    References:
      Kendall et al., `Multi-Task Learning Using Uncertainty to Weigh Losses for Scene Geometry
      and Semantics <https://arxiv.org/abs/1705.07115>`_, CVPR 2018, Section 3.
    """
    name = checks.arguments(
        uncertainty_weighting,
        locals(),
        num_tasks="int [1, inf)",
        optimizer=optax.GradientTransformation,
    )
    return _learnt_scales(
        name, num_tasks, optimizer, uncertainty_loss, lambda tasks, weights: weights
    )


def imtl_l(num_tasks: int, optimizer: optax.GradientTransformation | None = None) -> core.Surgery:
    r"""IMTL-L: weights each task by a learnt scale that makes all losses equal.

    The total loss with a learnt :math:`s_i` for each task is

    .. math::
      \sum_i e^{s_i} L_i - s_i, \qquad
      w_i = e^{s_i}, \qquad
      \frac{\partial}{\partial s_i} = e^{s_i} L_i - 1.

    All s begin at 0, and each step updates them by their gradient after its weights are taken.
    They tend to :math:`-\log L_i`, where the update is that of `scale_invariant`.

    Args:
      num_tasks: number of tasks T, at least 1.
      optimizer: what steps s; `optax.adam(0.025)` by default.

    Returns:
      A `Surgery` from leaves `(T, *shape)` to leaves `(*shape)`.
      The update is a weighted sum, at first the sum of the gradients; weights are above zero.

    Raises:
      ValueError: at trace time, from `update`, if `losses` are missing or the gradients are not
        those of `num_tasks` tasks; at once, for an argument out of its range.

    Note:
      The paper steps s with the network's own optimiser. It balances heads by this, and shared
      parameters by `imtl`. s stays within 60 of zero.
      Losses have to be above zero: the task of one that is not has weight zero in that step,
      and is counted in the state.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_surgery as surgery
      >>> tx = surgery.imtl_l(num_tasks=2)
      >>> task_grads, losses = jnp.array([[1.0, 0.0], [0.0, 1.0]]), jnp.array([0.1, 10.0])
      >>> updates, state = tx.update(task_grads, tx.init(jnp.zeros(2)), losses=losses)
      >>> updates, state = tx.update(task_grads, state, losses=losses)
      >>> print([round(float(weight), 3) for weight in updates])
      [1.025, 0.975]

    References:
      Liu et al., `Towards Impartial Multi-task Learning
      <https://openreview.net/forum?id=IMPnRXEWpvr>`_, ICLR 2021, Section 3.2.
    """
    name = checks.arguments(
        imtl_l,
        locals(),
        num_tasks="int [1, inf)",
        optimizer=optax.GradientTransformation,
    )
    return _learnt_scales(
        name, num_tasks, optimizer, impartial_loss, lambda tasks, weights: weights
    )


def imtl(num_tasks: int, optimizer: optax.GradientTransformation | None = None) -> core.Surgery:
    r"""IMTL: IMTL-G's equal projections, on the gradients of losses that IMTL-L made equal.

    With the scales :math:`e^{s_i}` of `imtl_l`, the scaled gradients
    :math:`h_i = e^{s_i} g_i` and the weights :math:`\alpha` of `imtl_g` for them,

    .. math:: w_i = \alpha_i e^{s_i}, \qquad \sum_i \alpha_i = 1.

    As equal projections do not depend on the lengths of the gradients, the direction is that of
    `imtl_g`; the scales change the length of the update.

    Args:
      num_tasks: number of tasks T, at least 1.
      optimizer: what steps s; `optax.adam(0.025)` by default.

    Returns:
      A `Surgery` from leaves `(T, *shape)` to leaves `(*shape)`.
      The update is a weighted mean of the scaled gradients; weights may be negative. The first
      one is that of `imtl_g`.

    Raises:
      ValueError: at trace time, from `update`, if `losses` are missing or the gradients are not
        those of `num_tasks` tasks; at once, for an argument out of its range.

    Note:
      In the paper heads have the gradients of the scaled losses: in an `optax.partition`, use
      `imtl_l(num_tasks)` for them, whose scales are the same. The projections are on the
      gradients of the shared features there, and on those of the parameters here. What is said
      of signs and of dependent gradients in `imtl_g`, and of s and of losses in `imtl_l`, holds
      here too.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_surgery as surgery
      >>> tx = surgery.imtl(num_tasks=2)
      >>> task_grads, losses = jnp.array([[1.0, 0.0], [0.0, 3.0]]), jnp.array([0.1, 10.0])
      >>> updates, state = tx.update(task_grads, tx.init(jnp.zeros(2)), losses=losses)
      >>> print(updates)
      [0.75 0.75]

    References:
      Liu et al., `Towards Impartial Multi-task Learning
      <https://openreview.net/forum?id=IMPnRXEWpvr>`_, ICLR 2021, Algorithm 1.
    """
    name = checks.arguments(
        imtl,
        locals(),
        num_tasks="int [1, inf)",
        optimizer=optax.GradientTransformation,
    )

    def weights_of(tasks, scales):
        return impartial_weights(tasks.gramian, scales.astype(tasks.dtype))

    return _learnt_scales(name, num_tasks, optimizer, impartial_loss, weights_of)


def _learnt_scales(
    name: str,
    num_tasks: int,
    optimizer: optax.GradientTransformation | None,
    total_loss: Callable[[jax.Array, jax.Array], jax.Array],
    weights_of: Callable[[core.Tasks, jax.Array], jax.Array],
) -> core.Surgery:
    """Learns one number per task by the slope of a total loss, which also has the weights."""
    learner = core.unnamed_state(optax.adam(0.025) if optimizer is None else optimizer, num_tasks)

    def init():
        log_scales = jnp.zeros(num_tasks)
        return LearntScalesState(log_scales, learner.init(log_scales))

    def update(tasks, state):
        losses = tasks.losses.astype(state.log_scales.dtype)
        weights, slopes = jax.grad(total_loss, argnums=(0, 1))(losses, state.log_scales)
        steps, optimizer_state = learner.update(
            jnp.clip(slopes, -LARGEST_SLOPE, LARGEST_SLOPE), state.optimizer_state, state.log_scales
        )
        log_scales = jnp.clip(state.log_scales + steps, -LARGEST_LOG_SCALE, LARGEST_LOG_SCALE)
        # What belongs to a masked task stays, also in the optimiser's state.
        new_state = jax.tree.map(
            lambda new, old: jnp.where(tasks.task_mask, new, old) if new.shape else new,
            LearntScalesState(log_scales, optimizer_state),
            state,
        )
        return weights_of(tasks, weights), new_state

    # A loss of zero or less would take its scale to the bound.
    weighting = core.Weighting(init, update, usable=lambda tasks: tasks.losses > 0)
    return core.gradient_surgery(weighting, name=name, num_tasks=num_tasks)
