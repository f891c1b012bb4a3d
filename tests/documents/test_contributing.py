"""What a method consists of, and that something says which part of it is missing."""

import doctest
import re
import shutil
from pathlib import Path

import pytest

import optax_surgery as surgery
from tests import cases
from tests.papers import coordinates, gramian, losses

ROOT = Path(__file__).parents[2]
METHODS = [
    name
    for name, value in vars(surgery).items()
    if getattr(value, "__module__", "").startswith("optax_surgery.methods.")
]
# Of a random update there is no oracle; those of their draws and laws are in their own tests.
RANDOM = {"pcgrad", "gradvac", "random_weighting", "graddrop"}


def missing_parts(root, file):
    """What the methods of a file lack in a checkout, each as a sentence to act upon."""
    read = lambda path: (root / path).read_text()  # noqa: E731
    pattern = rf"^from optax_surgery\.methods\.{file} import (.*)$"
    imports = re.findall(pattern, read("optax_surgery/__init__.py"), re.MULTILINE)
    if not imports:
        return [f"{file}: an import in optax_surgery/__init__.py"]
    missing = []
    for name in re.findall(r"(?:^|, )(\w+)", ", ".join(imports)):
        row = re.search(
            rf'^    "{name}": Case\((.*?)\n    \),$', read("tests/cases.py"), re.M | re.S
        )
        if name != "sum" and f'    "{name}",\n' not in read("optax_surgery/__init__.py"):
            missing.append(f"{name}: its name in __all__ of optax_surgery/__init__.py")
        if row is None:
            missing.append(f"{name}: a row in tests/cases.py")
        elif "rule=None" in row.group(1) and name not in RANDOM:
            missing.append(f"{name}: an oracle in tests/papers/, as the `rule` of its row")
        if not re.search(rf"^\| `{name}`", read("docs/methods/index.md"), re.MULTILINE):
            missing.append(f"{name}: a row in the table of docs/methods/index.md")
    return missing


FILES = sorted(path.stem for path in (ROOT / "optax_surgery/methods").glob("[a-z]*.py"))


@pytest.mark.parametrize("file", FILES)
def test_every_method_has_all_its_parts(file):
    assert missing_parts(ROOT, file) == []


def test_every_public_method_has_a_row_and_every_row_is_walked():
    assert set(METHODS) <= set(cases.CASES)
    assert set(METHODS) == set(cases.METHODS)
    assert {name for name in METHODS if cases.CASES[name].rule is None} == RANDOM


def test_oracles_use_no_code_of_the_library():
    for module in (coordinates, gramian, losses):
        assert "optax_surgery" not in Path(module.__file__).read_text()


def test_the_skeleton_of_a_method_is_told_at_each_step_what_it_lacks(tmp_path):
    for file in ("optax_surgery/__init__.py", "tests/cases.py", "docs/methods/index.md"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, tmp_path / file)

    init, imtl_g = "optax_surgery/__init__.py", "from optax_surgery.methods.imtl_g"
    row = '    "half": Case(\n        rule=None,\n    ),\n    "imtl_g": Case('
    steps = [
        ("an import in", init, imtl_g, f"from optax_surgery.methods.half import half\n{imtl_g}"),
        ("its name in __all__ of", init, '    "imtl",\n', '    "half",\n    "imtl",\n'),
        ("a row in tests/cases.py", "tests/cases.py", '    "imtl_g": Case(', row),
        ("an oracle in tests/papers/", "tests/cases.py", 'rule=None,\n    ),\n    "imtl_g', None),
        (
            "a row in the table",
            "docs/methods/index.md",
            "| `imtl_g` |",
            "| `half` | |\n| `imtl_g` |",
        ),
    ]
    for lack, path, old, new in steps:
        assert any(lack in sentence for sentence in missing_parts(tmp_path, "half")), lack
        whole = (tmp_path / path).read_text()
        assert old in whole
        new = old.replace("None", "papers.half") if new is None else new
        (tmp_path / path).write_text(whole.replace(old, new, 1))
    assert missing_parts(tmp_path, "half") == []


def test_the_skeleton_is_a_method(monkeypatch):
    text = re.search(r'```python\n(""".*?)```', (ROOT / "CONTRIBUTING.md").read_text(), re.S)
    namespace = {"__name__": "half"}
    exec(compile(text.group(1), "half.py", "exec"), namespace)
    monkeypatch.setattr(surgery, "half", namespace["half"], raising=False)
    runner = doctest.DocTestRunner()
    for test in doctest.DocTestFinder().find(namespace["half"], "half", module=False, globs={}):
        runner.run(test)
    assert runner.summarize(verbose=False)[:2] == (0, 5)
    with pytest.raises(ValueError, match=r"in \(0, 1\], got 0 at 'factor'"):
        namespace["half"](factor=0)
