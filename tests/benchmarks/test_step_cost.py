"""The benchmark of step costs runs, says what it measured and refuses what it cannot do."""

import json

import pytest

from benchmarks.systems import step_cost

SMALL = ["--networks", "transformer", "unequal", "samples", "--tasks", "2", "--samples", "3"]
SMALL += ["--rounds", "1"]
WAYS = {
    "transformer": {"plain", "stacked", "chunked", "exact", "reused", "features"},
    "unequal": {"plain", "stacked", "exact", "reused"},
    "samples": {"plain", "stacked", "exact", "reused"},
}


def test_a_small_run_writes_what_it_measured(tmp_path, capsys):
    step_cost.main([*SMALL, "--out", str(tmp_path / "results")])
    results = json.loads((tmp_path / "results" / "results.json").read_text())
    assert [row["network"] for row in results["results"]] == list(WAYS)
    for row in results["results"]:
        assert WAYS[row["network"]] <= set(row["ways"])
        for way in WAYS[row["network"]]:
            assert row["ways"][way]["bytes"] > 0
            assert len(row["ways"][way]["seconds"]) == 1
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
