"""Where does each method end on the two landscapes of the papers?

A point moves on a landscape of two parameters and two losses. PCGrad's Figure 1 has two valleys
that meet far away; the landscape that CAGrad, Nash-MTL, Aligned-MTL and FAMO share has a Pareto set
that one can draw. Both are as in the authors' code: losses, starts, steps, and Adam with a learning
rate of 0.001; here in float64. The table says where each run ended, and which trade-off that is.
Run `python -m benchmarks.toy`.

What does not apply to two tasks without noise is left out: `krum`, `trimmed_mean`,
`coordinate_median` and `geometric_median` need three tasks, `pivrg` needs scores of networks, and
`mean` and `constant` are `sum` to Adam. `modo` and `sdmgrad` get the Gramian of one batch, as two
would be the same. By default Figure 1, with its 500,000 steps, leaves out the methods whose convex
problem takes 0.1 ms and more a step; `--figure-1-methods` has them too.
"""

import concurrent.futures
import dataclasses
import functools
import io
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from scipy import optimize

import optax_surgery as surgery
from benchmarks.common.command_line import Parser, as_json, check_output, parse, run_main, write
from benchmarks.common.progress import Progress
from optax_surgery import plotting

LEARNING_RATE = 1e-3
RECORD_EVERY = 200  # steps; it divides the published numbers of steps
LOWEST = 5e-6  # argument of a logarithm

METHODS = {
    "sum": surgery.sum,
    "pcgrad": surgery.pcgrad,
    "gradvac": lambda: surgery.gradvac(2),
    "graddrop": surgery.graddrop,
    "mgda": surgery.mgda,
    "cagrad": lambda: surgery.cagrad(0.5, rescale="1+c"),  # as its paper's toy has it
    "imtl_g": surgery.imtl_g,
    "imtl": lambda: surgery.imtl(2),
    "nash_mtl": surgery.nash_mtl,
    "fairgrad": surgery.fairgrad,
    "aligned_mtl": surgery.aligned_mtl,
    "upgrad": surgery.upgrad,
    "dualproj": surgery.dualproj,
    "conflict_free": surgery.conflict_free,
    "momentum_conflict_free": lambda: surgery.momentum_conflict_free(2),
    "cr_mogm": lambda: surgery.cr_mogm(surgery.conflict_free(), 2),
    "gradops": surgery.gradops,
    "ntkmtl": surgery.ntkmtl,
    "pcd": lambda: surgery.pcd(0, 2),
    "moco": lambda: surgery.moco(2),
    "modo": lambda: surgery.modo(2),
    "sdmgrad": lambda: surgery.sdmgrad(2),
    "db_mtl": lambda: surgery.db_mtl(2),
    "excess_mtl": lambda: surgery.excess_mtl(2),
    "famo": lambda: surgery.famo(2, decay=0.0),
    "gradnorm": lambda: surgery.gradnorm(2),
    "uncertainty_weighting": lambda: surgery.uncertainty_weighting(2),
    "imtl_l": lambda: surgery.imtl_l(2),
    "dwa": lambda: surgery.dwa(2, window=1000),
    "go4align": lambda: surgery.go4align(2, num_groups=2),
    "random_weighting": surgery.random_weighting,
    "gls": surgery.gls,
    "scale_invariant": surgery.scale_invariant,
    "stch": surgery.stch,
    "cosmos": lambda: surgery.cosmos(1.0),
    "pbi": surgery.pbi,
}
NEED_GRAMIAN = ("modo", "sdmgrad")
SLOW = ("mgda", "cagrad", "nash_mtl", "fairgrad", "upgrad", "dualproj", "pcd")
# Those of the papers' own figures, in the picture of the Pareto front.
MARKERS = {
    "sum": ("v", "#000000"),
    "pcgrad": ("s", "#D55E00"),
    "mgda": ("^", "#56B4E9"),
    "cagrad": ("D", "#CC79A7"),
    "imtl_g": ("P", "#E69F00"),
    "nash_mtl": ("X", "#0072B2"),
    "aligned_mtl": ("o", "#009E73"),
    "famo": ("*", "#7F3C8D"),
}


# --- The landscapes


def clamp(values, least):
    """As `torch.clamp` does, it passes the gradient on where a value is the least one.

    At x2 = 0 both switches of the shared landscape are; with `jax.nn.relu`, whose gradient is zero
    there, the start (0, 0) would never be left.
    """
    return jnp.where(values >= least, values, least)


def log_valley(values):
    return jnp.log(clamp(jnp.abs(values), LOWEST))


def two_valleys(params):
    x1, x2 = params
    return jnp.stack(
        [
            20 * log_valley(0.5 * x1 + jnp.tanh(x2)),
            25 * log_valley(0.5 * x1 - jnp.tanh(x2) + 2),
        ]
    )


def shared_losses(params):
    """Logarithmic valleys above x2 = 0, two bowls below."""
    x1, x2 = params
    valleys = jnp.stack(
        [
            log_valley(0.5 * (-x1 - 7) - jnp.tanh(-x2)) + 6,
            log_valley(0.5 * (-x1 + 3) + jnp.tanh(-x2) + 2) + 6,
        ]
    )
    bowls = ((x1 - jnp.array([7.0, -7.0])) ** 2 + 0.1 * (x2 + 8) ** 2) / 10 - 20
    above, below = clamp(jnp.tanh(0.5 * x2), 0), clamp(jnp.tanh(-0.5 * x2), 0)
    return above * valleys + below * bowls


def shared_pareto_set():
    """(K, 2) the points where a convex combination of both gradients vanishes.

    In x1 it vanishes for the weight (x1 + 7) / 14 of task 1. With it both bowls add up to the one
    below; where its product with the switch is flat in x2, so is the combination.
    """

    def slope(x2, x1):
        switch = np.tanh(-0.5 * x2)
        bowl = (49 - x1**2 + 0.1 * (x2 + 8) ** 2) / 10 - 20
        return -0.5 * (1 - switch**2) * bowl + switch * 0.02 * (x2 + 8)

    x1 = np.linspace(-7, 7, 1401)
    x2 = np.array([optimize.brentq(slope, -9, -8, args=(each,)) for each in x1], float)
    return np.stack([x1, x2], axis=1)


@dataclasses.dataclass(frozen=True, eq=False)
class Landscape:
    """Two losses of two parameters.

    Attributes:
      losses: (2,) parameters -> (2,) losses.
      goal: (K, 2) the points that training should reach.
      goal_name: what it is called.
      along: the parameter that tells its points apart.
      lower_bounds: (2,) of the losses.
      window: x1 from and to, x2 from and to, in pictures.
    """

    losses: Callable[[jax.Array], jax.Array]
    goal: np.ndarray
    goal_name: str
    along: int
    lower_bounds: np.ndarray
    window: tuple[float, float, float, float]


# The valleys meet at infinity. From x2 = 2.5 on they are less apart than Adam oscillates.
VALLEYS = Landscape(
    two_valleys,
    goal=np.stack([np.full(1201, -2.0), np.linspace(2.5, 14.5, 1201)], axis=1),
    goal_name="joint valley",
    along=1,
    lower_bounds=np.array([20, 25]) * np.log(LOWEST) - 1,
    window=(-5, 3, -4, 9),
)
SHARED = Landscape(
    shared_losses,
    goal=shared_pareto_set(),
    goal_name="Pareto set",
    along=0,
    lower_bounds=np.array([-21.0, -21.0]),  # FAMO's
    window=(-10, 10, -10, 10),
)


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a paper trained: its losses are `scales` times those of the landscape."""

    title: str
    landscape: Landscape
    scales: tuple[float, float]
    starts: tuple[tuple[float, float], ...]
    steps: int

    def optimum(self):
        """The point of the shared Pareto set at which the sum of the scaled losses is least."""
        first, second = self.scales
        x1 = 7 * (first - second) / (first + second)
        return self.landscape.goal[np.argmin(np.abs(self.landscape.goal[:, 0] - x1))]


FIVE_STARTS = ((-8.5, 7.5), (0.0, 0.0), (9.0, 9.0), (-7.5, -0.5), (9.0, -1.0))
SETTINGS = {
    "pcgrad": Setting("PCGrad, Figure 1", VALLEYS, (1.0, 1.0), ((0.5, -3.0),), 500_000),
    "cagrad": Setting(
        "CAGrad", SHARED, (1.0, 1.0), ((-8.5, 7.5), (-8.5, -5.0), (9.0, 9.0)), 100_000
    ),
    "nash_mtl": Setting("Nash-MTL", SHARED, (0.1, 1.0), FIVE_STARTS, 35_000),
    "aligned_mtl": Setting("Aligned-MTL", SHARED, (0.5, 0.5), FIVE_STARTS, 35_000),
    "famo": Setting("FAMO", SHARED, (0.1, 1.0), FIVE_STARTS, 50_000),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """The options, each with its help and what it may be: one of some names, or a least number."""

    settings: Annotated[tuple, "the papers' settings to run", tuple(SETTINGS)] = tuple(SETTINGS)
    methods: Annotated[tuple, "what runs on the shared landscape", tuple(METHODS)] = tuple(METHODS)
    figure_1_methods: Annotated[tuple, "what runs in PCGrad's Figure 1", tuple(METHODS)] = tuple(
        method for method in METHODS if method not in SLOW
    )
    length: Annotated[float, "number of steps, relative to the published one", 1e-9] = 1.0
    out: Annotated[Path, "folder for the results", None] = Path("results/toy")
    overwrite: Annotated[bool, "replace the results of an earlier run", None] = False


# --- Training


@functools.partial(jax.jit, static_argnums=(0, 1, 4, 5))
def train(landscape, method, scales, starts, num_points, stride):
    """Runs of a method, one a start: (R, 2) scales, (R, 2) starts -> (R, num_points + 1, 2).

    Of each path the start is kept, and one point in `stride` steps.
    """

    def run(scales, start):
        tx = optax.chain(METHODS[method](), optax.adam(LEARNING_RATE))
        task_value_and_grad = surgery.task_value_and_grad(
            lambda params: scales * landscape.losses(params)
        )

        def step(carry, _):
            params, state = carry
            losses, task_grads = task_value_and_grad(params)
            # Above their bounds, as FAMO's authors do: methods take logarithms of losses.
            extra_args = {"losses": losses - scales * landscape.lower_bounds}
            if method in NEED_GRAMIAN:
                extra_args["gramian"] = surgery.gramian(task_grads)
            updates, state = tx.update(task_grads, state, params, **extra_args)
            return (optax.apply_updates(params, updates), state), None

        def record(carry, _) -> tuple[Any, Any]:
            carry, _ = lax.scan(step, carry, length=stride)
            return carry, carry[0]

        _, path = lax.scan(record, (start, tx.init(start)), length=num_points)
        return jnp.concatenate([start[None], path])

    return jax.vmap(run)(scales, starts)


class Job(NamedTuple):
    """A method on a landscape, in all settings of it at once: they only differ in numbers."""

    landscape: Landscape
    method: str
    settings: tuple[str, ...]


def jobs_of(config):
    for landscape in (VALLEYS, SHARED):
        methods = config.figure_1_methods if landscape is VALLEYS else config.methods
        settings = tuple(s for s in config.settings if SETTINGS[s].landscape is landscape)
        yield from (Job(landscape, method, settings) for method in methods if settings)


def run_job(job, length):
    """(setting, method) -> paths (R, S, 2), with float64 whatever the caller's precision.

    All runs go on to the end of the longest setting; each setting is read at its own.
    """
    settings = [SETTINGS[name] for name in job.settings]
    scales = np.concatenate([np.tile(each.scales, (len(each.starts), 1)) for each in settings])
    starts = np.concatenate([each.starts for each in settings])
    stride = max(1, round(length * RECORD_EVERY))
    num_points = [each.steps // RECORD_EVERY for each in settings]
    with jax.enable_x64(True):
        arguments = job.landscape, job.method, jnp.asarray(scales), jnp.asarray(starts)
        program = train.lower(*arguments, max(num_points), stride).compile()
        began = time.perf_counter()
        paths = np.asarray(program(*arguments[2:]))
    seconds = (time.perf_counter() - began) / (max(num_points) * stride)
    ends = np.cumsum([len(each.starts) for each in settings])[:-1]
    found = zip(job.settings, np.split(paths, ends), num_points, strict=True)
    return {(name, job.method): path[:, : end + 1] for name, path, end in found}, seconds


# --- What came of it


class Outcome(NamedTuple):
    """Where the runs of a method in a setting ended. Arrays are by start.

    Attributes:
      ends: (R, 2) parameters.
      losses: (R, 2) scaled losses there.
      distances: (R,) from the goal.
      arrived: (R,) whether that is within TOLERANCE.
      moving: (R,) whether in the last steps it went at least the share STANDSTILL of the way that
        Adam can.
      verdict: in words, over all starts.
    """

    ends: np.ndarray
    losses: np.ndarray
    distances: np.ndarray
    arrived: np.ndarray
    moving: np.ndarray
    verdict: str

    @property
    def stalled(self):
        return ~self.arrived & ~self.moving


TOLERANCE = 0.1  # Adam oscillates about the valleys
# In the valleys the sum of the losses creeps at 0.02 and never leaves them; CAGrad, at 0.026, does.
STANDSTILL = 0.022


def judge(name, paths, steps):
    setting = SETTINGS[name]
    landscape, ends, num_points = setting.landscape, paths[:, -1], paths.shape[1]
    differences = ends[:, None] - landscape.goal
    distances = np.linalg.norm(differences, axis=2).min(axis=1)
    # Positions are means over a twentieth of the path, as single points oscillate.
    few = max(1, num_points // 20)
    before, last = paths[:, -2 * few : -few], paths[:, -few:]
    travelled = np.linalg.norm(last.mean(axis=1) - before.mean(axis=1), axis=1)
    reach = LEARNING_RATE * steps * few / num_points
    arrived, moving = distances < TOLERANCE, travelled >= STANDSTILL * reach
    losses = np.asarray(setting.scales) * np.asarray(jax.vmap(landscape.losses)(ends))
    verdict = in_a_word(setting, ends, arrived, moving)
    return Outcome(ends, losses, distances, arrived, moving, verdict)


def in_a_word(setting, ends, arrived, moving):
    if setting.landscape is VALLEYS:
        return "arrives" if arrived.all() else "does not arrive"
    if not arrived.all():
        return f"{arrived.sum()} of {len(arrived)} arrive"
    if np.all(np.abs(ends[:, 0] - setting.optimum()[0]) < TOLERANCE):
        return "weighted optimum"
    if moving.any():
        return "all arrive, not all at rest"
    return "depends on the start" if np.ptp(ends[:, 0]) > 2 * TOLERANCE else "one trade-off"


def stalls_somewhere(setting, found):
    return found.stalled.any()


def arrives(setting, found):
    return found.arrived.all()


def ends_where_the_start_decides(setting, found):
    """Some may still be on their way; of those that arrived, no two need to agree."""
    arrived = found.ends[found.arrived, 0]
    return not found.stalled.any() and len(arrived) > 1 and np.ptp(arrived) > 2 * TOLERANCE


def reaches_the_weighted_optimum(setting, found):
    return found.verdict == "weighted optimum"


def is_balanced(setting, found):
    """Nearer to the even trade-off than to the least weighted sum, which favours one task."""
    x1 = found.ends[:, 0]
    return found.arrived.all() and np.all(np.abs(x1) < np.abs(x1 - setting.optimum()[0]))


# What the papers report of their own methods and of those they compare with.
REPORTED = (
    ("pcgrad", "sum", stalls_somewhere),
    ("pcgrad", "pcgrad", arrives),
    ("cagrad", "sum", stalls_somewhere),
    ("cagrad", "mgda", ends_where_the_start_decides),
    ("cagrad", "pcgrad", ends_where_the_start_decides),
    ("cagrad", "cagrad", reaches_the_weighted_optimum),
    ("nash_mtl", "sum", stalls_somewhere),
    ("nash_mtl", "mgda", ends_where_the_start_decides),
    ("nash_mtl", "pcgrad", ends_where_the_start_decides),
    ("nash_mtl", "imtl_g", ends_where_the_start_decides),
    ("nash_mtl", "nash_mtl", ends_where_the_start_decides),
    ("aligned_mtl", "sum", stalls_somewhere),
    ("aligned_mtl", "aligned_mtl", reaches_the_weighted_optimum),
    ("famo", "sum", stalls_somewhere),
    ("famo", "famo", is_balanced),
)


def in_words(outcomes):
    for name, method, report in REPORTED:
        if found := outcomes.get((name, method)):
            setting = SETTINGS[name]
            answer = "so it is here" if report(setting, found) else "not so here"
            places = ", ".join(place(setting, found, run) for run in range(len(found.ends)))
            words = report.__name__.replace("_", " ")
            yield f"{setting.title}: {method} {words}: {answer} ({places})."


def place(setting, outcome, run):
    """Along the goal if it was reached, else in brackets; with an arrow if it still moved."""
    end = outcome.ends[run]
    if not np.isfinite(end).all():
        return "diverged"
    arrow = " →" if outcome.moving[run] else ""
    if outcome.arrived[run]:
        return f"{round(end[setting.landscape.along], 2) + 0.0:.2f}{arrow}"  # not -0.00
    return f"[{end[0]:.1f}, {end[1]:.1f}]{arrow}"


def heading(name, steps):
    setting = SETTINGS[name]
    first, second = setting.scales
    return f"{setting.title}: {first:g} L1, {second:g} L2, {steps[name]:,} steps of Adam"


def make_table(name, outcomes):
    setting = SETTINGS[name]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("method", no_wrap=True)
    for x1, x2 in setting.starts:
        table.add_column(f"from\n({x1:g}, {x2:g})", justify="right", no_wrap=True)
    table.add_column("so", no_wrap=True)
    for (of, method), outcome in outcomes.items():
        if of == name:
            cells = (place(setting, outcome, run) for run in range(len(setting.starts)))
            table.add_row(method, *map(escape, cells), outcome.verdict)
    return table


LEGEND = """\
A number is the trade-off, the x1 of the point of the Pareto set that was reached: 7 is best for
task 1, -7 for task 2, and 0 even; the weighted sum is least at 0, with 0.1 L1 at -5.73. In Figure 1
it is x2, how far up the joint valley. [x1, x2]: it did not arrive. →: it moved to the end, at more
than 2.2% of the pace that Adam can have; without an arrow it stood still.
"""

SHORTENED = "Shortened runs say nothing about what the papers report."


def make_grid(name, paths, outcomes, steps):
    """A panel a method: how it went from every start."""
    setting = SETTINGS[name]
    landscape, methods = setting.landscape, [method for of, method in paths if of == name]
    columns = min(6, len(methods))
    rows = -(-len(methods) // columns)
    size = (2.5 * columns + 0.6, 2.4 * rows + 1)
    figure = Figure(figsize=size, layout="constrained", dpi=100)
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    x1, x2 = np.linspace(*landscape.window[:2], 120), np.linspace(*landscape.window[2:], 120)
    points = np.stack(np.meshgrid(x1, x2), axis=-1)
    losses = np.asarray(jax.vmap(jax.vmap(landscape.losses))(jnp.asarray(points))) * setting.scales
    surface = x1, x2, losses.sum(axis=-1)
    for axes, method in zip(grid.flat, methods, strict=False):
        shown = {"surface": surface, "pareto_set": landscape.goal}
        plotting.trajectories(paths[name, method], **shown, ax=axes)
        axes.get_legend().remove()
        if landscape is SHARED:
            axes.plot(*setting.optimum(), "*", color="white", mec="black", ms=10, mew=0.8)
        axes.set_title(f"{method}\n{outcomes[name, method].verdict}", fontsize=9)
        axes.set(xlim=landscape.window[:2], ylim=landscape.window[2:])
    for axes in grid.flat[len(methods) :]:
        axes.set_visible(False)
    star = "; white star: where the weighted sum is least" if landscape is SHARED else ""
    figure.suptitle(
        f"{heading(name, steps)}.\nHollow: starts; filled: ends; "
        f"grey bar: {landscape.goal_name}{star}",
        fontsize=11,
    )
    figure.supxlabel("x1")
    figure.supylabel("x2")
    return figure


def make_front(outcomes):
    """The end points in the plane of the losses, for each setting of the shared landscape."""
    names = [name for name in SETTINGS if any(of == name for of, _ in outcomes)]
    names = [name for name in names if SETTINGS[name].landscape is SHARED]
    figure = Figure(figsize=(4.2 * len(names), 4.8), layout="constrained", dpi=120)
    panels = np.ravel(figure.subplots(1, len(names)))
    for axes, name in zip(panels, names, strict=True):
        setting = SETTINGS[name]
        of_methods = {method: found for (of, method), found in outcomes.items() if of == name}
        others = [found.losses for method, found in of_methods.items() if method not in MARKERS]
        front = np.asarray(jax.vmap(SHARED.losses)(jnp.asarray(SHARED.goal))) * setting.scales
        plotting.pareto_front(
            np.concatenate([np.empty((0, 2)), *others]),
            front=front,
            ax=axes,
            label="other methods",
            color="0.72",
            ms=4,
        )
        for method, (marker, colour) in MARKERS.items():
            if method in of_methods:
                style = {
                    "ls": "none",
                    "ms": 11 if marker == "*" else 8,
                    "mec": "white",
                    "mew": 0.6,
                    "clip_on": False,
                }
                points = of_methods[method].losses.T
                axes.plot(*points, marker=marker, color=colour, label=method, **style)
        axes.get_legend().remove()
        axes.set_title(f"{setting.title}: {setting.scales[0]:g} L1, {setting.scales[1]:g} L2")
        axes.set(xlabel="first loss", ylabel="second loss")
    handles, labels = panels[-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False)
    return figure


def as_png(figure):
    picture = io.BytesIO()
    figure.savefig(picture)
    return picture.getvalue()


# --- The command line


def main(argv=None):
    parser = Parser("python -m benchmarks.toy", description=__doc__)
    config = parse(parser, Config, argv)
    on_shared = [name for name in config.settings if SETTINGS[name].landscape is SHARED]
    pictures = [*config.settings, *(["front"] if on_shared else [])]
    files = config.out / "results.json", *(config.out / f"{name}.png" for name in pictures)
    check_output(parser, files, config.overwrite)
    jobs = list(jobs_of(config))
    paths, seconds = {}, {}
    with (
        Progress(len(jobs), "Training") as progress,
        concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as threads,
    ):
        found = threads.map(lambda job: run_job(job, config.length), jobs)
        for job, (found_paths, per_step) in zip(jobs, found, strict=True):
            paths |= found_paths
            seconds[job] = per_step
            progress.advance()

    paths = {run: paths[run] for name in config.settings for run in paths if run[0] == name}
    stride = max(1, round(config.length * RECORD_EVERY))
    steps = {name: SETTINGS[name].steps // RECORD_EVERY * stride for name in config.settings}
    outcomes = {(name, m): judge(name, path, steps[name]) for (name, m), path in paths.items()}
    findings = list(in_words(outcomes)) if config.length >= 1 else [SHORTENED]
    console = Console(highlight=False)
    console.width = max(console.width, 130)
    for name in config.settings:
        console.print(heading(name, steps), make_table(name, outcomes), sep="\n")
    console.print(LEGEND, *findings, sep="\n", markup=False, soft_wrap=True)

    runs = [
        {
            "setting": name,
            "method": method,
            "steps": steps[name],
            **outcome._asdict(),
            "stalled": outcome.stalled,
        }
        for (name, method), outcome in outcomes.items()
    ]
    timing = [
        {"settings": job.settings, "method": job.method, "microseconds_per_step": 1e6 * per_step}
        for job, per_step in seconds.items()
    ]
    text = as_json(config, findings=findings, runs=runs, timing=timing)
    drawn = [as_png(make_grid(name, paths, outcomes, steps)) for name in config.settings]
    drawn += [as_png(make_front(outcomes))] if on_shared else []
    write(dict(zip(files, (text, *drawn), strict=True)))
    console.print(f"\nWritten: {files[0]} and {len(drawn)} pictures beside it")


if __name__ == "__main__":
    run_main(main)
