"""Linear programs against HiGHS, on constraints like those of EPO."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from optax_surgery.algebra import linear_program

BATCH = 30
SOLVE = jax.jit(jax.vmap(linear_program.maximise))


@functools.cache
def problems(num_tasks):
    """Full and half rank, strong conflict; bounds below zero, at zero, and without effect."""
    rng = np.random.default_rng(num_tasks)
    found = []
    for number in range(BATCH):
        rows = rng.normal(size=(num_tasks, num_tasks + 3))
        if number % 4 == 1:
            rows = rows[:, : (num_tasks + 1) // 2]
        if number % 4 == 2:
            signs = np.where(np.arange(num_tasks) % 2, 1, -1)[:, None]
            rows = rows + 3 * signs * rng.normal(size=(1, num_tasks + 3))
        rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        cosines = rows @ rows.T
        gains = cosines @ rng.normal(size=num_tasks)
        bounds = np.where(gains > 0, -2, gains)
        bounds[0] = 0
        if number % 4 == 3:
            bounds = np.zeros(num_tasks)
        found.append((gains, cosines, bounds, 10 ** rng.uniform(-1, 0, num_tasks)))
    return [np.stack(each) for each in zip(*found, strict=True)]


def best_value(objective, matrix, bounds, normal):
    return -scipy.optimize.linprog(
        -objective, A_ub=-matrix, b_ub=-bounds, A_eq=normal[None], b_eq=[1.0]
    ).fun


@pytest.mark.parametrize("num_tasks", [1, 2, 8, 20])
@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 1e-3), (np.float64, 1e-9)])
def test_nothing_feasible_is_better(num_tasks, dtype, tolerance):
    with jax.enable_x64(dtype is np.float64):
        numbers = [each.astype(dtype) for each in problems(num_tasks)]
        solution = SOLVE(*numbers)
    assert solution.converged.all()
    for x, *each in zip(np.asarray(solution.weights, float), *numbers, strict=True):
        objective, matrix, bounds, normal = (np.asarray(part, float) for part in each)
        size = max(1, x.max())
        assert x.min() >= 0
        assert abs(normal @ x - 1) < tolerance
        assert (matrix @ x - bounds).min() > -tolerance * size
        expected = best_value(objective, matrix, bounds, normal)
        assert abs(objective @ x - expected) < tolerance * max(1, abs(expected))


def test_constraints_that_exclude_one_another_are_told_and_least_violated():
    """x_1 + x_2 = 1, and both are to be 1 or more: together they lack 1, wherever x is."""
    solution = linear_program.maximise(jnp.ones(2), jnp.eye(2), jnp.ones(2), jnp.ones(2))
    assert not solution.converged
    np.testing.assert_allclose(jnp.sum(solution.weights), 1, rtol=1e-6)
    assert float(jnp.sum(jnp.maximum(1 - solution.weights, 0))) == pytest.approx(1)


def test_what_is_not_finite_is_no_solution():
    matrix = jnp.eye(2).at[0, 1].set(jnp.nan)
    solution = linear_program.maximise(jnp.ones(2), matrix, jnp.zeros(2), jnp.ones(2))
    assert not solution.converged


def test_the_vertex_moves_with_the_constraint_that_it_lies_on():
    """The largest x_1 with x_1 + x_2 = 1 and x_2 >= b is 1 - b."""

    def first(bound):
        bounds = jnp.stack([-1.0, bound])
        objective = jnp.array([1.0, 0.0])
        return linear_program.maximise(objective, jnp.eye(2), bounds, jnp.ones(2)).weights[0]

    value, slope = jax.value_and_grad(first)(0.25)
    assert float(value) == pytest.approx(0.75)
    assert float(slope) == pytest.approx(-1)
