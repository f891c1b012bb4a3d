"""How the gradients of tasks agree, and the control beside it."""

import jax
import numpy as np
import pytest

from benchmarks.common import agreement


@pytest.mark.parametrize(("size", "batch_size", "expected"), [(100, 8, 8), (10, 8, 5), (11, 64, 5)])
def test_two_batches_share_no_example(size, batch_size, expected):
    halves = np.asarray(agreement.disjoint_batches(jax.random.key(0), size, batch_size))
    assert halves.shape == (2, expected)
    assert len(np.unique(halves)) == 2 * expected
    assert halves.min() >= 0
    assert halves.max() < size


def test_cosines_are_between_batches_and_their_diagonal_is_one_tasks_own():
    rng = np.random.default_rng(0)
    grads = {"kernel": rng.normal(size=(2, 3, 4, 5)), "bias": rng.normal(size=(2, 3, 5))}
    grads = {name: leaf.astype(np.float32) for name, leaf in grads.items()}
    flat = np.concatenate([leaf.reshape(2, 3, -1) for leaf in grads.values()], -1, dtype=float)
    first, second = flat / np.linalg.norm(flat, axis=-1, keepdims=True)
    found = agreement.cosines_on_two_batches(jax.tree.map(jax.numpy.asarray, grads))
    np.testing.assert_allclose(found, first @ second.T, atol=1e-6)


def test_split_takes_each_pair_twice_and_the_diagonal_once():
    cosines = np.arange(2 * 9.0).reshape(2, 3, 3)
    between, same = agreement.split(cosines.tolist())
    np.testing.assert_array_equal(same, [[0, 4, 8], [9, 13, 17]])
    np.testing.assert_array_equal(between[0], [1, 2, 3, 5, 6, 7])
    assert between.shape == (2, 6)


def test_the_sentence_counts_conflicts_between_tasks_only():
    cosines = [[[-1.0, 0.3], [-0.05, 0.5]], [[0.5, -0.4], [0.2, 1.0]]]
    assert agreement.in_words("sum", cosines) == (
        "Trained with sum, 50% of the pairs of tasks conflict, 25% by more than -0.1; the mean "
        "cosine is +0.01, of one task on two batches +0.25."
    )
