"""Studies and measurements: each module is a command, `python -m benchmarks.NAME`.

Python runs this file before the module that is named. So a mistyped option, which is read off that
module's `Config` without importing it, is told at once, and not after JAX has been imported.
"""

import ast
import difflib
import sys
from pathlib import Path


def _options(source: str) -> list[str]:
    """The options of a module's `Config`; none where it has no such class of its own."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef) and node.name == "Config" and not node.bases:
            fields = [each.target for each in node.body if isinstance(each, ast.AnnAssign)]
            names = [field.id for field in fields if isinstance(field, ast.Name)]
            return ["--help", *(f"--{name.replace('_', '-')}" for name in names)]
    return []


def _check(module: str, words: list[str]) -> None:
    path = Path(__file__).parent.joinpath(*module.split(".")[1:]).with_suffix(".py")
    known = _options(path.read_text()) if path.exists() else []
    for word in words if known else ():
        given = word.split("=")[0]
        # As argparse has it, the beginning of an option will do.
        if word.startswith("--") and not any(option.startswith(given) for option in known):
            nearest = difflib.get_close_matches(given, known, 1)
            remedy = f"did you mean {nearest[0]}?" if nearest else "--help lists them"
            print(f"python -m {module}: error: unknown option {given}: {remedy}", file=sys.stderr)
            sys.exit(2)


if "-m" in sys.orig_argv:
    _named, *_words = sys.orig_argv[sys.orig_argv.index("-m") + 1 :]
    if _named.startswith("benchmarks."):
        _check(_named, _words)
