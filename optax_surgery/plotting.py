"""Pictures of what `monitor` and `metrics` say about a training. It needs matplotlib.

Every function takes arrays and an optional `ax`, draws in it (or in the current Axes), and returns
it. They take histories: S recorded steps, as a `lax.scan` stacks them. The colours can be told
apart by the colour-blind, and lines also differ in their dashes.
"""

from collections.abc import Sequence
from typing import Any

import jax
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from numpy.typing import ArrayLike

from optax_surgery import checks, metrics

# Okabe and Ito's colours, without the yellow, which is hard to see on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1, 1, 1)), (0, (1, 1)))
_PALE = LinearSegmentedColormap.from_list("pale", ("0.78", "1.0"))
_MOST_ROWS_WITH_NAMES = 20

# Metrics of histories: compiled once, not operation by operation.
_cosine_similarities = jax.jit(jax.vmap(metrics.cosine_similarities))
_conflict_fractions = jax.jit(jax.vmap(metrics.conflict_fraction))
_condition_numbers = jax.jit(jax.vmap(metrics.condition_number))


def cosines(
    gramians: ArrayLike,
    steps: ArrayLike | None = None,
    *,
    task_names: Sequence[str] | None = None,
    same_task_cosines: ArrayLike | None = None,
    ax: Axes | None = None,
) -> Axes:
    """A heat map of the cosines between the task gradients over training.

    There is a row a pair of tasks. Dark cells are conflicts.

    Args:
      gramians: (S, T, T) Gramians of the recorded steps.
      steps: (S,) their numbers; 0 to S - 1 by default.
      task_names: T names; the numbers of the tasks by default.
      same_task_cosines: (S, T) the noise ceiling, drawn above the pairs: cosines between the
        gradients of one task on two disjoint batches. A cosine between two tasks near zero says
        little where these are near zero too.
      ax: where to draw; the current Axes by default.

    Returns:
      The Axes. Pairs with a gradient that is zero, as that of a masked task is, are left blank.

    Examples:
      The noise ceiling is on a diagonal of the Gramian of 2 T gradients, those of all tasks on one
      batch and those on another one:

      >>> import jax, jax.numpy as jnp
      >>> import matplotlib.pyplot as plt
      >>> import optax_surgery as surgery
      >>> from optax_surgery import plotting
      >>> task_grads = jax.random.normal(jax.random.key(0), (10, 6, 50)) + 0.3
      >>> both = jax.jit(jax.vmap(surgery.gramian))(task_grads)
      >>> cosines = jax.jit(jax.vmap(surgery.cosine_similarities))(both)
      >>> same = cosines.diagonal(3, axis1=1, axis2=2)
      >>> _, ax = plt.subplots()
      >>> ax = plotting.cosines(both[:, :3, :3], same_task_cosines=same, ax=ax)
      >>> [label.get_text() for label in ax.get_yticklabels()][2:]
      ['2, two batches', '0, 1', '0, 2', '1, 2']
    """
    gramians = _gramians(gramians)
    num_tasks = gramians.shape[1]
    names = _task_names(task_names, num_tasks)
    first, second = np.triu_indices(num_tasks, k=1)
    rows = _present_cosines(gramians)[:, first, second]
    labels = [f"{names[i]}, {names[j]}" for i, j in zip(first, second, strict=True)]
    if same_task_cosines is not None:
        same = _array("same_task_cosines", same_task_cosines, (len(gramians), num_tasks))
        rows = np.concatenate([same, rows], axis=1)
        labels = [f"{name}, two batches" for name in names] + labels

    ax = plt.gca() if ax is None else ax
    mesh = ax.pcolormesh(
        _steps(steps, len(rows)),
        np.arange(len(labels)),
        rows.T,
        cmap="cividis",  # its lightness grows from end to end, so that it reads in grey
        vmin=-1,
        vmax=1,
        shading="nearest",
    )
    ax.figure.colorbar(mesh, ax=ax, label="cosine (negative: conflict)")
    if same_task_cosines is not None:
        ax.axhline(num_tasks - 0.5, color="white", lw=2)
    if len(labels) <= _MOST_ROWS_WITH_NAMES:
        ax.set_yticks(np.arange(len(labels)), labels)
    else:
        ax.set_yticks([])
    ax.invert_yaxis()
    ax.set(xlabel="step", ylabel="pair of tasks")
    return ax


def conflicts(
    gramians: ArrayLike,
    steps: ArrayLike | None = None,
    *,
    window: int = 1,
    same_task_cosines: ArrayLike | None = None,
    label: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """The share of pairs of tasks whose gradients conflict, over training.

    Random, nearly orthogonal gradients conflict in a half of all pairs, which a dotted line marks.

    Args:
      gramians: (S, T, T) Gramians of the recorded steps.
      steps: (S,) their numbers; 0 to S - 1 by default.
      window: number of recorded steps to average over, at least 1 and at most S. Few tasks need
        it: two either conflict or do not.
      same_task_cosines: (S, T) the control, as in `cosines`: drawn is the share of tasks whose own
        gradients on two disjoint batches conflict, which noise alone is to blame for.
      label: of the line, in the legend.
      ax: where to draw; the current Axes by default.

    Returns:
      The Axes.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> import matplotlib.pyplot as plt
      >>> import optax_surgery as surgery
      >>> from optax_surgery import plotting
      >>> task_grads = jax.random.normal(jax.random.key(0), (100, 3, 50))
      >>> _, ax = plt.subplots()
      >>> gramians = jax.jit(jax.vmap(surgery.gramian))(task_grads)
      >>> ax = plotting.conflicts(gramians, window=20, ax=ax)
      >>> ax.get_ylabel()
      'share of pairs that conflict'
    """
    gramians = _gramians(gramians)
    shares = np.asarray(_conflict_fractions(gramians))
    steps = _steps(steps, len(shares))
    if not 1 <= window <= len(steps):
        expected = f"a window of 1 to {len(steps)} recorded steps"
        checks.refuse(expected, window, "window", "With 1 nothing is averaged.")
    ax = plt.gca() if ax is None else ax
    if same_task_cosines is not None:
        same = _array("same_task_cosines", same_task_cosines, gramians.shape[:2])
        ceiling = _running_mean(np.mean(same < 0, axis=1), window)
        ax.plot(steps[window - 1 :], ceiling, "-.", color="0.5", label="one task, two batches")
    ax.plot(steps[window - 1 :], _running_mean(shares, window), lw=2, label=label or "tasks")
    ax.axhline(0.5, color="0.5", ls=":", lw=1)
    ax.set(xlabel="step", ylabel="share of pairs that conflict", ylim=(-0.02, 1.02))
    return _finish(ax)


def norms(
    gramians: ArrayLike,
    steps: ArrayLike | None = None,
    *,
    task_names: Sequence[str] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """The norms of the task gradients over training, on a logarithmic scale.

    Args:
      gramians: (S, T, T) Gramians of the recorded steps.
      steps: (S,) their numbers; 0 to S - 1 by default.
      task_names: T names; the numbers of the tasks by default. More than seven tasks have no
        legend: their lines are grey, and that of the median is black.
      ax: where to draw; the current Axes by default.

    Returns:
      The Axes. A gradient that is zero leaves a gap.

    Examples:
      >>> import jax.numpy as jnp
      >>> import matplotlib.pyplot as plt
      >>> from optax_surgery import plotting
      >>> gramians = jnp.array([[[4.0, -1.0], [-1.0, 9.0]], [[1.0, 0.0], [0.0, 0.0]]])
      >>> _, ax = plt.subplots()
      >>> ax = plotting.norms(gramians, task_names=["depth", "normals"], ax=ax)
      >>> ax.get_yscale()
      'log'
    """
    gramians = _gramians(gramians)
    values = np.sqrt(np.diagonal(gramians, axis1=1, axis2=2))
    ax = plt.gca() if ax is None else ax
    _draw_tasks(ax, steps, np.where(values > 0, values, np.nan), task_names)
    ax.set(xlabel="step", ylabel="norm of the task gradient", yscale="log")
    return _finish(ax)


def weights(
    weights: ArrayLike,
    steps: ArrayLike | None = None,
    *,
    task_names: Sequence[str] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """The weights of the tasks in the update, over training.

    Args:
      weights: (S, T) weights. A surgery that is fed `jnp.eye(T)` and `gramian=` returns them.
      steps: (S,) the numbers of the steps; 0 to S - 1 by default.
      task_names: as in `norms`.
      ax: where to draw; the current Axes by default.

    Returns:
      The Axes.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> import matplotlib.pyplot as plt
      >>> import optax_surgery as surgery
      >>> from optax_surgery import plotting
      >>> tx = surgery.pcgrad()
      >>> gramians = jnp.array([[[1.0, -0.5], [-0.5, 1.0]], [[1.0, 0.5], [0.5, 1.0]]])
      >>> def weigh(gramian):
      ...     return tx.update(jnp.eye(2), tx.init(None), gramian=gramian)[0]
      >>> _, ax = plt.subplots()
      >>> ax = plotting.weights(jax.vmap(weigh)(gramians), ax=ax)
      >>> ax.get_ylabel()
      'weight in the update'
    """
    values = _array("weights", weights, ("S", "T"))
    ax = plt.gca() if ax is None else ax
    ax.axhline(0, color="0.8", lw=1)
    _draw_tasks(ax, steps, values, task_names)
    ax.set(xlabel="step", ylabel="weight in the update")
    return _finish(ax)


def condition_numbers(
    gramians: ArrayLike,
    steps: ArrayLike | None = None,
    *,
    label: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """The condition number of the gradient matrix over training, on a logarithmic scale.

    Args:
      gramians: (S, T, T) Gramians of the recorded steps.
      steps: (S,) their numbers; 0 to S - 1 by default.
      label: of the line, in the legend.
      ax: where to draw; the current Axes by default.

    Returns:
      The Axes. Steps whose gradients are linearly dependent, so that the number is infinite, have
      a cross at the upper edge.

    Examples:
      >>> import jax.numpy as jnp
      >>> import matplotlib.pyplot as plt
      >>> from optax_surgery import plotting
      >>> gramians = jnp.array([[[1.0, 0.0], [0.0, 9.0]], [[1.0, 1.0], [1.0, 1.0]]])
      >>> _, ax = plt.subplots()
      >>> ax = plotting.condition_numbers(gramians, ax=ax)
      >>> [len(line.get_xdata()) for line in ax.get_lines()]
      [2, 1]
    """
    gramians = _gramians(gramians)
    values = np.asarray(_condition_numbers(gramians))
    infinite, steps = np.isinf(values), _steps(steps, len(values))
    ax = plt.gca() if ax is None else ax
    (line,) = ax.plot(steps, np.where(infinite, np.nan, values), lw=2, label=label)
    if infinite.any():
        ax.plot(
            steps[infinite],
            np.full(infinite.sum(), 0.98),
            "x",
            color=line.get_color(),
            transform=ax.get_xaxis_transform(),
            label="linearly dependent",
        )
    ax.set(xlabel="step", ylabel="condition number of the gradients", yscale="log")
    return _finish(ax)


def pareto_front(
    losses: ArrayLike,
    *,
    front: ArrayLike | None = None,
    task_names: Sequence[str] | None = None,
    ax: Axes | None = None,
    **style: Any,
) -> Axes:
    """Solutions in the plane of two losses, and the best trade-offs among them.

    Args:
      losses: (M, 2) losses of M solutions, the lower the better. Those that another one beats in
        one loss, and is not behind in the other, are hollow; a staircase joins the rest.
      front: (K, 2) the true Pareto front, where it is known. It is drawn in place of the staircase,
        and no solution is hollow, as rounding leaves hardly any on the front.
      task_names: 2 names; the numbers of the tasks by default.
      ax: where to draw; the current Axes by default.
      **style: of the solutions, as `Axes.plot` takes it: `label`, `color`, `marker`.

    Returns:
      The Axes.

    Examples:
      >>> import jax.numpy as jnp
      >>> import matplotlib.pyplot as plt
      >>> from optax_surgery import plotting
      >>> losses = jnp.array([[1.0, 3.0], [2.0, 2.0], [3.0, 1.0], [3.0, 3.0]])
      >>> _, ax = plt.subplots()
      >>> ax = plotting.pareto_front(losses, task_names=["left", "right"], label="PCGrad", ax=ax)
      >>> ax.get_xlabel()
      'loss of left'
    """
    losses = _array("losses", losses, ("M", 2))
    names = _task_names(task_names, 2)
    ax = plt.gca() if ax is None else ax
    style = {"color": COLOURS[0], "marker": "o", "ls": "none", "ms": 6} | style
    if front is None:
        beaten = _is_beaten(losses)
        stairs = losses[~beaten][np.argsort(losses[~beaten, 0], kind="stable")]
        ax.step(*stairs.T, where="post", color=style["color"], lw=1, alpha=0.6)
        ax.plot(*losses[beaten].T, **(style | {"label": None, "mfc": "white"}))
        losses = losses[~beaten]
    else:
        front = _array("front", front, ("K", 2))
        ax.plot(*front.T, color="0.4", lw=1.5, label="Pareto front", zorder=0)
    ax.plot(*losses.T, **style)
    ax.set(xlabel=f"loss of {names[0]}", ylabel=f"loss of {names[1]}")
    return _finish(ax)


def trajectories(
    points: ArrayLike,
    *,
    surface: tuple[ArrayLike, ArrayLike, ArrayLike] | None = None,
    pareto_set: ArrayLike | None = None,
    labels: Sequence[str] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Paths of training on a landscape with two parameters.

    A hollow circle is where a path begins, a filled one where it ends.

    Args:
      points: (R, S, 2) parameters of R runs.
      surface: x (X,), y (Y,) and heights (Y, X) of contour lines, as `Axes.contour` takes them;
        low ground is darker.
      pareto_set: (K, 2) parameters, drawn as a thick grey line.
      labels: R names of the runs, in the legend.
      ax: where to draw; the current Axes by default.

    Returns:
      The Axes.

    Examples:
      >>> import matplotlib.pyplot as plt
      >>> import numpy as np
      >>> from optax_surgery import plotting
      >>> x, y = np.linspace(-2, 2, 50), np.linspace(-1, 1, 30)
      >>> points = np.array([[[2.0, 1.0], [1.0, 0.2], [0.0, 0.0]]])
      >>> _, ax = plt.subplots()
      >>> ax = plotting.trajectories(points, surface=(x, y, x**2 + y[:, None] ** 2), ax=ax)
      >>> len(ax.get_lines())
      3
    """
    points = _array("points", points, ("R", "S", 2))
    ax = plt.gca() if ax is None else ax
    if surface is not None:
        x, y, heights = map(np.asarray, surface)
        ax.contourf(x, y, heights, levels=16, cmap=_PALE)
        ax.contour(x, y, heights, levels=16, colors="0.65", linewidths=0.5, linestyles="solid")
    if pareto_set is not None:
        ends = _array("pareto_set", pareto_set, ("K", 2))
        ax.plot(*ends.T, color="0.35", lw=5, alpha=0.6, solid_capstyle="round", label="Pareto set")
    for run, path in enumerate(points):
        colour, dashes = COLOURS[run % len(COLOURS)], DASHES[run % len(DASHES)]
        name = None if labels is None else labels[run]
        ax.plot(*path.T, color=colour, ls=dashes, lw=1.5, label=name)
        ax.plot(*path[0], "o", color=colour, mfc="white", ms=6)
        ax.plot(*path[-1], "o", color=colour, mec="white", mew=0.8, ms=7, zorder=4)
    return _finish(ax)


# What the pictures share


def _draw_tasks(
    ax: Axes, steps: ArrayLike | None, values: np.ndarray, task_names: Sequence[str] | None
) -> None:
    """A line a task; of many, their band of lines and the median."""
    steps, num_tasks = _steps(steps, len(values)), values.shape[1]
    names = _task_names(task_names, num_tasks)
    if num_tasks > len(COLOURS):
        ax.plot(steps, values, color="0.75", lw=0.8)
        middle = np.nanmedian(values, axis=1)
        ax.plot(steps, middle, color="black", lw=2, label=f"median of {num_tasks} tasks")
        return
    for task, name in enumerate(names):
        ax.plot(steps, values[:, task], color=COLOURS[task], ls=DASHES[task], lw=1.8, label=name)


def _finish(ax: Axes) -> Axes:
    ax.spines[["top", "right"]].set_visible(False)
    if ax.get_legend_handles_labels()[1]:
        ax.legend(frameon=False)
    return ax


def _present_cosines(gramians: np.ndarray) -> np.ndarray:
    """(S, T, T) cosines, NaN where a gradient is zero."""
    found = np.asarray(_cosine_similarities(gramians))
    present = np.diagonal(gramians, axis1=1, axis2=2) > 0
    return np.where(present[:, :, None] & present[:, None, :], found, np.nan)


def _running_mean(values: np.ndarray, window: int) -> np.ndarray:
    return np.convolve(values, np.full(window, 1 / window), mode="valid")


def _is_beaten(losses: np.ndarray) -> np.ndarray:
    """(M,) whether another solution is better in one loss and no worse in the other."""
    no_worse = np.all(losses[:, None] <= losses[None, :], axis=2)
    better = np.any(losses[:, None] < losses[None, :], axis=2)
    return np.any(no_worse & better, axis=0)


def _steps(steps: ArrayLike | None, num_steps: int) -> np.ndarray:
    if steps is None:
        return np.arange(num_steps)
    return _array("steps", steps, (num_steps,))


def _task_names(task_names: Sequence[str] | None, num_tasks: int) -> list[str]:
    if task_names is None:
        return [f"{task}" for task in range(num_tasks)]
    if len(task_names) != num_tasks:
        checks.refuse(f"{num_tasks} names", len(task_names), "task_names", "Name every task.")
    return list(task_names)


def _gramians(gramians: ArrayLike) -> np.ndarray:
    array = np.asarray(gramians)
    if array.ndim != 3 or array.shape[1] != array.shape[2]:
        remedy = "Stack those of the recorded steps."
        checks.refuse("Gramians of shape (S, T, T)", array.shape, "gramians", remedy)
    return array


def _array(name: str, values: ArrayLike, shape: tuple[int | str, ...]) -> np.ndarray:
    """A numpy array of the given shape, in which a letter stands for any size."""
    array = np.asarray(values)
    fits = array.ndim == len(shape) and all(
        isinstance(wanted, str) or size == wanted
        for wanted, size in zip(shape, array.shape, strict=True)
    )
    if not fits:
        wanted = f"({', '.join(map(str, shape))}{',' if len(shape) == 1 else ''})"
        remedy = "Pass one entry per recorded step, task or point, as the documentation says."
        checks.refuse(f"an array of shape {wanted}", array.shape, name, remedy)
    return array
