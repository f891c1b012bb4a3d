"""What the benchmarks share: their statistics, their methods, and sweeps that go on."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from benchmarks.common import methods, statistics, sweep
from benchmarks.common.command_line import Parser


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


def test_the_best_setting_has_the_best_mean_and_has_not_diverged():
    scores = [[[1.0, 2.0], [9.0, np.nan]], [[4.0, 4.0], [8.0, -9.0]]]
    assert sweep.best(scores) == (1, 0)


# --- Sweeps


@dataclasses.dataclass(frozen=True)
class Config:
    methods: Annotated[tuple, "", None] = ("sum",)
    steps: Annotated[int, "", 1] = 3
    out: Annotated[Path, "", None] = Path("results")
    overwrite: Annotated[bool, "", None] = False


@pytest.fixture
def finished(tmp_path):
    """A sweep of two runs, of which one is finished: (config, files)."""
    config = Config(out=tmp_path)
    files = {name: tmp_path / "runs" / f"{name}.json" for name in ("sum", "pcgrad")}
    sweep.save_run(config, files["sum"], {"score": np.array([1.0, np.nan])})
    return config, files


def test_a_sweep_goes_on_where_it_was(finished):
    config, files = finished
    assert sweep.finished_runs(Parser(), config, files) == {"sum": {"score": [1.0, None]}}
    chosen = dataclasses.replace(config, methods=("sum", "pcgrad"))
    assert list(sweep.finished_runs(Parser(), chosen, files)) == ["sum"]
    assert sweep.finished_runs(Parser(), dataclasses.replace(config, overwrite=True), files) == {}


def other_format(path):
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"format": 0}))


def other_package(path):
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"versions": content["versions"] | {"jax": "0.1"}}))


@pytest.mark.parametrize(
    ("change", "steps", "message"),
    [
        (lambda path: None, 4, "has another options: expected steps 4, got 3"),
        (other_format, 3, "has another format: expected 1, got 0"),
        (other_package, 3, "has another versions: expected jax"),
        (lambda path: path.write_text("{"), 3, "is no results file"),
        (lambda path: path.write_text("[1]"), 3, "is no results file"),
        (lambda path: path.write_bytes(b"\xff\xfe"), 3, "is no results file"),
    ],
)
def test_a_file_that_does_not_belong_is_named_and_left(change, steps, message, finished, capsys):
    config, files = finished
    change(files["sum"])
    before = files["sum"].read_bytes()
    with pytest.raises(SystemExit) as stopped:
        sweep.finished_runs(Parser(), dataclasses.replace(config, steps=steps), files)
    printed = capsys.readouterr().err
    assert stopped.value.code == 2
    assert printed.count("\n") == 1
    assert message in printed
    assert str(files["sum"]) in printed
    assert files["sum"].read_bytes() == before
    assert list(files["sum"].parent.iterdir()) == [files["sum"]]
