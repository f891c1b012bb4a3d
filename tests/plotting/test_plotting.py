"""The pictures show what they were given, in the Axes they were given."""

import subprocess
import sys

import jax
import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest

import optax_surgery as surgery
from optax_surgery import plotting

mpl.use("Agg")

TASK_GRADS = np.random.default_rng(0).normal(size=(12, 3, 5)).astype(np.float32)
GRAMIANS = np.einsum("sin,sjn->sij", TASK_GRADS, TASK_GRADS)
SAME = np.linspace(-1, 1, 36).reshape(12, 3)
POINTS = np.random.default_rng(1).normal(size=(2, 12, 2))
PICTURES = {
    "cosines": (plotting.cosines, GRAMIANS),
    "conflicts": (plotting.conflicts, GRAMIANS),
    "norms": (plotting.norms, GRAMIANS),
    "weights": (plotting.weights, SAME),
    "condition_numbers": (plotting.condition_numbers, GRAMIANS),
    "pareto_front": (plotting.pareto_front, POINTS[0]),
    "trajectories": (plotting.trajectories, POINTS),
}


@pytest.fixture(autouse=True)
def axes():
    figure, pair = plt.subplots(1, 2)
    yield pair
    figure.canvas.draw()  # nothing fails only when it is drawn
    plt.close("all")


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_is_drawn_in_the_axes_given_or_in_the_current_ones(name, axes):
    draw, array = PICTURES[name]
    plt.sca(axes[1])
    assert draw(array, ax=axes[0]) is axes[0]
    assert axes[0].has_data()
    assert not axes[1].has_data()
    plt.sca(axes[1])
    assert draw(jax.numpy.asarray(array)) is axes[1]
    assert axes[1].has_data()


@pytest.mark.parametrize("name", PICTURES)
def test_a_wrong_shape_is_said_by_name(name):
    draw, array = PICTURES[name]
    with pytest.raises(ValueError, match=r"^Expected .* of shape \(.*\), got \(.*\) at '\w+'\. "):
        draw(np.asarray(array)[..., :1].ravel())


def test_names_steps_and_windows_have_to_fit():
    with pytest.raises(ValueError, match="Expected 3 names, got 2 at 'task_names'"):
        plotting.norms(GRAMIANS, task_names=["a", "b"])
    with pytest.raises(ValueError, match=r"shape \(12,\), got \(3,\) at 'steps'"):
        plotting.norms(GRAMIANS, [1, 2, 3])
    with pytest.raises(ValueError, match=r"shape \(12, 3\), got \(12, 2\) at 'same_task_cosines'"):
        plotting.cosines(GRAMIANS, same_task_cosines=SAME[:, :2])
    with pytest.raises(ValueError, match=r"Expected a window of 1 to 12 .*, got 13"):
        plotting.conflicts(GRAMIANS, window=13)


def test_the_heat_map_has_the_ceiling_above_the_pairs_and_blanks_for_absent_tasks(axes):
    gramians = GRAMIANS.copy()
    gramians[4, 1] = gramians[4, :, 1] = 0
    ax = plotting.cosines(gramians, task_names="abc", same_task_cosines=SAME, ax=axes[0])
    drawn = ax.collections[0].get_array().reshape(6, 12)
    assert [label.get_text() for label in ax.get_yticklabels()] == [
        *("a, two batches", "b, two batches", "c, two batches"),
        *("a, b", "a, c", "b, c"),
    ]
    np.testing.assert_allclose(drawn[:3], SAME.T)
    norms = np.linalg.norm(TASK_GRADS, axis=2)
    expected = GRAMIANS / norms[:, :, None] / norms[:, None, :]
    np.testing.assert_allclose(drawn[4], expected[:, 0, 2], rtol=1e-5)
    blank = np.ma.getmaskarray(np.ma.masked_invalid(drawn))
    np.testing.assert_array_equal(np.argwhere(blank), [[3, 4], [5, 4]])


def test_conflicts_are_averaged_over_a_window_and_beside_their_control(axes):
    ax = plotting.conflicts(GRAMIANS, window=3, same_task_cosines=SAME, ax=axes[0])
    control, line, half = ax.get_lines()
    shares = np.array([surgery.conflict_fraction(gramian) for gramian in GRAMIANS])
    np.testing.assert_array_equal(line.get_xdata(), np.arange(2, 12))
    expected = [shares[end - 3 : end].mean() for end in range(3, 13)]
    np.testing.assert_allclose(line.get_ydata(), expected, rtol=1e-6)
    assert control.get_ydata()[0] == 1
    assert control.get_ydata()[-1] == 0
    assert set(half.get_ydata()) == {0.5}


def test_lines_differ_without_colour_and_many_tasks_become_a_median(axes):
    plotting.weights(np.eye(7), ax=axes[0])
    lines = axes[0].get_lines()[1:]  # the first is zero
    assert len({str(line._dash_pattern) for line in lines}) == 7
    plotting.weights(np.tile(np.arange(9.0), (4, 1)), ax=axes[1])
    assert axes[1].get_lines()[-1].get_ydata().tolist() == [4] * 4
    assert len(axes[1].get_legend().get_texts()) == 1


def test_solutions_that_another_one_beats_are_hollow(axes):
    losses = np.random.default_rng(2).integers(0, 6, (30, 2)).astype(float)
    ax = plotting.pareto_front(losses, ax=axes[0])
    _, hollow, filled = ax.get_lines()
    beaten = [
        any((other <= one).all() and (other < one).any() for other in losses) for one in losses
    ]
    np.testing.assert_array_equal(hollow.get_xydata(), losses[beaten])
    np.testing.assert_array_equal(filled.get_xydata(), losses[np.invert(beaten)])


def test_dependent_gradients_are_marked_and_not_drawn_as_a_number(axes):
    gramians = np.stack([np.eye(2), np.ones((2, 2)), np.diag([1.0, 9.0])])
    line, crosses = plotting.condition_numbers(gramians, ax=axes[0]).get_lines()
    np.testing.assert_allclose(line.get_ydata(), [1, np.nan, 3], rtol=1e-6)
    assert crosses.get_xdata().tolist() == [1]


def test_the_library_does_not_need_matplotlib_and_plotting_says_that_it_does():
    program = """if True:
        import sys
        import optax_surgery
        assert "matplotlib" not in sys.modules
        sys.modules["matplotlib"] = None  # as if it were not there
        import optax_surgery.plotting
    """
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 1
    assert "matplotlib" in done.stderr.splitlines()[-1]
    assert "Error" in done.stderr.splitlines()[-1]
