"""DB-MTL: gradients of the logarithms of the losses, all as long as the longest."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_surgery import checks, core, metrics, trees


class DBMTLState(NamedTuple):
    """State of `db_mtl`.

    Attributes:
      averages: pytree of leaves `(T, *param.shape)`, float32 or float64: averages of the gradients
        of the logarithms of the losses.
    """

    averages: optax.Updates


def db_mtl_weights(gramian: jax.Array) -> jax.Array:
    """Weights that make all gradients as long as the longest, (T,); 0 for zero gradients."""
    norms = metrics.task_norms(gramian)
    return jnp.where(norms > 0, jnp.max(norms) / jnp.where(norms > 0, norms, 1), 0)


def db_mtl(num_tasks: int, decay: float = 0.9, decay_power: float = 0.0) -> core.Surgery:
    r"""DB-MTL: takes gradients of the log losses, averages them and makes them equally long.

    .. math::
      \hat g_i \leftarrow \beta_k \hat g_i + (1 - \beta_k) \nabla \log(L_i + 10^{-8}), \qquad
      d = \max_j \|\hat g_j\| \sum_i \frac{\hat g_i}{\|\hat g_i\|}

    with :math:`\beta_k = \beta / k^\sigma` in step k, and :math:`\hat g_i = 0` at first. The
    logarithm balances losses of different scales, the common length gradients of
    different sizes.

    Args:
      num_tasks: number of tasks T, at least 1.
      decay: share that an average keeps of its value, beta in the paper, in [0, 1). The
        authors choose among 0.1, 0.5 and 0.9.
      decay_power: how fast that share falls with the step, sigma in the authors' code, at least
        0; they have 0, or 0.5 for beta over the root of k.

    Returns:
      A `Surgery` from leaves `(T, *shape)` to leaves `(*shape)`.
      The update is a sum over tasks of vectors as long as the longest average. It needs the
      extra argument `losses`. Its state holds one number per coordinate and task.

    Raises:
      ValueError: at trace time, from `update`, if the gradients are not those of `num_tasks`
        tasks, the losses are missing, or a Gramian is given; at once, for an argument out of its
        range.

    Note:
      Pass the gradients of the losses themselves: they are divided by the losses here, which is
      the gradient of the logarithm. Losses have to be above zero: the task of one that is not
      has weight zero in that step, keeps its average, and is counted in the state.
      A gradient that is not finite, or not after the division, goes into the update and not into
      the average. Averages start from zero without a correction, as in the authors' code, so that
      the first update is 1 - beta times as long as without averages. Task heads take the gradients
      of the log losses too, without the common length.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_surgery as surgery
      >>> tx = surgery.db_mtl(num_tasks=2, decay=0.5)
      >>> task_grads = jnp.array([[2.0, 0.0], [0.0, 1.0]])
      >>> state = tx.init(jnp.zeros(2))
      >>> updates, state = tx.update(task_grads, state, losses=jnp.array([1.0, 2.0]))
      >>> print(updates.round(3))
      [1. 1.]

    References:
      Lin et al., `Dual-Balancing for Multi-Task Learning <https://arxiv.org/abs/2308.12029>`_,
      2023, Algorithm 1.
    """

    name = checks.arguments(
        db_mtl,
        locals(),
        num_tasks="int [1, inf)",
        decay="[0, 1)",
        decay_power="[0, inf)",
    )

    def init(params):
        return DBMTLState(trees.zeros_per_task(params, num_tasks))

    def update(tasks, task_updates, state):
        task_mask, dtype = tasks.task_mask, tasks.dtype
        # Where all tasks are masked, their losses may be anything.
        losses = jnp.where(tasks.losses > 0, tasks.losses, 1)
        of_logarithms = trees.scale_tasks(1 / (losses + 1e-8), task_updates)
        fall = (tasks.step + 1).astype(dtype) ** jnp.asarray(decay_power, dtype)
        rates = jnp.where(task_mask, 1 - jnp.asarray(decay, dtype) / fall, 0)
        averages = trees.move_tasks(rates, state.averages, of_logarithms)
        present = trees.mask_tasks(task_mask, averages)
        weights = db_mtl_weights(trees.gramian_in_range(present))
        # What is not finite shows in the update, but would never leave an average.
        finite = jnp.isfinite(trees.largest_coordinates(averages))
        kept = jax.tree.map(
            lambda new, old: jnp.where(trees.along_tasks(finite, new), new, old),
            averages,
            state.averages,
        )
        return trees.combine(weights, present), DBMTLState(kept)

    rule = core.StackedRule(init, update, usable=lambda tasks: tasks.losses > 0)
    return core.stacked_surgery(rule, name=name, num_tasks=num_tasks)
