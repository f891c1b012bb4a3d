"""The methods that the benchmarks compare: by name, each with the settings of its paper.

A method is made from the number of tasks. Learning rates are no part of it: every benchmark tunes
them, by the same grid for each method. Left out are methods that need something of their own: a
primary task (`pcd`), a residual (`learning_rate_annealing`), scores against single-task networks
(`pivrg`, which is `fairgrad` without them), two independent batches (`modo`, `sdmgrad`).
"""

from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import optax_surgery as surgery

WINDOW = 25  # steps that stand for an epoch, as in the code of Nash-MTL and Aligned-MTL

METHODS: dict[str, Callable[[int], surgery.Surgery]] = {
    "sum": lambda num_tasks: surgery.sum(),
    # The sum of the losses with weights that are tuned together with the learning rate.
    "linear": lambda num_tasks: surgery.sum(),
    # From the Gramian
    "pcgrad": lambda num_tasks: surgery.pcgrad(),
    "gradvac": surgery.gradvac,
    "aligned_mtl": lambda num_tasks: surgery.aligned_mtl(),
    "mgda": lambda num_tasks: surgery.mgda(),
    "mgda_normalised": lambda num_tasks: surgery.mgda("loss+"),
    "cagrad": lambda num_tasks: surgery.cagrad(),
    "imtl_g": lambda num_tasks: surgery.imtl_g(),
    "upgrad": lambda num_tasks: surgery.upgrad(),
    "dualproj": lambda num_tasks: surgery.dualproj(),
    "conflict_free": lambda num_tasks: surgery.conflict_free(),
    "nash_mtl": lambda num_tasks: surgery.nash_mtl(),
    "fairgrad": lambda num_tasks: surgery.fairgrad(),
    "gradops": lambda num_tasks: surgery.gradops(),
    "ntkmtl": lambda num_tasks: surgery.ntkmtl(),
    "inverse_norms": surgery.inverse_norms,
    "fedmgda": lambda num_tasks: surgery.fedmgda(),
    "geometric_median": lambda num_tasks: surgery.geometric_median(),
    "krum": lambda num_tasks: surgery.krum(num_byzantine=0, num_selected=num_tasks - 1),
    "cr_mogm": lambda num_tasks: surgery.cr_mogm(surgery.mgda(), num_tasks),
    # From the losses
    "random_weighting": lambda num_tasks: surgery.random_weighting(),
    "uncertainty_weighting": surgery.uncertainty_weighting,
    "imtl_l": surgery.imtl_l,
    "imtl": surgery.imtl,
    "dwa": lambda num_tasks: surgery.dwa(num_tasks, WINDOW),
    "softadapt": surgery.softadapt,
    "relobralo": surgery.relobralo,
    "gls": lambda num_tasks: surgery.gls(),
    "scale_invariant": lambda num_tasks: surgery.scale_invariant(),
    # Log losses as in the authors' code for networks, without their nadir.
    "stch": lambda num_tasks: surgery.stch(log_losses=True),
    "famo": surgery.famo,
    "go4align": lambda num_tasks: surgery.go4align(num_tasks, num_groups=2),
    "gradnorm": surgery.gradnorm,
    # From the coordinates, or with an average per task
    "graddrop": lambda num_tasks: surgery.graddrop(),
    "trimmed_mean": lambda num_tasks: surgery.trimmed_mean(1),
    "coordinate_median": lambda num_tasks: surgery.coordinate_median(),
    "excess_mtl": surgery.excess_mtl,
    # The least of the authors' decays. Of 0.9, their default, Adam averages what lags already: in
    # runs of some hundred steps that costs more than all else gives (Adult: 82.96 and 83.63 AUC).
    "db_mtl": lambda num_tasks: surgery.db_mtl(num_tasks, decay=0.1),
    "moco": surgery.moco,
    # The authors' threshold for networks; 0.1 is that of their toy problems.
    "sam_gs": lambda num_tasks: surgery.sam_gs(num_tasks, threshold=0.7),
    "momentum_conflict_free": surgery.momentum_conflict_free,
}
# With fewer tasks they have nothing to leave out, or are the mean.
NEED_THREE_TASKS = ("krum", "trimmed_mean", "coordinate_median", "geometric_median")


def names(num_tasks: int) -> tuple[str, ...]:
    """The methods that apply to so many tasks."""
    return tuple(name for name in METHODS if num_tasks > 2 or name not in NEED_THREE_TASKS)


def behaviour(chosen: Iterable[str]) -> dict[str, np.ndarray]:
    """What each method makes of the same gradients, so that results tell which code made them.

    Args:
      chosen: names. Those that are no method here, such as `single`, are left out.

    Returns:
      {name: (3, 5) updates of three steps with four tasks}, which stay as they are, but for
      rounding, until the method or its settings change.
    """
    rng, num_tasks = np.random.default_rng(0), 4
    task_grads = jnp.asarray(rng.normal(size=(3, num_tasks, 5)), jnp.float32)
    losses = jnp.asarray(rng.uniform(0.5, 2.0, (3, num_tasks)), jnp.float32)

    def updates(name):
        tx = METHODS[name](num_tasks)

        def step(state, given):
            return tx.update(given[0], state, losses=given[1])[::-1]

        return jax.jit(lambda: lax.scan(step, tx.init(jnp.zeros(5)), (task_grads, losses))[1])()

    return {name: np.asarray(updates(name)) for name in chosen if name in METHODS}


def loss_weights(method: str, num_tasks: int, count: int) -> np.ndarray:
    """(candidates, T) weights of the losses to choose from: ones, but for `linear`.

    There they are equal at first, and then drawn uniformly from all that add up to T. The same
    draws are made every time.
    """
    equal = np.ones((1, num_tasks), np.float32)
    if method != "linear":
        return equal
    drawn = np.random.default_rng(0).dirichlet(np.ones(num_tasks), count - 1)
    return np.concatenate([equal, num_tasks * drawn]).astype(np.float32)
