"""Soft actor-critic on tasks of Meta-World: does surgery help where a robot learns several skills?

One agent with a head for each task learns from one environment per task, and makes one update per
step of them all. Actor and critic have a surgery of their own, on what the tasks share. `joint` is
the ordinary gradient of the mean loss. `mean` is the same by way of one gradient per task.
`single` has an agent for each task. Run `python -m benchmarks.metaworld_sac`.

`--suite easy3`, the default, is **not MT10** and no published suite: three easy tasks, small
networks and 35,000 steps a task, so that it ends on a CPU. The others have the defaults of the
published protocol (Meta-World+, arXiv 2505.11289): three layers of 400, 128 samples a task, Adam
at 3e-4, the gradient's norm clipped at 1, 2 million steps a task, 50 goals a task at the end. On an
accelerator:

    python -m benchmarks.metaworld_sac --suite mt10 --methods joint pcgrad aligned_mtl --seeds 10

What differs from it: transitions are collected with new goals in each episode (see
`metaworld_tasks`). The actor's heads and the critic's are not operated on. A killed run goes on
from its last evaluation, with agent, optimisers and buffer as they were; environments begin new
episodes, so that the result is not the same number by number.
"""

import dataclasses
import functools
import importlib.util
import io
import json
import shutil
import time
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import SingleDeviceSharding
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.console import Console
from scipy import stats

import optax_surgery as surgery
from benchmarks import metaworld_tasks, sac
from benchmarks.common import methods, statistics, study
from benchmarks.common.command_line import Parser, as_json, check_output, parse, run_main, write
from benchmarks.common.progress import Progress

DISCOUNT, POLYAK, LARGEST_NORM = 0.99, 0.005, 1.0
UPDATES = 10  # in one program, between as many steps of the environments
# Their updates are of the scale of a sum over tasks, those of the others of a mean.
OF_A_SUM = ("pcgrad", "nash_mtl")
# Methods that use losses are left out: the actor's are negative.
SURGERIES = ("mean", "pcgrad", "aligned_mtl", "cagrad", "nash_mtl", "mgda", "imtl_g", "upgrad")
CHOICES = ("joint", "single", *SURGERIES)
PUBLISHED_STEPS = 20_000_000  # of all environments of MT10 together
LAUNCH = 5e-6  # seconds, about what a GPU takes to begin a kernel: a lower bound of its time

# In percent. Never the same protocol as ours: each comes with its name.
PUBLISHED = {
    "Meta-World+ (arXiv 2505.11289): ten seeds, interquartile mean at the end, 50 episodes a task, "
    "V2 rewards": {
        "mt10": {"Soft Modules": 84.9, "PaCo": 73.6, "MOORE": 83.2},
        "mt50": {"Soft Modules": 65.8, "PaCo": 58.4, "MOORE": 72.0},
    },
    "CAGrad's protocol: Meta-World of February 2021, ten seeds, best mean over training, one "
    "episode a task": {
        "mt10": {
            "single": 90,
            "joint": 49,
            "joint, multi-head": 61,
            "pcgrad": 72,
            "cagrad": 83,
            "nash_mtl": 91,
            "aligned_mtl": 97,
        },
    },
}
# What `0` stands for.
OF_THE_SUITE = {
    "easy3": {
        "steps": 35_000,
        "random_steps": 1_000,
        "width": 128,
        "depth": 2,
        "samples": 64,
        "evaluate_every": 5_000,
    },
    "published": {
        "steps": 2_000_000,
        "random_steps": 4_000,
        "width": 400,
        "depth": 3,
        "samples": 128,
        "evaluate_every": 100_000,
    },
}


@dataclasses.dataclass(frozen=True)
class Config:
    """The options, each with its help and what it may be: one of some names, or a least number."""

    suite: Annotated[
        str, "the tasks; easy3 is reach, drawer-close, window-close", metaworld_tasks.SUITES
    ] = "easy3"
    methods: Annotated[tuple, "what to compare", CHOICES] = (
        "mean",
        "pcgrad",
        "aligned_mtl",
        "single",
    )
    seeds: Annotated[int, "runs per method, at least 2", 2] = 3
    first_seed: Annotated[int, "number of the first one: tune on others than you report", 0] = 0
    steps: Annotated[int, "steps of each environment, and updates. 0: the suite's", 0] = 0
    random_steps: Annotated[int, "steps with random actions at first. 0: the suite's", 0] = 0
    width: Annotated[int, "units of a layer. 0: the suite's", 0] = 0
    depth: Annotated[int, "layers before the heads. 0: the suite's", 0] = 0
    samples: Annotated[int, "transitions per task in an update. 0: the suite's", 0] = 0
    evaluate_every: Annotated[int, "steps between evaluations. 0: the suite's", 0] = 0
    episodes: Annotated[int, "per task, in an evaluation during training", 1] = 10
    last_episodes: Annotated[int, "per task, in the evaluation at the end", 1] = 50
    buffer: Annotated[int, "the latest transitions that are kept of each task", 10] = 100_000
    learning_rate: Annotated[float, "of Adam", 1e-9] = 3e-4
    rewards: Annotated[str, "v1: the old ones, up to about 1,200", ("v1", "v2")] = "v2"
    time_updates: Annotated[
        int, "time so many updates of joint and of pcgrad, and train nothing", 0
    ] = 0
    out: Annotated[Path, "folder for the results", None] = Path("results/metaworld_sac")
    overwrite: Annotated[bool, "replace the results of an earlier run", None] = False


class DivergedError(Exception):
    """A loss is not finite."""


# --- The agent, and programs of its method


class Programs(NamedTuple):
    """What a method runs: all compiled, the same for all seeds."""

    init: Any  # key -> agent
    act: Any  # agent, observations (T, size), key, number -> random actions (T, actions)
    act_greedily: Any  # agent, observations (T, size) -> actions (T, actions)
    update: Any  # agent, batches (UPDATES, T, samples), key -> agent, what was seen


def is_shared(path):
    return "head_" not in path


def as_of_mean(method, num_tasks):
    """Brings all updates to the scale of the mean loss's gradient, as the clipping will see them.

    The gradients of heads are summed, but each comes from one task.
    """

    def scale(path, update):
        summed = method in OF_A_SUM or not is_shared(jax.tree_util.keystr(path))
        return update / num_tasks if summed else update

    return optax.stateless(lambda updates, _: jax.tree_util.tree_map_with_path(scale, updates))


def make_optimiser(method, num_tasks, learning_rate):
    tail = optax.clip_by_global_norm(LARGEST_NORM), optax.adam(learning_rate)
    if method not in SURGERIES:
        return optax.chain(*tail)
    make = surgery.mean() if method == "mean" else methods.METHODS[method](num_tasks)
    operate = surgery.on_shared(surgery.monitor(num_tasks, make), is_shared)
    return optax.chain(operate, as_of_mean(method, num_tasks), *tail)


def cosines(state):
    return surgery.cosine_similarities(optax.tree.get(state.opt_state, "gramian"))


def make_step(method):
    """One update of an agent, and what is seen of it."""
    of_tasks = method in SURGERIES
    value_and_grad = surgery.per_task_value_and_grad if of_tasks else sac.joint_value_and_grad

    def step(agent, batch, tasks, key):
        agent, seen = sac.train_step(
            agent,
            batch,
            tasks,
            key,
            discount=DISCOUNT,
            polyak=POLYAK,
            value_and_grad=value_and_grad,
        )
        seen["temperature"] = agent.temperatures
        if of_tasks:
            seen["critic_cosines"] = cosines(agent.critic)
            seen["actor_cosines"] = cosines(agent.actor)
        return agent, seen

    if method != "single":
        return step

    def step_alone(agents, batch, tasks, key):
        """Agents of one task each, stacked."""
        keys = jax.random.split(key, tasks.size)
        agents, seen = jax.vmap(step)(
            agents, jax.tree.map(lambda x: x[:, None], batch), tasks[:, None], keys
        )
        return agents, {name: each[:, 0] for name, each in seen.items()}

    return step_alone


def make_programs(config, method, size, num_tasks):
    """The programs of a method for observations of a size."""
    alone = method == "single"
    num_heads = 1 if alone else num_tasks
    actor = sac.Actor(metaworld_tasks.NUM_ACTIONS, config.width, config.depth, num_heads)
    critic = sac.Critic(config.width, config.depth, num_heads)
    optimiser = make_optimiser(method, num_heads, config.learning_rate)
    temperature_optimiser = optax.adam(config.learning_rate)
    tasks = jnp.zeros(num_tasks, int) if alone else jnp.arange(num_tasks)
    step, of_agents = make_step(method), 0 if alone else None

    def init(key):
        def one(key):
            return sac.make_agent(
                actor,
                critic,
                lambda: optimiser,
                temperature_optimiser,
                jnp.zeros(size),
                num_heads,
                key,
            )

        return jax.vmap(one)(jax.random.split(key, num_tasks)) if alone else one(key)

    def act(agent, observations, key, number):
        def one(params, *each):
            return sac.act(actor.apply, params, *each)[0]

        keys = jax.random.split(jax.random.fold_in(key, number), num_tasks)
        return jax.vmap(one, (of_agents, 0, 0, 0))(agent.actor.params, observations, tasks, keys)

    def act_greedily(agent, observations):
        one = functools.partial(sac.act_greedily, actor.apply)
        return jax.vmap(one, (of_agents, 0, 0))(agent.actor.params, observations, tasks)

    def update(agent, batches, key):
        def one(agent, each):
            batch, key = each
            return step(agent, batch, tasks, key)

        keys = jax.random.split(key, len(batches.reward))
        agent, seen = lax.scan(one, agent, (batches, keys))
        return agent, jax.tree.map(lambda each: jnp.mean(each, axis=0), seen)

    return Programs(
        jax.jit(init), jax.jit(act), jax.jit(act_greedily), jax.jit(update, donate_argnums=0)
    )


# --- The buffer


class Buffer:
    """The latest transitions of every task, on the host.

    They come from there, and take gigabytes with 50 tasks: what an update needs is moved, ten
    batches at once.
    """

    def __init__(self, num_tasks, capacity, size):
        shapes = (size,), (metaworld_tasks.NUM_ACTIONS,), (), (size,), ()
        arrays: list[Any] = [np.zeros((num_tasks, capacity, *each), np.float32) for each in shapes]
        self.arrays = sac.Transitions(*arrays)
        self.added = 0

    @property
    def capacity(self):
        return self.arrays.reward.shape[1]

    def add(self, transitions):
        for array, each in zip(self.arrays, transitions, strict=True):
            array[:, self.added % self.capacity] = each
        self.added += 1

    def sample(self, rng, count, samples):
        """Batches (count, T, samples) of each task's own transitions, drawn with replacement."""
        num_tasks = len(self.arrays.reward)
        chosen = rng.integers(min(self.added, self.capacity), size=(count, num_tasks, samples))
        task = np.arange(num_tasks)[None, :, None]
        return sac.Transitions(*(array[task, chosen] for array in self.arrays))


# --- Checkpoints


def as_arrays(agent):
    """The agent's leaves by number; a PRNG key as its data."""
    is_key = [jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) for leaf in jax.tree.leaves(agent)]
    return {
        str(number): np.asarray(jax.random.key_data(leaf) if key else leaf)
        for number, (leaf, key) in enumerate(zip(jax.tree.leaves(agent), is_key, strict=True))
    }


def with_arrays(agent, arrays):
    """The agent with other leaves, of which `as_arrays` made numbers."""
    leaves, structure = jax.tree.flatten(agent)
    new = [jnp.asarray(arrays[str(number)]) for number in range(len(leaves))]
    return structure.unflatten(
        [
            jax.random.wrap_key_data(each, impl=jax.random.key_impl(leaf))
            if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
            else each
            for leaf, each in zip(leaves, new, strict=True)
        ]
    )


class Checkpoints:
    """Where a run is: its agent and its buffer by orbax, with the options they belong to."""

    def __init__(self, folder, config):
        import orbax.checkpoint

        self.orbax, self.stamp = orbax.checkpoint, study.stamp(config)
        self.manager = orbax.checkpoint.CheckpointManager(
            folder.absolute(), options=orbax.checkpoint.CheckpointManagerOptions(max_to_keep=1)
        )

    def save(self, step, agent, buffer, history):
        used = min(buffer.added, buffer.capacity)
        parts = {
            "agent": as_arrays(agent),
            "buffer": {
                name: np.ascontiguousarray(each[:, :used])
                for name, each in buffer.arrays._asdict().items()
            },
        }
        about = {**self.stamp, "added": buffer.added, "history": history}
        args = self.orbax.args
        self.manager.save(
            step,
            args=args.Composite(arrays=args.StandardSave(parts), about=args.JsonSave(about)),
        )
        self.manager.wait_until_finished()

    def restore(self, parser, agent, buffer):
        """The step, agent and history of the last checkpoint; the buffer is filled."""
        step, args = self.manager.latest_step(), self.orbax.args
        if step is None:
            return 0, agent, []
        about = self.manager.restore(step, args=args.Composite(about=args.JsonRestore()))["about"]
        for part, expected in self.stamp.items():
            if about.get(part) != expected:
                what = study.difference(about, part, expected)
                parser.error(
                    f"{self.manager.directory} is a checkpoint with another {part}: {what}: give "
                    "another --out, or --overwrite"
                )
        found = self.manager.restore(step, args=args.Composite(arrays=args.StandardRestore()))
        arrays = found["arrays"]
        buffer.added = about["added"]
        for name, each in arrays["buffer"].items():
            getattr(buffer.arrays, name)[:, : each.shape[1]] = each
        return step, with_arrays(agent, arrays["agent"]), about["history"]


# --- One run


class Run(NamedTuple):
    method: str
    seed: int

    @property
    def name(self):
        return f"{self.method}_{self.seed}"

    def __str__(self):
        return f"{self.method}, seed {self.seed}"


def at_random(rng, _, observations):
    return rng.uniform(-1, 1, (len(observations), metaworld_tasks.NUM_ACTIONS))


def choose_actions(programs, agent, key, number, observations):
    return programs.act(agent, observations, key, number)


def collect(environments, observations, buffer, choose):
    """UPDATES steps of all environments. Returns the observations after them."""
    for number in range(UPDATES):
        actions = np.asarray(choose(number, observations))
        transitions, observations, _ = environments.step(actions)
        buffer.add(transitions)
    return observations


def check_finite(run, step, names, seen):
    for name in ("critic_loss", "actor_loss"):
        bad = np.flatnonzero(~np.isfinite(seen[name]))
        if bad.size:
            raise DivergedError(f"{run}: {name} of {names[bad[0]]} is not finite at step {step}")


def train(parser, config, run, names, programs, environments, evaluate, told):
    """One run, from its seed or its last checkpoint. Returns what goes into its file.

    `told` is called with the steps since the last call, and a line or None.
    """
    buffer = Buffer(len(names), min(config.buffer, config.steps), environments.size)
    folder = config.out / "checkpoints" / run.name
    if config.overwrite:
        shutil.rmtree(folder, ignore_errors=True)
    checkpoints = Checkpoints(folder, config)
    agent = programs.init(jax.random.key(run.seed))
    start, agent, history = checkpoints.restore(parser, agent, buffer)
    began = time.perf_counter() - (history[-1]["seconds"] if history else 0)
    log = Log(config.out / "metrics" / f"{run.name}.jsonl", history)
    told(start, f"{run}: goes on at step {start:,}" if start else None)
    observations, seen, solved = environments.reset(), [], None
    for step in range(start, config.steps, UPDATES):
        observations, agent, new = advance(
            config, run, programs, environments, buffer, observations, agent, step
        )
        if new is not None:
            check_finite(run, step, names, new)
            seen.append(new)
        told(UPDATES, None)
        done = step + UPDATES
        if done % config.evaluate_every and done < config.steps:
            continue
        episodes = config.episodes if done < config.steps else config.last_episodes
        solved = evaluate(functools.partial(programs.act_greedily, agent), episodes)
        log.add(describe(done, solved, seen, time.perf_counter() - began))
        told(0, f"{run}: step {done:,}, success {in_short(names, solved)}")
        seen = []
        if done < config.steps:
            checkpoints.save(done, agent, buffer, log.lines)
    checkpoints.manager.close()
    return {"history": log.lines, "solved": solved}


def advance(config, run, programs, environments, buffer, observations, agent, step):
    """UPDATES steps of the environments and, but at first, as many updates.

    Returns the observations, the agent, and what was seen of the updates or None.
    """
    # From the step, so that there is no random state to keep.
    rng = np.random.default_rng([run.seed, step])
    key = jax.random.fold_in(jax.random.key(run.seed), step)
    if step < config.random_steps:
        choose = functools.partial(at_random, rng)
        return collect(environments, observations, buffer, choose), agent, None
    choose = functools.partial(choose_actions, programs, agent, key)
    observations = collect(environments, observations, buffer, choose)
    batches = buffer.sample(rng, UPDATES, config.samples)
    agent, seen = programs.update(agent, batches, jax.random.fold_in(key, UPDATES))
    return observations, agent, jax.device_get(seen)


class Log:
    """Lines of JSON, written as they come."""

    def __init__(self, path, lines):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        self.path, self.lines = path, list(lines)

    def add(self, line):
        self.lines.append(line)
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def describe(step, solved, seen, seconds):
    """A line of the log: successes, and means of what was seen since the last one."""
    names = seen[0] if seen else ()
    means = {name: np.mean([each[name] for each in seen], axis=0).tolist() for name in names}
    success = np.mean(solved, axis=1).tolist()
    return {"step": step, "seconds": round(seconds, 1), "success": success, **means}


def in_short(names, solved):
    return ", ".join(f"{n} {s:.2f}" for n, s in zip(names, np.mean(solved, axis=1), strict=True))


# --- What an update costs


def clock():
    """Seconds, and what to call them: those of all cores on a CPU, where others may work too."""
    if jax.default_backend() == "cpu":
        return time.process_time(), "core "
    return time.perf_counter(), ""


def time_updates(config, names, environments, say):
    """Joint and pcgrad in turn, on real transitions with random actions, at true size."""
    rng = np.random.default_rng(0)
    buffer, collected = filled_buffer(names, environments, rng)
    say(f"collected an episode a task: {collected:,.0f} steps per {clock()[1]}second")
    updates, agents, found = {}, {}, {}
    batches = buffer.sample(rng, UPDATES, config.samples)
    for method in ("joint", "pcgrad"):
        programs = make_programs(config, method, environments.size, len(names))
        agents[method] = programs.init(jax.random.key(0))
        lowered = programs.update.lower(agents[method], batches, jax.random.key(0))
        updates[method] = lowered.compile()
        memory = updates[method].memory_analysis()
        found[method] = {
            "milliseconds": [],
            "temporaries": getattr(memory, "temp_size_in_bytes", None),
        }
        say(f"compiled {method}")
    # The first round is not counted.
    for number in range(1 + -(-config.time_updates // UPDATES)):
        batches = jax.device_put(buffer.sample(rng, UPDATES, config.samples))
        for method, update in updates.items():
            jax.block_until_ready(batches)
            began, _ = clock()
            agents[method], _ = update(agents[method], batches, jax.random.key(number))
            jax.block_until_ready(agents[method])
            if number:
                taken = 1000 * (clock()[0] - began) / UPDATES
                found[method]["milliseconds"].append(taken)
        if number % 5 == 0:
            say(f"{UPDATES * number} updates timed")
    return {"methods": found, "environment_steps_per_second": collected}


def launches_on_h100(config, num_tasks, size):
    """{method: kernels that an update launches on an H100}, from the programs of its compiler.

    No device is needed, but the compiler, of the extra `compiled`. Without it there are none.
    """
    from benchmarks.systems import compiled

    if importlib.util.find_spec(compiled.COMPILERS["h100"]) is None:
        return {}
    place = SingleDeviceSharding(compiled.topology("h100").devices[0])
    buffer = Buffer(num_tasks, 1, size)
    buffer.added = 1  # of zeros: only shapes count
    batches = buffer.sample(np.random.default_rng(0), UPDATES, config.samples)
    found = {}
    for method in ("joint", "pcgrad"):
        programs = make_programs(config, method, size, num_tasks)
        shapes = (
            jax.eval_shape(programs.init, jax.random.key(0)),
            batches,
            jax.eval_shape(jax.random.PRNGKey, 0),
        )
        placed = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), shapes
        )
        program = programs.update.trace(*placed).lower().compile()
        found[method] = compiled.launches(program) / UPDATES
    return found


def filled_buffer(names, environments, rng):
    """An episode of each task with random actions, and the steps per second of all tasks."""
    buffer = Buffer(len(names), metaworld_tasks.EPISODE, environments.size)
    observations, (began, _) = environments.reset(), clock()
    choose = functools.partial(at_random, rng)
    for _ in range(metaworld_tasks.EPISODE // UPDATES):
        observations = collect(environments, observations, buffer, choose)
    return buffer, len(names) * metaworld_tasks.EPISODE / (clock()[0] - began)


def in_words_of_time(times, num_tasks):
    _, unit = clock()
    median = {
        method: float(np.median(each["milliseconds"])) for method, each in times["methods"].items()
    }
    for method, each in times["methods"].items():
        low, high = np.quantile(each["milliseconds"], [0.25, 0.75])
        temporaries = each["temporaries"]
        memory = "unknown" if temporaries is None else f"{temporaries / 2**20:,.0f} MiB"
        yield (
            f"{method}: {median[method]:.2f} {unit}ms per update (median; quartiles {low:.2f} and "
            f"{high:.2f}), temporaries {memory}."
        )
    yield f"pcgrad over joint: {median['pcgrad'] / median['joint']:.2f}."
    rate = times["environment_steps_per_second"]
    for method, milliseconds in median.items():
        updates = PUBLISHED_STEPS / num_tasks * milliseconds / 3.6e6
        yield (
            f"{PUBLISHED_STEPS:,} environment steps here, {method}: {updates:.1f} {unit}hours of "
            f"updates and {PUBLISHED_STEPS / rate / 3600:.1f} of environments, without evaluation."
        )
    for method, number in times["launches_on_h100"].items():
        hours = PUBLISHED_STEPS / num_tasks * number * LAUNCH / 3600
        yield (
            f"On an H100, {method}: {number:.0f} kernels per update; to launch those of "
            f"{PUBLISHED_STEPS:,} environment steps takes {hours:.1f} hours, at "
            f"{1e6 * LAUNCH:g} microseconds each."
        )


# --- What it finds


def interquartile_mean(values):
    """Of the middle half; of all values if there are fewer than four."""
    return float(stats.trim_mean(values, 0.25))


def summarise(results, config):
    """For each method what its runs say."""
    rows = {}
    for method in config.methods:
        of_seeds = [result for run, result in results.items() if run.method == method]
        curves = np.array([[line["success"] for line in each["history"]] for each in of_seeds])
        # A mean over tasks for each seed, from the last evaluation.
        final = np.array([np.mean(each["solved"]) for each in of_seeds])
        rows[method] = {
            "points": final,
            "interquartile_mean": interquartile_mean(final),
            "mean": float(final.mean()),
            "interval_95": float(statistics.interval_95(final)),
            "best_over_training": float(curves.mean(axis=(0, 2)).max()),
            "tasks": np.mean([each["solved"] for each in of_seeds], axis=(0, 2)),
            "curves": curves,
            "seconds": float(np.mean([each["history"][-1]["seconds"] for each in of_seeds])),
        }
    return rows


def compare(rows):
    """Paired tests of the methods against the first of joint and mean that is there."""
    baseline = next((name for name in ("joint", "mean") if name in rows), None)
    if baseline is None:
        return None, {}
    points = {name: row["points"] - rows[baseline]["points"] for name, row in rows.items()}
    del points[baseline]
    return baseline, statistics.paired_tests(points)


def make_table(rows, names, baseline, tests, config):
    headings = ["method", "at the end,\ninterquartile\nmean", "mean ± 95%"]
    headings += [f"against\n{baseline}"] if baseline else []
    headings += ["best mean\nover training", "minutes\na run"]
    # With 50 tasks they are in the file.
    shown = names if len(names) <= 10 else ()
    of_tasks = (name.removesuffix("-v3").replace("-", "\n") for name in shown)
    table = study.make_table(*headings, *of_tasks)
    for method, row in rows.items():
        cells = [
            f"{row['interquartile_mean']:.3f}",
            f"{row['mean']:.3f} ± {row['interval_95']:.3f}",
        ]
        cells += [statistics.verdict(tests.get(method))] if baseline else []
        cells += [f"{row['best_over_training']:.3f}", f"{row['seconds'] / 60:.1f}"]
        table.add_row(method, *cells, *(f"{row['tasks'][n]:.2f}" for n in range(len(shown))))
    table.title = title(config)
    return table


def title(config):
    kind = "three easy tasks, not MT10" if config.suite == "easy3" else config.suite.upper()
    return (
        f"Meta-World, {kind}: {config.steps:,} steps a task, {config.seeds} seeds, rewards "
        f"{config.rewards.upper()}"
    )


def legend(config):
    return (
        f"At the end: {config.last_episodes} episodes a task on metaworld, over its 50 goals in "
        "turn, with actions at the mode; an episode ends at success. Interquartile mean: over "
        "seeds, of the mean over tasks; with fewer than four seeds it is the mean. Best mean over "
        f"training: the largest of {config.steps // config.evaluate_every} means over seeds and "
        f"tasks, of which each has {config.episodes} episodes a task but the last. It is "
        "optimistic, and here because others report it. Against: the difference where a paired "
        "t-test with Holm's correction finds one; else =."
    )


def pairs_of(results, method, name):
    """(seeds, points, pairs) cosines between two tasks; NaN before the first update."""
    found = [
        [line.get(name) for line in result["history"]]
        for run, result in results.items()
        if run.method == method
    ]
    first = next((each for seed in found for each in seed if each is not None), None)
    if first is None:
        return None
    upper = np.triu_indices(len(first), 1)
    missing = np.full(np.shape(first), np.nan)
    return np.array([[np.array(x or missing)[upper] for x in seed] for seed in found], float)


def in_words(rows, results, names, baseline, tests, config):
    if config.suite == "easy3":
        yield "These are three easy tasks and not MT10: nothing here compares with its figures."
    if "drawer-close-v3" in names:
        number = names.index("drawer-close-v3")
        least = min(np.mean(result["solved"][number]) for result in results.values())
        yield f"drawer-close is solved in {least:.0%} of the episodes or more in every run."
    for word, sign in (("better", 1), ("worse", -1)):
        some = [name for name, test in tests.items() if test["differs"] and sign * test["mean"] > 0]
        if baseline:
            yield f"Against {baseline}, {word}: {', '.join(some) or 'none'}."
    for method in rows:
        parts = []
        for network in ("critic", "actor"):
            pairs = pairs_of(results, method, f"{network}_cosines")
            if pairs is not None:
                parts.append(
                    f"{network} {np.nanmean(pairs):+.2f}, {np.nanmean(pairs < 0):.0%} of the pairs "
                    "negative"
                )
        if parts:
            yield f"Cosines between two tasks over training, {method}: {'; '.join(parts)}."
    for protocol, of_suites in PUBLISHED.items():
        if figures := of_suites.get(config.suite):
            listed = ", ".join(f"{name} {value:g}%" for name, value in figures.items())
            yield f"Published, {protocol}: {listed}."


COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#882255")


def plot_band(axes, steps, values, colour, label):
    """The mean over the first axis, and its 95% interval."""
    mean, reach = values.mean(axis=0), statistics.interval_95(values)
    axes.plot(steps, mean, color=colour, lw=1.8, label=label)
    axes.fill_between(steps, mean - reach, mean + reach, color=colour, alpha=0.12, lw=0)


def make_figure(rows, results, names, config):
    """Success of all tasks, cosines of critic and actor, and a panel for each task."""
    columns = 3 if len(names) <= 3 else 5
    lines = 1 + -(-len(names) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.2 * lines), layout="constrained", dpi=110)
    halves: Any = figure.subfigures(2, 1, height_ratios=(1.15, lines - 1))
    top, below = halves
    success, critic, actor = top.subplots(1, 3)
    panels = below.subplots(lines - 1, columns, squeeze=False, sharex=True, sharey=True).ravel()
    steps = [line["step"] for line in next(iter(results.values()))["history"]]
    for (method, row), colour in zip(rows.items(), 2 * COLOURS, strict=False):
        plot_band(success, steps, row["curves"].mean(axis=2), colour, method)
        for number, axes in enumerate(panels[: len(names)]):
            plot_band(axes, steps, row["curves"][..., number], colour, method)
        for axes, network in ((critic, "critic"), (actor, "actor")):
            pairs = pairs_of(results, method, f"{network}_cosines")
            if pairs is not None:
                plot_band(axes, steps, pairs.mean(axis=2), colour, method)
    success.set_title("success, mean of the tasks")
    success.legend(frameon=False, fontsize=8)
    for axes, network in ((critic, "critic"), (actor, "actor")):
        axes.set_title(f"{network}: mean cosine between two tasks")
        axes.axhline(0, color="black", lw=0.8)
    for axes, name in zip(panels, names, strict=False):
        axes.set_title(name)
    for axes in panels[len(names) :]:
        axes.set_visible(False)
    for axes in (success, *panels):
        axes.set_ylim(-0.03, 1.03)
    for axes in (success, critic, actor, *panels[-columns:]):
        axes.set_xlabel("steps of a task")
    for axes in (success, critic, actor, *panels):
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(5))
    figure.suptitle(f"{title(config)}; bands: 95% intervals over seeds")
    return figure


# --- The command line


def with_suite(parser, config):
    """The options with what the suite says for those that are 0."""
    of_suite = OF_THE_SUITE["easy3" if config.suite == "easy3" else "published"]
    missing = {name: value for name, value in of_suite.items() if not getattr(config, name)}
    config = dataclasses.replace(config, **missing)
    for name in ("steps", "random_steps", "evaluate_every"):
        value = getattr(config, name)
        if value % UPDATES:
            option = f"--{name.replace('_', '-')}"
            parser.error(f"argument {option}: expected a multiple of {UPDATES}, got {value}")
    if config.random_steps >= config.steps:
        parser.error(
            f"argument --random-steps: expected less than --steps, got {config.random_steps}"
        )
    return config


def train_all(parser, config, names):
    """The results of all runs. Those that are finished are files, and kept."""
    runs = [Run(m, config.first_seed + s) for m in config.methods for s in range(config.seeds)]
    files = {run: config.out / "runs" / f"{run.name}.json" for run in runs}
    results = study.finished_runs(parser, config, files)
    left = [run for run in runs if run not in results]
    if not left:
        return {run: results[run] for run in runs}
    with Progress(len(left) * config.steps, "Making 50 goals a task") as progress:
        evaluate = metaworld_tasks.Evaluation(names, config.first_seed)

        def told(steps, line):
            progress.advance(steps)
            if line:
                progress.terminal.print(line)

        make = functools.cache(functools.partial(make_programs, config))
        for run in left:
            progress.describe(f"Training, {run}")
            environments = metaworld_tasks.Tasks(names, run.seed, config.rewards)
            programs = make(run.method, environments.size, len(names))
            results[run] = train(parser, config, run, names, programs, environments, evaluate, told)
            study.save_run(config, files[run], results[run])
            shutil.rmtree(config.out / "checkpoints" / run.name)
    return {run: results[run] for run in runs}


def report(config, names, results, files):
    rows = summarise(results, config)
    baseline, tests = compare(rows)
    findings = list(in_words(rows, results, names, baseline, tests, config))
    console = Console(highlight=False)
    console.width = max(console.width, 150)
    console.print(make_table(rows, names, baseline, tests, config))
    console.print(legend(config), *findings, sep="\n", soft_wrap=True)
    picture = io.BytesIO()
    make_figure(rows, results, names, config).savefig(picture, format="png")
    text = as_json(
        config,
        title=title(config),
        tasks=list(names),
        only_metaworld=sorted(metaworld_tasks.ONLY_METAWORLD & set(names)),
        published=PUBLISHED,
        findings=findings,
        behaviour=methods.behaviour(config.methods),
        against=tests,
        summary=rows,
        by_seed=[
            {
                "setting": title(config),
                "figure": "success at the end",
                "methods": {name: row["points"] for name, row in rows.items()},
            }
        ],
        runs=[{"method": run.method, "seed": run.seed, **each} for run, each in results.items()],
    )
    write(dict(zip(files, (text, picture.getvalue()), strict=True)))
    console.print(f"\nWritten: {files[0]} and {files[1]}")


def report_time(config, names, files):
    console = Console(highlight=False)
    terminal = Console(stderr=True)
    environments = metaworld_tasks.Tasks(names, config.first_seed, config.rewards)
    # First, as the compiler has to be found before JAX looks for devices.
    launches = launches_on_h100(config, len(names), environments.size)
    times = time_updates(config, names, environments, terminal.print)
    times["launches_on_h100"] = launches
    findings = list(in_words_of_time(times, len(names)))
    console.print(*findings, sep="\n", soft_wrap=True)
    times["clock"] = f"{clock()[1]}time"
    write({files[0]: as_json(config, tasks=list(names), times=times, findings=findings)})
    console.print(f"\nWritten: {files[0]}")


def main(argv=None):
    parser = Parser(
        "python -m benchmarks.metaworld_sac", description=(__doc__ or "").split("\n\n")[0]
    )
    config = with_suite(parser, parse(parser, Config, argv))
    files = config.out / "results.json", config.out / "metaworld_sac.png"
    if config.time_updates:
        files = (config.out / "times.json",)
    check_output(parser, files, config.overwrite)
    try:
        names = metaworld_tasks.suite(config.suite)
        if config.time_updates:
            report_time(config, names, files)
        else:
            report(config, names, train_all(parser, config, names), files)
    except ImportError as error:
        parser.error(f'no {error.name or error}: install with pip install -e ".[rl]"')
    except (DivergedError, metaworld_tasks.DeadEnvironmentError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    run_main(main, "the same command goes on from the last evaluation")
