"""The metrics of a Gramian, on gradients whose geometry is known."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_surgery as surgery


def gram(rows):
    rows = np.asarray(rows, "f4")
    return jnp.asarray(rows @ rows.T)


def test_norms_and_cosines():
    rows = [[3.0, 4.0], [0.0, -2.0]]
    np.testing.assert_allclose(surgery.task_norms(gram(rows)), [5, 2], rtol=1e-6)
    np.testing.assert_allclose(
        surgery.cosine_similarities(gram(rows)), [[1, -0.8], [-0.8, 1]], rtol=1e-6
    )


def test_conflict_fraction_counts_pairs_of_gradients_that_are_there():
    rows = [[1.0, 0.0], [-1.0, 0.1], [0.0, 1.0], [0.0, 0.0]]
    # pairs: (0, 1) conflicts; (0, 2) and (1, 2) do not; the zero gradient is in no pair
    np.testing.assert_allclose(surgery.conflict_fraction(gram(rows)), 1 / 3, rtol=1e-6)
    assert surgery.conflict_fraction(gram([[1.0, 2.0]])) == 0


def test_magnitude_similarity_is_definition_2():
    generator = np.random.default_rng(0)
    rows = generator.normal(size=(5, 7)) * 10.0 ** np.arange(5)[:, None]
    norms = np.linalg.norm(rows, axis=1)
    expected = 2 * np.outer(norms, norms) / np.add.outer(norms**2, norms**2)
    np.testing.assert_allclose(surgery.magnitude_similarities(gram(rows)), expected, rtol=1e-5)


@pytest.mark.parametrize("ratio", [1.0, 3.0, 100.0])
def test_condition_number_is_that_of_the_gradient_matrix(ratio):
    generator = np.random.default_rng(0)
    left = np.linalg.qr(generator.normal(size=(4, 4)))[0]
    right = np.linalg.qr(generator.normal(size=(9, 4)))[0]
    rows = left * np.geomspace(1, ratio, 4) @ right.T
    np.testing.assert_allclose(surgery.condition_number(gram(rows)), ratio, rtol=1e-3)


def test_condition_number_of_two_equally_long_gradients_is_that_of_half_their_angle():
    angle = np.deg2rad(130)
    rows = [[1.0, 0.0], [np.cos(angle), np.sin(angle)]]
    expected = max(np.tan(angle / 2), 1 / np.tan(angle / 2))
    np.testing.assert_allclose(surgery.condition_number(gram(rows)), expected, rtol=1e-4)


@pytest.mark.parametrize("place", [(0, 0), (1, 2)])
def test_condition_number_of_a_gradient_that_is_not_finite_is_none(place):
    gramian = jnp.eye(3).at[place].set(jnp.nan)
    assert jnp.isnan(surgery.condition_number(gramian))


def test_condition_number_ignores_absent_tasks_and_sees_dependent_ones():
    assert surgery.condition_number(gram(np.zeros((3, 4)))) == 1
    np.testing.assert_allclose(
        surgery.condition_number(gram([[3.0, 0.0], [0.0, 0.0], [0.0, 1.0]])), 3, rtol=1e-5
    )
    assert surgery.condition_number(gram([[1.0, 2.0], [2.0, 4.0]])) == np.inf


def test_update_alignment_is_the_product_with_each_gradient():
    rows = np.random.default_rng(0).normal(size=(3, 8)).astype("f4")
    weights = jnp.array([0.5, 2.0, -1.0])
    np.testing.assert_allclose(
        surgery.update_alignment(gram(rows), weights), rows @ (weights @ rows), rtol=1e-4
    )


@pytest.mark.parametrize(
    "metric",
    [
        surgery.task_norms,
        surgery.cosine_similarities,
        surgery.conflict_fraction,
        surgery.magnitude_similarities,
        surgery.condition_number,
    ],
)
def test_no_metric_divides_by_zero(metric):
    history = jnp.stack([gram(np.zeros((3, 2))), gram(np.ones((3, 2))), gram(np.eye(3))])
    with jax.debug_nans(True):
        assert not np.isnan(np.asarray(jax.jit(jax.vmap(metric))(history))).any()


def test_monitor_keeps_the_gramian_and_passes_the_gradients_on():
    rows = {"a": jnp.array([[1.0, 2.0], [3.0, -4.0]]), "b": jnp.array([1.0, -1.0])}
    tx = surgery.monitor(2)
    updates, state = jax.jit(tx.update)(rows, tx.init({"a": jnp.ones(2), "b": jnp.ones(())}))
    jax.tree.map(np.testing.assert_array_equal, updates, rows)
    np.testing.assert_allclose(state.gramian, surgery.gramian(rows))
    np.testing.assert_allclose(
        surgery.cosine_similarities(state.gramian)[0, 1], -6 / 26**0.5 / 6**0.5
    )


def test_monitor_leaves_masked_tasks_out():
    tx = surgery.monitor(3)
    rows = np.array([[1.0, 0.0], [np.nan, np.nan], [-1.0, 1.0]], "f4")
    _, state = tx.update(rows, tx.init(jnp.ones(2)), task_mask=np.array([True, False, True]))
    np.testing.assert_allclose(state.gramian, [[1, 0, -1], [0, 0, 0], [-1, 0, 2]])


def test_a_monitored_training_can_be_read():
    tx = optax.chain(surgery.monitor(2), surgery.mean(), optax.sgd(0.1))
    state = tx.init(jnp.ones(2))
    _, state = tx.update(jnp.array([[1.0, 0.0], [-1.0, 0.0]]), state)
    assert surgery.conflict_fraction(optax.tree.get(state, "gramian")) == 1
