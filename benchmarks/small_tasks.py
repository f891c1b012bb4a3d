"""What is left of tasks with small gradients? Errors in float32 as the norms spread.

Correlated gradients in conflict, their norms spread geometrically. Each update is found in float32
and compared with that of the same gradients in float64: for `aligned_mtl` with the singular value
decomposition of the stack, for the others with the same method. TorchJD, where it is installed
(`pip install -e ".[peers]"`), is measured by its own float64. The error is relative to the update,
the largest of several draws; at 1, nothing of the update is right.
Run `python -m benchmarks.small_tasks`.
"""

import dataclasses
import io
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table

import optax_surgery as surgery
from benchmarks.common.command_line import Parser, as_json, check_output, parse, run_main, write
from benchmarks.common.progress import Progress
from benchmarks.systems.speed import aggregation, torch

METHODS = {
    "aligned_mtl": (surgery.aligned_mtl, "AlignedMTL"),
    "imtl_g": (surgery.imtl_g, "IMTLG"),
    "conflict_free": (surgery.conflict_free, "ConFIG"),
    "mgda": (surgery.mgda, "MGDA"),
    "upgrad": (surgery.upgrad, "UPGrad"),
    "dualproj": (surgery.dualproj, "DualProj"),
    "nash_mtl": (surgery.nash_mtl, None),
    "cagrad": (surgery.cagrad, None),
}
COLOURS = {"optax_surgery": "#0072B2", "TorchJD": "#D55E00"}


@dataclasses.dataclass(frozen=True)
class Config:
    """The options, each with its help and what it may be: one of some names, or a least number."""

    methods: Annotated[tuple, "what to compare", tuple(METHODS)] = tuple(METHODS)
    tasks: Annotated[tuple, "numbers of tasks T", 2] = (4, 11)
    spreads: Annotated[tuple, "the longest gradient over the shortest", 1.0] = (
        1.0, 1e1, 1e2, 1e3, 1e4, 1e5, 1e6, 1e7,
    )  # fmt: skip
    draws: Annotated[int, "stacks of gradients per spread", 1] = 5
    coordinates: Annotated[int, "length of a gradient", 1] = 2000
    out: Annotated[Path, "folder for the results", None] = Path("results/small_tasks")
    overwrite: Annotated[bool, "replace the results of an earlier run", None] = False


def draw_stacks(config, num_tasks, spread):
    """Stacks of float32 gradients, with cosines of about 0.2 in size and of both signs."""
    random = np.random.default_rng(num_tasks)
    found = random.standard_normal((config.draws, num_tasks, config.coordinates))
    found += 0.5 * random.standard_normal((config.draws, 1, config.coordinates))
    found[:, ::3] *= -1
    norms = random.permuted(
        np.tile(np.geomspace(1, 1 / spread, num_tasks), (config.draws, 1)), axis=1
    )
    found *= (norms / np.linalg.norm(found, axis=2))[..., None]
    return found.astype(np.float32)


# --- Updates


def ours(name, stacks):
    """Updates by our method: weights in the dtype of the stacks, applied in float64."""
    tx = METHODS[name][0]()

    def weights(stack):
        identity = jnp.eye(len(stack), dtype=stack.dtype)
        gramian = surgery.gramian(stack)
        return tx.update(identity, tx.init(identity[0]), gramian=gramian)[0]

    found = np.asarray(jax.jit(jax.vmap(weights))(jnp.asarray(stacks)), float)
    return np.einsum("st,stn->sn", found, stacks.astype(float))


def exact(name, stacks):
    stacks = stacks.astype(float)
    if name == "aligned_mtl":
        left, values, _ = np.linalg.svd(stacks, full_matrices=False)
        weights = np.einsum("sik,sk,sjk->sij", left, 1 / values, left).mean(axis=2)
        return values[:, -1:] * np.einsum("st,stn->sn", weights, stacks)
    with jax.enable_x64(True):
        return ours(name, stacks)


def theirs(name, stacks):
    aggregator = getattr(aggregation, METHODS[name][1])()
    return np.stack([aggregator(torch.tensor(stack)).numpy().astype(float) for stack in stacks])


def largest_errors(config, found, expected):
    errors = np.linalg.norm(found - expected, axis=1) / np.linalg.norm(expected, axis=1)
    return errors.reshape(len(config.spreads), config.draws).max(axis=1)


def measure(config, num_tasks, name):
    """For each library the errors at all spreads."""
    stacks = np.concatenate([draw_stacks(config, num_tasks, each) for each in config.spreads])
    errors = {"optax_surgery": largest_errors(config, ours(name, stacks), exact(name, stacks))}
    if torch is not None and METHODS[name][1]:
        in_double = theirs(name, stacks.astype(float))
        errors["TorchJD"] = largest_errors(config, theirs(name, stacks), in_double)
    return {"method": name, "tasks": num_tasks, "errors": errors}


# --- Report


def make_table(config, rows):
    table = Table(box=box.SIMPLE, title="Largest relative error of the update in float32")
    for heading in ("T", "method", "library"):
        table.add_column(heading)
    for spread in config.spreads:
        table.add_column(f"spread {spread:.0e}", justify="right")
    for row in rows:
        for library, errors in row["errors"].items():
            cells = (f"{error:.0e}" for error in errors)
            table.add_row(str(row["tasks"]), row["method"], library, *cells)
    return table


def make_figure(config, rows):
    num_columns = min(4, len(config.methods))
    num_rows = -(-len(config.methods) // num_columns)
    figure = Figure(figsize=(3 * num_columns, 2.8 * num_rows), layout="constrained", dpi=110)
    grid = figure.subplots(num_rows, num_columns, sharex=True, sharey=True, squeeze=False)
    most = max(config.tasks)
    for axes in np.ravel(grid)[len(config.methods) :]:
        axes.set_visible(False)
    for axes, name in zip(np.ravel(grid), config.methods, strict=False):
        (row,) = (row for row in rows if (row["method"], row["tasks"]) == (name, most))
        for library, errors in row["errors"].items():
            shown = np.maximum(errors, 1e-9)
            axes.loglog(config.spreads, shown, "o-", ms=4, color=COLOURS[library], label=library)
        axes.axhline(1, color="0.6", lw=1, ls="--")
        axes.set_title(name)
    np.ravel(grid)[0].legend(frameon=False)
    figure.supxlabel("norm of the longest gradient over that of the shortest")
    figure.supylabel(f"relative error of the update, T = {most}")
    return figure


def main(argv=None):
    parser = Parser("python -m benchmarks.small_tasks", description=__doc__)
    config = parse(parser, Config, argv)
    results, picture = config.out / "results.json", config.out / "small_tasks.png"
    check_output(parser, [results, picture], config.overwrite)
    console = Console()
    if torch is None:
        console.print('TorchJD is not installed: pip install -e ".[peers]"', markup=False)
    pairs = [(num_tasks, name) for num_tasks in config.tasks for name in config.methods]
    rows = []
    with Progress(len(pairs)) as progress:
        for num_tasks, name in pairs:
            progress.describe(f"{name}, {num_tasks} tasks")
            rows.append(measure(config, num_tasks, name))
            progress.advance()
    console.print(make_table(config, rows))
    drawn = io.BytesIO()
    make_figure(config, rows).savefig(drawn)
    write({results: as_json(config, results=rows), picture: drawn.getvalue()})
    console.print(f"Written: {results} and {picture}", highlight=False)


if __name__ == "__main__":
    run_main(main)
