"""What does one training step cost, in time and memory, for each way from losses to an update?

Ways against the number of tasks T: the plain gradient of the summed losses; gradients stacked, all
at once or in chunks; exact surgery without a stack; surgery on the shared features; and exact
surgery in a step that reuses its weights. The tasks share their data (an MLP, a CNN, a ResNet-18,
transformers of few and of many tokens), or have data of their own (of equal and of unequal
shapes), or every sample is a task. All but the plain way end in PCGrad; for samples in NTKMTL, of
which TorchJD has no likeness: its autogram is measured with its own UPGrad's Gramian, where it is
installed, over a plain step of PyTorch. Time is the least of rounds in which the ways take turns,
memory what the compiler reports for temporaries and outputs.
Run `python -m benchmarks.systems.step_cost`.
"""

import dataclasses
import functools
import importlib
import io
import time
from pathlib import Path
from typing import Annotated

import flax.linen as nn
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
from benchmarks.images.networks import resnet18

CHUNK = 4  # tasks differentiated at once in the chunked way
COLOURS = {
    "plain": "#555555",
    "stacked": "#D55E00",
    "chunked": "#E69F00",
    "exact": "#0072B2",
    "reused": "#56B4E9",
    "features": "#009E73",
    "TorchJD": "#CC79A7",
}
NAMES = (
    "mlp",
    "cnn",
    "resnet18",
    "transformer",
    "tokens256",
    "tokens64",
    "own",
    "own_narrow",
    "unequal",
    "samples",
)


@dataclasses.dataclass(frozen=True)
class Config:
    """The options, each with its help and what it may be."""

    networks: Annotated[tuple, "what to train", NAMES] = ("mlp", "transformer", "own", "unequal")
    tasks: Annotated[tuple, "numbers of tasks T", 1] = (2, 8, 32)
    samples: Annotated[tuple, "numbers of samples that are tasks", 1] = (64, 256)
    rounds: Annotated[int, "timed steps of each way", 1] = 5
    memory_limit: Annotated[float, "GB; ways that need more are left out", 0.1] = 8.0
    out: Annotated[Path, "folder for the results", None] = Path("results/step_cost")
    overwrite: Annotated[bool, "replace the results of an earlier run", None] = False


# --- Networks for shared data: a trunk that gives features (batch, size), one linear head a task


class MLP(nn.Module):
    """Layers of one width."""

    width: int = 1024
    layers: int = 6

    @nn.compact
    def __call__(self, inputs):
        for _ in range(self.layers):
            inputs = nn.relu(nn.Dense(self.width)(inputs))
        return inputs


class CNN(nn.Module):
    """Three convolutions with pooling, and a dense layer."""

    @nn.compact
    def __call__(self, images):
        for channels in (32, 64, 128):
            images = nn.max_pool(nn.relu(nn.Conv(channels, (3, 3))(images)), (2, 2), (2, 2))
        return nn.relu(nn.Dense(256)(images.reshape(len(images), -1)))


class ResNet18(nn.Module):
    """A ResNet-18 whose batch normalisation is that of inference, and the mean over positions."""

    @nn.compact
    def __call__(self, images):
        return resnet18()(images, train=False).mean(axis=(1, 2))


class Transformer(nn.Module):
    """Blocks of attention and two dense layers, and the mean over tokens."""

    width: int = 128
    blocks: int = 2

    @nn.compact
    def __call__(self, tokens):
        for _ in range(self.blocks):
            tokens = tokens + nn.MultiHeadDotProductAttention(4)(nn.LayerNorm()(tokens))
            hidden = nn.gelu(nn.Dense(4 * self.width)(nn.LayerNorm()(tokens)))
            tokens = tokens + nn.Dense(self.width)(hidden)
        return tokens.mean(axis=1)


NETWORKS = {
    "mlp": (MLP(), (64, 1024)),
    "cnn": (CNN(), (32, 32, 32, 3)),
    "resnet18": (ResNet18(), (8, 32, 32, 3)),
    "transformer": (Transformer(), (16, 32, 128)),
    "tokens256": (Transformer(512, 4), (4, 64, 512)),
    "tokens64": (Transformer(512, 4), (1, 64, 512)),
}
# Data of each task's own: a network, and the rows of a task; none where a task is a sample.
OWN = {"own": (MLP(1024, 4), 16), "own_narrow": (MLP(400, 3), 128), "samples": (MLP(1024, 4), None)}


# --- The ways


def make_ways(network, num_tasks):
    """Each way as a function of its arguments, and those arguments."""
    if network in NETWORKS:
        trunk, shape = NETWORKS[network]
        return shared_ways(trunk, shape, num_tasks)
    return unequal_ways(num_tasks) if network == "unequal" else own_ways(network, num_tasks)


def shared_ways(trunk, shape, num_tasks):
    """For tasks that share their data."""
    keys = jax.random.split(jax.random.key(0), 4)
    inputs = jax.random.normal(keys[0], shape)
    encoder = trunk.init(keys[1], inputs)
    size = jax.eval_shape(trunk.apply, encoder, inputs).shape[-1]
    heads = jax.random.normal(keys[2], (num_tasks, size)) / size**0.5
    targets = jax.random.normal(keys[3], (len(inputs), num_tasks))

    def task_losses(heads, features, inputs):
        del inputs
        return jnp.mean((features @ heads.T - targets) ** 2, axis=0)

    def losses_fn(params, inputs):
        return task_losses(params["heads"], trunk.apply(params["encoder"], inputs), inputs)

    params = {"encoder": encoder, "heads": heads}
    tx = surgery.pcgrad()
    state = tx.init(params)
    arguments = (params, state, inputs)

    def plain(params, inputs):
        return jax.value_and_grad(lambda params: losses_fn(params, inputs).sum())(params)

    def chunks_of(chunk_size):
        return stacked(surgery.task_value_and_grad(losses_fn, chunk_size=chunk_size), tx)

    features = surgery.feature_surgery_value_and_grad(trunk.apply, task_losses, tx)
    return {
        "plain": (plain, (params, inputs)),
        "stacked": (chunks_of(None), arguments),
        "chunked": (chunks_of(CHUNK), arguments),
        "exact": (surgery.surgery_value_and_grad(losses_fn, tx), arguments),
        "reused": reused(surgery.surgery_value_and_grad, losses_fn, num_tasks, arguments),
        "features": (features, (encoder, heads, state, inputs)),
    }


def own_ways(network, num_tasks):
    """For tasks that have data of their own, all of one shape, or are single samples."""
    trunk, rows = OWN[network]
    width = trunk.width
    keys = jax.random.split(jax.random.key(0), 4)
    shape = (num_tasks, width) if rows is None else (num_tasks, rows, width)
    inputs, targets = jax.random.normal(keys[0], shape), jax.random.normal(keys[1], shape[:-1])
    params = {
        "trunk": trunk.init(keys[2], inputs[0]),
        "head": jax.random.normal(keys[3], (width,)) / width**0.5,
    }

    def loss_fn(params, inputs, targets):
        features = jnp.asarray(trunk.apply(params["trunk"], inputs))
        return jnp.mean((features @ params["head"] - targets) ** 2)

    def plain(params, inputs, targets):
        def total(params):
            return jax.vmap(functools.partial(loss_fn, params))(inputs, targets).sum()

        return jax.value_and_grad(total)(params)

    tx = surgery.ntkmtl() if rows is None else surgery.pcgrad()
    arguments = (params, tx.init(params), inputs, targets)
    exact = surgery.per_task_surgery_value_and_grad
    return {
        "plain": (plain, (params, inputs, targets)),
        "stacked": (stacked(surgery.per_task_value_and_grad(loss_fn), tx), arguments),
        "exact": (exact(loss_fn, tx), arguments),
        "reused": reused(exact, loss_fn, num_tasks, arguments),
    }


def unequal_ways(num_tasks):
    """For tasks of 256 rows and more, each of another number of them."""
    trunk = MLP(256, 3)
    keys = jax.random.split(jax.random.key(0), num_tasks + 2)
    batches = [jax.random.normal(keys[task], (256 + task, 256)) for task in range(num_tasks)]
    params = trunk.init(keys[-1], batches[0])
    tx = surgery.pcgrad()
    arguments = (params, tx.init(params), batches)

    def loss_fn(params, batch):
        return jnp.mean(jnp.asarray(trunk.apply(params, batch)) ** 2)

    def losses_fn(params, batches):
        return [loss_fn(params, batch) for batch in batches]

    def by_hand(params, batches):
        found = [jax.value_and_grad(loss_fn)(params, batch) for batch in batches]
        losses, grads = zip(*found, strict=True)
        return jnp.stack(losses), jax.tree.map(lambda *leaves: jnp.stack(leaves), *grads)

    def plain(params, batches):
        return jax.value_and_grad(lambda params: sum(losses_fn(params, batches)))(params)

    return {
        "plain": (plain, (params, batches)),
        "stacked": (stacked(by_hand, tx), arguments),
        "exact": (surgery.surgery_value_and_grad(losses_fn, tx), arguments),
        "reused": reused(surgery.surgery_value_and_grad, losses_fn, num_tasks, arguments),
    }


def stacked(task_value_and_grad, tx):
    """Gradients first, then a surgery on them."""

    def step(params, state, *data):
        losses, task_grads = task_value_and_grad(params, *data)
        grads, state = tx.update(task_grads, state, params, losses=losses)
        return (losses, grads), state

    return step


def reused(value_and_grad, function, num_tasks, arguments):
    """Exact surgery in a step in which `every` has weights in use."""
    params, _, *data = arguments
    tx = surgery.every(surgery.pcgrad(), k=1000, num_tasks=num_tasks)
    _, state = tx.update(jnp.eye(num_tasks), tx.init(params))
    return value_and_grad(function, tx), (params, state, *data)


def torchjd_ways(num_samples):
    """Plain and with every sample as a task, in PyTorch; nothing where it is not installed."""
    try:
        torch, autogram, aggregation = map(
            importlib.import_module, ("torch", "torchjd.autogram", "torchjd.aggregation")
        )
    except ImportError:
        return {}
    torch.manual_seed(0)
    inputs, targets = torch.randn(num_samples, 1024), torch.randn(num_samples)
    weighting = aggregation.UPGradWeighting()

    def hidden():
        return torch.nn.Linear(1024, 1024)

    def make_network():
        layers = [make() for _ in range(4) for make in (hidden, torch.nn.ReLU)]
        return torch.nn.Sequential(*layers, torch.nn.Linear(1024, 1))

    # The engine looks into every pass of its network.
    plain_network, network = make_network(), make_network()
    engine = autogram.Engine(network, batch_dim=0)

    def losses(network):
        network.zero_grad()
        return (network(inputs)[:, 0] - targets) ** 2

    def exact():
        found = losses(network)
        found.backward(weighting(engine.compute_gramian(found)))

    return {"plain of PyTorch": lambda: losses(plain_network).sum().backward(), "TorchJD": exact}


# --- Measuring


def bytes_needed(compiled):
    analysis = compiled.memory_analysis()
    return analysis.temp_size_in_bytes + analysis.output_size_in_bytes


def measure(network, num_tasks, config, advance):
    """For each way seconds of a step, to trace and to compile, and bytes."""
    steps, found = {}, {}
    for way, (function, arguments) in make_ways(network, num_tasks).items():
        start = time.perf_counter()
        lowered = jax.jit(function).lower(*arguments)
        traced = time.perf_counter()
        compiled = lowered.compile()
        size = bytes_needed(compiled)
        found[way] = {
            "bytes": size,
            "seconds_to_trace": traced - start,
            "seconds_to_compile": time.perf_counter() - traced,
            "seconds": [],
        }
        if way == "exact":
            found[way]["share_by_products"] = share_by_products(function, arguments)
        if size <= config.memory_limit * 1e9:
            steps[way] = functools.partial(compiled, *arguments)
        advance()
    if network == "samples":
        for way, step in torchjd_ways(num_tasks).items():
            steps[way], found[way] = step, {"bytes": float("nan"), "seconds": []}
    for step in steps.values():
        jax.block_until_ready(step())
    rng = np.random.default_rng(0)
    for _ in range(config.rounds):
        # In another order each time, so that no way always comes after the longest.
        for way in rng.permutation(list(steps)):
            start = time.perf_counter()
            jax.block_until_ready(steps[way]())
            found[way]["seconds"].append(time.perf_counter() - start)
        advance()
    return found


def share_by_products(function, arguments):
    """Of how many of the parameters' numbers no gradient is formed for the Gramian."""
    ways = surgery.explain_leaves(function, *arguments).values()
    sizes = [leaf.size for leaf in jax.tree.leaves(arguments[0])]
    taken = [size for size, way in zip(sizes, ways, strict=True) if way.startswith("product")]
    return sum(taken) / sum(sizes)


def relative(found, way, what):
    """The least time of a way, or its bytes, over that of the plain one; NaN where left out."""
    plain = "plain of PyTorch" if way == "TorchJD" else "plain"
    if way not in found or not found[way]["seconds"]:
        return float("nan")
    if what == "bytes":
        return found[way]["bytes"] / found[plain]["bytes"]
    return min(found[way]["seconds"]) / min(found[plain]["seconds"])


def shown(found, way):
    """A cell of the table."""
    if way not in found:
        return ""
    time_over, size = relative(found, way, "seconds"), found[way]["bytes"] / 1e6
    text = f"{time_over:.1f}x" if time_over >= 10 else f"{time_over:.2f}x"
    text = "-" if np.isnan(time_over) else text
    return text if np.isnan(size) else f"{text} {size:5.0f}"


def make_table(results):
    ways = [way for way in list(COLOURS)[1:] if any(way in found for found in results.values())]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("network", "T", "plain", *ways, "trace", "by products"):
        table.add_column(heading, justify="right", no_wrap=True)
    for (network, num_tasks), found in results.items():
        plain = found["plain"]
        traced = found["exact"]["seconds_to_trace"] / plain["seconds_to_trace"]
        table.add_row(
            network,
            f"{num_tasks}",
            f"{1e3 * min(plain['seconds']):.0f} ms {plain['bytes'] / 1e6:5.0f}",
            *(shown(found, way) for way in ways),
            f"{traced:.1f}x",
            f"{found['exact']['share_by_products']:.0%}",
        )
    return table


def make_figure(results):
    """Time above, memory below, a column a network, over the number of tasks."""
    networks = list(dict.fromkeys(network for network, _ in results))
    figure = Figure(figsize=(1 + 3.2 * len(networks), 6), layout="constrained", dpi=150)
    grid = figure.subplots(2, len(networks), squeeze=False)
    labelled = {}
    for column, network in enumerate(networks):
        tasks = [num_tasks for name, num_tasks in results if name == network]
        for axes, what in zip(grid[:, column], ("seconds", "bytes"), strict=True):
            for way, colour in COLOURS.items():
                ratios = [relative(results[network, number], way, what) for number in tasks]
                if not np.isnan(ratios).all():
                    (labelled[way],) = axes.plot(tasks, ratios, "o-", color=colour, ms=4)
            if what == "seconds" and network in NETWORKS:
                bound = [(number + 2) / 3 for number in tasks]
                (labelled["(T + 2) / 3"],) = axes.plot(tasks, bound, ":", color="black", lw=1)
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.set_xticks(tasks, [str(number) for number in tasks])
            axes.minorticks_off()
            low, high = axes.get_ylim()
            axes.set_ylim(min(low, 0.8), max(high, 12))
            axes.spines[["top", "right"]].set_visible(False)
        grid[0, column].set_title(network)
        grid[1, column].set_xlabel("samples" if network == "samples" else "tasks T")
    grid[0, 0].set_ylabel("time of a step, over the plain one")
    grid[1, 0].set_ylabel("memory, over the plain step")
    figure.legend(
        labelled.values(), labelled, loc="outside lower center", ncols=len(labelled), frameon=False
    )
    return figure


def main(argv=None):
    parser = Parser("python -m benchmarks.systems.step_cost", description=__doc__)
    config = parse(parser, Config, argv)
    files = config.out / "results.json", config.out / "cost.png"
    check_output(parser, files, config.overwrite)
    results = {}
    cases = [
        (network, number)
        for network in config.networks
        for number in (config.samples if network == "samples" else config.tasks)
    ]
    with Progress(len(cases) * (4 + config.rounds)) as progress:
        for network, number in cases:
            progress.describe(f"{network}, {number} tasks")
            results[network, number] = measure(network, number, config, progress.advance)
    console = Console(highlight=False)
    console.width = max(console.width, 160)
    console.print(make_table(results))
    console.print(
        "Time of a step, of the plain one and of the others over it, and MB of temporaries and "
        f"outputs. Chunks of {CHUNK} tasks; - where more than {config.memory_limit:g} GB were "
        "needed. Last, the time to trace the exact way over that of the plain one, and the share "
        "of the parameters whose inner products are found without a gradient."
    )
    picture = io.BytesIO()
    make_figure(results).savefig(picture)
    rows = [
        {"network": network, "tasks": tasks, "ways": found}
        for (network, tasks), found in results.items()
    ]
    text = as_json(config, results=rows)
    write(dict(zip(files, (text, picture.getvalue()), strict=True)))
    console.print(f"\nWritten: {files[0]} and {files[1]}")


if __name__ == "__main__":
    run_main(main)
