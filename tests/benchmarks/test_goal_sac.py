"""The benchmark of nine goals: the choice of a method by its number, and a tiny run of it all."""

import functools
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_surgery as surgery
from benchmarks import goal_sac

METHODS = ("single", "sum", "pcgrad", "mean")
SEEDS, POINTS, WIDTH = 2, 2, 4


@pytest.fixture
def task_grads():
    return {"w": jax.random.normal(jax.random.key(0), (4, 3)), "b": jnp.array([1.0, -1, 2, -3])}


@pytest.mark.parametrize("number", [0, 1, 2])
def test_the_chosen_method_operates(task_grads, number):
    names = ("aligned_mtl", "sum", "mgda")
    direct = goal_sac.SURGERIES[names[number]](4)
    expected, _ = direct.update(task_grads, direct.init(jnp.zeros(3)))
    tx = goal_sac.chosen(names, 4)
    state = optax.tree.set(tx.init(task_grads), method=jnp.asarray(number))
    updates, state = tx.update(task_grads, state)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), updates, expected
    )
    jax.tree.map(np.testing.assert_allclose, surgery.combine(state.weights, task_grads), updates)


def test_pcgrad_draws_a_new_order_at_every_step(task_grads):
    tx = goal_sac.chosen(("sum", "pcgrad"), 4)
    state = optax.tree.set(tx.init(task_grads), method=jnp.asarray(1))
    weights = []
    for _ in range(8):
        _, state = tx.update(task_grads, state)
        weights.append(np.asarray(state.weights))
    assert len(np.unique(np.round(weights, 4), axis=0)) > 1


def test_the_goal_is_hidden_behind_the_number_of_the_task():
    observation = jnp.arange(16.0).reshape(2, 8)
    np.testing.assert_array_equal(goal_sac.show(observation, 3, "observed"), observation)
    hidden = goal_sac.show(observation, 3, "hidden")
    np.testing.assert_array_equal(hidden[:, :6], observation[:, :6])
    np.testing.assert_array_equal(hidden[:, 6:], np.tile(np.eye(9)[3], (2, 1)))


def made_up(success):
    """Results with the given success (seeds, points), the same for every task."""
    success = np.repeat(np.asarray(success, float)[..., None], goal_sac.NUM_TASKS, axis=-1)
    return {"success": success, "reward": success}


def test_methods_are_compared_seed_by_seed():
    curves = np.array([[0, 0.4, 0.8], [0, 0.5, 0.9], [0, 0.45, 0.8]])
    results = {
        "sum": made_up(curves),
        "pcgrad": made_up(curves + np.array([[0, 0.1, 0], [0, 0.3, 0], [0, 0.2, 0]])),
    }
    rows = goal_sac.compare(results)
    assert rows["sum"]["area"]["against"] is None
    np.testing.assert_allclose(rows["sum"]["area"]["points"], [0.4, 0.475, 0.425])
    np.testing.assert_allclose(rows["pcgrad"]["area"]["against"]["mean"], 0.1)
    assert rows["pcgrad"]["final"]["against"]["mean"] == 0
    words = " ".join(goal_sac.differences_in_words(rows, "sum", 3))
    assert "success at the end, against sum, no difference found: pcgrad" in words
    assert goal_sac.baseline_of(results | {"mean": results["sum"]}) == "mean"


def test_a_run_that_diverges_is_found():
    seen = {"success": np.zeros((3, 2, 9)), "critic_loss": np.zeros((3, 1, 9))}
    assert goal_sac.diverged(seen).size == 0
    seen["critic_loss"][1, 0, 4] = np.nan
    assert goal_sac.diverged(seen).tolist() == [1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "sgd"], "invalid choice: 'sgd'"),
        (["--updates", "7", "--points", "2"], "a multiple of --points"),
        (["--seeds", "1"], "expected at least 2"),
        (["--scales", "0.5"], "expected at least 1"),
        (["--full", "--goal", "lost"], "invalid choice: 'lost'"),
    ],
)
def test_wrong_options_are_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as raised:
        goal_sac.main(arguments)
    error = capsys.readouterr().err
    assert raised.value.code == 2
    assert message in error
    assert error.count("\n") == 1


def test_full_sets_other_defaults_only():
    parser = goal_sac.Parser()
    config = goal_sac.read_options(parser, ["--full", "--seeds", "2"])
    assert set(config.methods) == set(goal_sac.CHOICES)
    assert (config.seeds, config.scales, config.goal) == (2, (1.0, 30.0), ("observed", "hidden"))


def test_without_the_packages_it_says_what_to_install(monkeypatch, capsys, tmp_path):
    goal_sac.make_reacher.cache_clear()
    monkeypatch.setitem(sys.modules, "gymnax", None)
    with pytest.raises(SystemExit) as raised:
        goal_sac.main(["--out", str(tmp_path)])
    goal_sac.make_reacher.cache_clear()
    assert raised.value.code == 2
    assert 'pip install -e ".[rl]"' in capsys.readouterr().err


@pytest.fixture
def tiny(monkeypatch):
    pytest.importorskip("gymnax", reason="the environment is a package of its own")
    for name, value in {
        "BATCH": 3,
        "ENVIRONMENTS": 2,
        "WARM_UP": 3,
        "EPISODES": 2,
        "PROBE": 4,
    }.items():
        monkeypatch.setattr(goal_sac, name, value)
    # Programs are kept by their options, to which those do not belong.
    goal_sac.make_program.cache_clear()
    yield
    goal_sac.make_program.cache_clear()


def test_training_changes_no_type(tiny):
    """Of any array: else the program would be compiled a second time."""
    names, tasks = ("sum", "aligned_mtl"), jnp.arange(9)
    lane = goal_sac.Lane(jnp.asarray(0), jnp.asarray(1), tasks, jnp.ones(9))
    options = {"names": names, "goal": "hidden", "width": 4, "capacity": 16}
    before = jax.eval_shape(functools.partial(goal_sac.start, **options), lane)
    train = functools.partial(goal_sac.train_stretch, goal="hidden")
    after, _ = jax.eval_shape(train, before, lane, jnp.arange(3, 5))
    assert jax.tree.structure(before) == jax.tree.structure(after)
    for one, other in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        assert one.weak_type == other.weak_type


def test_a_run_from_the_command_line_is_resumed(tiny, tmp_path, capsys, monkeypatch):
    options = ["--methods", *METHODS, "--seeds", str(SEEDS), "--width", str(WIDTH)]
    options += ["--updates", "4", "--points", str(POINTS), "--out", str(tmp_path), "--scales", "30"]
    goal_sac.main(options)
    assert f"reward scale 30, goal observed, {' '.join(METHODS[:1])}" in capsys.readouterr().err
    (setting,) = json.loads((tmp_path / "results.json").read_text())["settings"]
    assert setting["baseline"] == "mean"
    assert (tmp_path / "scale_30_observed.png").stat().st_size > 0
    for method in METHODS:
        assert np.shape(setting["runs"][method]["success"]) == (SEEDS, POINTS + 1, 9)
    runs = setting["runs"]
    assert np.shape(runs["pcgrad"]["actor_cosines"]) == (SEEDS, POINTS + 1, 9, 9)
    np.testing.assert_allclose(runs["mean"]["critic_weights"], 1 / 9, rtol=1e-6)
    # All methods begin with the same agent.
    assert runs["sum"]["success"][0][0] == runs["pcgrad"]["success"][0][0]
    np.testing.assert_allclose(runs["sum"]["reward"][1][0], runs["mean"]["reward"][1][0])

    (tmp_path / "results.json").unlink()
    (tmp_path / "scale_30_observed.png").unlink()
    monkeypatch.setattr(goal_sac, "train_setting", None)  # nothing is left to train
    goal_sac.main(options)
    again = json.loads((tmp_path / "results.json").read_text())["settings"][0]
    assert again["runs"] == runs

    with pytest.raises(SystemExit):
        goal_sac.main(options)
    assert "is already there" in capsys.readouterr().err


def test_what_diverges_is_said_and_the_rest_is_kept(tiny, tmp_path, capsys, monkeypatch):
    def train_setting(names, seeds, config, advance):
        bad = {"success": np.full((2, 3, 9), np.nan)}
        return {name: bad if name == "pcgrad" else made_up(np.ones((2, 3))) for name in names}

    monkeypatch.setattr(goal_sac, "train_setting", train_setting)
    with pytest.raises(SystemExit) as raised:
        goal_sac.main(["--seeds", "2", "--out", str(tmp_path)])
    assert raised.value.code == 2
    assert "not finite: pcgrad with seed 0, 1" in capsys.readouterr().err
    kept = sorted(path.stem for path in (tmp_path / "runs" / "scale_1_observed").iterdir())
    assert kept == ["aligned_mtl", "single", "sum"]
