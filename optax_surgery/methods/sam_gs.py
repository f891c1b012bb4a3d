"""SAM-GS: equal lengths where the task gradients are too unlike, else a gain by their momenta."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_surgery import checks, core, trees
from optax_surgery.algebra.arithmetic import or_one

_EPSILON = 1e-8  # of the paper, which adds it to the average of squares in every step


class SAMGSState(NamedTuple):
    """State of `sam_gs`.

    Attributes:
      momenta: pytree of leaves `(T, *param.shape)`, float32 or float64: averages of the task
        gradients, with bias corrections.
      num_gradients: (T,) int32, how many gradients are in each.
      mean_dissimilarity: () average of the squared dissimilarities, with a bias correction.
    """

    momenta: optax.Updates
    num_gradients: jax.Array
    mean_dissimilarity: jax.Array


def mean_dissimilarity(norms: jax.Array) -> jax.Array:
    """How unlike in length the gradients are: the mean over pairs of those that are not zero.

    Args:
      norms: (T,) of the task gradients, in any unit.

    Returns:
      () 1 less the mean magnitude similarity; 0 if there is no pair.
    """
    longer = or_one(jnp.maximum(norms[:, None], norms[None, :]))
    ratios = jnp.minimum(norms[:, None], norms[None, :]) / longer
    present = norms > 0
    pairs = jnp.triu(present[:, None] & present[None, :], k=1)
    # 1 less the similarity 2 r / (1 + r^2), without cancellation where r is near 1.
    total = jnp.sum((1 - ratios) ** 2 / (1 + ratios**2), where=pairs)
    return total / or_one(jnp.sum(pairs).astype(norms.dtype))


def sam_gs_update(rows: jax.Array, lengthening: jax.Array, gain: jax.Array) -> jax.Array:
    """SAM-GS's update of one leaf: the sum of the gradients times two factors.

    Args:
      rows: `(T, *shape)` task gradients.
      lengthening: (T,) the factors of whole gradients.
      gain: `(T, *shape)` those of their coordinates.

    Returns:
      `(*shape)` update. Where it does not fit the dtype, as it may be quadratic in the gradients,
      it is a large number.
    """
    products = (rows * gain) * trees.along_tasks(lengthening.astype(rows.dtype), rows)
    largest = float(jnp.finfo(rows.dtype).max) / len(rows)
    return jnp.sum(jnp.clip(products, -largest, largest), axis=0)


def rate_of_average(decay: float, num_steps: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """The share by which step t moves an average whose bias is corrected, (1 - b) / (1 - b^t)."""
    kept = jnp.asarray(decay, dtype)
    return (1 - kept) / (1 - kept ** num_steps.astype(dtype))


def sam_gs(
    num_tasks: int,
    decay: float = 0.9,
    similarity_decay: float = 0.99,
    threshold: float = 0.1,
) -> core.Surgery:
    r"""SAM-GS (similarity-aware momentum gradient surgery): equal lengths, or gains by momenta.

    With the mean :math:`\Psi` over all pairs of tasks of the magnitude similarity, and averages
    of the gradients and of the dissimilarity, with bias corrections as Adam's,

    .. math::
      \psi_{ij} = \frac{2 \|g_i\| \|g_j\|}{\|g_i\|^2 + \|g_j\|^2}, \qquad
      m_i \leftarrow \beta_1 m_i + (1 - \beta_1) g_i, \qquad
      h \leftarrow \beta_2 h + (1 - \beta_2) (1 - \Psi)^2 + \epsilon,

    .. math::
      d = \sum_i \frac{\frac{1}{T} \sum_j \|g_j\|}{\|g_i\|}\, g_i
      \quad \text{if} \ \Psi < \gamma, \qquad
      d = \sum_i \frac{|\hat m_i|}{\sqrt{\hat h}} \odot g_i \quad \text{otherwise}.

    Angles play no part. In the second case the update is quadratic in the gradients, and up to
    :math:`\sqrt{(1 - \beta_2) / \epsilon} = 1000` times the longer the more alike their lengths
    have been.

    Args:
      num_tasks: number of tasks T, at least 1.
      decay: beta_1, in [0, 1).
      similarity_decay: beta_2, in [0, 1).
      threshold: gamma, in [0, 1]. The paper's algorithm has 0.1, the authors' settings for networks
        0.7. With 0 lengths are never made equal, with 1 they always are.

    Returns:
      A `Surgery` from leaves `(T, *shape)` to leaves `(*shape)`.
      The update has the scale of a sum in the first case, and one of its own in the second: chain
      Adam after it. Its state holds one number per coordinate and task.

    Raises:
      ValueError: at trace time, from `update`, if the gradients are not those of `num_tasks`
        tasks, or a Gramian is given; at once, for an argument out of its range.

    Note:
      This is the authors' code, without its last factor T. The paper's text differs in three
      places: its mean similarity counts each gradient with itself, so that it is never below 0.1
      for 10 tasks or fewer; its first case multiplies by the gradient once more; and epsilon is
      added to the root as well. Gradients that are zero are in no pair.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_surgery as surgery
      >>> tx = surgery.sam_gs(num_tasks=2)
      >>> updates, _ = tx.update(jnp.array([[1.0, 0.0], [0.0, 99.0]]), tx.init(jnp.zeros(2)))
      >>> print(jnp.array_str(updates, precision=3))
      [50. 50.]

    References:
      Borsani et al., `Gradient Similarity Surgery in Multi-Task Deep Learning
      <https://arxiv.org/abs/2506.06130>`_, ECML PKDD 2025, Algorithm 1.
    """
    name = checks.arguments(
        sam_gs,
        locals(),
        num_tasks="int [1, inf)",
        decay="[0, 1)",
        similarity_decay="[0, 1)",
        threshold="[0, 1]",
    )

    def init(params):
        return SAMGSState(
            momenta=trees.zeros_per_task(params, num_tasks),
            num_gradients=jnp.zeros(num_tasks, jnp.int32),
            mean_dissimilarity=jnp.zeros(()),
        )

    def update(tasks, task_updates, state):
        task_mask, dtype = tasks.task_mask, tasks.dtype
        gramian, scales = tasks.relative_gramian
        norms = jnp.sqrt(jnp.diagonal(gramian)) / scales
        norms = norms / or_one(jnp.max(norms))
        dissimilarity = mean_dissimilarity(norms)

        # An average with its bias corrected is one whose rate falls from 1.
        num_gradients = state.num_gradients + task_mask.astype(jnp.int32)
        rates = rate_of_average(decay, jnp.maximum(num_gradients, 1), dtype)
        momenta = trees.move_tasks(jnp.where(task_mask, rates, 0), state.momenta, task_updates)
        rate = rate_of_average(similarity_decay, tasks.step + 1, dtype)
        before = state.mean_dissimilarity.astype(dtype)
        average = before + rate * (dissimilarity**2 - before)
        # What the paper adds in every step, its bias corrected, is always the same.
        root = jnp.sqrt(average + _EPSILON / (1 - jnp.asarray(similarity_decay, dtype)))

        unlike = 1 - dissimilarity < jnp.asarray(threshold, dtype)
        mean_norm = jnp.sum(norms) / or_one(jnp.sum(norms > 0).astype(dtype))
        lengthening = jnp.where(unlike, mean_norm / or_one(norms), 1 / root)

        def update_leaf(leaf, momentum):
            gain = jnp.where(unlike, 1, jnp.abs(momentum))
            return sam_gs_update(leaf.astype(momentum.dtype), lengthening, gain)

        updates = jax.tree.map(update_leaf, task_updates, momenta)
        return updates, SAMGSState(momenta, num_gradients, average)

    return core.stacked_surgery(core.StackedRule(init, update), name=name, num_tasks=num_tasks)
