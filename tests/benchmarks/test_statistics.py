"""What the benchmarks share: their statistics and their methods."""

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from benchmarks.common import methods, statistics


def test_delta_m_is_that_of_the_published_table():
    # Cityscapes, two tasks (Aligned-MTL, CVPR 2023): mIoU, pixel accuracy, absolute, relative.
    single, higher = [74.01, 93.16, 0.0125, 27.77], [True, True, False, False]
    rows = {"uniform": [75.18, 93.49, 0.0155, 46.77], "aligned_mtl": [75.77, 93.69, 0.0133, 32.66]}
    found = statistics.delta_m(list(rows.values()), single, higher)
    np.testing.assert_allclose(found, [22.60, 5.27], atol=0.1)  # of metrics that are rounded


def test_delta_m_of_negative_metrics_is_worse_above_zero():
    assert statistics.delta_m([-2.0], [-1.0], True) == 100
    assert statistics.delta_m([-0.5], [-1.0], True) == -50


def test_ranks_are_averaged_and_a_diverged_run_is_last():
    metrics = [[90.0, 1.0], [80.0, 2.0], [np.nan, np.nan], [90.0, 3.0]]
    np.testing.assert_array_equal(
        statistics.mean_ranks(metrics, [True, False]), [1.25, 2.5, 4.0, 2.25]
    )


def test_the_interval_holds_the_mean_in_95_of_100():
    values = np.random.default_rng(0).normal(3, 2, (6, 10_000))
    inside = np.abs(values.mean(axis=0) - 3) < statistics.interval_95(values)
    assert abs(inside.mean() - 0.95) < 0.01


def test_methods_are_tested_seed_by_seed_and_corrected_for_their_number():
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 0.1, (3, 8))
    noise -= noise.mean(axis=1, keepdims=True)
    shifts = {"single": 3.0, "pcgrad": 0.0, "aligned_mtl": 0.08}
    differences = {name: shift + noise[n] for n, (name, shift) in enumerate(shifts.items())}
    found = statistics.paired_tests(differences)
    raw = [stats.ttest_rel(each, np.zeros(8)).pvalue for each in differences.values()]
    np.testing.assert_allclose([one["p"] for one in found.values()], raw)
    expected = np.minimum(1, np.maximum.accumulate(np.array([3, 2, 1]) * np.sort(raw)))
    np.testing.assert_allclose(sorted(one["p_holm"] for one in found.values()), expected)
    assert found["single"]["differs"]
    assert not found["pcgrad"]["differs"]


def test_equal_figures_are_no_difference():
    found = statistics.paired_tests({"pcgrad": np.zeros(5)})
    assert (found["pcgrad"]["p"], found["pcgrad"]["interval_95"]) == (1, 0)


def test_every_method_makes_a_finite_update():
    num_tasks = 3
    task_grads = jnp.asarray(np.random.default_rng(0).normal(size=(num_tasks, 7)), jnp.float32)
    losses = jnp.linspace(0.5, 1.0, num_tasks)

    def updates(task_grads):
        found = {}
        for name in methods.names(num_tasks):
            tx = methods.METHODS[name](num_tasks)
            found[name], _ = tx.update(task_grads, tx.init(task_grads[0]), losses=losses)
        return found

    found = jax.jit(updates)(task_grads)
    assert set(found) == set(methods.METHODS)
    for name, update in found.items():
        assert np.all(np.isfinite(update)), name
        assert np.any(update), name
    assert set(methods.METHODS) - set(methods.names(2)) == set(methods.NEED_THREE_TASKS)


def test_weights_of_the_losses_begin_equal_and_add_up_to_the_number_of_tasks():
    weights = methods.loss_weights("linear", 4, 9)
    assert weights.shape == (9, 4)
    np.testing.assert_array_equal(weights[0], 1)
    np.testing.assert_allclose(weights.sum(axis=1), 4, rtol=1e-5)
    np.testing.assert_array_equal(methods.loss_weights("pcgrad", 4, 9), np.ones((1, 4)))
