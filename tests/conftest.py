"""Settings of the whole test run."""

import gc
import os

# The tests compile thousands of small programs, each to run it a few times.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import jax
import pytest

# A broadcast that nobody wrote is a bug in code that mixes T-sized and (T, T) arrays.
jax.config.update("jax_numpy_rank_promotion", "raise")

# JAX keeps the programs, millions of objects: walking over them took half of the run.
gc.set_threshold(1_000_000, 10, 1_000)


def pytest_collection_modifyitems(items):
    """Tests of one method, or of one wrapper, run in one process: it compiles each program once."""
    for item in items:
        callspec = getattr(item, "callspec", None)
        for argument in ("case", "name"):
            if callspec and argument in callspec.params:
                kind = callspec.params[argument]
                group = kind if isinstance(kind, str) else f"{kind.make.__code__.co_firstlineno}"
                item.add_marker(pytest.mark.xdist_group(f"{argument} {group}"))
