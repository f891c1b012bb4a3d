"""The picture of the README: two conflicting gradients, and what each method makes of them.

Run `python -m benchmarks.two_gradients`; it writes benchmarks/pictures/two_gradients.png.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt

import optax_surgery as surgery

PICTURE = Path(__file__).parent / "pictures" / "two_gradients.png"
TASK_GRADS = jnp.array([[2.4, 0.35], [-0.75, 0.95]])
METHODS = {
    "sum": surgery.sum(),
    "PCGrad": surgery.pcgrad(),
    "Aligned-MTL": surgery.aligned_mtl(jnp.ones(2)),
}
TASK_COLOURS = ("#0072B2", "#D55E00")


def update_of(tx):
    update, _ = tx.update(TASK_GRADS, tx.init(None))
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
    for task, (gradient, part, colour) in enumerate(
        zip(TASK_GRADS, parts, TASK_COLOURS, strict=True)
    ):
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


def main():
    figure, row = plt.subplots(1, len(METHODS), figsize=(12, 3.9), layout="constrained")
    for axes, (name, tx) in zip(row, METHODS.items(), strict=True):
        draw(axes, name, tx)
    strokes = {"pale: the two task gradients": "0.75", "black: the update": "black"}
    strokes["in colour: what the method makes of them"] = TASK_COLOURS[0]
    handles = [plt.Line2D([], [], color=colour, lw=3) for colour in strokes.values()]
    figure.legend(handles, strokes, loc="outside lower center", ncols=3, frameon=False)
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, dpi=120)
    print(f"wrote {PICTURE}")


if __name__ == "__main__":
    main()
