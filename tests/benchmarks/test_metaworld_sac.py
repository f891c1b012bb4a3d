"""Soft actor-critic on Meta-World: the loop on a tiny environment; EnvPool against metaworld."""

import json
import warnings
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

from benchmarks import metaworld_sac, metaworld_tasks, sac
from benchmarks.common.command_line import Parser, parse

NAMES = ("drawer-close-v3", "reach-v3")
SIZE = 2 + len(NAMES)


class Points:
    """Two tasks: bring a point to a place. It has the API of `metaworld_tasks.Tasks`."""

    size = SIZE
    dies_at: int | None = None
    reward = 0.0

    def __init__(self, names, seed, rewards="v2"):
        self.rng, self.steps = np.random.default_rng(seed), 0

    def reset(self):
        self.places = self.rng.uniform(-1, 1, (len(NAMES), 2))
        self.observation = metaworld_tasks.with_one_hot(self.places)
        return self.observation

    def step(self, actions):
        self.steps += 1
        if self.steps == self.dies_at:
            raise metaworld_tasks.DeadEnvironmentError("EOFError: it is gone")
        self.places = np.clip(self.places + 0.1 * actions[:, :2], -1, 1)
        after = metaworld_tasks.with_one_hot(self.places)
        rewards = (self.reward - np.sum(self.places**2, axis=1)).astype(np.float32)
        transitions = sac.Transitions(
            self.observation, actions, rewards, after, np.ones(len(NAMES), np.float32)
        )
        self.observation = self.reset() if self.steps % 20 == 0 else after
        return transitions, self.observation, rewards > -0.1


class Evaluation:
    """Asks for actions, and finds that the first task is always solved."""

    calls = 0
    fails_at: int | None = None

    def __init__(self, names, seed):
        pass

    def __call__(self, act, episodes):
        type(self).calls += 1
        if self.calls == self.fails_at:
            raise KeyboardInterrupt
        actions = np.asarray(act(np.zeros((len(NAMES), SIZE), np.float32)))
        assert np.all(np.abs(actions) <= 1)
        return np.repeat([[True], [False]], episodes, axis=1)


OPTIONS = "--steps 40 --random-steps 20 --evaluate-every 20 --seeds 2 --width 4 --depth 1"


class Tiny(NamedTuple):
    """The command line, and what it runs on."""

    run: Callable
    environments: type[Points]
    evaluation: type[Evaluation]

    def __call__(self, *options):
        return self.run(*options)


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """Calls the command line on `Points`; without orbax, the test is skipped."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("orbax.checkpoint", reason="checkpoints need orbax")
    environments = type("Environments", (Points,), {})
    evaluation = type("OneEvaluation", (Evaluation,), {})
    monkeypatch.setattr(metaworld_tasks, "Tasks", environments)
    monkeypatch.setattr(metaworld_tasks, "Evaluation", evaluation)
    monkeypatch.setattr(metaworld_tasks, "suite", lambda name: NAMES)

    def run(*options):
        out = tmp_path / "out"
        metaworld_sac.main([*OPTIONS.split(), "--samples", "3", "--out", str(out), *options])
        return out

    return Tiny(run, environments, evaluation)


def refused(capsys, call):
    """What is said on one line, with status 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as error:
        call()
    said = capsys.readouterr().err
    assert error.value.code == 2
    *progress, last = said.strip().splitlines()
    assert "error: " in last
    assert not any("error: " in line for line in progress)
    return last


def results_of(out):
    return json.loads((out / "results.json").read_text())


def test_it_trains_and_reports(tiny, capsys):
    out = tiny("--methods", "joint", "pcgrad", "single")
    said = capsys.readouterr().out
    results = results_of(out)
    assert "not MT10" in said
    assert "drawer-close is solved in 100% of the episodes or more" in said
    for method in ("joint", "pcgrad", "single"):
        assert results["summary"][method]["tasks"] == [1, 0]
        lines = (out / "metrics" / f"{method}_1.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == [20, 40]
        assert ("critic_cosines" in json.loads(lines[-1])) == (method == "pcgrad")
    assert (out / "metaworld_sac.png").read_bytes().startswith(b"\x89PNG")
    assert not list((out / "checkpoints").iterdir())


def test_nothing_is_overwritten(tiny, capsys):
    tiny("--methods", "joint")
    assert "is already there" in refused(capsys, lambda: tiny("--methods", "joint"))


def test_a_killed_run_goes_on(tiny, capsys):
    tiny.evaluation.fails_at = 2  # the one at the end of the first run
    with pytest.raises(KeyboardInterrupt):
        tiny("--methods", "pcgrad")
    tiny.evaluation.fails_at = None
    options = ("--methods", "pcgrad", "--learning-rate", "0.1")
    assert "another options: expected learning_rate" in refused(capsys, lambda: tiny(*options))
    out = tiny("--methods", "pcgrad")
    assert "pcgrad, seed 0: goes on at step 20" in capsys.readouterr().err
    steps = [line["step"] for line in results_of(out)["runs"][0]["history"]]
    assert steps == [20, 40]


def make_config(*options):
    parser = Parser("test")
    return metaworld_sac.with_suite(
        parser, parse(parser, metaworld_sac.Config, [*OPTIONS.split(), *options])
    )


def filled_buffer(rng):
    buffer = metaworld_sac.Buffer(len(NAMES), 10, SIZE)
    environments = Points(NAMES, 0)
    observations = environments.reset()
    for _ in range(25):
        actions = metaworld_sac.at_random(rng, 0, observations)
        transitions, observations, _ = environments.step(actions)
        buffer.add(transitions)
    return buffer


@pytest.mark.parametrize("method", ["pcgrad", "single"])
def test_a_checkpoint_holds_all_that_training_needs(tiny, tmp_path, method):
    config, rng = make_config("--out", str(tmp_path)), np.random.default_rng(0)
    programs = metaworld_sac.make_programs(config, method, SIZE, len(NAMES))
    buffer, key = filled_buffer(rng), jax.random.key(0)
    batches = buffer.sample(rng, 2, 3)
    agent, _ = programs.update(programs.init(key), batches, key)
    metaworld_sac.Checkpoints(tmp_path / "one", config).save(20, agent, buffer, [{"step": 20}])
    empty = metaworld_sac.Buffer(len(NAMES), 10, SIZE)
    step, restored, history = metaworld_sac.Checkpoints(tmp_path / "one", config).restore(
        Parser("test"), programs.init(jax.random.key(1)), empty
    )
    assert (step, history, empty.added) == (20, [{"step": 20}], 25)
    jax.tree.map(np.testing.assert_array_equal, empty.arrays, buffer.arrays)
    after, again = (programs.update(each, batches, key)[0] for each in (agent, restored))
    for one, other in zip(
        metaworld_sac.as_arrays(after).values(),
        metaworld_sac.as_arrays(again).values(),
        strict=True,
    ):
        np.testing.assert_array_equal(one, other)


def test_the_buffer_keeps_the_latest_of_each_task():
    buffer = filled_buffer(np.random.default_rng(0))
    batches = buffer.sample(np.random.default_rng(1), 2, 50)
    assert batches.observation.shape == (2, len(NAMES), 50, SIZE)
    for task in range(len(NAMES)):
        one_hot = np.eye(len(NAMES))[task]
        assert np.all(batches.observation[:, task, :, 2:] == one_hot)
        kept = {tuple(each) for each in buffer.arrays.observation[task]}
        assert {tuple(each) for each in batches.observation[:, task].reshape(-1, SIZE)} <= kept


def test_mean_is_joint_as_the_clipping_sees_it():
    """With heads outside the surgery, the update before clipping is the mean's gradient."""
    config = make_config()
    rng, key = np.random.default_rng(0), jax.random.key(0)
    batches = filled_buffer(rng).sample(rng, 3, 3)
    actors = []
    for method in ("joint", "mean"):
        programs = metaworld_sac.make_programs(config, method, SIZE, len(NAMES))
        agent, _ = programs.update(programs.init(key), batches, key)
        actors.append(agent.actor.params)
    for one, other in zip(*map(jax.tree.leaves, actors), strict=True):
        np.testing.assert_allclose(one, other, atol=3e-6)


@pytest.mark.parametrize("method", metaworld_sac.SURGERIES)
def test_methods_have_one_scale_before_the_clipping(method):
    """Tasks that agree: each method gives the gradient that they have in common."""
    shared = {"trunk": jnp.array([0.6, 0.8])}
    params = {**shared, "head_kernel": jnp.zeros(2)}
    tx = metaworld_sac.make_optimiser(method, 2, 0.1)
    grads = {"trunk": jnp.tile(params["trunk"], (2, 1)), "head_kernel": jnp.eye(2)}
    # Adam is left out: what goes into it is in its first moment.
    _, state = tx.update(grads, tx.init(params), params)
    moment = optax.tree.get(state, "mu")
    direction = moment["trunk"] / jnp.linalg.norm(moment["trunk"])
    np.testing.assert_allclose(direction, params["trunk"], atol=1e-5)
    norm = optax.tree.norm(moment) / 0.1
    assert norm <= 1 + 1e-5
    # Heads: the mean's gradient, an entry of 1/2 for each task, clipped with the rest.
    np.testing.assert_allclose(moment["head_kernel"][0], moment["head_kernel"][1], atol=1e-6)
    # CAGrad goes further by a factor of its own; Nash-MTL has a constant length.
    if method not in ("cagrad", "nash_mtl"):
        ratio = jnp.linalg.norm(moment["trunk"]) / moment["head_kernel"][0]
        np.testing.assert_allclose(ratio, 2.0, rtol=0.02)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--suite", "mt11"], "invalid choice: 'mt11'"),
        (["--methods", "pcgrat"], "invalid choice: 'pcgrat'"),
        (["--steps", "45"], "expected a multiple of 10"),
        (["--random-steps", "40"], "expected less than --steps"),
        (["--seeds", "1"], "expected at least 2"),
    ],
)
def test_wrong_options_are_one_line(tiny, capsys, options, said):
    assert said in refused(capsys, lambda: tiny(*options))


def test_a_loss_that_is_not_finite_ends_the_run(tiny, capsys):
    tiny.environments.reward = np.nan
    said = refused(capsys, lambda: tiny("--methods", "joint"))
    assert "joint, seed 0: critic_loss of drawer-close-v3 is not finite at step 20" in said


def test_a_dead_environment_ends_the_run(tiny, capsys):
    tiny.environments.dies_at = 25
    assert "EOFError: it is gone" in refused(capsys, lambda: tiny("--methods", "joint"))


def test_missing_packages_are_one_line(tiny, capsys, monkeypatch):
    def missing(name):
        raise ModuleNotFoundError("No module named 'metaworld'", name="metaworld")

    monkeypatch.setattr(metaworld_tasks, "suite", missing)
    assert 'no metaworld: install with pip install -e ".[rl]"' in refused(capsys, tiny)


def test_updates_are_timed(tiny, capsys):
    out = tiny("--time-updates", "20")
    times = json.loads((out / "times.json").read_text())["times"]
    assert all(len(each["milliseconds"]) == 2 for each in times["methods"].values())
    assert "pcgrad over joint: " in capsys.readouterr().out


# --- With Meta-World

CLIPS = pytest.mark.filterwarnings("ignore:Constant")  # the experts' actions, which are clipped


@pytest.fixture(scope="module")
def packages():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("metaworld", reason="needs metaworld")
        pytest.importorskip("envpool", reason="needs EnvPool")
        metaworld_tasks.import_metaworld()


class At:
    """An environment of metaworld that is put where one of EnvPool is."""

    def __init__(self, name, after_one_step):
        from metaworld.env_dict import ALL_V3_ENVIRONMENTS

        self.environment = environment = ALL_V3_ENVIRONMENTS[name]()
        environment._set_task_called, environment._partially_observable = True, False
        del environment.sawyer_observation_space
        # The first observation is nearly linear in the random vector that it is made from. What the
        # task does not draw, most often the height of an object at rest, is not asked for: lifted
        # or pressed into the table, the object falls or jumps, which no slope foretells.
        space = environment._random_reset_space
        environment.seeded_rand_vec, environment.np_random = True, np.random.default_rng(0)
        environment._freeze_rand_vec = False
        environment.reset()
        vector, drawn = environment._last_rand_vec, np.eye(space.low.size)[space.high > space.low]
        for _ in range(3):
            found = self.first(vector)
            slopes = np.stack([(self.first(vector + 1e-4 * e) - found) / 1e-4 for e in drawn], 1)
            step = np.linalg.lstsq(slopes, after_one_step - found, rcond=1e-3)[0]
            vector = np.clip(vector + step @ drawn, space.low, space.high)
        self.observation = self.first(vector)

    def first(self, vector):
        self.environment._freeze_rand_vec = True
        self.environment._last_rand_vec = vector
        self.environment.reset()
        return self.environment.step(np.zeros(4, np.float32))[0]


def side_by_side(name, seed=5):
    """Rewards and successes, (2, steps), of EnvPool and metaworld in one episode.

    Both get the same actions: those of a scripted expert, with noise.
    """
    from metaworld.policies import ENV_POLICY_MAP

    ours, expert = metaworld_tasks.EnvPoolTask(name, seed), ENV_POLICY_MAP[name]()
    ours.reset()
    ours.send(np.zeros(4))
    observation, rng = ours.receive()[0], np.random.default_rng(seed)
    theirs = At(name, observation)
    apart, rewards, successes = np.abs(observation - theirs.observation).max(), [], []
    for _ in range(metaworld_tasks.EPISODE - 1):
        action = expert.get_action(observation) + 0.05 * rng.normal(size=4)
        action = np.clip(action, -1, 1).astype(np.float32)
        ours.send(action)
        observation, reward, success = ours.receive()
        _, other_reward, _, _, info = theirs.environment.step(action)
        rewards.append((reward, other_reward))
        successes.append((success, info["success"]))
    return apart, np.array(rewards).T, np.array(successes).T


BEFORE_CONTACT = 20  # steps


def disagreements(name):
    """In what both differ: at once before contact, and in whole episodes but for chance.

    Contact is chaotic. The last bit decides how far two episodes part, and it is not the same on
    every machine: where episodes part, their differences spread, and only what lies beyond this
    spread counts. Where they do not part there is no spread, and the bounds hold as they stand.
    """
    apart, rewards, successes = zip(*(side_by_side(name, seed) for seed in (5, 6, 7)), strict=True)
    returns, solved = np.mean(rewards, axis=-1), np.sum(successes, axis=-1)  # (episodes, 2)
    early = np.abs(np.subtract(*np.moveaxis(rewards, 1, 0)))[:, :BEFORE_CONTACT].max()
    same = {
        f"first observations, by {apart}": max(apart) < 0.01,
        f"rewards before contact, by {early}": early <= 0.01 * np.max(rewards),
        f"returns, {returns.tolist()}": differ_by_at_most(0.01 * returns.mean(0).max(), returns),
        f"steps with success, {solved.tolist()}": differ_by_at_most(5, solved),
    }
    return [what for what, holds in same.items() if not holds]  # of NaN nothing holds


def differ_by_at_most(bound, pairs):
    """Whether the 99% interval of the pairs' mean difference reaches to within the bound."""
    differences = np.subtract(*np.transpose(pairs).astype(float))
    reach = stats.t.ppf(0.995, len(differences) - 1) * stats.sem(differences)
    return abs(differences.mean()) <= bound + reach


@pytest.mark.parametrize(
    ("differences", "within"),
    [
        ([0, 0, 0], True),
        ([5, 5, 5], True),
        ([6, 6, 6], False),
        ([0, 0, 90], True),
        ([360, 394, 348], False),
    ],
)
def test_only_what_lies_beyond_the_spread_counts(differences, within):
    assert differ_by_at_most(5, [(400 + each, 400) for each in differences]) == within


EXPECTED = [
    "reach-v3",
    "push-v3",
    "pick-place-v3",
    "drawer-open-v3",
    "drawer-close-v3",
    "button-press-topdown-v3",
    "peg-insert-side-v3",
    "window-open-v3",
]


@CLIPS
@pytest.mark.parametrize("name", EXPECTED)
def test_envpool_has_the_rewards_of_metaworld(packages, name):
    assert disagreements(name) == []


def test_what_is_tested_is_what_is_collected_from_envpool(packages):
    assert set(metaworld_tasks.suite("mt10")) - metaworld_tasks.ONLY_METAWORLD == set(EXPECTED)


@CLIPS
@pytest.mark.parametrize("name", ["window-close-v3", "door-open-v3"])
def test_why_some_tasks_come_from_metaworld(packages, name):
    assert name in metaworld_tasks.ONLY_METAWORLD
    assert disagreements(name)


@pytest.mark.parametrize("name", ["reach-v3", "window-close-v3"])
def test_the_time_limit_is_not_the_end_of_the_task(packages, name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tasks = metaworld_tasks.Tasks([name], 0)
    first = tasks.reset()
    assert first.shape == (1, tasks.size)
    assert np.all(first[:, -1] == 1)
    assert np.any(first[:, 36:39] != 0), "the goal is hidden"
    for number in range(metaworld_tasks.EPISODE):
        transitions, observation, _ = tasks.step(np.full((1, 4), 0.5))
        assert np.all(transitions.continues == 1)
        same = np.array_equal(transitions.next_observation, observation)
        assert same == (number < metaworld_tasks.EPISODE - 1)
    moved = np.abs(transitions.next_observation[:, :3] - first[:, :3]).max()
    assert moved > 0.1, "this is the first observation of the next episode"
    assert np.abs(observation[:, :3] - first[:, :3]).max() < 0.01


@CLIPS
def test_experts_are_evaluated(packages):
    from metaworld.policies import ENV_POLICY_MAP

    names = ["drawer-close-v3", "reach-v3"]
    expert = ENV_POLICY_MAP[names[0]]()

    def act(observations):
        assert observations.shape == (2, metaworld_tasks.SIZE + 2)
        action = expert.get_action(observations[0, : metaworld_tasks.SIZE].astype(float))
        return np.clip([action, np.zeros(4)], -1, 1)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        solved = metaworld_tasks.evaluate(names, act, 3, seed=0, max_steps=100)
    assert solved.shape == (2, 3)
    assert np.all(solved[0])
    assert not np.any(solved[1])
