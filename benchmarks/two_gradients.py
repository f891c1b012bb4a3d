"""The picture of the README: two conflicting gradients, and what each method makes of them.

Run `python -m benchmarks.two_gradients`.
"""

import io
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

import optax_surgery as surgery
from benchmarks.common.command_line import Parser, check_output, run_main, write

PICTURES = Path(__file__).parent / "pictures"
TASK_GRADS = jnp.array([[2.4, 0.35], [-0.75, 0.95]])
METHODS = {
    "sum": surgery.sum(),
    "PCGrad": surgery.pcgrad(),
    "Aligned-MTL": surgery.aligned_mtl(jnp.ones(2)),
}
TASK_COLOURS = ("#0072B2", "#D55E00")


def update_of(tx) -> Any:
    update, _ = tx.update(TASK_GRADS, tx.init(TASK_GRADS[0]))
    return update


def parts_of(name):
    """What the method makes of each gradient; the update is the sum of the two."""
    if name == "PCGrad":
        first, second = TASK_GRADS
        return jnp.stack([reject(first, second), reject(second, first)])
    if name == "Aligned-MTL":
        return jax.vmap(lambda one: update_of(surgery.aligned_mtl(one)))(jnp.eye(2))
    return TASK_GRADS


def reject(gradient, other):
    """The projection of `gradient` on the normal plane of `other`."""
    return gradient - (gradient @ other) / (other @ other) * other


def arrow(axes, vector, **style):
    axes.annotate("", xy=vector, xytext=(0, 0), arrowprops={"arrowstyle": "-|>", **style})


def draw(axes, name, tx):
    update, parts = update_of(tx), parts_of(name)
    for task, colour in enumerate(TASK_COLOURS):
        gradient, part = TASK_GRADS[task], parts[task]
        arrow(axes, gradient, color=colour, lw=1.5, alpha=0.35, mutation_scale=14)
        axes.annotate(f"$g_{task + 1}$", gradient, color=colour, fontsize=13, alpha=0.7)
        if name != "sum":
            arrow(axes, part, color=colour, lw=2.5, mutation_scale=16)
    arrow(axes, update, color="black", lw=3, mutation_scale=20)

    products = TASK_GRADS @ update
    helped = ["helps" if product > 1e-6 else "hurts" for product in products]
    axes.set_title(name, fontsize=14)
    axes.set_xlabel(f"a step {helped[0]} task 1, {helped[1]} task 2", fontsize=11)
    axes.axhline(0, color="0.9", lw=1, zorder=0)
    axes.axvline(0, color="0.9", lw=1, zorder=0)
    axes.set(xlim=(-1.1, 2.8), ylim=(-0.3, 2.45), aspect="equal", xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def make_figure():
    figure = Figure(figsize=(12, 3.9), layout="constrained", dpi=120)
    row = np.ravel(figure.subplots(1, len(METHODS)))
    for axes, (name, tx) in zip(row, METHODS.items(), strict=True):
        draw(axes, name, tx)
    strokes = {"pale: the two task gradients": "0.75", "black: the update": "black"}
    strokes["in colour: what the method makes of them"] = TASK_COLOURS[0]
    handles = [Line2D([], [], color=colour, lw=3) for colour in strokes.values()]
    figure.legend(handles, list(strokes), loc="outside lower center", ncols=3, frameon=False)
    return figure


def main(argv=None):
    parser = Parser("python -m benchmarks.two_gradients", description=__doc__)
    parser.add_argument(
        "--out",
        type=Path,
        default=PICTURES,
        help="folder for the picture (default: benchmarks/pictures)",
    )
    picture = parser.parse_args(argv).out / "two_gradients.png"
    check_output(parser, [picture], overwrite=True)
    drawn = io.BytesIO()
    make_figure().savefig(drawn)
    write({picture: drawn.getvalue()})
    print(f"Written: {picture}")


if __name__ == "__main__":
    run_main(main)
