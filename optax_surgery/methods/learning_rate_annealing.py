"""Learning-rate annealing: weigh each loss until its gradient is as large as the residual's."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_surgery import checks, core, trees


class LearningRateAnnealingState(NamedTuple):
    """State of `learning_rate_annealing`.

    Attributes:
      mean_weights: (T,) averages of the weights, 1 before the first step and for the residual.
    """

    mean_weights: jax.Array


def learning_rate_annealing_ratios(
    task_updates: optax.Updates, residual: int
) -> tuple[jax.Array, jax.Array]:
    """How much larger the residual's gradient is than each of the others.

    Args:
      task_updates: pytree of leaves `(T, *shape)`.
      residual: index of the task that the others are compared with.

    Returns:
      (T,) the largest absolute coordinate of the residual's gradient over the mean one of each,
      and (T,) bool, whether there is such a ratio: not of a gradient that is zero or not finite.
    """
    peaks = trees.largest_coordinates(task_updates)
    present = (peaks > 0) & jnp.isfinite(peaks)
    peaks = jnp.where(present, peaks, 1)

    # Relative to the largest coordinate, as sums need not fit the dtype. Divided first: of absolute
    # values that both reductions take, the compiler would keep a copy.
    def relative(leaf):
        return jnp.abs(leaf.astype(peaks.dtype) / trees.along_tasks(peaks, leaf))

    size = sum(leaf.size for leaf in jax.tree.leaves(task_updates)) / peaks.size
    means = trees.sum_coordinates(jax.tree.map(relative, task_updates)) / size
    largest = jnp.finfo(peaks.dtype).max
    ratios = jnp.minimum(peaks[residual] / peaks, largest) / jnp.where(present, means, 1)
    return jnp.minimum(ratios, largest), present & present[residual]


def learning_rate_annealing(residual: int, num_tasks: int, decay: float = 0.9) -> core.Surgery:
    r"""Weighs each loss by how small its gradient is beside the residual's, averaged over steps.

    With the gradient :math:`g_r` of the residual, and coordinates k,

    .. math::
      \hat\lambda_i = \frac{\max_k |g_{r,k}|}{\mathrm{mean}_k |g_{i,k}|}, \qquad
      \lambda_i \leftarrow \alpha \lambda_i + (1 - \alpha) \hat\lambda_i, \qquad
      d = g_r + \sum_{i \ne r} \lambda_i g_i.

    It is how physics-informed networks keep the boundary and the data from being forgotten beside a
    residual with large derivatives.

    Args:
      residual: index r of the task whose weight is 1, in [0, num_tasks). Of losses in a dict,
        `task_names(losses)` says which index a name has.
      num_tasks: number of tasks T, at least 1.
      decay: alpha, in [0, 1); with 0 weights are those of this step.

    Returns:
      A `Surgery` from leaves `(T, *shape)` to leaves `(*shape)`.
      The update is a weighted sum: weights are above zero, 1 for the residual, and otherwise mostly
      far above 1, as they compare a maximum with a mean.

    Raises:
      ValueError: at trace time, from `update`, if the gradients are not those of `num_tasks` tasks,
        or a Gramian is given; at once, for an argument out of its range.

    Note:
      A masked task, and one whose gradient is zero, keeps its average; and so do all where the
      residual is masked or its gradient zero. In the authors' code the gradients below the bar
      carry their weights already, so that these tend to the root of the ratio above; the mean is
      that over layers of the means over their kernels, without biases; and averages move in every
      tenth step only, which takes about as long as `decay=0.99` in every step.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_surgery as surgery
      >>> tx = surgery.learning_rate_annealing(residual=0, num_tasks=2, decay=0.0)
      >>> updates, _ = tx.update(jnp.array([[4.0, 0.0], [1.0, 3.0]]), tx.init(jnp.zeros(2)))
      >>> updates
      Array([6., 6.], dtype=float32)

    References:
      Wang, Teng and Perdikaris, `Understanding and Mitigating Gradient Flow Pathologies in
      Physics-Informed Neural Networks <https://arxiv.org/abs/2001.04536>`_, SIAM Journal on
      Scientific Computing 2021, Algorithm 1.
    """
    name = checks.arguments(
        learning_rate_annealing,
        locals(),
        residual="int [0, num_tasks)",
        num_tasks="int [1, inf)",
        decay="[0, 1)",
    )

    def init(params):
        return LearningRateAnnealingState(jnp.ones(num_tasks))

    def update(tasks, task_updates, state):
        ratios, known = learning_rate_annealing_ratios(task_updates, residual)
        rate = jnp.asarray(decay, state.mean_weights.dtype)
        averages = rate * state.mean_weights + (1 - rate) * ratios.astype(rate.dtype)
        averages = jnp.where(known, averages, state.mean_weights).at[residual].set(1)
        return trees.combine(averages, task_updates), LearningRateAnnealingState(averages)

    return core.stacked_surgery(core.StackedRule(init, update), name=name, num_tasks=num_tasks)
