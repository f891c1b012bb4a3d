"""MoCo: averaged gradients, and weights that step towards their min-norm point."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_surgery import checks, core, trees
from optax_surgery.algebra import simplex


class MoCoState(NamedTuple):
    """State of `moco`.

    Attributes:
      averages: pytree of leaves `(T, *param.shape)`, float32 or float64: y in the paper.
      relative_weights: (T,) T times the weights, lambda in the paper.
    """

    averages: optax.Updates
    relative_weights: jax.Array


def moco_weights(
    gramian: jax.Array,
    scale: jax.Array,
    weights: jax.Array,
    task_mask: jax.Array,
    learning_rate: jax.Array | float,
    regularization: jax.Array | float,
) -> jax.Array:
    """One projected gradient step of the weights towards the min-norm point.

    Args:
      gramian: (T, T) inner products of the averages times `scale`.
      scale: () power of two.
      weights: (T,) on the simplex.
      task_mask: (T,) bool.
      learning_rate: size of the step.
      regularization: rho, weight of the squared norm of the weights.

    Returns:
      (T,) weights on the simplex.
    """
    products = jnp.matmul(gramian, weights, precision=jax.lax.Precision.HIGHEST)
    # The projection ignores a common shift, and a step by 3 more than another leads to zero
    # whatever the weights were: so the true step, which may overflow, need not be known. The
    # bound in the middle keeps the compiler from squaring the scale.
    least = jnp.min(jnp.where(task_mask, products, jnp.max(products)))
    steps = learning_rate * jnp.where(task_mask, products - least, 0)
    steps = jnp.minimum(jnp.minimum(steps / scale, 1e30) / scale, 3)
    shrunk = weights * (1 - learning_rate * regularization)
    return simplex.project(shrunk - steps, task_mask)


def moco(
    num_tasks: int,
    tracking_rate: float = 0.5,
    learning_rate: float = 0.1,
    regularization: float = 0.0,
    *,
    tracking_power: float = 0.5,
    learning_rate_power: float = 0.5,
) -> core.Surgery:
    r"""MoCo: averages the task gradients, and weights the averages by a slow min-norm solver.

    .. math::
      y_i \leftarrow y_i - \beta_k (y_i - g_i), \qquad
      \lambda \leftarrow \Pi_\Delta \big( \lambda - \gamma_k (Y Y^\top + \rho I) \lambda \big),
      \qquad d = Y^\top \lambda

    in step k, with the rows :math:`y_i` of Y, the projection on the simplex
    :math:`\Pi_\Delta`, :math:`\beta_k = \beta / k^{\sigma_\beta}` and
    :math:`\gamma_k = \gamma / k^{\sigma_\gamma}`; Y = 0 and equal weights at first. The averages
    take the bias out of the min-norm point that the noise of a mini-batch has.

    Args:
      num_tasks: number of tasks T, at least 1.
      tracking_rate: beta in the paper, in (0, 1].
      learning_rate: gamma in the paper, above 0, in the unit of one over a squared gradient.
      regularization: rho in the paper, at least 0.
      tracking_power: how fast beta falls with the step, at least 0; 0 for a constant.
      learning_rate_power: how fast gamma falls with the step, at least 0; 0 for a constant.

    Returns:
      A `Surgery` from leaves `(T, *shape)` to leaves `(*shape)`.
      The update is a weighted mean over tasks of the averages, which are small at first. Its
      state holds one number per coordinate and task.

    Raises:
      ValueError: at trace time, from `update`, if the gradients are not those of `num_tasks`
        tasks, or a Gramian is given; at once, for an argument out of its range.

    Note:
      As in the paper, gradients are taken as they are: how fast the weights move depends on their
      scale. LibMTL, whose defaults these are, averages
      :math:`L_i g_i / \|g_i\|` and puts a softmax, which draws towards equal
      weights, in the place of the projection. The authors' code, as here, moves the weights by
      the new averages, and updates by the new weights. A masked task keeps its average and its
      relative weight.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_surgery as surgery
      >>> tx = surgery.moco(num_tasks=2, learning_rate=0.25)
      >>> task_grads = jnp.array([[4.0, 0.0], [0.0, 2.0]])
      >>> updates, state = tx.update(task_grads, tx.init(jnp.zeros(2)))
      >>> updates
      Array([0.625 , 0.6875], dtype=float32)

    References:
      Fernando et al., `Mitigating Gradient Bias in Multi-objective Learning: A Provably
      Convergent Approach <https://arxiv.org/abs/2210.12624>`_, ICLR 2023, Algorithm 1.
    """

    name = checks.arguments(
        moco,
        locals(),
        num_tasks="int [1, inf)",
        tracking_rate="(0, 1]",
        learning_rate="(0, inf)",
        regularization="[0, inf)",
        tracking_power="[0, inf)",
        learning_rate_power="[0, inf)",
    )

    def init(params):
        return MoCoState(trees.zeros_per_task(params, num_tasks), jnp.ones(num_tasks))

    def update(tasks, task_updates, state):
        task_mask, dtype = tasks.task_mask, tasks.dtype

        def falling(rate, power):
            fall = (tasks.step + 1).astype(dtype) ** jnp.asarray(power, dtype)
            return jnp.asarray(rate, dtype) / fall

        rates = jnp.where(task_mask, falling(tracking_rate, tracking_power), 0)
        averages = trees.move_tasks(rates, state.averages, task_updates)
        present = trees.mask_tasks(task_mask, averages)
        gramian, scale = trees.gramian_and_scale(present)
        weights = moco_weights(
            gramian,
            scale,
            simplex.shares(state.relative_weights.astype(dtype), task_mask),
            task_mask,
            falling(learning_rate, learning_rate_power),
            jnp.asarray(regularization, dtype),
        )
        relative_weights = simplex.redistribute(state.relative_weights, weights, task_mask)
        return trees.combine(weights, present), MoCoState(averages, relative_weights)

    return core.stacked_surgery(core.StackedRule(init, update), name=name, num_tasks=num_tasks)
