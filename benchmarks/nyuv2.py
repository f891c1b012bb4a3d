"""NYUv2: every pixel's class, depth and surface normal, from one image of a room.

The protocol that papers have shared since MTAN: SegNet-MTAN, 200 epochs of batches of 2, Adam with
1e-4, halved at epoch 100, random scale and mirror, and the mean of the last 10 epochs on the test
set. `--network pspnet` is Aligned-MTL's other network, which there starts from ImageNet and here
from random weights. Run `python -m benchmarks.nyuv2`.

The data are the set that the MTAN authors prepared (their repository says where it lies): folders
`train` and `val`, each with `image`, `label`, `depth` and `normal`, each with `0.npy`, `1.npy`, ...
"""

import dataclasses
from pathlib import Path
from typing import Annotated

import jax.numpy as jnp
import numpy as np
import optax

import optax_surgery as surgery
from benchmarks import dense
from benchmarks.networks import PSPNet, SegNet
from benchmarks.training import DataError, Problem, Split, read_array

OUTPUTS = {"segmentation": 13, "depth": 1, "normals": 3}
TASKS = tuple(OUTPUTS)
FIELDS = {"image": (3,), "label": (), "depth": (1,), "normal": (3,)}
LOSSES = {
    "segmentation": lambda outputs, batch: dense.segmentation_loss(outputs, batch["label"]),
    "depth": lambda outputs, batch: dense.depth_loss(outputs, batch["depth"]),
    "normals": lambda outputs, batch: dense.normals_loss(outputs, batch["normal"]),
}
SUMS = {
    "segmentation": lambda outputs, batch: dense.segmentation_sums(outputs, batch["label"]),
    "depth": lambda outputs, batch: dense.depth_sums(outputs, batch["depth"]),
    "normals": lambda outputs, batch: dense.normals_sums(outputs, batch["normal"]),
}
METRICS = {
    "segmentation": dense.segmentation_metrics,
    "depth": dense.depth_metrics,
    "normals": dense.normals_metrics,
}


def load(config):
    folders = {"train": config.data_dir / "train", "test": config.data_dir / "val"}
    return {
        name: dense.numpy_folder(folder, FIELDS, OUTPUTS["segmentation"])
        for name, folder in folders.items()
    }
