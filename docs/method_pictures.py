"""A picture of each method: what it makes of the same gradients, on the same axes.

All methods live through the same training of `NUM_STEPS` steps, and their last updates are drawn.
So neither those that keep a state nor those that look at losses need anything of their own. What a
method has to be told stands in `ARGUMENTS`; without arguments a new method needs no line here.
"""

import inspect
import io
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

import optax_surgery as surgery

# --- The training, and what each method is told

NUM_STEPS = 100
NUM_DRAWS = 24
# The loss of task 1 falls to a half, and the other losses stay.
LOSSES = np.stack([np.geomspace(4, 2, NUM_STEPS), *np.full((2, NUM_STEPS), 0.5)], axis=1)
LOSSES = LOSSES.astype(np.float32)
# In the last step. Those of tasks 1 and 2 are drawn in the README, too.
TASK_GRADS = np.array([[2.4, 0.35], [-0.75, 0.95], [0.9, 2.0]], np.float32)
# A gradient is as long as its loss is large.
HISTORY = (LOSSES / LOSSES[-1])[..., None] * TASK_GRADS

ARGUMENTS: dict[str, dict[str, Any]] = {
    "constant": {"weights": (0.3, 1.0)},
    "cosmos": {"penalty": 1.0},
    "cr_mogm": {"inner": surgery.mgda},
    "dwa": {"window": 25},
    "excess_mtl": {"learning_rate": 0.1},
    "go4align": {"num_groups": 2},
    "krum": {"num_byzantine": 0, "num_selected": 2},
    "learning_rate_annealing": {"residual": 0},
    "pbi": {"penalty": 0.5},
    "pcd": {"primary": 0},
    "pivrg": {"scores": (0.0, 30.0)},
    "sdmgrad": {"learning_rate": 0.3},
    "softadapt": {"focus": 50.0},
    "trimmed_mean": {"num_trimmed": 1},
}
# Of two tasks they make nothing, or a mean.
OF_THREE_TASKS = {"coordinate_median", "geometric_median", "go4align", "krum", "trimmed_mean"}
# They look at a Gramian of two batches, which here are the same.
OF_TWO_BATCHES = {"modo", "sdmgrad"}

# Nearly all of the time is XLA's, which has to compile each of these tiny programs for one run. So
# it shall not optimise, and shall write loops in its older way, as long as it has that.
COMPILER_OPTIONS: dict[str, Any] = {"xla_backend_optimization_level": 0}
if jax.__version_info__ < (0, 11):
    COMPILER_OPTIONS["xla_cpu_use_fusion_emitters"] = False


class Shown(NamedTuple):
    """What a picture shows."""

    arguments: str
    task_grads: np.ndarray  # (T, 2), of the last step
    updates: np.ndarray  # (draws, 2), of the last step
    first: np.ndarray  # (draws, 2), of the same gradients and losses in a first step
    looks_at_losses: bool

    @property
    def is_random(self):
        """Whether draws differ."""
        return not np.allclose(self.updates, self.updates[0], atol=1e-4)

    @property
    def remembers(self):
        """Whether the update depends on the steps before."""
        return not self.is_random and not np.allclose(self.first, self.updates, atol=0.05)

    @property
    def scale(self):
        """1, or the first of 1/2, 1/4, ... at which the updates lie in the frame."""
        drawn = np.concatenate([self.updates, self.first]) if self.remembers else self.updates
        beyond = np.max(np.maximum(drawn / LOW, drawn / HIGH))  # LOW is negative
        return 0.5 ** np.ceil(np.log2(max(beyond, 1.0)))

    def notes(self):
        """What a caption adds to the name."""
        told = [self.arguments] if self.arguments else []
        if self.looks_at_losses:
            told.append("looks at losses")
        if self.remembers:
            told.append("thin: in a first step")
        if self.is_random:
            told.append(f"random, {len(self.updates)} draws")
        if self.scale < 1:
            told.append(f"drawn at 1/{1 / self.scale:.0f} of its length")
        return "; ".join(told)


def methods():
    """Every method, by its name."""
    return {
        name: value
        for name, value in vars(surgery).items()
        if getattr(value, "__module__", "").startswith("optax_surgery.methods.")
    }


def make(name):
    """The surgery that is drawn, and what it was told."""
    method, arguments = methods()[name], ARGUMENTS.get(name, {})
    parameters = inspect.signature(method).parameters
    missing = [
        parameter.name
        for parameter in parameters.values()
        if parameter.default is parameter.empty and parameter.name not in {*arguments, "num_tasks"}
    ]
    if missing:
        raise ValueError(
            f"Expected a picture of every method, got none of '{name}'. Give it a line in "
            f"ARGUMENTS of docs/method_pictures.py that says {', '.join(missing)}."
        )
    told = [
        f"{key}={value.__name__}()" if callable(value) else f"{key}={value}"
        for key, value in arguments.items()
    ]
    given = {key: value() if callable(value) else value for key, value in arguments.items()}
    if "num_tasks" in parameters:
        given["num_tasks"] = num_tasks_of(name)
    return method(**given), ", ".join(told)


def num_tasks_of(name):
    """How many of the gradients its picture has."""
    return 3 if name in OF_THREE_TASKS else 2


def look(name):
    """Lets a method live through the training."""
    tx, told = make(name)
    num_tasks = num_tasks_of(name)
    history, losses = HISTORY[:, :num_tasks], LOSSES[:, :num_tasks]

    def update(task_grads, state, **extra):
        if name in OF_TWO_BATCHES:
            extra["gramian"] = surgery.gramian(task_grads)
        return tx.update(task_grads, state, **extra)

    def last_update(key, remembers):
        new = tx.init(jnp.zeros(2))

        def step(state, now):
            number, task_grads, losses = now
            forgets = (number == NUM_STEPS - 1) & ~remembers
            state = jax.tree.map(lambda old, new: jnp.where(forgets, new, old), state, new)
            step_key = jax.random.fold_in(key, number)
            update_, state = update(task_grads, state, losses=losses, key=step_key)
            return state, update_

        return jax.lax.scan(step, new, (jnp.arange(NUM_STEPS), history, losses))[1][-1]

    each = jax.vmap(jax.vmap(last_update, (0, None)), (None, 0))
    keys = jax.random.split(jax.random.key(0), NUM_DRAWS)
    compiled = jax.jit(each, compiler_options=COMPILER_OPTIONS)
    updates, first = np.asarray(compiled(keys, np.array([True, False])))
    if not np.all(np.isfinite([updates, first])):
        raise ValueError(f"Expected an update to draw, got one that is not finite of '{name}'.")
    return Shown(told, history[-1], updates, first, asks_for_losses(update, tx, history[-1]))


def asks_for_losses(update, tx, task_grads):
    """Whether there is no update without losses."""
    try:
        jax.eval_shape(lambda task_grads: update(task_grads, tx.init(jnp.zeros(2))), task_grads)
    except ValueError as error:
        return "`losses`" in str(error)
    return False


# --- The picture

# All pictures show the same part of the plane: these are its corners.
LOW, HIGH = np.array([-1.75, -0.4]), np.array([3.1, 2.65])
WIDTH = 2.2  # inches, of 100 pixels each in a page
QUARTER_TURN = np.array([[0, 1], [-1, 0]], np.float32)
TASK_COLOURS = ("#0072B2", "#D55E00", "#009E73")
# On the dark page: ink becomes chalk, and the colours of tasks brighter ones.
INK, GREY = "#17191c", "#8b8f94"
IN_THE_DARK = {
    INK: "#f1f1ef",
    TASK_COLOURS[0]: "#4fa8dd",
    TASK_COLOURS[1]: "#f0883e",
    TASK_COLOURS[2]: "#2fbf94",
}


def draw(shown):
    """The figure of what a picture shows."""
    figure = Figure(figsize=(WIDTH, WIDTH * (HIGH - LOW)[1] / (HIGH - LOW)[0]))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(LOW[0], HIGH[0]), ylim=(LOW[1], HIGH[1]))
    axes.axis("off")
    axes.fill(*no_task_worse(shown.task_grads).T, color=GREY, alpha=0.22, lw=0)
    for task, (grad, colour) in enumerate(zip(shown.task_grads, TASK_COLOURS, strict=False)):
        arrow(axes, grad, color=colour, lw=1.3, mutation_scale=8)
        # Where no other line is: right of the first gradient's tip, and left of the others'.
        side = grad @ QUARTER_TURN * (1 if task else -1)
        x, y = 0.9 * grad + 0.22 * side / np.linalg.norm(grad)
        axes.text(x, y, f"{task + 1}", color=colour, fontsize=8, ha="center", va="center")

    updates, first = shown.scale * shown.updates, shown.scale * shown.first
    if shown.is_random:
        for update in updates:
            arrow(axes, update, color=INK, lw=1.6, mutation_scale=9, alpha=0.3)
        return figure
    if len(shown.task_grads) == 2:
        draw_parts(axes, shown.task_grads, updates[0])
    if shown.remembers:
        arrow(axes, first[0], color=INK, lw=0.9, mutation_scale=7, alpha=0.55)
    arrow(axes, updates[0], color=INK, lw=2.4, mutation_scale=12)
    return figure


def no_task_worse(task_grads):
    """The corners of a triangle that covers the dual cone as far as the frame goes."""
    normals = np.concatenate([task_grads @ turn for turn in (QUARTER_TURN, QUARTER_TURN.T)])
    edges = normals[np.all(normals @ task_grads.T > -1e-5, axis=1)]
    return np.stack([np.zeros(2), *(20 * edges / np.linalg.norm(edges, axis=1, keepdims=True))])


def draw_parts(axes, task_grads, update):
    """The two gradients times their weights, and the parallelogram that adds them up."""
    parts = np.linalg.solve(task_grads.T, update)[:, None] * task_grads
    for part, colour in zip(parts, TASK_COLOURS, strict=False):
        axes.plot(*np.stack([part, update]).T, color=colour, lw=0.8, ls=(0, (2, 2)))
        axes.plot(*np.stack([np.zeros(2), part]).T, color=colour, lw=0.8, ls=(0, (2, 2)))
        axes.plot(*part, "o", color=colour, ms=3.2)


def arrow(axes, tip, *, alpha=1.0, lw, color, mutation_scale):
    """An arrow from zero, whose point is where it should be."""
    style = {"arrowstyle": "-|>", "shrinkA": 0, "shrinkB": 0, "joinstyle": "miter"}
    style |= {"alpha": alpha, "lw": lw, "color": color, "mutation_scale": mutation_scale}
    axes.annotate("", xy=tip, xytext=(0, 0), arrowprops=style)


def as_svg(figure):
    """The same text for the same picture: no date, and no random names in it."""
    drawn = io.StringIO()
    with rc_context({"svg.hashsalt": "optax_surgery"}):
        figure.savefig(drawn, format="svg", transparent=True, metadata={"Date": None})
    return drawn.getvalue()


def write_all(folder):
    """Two files for each method, `NAME.svg` and `NAME_dark.svg`. Returns what they show."""
    folder.mkdir(exist_ok=True)
    pictures = {name: look(name) for name in sorted(methods())}
    for name, shown in pictures.items():
        picture = as_svg(draw(shown))
        write(folder / f"{name}.svg", picture)
        for ink, chalk in IN_THE_DARK.items():
            picture = picture.replace(ink.lower(), chalk)
        write(folder / f"{name}_dark.svg", picture)
    return pictures


def write(path, text):
    """Leaves a file alone that says so already, for Sphinx goes by its time."""
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")
