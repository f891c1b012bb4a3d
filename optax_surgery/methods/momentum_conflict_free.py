"""M-ConFIG: ConFIG on the momenta of the task gradients, one task a step if need be."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_surgery import checks, core, trees
from optax_surgery.algebra import linear


class MomentumConflictFreeState(NamedTuple):
    """State of `momentum_conflict_free`.

    Attributes:
      momenta: pytree of leaves `(T, *param.shape)`, float32 or float64: averages of the task
        gradients, with bias corrections.
      num_gradients: (T,) int32, how many gradients are in each.
      pseudo_momentum: pytree of leaves `(*param.shape)`, float32 or float64: the average of the
        updates.
    """

    momenta: optax.Updates
    num_gradients: jax.Array
    pseudo_momentum: optax.Updates


def momentum_conflict_free_weights(gramian: jax.Array) -> jax.Array:
    """ConFIG's weights for equal cosines, (T,), from the Gramian of the momenta."""
    direction = linear.least_squares_of_cosines(gramian, jnp.ones(len(gramian), gramian.dtype))
    products = jnp.matmul(gramian, direction, precision=jax.lax.Precision.HIGHEST)
    squared_length = direction @ products
    safe = jnp.where(squared_length > 0, squared_length, 1)
    return jnp.where(squared_length > 0, direction * (jnp.sum(products) / safe), 0)


def momentum_conflict_free(
    num_tasks: int, decay: float = 0.9, *, alternating: bool = False
) -> core.Surgery:
    r"""M-ConFIG: the gradient whose momentum has equal cosines to the momenta of all tasks.

    With ConFIG's operator :math:`\mathcal G` (see `conflict_free`),

    .. math::
      m_i \leftarrow \beta_1 m_i + (1 - \beta_1) g_i, \qquad
      \hat m = \mathcal G\Big( \frac{m_1}{1 - \beta_1^{t_1}}, \dots,
        \frac{m_T}{1 - \beta_1^{t_T}} \Big), \qquad
      d = \frac{(1 - \beta_1^t)\, \hat m - \beta_1 m}{1 - \beta_1}, \qquad
      m \leftarrow (1 - \beta_1^t)\, \hat m

    in step t, with the number :math:`t_i` of gradients of task i so far. The update d is the
    pseudo-gradient whose momentum is :math:`\hat m`: chain `optax.adam(learning_rate, b1=decay)`
    after it, and this is the paper's Algorithm 1.

    The paper computes the gradient of only one task in a step, in turn. For that, take
    `alternating=True` and a `task_mask` with True at the tasks whose gradient is new.

    Args:
      num_tasks: number of tasks T, at least 1.
      decay: beta_1 in the paper, in [0, 1). Adam's `b1` has to be the same.
      alternating: whether masked tasks take part with the momentum that they have. By
        default they do not, as with every other surgery.

    Returns:
      A `Surgery` from leaves `(T, *shape)` to leaves `(*shape)`.
      The update has the scale of a sum, as ConFIG's, which is the first one. With `alternating`
      it is zero until each task has had a gradient. Its state holds one number per coordinate
      and task, and one more per coordinate.

    Raises:
      ValueError: at trace time, from `update`, if the gradients are not those of `num_tasks`
        tasks, or a Gramian is given; at once, for an argument out of its range.

    Note:
      The authors' class contains Adam's second moment; here that is Adam's, as the first moment
      that Adam makes of d is again :math:`\hat m`. Before each task has had a gradient, the
      authors' code does not count the steps, while here and in Algorithm 1 they count. The
      bias-corrected momenta are kept, as averages.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import optax_surgery as surgery
      >>> tx = optax.chain(surgery.momentum_conflict_free(num_tasks=2), optax.adam(0.1))
      >>> task_grads = jnp.array([[1.0, 0.0], [0.0, 3.0]])
      >>> updates, state = tx.update(task_grads, tx.init(jnp.zeros(2)))
      >>> print(updates.round(3))
      [-0.1 -0.1]

    References:
      Liu et al., `ConFIG: Towards Conflict-free Training of Physics Informed Neural Networks
      <https://arxiv.org/abs/2408.11104>`_, ICLR 2025, Algorithm 1.
    """
    name = checks.arguments(
        momentum_conflict_free,
        locals(),
        num_tasks="int [1, inf)",
        decay="[0, 1)",
        alternating=bool,
    )

    def init(params):
        pseudo_momentum = jax.tree.map(
            lambda leaf: jnp.zeros_like(leaf, trees.gramian_dtype(leaf)), params
        )
        return MomentumConflictFreeState(
            momenta=trees.zeros_per_task(params, num_tasks),
            num_gradients=jnp.zeros(num_tasks, jnp.int32),
            pseudo_momentum=pseudo_momentum,
        )

    def update(tasks, task_updates, state):
        task_mask, dtype = tasks.task_mask, tasks.dtype
        kept = jnp.asarray(decay, dtype)
        num_gradients = state.num_gradients + task_mask.astype(jnp.int32)
        # A momentum with its bias corrected is an average whose rate falls from 1.
        complete = 1 - kept ** jnp.maximum(num_gradients, 1).astype(dtype)
        rates = jnp.where(task_mask, (1 - kept) / complete, 0)
        momenta = trees.move_tasks(rates, state.momenta, task_updates)

        present = momenta if alternating else trees.mask_tasks(task_mask, momenta)
        weights = momentum_conflict_free_weights(trees.gramian_in_range(present))
        if alternating:
            weights = jnp.where(jnp.all(num_gradients > 0), weights, 0)
        share = 1 - kept ** (tasks.step + 1).astype(dtype)
        pseudo_momentum = jax.tree.map(
            lambda leaf: leaf * share.astype(leaf.dtype), trees.combine(weights, present)
        )
        updates = jax.tree.map(
            lambda new, old: (new - kept.astype(new.dtype) * old) / (1 - kept).astype(new.dtype),
            pseudo_momentum,
            state.pseudo_momentum,
        )
        return updates, MomentumConflictFreeState(momenta, num_gradients, pseudo_momentum)

    return core.stacked_surgery(core.StackedRule(init, update), name=name, num_tasks=num_tasks)
