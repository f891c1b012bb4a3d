"""Aligned-MTL against the singular value decomposition in float64."""

import jax
import numpy as np
import pytest

import optax_surgery as surgery
from tests.papers import gramian as papers

MODES = ["min", "median", "rmse"]


def jacobian_of_rank(num_tasks, rank, seed, size=12):
    generator = np.random.default_rng(seed)
    left = np.linalg.qr(generator.normal(size=(num_tasks, rank)))[0]
    right = np.linalg.qr(generator.normal(size=(size, rank)))[0]
    return (left * np.linspace(1, 3, rank) @ right.T).astype(np.float64)


def update_of(jacobian, **kwargs):
    tx = surgery.aligned_mtl(**kwargs)
    return np.asarray(tx.update(jacobian, tx.init(None))[0], np.float64)


@pytest.mark.parametrize("scale_mode", MODES)
@pytest.mark.parametrize(("num_tasks", "rank"), [(1, 1), (2, 2), (3, 2), (4, 4), (5, 3), (10, 7)])
def test_equals_the_singular_value_decomposition(num_tasks, rank, scale_mode):
    preference = np.random.default_rng(9).uniform(0.1, 1, num_tasks)
    for seed in range(2):
        jacobian = jacobian_of_rank(num_tasks, rank, seed)
        expected = papers.aligned_mtl(jacobian, preference, scale_mode)
        single = update_of(jacobian.astype("f4"), preference=preference, scale_mode=scale_mode)
        np.testing.assert_allclose(single, expected, atol=2e-5)
        with jax.enable_x64(True):
            double = update_of(jacobian, preference=preference, scale_mode=scale_mode)
        np.testing.assert_allclose(double, expected, atol=1e-12)


@pytest.mark.parametrize("num_tasks", [2, 3, 8])
def test_norm_is_the_least_singular_value_times_that_of_the_preference(num_tasks):
    jacobian = jacobian_of_rank(num_tasks, num_tasks, seed=0) * 0.3
    preference = np.linspace(0.2, 1, num_tasks)
    norm = np.linalg.norm(update_of(jacobian.astype("f4"), preference=preference))
    np.testing.assert_allclose(norm, 0.3 * np.linalg.norm(preference), rtol=1e-5)


def test_ones_give_the_authors_scale_which_is_num_tasks_times_ours():
    jacobian = jacobian_of_rank(4, 4, seed=1).astype("f4")
    theirs = update_of(jacobian, preference=np.ones(4))
    np.testing.assert_allclose(theirs, 4 * update_of(jacobian), rtol=1e-5)


def test_the_weighted_loss_never_rises_to_first_order():
    generator = np.random.default_rng(2)
    tx = surgery.aligned_mtl()
    for jacobian in generator.normal(size=(50, 4, 6)).astype("f4"):
        update, _ = tx.update(jacobian, tx.init(None))
        assert np.asarray(update) @ jacobian.mean(axis=0) >= -1e-6


@pytest.mark.parametrize("scale_mode", MODES)
def test_all_gradients_zero_gives_the_preference_as_weights(scale_mode):
    tx = surgery.aligned_mtl(scale_mode=scale_mode)
    weights, _ = tx.update(np.eye(3, dtype="f4"), tx.init(None), gramian=np.zeros((3, 3), "f4"))
    np.testing.assert_allclose(weights, np.full(3, 1 / 3), rtol=1e-6)


def test_an_unknown_scale_mode_is_refused():
    with pytest.raises(ValueError, match=r"Expected one of .*'rmse'.*got 'max' at 'scale_mode'"):
        surgery.aligned_mtl(scale_mode="max")
