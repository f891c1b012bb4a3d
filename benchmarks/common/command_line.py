"""What the command lines of the benchmarks share: options, checks and files.

A benchmark's options are the fields of a frozen dataclass, each `Annotated` with its help and what
it may be: one of some names, or a least number.
"""

import argparse
import contextlib
import dataclasses
import importlib.metadata
import json
import os
import platform
import shlex
import sys
import tempfile
import typing
from pathlib import Path
from typing import NoReturn

import jax
import numpy as np

# Of what a results file holds and means. A file of another one is refused.
FORMAT = 1
# Where the benchmarks keep prepared data between runs.
DATA_DIR = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "optax_surgery"
PACKAGES = ("optax_surgery", "jax", "jaxlib", "optax", "flax", "numpy", "tensorflow_datasets")


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


GOES_ON = "finished runs are kept, and the same command goes on"


def run_main(main, interrupted="no results are written"):
    """Calls a benchmark's `main`, as its command does. To be interrupted is told in a line."""
    try:
        main()
    except KeyboardInterrupt:
        print(f"Interrupted: {interrupted}.", file=sys.stderr)
        sys.exit(130)


def parse(parser, config_class, argv):
    """The options on the command line. What is wrong with them is one line, and status 2."""
    defaults = vars(config_class())
    hints = typing.get_type_hints(config_class, include_extras=True)
    described = {name: hints[name].__metadata__ for name in defaults}
    for name, default in defaults.items():
        text, limit = described[name]
        several = isinstance(default, tuple)
        shown = " ".join(map(str, default)) if several else default
        options = {"default": default, "help": f"{text} (default: {shown})"}
        if isinstance(default, bool):
            options["action"] = "store_true"
        else:
            options["type"] = type(default[0] if several else default)
            options["nargs"] = "+" if several else None
            options["choices"] = limit if isinstance(limit, tuple) else None
        parser.add_argument(as_option(name), **options)
    config = config_class(**vars(parser.parse_args(argv)))
    for name, (_, limit) in described.items():
        for value in np.ravel(getattr(config, name)):
            if isinstance(limit, int | float) and not limit <= value < np.inf:
                parser.error(f"argument {as_option(name)}: expected at least {limit}, got {value}")
    several = [name for name, default in defaults.items() if isinstance(default, tuple)]
    once = {name: tuple(dict.fromkeys(getattr(config, name))) for name in several}
    return dataclasses.replace(config, **once)


def as_option(name):
    return f"--{name.replace('_', '-')}"


def check_output(parser, files, overwrite, alone=True):
    """Finds out before the work, not after it, whether the results can be written.

    `alone` is whether no other process may write to the folder meanwhile.
    """
    for path in files:
        if path.exists() and not overwrite:
            parser.error(f"{path} is already there: give another --out, or --overwrite")
    folder = files[0].parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
        if alone:
            hold(folder)
    except BlockingIOError:
        parser.error(f"--out {folder} is in use by another run: give another --out, or wait")
    except OSError as error:
        parser.error(f"cannot write to --out {folder}: {error.strerror}")


HELD: dict[Path, int] = {}  # open folders, for as long as this process lives


def hold(folder):
    """Claims a folder for this process. A lock goes with its process, however that ends.

    Some network file systems have none for folders: there two runs do not notice each other.
    """
    with contextlib.suppress(ImportError):  # there is none on Windows
        import fcntl

        with contextlib.suppress(KeyError):
            os.close(HELD.pop(folder.resolve()))
        opened = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(opened)
            raise
        except OSError:
            os.close(opened)
        else:
            HELD[folder.resolve()] = opened


def write(contents):
    """Writes the files beside their places and renames them: none is ever half there."""
    parent = next(iter(contents)).parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=parent, prefix=".") as folder:
            for path, content in contents.items():
                Path(folder, path.name).write_bytes(content)
            for path in contents:
                os.replace(Path(folder, path.name), path)
    except OSError as error:
        print(f"Cannot write to {parent}: {error.strerror}.", file=sys.stderr)
        sys.exit(2)


def command_of(config):
    """What to type for these options, whatever was typed."""
    module, defaults = sys.modules[type(config).__module__], type(config)()
    # The name of a module that is run as a command is `__main__`.
    words = ["python", "-m", module.__spec__.name if module.__spec__ else module.__name__]
    for name, default in vars(defaults).items():
        value = getattr(config, name)
        if value != default:
            values = value if isinstance(value, tuple) else [] if value is True else [value]
            words += [as_option(name), *map(str, values)]
    return shlex.join(words)


def as_json(config, **results):
    """The results with what they were made with, as bytes."""
    described = {
        "format": FORMAT,
        "command": command_of(config),
        "config": dataclasses.asdict(config),
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in PACKAGES},
        },
        "device": {"kind": jax.devices()[0].device_kind, "cpus": os.cpu_count()},
        **results,
    }
    text = json.dumps(described, default=lambda x: str(x) if isinstance(x, Path) else x.tolist())
    # A diverged run holds NaN, for which JSON has no word.
    return json.dumps(json.loads(text, parse_constant=lambda _: None), indent=1).encode()
