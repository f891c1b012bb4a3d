"""What the studies share: tuning and seeds, runs that are kept, and the files they write."""

import dataclasses
import errno
import json
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Annotated

import numpy as np
import pytest

from benchmarks.common import command_line, study
from benchmarks.common.command_line import Parser

# --- Tuning

OPTIONS = types.SimpleNamespace(learning_rates=(0.1, 0.3, 1.0), weightings=4, seeds=6)


def test_every_network_takes_the_rate_that_validates_best():
    ideal = np.array([0.1, 1.0, 0.3])  # of the networks of a seed

    def score(runs):
        return -np.abs(np.log(runs.learning_rates / ideal[runs.tasks[:, 0]]))

    choice = study.tune("single", 3, OPTIONS, score)
    np.testing.assert_allclose(choice.learning_rates, ideal)
    np.testing.assert_array_equal(choice.loss_weights, np.ones((3, 3)))
    assert choice.scores.shape == (1, 3, 3, 2)
    runs = study.every_seed("single", 3, choice, OPTIONS)
    np.testing.assert_array_equal(runs.seeds, np.arange(6).repeat(3))
    np.testing.assert_array_equal(study.by_seed(runs.tasks, OPTIONS)[:, :, 0], [[0, 1, 2]] * 6)
    np.testing.assert_allclose(study.by_seed(runs.learning_rates, OPTIONS), [ideal] * 6)


def test_only_linear_chooses_weights_and_it_takes_the_best():
    def score(runs):
        return runs.loss_weights[:, 0]

    choice = study.tune("linear", 2, OPTIONS, score)
    assert choice.scores.shape == (4, 3, 1, 2)
    assert choice.loss_weights[0, 0] == choice.scores.max()
    np.testing.assert_array_equal(study.tune("sum", 2, OPTIONS, score).loss_weights, [[1, 1]])


def test_a_rate_that_diverged_in_one_seed_is_not_chosen():
    def score(runs):
        return np.where(
            (runs.learning_rates > 0.5) & (runs.seeds == 1), np.nan, runs.learning_rates
        )

    np.testing.assert_allclose(study.tune("sum", 2, OPTIONS, score).learning_rates, 0.3)


def test_where_there_is_no_choice_nothing_is_trained():
    one = types.SimpleNamespace(learning_rates=(0.1,), weightings=1, seeds=2)
    choice = study.tune("linear", 2, one, lambda runs: pytest.fail("trained"))
    assert choice.scores is None
    np.testing.assert_allclose(choice.learning_rates, 0.1)


def test_the_best_setting_has_the_best_mean_and_has_not_diverged():
    scores = [[[1.0, 2.0], [9.0, np.nan]], [[4.0, 4.0], [8.0, -9.0]]]
    assert study.best(scores) == (1, 0)


# --- Runs that are kept


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
    study.save_run(config, files["sum"], {"score": np.array([1.0, np.nan])})
    return config, files


def test_a_sweep_goes_on_where_it_was(finished):
    config, files = finished
    assert study.finished_runs(Parser(), config, files) == {"sum": {"score": [1.0, None]}}
    chosen = dataclasses.replace(config, methods=("sum", "pcgrad"))
    assert list(study.finished_runs(Parser(), chosen, files)) == ["sum"]
    assert study.finished_runs(Parser(), dataclasses.replace(config, overwrite=True), files) == {}


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
        study.finished_runs(Parser(), dataclasses.replace(config, steps=steps), files)
    printed = capsys.readouterr().err
    assert stopped.value.code == 2
    assert printed.count("\n") == 1
    assert message in printed
    assert str(files["sum"]) in printed
    assert files["sum"].read_bytes() == before
    assert list(files["sum"].parent.iterdir()) == [files["sum"]]


def test_a_study_trains_what_is_left_and_tells_it_as_its_file_does(finished):
    config, files = finished
    trained = []

    def train(run, data, results, advance):
        trained.append((run, data, list(results)))
        return {"score": np.array([np.nan, 2.0])}

    found = study.train_all(Parser(), config, files, lambda: "data", train)
    assert trained == [("pcgrad", "data", ["sum"])]
    assert found["pcgrad"].pop("cpu_seconds") >= 0
    assert found == {"sum": {"score": [1.0, None]}, "pcgrad": {"score": [None, 2.0]}}
    nothing = pytest.fail
    again = study.train_all(Parser(), config, files, nothing, nothing)
    assert again["pcgrad"]["score"] == [None, 2.0]


# --- The files


def test_a_file_is_replaced_and_nothing_else_is_left(tmp_path):
    path = tmp_path / "below" / "results.json"
    for content in (b"old", b"new"):
        command_line.write({path: content})
        assert path.read_bytes() == content
    assert list(path.parent.iterdir()) == [path]


def test_a_full_disk_is_one_line_and_leaves_what_was_there(tmp_path, monkeypatch, capsys):
    path = tmp_path / "results.json"
    path.write_text("old")

    def full(self, content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(SystemExit) as stopped:
        command_line.write({path: b"new"})
    printed = capsys.readouterr().err
    assert (stopped.value.code, printed.count("\n")) == (2, 1)
    assert f"Cannot write to {tmp_path}: No space left on device" in printed
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


HOLD = """
import sys
from pathlib import Path
from benchmarks.common import command_line
command_line.check_output(command_line.Parser(), [Path(sys.argv[1], "results.json")], False)
print("held", flush=True)
sys.stdin.read()
"""


def test_two_runs_do_not_share_a_folder(tmp_path, capsys):
    files = [tmp_path / "results.json"]
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, **pipes) as other:
        assert other.stdout
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(SystemExit) as stopped:
            command_line.check_output(Parser(), files, overwrite=False)
        other.kill()  # a lock does not outlive its process
    printed = capsys.readouterr().err
    assert (stopped.value.code, printed.count("\n")) == (2, 1)
    assert f"--out {tmp_path} is in use by another run" in printed
    for _ in range(2):  # one process may come back to its folder
        command_line.check_output(Parser(), files, overwrite=False)


def test_a_file_system_without_locks_is_written_to(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl", reason="there are no such locks on Windows")

    def no_lock(*_):
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))  # as NFS of an open folder

    monkeypatch.setattr(fcntl, "flock", no_lock)
    command_line.check_output(Parser(), [tmp_path / "below" / "results.json"], overwrite=False)
    assert (tmp_path / "below").is_dir()


# --- Options


@pytest.mark.parametrize(
    ("command", "remedy"),
    [
        ("multi_mnist --sed 3", "unknown option --sed: did you mean --seeds?"),
        ("images.celeb_a --epoch=2 --zzz", "unknown option --zzz: --help lists them"),
        ("systems.speed --size 10 --taks 2", "unknown option --taks: did you mean --tasks?"),
    ],
)
def test_a_mistyped_option_is_told_before_jax_is_imported(command, remedy):
    module, *words = command.split()
    command = [sys.executable, "-X", "importtime", "-m", f"benchmarks.{module}", *words]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [line for line in ended.stderr.splitlines() if not line.startswith("import time:")]
    assert ended.returncode == 2
    assert lines == [f"python -m benchmarks.{module}: error: {remedy}"]
    assert "jax" not in ended.stderr
