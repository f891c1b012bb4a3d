"""The results that are kept: they are what the code beside them would make."""

import importlib
import json
import shlex
from pathlib import Path

import numpy as np
import pytest

from benchmarks import fronts, report, samples
from benchmarks.common import methods, statistics
from benchmarks.common.command_line import Parser, command_of, parse

FOLDER = Path(report.__file__).parent / "results"
RESULTS = {path.stem: json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json"))}
each_of_them = pytest.mark.parametrize("name", RESULTS)


def options_now(result):
    """The options that the command of a result would run with."""
    words = shlex.split(result["command"])
    assert words[:2] == ["python", "-m"]
    module = importlib.import_module(words[2])
    config_class = module.FullConfig if "--full" in words else module.Config
    return parse(Parser(), config_class, words[3:])


@each_of_them
def test_the_command_of_a_result_has_its_options(name):
    result = RESULTS[name]
    config = options_now(result)
    places = ("data_dir", "data_file", "out", "overwrite")
    now = {option: each for option, each in vars(config).items() if option not in places}
    assert json.loads(json.dumps(now)) == result["config"]
    assert command_of(config) == result["command"]


@each_of_them
def test_methods_are_those_that_made_the_results(name):
    before = RESULTS[name]["behaviour"]
    compared = set(RESULTS[name]["config"].get("methods", before)) & set(methods.METHODS)
    assert set(before) == compared
    for method, now in methods.behaviour(before).items():
        scale = np.max(np.abs(before[method]))
        np.testing.assert_allclose(now / scale, before[method] / scale, atol=1e-3, err_msg=method)


def test_a_method_that_changes_is_noticed(monkeypatch):
    before = methods.behaviour(["aligned_mtl"])["aligned_mtl"]
    monkeypatch.setitem(methods.METHODS, "aligned_mtl", methods.METHODS["pcgrad"])
    after = methods.behaviour(["aligned_mtl"])["aligned_mtl"]
    assert np.max(np.abs(after - before)) > 1e-2 * np.max(np.abs(before))


def test_tables_are_those_of_the_results():
    with_success = [each for each in RESULTS.values() if "by_seed" in each]
    others = [each for each in RESULTS.values() if "metrics" in each]
    text = report.markdown(others) + report.successes_in_markdown(with_success)
    assert (FOLDER / "results.md").read_text() == text


# The tables of two studies stand in the documentation, a row for each method.


def row_of_front(run):
    known, seconds = fronts.PROBLEMS.get(run["problem"]), run["seconds"]
    cells = [
        known.title if known else "MultiMNIST",
        f"`{run['method']}`",
        fronts.with_interval(run["hypervolume"], 3),
        statistics.verdict(run["hypervolume_against_linear"], 3) or "-",
        fronts.with_interval(run["angle"], 1),
        statistics.verdict(run["angle_against_linear"], 1) or "-",
        f"{np.mean(run['order']):.2f}",
        f"{seconds['front'] / seconds['run']:.1f}" if seconds else "-",
    ]
    return f"| {' | '.join(cells)} |"


def row_of_samples(run):
    cells = [f"`{run['method']}`"]
    for name, figure in run["figures"].items():
        # NaN, of networks that diverged, is None in a file.
        numbers = {part: np.array(figure[part], float) for part in ("points", "mean")}
        cells += [cell or "-" for cell in samples.cells_of(name, figure | numbers)]
    cells += [f"{run['learning_rates'][0]:g}", f"{np.median(run['time']):.1f}"]
    return f"| {' | '.join(cells)} |"


@pytest.mark.parametrize(
    ("name", "row_of"), [("fronts", row_of_front), ("samples", row_of_samples)]
)
def test_tables_of_the_documentation_are_those_of_the_results(name, row_of):
    page = (FOLDER.parents[1] / "docs/results.md").read_text()
    rows = [row_of(run) for run in RESULTS[name]["runs"]]
    assert len(rows) > 10
    assert [row for row in rows if row not in page] == []
    if name == "samples":
        assert [said for said in RESULTS[name]["findings"][-6:] if f"- {said}" not in page] == []
