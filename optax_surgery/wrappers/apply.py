"""After the optimiser: `apply_updates`."""

import optax

from optax_surgery import checks


def apply_updates(params: optax.Params, updates: optax.Updates) -> optax.Params:
    """`optax.apply_updates`, which refuses updates that are still stacked.

    Without a surgery, optimisers take stacked gradients as they are, and the parameters silently
    become `(T, *shape)` when the updates are added to them.

    Args:
      params: pytree of parameters.
      updates: pytree of updates of the same shapes.

    Returns:
      The new parameters.

    Raises:
      ValueError: at trace time, if an update has not the shape of its parameter.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import optax_surgery as surgery
      >>> params, tx = {"w": jnp.zeros(2)}, optax.sgd(0.1)
      >>> updates, state = tx.update({"w": jnp.ones((3, 2))}, tx.init(params))
      >>> surgery.apply_updates(params, updates)
      Traceback (most recent call last):
      ...
      ValueError: Expected an update of shape (2,), got shape (3, 2) at 'w'. Combine the ...
    """
    checks.updates(updates, params)
    return optax.apply_updates(params, updates)
