"""Fronts: hypervolumes and exact fronts by hand, one program against single runs, the options."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import fronts, toy

SHARES = jnp.linspace(0.2, 0.8, 4)


def test_a_hypervolume_is_the_area_between_the_points_and_the_reference():
    """Two rectangles of 3 x 1 and 1 x 3 with a square of 1 in common, and what adds nothing."""
    points = [[3, 1], [1, 3], [3, 3], [0, 4], [5, 0], [np.nan, 0], [np.inf, 0]]
    assert fronts.hypervolume(points, (4, 4)) == pytest.approx(3 + 3 - 1)
    assert fronts.hypervolume([[2, 2]], (1, 1)) == 0
    assert fronts.hypervolume(np.zeros((0, 2)), (1, 1)) == 0


def test_angles_are_those_between_the_losses_and_the_ray():
    ends, shares = np.array([[1.0, 1.0], [0.0, 2.0], [3.0, 1.0]]), np.array([0.5, 0.5, 0.75])
    np.testing.assert_allclose(fronts.angles_from_rays(ends, shares), [0, 45, 0], atol=1e-12)


def test_ends_are_in_order_where_each_more_share_is_a_larger_first_loss():
    ends, shares = np.array([[1, 4], [2, 3], [3, 2], [4, 1]]), np.arange(4)
    assert fronts.order_along_the_front(ends, shares) == pytest.approx(1)
    assert fronts.order_along_the_front(ends[::-1], shares) == pytest.approx(-1)
    assert fronts.order_along_the_front(ends[[0] * 4], shares) == 0


@pytest.mark.parametrize("name", fronts.PROBLEMS)
def test_fronts_are_where_a_convex_combination_of_the_gradients_vanishes(name):
    """The parameters on the Pareto set, from the papers, and their losses are the front."""
    problem, places = fronts.PROBLEMS[name], [100, 500, 900]
    along = fronts.ALONG[places]
    centre = np.ones(fronts.NUM_VARIABLES) / np.sqrt(fronts.NUM_VARIABLES)
    with jax.enable_x64(True):
        if name == "shared":
            goal = toy.SHARED.goal[::-1]
            params, expected = goal[places], problem.front[places]
        elif name == "zdt1":  # the front is at (t^2, 1 - t)
            logits = np.log(along**2 / (1 - along**2))
            params = np.zeros((3, fronts.NUM_VARIABLES))
            params[:, 0], expected = logits, problem.front[places]
        else:  # between the centres
            params, expected = np.outer(2 * along - 1, centre), problem.front[places]
        losses = np.array([problem.losses(each, (), None) for each in params])
        slopes = np.array([jax.jacrev(problem.losses)(each, (), None) for each in params])
    np.testing.assert_allclose(losses, expected, atol=1e-6)
    for first, second in slopes:
        share = second @ (second - first) / ((first - second) @ (first - second))
        assert 0 < share < 1
        np.testing.assert_allclose(share * first + (1 - share) * second, 0, atol=1e-6)


def test_one_program_for_all_preferences_gives_what_single_runs_give():
    problem = fronts.PROBLEMS["vlmop2"]
    together, _ = fronts.train_fronts(problem, "epo", 60, SHARES, jnp.arange(2), ())
    assert together.shape == (2, 4, 2)
    alone = np.array(
        [
            [
                fronts.train_fronts(problem, "epo", 60, share[None], seed[None], ())[0][0, 0]
                for share in SHARES
            ]
            for seed in jnp.arange(2)
        ]
    )
    np.testing.assert_allclose(together, alone, atol=1e-4)


@pytest.mark.parametrize("method", ["epo", "pmgda"])
def test_exact_methods_end_on_their_rays_and_on_a_concave_front(method):
    """Linear scalarisation ends at the two tips of such a front, whatever the preference."""
    problem = fronts.PROBLEMS["vlmop2"]
    ends, unsolved = fronts.train_fronts(problem, method, 500, SHARES, jnp.arange(1), ())
    found = fronts.judge(problem, np.array(ends), np.array(SHARES))
    assert found["angle"].max() < 1
    np.testing.assert_array_equal(found["order"], 1)
    assert unsolved.max() == 0
    distances = np.linalg.norm(np.array(ends)[0, :, None] - problem.front, axis=2).min(axis=1)
    assert distances.max() < 0.02
    linear, _ = fronts.train_fronts(problem, "linear", 500, SHARES, jnp.arange(1), ())
    assert np.min(linear, axis=2).max() < 0.03


def test_a_small_study_writes_everything(tmp_path, capsys):
    options = "--problems vlmop1 --methods linear stch --preferences 3 --seeds 2 --length 0.02"
    fronts.main([*options.split(), "--out", str(tmp_path)])
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "fronts.png"}
    results = json.loads((tmp_path / "results.json").read_text())
    assert [(run["problem"], run["method"]) for run in results["runs"]] == [
        ("vlmop1", "linear"),
        ("vlmop1", "stch"),
    ]
    assert np.shape(results["runs"][1]["ends"]) == (2, 3, 2)
    assert results["runs"][0]["hypervolume_against_linear"] is None
    assert results["runs"][1]["hypervolume_against_linear"]["p_holm"] <= 1
    assert "VLMOP1, convex" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--methods nonsense", "invalid choice: 'nonsense'"),
        ("--problems moon", "invalid choice: 'moon'"),
        ("--preferences 2", "--preferences: expected at least 3, got 2"),
        ("--seeds 1", "--seeds: expected at least 2, got 1"),
        ("--length nan", "--length: expected at least 1e-09, got nan"),
    ],
)
def test_bad_options_are_one_line_and_status_2(options, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        fronts.main(["--out", str(tmp_path / "out"), *options.split()])
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (tmp_path / "out").exists()
