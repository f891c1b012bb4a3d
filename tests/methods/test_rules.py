"""Each method equals its paper's rule, stated in float64 numpy, on a hundred Jacobians and more."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_surgery as surgery
from tests.cases import CASES, losses_of
from tests.papers import gramian as papers

deterministic = pytest.mark.parametrize(
    "case",
    [case for case in CASES.values() if case.rule],
    ids=[name for name, case in CASES.items() if case.rule],
)


def jacobians(num_tasks, size, draws, seed=0):
    """Five kinds of Jacobians, `draws` of each, float64 (5 * draws, num_tasks, size)."""
    generator = np.random.default_rng(seed)
    shape = (draws, num_tasks, size)
    full = generator.normal(size=shape)
    rank = (num_tasks + 1) // 2
    mixing = generator.normal(size=(draws, num_tasks, rank))
    if rank == 1:  # parallel to the last bit: by rounding, opposite rows could cease to be so
        mixing = np.sign(mixing) * 2.0 ** np.arange(num_tasks)[:, None]
    deficient = mixing @ generator.normal(size=(draws, rank, size))
    spread = full * 10 ** generator.uniform(-3, 3, size=(draws, num_tasks, 1))
    common = generator.normal(size=(draws, 1, size))
    signs = np.where(np.arange(num_tasks) % 2, -1, 1)[None, :, None]
    conflicting = signs * common + 0.3 * generator.normal(size=shape)
    parallel = common + 0.03 * generator.normal(size=shape)
    return np.concatenate([full, deficient, spread, conflicting, parallel])


def errors(case, batch):
    """Differences from the paper's rule, relative to the update and the gradients.

    Where the paper's equations have no solution, the state must say so and there is no error.
    """
    losses = losses_of(batch.shape[1])
    # One after the other, by programs that the tests of numbers have, too.
    steps = [case.step(rows) for rows in batch]
    updates, states = jax.tree.map(lambda *leaves: np.stack(leaves), *steps)
    exact_losses = losses.astype(np.float64)
    expected = np.stack([case.rule(rows.astype(np.float64), exact_losses) for rows in batch])
    unsolvable = np.isnan(expected).any(axis=-1)
    if unsolvable.any():
        assert not np.asarray(states.weighting_state.converged)[unsolvable].any()
    sizes = np.linalg.norm(batch.astype(np.float64), axis=-1).max(axis=-1)
    sizes = np.maximum(sizes, np.linalg.norm(expected, axis=-1))
    found = np.abs(np.asarray(updates, np.float64) - expected).max(axis=-1) / sizes
    return np.where(unsolvable, 0, found)


@deterministic
@pytest.mark.parametrize(("num_tasks", "size", "seed"), [(4, 6, 0), (20, 24, 0)])
def test_equals_the_papers_rule_in_float64(case, num_tasks, size, seed):
    with jax.enable_x64(True):
        batch = jacobians(num_tasks, size, draws=7, seed=seed)
        assert errors(case, batch).max() < case.tolerance_x64


@deterministic
@pytest.mark.parametrize("num_tasks", [1, 2, 4])
def test_equals_the_papers_rule_in_float32(case, num_tasks):
    generator = np.random.default_rng(0)
    norms = np.exp(generator.normal(size=(50, num_tasks, 1)))
    rows = generator.normal(size=(50, num_tasks, 6)) * norms
    assert errors(case, rows.astype("f4")).max() < case.tolerance


@pytest.mark.parametrize(
    "length", ["projections", "minimum", "harmonic", "geometric", "arithmetic"]
)
def test_the_length_of_conflict_free_is_chosen(length):
    jacobian = np.random.default_rng(0).normal(size=(3, 8)) * np.array([[1.0], [100.0], [0.01]])
    tx = surgery.conflict_free(length=length)
    updates, _ = tx.update(jnp.asarray(jacobian, "f4"), tx.init(jnp.zeros(8)))
    expected = papers.conflict_free(jacobian, length=length)
    np.testing.assert_allclose(updates, expected, atol=1e-4 * np.linalg.norm(expected))
    with jax.debug_nans(True):
        zeros = tx.update(jnp.zeros((3, 8)), tx.init(jnp.zeros(8)))[0]
    np.testing.assert_array_equal(zeros, 0)


def test_every_task_has_a_margin_of_its_own():
    jacobian, margins = np.random.default_rng(2).normal(size=(4, 9)), np.array([0.0, 0.4, 0.0, 0.9])
    update = {}
    for name, margin in {"array": margins, "dict": dict(zip("abcd", margins, strict=True))}.items():
        tx = surgery.pcd(primary=2, num_tasks=4, margin=margin, epsilon=0.0)
        update[name], state = tx.update(jnp.asarray(jacobian, "f4"), tx.init(jnp.zeros(9)))
        assert state.weighting_state.report.converged
    expected = papers.pcd(jacobian, 2, margins, np.linalg.norm(jacobian, axis=1))
    np.testing.assert_allclose(update["array"], expected, atol=1e-4 * np.linalg.norm(expected))
    np.testing.assert_array_equal(update["array"], update["dict"])


def test_averages_begin_with_chosen_weights():
    tx = surgery.cr_mogm(surgery.mean(), 2, decay=0.75, initial_weights=np.array([1.5, -0.5]))
    state, rows = tx.init(jnp.zeros(2)), jnp.eye(2)
    for step in range(1, 4):
        weights, state = tx.update(rows, state)
        share = 0.75**step
        np.testing.assert_allclose(weights, [0.5 + share, 0.5 - share], rtol=1e-6)
