"""What does a training step of a large transformer cost on 16 chips of a TPU v5e? Nothing is run.

The step's gradients are compiled ahead of time, without a device, for a decoder whose layers are
scanned and rematerialised, in bfloat16, with its parameters sharded over all chips, and the program
is read: multiplications, memory beside the arguments, and what the chips send to one another. XLA's
own counts take a loop's body once; here it counts as often as it runs. One row is the plain step,
the gradient of the summed losses; the others are a PCGrad step on stacked gradients, and the exact
one without a stack. Shared data: a loss for each of T kinds of tokens. Own data: one task a chip.
Needs `pip install -e ".[compiled]"`; run `python -m benchmarks.systems.compiled_transformer`. A
program takes two to five minutes to compile on one core.
"""

import collections
import dataclasses
import functools
import importlib.util
import math
import os
import re
import time
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from rich import box
from rich.console import Console
from rich.table import Table

import optax_surgery as surgery
from benchmarks.common.command_line import Parser, as_json, check_output, parse, run_main, write

COMPILER = "libtpu"
CHIPS = 16
DATA, WAYS = ("shared", "own"), ("plain", "stacked", "exact")


@dataclasses.dataclass(frozen=True)
class Config:
    """The options, each with its help and what it may be."""

    data: Annotated[tuple, "whether tasks share their data", DATA] = DATA
    ways: Annotated[tuple, "to the gradients", WAYS] = WAYS
    tasks: Annotated[int, "number of tasks T that share their data", 1] = 8
    layers: Annotated[int, "of the decoder", 1] = 16
    width: Annotated[int, "a multiple of 128", 128] = 2048
    vocabulary: Annotated[int, "number of tokens", 1] = 32_000
    sequences: Annotated[int, "of a batch, a multiple of 16", CHIPS] = CHIPS
    length: Annotated[int, "tokens of a sequence", 1] = 1024
    copies: Annotated[bool, "gradients by bfloat16 copies of the parameters", None] = False
    out: Annotated[Path, "folder for the results", None] = Path("results/compiled_transformer")
    overwrite: Annotated[bool, "replace the results of an earlier run", None] = False


# --- The decoder


def shapes(config):
    """Of the parameters; those of layers are stacked."""
    width, layers = config.width, config.layers
    return {
        "embedding": (config.vocabulary, width),
        "layers": {
            "scales": (layers, 2, width),
            "qkv": (layers, width, 3 * width),
            "out": (layers, width, width),
            "up": (layers, width, 4 * width),
            "down": (layers, 4 * width, width),
        },
        "head": (width, config.vocabulary),
    }


def token_losses(params, tokens, lie):
    """The loss of each token but the first, (sequences, length - 1).

    Args:
      params: of the `shapes`.
      tokens: (sequences, length).
      lie: says of activations (sequences, ...) where they lie.
    """

    def normalize(x, scale):
        wide = x.astype(jnp.float32)
        return (wide * lax.rsqrt(jnp.mean(wide**2, -1, keepdims=True) + 1e-6) * scale).astype(
            jnp.bfloat16
        )

    def dense(x, kernel):
        return lie(x @ kernel.astype(jnp.bfloat16))

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def layer(x, params):
        sequences, length, width = x.shape
        normalized = normalize(x, params["scales"][0, None, None])
        qkv = dense(normalized, params["qkv"]).reshape(sequences, length, 3, -1, 128)
        query, key, value = jnp.moveaxis(qkv, 2, 0)
        scores = jnp.einsum("bqhd,bkhd->bhqk", query, key).astype(jnp.float32) / math.sqrt(128)
        causal = jnp.tril(jnp.ones((length, length), bool))
        shares = jax.nn.softmax(jnp.where(causal, scores, -1e9)).astype(jnp.bfloat16)
        attended = jnp.einsum("bhqk,bkhd->bqhd", shares, value).reshape(sequences, length, width)
        x = lie(x + dense(attended, params["out"]))
        hidden = jax.nn.gelu(dense(normalize(x, params["scales"][1, None, None]), params["up"]))
        return lie(x + dense(hidden, params["down"])), None

    x = lie(params["embedding"].astype(jnp.bfloat16)[tokens])
    x, _ = lax.scan(layer, x, params["layers"])
    logits = dense(normalize(x, 1.0), params["head"])[:, :-1].astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, tokens[:, 1:, None], -1)[..., 0]
    return jax.nn.logsumexp(logits, -1) - chosen


# --- The steps


def step_of(config, data, way, mesh):
    """(params, batch) -> losses and gradients, and the batch's shapes with their specs."""
    tokens = jax.ShapeDtypeStruct((config.sequences, config.length), jnp.int32)
    pcgrad = surgery.pcgrad()
    state = pcgrad.init(())

    def lie_over(*spec):
        return lambda x: lax.with_sharding_constraint(
            x, NamedSharding(mesh, P(*spec, *[None] * (x.ndim - len(spec))))
        )

    if data == "shared":
        batch = {"tokens": tokens, "kinds": tokens}

        def losses_fn(params, batch):
            losses = token_losses(params, batch["tokens"], lie_over("chips"))
            is_kind = batch["kinds"][None, :, 1:] == jnp.arange(config.tasks)[:, None, None]
            return jnp.sum(is_kind * losses[None], (1, 2)) / jnp.maximum(
                jnp.sum(is_kind, (1, 2)), 1
            )

        plain = losses_fn
        stacks = surgery.task_value_and_grad(losses_fn)
        exact = surgery.surgery_value_and_grad(losses_fn, pcgrad)
    else:
        rows = config.sequences // CHIPS
        batch = jax.ShapeDtypeStruct((CHIPS, rows, config.length), jnp.int32)

        def loss_fn(params, tokens):
            return jnp.mean(token_losses(params, tokens, lie_over(None)))

        over = "chips"
        plain = jax.vmap(loss_fn, in_axes=(None, 0), spmd_axis_name=over)
        stacks = surgery.per_task_value_and_grad(loss_fn, spmd_axis_name=over)
        exact = surgery.per_task_surgery_value_and_grad(loss_fn, pcgrad, spmd_axis_name=over)

    def step(params, batch):
        dtypes = jax.tree.map(lambda leaf: leaf.dtype, params)
        if config.copies:  # a stack, and what is sent of it, then takes half
            params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
        if way == "plain":

            def total(params):
                losses = plain(params, batch)
                return jnp.sum(losses), losses

            grads, losses = jax.grad(total, has_aux=True)(params)
        elif way == "stacked":
            losses, task_grads = stacks(params, batch)
            grads, _ = pcgrad.update(task_grads, state, losses=losses)
        else:
            (losses, grads), _ = exact(params, state, batch)
        return losses, jax.tree.map(lambda leaf, dtype: leaf.astype(dtype), grads, dtypes)

    return step, batch


def spec_of(shape):
    """The last axis over all chips, as fully sharded training has it."""
    return P(*[None] * (len(shape) - 1), "chips") if shape[-1] % CHIPS == 0 else P()


@functools.cache
def mesh_of_chips():
    """16 chips that are not here."""
    os.environ.update(
        TPU_SKIP_MDS_QUERY="1",
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",
        TPU_ACCELERATOR_TYPE="v5litepod-16",
        TPU_WORKER_HOSTNAMES="localhost",
    )
    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:4x4")
    return Mesh(np.array(topology.devices), ("chips",))


def compile_step(config, data, way, mesh):
    """The program of a step for the chips of a mesh."""
    step, batch = step_of(config, data, way, mesh)

    def struct(shape, dtype, spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    params = jax.tree.map(
        lambda shape: struct(shape, jnp.float32, spec_of(shape)),
        shapes(config),
        is_leaf=lambda shape: isinstance(shape, tuple),
    )
    batch = jax.tree.map(lambda leaf: struct(leaf.shape, leaf.dtype, P("chips")), batch)
    grads = jax.tree.map(lambda leaf: leaf.sharding, params)
    jitted = jax.jit(step, out_shardings=(NamedSharding(mesh, P()), grads))
    with jax.set_mesh(mesh):
        return jitted.lower(params, batch).compile()


# --- Reading the programs


NAME = r"%?([\w.-]+)"
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


class Instruction(NamedTuple):
    """One line of a program.

    Attributes:
      text: all of it.
      arrays: dtype and dimensions of what it returns, of several for a tuple.
      operation: its name.
      operands: the names of those.
    """

    text: str
    arrays: list[tuple[str, tuple[int, ...]]]
    operation: str
    operands: list[str]

    def size(self):
        """In bytes."""
        return sum(math.prod(dims) * bits(dtype) // 8 for dtype, dims in self.arrays)

    def attribute(self, name, pattern):
        found = re.search(rf"\b{name}={pattern}", self.text)
        return found and found[1]


def bits(dtype):
    digits = re.search(r"\d+", dtype)
    return int(digits[0]) if digits else {"pred": 8, "token": 0}.get(dtype, 8)


class Program:
    """A compiled program, of which is counted what it runs, a loop's body as often as it does.

    Of the branches of a `cond` the one with the least products counts: of a surgery, that for
    gradients that are in range and numbers.
    """

    def __init__(self, text):
        self.computations: dict[str, dict[str, Instruction]] = {}
        instructions, self.entry = {}, ""
        for line in text.splitlines():
            if head := re.match(r"(ENTRY )?%?([\w.-]+) \(.*\{$", line):
                self.computations[head[2]] = instructions = {}
                self.entry = head[2] if head[1] else self.entry
            elif found := re.match(r"\s+(?:ROOT )?%?([\w.-]+) = (.*?) ([a-z][\w-]*)\((.*)", line):
                name, kind, operation, rest = found.groups()
                arrays = [
                    (dtype, tuple(int(size) for size in dims.split(",") if size))
                    for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", kind)
                ]
                operands = re.findall(r"%([\w.-]+)", rest.split(")")[0])
                instructions[name] = Instruction(line, arrays, operation, operands)
        self.products, by_channel = self._count(self.entry, 1)
        self.sent = collections.Counter()
        for kind, size in by_channel.values():
            self.sent[kind] += size

    def _count(self, name, times):
        """Operations of products, and for each collective its kind and the bytes that it moves."""
        products, sent = 0, {}

        def send(channel, kind, size):
            # One that runs beside others stands in the program of each of them, of loops too.
            sent[channel] = min((kind, size), sent.get(channel, (kind, size)))

        def include(found):
            for channel, one in found[1].items():
                send(channel, *one)
            return found[0]

        for scope, each in self._inlined(name):
            if each.operation in PRODUCTS:
                left, right = (scope[operand] for operand in each.operands)
                products += times * PRODUCTS[each.operation](each, left, right)
            elif kind := re.fullmatch(rf"({'|'.join(COLLECTIVES)})(-start)?", each.operation):
                channel = each.attribute("channel_id", r"(\d+)") or each.text
                send(channel, kind[1], times * moved(each, scope, bool(kind[2])))
            elif each.operation == "while":
                body = each.attribute("body", NAME)
                products += include(self._count(body, times * self._trips(each, scope)))
            elif each.operation == "conditional":
                branches = each.attribute("branch_computations", r"\{(.*?)\}")
                pair = rf"(?:true|false)_computation={NAME}"
                names = re.findall(NAME, branches) if branches else re.findall(pair, each.text)
                found = [self._count(branch, times) for branch in names]
                products += include(min(found, key=lambda one: one[0]))
        return products, sent

    def _inlined(self, name):
        """The instructions of a computation, with those that run as a part of it."""
        scope = self.computations[name]
        for each in scope.values():
            yield scope, each
            inner = each.attribute("(?:calls|to_apply)", NAME)
            if inner and each.operation in ("fusion", "call", "async-start"):
                yield from self._inlined(inner)

    def _trips(self, loop, scope):
        known = re.search(r"known_trip_count\D*(\d+)", loop.text)
        if known:
            return int(known[1])
        # An index below a constant: where it begins, and its step in the body.
        condition = self.computations[loop.attribute("condition", NAME)]
        body = self.computations[loop.attribute("body", NAME)]
        (compare,) = (each for each in condition.values() if each.operation == "compare")
        index, bound = (condition[name] for name in compare.operands)
        assert "direction=LT" in compare.text, compare.text
        assert (index.operation, bound.operation) == ("get-tuple-element", "constant"), index.text
        place = int(index.attribute("index", r"(\d+)") or 0)
        start = scope[loop.operands[0]]
        (root,) = (each for each in body.values() if each.text.lstrip().startswith("ROOT"))
        begins, step = 0, 1
        if start.operation == "tuple":
            begins = constant(scope.get(start.operands[place])) or 0
        following = body[root.operands[place]]
        if following.operation == "add":
            steps = [constant(body[name]) for name in following.operands]
            step = next((each for each in steps if each is not None), 1)
        return -(-(constant(bound) - begins) // step)


def constant(instruction) -> Any:
    """The number that an instruction is, None if it is none."""
    found = instruction and re.search(r" constant\((-?\d+)\)", instruction.text)
    return int(found[1]) if found else None


def moved(collective, scope, started):
    """The bytes of what a collective takes or gives, whichever is more."""
    taken = sum(scope[name].size() for name in collective.operands)
    if started and not collective.operation.startswith("all-reduce"):
        return max(taken, collective.size() - taken)  # which returns what it took, too
    return max(taken, collective.size())


def dot_operations(dot, left, right):
    del right
    axes = dot.attribute("lhs_contracting_dims", r"\{([\d,]*)\}") or ""
    contracted = math.prod(left.arrays[0][1][int(axis)] for axis in axes.split(",") if axis)
    return 2 * math.prod(dot.arrays[0][1]) * contracted


def convolution_operations(convolution, left, right):
    """Of those products that do not meet padding or the holes of a dilation.

    A TPU's compiler makes convolutions of products, batches of them by dilation.
    """
    labels = convolution.attribute("dim_labels", r"(\S+?_\S+?->\w+)")
    inputs, kernel, outputs = re.split("_|->", labels)
    window = convolution.attribute("window", r"\{([^}]*)\}") or ""
    options = dict(re.findall(r"(\w+)=(\S+)", window))
    (_, sizes), (_, kernel_sizes), (_, output_sizes) = (
        each.arrays[0] for each in (left, right, convolution)
    )
    total = math.prod(output_sizes[outputs.index(label)] for label in "bf")
    total *= 2 * kernel_sizes[kernel.index("i")]

    def option(name, axis, default):
        return options[name].split("x")[axis] if name in options else default

    for axis in range(len(labels.split("_")[0]) - 2):
        label = str(axis)
        places = np.arange(output_sizes[outputs.index(label)]) * int(option("stride", axis, "1"))
        kernels = np.arange(kernel_sizes[kernel.index(label)]) * int(
            option("rhs_dilate", axis, "1")
        )
        holes = int(option("lhs_dilate", axis, "1"))
        before = int(option("pad", axis, "0_0").split("_")[0])
        met = places[:, None] + kernels - before
        length = (sizes[inputs.index(label)] - 1) * holes + 1
        total *= np.count_nonzero((met >= 0) & (met < length) & (met % holes == 0))
    return int(total)


PRODUCTS = {"dot": dot_operations, "convolution": convolution_operations}


# --- Results


def measure(config, data, way, mesh):
    begin = time.perf_counter()
    row = {"data": data, "way": way}
    try:
        compiled = compile_step(config, data, way, mesh)
    except jax.errors.JaxRuntimeError as error:
        needed = re.search(r"\(([\d.]+)G\)", str(error))
        if "RESOURCE_EXHAUSTED" not in str(error) or needed is None:
            raise
        return row | {"out_of_memory_gib": float(needed[1])}
    program, memory = Program(compiled.as_text()), compiled.memory_analysis()
    assert memory is not None
    return row | {
        "operations": program.products,
        "temporaries": memory.temp_size_in_bytes,
        "arguments": memory.argument_size_in_bytes,
        "sent": dict(program.sent),
        "seconds": time.perf_counter() - begin,
    }


def table_of(rows):
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("A step, per chip", no_wrap=True)
    for heading in ("TFLOP", "x plain", "temporaries MiB", "sent MiB", "x plain", "of which"):
        table.add_column(heading, justify="right", no_wrap=heading != "of which")
    for row in rows:
        name = f"{row['data']} data, {row['way']}"
        if "out_of_memory_gib" in row:
            table.add_row(name, "-", "-", f"out of memory: {row['out_of_memory_gib']} GiB")
            continue
        plain = next(
            (one for one in rows if (one["data"], one["way"]) == (row["data"], "plain")), None
        )
        sent = {kind: size / 2**20 for kind, size in row["sent"].items() if size >= 2**19}
        total = sum(row["sent"].values())
        table.add_row(
            name,
            f"{row['operations'] / 1e12:.1f}",
            f"{row['operations'] / plain['operations']:.2f}" if plain else "-",
            f"{row['temporaries'] / 2**20:,.0f}",
            f"{total / 2**20:,.0f}",
            f"{total / sum(plain['sent'].values()):.2f}" if plain else "-",
            ", ".join(f"{kind} {size:,.0f}" for kind, size in sorted(sent.items())),
        )
    return table


def main(argv=None):
    parser = Parser("python -m benchmarks.systems.compiled_transformer", description=__doc__)
    config = parse(parser, Config, argv)
    path = config.out / "results.json"
    check_output(parser, [path], config.overwrite)
    if config.width % 128 or config.sequences % CHIPS:
        parser.error(f"--width must be a multiple of 128, --sequences of {CHIPS}")
    if not importlib.util.find_spec(COMPILER):
        parser.error(f'no {COMPILER}: pip install -e ".[compiled]"')
    jax.config.update("jax_platforms", "cpu")
    mesh, rows = mesh_of_chips(), []
    terminal, console = Console(stderr=True), Console(highlight=False)
    for data in config.data:
        for way in config.ways:
            with terminal.status(f"Compiling {data} data, {way}"):
                rows.append(measure(config, data, way, mesh))
    leaves = jax.tree.leaves(shapes(config), is_leaf=lambda shape: isinstance(shape, tuple))
    console.width = max(console.width, 120)
    console.print(
        f"{sum(map(math.prod, leaves)) / 1e9:.2f} B parameters, {config.layers} layers of "
        f"{config.width}, {config.sequences} x {config.length} tokens; T = {config.tasks} tasks "
        f"that share their data, {CHIPS} with data of their own, one a chip; jax {jax.__version__}"
    )
    console.print(table_of(rows))
    write({path: as_json(config, rows=rows)})
    console.print(f"Written: {path}")


if __name__ == "__main__":
    run_main(main)
