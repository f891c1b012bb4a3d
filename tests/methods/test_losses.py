"""The methods from the losses: their trajectories, masks, distributions and strange losses."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_surgery as surgery
from optax_surgery.methods.go4align import group_means
from tests.cases import FROM_THE_LOSSES
from tests.papers import gramian as papers_gramian
from tests.papers import losses as papers_losses

NUM_TASKS, SIZE, NUM_STEPS = 4, 6, 60


def loss_history(num_steps=NUM_STEPS, num_tasks=NUM_TASKS, seed=0):
    """Losses of different scales that fall at different rates, with the noise of batches."""
    generator = np.random.default_rng(seed)
    scales = 10 ** generator.uniform(-1, 1, num_tasks)
    rates = generator.uniform(0, 0.05, num_tasks)
    noise = 0.2 * generator.normal(size=(num_steps, num_tasks))
    history = scales * np.exp(-rates * np.arange(num_steps)[:, None] + noise)
    return history.astype("f4").astype("f8")


def jacobian_history(num_steps=NUM_STEPS, num_tasks=NUM_TASKS, seed=1):
    generator = np.random.default_rng(seed)
    norms = 10 ** generator.uniform(-1, 1, (num_tasks, 1))
    return (norms * generator.normal(size=(num_steps, num_tasks, SIZE))).astype("f4").astype("f8")


def run(tx, history, jacobians=None, masks=None):
    """The weights (the updates, if there are Jacobians) and the states of all steps."""
    num_steps, num_tasks = history.shape
    rows = np.stack([np.eye(num_tasks)] * num_steps) if jacobians is None else jacobians
    masks = np.ones(history.shape, bool) if masks is None else np.asarray(masks)

    def step(state, inputs):
        task_grads, losses, task_mask = inputs
        update, state = tx.update(task_grads, state, losses=losses, task_mask=task_mask)
        return state, (update, state.weighting_state)

    inputs = (rows.astype("f4"), history.astype("f4"), masks)
    _, (updates, states) = jax.lax.scan(step, tx.init(jnp.zeros(rows.shape[-1])), inputs)
    return np.asarray(updates, np.float64), states


TRAJECTORIES = {
    "uncertainty_weighting": (
        lambda: surgery.uncertainty_weighting(NUM_TASKS),
        papers_losses.uncertainty_weighting,
    ),
    "imtl_l": (lambda: surgery.imtl_l(NUM_TASKS), papers_losses.imtl_l),
    "dwa": (
        lambda: surgery.dwa(NUM_TASKS, window=7, temperature=0.5),
        functools.partial(papers_losses.dwa, window=7, temperature=0.5),
    ),
    "softadapt": (
        lambda: surgery.softadapt(NUM_TASKS, focus=2.0),
        functools.partial(papers_losses.softadapt, focus=2.0),
    ),
    "softadapt, normalized": (
        lambda: surgery.softadapt(NUM_TASKS, focus=3.0, kind="normalized"),
        functools.partial(papers_losses.softadapt, focus=3.0, kind="normalized"),
    ),
    "softadapt, loss-weighted": (
        lambda: surgery.softadapt(NUM_TASKS, focus=0.5, kind="loss_weighted"),
        functools.partial(papers_losses.softadapt, focus=0.5, kind="loss_weighted"),
    ),
    "relobralo, never looking back": (
        lambda: surgery.relobralo(NUM_TASKS, decay=0.7, lookback=1.0),
        functools.partial(papers_losses.relobralo, decay=0.7),
    ),
    "relobralo, always looking back": (
        lambda: surgery.relobralo(NUM_TASKS, temperature=1.0, decay=0.7, lookback=0.0),
        functools.partial(
            papers_losses.relobralo, temperature=1.0, decay=0.7, keeps=np.zeros(NUM_STEPS)
        ),
    ),
    "famo": (lambda: surgery.famo(NUM_TASKS), papers_losses.famo),
    "famo with bounds and decay": (
        lambda: surgery.famo(NUM_TASKS, lower_bounds=np.array([-1, 0, -3, 0.01]), decay=0.1),
        functools.partial(papers_losses.famo, lower_bounds=np.array([-1, 0, -3, 0.01]), decay=0.1),
    ),
    "go4align": (
        lambda: surgery.go4align(NUM_TASKS, num_groups=2, learning_rate=0.01),
        functools.partial(papers_losses.go4align, num_groups=2, learning_rate=0.01),
    ),
}


@pytest.mark.parametrize("name", TRAJECTORIES)
def test_weights_of_60_steps_are_those_of_the_paper(name):
    make, rule = TRAJECTORIES[name]
    expected = rule(loss_history())
    assert np.ptp(expected, axis=0).max() > 0.1, "nothing was learnt: the test sees nothing"
    weights, _ = run(make(), loss_history())
    np.testing.assert_allclose(weights, expected, rtol=2e-5)


def test_relobralo_looks_back_as_often_as_it_says():
    history = np.repeat(loss_history()[:1], 400, axis=0)
    history[1:, 0] *= 2  # a task that was set back: only a look back tells
    tx = surgery.relobralo(NUM_TASKS, temperature=1.0, decay=1.0, lookback=0.9)
    weights, _ = run(tx, history)
    renewed = (weights[1:] != weights[:-1]).any(axis=1)
    assert renewed.sum() == 1, "the first look back; later ones find the same"
    first = np.argmax(renewed) + 1
    expected = papers_losses.relobralo(history[:2], temperature=1.0, decay=1.0, keeps=[0, 0])[1]
    np.testing.assert_allclose(weights[first:], expected[None].repeat(400 - first, 0), rtol=1e-5)
    assert first < 100


@pytest.mark.parametrize("asymmetry", [0.12, 1.5])
def test_60_steps_of_gradnorm_are_those_of_the_paper(asymmetry):
    jacobians, history = jacobian_history(), loss_history()
    expected = papers_losses.gradnorm(jacobians, history, asymmetry)
    assert np.ptp(expected, axis=0).max() > 0.5
    assert expected.min() > 0.01, "the least weight of ours must not matter here"
    updates, states = run(surgery.gradnorm(NUM_TASKS, asymmetry), history, jacobians)
    np.testing.assert_allclose(states.task_weights[:-1], expected[1:], atol=2e-5)
    exact = np.einsum("st,stn->sn", expected, jacobians)
    np.testing.assert_allclose(updates, exact, atol=1e-4 * np.abs(jacobians).max())


def test_60_steps_of_inverse_norms_are_those_of_the_paper():
    jacobians, history = jacobian_history(), loss_history()
    expected = papers_gramian.inverse_norms(jacobians, decay=0.8)
    updates, _ = run(surgery.inverse_norms(NUM_TASKS, decay=0.8), history, jacobians)
    np.testing.assert_allclose(updates, expected, atol=1e-5 * np.abs(expected).max())


def test_60_steps_of_imtl_are_those_of_the_paper():
    jacobians, history = jacobian_history(), loss_history()
    expected = papers_losses.imtl(jacobians, history)
    updates, _ = run(surgery.imtl(NUM_TASKS), history, jacobians)
    sizes = np.linalg.norm(jacobians, axis=-1).max(axis=-1)
    sizes = np.maximum(sizes, np.linalg.norm(expected, axis=-1))
    assert (np.abs(updates - expected).max(axis=-1) / sizes).max() < 1e-3


@pytest.mark.parametrize("seed", range(20))
def test_imtl_equals_the_authors_closed_form_and_projects_equally(seed):
    generator = np.random.default_rng(seed)
    jacobian = generator.normal(size=(3, 6)) * np.exp(generator.normal(size=(3, 1)))
    scales = np.exp(generator.normal(size=3))
    tx = surgery.imtl(3)
    with jax.enable_x64(True):
        state = tx.init(jnp.zeros(6))
        learnt = state.weighting_state._replace(log_scales=jnp.log(scales).astype("f4"))
        state = state._replace(weighting_state=learnt)
        update, _ = tx.update(jacobian, state, losses=np.ones(3))
    scaled = np.exp(np.asarray(learnt.log_scales, np.float64))[:, None] * jacobian
    expected = papers_losses.imtl_authors(scaled) @ scaled
    sizes = max(np.linalg.norm(expected), np.linalg.norm(jacobian, axis=1).max())
    np.testing.assert_allclose(update, expected, atol=1e-6 * sizes)
    projections = jacobian @ np.asarray(update) / np.linalg.norm(jacobian, axis=1)
    np.testing.assert_allclose(projections, projections.mean(), rtol=1e-6)


@pytest.mark.parametrize(
    ("make", "factor"), [(surgery.uncertainty_weighting, 0.5), (surgery.imtl_l, 1.0)]
)
def test_learnt_scales_tend_to_the_inverse_losses(make, factor):
    losses = np.array([0.2, 1.0, 5.0])
    weights, _ = run(make(3), np.tile(losses, (3000, 1)))
    np.testing.assert_allclose(weights[-1], factor / losses, rtol=1e-2)


@pytest.mark.parametrize("losses", [0.0, -2.0])
@pytest.mark.parametrize("make", [surgery.uncertainty_weighting, surgery.imtl_l])
def test_learnt_scales_of_losses_without_an_inverse_stay_in_bounds(make, losses):
    tx = make(2, optax.sgd(10.0))
    weights, _ = run(tx, np.tile(np.array([losses, 1.0]), (100, 1)))
    assert np.isfinite(weights).all()
    assert weights.max() < 1.2e26  # exp(60)


def test_the_optimiser_is_the_callers():
    history = loss_history(num_steps=2)
    _, states = run(surgery.imtl_l(NUM_TASKS, optax.sgd(0.5)), history)
    np.testing.assert_allclose(states.log_scales[0], -0.5 * (history[0] - 1), rtol=1e-5)
    _, states = run(surgery.uncertainty_weighting(NUM_TASKS, optax.sgd(0.5)), history)
    np.testing.assert_allclose(states.log_scales[0], 0.25 * (history[0] - 1), rtol=1e-5)


# Masks that change from step to step


def test_a_masked_task_of_learnt_scales_misses_its_steps_only():
    # With SGD a task's numbers depend on its own steps only, whoever else takes part.
    history = loss_history(num_tasks=2)
    masks = np.random.default_rng(5).random(history.shape) < 0.6
    _, states = run(surgery.imtl_l(2, optax.sgd(0.1)), history, masks=masks)
    for task in range(2):
        alone = history[masks[:, task], task][:, None]
        _, expected = run(surgery.imtl_l(1, optax.sgd(0.1)), alone)
        np.testing.assert_allclose(
            states.log_scales[-1, task], expected.log_scales[-1, 0], rtol=1e-5
        )


def test_windows_of_dwa_hold_the_steps_in_which_a_task_took_part():
    history = loss_history(num_tasks=2)
    masks = np.random.default_rng(5).random(history.shape) < 0.6
    _, states = run(surgery.dwa(2, window=5), history, masks=masks)
    for task in range(2):
        seen = history[masks[:, task], task]
        windows = seen[: len(seen) // 5 * 5].reshape(-1, 5).mean(axis=1)
        np.testing.assert_allclose(states.last_means[-1, task], windows[-1], rtol=1e-5)
        np.testing.assert_allclose(states.earlier_means[-1, task], windows[-2], rtol=1e-5)
        assert states.task_steps[-1, task] == len(seen)


def test_dwa_counts_a_task_without_two_windows_as_unchanged():
    history = np.array([[1.0, 1.0], [3.0, 1.0], [1.0, 1.0]])
    masks = np.array([[True, False], [True, True], [True, True]])
    weights, _ = run(surgery.dwa(2, window=1), history, masks=masks)
    np.testing.assert_allclose(weights[0], [1, 0])
    np.testing.assert_allclose(weights[2], 2 * papers_losses.softmax(np.array([3, 1]) / 2))


def famo_logits(logits, gains):
    """One step of SGD with rate 1 without decay."""
    shares = papers_losses.softmax(logits)
    return logits - shares * (gains - shares @ gains)


def test_famo_compares_with_the_last_step_in_which_a_task_took_part():
    history = loss_history(num_steps=4, num_tasks=3)
    masks = np.array([[1, 1, 0], [1, 0, 0], [1, 1, 1], [1, 1, 1]], bool)
    tx = surgery.famo(3, decay=0.0, optimizer=optax.sgd(1.0))
    _, states = run(tx, history, masks=masks)
    logs = np.log(history + 1e-8)

    np.testing.assert_array_equal(states.logits[0], 0)
    # Task 1 is alone with a gain: a softmax of one does not move.
    np.testing.assert_array_equal(states.logits[1], 0)
    # Task 2 is new and stays; task 1 is compared with the first step.
    two = famo_logits(np.zeros(2), np.array([logs[1, 0], logs[0, 1]]) - logs[2, :2])
    np.testing.assert_allclose(states.logits[2], [*two, 0], atol=1e-6)
    three = famo_logits(np.array([*two, 0]), logs[2] - logs[3])
    np.testing.assert_allclose(states.logits[3], three, atol=1e-6)


def test_famos_optimiser_begins_with_the_first_comparison():
    history = loss_history(num_steps=3)
    _, states = run(surgery.famo(NUM_TASKS), history)
    steps = [leaf for leaf in states.optimizer_state if leaf.dtype == jnp.int32]
    np.testing.assert_array_equal(steps[0], [0, 1, 2])


def test_weights_of_gradnorm_add_up_to_the_number_of_tasks_whatever_is_masked():
    history = loss_history()
    masks = np.random.default_rng(5).random(history.shape) < 0.6
    masks[masks.sum(axis=1) == 0] = True
    weights, states = run(surgery.gradnorm(NUM_TASKS), history, masks=masks)
    np.testing.assert_allclose(weights.sum(axis=1), masks.sum(axis=1), rtol=1e-5)
    np.testing.assert_allclose(states.task_weights.sum(axis=1), NUM_TASKS, rtol=1e-4)
    first_seen = masks.argmax(axis=0)
    np.testing.assert_allclose(
        states.initial_losses[-1], history[first_seen, np.arange(NUM_TASKS)], rtol=1e-6
    )


def test_weights_of_gradnorm_stay_above_zero():
    jacobians, history = jacobian_history(), loss_history()
    _, states = run(surgery.gradnorm(NUM_TASKS, optimizer=optax.sgd(100.0)), history, jacobians)
    assert np.min(states.task_weights) > 0
    np.testing.assert_allclose(states.task_weights.sum(axis=1), NUM_TASKS, rtol=1e-4)


def test_a_pause_of_go4align_costs_a_task_no_share():
    history = np.array([[1.0, 2.0, 6.0], [1.0, 2.0, 6.0]])
    masks = np.array([[True, True, True], [True, True, False]])
    _, states = run(surgery.go4align(3, num_groups=2, learning_rate=0.1), history, masks=masks)
    np.testing.assert_allclose(states.log_shares[0], [0.2, 0.1, -0.3], atol=1e-6)
    np.testing.assert_allclose(states.log_shares[1], [0.25, 0.05, -0.3], atol=1e-6)


# k-means on a line


def best_labels(values, num_groups):
    """The least cost of all ways to label the values, intervals or not."""
    costs = []
    for labels in itertools.product(range(num_groups), repeat=len(values)):
        means = np.array([values[np.equal(labels, label)].mean() for label in labels])
        costs.append(((values - means) ** 2).sum())
    return min(costs)


@pytest.mark.parametrize("num_groups", [1, 2, 3, 7])
def test_groups_are_the_best_of_all(num_groups):
    generator = np.random.default_rng(num_groups)
    for size in (1, 2, 3, 5):
        draws = np.exp(2 * generator.normal(size=(10, size))).astype("f4")
        # Masked values stand in between, and are far away.
        mixed = np.insert(draws, [size // 2] * 2, [1e6, -1e6], axis=1)
        mask = np.insert(np.ones(size, bool), size // 2, [False, False])
        split = functools.partial(group_means, task_mask=jnp.asarray(mask), num_groups=num_groups)
        grouped = jax.jit(jax.vmap(split))
        for values, row in zip(draws.astype("f8"), np.asarray(grouped(mixed)), strict=True):
            means = row[mask]
            assert len(np.unique(means)) <= num_groups
            cost = ((values - means) ** 2).sum()
            best = best_labels(values, min(num_groups, size))
            np.testing.assert_allclose(cost, best, atol=1e-5 * (values**2).sum())
            for mean in np.unique(means):
                np.testing.assert_allclose(values[means == mean].mean(), mean, rtol=1e-5)


def test_equal_values_are_their_own_mean():
    means = group_means(jnp.full(5, 0.3), jnp.ones(5, bool), 2)
    np.testing.assert_allclose(means, 0.3, rtol=1e-6)


# Random loss weighting


@functools.cache
def random_weights(num_tasks, num_keys=40_000):
    def weights(key):
        tx = surgery.random_weighting(key=key)
        return tx.update(jnp.eye(num_tasks), tx.init(None))[0]

    return np.asarray(jax.jit(jax.vmap(weights))(jax.random.split(jax.random.key(3), num_keys)))


@pytest.mark.parametrize("num_tasks", [2, 3, 8])
def test_random_weights_have_the_moments_of_a_softmax_of_normals(num_tasks):
    weights = random_weights(num_tasks).astype("f8")
    np.testing.assert_allclose(weights.sum(axis=1), 1, rtol=1e-5)
    normals = np.random.default_rng(0).normal(size=(400_000, num_tasks))
    exact = np.exp(normals) / np.exp(normals).sum(axis=1, keepdims=True)
    for power in (1, 2, 3):
        spread = exact[:, 0] ** power
        error = spread.std() * math.sqrt(1 / len(weights) + 1 / exact.size)
        expected = 1 / num_tasks if power == 1 else (exact**power).mean()
        assert (np.abs((weights**power).mean(axis=0) - expected) < 4 * error).all()


def test_two_random_weights_have_the_exact_distribution():
    # w = 1 / (1 + exp(z_2 - z_1)), so that P(w <= x) = Phi(log(x / (1 - x)) / sqrt(2)).
    weights = np.sort(random_weights(2)[:, 0].astype("f8"))
    quantiles = np.log(weights / (1 - weights)) / 2
    exact = np.array([(1 + math.erf(quantile)) / 2 for quantile in quantiles])
    gap = np.abs(exact - (np.arange(weights.size) + 0.5) / weights.size).max()
    assert gap < 1.95 / math.sqrt(weights.size)  # Kolmogorov and Smirnov, 99.9 %


def test_random_weights_change_from_step_to_step_and_not_between_runs():
    weights, _ = run(surgery.random_weighting(key=4), np.ones((6, 3)))
    assert len(np.unique(weights.round(5), axis=0)) == 6
    again, _ = run(surgery.random_weighting(key=4), np.ones((6, 3)))
    np.testing.assert_array_equal(weights, again)


def test_masked_tasks_take_no_draw_of_random_weights():
    mask = np.array([False, True, True, False, True])
    tx = surgery.random_weighting(key=4)
    weights, _ = tx.update(jnp.eye(5), tx.init(None), task_mask=mask)
    alone, _ = tx.update(jnp.eye(3), tx.init(None))
    np.testing.assert_allclose(weights[mask], alone, rtol=1e-6)


# Scalarisations


def weights_of(tx, losses, **kwargs):
    losses = np.asarray(losses, "f4")
    return np.asarray(tx.update(jnp.eye(losses.size), tx.init(None), losses=losses, **kwargs)[0])


def test_scaled_losses_give_the_same_update_or_direction():
    generator = np.random.default_rng(0)
    rows, losses = generator.normal(size=(3, 5)).astype("f4"), np.array([0.1, 1.0, 20.0], "f4")
    factors = np.array([1e-3, 7.0, 1e4], "f4")

    def update(tx, factors):
        scaled = {"losses": factors * losses}
        return np.asarray(tx.update(factors[:, None] * rows, tx.init(None), **scaled)[0])

    ones = np.ones(3, "f4")
    for tx, share in ((surgery.scale_invariant(), 1.0), (surgery.gls(), factors.prod() ** (1 / 3))):
        np.testing.assert_allclose(update(tx, factors), share * update(tx, ones), rtol=1e-4)


def test_a_geometric_mean_of_many_losses_does_not_overflow():
    weights = weights_of(surgery.gls(), np.full(40, 1e3))
    np.testing.assert_allclose(weights, 1 / 40, rtol=1e-5)
    weights = weights_of(surgery.gls(), [1e-20] + [1e38] * 39)
    np.testing.assert_allclose(weights[0], 1e30, rtol=1e-5)


def test_stch_has_the_worst_task_alone_in_the_limit():
    weights = weights_of(surgery.stch(1e-4), [1.0, 3.0, 2.0])
    np.testing.assert_allclose(weights, [0, 1 / 3, 0], atol=1e-6)


def test_stch_of_the_authors_code_for_networks():
    losses, nadir, smoothing = np.array([0.5, 3.0, 1.0]), np.array([0.7, 2.0, 4.0]), 0.3

    def scalar(values):
        return 3 * smoothing * np.log(np.exp(np.log(values / nadir) / smoothing).sum())

    tx = surgery.stch(smoothing, jnp.ones(3), jnp.log(nadir), log_losses=True)
    expected = papers_losses.derivative(scalar, losses)
    np.testing.assert_allclose(3 * weights_of(tx, losses), expected, rtol=1e-5)


def test_cosmos_without_a_penalty_is_a_constant_weighting():
    np.testing.assert_allclose(weights_of(surgery.cosmos(0.0), [1.0, 2.0]), 0.5)


@pytest.mark.parametrize("losses", [[0.3, 0.3, 0.3], [0.0, 0.0, 0.0], [1e-30, 0.0, 0.0]])
def test_on_the_ray_of_pbi_only_the_way_along_it_counts(losses):
    weights = weights_of(surgery.pbi(), losses)
    if losses[0] == losses[1]:
        np.testing.assert_allclose(weights, 1 / math.sqrt(3), rtol=1e-6)
    else:  # far off the ray, however small the losses
        np.testing.assert_allclose(np.linalg.norm(weights), math.sqrt(26), rtol=1e-5)


def test_pbi_and_cosmos_agree_at_all_scales_of_the_losses():
    for scale in (1e-15, 1e25):
        losses = np.array([0.5, 1.0, 3.0]) * scale
        expected = papers_losses.pbi(losses / scale)
        np.testing.assert_allclose(weights_of(surgery.pbi(), losses), expected, rtol=1e-5)
        expected = papers_losses.cosmos(losses / scale, 1.0)
        found = weights_of(surgery.cosmos(scale), losses)
        np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_a_preference_may_be_new_in_every_compiled_step():
    @jax.jit
    def update(preference, losses):
        tx = surgery.cosmos(1.0, preference)
        return tx.update(jnp.eye(2), tx.init(None), losses=losses)[0]

    for preference in np.random.default_rng(0).dirichlet(np.ones(2), 3):
        expected = papers_losses.cosmos(np.array([1.0, 2.0]), 1.0, preference)
        found = update(preference.astype("f4"), np.array([1.0, 2.0], "f4"))
        np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert update._cache_size() == 1


# Strange losses, and misuse


STRANGE = {
    "zero": [0.0, 0.0, 0.0],
    "one zero": [0.0, 1.0, 2.0],
    "negative": [-1.0, -2.0, -3.0],
    "one negative": [-1.0, 1.0, 2.0],
    "tiny": [1e-30, 1e-38, 1e-20],
    "huge": [1e30, 1e25, 1e20],
    "tiny and huge": [1e-30, 1e30, 1.0],
    "negative and huge": [-1e30, 1e30, 0.0],
}


@pytest.mark.parametrize("losses", STRANGE)
@pytest.mark.parametrize("case", FROM_THE_LOSSES.values(), ids=FROM_THE_LOSSES)
def test_strange_losses_give_finite_weights(case, losses):
    ordinary = [0.5, 1.0, 2.0]
    state = None
    with jax.debug_nans(True):
        for step in (STRANGE[losses], ordinary, STRANGE[losses], STRANGE[losses]):
            weights, state = case.step(np.eye(3, dtype="f4"), state, losses=np.array(step, "f4"))
            for leaf in jax.tree.leaves((weights, state)):
                assert np.isfinite(np.asarray(leaf)).all()


@pytest.mark.parametrize("case", FROM_THE_LOSSES.values(), ids=FROM_THE_LOSSES)
def test_a_first_state_may_be_donated_as_it_is(case):
    state = case.surgery(3).init(jnp.zeros(3))
    weights, _ = jax.jit(case.step, donate_argnums=1)(jnp.eye(3), state)
    assert np.isfinite(np.asarray(weights)).all()


@pytest.mark.parametrize("name", FROM_THE_LOSSES)
def test_missing_losses_are_told(name):
    tx = FROM_THE_LOSSES[name].surgery(3)
    if name == "random_weighting":
        tx.update(jnp.eye(3), tx.init(jnp.zeros(3)))
        return
    with pytest.raises(ValueError, match=r"Expected the extra argument `losses`, got None at"):
        tx.update(jnp.eye(3), tx.init(jnp.zeros(3)))


WITH_NUM_TASKS = {
    "uncertainty_weighting": {},
    "imtl_l": {},
    "imtl": {},
    "dwa": {"window": 3},
    "softadapt": {},
    "relobralo": {},
    "famo": {},
    "go4align": {"num_groups": 2},
    "gradnorm": {},
}


@pytest.mark.parametrize("name", WITH_NUM_TASKS)
def test_another_number_of_tasks_is_told(name):
    tx = getattr(surgery, name)(4, **WITH_NUM_TASKS[name])
    hint = ", ".join(
        f"{key}={value}" for key, value in {"num_tasks": 3, **WITH_NUM_TASKS[name]}.items()
    )
    message = rf"Expected the gradients of 4 tasks, got 3 at '{name}'. Make it `{name}\({hint}\)`"
    with pytest.raises(ValueError, match=message):
        tx.update(jnp.eye(3), tx.init(jnp.zeros(3)), losses=jnp.ones(3))


MISUSES = {
    "window": (lambda: surgery.dwa(3, window=0), r"in \[1, inf\), got 0 at 'window'"),
    "groups": (lambda: surgery.go4align(3, 0), r"in \[1, inf\), got 0 at 'num_groups'"),
    "preference": (lambda: surgery.stch(preference=jnp.ones(2)), r"preference of shape \(3,\)"),
    "reference": (lambda: surgery.pbi(reference=jnp.ones(2)), r"reference of shape \(3,\)"),
    "bounds": (lambda: surgery.famo(3, jnp.ones(2)), r"lower_bounds of shape \(3,\)"),
}


@pytest.mark.parametrize("misuse", MISUSES)
def test_misuse_is_told(misuse):
    make, message = MISUSES[misuse]
    with pytest.raises(ValueError, match=message):
        weights_of(make(), np.ones(3))
