"""Both products on a GPU."""

import jax.numpy as jnp
from jax import lax

from optax_surgery.products import dot, placement

# Up to this many coordinates, the Gramian is one kernel that reads them again and again.
_FEW_COORDINATES = 2048


def gramian(left, right, scale=None, *, symmetric, dtype):
    """A batch of products over short pieces of the rows, then their sum.

    To occupy a whole GPU, XLA splits a product of few rows into many, and where their length
    does not divide evenly it first copies the rows to pad them. It leaves a batch alone that is
    already large, or whose pieces are short.
    """
    if placement.may_be_partitioned(left):
        return dot.gramian(left, right, scale, dtype=dtype)
    num_tasks = left.shape[0]
    left, right = (rows.reshape(num_tasks, -1) for rows in (left, right))
    num_coordinates = left.shape[1]
    if num_coordinates <= _FEW_COORDINATES:
        return _gramian_elementwise(left, right, scale, dtype=dtype)
    length = _piece_length(num_coordinates)
    if length and scale is None:
        return _gramian_pieces(left, right, dtype=dtype, length=length)
    if num_coordinates <= 8 * _FEW_COORDINATES:
        return _gramian_elementwise(left, right, scale, dtype=dtype)

    # No divisor will do, or XLA would hold all the scaled rows: a loop over blocks that have a
    # divisor, of 16 MB, which the cache holds.
    num_blocks = max(8, left.nbytes // 2**24)
    size = num_coordinates // num_blocks // 128 * 128
    num_blocks = num_coordinates // size

    def add_block(number, total):
        block_of_left, block_of_right = (
            lax.dynamic_slice_in_dim(rows, number * size, size, axis=1) for rows in (left, right)
        )
        length = _piece_length(size)
        return total + _gramian_pieces(
            block_of_left, block_of_right, scale, dtype=dtype, length=length
        )

    # Zeros that vary over a manual mesh as the rows do.
    zeros = lax.full_like(left, 0, dtype, (num_tasks, num_tasks))
    total = lax.fori_loop(0, num_blocks, add_block, zeros)
    rest_of_left, rest_of_right = (rows[:, num_blocks * size :] for rows in (left, right))
    return total + _gramian_elementwise(rest_of_left, rest_of_right, scale, dtype=dtype)


def _piece_length(num_coordinates):
    """The greatest divisor that gives many pieces or short ones, 0 if it is very short."""
    longest = max(511, num_coordinates // 512)
    length = next(size for size in range(longest, 0, -1) if num_coordinates % size == 0)
    return length if length >= 64 else 0


def _gramian_pieces(left, right, scale=None, *, dtype, length):
    left, right = (
        dot.read(rows.reshape(rows.shape[0], -1, length), scale, dtype) for rows in (left, right)
    )
    axes = (((2,), (2,)), ((1,), (1,)))
    return jnp.sum(lax.dot_general(left, right, axes, precision=lax.Precision.HIGHEST), axis=0)


def _gramian_elementwise(left, right, scale=None, *, dtype):
    left, right = (dot.read(rows, scale, dtype) for rows in (left, right))
    return jnp.sum(left[:, None] * right[None, :], axis=2)


def combination(weights, rows, task_mask=None):
    """One product, of rows that are converted for it alone.

    Else XLA may convert bfloat16 rows once, for this and for the Gramian, and hold the result.
    """
    return dot.combination(weights, lax.optimization_barrier(rows), task_mask)
