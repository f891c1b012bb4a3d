"""The README's Python runs as it stands, from top to bottom."""

import functools
import re
from pathlib import Path

import jax
import numpy as np
import pytest

import optax_surgery as surgery
from tests.cases import METHODS

README = (Path(__file__).parents[2] / "README.md").read_text()


def test_every_python_block_runs():
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 5
    namespace = {}
    for block in blocks:
        exec(block, namespace)
    for leaf in jax.tree.leaves(namespace["updates"]):
        assert np.isfinite(np.asarray(leaf)).all()


def test_the_first_block_is_the_example_of_at_most_15_lines():
    first = re.search(r"```python\n(.*?)```", README, re.DOTALL).group(1)
    assert len([line for line in first.splitlines() if line.strip()]) <= 15


def test_the_table_of_methods_names_every_method():
    listed = set(re.findall(r"^\| `(\w+)`", README.split("<!-- methods -->")[1], re.MULTILINE))
    methods = {name for name in dir(surgery) if is_method(getattr(surgery, name))}
    assert methods <= listed


@pytest.mark.parametrize(("name", "case"), METHODS.items(), ids=METHODS)
def test_the_table_says_which_losses_a_method_can_use(name, case):
    row = re.search(rf"^\| `{name}`.*$", README, re.MULTILINE).group()
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


def test_pictures_exist():
    for path in re.findall(r"!\[.*?\]\((.*?)\)", README):
        assert (Path(__file__).parents[2] / path).is_file()
