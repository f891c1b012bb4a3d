"""The results that are kept: they are what the code beside them would make."""

import importlib
import json
import shlex
from pathlib import Path

import numpy as np
import pytest

from benchmarks import report
from benchmarks.common import methods
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
