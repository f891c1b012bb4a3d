"""Methods on coordinates, averages or two batches: what one step from the start cannot show."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_surgery as surgery
from optax_surgery.algebra import simplex
from optax_surgery.methods.graddrop import graddrop_update
from tests.methods.test_rules import jacobians
from tests.papers import coordinates as papers

NUM_STEPS, NUM_TASKS, SIZE = 30, 3, 6


def gradients(seed=0, num_steps=NUM_STEPS, num_tasks=NUM_TASKS, size=SIZE):
    """Task gradients of several steps that drift, (steps, T, n) float64."""
    generator = np.random.default_rng(seed)
    start = generator.normal(size=(1, num_tasks, size))
    drift = 0.3 * generator.normal(size=(num_steps, num_tasks, size)).cumsum(axis=0)
    noise = 0.3 * generator.normal(size=(num_steps, num_tasks, size))
    return start + drift + noise


def trajectory(tx, steps, **extra_args):
    """All updates and states of a run; extra arguments have a leading axis of steps."""

    def step(state, inputs):
        task_grads, extra = inputs
        updates, state = tx.update(task_grads, state, **extra)
        return state, (updates, state)

    extra_args = {name: jnp.asarray(values) for name, values in extra_args.items()}
    state = tx.init(jax.tree.map(lambda leaf: leaf[0, 0], steps))
    return jax.lax.scan(step, state, (steps, extra_args))[1]


def split(steps):
    """The same gradients as a tree of two leaves."""
    return {"matrix": jnp.asarray(steps[..., :4]).reshape(*steps.shape[:-1], 2, 2),
            "vector": jnp.asarray(steps[..., 4:])}  # fmt: skip


def joined(tree):
    leaves = [np.asarray(leaf).reshape(len(leaf), -1) for leaf in tree.values()]
    return np.concatenate(leaves, axis=-1)


def equal_in_float32_and_float64(tx, expected, steps, **extra_args):
    for dtype, tolerance in [("float32", 1e-3), ("float64", 1e-5)]:
        with jax.enable_x64(dtype == "float64"):
            extra = {name: values.astype(dtype) for name, values in extra_args.items()}
            updates, _ = trajectory(tx, split(steps.astype(dtype)), **extra)
            assert updates["vector"].dtype == dtype
            scale = np.abs(expected).max()
            np.testing.assert_allclose(joined(updates), expected, atol=tolerance * scale)


# GradDrop


@pytest.mark.parametrize("leak", [0.0, 0.3, 1.0])
def test_graddrop_for_given_draws(leak):
    generator = np.random.default_rng(0)
    jacobian = generator.normal(size=(5, 50)) * (generator.random((5, 50)) < 0.7)
    draws = generator.random(50)
    update = graddrop_update(jnp.asarray(jacobian, "f4"), draws, jnp.full(5, leak))
    np.testing.assert_allclose(update, papers.graddrop(jacobian, draws, leak), atol=1e-5)


def steep(purity):
    return 3 * purity**2 - 2 * purity**3


def test_graddrop_draws_by_a_function_of_the_purity():
    generator = np.random.default_rng(0)
    jacobian, draws = generator.normal(size=(5, 200)), generator.random(200)
    update = graddrop_update(jnp.asarray(jacobian, "f4"), draws, jnp.zeros(5), steep)
    np.testing.assert_allclose(update, papers.graddrop(jacobian, draws, 0.0, steep), atol=1e-5)
    rows, coordinates = np.array([[3.0], [-1.0]], np.float32), 20_000
    tx = surgery.graddrop(function=steep)
    update, _ = tx.update(np.repeat(rows, coordinates, axis=1), tx.init(jnp.zeros(coordinates)))
    share, expected = (np.asarray(update) > 0).mean(), steep(0.75)
    assert abs(share - expected) < 4 * np.sqrt(expected * (1 - expected) / coordinates)


def test_graddrop_draws_a_sign_by_its_share_and_is_the_sum_in_the_mean():
    jacobian = np.array(
        [[1.0, 1.0, 2.0, -1.0, 0.0], [-1.0, 3.0, -1.0, -2.0, 0.0], [0.0, -0.5, -7.0, -3.0, 0.0]],
        np.float32,
    )
    positive, negative = np.maximum(jacobian, 0).sum(axis=0), np.maximum(-jacobian, 0).sum(axis=0)
    state = surgery.graddrop().init(jnp.zeros(5))
    keys = jax.random.split(jax.random.key(0), 20_000)
    draw = jax.jit(jax.vmap(lambda key: surgery.graddrop(key=key).update(jacobian, state)[0]))
    updates = np.asarray(draw(keys))
    assert (np.isclose(updates, positive) | np.isclose(updates, -negative)).all()
    purities = np.array([0.5, 8 / 9, 0.2, 0.0])
    shares = (updates > 0).mean(axis=0)[:4]
    assert (np.abs(shares - purities) <= 4 * np.sqrt(purities * (1 - purities) / len(keys))).all()
    errors = updates.std(axis=0) / np.sqrt(len(keys))
    assert (np.abs(updates.mean(axis=0) - jacobian.sum(axis=0)) <= 4 * errors + 1e-5).all()


def test_graddrop_draws_anew_for_each_coordinate_leaf_and_step():
    size = 4000
    rows = np.stack([np.ones(size), -np.ones(size)]).astype(np.float32)
    task_grads = {"a": rows, "b": rows}
    tx = surgery.graddrop(key=5)
    state = tx.init({"a": jnp.zeros(size), "b": jnp.zeros(size)})
    first, next_state = tx.update(task_grads, state)
    second, _ = tx.update(task_grads, next_state)
    again, _ = tx.update(task_grads, state)
    np.testing.assert_array_equal(first["a"], again["a"])
    other, _ = surgery.graddrop(key=6).update(task_grads, state)
    draws = [first["a"], first["b"], second["a"], second["b"], other["a"], np.roll(first["a"], 1)]
    correlations = np.corrcoef(np.stack(draws)) - np.eye(len(draws))
    assert np.abs(correlations).max() < 4 / np.sqrt(size)


def test_graddrop_leaks_by_task():
    jacobian = np.array([[2.0, -1.0], [-1.0, 3.0]], np.float32)
    tx = surgery.graddrop(leak=jnp.array([1.0, 0.0]))
    updates = {tuple(np.asarray(tx.update(jacobian, tx.init(jnp.zeros(2))._replace(
        surgery_step=jnp.asarray(step)))[0]).tolist()) for step in range(40)}  # fmt: skip
    assert updates == {(2.0, 2.0), (2.0, -1.0), (1.0, 2.0), (1.0, -1.0)}


def test_a_half_precision_leaf_is_summed_in_float32():
    rows = jnp.asarray(np.repeat([[1.0], [1 / 512]], [1, 256], axis=0), jnp.bfloat16)
    tx = surgery.graddrop()
    update, _ = tx.update(rows, tx.init(jnp.zeros(1, jnp.bfloat16)))
    assert update.dtype == jnp.bfloat16
    np.testing.assert_array_equal(update, 1.5)


# Learning-rate annealing


@pytest.mark.parametrize("residual", [0, 2])
def test_learning_rate_annealing_equals_the_papers_rule(residual):
    steps = gradients(9)
    expected, weights = papers.annealed(steps, residual, decay=0.8)
    assert np.ptp(weights, axis=0).max() > 1, "the weights must move"
    tx = surgery.learning_rate_annealing(residual, NUM_TASKS, decay=0.8)
    equal_in_float32_and_float64(tx, expected, steps)
    with jax.enable_x64(True):
        _, states = trajectory(tx, split(steps))
    np.testing.assert_allclose(states.weighting_state.mean_weights, weights, rtol=1e-6)


def test_averages_are_kept_while_the_residual_or_a_gradient_is_zero_or_masked():
    tx, task_grads = surgery.learning_rate_annealing(1, 3), np.diag([1.0, 2.0, 3.0])
    _, start = tx.update(jnp.asarray(task_grads), tx.init(jnp.zeros(3)))
    before = start.weighting_state.mean_weights
    for lacking, kept in {1: [0, 1, 2], 2: [1, 2]}.items():
        zeros, mask = task_grads * (np.arange(3) != lacking)[:, None], np.arange(3) != lacking
        for rows, extra in ((zeros, {}), (task_grads, {"task_mask": mask})):
            _, state = tx.update(jnp.asarray(rows), start, **extra)
            after = state.weighting_state.mean_weights
            assert np.flatnonzero(after == before).tolist() == kept


# SAM-GS


def test_sam_gs_equals_the_authors_rule():
    steps = gradients(10) * np.array([1.0, 1.0, 4.0])[:, None]
    expected, similarities = papers.sam_gs(steps, 0.8, 0.9, threshold=0.6)
    assert 5 < (similarities < 0.6).sum() < NUM_STEPS - 5, "both cases must occur"
    tx = surgery.sam_gs(NUM_TASKS, 0.8, 0.9, threshold=0.6)
    equal_in_float32_and_float64(tx, expected, steps)


# Robust aggregators


def test_trimmed_mean_equals_torchjd():
    jacobian = np.array([[1e11, 3], [1, -1e11], [-1e10, 1e10], [2, 2]], np.float32)
    tx = surgery.trimmed_mean(1)
    update, _ = tx.update(jacobian, tx.init(jnp.zeros(2)))
    np.testing.assert_allclose(update, [1.5, 2.5], rtol=1e-6)


@pytest.mark.parametrize("num_tasks", [5, 6, 9])
def test_robust_aggregators_under_every_number_of_masked_tasks(num_tasks):
    generator = np.random.default_rng(num_tasks)
    jacobian = generator.normal(size=(num_tasks, 40)).astype(np.float32)
    median, trimmed = surgery.coordinate_median(), surgery.trimmed_mean(2)
    for num_active in range(1, num_tasks + 1):
        mask = generator.permutation(num_tasks) < num_active
        poisoned = np.where(mask[:, None], jacobian, np.nan)
        update, _ = median.update(poisoned, median.init(jnp.zeros(40)), task_mask=mask)
        np.testing.assert_allclose(update, papers.coordinate_median(jacobian[mask]), atol=1e-6)
        update, _ = trimmed.update(poisoned, trimmed.init(jnp.zeros(40)), task_mask=mask)
        expected = papers.trimmed_mean(jacobian[mask], min(2, (num_active - 1) // 2))
        np.testing.assert_allclose(update, expected, atol=1e-6)


@pytest.mark.parametrize("bad", [np.inf, -np.inf, 1e38])
def test_robust_aggregators_survive_a_bad_task(bad):
    jacobian = np.random.default_rng(0).normal(size=(5, 40)).astype(np.float32)
    good = jacobian.copy()
    jacobian[2] = bad
    for tx in (surgery.coordinate_median(), surgery.trimmed_mean(1)):
        update, _ = tx.update(jacobian, tx.init(jnp.zeros(40)))
        others = np.delete(good, 2, axis=0)
        assert (update <= others.max(axis=0)).all()
        assert (update >= others.min(axis=0)).all()


# Averages


def test_excess_mtl_equals_the_papers_rule():
    steps = gradients()
    expected, weights = papers.excess_mtl(steps, learning_rate=0.5)
    assert np.ptp(weights[-1]) > 0.3, "the weights must move"
    equal_in_float32_and_float64(surgery.excess_mtl(3, learning_rate=0.5), expected, steps)


def test_excess_mtl_warms_up():
    steps = gradients(seed=1)
    expected, weights = papers.excess_mtl(steps, learning_rate=0.5, num_warmup_steps=5)
    np.testing.assert_allclose(weights[:5], 1 / 3)
    tx = surgery.excess_mtl(3, learning_rate=0.5, num_warmup_steps=5)
    equal_in_float32_and_float64(tx, expected, steps)


@pytest.mark.parametrize("scale", [1e-30, 1e-15, 1e15, 1e30])
def test_excess_mtl_does_not_depend_on_the_scale(scale):
    steps = gradients().astype(np.float32)
    tx = surgery.excess_mtl(3, learning_rate=0.5)
    plain, _ = trajectory(tx, steps)
    scaled, states = trajectory(tx, steps * np.float32(scale))
    np.testing.assert_allclose(np.asarray(scaled, "f8") / scale, plain, rtol=1e-3, atol=1e-5)
    assert all(np.isfinite(np.asarray(leaf)).all() for leaf in jax.tree.leaves(states))


def test_excess_mtl_takes_the_first_gradient_that_is_not_zero():
    steps = gradients().astype(np.float32)
    steps[:4, 1] = 0
    with jax.debug_nans(True):
        updates, states = trajectory(surgery.excess_mtl(3), steps)
    assert np.isfinite(np.asarray(updates)).all()
    baselines = np.asarray(states.weighting_state.baselines)
    assert (baselines[:4, 1] == 0).all()
    assert (baselines[4:, 1] == baselines[4, 1]).all()
    np.testing.assert_allclose(baselines[4, 1], np.abs(steps[4, 1]).sum(), rtol=1e-6)


def test_excess_mtl_survives_weights_that_underflow():
    steps = gradients().astype(np.float32)
    steps[1:, 0] *= 1e12  # the excess risk of task 0 is 1e12 times its first
    with jax.debug_nans(True):
        updates, states = trajectory(surgery.excess_mtl(3, learning_rate=10.0), steps)
    np.testing.assert_allclose(updates[-1], steps[-1, 0], rtol=1e-5)
    assert np.isfinite(np.asarray(states.weighting_state.log_weights)).all()


@pytest.mark.parametrize("options", [(0.9, 0.0), (0.5, 0.5), (0.0, 0.0)])
def test_db_mtl_equals_the_papers_rule(options):
    steps = gradients()
    losses = np.random.default_rng(1).uniform(0.1, 5, size=(NUM_STEPS, NUM_TASKS))
    expected = papers.db_mtl(steps, losses, *options)
    equal_in_float32_and_float64(surgery.db_mtl(3, *options), expected, steps, losses=losses)


@pytest.mark.parametrize("loss", [0.0, -1.0, -1e-8])
def test_db_mtl_divides_by_no_zero(loss):
    tx = surgery.db_mtl(2)
    with jax.debug_nans(True):
        update, _ = tx.update(
            jnp.eye(2), tx.init(jnp.zeros(2)), losses=jnp.array([loss, 1.0], jnp.float32)
        )
    assert np.isfinite(np.asarray(update)).all()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tracking_rate": 0.2, "learning_rate": 0.02, "regularization": 0.5},
        {"learning_rate": 0.05, "tracking_power": 0.0, "learning_rate_power": 0.0},
    ],
)
def test_moco_equals_the_papers_rule(options):
    steps = gradients(seed=2)
    expected, weights = papers.moco(steps, **options)
    assert np.ptp(weights[-1]) > 0.1, "the weights must move"
    equal_in_float32_and_float64(surgery.moco(3, **options), expected, steps)


@pytest.mark.parametrize("exponent", range(-32, 37, 4))
def test_moco_takes_the_true_step_at_every_scale(exponent):
    # The Gramian of norms below 1e-19 or above 1e19 is no float32.
    jacobian = gradients(num_steps=1) * 10.0**exponent
    expected, weights = papers.moco(jacobian)
    updates, states = trajectory(surgery.moco(3), jacobian.astype(np.float32))
    tolerance = 1e-5 * np.abs(expected).max()
    np.testing.assert_allclose(np.asarray(updates, "f8"), expected, atol=tolerance)
    np.testing.assert_allclose(states.weighting_state.relative_weights, 3 * weights, atol=1e-5)


@pytest.mark.parametrize("tasks", [2, 3])
def test_m_config_before_adam_is_algorithm_1(tasks):
    steps = gradients(seed=3, num_tasks=tasks)
    fresh = np.ones((NUM_STEPS, tasks), bool)
    expected = papers.momentum_conflict_free(steps, fresh, 0.1)
    tx = optax.chain(surgery.momentum_conflict_free(tasks), optax.adam(0.1))
    equal_in_float32_and_float64(tx, expected, steps)


def test_m_config_of_one_task_a_step_is_algorithm_1():
    steps = gradients(seed=4)
    fresh = np.arange(NUM_STEPS)[:, None] % NUM_TASKS == np.arange(NUM_TASKS)
    expected = papers.momentum_conflict_free(steps, fresh, 0.1)
    assert (expected[: NUM_TASKS - 1] == 0).all()
    tx = optax.chain(surgery.momentum_conflict_free(3, alternating=True), optax.adam(0.1))
    poisoned = np.where(fresh[..., None], steps, np.nan)
    with jax.enable_x64(True):
        updates, _ = trajectory(tx, split(poisoned), task_mask=fresh)
    np.testing.assert_allclose(joined(updates), expected, atol=1e-6)


AVERAGES = {
    "excess_mtl": (surgery.excess_mtl(4), "root_sums"),
    "db_mtl": (surgery.db_mtl(4, 0.6), "averages"),
    "sam_gs": (surgery.sam_gs(4, 0.6), "momenta"),
    "moco": (surgery.moco(4, 0.4, tracking_power=0.0), "averages"),
    "m_config": (surgery.momentum_conflict_free(4, 0.6), "momenta"),
    "m_config_alternating": (
        surgery.momentum_conflict_free(4, 0.6, alternating=True), "momenta",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", AVERAGES)
def test_the_average_of_a_task_holds_the_gradients_of_its_own_steps(name):
    tx, field = AVERAGES[name]
    steps = gradients(num_tasks=4).astype(np.float32)
    mask = np.random.default_rng(5).random((NUM_STEPS, 4)) < 0.6
    losses = np.where(mask, 1.0, np.nan).astype(np.float32)
    poisoned = np.where(mask[..., None], steps, np.nan)
    updates, states = trajectory(tx, poisoned, task_mask=mask, losses=losses)
    assert np.isfinite(np.asarray(updates)).all()
    averages = np.asarray(getattr(states.weighting_state, field))
    for task in range(4):
        square, average, count = np.zeros(SIZE), np.zeros(SIZE), 0
        for step in range(NUM_STEPS):
            if mask[step, task]:
                square += steps[step, task] ** 2
                average = 0.6 * average + 0.4 * steps[step, task]
                count += 1
            if name == "excess_mtl":
                expected = np.sqrt(square)
            elif (name == "sam_gs" or name.startswith("m_config")) and count:
                expected = average / (1 - 0.6**count)
            else:
                expected = average
            np.testing.assert_allclose(averages[step, task], expected, rtol=1e-4, atol=1e-5)
        kept = ~mask[1:, task]
        np.testing.assert_array_equal(averages[1:][kept, task], averages[:-1][kept, task])


def test_averages_have_the_dtype_of_the_gramian():
    with jax.enable_x64(True):
        params = {"half": jnp.zeros(2, jnp.bfloat16), "double": jnp.zeros((2, 3))}
        for tx, field in AVERAGES.values():
            averages = getattr(tx.init(params).weighting_state, field)
            assert averages["half"].dtype == jnp.float32
            assert averages["double"].dtype == jnp.float64
            assert averages["double"].shape == (4, 2, 3)


# Two batches


def test_modo_equals_the_papers_rule():
    first, second, third = (gradients(seed) for seed in (6, 6, 7))
    second = second + 0.1 * gradients(8)
    expected, weights = papers.modo(third, first, second, 0.02, 0.1)
    assert np.ptp(weights[-1]) > 0.1, "the weights must move"
    cross = np.einsum("ktn,ksn->kts", first, second)
    equal_in_float32_and_float64(surgery.modo(3, 0.02, 0.1), expected, third, gramian=cross)


@pytest.mark.parametrize("preference", [None, np.array([0.7, 0.2, 0.1])])
def test_sdmgrad_equals_the_papers_rule(preference):
    first, third = gradients(9), gradients(10)
    second = first + 0.1 * gradients(11)
    options = {"regularization": 0.5, "preference": preference, "learning_rate": 0.2}
    expected, weights = papers.sdmgrad(third, first, second, **options)
    assert np.ptp(weights[-1]) > 0.1, "the weights must move"
    cross = np.einsum("ktn,ksn->kts", first, second)
    equal_in_float32_and_float64(surgery.sdmgrad(3, **options), expected, third, gramian=cross)


@pytest.mark.parametrize("num_tasks", [1, 2, 3, 5, 10, 20])
def test_sdmgrad_with_the_authors_learning_rate(num_tasks):
    # In float64, as rounding errors grow with every iteration, and without the deficient ones,
    # whose rows are exactly parallel for two tasks: that is a tie, which rounding decides.
    draws = 7
    batch = np.delete(jacobians(num_tasks, 24, draws), np.s_[draws : 2 * draws], axis=0)
    with jax.enable_x64(True):
        tx = surgery.sdmgrad(num_tasks)
        for jacobian in batch:
            state = tx.init(jnp.zeros(24))
            update, _ = tx.update(jacobian, state, gramian=surgery.gramian(jacobian))
            expected = papers.sdmgrad(*[jacobian[None]] * 3)[0][0]
            scale = np.linalg.norm(jacobian, axis=1).max()
            np.testing.assert_allclose(update, expected, atol=1e-9 * scale)


def test_sdmgrad_keeps_its_weights_where_no_squared_norm_is_above_zero():
    tx = surgery.sdmgrad(2)
    cross = jnp.array([[-1.0, 5.0], [2.0, 0.0]])
    with jax.debug_nans(True):
        weights, _ = tx.update(jnp.eye(2), tx.init(jnp.zeros(2)), gramian=cross)
    np.testing.assert_allclose(weights, 0.5)


# Weights on the simplex


@pytest.mark.parametrize("num_tasks", [1, 2, 3, 10, 40])
def test_the_projection_is_the_nearest_point_of_the_active_simplex(num_tasks):
    generator = np.random.default_rng(0)
    scales = 10 ** generator.uniform(-3, 30, size=(200, 1))
    batch = (generator.normal(size=(200, num_tasks)) * scales).astype(np.float32)
    masks = generator.random(batch.shape) < 0.7
    masks[np.arange(200), generator.integers(num_tasks, size=200)] = True
    projections = np.asarray(jax.vmap(simplex.project)(batch, masks))
    for values, mask, found in zip(batch, masks, projections, strict=True):
        expected = papers.projected(values[mask].astype(np.float64))
        np.testing.assert_allclose(found[mask], expected, atol=1e-6)
        assert (found[~mask] == 0).all()


@pytest.mark.parametrize("name", ["moco", "modo", "sdmgrad"])
def test_a_masked_task_keeps_its_share(name):
    tx = getattr(surgery, name)(4, learning_rate=0.05)
    steps = gradients(seed=12, num_tasks=4).astype(np.float32)
    mask = np.random.default_rng(13).random((NUM_STEPS, 4)) < 0.5
    extra = {} if name == "moco" else {"gramian": np.einsum("ktn,ksn->kts", steps, steps)}
    _, states = trajectory(tx, steps, task_mask=mask, **extra)
    weights = np.asarray(states.weighting_state.relative_weights)
    np.testing.assert_array_equal(weights[1:][~mask[1:]], weights[:-1][~mask[1:]])
    np.testing.assert_allclose(weights.sum(axis=1), 4, rtol=1e-5)
    assert (weights >= 0).all()
    assert np.ptp(weights[-1]) > 0.1


def test_tasks_without_a_share_among_them_begin_with_equal_ones():
    mask = np.array([True, True, False])
    weights = simplex.shares(jnp.array([0.0, 0.0, 3.0]), mask)
    np.testing.assert_allclose(weights, [0.5, 0.5, 0.0])
    np.testing.assert_array_equal(simplex.shares(jnp.ones(3), np.zeros(3, bool)), 0)


# Errors


def test_what_is_missing_is_named():
    for name, argument in [("db_mtl", "losses"), ("modo", "gramian"), ("sdmgrad", "gramian")]:
        tx = getattr(surgery, name)(2)
        state = tx.init(jnp.zeros(2))
        with pytest.raises(ValueError, match=f"argument `{argument}`, got None at '{name}'"):
            tx.update(jnp.eye(2), state)


STATEFUL = ["excess_mtl", "db_mtl", "moco", "sam_gs", "momentum_conflict_free", "modo", "sdmgrad"]


@pytest.mark.parametrize("name", STATEFUL)
def test_another_number_of_tasks_is_refused(name):
    tx = getattr(surgery, name)(3)
    extra = {"losses": jnp.ones(2)}
    if name in ("modo", "sdmgrad"):
        extra["gramian"] = jnp.eye(2)
    with pytest.raises(ValueError, match=rf"gradients of 3 tasks, got 2 .*`{name}\(num_tasks=2\)`"):
        tx.update(jnp.eye(2), tx.init(jnp.zeros(2)), **extra)


MISUSES = {
    "leak above 1": (lambda: surgery.graddrop(1.5), r"in \[0, 1\], got 1.5 at 'leak'"),
    "no function": (lambda: surgery.graddrop(function=3), "a Callable, got .* at 'function'"),
    "nothing trimmed": (lambda: surgery.trimmed_mean(-1), "got -1 at 'num_trimmed'"),
    "no warm-up": (lambda: surgery.excess_mtl(2, 0.1, 0), "got 0 at 'num_warmup_steps'"),
    "decay of 1": (
        lambda: surgery.momentum_conflict_free(2, 1.0), r"in \[0, 1\), got 1.0 at 'decay'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("misuse", MISUSES)
def test_arguments_out_of_range_are_refused(misuse):
    make, message = MISUSES[misuse]
    with pytest.raises(ValueError, match=message):
        make()


def test_gradients_that_do_not_fit_are_refused():
    tx = surgery.trimmed_mean(2)
    message = r"with T = 4, got 2 at 'num_trimmed'. Make it `trimmed_mean\(num_trimmed=[01]\)`"
    with pytest.raises(ValueError, match=message):
        tx.update(jnp.ones((4, 2)), tx.init(jnp.zeros(2)))
    tx = surgery.graddrop(jnp.zeros(3))
    with pytest.raises(ValueError, match=r"leak of shape \(2,\), got shape \(3,\) at 'leak'"):
        tx.update(jnp.eye(2), tx.init(jnp.zeros(2)))
    tx = surgery.coordinate_median()
    with pytest.raises(ValueError, match="Expected a task_mask of booleans"):
        tx.update(jnp.eye(2), tx.init(jnp.zeros(2)), task_mask=jnp.ones(2))
    with pytest.raises(ValueError, match=r"Expected task gradients of shape \(T, 2\)"):
        tx.update({"a": jnp.zeros(2)}, tx.init(None), {"a": jnp.zeros(2)})


def test_a_group_without_leaves_passes():
    params = {"trunk": jnp.zeros(2)}
    tx = optax.partition(
        {"shared": surgery.moco(2), "heads": surgery.excess_mtl(3)}, {"trunk": "shared"}
    )
    updates, _ = tx.update({"trunk": jnp.eye(2)}, tx.init(params), params)
    assert updates["trunk"].shape == (2,)
