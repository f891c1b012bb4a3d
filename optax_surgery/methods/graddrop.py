"""GradDrop: at each coordinate keep the gradients of one sign, drawn by its share."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from optax_surgery import checks, core, trees


def graddrop_update(
    rows: jax.Array,
    draws: jax.Array,
    leak: jax.Array,
    function: Callable[[jax.Array], jax.Array] | None = None,
) -> jax.Array:
    """GradDrop's update of one leaf for given draws.

    Args:
      rows: `(T, *shape)` task gradients.
      draws: `(*shape)` numbers in [0, 1), U in the paper.
      leak: (T,) share of each gradient that is never dropped.
      function: from the positive sign purities to probabilities, or None for the identity.

    Returns:
      `(*shape)` update.
    """
    positive = jnp.sum(jnp.maximum(rows, 0), axis=0)
    negative = jnp.sum(jnp.maximum(-rows, 0), axis=0)
    total = positive + negative
    purity = positive / jnp.where(total > 0, total, 1)
    probability = purity if function is None else function(purity)
    kept = jnp.where((draws < probability)[None], rows > 0, rows < 0)
    leaks = trees.along_tasks(leak.astype(rows.dtype), rows)
    return jnp.sum(jnp.where(kept, rows, leaks * rows), axis=0)


def graddrop(
    leak: float | core.PerTask = 0.0,
    function: Callable[[jax.Array], jax.Array] | None = None,
    *,
    key: jax.Array | int = 0,
) -> core.Surgery:
    r"""GradDrop: at each coordinate keeps the task gradients of one sign and drops the others.

    The sign is drawn for each coordinate and each step: positive with the probability f(P), where

    .. math:: P = \frac12 \Big( 1 + \frac{\sum_i g_i}{\sum_i |g_i|} \Big)

    is the positive sign purity. With U uniform in [0, 1), the update is

    .. math::
      d = \sum_i \big( \ell_i + (1 - \ell_i) M_i \big)\, g_i, \qquad
      M_i = [f(P) > U][g_i > 0] + [f(P) \le U][g_i < 0].

    Where tasks agree on a sign nothing is dropped. With the identity for f, the mean of the update
    over the draws is the sum of the task gradients.

    Args:
      leak: share of a gradient that passes whatever the sign, ell in the paper, in [0, 1]; one
        number, (T,), or a tree of them. With 1 the update is the sum.
      function: f in the paper, of an array of purities, elementwise; the identity by default.
        It should rise from 0 at 0 to 1 at 1, with f(1 - P) = 1 - f(P). A steep one mostly takes
        the sign that has the larger share.
      key: seed or PRNG key of the draws.

    Returns:
      A `Surgery` from leaves `(T, *shape)` to leaves `(*shape)`.
      The update is a sum over tasks, and no weighted sum: coordinates differ in which tasks
      they take.

    Raises:
      ValueError: for an argument out of its range; at trace time, from `update`, if the gradients
        are not stacked, `leak` has not one entry per task, or a Gramian is given.

    Note:
      These are lines 10 to 15 of Algorithm 1 on the gradients of the parameters. The paper applies
      them to the gradients of a layer's activations, times the signs of these and summed over the
      batch; feed such gradients to this surgery for that. Other code takes the mean over tasks,
      adds 1e-8 to the denominator, or draws one sign for a whole task. Draws are in float32, and
      differ from leaf to leaf.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_surgery as surgery
      >>> tx = surgery.graddrop()
      >>> task_grads = jnp.array([[1.0, 1.0], [-1.0, 2.0]])
      >>> updates, state = tx.update(task_grads, tx.init(jnp.zeros(2)))
      >>> updates
      Array([1., 3.], dtype=float32)

    References:
      Chen et al., `Just Pick a Sign: Optimizing Deep Multitask Models with Gradient Sign
      Dropout <https://arxiv.org/abs/2010.06808>`_, NeurIPS 2020, Algorithm 1.
    """
    name = checks.arguments(graddrop, locals(), leak="per task [0, 1]", function=Callable)

    def update(tasks, task_updates, state):
        leaks = tasks.spread("leak", leak)

        def rule(rows, key):
            draws = jax.random.uniform(key, rows.shape[1:], jnp.float32)
            return graddrop_update(rows, draws.astype(rows.dtype), leaks, function)

        return trees.map_rows(rule, task_updates, tasks.key), state

    rule = core.StackedRule(lambda params: (), update)
    return core.stacked_surgery(rule, name=name, key=key)
