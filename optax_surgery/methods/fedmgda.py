"""FedMGDA+: the shortest combination of the unit gradients, with weights near a preference."""

import jax
import jax.numpy as jnp

from optax_surgery import checks, core
from optax_surgery.algebra import linear, solvers
from optax_surgery.algebra.arithmetic import or_one


def fedmgda_weights(
    gramian: jax.Array, preference: jax.Array, radius: float | jax.Array
) -> tuple[jax.Array, solvers.Solution]:
    """FedMGDA+'s weights.

    Args:
      gramian: (T, T) inner products; rows of absent tasks are zero.
      preference: (T,) what the weights of the unit gradients are near to, up to a common factor.
      radius: how near, in [0, 1].

    Returns:
      (T,) weights of the gradients, 0 for those that are zero, and the solution for the unit
      gradients.
    """
    cosines, inverse_norms = linear.unit_gradients(gramian)
    present = inverse_norms > 0
    centre = jnp.where(present, preference, 0)
    centre = centre / or_one(jnp.sum(centre))
    radius = jnp.asarray(radius, centre.dtype)
    lower = jnp.where(present, jnp.maximum(centre - radius, 0), 0)
    upper = jnp.where(present, jnp.minimum(centre + radius, 1), 0)
    solution = solvers.min_norm_in_box(cosines, lower, upper)
    return solution.weights * inverse_norms, solution


def fedmgda(radius: float = 0.1, preference: core.PerTask | None = None) -> core.Surgery:
    r"""FedMGDA+: takes the shortest combination of unit gradients with weights near a preference.

    With the preference :math:`\lambda_0` over its sum,

    .. math::
      \lambda = \arg\min_{\lambda \ge 0,\ \sum_i \lambda_i = 1,\
        \|\lambda - \lambda_0\|_\infty \le \epsilon}
        \Big\| \sum_i \lambda_i \frac{g_i}{\|g_i\|} \Big\|, \qquad
      d = \sum_i \lambda_i \frac{g_i}{\|g_i\|}.

    With :math:`\epsilon = 0` it is a mean of gradients of equal length, with :math:`\epsilon = 1`
    MGDA on them, whose update conflicts with no task. Lengths do not count: a task, in federated
    learning a client, gains nothing by making its loss large.

    Args:
      radius: epsilon, how far a weight may be from the preference, in [0, 1].
      preference: lambda_0, (T,) or a tree of numbers, each above 0; equal by default.

    Returns:
      A `Surgery` from leaves `(T, *shape)` to leaves `(*shape)`.
      The update is a weighted mean of unit gradients: no longer than 1, and it does not shrink as
      the gradients do, so let the learning rate fall. Its state is a `SolverReport`.

    Raises:
      ValueError: at trace time, from `update`, if the gradients are not stacked or `preference`
        has not one entry per task; at once, for an argument out of its range.

    Note:
      A task without a gradient takes no part, and the others share its preference. The authors'
      code has equal preferences, and epsilon as an option; 0.1 is what other code takes. Sampling
      of clients and their local steps are the caller's: what a client sends back is its gradient.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_surgery as surgery
      >>> tx = surgery.fedmgda(radius=0.25)
      >>> task_grads = jnp.array([[3.0, 0.0], [-1.0, 0.0], [0.0, 9.0]])
      >>> updates, state = tx.update(task_grads, tx.init(jnp.zeros(2)))
      >>> print(jnp.array_str(updates + 0.0, precision=3, suppress_small=True))
      [0.    0.083]

    References:
      Hu et al., `Federated Learning Meets Multi-objective Optimization
      <https://arxiv.org/abs/2006.11489>`_, IEEE Transactions on Network Science and Engineering
      2022.
    """
    name = checks.arguments(fedmgda, locals(), radius="[0, 1]", preference="per task (0, inf)")

    def update(tasks, state):
        gramian, scales = tasks.relative_gramian
        weights, solution = fedmgda_weights(gramian, tasks.preference(preference), radius)
        weights = jnp.minimum(weights * scales, jnp.finfo(weights.dtype).max)
        return weights, solution.report()

    return core.gradient_surgery(core.Weighting(solvers.initial_report, update), name=name)
