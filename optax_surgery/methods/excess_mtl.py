"""ExcessMTL: more weight to the tasks that are further from convergence."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_surgery import checks, core, trees


class ExcessMTLState(NamedTuple):
    """State of `excess_mtl`.

    Attributes:
      root_sums: pytree of leaves `(T, *param.shape)`, float32 or float64: the roots of the sums of
        squared gradients.
      baselines: (T,) the excess risks that later ones are divided by.
      num_estimates: (T,) int32, how often the excess risk of a task was above zero.
      log_weights: (T,) logarithms of relative weights. What the tasks of a step gain and lose,
        they gain and lose among themselves.
    """

    root_sums: optax.Updates
    baselines: jax.Array
    num_estimates: jax.Array
    log_weights: jax.Array


def excess_risks(root_sums: optax.Updates, task_updates: optax.Updates) -> jax.Array:
    """The estimates of the excess risks, (T,): sums of g^2 / sqrt(S) over coordinates."""
    dtype = trees.gramian_dtype(task_updates)

    def per_coordinate(root_sum, leaf):
        sizes = jnp.abs(leaf.astype(root_sum.dtype))
        # in this order, as squares may leave the range of the dtype
        shares = sizes * (sizes / jnp.where(root_sum > 0, root_sum, 1))
        return shares.astype(dtype)

    return trees.sum_coordinates(jax.tree.map(per_coordinate, root_sums, task_updates))


def excess_mtl(
    num_tasks: int, learning_rate: float = 0.01, num_warmup_steps: int = 1
) -> core.Surgery:
    r"""ExcessMTL: weights the task gradients by how far each task is from convergence.

    The excess risk of a task, its loss less the least loss possible, is estimated from its
    gradients alone, with the diagonal approximation of the Hessian that Adagrad has:

    .. math::
      S_i \leftarrow S_i + g_i^2, \qquad
      e_i = \sum_k g_{i,k}^2 / \sqrt{S_{i,k}}, \qquad
      \alpha_i \propto \alpha_i \exp(\eta\, e_i / e_i^0), \qquad
      d = \sum_i \alpha_i g_i

    with :math:`\sum_i \alpha_i = 1`, equal weights at first, and the excess risks
    :math:`e_i^0` of the first steps. Unlike a loss, an excess risk is not high for ever where
    labels are noisy.

    Args:
      num_tasks: number of tasks T, at least 1.
      learning_rate: step of the logarithms of the weights, eta_alpha in the paper, above 0.
      num_warmup_steps: number of first steps of a task, at least 1, over which its excess risk is
        averaged to :math:`e_i^0` and its weight stays. The paper takes those of 3 epochs, the
        authors' code 1.

    Returns:
      A `Surgery` from leaves `(T, *shape)` to leaves `(*shape)`.
      The update is a weighted mean over tasks. Its state holds one number per coordinate and
      task.

    Raises:
      ValueError: at trace time, from `update`, if the gradients are not those of `num_tasks`
        tasks, or a Gramian is given; at once, for an argument out of its range.

    Note:
      The authors' code has weights of sum T: its update is T times ours. It adds 1e-7 to S; here a
      coordinate without any gradient yet counts as zero instead, so that the weights do
      not depend on the common scale of the gradients. The roots of S are kept, not S, as squares
      overflow. A step in which a task's gradient is zero is none of its first steps: the authors'
      code divides by zero after one. The authors take 1 for eta on Office-Home.
      A mode without any first step, which other code has, is neither the paper's nor the authors':
      its first weights come from excess risks in the unit of the losses.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_surgery as surgery
      >>> tx = surgery.excess_mtl(num_tasks=2, learning_rate=1.0)
      >>> state = tx.init(jnp.zeros(2))
      >>> updates, state = tx.update(jnp.array([[1.0, 0.0], [0.0, 1.0]]), state)
      >>> updates
      Array([0.5, 0.5], dtype=float32)
      >>> updates, state = tx.update(jnp.array([[0.1, 0.0], [0.0, 1.0]]), state)
      >>> print(f"{updates[1]:.2f}")  # the second task is further from convergence
      0.67

    References:
      He et al., `Robust Multi-Task Learning with Excess Risks
      <https://arxiv.org/abs/2402.02009>`_, ICML 2024, Equations 6, 7 and 9.
    """
    name = checks.arguments(
        excess_mtl,
        locals(),
        num_tasks="int [1, inf)",
        learning_rate="(0, inf)",
        num_warmup_steps="[1, inf)",
    )

    def init(params):
        return ExcessMTLState(
            root_sums=trees.zeros_per_task(params, num_tasks),
            baselines=jnp.zeros(num_tasks),
            num_estimates=jnp.zeros(num_tasks, jnp.int32),
            log_weights=jnp.zeros(num_tasks),
        )

    def update(tasks, task_updates, state):
        task_mask, dtype = tasks.task_mask, state.baselines.dtype
        root_sums = jax.tree.map(
            lambda root_sum, leaf: jnp.hypot(root_sum, leaf.astype(root_sum.dtype)),
            state.root_sums,
            task_updates,
        )
        risks = excess_risks(root_sums, task_updates).astype(dtype)
        num_estimates = state.num_estimates + (risks > 0).astype(jnp.int32)
        first = num_estimates.astype(dtype) <= jnp.asarray(num_warmup_steps, dtype)
        moves = (risks - state.baselines) / jnp.maximum(num_estimates, 1).astype(dtype)
        means = state.baselines + moves
        baselines = jnp.where(first & (risks > 0), means, state.baselines)

        ratios = jnp.where(first, 1, risks / jnp.where(baselines > 0, baselines, 1))
        gains = jnp.asarray(learning_rate, dtype) * jnp.minimum(ratios, 1e30)
        gained = state.log_weights + gains
        before, after = (
            jax.nn.logsumexp(numbers, where=task_mask) for numbers in (state.log_weights, gained)
        )
        log_weights = jnp.where(task_mask, gained - after + before, state.log_weights)
        weights = jax.nn.softmax(log_weights, where=task_mask)
        new_state = ExcessMTLState(root_sums, baselines, num_estimates, log_weights)
        return trees.combine(weights, task_updates), new_state

    return core.stacked_surgery(core.StackedRule(init, update), name=name, num_tasks=num_tasks)
