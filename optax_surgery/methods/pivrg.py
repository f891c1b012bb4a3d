"""PIVRG: a fair update that favours the tasks which lag behind their single-task networks."""

import jax
import jax.numpy as jnp

from optax_surgery import checks, core
from optax_surgery.algebra import solvers


def pivrg(scores: core.PerTask, bound: float = 2.0, min_temperature: float = 10.0) -> core.Surgery:
    r"""PIVRG: weights the task gradients fairly, more for tasks that do worse than alone.

    From the scores s, in per cent of the performance of single-task networks that each task has
    lost (its delta-m),

    .. math::
      p = T\, \mathrm{softmax}(s / \tau), \qquad
      \tau = \max\Big(\frac{\max_i s_i - \min_i s_i}{\log b},\ \tau_{\min}\Big), \qquad
      G w = (p / w)^{1/2}, \quad w > 0.

    Args:
      scores: s, (T,) or a tree of any numbers, in per cent, larger for worse. They change once an
        epoch: `optax.inject_hyperparams(pivrg)(scores)` keeps them in the state, where they can be
        set.
      bound: b, above 1, the largest ratio between two entries of p; 2 for NYUv2 and CelebA, 1.8 for
        Cityscapes and QM9.
      min_temperature: least tau, in per cent, above 0; 10 for NYUv2 and CelebA, 20 for Cityscapes,
        100 for QM9.

    Returns:
      A `Surgery` from leaves `(T, *shape)` to leaves `(*shape)`.
      The update is homogeneous of degree -1/3 in the gradients, as that of `fairgrad`. Its state
      is a `SolverReport`.

    Raises:
      ValueError: at trace time, from `update`, if the gradients are not stacked or `scores` has
        not one entry per task; at once, for an argument out of its range.

    Note:
      The authors multiply the update by T and clip it to norm 1, see `fairgrad`.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_surgery as surgery
      >>> tx = surgery.pivrg(scores=jnp.array([3.0, 3.0]))
      >>> task_grads = jnp.array([[1.0, 0.0], [0.0, 8.0]])
      >>> updates, state = tx.update(task_grads, tx.init(jnp.zeros(2)))
      >>> print(jnp.array_str(updates, precision=3, suppress_small=True))
      [1.  0.5]

    References:
      Qin et al., Towards Consistent Multi-Task Learning: Unlocking the Potential of Task-Specific
      Parameters, and its code base `MTLlib <https://github.com/jianke0604/MTLlib>`_, CVPR 2025.
    """
    name = checks.arguments(
        pivrg,
        locals(),
        scores="per task (-inf, inf)",
        bound="(1, inf)",
        min_temperature="(0, inf)",
    )

    def update(tasks, state):
        task_mask, dtype = tasks.task_mask, tasks.dtype
        values = jnp.where(task_mask, tasks.read("scores", scores), 0)
        spread = jnp.max(values, where=task_mask, initial=-jnp.inf) - jnp.min(
            values, where=task_mask, initial=jnp.inf
        )
        spread = jnp.where(jnp.any(task_mask), spread, 0)
        temperature = spread / jnp.log(jnp.asarray(bound, dtype))
        temperature = jnp.maximum(temperature, jnp.asarray(min_temperature, dtype))
        # A finite number in the place of minus infinity: all tasks may be masked.
        shares = jax.nn.softmax(jnp.where(task_mask, values / temperature, jnp.finfo(dtype).min))
        factors = jnp.sum(task_mask, dtype=dtype) * jnp.where(task_mask, shares, 0)
        solution = solvers.fair_weights(tasks.gramian, 2.0, task_mask, factors)
        return solution.weights, solution.report()

    return core.gradient_surgery(core.Weighting(solvers.initial_report, update), name=name)
