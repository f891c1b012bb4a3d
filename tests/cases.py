"""The one table of methods: how to make each, its paper's rule, and what it promises.

Generic tests walk it. A property that a method does not have is False here, and the
tests find a counter-example for it, so that no promise is forgotten either way.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
import optax

import optax_surgery as surgery
from tests import papers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One method.

    Attributes:
      make: num_tasks -> surgery.
      keep: mask -> the surgery of the tasks that a mask leaves, where it is not
        `make(number of them)`: for methods made with one number per task.
      rule: float64 Jacobian -> update, the paper's rule; None where the update is random.
      tolerance: of the update, relative to the largest task gradient, in float32.
      random: whether the update depends on the key.
      non_conflicting: no update has a negative product with a task gradient (T <= n).
      permutation_equivariant: permuted tasks give the same update (in law, if random).
      linear_under_scaling: c -> update(diag(c) J) is linear for c > 0.
      degree: update(s J) = s^degree update(J).
      positive_weights: weights are always above zero, so that only Pareto stationary
        points have a zero update.
    """

    make: Callable[[int], optax.GradientTransformationExtraArgs]
    rule: Callable[[np.ndarray], np.ndarray] | None
    keep: Callable[[np.ndarray], optax.GradientTransformationExtraArgs] | None = None
    tolerance: float = 1e-5
    random: bool = False
    non_conflicting: bool = False
    permutation_equivariant: bool = True
    linear_under_scaling: bool = False
    degree: float = 1.0
    positive_weights: bool = False


def ramp(num_tasks):
    """Weights that differ from task to task."""
    return np.arange(1, num_tasks + 1, dtype=np.float32) / num_tasks


CASES = {
    "mean": Case(
        make=lambda num_tasks: surgery.mean(),
        rule=papers.mean,
        linear_under_scaling=True,
        positive_weights=True,
    ),
    "sum": Case(
        make=lambda num_tasks: surgery.sum(),
        rule=papers.sum,
        linear_under_scaling=True,
        positive_weights=True,
    ),
    "constant": Case(
        make=lambda num_tasks: surgery.constant(ramp(num_tasks)),
        rule=lambda jacobian: papers.constant(jacobian, ramp(len(jacobian))),
        keep=lambda mask: surgery.constant(ramp(len(mask))[mask]),
        permutation_equivariant=False,
        linear_under_scaling=True,
        positive_weights=True,
    ),
    "pcgrad": Case(
        make=lambda num_tasks: surgery.pcgrad(),
        rule=None,
        random=True,
        linear_under_scaling=True,
        positive_weights=True,
    ),
    "aligned_mtl": Case(
        make=lambda num_tasks: surgery.aligned_mtl(),
        rule=papers.aligned_mtl,
        tolerance=1e-4,
    ),
    "aligned_mtl_preference": Case(
        make=lambda num_tasks: surgery.aligned_mtl(ramp(num_tasks)),
        rule=lambda jacobian: papers.aligned_mtl(jacobian, ramp(len(jacobian))),
        keep=lambda mask: surgery.aligned_mtl(ramp(len(mask))[mask]),
        tolerance=1e-4,
        permutation_equivariant=False,
    ),
}
