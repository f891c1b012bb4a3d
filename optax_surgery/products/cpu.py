"""Both products on a CPU."""

import functools
import math
import operator

import jax.numpy as jnp
from jax import lax

from optax_surgery.products import dot, placement

# Up to so many tasks, Gramians and combinations are sums of vectors; beyond, products of matrices.
_FEW_FOR_GRAMIAN, _FEW_FOR_COMBINATION = 128, 16
# Where some are masked, the sum goes through the tasks in groups of so many.
_GROUP_SIZE = 8
# The Gramian goes through the rows in blocks of up to so many numbers, and in so many blocks at
# least, of which each task has enough to be worth a loop.
_BLOCK_SIZE, _LEAST_BLOCKS, _LEAST_COORDINATES = 2**18, 16, 2**15
# In blocks of few tasks, a chunk has so many terms, which are added up in registers, by so many
# lanes, as vector instructions need, and a tile of the Gramian so many rows and columns. With 8 or
# 9 terms, XLA 0.10.2 writes no vector instructions; with 16, the registers do not hold those of a
# row. The innermost cache holds a chunk of the columns of a tile.
_TERMS, _LANES, _TILE = 12, 8, (16, 64)


def gramian(left, right, scale=None, *, symmetric, dtype):
    """Reads the rows block by block, so that a block is in the caches for all its products.

    XLA hands matrix products to libraries that first bring both factors into another layout,
    which for few rows costs as much as the product, and that read all of a long row before the
    next. For few tasks, elementwise products become one loop of loads and multiply-adds.
    """
    num_tasks = left.shape[0]
    left, right = (rows.reshape(num_tasks, -1) for rows in (left, right))
    num_coordinates = left.shape[1]
    if num_coordinates < _LEAST_COORDINATES:
        return dot.gramian(left, right, scale, dtype=dtype)
    size = num_coordinates // max(_LEAST_BLOCKS, math.ceil(left.size / _BLOCK_SIZE))
    few = num_tasks <= _FEW_FOR_GRAMIAN
    if few:
        # An odd number of chunks, else those of all rows may be at addresses a power of two apart,
        # and of such a cache holds but a few.
        size = ((size // (_TERMS * _LANES) - 1) | 1) * _TERMS * _LANES
    num_blocks = num_coordinates // size

    def block(rows, number):
        part = lax.dynamic_slice_in_dim(rows, number * size, size, axis=1)
        return dot.read(part, scale, dtype)

    def zeros(*shape):
        return lax.full_like(left, 0, dtype, shape)  # varies over a manual mesh as the rows do

    if few:
        num_chunks = size // (_TERMS * _LANES)
        total = _sum_of_vector_products(
            left, right, block, zeros, num_blocks, num_chunks, symmetric
        )
    else:
        total = lax.fori_loop(
            0,
            num_blocks,
            lambda number, total: (
                total + dot.gramian(block(left, number), block(right, number), dtype=dtype)
            ),
            zeros(num_tasks, num_tasks),
        )
    rest_of_left, rest_of_right = (rows[:, num_blocks * size :] for rows in (left, right))
    return total + dot.gramian(rest_of_left, rest_of_right, scale, dtype=dtype)


def _sum_of_vector_products(left, right, block, zeros, num_blocks, num_chunks, symmetric):
    num_tasks = left.shape[0]
    # Of a symmetric Gramian the tiles about the upper triangle.
    height, width = _TILE
    tiles = [
        (slice(top, top + height), slice(edge, edge + width))
        for top in range(0, num_tasks, height)
        for edge in range(top if symmetric else 0, num_tasks, width)
    ]

    def chunks(rows, number):
        split = block(rows, number).reshape(num_tasks, num_chunks, _TERMS, _LANES)
        return split.swapaxes(0, 1)

    def tile_terms(chunks, tasks, axis):
        """Those terms of some tasks. By `lax`, as tracing hundreds of `[...]` takes a second."""
        chunks = lax.slice_in_dim(chunks, tasks.start, min(tasks.stop, num_tasks), axis=1)
        chunks = lax.expand_dims(chunks, (axis,))
        return [lax.index_in_dim(chunks, term, axis=3, keepdims=False) for term in range(_TERMS)]

    def add_block(number, sums):
        lefts = chunks(left, number)
        rights = lefts if symmetric else chunks(right, number)
        # The terms before the total: a long sum of short ones rounds less.
        return [
            total
            + functools.reduce(
                lax.add, map(operator.mul, tile_terms(lefts, i, 2), tile_terms(rights, k, 1))
            )
            for (i, k), total in zip(tiles, sums, strict=True)
        ]

    task = range(num_tasks)
    sums = [zeros(num_chunks, len(task[i]), len(task[k]), _LANES) for i, k in tiles]
    sums = lax.fori_loop(0, num_blocks, add_block, sums)
    total = zeros(num_tasks, num_tasks)
    for tile, part in zip(tiles, sums, strict=True):
        total = total.at[tile].set(jnp.sum(part, axis=(0, 3)))
    return jnp.triu(total) + jnp.triu(total, 1).T if symmetric else total


def combination(weights, rows, task_mask=None):
    """For few tasks a sum of vectors, which XLA makes one loop of loads and multiply-adds."""
    num_tasks = rows.shape[0]
    if num_tasks <= _FEW_FOR_COMBINATION:
        return functools.reduce(jnp.add, _terms(weights, rows, task_mask))
    # A loop over tasks that the partitioner shards would gather them.
    if task_mask is None or placement.may_be_partitioned(rows):
        return dot.combination(weights, rows, task_mask)

    # A product of matrices would first copy the rows without those that are masked.
    def add_group(first, total, size=_GROUP_SIZE):
        group = (
            lax.dynamic_slice_in_dim(array, first, size) for array in (weights, rows, task_mask)
        )
        return functools.reduce(jnp.add, _terms(*group), total)

    num_groups, rest = divmod(num_tasks, _GROUP_SIZE)
    total = lax.full_like(rows[0], 0, weights.dtype)
    total = lax.fori_loop(
        0, num_groups, lambda number, total: add_group(number * _GROUP_SIZE, total), total
    )
    return add_group(num_tasks - rest, total, rest) if rest else total


def _terms(weights, rows, task_mask):
    terms = [weight * row.astype(weights.dtype) for weight, row in zip(weights, rows, strict=True)]
    if task_mask is None:
        return terms
    return [jnp.where(active, term, 0) for active, term in zip(task_mask, terms, strict=True)]
