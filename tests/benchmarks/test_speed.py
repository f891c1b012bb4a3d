"""The benchmark of speed compares like with like, and says what it measured and left out."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_surgery as surgery
from benchmarks.systems import speed


@pytest.fixture
def small_network(monkeypatch):
    network = nn.Dense(5), jax.ShapeDtypeStruct((3, 4), jnp.float32)
    monkeypatch.setitem(speed.NETWORKS, "transformer", network)
    monkeypatch.setattr(speed, "ROUNDS", range(2, 3))
    monkeypatch.setattr(speed, "SETUP_SHAPES", ((3,), (2, 3)))
    monkeypatch.setattr(speed, "SETUP_COPIES", 2)
    monkeypatch.setattr(speed, "SETUP_REPEATS", 1)


def run(out, *options):
    small = ["--networks", "transformer", "--sizes", "1000", "--methods", "pcgrad", "aligned_mtl"]
    speed.main([*small, "--setup-tasks", "2", *options, "--out", str(out)])
    return json.loads((out / "results.json").read_text())


def test_a_small_run_writes_what_it_measured(tmp_path, capsys, monkeypatch, small_network):
    monkeypatch.setattr(speed, "torch", None)
    results = run(tmp_path, "--tasks", "2", "3", "--seconds", "3600")
    cases = {(row["leaves"], row["num_tasks"]): row for row in results["results"]}
    assert set(cases) == {("transformer", 4), ("one leaf", 2), ("one leaf", 3)}
    assert cases["transformer", 4]["size"] == 25
    for (leaves, _), row in cases.items():
        expected = {"mean / jnp.mean", "pcgrad / floor", "pcgrad / plain JAX"}
        expected |= {"training step"} if leaves == "transformer" else set()
        assert set(row["ratios"]) == expected
        assert {"optax_surgery aligned_mtl", "write", "read by sum"} <= set(row["seconds"])
        assert all(min(found) > 0 for found in row["seconds"].values())
    timed = [(row["method"], row["num_tasks"]) for row in results["setup"]]
    assert timed == [("pcgrad", 2), ("aligned_mtl", 2)]
    for row in results["setup"]:
        assert set(row["seconds"]) == {"optax_surgery", "plain JAX"}
        assert all(min(found.values()) > 0 for found in row["seconds"].values())
    assert (tmp_path / "speed.png").stat().st_size > 10_000
    said = capsys.readouterr().out
    assert "Left out, as torch or torchjd is not installed: TorchJD" in said
    assert "A training step of transformer" in said


def test_what_fits_neither_into_memory_nor_into_the_time_is_left_out(
    tmp_path, monkeypatch, small_network
):
    monkeypatch.setattr(speed, "free_memory", lambda: 30_000)
    ticks = iter(range(0, 1_000_000, 3))  # seconds, at every look at the clock
    monkeypatch.setattr(speed.time, "perf_counter", lambda: next(ticks))
    results = run(tmp_path, "--tasks", "2", "3", "--seconds", "4")
    assert [row["leaves"] for row in results["results"]] == ["transformer"]
    said = " ".join(results["findings"])
    assert "a stack may take 1/3: one leaf, T = 3, N = 1e+03." in said
    assert "would not have fitted into --seconds 4: " in said
    assert "pcgrad (one leaf, T = 2, N = 1e+03)" in said


def test_the_floor_takes_the_fastest_ways_and_ratios_are_taken_round_by_round():
    seconds = {
        "read by sum": [1.0, 2.0, 1.0],
        "read by max": [9.0, 9.0, 9.0],
        "write": [1.0, 1.0, 1.0],
        "write in place": [0.5, 0.5, 0.5],
        "optax_surgery pcgrad": [5.0, 9.0, 10.0],
        "TorchJD pcgrad": [10.0, 9.0],
        "optax_surgery mean": [1.0, 1.0, 1.0],
        "jnp.mean": [2.0, 2.0, 2.0],
        "gradients": [8.0, 8.0, 8.0],
        "step, pcgrad": [2.0, 2.0, 2.0],
        "step, mean": [0.0, 0.0, 0.0],
    }
    np.testing.assert_allclose(speed.floor(seconds), [2.5, 4.5, 2.5])
    medians = {name: found[1] for name, found in speed.ratios(seconds).items()}
    assert medians == {
        "pcgrad / TorchJD": 0.75,
        "pcgrad / floor": 2.0,
        "mean / jnp.mean": 0.5,
        "training step": 1.25,
    }


def test_the_plain_pcgrad_is_pcgrad():
    stack = {"a": jnp.array([[[1.0, 2.0]], [[-2.0, 1.0]]]), "b": jnp.array([[1.0], [-3.0]])}
    tx = surgery.pcgrad()  # of two tasks, so that there is one order only
    updates, _ = tx.update(stack, tx.init(None))
    expected = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(updates)])
    found = speed.plain_pcgrad(stack, jax.random.key(0))
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_the_surgery_by_plain_products_is_the_surgery():
    stack = {"a": jnp.array([[[1.0, 2.0]], [[-2.0, 1.0]]]), "b": jnp.array([[1.0], [-3.0]])}
    tx = surgery.pcgrad()
    updates, _ = tx.update(stack, tx.init(None))
    found = speed.surgery_by_plain_products(surgery.pcgrad, stack)
    for name, expected in updates.items():
        np.testing.assert_allclose(found[name], expected, rtol=1e-6)


@pytest.mark.parametrize("on_leaves", [False, True])
def test_torchjd_works_on_the_same_memory_and_finds_the_same(on_leaves):
    torch = pytest.importorskip("torch")
    pytest.importorskip("torchjd")
    stack = jax.random.normal(jax.random.key(0), (2, 1000))
    assert torch.from_dlpack(stack).data_ptr() == stack.unsafe_buffer_pointer()
    stack = {"a": stack, "b": stack[:, :10].reshape(2, 2, 5)} if on_leaves else stack
    for method in ("pcgrad", "aligned_mtl"):
        found = speed.in_torchjd(speed.IN_TORCHJD[method](), stack)()
        updates = speed.ours(speed.METHODS[method], stack)()
        for leaf, expected in zip(jax.tree.leaves(updates), found, strict=True):
            np.testing.assert_allclose(leaf, expected.numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "sum"], "invalid choice: 'sum'"),
        (["--tasks", "0"], "expected at least 1, got 0"),
        (["--sizes", "many"], "invalid int value: 'many'"),
        (["--seconds", "0"], "expected at least 1, got 0"),
    ],
)
def test_bad_options_are_one_line_and_status_2(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        speed.main([*arguments, "--out", str(tmp_path / "results")])
    assert error.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line
    assert not (tmp_path / "results").exists()
