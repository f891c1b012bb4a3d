"""The Python of README and docs runs as it stands, each page from top to bottom."""

import functools
import inspect
import re
from pathlib import Path

import jax
import numpy as np
import pytest

import optax_surgery as surgery
from tests.cases import METHODS
from tests.documents import page_code
from tests.documents.page_code import ROOT, blocks

README = (ROOT / "README.md").read_text()
TABLE = (ROOT / "docs/methods/index.md").read_text()


PAGES = {str(page.relative_to(ROOT)): page for page in page_code.PAGES if blocks(page)}


@pytest.mark.parametrize("page", PAGES)
def test_every_python_block_runs(page):
    namespace = {}
    for block in blocks(PAGES[page]):
        exec(compile(block, page, "exec"), namespace)
    found = [
        namespace[name] for name in ("updates", "grads", "losses", "front") if name in namespace
    ]
    for leaf in jax.tree.leaves(found):
        assert np.isfinite(np.asarray(leaf)).all()


def test_the_readme_prints_what_it_says(capsys):
    exec(blocks(PAGES["README.md"])[0], {})
    said = re.search(r"```\n(\[.*?)```", README, re.DOTALL).group(1)
    said, printed = (
        [re.findall(r"[\d.]+", line)[:2] for line in text.splitlines()]
        for text in (said, capsys.readouterr().out)
    )
    np.testing.assert_allclose(
        np.array(printed, float), np.array(said, float), rtol=0.1, atol=0.005
    )


def test_links_to_files_lead_somewhere():
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for link in re.findall(r"\]\(([^)#:]+)[^):]*\)", page.read_text()):
            target = page.parent / link
            if "notebooks/" in link:  # copied into the docs when they are built
                target = ROOT / "notebooks" / Path(link).name
            assert target.exists(), f"{page}: {link}"


def test_the_table_of_methods_names_every_method():
    listed = set(re.findall(r"^\| `(\w+)`", TABLE.split("<!-- methods -->")[1], re.MULTILINE))
    methods = {name for name in dir(surgery) if is_method(getattr(surgery, name))}
    assert methods <= listed


def test_the_pages_say_which_methods_need_arguments():
    calls = re.search(r"<!-- calls -->\n(.*?)\n\n", TABLE, re.DOTALL).group(1)
    methods = {name: getattr(surgery, name) for name in dir(surgery)}
    needed = {
        f"{name}({', '.join(found)})"
        for name, method in methods.items()
        if is_method(method) and (found := without_default(method))
    }
    assert set(re.findall(r"`(.*?)`", calls)) == needed


def without_default(method):
    parameters = inspect.signature(method).parameters.values()
    return [each.name for each in parameters if each.default is each.empty]


@pytest.mark.parametrize(("name", "case"), METHODS.items(), ids=METHODS)
def test_the_table_says_which_losses_a_method_can_use(name, case):
    row = re.search(rf"^\| `{name}`.*$", TABLE, re.MULTILINE).group()
    losses = row.split("|")[4].strip()
    task_grads = np.eye(4, 6, dtype="f4")  # as in the tests of numbers, whose program it is
    _, state = case.step(task_grads, losses=np.array([-1.0, 0.5, 2.0, 3.0], "f4"))
    without = functools.partial(case.step, losses=None)
    needs = "argument `losses`" in refusal(lambda: jax.eval_shape(without, task_grads))
    assert state.unusable_losses == (losses == "> 0")
    assert needs == (losses in ("> 0", "any") or losses.startswith("any;"))


def refusal(step):
    try:
        step()
    except ValueError as error:
        return str(error)
    return ""


def is_method(value):
    return getattr(value, "__module__", "").startswith("optax_surgery.methods.")
