"""GLS, scale-invariant, smooth Tchebycheff, COSMOS and PBI: one scalar made of the losses."""

import jax
import jax.numpy as jnp

from optax_surgery import checks, core

# Logarithms and inverses take losses of less than this for this: their weights stay in range.
LEAST_LOSS = 1e-20
# The derivative of a geometric mean can be beyond float32.
LARGEST_WEIGHT = 1e30


def gls() -> core.Surgery:
    r"""Geometric loss strategy (GLS): the gradient of the geometric mean of the losses.

    .. math::
      \bar L = \Big( \prod_i L_i \Big)^{1/T}, \qquad
      w_i = \frac{\partial \bar L}{\partial L_i} = \frac{\bar L}{T L_i}

    Each loss may be scaled by a constant: the direction stays as it was.

    Returns:
      A `Surgery` from leaves `(T, *shape)` to leaves `(*shape)`.
      Weights are above zero; for equal losses the update is the mean gradient.

    Raises:
      ValueError: at trace time, from `update`, if `losses` are missing or the gradients are
        not stacked.

    Note:
      Losses have to be above zero: the task of one that is not has weight zero in that step,
      and is counted in the state. Losses below 1e-20 count as 1e-20, and no weight is above
      1e30. The mean is taken of logarithms: a product of many losses would overflow.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_surgery as surgery
      >>> tx = surgery.gls()
      >>> task_grads, losses = jnp.array([[1.0, 0.0], [0.0, 1.0]]), jnp.array([1.0, 4.0])
      >>> updates, state = tx.update(task_grads, tx.init(jnp.zeros(2)), losses=losses)
      >>> print(updates.round(3))
      [1.   0.25]

    References:
      Chennupati et al., `MultiNet++: Multi-Stream Feature Aggregation and Geometric Loss
      Strategy for Multi-Task Learning <https://arxiv.org/abs/1904.08492>`_, CVPR Workshops 2019.
    """

    def update(tasks, state):
        logs = jnp.log(jnp.maximum(tasks.losses, LEAST_LOSS))
        shares = tasks.preference(None)
        weights = shares * jnp.exp(jnp.sum(shares * logs) - logs)
        return jnp.minimum(weights, LARGEST_WEIGHT), state

    weighting = core.Weighting(tuple, update, usable=_above_zero)
    return core.gradient_surgery(weighting, name="gls")


def scale_invariant() -> core.Surgery:
    r"""Scale-invariant weighting: the sum of the gradients of the logarithms of the losses.

    .. math:: \nabla \sum_i \log L_i = \sum_i w_i g_i, \qquad w_i = 1 / L_i

    Each loss may be scaled by a constant: the update stays as it was.

    Returns:
      A `Surgery` from leaves `(T, *shape)` to leaves `(*shape)`.
      The update is a sum of relative gradients; weights are above zero.

    Raises:
      ValueError: at trace time, from `update`, if `losses` are missing or the gradients are
        not stacked.

    Note:
      Losses have to be above zero: the task of one that is not has weight zero in that step,
      and is counted in the state. Losses below 1e-20 count as 1e-20.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_surgery as surgery
      >>> tx = surgery.scale_invariant()
      >>> task_grads, losses = jnp.array([[1.0, 0.0], [0.0, 1.0]]), jnp.array([1.0, 4.0])
      >>> updates, state = tx.update(task_grads, tx.init(jnp.zeros(2)), losses=losses)
      >>> print(updates)
      [1.   0.25]

    References:
      The baseline SI of Navon et al., `Multi-Task Learning as a Bargaining Game
      <https://arxiv.org/abs/2202.01017>`_, ICML 2022.
    """

    def update(tasks, state):
        return 1 / jnp.maximum(tasks.losses, LEAST_LOSS), state

    weighting = core.Weighting(tuple, update, usable=_above_zero)
    return core.gradient_surgery(weighting, name="scale_invariant")


def stch(
    smoothing: float = 1.0,
    preference: core.PerTask | None = None,
    reference: core.PerTask | None = None,
    *,
    log_losses: bool = False,
) -> core.Surgery:
    r"""Smooth Tchebycheff scalarisation (STCH): the gradient of a smooth maximum of the losses.

    With :math:`f_i = L_i`, or :math:`\log L_i` if asked for,

    .. math::
      g^{\text{STCH}} = \mu \log \sum_i \exp \frac{\lambda_i (f_i - z_i^*)}{\mu}, \qquad
      w_i = \frac{\partial f_i}{\partial L_i}\, \lambda_i\,
        \mathrm{softmax} \Big( \frac{\lambda (f - z^*)}{\mu} \Big)_i.

    Args:
      smoothing: mu in the paper, above 0. Towards 0 the worst task has all the weight.
      preference: lambda in the paper, (T,) or a tree of numbers, each at least 0; 1/T each by
        default (over the tasks that are not masked).
      reference: z* in the paper, the ideal point that f is measured from, (T,) or a tree of any
        numbers; 0 by default.
      log_losses: whether f is the logarithm of the losses, which then have to be above zero.

    Returns:
      A `Surgery` from leaves `(T, *shape)` to leaves `(*shape)`.
      The update is a weighted mean of the gradients of :math:`\lambda_i f_i`; weights are not
      negative.

    Raises:
      ValueError: at trace time, from `update`, if `losses` are missing, the gradients are not
        stacked, or `preference` or `reference` has not one entry per task; at once, for an argument
        out of its range.

    Note:
      The paper has f = L and an ideal point. The authors' code for networks has log losses,
      lambda = 1 and another reference: four epochs train with `scale_invariant()`, the mean
      losses of the next one are the nadir, and from there on the update is T times that of
      `stch(1.0, jnp.ones(T), jnp.log(nadir), log_losses=True)`. Neither has a state, so one
      may take the place of the other in a chain. With log losses, the task of a loss that is not
      above zero has weight zero in that step, and is counted in the state; losses below 1e-20
      count as 1e-20.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_surgery as surgery
      >>> tx = surgery.stch(smoothing=0.5)
      >>> task_grads, losses = jnp.array([[1.0, 0.0], [0.0, 1.0]]), jnp.array([1.0, 2.0])
      >>> updates, state = tx.update(task_grads, tx.init(jnp.zeros(2)), losses=losses)
      >>> print([round(float(weight), 3) for weight in updates])
      [0.134, 0.366]

    References:
      Lin et al., `Smooth Tchebycheff Scalarization for Multi-Objective Optimization
      <https://arxiv.org/abs/2402.19078>`_, ICML 2024.
    """

    name = checks.arguments(
        stch,
        locals(),
        smoothing="(0, inf)",
        preference="per task [0, inf)",
        reference="per task (-inf, inf)",
        log_losses=bool,
    )

    def update(tasks, state):
        losses, task_mask = tasks.losses, tasks.task_mask
        slopes = jnp.ones_like(losses)
        if log_losses:
            losses = jnp.maximum(losses, LEAST_LOSS)
            losses, slopes = jnp.log(losses), 1 / losses
        if reference is not None:
            losses = losses - tasks.read("reference", reference)
        chosen = tasks.preference(preference)
        distances = jnp.where(task_mask, chosen * losses, jnp.finfo(losses.dtype).min)
        # Differences first: the quotients might overflow. A compiler may fuse the product above
        # with the difference, unrounded: that of the worst task need not be zero then.
        worst = jnp.max(distances)
        logits = jnp.minimum((distances - worst) / jnp.asarray(smoothing, tasks.dtype), 0)
        shares = jax.nn.softmax(jnp.where(distances < worst, logits, 0))
        return slopes * chosen * shares, state

    weighting = core.Weighting(tuple, update, usable=_above_zero if log_losses else None)
    return core.gradient_surgery(weighting, name=name)


def cosmos(penalty: float, preference: core.PerTask | None = None) -> core.Surgery:
    r"""COSMOS: weights that pull the vector of losses towards a ray of preference.

    .. math::
      \sum_i w_i g_i = \nabla \big( r^\top L - \lambda \cos(r, L) \big), \qquad
      w = r - \frac{\lambda}{\|L\|} \big( \hat r - \cos(r, L)\, \hat L \big)

    with the unit vectors :math:`\hat r` and :math:`\hat L`.

    Args:
      penalty: lambda in the paper, at least 0; 0.01 to 8 there for different data.
      preference: r in the paper, (T,) or a tree of numbers, each at least 0 and not all 0; 1/T
        each by default (over the tasks that are not masked).

    Returns:
      A `Surgery` from leaves `(T, *shape)` to leaves `(*shape)`.
      The update is a weighted sum, where weights may be negative.

    Raises:
      ValueError: at trace time, from `update`, if `losses` are missing, the gradients are not
        stacked, or `preference` has not one entry per task; at once, for an argument out of its
        range.

    Note:
      This is the paper's loss. Its network also takes the preference as an input, drawn anew in
      every step from a Dirichlet distribution: make `cosmos(penalty, preference)` inside of the
      training step then, as it has no state. Lengths of the losses below 1e-20 count as 1e-20.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_surgery as surgery
      >>> tx = surgery.cosmos(penalty=1.0, preference=jnp.array([0.5, 0.5]))
      >>> task_grads, losses = jnp.array([[1.0, 0.0], [0.0, 1.0]]), jnp.array([3.0, 4.0])
      >>> updates, state = tx.update(task_grads, tx.init(jnp.zeros(2)), losses=losses)
      >>> print([round(float(weight), 3) for weight in updates])
      [0.477, 0.517]

    References:
      Ruchte and Grabocka, `Scalable Pareto Front Approximation for Deep Multi-Objective Learning
      <https://arxiv.org/abs/2103.13392>`_, ICDM 2021.
    """

    name = checks.arguments(cosmos, locals(), penalty="[0, inf)", preference="per task [0, inf)")

    def update(tasks, state):
        chosen = tasks.preference(preference)
        ray, _ = _direction(chosen)
        direction, length = _direction(jnp.where(tasks.task_mask, tasks.losses, 0))
        bend = ray - jnp.sum(ray * direction) * direction
        bend = jnp.where(length > 0, bend, 0)  # the cosine has no slope at zero losses
        pull = jnp.asarray(penalty, bend.dtype) * bend / jnp.maximum(length, LEAST_LOSS)
        return chosen - pull, state

    return core.gradient_surgery(core.Weighting(tuple, update), name=name)


def pbi(
    penalty: float = 5.0,
    preference: core.PerTask | None = None,
    reference: core.PerTask | None = None,
) -> core.Surgery:
    r"""Penalty-based boundary intersection (PBI): along a ray of preference, and not far from it.

    With :math:`f = L - z^*` and the unit vector :math:`\hat \lambda`,

    .. math::
      d_1 = f^\top \hat\lambda, \qquad d_2 = \|f - d_1 \hat\lambda\|, \qquad
      \sum_i w_i g_i = \nabla (d_1 + \theta d_2), \qquad
      w = \hat\lambda + \theta\, \frac{f - d_1 \hat\lambda}{d_2}.

    Args:
      penalty: theta in the paper, at least 0; 5 in its experiments.
      preference: lambda in the paper, (T,) or a tree of numbers, each at least 0 and not all 0;
        1/T each by default (over the tasks that are not masked).
      reference: z* in the paper, the ideal point that losses are measured from, (T,) or a tree of
        any numbers; 0 by default.

    Returns:
      A `Surgery` from leaves `(T, *shape)` to leaves `(*shape)`.
      The weights have norm sqrt(1 + theta^2), or 1 on the ray; they may be negative.

    Raises:
      ValueError: at trace time, from `update`, if `losses` are missing, the gradients are not
        stacked, or `preference` or `reference` has not one entry per task; at once, for an argument
        out of its range.

    Note:
      On the ray d_2 has no gradient, and we take zero: where d_2 is but rounding error, below
      4 T times the machine epsilon of the norm of f.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_surgery as surgery
      >>> tx = surgery.pbi(penalty=0.5)
      >>> task_grads, losses = jnp.array([[1.0, 0.0], [0.0, 1.0]]), jnp.array([1.0, 3.0])
      >>> updates, state = tx.update(task_grads, tx.init(jnp.zeros(2)), losses=losses)
      >>> print([round(float(weight), 3) for weight in updates])
      [0.354, 1.061]

    References:
      Zhang and Li, `MOEA/D: A Multiobjective Evolutionary Algorithm Based on Decomposition
      <https://ieeexplore.ieee.org/document/4358754>`_, IEEE Transactions on Evolutionary
      Computation 2007.
    """

    name = checks.arguments(
        pbi,
        locals(),
        penalty="[0, inf)",
        preference="per task [0, inf)",
        reference="per task (-inf, inf)",
    )

    def update(tasks, state):
        losses = tasks.losses
        if reference is not None:
            losses = losses - tasks.read("reference", reference)
        ray, _ = _direction(tasks.preference(preference))
        direction, _ = _direction(jnp.where(tasks.task_mask, losses, 0))
        aside, distance = _direction(direction - jnp.sum(ray * direction) * ray)
        off_the_ray = distance > 4 * losses.size * jnp.finfo(losses.dtype).eps
        return ray + jnp.asarray(penalty, ray.dtype) * jnp.where(off_the_ray, aside, 0), state

    return core.gradient_surgery(core.Weighting(tuple, update), name=name)


def _above_zero(tasks: core.Tasks) -> jax.Array:
    """The tasks whose losses have a logarithm and an inverse."""
    return tasks.losses > 0


def _direction(vector: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The unit vector and the length, without squares out of range; a zero vector stays."""
    peak = jnp.max(jnp.abs(vector))
    scaled = vector / jnp.where(peak > 0, peak, 1)
    length = jnp.sqrt(jnp.sum(scaled**2))
    return scaled / jnp.maximum(length, 1), peak * length
