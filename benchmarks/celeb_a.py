"""CelebA: forty attributes of a face, as forty tasks of yes or no.

The nine-layer network and the protocol of FAMO and FairGrad: 15 epochs, batches of 256, Adam with
a rate of 3e-4, images of 64 x 64; the F1 of each attribute on the test set, at the epoch whose mean
F1 on the validation set is best. The mean error, which the PCGrad paper reports, stands beside it.
Run `python -m benchmarks.celeb_a`.
"""

import dataclasses
from pathlib import Path
from typing import Annotated

import jax.numpy as jnp
import numpy as np
import optax
from PIL import Image

import optax_surgery as surgery
from benchmarks.networks import CelebANet
from benchmarks.training import Problem, Split, read_record, tfds_sources

TASKS = tuple(
    """
    5_o_Clock_Shadow Arched_Eyebrows Attractive Bags_Under_Eyes Bald Bangs Big_Lips Big_Nose
    Black_Hair Blond_Hair Blurry Brown_Hair Bushy_Eyebrows Chubby Double_Chin Eyeglasses Goatee
    Gray_Hair Heavy_Makeup High_Cheekbones Male Mouth_Slightly_Open Mustache Narrow_Eyes No_Beard
    Oval_Face Pale_Skin Pointy_Nose Receding_Hairline Rosy_Cheeks Sideburns Smiling Straight_Hair
    Wavy_Hair Wearing_Earrings Wearing_Hat Wearing_Lipstick Wearing_Necklace Wearing_Necktie Young
    """.split()
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
        return net.init(key, jnp.zeros((1, config.size, config.size, 3)), train=True)

    def losses_fn(params, variables, batch):
        logits, variables = net.apply(
            {"params": params, **variables}, batch["image"] / 255, train=True, mutable="batch_stats"
        )
        errors = optax.sigmoid_binary_cross_entropy(logits, batch["label"][:, chosen])
        return jnp.mean(errors, axis=0), variables

    def value_and_grad(params, variables, batch, key):
        return surgery.task_value_and_grad(losses_fn, has_aux=True)(params, variables, batch)

    def measure(params, variables, batch):
        logits = net.apply({"params": params, **variables}, batch["image"] / 255, train=False)
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
