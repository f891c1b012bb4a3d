"""The structural properties that methods are proved to have, and those they lack.

Definitions are those of Quinton and Rey, Jacobian Descent for Multi-Objective
Optimization (arXiv 2406.16232). A property that the table denies needs a
counter-example, so that a wrong False fails as a wrong True does.
"""

import jax
import numpy as np
import pytest

from tests.cases import CASES, losses_of

every_method = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
deterministic = pytest.mark.parametrize(
    "case", [case for case in CASES.values() if not case.random],
    ids=[name for name, case in CASES.items() if not case.random],
)  # fmt: skip
NUM_TASKS, SIZE, DRAWS = 3, 6, 200


def jacobians(num_tasks=NUM_TASKS, draws=DRAWS):
    """Random Jacobians with norms and angles of many kinds."""
    generator = np.random.default_rng(0)
    rows = generator.normal(size=(draws, num_tasks, SIZE))
    common = generator.normal(size=(draws, 1, SIZE)) * np.linspace(-3, 3, draws)[:, None, None]
    norms = np.exp(generator.normal(size=(draws, num_tasks, 1)))
    signs = np.where(generator.random((draws, num_tasks, 1)) < 0.5, -1, 1)
    return ((rows + signs * common) * norms).astype("f4")


def updates_of(case, batch, **kwargs):
    return np.asarray(jax.vmap(lambda rows: case.step(rows, **kwargs)[0])(batch), np.float64)


def holds_as_declared(declared, violations, tolerance):
    """All violations are small if the property is declared, else one is large."""
    if declared:
        return violations.max() < tolerance
    return violations.max() > 10 * tolerance


def relative_to(batch, differences):
    sizes = np.linalg.norm(batch, axis=-1).max(axis=-1)
    return np.abs(differences).max(axis=-1) / sizes


@every_method
def test_non_conflicting(case):
    batch = jacobians()
    updates = updates_of(case, batch)
    sizes = np.linalg.norm(batch, axis=-1) * np.linalg.norm(updates, axis=-1)[:, None] + 1e-30
    cosines = np.einsum("btn,bn->bt", batch, updates) / sizes
    assert holds_as_declared(case.non_conflicting, -cosines.min(axis=1), 1e-3)


@deterministic
def test_permutation_equivariant(case):
    batch = jacobians()
    order = [2, 0, 1]
    permuted = updates_of(case, batch[:, order], losses=losses_of(NUM_TASKS)[order])
    plain = updates_of(case, batch)
    # One that is quadratic in the gradients has a scale of its own.
    scale = plain[:, None] if case.degree == 2 else batch
    differences = relative_to(scale, permuted - plain)
    assert holds_as_declared(case.permutation_equivariant, differences, 1e-4)


@every_method
def test_linear_under_scaling(case):
    batch = jacobians()
    generator = np.random.default_rng(1)
    first, second = generator.uniform(0.1, 2, size=(2, DRAWS, NUM_TASKS, 1)).astype("f4")
    together = updates_of(case, (0.3 * first + 0.9 * second) * batch)
    apart = 0.3 * updates_of(case, first * batch) + 0.9 * updates_of(case, second * batch)
    differences = relative_to(batch, together - apart)
    assert holds_as_declared(case.linear_under_scaling, differences, 1e-4)


@every_method
@pytest.mark.parametrize("scale", [0.125, 16.0])
def test_homogeneous_of_its_degree(case, scale):
    batch = jacobians()
    scaled, plain = updates_of(case, np.float32(scale) * batch), updates_of(case, batch)
    if case.degree is None:
        # There is none: the direction changes with the scale.
        scaled, plain = (
            updates / np.linalg.norm(updates, axis=-1, keepdims=True) for updates in (scaled, plain)
        )
        assert np.abs(scaled - plain).max() > 1e-3
        return
    assert relative_to(batch, scaled / scale**case.degree - plain).max() < 1e-4


@every_method
def test_positive_weights(case):
    if case.coordinates:
        pytest.skip("the update is no weighted sum of the task gradients")
    # Four tasks, one Jacobian after the other: by the program of the surgery of the identity.
    rows, identity = jacobians(4, 60), np.eye(4, dtype="f4")
    grams = np.einsum("btn,bsn->bts", rows, rows)
    least = min(np.min(case.step(identity, gramian=gram)[0]) for gram in grams)
    assert least > 0 if case.positive_weights else least < 1e-6
