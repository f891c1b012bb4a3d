"""FAMO: weights under which the logarithms of all losses fall equally fast."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_surgery import checks, core

# As in the authors' code, a loss is taken to be this much above its lower bound.
EPSILON = 1e-8


class FAMOState(NamedTuple):
    """State of `famo`.

    Attributes:
      logits: (T,) the learnt logits of the weights, xi in the paper.
      optimizer_state: the leaves of the optimiser's state.
      last_gaps: (T,) losses above their bounds when a task last took part, 0 before.
    """

    logits: jax.Array
    optimizer_state: optax.OptState
    last_gaps: jax.Array


def famo_slopes(logits: jax.Array, decreases: jax.Array, present: jax.Array) -> jax.Array:
    """The gradient of softmax(logits) . decreases in the logits, over the tasks present."""

    def total(logits):
        shares = jax.nn.softmax(jnp.where(present, logits, jnp.finfo(logits.dtype).min))
        return jnp.sum(jnp.where(present, shares * decreases, 0))

    return jax.grad(total)(logits)


def famo(
    num_tasks: int,
    lower_bounds: core.PerTask | None = None,
    decay: float = 1e-3,
    optimizer: optax.GradientTransformation | None = None,
) -> core.Surgery:
    r"""FAMO: weights the tasks so that the logarithms of their losses fall equally fast.

    With :math:`D_i = L_i - b_i` and learnt logits :math:`\xi` that begin at 0, the update is the
    gradient of :math:`c \sum_i z_i \log D_i` with a constant c that makes weights add up to 1:

    .. math::
      z = \mathrm{softmax}(\xi), \qquad w_i = c\, \frac{z_i}{D_i}, \qquad
      \frac1c = \sum_i \frac{z_i}{D_i}.

    From the second step on, the logits are updated first, by how much each task has gained:

    .. math::
      \xi \leftarrow \xi - \beta (\delta + \gamma \xi), \qquad
      \delta = \Big( \frac{\partial z}{\partial \xi} \Big)^{\!\top}
        \big( \log D^{\text{last}} - \log D \big).

    Args:
      num_tasks: number of tasks T, at least 1.
      lower_bounds: least possible losses, b, (T,) or a tree of any numbers; 0 by default.
      decay: gamma in the paper, at least 0. The authors have 0.001 for NYUv2, QM9 and CelebA,
        0.01 for Cityscapes and 0 for their toy problem.
      optimizer: what steps the logits; by default `optax.adam(0.025)`, beta in the paper being
        its learning rate.

    Returns:
      A `Surgery` from leaves `(T, *shape)` to leaves `(*shape)`.
      The update is a weighted mean; weights are above zero and add up to 1.

    Raises:
      ValueError: at trace time, from `update`, if `losses` are missing, the gradients are not
        those of `num_tasks` tasks, or `lower_bounds` has not one entry per task; at once, for an
        argument out of its range.

    Note:
      The authors evaluate the losses of the same batch again after the step. Here the gain is
      that from the losses of one `update` to those of the next one, as in the code of their toy
      problem: no second forward pass, but noise where batches differ. As in their code, the decay
      goes through Adam. They clip the update to norm 1, which
      `optax.chain(famo(T), optax.clip_by_global_norm(1.0))` does. A task that was masked is
      compared with when it last took part, and a task seen for the first time has no gain yet.
      Losses have to be above their bounds: the task of one that is not has weight zero in that
      step, and is counted in the state.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_surgery as surgery
      >>> tx = surgery.famo(num_tasks=2)
      >>> task_grads, losses = jnp.array([[1.0, 0.0], [0.0, 1.0]]), jnp.array([1.0, 3.0])
      >>> updates, state = tx.update(task_grads, tx.init(jnp.zeros(2)), losses=losses)
      >>> print([round(float(weight), 3) for weight in updates])
      [0.75, 0.25]
      >>> losses = jnp.array([0.5, 3.0])  # the second task gained less
      >>> updates, state = tx.update(task_grads, state, losses=losses)
      >>> print(state.weighting_state.logits.round(3))
      [-0.025  0.025]

    References:
      Liu et al., `FAMO: Fast Adaptive Multitask Optimization
      <https://arxiv.org/abs/2306.03792>`_, NeurIPS 2023, Algorithm 1.
    """
    name = checks.arguments(
        famo,
        locals(),
        num_tasks="int [1, inf)",
        lower_bounds="per task (-inf, inf)",
        decay="[0, inf)",
        optimizer=optax.GradientTransformation,
    )
    learner = core.unnamed_state(optax.adam(0.025) if optimizer is None else optimizer, num_tasks)

    def init():
        zeros = jnp.zeros(num_tasks)
        return FAMOState(zeros, learner.init(zeros), jnp.zeros_like(zeros))

    def gaps_of(tasks):
        if lower_bounds is None:
            return tasks.losses
        return tasks.losses - tasks.read("lower_bounds", lower_bounds)

    def update(tasks, state):
        task_mask = tasks.task_mask
        gaps = (jnp.maximum(gaps_of(tasks), 0) + EPSILON).astype(state.logits.dtype)
        present = task_mask & (state.last_gaps > 0)
        last_gaps = jnp.where(present, state.last_gaps, 1)
        decreases = jnp.log(last_gaps) - jnp.log(jnp.where(present, gaps, 1))
        slopes = famo_slopes(state.logits, decreases, present)
        steps, optimizer_state = learner.update(
            slopes + jnp.asarray(decay, slopes.dtype) * state.logits,
            state.optimizer_state,
            state.logits,
        )
        # What belongs to an absent task stays, and all stays where no task is compared.
        logits, optimizer_state = jax.tree.map(
            lambda new, old: jnp.where(present if new.shape else jnp.any(present), new, old),
            (state.logits + steps, optimizer_state),
            (state.logits, state.optimizer_state),
        )
        scores = jnp.where(task_mask, logits - jnp.log(gaps), jnp.finfo(gaps.dtype).min)
        last_gaps = jnp.where(task_mask, gaps, state.last_gaps)
        return jax.nn.softmax(scores), FAMOState(logits, optimizer_state, last_gaps)

    weighting = core.Weighting(init, update, usable=lambda tasks: gaps_of(tasks) > 0)
    return core.gradient_surgery(weighting, name=name, num_tasks=num_tasks)
