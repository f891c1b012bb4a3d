"""MoDo: weights that step towards the min-norm point of the expected gradients."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from optax_surgery import checks, core
from optax_surgery.algebra import simplex


class MoDoState(NamedTuple):
    """State of `modo`.

    Attributes:
      relative_weights: (T,) T times the weights, lambda in the paper.
    """

    relative_weights: jax.Array


def modo_weights(
    gramian: jax.Array,
    weights: jax.Array,
    task_mask: jax.Array,
    learning_rate: jax.Array | float,
    regularization: jax.Array | float,
) -> jax.Array:
    """One projected gradient step of the weights.

    Args:
      gramian: (T, T) inner products of the gradients of two batches.
      weights: (T,) on the simplex.
      task_mask: (T,) bool.
      learning_rate: size of the step.
      regularization: rho, weight of the squared norm of the weights.

    Returns:
      (T,) weights on the simplex.
    """
    products = jnp.matmul(gramian, weights, precision=jax.lax.Precision.HIGHEST)
    gradient = products + regularization * weights
    return simplex.project(weights - learning_rate * gradient, task_mask)


def modo(num_tasks: int, learning_rate: float = 0.1, regularization: float = 0.1) -> core.Surgery:
    r"""MoDo: weights the task gradients by a slow min-norm solver on two independent batches.

    With the gradients :math:`J_1` and :math:`J_2` of two batches in their rows,

    .. math::
      \lambda \leftarrow \Pi_\Delta \big( \lambda
        - \gamma (J_1 J_2^\top \lambda + \rho \lambda) \big), \qquad d = J^\top \lambda

    with the projection on the simplex :math:`\Pi_\Delta`, and equal weights at first.
    :math:`J_1 J_2^\top` has the Gramian of the expected gradients for its mean, which that of one
    batch has not.

    Pass `gramian=surgery.gramian(task_grads_1, task_grads_2)` to `update`, and as task gradients
    the mean of the two, as in the paper, or those of a third batch.

    Args:
      num_tasks: number of tasks T, at least 1.
      learning_rate: gamma in the paper, above 0, in the unit of one over a squared gradient.
      regularization: rho in the paper, at least 0.

    Returns:
      A `Surgery` from leaves `(T, *shape)` to leaves `(*shape)`.
      The update is a weighted mean over tasks. It needs the extra argument `gramian`.

    Raises:
      ValueError: at trace time, from `update`, if the gradients are not those of `num_tasks`
        tasks, or the Gramian is missing or of one batch; at once, for an argument out of its range.

    Note:
      How fast the weights move depends on the scale of the gradients. The authors' code updates by
      the sum of both batches, twice the mean; LibMTL has a learning rate of 0.001 for the
      weights. A masked task keeps its relative weight.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_surgery as surgery
      >>> tx = surgery.modo(num_tasks=2, learning_rate=0.25, regularization=0.0)
      >>> first = jnp.array([[2.0, 0.0], [0.0, 1.0]])
      >>> second = jnp.array([[2.0, 1.0], [0.0, 1.0]])
      >>> cross = surgery.gramian(first, second)
      >>> state = tx.init(jnp.zeros(2))
      >>> updates, state = tx.update((first + second) / 2, state, gramian=cross)
      >>> updates
      Array([0.75  , 0.8125], dtype=float32)

    References:
      Chen et al., `Three-Way Trade-Off in Multi-Objective Learning: Optimization,
      Generalization and Conflict-Avoidance <https://arxiv.org/abs/2305.20057>`_, NeurIPS 2023
      and JMLR 2024, Algorithm 1.
    """
    name = checks.arguments(
        modo,
        locals(),
        num_tasks="int [1, inf)",
        learning_rate="(0, inf)",
        regularization="[0, inf)",
    )

    def init():
        return MoDoState(jnp.ones(num_tasks))

    def update(tasks, state):
        weights = modo_weights(
            tasks.given_gramian,
            simplex.shares(state.relative_weights.astype(tasks.dtype), tasks.task_mask),
            tasks.task_mask,
            jnp.asarray(learning_rate, tasks.dtype),
            jnp.asarray(regularization, tasks.dtype),
        )
        relative_weights = simplex.redistribute(state.relative_weights, weights, tasks.task_mask)
        return weights, MoDoState(relative_weights)

    return core.gradient_surgery(core.Weighting(init, update), name=name, num_tasks=num_tasks)
