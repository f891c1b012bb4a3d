"""Singular values and inverse roots of Gramians: right relative to themselves at any norms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_surgery.algebra import eigen

SPREADS = [1, 1e2, 1e4, 1e6, 1e7]


def rows(num_tasks, spread, seed, num_coordinates=500, common=0.5):
    """Correlated gradients in float32, whose norms are spread geometrically and shuffled."""
    random = np.random.default_rng(seed)
    shared = random.standard_normal((1, num_coordinates))
    jacobian = random.standard_normal((num_tasks, num_coordinates)) + common * shared
    norms = random.permutation(np.geomspace(1, 1 / spread, num_tasks))
    jacobian *= (norms / np.linalg.norm(jacobian, axis=1))[:, None]
    return jacobian.astype("f4").astype(float)


def gram(jacobian, dtype="f4"):
    return jnp.asarray(jacobian @ jacobian.T, dtype)


def exact(jacobian):
    """Ascending singular values, and the inverse root of the Gramian, from J itself in float64."""
    left, values, _ = np.linalg.svd(jacobian, full_matrices=False)
    return values[::-1], (left / values) @ left.T


spectrum = jax.jit(eigen.spectrum)
spectra = jax.jit(jax.vmap(eigen.spectrum))


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("num_tasks", [1, 2, 3, 8, 40, 100])
def test_every_singular_value_is_right_relative_to_itself(num_tasks, spread):
    """The smallest too, a ten-millionth of the largest: another algorithm's would be noise."""
    jacobian = rows(num_tasks, spread, seed=num_tasks)
    found = spectrum(gram(jacobian))
    values, inverse_root = exact(jacobian)
    np.testing.assert_allclose(found.values, values, rtol=1e-5)
    # As the rows are multiplied by it: an error counts by the longer of two gradients.
    vectors = np.asarray(found.inverse_root, float) @ jacobian
    expected = inverse_root @ jacobian
    np.testing.assert_allclose(vectors @ vectors.T, np.eye(num_tasks), atol=2e-5)
    np.testing.assert_allclose(vectors, expected, atol=2e-5)


def test_the_spectrum_of_a_batch_is_that_of_each():
    gramians = jnp.stack([gram(rows(5, spread, 0)) for spread in SPREADS])
    together = spectra(gramians)
    for number, gramian in enumerate(gramians):
        each = spectrum(gramian)
        jax.tree.map(
            lambda one, all_of_them, number=number: np.testing.assert_allclose(
                all_of_them[number], one, rtol=1e-5
            ),
            each,
            together,
        )


@pytest.mark.parametrize("factor", [1.0, 0.1, -0.3, 1e-3, -1e-6, 3e5])
def test_a_duplicate_of_any_length_takes_no_other_with_it(factor):
    jacobian = rows(3, 1e5, seed=1)
    jacobian = np.concatenate([jacobian, factor * jacobian[:1], np.zeros((1, 500))])
    jacobian = jacobian.astype("f4").astype(float)
    found = spectrum(gram(jacobian))
    values = np.linalg.svd(jacobian, compute_uv=False)[:3][::-1]
    np.testing.assert_allclose(found.values, [0, 0, *values], rtol=1e-5)
    assert np.isfinite(found.inverse_root).all()
    np.testing.assert_allclose(found.independence[1:3], 1, atol=1e-6)
    assert min(found.independence[0], found.independence[3]) < 0.95
    assert found.independence[4] == 0


def test_more_tasks_than_coordinates_have_the_rank_of_the_coordinates():
    jacobian = np.random.default_rng(0).standard_normal((9, 3)).astype("f4").astype(float)
    found = spectrum(gram(jacobian))
    values = np.linalg.svd(jacobian, compute_uv=False)[::-1]
    np.testing.assert_allclose(found.values, [0] * 6 + list(values), rtol=1e-5)
    expected = np.linalg.pinv(jacobian @ jacobian.T, rcond=1e-9)
    root = np.asarray(found.inverse_root, float)
    np.testing.assert_allclose(root @ root, expected, rtol=1e-4, atol=1e-5 * expected.max())


@pytest.mark.parametrize("spread", SPREADS[:4])
@pytest.mark.parametrize(("num_tasks", "rank"), [(5, 3), (24, 2), (24, 5), (24, 18)])
def test_nearly_dependent_gradients_of_a_subspace_are_neither_dropped_nor_noise(
    num_tasks, rank, spread
):
    """Some of them are next to the span of longer ones: a part of a thousandth is a part."""
    jacobians = np.stack([rows(num_tasks, spread, seed, rank, 0.0) for seed in range(100)])
    found = spectra(jnp.stack([gram(each) for each in jacobians]))
    for number, jacobian in enumerate(jacobians):
        values, inverse_root = exact(jacobian)
        cosines = jacobian / np.linalg.norm(jacobian, axis=1, keepdims=True)
        condition = np.linalg.cond(cosines) ** 2
        assert np.count_nonzero(found.values[number]) == rank
        off = found.values[number, -rank:] / values - 1
        assert np.max(np.abs(off)) < 20 * np.finfo("f4").eps * condition
        off = (np.asarray(found.inverse_root[number], float) - inverse_root) @ jacobian
        assert np.max(np.abs(off)) < 20 * np.finfo("f4").eps * condition


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_the_unit_of_the_gradients_changes_nothing_else(scale):
    gramian = gram(rows(4, 1e4, seed=0))
    one, other = spectrum(gramian), spectrum(gramian * jnp.float32(scale) * jnp.float32(scale))
    np.testing.assert_allclose(other.values, one.values * scale, rtol=1e-5)
    np.testing.assert_allclose(other.inverse_root * scale, one.inverse_root, rtol=1e-4)


BAD = {
    "zero": np.zeros((3, 3)),
    "negative": -np.eye(3),
    "indefinite": np.array([[1.0, 3, 0], [3, 1, 0], [0, 0, 1]]),
    "not symmetric": np.array([[1.0, 0.9, 0], [0.1, 1, 0], [0, 0, 1]]),
    "rounding only": 1e-8 * np.random.default_rng(0).standard_normal((3, 3)) * np.eye(3)[::-1],
}


@pytest.mark.parametrize("kind", BAD)
def test_a_matrix_that_is_no_gramian_gives_finite_numbers(kind):
    found = spectrum(jnp.asarray(BAD[kind], "f4"))
    assert all(np.isfinite(part).all() for part in found)


@pytest.mark.parametrize("place", [(0, 0), (2, 2), (0, 1), (2, 1)])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_not_dropped_in_silence(bad, place):
    gramian = np.eye(3, dtype="f4")
    gramian[place] = bad
    assert np.isnan(spectrum(jnp.asarray(gramian)).inverse_root).any()


def test_an_asymmetric_matrix_counts_as_its_symmetric_part():
    one = spectrum(jnp.asarray(BAD["not symmetric"], "f4"))
    other = spectrum(jnp.asarray([[1, 0.5, 0], [0.5, 1, 0], [0, 0, 1]], "f4"))
    np.testing.assert_allclose(one.inverse_root, other.inverse_root, rtol=1e-6)


# --- Derivatives


def differences(function, jacobian, change, step=1e-6):
    return (function(jacobian + step * change) - function(jacobian - step * change)) / (2 * step)


def functions_of(num_tasks):
    weights = np.linspace(1, 2, num_tasks)
    return {
        "inverse root": lambda found: found.inverse_root @ weights,
        "mean square": lambda found: jnp.sum(found.values**2),
        "sum of values": lambda found: jnp.sum(found.values),
    }


@pytest.mark.parametrize("name", functions_of(2))
@pytest.mark.parametrize(
    ("num_tasks", "num_coordinates"), [(2, 9), (5, 9), (6, 3)], ids=["two", "five", "dependent"]
)
def test_derivatives_are_those_of_finite_differences(name, num_tasks, num_coordinates):
    with jax.enable_x64(True):
        random = np.random.default_rng(3)
        jacobian = random.standard_normal((num_tasks, num_coordinates))
        change = random.standard_normal(jacobian.shape)

        def function(jacobian):
            return functions_of(num_tasks)[name](eigen.spectrum(jacobian @ jacobian.T))

        expected = differences(function, jacobian, change)
        _, forward = jax.jvp(function, (jacobian,), (change,))
        np.testing.assert_allclose(forward, expected, rtol=1e-5, atol=1e-7)
        gradient = jax.grad(lambda jacobian: jnp.sum(function(jacobian)))(jacobian)
        np.testing.assert_allclose(
            np.sum(gradient * change), np.sum(expected), rtol=1e-5, atol=1e-7
        )


def test_the_inverse_root_has_a_derivative_at_equal_eigenvalues():
    with jax.enable_x64(True):
        random = np.random.default_rng(4)
        jacobian = np.linalg.qr(random.standard_normal((9, 4)))[0].T
        change = random.standard_normal(jacobian.shape)

        def function(jacobian):
            return eigen.spectrum(jacobian @ jacobian.T).inverse_root @ np.arange(4.0)

        _, forward = jax.jvp(function, (jacobian,), (change,))
        np.testing.assert_allclose(
            forward, differences(function, jacobian, change), rtol=1e-5, atol=1e-8
        )


def test_the_derivative_of_equal_values_is_the_mean_of_both():
    """The least of two equal values has two one-sided derivatives; theirs lies between."""
    with jax.enable_x64(True):
        jacobian, change = np.eye(2, 3), np.array([[1.0, 0, 0], [0, -0.5, 0]])

        def least(jacobian):
            return eigen.spectrum(jacobian @ jacobian.T).values[0]

        sides = [(least(jacobian + s * change) - least(jacobian)) / s for s in (-1e-6, 1e-6)]
        _, forward = jax.jvp(least, (jacobian,), (change,))
        assert min(sides) < forward < max(sides)


def test_masked_and_zero_tasks_have_finite_derivatives():
    with jax.enable_x64(True):
        jacobian = np.diag([1.0, 0, 2])
        gradient = jax.grad(lambda j: jnp.sum(eigen.spectrum(j @ j.T).inverse_root))(jacobian)
        assert np.isfinite(gradient).all()
