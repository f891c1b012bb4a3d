"""SDMGrad: a min-norm point of the expected gradients, near a preferred direction."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from optax_surgery import checks, core
from optax_surgery.algebra import simplex


class SDMGradState(NamedTuple):
    """State of `sdmgrad`.

    Attributes:
      relative_weights: (T,) T times the weights, w in the paper.
    """

    relative_weights: jax.Array


def sdmgrad_weights(
    gramian: jax.Array,
    weights: jax.Array,
    preference: jax.Array,
    task_mask: jax.Array,
    *,
    regularization: jax.Array | float,
    learning_rate: jax.Array | float,
    momentum: jax.Array | float,
    num_iterations: int,
) -> jax.Array:
    """SDMGrad's weights w after the steps of one update.

    Args:
      gramian: (T, T) inner products of the gradients of two batches; masked ones are zero.
      weights: (T,) on the simplex, to start from.
      preference: (T,) weights of the preferred direction.
      task_mask: (T,) bool.
      regularization: lambda in the paper.
      learning_rate: size of a step, for gradients of norm 1.
      momentum: share that the velocity keeps in a step.
      num_iterations: number of steps.

    Returns:
      (T,) weights on the simplex.
    """
    roots = jnp.sqrt(jnp.maximum(jnp.diagonal(gramian), 0))
    scale = jnp.sum(roots) / jnp.maximum(jnp.sum(task_mask, dtype=roots.dtype), 1)
    safe = jnp.where(scale > 0, scale, 1)
    normalised = jnp.where(scale > 0, gramian / safe / safe, 0)

    def step(carry, _):
        weights, velocity = carry
        target = weights + regularization * preference
        gradient = jnp.matmul(normalised, target, precision=lax.Precision.HIGHEST)
        velocity = momentum * velocity + gradient
        return (simplex.project(weights - learning_rate * velocity, task_mask), velocity), None

    start = weights, jnp.zeros_like(weights)
    (weights, _), _ = lax.scan(step, start, length=num_iterations)
    return weights


def sdmgrad(
    num_tasks: int,
    regularization: float = 0.3,
    preference: core.PerTask | None = None,
    *,
    learning_rate: float = 10.0,
    momentum: float = 0.5,
    num_iterations: int = 20,
) -> core.Surgery:
    r"""SDMGrad: weights the task gradients by a min-norm point near a preferred direction.

    With the gradients :math:`J_1` and :math:`J_2` of two batches in their rows,
    :math:`A = J_1 J_2^\top / s^2` and a preference :math:`\tilde w`, it takes S steps of
    projected gradient descent with momentum,

    .. math::
      w \leftarrow \Pi_\Delta \big( w - \eta A (w + \lambda \tilde w) \big), \qquad
      d = \frac{J^\top (w + \lambda \tilde w)}{1 + \lambda}

    with the projection on the simplex :math:`\Pi_\Delta`, from the weights of the last step, equal
    ones at first. The scale s is the mean of the square roots of the diagonal of
    :math:`J_1 J_2^\top`. A larger lambda keeps the update nearer to
    :math:`J^\top \tilde w`; with 0 it is the min-norm point of MGDA that is looked for.

    Pass `gramian=surgery.gramian(task_grads_1, task_grads_2)` to `update`, and the gradients of a
    third batch as task gradients.

    Args:
      num_tasks: number of tasks T, at least 1.
      regularization: lambda in the paper, at least 0.
      preference: weights of the preferred direction, (T,) or a tree of any numbers of sum 1; 1/T
        each by default (over the tasks that are not masked).
      learning_rate: eta, the size of a step, above 0.
      momentum: share that the velocity keeps, in [0, 1). It starts from zero in every update.
      num_iterations: S in the paper, number of steps, at least 1.

    Returns:
      A `Surgery` from leaves `(T, *shape)` to leaves `(*shape)`.
      The update is a weighted mean over tasks. It needs the extra argument `gramian`.

    Raises:
      ValueError: at trace time, from `update`, if the gradients are not those of `num_tasks`
        tasks, the Gramian is missing or of one batch, or `preference` has not one entry per task;
        at once, for an argument out of its range.

    Note:
      Defaults are those of the authors' runs; their class has a lambda of 0.6, and multiplies the
      update by T before it clips it to norm 1. Their three batches share one buffer, so that all
      gradients are those of the last. The momentum and the scale s are from their code; entries
      below zero on the diagonal, which two batches may give, count as zero, where they take
      the root of them. If no entry is above zero the weights stay as they are. At this learning
      rate the steps may go to and fro between corners of the simplex and rounding errors grow
      with them (in float32 above 1e-3 of the update in 3 of 200 draws): it is no exact solver.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_surgery as surgery
      >>> tx = surgery.sdmgrad(num_tasks=2, learning_rate=0.5)
      >>> first = jnp.array([[2.0, 0.0], [0.0, 1.0]])
      >>> cross = surgery.gramian(first, first)
      >>> updates, state = tx.update(first, tx.init(jnp.zeros(2)), gramian=cross)
      >>> print(updates.round(3))
      [0.4 0.8]

    References:
      Xiao, Ban and Ji, `Direction-oriented Multi-objective Learning: Simple and Provable
      Stochastic Algorithms <https://arxiv.org/abs/2305.18409>`_, NeurIPS 2023, Algorithm 1.
    """
    name = checks.arguments(
        sdmgrad,
        locals(),
        num_tasks="int [1, inf)",
        regularization="[0, inf)",
        preference="per task (-inf, inf)",
        learning_rate="(0, inf)",
        momentum="[0, 1)",
        num_iterations="int [1, inf)",
    )

    def init():
        return SDMGradState(jnp.ones(num_tasks))

    def update(tasks, state):
        preferred = tasks.preference(preference)
        share = jnp.asarray(regularization, tasks.dtype)
        weights = sdmgrad_weights(
            tasks.given_gramian,
            simplex.shares(state.relative_weights.astype(tasks.dtype), tasks.task_mask),
            preferred,
            tasks.task_mask,
            regularization=share,
            learning_rate=jnp.asarray(learning_rate, tasks.dtype),
            momentum=jnp.asarray(momentum, tasks.dtype),
            num_iterations=num_iterations,
        )
        relative_weights = simplex.redistribute(state.relative_weights, weights, tasks.task_mask)
        return (weights + share * preferred) / (1 + share), SDMGradState(relative_weights)

    return core.gradient_surgery(core.Weighting(init, update), name=name, num_tasks=num_tasks)
