"""Networks that solve equations: does any method beat the sum of the losses, or tuned weights?

A physics-informed network learns the solution of a differential equation from its residual inside
the domain and from its conditions on the edge: two or three losses of one network, whose gradients
differ in length and often conflict. Four equations are here, with exact or computed solutions
(`benchmarks/pinn_equations.py`). `linear`, the sum with a tuned weight for the conditions, is the
baseline to beat. Rates and weights are tuned by the same grid for every method, with seeds of 100
and more and a third of the steps; other seeds report. Errors are of the field against the solution.

By default this is a study with a small budget: two equations, few points and few thousand steps.
The published protocol (ConFIG, Liu et al., ICLR 2025) has 30,000 steps for Burgers' equation and
100,000 for the others, more points, and one rate for all. On an accelerator:

    python -m benchmarks.pinn --equations burgers --steps 30000 --inside 10000 --boundary 250 \\
        --initial 250 --learning-rates 1e-3 --condition-weights 1 --seeds 3 --out results/burgers

and `--steps 100000` with `--inside 20000 --boundary 1000` for kovasznay, `--inside 20000
--boundary 500 --initial 500` for schroedinger and `--inside 25000 --boundary 5000 --initial 5000`
for beltrami. With `--losses two` both conditions are one loss, as in half of its experiments.
"""

import dataclasses
import functools
import io
import itertools
import sys
import time
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import optax_surgery as surgery
from benchmarks import pinn_equations
from benchmarks.common import methods, statistics, sweep
from benchmarks.common.command_line import DATA_DIR, Parser, as_json, check_output, parse, write
from benchmarks.pinn_equations import EQUATIONS

# With the weightings of physics code.
SURGERIES = {
    **methods.METHODS,
    "inverse_norms": surgery.inverse_norms,
    "softadapt": surgery.softadapt,
    "relobralo": surgery.relobralo,
}
ALWAYS = ("sum", "linear")  # what everything else is measured by
DEFAULTS = (*ALWAYS, "pcgrad", "conflict_free", "aligned_mtl", "inverse_norms")
CHOICES = (
    *DEFAULTS,
    "momentum_conflict_free",
    "imtl_g",
    "nash_mtl",
    "upgrad",
    "scale_invariant",
    "softadapt",
    "relobralo",
)
TUNING_SEED = 100  # the first one
TUNING_SHARE = 3  # of so many steps one is made to tune
WARM_UP = 100  # steps, or a hundredth of all if that is less
LEAST_RATE = 0.1  # of the learning rate, at the end


@dataclasses.dataclass(frozen=True)
class Config:
    """The options, each with its help and what it may be: one of some names, or a least number."""

    equations: Annotated[tuple, "what to solve", tuple(EQUATIONS)] = ("kovasznay", "burgers")
    methods: Annotated[tuple, "what to compare, always with sum and linear", CHOICES] = DEFAULTS
    seeds: Annotated[int, "networks per method, from seed 0, at least 2", 2] = 6
    losses: Annotated[
        str, "three: residual, boundary, initial; two: both conditions as one", ("three", "two")
    ] = "three"
    steps: Annotated[int, "of training, a multiple of --points", 1] = 5000
    points: Annotated[int, "times to measure after the start", 2] = 20
    inside: Annotated[int, "points per step for the residual", 1] = 200
    boundary: Annotated[int, "points per step for the boundary condition", 1] = 50
    initial: Annotated[int, "points per step for the initial condition", 1] = 50
    width: Annotated[int, "of the hidden layers", 1] = 50
    depth: Annotated[int, "hidden layers", 1] = 4
    learning_rates: Annotated[
        tuple, "of Adam, which fall by a cosine to a tenth. The best in tuning is taken", 1e-9
    ] = (3e-3, 1e-2, 3e-2)
    condition_weights: Annotated[
        tuple, "weights of the conditions that `linear` chooses from; the residual has 1", 1e-9
    ] = (1.0, 10.0, 100.0)
    data_dir: Annotated[Path, "folder where computed solutions are kept", None] = DATA_DIR / "pinn"
    out: Annotated[Path, "folder for the results", None] = Path("results/pinn")
    overwrite: Annotated[bool, "replace the results of an earlier run", None] = False


# --- The network and its losses


class Network(nn.Module):
    """From a point to the values of the field there."""

    width: int
    depth: int
    outputs: int

    @nn.compact
    def __call__(self, point):
        dense = functools.partial(nn.Dense, kernel_init=nn.initializers.glorot_normal())
        for _ in range(self.depth):
            point = jnp.tanh(dense(self.width)(point))
        return dense(self.outputs)(point)


def make_network(config, equation):
    return Network(config.width, config.depth, len(equation.outputs))


def tasks_of(config, equation):
    """The names of the losses, in the order of their gradients."""
    if config.losses == "two" and "initial" in equation.mistakes:
        return ("conditions", "residual")
    return tuple(sorted(equation.mistakes))


def losses_of(config, equation, params, points):
    """{task: loss}."""
    network = make_network(config, equation)
    found = pinn_equations.losses(equation, lambda point: network.apply(params, point), points)
    if "conditions" in tasks_of(config, equation):
        conditions = (found["boundary"] + found["initial"]) / 2
        return {"conditions": conditions, "residual": found["residual"]}
    return found


def sample(config, equation, key):
    counts = {
        "residual": config.inside,
        "boundary": config.boundary,
        "initial": config.initial,
    }
    counts = {loss: counts[loss] for loss in equation.mistakes}
    return pinn_equations.sample(equation, key, counts)


# --- One network


class Lane(NamedTuple):
    """What distinguishes the networks that one program trains."""

    seed: Any
    learning_rate: Any
    loss_weights: Any  # (T,)
    steps: Any  # over which the learning rate falls


class Run(NamedTuple):
    """A network in training."""

    params: Any
    opt_state: Any
    key: Any


def learning_rate(step, lane):
    warm_up = jnp.clip(lane.steps // 100, 1, WARM_UP)
    over = jnp.clip((step - warm_up) / jnp.maximum(1, lane.steps - warm_up), 0, 1)
    cosine = LEAST_RATE + (1 - LEAST_RATE) * (1 + jnp.cos(jnp.pi * over)) / 2
    return lane.learning_rate * cosine * jnp.minimum(1, (step + 1) / warm_up)


def make_optimiser(update, num_tasks, lane):
    """Adam divides by the recent size of updates: sums and means of gradients are alike to it."""
    adam = optax.adam(lambda step: learning_rate(step, lane))
    return optax.chain(SURGERIES[update](num_tasks), adam)


def start(lane, config, equation, update):
    init_key, key = jax.random.split(jax.random.key(lane.seed))
    params = make_network(config, equation).init(init_key, jnp.zeros(len(equation.inputs)))
    optimiser = make_optimiser(update, len(tasks_of(config, equation)), lane)
    return Run(params, optimiser.init(params), key)


def train_stretch(run, lane, numbers, config, equation, update):
    """The steps of these numbers, each on points of its own."""
    tasks = tasks_of(config, equation)
    optimiser = make_optimiser(update, len(tasks), lane)

    def losses_fn(params, points):
        losses = losses_of(config, equation, params, points)
        return {task: lane.loss_weights[n] * losses[task] for n, task in enumerate(tasks)}

    def step(run, number):
        points = sample(config, equation, jax.random.fold_in(run.key, number))
        # A loss does not look at the points of the others, so that its gradient costs its own only.
        losses, grads = surgery.task_value_and_grad(losses_fn)(run.params, points)
        updates, opt_state = optimiser.update(grads, run.opt_state, run.params, losses=losses)
        return Run(optax.apply_updates(run.params, updates), opt_state, run.key), None

    return lax.scan(step, run, numbers)[0]


def measure(run, number, points, values, config, equation):
    """The error on the grid; losses and cosines of their gradients on points that are new."""
    network = make_network(config, equation)
    found = jax.vmap(lambda point: network.apply(run.params, point))(points)
    # Those of the next step, which have not been seen yet and are the same for all methods.
    new = sample(config, equation, jax.random.fold_in(run.key, number))
    losses, grads = surgery.task_value_and_grad(functools.partial(losses_of, config, equation))(
        run.params, new
    )
    return {
        "mse": jnp.mean((found - values) ** 2),
        "losses": jnp.stack(jax.tree.leaves(losses)),
        "cosines": surgery.cosine_similarities(surgery.gramian(grads)),
    }


def field(run, points, config, equation):
    network = make_network(config, equation)
    return jax.vmap(lambda point: network.apply(run.params, point))(points)


# --- All networks of a method


@functools.cache
def make_program(name, update, config):
    """What starts, trains and measures several networks at once."""
    known = {"config": config, "equation": EQUATIONS[name]}
    axes = {"start": 0, "train": (0, 0, None), "measure": (0, None, None, None)}
    functions = {
        "start": functools.partial(start, update=update, **known),
        "train": functools.partial(train_stretch, update=update, **known),
        "measure": functools.partial(measure, **known),
    }
    return {part: jax.jit(jax.vmap(fn, axes[part])) for part, fn in functions.items()}


def of_program(config):
    """The options that shape a program, so that others do not compile it again."""
    kept = ("losses", "inside", "boundary", "initial", "width", "depth")
    return Config(**{name: getattr(config, name) for name in kept})


def train_lanes(lanes, name, update, config, stretches, tell):
    """Trains all lanes. Returns them, what was seen (lanes, points), and the seconds per step."""
    program = make_program(name, update, of_program(config))
    solution = pinn_equations.reference(name, config.data_dir)
    length = config.steps // config.points
    runs = program["start"](lanes)
    seen, seconds = [program["measure"](runs, 0, *solution)], []
    for stretch in range(stretches):
        first = stretch * length
        began = time.perf_counter()
        runs = jax.block_until_ready(program["train"](runs, lanes, first + jnp.arange(length)))
        seconds.append((time.perf_counter() - began) / length)
        seen.append(jax.block_until_ready(program["measure"](runs, first + length, *solution)))
        tell()
    # The first stretch may have been compiled first.
    return runs, jax.tree.map(lambda *x: np.stack(x, axis=1), *seen), np.median(seconds[1:])


def candidates(method, tasks, config):
    """(candidates, T) weights of the losses to choose from: ones, but for `linear`."""
    choices = config.condition_weights if method == "linear" else (1.0,)
    residual = np.array([task == "residual" for task in tasks])
    return np.array([np.where(residual, 1, weight) for weight in choices], np.float32)


def tune(method, name, update, config, tell):
    """Minus the logarithms of the errors, (candidates, rates, seeds), after a part of the steps."""
    rates = np.array(config.learning_rates, np.float32)
    # About as many networks as are trained in the end: then the program is the same.
    shape = len(rates), max(1, config.seeds // len(rates))
    rate, seed = (each.ravel() for each in np.indices(shape))
    stretches = max(2, -(-config.points // TUNING_SHARE))
    steps = np.full(len(seed), stretches * (config.steps // config.points))
    scores, weightings = [], candidates(method, tasks_of(config, EQUATIONS[name]), config)
    told = itertools.count(1)
    for weights in weightings:
        each = np.tile(weights, (len(seed), 1))
        lanes = Lane(TUNING_SEED + seed, rates[rate], each, steps)
        _, seen, _ = train_lanes(
            lanes,
            name,
            update,
            config,
            stretches,
            lambda: tell(next(told), stretches * len(weightings)),
        )
        scores.append(-np.log10(seen["mse"][:, -1]).reshape(shape))
    return np.array(scores)


def train_method(method, name, config, tell):
    """Tunes a method and trains all its seeds. Returns what goes into the file of the run."""
    equation = EQUATIONS[name]
    # `linear` differs in the weights of the losses only.
    update = "sum" if method == "linear" else method
    weightings = candidates(method, tasks_of(config, equation), config)
    rates = np.array(config.learning_rates, np.float32)
    scores, weighting, rate = None, 0, 0
    if len(weightings) * len(rates) > 1:
        scores = tune(method, name, update, config, functools.partial(tell, "tuning"))
        weighting, rate = sweep.best(scores)
    several = np.ones(config.seeds, np.float32)
    lanes = Lane(
        np.arange(config.seeds),
        several * rates[rate],
        np.outer(several, weightings[weighting]),
        np.full(config.seeds, config.steps),
    )
    told = itertools.count(1)
    runs, seen, seconds = train_lanes(
        lanes,
        name,
        update,
        config,
        config.points,
        lambda: tell("training", next(told), config.points),
    )
    points, _ = pinn_equations.reference(name, config.data_dir)
    shown = field(jax.tree.map(lambda each: each[0], runs), points, config, equation)
    return {
        **seen,
        "learning_rate": rates[rate],
        "condition_weight": np.delete(weightings[weighting], -1)[0],
        "scores": scores,
        "seconds_per_step": seconds,
        # Enough digits for a picture.
        "field": np.round(as_picture(name, shown).astype(float), 4),
    }


def as_picture(name, values):
    """A slice of a field's values on the grid: what there is to see of it, in two dimensions."""
    equation = EQUATIONS[name]
    shown = np.asarray(values).reshape(*equation.grid, -1)
    while shown.ndim > 3:  # in the middle of space, at the last time
        last = shown.ndim == len(equation.inputs) + 1
        shown = shown[..., -1 if last else shown.shape[-2] // 2, :]
    return np.linalg.norm(shown, axis=-1) if name == "schroedinger" else shown[..., 0]


# --- What it finds


def logarithms(result):
    """Of the errors, (seeds, points + 1). NaN where a network has diverged."""
    errors = np.asarray(result["mse"], float)
    return np.log10(np.where(np.isfinite(errors), errors, np.nan))


def compare(results):
    """{method: row} of one equation, the least error first, those that diverged last.

    Tests are paired, on logarithms of errors.
    """
    found = {method: logarithms(result)[:, -1] for method, result in results.items()}
    whole = {method: each for method, each in found.items() if np.isfinite(each).all()}
    rows = {
        method: {
            "points": each,
            "mean": np.mean(each),
            "interval_95": statistics.interval_95(each),
            "diverged": int(np.sum(~np.isfinite(each))),
            "against": {},
        }
        for method, each in found.items()
    }
    for baseline in filter(whole.__contains__, ALWAYS):
        differences = {m: each - whole[baseline] for m, each in whole.items() if m != baseline}
        for method, test in statistics.paired_tests(differences).items():
            rows[method]["against"][baseline] = test
    order = sorted(rows, key=lambda method: np.nan_to_num(rows[method]["mean"], nan=np.inf))
    return {method: rows[method] for method in order}


def relative_error(mse, values):
    """The relative L2 error that goes with a mean squared error."""
    return np.sqrt(mse / np.mean(np.square(values, dtype=float)))


def verdict(test):
    """A cell of a table: the factor between errors where there is one, else =."""
    if test is None:
        return ""
    return f"x {10 ** test['mean']:.2f}" if test["differs"] else "="


def make_table(rows, results, values, tasks):
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("method", no_wrap=True)
    losses = (f"loss:\n{task}" for task in tasks)
    headings = ("mean squared\nerror", "relative\nL2, %", "against\nsum", "against\nlinear", "rate")
    for heading in (*headings, *losses, "ms per\nstep"):
        table.add_column(heading, justify="right", no_wrap=True)
    for method, row in rows.items():
        result = results[method]
        losses = 10 ** np.mean(np.log10(np.asarray(result["losses"], float)[:, -1]), axis=0)
        error = f"{10 ** row['mean']:.2e} x/ {10 ** row['interval_95']:.2f}"
        relative = f"{100 * relative_error(10 ** row['mean'], values):.2f}"
        if row["diverged"]:
            error, relative = f"{row['diverged']} of {len(row['points'])} diverged", ""
        table.add_row(
            method,
            error,
            relative,
            *(verdict(row["against"].get(baseline)) for baseline in ALWAYS),
            f"{result['learning_rate']:g}",
            *(f"{each:.1e}" if np.isfinite(each) else "" for each in losses),
            f"{1000 * result['seconds_per_step']:.1f}",
        )
    return table


LEGEND = """\
Mean squared error against the solution, over all outputs on a grid: the geometric mean over seeds
and, after x/, the factor of its 95% interval to either side. Relative L2: the same as a share of
the solution's norm. Against sum and linear: the factor between errors, where a paired t-test of
their logarithms finds one, with Holm's correction for the number of methods; else an equals sign.
Loss: on new points at the end, without weights. Ms per step: of all seeds together, measured here.
"""


def in_words(name, rows, results, values, config):
    """The findings of one equation, a sentence each."""
    equation = EQUATIONS[name]
    for baseline in ALWAYS:
        tests = {m: r["against"][baseline] for m, r in rows.items() if baseline in r["against"]}
        if tests:  # none, where the baseline diverged
            yield f"Against {baseline}, {differences(tests, config.seeds)}."
    lost = [f"{m} ({row['diverged']})" for m, row in rows.items() if row["diverged"]]
    if lost:
        yield f"Networks diverged, and are in no test, of: {', '.join(lost)}."
    best = next(iter(rows))
    if not rows[best]["diverged"]:
        error = relative_error(10 ** rows[best]["mean"], values)
        yield f"The least error has {best}: {100 * error:.2f}% of the solution's norm."
    weight = results["linear"]["condition_weight"]
    yield f"In linear, the conditions weigh {weight:g} times as much as the residual."
    cosines = np.asarray(results["sum"]["cosines"], float)[:, 1:]
    residual = tasks_of(config, equation).index("residual")
    with_it = np.delete(cosines[:, :, residual], residual, axis=-1)
    yield (
        f"Trained with sum, the residual's gradient conflicts with a condition's in "
        f"{np.mean(with_it < 0):.0%} of the measurements, by a cosine below -0.1 in "
        f"{np.mean(with_it < -0.1):.0%}."
    )
    grids = {"learning_rate": config.learning_rates, "condition_weight": config.condition_weights}
    for setting, grid in grids.items():
        some = results if setting == "learning_rate" else {"linear": results["linear"]}
        edge = [m for m, each in some.items() if sweep.at_the_edge(grid, [each[setting]])]
        if edge:
            told = setting.replace("_", " ")
            yield f"The best {told} is at the edge of the grid for: {', '.join(edge)}."


def differences(tests, seeds):
    told = []
    for word, sign in (("better", -1), ("worse", 1)):
        some = [m for m, test in tests.items() if test["differs"] and sign * test["mean"] > 0]
        told.append(f"{word}: {', '.join(some) or 'none'}")
    equal = {m: test for m, test in tests.items() if not test["differs"]}
    if equal:
        reach = max(abs(test["mean"]) + test["interval_95"] for test in equal.values())
        told.append(
            f"no difference found: {', '.join(equal)} (with {seeds} seeds, factors up to "
            f"{10**reach:.1f} are not ruled out)"
        )
    return "; ".join(told)


def over_all(rows):
    """Which methods are better than a baseline on every equation."""
    for baseline in ALWAYS:
        found = [
            {m for m, r in each.items() if (t := r["against"].get(baseline)) and beats(t)}
            for each in rows.values()
        ]
        some = sorted(set.intersection(*found))
        yield f"Better than {baseline} on every equation: {', '.join(some) or 'none'}."


def beats(test):
    return test["differs"] and test["mean"] < 0


# --- The picture

COLOURS = dict(
    zip(
        CHOICES,
        ("#000000", "#999999", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9",
         "#8B5A2B", "#7B3294", "#BCBD22", "#F0027F", "#17BECF"),
        strict=True,
    )
)  # fmt: skip


def draw_errors(figure, rows, results, config):
    """Over steps and over time, and at the end."""
    over_steps, over_time, final = figure.subplots(1, 3, width_ratios=(1, 1, 0.9))
    steps = np.linspace(0, config.steps, config.points + 1)
    for method in rows:
        logs = logarithms(results[method])
        mean, reach = logs.mean(axis=0), statistics.interval_95(logs)
        seconds = steps * results[method]["seconds_per_step"]
        for axes, places in ((over_steps, steps), (over_time, seconds)):
            axes.plot(places, 10**mean, color=COLOURS[method], label=method)
            low, high = 10 ** (mean - reach), 10 ** (mean + reach)
            axes.fill_between(places, low, high, color=COLOURS[method], alpha=0.1, lw=0)
    for axes, label in ((over_steps, "steps"), (over_time, "seconds of training, all seeds")):
        axes.set(yscale="log", xlabel=label)
        axes.spines[["top", "right"]].set_visible(False)
    over_steps.set_ylabel("mean squared error")
    over_steps.set_title("bands: 95% intervals over seeds", fontsize=10)
    over_steps.legend(frameon=False, fontsize=8)
    draw_final(final, rows)


def draw_final(axes, rows):
    for place, (method, row) in enumerate(reversed(rows.items())):
        style = {"color": COLOURS[method]}
        axes.plot(10 ** row["points"], np.full(len(row["points"]), place), ".", alpha=0.4, **style)
        ends = 10 ** (row["mean"] + np.array([-1, 1]) * row["interval_95"])
        axes.plot(ends, [place, place], lw=2, **style)
        axes.plot(10 ** row["mean"], place, "|", ms=12, mew=2, **style)
    axes.set_yticks(range(len(rows)), list(reversed(rows)))
    axes.set_xlabel("mean squared error at the end")
    if any(np.isfinite(row["points"]).any() for row in rows.values()):
        axes.set_xscale("log")
        # One and three of each power of ten: labels of all lines would overlap.
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
        axes.xaxis.set_major_formatter("{x:.0e}")
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_title("dots: seeds; lines: 95% intervals of the mean", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)


def draw_fields(figure, name, rows, results, values):
    """The solution, and the errors of sum and of the best of the others."""
    equation = EQUATIONS[name]
    exact = as_picture(name, values)
    others = [method for method in rows if method != "sum"]
    best = others[0]
    fields = {m: np.asarray(results[m]["field"], float) for m in ("sum", best)}
    errors = {m: np.maximum(np.abs(each - exact), 1e-6) for m, each in fields.items()}
    finite = np.concatenate([each[np.isfinite(each)] for each in errors.values()])
    norm = LogNorm(*np.quantile(finite, [0.02, 1])) if finite.size else None
    panels = figure.subplots(1, 4, sharex=True, sharey=True)
    across, up = (0, 1) if equation.inputs[1] == "y" else (1, 0)
    extent = [end for n in (across, up) for end in (equation.low[n], equation.high[n])]
    style = {"extent": extent, "origin": "lower", "aspect": "auto"}
    limits = {"vmin": exact.min(), "vmax": exact.max(), "cmap": "RdBu_r"}
    shown = [
        ("solution", exact, limits),
        (f"{best}, seed 0", fields[best], limits),
        *((f"error of {m}, seed 0", each, {"norm": norm}) for m, each in errors.items()),
    ]
    for axes, (title, picture, own) in zip(panels, shown, strict=True):
        picture = picture.T if across == 0 else picture
        image = axes.imshow(picture, **own, **style)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel(equation.inputs[across])
        figure.colorbar(image, ax=axes, shrink=0.9)
    panels[0].set_ylabel(equation.inputs[up])


def make_figure(name, rows, results, values, config):
    figure = Figure(figsize=(15, 9), layout="constrained", dpi=130)
    upper, lower = figure.subfigures(2, 1, squeeze=False, height_ratios=(1.2, 1))[:, 0]
    draw_errors(upper, rows, results, config)
    draw_fields(lower, name, rows, results, values)
    equation = EQUATIONS[name]
    which = "|h|" if name == "schroedinger" else equation.outputs[0]
    figure.suptitle(
        f"{equation.title}: {len(tasks_of(config, equation))} losses, {config.steps:,} steps, "
        f"{config.seeds} seeds; below: {which}"
        f"{' at z = 0 and the last time' if len(equation.inputs) > 2 else ''}"
    )
    return figure


# --- The command line


class Report:
    """Says how far the training is: a bar in a terminal, and lines on stderr elsewhere."""

    def __init__(self):
        self.terminal = Console(stderr=True)
        self.bar = Progress(
            console=self.terminal, transient=True, disable=not self.terminal.is_terminal
        )
        self.began = time.monotonic()
        self.task = self.bar.add_task("", total=None)

    def tell(self, name, method, what, done, total):
        text = f"{name}, {what} {method}"
        self.bar.update(self.task, description=text, completed=done, total=total)
        # A line now and then, and one at the end.
        if not self.terminal.is_terminal and (done == total or done % 5 == 0):
            seconds = time.monotonic() - self.began
            print(f"{text}: {done} of {total} stretches, {seconds:.0f} s", file=sys.stderr)


def of_equation(config, name):
    """The options of one equation, as they stand in its files."""
    return dataclasses.replace(config, equations=(name,))


def train_all(parser, config):
    """{equation: {method: results}}. What is finished is files, and kept."""
    files = {
        name: {method: config.out / "runs" / name / f"{method}.json" for method in config.methods}
        for name in config.equations
    }
    results = {
        name: sweep.finished_runs(parser, of_equation(config, name), each)
        for name, each in files.items()
    }
    report = Report()
    with report.bar:
        for name, method in ((n, m) for n in files for m in files[n] if m not in results[n]):
            tell = functools.partial(report.tell, name, method)
            began = time.process_time()
            found = train_method(method, name, config, tell)
            results[name][method] = found | {"cpu_seconds": time.process_time() - began}
            sweep.save_run(of_equation(config, name), files[name][method], results[name][method])
    return {
        name: {method: each[method] for method in config.methods} for name, each in results.items()
    }


def read_options(parser, argv):
    config = parse(parser, Config, argv)
    if config.steps % config.points:
        parser.error(f"argument --steps: expected a multiple of --points, got {config.steps}")
    chosen = tuple(name for name in CHOICES if name in (*ALWAYS, *config.methods))
    return dataclasses.replace(config, methods=chosen)


def as_png(figure):
    picture = io.BytesIO()
    figure.savefig(picture)
    return picture.getvalue()


def main(argv=None):
    parser = Parser("python -m benchmarks.pinn", description=(__doc__ or "").split("\n\n")[0])
    config = read_options(parser, argv)
    file = config.out / "results.json"
    pictures = [config.out / f"{name}.png" for name in config.equations]
    check_output(parser, [file, *pictures], config.overwrite)
    results = train_all(parser, config)
    rows = {name: compare(each) for name, each in results.items()}
    values = {name: pinn_equations.reference(name, config.data_dir)[1] for name in results}
    findings = {
        name: list(in_words(name, rows[name], results[name], values[name], config))
        for name in results
    }
    console = Console(highlight=False)
    console.width = max(console.width, 120)
    for name, each in results.items():
        console.print(f"\n{EQUATIONS[name].title}", style="bold")
        tasks = tasks_of(config, EQUATIONS[name])
        console.print(make_table(rows[name], each, values[name], tasks))
        console.print(*findings[name], sep="\n", soft_wrap=True)
    console.print(f"\n{LEGEND}", *over_all(rows), sep="\n", soft_wrap=True)
    text = as_json(
        config,
        equations=[
            {
                "equation": name,
                "losses": tasks_of(config, EQUATIONS[name]),
                "rows": rows[name],
                "findings": findings[name],
                # Pictures of fields stay in the files of the runs.
                "runs": {
                    method: {part: each for part, each in result.items() if part != "field"}
                    for method, result in results[name].items()
                },
            }
            for name in results
        ],
        findings=list(over_all(rows)),
    )
    drawn = [
        as_png(make_figure(name, rows[name], results[name], values[name], config))
        for name in results
    ]
    write(dict(zip((file, *pictures), (text, *drawn), strict=True)))
    console.print(f"Written: {', '.join(str(each) for each in (file, *pictures))}", soft_wrap=True)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("Interrupted: finished runs are kept, and the same command goes on.", file=sys.stderr)
        sys.exit(130)
