"""PCGrad against Algorithm 1 of Yu et al. 2020 on vectors, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_surgery as surgery
from optax_surgery.core import random_orders
from optax_surgery.methods.pcgrad import pcgrad_weights
from tests.papers import gramian as papers


def updates_over_keys(jacobian, num_keys):
    state = surgery.pcgrad().init(None)
    keys = jax.random.split(jax.random.key(1), num_keys)
    update = jax.jit(jax.vmap(lambda key: surgery.pcgrad(key=key).update(jacobian, state)[0]))
    return np.asarray(update(keys), np.float64)


@pytest.mark.parametrize(("num_tasks", "num_keys"), [(3, 400), (4, 40_000)])
def test_every_update_is_one_of_algorithm_1_and_all_of_them_occur(num_tasks, num_keys):
    generator = np.random.default_rng(0)
    jacobian = generator.normal(size=(num_tasks, num_tasks - 1)).astype(np.float32)
    possible = np.unique(papers.pcgrad_all(jacobian).round(6), axis=0)
    assert len(possible) > 2, "the orders must matter for this Jacobian"

    found = updates_over_keys(jacobian, num_keys)
    distances = np.abs(found[:, None] - possible[None]).max(axis=-1)
    assert distances.min(axis=1).max() < 1e-5 * np.abs(jacobian).max()
    assert set(distances.argmin(axis=1)) == set(range(len(possible)))


def test_orders_are_independent_and_uniform():
    # T = 3: two orders for each task. All eight choices are equally likely.
    orders = jax.vmap(lambda key: random_orders(key, 3))(jax.random.split(jax.random.key(0), 8000))
    choices = np.asarray(orders[:, :, 0] < orders[:, :, 1]) @ np.array([4, 2, 1])
    counts = np.bincount(choices, minlength=8)
    chi_squared = ((counts - 1000) ** 2 / 1000).sum()
    assert chi_squared < 24.3  # 99.9 % quantile with 7 degrees of freedom


def test_no_task_meets_itself_and_each_other_once():
    orders = np.asarray(random_orders(jax.random.key(3), 7))
    for task, order in enumerate(orders):
        assert sorted(order) == [other for other in range(7) if other != task]


def test_steps_draw_new_orders():
    jacobian = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    tx = surgery.pcgrad(key=4)
    state, updates = tx.init(None), []
    for _ in range(6):
        update, state = tx.update(jacobian, state)
        updates.append(np.asarray(update))
    assert len(np.unique(np.stack(updates).round(5), axis=0)) > 1


@pytest.mark.parametrize("seed", range(20))
def test_two_tasks_have_a_closed_form(seed):
    jacobian = np.random.default_rng(seed).normal(size=(2, 5)).astype(np.float32)
    gram = jacobian.astype(np.float64) @ jacobian.T
    weights = np.ones(2)
    if gram[0, 1] < 0:
        weights = 1 - gram[0, 1] / np.diagonal(gram)
    tx = surgery.pcgrad()
    update, _ = tx.update(jacobian, tx.init(None))
    np.testing.assert_allclose(update, weights @ jacobian, rtol=1e-5, atol=1e-5)


def test_two_tasks_are_never_left_in_conflict():
    tx = surgery.pcgrad()
    for jacobian in np.random.default_rng(1).normal(size=(50, 2, 3)).astype(np.float32):
        update, _ = tx.update(jacobian, tx.init(None))
        assert (jacobian @ np.asarray(update)).min() > -1e-5


def test_three_tasks_may_be_left_in_conflict():
    # "13 % of Gaussian 3 x 3 matrices" conflict with some task; here at least one in 200.
    jacobians = np.random.default_rng(0).normal(size=(200, 3, 3)).astype(np.float32)
    tx = surgery.pcgrad()
    updates = jax.vmap(lambda jacobian: tx.update(jacobian, tx.init(None))[0])(jacobians)
    products = np.einsum("btn,bn->bt", jacobians, updates)
    share = (products.min(axis=1) < -1e-4).mean()
    assert 0.05 < share < 0.25


def test_a_task_that_is_left_out_of_its_own_order_is_not_projected_on_itself():
    # Unit gradients at 0, 150 and 200 degrees, task 0 meeting task 1, then task 2: including
    # itself would give (0, 0.30201) for task 0 (references: Algorithm 1, line 5).
    angles = np.deg2rad([0, 150, 200])
    jacobian = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    first = papers.pcgrad(jacobian, [[1, 2], [], []]) - jacobian[1] - jacobian[2]
    np.testing.assert_allclose(first, [-0.10992, 0.30201], atol=1e-5)
    orders = np.array([[1, 2], [2, 0], [0, 1]])
    weights = pcgrad_weights(jnp.asarray(jacobian @ jacobian.T), orders)
    np.testing.assert_allclose(
        np.asarray(weights) @ jacobian, papers.pcgrad(jacobian, orders), atol=1e-5
    )
