"""Transformations of stacked task gradients that go before or around a surgery."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_surgery import core, trees


class MonitorState(NamedTuple):
    """State of `monitor`.

    Attributes:
      gramian: (T, T) inner products of the latest task gradients.
    """

    gramian: jax.Array


def monitor(num_tasks: int) -> optax.GradientTransformationExtraArgs:
    """Passes the task gradients through, and keeps their Gramian in its state.

    Chained before a surgery, or before `mean()`, it shows conflicts before anyone treats
    them. All of `optax_surgery.metrics` follows from the Gramian. In one `jit` with a
    surgery the Gramian is computed once.

    Args:
      num_tasks: number of tasks T.

    Returns:
      An `optax.GradientTransformationExtraArgs` from leaves (T, *shape) to the same
      leaves. Its state has one field, `gramian`, of shape (T, T), float32 (float64 for
      float64 parameters): zero before the first step, and in the rows of masked tasks.

    Raises:
      ValueError: at trace time, from `update`, if the gradients are not those of
        `num_tasks` tasks.

    Note:
      Where squares of the gradients do not fit the dtype (norms of 1e30, say) this is the
      Gramian of the gradients times a power of two, as `gradient_surgery` uses it:
      cosines and conflicts are right, norms are not.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import optax_surgery as surgery
      >>> tx = optax.chain(surgery.monitor(2), surgery.mean(), optax.sgd(0.1))
      >>> task_grads = jnp.array([[1.0, 0.0], [-1.0, 1.0]])
      >>> updates, state = tx.update(task_grads, tx.init(jnp.zeros(2)))
      >>> print(surgery.conflict_fraction(optax.tree.get(state, "gramian")))
      1.0
    """

    def init_fn(params: optax.Params) -> MonitorState:
        return MonitorState(jnp.zeros((num_tasks, num_tasks), trees.gramian_dtype(params)))

    def update_fn(
        task_updates: optax.Updates,
        state: MonitorState,
        params: optax.Params | None = None,
        *,
        task_mask: jax.Array | None = None,
        gramian: jax.Array | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, MonitorState]:
        del extra_args
        got = trees.check_task_updates(task_updates, params)
        core.check_num_tasks("monitor", num_tasks, got)
        _, gramian = core.masked_gramian(task_updates, task_mask, gramian)
        return task_updates, MonitorState(gramian.astype(state.gramian.dtype))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)  # pyright: ignore[reportArgumentType]
