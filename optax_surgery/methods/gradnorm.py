"""GradNorm: learn weights under which tasks train at similar rates."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_surgery import checks, core, metrics

# Weights stay above zero, which the paper takes for granted.
LEAST_WEIGHT = 1e-3
# Ratios of losses stay where T of them can be added up.
LARGEST_RATIO = 1e30


class GradNormState(NamedTuple):
    """State of `gradnorm`.

    Attributes:
      task_weights: (T,) the learnt weights, which add up to T.
      optimizer_state: the leaves of the optimiser's state.
      initial_losses: (T,) the first loss of each task, 0 before.
    """

    task_weights: jax.Array
    optimizer_state: optax.OptState
    initial_losses: jax.Array


def gradnorm_loss(
    weights: jax.Array,
    norms: jax.Array,
    ratios: jax.Array,
    asymmetry: jax.Array | float,
    task_mask: jax.Array,
) -> jax.Array:
    """The distance of the norms of weighted gradients from their targets.

    Args:
      weights: (T,) weights, above zero.
      norms: (T,) norms of the task gradients.
      ratios: (T,) losses relative to the initial ones, not negative.
      asymmetry: exponent of the inverse training rates.
      task_mask: (T,) bool, False for tasks that are left out.

    Returns:
      () distance, to be differentiated in the weights: targets are constants.
    """
    active = task_mask.astype(norms.dtype)
    evenly = active / jnp.maximum(jnp.sum(active), 1)
    mean_ratio = jnp.sum(evenly * ratios)
    rates = jnp.where(mean_ratio > 0, ratios / jnp.where(mean_ratio > 0, mean_ratio, 1), 1)
    targets = jax.lax.stop_gradient(jnp.sum(evenly * weights * norms)) * rates**asymmetry
    return jnp.sum(jnp.where(task_mask, jnp.abs(weights * norms - targets), 0))


def gradnorm(
    num_tasks: int,
    asymmetry: float = 1.5,
    optimizer: optax.GradientTransformation | None = None,
) -> core.Surgery:
    r"""GradNorm: learns weights that give slow tasks longer gradients than fast ones.

    The update is :math:`\sum_i w_i g_i` with weights that begin at 1. After it, they take one step
    down the gradient of

    .. math::
      \sum_i \big| w_i \|g_i\| - \bar G\, r_i^{\alpha} \big|, \qquad
      \bar G = \frac1T \sum_i w_i \|g_i\|, \qquad
      r_i = \frac{L_i / L_i(0)}{\frac1T \sum_j L_j / L_j(0)},

    with the targets :math:`\bar G r_i^\alpha` as constants, and are scaled to add up to T again.

    Args:
      num_tasks: number of tasks T, at least 1.
      asymmetry: alpha in the paper, at least 0; the higher, the harder slow tasks are pushed.
        The paper has 1.5 for NYUv2 and 0.12 for its toy problem.
      optimizer: what steps the weights; `optax.adam(0.025)` by default, as in the paper.

    Returns:
      A `Surgery` from leaves `(T, *shape)` to leaves `(*shape)`.
      The update is a weighted sum; weights are above zero and add up to T.

    Raises:
      ValueError: at trace time, from `update`, if `losses` are missing or the gradients are not
        those of `num_tasks` tasks; at once, for an argument out of its range.

    Note:
      The paper takes the norms in the last shared layer only: pass the Gramian of its gradients
      as `gramian=` for that. Its Algorithm 1 does not say what becomes of a weight that a step
      takes below zero; here weights are at least 0.001 before they are scaled. L(0) is the
      loss of the first step in which a task takes part. Where tasks are masked, the weights of
      the others are scaled to add up to their number for the update.
      Losses have to be above zero: the task of one that is not has weight zero in that step,
      and is counted in the state.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_surgery as surgery
      >>> tx = surgery.gradnorm(num_tasks=2)
      >>> task_grads, losses = jnp.array([[1.0, 0.0], [0.0, 3.0]]), jnp.array([1.0, 1.0])
      >>> updates, state = tx.update(task_grads, tx.init(jnp.zeros(2)), losses=losses)
      >>> print(updates)
      [1. 3.]
      >>> weights = state.weighting_state.task_weights  # of the next step: less for the longer one
      >>> print([round(float(weight), 3) for weight in weights])
      [1.025, 0.975]

    References:
      Chen et al., `GradNorm: Gradient Normalization for Adaptive Loss Balancing in Deep Multitask
      Networks <https://arxiv.org/abs/1711.02257>`_, ICML 2018, Algorithm 1.
    """
    name = checks.arguments(
        gradnorm,
        locals(),
        num_tasks="int [1, inf)",
        asymmetry="[0, inf)",
        optimizer=optax.GradientTransformation,
    )
    learner = core.unnamed_state(optax.adam(0.025) if optimizer is None else optimizer, num_tasks)

    def init():
        weights = jnp.ones(num_tasks)
        return GradNormState(weights, learner.init(weights), jnp.zeros_like(weights))

    def update(tasks, state):
        task_mask, dtype = tasks.task_mask, state.task_weights.dtype
        losses = tasks.losses.astype(dtype)
        initial_losses = jnp.where(state.initial_losses > 0, state.initial_losses, losses)

        share = jnp.sum(jnp.where(task_mask, state.task_weights, 0))
        num_active = jnp.sum(task_mask).astype(dtype)
        weights = state.task_weights * num_active / jnp.where(share > 0, share, 1)
        slopes = jax.grad(gradnorm_loss)(
            weights,
            metrics.task_norms(tasks.gramian).astype(dtype),
            jnp.minimum(losses / initial_losses, LARGEST_RATIO),
            jnp.asarray(asymmetry, dtype),
            task_mask,
        )
        steps, optimizer_state = learner.update(slopes, state.optimizer_state, weights)
        moved = jnp.where(task_mask, jnp.maximum(weights + steps, LEAST_WEIGHT), 0)
        new_weights = moved * share / jnp.maximum(jnp.sum(moved), LEAST_WEIGHT)
        # What belongs to a masked task stays, also in the optimiser's state.
        new_state = jax.tree.map(
            lambda new, old: jnp.where(task_mask, new, old) if new.shape else new,
            GradNormState(new_weights, optimizer_state, initial_losses),
            state,
        )
        return weights, new_state

    weighting = core.Weighting(init, update, usable=lambda tasks: tasks.losses > 0)
    return core.gradient_surgery(weighting, name=name, num_tasks=num_tasks)
