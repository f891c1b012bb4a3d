"""The benchmark of small tasks runs, and says what is known of it."""

import json

import numpy as np
import pytest

from benchmarks import small_tasks

SMALL = [
    "--methods",
    "aligned_mtl",
    "mgda",
    "--tasks",
    "3",
    "--spreads",
    "1",
    "1e6",
    "--draws",
    "2",
]


def test_a_small_run_writes_what_it_measured(tmp_path, capsys):
    out = tmp_path / "results"
    small_tasks.main([*SMALL, "--out", str(out)])
    rows = json.loads((out / "results.json").read_text())["results"]
    assert [row["method"] for row in rows] == ["aligned_mtl", "mgda"]
    for row in rows:
        assert len(row["errors"]["optax_surgery"]) == 2
        assert max(row["errors"]["optax_surgery"]) < 1e-5
    assert (out / "small_tasks.png").stat().st_size > 10_000
    assert "aligned_mtl" in capsys.readouterr().out


def test_a_loss_of_precision_is_seen():
    """The measure of error is one: the update of another method is far away."""
    config = small_tasks.Config(spreads=(1.0, 1e6), draws=2)
    stacks = small_tasks.draw_stacks(config, 3, 1e6)
    expected = small_tasks.exact("aligned_mtl", stacks)
    found = small_tasks.ours("mgda", stacks)
    errors = small_tasks.largest_errors(config, np.tile(found, (2, 1)), np.tile(expected, (2, 1)))
    assert min(errors) > 0.1


def test_a_bad_option_is_one_line_and_status_2(tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        small_tasks.main(["--tasks", "1", "--out", str(tmp_path / "results")])
    assert error.value.code == 2
    assert "expected at least 2, got 1" in capsys.readouterr().err
