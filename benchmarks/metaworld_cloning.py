"""Ten robot tasks from demonstrations of scripted experts: does surgery help one policy for all?

Meta-World comes with a scripted expert for each task. A few demonstrations of the ten tasks of MT10
are cloned: one perceptron, told the task by a one-hot, is regressed on the experts' actions, with
the gradients of the tasks combined by each method. What counts is not the loss but success, in
rollouts of Meta-World's own environments. `mean`, the gradient of the mean loss, is the baseline.
Single-task networks show what sharing costs. No reward is learnt from: these figures say nothing
about reinforcement learning on MT10, and do not compare with published ones.
Run `python -m benchmarks.metaworld_cloning`.

An expert that is merely watched shows no way back from a mistake. So the action that is executed
has noise on it, and the demonstrated one is the expert's at the state where that noise has led
(Laskey et al. 2017, arXiv 1703.09327). Every seed has demonstrations of its own, the same for all
methods, and is tested on goals that it was not shown.
"""

import dataclasses
import functools
import importlib.metadata
import io
import json
import os
import tempfile
import time
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from matplotlib.figure import Figure
from rich.console import Console

import optax_surgery as surgery
from benchmarks import metaworld_tasks
from benchmarks.common import agreement, methods, statistics, study
from benchmarks.common.command_line import (
    DATA_DIR,
    GOES_ON,
    Parser,
    as_json,
    check_output,
    parse,
    run_main,
    write,
)
from benchmarks.common.progress import Progress
from benchmarks.sac import Network
from optax_surgery.flax import SurgeryTrainState

NUM_TASKS = 10
INSTALL = 'pip install -e ".[rl]"'
ALWAYS = ("single", "mean")  # what everything else is measured by
# Adam makes `sum` the mean, and `linear` would need its weights to be tuned.
CHOICES = (*ALWAYS, *methods.names(NUM_TASKS)[2:])
DEFAULTS = (*ALWAYS, "pcgrad", "aligned_mtl")
# Demonstrations and tests draw their goals from different seeds.
TEST_SEED = 1000
REACHED = 0.7  # success below which a comparison would be one of failures


@dataclasses.dataclass(frozen=True)
class Config:
    """The options, each with its help and what it may be: one of some names, or a least number."""

    methods: Annotated[tuple, "what to compare, with single and mean", CHOICES] = DEFAULTS
    seeds: Annotated[int, "policies per method, each with its demonstrations; at least 2", 2] = 3
    demonstrations: Annotated[int, "successful episodes of the expert per task", 1] = 10
    noise: Annotated[float, "deviation of the noise on the actions of the expert", 0.0] = 0.1
    steps: Annotated[int, "training steps, a multiple of --points", 1] = 3000
    points: Annotated[int, "times to report the loss and to compare gradients", 2] = 10
    batch_size: Annotated[int, "states per task and step", 1] = 32
    learning_rate: Annotated[float, "of Adam; from there down to zero by a cosine", 1e-9] = 1e-3
    width: Annotated[int, "units of a hidden layer", 1] = 128
    depth: Annotated[int, "hidden layers", 1] = 2
    episodes: Annotated[int, "rollouts per task at the end", 1] = 50
    max_steps: Annotated[int, "steps after which a rollout has failed", 1] = 500
    data_dir: Annotated[Path, "where demonstrations are kept", None] = DATA_DIR / "metaworld"
    out: Annotated[Path, "folder for the results", None] = Path("results/metaworld_cloning")
    overwrite: Annotated[bool, "replace the results of an earlier run", None] = False


class Failure(Exception):
    """What ends the benchmark, in one line."""


def version():
    return importlib.metadata.version("metaworld")


# --- Demonstrations


def make_task(name, seed):
    """A task's environment, its goals, and its expert."""
    metaworld = metaworld_tasks.import_metaworld()
    from metaworld.policies import ENV_POLICY_MAP

    benchmark = metaworld.MT1(name, seed=seed)
    return benchmark.train_classes[name](), benchmark.train_tasks, ENV_POLICY_MAP[name]()


def demonstrate(environment, goal, expert, noise, random):
    """One episode: observations, the expert's actions at them, and whether it succeeded."""
    environment.set_task(goal)
    observation, _ = environment.reset()
    observations, actions = [], []
    for _ in range(environment.max_path_length):
        with warnings.catch_warnings():
            # That its gains are high. What exceeds the limits is cut off here.
            warnings.simplefilter("ignore")
            action = np.clip(expert.get_action(observation), -1, 1)
        observations.append(observation)
        actions.append(action)
        executed = np.clip(action + noise * random.normal(size=action.shape), -1, 1)
        observation, *_, info = environment.step(executed.astype(np.float32))
        if info["success"]:
            return observations, actions, True
    return observations, actions, False


def collect(name, seed, config):
    """The states and actions of enough successes of a task's expert, and its rate of success."""
    environment, goals, expert = make_task(name, seed)
    random = np.random.default_rng(seed)
    observations, actions, successes, tries = [], [], 0, 0
    while successes < config.demonstrations:
        if tries >= 10 and tries > 4 * config.demonstrations:
            raise Failure(
                f"the expert of {name} succeeds in {successes} of {tries} episodes with --noise "
                f"{config.noise}: give less"
            )
        goal = goals[tries % len(goals)]
        seen, done, success = demonstrate(environment, goal, expert, config.noise, random)
        tries += 1
        if success:
            successes += 1
            observations += seen
            actions += done
    environment.close()
    return np.array(observations, np.float32), np.array(actions, np.float32), successes / tries


def collect_all(names, seed, config):
    """The demonstrations of all tasks, padded to the same number of states."""
    observations, actions, success = zip(
        *(collect(name, seed, config) for name in names), strict=True
    )
    sizes = np.array([len(each) for each in observations])

    def padded(arrays):
        return np.stack([np.pad(x, ((0, sizes.max() - len(x)), (0, 0))) for x in arrays])

    return {
        "observation": padded(observations),
        "action": padded(actions),
        "size": sizes,
        "expert": np.array(success),
    }


ARRAYS = ("observation", "action", "size", "expert")


def load(names, seed, config):
    """The demonstrations of a seed, from the cache where there are some.

    Returns:
      "observation" (T, states, features), "action" (T, states, 4), "size" (T,) how many of the
      states are no padding, and "expert" (T,) the success of the experts with noise.
    """
    cache = config.data_dir / f"mt10_{config.demonstrations}_{config.noise}_{seed}.npz"
    made_from = {
        "tasks": list(names),
        "seed": seed,
        "demonstrations": config.demonstrations,
        "noise": config.noise,
        "metaworld": version(),
    }
    try:
        if cache.exists():
            with open(cache, "rb") as file, np.load(file) as kept:
                if json.loads(str(kept["made_from"])) == made_from:
                    return {name: kept[name] for name in ARRAYS}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as bad:
        what = " ".join(f"{type(bad).__name__}: {bad}".split())
        raise Failure(f"{cache} holds no demonstrations ({what}): remove it") from bad
    arrays = collect_all(names, seed, config)
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache.parent, prefix=".") as folder:
            path = Path(folder, cache.name)
            np.savez_compressed(path, made_from=json.dumps(made_from), **arrays)
            os.replace(path, cache)
    except OSError as error:
        raise Failure(f"cannot write {cache}: {error.strerror}") from error
    return arrays


def stack(seeds):
    """The demonstrations of all seeds, with a leading axis, and what normalises observations."""
    size = max(each["observation"].shape[1] for each in seeds)

    def padded(x):
        return np.pad(x, ((0, 0), (0, size - x.shape[1]), (0, 0)))

    observation, action = (np.stack([padded(each[name]) for each in seeds]) for name in ARRAYS[:2])
    sizes = np.stack([each["size"] for each in seeds])
    real = (np.arange(size) < sizes[..., None])[..., None]
    mean = np.mean(observation, axis=(1, 2), where=real, keepdims=True)
    # Some features are always zero.
    scale = np.std(observation, axis=(1, 2), where=real, keepdims=True) + 1e-3
    data = {
        "observation": (observation - mean) / scale,
        "action": action,
        "size": sizes,
        "mean": mean,
        "scale": scale,
    }
    return jax.tree.map(jnp.asarray, data)


# --- One run: a policy for the tasks whose numbers are in `tasks`


class Runs(NamedTuple):
    """What distinguishes the runs of a method: arrays whose leading axis is that of the runs."""

    seeds: np.ndarray
    tasks: np.ndarray


def choose_action(params, observation, task, config):
    """The policy: actions at normalised observations (..., features) of one task."""
    told = jnp.broadcast_to(jax.nn.one_hot(task, NUM_TASKS), (*observation.shape[:-1], NUM_TASKS))
    network = Network(metaworld_tasks.NUM_ACTIONS, config.width, config.depth)
    return jnp.asarray(network.apply(params, jnp.concatenate([observation, told], axis=-1), task))


def make_state(key, num_features, num_tasks, method, config):
    """Adam divides by the size of recent updates: a method's scale is no learning rate."""
    network = Network(metaworld_tasks.NUM_ACTIONS, config.width, config.depth)
    params = network.init(key, jnp.zeros(num_features + NUM_TASKS), jnp.zeros((), int))
    update = surgery.mean() if method == "mean" else methods.METHODS[method](num_tasks)
    adam = optax.adam(optax.cosine_decay_schedule(config.learning_rate, config.steps))
    tx = optax.chain(update, adam)
    return SurgeryTrainState.create(apply_fn=network.apply, params=params, tx=tx)


def task_gradients(params, examples, rows, tasks, config):
    """Losses (T,) and gradients of the tasks, on rows (T, batch) of their states."""

    def loss_fn(params, observation, action, task):
        return jnp.mean((choose_action(params, observation, task, config) - action) ** 2)

    at = jnp.arange(len(tasks))[:, None], rows
    observation, action = examples["observation"][at], examples["action"][at]
    return surgery.per_task_value_and_grad(loss_fn)(params, observation, action, tasks)


def cosines_on_two_batches(params, examples, tasks, key, config):
    """(T, T) cosines of the tasks' gradients on two batches of their states: see `agreement`."""
    halves = two_batches(key, examples["size"], examples["action"].shape[1], config.batch_size)
    _, grads = lax.map(lambda rows: task_gradients(params, examples, rows, tasks, config), halves)
    return agreement.cosines_on_two_batches(grads)


def train(run, data, method, config):
    """One run. Returns the parameters, losses (points, T), and for T > 1 cosines."""
    examples = {name: data[name][run.seeds][run.tasks] for name in ARRAYS[:3]}
    sizes = examples["size"][:, None]
    init_key, batch_key, probe_key = jax.random.split(jax.random.key(run.seeds), 3)

    def train_step(state, step):
        key = jax.random.fold_in(batch_key, step)
        drawn = jax.random.uniform(key, (len(run.tasks), config.batch_size))
        rows = (drawn * sizes).astype(int)
        losses, grads = task_gradients(state.params, examples, rows, run.tasks, config)
        return state.apply_gradients(grads=grads, losses=losses), losses

    def train_stretch(state, steps):
        state, losses = lax.scan(train_step, state, steps)
        seen = {"loss": jnp.mean(losses, axis=0)}
        if len(run.tasks) > 1:
            key = jax.random.fold_in(probe_key, steps[0])
            seen["cosines"] = cosines_on_two_batches(state.params, examples, run.tasks, key, config)
        return state, seen

    num_features = data["observation"].shape[-1]
    state = make_state(init_key, num_features, len(run.tasks), method, config)
    steps = jnp.arange(config.steps).reshape(config.points, -1)
    state, seen = lax.scan(train_stretch, state, steps)
    return state.params, seen


def two_batches(key, sizes, most, count):
    """Rows (2, T, count) of two batches of each task that share no state, while there are enough.

    They are as large as in training. Larger ones would be the halves of all states: where the
    gradient of the whole vanishes, those of its halves are opposite.
    """
    order = jax.random.uniform(key, (len(sizes), most))
    # Padding comes last.
    order = jnp.argsort(jnp.where(jnp.arange(most)[None] < sizes[:, None], order, 2.0), axis=1)
    half = jnp.clip(sizes // 2, 1, count)[:, None]
    first = jnp.arange(count)[None] % half
    return jnp.take_along_axis(order[None], jnp.stack([first, half + first]), axis=-1)


# --- All runs of a method


def test(params, data, names, seed, config):
    """Success (T, episodes) of one seed, from parameters with axes (seeds, T)."""
    params = jax.tree.map(lambda leaf: leaf[seed], params)
    mean, scale = data["mean"][seed, 0], data["scale"][seed, 0]
    policy = jax.vmap(functools.partial(choose_action, config=config))

    @jax.jit
    def choose(observations):
        # The policy is told the task by its number.
        seen = (observations[:, :-NUM_TASKS] - mean) / scale
        return jnp.clip(policy(params, seen, jnp.arange(NUM_TASKS)), -1, 1)

    def act(observations):
        return np.asarray(choose(observations))

    try:
        return metaworld_tasks.evaluate(
            names, act, config.episodes, TEST_SEED + seed, config.max_steps
        )
    except (OSError, EOFError, RuntimeError, metaworld_tasks.DeadEnvironmentError) as error:
        what = " ".join(f"{type(error).__name__}: {error}".split())
        raise Failure(f"an environment of Meta-World has failed: {what}") from error


def train_seeds(method, config, data):
    """Trains all seeds in one program: parameters with axes (seeds, T), and what was seen."""
    numbers = np.arange(NUM_TASKS)
    # A seed has one policy, or one a task.
    groups = numbers[:, None] if method == "single" else numbers[None, :]
    runs = Runs(np.arange(config.seeds).repeat(len(groups)), np.tile(groups, (config.seeds, 1)))
    method = "mean" if method == "single" else method
    train_runs = jax.jit(
        jax.vmap(functools.partial(train, method=method, config=config), (0, None))
    )
    params, seen = jax.block_until_ready(train_runs(runs, data))

    def for_each_task(leaf):
        leaf = leaf.reshape(config.seeds, len(groups), *leaf.shape[1:])
        return jnp.broadcast_to(leaf, (config.seeds, NUM_TASKS, *leaf.shape[2:]))

    loss = np.asarray(seen["loss"]).reshape(config.seeds, len(groups), config.points, -1)
    loss = loss.swapaxes(1, 2).reshape(config.seeds, config.points, NUM_TASKS)
    return jax.tree.map(for_each_task, params), loss, seen.get("cosines")


def train_method(method, config, data, names, tell):
    """Trains and tests all seeds of a method. Returns what goes into the file of the run."""
    tell(f"{method}: training")
    began = time.perf_counter()
    params, loss, cosines = train_seeds(method, config, data)
    if not np.all(np.isfinite(loss)):
        raise Failure(f"{method}: a loss is not finite: give a lower --learning-rate")
    trained = time.perf_counter()
    success = []
    for seed in range(config.seeds):
        tell(f"{method}: rollouts, seed {seed}")
        success.append(np.mean(test(params, data, names, seed, config), axis=1))
    return {
        "success": np.array(success),
        "loss": loss,
        "cosines": cosines,
        "seconds": {"training": trained - began, "rollouts": time.perf_counter() - trained},
    }


# --- What it finds


def compare(results):
    """For each method the success of each seed, its mean and interval, and tests against `mean`."""
    points = {m: np.mean(np.array(each["success"], float), axis=1) for m, each in results.items()}
    tests = statistics.paired_tests(
        {method: each - points["mean"] for method, each in points.items() if method != "mean"}
    )
    return {
        method: {
            "points": each,
            "success": float(np.mean(each)),
            "interval_95": float(statistics.interval_95(each)),
            "against_mean": tests.get(method),
        }
        for method, each in points.items()
    }


def short(name):
    return name.removesuffix("-v3")


def make_task_table(names, results, expert):
    """Success per task, with the intervals over seeds."""
    table = study.make_table("success", *results, "expert")
    for task, name in enumerate(names):
        cells = []
        for result in results.values():
            points = np.array(result["success"], float)[:, task]
            cells.append(f"{points.mean():.2f} ± {statistics.interval_95(points):.2f}")
        table.add_row(short(name), *cells, f"{expert[task]:.2f}")
    return table


def make_method_table(board, results):
    table = study.make_table(
        "method", "success", "against\nmean", "p, Holm", "last loss", "CPU seconds"
    )
    for method, row in board.items():
        test = row["against_mean"]
        table.add_row(
            method,
            f"{row['success']:.3f} ± {row['interval_95']:.3f}",
            statistics.verdict(test),
            f"{test['p_holm']:.2f}" if test else "",
            f"{np.mean(np.array(results[method]['loss'], float)[:, -1]):.4f}",
            f"{results[method]['cpu_seconds']:.0f}",
        )
    return table


LEGEND = """\
Success: the share of rollouts that succeed at some step, ± the 95% interval of its mean over seeds
(Student's t: with few seeds it is wide, and may go beyond 1). Expert: the scripted experts while
they demonstrate, with noise on their actions. Against mean: the difference in success where a
paired t-test over seeds, with Holm's correction for the number of methods, finds one; else =.
"""


def in_words(names, board, results, config):
    tests = {m: row["against_mean"] for m, row in board.items() if row["against_mean"]}
    for word, sign in (("better", 1), ("worse", -1)):
        some = [m for m, test in tests.items() if test["differs"] and sign * test["mean"] > 0]
        yield f"Against mean, {word}: {', '.join(some) or 'none'}."
    same = [method for method, test in tests.items() if not test["differs"]]
    yield f"No difference from mean is found for: {', '.join(same) or 'none'}."
    reach = max(test["interval_95"] for test in tests.values())
    yield (
        f"With {config.seeds} seeds the 95% intervals of these differences reach up to {reach:.2f} "
        "to either side: smaller differences may be there, unseen."
    )
    low = [m for m in ALWAYS if board[m]["success"] < REACHED]
    if low:
        yield f"Success below {REACHED}: {', '.join(low)}. This compares failures."
    of_mean = np.mean(np.array(results["mean"]["success"], float), axis=0)
    yield (
        f"The hardest task for mean is {short(names[np.argmin(of_mean)])}, with success in "
        f"{of_mean.min():.0%} of the rollouts."
    )
    between, same = agreement.split(results["mean"]["cosines"])
    for when, point in (("first", 0), ("last", -1)):
        yield (
            f"At the {when} of {config.points} looks at training with mean the cosine between the "
            f"gradients of two tasks is {between[:, point].mean():+.2f} on average, "
            f"{np.mean(between[:, point] < -0.1):.0%} of the pairs are below -0.1, and that of one "
            f"task on two batches is {same[:, point].mean():+.2f}."
        )
    if same[:, -1].mean() < same[:, 0].mean() / 2:
        yield "The latter falls to less than half: late gradients are mostly the noise of a batch."
    training, rollouts = (
        sum(result["seconds"][part] for result in results.values()) / 60
        for part in ("training", "rollouts")
    )
    yield (
        f"Training took {training:.1f} minutes and rollouts {rollouts:.1f}; of a processor both "
        f"took {sum(result['cpu_seconds'] for result in results.values()) / 60:.1f}."
    )


# --- The picture

COLOURS = ("#000000", "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")


def make_figure(names, board, results, config):
    figure = Figure(figsize=(13, 8.5), dpi=130, layout="constrained")
    axes = figure.subplot_mosaic([["success", "success"], ["cosines", "loss"]])
    colours = dict(zip(results, COLOURS * len(results), strict=False))
    draw_success(axes["success"], names, board, results, colours)
    draw_cosines(axes["cosines"], results, config)
    draw_losses(axes["loss"], results, colours, config)
    for each in axes.values():
        each.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"Cloning MT10's scripted experts: {config.demonstrations} demonstrations a task, "
        f"{config.steps:,} steps, {config.seeds} seeds, {config.episodes} rollouts a task"
    )
    return figure


def draw_success(axes, names, board, results, colours):
    """Bars for each task, and for the mean over tasks."""
    width = 0.8 / len(results)
    places = np.append(np.arange(len(names)), len(names) + 0.3)
    for n, (method, result) in enumerate(results.items()):
        points = np.array(result["success"], float)
        points = np.concatenate([points, points.mean(axis=1, keepdims=True)], axis=1)
        at = places + (n - (len(results) - 1) / 2) * width
        reach = statistics.interval_95(points)
        heights = points.mean(axis=0)
        # No more than all rollouts can succeed, and no less than none.
        bars = np.stack([heights - np.clip(heights - reach, 0, 1), reach])
        bars[1] = np.clip(heights + reach, 0, 1) - heights
        label = f"{method}, {board[method]['success']:.2f}"
        axes.bar(at, heights, width, color=colours[method], alpha=0.85, label=label)
        axes.errorbar(at, heights, yerr=bars, fmt="none", ecolor="#555555", lw=1, capsize=1.5)
    axes.axvline(len(names) - 0.35, color="#AAAAAA", lw=0.8)
    labels = [short(name).replace("-", "\n") for name in names]
    axes.set_xticks(places, [*labels, "mean over\ntasks"], fontsize=9)
    axes.set_ylim(0, 1.02)
    axes.set_ylabel("success")
    axes.set_title(
        "success in rollouts, with 95% intervals over seeds (cut at 0 and 1)", fontsize=10
    )
    axes.legend(frameon=False, fontsize=9, ncols=1, loc="upper left", bbox_to_anchor=(1, 1))


def steps_of(config):
    return config.steps // config.points * np.arange(1, config.points + 1)


def draw_cosines(axes, results, config):
    between, same = agreement.split(results["mean"]["cosines"])
    for values, colour, dashes, label in (
        (same, "black", "-.", "ceiling: one task on two batches"),
        (between, "#0072B2", "-", "between two tasks"),
    ):
        pairs = values.mean(axis=0)
        axes.plot(steps_of(config), pairs.mean(axis=1), color=colour, ls=dashes, lw=2, label=label)
        low, high = np.quantile(pairs, [0.1, 0.9], axis=1)
        axes.fill_between(steps_of(config), low, high, color=colour, alpha=0.12, lw=0)
    axes.axhline(0, color="black", lw=0.8)
    axes.set_xlabel("step")
    axes.set_ylabel("cosine of gradients on two batches")
    axes.set_title("trained with mean; bands: 10% to 90% of the pairs", fontsize=10)
    axes.legend(frameon=False, fontsize=9)


def draw_losses(axes, results, colours, config):
    for method, result in results.items():
        losses = np.array(result["loss"], float).mean(axis=2)
        axes.plot(steps_of(config), losses.mean(axis=0), color=colours[method], lw=2, label=method)
    axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.set_ylabel("mean squared error of the actions")
    axes.set_title("loss in training, mean over tasks and seeds", fontsize=10)
    axes.legend(frameon=False, fontsize=9)


# --- The command line


def run_all(parser, config, names):
    """The results of all methods, those that are finished from their files; and the experts'."""
    files = {method: config.out / "runs" / f"{method}.json" for method in config.methods}
    results = study.finished_runs(parser, config, files)
    left = [method for method in files if method not in results]
    with Progress(len(left)) as progress:
        seeds = []
        for seed in range(config.seeds):
            progress.describe(f"demonstrations, seed {seed}")
            seeds.append(load(names, seed, config))
        data = stack(seeds)
        for method in left:
            began = time.process_time()
            found = train_method(method, config, data, names, progress.describe)
            results[method] = found | {"cpu_seconds": time.process_time() - began}
            study.save_run(config, files[method], results[method])
            progress.advance()
    expert = np.mean([each["expert"] for each in seeds], axis=0)
    return {method: results[method] for method in files}, expert


def main(argv=None):
    parser = Parser(
        "python -m benchmarks.metaworld_cloning", description=(__doc__ or "").split("\n\n")[0]
    )
    config = parse(parser, Config, argv)
    if config.steps % config.points:
        parser.error(f"argument --steps: expected a multiple of --points, got {config.steps}")
    chosen = tuple(dict.fromkeys((*ALWAYS, *config.methods)))
    config = dataclasses.replace(config, methods=chosen)
    files = config.out / "results.json", config.out / "metaworld_cloning.png"
    check_output(parser, files, config.overwrite)
    try:
        names = metaworld_tasks.suite("mt10")
        results, expert = run_all(parser, config, names)
    except ImportError as error:
        parser.error(f"{error}: {INSTALL}")
    except Failure as error:
        parser.error(str(error))
    report(config, files, names, results, expert)


def report(config, files, names, results, expert):
    board = compare(results)
    findings = list(in_words(names, board, results, config))
    console = Console(highlight=False)
    console.width = max(console.width, 100)
    tables = make_task_table(names, results, expert), make_method_table(board, results)
    console.print(*tables, LEGEND, *findings, sep="\n", soft_wrap=True)
    picture = io.BytesIO()
    make_figure(names, board, results, config).savefig(picture)
    text = as_json(
        config,
        metaworld=version(),
        tasks=list(names),
        expert=expert,
        findings=findings,
        behaviour=methods.behaviour(config.methods),
        methods=board,
        by_seed=[
            {
                "setting": f"{len(names)} tasks",
                "figure": "success in rollouts",
                "methods": {name: row["points"] for name, row in board.items()},
            }
        ],
        runs=[{"method": method, **result} for method, result in results.items()],
    )
    write(dict(zip(files, (text, picture.getvalue()), strict=True)))
    console.print(f"\nWritten: {files[0]} and {files[1]}", soft_wrap=True)


if __name__ == "__main__":
    run_main(main, GOES_ON)
