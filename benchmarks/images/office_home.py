"""Office-Home: 65 everyday objects in four styles; a style is a task, with images of its own.

The protocol of LibMTL and DB-MTL: ResNet-18, a linear head for each style, 100 epochs with batches
of 64 images of each style at 224 x 224, Adam with 1e-4 and a weight decay of 1e-5; 60% of the
images to train on, 20% to choose the epoch and 20% to test with. There ResNet-18 starts from
ImageNet and the split is a list of files; here its weights are random and the split is drawn, the
same one every time. Run `python -m benchmarks.images.office_home --data-dir FOLDER`.

The folder is as https://www.hemanthdv.org/officeHomeDataset.html hands it out: `Art`, `Clipart`,
`Product` and `Real World`, each with a folder for each class, each with JPEG images.
"""

import dataclasses
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_surgery as surgery
from benchmarks.common.command_line import GOES_ON, run_main
from benchmarks.images import image_suite
from benchmarks.images.networks import ImageClassifier, normalise, predict, resnet18
from benchmarks.images.training import DataError, Problem, Split, read_image, side_by_side

TASKS = ("Art", "Clipart", "Product", "Real World")
CLASSES = 65
# Of the images of a style.
SHARES = {"train": 0.6, "validation": 0.2, "test": 0.2}


@dataclasses.dataclass(frozen=True)
class Config:
    """The options. The defaults are the published protocol."""

    methods: Annotated[tuple, "what to compare", image_suite.choices(len(TASKS))] = (
        image_suite.DEFAULT
    )
    seeds: Annotated[int, "networks per method, at least 2", 2] = 3
    epochs: Annotated[int, "times that every image of the largest style is seen", 1] = 100
    batch_size: Annotated[int, "images of each style per step", 1] = 64
    learning_rate: Annotated[float, "of Adam", 1e-9] = 1e-4
    size: Annotated[int, "height and width that images are resized to", 32] = 224
    channels: Annotated[int, "of the first convolution; later ones have up to 8 times", 1] = 64
    data_dir: Annotated[Path, "folder with the four styles", None] = Path("data/office_home")
    out: Annotated[Path, "folder for the results", None] = Path("results/office_home")
    overwrite: Annotated[bool, "replace the results of an earlier sweep", None] = False


def load(config):
    """Every style's images, split in parts by a permutation that never changes."""
    by_style = [files_of(config.data_dir, style) for style in TASKS]
    splits, start = {}, 0.0
    for name, share in SHARES.items():
        parts = [
            files[round(start * len(files)) : round((start + share) * len(files))]
            for files in by_style
        ]
        splits[name] = side_by_side([image_files(part, config.size) for part in parts])
        start += share
    return splits


def files_of(folder, style):
    """(file, class) of all images, in an order drawn once and for all."""
    found = {folder / style, folder / style.replace(" ", "_")}
    classes = sorted(path for each in found for path in each.glob("*/"))
    if len(classes) != CLASSES:
        raise DataError(
            f"expected {CLASSES} folders of classes in {folder / style}, found {len(classes)}: "
            "download Office-Home from www.hemanthdv.org/officeHomeDataset.html"
        )
    files = [
        (path, label)
        for label, each in enumerate(classes)
        for path in sorted(each.iterdir())
        if path.suffix.lower() in (".jpg", ".jpeg", ".png")
    ]
    if len(files) < 5:
        raise DataError(f"expected images in the folders in {folder / style}, got {len(files)}")
    return [files[place] for place in np.random.default_rng(0).permutation(len(files))]


def image_files(files, size):
    def read(positions):
        chosen = [files[position] for position in positions]
        images = np.stack([read_image(path, (size, size)) for path, _ in chosen])
        return {"image": images, "label": np.array([label for _, label in chosen])}

    return Split(len(files), read)


def make_problem(tasks, config):
    """To learn the styles at these positions."""
    chosen, each = np.array(tasks), jnp.arange(len(tasks))
    outputs = {TASKS[task].replace(" ", "_"): CLASSES for task in tasks}
    net = ImageClassifier(resnet18(width=config.channels), outputs)

    def init(key):
        return dict(net.init(key, jnp.zeros((1, config.size, config.size, 3)), train=True))

    def by_task(batch):
        return (jnp.moveaxis(batch[name][:, chosen], 1, 0) for name in ("image", "label"))

    def task_loss(params, task, images, labels, variables):
        logits, variables = net.apply(
            {"params": params, **variables}, normalise(images), train=True, mutable="batch_stats"
        )
        errors = optax.softmax_cross_entropy_with_integer_labels(jnp.stack(logits)[task], labels)
        return jnp.mean(errors), variables

    def value_and_grad(params, variables, batch, key):
        def loss_fn(params, task, images, labels):
            return task_loss(params, task, images, labels, variables)

        (losses, several), task_grads = surgery.per_task_value_and_grad(loss_fn, has_aux=True)(
            params, each, *by_task(batch)
        )
        # Every style is normalised by itself; the statistics that are kept are their mean.
        return (losses, jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), several)), task_grads

    def measure(params, variables, batch):
        def right(task, images, labels):
            logits = predict(net, params, variables, normalise(images))
            return jnp.argmax(jnp.stack(logits)[task], axis=-1) == labels

        counts = batch["counts"][:, chosen].T
        hits = jax.vmap(right)(each, *by_task(batch)) & counts
        return {"right": jnp.sum(hits, axis=1), "images": jnp.sum(counts, axis=1)}

    def metrics(sums):
        accuracies = 100 * sums["right"] / sums["images"]
        return {TASKS[task]: found for task, found in zip(tasks, accuracies, strict=True)}

    return Problem(init, value_and_grad, measure, metrics)


def mean_accuracy(metrics):
    return float(np.mean(list(metrics.values())))


def suite(config):
    return image_suite.Suite(
        tasks=TASKS,
        load=load,
        make_problem=make_problem,
        # The decay is part of the gradient, as in PyTorch's Adam.
        make_adam=lambda config, steps_per_epoch: optax.chain(
            optax.add_decayed_weights(1e-5), optax.adam(config.learning_rate)
        ),
        choose=lambda curves: image_suite.best_epoch(curves, mean_accuracy),
        columns=lambda metrics: metrics | {"mean": mean_accuracy(metrics)},
        higher_is_better=lambda metrics: dict.fromkeys(metrics, True),
    )


def main(argv=None):
    image_suite.run(suite, Config, __doc__, "office_home", argv)


if __name__ == "__main__":
    run_main(main, GOES_ON)
