"""Nine goals, one agent: does gradient surgery help soft actor-critic, and when?

An arm with two joints (gymnax's Reacher) has to bring its hand to a goal and keep it there. The
nine goals of a 3 x 3 grid are nine tasks of one agent, as in the goal-conditioned experiment of
PCGrad (Yu et al. 2020). Environment, agent and surgery are one compiled program, in which all
methods and seeds train side by side. Actor and critic are operated on separately, and every task
has a temperature of its own. `single`, an agent for each goal, shows what sharing costs.

Two axes make it harder. `--scales 30`: the rewards of the tasks are multiplied by numbers from 1
to 30, so that tasks weigh differently in a sum. `--goal hidden`: the agent sees the number of its
task in place of the goal, so that nothing tells it which goals are near each other.

The optimiser is Adam alone, for which the scale of an update does not matter: `sum` and `mean`
differ by nothing but rounding and Adam's epsilon. `mean` is the baseline of the paired tests. Where
it is not among the methods, `sum` is, which always is there. Two methods with the same seed begin
with the same networks and are evaluated from the same starts.

Run `python -m benchmarks.goal_sac`. It takes four to five minutes of one core, about one of them to
compile. `--full` takes both axes, all methods and six seeds.
"""

import argparse
import dataclasses
import functools
import io
import itertools
import time
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from matplotlib import colormaps
from matplotlib.figure import Figure
from rich.console import Console

import optax_surgery as surgery
from benchmarks import sac
from benchmarks.common import agreement, methods, statistics, study
from benchmarks.common.command_line import (
    GOES_ON,
    Parser,
    as_json,
    check_output,
    parse,
    run_main,
    write,
)
from benchmarks.common.progress import Progress

GOALS = np.array(list(itertools.product((-1.2, 0.0, 1.2), repeat=2)), np.float32)
NUM_TASKS = len(GOALS)
NUM_ACTIONS = 2  # a torque at each joint
SURGERIES = {**methods.METHODS, "mean": lambda num_tasks: surgery.mean()}
DEFAULTS = ("single", "sum", "pcgrad", "aligned_mtl")
# Only methods that work on the Gramian: those that work on losses cannot take an actor's, which
# are negative.
CHOICES = (*DEFAULTS, "mean", "nash_mtl", "cagrad", "upgrad", "imtl_g")

# Of the agent: chosen once, and tried with seeds 100 to 102, which are reported nowhere. No grid
# was searched: no method is tuned.
LEARNING_RATE = 1e-3
DISCOUNT = 0.97
POLYAK = 0.01
TEMPERATURE = 0.37  # at the start
DEPTH = 2
BATCH = 32  # transitions of each task per update
ENVIRONMENTS = 4  # of each task; each makes one step per update
WARM_UP = 100  # random steps of each environment before the first update

# Of its evaluation.
EPISODES = 32  # of each task
REACHED = 0.9  # the mean reward that counts as a success: the hand within 0.32 of the goal,
LAST = 20  # over so many steps at the end of an episode
PROBE = 256  # transitions of each task for the cosines


@dataclasses.dataclass(frozen=True)
class Config:
    """The options, each with its help and what it may be: one of some names, or a least number."""

    methods: Annotated[tuple, "what to compare, always with sum", CHOICES] = DEFAULTS
    seeds: Annotated[int, "agents per method, from seed 0, at least 2", 2] = 3
    scales: Annotated[tuple, "rewards of the tasks go geometrically from 1 to this", 1] = (1.0,)
    goal: Annotated[
        tuple,
        "observed: the goal's place is seen; hidden: the task's number",
        ("observed", "hidden"),
    ] = ("observed",)
    width: Annotated[int, "of the two hidden layers of every network", 1] = 64
    updates: Annotated[int, "of actor and critic, a multiple of --points", 1] = 10_000
    points: Annotated[int, "times to evaluate after the start", 1] = 20
    full: Annotated[
        bool, "other defaults: all methods, 6 seeds, --scales 1 30, --goal observed hidden", None
    ] = False
    out: Annotated[Path, "folder for the results", None] = Path("results/goal_sac")
    overwrite: Annotated[bool, "replace the results of an earlier run", None] = False


# The defaults with `--full`. What is given on the command line stays as it is given.
FULL = {"methods": CHOICES, "seeds": 6, "scales": (1.0, 30.0), "goal": ("observed", "hidden")}
FullConfig = dataclasses.make_dataclass(
    "FullConfig",
    [(name, Config.__annotations__[name], default) for name, default in FULL.items()],
    bases=(Config,),
    frozen=True,
)
FullConfig.__module__ = __name__  # of Python 3.11 it would be that of dataclasses


# --- The environments


@functools.cache
def make_reacher():
    import gymnax  # here, so that --help needs no more than the package

    return gymnax.make("Reacher-misc")


def reset(key, task):
    """An arm at rest nowhere in particular, with the goal of the task."""
    environment, settings = make_reacher()
    _, state = environment.reset_env(key, settings)
    return state.replace(goal_xy=jnp.asarray(GOALS)[task])


def observe(state):
    environment, settings = make_reacher()
    return environment.get_obs(state, settings)


def step(state, action):
    """The next state, and the reward for it."""
    environment, settings = make_reacher()
    # Its steps are not random, but it asks for a key.
    _, after, reward, _, _ = environment.step_env(jax.random.key(0), state, action, settings)
    return after, reward


def step_or_reset(state, action, task, key):
    """The state after the action, the state to go on from, and the reward."""
    after, reward = step(state, action)
    over = after.time >= make_reacher()[1].max_steps_in_episode
    following = jax.tree.map(lambda new, old: jnp.where(over, new, old), reset(key, task), after)
    return after, following, reward


def show(observation, task, goal):
    """What the networks see of an observation, whose last two numbers are the goal."""
    if goal == "observed":
        return observation
    number = jax.nn.one_hot(task, NUM_TASKS)
    number = jnp.broadcast_to(number, (*observation.shape[:-1], NUM_TASKS))
    return jnp.concatenate([observation[..., :-2], number], axis=-1)


# The same of all environments of all tasks, (T, environments).
reset_all = jax.vmap(jax.vmap(reset, (0, None)))
observe_all = jax.vmap(jax.vmap(observe))
step_all = jax.vmap(jax.vmap(step))
step_or_reset_all = jax.vmap(jax.vmap(step_or_reset, (0, 0, None, 0)))


def show_all(observations, tasks, goal):
    return jax.vmap(lambda each, task: show(each, task, goal))(observations, tasks)


# --- The optimiser


class ChosenState(NamedTuple):
    """Which method operates, the states of all of them, and the weights of the last step."""

    method: jax.Array
    states: tuple
    weights: jax.Array


def chosen(names, num_tasks):
    """The surgery whose number among `names` is in the state, so that it may differ by agent.

    Agents with different methods can be trained by one program then. The Gramian is made once, and
    every method says its weights for it. All states advance: PCGrad draws a new order each time.
    """
    surgeries = [SURGERIES[name](num_tasks) for name in names]

    def init(params):
        del params
        states = tuple(each.init(jnp.zeros(num_tasks)) for each in surgeries)
        return ChosenState(jnp.zeros((), int), states, jnp.zeros(num_tasks))

    def update(updates, state, params=None, **_):
        del params
        gramian = surgery.gramian(updates)
        # Fed with the identity, what a surgery returns are its weights.
        each = [
            one.update(jnp.eye(num_tasks), old, gramian=gramian)
            for one, old in zip(surgeries, state.states, strict=True)
        ]
        weights, states = zip(*each, strict=True)
        mine = jnp.stack(weights)[state.method]
        return surgery.combine(mine, updates), ChosenState(state.method, states, mine)

    return optax.GradientTransformationExtraArgs(init, update)


# --- One agent. It learns the tasks whose numbers are in `lane.tasks`.


class Lane(NamedTuple):
    """What distinguishes the agents that one program trains."""

    seed: Any
    method: Any  # its number
    tasks: Any  # (T,)
    scales: Any  # (T,) what the rewards are multiplied by


class Run(NamedTuple):
    """An agent in training."""

    agent: sac.Agent
    worlds: Any  # (T, ENVIRONMENTS) states
    memory: sac.Transitions  # (T, capacity), with observations as the environments give them
    key: jax.Array


def make_agent(lane, names, goal, width, observation, key):
    """The agent of a lane, operated on by the lane's method."""
    num_tasks = len(lane.tasks)
    agent = sac.make_agent(
        sac.Actor(NUM_ACTIONS, width, DEPTH),
        sac.Critic(width, DEPTH),
        lambda: optax.chain(chosen(names, num_tasks), optax.adam(LEARNING_RATE)),
        optax.adam(LEARNING_RATE),
        show(observation, lane.tasks[0], goal),
        num_tasks,
        key,
        TEMPERATURE,
    )
    actor, critic = (
        each.replace(opt_state=optax.tree.set(each.opt_state, method=lane.method))
        for each in (agent.actor, agent.critic)
    )
    return agent._replace(actor=actor, critic=critic)


def start(lane, names, goal, width, capacity):
    """An agent before its first update, and a memory with the steps of the warm-up."""
    # A single agent has another key for every task; one for all tasks has that of the first.
    key = jax.random.fold_in(jax.random.key(lane.seed), lane.tasks[0])
    agent_key, reset_key, warm_key, key = jax.random.split(key, 4)
    shape = len(lane.tasks), ENVIRONMENTS
    worlds = reset_all(jax.random.split(reset_key, shape), lane.tasks)
    seen = observe(jax.tree.map(lambda each: each[0, 0], worlds))
    agent = make_agent(lane, names, goal, width, seen, agent_key)
    one = sac.Transitions(seen, jnp.zeros(NUM_ACTIONS), jnp.zeros(()), seen, jnp.zeros(()))
    memory = jax.tree.map(lambda x: jnp.zeros((len(lane.tasks), capacity, *x.shape)), one)

    def random_step(run, number):
        action_key, step_key = jax.random.split(jax.random.fold_in(warm_key, number))
        actions = jax.random.uniform(action_key, (*shape, NUM_ACTIONS), minval=-1.0, maxval=1.0)
        return interact(run, lane, actions, step_key, number), None

    return lax.scan(random_step, Run(agent, worlds, memory, key), jnp.arange(WARM_UP))[0]


def interact(run, lane, actions, key, number):
    """Every environment makes its step of this number, which is remembered."""
    keys = jax.random.split(key, actions.shape[:2])
    after, worlds, reward = step_or_reset_all(run.worlds, actions, lane.tasks, keys)
    # Episodes end by their time limit only, so that the value after it counts.
    new = sac.Transitions(
        observation=observe_all(run.worlds),
        action=actions,
        reward=reward * lane.scales[:, None],
        next_observation=observe_all(after),
        continues=jnp.ones_like(reward),
    )
    memory = jax.tree.map(
        lambda old, x: lax.dynamic_update_slice_in_dim(old, x, number * ENVIRONMENTS, axis=1),
        run.memory,
        new,
    )
    return run._replace(worlds=worlds, memory=memory)


def sample(run, lane, goal, key, size, rows):
    """Transitions (T, size) as the networks see them. `rows` makes row numbers of a key."""
    places = rows(key, (len(lane.tasks), size))
    batch = jax.tree.map(lambda each: jax.vmap(lambda x, i: x[i])(each, places), run.memory)
    return batch._replace(
        observation=show_all(batch.observation, lane.tasks, goal),
        next_observation=show_all(batch.next_observation, lane.tasks, goal),
    )


def update(run, lane, number, goal):
    """One step of the environments and of the agent; losses and weights, each (T,)."""
    keys = jax.random.split(jax.random.fold_in(run.key, number), 4)
    observation = show_all(observe_all(run.worlds), lane.tasks, goal)
    actor = run.agent.actor
    actions, _ = sac.act(actor.apply_fn, actor.params, observation, lane.tasks, keys[0])
    run = interact(run, lane, actions, keys[1], number)

    def rows(key, shape):
        return jax.random.randint(key, shape, 0, (number + 1) * ENVIRONMENTS)

    batch = sample(run, lane, goal, keys[2], BATCH, rows)
    agent, losses = sac.train_step(
        run.agent, batch, lane.tasks, keys[3], discount=DISCOUNT, polyak=POLYAK
    )
    weights = {
        f"{name}_weights": optax.tree.get(getattr(agent, name).opt_state, "weights")
        for name in ("critic", "actor")
    }
    return run._replace(agent=agent), losses | weights


def train_stretch(run, lane, numbers, goal):
    """The updates of these numbers, and the means of losses and weights over them."""
    run, seen = lax.scan(lambda run, number: update(run, lane, number, goal), run, numbers)
    return run, jax.tree.map(lambda each: jnp.mean(each, axis=0), seen)


# --- What is measured of an agent


def play(run, lane, goal, key):
    """Success and reward (T,) at the end of greedy episodes."""
    # From the same starts for every task.
    keys = jnp.broadcast_to(jax.random.split(key, EPISODES), (len(lane.tasks), EPISODES))
    worlds = reset_all(keys, lane.tasks)
    actor = run.agent.actor

    def one_step(worlds, _):
        observation = show_all(observe_all(worlds), lane.tasks, goal)
        actions = sac.act_greedily(actor.apply_fn, actor.params, observation, lane.tasks)
        return step_all(worlds, actions)

    _, rewards = lax.scan(one_step, worlds, length=make_reacher()[1].max_steps_in_episode)
    at_the_end = jnp.mean(rewards[-LAST:], axis=0)
    return jnp.mean(at_the_end > REACHED, axis=-1), jnp.mean(at_the_end, axis=-1)


def task_gradients(run, lane, batch, key):
    """The critic's and the actor's, of one batch."""
    agent, keys = run.agent, jax.random.split(key, len(lane.tasks))

    def of_critic(params, batch, task, temperature, key):
        return sac.critic_loss(params, agent, batch, task, temperature, key, DISCOUNT)

    def of_actor(params, batch, task, temperature, key):
        return sac.actor_loss(params, agent, batch, task, temperature, key)[0]

    own = batch, lane.tasks, agent.temperatures, keys
    return {
        "critic": surgery.per_task_value_and_grad(of_critic)(agent.critic.params, *own)[1],
        "actor": surgery.per_task_value_and_grad(of_actor)(agent.actor.params, *own)[1],
    }


def cosines(run, lane, goal, filled, key):
    """How the tasks' gradients agree: the (T, T) cosines on one batch.

    On the diagonal stands the ceiling that the noise of a batch leaves: the cosine of the task's
    gradients on two disjoint batches, of which one is drawn from even and one from odd rows.
    """
    pair = []
    for parity, one_key in enumerate(jax.random.split(key)):
        batch_key, noise_key = jax.random.split(one_key)

        def rows(key, shape, parity=parity):
            return 2 * jax.random.randint(key, shape, 0, filled // 2) + parity

        batch = sample(run, lane, goal, batch_key, PROBE, rows)
        pair.append(task_gradients(run, lane, batch, noise_key))
    both = jax.tree.map(lambda *each: jnp.concatenate(each), *pair)
    size, found = len(lane.tasks), {}
    for name, grads in both.items():
        all_of_them = surgery.cosine_similarities(surgery.gramian(grads))
        same = jnp.diagonal(all_of_them[:size, size:])
        found[f"{name}_cosines"] = jnp.where(jnp.eye(size) > 0, same, all_of_them[:size, :size])
    return found


def measure(run, lane, number, goal):
    """All that is measured after so many steps of the environments."""
    # The same starts for every method, and for single agents.
    key = jax.random.fold_in(jax.random.key(lane.seed), number)
    play_key, probe_key = jax.random.split(key)
    success, reward = play(run, lane, goal, play_key)
    found = cosines(run, lane, goal, number * ENVIRONMENTS, probe_key)
    return {"success": success, "reward": reward, **found}


# --- All agents of a setting


@functools.cache
def make_program(names, goal, width, capacity):
    """What starts, trains and measures several agents at once, compiled once for all scales."""
    several = {
        "start": (
            functools.partial(start, names=names, goal=goal, width=width, capacity=capacity),
            0,
        ),
        "train": (functools.partial(train_stretch, goal=goal), (0, 0, None)),
        "measure": (functools.partial(measure, goal=goal), (0, 0, None)),
    }
    return {
        # The memory is large, and is written where it lies.
        name: jax.jit(jax.vmap(fn, axes), donate_argnums=(0,) if name == "train" else ())
        for name, (fn, axes) in several.items()
    }


def train_lanes(lanes, names, config, advance):
    """Trains all lanes. Returns what was seen, with leading axes (lanes, points)."""
    per_stretch = config.updates // config.points
    capacity = (WARM_UP + config.updates) * ENVIRONMENTS
    program = make_program(names, config.goal[0], config.width, capacity)
    runs = program["start"](lanes)
    measured, trained = [program["measure"](runs, lanes, WARM_UP)], []
    for point in range(config.points):
        first = WARM_UP + point * per_stretch
        runs, seen = program["train"](runs, lanes, first + jnp.arange(per_stretch))
        trained.append(seen)
        measured.append(program["measure"](runs, lanes, first + per_stretch))
        jax.block_until_ready(measured[-1])
        advance()

    def stacked(trees):
        return jax.tree.map(lambda *each: np.stack(each, axis=1), *trees)

    return stacked(measured) | stacked(trained)


def reward_scales(scale):
    """Geometrically from 1 to `scale`, over the tasks."""
    return np.geomspace(1, scale, NUM_TASKS).astype(np.float32)


def train_joint(names, seeds, config, advance):
    """{method: what was seen, with leading axes (seeds, points)} of agents with all tasks."""
    number, seed = (each.ravel() for each in np.indices((len(names), len(seeds))))
    tasks, scales = (
        np.tile(each, (len(seed), 1))
        for each in (np.arange(NUM_TASKS), reward_scales(config.scales[0]))
    )
    seen = train_lanes(Lane(np.array(seeds)[seed], number, tasks, scales), names, config, advance)
    return {
        name: {part: each[number == n] for part, each in seen.items()}
        for n, name in enumerate(names)
    }


def train_single(seeds, config, advance):
    """The same of one agent for each task."""
    seed, task = (each.ravel() for each in np.indices((len(seeds), NUM_TASKS)))
    scales = reward_scales(config.scales[0])[task, None]
    lanes = Lane(np.array(seeds)[seed], np.zeros_like(seed), task[:, None], scales)
    seen = train_lanes(lanes, ("sum",), config, advance)
    per_task = ("success", "reward", "critic_loss", "actor_loss")
    # The lanes' axis is (seeds, tasks), and the tasks' axis of a lane is 1.
    return {
        part: np.moveaxis(seen[part][..., 0].reshape(len(seeds), NUM_TASKS, -1), 1, 2)
        for part in per_task
    }


def train_setting(names, seeds, config, advance):
    """{method: what was seen} of one setting, the first of each axis in `config`."""
    found = {}
    if joint := tuple(name for name in names if name != "single"):
        found |= train_joint(joint, seeds, config, advance)
    if "single" in names:
        found["single"] = train_single(seeds, config, advance)
    return found


def diverged(seen):
    """In which seeds something is not finite."""
    finite = [
        np.isfinite(np.asarray(each, float)).reshape(len(each), -1).all(axis=1)
        for each in seen.values()
    ]
    return np.flatnonzero(~np.all(finite, axis=0))


# --- What it finds


def baseline_of(results):
    return "mean" if "mean" in results else "sum"


def summary(seen):
    """Of each seed: the area under its success curve, from 0 to 1, and success at the end."""
    success = np.mean(np.asarray(seen["success"], float), axis=-1)
    area = np.trapezoid(success, axis=-1) / (success.shape[-1] - 1)
    return {"area": area, "final": success[:, -1]}


def compare(results):
    """{method: row} of one setting, with paired tests against the baseline."""
    baseline = baseline_of(results)
    found = {method: summary(seen) for method, seen in results.items()}
    rows = {method: {} for method in found}
    for figure in ("area", "final"):
        tests = statistics.paired_tests(
            {
                method: each[figure] - found[baseline][figure]
                for method, each in found.items()
                if method != baseline
            }
        )
        for method, each in found.items():
            rows[method][figure] = {
                "points": each[figure],
                "mean": np.mean(each[figure]),
                "interval_95": statistics.interval_95(each[figure]),
                "against": tests.get(method),
            }
    return rows


def between_tasks(seen, name):
    """Cosines (seeds, points) between tasks, of a task with itself, and the share below -0.1."""
    pairs, same = agreement.split(seen[f"{name}_cosines"])
    return pairs.mean(axis=-1), same.mean(axis=-1), np.mean(pairs < -0.1, axis=-1)


def shares(seen, name):
    """(seeds, points, T) weights over their mean: 1 for each task in a sum."""
    weights = np.asarray(seen[f"{name}_weights"], float)
    return weights / weights.mean(axis=-1, keepdims=True)


def make_table(rows, results):
    baseline = baseline_of(results)
    against = f"against\n{baseline}"
    headings = ("area under\nsuccess", against, "success\nat the end", against, "worst\ntask")
    table = study.make_table("method", *headings, "reward\nat the end")
    for method, row in sorted(rows.items(), key=lambda item: -item[1]["area"]["mean"]):
        cells = []
        for figure in (row["area"], row["final"]):
            cells += [
                f"{figure['mean']:.3f} ± {figure['interval_95']:.3f}",
                statistics.verdict(figure["against"]),
            ]
        success, reward = (
            np.mean(np.asarray(results[method][part], float)[:, -1], axis=0)
            for part in ("success", "reward")
        )
        table.add_row(method, *cells, f"{success.min():.2f}", f"{reward.mean():.3f}")
    return table


LEGEND = """\
Success: the share of episodes whose last 20 rewards have a mean above 0.9, which is to keep the
hand near the goal. Area: under the curve of success over updates, as a share of the most that is
possible: it tells who learns faster. ±: the 95% interval over seeds. Against the baseline: the
difference, where a paired t-test finds one, with Holm's correction for the number of methods; else
an equals sign.
"""


def differences_in_words(rows, baseline, seeds):
    for figure, what in (("area", "the area under the curve"), ("final", "success at the end")):
        tests = {m: r[figure]["against"] for m, r in rows.items() if r[figure]["against"]}
        told = []
        for word, sign in (("better", 1), ("worse", -1)):
            some = [m for m, test in tests.items() if test["differs"] and sign * test["mean"] > 0]
            told += [f"{word}: {', '.join(some)}"] if some else []
        equal = {m: test for m, test in tests.items() if not test["differs"]}
        if equal:
            reach = max(abs(test["mean"]) + test["interval_95"] for test in equal.values())
            told.append(
                f"no difference found: {', '.join(equal)} (with {seeds} seeds, differences up to "
                f"{reach:.2f} are not ruled out)"
            )
        yield f"In {what}, against {baseline}, {'; '.join(told)}."


def in_words(rows, results, seeds):
    """The findings of one setting, a sentence each."""
    baseline = baseline_of(results)
    yield from differences_in_words(rows, baseline, seeds)
    untrained = max(np.mean(np.asarray(seen["success"], float)[:, 0]) for seen in results.values())
    yield f"Before training, success is at most {untrained:.3f}."
    for name in ("critic", "actor"):
        between, same, below = (each.mean() for each in between_tasks(results[baseline], name))
        yield (
            f"Gradients of the {name}, trained with {baseline}: the mean cosine between tasks is "
            f"{between:+.2f}, of one task on two batches {same:+.2f}; {below:.0%} of the pairs are "
            "below -0.1."
        )
    joint = [method for method in results if method not in ("single", "sum", "mean")]
    for name in ("critic", "actor"):
        each = [shares(results[method], name).mean(axis=(0, 1)) for method in joint]
        told = [f"{m} {s.min():.2f} to {s.max():.2f}" for m, s in zip(joint, each, strict=True)]
        if told:
            yield f"Weights of the tasks in the {name}, over their mean: {', '.join(told)}."


# --- The picture

COLOURS = dict(
    zip(
        CHOICES,
        ("#000000", "#999999", "#0072B2", "#D55E00", "#56B4E9", "#009E73", "#E69F00", "#CC79A7",
         "#8B5A2B"),
        strict=True,
    )
)  # fmt: skip


def draw_interval(axes, steps, values, **style):
    """The mean over seeds, the leading axis, and its 95% interval."""
    mean, reach = values.mean(axis=0), statistics.interval_95(values)
    (line,) = axes.plot(steps, mean, **style)
    axes.fill_between(steps, mean - reach, mean + reach, color=line.get_color(), alpha=0.1, lw=0)


def draw_success(figure, results, steps):
    axes = figure.subplots()
    for method, seen in results.items():
        success = np.asarray(seen["success"], float).mean(axis=-1)
        dashes = "--" if method == "single" else "-"
        draw_interval(axes, steps, success, color=COLOURS[method], ls=dashes, label=method)
    axes.set(ylim=(0, 1.02), xlabel="updates", ylabel="success, mean over tasks")
    axes.set_title("bands: 95% intervals over seeds", fontsize=10)
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def draw_tasks(figure, results, steps, scales):
    """A panel for each goal, where the goal lies."""
    panels = figure.subplots(3, 3, sharex=True, sharey=True)
    for task, (x, y) in enumerate(GOALS):
        axes = panels[1 - round(y / 1.2), 1 + round(x / 1.2)]
        for method, seen in results.items():
            success = np.asarray(seen["success"], float)[..., task].mean(axis=0)
            dashes = "--" if method == "single" else "-"
            axes.plot(steps, success, color=COLOURS[method], ls=dashes, lw=1)
        scaled = f", rewards times {scales[task]:.3g}" if scales[-1] > 1 else ""
        axes.set_title(f"({x:.1f}, {y:.1f}){scaled}", fontsize=7)
        axes.tick_params(labelsize=7)
        axes.set_ylim(0, 1.02)
    figure.suptitle("success at each goal", fontsize=10)


def draw_cosines(figure, results, steps):
    """Between tasks, and the ceiling in grey: a task with itself on two batches."""
    panels = figure.subplots(1, 2, sharey=True)
    for axes, name in zip(panels, ("critic", "actor"), strict=True):
        for method, seen in results.items():
            if method == "single":
                continue
            between, same, _ = between_tasks(seen, name)
            axes.plot(steps, between.mean(axis=0), color=COLOURS[method])
            axes.plot(steps, same.mean(axis=0), color=COLOURS[method], ls=":", lw=1)
        axes.axhline(0, color="black", lw=0.8)
        axes.set_title(f"{name}'s gradients", fontsize=10)
        axes.set_xlabel("updates")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("cosine: — between tasks, ··· ceiling")


def draw_weights(figure, results, steps):
    """A panel for each method whose weights change, one line a task."""
    names = [method for method in results if method not in ("single", "sum", "mean")]
    if not names:
        return
    panels = figure.subplots(2, len(names), sharex=True, sharey="row", squeeze=False)
    colours = colormaps["viridis"](np.linspace(0, 0.95, NUM_TASKS))
    for row, network in zip(panels, ("critic", "actor"), strict=True):
        row[0].set_ylabel(f"{network}: weight over mean", fontsize=8)
        for axes, method in zip(row, names, strict=True):
            for task, line in enumerate(shares(results[method], network).mean(axis=0).T):
                axes.plot(steps[1:], line, color=colours[task], lw=1)
            axes.axhline(1, color="black", lw=0.8, ls=":")
            axes.tick_params(labelsize=7)
        if np.max([shares(results[method], network) for method in names]) > 5:
            # Not a plain logarithm: a weight may be below 0.
            row[0].set_yscale("symlog", linthresh=0.1)
            row[0].yaxis.set_major_formatter("{x:g}")
    for axes, method in zip(panels[0], names, strict=True):
        axes.set_title(method, fontsize=9)
    for axes in panels[1]:
        axes.set_xlabel("updates", fontsize=8)
    figure.suptitle("weights: a line for each task, from dark (the first) to bright", fontsize=10)


def make_figure(results, setting, config):
    figure = Figure(figsize=(15, 10), layout="constrained", dpi=130)
    upper, lower = figure.subfigures(2, 1, squeeze=False)[:, 0]
    curves, tasks = upper.subfigures(1, 2, squeeze=False, width_ratios=(1, 1.1))[0]
    agreement, weights = lower.subfigures(1, 2, squeeze=False, width_ratios=(1, 1.6))[0]
    steps = np.linspace(0, config.updates, config.points + 1)
    draw_success(curves, results, steps)
    draw_tasks(tasks, results, steps, reward_scales(setting[0]))
    draw_cosines(agreement, results, steps)
    draw_weights(weights, results, steps)
    figure.suptitle(f"Nine goals of an arm, {describe(setting)}: {config.seeds} seeds")
    return figure


# --- The command line


def describe(setting):
    scale, goal = setting
    return f"reward scale {scale:g}, goal {goal}"


def as_name(setting):
    scale, goal = setting
    return f"scale_{scale:g}_{goal}"


def of_setting(config, setting):
    """The options of one setting, as they stand in its files."""
    scale, goal = setting
    return dataclasses.replace(config, scales=(scale,), goal=(goal,), full=False)


def run_files(config, setting):
    folder = config.out / "runs" / as_name(setting)
    return {method: folder / f"{method}.json" for method in config.methods}


def programs_left(methods, results):
    """The methods without results, by the program that trains them: single agents have one."""
    left = [method for method in methods if method not in results]
    single = left.count("single")  # it is the first of the choices
    return [names for names in (left[:single], left[single:]) if names]


def train_left(parser, config, setting, results, progress):
    """Adds to the results of a setting those that are not there yet, and writes their files."""
    config, files = of_setting(config, setting), run_files(config, setting)
    failed = {}
    for names in programs_left(files, results):
        progress.describe(f"{describe(setting)}, {' '.join(names)}")
        began = time.process_time()
        found = train_setting(names, range(config.seeds), config, progress.advance)
        seconds = (time.process_time() - began) / len(names)
        for method, seen in found.items():
            if len(seeds := diverged(seen)):
                failed[method] = seeds
                continue
            results[method] = seen | {"cpu_seconds": seconds}
            study.save_run(config, files[method], results[method])
    if failed:
        told = "; ".join(f"{m} with seed {', '.join(map(str, s))}" for m, s in failed.items())
        parser.error(
            f"{describe(setting)}: not finite: {told}: all other runs are kept; leave "
            f"{', '.join(failed)} out of --methods"
        )


def train_all(parser, config, settings):
    """{setting: {method: what was seen}}. What is finished is files, and kept."""
    found = {
        setting: study.finished_runs(
            parser, of_setting(config, setting), run_files(config, setting)
        )
        for setting in settings
    }
    num_programs = sum(len(programs_left(config.methods, results)) for results in found.values())
    with Progress(num_programs * config.points) as progress:
        for setting, results in found.items():
            train_left(parser, config, setting, results, progress)
    return {
        setting: {method: found[setting][method] for method in config.methods}
        for setting in settings
    }


def read_options(parser, argv):
    """The options. With `--full` others are the defaults."""
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--full", action="store_true")
    full = first.parse_known_args(argv)[0].full
    config = parse(parser, FullConfig if full else Config, argv)
    if config.updates % config.points:
        parser.error(f"argument --updates: expected a multiple of --points, got {config.updates}")
    chosen = [name for name in CHOICES if name in (*config.methods, "sum")]
    return dataclasses.replace(config, methods=tuple(chosen))


def check_packages(parser):
    try:
        make_reacher()
    except ImportError as error:
        parser.error(f'{error}: install what it needs with pip install -e ".[rl]"')


def report_setting(console, setting, results, config):
    """Prints what was found in one setting. Returns it for the file, and its picture."""
    rows = compare(results)
    findings = list(in_words(rows, results, config.seeds))
    console.print(f"\n{describe(setting)}", style="bold")
    console.print(make_table(rows, results))
    console.print(*findings, sep="\n", soft_wrap=True)
    scale, goal = setting
    baseline = baseline_of(results)
    told = {"scale": scale, "goal": goal, "baseline": baseline, "rows": rows, "findings": findings}
    picture = io.BytesIO()
    make_figure(results, setting, config).savefig(picture)
    return told | {"runs": results}, picture.getvalue()


def by_seed(told):
    """The figures of each seed, for `benchmarks.report`."""
    names = {"area": "area under success", "final": "success at the end"}
    return [
        {
            "setting": describe((each["scale"], each["goal"])),
            "figure": names[figure],
            "methods": {name: row[figure]["points"] for name, row in each["rows"].items()},
        }
        for each in told
        for figure in names
    ]


def main(argv=None):
    parser = Parser("python -m benchmarks.goal_sac", description=(__doc__ or "").split("\n\n")[0])
    config = read_options(parser, argv)
    check_packages(parser)
    settings = list(itertools.product(config.scales, config.goal))
    pictures = [config.out / f"{as_name(setting)}.png" for setting in settings]
    files = [config.out / "results.json", *pictures]
    check_output(parser, files, config.overwrite)
    results = train_all(parser, config, settings)
    console = Console(highlight=False)
    console.width = max(console.width, 100)
    reports = [report_setting(console, each, results[each], config) for each in settings]
    console.print(f"\n{LEGEND}", soft_wrap=True)
    told, drawn = zip(*reports, strict=True)
    behaviour = methods.behaviour(config.methods)
    text = as_json(config, behaviour=behaviour, settings=told, by_seed=by_seed(told))
    write(dict(zip(files, (text, *drawn), strict=True)))
    console.print(f"Written: {', '.join(map(str, files))}", soft_wrap=True)


if __name__ == "__main__":
    run_main(main, GOES_ON)
