"""What do XLA's compilers for a TPU v5e and an H100 make of a surgery? Nothing is run.

The programs are compiled ahead of time, without a device, and read: how often they go through the
stack of task gradients, what they hold beside it, how many kernels they launch, what they send
between devices. First the leaves of a ResNet-50, of a transformer and awkward ones, each in
programs of its own: the two products that read the stack (the Gramian and the combination), and
an update, which is to hold no copy of it. Then whole programs: the updates of PCGrad and
Aligned-MTL and a training step of a small network, on one device and on four. Needs
`pip install -e ".[compiled]"`; run `python -m benchmarks.systems.compiled`.
"""

import collections
import dataclasses
import functools
import importlib.util
import io
import math
import os
import re
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table

import optax_surgery as surgery
from benchmarks.common.command_line import Parser, as_json, check_output, parse, run_main, write
from benchmarks.common.progress import Progress

# The compiler for a GPU needs no CUDA libraries; JAX looks for them when it looks for devices.
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")

COMPILERS = {"v5e": "libtpu", "h100": "jax_cuda12_plugin"}
LARGE = 1e6  # bytes of a stack; below it, T-sized temporaries are all there is
COLOURS = {"ResNet-50": "#0072B2", "transformer": "#009E73", "awkward": "#D55E00"}


@dataclasses.dataclass(frozen=True)
class Config:
    """The options, each with its help and what it may be."""

    devices: Annotated[tuple, "what to compile for", tuple(COMPILERS)] = tuple(COMPILERS)
    tasks: Annotated[tuple, "numbers of tasks T", 1] = (4, 10)
    leaves: Annotated[tuple, "whose leaves", tuple(COLOURS)] = tuple(COLOURS)
    out: Annotated[Path, "folder for the results", None] = Path("results/compiled")
    overwrite: Annotated[bool, "replace the results of an earlier run", None] = False


# --- Leaves: parameter shapes, each with how often it occurs


def resnet_leaves():
    """The parameters of a ResNet-50."""
    shapes = collections.Counter({(7, 7, 3, 64): 1, (64,): 2, (2048, 1000): 1, (1000,): 1})
    channels = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes.update([(1, 1, channels, width), (3, 3, width, width), (1, 1, width, 4 * width)])
            shapes.update({(width,): 4, (4 * width,): 2})
            if block == 0:  # the projection of the shortcut
                shapes.update({(1, 1, channels, 4 * width): 1, (4 * width,): 2})
            channels = 4 * width
    return shapes


def transformer_leaves(layers=6, width=512, heads=8, vocabulary=32_000):
    """The parameters of a small transformer, as Flax's attention shapes them."""
    head = width // heads
    layer = {
        (width, heads, head): 3,
        (heads, head): 3,
        (heads, head, width): 1,
        (width, 4 * width): 1,
        (4 * width,): 1,
        (4 * width, width): 1,
        (width,): 6,
    }
    return collections.Counter({shape: layers * count for shape, count in layer.items()}) + (
        collections.Counter({(vocabulary, width): 1, (width,): 2})
    )


def awkward_leaves():
    """Large, not multiples of a tile, primes, tiny."""
    shapes = (
        (1024, 4096),
        (2500, 4000),
        (3, 3, 512, 512),
        (10_000_000,),
        (997, 1009),
        (104_729,),
        (17, 13, 11),
        (3,),
        (),
    )
    return collections.Counter(shapes)


LEAVES = {"ResNet-50": resnet_leaves, "transformer": transformer_leaves, "awkward": awkward_leaves}


# --- Compiling


@functools.cache
def topology(device):
    """The description of hardware that is not here."""
    if device == "v5e":
        os.environ.update(
            TPU_SKIP_MDS_QUERY="1",
            ALLOW_MULTIPLE_LIBTPU_LOAD="1",
            TPU_ACCELERATOR_TYPE="v5litepod-4",
            TPU_WORKER_HOSTNAMES="localhost",
        )
        return topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
    target = Path(__file__).parent / "h100_target_config.txtpb"
    return topologies.get_topology_desc(
        "", "cuda", topology="1x1x1", target_config=target.read_text()
    )


def compile_for(device, num_devices, function, task_updates, *others):
    """Compiles for stacks that are sharded, and for other arguments that every device holds."""
    mesh = Mesh(np.array(topology(device).devices[:num_devices]), ("devices",))

    def place(tree, spec_of):
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec_of(leaf.shape))
            ),
            tree,
        )

    arguments = place(task_updates, lambda shape: P(None, *shard(shape[1:], num_devices)))
    return jax.jit(function).trace(arguments, *place(others, lambda _: P())).lower().compile()


def shard(shape, num_devices):
    """The last axis that divides evenly, as fully sharded training has it."""
    axes = [axis for axis, size in enumerate(shape) if size % num_devices == 0]
    return ["devices" if axes and axis == axes[-1] else None for axis in range(len(shape))]


# --- Reading the programs


def stack_bytes(task_updates):
    return 4 * sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(task_updates))


def temporary_bytes(compiled):
    return compiled.memory_analysis().temp_size_in_bytes


def bytes_accessed(compiled):
    """XLA's bytes accessed, without the copies of small arrays to the memory on the chip.

    XLA counts such a copy four times; the program reads it once from the chip's main memory, and
    that read is counted where the copy is used.
    """
    total = compiled.cost_analysis()["bytes accessed"]
    for dtype, dims, order, tile in re.findall(
        r"= \((\w+)\[([\d,]*)\]\{([\d,]*):(?:T\(([\d,]+)\))?[^}]*\}, [^)]*\)[^=]* copy-start\(",
        compiled.as_text(),
    ):
        sizes = [int(size) for size in dims.split(",") if size]
        minor_first = [int(axis) for axis in order.split(",") if axis]
        for axis, width in zip(
            minor_first, [int(w) for w in tile.split(",") if w][::-1], strict=False
        ):
            sizes[axis] = -(-sizes[axis] // width) * width
        total -= 4 * math.prod(sizes) * (int(re.sub(r"\D", "", dtype)) // 8 or 1)
    return total


LAUNCHES = re.compile(
    r" = .*? (fusion|custom-call|copy|[a-z-]*(?:reduce|sort|scatter|gather|dot)|"
    r"transpose|concatenate|pad|convert|iota|broadcast|dynamic-update-slice)\("
)


def computations(compiled):
    """The lines of each computation of a program, the entry under its own name."""
    found, name = {}, None
    for line in compiled.as_text().splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.-]+) \(.*\{$", line):
            name = "ENTRY" if head[1] else head[2]
            found[name] = []
        elif name and line.startswith("  "):
            found[name].append(line)
    return found


def kernels(compiled):
    """How many kernels a GPU program launches outside of loops, and of each loop (steps, kernels).

    Nothing is counted of a `cond`: of a surgery, only the branch for gradients out of range.
    """
    lines = computations(compiled)
    counts = {name: sum(map(bool, map(LAUNCHES.search, lines[name]))) for name in lines}
    loops = re.findall(
        r" while\(.*body=%?([\w.-]+).*known_trip_count\D*(\d+)", "\n".join(lines["ENTRY"])
    )
    return counts["ENTRY"], [(int(steps), counts[body]) for body, steps in loops]


def launches(compiled):
    """How many kernels a GPU program launches in all, loops within loops included."""
    lines = computations(compiled)

    def of(name: str) -> int:
        loops = re.findall(
            r" while\(.*body=%?([\w.-]+).*known_trip_count\D*(\d+)", "\n".join(lines[name])
        )
        own = sum(map(bool, map(LAUNCHES.search, lines[name])))
        return own + sum(int(steps) * of(body) for body, steps in loops)

    return of("ENTRY")


def collectives(compiled):
    """Each kind of collective with how many there are and the most elements that one moves."""
    found = {}
    for dims, kind in re.findall(
        r" = \(?\w+\[([\d,]*)\].* (all-[a-z]+|collective-[a-z]+|reduce-scatter)(?:-start)?\(",
        compiled.as_text(),
    ):
        elements = math.prod(int(size) for size in dims.split(",") if size)
        number, most = found.get(kind, (0, 0))
        found[kind] = (number + 1, max(most, elements))
    return found


# --- Programs


def structs(shapes, num_tasks):
    return jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct((num_tasks, *shape), jnp.float32),
        shapes,
        is_leaf=lambda shape: isinstance(shape, tuple),
    )


def squared_norms(tasks, state):
    """The simplest rule: what is T-sized is the same for all leaves, and takes long to compile."""
    return jnp.diagonal(tasks.gramian), state


def measure_leaf(device, num_tasks, shape):
    """Temporaries of an update of one leaf; bytes or kernels of the two products in it."""

    def products(task_updates, weights):
        return surgery.gramian(task_updates), surgery.combine(weights, task_updates)

    weighting = surgery.Weighting(init=tuple, update=squared_norms)
    tx = surgery.gradient_surgery(weighting, name="squared_norms")
    task_updates, state = structs(shape, num_tasks), jax.eval_shape(tx.init, None)
    update = compile_for(device, 1, update_of(tx), task_updates, state)
    found = {"temporaries": temporary_bytes(update)}
    weights = jax.ShapeDtypeStruct((num_tasks,), jnp.float32)
    compiled = compile_for(device, 1, products, task_updates, weights)
    if device == "h100":  # whose compiler reports no bytes
        outside, inside = kernels(compiled)
        return {**found, "kernels": outside + sum(trips * count for trips, count in inside)}
    return {**found, "bytes": bytes_accessed(compiled)}


def update_of(tx):
    return lambda task_updates, state: tx.update(task_updates, state)


NETWORK = {
    "embedding": (8192, 256),
    "convolution": (3, 3, 256, 256),
    "dense": {"kernel": (256, 1024), "bias": (1024,)},
    "head": (1024, 256),
}


def whole_programs(num_tasks):
    """Name -> function and arguments after the stack, on the leaves of a small network."""
    params = jax.tree.map(
        lambda rows: jax.ShapeDtypeStruct(rows.shape[1:], rows.dtype), structs(NETWORK, num_tasks)
    )
    training = optax.chain(surgery.pcgrad(), optax.adam(1e-3))

    def train(task_updates, state, params):
        updates, state = training.update(task_updates, state, params)
        return optax.apply_updates(params, updates), state

    pcgrad, aligned_mtl = surgery.pcgrad(), surgery.aligned_mtl()
    return {
        "PCGrad": (update_of(pcgrad), (jax.eval_shape(pcgrad.init, params),)),
        "Aligned-MTL": (update_of(aligned_mtl), (jax.eval_shape(aligned_mtl.init, params),)),
        "PCGrad and Adam": (train, (jax.eval_shape(training.init, params), params)),
    }


def measure_program(device, num_devices, num_tasks, name):
    function, others = whole_programs(num_tasks)[name]
    task_updates = structs(NETWORK, num_tasks)
    compiled = compile_for(device, num_devices, function, task_updates, *others)
    outside, inside = kernels(compiled)
    return {
        "temporaries": temporary_bytes(compiled) / (stack_bytes(task_updates) / num_devices),
        "kernels": (outside, inside) if device == "h100" else None,
        "collectives": collectives(compiled),
    }


# --- Summaries, table and picture


def summarise(shapes, found, num_tasks):
    """Of leaves taken together: bytes over the ideal, and the worst temporaries over the leaf's."""
    sizes = {shape: 4 * math.prod(shape) for shape in shapes}
    ideal = sum(count * sizes[shape] * (2 * num_tasks + 1) for shape, count in shapes.items())
    large = {shape for shape in shapes if num_tasks * sizes[shape] >= LARGE}
    worst = max(
        (found[shape]["temporaries"] / (num_tasks * sizes[shape]) for shape in large), default=None
    )
    totals = {
        what: sum(count * found[shape][what] for shape, count in shapes.items())
        for what in ("bytes", "kernels")
        if what in next(iter(found.values()))
    }
    relative = {"bytes": totals["bytes"] / ideal} if "bytes" in totals else {}
    return {"temporaries": worst, **totals, **relative}


def leaf_rows(device, num_tasks, shapes, found):
    """A row for each group of leaves, and for the awkward ones one each."""
    groups = {name: counts for name, counts in shapes.items() if name != "awkward"}
    awkward = shapes.get("awkward", {})
    groups |= {f"awkward {shape}": {shape: 1} for shape in awkward}
    common = {"device": device, "tasks": num_tasks}
    return [
        {"leaves": name, **common, **summarise(counts, found, num_tasks)}
        for name, counts in groups.items()
    ]


def dash(text, number):
    return "-" if number is None else text.format(number)


def leaf_table(results):
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("Gramian and combination", no_wrap=True)
    for heading in ("device", "T", "bytes / ideal", "temporaries / stack", "kernels"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in results:
        table.add_row(
            row["leaves"],
            row["device"],
            str(row["tasks"]),
            dash("{:.2f}", row.get("bytes")),
            dash("{:.3f}", row["temporaries"]),
            dash("{}", row.get("kernels")),
        )
    return table


def program_table(results):
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("A small network", no_wrap=True)
    headings = ("device", "T", "temporaries / stack", "kernels", "in loops", "collectives")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in results:
        outside, inside = row["kernels"] or (None, None)
        sent = [
            f"{count} {kind} of at most {most}"
            for kind, (count, most) in row["collectives"].items()
        ]
        table.add_row(
            row["program"],
            f"{row['device']} x{row['devices']}",
            str(row["tasks"]),
            f"{row['temporaries']:.3f}",
            dash("{}", outside),
            dash(
                "{}", inside and ", ".join(f"{count} in each of {steps}" for steps, count in inside)
            ),
            ", ".join(sent) or "none",
        )
    return table


def make_figure(results, config):
    """A bar for each group of leaves: bytes over the ideal on the TPU."""
    figure = Figure(figsize=(9, 1 + 2.2 * len(config.tasks)), layout="constrained", dpi=150)
    for axes, num_tasks in zip(
        figure.subplots(len(config.tasks), sharex=True, squeeze=False)[:, 0],
        config.tasks,
        strict=True,
    ):
        # Without the small leaves, whose bytes are those of the tiles that they do not fill.
        rows = [
            row
            for row in results
            if row["tasks"] == num_tasks and row.get("bytes") and row["temporaries"] is not None
        ]
        axes.bar(
            range(len(rows)),
            [row["bytes"] for row in rows],
            color=[COLOURS[row["leaves"].split(" ")[0]] for row in rows],
        )
        axes.axhline(1, color="0.4", lw=1)
        axes.set_ylabel(f"T = {num_tasks}")
        axes.set_xticks(
            range(len(rows)), [row["leaves"] for row in rows], rotation=60, ha="right", fontsize=7
        )
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle("Gramian and combination on a TPU v5e: bytes accessed over the ideal")
    return figure


def available_devices(parser, config):
    """Those devices for which a compiler is installed; what is left out is said."""
    found = [name for name in config.devices if importlib.util.find_spec(COMPILERS[name])]
    for name in set(config.devices) - set(found):
        Console(stderr=True).print(f"Left out {name}: no {COMPILERS[name]}", highlight=False)
    if not found:
        parser.error('no compiler for these devices: pip install -e ".[compiled]"')
    return found


def main(argv=None):
    parser = Parser("python -m benchmarks.systems.compiled", description=__doc__)
    config = parse(parser, Config, argv)
    files = config.out / "results.json", config.out / "bytes.png"
    check_output(parser, files, config.overwrite)
    jax.config.update("jax_platforms", "cpu")
    devices = available_devices(parser, config)
    shapes = {name: LEAVES[name]() for name in config.leaves}
    programs = [
        (device, number, name)
        for device in devices
        for number in ({"v5e": (1, 4), "h100": (1,)}[device])
        for name in ("PCGrad", "Aligned-MTL", "PCGrad and Adam")
    ]
    distinct = set().union(*shapes.values())
    total = len(config.tasks) * (len(programs) + len(devices) * len(distinct))
    leaves, whole = [], []
    with Progress(total) as progress:
        for num_tasks in config.tasks:
            for device in devices:
                found = {}
                for shape in distinct:
                    progress.describe(f"{device}, ({num_tasks}, *{shape})")
                    found[shape] = measure_leaf(device, num_tasks, shape)
                    progress.advance()
                leaves += leaf_rows(device, num_tasks, shapes, found)
            for device, number, name in programs:
                progress.describe(f"{device} x{number}, {name}")
                measured = measure_program(device, number, num_tasks, name)
                whole.append(
                    {"program": name, "device": device, "devices": number, "tasks": num_tasks}
                    | measured
                )
                progress.advance()
    console = Console(highlight=False)
    console.width = max(console.width, 120)
    console.print(leaf_table(leaves))
    console.print(program_table(whole))
    console.print(
        "Ideal: two reads of the stack, one write. Bytes as XLA counts them, without copies to the "
        "chip's own memory; an H100's compiler reports none. A TPU keeps arrays in tiles of 8 x "
        "128, which small leaves do not fill. Temporaries of an update: "
        f"the worst leaf whose stack has {LARGE / 1e6:g} MB or more."
    )
    picture = io.BytesIO()
    make_figure([row for row in leaves if row["device"] == "v5e"], config).savefig(picture)
    text = as_json(config, leaves=leaves, programs=whole)
    write(dict(zip(files, (text, picture.getvalue()), strict=True)))
    console.print(f"\nWritten: {files[0]} and {files[1]}")


if __name__ == "__main__":
    run_main(main)
