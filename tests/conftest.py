"""Settings of the whole test run."""

import os

# The tests compile thousands of small programs, each to run it a few times.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import jax

# A broadcast that nobody wrote is a bug in code that mixes T-sized and (T, T) arrays.
jax.config.update("jax_numpy_rank_promotion", "raise")
