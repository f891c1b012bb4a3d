"""What the studies share: the protocol of tuning and seeds, runs that can be killed, the report.

A study is a script with its question, its data, its network and its pictures. The parts here are
functions that it calls, in this order:

1. `tune` and `every_seed` say which networks to train: every method chooses from the same learning
   rates, by the same validation, and is then trained with every seed.
2. `train_all` trains what earlier calls have not. Each finished run is a file, so that a study
   which is killed goes on from there.
3. `against_baselines`, `edge_of_grid`, `draw_board` and `finish` say what came of it.
"""

import io
import json
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.common import methods
from benchmarks.common.command_line import Parser, as_json, write
from benchmarks.common.progress import Progress

# --- Tuning


class Runs(NamedTuple):
    """What distinguishes the runs of a method: arrays whose leading axis is that of the runs."""

    seeds: np.ndarray
    tasks: np.ndarray  # (runs, T) numbers of the tasks that a network learns
    learning_rates: np.ndarray
    loss_weights: np.ndarray  # (runs, all tasks)


class Choice(NamedTuple):
    """What validated best, for each network of a seed: one network, or with `single` one a task."""

    learning_rates: np.ndarray  # (networks,)
    loss_weights: np.ndarray  # (networks, all tasks)
    scores: np.ndarray | None  # (weightings, rates, networks, seeds); None without a choice


def networks_of(method, num_tasks):
    """The tasks of each network that a seed stands for: one network, or one a task."""
    numbers = np.arange(num_tasks)
    return numbers[:, None] if method == "single" else numbers[None, :]


def tune(method, num_tasks, config, score):
    """The learning rate and the weights of the losses that validate best.

    Args:
      method: its name. Only `linear` has weights to choose from.
      num_tasks: how many tasks there are.
      config: says `learning_rates`, `weightings` (how many of them) and `seeds`.
      score: (runs) -> (runs,) scores of trained networks, higher for better. NaN, of a run that
        diverged, is the worst.

    Returns:
      A `Choice`. About as many networks are trained for each weighting as there are in the end,
      so that a program for so many runs is compiled once.
    """
    networks = networks_of(method, num_tasks)
    rates = np.array(config.learning_rates, np.float32)
    candidates = methods.loss_weights(method, num_tasks, config.weightings)
    if len(rates) * len(candidates) == 1:
        return Choice(rates.repeat(len(networks)), candidates.repeat(len(networks), axis=0), None)
    shape = len(rates), len(networks), max(2, config.seeds // len(rates))
    rate, network, seed = (each.ravel() for each in np.indices(shape))
    several = [
        Runs(seed, networks[network], rates[rate], np.tile(weights, (len(seed), 1)))
        for weights in candidates
    ]
    scores = np.stack([np.reshape(score(runs), shape) for runs in several])
    chosen = [best(scores[:, :, one]) for one in range(len(networks))]
    weighting, rate = (np.array(each) for each in zip(*chosen, strict=True))
    return Choice(rates[rate], candidates[weighting], scores)


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


def every_seed(method, num_tasks, choice, config):
    """The runs of all seeds, with what was chosen for each of a seed's networks."""
    networks, several = networks_of(method, num_tasks), (config.seeds, 1)
    return Runs(
        np.arange(config.seeds).repeat(len(networks)),
        np.tile(networks, several),
        np.tile(choice.learning_rates, config.seeds),
        np.tile(choice.loss_weights, several),
    )


def by_seed(values, config):
    """From a leading axis of runs to two, (seeds, networks of a seed)."""
    values = np.asarray(values)
    return values.reshape(config.seeds, -1, *values.shape[1:])


# --- Runs that are kept

# What chooses runs, or says where things are. All other options shape the runs themselves.
NOT_OF_A_RUN = frozenset(
    {"methods", "widths", "data_dir", "data_file", "download", "out", "overwrite"}
)


def train_all(parser: Parser, config, files, load, train, counts=1):
    """The results of all runs. Those that earlier calls have finished are read from their files.

    Args:
      parser: for its error: one line, and status 2.
      config: the options.
      files: {run: path of its file}, in the order in which runs are trained.
      load: () -> the data. It is called once, and only if a run is left.
      train: (run, data, results so far, advance) -> {name: array or what JSON knows}. Where
        `counts` is above 1 it calls `advance` as often.

    Returns:
      {run: results} as they stand in the files, with `cpu_seconds` of each.
    """
    results = finished_runs(parser, config, files)
    left = [run for run in files if run not in results]
    data = load() if left else None
    with Progress(len(left) * counts) as progress:
        for run in left:
            progress.describe(f"Training, {files[run].stem.replace('_', ' ')}")
            began = time.process_time()
            found = train(run, data, results, progress.advance)
            found["cpu_seconds"] = time.process_time() - began
            results[run] = save_run(config, files[run], found)
            if counts == 1:
                progress.advance()
    return {run: results[run] for run in files}


def stamp(config):
    """What has to be the same for a file to belong to this study."""
    described = json.loads(as_json(config))
    options = {n: each for n, each in described["config"].items() if n not in NOT_OF_A_RUN}
    return {"format": described["format"], "options": options, "versions": described["versions"]}


def finished_runs(parser: Parser, config, files):
    """Reads what earlier calls have finished. A file that does not belong here is an error.

    Args:
      parser: for its error: one line, and status 2.
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
    """Writes the file of a finished run, whole or not at all. Returns what a reader will find."""
    text = as_json(config, **stamp(config), results=results)
    write({path: text})
    return json.loads(text)["results"]


# --- The report

BETTER, WORSE, ALIKE = "#009E73", "#D55E00", "#555555"


def make_table(*headings):
    """A table whose first column is text, and whose others are figures."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for place, heading in enumerate(headings):
        table.add_column(heading, justify="right" if place else "left", no_wrap=True)
    return table


def rates_of(result):
    """The chosen learning rates, as a cell of a table."""
    return " ".join(f"{rate:g}" for rate in np.unique(result["learning_rates"]))


def better_and_worse(board, baseline):
    """{"better": methods, "worse": methods} against a baseline, where a test finds a difference.

    The board's figure is one of which less is better.
    """
    tests = {m: row["against"][baseline] for m, row in board.items() if baseline in row["against"]}
    return {
        word: [m for m, test in tests.items() if test["differs"] and sign * test["mean"] > 0]
        for word, sign in (("better", -1), ("worse", 1))
    }


def against_baselines(board, baselines=("sum", "linear")):
    """Who is better and who is worse, a sentence for each baseline that was trained."""
    for baseline in [name for name in baselines if name in board]:
        for word, some in better_and_worse(board, baseline).items():
            yield f"Against {baseline}, {word}: {', '.join(some) or 'none'}."


def at_the_edge(grid, chosen):
    """Whether one of the chosen numbers is the least or the largest of several to choose from."""
    ends = np.array([min(grid), max(grid)], np.float32)
    return len(grid) > 1 and bool(np.isin(np.array(chosen, np.float32), ends).any())


def edge_of_grid(results, config):
    """A sentence on the learning rates that a wider grid might better."""
    some = [
        method
        for method, result in results.items()
        if at_the_edge(config.learning_rates, result["learning_rates"])
    ]
    return f"The best learning rate is at the edge of the grid for: {', '.join(some) or 'none'}."


def colour_of(test):
    """Of a method: whether a test finds it better than a baseline, or worse, or neither."""
    if not test or not test["differs"]:
        return ALIKE
    return BETTER if test["mean"] < 0 else WORSE


def draw_board(axes, board, baseline):
    """Each method's Δm: its seeds, their mean and its interval. The best is on top."""
    for place, row in enumerate(board.values()):
        colour = colour_of(row["against"].get(baseline))
        heights = np.full(len(row["points"]), place)
        axes.plot(row["points"], heights, ".", alpha=0.3, color=colour, mew=0)
        bar = {"fmt": "|", "ms": 9, "capsize": 3, "color": colour}
        axes.errorbar(row["delta_m"], place, xerr=row["interval_95"], **bar)
    axes.set_yticks(range(len(board)), list(board))
    axes.set_ylim(len(board) - 0.3, -0.7)
    axes.spines[["top", "right"]].set_visible(False)


def finish(config, files, printed, figure, width=120, **results):
    """Prints the tables and sentences of a study, and writes its JSON file and its picture.

    Args:
      config: the options.
      files: the paths of the two files.
      printed: tables and strings, in this order.
      figure: the picture.
      width: columns that the widest table needs.
      **results: what the JSON file holds beside what the results were made with.
    """
    console = Console(highlight=False)
    console.width = max(console.width, width)
    console.print(*printed, sep="\n", soft_wrap=True)
    picture = io.BytesIO()
    figure.savefig(picture)
    behaviour = methods.behaviour(config.methods)
    contents = as_json(config, behaviour=behaviour, **results), picture.getvalue()
    write(dict(zip(files, contents, strict=True)))
    console.print(f"\nWritten: {' and '.join(map(str, files))}")
