"""What NYUv2 and Cityscapes share: losses and metrics of every pixel, and augmentation.

Images are (batch, height, width, channels), labels (batch, height, width). Pixels without a truth
count in nothing: a label outside the classes, a depth of zero, a normal of zero.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.scipy.ndimage import map_coordinates

import optax_surgery as surgery
from benchmarks.images.networks import PSPNet, SegNet, predict
from benchmarks.images.training import DataError, Problem, Split, read_array

SCALES = (1.0, 1.2, 1.5)  # of the random crops
# The share of normals within so many degrees.
WITHIN = (11.25, 22.5, 30.0)


# --- Losses


def masked_mean(values, mask):
    return jnp.sum(jnp.where(mask, values, 0)) / jnp.maximum(jnp.sum(mask), 1)


def segmentation_loss(logits, labels):
    """Cross-entropy of the pixels that have a label."""
    mask = (labels >= 0) & (labels < logits.shape[-1])
    labels = jnp.where(mask, labels, 0)
    return masked_mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels), mask)


def depth_loss(predicted, depth):
    """Mean absolute error. Both are (batch, height, width, 1)."""
    return masked_mean(jnp.abs(predicted - depth), depth != 0)


def normals_loss(predicted, normals):
    """One minus the mean cosine. Predictions of any length are taken for directions."""
    cosines = jnp.sum(unit(predicted) * normals, axis=-1)
    return 1 - masked_mean(cosines, jnp.any(normals != 0, axis=-1))


def instances_loss(predicted, instance):
    """Mean absolute error of the way from an instance's centre. The truth's last is a mask."""
    return masked_mean(jnp.mean(jnp.abs(predicted - instance[..., :2]), -1), instance[..., 2] > 0)


def unit(vectors):
    return vectors * jax.lax.rsqrt(jnp.sum(vectors**2, axis=-1, keepdims=True) + 1e-12)


# --- Metrics. Of a batch: sums, which are added up over batches.
#
# As in the authors' code the confusion matrix is that of all images, while errors are averaged
# over the pixels of a batch, medians taken within a batch, and both averaged over batches, here
# weighted by their images, so that a smaller last batch does not count as much as a full one.


def segmentation_sums(logits, labels):
    """Pixels by true class and predicted class."""
    classes = logits.shape[-1]
    mask = (labels >= 0) & (labels < classes)
    cells = jnp.where(mask, labels, 0) * classes + jnp.argmax(logits, axis=-1)
    counts = jnp.zeros(classes**2).at[cells.ravel()].add(mask.ravel())
    return {"confusion": counts.reshape(classes, classes)}


def segmentation_metrics(sums):
    """Mean intersection over union, of the classes that occur, and pixel accuracy, in %."""
    confusion = np.asarray(sums["confusion"], np.float64)
    right = np.diag(confusion)
    union = confusion.sum(axis=0) + confusion.sum(axis=1) - right
    occurs = union > 0
    return {
        "mIoU": 100 * np.mean(right[occurs] / union[occurs]) if occurs.any() else np.nan,
        "pixel accuracy": 100 * right.sum() / max(confusion.sum(), 1),
    }


def batch_sums(values, mask):
    """Values of a batch times its images; nothing where no pixel of it has a truth."""
    images = jnp.where(jnp.any(mask), mask.shape[0], 0)
    return {name: images * value for name, value in values.items()} | {"images": images}


def batch_means(sums):
    return {
        name: value / max(sums["images"], 1) for name, value in sums.items() if name != "images"
    }


def depth_sums(predicted, depth):
    mask = depth != 0
    errors = jnp.abs(predicted - depth)
    relative = errors / jnp.where(mask, depth, 1)
    means = {"absolute": masked_mean(errors, mask), "relative": masked_mean(relative, mask)}
    return batch_sums(means, mask)


def depth_metrics(sums):
    """Mean absolute error, and mean error relative to the truth."""
    means = batch_means(sums)
    return {"absolute error": means["absolute"], "relative error": means["relative"]}


def disparity_sums(predicted, disparity):
    mask = disparity != 0
    return batch_sums({"squared": masked_mean((predicted - disparity) ** 2, mask)}, mask)


def instances_sums(predicted, instance):
    return batch_sums({"error": instances_loss(predicted, instance)}, instance[..., 2] > 0)


def normals_sums(predicted, normals):
    mask = jnp.any(normals != 0, axis=-1)
    cosines = jnp.clip(jnp.sum(unit(predicted) * normals, axis=-1), -1, 1)
    angles = jnp.degrees(jnp.arccos(cosines))
    in_order = jnp.sort(jnp.where(mask, angles, jnp.inf), axis=None)
    valid = jnp.sum(mask)
    middle = jnp.stack([jnp.maximum(valid - 1, 0) // 2, valid // 2])
    values = {
        "mean": masked_mean(angles, mask),
        "median": jnp.where(valid, jnp.mean(in_order[middle]), 0),
        **{f"within {limit}": masked_mean(angles < limit, mask) for limit in WITHIN},
    }
    return batch_sums(values, mask)


def normals_metrics(sums):
    """Mean and median angle in degrees, and the share of pixels within some angles, in %."""
    means = batch_means(sums)
    return {
        "mean angle": means["mean"],
        "median angle": means["median"],
        **{f"within {limit}": 100 * means[f"within {limit}"] for limit in WITHIN},
    }


HIGHER_IS_BETTER = {
    **dict.fromkeys(("mIoU", "pixel accuracy", *(f"within {limit}" for limit in WITHIN)), True),
    **dict.fromkeys(("absolute error", "relative error", "mean angle", "median angle"), False),
    **dict.fromkeys(("instance error", "squared error"), False),
}


# --- Tasks, by name, and what a network learns of them


class Task(NamedTuple):
    field: str  # of a batch, with the truth
    loss: Callable[..., jax.Array]  # (predictions, truth) -> scalar
    sums: Callable[..., dict]  # (predictions, truth) -> sums
    metrics: Callable[[dict], dict[str, float]]


TASKS = {
    "segmentation": Task("label", segmentation_loss, segmentation_sums, segmentation_metrics),
    "depth": Task("depth", depth_loss, depth_sums, depth_metrics),
    "normals": Task("normal", normals_loss, normals_sums, normals_metrics),
    "instances": Task(
        "instance",
        instances_loss,
        instances_sums,
        lambda sums: {"instance error": batch_means(sums)["error"]},
    ),
    "disparity": Task(
        "depth",
        depth_loss,
        disparity_sums,
        lambda sums: {"squared error": batch_means(sums)["squared"]},
    ),
}
NETWORKS = ("segnet_mtan", "segnet", "pspnet")


def make_network(name, outputs, channels):
    if name == "pspnet":
        return PSPNet(outputs, width=channels)
    return SegNet(outputs, attention=name == "segnet_mtan", width=channels)


def make_problem(net, tasks, augmentations):
    """To learn these tasks from batches with an "image" and the tasks' fields.

    Statistics of batch normalisation are kept once, not once a task.
    """

    def init(key):
        # Of the smallest size that the networks take: their parameters depend on none.
        return dict(net.init(key, jnp.zeros((1, 64, 64, 3)), train=True))

    def losses_fn(params, variables, batch):
        outputs, variables = net.apply(
            {"params": params, **variables}, batch["image"], train=True, mutable="batch_stats"
        )
        losses = [TASKS[task].loss(outputs[task], batch[TASKS[task].field]) for task in tasks]
        return jnp.stack(losses), variables

    def value_and_grad(params, variables, batch, key):
        for number, augment in enumerate(augmentations):
            batch = augment(batch, jax.random.fold_in(key, number))
        return surgery.task_value_and_grad(losses_fn, has_aux=True)(params, variables, batch)

    def measure(params, variables, batch):
        outputs = predict(net, params, variables, batch["image"])
        return {t: TASKS[t].sums(outputs[t], batch[TASKS[t].field]) for t in tasks}

    def metrics(sums):
        return {k: v for task in tasks for k, v in TASKS[task].metrics(sums[task]).items()}

    return Problem(init, value_and_grad, measure, metrics)


def halved_adam(config, steps_per_epoch):
    halved = {config.halve_at * steps_per_epoch: 0.5}
    return optax.adam(optax.piecewise_constant_schedule(config.learning_rate, halved))


# --- Augmentation. A batch has "image", "label", and some of "depth", "normal" and "instance".


def scale_and_crop(batch, key):
    """Enlarges a random part of each image to the size of the whole, by one of `SCALES`.

    Enlarging brings what the image shows nearer: depths are divided by the scale.
    """
    return jax.vmap(_scale_and_crop)(batch, jax.random.split(key, len(batch["image"])))


def _scale_and_crop(example, key):
    scale_key, *corner_keys = jax.random.split(key, 3)
    scale = jax.random.choice(scale_key, jnp.array(SCALES))
    places = []
    for size, corner_key in zip(example["image"].shape[:2], corner_keys, strict=True):
        part = jnp.floor(size / scale)
        corner = jnp.floor(jax.random.uniform(corner_key) * (size - part + 1))
        places.append(corner + jnp.linspace(0, 1, size) * (part - 1))
    grid = jnp.meshgrid(*places, indexing="ij")
    nearest = tuple(jnp.round(axis).astype(int) for axis in grid)

    def smooth(field):
        channels = [map_coordinates(field[..., c], grid, order=1) for c in range(field.shape[-1])]
        return jnp.stack(channels, axis=-1)

    # Labels and depths are not averaged: there is nothing between a wall and what stands before.
    cropped = {name: field[nearest] for name, field in example.items()}
    cropped["image"] = smooth(example["image"])
    if "depth" in cropped:
        cropped["depth"] = cropped["depth"] / scale
    if "normal" in cropped:
        known = jnp.any(cropped["normal"] != 0, axis=-1, keepdims=True)
        cropped["normal"] = jnp.where(known, unit(smooth(example["normal"])), 0)
    return cropped


def mirror(batch, key):
    """Mirrors half of the images, and with them what points to the left or right."""
    mirrored = jax.random.bernoulli(key, shape=(len(batch["image"]),))
    signs = {"normal": (-1, 1, 1), "instance": (1, -1, 1)}
    signs = {name: jnp.array(sign).reshape(1, 1, 1, 3) for name, sign in signs.items()}

    def choose(name, field):
        turned = field[:, :, ::-1] * signs.get(name, 1)
        return jnp.where(mirrored.reshape(-1, *[1] * (field.ndim - 1)), turned, field)

    return {name: choose(name, field) for name, field in batch.items()}


# --- Data as the MTAN authors prepared them: a folder a field, a numbered `.npy` file an image


def numpy_folder(folder, fields, num_classes):
    """A split from `folder/field/0.npy`, ...; `fields` has each field's trailing shape.

    Reads "image", "label", "depth", "normal" by the last part of the field's name before `_`:
    "label_7" is a label. All images are to have one size, in multiples of 32.
    """
    names = {field: field.split("_")[0] for field in fields}
    numbers = sorted(int(path.stem) for path in (folder / "image").glob("*.npy"))
    if not numbers:
        raise DataError(
            f"expected the prepared set in {folder}, with {', '.join(fields)} / 0.npy, 1.npy, "
            f"..., found no {folder / 'image' / '0.npy'}: download it where the docstring says"
        )
    for field in fields:
        for number in numbers:
            if not (folder / field / f"{number}.npy").exists():
                raise DataError(f"expected {folder / field / f'{number}.npy'} beside its image")
    height, width, _ = read_array(folder / "image" / f"{numbers[0]}.npy", (None, None, 3)).shape
    if height % 32 or width % 32:
        raise DataError(
            f"expected a height and width in multiples of 32 in {folder}, got {height} x {width}"
        )

    def read_one(number):
        example = {}
        for field, trailing in fields.items():
            path = folder / field / f"{number}.npy"
            array = read_array(path, (height, width, *trailing))
            if names[field] == "label":
                check_labels(array, num_classes, path)
            dtype = np.int32 if names[field] == "label" else np.float32
            example[names[field]] = array.astype(dtype)
        return example

    def read(positions):
        examples = [read_one(numbers[position]) for position in positions]
        return {name: np.stack([one[name] for one in examples]) for name in examples[0]}

    return Split(len(numbers), read)


def check_labels(labels, num_classes, path):
    if labels.min() < -1 or labels.max() >= num_classes:
        raise DataError(
            f"expected labels from -1 (none) to {num_classes - 1} in {path}, got "
            f"{labels.min():g} to {labels.max():g}"
        )
