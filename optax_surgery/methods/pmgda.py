"""PMGDA: to a ray of preference by a linear program, and down along it by a min-norm point."""

import jax
import jax.numpy as jnp

from optax_surgery import checks, core
from optax_surgery.algebra import linear, linear_program, solvers
from optax_surgery.algebra.arithmetic import dot, or_one


def distance_from_ray(losses: jax.Array, ray: jax.Array) -> tuple[jax.Array, jax.Array]:
    """How far the losses are from a ray, and the derivative of that by each loss.

    Args:
      losses: (T,), 0 for masked tasks.
      ray: (T,) the direction of the ray, 0 for masked tasks.

    Returns:
      () the distance, h in the paper, and (T,) a unit vector; 0 on the ray, to rounding.
    """
    ray = ray / or_one(jnp.max(jnp.abs(ray)))
    ray = ray / jnp.sqrt(or_one(jnp.sum(ray**2)))
    size = jnp.max(jnp.abs(losses))
    aside = losses / or_one(size)
    aside = aside - jnp.sum(ray * aside) * ray
    squared = jnp.sum(aside**2)
    off_the_ray = squared > (4 * losses.size * jnp.finfo(losses.dtype).eps) ** 2
    length = jnp.sqrt(jnp.where(off_the_ray, squared, 1))
    return jnp.where(off_the_ray, size * length, 0), jnp.where(off_the_ray, aside / length, 0)


def pmgda_weights(
    gramian: jax.Array,
    slopes: jax.Array,
    corrects: jax.Array,
    task_mask: jax.Array,
    correction: float | jax.Array,
) -> solvers.Solution:
    """PMGDA's weights, where the gradient of the distance from the ray is `slopes` @ J.

    Args:
      gramian: (T, T) inner products of the task gradients; rows of masked tasks are zero.
      slopes: (T,) the derivatives of the distance by the losses.
      corrects: () bool, whether to go to the ray; else along it.
      task_mask: (T,) bool.
      correction: sigma in the paper.

    Returns:
      A `Solution` whose weights may be negative. Its residual is that of the solver.
    """
    cosines, inverse_norms = linear.unit_gradients(gramian)
    present = inverse_norms > 0
    norms = jnp.where(present, 1 / jnp.where(present, inverse_norms, 1), 0)
    # The gradient of the distance, in unit gradients: what lengths they share is left out.
    in_units = norms * slopes
    in_units = in_units / or_one(jnp.max(jnp.abs(in_units)))
    image = dot(cosines, in_units)
    squared = jnp.sum(in_units * image)
    rounding = 64 * jnp.finfo(gramian.dtype).eps * jnp.sum(jnp.abs(in_units)) ** 2
    has_slope = squared > rounding
    length = jnp.sqrt(jnp.where(has_slope, squared, 1))
    unit, to_unit = (jnp.where(has_slope, each / length, 0) for each in (in_units, image))

    def correct():
        count = len(gramian)
        pairs = jnp.concatenate([cosines, to_unit[:, None]], axis=1)
        of_distance = jnp.append(to_unit, has_slope.astype(gramian.dtype))
        # The least gain, in units of the shortest gradient, is the difference of two variables.
        gain = jnp.where(present, inverse_norms / or_one(jnp.max(inverse_norms)), 0)
        rows = jnp.concatenate([pairs, -gain[:, None], gain[:, None]], axis=1)
        last = jnp.concatenate([of_distance, jnp.zeros(2, gramian.dtype)])
        solution = linear_program.maximise(
            jnp.zeros(count + 3, gramian.dtype).at[-2:].set(jnp.array([1, -1], gramian.dtype)),
            jnp.concatenate([rows, last[None, :]]),
            jnp.append(jnp.zeros(count, gramian.dtype), jnp.where(has_slope, correction, -1)),
            jnp.concatenate([present, has_slope[None], jnp.zeros(2, bool)]).astype(gramian.dtype),
        )
        shares = solution.weights
        weights = inverse_norms * (shares[:count] + shares[count] * unit)
        return solution._replace(weights=weights)

    def predict():
        within = cosines - to_unit[:, None] * to_unit[None, :]
        # A gradient along that of the distance leaves nothing but rounding errors.
        left = jnp.diagonal(within) > 64 * jnp.finfo(within.dtype).eps
        within = jnp.where(left[:, None] & left[None, :], within, 0)
        within = norms[:, None] * norms[None, :] * within
        solution = solvers.min_norm_point(within, task_mask)
        along = jnp.sum(to_unit * norms * solution.weights)
        return solution._replace(weights=solution.weights - along * inverse_norms * unit)

    return jax.lax.cond(corrects & has_slope, correct, predict)


def pmgda(
    preference: core.PerTask | None = None, correction: float = 0.95, tolerance: float = 0.01
) -> core.Surgery:
    r"""Preference-based MGDA (PMGDA): to a ray of preference, and then down along it.

    With the distance of the losses from the ray, :math:`h = \|L - (L^\top \hat\lambda)
    \hat\lambda\|`, its gradient :math:`g_h = \sum_i \frac{\partial h}{\partial L_i} g_i` and unit
    vectors :math:`\hat g`, the update is

    .. math::
      d = \begin{cases}
        \arg\max_d \min_i g_i^\top d \quad \text{over} \quad
          d \in \mathrm{conv} \{\hat g_1, \dots, \hat g_T, \hat g_h\},\
          \hat g_h^\top d \ge \sigma & h > \epsilon \\
        \arg\min_d \|d\| \quad \text{over} \quad
          d = \textstyle\sum_i \mu_i g_i + \nu g_h,\ \mu \ge 0,\ \sum_i \mu_i = 1
          & h \le \epsilon.
      \end{cases}

    The first corrects: the distance falls at least as fast as sigma says, and the losses fall
    as they can. The second predicts: no loss rises, and the distance stays.

    Args:
      preference: lambda in the paper, the direction of the ray, (T,) or a tree of numbers, each at
        least 0 and not all 0; 1/T each by default (over the tasks that are not masked).
      correction: sigma in the paper, in [0, 1].
      tolerance: epsilon in the paper, at least 0: the distance, as losses are measured, up to
        which they count as on the ray.

    Returns:
      A `Surgery` from leaves `(T, *shape)` to leaves `(*shape)`.
      Off the ray the update has norm 1 at most, whatever the gradients; on it, it is a weighted sum
      no longer than the shortest gradient. Weights may be negative. Its state is a `SolverReport`.

    Raises:
      ValueError: at trace time, from `update`, if `losses` are missing, the gradients are not
        stacked, or `preference` has not one entry per task; at once, for an argument out of its
        range.

    Note:
      The defaults are those of the authors' library, LibMOON, and so is this h. It leaves g_h out
      of the second program, which is then MGDA's; the paper has it. Its unit vectors are a little
      shorter, by 1e-4 in the denominator. A task without a gradient takes no part in the first
      program, whose minimum it would hold at zero.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_surgery as surgery
      >>> tx = surgery.pmgda(correction=0.5)
      >>> task_grads, losses = jnp.array([[1.0, 0.0], [0.0, 1.0]]), jnp.array([3.0, 1.0])
      >>> updates, state = tx.update(task_grads, tx.init(jnp.zeros(2)), losses=losses)
      >>> print(jnp.array_str(updates, precision=3))
      [0.854 0.146]

    References:
      Zhang et al., `PMGDA: A Preference-based Multiple Gradient Descent Algorithm
      <https://arxiv.org/abs/2402.09492>`_, 2024; `LibMOON <https://arxiv.org/abs/2409.02969>`_,
      NeurIPS 2024.
    """
    name = checks.arguments(
        pmgda,
        locals(),
        preference="per task [0, inf)",
        correction="[0, 1]",
        tolerance="[0, inf)",
    )

    def update(tasks, state):
        ray, task_mask = tasks.preference(preference), tasks.task_mask
        losses = jnp.where(task_mask, tasks.losses, 0)
        distance, slopes = distance_from_ray(losses, ray)
        corrects = distance > jnp.asarray(tolerance, tasks.dtype)
        strength = jnp.asarray(correction, tasks.dtype)
        solution = pmgda_weights(tasks.gramian, slopes, corrects, task_mask, strength)
        return solution.weights, solution.report()

    return core.gradient_surgery(core.Weighting(solvers.initial_report, update), name=name)
