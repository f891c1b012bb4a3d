"""What the image suites share: reading batches ahead, and one run of training and evaluation.

A script says what its data are (`Split`) and what is to be learnt (`Problem`). A run keeps the
state of every finished epoch, so that one that is killed goes on from there, with the same
batches and the same figures.
"""

import collections
import functools
import json
import logging
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tensorflow_datasets as tfds
from PIL import Image

import optax_surgery as surgery
from benchmarks.common.command_line import write
from benchmarks.common.study import stamp
from benchmarks.images.networks import shared
from optax_surgery.flax import SurgeryTrainState

TFDS_DIR = Path(os.environ.get("TFDS_DATA_DIR") or Path.home() / "tensorflow_datasets")


class DataError(Exception):
    """What is wrong with the data: one line that names the file or folder."""


class Split(NamedTuple):
    """Examples that may be too many to hold: how many, and how to read some of them."""

    length: int
    read: Callable[[np.ndarray], dict[str, np.ndarray]]  # positions -> batch


class Problem(NamedTuple):
    """What is to be learnt, in pure functions.

    `variables` is what the network keeps beside its parameters, such as the statistics of batch
    normalisation: one copy for all tasks.
    """

    init: Callable[[jax.Array], dict[str, Any]]  # key -> {"params": ..., ...}
    # (params, variables, batch, key) -> ((losses, variables), task_grads)
    value_and_grad: Callable[..., Any]
    # (params, variables, batch) -> tree of sums, which are added up over batches
    measure: Callable[..., Any]
    metrics: Callable[[Any], dict[str, float]]  # of the sums of a whole split


class State(SurgeryTrainState):
    variables: Any


# --- Reading


def read_image(path, size=None, mode="RGB", resample=Image.Resampling.BILINEAR):
    """An image file as an array of this height and width."""
    try:
        with Image.open(path) as image:
            image = image.convert(mode)
            return np.array(image if size is None else image.resize(size[::-1], resample))
    # What Pillow raises for a missing, a truncated, and a damaged file.
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"cannot read the image {path}: {error}") from error


def read_array(path, shape):
    """A `.npy` file. `None` in the shape stands for any size."""
    try:
        array = np.load(path)
    except (OSError, EOFError, ValueError) as error:
        raise DataError(f"cannot read the array {path}: {error}") from error
    fits = len(array.shape) == len(shape) and all(
        wanted in (None, size) for size, wanted in zip(array.shape, shape, strict=True)
    )
    if not fits:
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise DataError(f"expected an array of shape ({wanted}) in {path}, got {array.shape}")
    return array


def tfds_sources(name, data_dir, download, splits):
    """Splits of a TFDS data set, without TensorFlow. Nothing is downloaded unless asked for."""
    if download:
        tfds.builder(name, data_dir=data_dir, file_format="array_record").download_and_prepare()
    # A builder made by its name would ask TFDS's server about the data set.
    prepared = sorted(data_dir.glob(f"{name}/*/dataset_info.json"))
    if not prepared:
        raise DataError(
            f"expected {name} as TFDS prepares it, in array_record, in {data_dir / name}, found "
            "none: copy it there, or add --download (which needs TensorFlow)"
        )
    folder = prepared[-1].parent
    logging.getLogger("absl").setLevel(logging.ERROR)  # it advises OpenCV for decoding
    try:
        return data_sources(tfds.builder_from_directory(folder), splits)
    except Exception as error:  # of parsers of JSON, protocol buffers and array_record
        message = " ".join(str(error).split())
        raise DataError(f"cannot read {name} in {folder}: {message}") from error


def data_sources(builder, splits):
    return {split: builder.as_data_source(split) for split in splits}


def read_record(source, position, folder):
    """One example of a TFDS source."""
    try:
        return source[position]
    except Exception as error:  # of array_record's C++ and of image decoders
        message = " ".join(str(error).split())
        raise DataError(f"cannot read example {position} in {folder}: {message}") from error


def batches(split, order, batch_size):
    """The batches in this order. Threads read some ahead, while the device computes."""
    chunks = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as executor:
        pending = collections.deque()
        for chunk in chunks:
            pending.append(executor.submit(split.read, chunk))
            if len(pending) > 2 * (os.cpu_count() or 1):
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


# --- One run


def make_optimiser(method, num_tasks, adam):
    """Surgery where the tasks meet, then Adam. Its head has each task to itself."""
    # Chained, as only then it also watches methods on coordinates, which have no weights to show.
    operated = surgery.Surgery(*optax.chain(surgery.monitor(num_tasks), method))
    return optax.chain(surgery.on_shared(operated, shared), adam)


@functools.partial(jax.jit, static_argnames="problem", donate_argnames="state")
def train_step(problem, state, batch, key):
    (losses, variables), task_grads = problem.value_and_grad(
        state.params, state.variables, batch, key
    )
    state = state.apply_gradients(grads=task_grads, losses=losses, variables=variables)
    return state, losses


@functools.partial(jax.jit, static_argnames="problem")
def measure(problem, params, variables, batch):
    return problem.measure(params, variables, batch)


def evaluate(problem, state, split, batch_size):
    sums = None
    for batch in batches(split, np.arange(split.length), batch_size):
        found = measure(problem, state.params, state.variables, batch)
        # In float64: float32 counts no pixels beyond 2**24.
        found = jax.tree.map(lambda array: np.asarray(array, np.float64), found)
        sums = found if sums is None else jax.tree.map(np.add, sums, found)
    return {name: float(value) for name, value in problem.metrics(sums).items()}


def train(problem, tx, splits, config, seed, checkpoint, advance):
    """Trains on `splits["train"]` and evaluates on all others after every epoch.

    Args:
      problem, tx, splits: what, by which rule, and from which data to learn.
      config: says `epochs` and `batch_size`.
      seed: of the parameters, the order of the examples, and augmentation.
      checkpoint: the file that keeps the state after every epoch. Remove it when all is saved.
      advance: is called after every epoch.

    Returns:
      {"loss": per epoch the mean of each task's loss, and for each other split: per epoch a
      dict of metrics}.
    """
    key = jax.random.key(seed)
    variables = jax.jit(problem.init)(jax.random.fold_in(key, 0))
    params = variables.pop("params")
    state = State.create(apply_fn=None, params=params, tx=tx, variables=variables)
    curves = {name: [] for name in ("loss", *splits) if name != "train"}
    if config.overwrite:
        checkpoint.unlink(missing_ok=True)
    if checkpoint.exists():
        state, curves = restore(checkpoint, state, config)
    train_split = splits["train"]
    batch_size = min(config.batch_size, train_split.length)
    # A smaller last batch would be compiled anew; shuffled, its examples come in other epochs.
    used = train_split.length - train_split.length % batch_size
    for _ in curves["loss"]:
        advance()
    for epoch in range(len(curves["loss"]), config.epochs):
        order = np.random.default_rng([seed, epoch]).permutation(train_split.length)[:used]
        epoch_key = jax.random.fold_in(key, epoch + 1)
        seen = []
        for step, batch in enumerate(batches(train_split, order, batch_size)):
            step_key = jax.random.fold_in(epoch_key, step)
            state, losses = train_step(problem, state, batch, step_key)
            seen.append(losses)
        curves["loss"].append(np.mean(jnp.stack(seen), axis=0).tolist())
        for name, split in splits.items():
            if name != "train":
                curves[name].append(evaluate(problem, state, split, batch_size))
        notes = json.dumps({"made with": stamp(config), "curves": curves})
        saved = flax.serialization.to_bytes({"state": state, "notes": notes})
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        write({checkpoint: saved})
        advance()
    return curves


def restore(checkpoint, state, config):
    """The state and the curves that a killed run left."""
    advice = "remove it to begin this run anew, or give --overwrite"
    try:
        empty = {"state": state, "notes": ""}
        saved = flax.serialization.from_bytes(empty, checkpoint.read_bytes())
        notes = json.loads(saved["notes"])
    except Exception as error:  # of msgpack, Flax and JSON, which have no common base
        reason = " ".join(str(error).split())[:80]
        raise DataError(f"cannot go on from {checkpoint} ({reason}): {advice}") from error
    if notes["made with"] != stamp(config):
        raise DataError(f"{checkpoint} was left by a run with other options or versions: {advice}")
    return saved["state"], notes["curves"]


def in_memory(arrays):
    return Split(
        len(arrays["image"]), lambda positions: {n: a[positions] for n, a in arrays.items()}
    )


def steps_per_epoch(split, batch_size):
    return split.length // min(batch_size, split.length)


def side_by_side(splits):
    """One split out of one for each task: an example is an image of every task.

    Where a task has fewer images than another they come again; "counts" says whether an image is
    there for the first time. Arrays are (batch, tasks, ...).
    """
    lengths = np.array([split.length for split in splits])

    def read(positions):
        found = [split.read(positions % split.length) for split in splits]
        batch = {name: np.stack([one[name] for one in found], axis=1) for name in found[0]}
        return batch | {"counts": positions[:, None] < lengths}

    return Split(lengths.max(), read)
