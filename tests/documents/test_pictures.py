"""The pictures of the methods: every method has one, and they show what they say."""

import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest

DOCS = Path(__file__).parents[2] / "docs"


def load():
    spec = importlib.util.spec_from_file_location("method_pictures", DOCS / "method_pictures.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


pictures = load()


def test_every_method_is_told_what_it_asks_for():
    for name in pictures.methods():
        pictures.make(name)


def test_what_a_method_lacks_is_said(monkeypatch):
    monkeypatch.delitem(pictures.ARGUMENTS, "krum")
    with pytest.raises(ValueError, match=r"none of 'krum'.* ARGUMENTS .* says num_byzantine\."):
        pictures.make("krum")


def test_every_method_is_on_one_page_where_its_picture_goes():
    pages = "".join(page.read_text() for page in sorted((DOCS / "methods").glob("*.md")))
    shown = re.findall(r"^\.\. autofunction:: (\w+)$", pages, re.MULTILINE)
    assert sorted(shown) == sorted(pictures.methods())


def test_the_tables_name_methods_only():
    named = pictures.ARGUMENTS.keys() | pictures.OF_THREE_TASKS | pictures.OF_TWO_BATCHES
    assert named <= pictures.methods().keys()


def test_a_method_is_drawn_as_it_ends_the_training():
    """By what can be said of four methods by hand."""
    first, second, _ = pictures.TASK_GRADS
    shown = pictures.look("sum")
    np.testing.assert_allclose(shown.updates, np.tile(first + second, (24, 1)), rtol=1e-6)
    assert shown.notes() == ""

    shown = pictures.look("scale_invariant")  # the losses are 2 and 1/2
    np.testing.assert_allclose(shown.updates[0], first / 2 + 2 * second, rtol=1e-5)
    assert shown.notes() == "looks at losses"

    shown = pictures.look("random_weighting")
    assert shown.notes() == "random, 24 draws"
    assert len(np.unique(shown.updates, axis=0)) == 24

    # In a first step the average of a norm is the norm; later it is above that of a gradient that
    # becomes shorter, and so is the weight of the gradient below one.
    shown = pictures.look("inverse_norms")
    assert shown.notes() == "thin: in a first step"
    weights = [np.linalg.solve(np.stack([first, second], axis=1), each[0]) for each in shown[2:4]]
    assert weights[0][0] < weights[1][0]


def test_what_is_too_long_for_the_picture_is_halved_until_it_fits():
    zero = np.zeros((1, 2))
    shown = pictures.Shown("", pictures.TASK_GRADS[:2], zero, zero, False)
    lengths = (1.01 * pictures.HIGH, 1 / 2), (5 * pictures.LOW, 1 / 8), (0.9 * pictures.HIGH, 1)
    for update, scale in lengths:
        assert shown._replace(updates=update[None], first=update[None]).scale == scale


@pytest.mark.parametrize("num_tasks", [2, 3])
def test_what_is_shaded_is_where_no_loss_rises(num_tasks):
    task_grads = pictures.TASK_GRADS[:num_tasks]
    corners = pictures.no_task_worse(task_grads)
    assert len(corners) == 3
    points = np.random.default_rng(0).uniform(pictures.LOW, pictures.HIGH, (200, 2))
    inside = np.all(np.linalg.solve(corners[1:].T, points.T) >= 0, axis=0)
    no_worse = np.all(points @ task_grads.T >= 0, axis=1)
    np.testing.assert_array_equal(inside, no_worse)
    assert 20 < inside.sum() < 180


def test_pictures_are_the_same_each_time_and_written_once(tmp_path, monkeypatch):
    methods = {name: pictures.methods()[name] for name in ("constant", "graddrop", "krum")}
    monkeypatch.setattr(pictures, "methods", lambda: methods)
    pictures.write_all(tmp_path)
    files = sorted(tmp_path.iterdir())
    assert [file.stem for file in files[:2]] == ["constant", "constant_dark"]
    before = [(file.read_text(), file.stat().st_mtime_ns) for file in files]
    pictures.write_all(tmp_path)
    assert [(file.read_text(), file.stat().st_mtime_ns) for file in files] == before


def test_on_dark_pages_no_dark_colour_is_left(tmp_path, monkeypatch):
    methods = {"trimmed_mean": pictures.methods()["trimmed_mean"]}
    monkeypatch.setattr(pictures, "methods", lambda: methods)
    pictures.write_all(tmp_path)
    light, dark = (
        (tmp_path / f"trimmed_mean{end}.svg").read_text().lower() for end in ("", "_dark")
    )
    for ink, chalk in pictures.IN_THE_DARK.items():
        assert ink.lower() in light
        assert ink.lower() not in dark
        assert chalk.lower() in dark
