"""The benchmark of step costs runs, says what it measured and refuses what it cannot do."""

import json

import pytest

from benchmarks import step_cost

SMALL = ["--networks", "transformer", "--tasks", "2", "--rounds", "1"]


def test_a_small_run_writes_what_it_measured(tmp_path, capsys):
    step_cost.main([*SMALL, "--out", str(tmp_path / "results")])
    results = json.loads((tmp_path / "results" / "results.json").read_text())
    (row,) = results["results"]
    assert set(row["ways"]) == set(step_cost.COLOURS)
    for found in row["ways"].values():
        assert found["bytes"] > 0
        assert len(found["seconds"]) == 1
    assert (tmp_path / "results" / "cost.png").stat().st_size > 10_000
    assert "transformer" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--networks", "rnn"], "invalid choice: 'rnn'"),
        (["--tasks", "0"], "expected at least 1, got 0"),
        (["--rounds", "many"], "invalid int value: 'many'"),
    ],
)
def test_bad_options_are_one_line_and_status_2(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        step_cost.main([*arguments, "--out", str(tmp_path / "results")])
    assert error.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line
    assert not (tmp_path / "results").exists()
