"""Positive definite systems against numpy's float64 solutions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_surgery.algebra import factor

SIZES = pytest.mark.parametrize("size", [1, 2, 3, 8, 12, 13, 20])
FLOATS = pytest.mark.parametrize("dtype", [np.float32, np.float64])


@jax.jit
def solve(matrix, right_side):
    return factor.positive_definite_solver(matrix)(right_side)


def problem(rng, size, condition):
    """A matrix of cosines of this condition number."""
    basis = np.linalg.qr(rng.standard_normal((size, size)))[0]
    matrix = basis * np.geomspace(1, condition, size) @ basis.T
    norms = np.sqrt(np.diag(matrix))
    return matrix / norms[:, None] / norms, rng.standard_normal((size, 3))


@FLOATS
@SIZES
def test_solutions_are_right_up_to_the_condition_number(size, dtype):
    matrix, right = problem(np.random.default_rng(size), size, 100)
    expected = np.linalg.solve(matrix.astype(dtype).astype(float), right.astype(dtype))
    with jax.enable_x64(dtype == np.float64):
        found = np.asarray(solve(matrix.astype(dtype), right.astype(dtype)))
        single = np.asarray(solve(matrix.astype(dtype), right[:, 0].astype(dtype)))
    tolerance = 300 * np.finfo(dtype).eps
    assert found.dtype == dtype
    assert np.linalg.norm(found - expected) <= tolerance * np.linalg.norm(expected)
    assert np.linalg.norm(single - expected[:, 0]) <= tolerance * np.linalg.norm(expected)


@SIZES
def test_scales_of_the_variables_do_not_matter(size):
    """The solvers' matrices have diagonals over dozens of orders of magnitude."""
    rng = np.random.default_rng(size)
    matrix, right = problem(rng, size, 10)
    scale = 2.0 ** rng.integers(-25, 25, size)
    scaled = (matrix * scale[:, None] * scale).astype(np.float32)
    found = solve(scaled, (right * scale[:, None]).astype(np.float32)) * scale[:, None]
    np.testing.assert_allclose(found, np.linalg.solve(matrix, right), rtol=1e-3, atol=1e-5)


@SIZES
def test_a_batch_of_batches_gives_what_single_solves_give(size):
    rng = np.random.default_rng(size)
    matrices, sides = zip(*[problem(rng, size, 10) for _ in range(6)], strict=True)
    matrices = np.stack(matrices).reshape(2, 3, size, size).astype(np.float32)
    sides = np.stack(sides).reshape(2, 3, size, 3).astype(np.float32)
    found = jax.jit(jax.vmap(jax.vmap(solve)))(matrices, sides)
    np.testing.assert_allclose(found, np.linalg.solve(matrices, sides), rtol=1e-3, atol=1e-5)
    shared = jax.vmap(solve, in_axes=(None, 0))(matrices[0, 0], sides[0])
    np.testing.assert_allclose(
        shared, np.linalg.solve(matrices[0, 0][None], sides[0]), rtol=1e-3, atol=1e-5
    )


@SIZES
def test_a_matrix_with_a_nan_has_no_solution(size):
    matrix, right = problem(np.random.default_rng(size), size, 10)
    matrix[0], matrix[:, 0] = np.nan, np.nan
    assert np.isnan(solve(matrix.astype(np.float32), right.astype(np.float32))).all()


@pytest.mark.parametrize("kind", ["zero", "negative", "rank one"])
def test_matrices_that_are_not_definite_make_no_nan_at_small_sizes(kind):
    matrix = {"zero": np.zeros, "negative": lambda shape: -np.eye(*shape), "rank one": np.ones}
    with jax.debug_nans(True):
        found = solve(matrix[kind]((4, 4)).astype(np.float32), np.zeros((4, 1), np.float32))
    assert np.isfinite(found).all()


def test_small_systems_call_no_library_and_large_ones_only_one_at_a_time():
    def text(size, batch):
        shapes = [(*batch, size, size), (*batch, size)]
        program = jax.vmap(solve) if batch else solve
        return jax.jit(program).lower(*[jnp.zeros(shape) for shape in shapes]).as_text()

    assert "custom_call" not in text(12, ())
    assert "custom_call" not in text(12, (5,))
    assert "lapack" in text(13, ())
    called = [line for line in text(13, (5,)).splitlines() if "@lapack" in line]
    assert called
    assert not any("5x13" in line for line in called)


def test_lowers_for_every_platform_in_a_batch():
    program = jax.jit(jax.vmap(solve))
    exported = jax.export.export(program, platforms=("cpu", "cuda", "tpu"))
    exported(jnp.zeros((3, 16, 16)), jnp.zeros((3, 16)))


@SIZES
def test_solutions_are_differentiated_by_the_right_side(size):
    matrix, right = problem(np.random.default_rng(size), size, 10)
    with jax.enable_x64(True):
        gradient = jax.vmap(jax.grad(lambda b: jnp.sum(solve(matrix, b)[:1])), in_axes=1)(right)
    np.testing.assert_allclose(gradient, np.tile(np.linalg.inv(matrix)[0], (3, 1)), rtol=1e-9)
