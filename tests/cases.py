"""The one table of methods: how to make each, its paper's rule, and what it promises.

Generic tests walk it. A property that a method does not have is False here, and the
tests find a counter-example for it, so that no promise is forgotten either way.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import numpy as np
import optax

import optax_surgery as surgery
from tests import papers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One method.

    Attributes:
      make: num_tasks -> surgery.
      rule: (jacobian, losses) -> update of the first step: the paper's rule in float64
        numpy; None where the update is random.
      tolerance: of the update, relative to the longest of it and the task gradients, in
        float32, over well-conditioned Jacobians of three tasks.
      tolerance_x64: the same in float64, over Jacobians of up to 20 tasks, of full and
        deficient rank, norms spread over six orders of magnitude.
      keep: mask -> the surgery of the tasks that a mask leaves, where it is not
        `make(number of them)`: for methods made with one number per task.
      random: whether the update depends on the key.
      mask_in_law: masking equals leaving out in distribution only, as what a task draws
        depends on its number.
      coordinates: whether the method works on coordinates and refuses a Gramian.
      needs_gramian: whether the method needs the Gramian of two batches.
      non_conflicting: no update has a negative product with a task gradient (T <= n).
      permutation_equivariant: permuted tasks give the same update (in law, if random).
      linear_under_scaling: c -> update(diag(c) J) is linear for c > 0.
      degree: update(s J) = s^degree update(J).
      positive_weights: weights are always above zero, so that only Pareto stationary
        points have a zero update.
    """

    make: Callable[[int], optax.GradientTransformationExtraArgs]
    rule: Callable[[np.ndarray, np.ndarray], np.ndarray] | None
    tolerance: float = 1e-5
    tolerance_x64: float = 1e-9
    keep: Callable[[np.ndarray], optax.GradientTransformationExtraArgs] | None = None
    random: bool = False
    mask_in_law: bool = False
    coordinates: bool = False
    needs_gramian: bool = False
    non_conflicting: bool = False
    permutation_equivariant: bool = True
    linear_under_scaling: bool = False
    degree: float = 1.0
    positive_weights: bool = False

    @functools.cache  # noqa: B019  so that a surgery is compiled once in the whole run
    def surgery(self, num_tasks):
        return self.make(num_tasks)

    def extra_args(self, task_grads):
        """What `update` may need besides the gradients."""
        num_tasks = jax.tree.leaves(task_grads)[0].shape[0]
        extra = {"losses": losses_of(num_tasks)}
        return extra | ({"gramian": surgery.gramian(task_grads)} if self.needs_gramian else {})

    def step(self, task_grads, state=None, **kwargs):
        """One update of stacked gradients, from the initial state if none is given."""
        tx = self.surgery(jax.tree.leaves(task_grads)[0].shape[0])
        if state is None:
            state = tx.init(jax.tree.map(lambda leaf: leaf[0], task_grads))
        return tx.update(task_grads, state, **(self.extra_args(task_grads) | kwargs))


def losses_of(num_tasks):
    return np.linspace(0.5, 2.0, num_tasks).astype(np.float32)


def ramp(num_tasks):
    """Weights that differ from task to task."""
    return np.arange(1, num_tasks + 1, dtype=np.float32) / num_tasks


BASELINES = {
    "mean": Case(
        make=lambda num_tasks: surgery.mean(),
        rule=lambda jacobian, losses: jacobian.mean(axis=0),
        linear_under_scaling=True,
        positive_weights=True,
    ),
    "sum": Case(
        make=lambda num_tasks: surgery.sum(),
        rule=lambda jacobian, losses: jacobian.sum(axis=0),
        linear_under_scaling=True,
        positive_weights=True,
    ),
    "constant": Case(
        make=lambda num_tasks: surgery.constant(ramp(num_tasks)),
        rule=lambda jacobian, losses: ramp(len(jacobian)) @ jacobian,
        keep=lambda mask: surgery.constant(ramp(len(mask))[mask]),
        permutation_equivariant=False,
        linear_under_scaling=True,
        positive_weights=True,
    ),
}

FROM_THE_GRAMIAN = {
    "pcgrad": Case(
        make=lambda num_tasks: surgery.pcgrad(),
        rule=None,
        random=True,
        linear_under_scaling=True,
        positive_weights=True,
    ),
    "aligned_mtl": Case(
        make=lambda num_tasks: surgery.aligned_mtl(),
        rule=lambda jacobian, losses: papers.aligned_mtl(jacobian),
        tolerance=1e-4,
        tolerance_x64=2e-6,  # 1e-16 times the condition number of the Gramian
    ),
    "aligned_mtl_preference": Case(
        make=lambda num_tasks: surgery.aligned_mtl(ramp(num_tasks)),
        rule=lambda jacobian, losses: papers.aligned_mtl(jacobian, ramp(len(jacobian))),
        tolerance=1e-4,
        tolerance_x64=2e-6,
        keep=lambda mask: surgery.aligned_mtl(ramp(len(mask))[mask]),
        permutation_equivariant=False,
    ),
    "imtl_g": Case(
        make=lambda num_tasks: surgery.imtl_g(),
        rule=lambda jacobian, losses: papers.imtl_g(jacobian),
        tolerance=1e-3,
    ),
    "conflict_free": Case(
        make=lambda num_tasks: surgery.conflict_free(),
        rule=lambda jacobian, losses: papers.conflict_free(jacobian),
        tolerance=1e-4,
        non_conflicting=True,
        linear_under_scaling=True,
    ),
    "conflict_free_preference": Case(
        make=lambda num_tasks: surgery.conflict_free(ramp(num_tasks)),
        rule=lambda jacobian, losses: papers.conflict_free(jacobian, ramp(len(jacobian))),
        tolerance=1e-4,
        keep=lambda mask: surgery.conflict_free(ramp(len(mask))[mask]),
        non_conflicting=True,
        permutation_equivariant=False,
        linear_under_scaling=True,
    ),
    "gradops": Case(
        make=lambda num_tasks: surgery.gradops(),
        rule=lambda jacobian, losses: papers.gradops(jacobian),
        tolerance=1e-4,
        non_conflicting=True,
        linear_under_scaling=True,
    ),
    "ntkmtl": Case(
        make=lambda num_tasks: surgery.ntkmtl(),
        rule=lambda jacobian, losses: papers.ntkmtl(jacobian),
        positive_weights=True,
    ),
    "krum": Case(
        make=lambda num_tasks: surgery.krum(num_byzantine=0, num_selected=2),
        rule=lambda jacobian, losses: papers.krum(jacobian, 0, 2),
    ),
    "gradvac": Case(
        make=lambda num_tasks: surgery.gradvac(num_tasks),
        rule=None,
        random=True,
        linear_under_scaling=True,
        positive_weights=True,
    ),
    "cr_mogm": Case(
        make=lambda num_tasks: surgery.cr_mogm(surgery.conflict_free(), num_tasks),
        rule=lambda jacobian, losses: papers.conflict_free(jacobian),
        tolerance=1e-4,
        non_conflicting=True,
        linear_under_scaling=True,
    ),
}

FROM_THE_LOSSES = {}

FROM_THE_COORDINATES = {}

CASES = BASELINES | FROM_THE_GRAMIAN | FROM_THE_LOSSES | FROM_THE_COORDINATES
