"""PCGrad: project each task gradient on the normal plane of those it conflicts with."""

import jax
import jax.numpy as jnp
from jax import lax

from optax_surgery import core


def pcgrad_weights(gramian: jax.Array, orders: jax.Array) -> jax.Array:
    """PCGrad's weights for given orders of the projections.

    A projected gradient stays in the span of the task gradients: row i of C holds the
    coefficients of g_i^PC, and row i of C G its inner products with the original gradients.
    Both begin as rows of I and G, and to project on the normal plane of g_j is to subtract a
    multiple of row j of [G, I] from row i of [C G, C]. So Algorithm 1 needs no vector longer
    than 2T, all tasks take their k-th projection at once, and a step is one elementwise
    kernel; two steps are unrolled so that an accelerator needs no copy in between.

    Args:
      gramian: (T, T) inner products of the task gradients.
      orders: (T, T - 1) int, row i the order in which task i meets the others.

    Returns:
      (T,) weights, each at least 1.
    """
    num_tasks = gramian.shape[0]
    tasks = jnp.arange(num_tasks)
    squared_norms = jnp.diagonal(gramian)
    originals = jnp.concatenate([gramian, jnp.eye(num_tasks, dtype=gramian.dtype)], axis=1)

    def project(rows, others):
        products = rows[tasks, others]
        conflicts = products < 0
        steps = jnp.where(conflicts, products / jnp.where(conflicts, squared_norms[others], 1), 0)
        return rows - steps[:, None] * originals[others], None

    rows, _ = lax.scan(project, originals, orders.T, unroll=2)
    return jnp.sum(rows[:, num_tasks:], axis=0)


def pcgrad(*, key: jax.Array | int = 0) -> core.Surgery:
    r"""PCGrad: projects each task gradient on the normal plane of those it conflicts with.

    For every task i, beginning with :math:`g_i^{PC} = g_i`, and for every other task j in
    an order drawn anew for each i and each step: where
    :math:`g_i^{PC} \cdot g_j < 0`,

    .. math:: g_i^{PC} \leftarrow g_i^{PC} - \frac{g_i^{PC} \cdot g_j}{\|g_j\|^2}\, g_j

    with the original :math:`g_j`. The update is :math:`\sum_i g_i^{PC}`. It is computed on
    the T x T Gramian, in O(T^3) operations and T - 1 steps for all tasks at once.

    For two tasks the update conflicts with neither. For three or more it may conflict
    with some of them.

    Args:
      key: seed or PRNG key of the random orders.

    Returns:
      A `Surgery` from leaves `(T, *shape)` to leaves `(*shape)`.
      The update is a sum over tasks: without conflicts, T times the mean gradient.

    Raises:
      ValueError: at trace time, from `update`, if the gradients are not stacked.

    Note:
      This is Algorithm 1 to the letter. Much other code includes j = i, draws one order for
      all tasks, or averages. The authors' TensorFlow code discards the result of its
      shuffle, so that its order is fixed. Task heads do not belong in the stack: see
      `on_shared`.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_surgery as surgery
      >>> tx = surgery.pcgrad()
      >>> task_grads = jnp.array([[1.0, 0.0], [-1.0, 1.0]])
      >>> updates, state = tx.update(task_grads, tx.init(jnp.zeros(2)))
      >>> updates
      Array([0.5, 1.5], dtype=float32)

    References:
      Yu et al., `Gradient Surgery for Multi-Task Learning
      <https://arxiv.org/abs/2001.06782>`_, NeurIPS 2020, Algorithm 1.
    """

    def update(tasks, state):
        orders = core.random_orders(tasks.key, tasks.num_tasks)
        return pcgrad_weights(tasks.gramian, orders), state  # a masked row conflicts with none

    return core.gradient_surgery(core.Weighting(tuple, update), name="pcgrad", key=key)
