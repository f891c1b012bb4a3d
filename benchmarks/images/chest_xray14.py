"""ChestX-ray14: fourteen findings in a chest X-ray, as fourteen tasks of yes or no.

The patients' split that comes with the data, with an eighth of the training patients kept to choose
the epoch by, and ResNet-50, as in the paper of the data (Wang et al. 2017); the area under the ROC
curve of each finding. The paper starts from ImageNet, here weights are random; rate, epochs and the
size of 224 x 224 are those that later papers train with.
Run `python -m benchmarks.images.chest_xray14 --data-dir FOLDER`.

The folder is as https://nihcc.app.box.com/v/ChestXray-NIHCC hands it out: `Data_Entry_2017.csv` (or
`Data_Entry_2017_v2020.csv`), `train_val_list.txt`, `test_list.txt`, and the PNG files in `images`,
or in `images_001/images`, `images_002/images`, ... as they are unpacked.
"""

import csv
import dataclasses
from pathlib import Path
from typing import Annotated

import jax.numpy as jnp
import numpy as np
import optax

import optax_surgery as surgery
from benchmarks.common.command_line import GOES_ON, run_main
from benchmarks.images import image_suite
from benchmarks.images.networks import ImageClassifier, normalise, predict, resnet50
from benchmarks.images.training import DataError, Problem, Split, read_image

TASKS = (
    "Atelectasis",
    "Cardiomegaly",
    "Effusion",
    "Infiltration",
    "Mass",
    "Nodule",
    "Pneumonia",
    "Pneumothorax",
    "Consolidation",
    "Edema",
    "Emphysema",
    "Fibrosis",
    "Pleural_Thickening",
    "Hernia",
)
NO_FINDING = "No Finding"
# Scores are counted in so many bins of the logit between -LIMIT and LIMIT: that a curve can be
# added up over batches costs it the order of two images within 1/128.
BINS, LIMIT = 4096, 16


@dataclasses.dataclass(frozen=True)
class Config:
    """The options."""

    methods: Annotated[tuple, "what to compare", image_suite.choices(len(TASKS))] = (
        image_suite.DEFAULT
    )
    seeds: Annotated[int, "networks per method, at least 2", 2] = 3
    epochs: Annotated[int, "times that every image is seen", 1] = 15
    batch_size: Annotated[int, "images per step", 1] = 32
    learning_rate: Annotated[float, "of Adam", 1e-9] = 1e-4
    size: Annotated[int, "height and width that images are resized to", 32] = 224
    channels: Annotated[int, "of the first convolution; later ones have up to 32 times", 1] = 64
    data_dir: Annotated[Path, "folder with the data", None] = Path("data/chest_xray14")
    out: Annotated[Path, "folder for the results", None] = Path("results/chest_xray14")
    overwrite: Annotated[bool, "replace the results of an earlier sweep", None] = False


# --- The data


def load(config):
    folder = config.data_dir
    labels = read_labels(folder)
    files = {path.name: path for path in folder.glob("images*/**/*.png")}
    listed = {name: read_list(folder / f"{name}_list.txt") for name in ("train_val", "test")}
    # A patient's images are told by the number before "_": none is on both sides.
    kept = [int(name.split("_")[0]) % 8 == 0 for name in listed["train_val"]]
    names = {
        "train": [name for name, out in zip(listed["train_val"], kept, strict=True) if not out],
        "validation": [name for name, out in zip(listed["train_val"], kept, strict=True) if out],
        "test": listed["test"],
    }
    for split, chosen in names.items():
        if not chosen:
            raise DataError(f"expected images for {split} in the lists in {folder}, got none")
        for name in chosen:
            if name not in labels:
                raise DataError(f"expected a line for {name} in {entries(folder)}, found none")
            if name not in files:
                raise DataError(f"expected the image {folder / 'images' / name}: download it")
    return {
        split: image_files([files[n] for n in chosen], [labels[n] for n in chosen], config.size)
        for split, chosen in names.items()
    }


def entries(folder):
    """The table of findings, under the name of either release."""
    for name in ("Data_Entry_2017_v2020.csv", "Data_Entry_2017.csv"):
        if (folder / name).exists():
            return folder / name
    raise DataError(
        f"expected {folder / 'Data_Entry_2017.csv'}, found none: download ChestX-ray14 from "
        "nihcc.app.box.com/v/ChestXray-NIHCC"
    )


def read_labels(folder):
    """{image: which findings it has}."""
    path, labels = entries(folder), {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            try:
                name, findings = row["Image Index"], row["Finding Labels"].split("|")
            except (KeyError, AttributeError):
                raise DataError(
                    f"expected columns 'Image Index' and 'Finding Labels' in {path}"
                ) from None
            if unknown := set(findings) - {*TASKS, NO_FINDING}:
                raise DataError(f"expected known findings of {name} in {path}, got {unknown}")
            labels[name] = [task in findings for task in TASKS]
    return labels


def read_list(path):
    try:
        return path.read_text().split()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error


def image_files(files, labels, size):
    labels = np.array(labels)

    def read(positions):
        images = np.stack([read_image(files[position], (size, size)) for position in positions])
        return {"image": images, "label": labels[positions]}

    return Split(len(files), read)


# --- What is learnt


def make_problem(tasks, config):
    """To learn the findings at these positions."""
    chosen = np.array(tasks)
    net = ImageClassifier(resnet50(width=config.channels), {TASKS[task]: 1 for task in tasks})

    def init(key):
        return dict(net.init(key, jnp.zeros((1, config.size, config.size, 3)), train=True))

    def losses_fn(params, variables, batch):
        logits, variables = net.apply(
            {"params": params, **variables},
            normalise(batch["image"]),
            train=True,
            mutable="batch_stats",
        )
        logits = jnp.concatenate(logits, axis=1)
        errors = optax.sigmoid_binary_cross_entropy(logits, batch["label"][:, chosen])
        return jnp.mean(errors, axis=0), variables

    def value_and_grad(params, variables, batch, key):
        return surgery.task_value_and_grad(losses_fn, has_aux=True)(params, variables, batch)

    def measure(params, variables, batch):
        logits = predict(net, params, variables, normalise(batch["image"]))
        return score_counts(jnp.concatenate(logits, axis=1), batch["label"][:, chosen])

    def metrics(sums):
        areas = 100 * areas_under_curves(sums)
        return {TASKS[task]: area for task, area in zip(tasks, areas, strict=True)}

    return Problem(init, value_and_grad, measure, metrics)


def score_counts(logits, labels):
    """Of each task how many images with a finding, and without it, score in each bin."""
    bins = jnp.clip((logits + LIMIT) * (BINS / (2 * LIMIT)), 0, BINS - 1).astype(int)
    tasks = jnp.broadcast_to(jnp.arange(logits.shape[1]), bins.shape)
    empty = jnp.zeros((logits.shape[1], BINS))
    return {
        "with": empty.at[tasks, bins].add(labels),
        "without": empty.at[tasks, bins].add(~labels),
    }


def areas_under_curves(sums):
    """How often an image with the finding scores above one without; NaN if there is none."""
    below = np.cumsum(sums["without"], axis=1) - sums["without"] / 2
    pairs = sums["with"].sum(axis=1) * sums["without"].sum(axis=1)
    above = np.sum(sums["with"] * below, axis=1)
    return np.divide(above, pairs, out=np.full(len(pairs), np.nan), where=pairs > 0)


def mean_area(metrics):
    return float(np.nanmean(np.array(list(metrics.values()), float)))


def suite(config):
    return image_suite.Suite(
        tasks=TASKS,
        load=load,
        make_problem=make_problem,
        make_adam=lambda config, steps_per_epoch: optax.adam(config.learning_rate),
        choose=lambda curves: image_suite.best_epoch(curves, mean_area),
        columns=lambda metrics: {"mean AUROC": mean_area(metrics)},
        higher_is_better=lambda metrics: dict.fromkeys(metrics, True),
    )


def main(argv=None):
    image_suite.run(suite, Config, __doc__, "chest_xray14", argv)


if __name__ == "__main__":
    run_main(main, GOES_ON)
