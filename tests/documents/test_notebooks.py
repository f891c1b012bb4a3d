"""Every notebook runs from top to bottom, says nothing on stderr, and is light to read."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))
# The packages of those that need more than the tests do.
PACKAGES = {"reinforcement_learning": "gymnax"}
each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)

# What runs one notebook, in a process of its own: IPython's shell, with matplotlib's pictures where
# a notebook shows them, but without a kernel to talk with, which now and then waits for ever.
PROGRAM = """
import json, sys, traceback
from IPython.core.displayhook import DisplayHook
from IPython.core.displaypub import CapturingDisplayPublisher
from IPython.core.interactiveshell import InteractiveShell
from traitlets import Type
from traitlets.config import Config

values = []

class CapturingHook(DisplayHook):
    def write_format_data(self, format_dict, md_dict=None):
        values.append(format_dict)

class Shell(InteractiveShell):
    display_pub_class = Type(CapturingDisplayPublisher)
    displayhook_class = Type(CapturingHook)

    def showtraceback(self, exc_tuple=None, *args, **kwargs):
        # Of a cell, and of what `interact` calls, which would go on.
        traceback.print_exception(*(exc_tuple or sys.exc_info()))
        sys.stderr.flush()
        raise SystemExit(1)

    def enable_gui(self, gui=None):
        pass

    def showsyntaxerror(self, *args, **kwargs):
        self.showtraceback()

config = Config()
config.HistoryManager.enabled = False
shell = Shell.instance(config=config)
shell.enable_matplotlib("inline")
with open(sys.argv[1], encoding="utf-8") as file:
    cells = json.load(file)["cells"]
for cell in cells:
    if cell["cell_type"] == "code":
        shell.run_cell("".join(cell["source"]), store_history=True).raise_error()
shown = values + [output["data"] for output in shell.display_pub.outputs]
with open(sys.argv[2], "w") as file:
    json.dump([sorted(data) for data in shown], file)
"""


def execute(path, out):
    """The kinds of what the cells show, one list of MIME types each; runs in the folder."""
    arguments = [sys.executable, "-c", PROGRAM, path, out / "shown.json"]
    environment = {**os.environ, "IPYTHONDIR": str(out)}
    result = subprocess.run(
        list(map(str, arguments)),
        cwd=path.parent,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert not result.stderr
    assert result.returncode == 0, result.stdout[-3000:]
    return json.loads((out / "shown.json").read_text())


def kept(path):
    """A notebook as it is kept, and what its cells showed."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    return notebook, [output for cell in notebook["cells"] for output in cell.get("outputs", [])]


def test_there_are_notebooks():
    names = {path.stem for path in NOTEBOOKS}
    assert {"quickstart", "landscapes", "choosing_a_method", *PACKAGES} <= names


@each
def test_a_notebook_runs_without_a_warning_and_draws(path, tmp_path):
    """As many pictures as it is kept with."""
    if package := PACKAGES.get(path.stem):
        pytest.importorskip(package, reason=f"{path.stem} needs a package of the extra `rl`")
    shown = execute(path, tmp_path)
    pictures = ["image/png" in output.get("data", {}) for output in kept(path)[1]]
    assert sum("image/png" in kinds for kinds in shown) >= sum(pictures) > 0


@each
def test_a_notebook_is_kept_with_its_pictures_and_small(path):
    assert path.stat().st_size < 300_000
    notebook, outputs = kept(path)
    assert any("image/png" in output.get("data", {}) for output in outputs)
    texts = ["".join(output.get("text", "")) for output in outputs]
    assert not [text for text in texts if "/home" in text or "/root" in text or "site-pack" in text]
    assert "widgets" not in notebook["metadata"]


@each
def test_links_of_a_notebook_lead_somewhere(path):
    """Those to other files; the documentation's build makes them links of its own."""
    cells = kept(path)[0]["cells"]
    texts = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"]
    for link in re.findall(r"\]\(([^)#:]+)[^):]*\)", "".join(texts)):
        assert (path.parent / link).exists(), link
