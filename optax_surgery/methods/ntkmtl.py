"""NTKMTL: weights that even out the speeds at which tasks learn."""

import jax.numpy as jnp

from optax_surgery import checks, core


def ntkmtl(exponent: float = 0.5) -> core.Surgery:
    r"""NTKMTL: weights each task by the inverse of its speed in the neural tangent kernel.

    With one loss per task, the kernel of task i is :math:`\|g_i\|^2`, and

    .. math:: w_i = \Big( \frac{\sum_j \|g_j\|^2}{\|g_i\|^2} \Big)^{p}.

    With p = 1/2 all weighted gradients are equally long.

    Args:
      exponent: p, above 0; 0.5 in the paper.

    Returns:
      A `Surgery` from leaves `(T, *shape)` to leaves `(*shape)`.
      A sum of T gradients, with p = 1/2 each as long as the norm of the whole stack.

    Raises:
      ValueError: at trace time, from `update`, if the gradients are not stacked; at once, for an
        argument out of its range.

    Note:
      The authors multiply by T and clip the update to norm 1, which
      `optax.chain(ntkmtl(), optax.clip_by_global_norm(1.0))` does up to that T. Tasks whose
      gradient is zero get no weight. Their second form, NTKMTL-SR, takes Jacobians of a
      representation on several mini-batches and is no function of the task gradients.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_surgery as surgery
      >>> tx = surgery.ntkmtl()
      >>> task_grads = jnp.array([[3.0, 0.0], [0.0, 4.0]])
      >>> updates, state = tx.update(task_grads, tx.init(jnp.zeros(2)))
      >>> print(jnp.array_str(updates, precision=3, suppress_small=True))
      [5. 5.]

    References:
      Qin et al., `NTKMTL: Mitigating Task Imbalance in Multi-Task Learning from Neural Tangent
      Kernel Perspective <https://arxiv.org/abs/2510.18258>`_, NeurIPS 2025.
    """
    name = checks.arguments(ntkmtl, locals(), exponent="(0, inf)")

    def update(tasks, state):
        gramian, scales = tasks.relative_gramian
        largest = jnp.finfo(scales.dtype).max
        norms = jnp.minimum(jnp.sqrt(jnp.diagonal(gramian)) / scales, largest)
        present = norms > 0  # a masked row is zero: it gets no weight
        # Roots, as squares of ratios need not fit the dtype.
        peak = jnp.where(jnp.any(present), jnp.max(norms), 1)
        stack = jnp.sqrt(jnp.sum((norms / peak) ** 2))
        ratios = jnp.minimum(peak / jnp.where(present, norms, peak) * stack, largest)
        powers = jnp.where(present, ratios, 1) ** jnp.asarray(2 * exponent, tasks.dtype)
        return jnp.where(present, jnp.minimum(powers, largest), 0), state

    return core.gradient_surgery(core.Weighting(tuple, update), name=name)
