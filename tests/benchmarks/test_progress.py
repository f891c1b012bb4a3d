"""Progress that shows where there is no terminal, too."""

import pytest

from benchmarks.common import progress


@pytest.fixture
def clock(monkeypatch):
    """Time that stands still, but for what is added to it."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def lines(capsys):
    return capsys.readouterr().err.splitlines()


def test_in_a_pipe_every_new_description_is_a_line_with_an_estimate(clock, capsys):
    with progress.Progress(4) as shown:
        shown.describe("Training, sum")
        clock[0] += 300
        shown.advance()
        shown.describe("Training, pcgrad")
    assert lines(capsys) == [
        "Training, sum: 0 of 4 done",
        "Training, sum: 1 of 4 done, about 15 min left",
        "Training, pcgrad: 1 of 4 done, about 15 min left",
    ]


def test_many_quick_steps_are_few_lines(clock, capsys):
    with progress.Progress(1000, "Measuring") as shown:
        for _ in range(1000):
            clock[0] += 0.1
            shown.advance()
    said = lines(capsys)
    assert len(said) == 4
    assert said[0].startswith("Measuring: 201 of 1000 done, about 80 s left")


def test_a_name_in_brackets_is_no_markup(clock, capsys):
    with progress.Progress(1) as shown:
        shown.describe("(8, 3) [red]")
    assert lines(capsys) == ["(8, 3) [red]: 0 of 1 done"]
