"""The landscapes of the papers: their formulas, where runs end, and what the benchmark writes."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import toy


def shared_losses_of_the_papers(x1, x2):
    """As the authors' code has them, in float64 numpy."""
    low = 5e-6
    f1 = np.log(np.maximum(np.abs(0.5 * (-x1 - 7) - np.tanh(-x2)), low)) + 6
    f2 = np.log(np.maximum(np.abs(0.5 * (-x1 + 3) + np.tanh(-x2) + 2), low)) + 6
    q1 = ((-x1 + 7) ** 2 + 0.1 * (-x2 - 8) ** 2) / 10 - 20
    q2 = ((-x1 - 7) ** 2 + 0.1 * (-x2 - 8) ** 2) / 10 - 20
    c1, c2 = np.maximum(np.tanh(0.5 * x2), 0), np.maximum(np.tanh(-0.5 * x2), 0)
    return np.stack([c1 * f1 + c2 * q1, c1 * f2 + c2 * q2])


def figure_1_of_pcgrad(x1, x2):
    return np.stack(
        [
            20 * np.log(np.maximum(np.abs(0.5 * x1 + np.tanh(x2)), 5e-6)),
            25 * np.log(np.maximum(np.abs(0.5 * x1 - np.tanh(x2) + 2), 5e-6)),
        ]
    )


@pytest.mark.parametrize(
    ("landscape", "expected"),
    [(toy.SHARED, shared_losses_of_the_papers), (toy.VALLEYS, figure_1_of_pcgrad)],
)
def test_losses_and_slopes_are_those_of_the_papers(landscape, expected):
    points = np.random.default_rng(0).uniform(-9, 9, (50, 2))
    with jax.enable_x64(True):
        losses = jax.jit(jax.vmap(landscape.losses))(points)
        slopes = jax.jit(jax.vmap(jax.jacrev(landscape.losses)))(points)
    np.testing.assert_allclose(losses.T, expected(*points.T), atol=1e-12)
    for axis, move in enumerate(1e-6 * np.eye(2)):
        ahead, behind = expected(*(points + move).T), expected(*(points - move).T)
        np.testing.assert_allclose(slopes[:, :, axis].T, (ahead - behind) / 2e-6, atol=1e-4)


def test_the_clamp_lets_the_gradient_pass_at_the_origin():
    """There both switches have a slope of 1/2, as `torch.clamp` gives it to them."""
    with jax.enable_x64(True):
        slopes = jax.jacrev(toy.shared_losses)(jnp.zeros(2))
    f = np.log(3.5) + 6
    q = (49 + 6.4) / 10 - 20
    np.testing.assert_allclose(slopes, [[0, 0.5 * f - 0.5 * q]] * 2, rtol=1e-12)


def test_on_the_pareto_set_a_convex_combination_of_the_gradients_vanishes():
    goal = toy.SHARED.goal
    with jax.enable_x64(True):
        slopes = np.asarray(jax.jit(jax.vmap(jax.jacrev(toy.shared_losses)))(goal))
    of_first = (goal[:, 0] + 7) / 14
    both = of_first[:, None] * slopes[:, 0] + (1 - of_first)[:, None] * slopes[:, 1]
    np.testing.assert_allclose(both, 0, atol=1e-12)
    assert goal[700] == pytest.approx([0, -8.3552], abs=1e-4)
    assert toy.SETTINGS["nash_mtl"].optimum() == pytest.approx([-5.727, -8.41], abs=0.01)


def outcome(setting, method):
    landscape = toy.SETTINGS[setting].landscape
    paths, _ = toy.run_job(toy.Job(landscape, method, (setting,)), 1.0)
    (path,) = paths.values()
    return toy.judge(setting, path, toy.SETTINGS[setting].steps), path


def test_pcgrad_leaves_the_stall_of_figure_1_and_adam_alone_does_not():
    alone, path = outcome("pcgrad", "sum")
    assert path.shape == (1, 2501, 2)
    assert alone.stalled.all()
    with_pcgrad, _ = outcome("pcgrad", "pcgrad")
    assert with_pcgrad.arrived.all()
    assert with_pcgrad.ends[0, 1] > 4


def test_aligned_mtl_goes_to_the_optimum_where_the_sum_stalls():
    summed, path = outcome("aligned_mtl", "sum")
    np.testing.assert_array_equal(summed.stalled, [True, False, True, False, False])
    assert np.abs(path[1, -1]).max() > 1  # the start at the origin was left
    aligned, _ = outcome("aligned_mtl", "aligned_mtl")
    assert aligned.arrived.all()
    # From (9, -1) it is still on its way along the Pareto set.
    np.testing.assert_allclose(aligned.ends[:4, 0], 0, atol=0.1)
    assert aligned.moving[4]


def test_every_method_can_be_made_and_traced():
    with jax.enable_x64(True):
        runs = jax.ShapeDtypeStruct((2, 2), jnp.float64)
        for method in toy.METHODS:
            train = jax.tree_util.Partial(toy.train, toy.SHARED, method, num_points=3, stride=2)
            path = jax.eval_shape(train, runs, runs)
            assert path.shape == (2, 4, 2), method


def test_a_run_is_told_from_its_path():
    setting = toy.SETTINGS["aligned_mtl"]
    steps, goal = setting.steps, toy.SHARED.goal
    still = np.tile([5.0, 3.0], (176, 1))
    under_way = still - np.linspace(0, 20, 176)[:, None]
    at_optimum = np.tile(setting.optimum(), (176, 1)) + np.array([0.05, 0])
    elsewhere = np.tile(goal[0], (176, 1))
    diverged = np.full((176, 2), np.nan)
    found = toy.judge("aligned_mtl", np.stack([still, under_way, at_optimum]), steps)
    np.testing.assert_array_equal(found.arrived, [False, False, True])
    np.testing.assert_array_equal(found.stalled, [True, False, False])
    np.testing.assert_array_equal(found.moving, [False, True, False])
    assert found.verdict == "1 of 3 arrive"
    assert [toy.place(setting, found, run) for run in range(3)] == [
        "[5.0, 3.0]",
        "[-15.0, -17.0] →",
        "0.05",
    ]
    for paths, verdict in (
        ([at_optimum, at_optimum], "weighted optimum"),
        ([elsewhere, at_optimum], "depends on the start"),
        ([elsewhere, elsewhere], "one trade-off"),
        ([goal[: 176 * 5 : 5], at_optimum], "all arrive, not all at rest"),
        ([elsewhere, diverged], "1 of 2 arrive"),
    ):
        assert toy.judge("aligned_mtl", np.stack(paths), steps).verdict == verdict
    assert toy.place(setting, toy.judge("aligned_mtl", diverged[None], steps), 0) == "diverged"


SMALL = ["--length", "0.001", "--settings", "pcgrad", "nash_mtl", "famo"]
SMALL += ["--methods", "sum", "famo", "--figure-1-methods", "sum"]


def run(out, *options):
    toy.main([*SMALL, "--out", str(out), *options])
    return json.loads((out / "results.json").read_text())


def test_a_small_run_writes_everything_and_the_same_again(tmp_path, capsys):
    first, second = run(tmp_path / "first"), run(tmp_path / "second")
    names = {"results.json", "pcgrad.png", "nash_mtl.png", "famo.png", "front.png"}
    assert {path.name for path in (tmp_path / "first").iterdir()} == names
    assert first["runs"] == second["runs"]
    assert [(one["setting"], one["method"], one["steps"]) for one in first["runs"]] == [
        ("pcgrad", "sum", 2500),
        ("nash_mtl", "sum", 175),
        ("nash_mtl", "famo", 175),
        ("famo", "sum", 250),
        ("famo", "famo", 250),
    ]
    assert np.shape(first["runs"][1]["ends"]) == (5, 2)
    assert first["findings"] == [toy.SHORTENED]
    assert "Nash-MTL: 0.1 L1, 1 L2, 175 steps of Adam" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--methods nonsense", "invalid choice: 'nonsense'"),
        ("--settings moon", "invalid choice: 'moon'"),
        ("--length 0", "--length: expected at least 1e-09, got 0.0"),
        ("--length nan", "--length: expected at least 1e-09, got nan"),
    ],
)
def test_bad_options_are_one_line_and_status_2(options, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        toy.main(["--out", str(tmp_path / "out"), *options.split()])
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (tmp_path / "out").exists()


def test_an_interrupted_run_leaves_earlier_results_whole(tmp_path, monkeypatch):
    (tmp_path / "results.json").write_text("precious")

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(toy, "run_job", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, "--overwrite")
    with pytest.raises(SystemExit):
        run(tmp_path)
    assert (tmp_path / "results.json").read_text() == "precious"
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
