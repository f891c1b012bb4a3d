"""GradNorm: learn weights under which tasks train at similar rates."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_surgery import core, metrics

# Weights stay above zero, which the paper takes for granted.
LEAST_WEIGHT = 1e-3
LARGEST_RATIO = 1e30


class GradNormState(NamedTuple):
    """State of `gradnorm`.

    Attributes:
      task_weights: (T,) the learnt weights, which add up to T.
      optimizer_state: the leaves of the optimiser's state.
      initial_losses: (T,) the first loss above zero of each task, 0 before.
    """

    task_weights: jax.Array
    optimizer_state: optax.OptState
    initial_losses: jax.Array


def gradnorm_loss(
    weights: jax.Array,
    norms: jax.Array,
    ratios: jax.Array,
    asymmetry: float,
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
    evenly = core.task_preference(None, task_mask).astype(norms.dtype)
    mean_ratio = jnp.sum(evenly * ratios)
    rates = jnp.where(mean_ratio > 0, ratios / jnp.where(mean_ratio > 0, mean_ratio, 1), 1)
    targets = jax.lax.stop_gradient(jnp.sum(evenly * weights * norms)) * rates**asymmetry
    return jnp.sum(jnp.where(task_mask, jnp.abs(weights * norms - targets), 0))


def gradnorm(
    num_tasks: int,
    asymmetry: float = 1.5,
    optimizer: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""GradNorm: learns weights that give slow tasks longer gradients than fast ones.

    The update is :math:`\sum_i w_i g_i` with weights that begin at 1. After it, they take one step
    down the gradient of

    .. math::
      \sum_i \big| w_i \|g_i\| - \bar G\, r_i^{\alpha} \big|, \qquad
      \bar G = \frac1T \sum_i w_i \|g_i\|, \qquad
      r_i = \frac{L_i / L_i(0)}{\frac1T \sum_j L_j / L_j(0)},

    with the targets :math:`\bar G r_i^\alpha` as constants, and are scaled to add up to T again.

    Args:
      num_tasks: number of tasks T.
      asymmetry: alpha in the paper, not negative; the higher, the harder slow tasks are pushed.
        The paper has 1.5 for NYUv2 and 0.12 for its toy problem.
      optimizer: what steps the weights; `optax.adam(0.025)` by default, as in the paper.

    Returns:
      An `optax.GradientTransformationExtraArgs` from leaves (T, *shape) to leaves (*shape).
      The update is a weighted sum; weights are above zero and add up to T.

    Raises:
      ValueError: at trace time, from `update`, if `losses` are missing or the gradients are not
        those of `num_tasks` tasks.

    Note:
      The paper takes the norms in the last shared layer only: pass the Gramian of its gradients
      as `gramian=` for that. Its Algorithm 1 does not say what becomes of a weight that a step
      takes below zero; here weights are at least 0.001 before they are scaled. L(0) is the
      loss of the first step in which a task takes part (with a loss above zero: until then
      L / L(0) is 1), and losses below zero count as zero. Where tasks are masked, the weights of
      the others are scaled to add up to their number for the update.

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
    shape = jax.ShapeDtypeStruct((num_tasks,), jnp.float32)
    learner = core.unnamed_state(optax.adam(0.025) if optimizer is None else optimizer, shape)

    def init():
        weights = jnp.ones(shape.shape, shape.dtype)
        return GradNormState(weights, learner.init(weights), jnp.zeros_like(weights))

    def update(gramian, state, /, *, key, losses, task_mask):
        del key
        losses = jnp.maximum(core.needed("gradnorm", losses=losses), 0)
        core.check_num_tasks("gradnorm", num_tasks, task_mask.size)
        initial_losses = jnp.where(state.initial_losses > 0, state.initial_losses, losses)
        known = initial_losses > 0
        ratios = jnp.where(known, losses / jnp.where(known, initial_losses, 1), 1)

        share = jnp.sum(jnp.where(task_mask, state.task_weights, 0))
        weights = state.task_weights * jnp.sum(task_mask) / jnp.where(share > 0, share, 1)
        slopes = jax.grad(gradnorm_loss)(
            weights,
            metrics.task_norms(gramian),
            jnp.minimum(ratios, LARGEST_RATIO),
            asymmetry,
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

    return core.gradient_surgery(core.Weighting(init=init, update=update))
