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
import json
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
from rich.console import Console

import optax_surgery as surgery
from benchmarks import pinn_equations
from benchmarks.common import methods, statistics, study
from benchmarks.common.command_line import (
    DATA_DIR,
    GOES_ON,
    Parser,
    as_json,
    check_output,
    parse,
    run_main,
    write,
)
from benchmarks.common.progress import Progress
from benchmarks.pinn_equations import EQUATIONS
from benchmarks.report import origin, shorten

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
    inside: Annotated[int, "points per step for the residual", 1] = 128
    boundary: Annotated[int, "points per step for the boundary condition", 1] = 32
    initial: Annotated[int, "points per step for the initial condition", 1] = 32
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
    return optax.chain(methods.METHODS[update](num_tasks), adam)


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


def measure(params, key, number, points, values, config, equation):
    """The error on the grid; losses and cosines of their gradients on points that are new."""
    found = field(params, points, config, equation)
    # Those of the next step, which have not been seen yet and are the same for all methods.
    new = sample(config, equation, jax.random.fold_in(key, number))
    losses, grads = surgery.task_value_and_grad(functools.partial(losses_of, config, equation))(
        params, new
    )
    return {
        "mse": jnp.mean((found - values) ** 2),
        "losses": jnp.stack(jax.tree.leaves(losses)),
        "cosines": surgery.cosine_similarities(surgery.gramian(grads)),
    }


def field(params, points, config, equation):
    network = make_network(config, equation)
    return jax.vmap(lambda point: network.apply(params, point))(points)


# --- All networks of a method


@functools.cache
def make_program(name, update, config):
    """What starts and what trains several networks at once."""
    known = {"config": config, "equation": EQUATIONS[name], "update": update}
    starts = jax.vmap(functools.partial(start, **known))
    trains = jax.vmap(functools.partial(train_stretch, **known), (0, 0, None))
    return jax.jit(starts), jax.jit(trains)


@functools.cache
def make_measure(name, config):
    """What measures several networks at once, of whatever method."""
    fn = functools.partial(measure, config=config, equation=EQUATIONS[name])
    return jax.jit(jax.vmap(fn, (0, 0, None, None, None)))


def of_program(config):
    """The options that shape a program, so that others do not compile it again."""
    kept = ("losses", "inside", "boundary", "initial", "width", "depth")
    return Config(**{name: getattr(config, name) for name in kept})


def train_lanes(lanes, name, update, config, stretches, tell):
    """Trains all lanes. Returns them, what was seen (lanes, points), and the seconds per step."""
    starts, trains = make_program(name, update, of_program(config))
    solution = pinn_equations.reference(name, config.data_dir)
    measures = make_measure(name, of_program(config))
    length = config.steps // config.points
    runs = starts(lanes)
    seen, seconds = [measures(runs.params, runs.key, 0, *solution)], []
    for stretch in range(stretches):
        first = stretch * length
        began = time.process_time()
        runs = jax.block_until_ready(trains(runs, lanes, first + jnp.arange(length)))
        seconds.append((time.process_time() - began) / length)
        found = measures(runs.params, runs.key, first + length, *solution)
        seen.append(jax.block_until_ready(found))
        tell()
    # The first stretch may have been compiled first.
    return runs, jax.tree.map(lambda *x: np.stack(x, axis=1), *seen), np.median(seconds[1:])


def candidates(method, tasks, config):
    """(candidates, T) weights of the losses to choose from: ones, but for `linear`."""
    choices = config.condition_weights if method == "linear" else (1.0,)
    residual = np.array([task == "residual" for task in tasks])
    return np.array([np.where(residual, 1, weight) for weight in choices], np.float32)


def tuning_stretches(config):
    return max(2, -(-config.points // TUNING_SHARE))


def stretches_of(method, name, config):
    """How many stretches of training a method takes, with its tuning."""
    settings = len(candidates(method, tasks_of(config, EQUATIONS[name]), config))
    tuned = settings * len(config.learning_rates) > 1
    return config.points + tuned * settings * tuning_stretches(config)


def tune(method, name, update, config, tell):
    """Minus the logarithms of the errors, (candidates, rates, seeds), after a part of the steps."""
    rates = np.array(config.learning_rates, np.float32)
    # About as many networks as are trained in the end: then the program is the same.
    shape = len(rates), max(1, config.seeds // len(rates))
    rate, seed = (each.ravel() for each in np.indices(shape))
    stretches = tuning_stretches(config)
    steps = np.full(len(seed), stretches * (config.steps // config.points))
    scores = []
    for weights in candidates(method, tasks_of(config, EQUATIONS[name]), config):
        each = np.tile(weights, (len(seed), 1))
        lanes = Lane(TUNING_SEED + seed, rates[rate], each, steps)
        _, seen, _ = train_lanes(lanes, name, update, config, stretches, tell)
        scores.append(-np.log10(seen["mse"][:, -1]).reshape(shape))
    return np.array(scores)


def train_method(method, name, config, progress):
    """Tunes a method and trains all its seeds. Returns what goes into the file of the run."""
    equation = EQUATIONS[name]
    # `linear` differs in the weights of the losses only.
    update = "sum" if method == "linear" else method
    weightings = candidates(method, tasks_of(config, equation), config)
    rates = np.array(config.learning_rates, np.float32)
    scores, weighting, rate = None, 0, 0
    if len(weightings) * len(rates) > 1:
        progress.describe(f"{name}, tuning {method}")
        scores = tune(method, name, update, config, progress.advance)
        weighting, rate = study.best(scores)
    several = np.ones(config.seeds, np.float32)
    lanes = Lane(
        np.arange(config.seeds),
        several * rates[rate],
        np.outer(several, weightings[weighting]),
        np.full(config.seeds, config.steps),
    )
    progress.describe(f"{name}, training {method}")
    runs, seen, seconds = train_lanes(lanes, name, update, config, config.points, progress.advance)
    points, _ = pinn_equations.reference(name, config.data_dir)
    shown = field(jax.tree.map(lambda each: each[0], runs.params), points, config, equation)
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


def headings(tasks):
    losses = (f"loss:\n{task}" for task in tasks)
    against = (f"against\n{baseline}" for baseline in ALWAYS)
    errors = ("mean squared\nerror", "relative\nL2, %")
    return ("method", *errors, *against, "rate", *losses, "ms per\nstep")


def cells(method, row, result, values):
    """A row of the table."""
    losses = 10 ** np.mean(np.log10(np.asarray(result["losses"], float)[:, -1]), axis=0)
    error = f"{10 ** row['mean']:.2e} x/ {10 ** row['interval_95']:.2f}"
    relative = f"{100 * relative_error(10 ** row['mean'], values):.2f}"
    if row["diverged"]:
        error, relative = f"{row['diverged']} of {len(row['points'])} diverged", ""
    return (
        method,
        error,
        relative,
        *(verdict(row["against"].get(baseline)) for baseline in ALWAYS),
        f"{result['learning_rate']:g}",
        *(f"{each:.1e}" if np.isfinite(each) else "" for each in losses),
        f"{1000 * result['seconds_per_step']:.1f}",
    )


def make_table(rows, results, values, tasks):
    table = study.make_table(*headings(tasks))
    for method, row in rows.items():
        table.add_row(*cells(method, row, results[method], values))
    return table


def table_in_markdown(rows, results, values, tasks):
    heads = [heading.replace("\n", " ") for heading in headings(tasks)]
    lines = [f"| {' | '.join(heads)} |", "|---" + "|---:" * (len(heads) - 1) + "|"]
    for method, row in rows.items():
        name, *others = cells(method, row, results[method], values)
        lines.append(f"| `{name}` | {' | '.join(each or '-' for each in others)} |")
    return "\n".join(lines)


LEGEND = """\
Mean squared error against the solution, over all outputs on a grid: the geometric mean over seeds
and, after x/, the factor of its 95% interval to either side. Relative L2: the same as a share of
the solution's norm. Against sum and linear: the factor between errors, where a paired t-test of
their logarithms finds one, with Holm's correction for the number of methods; else an equals sign.
Loss: on new points at the end, without weights. Ms per step: processor time of all seeds together,
measured here."""


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
        edge = [m for m, each in some.items() if study.at_the_edge(grid, [each[setting]])]
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
    for axes, label in ((over_steps, "steps"), (over_time, "processor seconds, all seeds")):
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
        # One and, in a narrow range, three of each power of ten: labels of all would overlap.
        low, high = axes.get_xlim()
        subs = (1.0, 3.0) if high < 1e3 * low else (1.0,)
        axes.xaxis.set_major_locator(LogLocator(subs=subs, numticks=8))
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
    figure = Figure(figsize=(15, 9), layout="constrained", dpi=100)
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
        name: study.finished_runs(parser, of_equation(config, name), each)
        for name, each in files.items()
    }
    left = [
        (name, method) for name in files for method in files[name] if method not in results[name]
    ]
    with Progress(sum(stretches_of(method, name, config) for name, method in left)) as progress:
        for name, method in left:
            began = time.process_time()
            found = train_method(method, name, config, progress)
            results[name][method] = found | {"cpu_seconds": time.process_time() - began}
            study.save_run(of_equation(config, name), files[name][method], results[name][method])
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


def budget_of(config):
    rates = " ".join(f"{rate:g}" for rate in config.learning_rates)
    weights = " ".join(f"{weight:g}" for weight in config.condition_weights)
    return (
        f"{config.seeds} seeds, {config.steps:,} steps, {config.inside} points inside, "
        f"{config.boundary} on the boundary, {config.initial} at the start, {config.depth} hidden "
        f"layers of {config.width}, rates {rates}, weights of `linear` {weights}"
    )


def in_markdown(config, results, rows, values, findings):
    """What the documentation shows."""
    parts = [LEGEND, f"{budget_of(config)}; {seconds_of(results) / 60:.0f} core minutes."]
    for name, each in results.items():
        tasks = tasks_of(config, EQUATIONS[name])
        parts += [
            f"### {EQUATIONS[name].title}",
            table_in_markdown(rows[name], each, values[name], tasks),
            "\n".join(f"- {finding}" for finding in findings[name]),
        ]
    return "\n\n".join([*parts, *over_all(rows)]) + "\n"


KEPT = ("learning_rate", "condition_weight", "seconds_per_step", "cpu_seconds")  # of a run


def seconds_of(results):
    return sum(result["cpu_seconds"] for each in results.values() for result in each.values())


def summarise(config, results, rows, findings):
    """What is kept under version control: errors and settings, without curves of single seeds."""
    equations = [
        {
            "equation": name,
            "losses": tasks_of(config, EQUATIONS[name]),
            "methods": {
                method: {
                    "errors": 10 ** row["points"],
                    "against": row["against"],
                    "error_over_steps": 10 ** logarithms(results[name][method]).mean(axis=0),
                    **{part: results[name][method][part] for part in KEPT},
                }
                for method, row in rows[name].items()
            },
            "findings": findings[name],
        }
        for name in results
    ]
    found = {
        "behaviour": methods.behaviour(config.methods),
        "equations": equations,
        "findings": list(over_all(rows)),
    }
    # Folders are of one machine, and change no figure.
    config = dataclasses.replace(config, data_dir=Config.data_dir, out=Config.out, overwrite=False)
    content = json.loads(as_json(config, **found))
    kept = {part: shorten(content[part]) for part in ("equations", "findings")}
    return json.dumps(origin("pinn", content) | kept).encode()


def main(argv=None):
    parser = Parser("python -m benchmarks.pinn", description=(__doc__ or "").split("\n\n")[0])
    config = read_options(parser, argv)
    pictures = [config.out / f"{name}.png" for name in config.equations]
    files = [config.out / name for name in ("results.json", "summary.json", "results.md")]
    check_output(parser, [*files, *pictures], config.overwrite)
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
    console.print(f"\n{LEGEND}\n", *over_all(rows), sep="\n", soft_wrap=True)
    texts = [
        # Pictures of fields stay in the files of the runs.
        as_json(config, equations=without_fields(results)),
        summarise(config, results, rows, findings),
        in_markdown(config, results, rows, values, findings).encode(),
    ]
    drawn = [
        as_png(make_figure(name, rows[name], results[name], values[name], config))
        for name in results
    ]
    write(dict(zip((*files, *pictures), (*texts, *drawn), strict=True)))
    console.print(f"Written: {', '.join(map(str, (*files, *pictures)))}", soft_wrap=True)


def without_fields(results):
    """{equation: {method: what was measured}}."""
    return {
        name: {
            method: {part: each for part, each in result.items() if part != "field"}
            for method, result in runs.items()
        }
        for name, runs in results.items()
    }


if __name__ == "__main__":
    run_main(main, GOES_ON)
