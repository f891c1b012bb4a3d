"""Cityscapes: what is where in a street, how far away, and which instance it belongs to.

By default the protocol of MTAN: seven categories and disparity at 128 x 256, SegNet-MTAN, 200
epochs of batches of 8, Adam with 1e-4, halved at epoch 100, random scale and mirror, and the mean
of the last 10 epochs on the validation images. With `--protocol three --height 256 --epochs 100` it
is that of Aligned-MTL: 19 classes, instances (for every pixel, the way from the centre of its
instance) and disparity, predicted 8 times smaller than the image by PSPNet, with mirrored images.
There PSPNet starts from ImageNet and images are rotated too; here its weights are random, and
images stay upright. Run `python -m benchmarks.images.cityscapes --data-dir FOLDER`.

The folder is as https://www.cityscapes-dataset.com hands it out: `leftImg8bit`, `gtFine` and
`disparity` (packages leftImg8bit_trainvaltest, gtFine_trainvaltest, disparity_trainvaltest), each
with `train` and `val`, and a folder for each city. For the default protocol it may be the smaller
set that the MTAN authors prepared (https://github.com/lorenmt/mtan): `train` and `val`, each with
`image`, `label_7` and `depth`, each with `0.npy`, `1.npy`, ... Published absolute errors are in the
units of that set, which nobody states; of the original files a disparity is in 128 pixels.
"""

import dataclasses
from pathlib import Path
from typing import Annotated

import numpy as np
from PIL import Image

from benchmarks.common.command_line import GOES_ON, run_main
from benchmarks.images import dense, image_suite
from benchmarks.images.networks import PSPNet
from benchmarks.images.training import DataError, Split, read_image

OUTPUTS = {
    "two": {"segmentation": 7, "depth": 1},
    "three": {"segmentation": 19, "instances": 2, "disparity": 1},
}
# Of the set that the MTAN authors prepared.
FIELDS = {"image": (3,), "label_7": (), "depth": (1,)}
# The labels that count in the evaluation, in the order of their 19 classes, by category.
CATEGORIES = {
    "flat": (7, 8),
    "construction": (11, 12, 13),
    "object": (17, 19, 20),
    "nature": (21, 22),
    "sky": (23,),
    "human": (24, 25),
    "vehicle": (26, 27, 28, 31, 32, 33),
}
LABELS = 34
NEAREST = Image.Resampling.NEAREST
# 19 classes or 7 categories: by label, -1 where it counts in none.
CLASS_OF = np.full(LABELS, -1, np.int32)
CLASS_OF[[label for labels in CATEGORIES.values() for label in labels]] = np.arange(19)
CATEGORY_OF = np.full(LABELS, -1, np.int32)
for position, found in enumerate(CATEGORIES.values()):
    CATEGORY_OF[list(found)] = position


@dataclasses.dataclass(frozen=True)
class Config:
    """The options. The defaults are the published protocol of two tasks."""

    methods: Annotated[tuple, "what to compare", image_suite.choices(2)] = image_suite.DEFAULT
    protocol: Annotated[str, "number of tasks", (*OUTPUTS,)] = "two"
    network: Annotated[str, "of the protocol of two tasks", dense.NETWORKS] = "segnet_mtan"
    seeds: Annotated[int, "networks per method, at least 2", 2] = 3
    epochs: Annotated[int, "times that every image is seen", 1] = 200
    halve_at: Annotated[int, "epoch at which the learning rate is halved", 1] = 100
    batch_size: Annotated[int, "images per step", 1] = 8
    learning_rate: Annotated[float, "of Adam", 1e-9] = 1e-4
    height: Annotated[int, "of the images, half of their width, in multiples of 32", 32] = 128
    channels: Annotated[int, "of the first convolution; later ones have up to 8 times", 1] = 64
    data_dir: Annotated[Path, "folder with the data", None] = Path("data/cityscapes")
    out: Annotated[Path, "folder for the results", None] = Path("results/cityscapes")
    overwrite: Annotated[bool, "replace the results of an earlier sweep", None] = False


# --- The data


def load(config):
    classes = OUTPUTS[config.protocol]["segmentation"]
    splits = {"train": config.data_dir / "train", "test": config.data_dir / "val"}
    if config.protocol == "two" and splits["train"].exists():
        return {n: dense.numpy_folder(folder, FIELDS, classes) for n, folder in splits.items()}
    if config.height % 32:
        raise DataError(f"expected --height in multiples of 32, got {config.height}")
    return {n: original(config.data_dir, folder.name, config) for n, folder in splits.items()}


def original(folder, split, config):
    """The files as Cityscapes hands them out, read at the size that they are needed in."""
    images = sorted((folder / "leftImg8bit" / split).glob("*/*_leftImg8bit.png"))
    if not images:
        raise DataError(
            f"expected images {folder / 'leftImg8bit' / split}/*/*_leftImg8bit.png, found none: "
            "download leftImg8bit, gtFine and disparity from www.cityscapes-dataset.com"
        )
    examples = []
    for image in images:
        stem, city = image.name.removesuffix("leftImg8bit.png"), image.parent.name
        labels = folder / "gtFine" / split / city / f"{stem}gtFine_labelIds.png"
        instances = folder / "gtFine" / split / city / f"{stem}gtFine_instanceIds.png"
        disparities = folder / "disparity" / split / city / f"{stem}disparity.png"
        examples.append((image, labels, disparities, instances))
        for path in examples[-1]:
            if not path.exists():
                raise DataError(f"expected {path} beside {image}: download what is missing")
    read_one = read_two if config.protocol == "two" else read_three

    def read(positions):
        found = [read_one(config.height, *examples[position]) for position in positions]
        return {name: np.stack([one[name] for one in found]) for name in found[0]}

    return Split(len(examples), read)


def read_two(height, image, labels, disparities, _):
    size = height, 2 * height
    return {
        "image": read_image(image, size) / np.float32(255),
        "label": CATEGORY_OF[read_labels(labels, size)],
        "depth": read_disparity(disparities, size) / np.float32(256 * 128),
    }


def read_three(height, image, labels, disparities, instances):
    small = height // 8, height // 4
    return {
        "image": read_image(image, (height, 2 * height)) / np.float32(255),
        "label": CLASS_OF[read_labels(labels, small)],
        # The deviation by which the published protocol divides.
        "depth": read_disparity(disparities, small) / np.float32(2729.068),
        "instance": offsets(read_image(instances, mode="I"), small),
    }


def read_labels(path, size):
    labels = read_image(path, size, "L", NEAREST)
    labels[labels == 255] = 0  # a licence plate, whose number -1 does not fit into the file
    if labels.max() >= LABELS:
        raise DataError(f"expected labels from 0 to {LABELS - 1} in {path}, got {labels.max()}")
    return labels


def read_disparity(path, size):
    """In 1/256 of a pixel of the original image; 0 where it is not known."""
    stored = read_image(path, size, "I", NEAREST)
    return np.maximum(stored - 1, 0)[..., None].astype(np.float32)


def offsets(instances, size):
    """(*size, 3): how far below and to the right of its instance's centre a pixel is, in pixels
    of the original image, and whether it belongs to an instance at all.
    """
    rows, columns = np.indices(instances.shape)
    numbers, members = np.unique(instances, return_inverse=True)
    members = members.reshape(instances.shape)
    pixels = np.bincount(members.ravel())
    sampled = np.ix_(
        *(
            (np.arange(n) * 2 + 1) * full // (2 * n)
            for n, full in zip(size, instances.shape, strict=True)
        )
    )
    ways = [
        (places - (np.bincount(members.ravel(), places.ravel()) / pixels)[members])[sampled]
        for places in (rows, columns)
    ]
    # Smaller numbers are those of a class: road, or a crowd that nobody told apart.
    has_instance = (numbers >= 1000)[members][sampled]
    return np.stack([*(way * has_instance for way in ways), has_instance], -1).astype(np.float32)


# --- What is learnt


def make_problem(tasks, config):
    every = OUTPUTS[config.protocol]
    outputs = {task: every[task] for task in [list(every)[position] for position in tasks]}
    if config.protocol == "two":
        net = dense.make_network(config.network, outputs, config.channels)
        return dense.make_problem(net, outputs, (dense.scale_and_crop, dense.mirror))
    net = PSPNet(outputs, upsampled=1, width=config.channels)
    return dense.make_problem(net, outputs, (dense.mirror,))


def main(argv=None):
    image_suite.run(suite, Config, __doc__, "cityscapes", argv)


def suite(config):
    return image_suite.Suite(
        tasks=tuple(OUTPUTS[config.protocol]),
        load=load,
        make_problem=make_problem,
        make_adam=dense.halved_adam,
        choose=image_suite.last_epochs_mean,
        columns=dict,
        higher_is_better=lambda metrics: {name: dense.HIGHER_IS_BETTER[name] for name in metrics},
    )


if __name__ == "__main__":
    run_main(main, GOES_ON)
