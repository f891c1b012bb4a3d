"""Sweeps that can be killed: each finished run is a file, and the next call goes on from there."""

import json
from pathlib import Path

import numpy as np

from benchmarks.common.command_line import Parser, as_json, write

# What chooses runs, or says where things are. All other options shape the runs themselves.
NOT_OF_A_RUN = frozenset(
    {"methods", "widths", "data_dir", "data_file", "download", "out", "overwrite"}
)


def stamp(config):
    """What has to be the same for a file to belong to this sweep."""
    described = json.loads(as_json(config))
    options = {n: each for n, each in described["config"].items() if n not in NOT_OF_A_RUN}
    return {"format": described["format"], "options": options, "versions": described["versions"]}


def finished_runs(parser: Parser, config, files):
    """Reads what earlier calls have finished. A file that does not belong here is an error.

    Args:
      parser: the `Parser`, for its error: one line, and status 2.
      config: the options.
      files: {run: path of its file}.

    Returns:
      {run: its results} of those runs whose files are there; none with `config.overwrite`.
    """
    if config.overwrite:
        return {}
    expected, found = stamp(config), {}
    for run, path in files.items():
        if path.exists():
            content = read(parser, path)
            for part, value in expected.items():
                if content.get(part) != value:
                    what = difference(content, part, value)
                    parser.error(
                        f"{path} is there and has another {part}: {what}: give another --out, or "
                        "--overwrite"
                    )
            found[run] = content["results"]
    return found


def read(parser: Parser, path, needed=("format", "results")):
    """A results file with what is needed of it, or an error that names it."""
    try:
        content = json.loads(Path(path).read_text())
        missing = [name for name in needed if name not in content]
        if missing or not isinstance(content, dict):
            raise ValueError(f"it has no {missing[0] if missing else 'parts'}")
    except (OSError, ValueError, TypeError) as error:
        parser.error(f"{path} is no results file: {' '.join(str(error).split())}: remove it")
    return content


def difference(content, part, expected):
    """The first thing in which the part of a file is not what was expected."""
    found = content.get(part)
    if not isinstance(found, dict) or not isinstance(expected, dict):
        return f"expected {expected}, got {found}"
    name = next(n for n in {**expected, **found} if expected.get(n) != found.get(n))
    return f"expected {name} {expected.get(name)}, got {found.get(name)}"


def save_run(config, path, results):
    """Writes the file of a finished run, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write({path: as_json(config, **stamp(config), results=results)})


def best(scores):
    """The index of the best setting.

    Args:
      scores: (..., seeds) validation scores, higher for better. NaN, of a run that diverged, is
        the worst.

    Returns:
      The index of the best mean over seeds, a tuple with one number for each leading axis.
    """
    means = np.nan_to_num(np.mean(scores, axis=-1), nan=-np.inf)
    return tuple(int(n) for n in np.unravel_index(np.argmax(means), means.shape))


def at_the_edge(grid, chosen):
    """Whether one of the chosen numbers is the least or the largest of several to choose from."""
    ends = np.array([min(grid), max(grid)], np.float32)
    return len(grid) > 1 and bool(np.isin(np.array(chosen, np.float32), ends).any())
