"""Dtypes, extreme scales, degenerate gradients and masks, walked over the table of methods.

Tests share shapes, as a program is compiled for each: of four tasks, with a mask and without.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_surgery as surgery
from tests.cases import CASES, losses_of

every_method = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
NUM_TASKS, SIZE = 4, 6


def random_jacobian(num_tasks=NUM_TASKS, size=SIZE, seed=0):
    return np.random.default_rng(seed).normal(size=(num_tasks, size))


@every_method
def test_float64_gradients_give_float64_updates(case):
    jacobian = random_jacobian().astype("f4")
    expected, _ = case.step(jacobian)
    with jax.enable_x64(True):
        update, state = case.step(jacobian.astype("f8"))
        assert update.dtype == np.float64
    scale = np.abs(np.asarray(expected)).max()
    np.testing.assert_allclose(update, expected, rtol=1e-5, atol=1e-5 * scale)
    for leaf in jax.tree.leaves(state):
        assert np.isfinite(np.asarray(leaf)).all()


@every_method
def test_leaves_of_half_precision_keep_their_dtype_and_lose_only_the_rounding_of_the_result(case):
    whole = np.asarray(jnp.asarray(random_jacobian(), jnp.bfloat16), "f4")  # exact in float16 too
    expected = np.asarray(case.step(whole)[0])
    tree = {
        "bfloat16": jnp.asarray(whole[:, :2], jnp.bfloat16),
        "float16": jnp.asarray(whole[:, 2:4], jnp.float16),
        "float32": jnp.asarray(whole[:, 4:]),
    }
    update, _ = case.step(tree)
    assert {name: leaf.dtype.name for name, leaf in update.items()} == {name: name for name in tree}
    if case.draws_per_leaf:
        return
    scale = np.abs(expected).max()
    for name, part in zip(tree, np.split(expected, 3), strict=True):
        tolerance = max(4 * jnp.finfo(name).eps.item(), 1e-5)
        found = np.asarray(update[name], "f8")
        np.testing.assert_allclose(found, part, rtol=tolerance, atol=tolerance * scale)


@every_method
@pytest.mark.parametrize("scale", [1e-30, 1e-15, 1e15, 1e30])
def test_the_direction_does_not_suffer_from_squares_out_of_range(case, scale):
    if case.needs_gramian and scale in (1e-30, 1e30):
        pytest.skip("a Gramian that comes from the caller has to fit its dtype")
    jacobian = random_jacobian().astype("f4")
    update, _ = case.step(jacobian * np.float32(scale))
    update = np.asarray(update, np.float64)
    assert np.isfinite(update).all()
    if case.degree is None:  # the direction depends on the scale
        return
    if abs(case.degree * np.log10(scale)) > 37:  # the update is itself out of range
        return
    expected, _ = case.step(jacobian)
    direction = update / np.linalg.norm(update)
    np.testing.assert_allclose(direction, expected / np.linalg.norm(expected), atol=2e-5)


DEGENERATE = {
    "zero": np.zeros((NUM_TASKS, SIZE)),
    "one task zero": random_jacobian() * [[1], [0], [1], [1]],
    "duplicate": np.repeat(random_jacobian(1), NUM_TASKS, axis=0),
    "opposite": random_jacobian(1) * [[1], [-1], [1], [-1]],
    "rank one": random_jacobian(1) * [[1], [-2], [0.1], [3]],
    "fewer coordinates than tasks": random_jacobian() * [1, 1, 1, 0, 0, 0],
    "one coordinate": random_jacobian() * [1, 0, 0, 0, 0, 0],
    "one task": random_jacobian(1),
    "one task, zero": np.zeros((1, SIZE)),
    "tiny": random_jacobian() * 1e-15,
    "huge": random_jacobian() * 1e15,
}


@every_method
@pytest.mark.parametrize("kind", DEGENERATE)
def test_degenerate_gradients_give_finite_updates(case, kind):
    with jax.debug_nans(True):
        update, state = case.step(DEGENERATE[kind].astype("f4"))
    for leaf in jax.tree.leaves((update, state)):
        assert np.isfinite(np.asarray(leaf)).all()


@every_method
def test_zero_gradients_give_a_zero_update(case):
    update, _ = case.step(np.zeros((NUM_TASKS, SIZE), "f4"))
    np.testing.assert_array_equal(update, 0)


@every_method
@pytest.mark.parametrize("poison", [np.nan, np.inf, 0.0])
def test_masked_tasks_are_as_good_as_left_out(case, poison):
    # Two tasks remain, for which the update of a random method does not depend on the order.
    jacobian = random_jacobian(seed=3).astype("f4")
    mask = np.array([True, False, True, False])
    losses = np.where(mask, losses_of(NUM_TASKS), poison).astype("f4")
    poisoned = np.where(mask[:, None], jacobian, poison).astype("f4")

    with jax.debug_nans(poison == 0):
        masked, state = case.step(poisoned, losses=losses, task_mask=mask)
    assert all(np.isfinite(np.asarray(leaf)).all() for leaf in jax.tree.leaves((masked, state)))
    if case.mask_in_law:
        return
    left_out = case.keep(mask) if case.keep else case.surgery(2)
    extra_args = case.extra_args(jacobian[mask]) | {"losses": losses[mask]}
    expected, _ = left_out.update(jacobian[mask], left_out.init(jacobian[0]), **extra_args)
    np.testing.assert_allclose(masked, expected, rtol=1e-4, atol=1e-5)


@every_method
def test_a_mask_leaves_the_state_that_the_other_tasks_alone_would_have(case):
    if case.mask_in_law:
        pytest.skip("what a task draws depends on its number; its law is tested with the method")
    mask = np.array([True, False, True, False])
    left_out = case.keep(mask) if case.keep else case.surgery(2)
    before = state = case.surgery(NUM_TASKS).init(np.zeros(SIZE, "f4"))
    others = left_out.init(np.zeros(SIZE, "f4"))
    for seed in range(3):
        jacobian = random_jacobian(seed=seed).astype("f4")
        losses = losses_of(NUM_TASKS) * np.float32(1 + seed)
        _, state = case.step(jacobian, state, losses=losses, task_mask=mask)
        extra_args = case.extra_args(jacobian[mask]) | {"losses": losses[mask]}
        _, others = left_out.update(jacobian[mask], others, **extra_args)

    def compare(full, alone, first):
        full, alone, first = (np.asarray(leaf) for leaf in (full, alone, first))
        axes = [axis for axis in range(full.ndim) if full.shape[axis] != alone.shape[axis]]
        kept, masked = full, full != first
        for axis in axes:
            kept = np.compress(mask, kept, axis)
            masked = np.compress(~mask, masked, axis)
        np.testing.assert_allclose(kept, alone, rtol=1e-4, atol=1e-5)
        assert not axes or not masked.any(), "a masked task's numbers changed"

    jax.tree.map(compare, state, others, before)


@every_method
def test_all_tasks_masked_changes_nothing(case):
    _, state = case.step(random_jacobian().astype("f4"))
    nothing = np.zeros(NUM_TASKS, bool)
    for poison in (0.0, np.nan):
        with jax.debug_nans(poison == 0):
            update, new_state = case.step(
                np.full((NUM_TASKS, SIZE), poison, "f4"),
                state,
                losses=losses_of(NUM_TASKS) + np.float32(poison),
                task_mask=nothing,
            )
        np.testing.assert_array_equal(update, 0)
        jax.tree.map(np.testing.assert_array_equal, new_state, state)


@every_method
def test_a_mask_of_all_tasks_is_no_mask(case):
    with jax.enable_x64(True):
        plain, _ = case.step(random_jacobian())
        masked, _ = case.step(random_jacobian(), task_mask=np.ones(NUM_TASKS, bool))
    np.testing.assert_allclose(masked, plain, rtol=1e-12, atol=1e-12)


# One product, blocks of vectors with one tile and with several, blocks of matrices.
@pytest.mark.parametrize(
    ("num_tasks", "size"),
    [(4, 7), (4, 1_000), (4, 1_000_000), (17, 40_003), (81, 40_003), (130, 40_003)],
)
def test_the_gramian_is_accurate(num_tasks, size):
    jacobian = random_jacobian(num_tasks, size).astype("f4")
    exact = jacobian.astype("f8") @ jacobian.astype("f8").T
    found = np.asarray(surgery.gramian(jacobian), np.float64)
    np.testing.assert_allclose(found, exact, atol=1e-6 * np.abs(exact).max())
    crossed = np.asarray(surgery.gramian(jacobian, jacobian[::-1]), np.float64)
    np.testing.assert_allclose(crossed, exact[:, ::-1], atol=1e-6 * np.abs(exact).max())


@pytest.mark.parametrize("num_tasks", [3, 16, 17, 24, 29])  # sums of vectors, groups, and a rest
@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_a_combination_leaves_out_masked_tasks_whatever_they_hold(num_tasks, poison):
    jacobian, weights = random_jacobian(num_tasks, 30), np.arange(1.0, num_tasks + 1)
    task_mask = np.arange(num_tasks) % 3 != 1
    expected = (weights * task_mask) @ jacobian
    jacobian[~task_mask] = poison
    weights[~task_mask] = poison
    found = surgery.combine(
        jnp.asarray(weights), jnp.asarray(jacobian.reshape(-1, 5, 6), "f4"), jnp.asarray(task_mask)
    )
    np.testing.assert_allclose(found.ravel(), expected, rtol=1e-5, atol=1e-4)


def test_the_gramian_is_the_sum_over_leaves_of_any_rank():
    tree = {
        "scalar": jnp.array([1.0, 2.0]),
        "matrix": jnp.arange(12.0).reshape(2, 2, 3),
        "empty": jnp.zeros((2, 0)),
    }
    rows = np.concatenate([np.reshape(leaf, (2, -1)) for leaf in tree.values()], axis=1)
    np.testing.assert_allclose(surgery.gramian(tree), rows @ rows.T)


def test_half_precision_products_do_not_overflow():
    # The square of a float16 gradient of norm 447 is beyond float16.
    jacobian = jnp.full((2, 4), 400.0, jnp.float16)
    np.testing.assert_allclose(surgery.gramian(jacobian), np.full((2, 2), 640_000.0))
