"""CAGrad: near the mean gradient, help the task that gains the least."""

import typing
from typing import Literal

import jax.numpy as jnp

from optax_surgery import checks, core
from optax_surgery.algebra import solvers

Rescale = Literal["1+c", "1+c^2"]


def cagrad(c: float = 0.4, rescale: Rescale | None = None) -> core.Surgery:
    r"""CAGrad: in a ball around the mean gradient, takes what helps the worst task most.

    With the mean gradient :math:`g_0` over the tasks that take part,

    .. math:: d = \arg\max_{\|d - g_0\| \le c \|g_0\|}\ \min_i\ g_i \cdot d.

    With c < 1 it converges to a stationary point of the mean loss; with c = 0 it is the mean
    gradient, and as c grows it becomes MGDA.

    Args:
      c: radius of the ball relative to the norm of the mean gradient, at least 0. The authors take
        0.4 for NYUv2 and 0.2 to 0.9 elsewhere.
      rescale: None for d as above; one of "1+c" and "1+c^2" to divide it by that number, which
        bounds its growth with c.

    Returns:
      A `Surgery` from leaves `(T, *shape)` to leaves `(*shape)`.
      The update has the scale of a mean: between 1 - c and 1 + c times the mean gradient's norm.
      Its state is a `SolverReport`.

    Raises:
      ValueError: at trace time, from `update`, if the gradients are not stacked; at once, for an
        argument out of its range.

    Note:
      The authors' code divides by 1 + c^2 by default, and code that compares with summed losses
      multiplies by T. Where a combination of the gradients vanishes, so that no direction helps
      all tasks, the update is the point of the ball that hurts none and is nearest to g_0; the
      authors' code divides by nearly zero there, TorchJD returns zero.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_surgery as surgery
      >>> tx = surgery.cagrad(c=0.5)
      >>> task_grads = jnp.array([[2.0, 0.0], [0.0, 2.0]])
      >>> updates, state = tx.update(task_grads, tx.init(jnp.zeros(2)))
      >>> print(jnp.array_str(updates, precision=3, suppress_small=True))
      [1.5 1.5]

    References:
      Liu et al., `Conflict-Averse Gradient Descent for Multi-task Learning
      <https://arxiv.org/abs/2110.14048>`_, NeurIPS 2021, Algorithm 1.
    """
    name = checks.arguments(cagrad, locals(), c="[0, inf)", rescale=typing.get_args(Rescale))

    def update(tasks, state):
        mean, radius = tasks.preference(None), jnp.asarray(c, tasks.dtype)
        solution = solvers.cagrad_dual(tasks.gramian, mean, radius, tasks.task_mask)
        divisor = {None: 1, "1+c": 1 + radius, "1+c^2": 1 + radius**2}[rescale]
        return (mean + solution.weights) / divisor, solution.report()

    return core.gradient_surgery(core.Weighting(solvers.initial_report, update), name=name)
