"""Turns the results of the benchmarks into tables and pictures for people to choose a method by.

Every `results.json` below `--results` that has figures of several seeds and methods becomes a
table and a small JSON file, and all together one picture. Methods are compared seed by seed;
that one is better is said only where a paired t-test says so, with Holm's correction for the
number of methods. Run `python -m benchmarks.report` after the benchmarks.
"""

import dataclasses
import io
import json
from pathlib import Path
from typing import Annotated

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console

from benchmarks.common import agreement, statistics, study
from benchmarks.common.command_line import FORMAT, Parser, check_output, parse, run_main, write

SUMMARIES = Path("benchmarks/results")  # under version control
BASELINES = ("sum", "linear")
# Of what a run was made with, what the reader has to know.
BUDGET = (
    "seeds",
    "updates",
    "steps",
    "epochs",
    "batch_size",
    "learning_rates",
    "weightings",
    "scale",
    "noise",
)


@dataclasses.dataclass(frozen=True)
class Config:
    """The options, each with its help and what it may be."""

    results: Annotated[Path, "folder with the results of the benchmarks", None] = Path("results")
    out: Annotated[Path, "folder for tables, picture and summaries", None] = SUMMARIES
    overwrite: Annotated[bool, "replace the report of an earlier run", None] = False


# --- From results to a summary


def origin(name, content):
    """What made the results: with it, anyone can make them again, or find out what has changed."""
    places = ("data_dir", "data_file", "out", "overwrite")
    return {
        "format": FORMAT,
        "name": name,
        "command": content["command"],
        "config": {key: each for key, each in content["config"].items() if key not in places},
        "behaviour": shorten(content.get("behaviour", {})),
        "versions": content["versions"],
        "device": content["device"],
    }


def summarise(name, content):
    """What the tables and pictures need of a results file: figures by seed, not curves."""
    kept = ("width", "method", "learning_rates", "loss_weights", "time_relative_to_sum")
    runs = [
        {key: shorten(run[key]) for key in (*kept, "metrics", "cpu_seconds") if key in run}
        | agreement_of(run)
        for run in content["runs"]
    ]
    return origin(name, content) | {
        "metrics": content["metrics"],
        "higher_is_better": content["higher_is_better"],
        "runs": runs,
    }


def shorten(value):
    """Numbers to five digits, however deep."""
    if isinstance(value, dict):
        return {key: shorten(each) for key, each in value.items()}
    if isinstance(value, list):
        return [shorten(each) for each in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def agreement_of(run):
    """Cosines of the gradients by the time of training: between tasks, and the control.

    The control is the same task on two disjoint batches: what noise leaves of 1.
    """
    if run.get("cosines"):  # (seeds, points, T, T)
        between, same = agreement.split(np.mean(run["cosines"], axis=0))
    elif "cosine" in run.get("curves", {}):  # (points, seeds, ...)
        curves = {name: np.array(curve, float) for name, curve in run["curves"].items()}
        between, same = (
            curves[name].reshape(len(curves[name]), -1) for name in ("cosine", "same_task_cosine")
        )
    else:
        return {}
    return {
        "cosines": {
            "between_tasks": shorten(between.mean(axis=1).tolist()),
            "same_task": shorten(same.mean(axis=1).tolist()),
        }
    }


def summarise_success(name, content):
    """The same of results in which methods succeed more or less, as in reinforcement learning."""
    return origin(name, content) | {"by_seed": shorten(content["by_seed"]), "runs": []}


# --- From summaries to tables


def settings(summary):
    """The parts of a summary that are compared among themselves: {width or None: runs}."""
    found = {}
    for run in summary["runs"]:
        found.setdefault(run.get("width"), []).append(run)
    return found


def board_of(summary, runs):
    """Every method against single-task networks and baselines, the best first."""
    metrics = {run["method"]: np.array(run["metrics"], float) for run in runs}
    return statistics.leaderboard(metrics, summary["higher_is_better"], BASELINES)


def title_of(summary, width):
    return summary["name"] + (f", width {width}" if width is not None else "")


def options_of(summary):
    return ", ".join(
        f"{name.replace('_', ' ')} {' '.join(map(str, np.ravel(value)))}"
        for name, value in summary["config"].items()
        if name in BUDGET
    )


def budget_of(summary):
    options, device, versions = options_of(summary), summary["device"], summary["versions"]
    minutes = sum(run.get("cpu_seconds", 0) for run in summary["runs"]) / 60
    return (
        f"{options}; {device['kind']} ({device['cpus']} cores), {minutes:.0f} core minutes, "
        f"jax {versions['jax']}, optax_surgery {versions['optax_surgery']}"
    )


def markdown_table(summary, runs):
    """One row a method. Differences in Δm stand only where a test finds them."""
    rates = {run["method"]: run.get("learning_rates", []) for run in runs}
    heads = ["method", *summary["metrics"], "Δm, %", "rank", *(f"against {b}" for b in BASELINES)]
    lines = [f"| {' | '.join([*heads, 'rate'])} |", "|---" + "|---:" * len(heads) + "|"]
    for method, row in board_of(summary, runs).items():
        cells = [
            f"`{method}`",
            *(f"{each:.4g}" for each in row["metrics"]),
            f"{row['delta_m']:+.2f} ± {row['interval_95']:.2f}",
            f"{row['rank']:.1f}" if row["rank"] else "-",
            *(statistics.verdict(row["against"].get(other)) or "-" for other in BASELINES),
            " ".join(f"{rate:g}" for rate in sorted(set(rates[method]))),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def in_words(board):
    """Who is better and worse than each baseline, by the tests."""
    for baseline in [name for name in BASELINES if name in board]:
        compared = sum(baseline in row["against"] for row in board.values())
        for word, some in study.better_and_worse(board, baseline).items():
            told = ", ".join(f"`{method}`" for method in some) or "none"
            yield f"{word.capitalize()} than `{baseline}`: {told} (of {compared})."


LEGEND = """\
Δm: mean relative loss against single-task networks of the same form, ± its 95% interval over seeds;
lower is better. Rank: mean rank over the metrics. Against: the mean difference in Δm, where a
paired t-test over seeds finds one at 5% with Holm's correction for the number of methods; else =.
`linear` is the sum of the losses with weights tuned in validation, rate: the learning rate tuned
in validation, by the same grid for every method."""


def markdown(summaries):
    parts = [LEGEND]
    for summary in summaries:
        for width, runs in settings(summary).items():
            words = "\n".join(f"- {sentence}" for sentence in in_words(board_of(summary, runs)))
            parts += [
                f"## {title_of(summary, width)}",
                f"`{summary['command']}`",
                f"{budget_of(summary)}.",
                markdown_table(summary, runs),
                words,
            ]
    return "\n\n".join(parts) + "\n"


SUCCESS_LEGEND = """\
Reinforcement learning. Success: the share of episodes, or its mean over training (area), mean over
seeds ± its 95% interval, from 0 to 1, higher is better. Against: as above, in success."""


def success_table(entries):
    """Of one setting, a row a method, the best first, and two columns for each figure."""
    heads, columns = ["method"], []
    for entry in entries:
        found = {name: np.array(points, float) for name, points in entry["methods"].items()}
        baseline = "mean" if "mean" in found else "sum"
        apart = {name: points - found[baseline] for name, points in found.items()}
        tests = statistics.paired_tests({n: each for n, each in apart.items() if n != baseline})
        heads += [entry["figure"], f"against `{baseline}`"]
        columns.append((found, tests))
    first = columns[0][0]
    lines = [f"| {' | '.join(heads)} |", "|---" + "|---:" * (len(heads) - 1) + "|"]
    for name in sorted(first, key=lambda name: -first[name].mean()):
        cells = [f"`{name}`"]
        for found, tests in columns:
            points = found[name]
            cells.append(f"{points.mean():.3f} ± {statistics.interval_95(points):.3f}")
            cells.append(statistics.verdict(tests.get(name)) or "-")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def successes_in_markdown(summaries):
    parts = [SUCCESS_LEGEND] if summaries else []
    for summary in summaries:
        made_with = f"`{summary['command']}` ({options_of(summary)})."
        for setting in dict.fromkeys(entry["setting"] for entry in summary["by_seed"]):
            entries = [entry for entry in summary["by_seed"] if entry["setting"] == setting]
            parts += [f"## {summary['name']}: {setting}", made_with, success_table(entries)]
    return "\n" + "\n\n".join(parts) + "\n" if parts else ""


# --- The picture


def make_figure(summaries):
    panels = [
        (title_of(summary, width), board_of(summary, runs))
        for summary in summaries
        for width, runs in settings(summary).items()
    ]
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    height = 1.2 + 0.19 * max(len(board) for _, board in panels)
    figure = Figure(figsize=(4.2 * columns + 1, height * rows), layout="constrained", dpi=120)
    grid = figure.subplots(rows, columns, squeeze=False).flat
    for axes in list(grid)[len(panels) :]:
        axes.set_visible(False)
    for axes, (title, board) in zip(figure.axes, panels, strict=False):
        study.draw_board(axes, board, "sum")
        if "sum" in board:
            axes.axvline(board["sum"]["delta_m"], color="black", lw=0.8, ls=":")
        axes.tick_params("y", labelsize=8)
        axes.set_xlabel("Δm, %: lower is better")
        axes.set_title(title, fontsize=10)
    figure.suptitle(
        "Every seed, the mean and its 95% interval.\n"
        "Against sum (dotted): green better, orange worse, grey no difference.",
        fontsize=10,
    )
    return figure


# --- The command line


def main(argv=None):
    parser = Parser("python -m benchmarks.report", description=__doc__)
    config = parse(parser, Config, argv)
    summaries, successes = [], []
    for path in sorted(config.results.glob("*/results.json")):
        content = study.read(parser, path, needed=("format",))
        if content["format"] != FORMAT:
            parser.error(f"{path} is of format {content['format']}, and {FORMAT} is expected")
        methods = {run.get("method") for run in content.get("runs", [])}
        if "higher_is_better" in content and "single" in methods:
            summaries.append(summarise(path.parent.name, content))
        elif "by_seed" in content:
            successes.append(summarise_success(path.parent.name, content))
    if not summaries and not successes:
        parser.error(f"no results with single-task networks in {config.results}/*/results.json")
    text = markdown(summaries) + successes_in_markdown(successes)
    contents = {"results.md": text.encode()}
    if summaries:
        picture = io.BytesIO()
        make_figure(summaries).savefig(picture)
        contents["delta_m.png"] = picture.getvalue()
    for summary in (*summaries, *successes):
        contents[f"{summary['name']}.json"] = json.dumps(summary).encode()
    files = [config.out / name for name in contents]
    check_output(parser, files, config.overwrite)
    write(dict(zip(files, contents.values(), strict=True)))
    console = Console(highlight=False, soft_wrap=True, markup=False)
    console.print(text)
    console.print(f"Written: {', '.join(map(str, files))}")


if __name__ == "__main__":
    run_main(main)
