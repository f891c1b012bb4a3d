"""Settings of the whole test run."""

import jax

# A broadcast that nobody wrote is a bug in code that mixes T-sized and (T, T) arrays.
jax.config.update("jax_numpy_rank_promotion", "raise")
