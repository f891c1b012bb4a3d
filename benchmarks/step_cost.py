"""What does one training step cost, in time and memory, for each way from losses to an update?

Five ways, against the number of tasks T, for an MLP, a CNN and a transformer: the plain gradient of
the summed losses; gradients stacked, all at once or in chunks; streamed surgery, which never
holds two task gradients; and surgery on the shared features. All but the plain one end in
PCGrad. Time is the median over rounds in which the ways take turns, memory what the compiler
reports for temporaries and outputs. Run `python -m benchmarks.step_cost`.
"""

import dataclasses
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
from rich.progress import Progress
from rich.table import Table

import optax_surgery as surgery
from benchmarks.command_line import Parser, as_json, check_output, parse, write

CHUNK = 4  # tasks differentiated at once in the chunked way
COLOURS = {
    "plain": "#555555",
    "stacked": "#D55E00",
    "chunked": "#E69F00",
    "streamed": "#0072B2",
    "features": "#009E73",
}


@dataclasses.dataclass(frozen=True)
class Config:
    """The options, each with its help and what it may be."""

    networks: Annotated[tuple, "what to train", ("mlp", "cnn", "transformer")] = (
        "mlp",
        "cnn",
        "transformer",
    )
    tasks: Annotated[tuple, "numbers of tasks T", 1] = (2, 8, 32)
    rounds: Annotated[int, "timed steps of each way", 1] = 3
    memory_limit: Annotated[float, "GB; ways that need more are left out", 0.1] = 8.0
    out: Annotated[Path, "folder for the results", None] = Path("results/step_cost")
    overwrite: Annotated[bool, "replace the results of an earlier run", None] = False


# --- The networks: a trunk that gives features (batch, size), and one linear head a task


class MLP(nn.Module):
    """Six layers of 1,024 units."""

    @nn.compact
    def __call__(self, inputs):
        for _ in range(6):
            inputs = nn.relu(nn.Dense(1024)(inputs))
        return inputs


class CNN(nn.Module):
    """Three convolutions with pooling, and a dense layer."""

    @nn.compact
    def __call__(self, images):
        for channels in (32, 64, 128):
            images = nn.max_pool(nn.relu(nn.Conv(channels, (3, 3))(images)), (2, 2), (2, 2))
        return nn.relu(nn.Dense(256)(images.reshape(len(images), -1)))


class Transformer(nn.Module):
    """Two blocks of width 128 over 32 tokens, and the mean over tokens."""

    @nn.compact
    def __call__(self, tokens):
        for _ in range(2):
            tokens = tokens + nn.MultiHeadDotProductAttention(4)(nn.LayerNorm()(tokens))
            tokens = tokens + nn.Dense(128)(nn.gelu(nn.Dense(512)(nn.LayerNorm()(tokens))))
        return tokens.mean(axis=1)


NETWORKS = {
    "mlp": (MLP(), (64, 1024)),
    "cnn": (CNN(), (32, 32, 32, 3)),
    "transformer": (Transformer(), (16, 32, 128)),
}


# --- The ways


def make_ways(network, num_tasks):
    """Each way as a function of its arguments, and those arguments."""
    trunk, shape = NETWORKS[network]
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

    def plain(params, inputs):
        return jax.value_and_grad(lambda params: losses_fn(params, inputs).sum())(params)

    def stacked(chunk_size):
        fn = surgery.task_value_and_grad(losses_fn, chunk_size=chunk_size)

        def step(params, state, inputs):
            losses, task_grads = fn(params, inputs)
            grads, state = tx.update(task_grads, state, params, losses=losses)
            return (losses, grads), state

        return step

    features = surgery.feature_surgery_value_and_grad(trunk.apply, task_losses, tx)
    return {
        "plain": (plain, (params, inputs)),
        "stacked": (stacked(None), (params, state, inputs)),
        "chunked": (stacked(CHUNK), (params, state, inputs)),
        "streamed": (surgery.surgery_value_and_grad(losses_fn, tx), (params, state, inputs)),
        "features": (features, (encoder, heads, state, inputs)),
    }


# --- Measuring


def bytes_needed(compiled):
    analysis = compiled.memory_analysis()
    return analysis.temp_size_in_bytes + analysis.output_size_in_bytes


def measure(network, num_tasks, config, advance):
    """Seconds and bytes of each way; NaN seconds where it needs more memory than allowed."""
    steps, found = {}, {}
    for way, (function, arguments) in make_ways(network, num_tasks).items():
        compiled = jax.jit(function).lower(*arguments).compile()
        size = bytes_needed(compiled)
        found[way] = {"bytes": size, "seconds": []}
        if size <= config.memory_limit * 1e9:
            steps[way] = (compiled, arguments)
            jax.block_until_ready(compiled(*arguments))
        advance()
    for _ in range(config.rounds):
        for way, (compiled, arguments) in steps.items():
            start = time.perf_counter()
            jax.block_until_ready(compiled(*arguments))
            found[way]["seconds"].append(time.perf_counter() - start)
        advance()
    return found


def relative(found, way, what):
    """The median of a way over that of the plain one."""
    if what == "bytes":
        return found[way]["bytes"] / found["plain"]["bytes"]
    pairs = zip(found[way]["seconds"], found["plain"]["seconds"], strict=False)
    ratios = [seconds / plain for seconds, plain in pairs]
    return float(np.median(ratios)) if ratios else float("nan")


def make_table(results):
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("network", "T", "plain", *list(COLOURS)[1:]):
        table.add_column(heading, justify="right", no_wrap=True)
    for (network, num_tasks), found in results.items():
        plain = np.median(found["plain"]["seconds"])
        ratios = [
            f"{relative(found, way, 'seconds'):5.1f}x  {relative(found, way, 'bytes'):5.1f}x"
            if found[way]["seconds"]
            else f"  -      {relative(found, way, 'bytes'):5.1f}x"
            for way in list(COLOURS)[1:]
        ]
        size = found["plain"]["bytes"] / 1e6
        table.add_row(network, f"{num_tasks}", f"{1e3 * plain:.0f} ms  {size:.0f} MB", *ratios)
    return table


def make_figure(results, config):
    """Time above, memory below, a column a network, over the number of tasks."""
    figure = Figure(figsize=(1 + 3.4 * len(config.networks), 6), layout="constrained", dpi=150)
    grid = figure.subplots(2, len(config.networks), sharex=True, squeeze=False)
    for column, network in enumerate(config.networks):
        for axes, what in zip(grid[:, column], ("seconds", "bytes"), strict=True):
            for way, colour in COLOURS.items():
                ratios = [relative(results[network, tasks], way, what) for tasks in config.tasks]
                axes.plot(config.tasks, ratios, "o-", color=colour, label=way, ms=4)
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.set_xticks(config.tasks, [str(tasks) for tasks in config.tasks])
            axes.spines[["top", "right"]].set_visible(False)
        grid[0, column].set_title(network)
        grid[1, column].set_xlabel("tasks T")
    grid[0, 0].set_ylabel("time of a step, over the plain one")
    grid[1, 0].set_ylabel("memory, over the plain step")
    grid[0, 0].legend(frameon=False, fontsize=9)
    return figure


def main(argv=None):
    parser = Parser("python -m benchmarks.step_cost", description=__doc__)
    config = parse(parser, Config, argv)
    files = config.out / "results.json", config.out / "cost.png"
    check_output(parser, files, config.overwrite)
    results = {}
    total = len(config.networks) * len(config.tasks) * (len(COLOURS) + config.rounds)
    terminal = Console(stderr=True)
    with Progress(console=terminal, transient=True, disable=not terminal.is_terminal) as progress:
        bar = progress.add_task("Measuring", total=total)
        for network in config.networks:
            for tasks in config.tasks:
                progress.update(bar, description=f"{network}, {tasks} tasks")
                results[network, tasks] = measure(
                    network, tasks, config, lambda: progress.advance(bar)
                )
    console = Console(highlight=False)
    console.width = max(console.width, 110)
    console.print(make_table(results))
    console.print(
        "Time and memory of a step: of the plain one, and of the others over it. "
        f"Chunks of {CHUNK} tasks; - where more than {config.memory_limit:g} GB were needed."
    )
    picture = io.BytesIO()
    make_figure(results, config).savefig(picture)
    rows = [
        {"network": network, "tasks": tasks, "ways": found}
        for (network, tasks), found in results.items()
    ]
    text = as_json(config, results=rows)
    write(dict(zip(files, (text, picture.getvalue()), strict=True)))
    console.print(f"\nWritten: {files[0]} and {files[1]}")


if __name__ == "__main__":
    main()
