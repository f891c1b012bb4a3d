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
from tests.papers import coordinates as papers_coordinates
from tests.papers import gramian as papers
from tests.papers import losses as papers_losses
from tests.papers import preferences as papers_preferences


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
      draws_per_leaf: whether leaves have draws of their own, so that the update depends on how
        the coordinates are split into leaves.
      non_conflicting: no update has a negative product with a task gradient (T <= n).
      permutation_equivariant: permuted tasks give the same update (in law, if random).
      linear_under_scaling: c -> update(diag(c) J) is linear for c > 0.
      degree: update(s J) = s^degree update(J); None where no degree does.
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
    draws_per_leaf: bool = False
    non_conflicting: bool = False
    permutation_equivariant: bool = True
    linear_under_scaling: bool = False
    degree: float | None = 1.0
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
    "mgda": Case(
        make=lambda num_tasks: surgery.mgda(),
        rule=lambda jacobian, losses: papers.nearest_to_zero(jacobian),
        tolerance=1e-4,
        tolerance_x64=1e-6,
        non_conflicting=True,
    ),
    "mgda_l2": Case(
        make=lambda num_tasks: surgery.mgda("l2"), rule=None, linear_under_scaling=True
    ),
    "mgda_loss": Case(make=lambda num_tasks: surgery.mgda("loss"), rule=None),
    "mgda_loss+": Case(
        make=lambda num_tasks: surgery.mgda("loss+"), rule=None, linear_under_scaling=True
    ),
    "cagrad": Case(
        make=lambda num_tasks: surgery.cagrad(),
        rule=lambda jacobian, losses: papers.cagrad(jacobian, 0.4),
        tolerance=1e-4,
        tolerance_x64=1e-6,
        positive_weights=True,
    ),
    "cagrad_rescaled": Case(
        make=lambda num_tasks: surgery.cagrad(0.9, rescale="1+c^2"),
        rule=lambda jacobian, losses: papers.cagrad(jacobian, 0.9) / 1.81,
        tolerance=1e-4,
        tolerance_x64=1e-6,
        positive_weights=True,
    ),
    "dualproj": Case(
        make=lambda num_tasks: surgery.dualproj(),
        rule=lambda jacobian, losses: papers.dualproj(jacobian),
        tolerance=1e-4,
        tolerance_x64=1e-6,
        non_conflicting=True,
        positive_weights=True,
    ),
    "dualproj_preference": Case(
        make=lambda num_tasks: surgery.dualproj(ramp(num_tasks)),
        rule=lambda jacobian, losses: papers.dualproj(jacobian, ramp(len(jacobian))),
        tolerance=1e-4,
        tolerance_x64=1e-6,
        keep=lambda mask: surgery.dualproj(ramp(len(mask))[mask]),
        non_conflicting=True,
        permutation_equivariant=False,
        positive_weights=True,
    ),
    "upgrad": Case(
        make=lambda num_tasks: surgery.upgrad(),
        rule=lambda jacobian, losses: papers.upgrad(jacobian),
        tolerance=1e-4,
        tolerance_x64=1e-6,
        non_conflicting=True,
        linear_under_scaling=True,
        positive_weights=True,
    ),
    "upgrad_preference": Case(
        make=lambda num_tasks: surgery.upgrad(ramp(num_tasks)),
        rule=lambda jacobian, losses: papers.upgrad(jacobian, ramp(len(jacobian))),
        tolerance=1e-4,
        tolerance_x64=1e-6,
        keep=lambda mask: surgery.upgrad(ramp(len(mask))[mask]),
        non_conflicting=True,
        permutation_equivariant=False,
        linear_under_scaling=True,
        positive_weights=True,
    ),
    "nash_mtl": Case(
        make=lambda num_tasks: surgery.nash_mtl(),
        rule=lambda jacobian, losses: papers.fair(jacobian, 1.0),
        tolerance=1e-4,
        tolerance_x64=1e-6,
        non_conflicting=True,
        degree=0.0,
        positive_weights=True,
    ),
    "fairgrad": Case(
        make=lambda num_tasks: surgery.fairgrad(),
        rule=lambda jacobian, losses: papers.fair(jacobian, 2.0),
        tolerance=1e-4,
        tolerance_x64=1e-6,
        non_conflicting=True,
        degree=-1 / 3,
        positive_weights=True,
    ),
    "fairgrad_half": Case(
        make=lambda num_tasks: surgery.fairgrad(0.5),
        rule=lambda jacobian, losses: papers.fair(jacobian, 0.5),
        tolerance=1e-4,
        tolerance_x64=1e-6,
        non_conflicting=True,
        degree=1 / 3,
        positive_weights=True,
    ),
    "pivrg": Case(
        make=lambda num_tasks: surgery.pivrg(30 * ramp(num_tasks)),
        rule=lambda jacobian, losses: papers.fair(
            jacobian, 2.0, papers.pivrg_factors(30.0 * ramp(len(jacobian)), 2.0, 10.0)
        ),
        tolerance=1e-4,
        tolerance_x64=1e-6,
        keep=lambda mask: surgery.pivrg(30 * ramp(len(mask))[mask]),
        non_conflicting=True,
        permutation_equivariant=False,
        degree=-1 / 3,
        positive_weights=True,
    ),
    "pcd": Case(
        make=lambda num_tasks: surgery.pcd(0, num_tasks, margin=0.3, epsilon=0.0),
        rule=lambda jacobian, losses: papers.pcd(
            jacobian, 0, 0.3, np.linalg.norm(jacobian, axis=1)
        ),
        tolerance=1e-4,
        tolerance_x64=1e-6,
        permutation_equivariant=False,
        linear_under_scaling=True,  # in the first step, whose norms are the averages
    ),
    "fedmgda": Case(
        make=lambda num_tasks: surgery.fedmgda(),
        rule=lambda jacobian, losses: papers.fedmgda(jacobian, 0.1),
        tolerance=1e-4,
        tolerance_x64=1e-6,
        degree=0.0,
        positive_weights=True,  # for fewer than 10 tasks
    ),
    "fedmgda_everywhere": Case(
        make=lambda num_tasks: surgery.fedmgda(1.0),
        rule=lambda jacobian, losses: papers.fedmgda(jacobian, 1.0),
        tolerance=1e-4,
        tolerance_x64=1e-6,
        non_conflicting=True,
        degree=0.0,
    ),
    "fedmgda_preference": Case(
        make=lambda num_tasks: surgery.fedmgda(0.3, ramp(num_tasks)),
        rule=lambda jacobian, losses: papers.fedmgda(jacobian, 0.3, ramp(len(jacobian))),
        tolerance=1e-4,
        tolerance_x64=1e-6,
        keep=lambda mask: surgery.fedmgda(0.3, ramp(len(mask))[mask]),
        permutation_equivariant=False,
        degree=0.0,
    ),
    "geometric_median": Case(
        make=lambda num_tasks: surgery.geometric_median(),
        rule=lambda jacobian, losses: papers.geometric_median(jacobian),
        tolerance_x64=1e-6,
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
    "conflict_free_harmonic": Case(
        make=lambda num_tasks: surgery.conflict_free(length="harmonic"),
        rule=lambda jacobian, losses: papers.conflict_free(jacobian, length="harmonic"),
        tolerance=1e-4,
        non_conflicting=True,
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
        make=lambda num_tasks: surgery.krum(num_byzantine=0, num_selected=min(2, num_tasks)),
        rule=lambda jacobian, losses: papers.krum(jacobian, 0, 2),
    ),
    "gradvac": Case(
        make=lambda num_tasks: surgery.gradvac(num_tasks),
        rule=None,
        random=True,
        linear_under_scaling=True,
        positive_weights=True,
    ),
    "inverse_norms": Case(
        make=lambda num_tasks: surgery.inverse_norms(num_tasks, decay=0.3),
        rule=lambda jacobian, losses: papers.inverse_norms(jacobian[None], 0.3)[0],
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

FROM_THE_LOSSES = {
    "random_weighting": Case(
        make=lambda num_tasks: surgery.random_weighting(),
        rule=None,
        random=True,
        linear_under_scaling=True,
        positive_weights=True,
    ),
    "gls": Case(
        make=lambda num_tasks: surgery.gls(),
        rule=lambda jacobian, losses: papers_losses.gls(losses) @ jacobian,
        linear_under_scaling=True,
        positive_weights=True,
    ),
    "scale_invariant": Case(
        make=lambda num_tasks: surgery.scale_invariant(),
        rule=lambda jacobian, losses: papers_losses.scale_invariant(losses) @ jacobian,
        linear_under_scaling=True,
        positive_weights=True,
    ),
    "stch": Case(
        make=lambda num_tasks: surgery.stch(0.5),
        rule=lambda jacobian, losses: papers_losses.stch(losses, 0.5) @ jacobian,
        linear_under_scaling=True,
        positive_weights=True,
    ),
    "stch_log_losses": Case(
        make=lambda num_tasks: surgery.stch(
            1.0, ramp(num_tasks), -ramp(num_tasks), log_losses=True
        ),
        rule=lambda jacobian, losses: (
            papers_losses.stch(losses, 1.0, ramp(len(jacobian)), -ramp(len(jacobian)), True)
            @ jacobian
        ),
        keep=lambda mask: surgery.stch(
            1.0, ramp(len(mask))[mask], -ramp(len(mask))[mask], log_losses=True
        ),
        permutation_equivariant=False,
        linear_under_scaling=True,
        positive_weights=True,
    ),
    "cosmos": Case(
        make=lambda num_tasks: surgery.cosmos(4.0),
        rule=lambda jacobian, losses: papers_losses.cosmos(losses, 4.0) @ jacobian,
        linear_under_scaling=True,
    ),
    "cosmos_preference": Case(
        make=lambda num_tasks: surgery.cosmos(8.0, ramp(num_tasks)[::-1]),
        rule=lambda jacobian, losses: (
            papers_losses.cosmos(losses, 8.0, ramp(len(jacobian))[::-1]) @ jacobian
        ),
        keep=lambda mask: surgery.cosmos(8.0, ramp(len(mask))[::-1][mask]),
        permutation_equivariant=False,
        linear_under_scaling=True,
    ),
    "pbi": Case(
        make=lambda num_tasks: surgery.pbi(),
        rule=lambda jacobian, losses: papers_losses.pbi(losses) @ jacobian,
        linear_under_scaling=True,
    ),
    "pbi_preference": Case(
        make=lambda num_tasks: surgery.pbi(2.0, ramp(num_tasks)[::-1], -ramp(num_tasks)),
        rule=lambda jacobian, losses: (
            papers_losses.pbi(losses, 2.0, ramp(len(jacobian))[::-1], -ramp(len(jacobian)))
            @ jacobian
        ),
        keep=lambda mask: surgery.pbi(2.0, ramp(len(mask))[::-1][mask], -ramp(len(mask))[mask]),
        permutation_equivariant=False,
        linear_under_scaling=True,
    ),
    "epo": Case(
        make=lambda num_tasks: surgery.epo(),
        rule=lambda jacobian, losses: papers_preferences.epo(jacobian, losses),
        tolerance=1e-4,
        tolerance_x64=1e-6,
    ),
    "epo_balanced": Case(
        make=lambda num_tasks: surgery.epo(ramp(num_tasks), tolerance=10.0),
        rule=lambda jacobian, losses: papers_preferences.epo(
            jacobian, losses, ramp(len(jacobian)), 10.0
        ),
        tolerance=1e-4,
        tolerance_x64=1e-6,
        keep=lambda mask: surgery.epo(ramp(len(mask))[mask], tolerance=10.0),
        non_conflicting=True,
        permutation_equivariant=False,
    ),
    "pmgda": Case(
        make=lambda num_tasks: surgery.pmgda(),
        rule=lambda jacobian, losses: papers_preferences.pmgda(jacobian, losses),
        tolerance=1e-4,
        tolerance_x64=1e-6,
        degree=0.0,
    ),
    "pmgda_near_the_ray": Case(
        make=lambda num_tasks: surgery.pmgda(ramp(num_tasks)[::-1], tolerance=10.0),
        rule=lambda jacobian, losses: papers_preferences.pmgda(
            jacobian, losses, ramp(len(jacobian))[::-1], tolerance=10.0
        ),
        tolerance=1e-4,
        tolerance_x64=1e-6,
        keep=lambda mask: surgery.pmgda(ramp(len(mask))[::-1][mask], tolerance=10.0),
        non_conflicting=True,
        permutation_equivariant=False,
    ),
    "uncertainty_weighting": Case(
        make=lambda num_tasks: surgery.uncertainty_weighting(num_tasks),
        rule=lambda jacobian, losses: (
            papers_losses.uncertainty_weighting(losses[None])[0] @ jacobian
        ),
        linear_under_scaling=True,
        positive_weights=True,
    ),
    "imtl_l": Case(
        make=lambda num_tasks: surgery.imtl_l(num_tasks),
        rule=lambda jacobian, losses: papers_losses.imtl_l(losses[None])[0] @ jacobian,
        linear_under_scaling=True,
        positive_weights=True,
    ),
    "imtl": Case(
        make=lambda num_tasks: surgery.imtl(num_tasks),
        rule=lambda jacobian, losses: papers_losses.imtl(jacobian[None], losses[None])[0],
        tolerance=1e-3,
    ),
    "dwa": Case(
        make=lambda num_tasks: surgery.dwa(num_tasks, window=1),
        rule=lambda jacobian, losses: papers_losses.dwa(losses[None], 1)[0] @ jacobian,
        linear_under_scaling=True,
        positive_weights=True,
    ),
    "softadapt": Case(
        make=lambda num_tasks: surgery.softadapt(num_tasks),
        rule=lambda jacobian, losses: papers_losses.softadapt(losses[None])[0] @ jacobian,
        linear_under_scaling=True,
        positive_weights=True,
    ),
    "relobralo": Case(
        make=lambda num_tasks: surgery.relobralo(num_tasks),
        rule=lambda jacobian, losses: papers_losses.relobralo(losses[None])[0] @ jacobian,
        linear_under_scaling=True,
        positive_weights=True,
    ),
    "famo": Case(
        make=lambda num_tasks: surgery.famo(num_tasks),
        rule=lambda jacobian, losses: papers_losses.famo(losses[None])[0] @ jacobian,
        linear_under_scaling=True,
        positive_weights=True,
    ),
    "famo_bounds": Case(
        make=lambda num_tasks: surgery.famo(num_tasks, lower_bounds=-ramp(num_tasks)),
        rule=lambda jacobian, losses: (
            papers_losses.famo(losses[None], -ramp(len(jacobian)))[0] @ jacobian
        ),
        keep=lambda mask: surgery.famo(mask.sum(), lower_bounds=-ramp(len(mask))[mask]),
        permutation_equivariant=False,
        linear_under_scaling=True,
        positive_weights=True,
    ),
    "go4align": Case(
        make=lambda num_tasks: surgery.go4align(num_tasks, num_groups=2),
        rule=lambda jacobian, losses: papers_losses.go4align(losses[None], 2)[0] @ jacobian,
        linear_under_scaling=True,
        positive_weights=True,
    ),
    "gradnorm": Case(
        make=lambda num_tasks: surgery.gradnorm(num_tasks),
        rule=lambda jacobian, losses: (
            papers_losses.gradnorm(jacobian[None], losses[None])[0] @ jacobian
        ),
        linear_under_scaling=True,
        positive_weights=True,
    ),
}

FROM_THE_COORDINATES = {
    "graddrop": Case(
        make=lambda num_tasks: surgery.graddrop(),
        rule=None,
        random=True,
        coordinates=True,
        draws_per_leaf=True,
    ),
    "trimmed_mean": Case(
        make=lambda num_tasks: surgery.trimmed_mean(int(num_tasks > 2)),
        rule=lambda jacobian, losses: papers_coordinates.trimmed_mean(jacobian, len(jacobian) > 2),
        coordinates=True,
    ),
    "coordinate_median": Case(
        make=lambda num_tasks: surgery.coordinate_median(),
        rule=lambda jacobian, losses: papers_coordinates.coordinate_median(jacobian),
        coordinates=True,
    ),
    "excess_mtl": Case(
        make=lambda num_tasks: surgery.excess_mtl(num_tasks),
        rule=lambda jacobian, losses: papers_coordinates.excess_mtl(jacobian[None])[0][0],
        coordinates=True,
        linear_under_scaling=True,
    ),
    "learning_rate_annealing": Case(
        make=lambda num_tasks: surgery.learning_rate_annealing(0, num_tasks),
        rule=lambda jacobian, losses: papers_coordinates.annealed(jacobian[None])[0][0],
        coordinates=True,
        permutation_equivariant=False,
        linear_under_scaling=True,
    ),
    "db_mtl": Case(
        make=lambda num_tasks: surgery.db_mtl(num_tasks),
        rule=lambda jacobian, losses: papers_coordinates.db_mtl(jacobian[None], losses[None])[0],
        coordinates=True,
    ),
    "moco": Case(
        make=lambda num_tasks: surgery.moco(num_tasks),
        rule=lambda jacobian, losses: papers_coordinates.moco(jacobian[None])[0][0],
        coordinates=True,
        degree=None,
    ),
    "momentum_conflict_free": Case(
        make=lambda num_tasks: surgery.momentum_conflict_free(num_tasks),
        rule=lambda jacobian, losses: papers_coordinates.conflict_free(jacobian),
        tolerance=1e-4,
        coordinates=True,
        non_conflicting=True,
        linear_under_scaling=True,
    ),
    "sam_gs": Case(
        make=lambda num_tasks: surgery.sam_gs(num_tasks, threshold=0.0),
        rule=lambda jacobian, losses: papers_coordinates.sam_gs(jacobian[None], threshold=0)[0][0],
        coordinates=True,
        degree=2.0,
    ),
    "sam_gs_equal": Case(
        make=lambda num_tasks: surgery.sam_gs(num_tasks, threshold=1.0),
        rule=lambda jacobian, losses: papers_coordinates.sam_gs(jacobian[None], threshold=1)[0][0],
        coordinates=True,
        linear_under_scaling=True,
    ),
    "modo": Case(
        make=lambda num_tasks: surgery.modo(num_tasks),
        rule=lambda jacobian, losses: papers_coordinates.modo(*[jacobian[None]] * 3)[0][0],
        needs_gramian=True,
        degree=None,
    ),
    "sdmgrad": Case(
        # With the default of 10 the solver doubles rounding errors in every iteration.
        make=lambda num_tasks: surgery.sdmgrad(num_tasks, learning_rate=0.3),
        rule=lambda jacobian, losses: papers_coordinates.sdmgrad(
            *[jacobian[None]] * 3, learning_rate=0.3
        )[0][0],
        needs_gramian=True,
        positive_weights=True,
    ),
}

CASES = BASELINES | FROM_THE_GRAMIAN | FROM_THE_LOSSES | FROM_THE_COORDINATES
# Every method with its defaults. The other rows have other arguments, and differ in the rule only.
METHODS = {name: case for name, case in CASES.items() if hasattr(surgery, name)}
