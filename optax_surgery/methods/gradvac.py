"""GradVac: turn each task gradient towards the cosines that pairs of tasks usually have."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from optax_surgery import checks, core


class GradVacState(NamedTuple):
    """State of `gradvac`.

    Attributes:
      targets: (T, T) averages of the cosines that were met, the goals of the next step.
    """

    targets: jax.Array


def gradvac_weights(
    gramian: jax.Array, orders: jax.Array, targets: jax.Array, decay: jax.Array | float
) -> tuple[jax.Array, jax.Array]:
    """GradVac's weights for given orders, and the averages after them.

    Args:
      gramian: (T, T) inner products; rows of absent tasks are zero.
      orders: (T, T - 1) int, row i the order in which task i meets the others.
      targets: (T, T) goals of the cosines.
      decay: share that an average keeps of its value.

    Returns:
      (T,) weights, each at least 1, and the new targets.
    """
    tasks = jnp.arange(gramian.shape[0])
    norms = jnp.sqrt(jnp.diagonal(gramian))
    present = norms > 0
    # Row i of `coefficients` holds those of the current gradient of task i.
    coefficients = jnp.eye(gramian.shape[0], dtype=gramian.dtype)
    squared_lengths = jnp.diagonal(gramian)
    least_squared_lengths = squared_lengths * tasks.size * jnp.finfo(gramian.dtype).eps

    def turn(carry, others):
        coefficients, squared_lengths, targets = carry
        met = others[:, None] == tasks[None, :]
        # What is left of a gradient may be rounding error, whose direction means nothing.
        left = squared_lengths > least_squared_lengths
        both = present & present[others] & left
        other_norms = jnp.where(both, norms[others], 1)
        lengths = jnp.where(both, jnp.sqrt(squared_lengths), 1)

        products = jnp.sum(coefficients * gramian[others], axis=1)
        cosines = jnp.clip(products / lengths / other_norms, -1, 1)
        goals = targets[tasks, others]
        sine, goal_sine = jnp.sqrt(1 - cosines**2), jnp.sqrt(1 - goals**2)
        steps = lengths * (goals * sine - cosines * goal_sine) / (other_norms * goal_sine)
        steps = jnp.where(both & (cosines < goals), steps, 0)

        coefficients = coefficients + jnp.where(met, steps[:, None], 0)
        squared_lengths = squared_lengths + steps * (2 * products + steps * other_norms**2)
        averages = decay * targets + (1 - decay) * cosines[:, None]
        # A goal of 1 could only be met by an infinite step.
        averages = jnp.clip(averages, -0.999, 0.999)
        targets = jnp.where(met & both[:, None], averages, targets)
        return (coefficients, jnp.maximum(squared_lengths, 0), targets), None

    (coefficients, _, targets), _ = lax.scan(
        turn, (coefficients, squared_lengths, targets), orders.T
    )
    return jnp.sum(coefficients, axis=0), targets


def gradvac(num_tasks: int, decay: float = 0.5, *, key: jax.Array | int = 0) -> core.Surgery:
    r"""GradVac: turns each task gradient until its cosine with another is what it usually is.

    For every task i, beginning with :math:`g_i' = g_i`, and for every other task j in an order
    drawn anew for each i and each step: with :math:`\phi = \cos(g_i', g_j)` and the average
    :math:`\hat\phi_{ij}` of those met before, where :math:`\phi < \hat\phi_{ij}`,

    .. math::
      g_i' \leftarrow g_i' + \frac{\|g_i'\| (\hat\phi_{ij} \sqrt{1 - \phi^2}
        - \phi \sqrt{1 - \hat\phi_{ij}^2})}{\|g_j\| \sqrt{1 - \hat\phi_{ij}^2}}\, g_j

    after which :math:`\cos(g_i', g_j) = \hat\phi_{ij}`; then
    :math:`\hat\phi_{ij} \leftarrow (1 - \beta) \hat\phi_{ij} + \beta \phi`. The update is
    :math:`\sum_i g_i'`.

    Args:
      num_tasks: number of tasks T, at least 1.
      decay: 1 - beta in the paper, in [0, 1]; with 1 the averages stay at zero and the method
        is PCGrad.
      key: seed or PRNG key of the random orders.

    Returns:
      A `Surgery` from leaves `(T, *shape)` to leaves `(*shape)`.
      The update is a sum over tasks; weights are at least 1. The first one is PCGrad's.

    Raises:
      ValueError: at trace time, from `update`, if the gradients are not those of `num_tasks`
        tasks; at once, for an argument out of its range.

    Note:
      The averages are updated for every pair in every step, also where nothing was turned, as
      in the paper; they are kept within 0.999 of zero. One Gramian is that of all leaves
      together; wrap groups of leaves for the paper's other granularities.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_surgery as surgery
      >>> tx = surgery.gradvac(num_tasks=2)
      >>> task_grads = jnp.array([[1.0, 0.0], [-1.0, 1.0]])
      >>> updates, state = tx.update(task_grads, tx.init(jnp.zeros(2)))
      >>> print(jnp.array_str(updates, precision=3, suppress_small=True))
      [0.5 1.5]

    References:
      Wang et al., `Gradient Vaccine: Investigating and Improving Multi-task Optimization in
      Massively Multilingual Models <https://arxiv.org/abs/2010.05874>`_, ICLR 2021, Algorithm 1.
    """
    name = checks.arguments(gradvac, locals(), num_tasks="int [1, inf)", decay="[0, 1]")

    def init():
        return GradVacState(jnp.zeros((num_tasks, num_tasks)))

    def update(tasks, state):
        weights, targets = gradvac_weights(
            tasks.gramian,
            core.random_orders(tasks.key, num_tasks),
            state.targets.astype(tasks.dtype),
            jnp.asarray(decay, tasks.dtype),
        )
        return weights, GradVacState(targets)

    weighting = core.Weighting(init, update)
    return core.gradient_surgery(weighting, name=name, num_tasks=num_tasks, key=key)
