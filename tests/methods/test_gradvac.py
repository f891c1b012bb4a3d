"""GradVac against Algorithm 1 of Wang et al. 2021 on vectors, in float64."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

import optax_surgery as surgery
from optax_surgery.methods.gradvac import gradvac_weights
from tests.papers import gramian as papers


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.99])
def test_a_run_of_steps_is_that_of_algorithm_1(decay):
    generator = np.random.default_rng(0)
    num_tasks, targets = 4, np.zeros((4, 4))
    found_targets = jnp.zeros((4, 4))
    for _ in range(10):
        jacobian = generator.normal(size=(num_tasks, 6)).astype("f4").astype("f8")
        orders = np.stack(
            [
                generator.permutation([j for j in range(num_tasks) if j != i])
                for i in range(num_tasks)
            ]
        )
        expected = papers.gradvac(jacobian, orders, targets, decay)
        gramian = jnp.asarray(jacobian @ jacobian.T, jnp.float32)
        weights, found_targets = gradvac_weights(gramian, jnp.asarray(orders), found_targets, decay)
        np.testing.assert_allclose(weights @ jacobian, expected, rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(found_targets, targets, atol=1e-4)


def test_the_first_step_is_one_of_pcgrads():
    jacobian = np.random.default_rng(3).normal(size=(3, 2))
    tx = surgery.gradvac(3)
    update, _ = tx.update(jacobian.astype("f4"), tx.init(None))
    distances = np.abs(papers.pcgrad_all(jacobian) - np.asarray(update)).max(axis=1)
    assert distances.min() < 1e-5


def test_without_averaging_it_stays_pcgrad():
    tx = surgery.gradvac(3, decay=1.0)
    state = tx.init(None)
    for seed in range(5):
        jacobian = np.random.default_rng(seed).normal(size=(3, 2))
        update, state = tx.update(jacobian.astype("f4"), state)
        assert np.abs(papers.pcgrad_all(jacobian) - np.asarray(update)).max(axis=1).min() < 1e-5


def test_a_turned_gradient_has_the_cosine_that_was_its_goal():
    jacobian = np.array([[1.0, 0.0], [-0.5, 1.0]])
    goals = jnp.array([[0.0, 0.6], [0.3, 0.0]])
    weights, _ = gradvac_weights(
        jnp.asarray(jacobian @ jacobian.T, jnp.float32), jnp.array([[1], [0]]), goals, 0.5
    )
    # weights = 1 + the step of the other task, so that each step can be read off
    for i, j in itertools.permutations(range(2)):
        turned = jacobian[i] + (weights[j] - 1) * jacobian[j]
        cosine = turned @ jacobian[j] / np.linalg.norm(turned) / np.linalg.norm(jacobian[j])
        np.testing.assert_allclose(cosine, goals[i, j], atol=1e-5)
