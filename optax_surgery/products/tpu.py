"""The Gramian on a TPU."""

import math

from optax_surgery.products import dot


def gramian(left, right, scale=None, *, symmetric, dtype):
    """Contracts the axis along the lanes last, else XLA first copies the rows into that order.

    A TPU keeps an array in tiles of 8 sublanes x 128 lanes. Of the last two axes the last one lies
    along the lanes, unless the other way fills the tiles better.
    """
    del symmetric
    axes = list(range(1, left.ndim))
    if len(axes) > 1:
        num_tasks, *_, rows, columns = left.shape
        if _tiled(num_tasks, columns, rows) < _tiled(num_tasks, rows, columns):
            axes[-2:] = axes[:-3:-1]
    return dot.gramian(left, right, scale, dtype=dtype, axes=tuple(axes))


def _tiled(num_tasks, others, lanes):
    """What matrices take in a TPU's memory, if tasks or others lie along the sublanes."""
    rows = min(num_tasks * _sublanes(others), others * _sublanes(num_tasks))
    return rows * math.ceil(lanes / 128)


def _sublanes(number):
    """Rounded up to whole tiles; those of less than 8 sublanes have a power of two of them."""
    return math.ceil(number / 8) * 8 if number > 4 else 1 << (number - 1).bit_length()
