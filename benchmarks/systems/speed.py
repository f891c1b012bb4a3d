"""How fast is a surgery, against its peers and against what memory allows?

The jitted update of each method, on stacks of T gradients of length N and on those of a ResNet-50
and a small transformer, against TorchJD on the same arrays, against PCGrad as it is usually written
in JAX, and against `jnp.mean`. The floor is what no surgery can do without: to read the stack
twice and to write the update once, timed in the same run. All take turns in every round. Before
that, what it takes to trace, lower and compile each method, against the same rule between plain
products. Run `python -m benchmarks.systems.speed`; the peers are the extra `peers`, and who is
missing is named.
"""

import collections
import dataclasses
import functools
import importlib
import importlib.metadata
import io
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, NamedTuple

# JAX would take most of a GPU's memory for itself, and leave little to PyTorch.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
# The threads of the LAPACK that JAX calls on a CPU wait busily for tens of milliseconds, and slow
# down who is timed next, PyTorch, which has a LAPACK of its own, as well as JAX.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import psutil
from jax import lax
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table

import optax_surgery as surgery
from benchmarks.common.command_line import Parser, as_json, check_output, parse, run_main, write
from benchmarks.common.progress import Progress


def peers() -> tuple[Any, Any, Any]:
    """PyTorch and the parts of TorchJD that are used; all None where one is missing."""
    try:
        torch = importlib.import_module("torch")
        aggregation = importlib.import_module("torchjd.aggregation")
        autojac = importlib.import_module("torchjd.autojac")
    except ImportError:
        return None, None, None
    return torch, aggregation, autojac


torch, aggregation, autojac = peers()

CAGRAD_C = 0.4
METHODS = {
    "pcgrad": surgery.pcgrad,
    "aligned_mtl": surgery.aligned_mtl,
    "mgda": surgery.mgda,
    "upgrad": surgery.upgrad,
    "cagrad": functools.partial(surgery.cagrad, c=CAGRAD_C),
}
IN_TORCHJD = {
    "pcgrad": lambda: aggregation.PCGrad(),
    "aligned_mtl": lambda: aggregation.AlignedMTL(),
    "mgda": lambda: aggregation.MGDA(),
    "upgrad": lambda: aggregation.UPGrad(),
    "cagrad": lambda: aggregation.CAGrad(c=CAGRAD_C),
}
COLOURS = {
    "pcgrad": "#D55E00",
    "aligned_mtl": "#009E73",
    "mgda": "#0072B2",
    "upgrad": "#CC79A7",
    "cagrad": "#E69F00",
}
LINES = {
    "plain JAX pcgrad": {"color": "#999999", "ls": "-.", "label": "plain JAX"},
    "TorchJD pcgrad": {"color": "#0072B2", "ls": "--", "label": "TorchJD"},
    "optax_surgery pcgrad": {"color": "#D55E00", "ls": "-", "label": "optax_surgery"},
}
STEP = "gradients", "step, pcgrad", "step, mean"
ONE_LEAF = "one leaf"
NETWORK_TASKS = 4
BLOCK = 100_000  # columns of a stack that are drawn; longer gradients repeat them
MEMORY_SHARE = 3  # a stack may take one part of so many of the memory that is free
PLAIN_LIMIT = 1e9  # T^2 N beyond which the plain PCGrad would take most of the run
ROUNDS = range(5, 50)  # at least and at most
SLOW_ROUNDS = 3  # at least, for what takes more than its share of the time
SAMPLE_SECONDS = 2e-3  # shorter calls are timed several at once
# The leaves whose set-up is timed: so many of each shape. One of each is compiled, as XLA compiles
# every leaf anew and would take minutes.
SETUP_SHAPES = (256,), (256, 64), (64, 64, 3, 3), (512, 512)
SETUP_COPIES = 50
SETUP_REPEATS = 3
PAUSE_SECONDS = 2e-3  # before each sample, in which the other runtime's threads fall asleep


@dataclasses.dataclass(frozen=True)
class Config:
    """The options, each with its help and what it may be."""

    tasks: Annotated[tuple, "numbers of tasks T", 1] = (2, 4, 10, 40, 128)
    sizes: Annotated[tuple, "lengths N of a gradient, on one leaf", 1] = (
        100_000,
        1_000_000,
        10_000_000,
        100_000_000,
    )
    networks: Annotated[tuple, "whose leaves and training steps", ("resnet50", "transformer")] = (
        "transformer",
        "resnet50",
    )
    methods: Annotated[tuple, "what to time", tuple(METHODS)] = tuple(METHODS)
    setup_tasks: Annotated[tuple, "numbers of tasks whose set-up is timed", 1] = (4, 50)
    seconds: Annotated[
        float, "that the run may take after the set-up; what would not fit is left out", 1
    ] = 225.0
    out: Annotated[Path, "folder for the results", None] = Path("results/speed")
    overwrite: Annotated[bool, "replace the results of an earlier run", None] = False


# --- What is operated on


class Case(NamedTuple):
    """One stack of gradients: on one leaf, or on a network's."""

    leaves: str
    num_tasks: int
    size: int

    def __str__(self):
        return f"{self.leaves}, T = {self.num_tasks}, N = {self.size:.3g}"


class Bottleneck(nn.Module):
    """Three convolutions beside a shortcut."""

    channels: int
    stride: int

    @nn.compact
    def __call__(self, inputs):
        conv = functools.partial(nn.Conv, use_bias=False)
        outputs = nn.relu(nn.GroupNorm()(conv(self.channels, (1, 1))(inputs)))
        outputs = nn.relu(nn.GroupNorm()(conv(self.channels, (3, 3), self.stride)(outputs)))
        outputs = nn.GroupNorm()(conv(4 * self.channels, (1, 1))(outputs))
        if inputs.shape != outputs.shape:
            inputs = nn.GroupNorm()(conv(4 * self.channels, (1, 1), self.stride)(inputs))
        return nn.relu(inputs + outputs)


class ResNet50(nn.Module):
    """He et al. 2016, with group instead of batch normalisation: leaves of the same shapes."""

    @nn.compact
    def __call__(self, images):
        outputs = nn.Conv(64, (7, 7), 2, use_bias=False)(images)
        outputs = nn.max_pool(nn.relu(nn.GroupNorm()(outputs)), (3, 3), (2, 2), "SAME")
        for stage, blocks in enumerate((3, 4, 6, 3)):
            for block in range(blocks):
                stride = 2 if stage and not block else 1
                outputs = Bottleneck(64 * 2**stage, stride)(outputs)
        return nn.Dense(1000)(outputs.mean(axis=(1, 2)))


class Transformer(nn.Module):
    """Six blocks of width 512 and a vocabulary of 8,192."""

    @nn.compact
    def __call__(self, tokens):
        embedding = nn.Embed(8192, 512)
        outputs = embedding(tokens)
        for _ in range(6):
            outputs += nn.MultiHeadDotProductAttention(8)(nn.LayerNorm()(outputs))
            outputs += nn.Dense(512)(nn.gelu(nn.Dense(2048)(nn.LayerNorm()(outputs))))
        return embedding.attend(nn.LayerNorm()(outputs))


NETWORKS = {
    "resnet50": (ResNet50(), jax.ShapeDtypeStruct((8, 64, 64, 3), jnp.float32)),
    "transformer": (Transformer(), jax.ShapeDtypeStruct((4, 128), jnp.int32)),
}


def one_leaf_stack(case):
    """Gradients with a common part, of either sign, so that many of them conflict."""
    keys = jax.random.split(jax.random.key(0), 3)
    width = min(BLOCK, case.size)
    block = jax.random.normal(keys[0], (case.num_tasks, width))
    signs = jax.random.normal(keys[1], (case.num_tasks, 1))
    block += signs * jax.random.normal(keys[2], (1, width))
    repeats = -(-case.size // width)
    return jax.jit(lambda block: jnp.tile(block, (1, repeats))[:, : case.size])(block)


@functools.cache
def param_shapes(name):
    network, inputs = NETWORKS[name]
    return jax.eval_shape(network.init, jax.random.key(0), inputs)


def network_gradients(name, num_tasks):
    """Parameters, and a function from them to the stacked gradients of all tasks.

    The tasks are to predict different random labels.
    """
    network, inputs = NETWORKS[name]
    rng = np.random.default_rng(0)
    shapes = param_shapes(name)
    params = jax.tree.map(lambda leaf: rng.normal(0, 0.02, leaf.shape).astype(leaf.dtype), shapes)
    labelled = jax.eval_shape(network.apply, shapes, inputs).shape
    labels = jnp.asarray(rng.integers(labelled[-1], size=(num_tasks, *labelled[:-1])))
    drawn = rng.integers(8192, size=inputs.shape).astype(inputs.dtype)

    def losses_fn(params):
        logits = network.apply(params, jnp.asarray(drawn))
        cross_entropy = optax.softmax_cross_entropy_with_integer_labels
        return jax.vmap(lambda labels: jnp.mean(cross_entropy(logits, labels)))(labels)

    gradients = jax.jit(lambda params: surgery.task_value_and_grad(losses_fn)(params)[1])
    return jax.tree.map(jnp.asarray, params), gradients


# --- The contestants: functions without arguments, which return when their result is there


def waiting(function, *arguments, **options):
    """The jitted function of these arguments, waited for."""
    function = jax.jit(function, **options)
    return lambda: jax.block_until_ready(function(*arguments))


def ours(method, stack):
    tx = method()
    state = tx.init(jax.tree.map(lambda leaf: leaf[0], stack))
    update = jax.jit(lambda stack, state: tx.update(stack, state)[0])
    return lambda: jax.block_until_ready(update(stack, state))


def in_torchjd(aggregator, stack):
    """TorchJD on the same memory: on one leaf as a matrix, on several as it takes Jacobians."""
    jacobians = [torch.from_dlpack(leaf) for leaf in jax.tree.leaves(stack)]
    params = [torch.zeros_like(jacobian[0], requires_grad=True) for jacobian in jacobians]
    for param, jacobian in zip(params, jacobians, strict=True):
        param.jac = jacobian

    def on_leaves():
        for param in params:
            param.grad = None
        # Without a concatenation, which would cost another copy of the stack.
        autojac.jac_to_grad(params, aggregator, retain_jac=True, optimize_gramian_computation=True)
        return [param.grad for param in params]

    def call():
        with torch.no_grad():
            matrix = isinstance(stack, jax.Array)
            update = [aggregator(jacobians[0])] if matrix else on_leaves()
            if jacobians[0].is_cuda:
                torch.cuda.synchronize()
        return update

    return call


def plain_pcgrad(stack, key):
    """PCGrad as it is usually written in JAX: each flat gradient against each other one."""
    leaves = jax.tree.leaves(stack)
    gradients = jnp.concatenate([leaf.reshape(len(leaf), -1) for leaf in leaves], axis=1)
    tasks = jnp.arange(len(gradients))
    keys = jax.random.split(key, len(tasks))
    orders = jax.vmap(lambda key: jax.random.permutation(key, tasks))(keys)

    def project_on_others(task, gradient, order):
        def project(gradient, other):
            product = jnp.dot(gradient, gradients[other])
            step = jnp.minimum(product, 0) / jnp.dot(gradients[other], gradients[other])
            return jnp.where(other == task, gradient, gradient - step * gradients[other]), None

        return lax.scan(project, gradient, order)[0]

    return lax.map(lambda each: project_on_others(*each), (tasks, gradients, orders)).sum(axis=0)


def baselines(stack):
    """The mean, ours and `jnp.mean`, and ways to read a stack and to write an update."""
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), stack)

    def reduce(function):
        return lambda stack: [function(leaf) for leaf in jax.tree.leaves(stack)]

    def fill(value):
        return jax.tree.map(lambda leaf: jnp.full(leaf.shape, value, leaf.dtype), shapes)

    refill = jax.jit(lambda old, value: fill(value), donate_argnums=0, keep_unused=True)
    kept = [fill(0.0)]

    def write_in_place():
        kept[0] = jax.block_until_ready(refill(kept[0], 1.0))

    return {
        "read by sum": waiting(reduce(jnp.sum), stack),
        "read by max": waiting(reduce(jnp.max), stack),
        "write": waiting(fill, 1.0),
        "write in place": write_in_place,
        "jnp.mean": waiting(
            lambda stack: jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), stack), stack
        ),
        "optax_surgery mean": ours(surgery.mean, stack),
    }


def training_step(method, params, task_grads):
    """Update and new parameters, from gradients that are there; memory is used anew each time."""
    tx = optax.chain(method(), optax.adam(1e-3))
    carried = [jax.tree.map(jnp.copy, params), tx.init(params)]

    @functools.partial(jax.jit, donate_argnums=(1, 2))
    def step(task_grads, params, state):
        updates, state = tx.update(task_grads, state, params)
        return optax.apply_updates(params, updates), state

    def call():
        carried[:] = jax.block_until_ready(step(task_grads, *carried))

    return call


def torchjd_aggregators(config, left_out):
    """Those that can be had, by method."""
    if torch is None:
        left_out["torch or torchjd is not installed"] = ["TorchJD"]
        return {}
    on_gpu = jax.default_backend() == "gpu" and torch.cuda.is_available()
    if not on_gpu and jax.default_backend() != "cpu":
        left_out[f"PyTorch does not see this {jax.default_backend()}"] = ["TorchJD"]
        return {}
    torch.set_num_threads(os.cpu_count())
    found = {}
    for method in config.methods:
        try:
            found[method] = IN_TORCHJD[method]()
        except ImportError as error:
            left_out[" ".join(str(error).split())] = [f"TorchJD's {method}"]
    return found


# --- Measuring


class Job(NamedTuple):
    """Some methods on one stack, with or without all else that they are compared with."""

    case: Case
    methods: tuple
    first: bool

    @property
    def cost(self):
        """In which jobs are ordered: products of the Gramian, but reading is never free."""
        return self.case.size * self.case.num_tasks * max(self.case.num_tasks, 20)


def free_memory():
    """Bytes that the device has left."""
    stats = jax.devices()[0].memory_stats()  # None on a CPU
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    return psutil.virtual_memory().available


def plan(config, left_out):
    """The jobs by cost, those of networks among them. What does not fit into memory is left out."""
    jobs = []
    for name in config.networks:
        size = sum(leaf.size for leaf in jax.tree.leaves(param_shapes(name)))
        jobs.append(Job(Case(name, NETWORK_TASKS, size), config.methods, True))
    grid = []
    memory = free_memory()
    for case in [Case(ONE_LEAF, tasks, size) for tasks in config.tasks for size in config.sizes]:
        if 4 * case.num_tasks * case.size * MEMORY_SHARE > memory:
            reason = f"of {memory / 1e9:.3g} GB that are free, a stack may take 1/{MEMORY_SHARE}"
            left_out.setdefault(reason, []).append(str(case))
            continue
        first, rest = config.methods[:1], config.methods[1:]
        grid.append(Job(case, first, True))
        grid += [Job(case, rest, False)] if rest else []
    return sorted(jobs + grid, key=lambda job: (job.cost, not job.first))


def make_calls(job, aggregators, left_out):
    """The contestants of a job, by name."""
    case, calls = job.case, {}
    if case.leaves in NETWORKS:
        params, gradients = network_gradients(case.leaves, case.num_tasks)
        stack = jax.block_until_ready(gradients(params))
        calls = {
            "gradients": lambda: jax.block_until_ready(gradients(params)),
            "step, pcgrad": training_step(surgery.pcgrad, params, stack),
            "step, mean": training_step(surgery.mean, params, stack),
        }
    else:
        stack = jax.block_until_ready(one_leaf_stack(case))
    if job.first:
        calls |= baselines(stack)
    if "pcgrad" in job.methods:
        if case.num_tasks**2 * case.size <= PLAIN_LIMIT:
            calls["plain JAX pcgrad"] = waiting(plain_pcgrad, stack, jax.random.key(0))
        else:
            reason = f"it takes long where T² N is above {PLAIN_LIMIT:.0e}"
            left_out.setdefault(reason, []).append(f"plain JAX pcgrad ({case})")
    for method in job.methods:
        calls[f"optax_surgery {method}"] = ours(METHODS[method], stack)
        if method in aggregators:
            calls[f"TorchJD {method}"] = in_torchjd(aggregators[method], stack)
    return calls


def sample(call, repeats):
    """Seconds of a call, the mean over some without a break."""
    time.sleep(PAUSE_SECONDS)
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def measure(calls, seconds):
    """Samples of every contestant, which take turns in a new order in each round."""
    repeats = {
        name: int(np.clip(SAMPLE_SECONDS / sample(call, 1), 1, 100)) for name, call in calls.items()
    }
    found = {name: [] for name in calls}
    rng = np.random.default_rng(0)
    start = time.perf_counter()
    for turn in range(ROUNDS.stop):
        if turn >= ROUNDS.start and time.perf_counter() - start > seconds:
            break
        for name in rng.permutation(list(calls)):
            spent = sum(found[name]) * repeats[name]
            if turn < SLOW_ROUNDS or spent < seconds / 4:
                found[name].append(sample(calls[name], repeats[name]))
    return found


def differences(updates, methods):
    """How far TorchJD's update is from ours, over its length."""
    found = {}
    for method in methods:
        if f"TorchJD {method}" in updates:
            pairs = zip(
                jax.tree.leaves(updates[f"optax_surgery {method}"]),
                updates[f"TorchJD {method}"],
                strict=True,
            )
            pairs = [(np.asarray(ours), theirs.cpu().numpy()) for ours, theirs in pairs]
            distance = np.sqrt(sum(np.sum((ours - theirs) ** 2) for ours, theirs in pairs))
            found[method] = distance / np.sqrt(sum(np.sum(theirs**2) for _, theirs in pairs))
    return found


def run(config, jobs, aggregators, left_out, progress):
    """Samples and differences by case. Time that a job does not need goes to those after it."""
    results, last = {}, {}
    end = time.perf_counter() + config.seconds
    for number, job in enumerate(jobs):
        progress.describe(str(job.case))
        progress.advance()  # here, as it may be left out
        start = time.perf_counter()
        share = (end - start) / (len(jobs) - number)
        # A larger stack takes as long to compile and, in proportion to its cost, longer to run.
        setup, turn, cost = last.get(job.first, (0, 0, job.cost))
        expected_end = start + setup + (2 + ROUNDS.start) * turn * job.cost / cost
        if expected_end > end or not (job.first or job.case in results):
            reason = f"it would not have fitted into --seconds {config.seconds:g}"
            left_out.setdefault(reason, []).append(f"{' '.join(job.methods)} ({job.case})")
            continue
        calls = make_calls(job, aggregators, left_out)
        in_jax = {name: call for name, call in calls.items() if not name.startswith("TorchJD")}
        with ThreadPoolExecutor() as pool:  # they compile side by side
            updates = dict(zip(in_jax, pool.map(lambda call: call(), in_jax.values()), strict=True))
        updates |= {name: call() for name, call in calls.items() if name not in in_jax}
        apart = differences(updates, job.methods)
        del updates
        setup = time.perf_counter() - start
        seconds = measure(calls, share - setup)
        if job.case.leaves not in NETWORKS:
            last[job.first] = setup, sum(map(np.median, seconds.values())), job.cost
        result = results.setdefault(job.case, {"seconds": {}, "differences": {}})
        result["seconds"] |= seconds
        result["differences"] |= apart
    return results


# --- Set-up


def surgery_by_plain_products(method, stack):
    """The update of a method as a user of JAX might write it, with our rule for the weights."""
    leaves = jax.tree.leaves(stack)
    products = functools.partial(jnp.tensordot, precision=lax.Precision.HIGHEST)
    axes = [tuple(range(1, leaf.ndim)) for leaf in leaves]
    gramian = sum(
        products(leaf, leaf, axes=(own, own)) for leaf, own in zip(leaves, axes, strict=True)
    )
    tx = method()
    weights, _ = tx.update(jnp.eye(len(leaves[0])), tx.init(None), gramian=gramian)
    return jax.tree.map(lambda leaf: products(weights, leaf, axes=(0, 0)), stack)


def setup_seconds(function, num_tasks):
    """Seconds to trace and to lower a function of all leaves, and to compile it of one of each."""

    def stack(copies):
        shapes = [(num_tasks, *shape) for shape in SETUP_SHAPES for _ in range(copies)]
        return [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]

    found = []
    for _ in range(SETUP_REPEATS):
        jax.clear_caches()  # else the second method would find what the first has traced
        start = time.perf_counter()
        traced = jax.jit(function).trace(stack(SETUP_COPIES))
        middle = time.perf_counter()
        traced.lower()
        found.append((middle - start, time.perf_counter() - middle))
    trace, lower = min(found, key=sum)
    lowered = jax.jit(function).lower(stack(1))
    start = time.perf_counter()
    lowered.compile()
    return {"trace": trace, "lower": lower, "compile": time.perf_counter() - start}


def measure_setup(config, progress):
    """For each method and number of tasks, what ours takes and what plain products take."""
    cases = [(method, tasks) for method in config.methods for tasks in config.setup_tasks]
    rows = []
    for method, tasks in cases:
        progress.describe(f"Set-up, {method}, {tasks} tasks")
        tx = METHODS[method]()
        ways = {
            "optax_surgery": lambda stack, tx=tx: tx.update(stack, tx.init(None))[0],
            "plain JAX": functools.partial(surgery_by_plain_products, METHODS[method]),
        }
        seconds = {name: setup_seconds(function, tasks) for name, function in ways.items()}
        rows.append({"method": method, "num_tasks": tasks, "seconds": seconds})
        progress.advance()
    return rows


def make_setup_table(rows):
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    steps = "trace", "lower", "compile"
    table.add_column("set-up")
    for heading in ("T", *(f"{step}\nms" for step in steps), "trace, lower\n/ plain JAX"):
        table.add_column(heading, justify="right")
    for row in rows:
        ours, plain = (row["seconds"][name] for name in ("optax_surgery", "plain JAX"))
        ratio = (ours["trace"] + ours["lower"]) / (plain["trace"] + plain["lower"])
        table.add_row(
            row["method"],
            f"{row['num_tasks']}",
            *(f"{1e3 * ours[step]:.0f}" for step in steps),
            f"{ratio:.2f}",
        )
    return table


# --- What it finds


def together(*samples):
    """Those of the rounds that all took part in."""
    rounds = min(map(len, samples))
    return np.array([each[:rounds] for each in samples])


def floor(seconds):
    """Two reads and one write, by the ways that are fastest here."""
    read, write = (
        min((each for name, each in seconds.items() if name.startswith(way)), key=np.median)
        for way in ("read", "write")
    )
    read, write = together(read, write)
    return 2 * read + write


def training_steps(seconds):
    """Whole steps with PCGrad and with the mean, on the same gradients."""
    gradients, pcgrad, mean = together(*(seconds[name] for name in STEP))
    return np.array([gradients + pcgrad, gradients + mean])


def ratios(seconds):
    """What is over what in one case: the quartiles of the ratios in a round, median amid them."""
    pairs = {
        f"{method} / TorchJD": (f"optax_surgery {method}", f"TorchJD {method}")
        for method in METHODS
    }
    pairs["pcgrad / plain JAX"] = "optax_surgery pcgrad", "plain JAX pcgrad"
    pairs["mean / jnp.mean"] = "optax_surgery mean", "jnp.mean"
    both = {
        name: together(seconds[above], seconds[below])
        for name, (above, below) in pairs.items()
        if above in seconds and below in seconds
    }
    if "optax_surgery pcgrad" in seconds:
        both["pcgrad / floor"] = together(seconds["optax_surgery pcgrad"], floor(seconds))
    if STEP[0] in seconds:
        both["training step"] = training_steps(seconds)
    return {
        name: np.percentile(above / below, (25, 50, 75)) for name, (above, below) in both.items()
    }


def shown(quartiles):
    if quartiles is None:
        return "-"
    low, median, high = quartiles
    return f"{median:.2f} ±{(high - low) / 2:.2f}"


def make_table(results):
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    names = {
        "pcgrad / floor": "pcgrad\n/ floor",
        **{f"{method} / TorchJD": f"{method}\n/ TorchJD" for method in METHODS},
        "pcgrad / plain JAX": "pcgrad /\nplain JAX",
        "mean / jnp.mean": "mean /\njnp.mean",
    }
    for heading in ("stack", "T", "N", "floor\nms", "pcgrad\nms", *names.values()):
        justify = "left" if heading == "stack" else "right"
        table.add_column(heading, justify=justify, no_wrap=True)
    for case, result in results.items():
        seconds = result["seconds"]
        pcgrad = seconds.get("optax_surgery pcgrad")
        table.add_row(
            case.leaves,
            f"{case.num_tasks}",
            f"{case.size:.3g}".replace("e+0", "e"),
            f"{1e3 * np.median(floor(seconds)):.3g}",
            f"{1e3 * np.median(pcgrad):.3g}" if pcgrad else "-",
            *(shown(result["ratios"].get(name)) for name in names),
        )
    return table


def in_words(results, left_out):
    for case, result in results.items():
        if "training step" in result["ratios"]:
            gradients, pcgrad, mean = (np.median(result["seconds"][name]) for name in STEP)
            yield (
                f"A training step of {case.leaves} with chain(pcgrad(), adam) takes "
                f"{shown(result['ratios']['training step'])} times that with chain(mean(), adam): "
                f"{1e3 * gradients:.0f} ms for the {case.num_tasks} gradients, then "
                f"{1e3 * pcgrad:.0f} against {1e3 * mean:.0f} ms."
            )
    for reason, what in left_out.items():
        yield f"Left out, as {reason}: {'; '.join(what)}."


SETUP_LEGEND = f"""\
Of {SETUP_COPIES * len(SETUP_SHAPES)} leaves of {len(SETUP_SHAPES)} shapes, to trace and to lower; \
of one leaf of each shape, to compile.
"""

LEGEND = """\
Ratios of times, medians over rounds ± half the distance of the quartiles. Floor: two reads of the
stack and one write of the update.
"""


def make_figure(results):
    """Time of PCGrad above, methods over TorchJD's below; against N on the left, T on the right."""
    figure = Figure(figsize=(11, 8.5), layout="constrained", dpi=150)
    panels = figure.subplots(2, 2, sharex="col", sharey="row")
    grid = {case: found for case, found in results.items() if case.leaves == ONE_LEAF}
    if not grid:
        figure.clear()
        figure.text(0.5, 0.5, "There was no time for stacks on one leaf.", ha="center")
        return figure

    def draw(axes, along, values, **style):
        xs = [getattr(case, along) for case in values]
        axes.plot(xs, list(values.values()), marker="o", ms=4, **style)

    axes_of_cases = (("size", "num_tasks"), ("num_tasks", "size"))
    for (times, relative), (along, fixed) in zip(panels.T, axes_of_cases, strict=True):
        counts = collections.Counter(getattr(case, fixed) for case in grid)
        chosen = max(counts, key=lambda value: (counts[value], value), default=0)
        row = {case: found for case, found in grid.items() if getattr(case, fixed) == chosen}
        for name, style in LINES.items():
            timed = {
                case: 1e3 * np.median(found["seconds"][name])
                for case, found in row.items()
                if name in found["seconds"]
            }
            draw(times, along, timed, **style)
        floors = {case: 1e3 * np.median(floor(found["seconds"])) for case, found in row.items()}
        draw(times, along, floors, color="black", lw=1, label="floor: 2 reads, 1 write")
        for method, colour in COLOURS.items():
            name = f"{method} / TorchJD"
            medians = {
                case: found["ratios"][name][1]
                for case, found in row.items()
                if name in found["ratios"]
            }
            draw(relative, along, medians, color=colour, label=method)
        relative.axhline(1, color="black", lw=0.8)
        times.set_title(f"T = {chosen}" if fixed == "num_tasks" else f"N = {chosen:.3g}")
        relative.set_xscale("log")
        relative.set_xlabel({"size": "length of a gradient N", "num_tasks": "tasks T"}[along])
        if along == "num_tasks":
            tasks = sorted({case.num_tasks for case in row})
            relative.set_xticks(tasks, [str(each) for each in tasks])
            relative.minorticks_off()
        for axes in (times, relative):
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("{x:g}" if axes is relative else "")
            axes.tick_params(axis="y", which="minor", labelsize=7)
            axes.spines[["top", "right"]].set_visible(False)
    panels[0, 0].set_ylabel("time of PCGrad's update, ms")
    panels[1, 0].set_ylabel("time over TorchJD's")
    for axes in panels[:, 0]:
        axes.legend(frameon=False)
    return figure


# --- The command line


def machine(busy):
    """What ran on what, and whether something else ran there too."""
    packages = ["jax", *(["torch", "torchjd"] if torch is not None else [])]
    versions = [f"{name} {importlib.metadata.version(name)}" for name in packages]
    kind = jax.devices()[0].device_kind
    yield f"On {kind} with {os.cpu_count()} CPU cores, {', '.join(versions)}."
    if busy > 0.5:
        yield (
            f"When this began, other programs kept {busy:.1f} cores busy: these figures are not "
            "those of an idle machine."
        )


def main(argv=None):
    parser = Parser("python -m benchmarks.systems.speed", description=__doc__)
    config = parse(parser, Config, argv)
    files = config.out / "results.json", config.out / "speed.png"
    check_output(parser, files, config.overwrite)
    busy = psutil.cpu_percent(interval=1.0) / 100 * (os.cpu_count() or 1)
    left_out = {}
    aggregators = torchjd_aggregators(config, left_out)
    jobs = plan(config, left_out)
    if not jobs:
        parser.error("nothing of --tasks and --sizes fits into memory, and there are no --networks")
    total = len(jobs) + len(config.methods) * len(config.setup_tasks)
    with Progress(total) as progress:
        setup = measure_setup(config, progress)
        results = run(config, jobs, aggregators, left_out, progress)
    for result in results.values():
        result["ratios"] = ratios(result["seconds"])

    findings = [*machine(busy), *in_words(results, left_out)]
    console = Console(highlight=False)
    console.width = max(console.width, 140)
    console.print(make_setup_table(setup), SETUP_LEGEND, sep="\n", soft_wrap=True)
    console.print(make_table(results), LEGEND, *findings, sep="\n", soft_wrap=True)

    picture = io.BytesIO()
    make_figure(results).savefig(picture)
    rows = [{**case._asdict(), **result} for case, result in results.items()]
    text = as_json(config, findings=findings, busy_cores=busy, setup=setup, results=rows)
    write(dict(zip(files, (text, picture.getvalue()), strict=True)))
    console.print(f"\nWritten: {files[0]} and {files[1]}")


if __name__ == "__main__":
    run_main(main)
