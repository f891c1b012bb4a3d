"""CelebA: forty attributes of a face, as forty tasks of yes or no.

The nine-layer network and the protocol of FAMO and FairGrad: 15 epochs, batches of 256, Adam with
a rate of 3e-4, images of 64 x 64; the F1 of each attribute on the test set, at the epoch whose mean
F1 on the validation set is best. The mean error, which the PCGrad paper reports, stands beside it.
Run `python -m benchmarks.images.celeb_a`.
"""

import dataclasses
from pathlib import Path
from typing import Annotated

import jax.numpy as jnp
import numpy as np
import optax
from PIL import Image

import optax_surgery as surgery
from benchmarks.common.command_line import GOES_ON, run_main
from benchmarks.images import image_suite
from benchmarks.images.networks import CelebANet, predict
from benchmarks.images.training import TFDS_DIR, Problem, Split, read_record, tfds_sources

TASKS = (
    "5_o_Clock_Shadow",
    "Arched_Eyebrows",
    "Attractive",
    "Bags_Under_Eyes",
    "Bald",
    "Bangs",
    "Big_Lips",
    "Big_Nose",
    "Black_Hair",
    "Blond_Hair",
    "Blurry",
    "Brown_Hair",
    "Bushy_Eyebrows",
    "Chubby",
    "Double_Chin",
    "Eyeglasses",
    "Goatee",
    "Gray_Hair",
    "Heavy_Makeup",
    "High_Cheekbones",
    "Male",
    "Mouth_Slightly_Open",
    "Mustache",
    "Narrow_Eyes",
    "No_Beard",
    "Oval_Face",
    "Pale_Skin",
    "Pointy_Nose",
    "Receding_Hairline",
    "Rosy_Cheeks",
    "Sideburns",
    "Smiling",
    "Straight_Hair",
    "Wavy_Hair",
    "Wearing_Earrings",
    "Wearing_Hat",
    "Wearing_Lipstick",
    "Wearing_Necklace",
    "Wearing_Necktie",
    "Young",
)


def load(config):
    sources = tfds_sources(
        "celeb_a", config.data_dir, config.download, ("train", "validation", "test")
    )
    return {
        split: Split(len(source), lambda positions, source=source: read(source, positions, config))
        for split, source in sources.items()
    }


def read(source, positions, config):
    records = [read_record(source, int(p), config.data_dir) for p in positions]
    size = (config.size, config.size)
    images = [
        np.asarray(Image.fromarray(record["image"]).resize(size, Image.Resampling.BILINEAR))
        for record in records
    ]
    labels = [[record["attributes"][task] for task in TASKS] for record in records]
    return {"image": np.stack(images), "label": np.array(labels)}


def make_problem(tasks, config):
    """To learn the attributes at these positions."""
    chosen = np.array(tasks)
    net = CelebANet(tuple(TASKS[task] for task in tasks), config.channels)

    def init(key):
        return dict(net.init(key, jnp.zeros((1, config.size, config.size, 3)), train=True))

    def losses_fn(params, variables, batch):
        logits, variables = net.apply(
            {"params": params, **variables}, batch["image"] / 255, train=True, mutable="batch_stats"
        )
        errors = optax.sigmoid_binary_cross_entropy(logits, batch["label"][:, chosen])
        return jnp.mean(errors, axis=0), variables

    def value_and_grad(params, variables, batch, key):
        return surgery.task_value_and_grad(losses_fn, has_aux=True)(params, variables, batch)

    def measure(params, variables, batch):
        logits = predict(net, params, variables, batch["image"] / 255)
        said, true = logits > 0, batch["label"][:, chosen]
        cells = {"hits": said & true, "false alarms": said & ~true, "misses": ~said & true}
        cells["images"] = jnp.ones_like(said)
        return {name: jnp.sum(cell, axis=0) for name, cell in cells.items()}

    return Problem(init, value_and_grad, measure, lambda sums: metrics(sums, tasks))


def metrics(sums, tasks):
    """F1 and error of each attribute in %."""
    wrong = sums["false alarms"] + sums["misses"]
    f1 = 2 * sums["hits"] / np.maximum(2 * sums["hits"] + wrong, 1)
    error = wrong / sums["images"]
    return {
        f"{TASKS[task]} {name}": 100 * value
        for name, values in (("F1", f1), ("error", error))
        for task, value in zip(tasks, values, strict=True)
    }


# --- The command line


@dataclasses.dataclass(frozen=True)
class Config:
    """The options. The defaults are the published protocol."""

    methods: Annotated[tuple, "what to compare", image_suite.choices(len(TASKS))] = (
        image_suite.DEFAULT
    )
    seeds: Annotated[int, "networks per method, at least 2", 2] = 3
    epochs: Annotated[int, "times that every image is seen", 1] = 15
    batch_size: Annotated[int, "images per step", 1] = 256
    learning_rate: Annotated[float, "of Adam", 1e-9] = 3e-4
    size: Annotated[int, "height and width that images are resized to", 8] = 64
    channels: Annotated[int, "of the first convolution; later ones have up to 8 times", 1] = 64
    data_dir: Annotated[Path, "TFDS's folder, which holds celeb_a", None] = TFDS_DIR
    download: Annotated[bool, "let TFDS download and prepare the data", None] = False
    out: Annotated[Path, "folder for the results", None] = Path("results/celeb_a")
    overwrite: Annotated[bool, "replace the results of an earlier sweep", None] = False


def means(found):
    """The mean of F1 and of the error, over the attributes that were learnt."""
    return {
        f"mean {kind}": float(
            np.mean([value for name, value in found.items() if name.endswith(kind)])
        )
        for kind in ("F1", "error")
    }


def suite(config):
    return image_suite.Suite(
        tasks=TASKS,
        load=load,
        make_problem=make_problem,
        make_adam=lambda config, steps_per_epoch: optax.adam(config.learning_rate),
        choose=lambda curves: image_suite.best_epoch(curves, lambda found: means(found)["mean F1"]),
        columns=means,
        higher_is_better=lambda found: {name: True for name in found if name.endswith("F1")},
    )


def main(argv=None):
    image_suite.run(suite, Config, __doc__, "celeb_a", argv)


if __name__ == "__main__":
    run_main(main, GOES_ON)
