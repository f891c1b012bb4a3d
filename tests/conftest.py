"""Settings of the whole test run."""

import gc
import importlib.metadata
import os

# The tests compile thousands of small programs, each to run it a few times. So they are compiled
# without optimisation and, where XLA still has these flags, by its older way to write loops, which
# is three times as fast, and each into one library, and not into many, which halves the rest. XLA
# ends the process at a flag that it does not know.
FLAGS = ["--xla_backend_optimization_level=0"]
if tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2])) < (0, 11):
    FLAGS += ["--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1"]
os.environ.setdefault("XLA_FLAGS", " ".join(FLAGS))

import jax  # noqa: E402
import jax.monitoring  # noqa: E402
import pytest  # noqa: E402

# A broadcast that nobody wrote is a bug in code that mixes T-sized and (T, T) arrays.
jax.config.update("jax_numpy_rank_promotion", "raise")

# JAX keeps the programs, millions of objects: walking over them took half of the run.
gc.set_threshold(1_000_000, 10, 1_000)


def group_of(item):
    """What a test shares programs with: the tests of its method or wrapper, or of its file."""
    callspec = getattr(item, "callspec", None)
    for argument in ("case", "name"):
        if callspec and argument in callspec.params:
            kind = callspec.params[argument]
            return kind if isinstance(kind, str) else f"case {kind.make.__code__.co_firstlineno}"
    return item.path.name


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items):
    """Tests of one group run in one process: programs and fixtures are made once."""
    for item in items:
        item.add_marker(pytest.mark.xdist_group(group_of(item)))


# A program takes two megabytes and a dozen of the 65,530 memory maps that Linux gives a process.
MAX_PROGRAMS = 400
programs = []


def count_program(event, duration, **kwargs):
    if event == "/jax/core/compile/backend_compile_duration":
        programs.append(event)


jax.monitoring.register_event_duration_secs_listener(count_program)


def pytest_runtest_teardown(item, nextitem):
    """Drops the programs of groups that are done, once they are many.

    Not after each group, as what all groups share would be compiled anew in each.
    """
    if nextitem is None or group_of(item) == group_of(nextitem):
        return
    if len(programs) > MAX_PROGRAMS:
        gc.unfreeze()
        jax.clear_caches()
        programs.clear()
        gc.collect()
    gc.freeze()  # JAX itself collects garbage where it looks for leaks, now not among all of these
