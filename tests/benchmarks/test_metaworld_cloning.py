"""The benchmark on cloning, with points that walk to goals in place of robots."""

import dataclasses
import functools
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import metaworld_cloning, metaworld_tasks
from benchmarks.metaworld_cloning import NUM_TASKS, Config

NAMES = tuple(f"walk-{n}-v3" for n in range(NUM_TASKS))
STEPS = 40
SMALL = {"seeds": 2, "demonstrations": 2, "steps": 60, "points": 2, "width": 32}


class Walk:
    """A point in a plane goes to its goal; the other coordinates are of no use."""

    max_path_length = STEPS

    def set_task(self, task):
        self.goal = task

    def reset(self):
        self.place = np.zeros(2)
        return self.observation(), {}

    def observation(self):
        return np.concatenate([self.place, self.goal, np.ones(2)])

    def step(self, action):
        self.place = self.place + 0.1 * action[:2]
        near = np.linalg.norm(self.place - self.goal) < 0.2
        return self.observation(), 0.0, False, False, {"success": float(near)}

    def close(self):
        pass


class Expert:
    def get_action(self, observation):
        towards = observation[2:4] - observation[:2]
        return np.concatenate([10 * towards, [0.5, -3.0]])


def goals(number, seed):
    """Five goals of a task, near to one another and far from the start."""
    angle = 2 * np.pi * number / NUM_TASKS
    near = np.random.default_rng((number, seed)).uniform(-0.1, 0.1, (5, 2))
    return 0.9 * np.array([np.cos(angle), np.sin(angle)]) + near


def evaluate(names, act, episodes, seed, max_steps):
    """As that of `metaworld_tasks`, with one-hot observations."""
    solved = np.zeros((len(names), episodes), bool)
    for episode in range(episodes):
        tasks = [Walk() for _ in names]
        for number, task in enumerate(tasks):
            task.set_task(goals(number, seed)[episode % 5])
            task.reset()
        for _ in range(min(max_steps, STEPS)):
            seen = np.stack([task.observation() for task in tasks])
            seen = np.concatenate([seen, np.eye(len(names))], axis=1).astype(np.float32)
            for number, (task, action) in enumerate(zip(tasks, act(seen), strict=True)):
                solved[number, episode] |= task.step(action)[-1]["success"] > 0
    return solved


@pytest.fixture(autouse=True)
def walks(monkeypatch):
    """No package of robots is needed, nor used where there is one."""

    def make_task(name, seed):
        return Walk(), list(goals(NAMES.index(name), seed)), Expert()

    monkeypatch.setattr(metaworld_cloning, "make_task", make_task)
    monkeypatch.setattr(metaworld_cloning, "version", lambda: "of a test")
    monkeypatch.setattr(metaworld_tasks, "suite", lambda name: NAMES)
    monkeypatch.setattr(metaworld_tasks, "evaluate", evaluate)


@pytest.fixture
def config(tmp_path):
    return Config(**SMALL, data_dir=tmp_path / "data")


@pytest.fixture
def command(tmp_path):
    options = [word for name, value in SMALL.items() for word in (f"--{name}", str(value))]
    return [
        *options,
        "--episodes",
        "3",
        "--data-dir",
        str(tmp_path / "data"),
        "--out",
        str(tmp_path / "out"),
    ]


def fails(capsys, command):
    """The one line that a command line fails with."""
    with pytest.raises(SystemExit) as stopped:
        metaworld_cloning.main(command)
    assert stopped.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    # Before it there is progress.
    (line,) = [line for line in lines if line.startswith("python -m benchmarks.metaworld_cloning")]
    assert line == lines[-1]
    return line


# --- The whole


def test_clones_reach_their_goals_and_a_second_call_trains_nothing(
    command, tmp_path, capsys, monkeypatch
):
    metaworld_cloning.main([*command, "--methods", "pcgrad", "--steps", "400"])
    output = capsys.readouterr()
    assert "pcgrad: training" in output.err
    assert "walk-0" in output.out
    file, picture = tmp_path / "out/results.json", tmp_path / "out/metaworld_cloning.png"
    results = json.loads(file.read_text())
    assert [run["method"] for run in results["runs"]] == ["single", "mean", "pcgrad"]
    for run in results["runs"]:
        success = np.array(run["success"])
        assert success.shape == (2, NUM_TASKS)
        assert success.mean() > 0.7
        loss = np.array(run["loss"])
        assert loss.shape == (2, 2, NUM_TASKS)
        assert loss[:, -1].mean() < loss[:, 0].mean()
    assert results["findings"]
    assert picture.read_bytes().startswith(b"\x89PNG")

    file.unlink()
    picture.unlink()
    monkeypatch.delattr(metaworld_cloning, "train_method")
    metaworld_cloning.main([*command, "--methods", "pcgrad", "--steps", "400"])
    again = json.loads(file.read_text())
    assert again["runs"] == results["runs"]


@pytest.mark.parametrize("differs", [True, False])
def test_says_in_words_whether_a_method_differs(differs):
    steady = np.full((3, NUM_TASKS), 0.5) + np.array([0.0, 0.01, 0.02])[:, None]
    other = steady + (0.3 if differs else 0) + np.array([0.01, -0.01, 0.0])[:, None]
    cosines = np.tile(np.eye(NUM_TASKS), (3, 2, 1, 1))
    time = {"seconds": {"training": 60, "rollouts": 120}, "cpu_seconds": 90}
    results = {
        "single": {"success": other, **time},
        "mean": {"success": steady, "cosines": cosines, **time},
    }
    board = metaworld_cloning.compare(results)
    words = " ".join(metaworld_cloning.in_words(NAMES, board, results, Config(points=2)))
    assert ("Against mean, better: single." in words) == differs
    assert ("No difference from mean is found for: single." in words) != differs
    assert "Training took 2.0 minutes and rollouts 4.0; of a processor both took 3.0." in words
    assert "below 0.7" in words


# --- Demonstrations


def test_the_expert_labels_what_noise_leads_to():
    class Recorder(Walk):
        executed = ()

        def step(self, action):
            self.executed = (*self.executed, action)
            return super().step(action)

    task, random = Recorder(), np.random.default_rng(0)
    seen, done, success = metaworld_cloning.demonstrate(
        task, np.array([0.9, -0.9]), Expert(), 0.3, random
    )
    assert success
    for observation, action in zip(seen, done, strict=True):
        np.testing.assert_allclose(action, np.clip(Expert().get_action(observation), -1, 1))
    executed = np.array(task.executed)
    assert np.all(np.abs(executed) <= 1)
    assert 0.1 < np.std(executed[:, 2] - 0.5) < 0.5


def test_demonstrations_are_made_once(config, monkeypatch):
    made = metaworld_cloning.load(NAMES, 0, config)
    assert made["observation"].shape[:2] == made["action"].shape[:2]
    assert made["size"].max() == made["observation"].shape[1]
    np.testing.assert_array_equal(made["expert"], 1)
    monkeypatch.delattr(metaworld_cloning, "make_task")
    kept = metaworld_cloning.load(NAMES, 0, config)
    for name, each in made.items():
        np.testing.assert_array_equal(each, kept[name])
    assert len(list(config.data_dir.iterdir())) == 1


def test_demonstrations_of_other_tasks_are_made_again(config):
    other = metaworld_cloning.load(NAMES[::-1], 0, config)
    made = metaworld_cloning.load(NAMES, 0, config)
    assert not np.array_equal(made["size"], other["size"])


def test_seeds_have_demonstrations_of_their_own(config):
    first, second = (metaworld_cloning.load(NAMES, seed, config) for seed in range(2))
    assert not np.array_equal(first["size"], second["size"])


@pytest.mark.parametrize("damage", [lambda x: x[: len(x) // 2], lambda _: b"", lambda _: b"x"])
def test_a_damaged_cache_is_named(command, capsys, config, damage):
    metaworld_cloning.load(NAMES, 0, config)
    (path,) = config.data_dir.iterdir()
    path.write_bytes(damage(path.read_bytes()))
    assert f"{path} holds no demonstrations" in fails(capsys, command)


def test_an_expert_that_fails_is_named(command, capsys, monkeypatch):
    monkeypatch.setattr(Expert, "get_action", lambda self, observation: np.zeros(4))
    assert "the expert of walk-0-v3 succeeds in 0 of" in fails(capsys, command)


# --- Training


def make_data(config):
    return metaworld_cloning.stack([metaworld_cloning.load(NAMES, n, config) for n in range(2)])


def test_padding_is_never_read(config):
    data = make_data(config)
    size = data["observation"].shape[2]
    padding = (jnp.arange(size)[None, None] >= data["size"][..., None])[..., None]
    assert jnp.any(padding)
    for name in ("observation", "action"):
        data[name] = jnp.where(padding, jnp.nan, data[name])
    _, losses, cosines = metaworld_cloning.train_seeds("mean", config, data)
    assert np.all(np.isfinite(losses))
    assert np.all(np.isfinite(cosines))
    assert cosines.shape == (2, config.points, NUM_TASKS, NUM_TASKS)


def test_every_method_fits(config):
    data = make_data(config)
    run = metaworld_cloning.Runs(jnp.zeros((), int), jnp.arange(NUM_TASKS))
    for method in metaworld_cloning.CHOICES[1:]:
        train = functools.partial(metaworld_cloning.train, method=method, config=config)
        # It is not run, which would take minutes.
        _, seen = jax.eval_shape(train, run, data)
        assert seen["loss"].shape == (config.points, NUM_TASKS)


def test_real_states_are_normalised(config):
    data = make_data(config)
    real = np.arange(data["observation"].shape[2]) < np.array(data["size"])[..., None]
    for observations, chosen in zip(np.array(data["observation"]), real, strict=True):
        np.testing.assert_allclose(observations[chosen].mean(axis=0), 0, atol=1e-5)
        np.testing.assert_allclose(observations[chosen][:, :4].std(axis=0), 1, atol=0.05)


def test_a_single_policy_sees_its_task_only(config):
    data = make_data(config)
    params, losses, cosines = metaworld_cloning.train_seeds("single", config, data)
    assert cosines is None
    changed = data | {"action": data["action"].at[:, 3].add(1)}
    other, *_ = metaworld_cloning.train_seeds("single", config, changed)
    for before, after in zip(jax.tree.leaves(params), jax.tree.leaves(other), strict=True):
        same = np.array(before) == np.array(after)
        same = same.reshape(2, NUM_TASKS, -1).all(axis=(0, 2))
        np.testing.assert_array_equal(same, np.arange(NUM_TASKS) != 3)
    assert losses.shape == (2, config.points, NUM_TASKS)


def test_two_batches_share_no_state():
    sizes = jnp.array([5, 40])
    rows = np.array(metaworld_cloning.two_batches(jax.random.key(0), sizes, 40, 8))
    assert rows.shape == (2, 2, 8)
    for task, size in enumerate(sizes):
        assert rows[:, task].max() < size
        assert not set(rows[0, task]) & set(rows[1, task])


# --- What goes wrong


def test_help_needs_no_robots(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "metaworld", None)
    with pytest.raises(SystemExit) as stopped:
        metaworld_cloning.main(["--help"])
    assert stopped.value.code == 0
    assert "--demonstrations" in capsys.readouterr().out


def test_a_missing_package_is_named(command, capsys, monkeypatch):
    def suite(name):
        raise ModuleNotFoundError("No module named 'metaworld'")

    monkeypatch.setattr(metaworld_tasks, "suite", suite)
    line = fails(capsys, command)
    assert "No module named 'metaworld': pip install -e \".[rl]\"" in line


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--methods", "psgrad"], "invalid choice: 'psgrad'"),
        (["--seeds", "1"], "expected at least 2"),
        (["--noise", "nan"], "expected at least 0.0"),
        (["--steps", "61"], "expected a multiple of --points"),
    ],
)
def test_bad_options(command, capsys, options, words):
    assert words in fails(capsys, [*command, *options])


def test_a_loss_that_is_not_finite(command, capsys, tmp_path):
    line = fails(capsys, [*command, "--learning-rate", "1e30"])
    assert "single: a loss is not finite" in line
    assert not list((tmp_path / "out").iterdir())


def test_an_environment_that_dies_leaves_earlier_runs(command, capsys, tmp_path, monkeypatch):
    calls = []

    def dies(*args):
        calls.append(args)
        # In the second method, whose first of two seeds it is.
        if len(calls) == 3:
            raise BrokenPipeError("gone")
        return evaluate(*args)

    monkeypatch.setattr(metaworld_tasks, "evaluate", dies)
    line = fails(capsys, [*command, "--methods", "mean"])
    assert "an environment of Meta-World has failed: BrokenPipeError: gone" in line
    assert [path.name for path in (tmp_path / "out/runs").iterdir()] == ["single.json"]
    assert not (tmp_path / "out/results.json").exists()


def test_nothing_is_overwritten(command, capsys, tmp_path):
    file = tmp_path / "out/results.json"
    file.parent.mkdir()
    file.write_text("earlier")
    assert f"{file} is already there" in fails(capsys, command)
    assert file.read_text() == "earlier"


# --- With metaworld


def test_an_expert_of_metaworld_demonstrates(config, monkeypatch):
    reason = "metaworld is not installed: pip install -e '.[rl]'"
    monkeypatch.setenv("MUJOCO_GL", "disable")
    pytest.importorskip("metaworld", reason=reason)
    monkeypatch.undo()
    few = dataclasses.replace(config, demonstrations=1)
    observations, actions, success = metaworld_cloning.collect("drawer-close-v3", 0, few)
    assert observations.shape == (len(actions), metaworld_tasks.SIZE)
    assert actions.shape[1] == metaworld_tasks.NUM_ACTIONS
    assert np.abs(actions).max() <= 1
    assert success > 0.2
