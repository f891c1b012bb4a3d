"""Eleven properties of molecules whose losses differ by five orders of magnitude: what helps?

A SchNet-like network reads real molecules of QM9 and predicts eleven properties from one shared
representation. The losses are squared errors in the usual units (debye, bohr³, eV, bohr², cal/mol
K; energies of atomisation), so that the spatial extent R2 outweighs all others in a sum: this is
where methods that balance tasks should pay. `linear`, the sum with tuned weights, starts from the
losses over the variance of their target. It is the baseline to beat. With `--standardise` every
method gets those losses, as in the literature's code. Single-task networks show what sharing costs.
Run `python -m benchmarks.qm9`; the data is in a package: `pip install --no-deps qm9pack==1.0.3`.

By default this is a study with a small budget: a subset of the molecules, hydrogens counted at
their heavy atoms, a small network and a few hundred steps. The published protocol is 300 epochs of
all molecules with all atoms, standardised losses, batches of 120, and Adam at 1e-3, multiplied by
0.7 (down to 1e-5) when validation has not improved for 5 epochs. On an accelerator:

    python -m benchmarks.qm9 --standardise --atoms all --train-size 110831 --held-out-size 10000 \\
        --width 64 --interactions 3 --batch-size 120 --steps 277200 --points 300 \\
        --schedule plateau --learning-rates 1e-3 --weightings 1 --seeds 3 --out results/qm9_full

The network differs from the published one (an NNConv with a GRU and Set2Set, with bonds as inputs).
So does the split, which the published code draws anew for each seed; ours is always the same.
"""

import dataclasses
import functools
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
from benchmarks import qm9_data
from benchmarks.common import agreement, methods, statistics, study
from benchmarks.common.command_line import GOES_ON, Parser, check_output, parse, run_main
from optax_surgery.flax import SurgeryTrainState

TASKS = tuple(qm9_data.TARGETS)
# Errors are reported in these units: in meV instead of eV, as in the literature.
UNITS = [unit.replace("eV", "meV") for *_, unit in qm9_data.TARGETS.values()]
REPORTED = np.array([1000.0 if unit == "meV" else 1.0 for unit in UNITS])

# Δm in % of the published code, and mean rank and Δm when it is trained for longer (batch 60,
# patience 10). From NTKMTL (NeurIPS 2025, arXiv 2510.18258), which collects them.
PUBLISHED = {
    "sum": (177.6, 9.82, 179.8),
    "scale_invariant": (77.8, 5.27, 39.7),
    "random_weighting": (203.8, 12.09, 222.6),
    "dwa": (175.3, 8.73, 173.0),
    "uncertainty_weighting": (108.0, 8.27, 58.4),
    "mgda": (120.5, 8.36, 101.4),
    "pcgrad": (125.7, 7.91, 118.6),
    "cagrad": (112.8, 8.27, 102.4),
    "nash_mtl": (62.0, 6.91, 72.9),
    "famo": (58.5, 5.91, 38.9),
    "fairgrad": (57.9, 6.64, 57.0),
    "go4align": (52.7, 6.64, 40.5),
    "ntkmtl": (None, 5.91, 56.7),
}
ALWAYS = ("single", "sum", "linear")  # what everything else is measured by
CHOICES = (*ALWAYS, *methods.names(len(TASKS))[2:])
DEFAULTS = (*ALWAYS, *list(PUBLISHED)[1:], "aligned_mtl", "imtl_g", "stch")

CENTRES = np.linspace(1.0, 7.0, 12)  # of the Gaussians that distances are seen through, in Å
CHUNK = 250  # molecules that are evaluated at once
PLATEAU = {"factor": 0.7, "patience": 5}
LEAST_RATE = 1e-5


@dataclasses.dataclass(frozen=True)
class Config:
    """The options, each with its help and what it may be: one of some names, or a least number."""

    methods: Annotated[tuple, "what to compare, with single, sum and linear", CHOICES] = DEFAULTS
    seeds: Annotated[int, "networks per method, at least 2", 2] = 6
    steps: Annotated[int, "training steps, a multiple of --points", 1] = 200
    points: Annotated[int, "times to validate; the best one in validation is tested", 2] = 10
    batch_size: Annotated[int, "molecules per step", 1] = 32
    train_size: Annotated[int, "molecules to train on, of at most 110,831", 2] = 4000
    held_out_size: Annotated[int, "molecules to validate and to test, of at most 10,000", 1] = 1000
    atoms: Annotated[
        str, "heavy: hydrogens are counted at their heavy atom; all: every atom", ("heavy", "all")
    ] = "heavy"
    width: Annotated[int, "features of an atom and of a molecule", 1] = 24
    interactions: Annotated[int, "rounds of messages", 1] = 2
    standardise: Annotated[bool, "losses over the variance of their target", None] = False
    learning_rates: Annotated[
        tuple, "of Adam, at the start. The best in validation is taken", 1e-9
    ] = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
    schedule: Annotated[
        str, "cosine: to zero; plateau: down when validation stalls", ("cosine", "plateau")
    ] = "cosine"
    weightings: Annotated[int, "weights of the losses that `linear` chooses from", 1] = 4
    data_file: Annotated[Path, "where the prepared data is kept", None] = qm9_data.CACHE
    out: Annotated[Path, "folder for the results", None] = Path("results/qm9")
    overwrite: Annotated[bool, "replace the results of an earlier run", None] = False


# --- The data


def read_data(parser: Parser, config):
    """The splits with standardised targets, and the spread of each target in its unit."""
    try:
        arrays = qm9_data.load(config.data_file)
    except qm9_data.BadTable as error:
        parser.error(str(error))
    chosen = qm9_data.split(len(arrays["targets"]), config.train_size, config.held_out_size)
    for name, option in (("train", "train_size"), ("test", "held_out_size")):
        if len(chosen[name]) < getattr(config, option):
            parser.error(
                f"argument --{option.replace('_', '-')}: expected at most {len(chosen[name])}, "
                f"got {getattr(config, option)}"
            )
    splits = {name: qm9_data.features(arrays, each, config.atoms) for name, each in chosen.items()}
    targets = splits["train"]["targets"]
    mean, spread = targets.mean(axis=0), targets.std(axis=0)
    for examples in splits.values():
        examples["targets"] = (examples["targets"] - mean) / spread
    return jax.tree.map(lambda each: jnp.asarray(each, jnp.float32), splits), spread


# --- The network and its optimiser


class Molecules(nn.Module):
    """What all tasks share: continuous-filter messages between all pairs of atoms, then a sum.

    As SchNet (Schütt et al. 2017), but for filters that are linear in the Gaussians and for tanh.
    Takes one molecule: `nodes` (atoms, 6), `positions` (atoms, 3) and `mask` (atoms,).
    """

    width: int
    interactions: int

    @nn.compact
    def __call__(self, nodes, positions, mask):
        apart = positions[:, None, :] - positions[None, :, :]
        distances = jnp.sqrt(jnp.sum(apart**2, axis=-1) + 1e-6)
        spacing = CENTRES[1] - CENTRES[0]
        gaussians = jnp.exp(-((jnp.subtract.outer(distances, CENTRES) / spacing) ** 2) / 2)
        # The atom itself and padding send nothing.
        pairs = jnp.outer(mask, mask) * (1 - jnp.eye(len(mask)))
        gaussians = gaussians * pairs[:, :, None]
        atoms = nn.Dense(self.width)(nodes)
        for _ in range(self.interactions):
            filters = nn.Dense(self.width, use_bias=False)(gaussians)
            messages = jnp.einsum("ijf,jf->if", filters, nn.Dense(self.width)(atoms))
            atoms = atoms + nn.Dense(self.width)(jnp.tanh(messages))
        atoms = jnp.tanh(nn.Dense(self.width)(atoms)) * mask[:, None]
        # Most properties grow with the molecule: a sum, and not a mean.
        return jnp.sum(atoms, axis=0) / np.sqrt(len(mask))


class MultiTaskNet(nn.Module):
    """The shared part, and a linear head for each task, which gives its standardised target."""

    width: int
    interactions: int

    def setup(self):
        self.shared = Molecules(self.width, self.interactions)
        self.heads = nn.Dense(len(TASKS))

    def __call__(self, molecule):
        inputs = (molecule[name] for name in ("nodes", "positions", "mask"))
        return self.heads(self.shared(*inputs))


def make_optimiser(update, num_tasks, learning_rate, config):
    """Surgery on the shared parameters only: in its head a task meets no other.

    Adam divides updates by their recent size, so that the scale of a method's update does not act
    as a learning rate of its own, and neither does the scale of a single task's loss.
    """
    make = methods.METHODS[update]
    if config.schedule == "cosine":
        adam = optax.adam(optax.cosine_decay_schedule(learning_rate, config.steps))
    else:
        # Between two validations it sees the same value.
        plateau = optax.contrib.reduce_on_plateau(
            **PLATEAU,
            accumulation_size=config.steps // config.points,
            min_scale=LEAST_RATE / learning_rate,
        )
        adam = optax.chain(optax.adam(learning_rate), plateau)
    return optax.partition(
        {
            "shared": optax.chain(make(num_tasks), adam),
            "heads": optax.chain(surgery.sum(), adam),
        },
        lambda params: {name: name for name in params},
    )


# --- One run. It learns the tasks whose numbers are in `tasks`.


def train(run, splits, update, config):
    """One run, from its seed to its errors at every point: means of |error| over the spread."""
    net, examples = MultiTaskNet(config.width, config.interactions), splits["train"]
    init_key, batch_key, probe_key = jax.random.split(jax.random.key(run.seeds), 3)
    size = len(examples["targets"])

    def error(params, molecule):
        return net.apply({"params": params}, molecule) - molecule["targets"]

    def task_gradients(params, rows):
        batch = jax.tree.map(lambda each: each[rows], examples)

        def losses_fn(params):
            errors = jax.vmap(error, (None, 0))(params, batch)
            losses = (run.loss_weights * jnp.mean(errors**2, axis=0))[run.tasks]
            return losses, losses

        return jax.jacrev(losses_fn, has_aux=True)(params)

    def train_step(carry, step):
        state, value = carry
        rows = jax.random.randint(jax.random.fold_in(batch_key, step), [config.batch_size], 0, size)
        task_grads, losses = task_gradients(state.params, rows)
        state = state.apply_gradients(grads=task_grads, losses=losses, value=value)
        return (state, value), None

    def mean_errors(params, split):
        size = min(CHUNK, len(split["targets"]))
        errors = lax.map(lambda each: jnp.abs(error(params, each)), split, batch_size=size)
        return jnp.mean(errors, axis=0)[run.tasks]

    def train_stretch(carry, steps):
        """Trains, validates, then looks at the tasks' gradients on two disjoint batches."""
        (state, _), _ = lax.scan(train_step, carry, steps)
        seen = {name: mean_errors(state.params, splits[name]) for name in ("validation", "test")}
        if len(run.tasks) > 1:
            key = jax.random.fold_in(probe_key, steps[0])
            halves = agreement.disjoint_batches(key, size, config.batch_size)
            grads = lax.map(lambda rows: task_gradients(state.params, rows)[0]["shared"], halves)
            seen["cosines"] = agreement.cosines_on_two_batches(grads)
        return (state, jnp.mean(seen["validation"])), seen

    tx = make_optimiser(update, len(run.tasks), run.learning_rates, config)
    first = jax.tree.map(lambda each: each[0], examples)
    params = net.init(init_key, first)["params"]
    state = SurgeryTrainState.create(apply_fn=net.apply, params=params, tx=tx)
    steps = jnp.arange(config.steps).reshape(config.points, -1)
    # Until the first validation its value is one that any will improve on.
    _, seen = lax.scan(train_stretch, (state, jnp.asarray(1e6)), steps)
    return seen


# --- All runs of a method


@functools.cache
def make_train_runs(update, config):
    return jax.jit(jax.vmap(functools.partial(train, update=update, config=config), (0, None)))


def choose_points(validation, references):
    """For each network the point that validates best, by Δm; one without errors is the worst.

    Args:
      validation: (..., points, tasks) errors.
      references: (tasks,) those of the single-task networks.

    Returns:
      Indices of shape (...), and the Δm there.
    """
    worth = statistics.delta_m(validation, references, False)
    worth = np.where(np.isfinite(worth), worth, np.inf)
    return np.argmin(worth, axis=-1), np.min(worth, axis=-1)


def loss_scales(spread, config):
    """What makes of standardised squared errors those in the units of the targets."""
    return np.ones(len(TASKS)) if config.standardise else spread**2


def train_method(method, config, splits, spread, references):
    """Tunes a method and trains all its seeds. Returns what goes into the file of the run.

    `references` are the validation errors of the single-task networks, or None for themselves.
    """
    # One program for what differs in the weights of the losses only, or in where results go.
    update = "sum" if method in ("single", "linear") else method
    train_runs = make_train_runs(update, dataclasses.replace(config, out=Path()))
    # The weights are of losses as they come; `linear` weighs standardised ones.
    scales = np.ones(len(TASKS)) if method == "linear" else loss_scales(spread, config)

    def tested(runs):
        """Errors at the best points, their Δm, these points, and all that was seen, by run."""
        weights = (runs.loss_weights * scales).astype(np.float32)
        seen = {
            n: np.asarray(each)
            for n, each in train_runs(runs._replace(loss_weights=weights), splits).items()
        }
        # A single-task network is chosen by its own error: any reference will do.
        found, worth = choose_points(seen["validation"], 1.0 if references is None else references)
        at = found[:, None, None]
        best = {n: np.take_along_axis(seen[n], at, 1)[:, 0] for n in ("validation", "test")}
        return best, worth, found, seen

    choice = study.tune(method, len(TASKS), config, lambda runs: -tested(runs)[1])
    errors, _, points, seen = tested(study.every_seed(method, len(TASKS), choice, config))
    standardised = errors["test"].reshape(config.seeds, -1)
    units = spread * REPORTED
    return {
        **choice._asdict(),
        "points": study.by_seed(points, config),
        "validation": errors["validation"].reshape(config.seeds, -1) * units,
        "metrics": standardised * units,
        "standardised": standardised,
        "curve": study.by_seed(seen["validation"], config).mean(axis=(1, -1)),
        "cosines": None if method == "single" else seen["cosines"],
    }


# --- What it finds


def number(value):
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def make_error_table(board, results):
    table = study.make_table(
        "method", *(f"{task}\n{unit}" for task, unit in zip(TASKS, UNITS, strict=True))
    )
    for method, row in board.items():
        spread = np.std(np.asarray(results[method]["metrics"], float), axis=0, ddof=1)
        table.add_row(method, *(number(each) for each in row["metrics"]))
        table.add_row("", *(f"±{number(each)}" for each in spread), style="dim")
    return table


def make_comparison_table(board, results):
    against = ("against\nsum", "against\nlinear")
    published = ("published\nΔm, %", "longer\nrank", "longer\nΔm, %")
    table = study.make_table("method", "Δm, %", "rank", *against, "rate", *published)
    for method, row in board.items():
        table.add_row(
            method,
            f"{row['delta_m']:+.1f} ± {row['interval_95']:.1f}",
            f"{row['rank']:.1f}" if row["rank"] else "",
            *(statistics.verdict(row["against"].get(other)) for other in ("sum", "linear")),
            study.rates_of(results[method]),
            *("" if each is None else f"{each}" for each in PUBLISHED.get(method, ())),
        )
    return table


LEGEND = """\
Above: mean absolute error on the test split, and below it the standard deviation over seeds. Δm:
the mean relative loss against our single-task networks, ± its 95% interval over seeds; lower is
better. Rank: the mean over the targets. Against sum and linear: the difference in Δm, where a
paired t-test with Holm's correction for the number of methods finds one; else =. Rate: the learning
rate that validated best. Published, and longer: what NTKMTL (NeurIPS 2025) reports for the code of
the literature, and for it when trained for longer. That is another network on all molecules, with
standardised losses and for 300 epochs: the figures do not compare, at most their order does.
"""


def in_words(board, results, config):
    yield agreement.in_words("linear", results["linear"]["cosines"])
    yield from study.against_baselines(board)
    useless = [
        method
        for method, result in results.items()
        if np.any(np.mean(np.array(result["standardised"], float), axis=0) > 0.75)
    ]
    yield (
        "Some target is hardly learnt (mean absolute error above 0.75 standard deviations; always "
        f"predicting the mean of a normal target has 0.80) by: {', '.join(useless) or 'none'}."
    )
    yield study.edge_of_grid(results, config)


def make_figure(board, results, config):
    """Every method's Δm; how the tasks' gradients agree over training, beside the control."""
    height = max(4.5, 2.2 + 0.2 * len(board))
    figure = Figure(figsize=(17, height), layout="constrained", dpi=150)
    worth, over_time, map_axes = figure.subplots(1, 3, width_ratios=(3, 2, 2))
    study.draw_board(worth, board, "linear")
    worth.axvline(0, color="black", lw=0.8)
    style = {"color": "#0072B2", "lw": 1, "ls": ":", "label": "linear"}
    worth.axvline(board["linear"]["delta_m"], **style)
    # Linear where most methods are; a method that fails on a target must not hide the others.
    worth.set_xscale("symlog", linthresh=100)
    ticks = [-50, 0, 50, 100, 150, 200, 300, 500, 1000, 2000, 5000, 10000]
    low, high = worth.get_xlim()
    shown = [tick for tick in ticks if low <= tick <= high]
    worth.set_xticks(shown, [f"{tick}" for tick in shown])
    worth.minorticks_off()
    worth.legend(frameon=False, loc="lower right" if board["linear"]["delta_m"] < 0 else "best")
    worth.set_xlabel("Δm against single-task networks, %: lower is better (logarithmic above 100)")
    worth.set_title("green: better than linear, orange: worse, by a paired test", fontsize=10)

    cosines = np.array(results["linear"]["cosines"], float)
    between, same = agreement.split(cosines)
    steps = config.steps // config.points * np.arange(1, config.points + 1)
    for values, colour, dashes, label in (
        (between, "#0072B2", "-", "between two tasks"),
        (same, "black", "-.", "control: one task on two batches"),
    ):
        pairs = values.mean(axis=0)
        over_time.plot(steps, pairs.mean(axis=1), color=colour, ls=dashes, lw=2, label=label)
        low, high = np.quantile(pairs, [0.1, 0.9], axis=1)
        over_time.fill_between(steps, low, high, color=colour, alpha=0.12, lw=0)
    over_time.axhline(0, color="black", lw=0.8)
    over_time.set_xlabel("step")
    over_time.set_ylabel("cosine of gradients on two disjoint batches")
    over_time.set_title("trained with linear; bands: 10% to 90% of the pairs", fontsize=10)
    over_time.legend(frameon=False, fontsize=8)

    image = map_axes.imshow(cosines.mean(axis=(0, 1)), cmap="RdBu", vmin=-1, vmax=1)
    map_axes.set_xticks(range(len(TASKS)), TASKS, rotation=90)
    map_axes.set_yticks(range(len(TASKS)), TASKS)
    map_axes.set_title("mean over training; the diagonal is the control", fontsize=10)
    figure.colorbar(image, ax=map_axes, shrink=0.7, label="cosine")
    over_time.spines[["top", "right"]].set_visible(False)
    losses = "standardised losses" if config.standardise else "losses in the usual units"
    figure.suptitle(
        f"QM9, eleven targets, {losses}: {config.train_size:,} molecules, {config.steps:,} steps, "
        f"{config.seeds} seeds"
    )
    return figure


# --- The command line


def references_of(results, spread):
    """The standardised validation errors of the single-task networks, once they are trained."""
    if "single" not in results:
        return None
    return np.array(results["single"]["validation"], float).mean(axis=0) / (spread * REPORTED)


def main(argv=None):
    parser = Parser("python -m benchmarks.qm9", description=(__doc__ or "").split("\n\n")[0])
    config = parse(parser, Config, argv)
    if config.steps % config.points:
        parser.error(f"argument --steps: expected a multiple of --points, got {config.steps}")
    chosen = tuple(dict.fromkeys((*ALWAYS, *config.methods)))
    config = dataclasses.replace(config, methods=chosen)
    files = config.out / "results.json", config.out / "qm9.png"
    check_output(parser, files, config.overwrite)

    def train_one(method, data, results, _):
        splits, spread = data
        return train_method(method, config, splits, spread, references_of(results, spread))

    results = study.train_all(
        parser,
        config,
        {method: config.out / "runs" / f"{method}.json" for method in config.methods},
        load=lambda: read_data(parser, config),
        train=train_one,
    )
    metrics = {method: np.asarray(result["metrics"], float) for method, result in results.items()}
    board = statistics.leaderboard(metrics, False)
    findings = list(in_words(board, results, config))
    tables = make_error_table(board, results), make_comparison_table(board, results)
    study.finish(
        config,
        files,
        [*tables, LEGEND, *findings],
        make_figure(board, results, config),
        width=130,
        metrics=[f"{task}, {unit}" for task, unit in zip(TASKS, UNITS, strict=True)],
        higher_is_better=[False] * len(TASKS),
        published=PUBLISHED,
        findings=findings,
        runs=[{"method": method, **result} for method, result in results.items()],
    )


if __name__ == "__main__":
    run_main(main, GOES_ON)
