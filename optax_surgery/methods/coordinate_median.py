"""Coordinate median: at each coordinate the median of the task gradients."""

from optax_surgery import core, trees


def coordinate_median() -> core.Surgery:
    """Coordinate median: at each coordinate takes the median of the task gradients.

    d[k] = median of g_1[k], ..., g_T[k]; for an even number of tasks the mean of the two in the
    middle. Less than half of the gradients, whatever they are, cannot take the update of
    a coordinate out of the range of the others. It is the trimmed mean that trims the most.

    Returns:
      A `Surgery` from leaves `(T, *shape)` to leaves `(*shape)`.
      The update has the scale of a mean over tasks, and is no weighted sum: coordinates differ
      in which tasks they take.

    Raises:
      ValueError: at trace time, from `update`, if the gradients are not stacked or a Gramian is
        given.

    Note:
      A leaf is sorted along its task axis, which takes one more copy of that leaf's gradients.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_surgery as surgery
      >>> tx = surgery.coordinate_median()
      >>> task_grads = jnp.array([[1e11, 3.0], [1.0, -1e11], [2.0, 2.0]])
      >>> updates, state = tx.update(task_grads, tx.init(jnp.zeros(2)))
      >>> updates
      Array([2., 2.], dtype=float32)

    References:
      Yin et al., `Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates
      <https://arxiv.org/abs/1803.01498>`_, ICML 2018, Definition 1.
    """

    def update(tasks, task_updates, state):
        def rule(rows, key):
            return trees.middle_mean(rows, tasks.num_tasks, tasks.task_mask)

        return trees.map_rows(rule, task_updates, tasks.key), state

    rule = core.StackedRule(lambda params: (), update)
    return core.stacked_surgery(rule, name="coordinate_median")
