"""What the image suites share: a sweep over methods and seeds, its table and its picture.

Every run of a method and a seed ends in a file of its own, so that a sweep that is killed goes on
where it was. The reference of a task, `single`, is the same network trained on that task alone.
"""

import functools
import io
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import optax
from matplotlib.figure import Figure
from rich.console import Console

import optax_surgery as surgery
from benchmarks.common import methods
from benchmarks.common.command_line import Parser, as_json, check_output, parse, write
from benchmarks.common.progress import Progress
from benchmarks.common.statistics import delta_m, interval_95, mean_ranks, paired_tests
from benchmarks.common.study import finished_runs, make_table, save_run
from benchmarks.images.training import (
    DataError,
    Problem,
    Split,
    make_optimiser,
    steps_per_epoch,
    train,
)

DEFAULT = ("single", "sum", "pcgrad", "aligned_mtl")


class Suite(NamedTuple):
    """What a script says about its benchmark."""

    tasks: tuple[str, ...]
    load: Callable[[Any], dict[str, Split]]  # config -> "train", maybe "validation", and "test"
    make_problem: Callable[[tuple[int, ...], Any], Problem]  # of the tasks at these positions
    make_adam: Callable[[Any, int], optax.GradientTransformation]  # from steps per epoch
    choose: Callable[[dict], dict[str, float]]  # curves -> the metrics that a run reports
    columns: Callable[[dict], dict[str, float]]  # metrics -> what the table shows of them
    # Of the metrics that Δm and the mean rank count: whether higher is better.
    higher_is_better: Callable[[dict], dict[str, bool]]


def choices(num_tasks):
    """Names for `--methods`. A linear scalarisation would have to be tuned, run by run."""
    return "single", *(name for name in methods.names(num_tasks) if name != "linear")


# --- What a run reports


def last_epochs_mean(curves, epochs=10):
    """The mean of the last test results, where there is no validation set to choose by."""
    last = curves["test"][-epochs:]
    return {name: float(np.mean([found[name] for found in last])) for name in last[0]}


def best_epoch(curves, score):
    """The test result of the epoch that the validation set likes best."""
    scores = [score(found) for found in curves["validation"]]
    return curves["test"][int(np.argmax(np.nan_to_num(scores, nan=-np.inf)))]


# --- The sweep


def run(make_suite, config_class, description, name, argv):
    """The command line of a script. `make_suite` makes its `Suite` from the options."""
    parser = Parser(f"python -m benchmarks.images.{name}", description=description)
    config = parse(parser, config_class, argv)
    suite = make_suite(config)
    seeds = range(config.seeds)
    files = {
        (method, seed): config.out / "runs" / f"{method}_{seed}.json"
        for method in config.methods
        for seed in seeds
    }
    summary, picture = config.out / "results.json", config.out / "curves.png"
    # These two are made anew from the files of the runs, whenever a sweep goes on.
    check_output(parser, [summary, picture], overwrite=True)
    found = finished_runs(parser, config, files)
    try:
        found |= sweep(suite, config, {run: files[run] for run in files if run not in found})
    except DataError as error:
        parser.error(str(error))

    runs = {run: found[run] for run in files}
    higher, values = collect(suite, config, runs)
    deltas, ranks = compare(higher, values)
    console = Console(highlight=False)
    console.width = max(console.width, 120)
    findings = list(in_words(deltas))
    console.print(make_result_table(suite, config, runs, deltas, ranks), *findings, sep="\n")
    drawn = io.BytesIO()
    make_figure(suite, config, runs, deltas).savefig(drawn)
    text = as_json(
        config,
        metrics=list(higher),
        higher_is_better=list(higher.values()),
        findings=findings,
        behaviour=methods.behaviour(config.methods),
        runs=[
            {
                "method": method,
                "metrics": each,
                "cpu_seconds": sum(runs[method, seed]["cpu_seconds"] for seed in seeds),
            }
            for method, each in values.items()
        ],
    )
    write({summary: text, picture: drawn.getvalue()})
    console.print(f"\nWritten: {summary}, {picture} and {len(runs)} files in {config.out / 'runs'}")


def sweep(suite, config, files):
    """Trains what is missing. With one seed all methods meet the same batches and, but for
    `single`, start from the same parameters.
    """
    if not files:
        return {}
    found = {}
    several = [(t,) for t in range(len(suite.tasks))]
    together = [tuple(range(len(suite.tasks)))]
    networks = {method: several if method == "single" else together for method, _ in files}
    total = config.epochs * sum(len(networks[method]) for method, _ in files)
    with Progress(total, "Reading the data") as progress:
        splits = suite.load(config)
        # Made once, so that methods share the compilation of an evaluation, and seeds all.
        make_problem = functools.cache(lambda tasks: suite.make_problem(tasks, config))
        adam = suite.make_adam(config, steps_per_epoch(splits["train"], config.batch_size))
        for method, own in networks.items():
            made = [(make_problem(tasks), optimiser(method, tasks, adam)) for tasks in own]
            for seed in [seed for name, seed in files if name == method]:
                progress.describe(f"Training {method}, seed {seed}")
                began, began_cpu = time.perf_counter(), time.process_time()
                file, curves = files[method, seed], []
                unfinished = [file.with_suffix(f".{tasks[0]}.unfinished") for tasks in own]
                for (problem, tx), checkpoint in zip(made, unfinished, strict=True):
                    curves.append(
                        train(
                            problem,
                            tx,
                            splits,
                            config,
                            seed,
                            checkpoint,
                            progress.advance,
                        )
                    )
                results = {
                    "method": method,
                    "seed": seed,
                    "metrics": {k: v for each in curves for k, v in suite.choose(each).items()},
                    "curves": curves,
                    "seconds": time.perf_counter() - began,
                    "cpu_seconds": time.process_time() - began_cpu,
                }
                save_run(config, file, results)
                for checkpoint in unfinished:
                    checkpoint.unlink()
                found[method, seed] = results
    return found


def optimiser(method, tasks, adam):
    made = surgery.sum() if method == "single" else methods.METHODS[method](len(tasks))
    return make_optimiser(made, len(tasks), adam)


# --- What the runs say


def collect(suite, config, runs):
    """Of the metrics that count whether higher is better, and by method (seeds, metrics)."""
    found = {
        method: [runs[method, seed]["metrics"] for seed in range(config.seeds)]
        for method in config.methods
    }
    higher = suite.higher_is_better(found[config.methods[0]][0])
    # What a diverged run leaves is null in a file, NaN here.
    return higher, {
        method: np.array([[metrics[name] for name in higher] for metrics in each], float)
        for method, each in found.items()
    }


def compare(higher, values):
    """By method: Δm of every seed against the mean of `single`, and the mean rank among them."""
    directions = list(higher.values())
    joint = {method: each for method, each in values.items() if method != "single"}
    means = [each.mean(axis=0) for each in joint.values()]
    ranks = dict(zip(joint, mean_ranks(means, directions), strict=True)) if joint else {}
    if "single" not in values:
        return {}, ranks
    references = values["single"].mean(axis=0)
    return {m: delta_m(each, references, directions) for m, each in joint.items()}, ranks


def in_words(deltas):
    """Every method against `sum`, where both have been compared with `single`."""
    if "sum" not in deltas or len(deltas) < 2:
        return
    differences = {m: each - deltas["sum"] for m, each in deltas.items() if m != "sum"}
    for method, found in paired_tests(differences).items():
        verdict = "a difference" if found["differs"] else "no difference"
        yield (
            f"Δm of {method} against sum {found['mean']:+.2f} "
            f"(95% interval ± {found['interval_95']:.2f}, Holm's p = {found['p_holm']:.2g}): "
            f"{verdict}."
        )


def make_result_table(suite, config, runs, deltas, ranks):
    shown = {
        method: [suite.columns(runs[method, seed]["metrics"]) for seed in range(config.seeds)]
        for method in config.methods
    }
    columns = list(shown[config.methods[0]][0])
    headings = (*columns, "Δm, %", "mean rank")
    table = make_table("method", *(heading.replace(" ", "\n") for heading in headings))
    for method, found in shown.items():
        cells = [np.array([one[name] for one in found], float) for name in columns]
        delta = with_spread(deltas[method]) if method in deltas else ""
        rank = f"{ranks[method]:.2f}" if method in ranks else ""
        table.add_row(method, *(with_spread(cell) for cell in cells), delta, rank)
    return table


def with_spread(values):
    digits = 4 if np.all(np.abs(values) < 1) else 2
    return f"{values.mean():.{digits}f}\n±{values.std(ddof=1):.{digits}f}"


def make_figure(suite, config, runs, deltas):
    """A panel for what each column of the table was after every epoch, and one for Δm."""

    def curve(method, seed):
        epochs = zip(*(each["test"] for each in runs[method, seed]["curves"]), strict=True)
        return [
            suite.columns({k: v for part in parts for k, v in part.items()}) for parts in epochs
        ]

    curves = {m: [curve(m, seed) for seed in range(config.seeds)] for m in config.methods}
    columns = list(curves[config.methods[0]][0][0])
    panels = len(columns) + bool(deltas)
    rows, across = -(-panels // 4), min(4, panels)
    figure = Figure(figsize=(1 + 3.6 * across, 0.8 + 2.8 * rows), layout="constrained", dpi=150)
    grid = figure.subplots(rows, across, squeeze=False)
    colours = {method: f"C{i % 10}" for i, method in enumerate(config.methods)}
    dashes = {method: ("-", "--", ":", "-.")[i // 10] for i, method in enumerate(config.methods)}
    for axes, column in zip(grid.flat, columns, strict=False):
        for method, seeds in curves.items():
            values = np.array([[found[column] for found in seed] for seed in seeds], float)
            epochs = np.arange(1, values.shape[1] + 1)
            mean, spread = values.mean(axis=0), values.std(axis=0, ddof=1)
            style = {"color": colours[method], "ls": dashes[method]}
            marker = "o" if len(epochs) == 1 else None
            axes.plot(epochs, mean, label=method, marker=marker, **style)
            axes.fill_between(
                epochs, mean - spread, mean + spread, color=style["color"], alpha=0.12, lw=0
            )
        axes.set(xlabel="epoch", ylabel=column)
        axes.xaxis.get_major_locator().set_params(integer=True)
    if deltas:
        axes = grid.flat[len(columns)]
        for place, (method, values) in enumerate(deltas.items()):
            axes.plot(values, [place] * len(values), "o", alpha=0.4, color=colours[method])
            bar = {"fmt": "|", "ms": 14, "capsize": 4, "color": colours[method]}
            axes.errorbar(values.mean(), place, xerr=interval_95(values), **bar)
        axes.set_yticks(range(len(deltas)), list(deltas))
        axes.invert_yaxis()
        axes.axvline(0, color="black", lw=0.8)
        axes.set(xlabel="Δm in %: left is better")
    for axes in grid.flat[panels:]:
        axes.set_visible(False)
    for axes in grid.flat:
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=6, frameon=False)
    return figure
