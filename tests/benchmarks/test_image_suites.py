"""The image suites: their metrics, sweeps that go on, whole runs on data of the right form, and
what they say to bad data. The data are written here: nothing is downloaded.
"""

import dataclasses
import functools
import json
import re
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from scipy import stats

import optax_surgery as surgery
from benchmarks import report
from benchmarks.images import (
    celeb_a,
    chest_xray14,
    cifar100,
    cityscapes,
    dense,
    image_suite,
    networks,
    nyuv2,
    office_home,
    training,
)

# --- Metrics, against independent statements of them


def test_mean_iou_leaves_out_absent_classes_and_pixels_without_a_label():
    rng = np.random.default_rng(0)
    labels = rng.integers(-1, 3, (2, 4, 5))  # class 3 does not occur
    logits = rng.normal(size=(2, 4, 5, 4)).astype(np.float32)
    logits[..., 3] = -9  # nor is it predicted
    labels[0, 0, 0] = 7  # no class
    found = dense.segmentation_metrics(jax.jit(dense.segmentation_sums)(logits, labels))
    said, known = logits.argmax(-1), (labels >= 0) & (labels < 4)
    ious = [
        np.sum((said == c) & (labels == c)) / np.sum(((said == c) & known) | (labels == c))
        for c in range(3)
    ]
    np.testing.assert_allclose(found["mIoU"], 100 * np.mean(ious), rtol=1e-6)
    accuracy = np.mean(said[known] == labels[known])
    np.testing.assert_allclose(found["pixel accuracy"], 100 * accuracy, rtol=1e-6)


def test_errors_count_pixels_with_a_truth_only():
    rng = np.random.default_rng(1)
    predicted, depth = rng.normal(size=(2, 2, 4, 5, 1)).astype(np.float32)
    depth = np.abs(depth) + 0.1
    depth[0, :2] = 0
    found = dense.depth_metrics(jax.jit(dense.depth_sums)(predicted, depth))
    known = depth != 0
    errors = np.abs(predicted - depth)[known]
    np.testing.assert_allclose(found["absolute error"], errors.mean(), rtol=1e-5)
    np.testing.assert_allclose(found["relative error"], (errors / depth[known]).mean(), rtol=1e-5)


@pytest.mark.parametrize("unknown", [3, 4], ids=["odd", "even"])
def test_angles_leave_out_pixels_without_a_normal(unknown):
    rng = np.random.default_rng(2)
    predicted, normals = rng.normal(size=(2, 1, 4, 5, 3)).astype(np.float32)
    normals = predicted + 0.4 * normals
    normals /= np.linalg.norm(normals, axis=-1, keepdims=True)
    normals.reshape(-1, 3)[:unknown] = 0
    found = dense.normals_metrics(jax.jit(dense.normals_sums)(predicted, normals))
    truth, said = normals.reshape(-1, 3)[unknown:], predicted.reshape(-1, 3)[unknown:]
    cosines = np.sum(truth * said, axis=1) / np.linalg.norm(said, axis=1)
    angles = np.degrees(np.arccos(cosines))
    expected = {"mean angle": angles.mean(), "median angle": np.median(angles)}
    expected |= {f"within {limit}": 100 * np.mean(angles < limit) for limit in (11.25, 22.5, 30.0)}
    assert found == pytest.approx(expected, rel=1e-4)


def test_images_without_any_truth_count_in_no_mean():
    @jax.jit
    def count(predicted, nothing):
        losses = [
            dense.depth_loss(predicted, nothing),
            dense.segmentation_loss(predicted, nothing[..., 0].astype(int) - 1),
            dense.instances_loss(predicted[..., :2], nothing),
        ]
        return losses, dense.normals_sums(predicted, nothing)["images"]

    losses, images = count(np.ones((2, 4, 5, 3)), np.zeros((2, 4, 5, 3)))
    np.testing.assert_array_equal(losses, 0)
    assert images == 0


def test_areas_under_curves_are_those_of_the_ranks():
    rng = np.random.default_rng(3)
    labels = rng.random((50, 3)) < 0.3
    labels[:, 2] = False
    logits = np.round(rng.normal(size=(50, 3)) + labels, 1).astype(np.float32)
    sums = jax.tree.map(np.asarray, jax.jit(chest_xray14.score_counts)(logits, labels))
    found = chest_xray14.areas_under_curves(sums)
    for task in range(2):
        yes, no = logits[labels[:, task], task], logits[~labels[:, task], task]
        area = stats.mannwhitneyu(yes, no).statistic / (len(yes) * len(no))
        np.testing.assert_allclose(found[task], area, atol=1e-6)
    assert np.isnan(found[2])


def test_f1_and_error_of_attributes():
    sums = {"hits": [3.0, 0], "false alarms": [1.0, 0], "misses": [2.0, 0], "images": [10.0, 10]}
    found = celeb_a.metrics({name: np.array(values) for name, values in sums.items()}, (4, 7))
    assert found["Bald F1"] == pytest.approx(100 * 2 * (3 / 4) * (3 / 5) / (3 / 4 + 3 / 5))
    assert found["Bald error"] == pytest.approx(30)
    assert found["Big_Nose F1"] == 0


# --- Augmentation


def test_mirrors_turn_what_points_sideways():
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.random((8, 4, 6, 3)),
        "label": rng.integers(0, 3, (8, 4, 6)),
        "normal": rng.normal(size=(8, 4, 6, 3)),
        "instance": rng.normal(size=(8, 4, 6, 3)),
    }
    found = jax.jit(dense.mirror)(batch, jax.random.key(0))
    found = jax.tree.map(np.asarray, found)
    turned = {name: field[:, :, ::-1].copy() for name, field in batch.items()}
    turned["normal"][..., 0] *= -1
    turned["instance"][..., 1] *= -1
    times = 0
    for place in range(8):
        mirrored = not np.allclose(found["image"][place], batch["image"][place])
        times += mirrored
        for name, field in (turned if mirrored else batch).items():
            np.testing.assert_allclose(found[name][place], field[place], rtol=1e-5)
    assert 0 < times < 8


def test_crops_enlarge_all_fields_alike_and_bring_them_nearer():
    rows, columns = np.meshgrid(np.arange(24.0), np.arange(36.0), indexing="ij")
    image = np.stack([rows, columns, rows + columns], axis=-1)
    examples = 12
    batch = {
        "image": np.tile(image, (examples, 1, 1, 1)),
        "label": np.tile(36 * rows + columns, (examples, 1, 1)).astype(int),
        "depth": np.ones((examples, 24, 36, 1)),
    }
    found = jax.tree.map(np.asarray, jax.jit(dense.scale_and_crop)(batch, jax.random.key(1)))
    scales = 1 / np.asarray(found["depth"], float)[:, 0, 0, 0]
    assert set(np.round(scales, 3).tolist()) == {1.0, 1.2, 1.5}
    for scale, cropped, labels in zip(scales, found["image"], found["label"], strict=True):
        # Where a pixel comes from is what it shows, up to half of a pixel.
        np.testing.assert_array_less(np.abs(labels // 36 - cropped[..., 0]), 0.501)
        np.testing.assert_array_less(np.abs(labels % 36 - cropped[..., 1]), 0.501)
        height = cropped[-1, 0, 0] - cropped[0, 0, 0] + 1
        assert height == pytest.approx(np.floor(24 / scale + 1e-4), abs=1e-3)


# --- The sweep, on a task of two numbers


@dataclasses.dataclass(frozen=True)
class Config:
    methods: Annotated[tuple, "", image_suite.choices(2)] = image_suite.DEFAULT
    seeds: Annotated[int, "", 2] = 2
    epochs: Annotated[int, "", 1] = 3
    batch_size: Annotated[int, "", 1] = 4
    learning_rate: Annotated[float, "", 1e-9] = 0.1
    out: Annotated[Path, "", None] = Path("none")
    overwrite: Annotated[bool, "", None] = False


def line_suite(config, reads=None):
    """Two lines to fit, of which one is better the higher its metric."""
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(18, 3)).astype(np.float32)
    arrays = {"image": inputs, "truth": inputs @ rng.normal(size=(3, 2)).astype(np.float32)}

    def read(positions):
        if reads is not None:
            reads.append(positions)
        return {name: array[positions] for name, array in arrays.items()}

    def make_problem(tasks, config):
        chosen = np.array(tasks)

        def losses_fn(params, variables, batch):
            errors = batch["image"] @ params["lines"] - batch["truth"]
            return jnp.mean(errors**2, axis=0)[chosen], variables

        def value_and_grad(params, variables, batch, key):
            return surgery.task_value_and_grad(losses_fn, has_aux=True)(params, variables, batch)

        return training.Problem(
            init=lambda key: {"params": {"lines": jax.random.normal(key, (3, 2))}, "seen": 0},
            value_and_grad=value_and_grad,
            measure=lambda p, v, batch: {"loss": 4 * losses_fn(p, v, batch)[0], "images": 4},
            metrics=lambda sums: {
                f"error {t}": e for t, e in zip(tasks, sums["loss"] / sums["images"], strict=True)
            },
        )

    return image_suite.Suite(
        tasks=("first", "second"),
        load=lambda config: {name: training.Split(18, read) for name in ("train", "test")},
        make_problem=make_problem,
        make_adam=lambda config, steps: optax.adam(config.learning_rate),
        choose=lambda curves: image_suite.last_epochs_mean(curves, 2),
        columns=dict,
        higher_is_better=lambda metrics: dict.fromkeys(metrics, False),
    )


def run_lines(out, *options, **changes):
    image_suite.run(
        lambda config: line_suite(config, **changes),
        Config,
        "",
        "lines",
        ["--out", str(out), *options],
    )
    return {path.name: json.loads(path.read_text()) for path in sorted((out / "runs").iterdir())}


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    out = tmp_path_factory.mktemp("suites") / "lines"
    return out, run_lines(out)


def test_every_run_has_a_file_and_the_sweep_a_picture(lines):
    out, found = lines
    methods = ("single", "sum", "pcgrad", "aligned_mtl")
    assert set(found) == {f"{method}_{seed}.json" for method in methods for seed in (0, 1)}
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    for name, one in found.items():
        results = one["results"]
        assert set(results["metrics"]) == {"error 0", "error 1"}
        assert len(results["curves"]) == (2 if name.startswith("single") else 1)
        for curves in results["curves"]:
            assert len(curves["loss"]) == len(curves["test"]) == 3
            for metric in curves["test"][0]:
                last = np.mean([curves["test"][epoch][metric] for epoch in (1, 2)])
                np.testing.assert_allclose(results["metrics"][metric], last)


def test_the_report_reads_what_a_suite_writes(lines, tmp_path):
    out, found = lines
    report.main(["--results", str(out.parent), "--out", str(tmp_path)])
    summary = json.loads((tmp_path / "lines.json").read_text())
    assert summary["metrics"] == ["error 0", "error 1"]
    by_method = {run["method"]: run["metrics"] for run in summary["runs"]}
    assert set(by_method) == set(image_suite.DEFAULT)
    last = found["pcgrad_1.json"]["results"]["metrics"]
    np.testing.assert_allclose(by_method["pcgrad"][1], [*last.values()], rtol=1e-4)


def test_a_killed_sweep_goes_on_to_the_same_figures_and_reads_no_more_than_is_missing(
    lines, tmp_path
):
    _, expected = lines
    reads = []

    class Killed(list):
        def append(self, positions):
            super().append(positions)
            if len(self) > 100:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_lines(tmp_path, reads=Killed())
    left = {path.name for path in (tmp_path / "runs").iterdir()}
    assert any(name.endswith(".unfinished") for name in left)
    assert 0 < sum(name.endswith(".json") for name in left) < 8
    found = run_lines(tmp_path, reads=reads)
    # A run of a network reads 3 epochs of 4 training and 5 test batches.
    assert len(reads) < 10 * 27 - 100 + 4 + 27 + 2 * (training.os.cpu_count() or 1)
    assert set(found) == set(expected)
    for name, one in found.items():
        assert one["results"]["metrics"] == expected[name]["results"]["metrics"]
        assert one["results"]["curves"] == expected[name]["results"]["curves"]


def test_a_finished_sweep_is_not_trained_again(lines):
    out, expected = lines
    reads = []
    assert run_lines(out, reads=reads) == expected
    assert not reads


def test_the_reference_of_a_task_is_trained_on_it_alone(lines):
    _, found = lines
    # The lines have no parameter in common: to share the network changes nothing for Adam.
    for seed in (0, 1):
        alone = found[f"single_{seed}.json"]["results"]["metrics"]
        together = found[f"sum_{seed}.json"]["results"]["metrics"]
        assert alone == pytest.approx(together, rel=1e-4)


def refused(capsys, run, *options):
    """What is said, in one line and with status 2."""
    with pytest.raises(SystemExit) as stopped:
        run([*map(str, options)])
    printed = capsys.readouterr()
    assert stopped.value.code == 2
    assert printed.out == ""
    # Before it may stand how far the run was.
    errors = [
        line for line in printed.err.splitlines() if not re.search(r": \d+ of \d+ done", line)
    ]
    assert len(errors) == 1
    return printed.err


def test_results_of_another_version_are_refused_and_left_alone(lines, capsys):
    out, found = lines
    path = out / "runs" / "sum_1.json"
    original = path.read_text()
    try:
        path.write_text(json.dumps(found["sum_1.json"] | {"format": -1}))
        changed = path.read_bytes()
        message = refused(capsys, lambda options: run_lines(out, *options))
        assert str(path) in message
        assert "format" in message
        assert path.read_bytes() == changed
    finally:
        path.write_text(original)


@pytest.mark.parametrize("content", [b"", b"\x81\xa5state", b"nonsense"])
def test_an_unfinished_run_that_cannot_be_read_is_named(content, tmp_path, capsys):
    (tmp_path / "runs").mkdir()
    path = tmp_path / "runs" / "sum_0.0.unfinished"
    path.write_bytes(content)
    message = refused(capsys, lambda options: run_lines(tmp_path, *options), "--methods", "sum")
    assert f"cannot go on from {path}" in message
    assert path.read_bytes() == content


# --- Data of the form that the suites read


def write_tfds(folder, name, version, features, splits):
    """Prepares a data set as TFDS would have, from examples that are given."""
    with tfds.core.registered.skip_registration():
        builder_class = type(
            "".join(part.capitalize() for part in name.split("_")),
            (tfds.core.GeneratorBasedBuilder,),
            {
                "__module__": __name__,
                "name": name,
                "VERSION": tfds.core.Version(version),
                "_info": lambda self: tfds.core.DatasetInfo(
                    builder=self, features=tfds.features.FeaturesDict(features)
                ),
                "_split_generators": lambda self, manager: {
                    split: iter(enumerate(examples)) for split, examples in splits.items()
                },
                "_generate_examples": lambda self: iter(()),
            },
        )
    builder_class(data_dir=folder, file_format="array_record").download_and_prepare()


def noise(rng, *shape):
    return rng.integers(0, 256, shape, np.uint8)


@pytest.fixture(scope="module", autouse=True)
def quiet():
    tfds.disable_progress_bar()


@pytest.fixture(scope="module")
def cifar_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    rng = np.random.default_rng(0)
    names = sorted(" ".join(cifar100.SUPERCLASSES.values()).split())
    coarse = {
        name: number
        for number, classes in enumerate(cifar100.SUPERCLASSES.values())
        for name in classes.split()
    }

    def examples(count):
        for number in range(count):
            label = number % 100
            yield {
                "image": Image.fromarray(noise(rng, 32, 32, 3)),
                "label": label,
                "coarse_label": coarse[names[label]],
            }

    features = {
        "image": tfds.features.Image(shape=(32, 32, 3)),
        "label": tfds.features.ClassLabel(num_classes=100),
        "coarse_label": tfds.features.ClassLabel(num_classes=20),
    }
    splits = {"train": list(examples(110)), "test": list(examples(100))}
    write_tfds(folder, "cifar100", "3.0.2", features, splits)
    return folder


@pytest.fixture(scope="module")
def celeb_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    rng = np.random.default_rng(0)
    features = {
        "image": tfds.features.Image(shape=(218, 178, 3)),
        "attributes": {task: np.bool_ for task in celeb_a.TASKS},
    }
    splits = {
        split: [
            {
                "image": Image.fromarray(noise(rng, 218, 178, 3)),
                "attributes": dict(zip(celeb_a.TASKS, rng.random(40) < 0.5, strict=True)),
            }
            for _ in range(4)
        ]
        for split in ("train", "validation", "test")
    }
    write_tfds(folder, "celeb_a", "2.1.0", features, splits)
    return folder


def write_nyuv2(folder, labels=13):
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for field in ("image", "label", "depth", "normal"):
            (folder / split / field).mkdir(parents=True)
        for number in range(2):
            normals = rng.normal(size=(64, 64, 3))
            arrays = {
                "image": rng.random((64, 64, 3)),
                "label": rng.integers(-1, labels, (64, 64)).astype(float),
                "depth": rng.random((64, 64, 1)),
                "normal": normals / np.linalg.norm(normals, axis=-1, keepdims=True),
            }
            for field, array in arrays.items():
                np.save(folder / split / field / f"{number}.npy", array)
    return folder


def write_cityscapes(folder, size=(64, 128), top=33):
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for number in range(2):
            instances = rng.integers(0, top + 1, size).astype(np.int32)
            instances[4:30, 6:50] = 26_003  # a car
            files = {
                "leftImg8bit/{}/aachen/aachen_{}_leftImg8bit.png": noise(rng, *size, 3),
                "gtFine/{}/aachen/aachen_{}_gtFine_labelIds.png": np.where(
                    instances >= 1000, instances // 1000, instances
                ).astype(np.uint8),
                "gtFine/{}/aachen/aachen_{}_gtFine_instanceIds.png": instances.astype(np.uint16),
                "disparity/{}/aachen/aachen_{}_disparity.png": rng.integers(0, 2**15, size).astype(
                    np.uint16
                ),
            }
            for pattern, array in files.items():
                path = folder / pattern.format(split, f"{number:06}_000019")
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(array).save(path)
    return folder


def write_office_home(folder):
    rng = np.random.default_rng(0)
    for style in office_home.TASKS:
        for label in range(65):
            path = folder / style / f"class_{label:02}"
            path.mkdir(parents=True)
            if label < 8 or style == "Art":
                Image.fromarray(noise(rng, 40, 36, 3)).save(path / "00001.jpg")
    return folder


def write_chest_xray14(folder):
    rng = np.random.default_rng(0)
    names = [f"{patient:08}_{visit:03}.png" for patient in range(5, 12) for visit in (0, 1)]
    findings = [task for task in (*chest_xray14.TASKS, "No Finding")]
    lines = ["Image Index,Finding Labels,Patient ID"]
    (folder / "images_001" / "images").mkdir(parents=True)
    for number, name in enumerate(names):
        has = (
            "|".join(findings[number % 15 : number % 15 + 2]) if number % 15 < 13 else findings[14]
        )
        lines.append(f"{name},{has},{int(name[:8])}")
        Image.fromarray(noise(rng, 70, 70)).save(folder / "images_001" / "images" / name)
    (folder / "Data_Entry_2017.csv").write_text("\n".join(lines) + "\n")
    (folder / "train_val_list.txt").write_text("\n".join(names[:10]))
    (folder / "test_list.txt").write_text("\n".join(names[10:]))
    return folder


# --- Whole runs: a step or two of a small network


SMALL = ("--seeds", "2", "--epochs", "1", "--methods", "pcgrad")


def run_script(script, folder, out, *options):
    script.main([*SMALL, "--data-dir", str(folder), "--out", str(out), *options])
    runs = [json.loads(path.read_text())["results"] for path in sorted((out / "runs").iterdir())]
    assert [one["seed"] for one in runs] == [0, 1]
    assert np.isfinite(runs[0]["curves"][0]["loss"]).all()
    assert runs[0]["metrics"] != runs[1]["metrics"] or script is cifar100
    return runs[0]["metrics"]


@pytest.mark.parametrize("network", ["plain", "routed"])
def test_cifar100_runs(network, cifar_folder, tmp_path):
    options = ("--batch-size", "3", "--channels", "2", "--features", "4", "--blocks", "2")
    found = run_script(cifar100, cifar_folder, tmp_path, *options, "--network", network)
    assert set(found) == set(cifar100.TASKS)
    # Five images a task to test with.
    assert set(np.round(np.array([*found.values()]) / 20, 6) % 1) == {0}


def test_celeb_a_runs(celeb_folder, tmp_path):
    options = ("--batch-size", "4", "--channels", "2", "--size", "16")
    found = run_script(celeb_a, celeb_folder, tmp_path, *options)
    assert set(found) == {f"{task} {kind}" for task in celeb_a.TASKS for kind in ("F1", "error")}


def test_nyuv2_runs(tmp_path):
    folder = write_nyuv2(tmp_path / "data")
    options = ("--channels", "1", "--network", "segnet")
    found = run_script(nyuv2, folder, tmp_path / "out", *options)
    assert list(found)[:4] == ["mIoU", "pixel accuracy", "absolute error", "relative error"]
    assert list(found)[4:] == [
        "mean angle",
        "median angle",
        "within 11.25",
        "within 22.5",
        "within 30.0",
    ]


def test_cityscapes_runs(tmp_path):
    folder = write_cityscapes(tmp_path / "data")
    options = ("--channels", "1", "--network", "segnet", "--height", "32", "--batch-size", "2")
    found = run_script(cityscapes, folder, tmp_path / "out", *options)
    assert list(found) == ["mIoU", "pixel accuracy", "absolute error", "relative error"]


def test_office_home_runs(tmp_path):
    folder = write_office_home(tmp_path / "data")
    options = ("--channels", "1", "--size", "32", "--batch-size", "20")
    found = run_script(office_home, folder, tmp_path / "out", *options)
    assert list(found) == list(office_home.TASKS)


def test_chest_xray14_runs(tmp_path, monkeypatch):
    folder = write_chest_xray14(tmp_path / "data")
    # Fifty layers take long to compile; how many there are is tested with the networks.
    small = functools.partial(networks.ResNet, networks.BasicBlock, (1, 1, 1, 1))
    monkeypatch.setattr(chest_xray14, "resnet50", small)
    options = ("--channels", "1", "--size", "32", "--batch-size", "4")
    found = run_script(chest_xray14, folder, tmp_path / "out", *options)
    assert list(found) == list(chest_xray14.TASKS)


def test_the_other_protocol_of_cityscapes_and_networks_of_nyuv2_learn_from_what_is_read(
    tmp_path, monkeypatch
):
    small = functools.partial(networks.ResNet, networks.Bottleneck, (1, 1, 1, 1))
    monkeypatch.setattr(networks, "resnet50", small)
    folders = {
        cityscapes: write_cityscapes(tmp_path / "cityscapes"),
        nyuv2: write_nyuv2(tmp_path / "nyuv2"),
    }
    for script, changes in (
        (cityscapes, {"protocol": "three", "height": 64}),
        (nyuv2, {"network": "segnet_mtan"}),
        (nyuv2, {"network": "pspnet"}),
    ):
        config = script.Config(data_dir=folders[script], channels=2, **changes)
        suite = script.suite(config)
        problem = suite.make_problem(tuple(range(len(suite.tasks))), config)
        batch = suite.load(config)["train"].read(np.arange(2))
        # Traced only: to compile them would take a minute.
        variables = jax.eval_shape(problem.init, jax.random.key(0))
        params = variables.pop("params")
        (losses, new), grads = jax.eval_shape(
            problem.value_and_grad, params, variables, batch, jax.random.key(0)
        )
        assert losses.shape == (len(suite.tasks),)
        assert jax.tree.map(jnp.shape, new) == jax.tree.map(jnp.shape, variables)
        assert [leaf.shape for leaf in jax.tree.leaves(grads)] == [
            (*losses.shape, *leaf.shape) for leaf in jax.tree.leaves(params)
        ]
        assert jax.eval_shape(problem.measure, params, variables, batch)


def test_instances_are_ways_from_their_centres():
    instances = np.full((16, 32), 7)
    instances[2:7, 10:21] = 24_001
    found = cityscapes.offsets(instances, (16, 32))
    assert found[..., 2].sum() == 5 * 11
    np.testing.assert_array_equal(found[2, 10], [-2, -5, 1])
    np.testing.assert_array_equal(found[4, 15], [0, 0, 1])
    np.testing.assert_array_equal(found[0, 0], 0)
    # Sampled, they are still in pixels of the original image.
    assert cityscapes.offsets(instances, (4, 8)).min() < -1


def test_classes_of_cityscapes():
    assert cityscapes.CLASS_OF[[7, 33, 26, 0, 9]].tolist() == [0, 18, 13, -1, -1]
    assert cityscapes.CATEGORY_OF[[7, 33, 26, 17, 23, 0]].tolist() == [0, 6, 6, 2, 4, -1]


def test_office_home_splits_share_no_image(tmp_path):
    config = office_home.Config(data_dir=write_office_home(tmp_path), size=32)
    splits = office_home.load(config)
    assert [splits[name].length for name in ("train", "validation", "test")] == [39, 13, 13]
    art = {
        name: {split.read(np.array([n]))["image"][0, 0].tobytes() for n in range(split.length)}
        for name, split in splits.items()
    }
    assert sum(map(len, art.values())) == len(set().union(*art.values())) == 65
    # A smaller style comes again, which is not counted.
    counts = splits["test"].read(np.arange(13))["counts"].sum(axis=0)
    assert counts.tolist() == [13, 2, 2, 2]


def test_patients_of_chest_xray14_are_on_one_side(tmp_path):
    config = chest_xray14.Config(data_dir=write_chest_xray14(tmp_path), size=32)
    splits = chest_xray14.load(config)
    # Patients 5 to 9, of whom 8 is kept, and 10 and 11.
    assert {name: split.length for name, split in splits.items()} == {
        "train": 8,
        "validation": 2,
        "test": 4,
    }
    assert splits["train"].read(np.arange(1))["label"][0].nonzero()[0].tolist() == [0, 1]


# --- Bad data


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    "script",
    [cifar100, celeb_a, nyuv2, cityscapes, office_home, chest_xray14],
    ids=lambda script: script.__name__.rpartition(".")[2],
)
def test_a_missing_folder_is_named_with_what_belongs_there(script, tmp_path, capsys):
    out, folder = tmp_path / "out", tmp_path / "none"
    message = refused(capsys, script.main, "--data-dir", folder, "--out", out)
    assert str(folder) in message
    assert "download" in message
    assert not [path for path in out.rglob("*") if path.is_file()]


BAD = {
    "nyuv2: a truncated array": (
        nyuv2,
        write_nyuv2,
        lambda folder: truncate(folder / "train" / "depth" / "1.npy"),
        "train/depth/1.npy",
    ),
    "nyuv2: labels out of range": (
        nyuv2,
        lambda folder: write_nyuv2(folder, labels=20),
        lambda folder: None,
        "expected labels from -1 (none) to 12",
    ),
    "nyuv2: a missing file": (
        nyuv2,
        write_nyuv2,
        lambda folder: (folder / "val" / "normal" / "0.npy").unlink(),
        "val/normal/0.npy",
    ),
    "nyuv2: another shape": (
        nyuv2,
        write_nyuv2,
        lambda folder: np.save(folder / "train" / "depth" / "1.npy", np.zeros((64, 32, 1))),
        "expected an array of shape (64, 64, 1)",
    ),
    "cityscapes: a truncated image": (
        cityscapes,
        write_cityscapes,
        lambda folder: truncate(
            folder / "leftImg8bit/train/aachen/aachen_000001_000019_leftImg8bit.png"
        ),
        "aachen_000001_000019_leftImg8bit.png",
    ),
    "cityscapes: labels out of range": (
        cityscapes,
        lambda folder: write_cityscapes(folder, top=40),
        lambda folder: None,
        "expected labels from 0 to 33",
    ),
    "cityscapes: a missing file": (
        cityscapes,
        write_cityscapes,
        lambda folder: (
            folder / "disparity/val/aachen/aachen_000000_000019_disparity.png"
        ).unlink(),
        "aachen_000000_000019_disparity.png",
    ),
    "office_home: no image": (
        office_home,
        write_office_home,
        lambda folder: [path.write_text("no image") for path in folder.glob("Product/*/00001.jpg")],
        "Product/class_0",
    ),
    "office_home: a missing class": (
        office_home,
        write_office_home,
        lambda folder: (folder / "Clipart" / "class_64").rmdir(),
        "expected 65 folders",
    ),
    "chest_xray14: a truncated image": (
        chest_xray14,
        write_chest_xray14,
        lambda folder: truncate(folder / "images_001/images/00000005_000.png"),
        "00000005_000.png",
    ),
    "chest_xray14: an unknown finding": (
        chest_xray14,
        write_chest_xray14,
        lambda folder: (folder / "Data_Entry_2017.csv").write_text(
            "Image Index,Finding Labels\n00000005_000.png,Cough\n"
        ),
        "Cough",
    ),
    "chest_xray14: a missing image": (
        chest_xray14,
        write_chest_xray14,
        lambda folder: (folder / "images_001/images/00000010_000.png").unlink(),
        "00000010_000.png",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_data_are_named_in_one_line(case, tmp_path, capsys, monkeypatch):
    script, write, spoil, message = BAD[case]
    folder, out = tmp_path / "data", tmp_path / "out"
    folder.mkdir()
    write(folder)
    spoil(folder)

    def read_all(problem, tx, splits, *args):
        """What training would read, without the training."""
        for split in splits.values():
            for _ in training.batches(split, np.arange(split.length), 2):
                pass

    monkeypatch.setattr(image_suite, "train", read_all)
    options = ("--methods", "sum", "--data-dir", folder, "--out", out)
    assert message in refused(capsys, script.main, *options)
    assert not [path for path in out.rglob("*") if path.is_file()]


def test_truncated_tfds_files_are_named(cifar_folder, tmp_path, capsys):
    copy = tmp_path / "cifar100" / "3.0.2"
    copy.mkdir(parents=True)
    for path in (cifar_folder / "cifar100" / "3.0.2").iterdir():
        content = path.read_bytes()
        short = content[: len(content) // 2] if "train" in path.name else content
        (copy / path.name).write_bytes(short)
    message = refused(capsys, cifar100.main, "--data-dir", tmp_path, "--out", tmp_path / "out")
    assert str(tmp_path) in message


def test_superclasses_that_contradict_the_classes_are_refused():
    source = [{"image": np.zeros((32, 32, 3), np.uint8), "label": 0, "coarse_label": 3}]
    with pytest.raises(training.DataError, match="expected superclass 4 for class 0, got 3"):
        cifar100.by_task(source, Path("folder"))


def test_routes_that_are_rewarded_more_than_usual_become_likelier():
    variables = {"policies": jnp.full((2, 2, 4), 0.25), "rewards": jnp.zeros(2)}
    routes = jnp.array([[0, 1], [2, 3]])
    new = jax.jit(cifar100.learn_routes)(variables, routes, jnp.array([0.9, 0.1]))
    policies = np.asarray(new["policies"])
    np.testing.assert_allclose(policies.sum(axis=-1), 1, rtol=1e-5)
    assert policies[0, 0, 0] > 0.25
    assert policies[0, 1, 1] > 0.25
    assert policies[1, 0, 2] < 0.25
    assert policies[1, 1, 3] < 0.25
    np.testing.assert_allclose(new["rewards"], [0.08, -0.08], rtol=1e-5)
