"""One file writes all refusals."""

import pathlib

import optax_surgery

LIBRARY = pathlib.Path(optax_surgery.__file__).parent


def test_nothing_but_checks_raises_a_value_error():
    sources = {path.relative_to(LIBRARY): path.read_text() for path in LIBRARY.rglob("*.py")}
    assert len(sources) > 40
    raising = [str(path) for path, text in sources.items() if "raise ValueError" in text]
    assert raising == ["checks.py"]


def test_checks_raises_in_one_place():
    assert (LIBRARY / "checks.py").read_text().count("raise ValueError") == 1
