"""`krum` and `geometric_median` where gradients have a large part in common, or differ in size."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_surgery as surgery
from optax_surgery import trees

NUM_CLIENTS, SIZE, SEEDS = 9, 1000, 100
SPREADS = [1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5]


def clients(spread, outliers, seeds=SEEDS, size=SIZE):
    """Nine clients around a common vector; two of them may be as far from it as `outliers` says."""
    generator = np.random.default_rng(0)
    common = generator.normal(size=(seeds, 1, size))
    noise = spread * generator.normal(size=(seeds, NUM_CLIENTS, size))
    noise[:, 3:5] *= outliers / spread if outliers else 1
    return (common + noise).astype("f4")


def report_of(state):
    nodes = jax.tree.leaves(state, is_leaf=is_report)
    return next(node for node in nodes if is_report(node))


def is_report(node):
    return hasattr(node, "converged")


@functools.cache
def stacked(tx):
    """The update of a stack and the report of the solver, of many stacks at once."""

    return jax.jit(jax.vmap(lambda rows: stacked_step(tx, rows)))


def stacked_step(tx, rows):
    update, state = tx.update(rows, tx.init(rows[0]))
    return update, report_of(state)


KRUM, MEDIAN = surgery.krum(num_byzantine=2), surgery.geometric_median()


def distances_in_float64(rows):
    rows = rows.astype("f8")
    return np.stack([np.linalg.norm(rows - rows[:, [i]], axis=-1) for i in range(rows.shape[1])], 1)


def scores_of_krum(rows):
    nearest = np.sort(distances_in_float64(rows) ** 2)[:, :, 1 : NUM_CLIENTS - 3]
    return nearest.sum(axis=-1)


def client_of_krum(rows):
    return scores_of_krum(rows).argmin(axis=1)


def sum_of_distances(rows, point, preference=1.0):
    away = rows.astype("f8") - np.asarray(point, "f8")[:, None]
    return (preference * np.linalg.norm(away, axis=-1)).sum(axis=-1)


@pytest.mark.parametrize("outliers", [0, 10.0, 1e8])
@pytest.mark.parametrize("spread", SPREADS)
def test_krum_takes_the_client_of_float64(spread, outliers):
    rows = clients(spread, outliers)
    update, report = stacked(KRUM)(rows)
    taken = np.all(rows == update[:, None], axis=-1)
    assert np.all(taken.sum(axis=1) == 1)
    # In one of these stacks the scores of two clients differ by less than eps.
    scores = scores_of_krum(rows)
    np.testing.assert_allclose(scores[taken], scores.min(axis=1), rtol=4 * np.finfo("f4").eps)
    assert np.all(report.converged)


@pytest.mark.parametrize("outliers", [0, 10.0, 1e8])
@pytest.mark.parametrize("spread", SPREADS)
def test_geometric_median_is_never_worse_than_the_mean(spread, outliers):
    rows = clients(spread, outliers)
    update, report = stacked(MEDIAN)(rows)
    assert np.all(sum_of_distances(rows, update) <= sum_of_distances(rows, rows.mean(axis=1)))
    assert np.all(report.converged)
    assert np.all(report.residual < 1e-4)


@pytest.mark.parametrize("spread", [1.0, 1e2, 1e3, 1e4, 1e7, 1e12])
@pytest.mark.parametrize("num_tasks", [3, 6, 20])
def test_geometric_median_at_norms_that_differ_is_that_of_float64(num_tasks, spread):
    generator = np.random.default_rng(1)
    norms = spread ** generator.uniform(-0.5, 0.5, size=(10, num_tasks, 1))
    rows = (norms * generator.normal(size=(10, num_tasks, 50)) / np.sqrt(50)).astype("f4")
    update, report = stacked(MEDIAN)(rows)
    with jax.enable_x64(True):
        exact, exactly = stacked(MEDIAN)(rows.astype("f8"))
    update, exact = np.asarray(update, "f8"), np.asarray(exact)
    errors = np.linalg.norm(update - exact, axis=-1) / np.linalg.norm(exact, axis=-1)
    assert errors.max() < 1e-5
    assert np.all(report.converged)
    assert np.all(np.asarray(exactly.converged))
    away = rows.astype("f8") - exact[:, None]
    lengths = np.linalg.norm(away, axis=-1, keepdims=True)
    at_gradient = lengths.min(axis=(1, 2)) < 1e-9 * np.median(lengths, axis=(1, 2))
    force = np.linalg.norm((away / np.maximum(lengths, 1e-300)).sum(axis=1), axis=-1)
    assert np.all(force < np.where(at_gradient, 1 + 1e-9, 1e-6))


def test_of_a_gramian_what_rounding_hides_has_not_converged():
    rows = clients(1e-4, 0, seeds=20)
    for tx in (KRUM, MEDIAN):

        def step(rows, tx=tx):
            identity = jnp.eye(NUM_CLIENTS)
            _, state = tx.update(identity, tx.init(rows[0]), gramian=surgery.gramian(rows))
            return report_of(state)

        assert not np.any(jax.jit(jax.vmap(step))(rows).converged)
        assert np.all(jax.jit(jax.vmap(step))(clients(1.0, 0, seeds=20)).converged)


# The ways in which a surgery gets its gradients


def of_shared_data(tx):
    """By backward passes of one program, a stack for one leaf and products for the other."""

    def step(rows):
        columns = SIZE // 2

        def losses_fn(params):
            return rows[:, :columns] @ params["stack"] + rows[:, columns:] @ (
                jnp.eye(columns) @ params["product"]
            )

        params = {"stack": jnp.zeros(columns), "product": jnp.zeros(columns)}
        fn = surgery.surgery_value_and_grad(losses_fn, tx)
        (_, grads), state = fn(params, tx.init(params))
        return jnp.concatenate([grads["stack"], grads["product"]]), report_of(state)

    return jax.jit(jax.vmap(step))


def of_own_data(tx):
    def step(rows):
        params = jnp.zeros(SIZE)
        fn = surgery.per_task_surgery_value_and_grad(lambda params, row: row @ params, tx)
        (_, grads), state = fn(params, tx.init(params), rows)
        return grads, report_of(state)

    return jax.jit(jax.vmap(step))


def every(tx):
    return stacked(surgery.every(tx, k=2, num_tasks=NUM_CLIENTS))


def monitor(tx):
    return stacked(surgery.monitor(NUM_CLIENTS, tx))


def masked(tx):
    """With a tenth client that is not there, and holds anything."""

    def step(rows):
        rows = jnp.concatenate([jnp.full_like(rows[:1], jnp.nan), rows])
        mask = jnp.arange(NUM_CLIENTS + 1) > 0
        update, state = tx.update(rows, tx.init(rows[0]), task_mask=mask)
        return update, report_of(state)

    return jax.jit(jax.vmap(step))


def some(tx):
    """Of ten gradients, nine."""
    part = surgery.on_tasks(tx, list(range(1, NUM_CLIENTS + 1)))
    of_ten = surgery.monitor(NUM_CLIENTS + 1, part)

    def step(rows):
        return stacked_step(of_ten, jnp.concatenate([jnp.ones_like(rows[:1]), rows]))

    return jax.jit(jax.vmap(step))


@pytest.mark.parametrize("way", [of_shared_data, of_own_data, every, monitor, masked, some])
def test_differences_are_had_by_every_way(way):
    rows = clients(1e-5, 1e3, seeds=10)
    update, report = way(KRUM)(rows)
    expected = rows[np.arange(10), client_of_krum(rows)]
    np.testing.assert_allclose(update, expected, atol=3e-7)
    assert np.all(report.converged)
    update, report = way(MEDIAN)(rows)
    expected, _ = stacked(MEDIAN)(rows)
    np.testing.assert_allclose(update, expected, atol=2e-6)
    assert np.all(report.converged)


@pytest.mark.parametrize("spread", [1.0, 1e-3, 1e-5])
def test_of_normalised_gradients_the_client_is_right_or_it_has_not_converged(spread):
    rows = clients(spread, 0, seeds=50)
    unit = rows.astype("f8") / np.linalg.norm(rows.astype("f8"), axis=-1, keepdims=True)
    update, report = stacked(surgery.normalize_tasks(KRUM))(rows)
    away = np.linalg.norm(unit - np.asarray(update)[:, None], axis=-1)
    right = away.argmin(axis=1) == client_of_krum(unit)
    assert np.all(right | ~np.asarray(report.converged))
    assert np.mean(right) > 0.95
    update, report = stacked(surgery.normalize_tasks(MEDIAN))(rows)
    worse = sum_of_distances(unit, update) > sum_of_distances(unit, unit.mean(axis=1))
    assert not np.any(worse & np.asarray(report.converged) & (spread > 1e-5))


def test_leaves_of_bfloat16_have_the_distances_of_their_numbers():
    rows = np.asarray(clients(1e-1, 0, seeds=20), jnp.bfloat16)
    update, report = stacked(KRUM)(rows)
    exact = rows.astype("f4")
    assert np.array_equal(update, rows[np.arange(20), client_of_krum(exact)])
    assert np.all(report.converged)


def test_differences_go_through_a_leaf_block_by_block(monkeypatch):
    rows = clients(1e-3, 0, seeds=1)[0]
    whole = trees.differences(rows, jnp.asarray(2))
    monkeypatch.setattr(trees, "_BLOCK_SIZE", 1000)
    in_blocks = trees.differences(rows.reshape(NUM_CLIENTS, 10, 100), jnp.asarray(2))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-6), whole, in_blocks)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
@pytest.mark.parametrize("tx", [KRUM, MEDIAN])
def test_of_gradients_whose_squares_fit_no_float32(tx, scale):
    rows = np.random.default_rng(2).normal(size=(1, 5, 6)).astype("f4")
    expected, _ = stacked(tx)(rows)
    scaled = (rows * np.float32(scale)).astype("f4")
    np.testing.assert_allclose(stacked(tx)(scaled)[0] / scale, expected, rtol=1e-4, atol=1e-6)


# Clients of different weights


def test_geometric_median_of_a_preference_is_that_of_repeated_gradients():
    rows = np.random.default_rng(3).normal(size=(1, 4, 6)).astype("f4")
    repeats = [1, 2, 1, 3]
    update, _ = stacked(surgery.geometric_median(np.array(repeats, "f4")))(rows)
    expected, _ = stacked(MEDIAN)(np.repeat(rows, repeats, axis=1))
    np.testing.assert_allclose(update, expected, atol=2e-6)


def test_krum_averages_by_preference_whom_it_selects_without():
    rows = np.array([[[1.0], [1.5], [1.2], [1.3], [-900.0]]], "f4")
    tx = surgery.krum(1, num_selected=2, preference=np.array([9.0, 9.0, 1.0, 3.0, 9.0], "f4"))
    update, _ = stacked(tx)(rows)
    np.testing.assert_allclose(update, [[(1.2 + 3 * 1.3) / 4]], rtol=1e-6)


# Others at extreme ratios


def test_ntkmtl_at_extreme_ratios():
    for norms in ([2e-12, 1.0, 1e8], [1e-15, 1e15], [1e-15, 1.0, 0.0]):
        rows = np.diag(np.array(norms, "f4"))
        tx = surgery.ntkmtl()
        update, _ = tx.update(rows, tx.init(rows[0]))
        total = np.linalg.norm(norms)
        np.testing.assert_allclose(update, [total if norm else 0 for norm in norms], rtol=1e-5)


def test_db_mtl_keeps_nothing_that_is_not_finite():
    tx = surgery.db_mtl(num_tasks=2)
    rows, losses = jnp.eye(2), jnp.ones(2)
    _, state = tx.update(rows * jnp.array([[1e38], [1.0]]), tx.init(rows[0]), losses=1e-8 * losses)
    assert np.all(np.isfinite(state.weighting_state.averages))
    update, _ = tx.update(rows, state, losses=losses)
    assert np.all(np.isfinite(update))


def test_gramian_of_gradients_at_a_scale():
    rows = jnp.eye(2) * 1e30
    np.testing.assert_allclose(surgery.gramian(rows, scale=1e-30), np.eye(2), rtol=1e-5)
    np.testing.assert_allclose(surgery.gramian(rows, rows, scale=1e-30), np.eye(2), rtol=1e-5)


def test_accumulate_averages_float64_in_float64():
    with jax.enable_x64(True):
        rows = np.random.default_rng(4).normal(size=(3, 2, 5))
        tx = surgery.accumulate(surgery.mean(), every_k=3, num_tasks=2)
        state = tx.init(jnp.zeros(5))
        for batch in rows:
            update, state = tx.update(jnp.asarray(batch), state)
        np.testing.assert_allclose(update, rows.mean(axis=(0, 1)), rtol=1e-14)
