"""Trimmed mean: at each coordinate the mean without the largest and the least gradients."""

from optax_surgery import checks, core, trees


def trimmed_mean(num_trimmed: int) -> core.Surgery:
    r"""Trimmed mean: at each coordinate leaves out the largest and the least task gradients.

    With the gradients of a coordinate in ascending order, and b of them left out on
    either side, the update is

    .. math:: d = \frac{1}{T - 2b} \sum_{i = b + 1}^{T - b} g_{(i)}.

    Up to b gradients, whatever they are, cannot take the update of a coordinate out of the range
    of the others.

    Args:
      num_trimmed: how many gradients are left out on either side, b, in [0, (T - 1) // 2]; 0
        gives the mean.

    Returns:
      A `Surgery` from leaves `(T, *shape)` to leaves `(*shape)`.
      The update is a mean over tasks, and no weighted sum: coordinates differ in which tasks
      they take.

    Raises:
      ValueError: at trace time, from `update`, if the gradients are not stacked, there are fewer
        than 2 b + 1 tasks, or a Gramian is given; at once, for an argument out of its range.

    Note:
      The paper gives b as a share beta of T. Where a mask leaves fewer than 2 b + 1 tasks, as many
      are left out as leave one or two. A leaf is sorted along its task axis, which takes one more
      copy of that leaf's gradients.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_surgery as surgery
      >>> tx = surgery.trimmed_mean(1)
      >>> task_grads = jnp.array([[1e11, 3.0], [1.0, -1e11], [-1e10, 1e10], [2.0, 2.0]])
      >>> updates, state = tx.update(task_grads, tx.init(jnp.zeros(2)))
      >>> updates
      Array([1.5, 2.5], dtype=float32)

    References:
      Yin et al., `Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates
      <https://arxiv.org/abs/1803.01498>`_, ICML 2018, Definition 2.
    """
    name = checks.arguments(trimmed_mean, locals(), num_trimmed="int [0, (T - 1) // 2]")

    def update(tasks, task_updates, state):
        def rule(rows, key):
            return trees.middle_mean(rows, num_trimmed, tasks.task_mask)

        return trees.map_rows(rule, task_updates, tasks.key), state

    return core.stacked_surgery(core.StackedRule(lambda params: (), update), name=name)
