"""The report: from results files to tables, a picture and summaries."""

import json

import numpy as np
import pytest

from benchmarks import report
from benchmarks.common.command_line import as_json

SHIFTS = {"single": 0.0, "sum": -4.0, "linear": -3.9, "pcgrad": -2.0, "mgda": -4.0}


def make_results(folder, widths=(None,), higher=(True, False), methods=tuple(SHIFTS)):
    """Six seeds of five methods: `pcgrad` is two points better than `sum`, `mgda` like it."""
    rng, config, runs = np.random.default_rng(0), report.Config(), []
    for width in widths:
        seeds = rng.normal(0, 1.0, (6, 1))  # what methods share
        for method in methods:
            scores = 80 + seeds + SHIFTS[method] + rng.normal(0, 0.1, (6, 2))
            signs = np.where(higher, 1, -1)
            run = {"method": method, "metrics": signs * (scores - 80) + 80, "cpu_seconds": 60.0}
            run |= {} if width is None else {"width": width}
            if method != "single":
                run["cosines"] = np.tile(np.eye(2), (6, 3, 1, 1))
            runs.append(run | {"learning_rates": [0.01]})
    described = {"metrics": ["accuracy", "error"], "higher_is_better": list(higher), "runs": runs}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_bytes(as_json(config, **described))


def run(tmp_path, *options):
    arguments = ["--results", str(tmp_path / "results"), "--out", str(tmp_path / "out"), *options]
    report.main(arguments)
    return (tmp_path / "out" / "results.md").read_text()


def test_a_winner_is_named_only_where_a_test_supports_it(tmp_path, capsys):
    make_results(tmp_path / "results" / "mine")
    text = run(tmp_path)
    assert text in capsys.readouterr().out
    assert "Better than `sum`: `pcgrad` (of 3)." in text
    assert "Worse than `sum`: none (of 3)." in text
    rows = {line.split("|")[1].strip(" `"): line for line in text.splitlines() if "| `" in line}
    assert [cell.strip() for cell in rows["mgda"].split("|")][6] == "="
    assert list(rows)[:2] == ["single", "pcgrad"]  # the best first
    assert "2 cores" in text or "cores" in text
    assert "5 core minutes" in text


def test_summaries_say_the_same_as_the_results(tmp_path):
    make_results(tmp_path / "results" / "mine", widths=(8, 64))
    text = run(tmp_path)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "results.md",
        "delta_m.png",
        "mine.json",
    }
    summary = json.loads((tmp_path / "out" / "mine.json").read_text())
    assert report.markdown([summary]) == text
    assert "## mine, width 8\n" in text
    assert "## mine, width 64\n" in text
    assert summary["runs"][1]["cosines"] == {"between_tasks": [0.0] * 3, "same_task": [1.0] * 3}


def test_other_results_are_passed_over(tmp_path):
    make_results(tmp_path / "results" / "mine")
    make_results(tmp_path / "results" / "without_reference", methods=("sum", "pcgrad"))
    (tmp_path / "results" / "cost").mkdir()
    (tmp_path / "results" / "cost" / "results.json").write_bytes(as_json(report.Config()))
    run(tmp_path)
    assert [path.name for path in (tmp_path / "out").glob("*.json")] == ["mine.json"]


def of_another_format(path):
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 0}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: path.unlink(), "no results with single-task networks"),
        (lambda path: path.write_text("{"), "is no results file"),
        (of_another_format, "is of format 0, and 1 is expected"),
    ],
)
def test_bad_results_are_refused_in_one_line(change, message, tmp_path, capsys):
    make_results(tmp_path / "results" / "mine")
    change(tmp_path / "results" / "mine" / "results.json")
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path)
    printed = capsys.readouterr().err
    assert stopped.value.code == 2
    assert printed.count("\n") == 1
    assert message in printed
    assert not (tmp_path / "out").exists()


def test_an_earlier_report_is_replaced_only_when_asked(tmp_path):
    make_results(tmp_path / "results" / "mine")
    run(tmp_path)
    with pytest.raises(SystemExit):
        run(tmp_path)
    run(tmp_path, "--overwrite")


def test_success_of_agents_is_a_table_for_each_setting(tmp_path):
    rng = np.random.default_rng(0)
    shared = rng.normal(0, 0.05, 5)
    points = {"mean": 0.5 + shared, "pcgrad": 0.7 + shared + rng.normal(0, 1e-3, 5)}
    by_seed = [
        {"setting": setting, "figure": figure, "methods": points}
        for setting in ("near", "far")
        for figure in ("area", "final")
    ]
    folder = tmp_path / "results" / "arm"
    folder.mkdir(parents=True)
    (folder / "results.json").write_bytes(as_json(report.Config(), by_seed=by_seed))
    text = run(tmp_path)
    assert "## arm: near\n" in text
    assert "## arm: far\n" in text
    row = next(line for line in text.splitlines() if line.startswith("| `pcgrad`"))
    cells = [cell.strip() for cell in row.split("|")[2:-1]]
    assert cells[1] == cells[3] == "+0.20"
    assert cells[0].startswith(f"{points['pcgrad'].mean():.3f} ± ")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"results.md", "arm.json"}
