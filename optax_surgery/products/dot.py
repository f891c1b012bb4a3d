"""Both products as one `dot_general`, as XLA likes it best on most platforms.

The other forms leave small rests to these. All take `symmetric`, which says that `left` is `right`.
"""

import jax.numpy as jnp
from jax import lax


def gramian(left, right, scale=None, *, dtype, symmetric=False, axes=None, sharding=None):
    """The (T, T) inner products of rows, scaled or not, over the axes in this order."""
    del symmetric
    left, right = (read(rows, scale, dtype) for rows in (left, right))
    axes = tuple(range(1, left.ndim)) if axes is None else axes
    return lax.dot_general(
        left,
        right,
        ((axes, axes), ((), ())),
        precision=lax.Precision.HIGHEST,
        out_sharding=sharding,
    )


def combination(weights, rows, task_mask=None, *, sharding=None):
    """The weighted sum of rows; where some are masked, after zeros are in their place."""
    rows = rows.astype(weights.dtype)
    if task_mask is not None:
        rows = jnp.where(lax.expand_dims(task_mask, range(1, rows.ndim)), rows, 0)
    return lax.dot_general(
        weights,
        rows,
        (((0,), (0,)), ((), ())),
        precision=lax.Precision.HIGHEST,
        out_sharding=sharding,
    )


def read(rows, scale, dtype):
    """Rows in the dtype of the sums, times a factor or one for each."""
    rows = rows.astype(dtype)
    if scale is None:
        return rows
    return rows * (lax.expand_dims(scale, range(1, rows.ndim)) if scale.ndim else scale)
