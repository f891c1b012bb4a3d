"""What the command lines of the benchmarks share: options, checks and files.

A benchmark's options are the fields of a frozen dataclass, each `Annotated` with its help and what
it may be: one of some names, or a least number.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import os
import platform
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


def check_output(parser, files, overwrite):
    """Finds out before the work, not after it, whether the results can be written."""
    for path in files:
        if path.exists() and not overwrite:
            parser.error(f"{path} is already there: give another --out, or --overwrite")
    try:
        files[0].parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=files[0].parent).close()
    except OSError as error:
        parser.error(f"cannot write to --out {files[0].parent}: {error.strerror}")


def write(contents):
    """Writes the files beside their places and renames them: none is ever half there."""
    with tempfile.TemporaryDirectory(dir=next(iter(contents)).parent, prefix=".") as folder:
        for path, content in contents.items():
            Path(folder, path.name).write_bytes(content)
        for path in contents:
            os.replace(Path(folder, path.name), path)


def as_json(config, **results):
    """The results with what they were made with, as bytes."""
    described = {
        "format": FORMAT,
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
