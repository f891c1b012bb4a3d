"""The two products that read the stacked gradients of one leaf.

What XLA makes of one `dot_general` is ideal on some platforms and for some shapes, and takes
30 times as long as one read of the rows on others. So there is one form per platform, chosen
when the program is lowered. All give the same sums, at the highest precision, and none makes
a copy of the rows.
"""

import collections
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

# Up to so many tasks, Gramians and combinations on a CPU are sums of vectors; beyond, products of
# matrices.
_FEW_FOR_GRAMIAN, _FEW_FOR_COMBINATION = 128, 16
# Where some are masked, the sum goes through the tasks in groups of so many.
_GROUP_SIZE = 8
# The Gramian on a CPU goes through the rows in blocks of up to so many numbers, and in so many
# blocks at least, of which each task has enough to be worth a loop.
_BLOCK_SIZE, _LEAST_BLOCKS, _LEAST_COORDINATES = 2**18, 16, 2**15
# In blocks of few tasks, a chunk has so many terms, which are added up in registers, by so many
# lanes, as vector instructions need, and a tile of the Gramian so many rows and columns. With 8 or
# 9 terms, XLA 0.10.2 writes no vector instructions; with 16, the registers do not hold those of a
# row. The innermost cache holds a chunk of the columns of a tile.
_TERMS, _LANES, _TILE = 12, 8, (16, 64)
# Up to this many coordinates, the Gramian on a GPU is one kernel that reads them again and again.
_FEW_COORDINATES = 2048


def gramian_of_leaves(
    leaves: list[tuple[jax.Array, ...]], *, dtype: jnp.dtype, scale: jax.Array | None = None
) -> jax.Array:
    """The inner products of rows, over all coordinates of all leaves.

    Args:
      leaves: for each leaf the rows (T, *shape), or two such stacks of which to multiply each
        row of the first with each of the second; of any floating dtype.
      dtype: of the sums, float32 or float64.
      scale: () a factor for all rows, (T,) one for each, or None.

    Returns:
      (T, T).
    """
    # On explicit axes every device takes the form of its own shards, and there is one
    # all-reduce for all leaves that are sharded over the same axes.
    alike = collections.defaultdict(list)
    for stacks in leaves:
        alike[_sharded_over(stacks[0])].append(stacks)

    def sum_of_gramians(leaves, scale):
        return functools.reduce(
            jnp.add, [_leaf_gramian(stacks, scale, dtype=dtype) for stacks in leaves]
        )

    sums = []
    for (mesh, axes), some in alike.items():
        if not axes:
            sums.append(sum_of_gramians(some, scale))
            continue
        specs = jax.tree.map(lambda rows: jax.typeof(rows).sharding.spec, some)
        in_shards = jax.shard_map(
            lambda *operands, axes=axes: lax.psum(sum_of_gramians(*operands), axes),
            mesh=mesh,
            in_specs=(specs, PartitionSpec()),
            out_specs=PartitionSpec(),
            axis_names=set(axes),
        )
        sums.append(in_shards(some, scale))
    return functools.reduce(jnp.add, sums)


# Both products are programs of their own, so that leaves of one shape are traced and lowered once.


@jax.jit
def leaf_combination(
    weights: jax.Array, rows: jax.Array, *, task_mask: jax.Array | None = None
) -> jax.Array:
    """The weighted sum of the rows of one leaf.

    Args:
      weights: (T,) of the dtype of the sums, float32 or float64.
      rows: (T, *shape), of any floating dtype.
      task_mask: (T,) bool, False for rows to leave out, whatever they hold; or None.

    Returns:
      (*shape), sum_i weights_i rows_i.
    """
    operands = (weights, rows) if task_mask is None else (weights, rows, task_mask)
    sharding = jax.typeof(rows).sharding
    if _is_sharded_by_task(sharding):
        result = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
        return _combination_dot(*operands, sharding=result)
    return lax.platform_dependent(
        *operands,
        cpu=_combination_cpu,
        cuda=_combination_gpu,
        default=_combination_dot,
    )


@functools.partial(jax.jit, static_argnames="dtype")
def _leaf_gramian(stacks, scale, *, dtype):
    left, right = stacks[0], stacks[-1]
    operands = (left, right) if scale is None else (left, right, scale)
    sharding = jax.typeof(left).sharding
    if _is_sharded_by_task(sharding):  # what to multiply is not on one device yet
        replicated = NamedSharding(sharding.mesh, PartitionSpec(None, None))
        return _gramian_dot(*operands, dtype=dtype, sharding=replicated)
    # A loop over blocks of a leaf that the partitioner shards would gather it.
    cpu = _gramian_dot if may_be_partitioned(left) else _gramian_cpu
    forms = {"cpu": cpu, "tpu": _gramian_tpu, "cuda": _gramian_gpu, "default": _gramian_dot}
    symmetric = len(stacks) == 1
    forms = {
        name: functools.partial(form, dtype=dtype, symmetric=symmetric)
        for name, form in forms.items()
    }
    return lax.platform_dependent(*operands, **forms)


def _gramian_dot(left, right, scale=None, *, dtype, symmetric=False, axes=None, sharding=None):
    del symmetric
    left, right = (_read(rows, scale, dtype) for rows in (left, right))
    axes = tuple(range(1, left.ndim)) if axes is None else axes
    return lax.dot_general(
        left,
        right,
        ((axes, axes), ((), ())),
        precision=lax.Precision.HIGHEST,
        out_sharding=sharding,
    )


def _gramian_tpu(left, right, scale=None, *, symmetric, dtype):
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
    return _gramian_dot(left, right, scale, dtype=dtype, axes=tuple(axes))


def _tiled(num_tasks, others, lanes):
    """What matrices take in a TPU's memory, if tasks or others lie along the sublanes."""
    rows = min(num_tasks * _sublanes(others), others * _sublanes(num_tasks))
    return rows * math.ceil(lanes / 128)


def _sublanes(number):
    """Rounded up to whole tiles; those of less than 8 sublanes have a power of two of them."""
    return math.ceil(number / 8) * 8 if number > 4 else 1 << (number - 1).bit_length()


def _gramian_gpu(left, right, scale=None, *, symmetric, dtype):
    """A batch of products over short pieces of the rows, then their sum.

    To occupy a whole GPU, XLA splits a product of few rows into many, and where their length
    does not divide evenly it first copies the rows to pad them. It leaves a batch alone that is
    already large, or whose pieces are short.
    """
    if may_be_partitioned(left):
        return _gramian_dot(left, right, scale, dtype=dtype)
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
        _read(rows.reshape(rows.shape[0], -1, length), scale, dtype) for rows in (left, right)
    )
    axes = (((2,), (2,)), ((1,), (1,)))
    return jnp.sum(lax.dot_general(left, right, axes, precision=lax.Precision.HIGHEST), axis=0)


def _gramian_elementwise(left, right, scale=None, *, dtype):
    left, right = (_read(rows, scale, dtype) for rows in (left, right))
    return jnp.sum(left[:, None] * right[None, :], axis=2)


def _gramian_cpu(left, right, scale=None, *, symmetric, dtype):
    """Reads the rows block by block, so that a block is in the caches for all its products.

    XLA hands matrix products to libraries that first bring both factors into another layout,
    which for few rows costs as much as the product, and that read all of a long row before the
    next. For few tasks, elementwise products become one loop of loads and multiply-adds.
    """
    num_tasks = left.shape[0]
    left, right = (rows.reshape(num_tasks, -1) for rows in (left, right))
    num_coordinates = left.shape[1]
    if num_coordinates < _LEAST_COORDINATES:
        return _gramian_dot(left, right, scale, dtype=dtype)
    size = num_coordinates // max(_LEAST_BLOCKS, math.ceil(left.size / _BLOCK_SIZE))
    few = num_tasks <= _FEW_FOR_GRAMIAN
    if few:
        # An odd number of chunks, else those of all rows may be at addresses a power of two apart,
        # and of such a cache holds but a few.
        size = ((size // (_TERMS * _LANES) - 1) | 1) * _TERMS * _LANES
    num_blocks = num_coordinates // size

    def block(rows, number):
        part = lax.dynamic_slice_in_dim(rows, number * size, size, axis=1)
        return _read(part, scale, dtype)

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
                total + _gramian_dot(block(left, number), block(right, number), dtype=dtype)
            ),
            zeros(num_tasks, num_tasks),
        )
    rest_of_left, rest_of_right = (rows[:, num_blocks * size :] for rows in (left, right))
    return total + _gramian_dot(rest_of_left, rest_of_right, scale, dtype=dtype)


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

    def add_block(number, sums):
        lefts = chunks(left, number)
        rights = lefts if symmetric else chunks(right, number)
        # The terms before the total: a long sum of short ones rounds less.
        return [
            total
            + functools.reduce(
                jnp.add,
                [lefts[:, i, None, term] * rights[:, None, k, term] for term in range(_TERMS)],
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


def _combination_dot(weights, rows, task_mask=None, *, sharding=None):
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


def _combination_cpu(weights, rows, task_mask=None):
    num_tasks = rows.shape[0]
    if num_tasks <= _FEW_FOR_COMBINATION:
        return functools.reduce(jnp.add, _terms(weights, rows, task_mask))
    # A loop over tasks that the partitioner shards would gather them.
    if task_mask is None or may_be_partitioned(rows):
        return _combination_dot(weights, rows, task_mask)

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


def _combination_gpu(weights, rows, task_mask=None):
    # Else XLA may convert bfloat16 rows once, for this and for the Gramian, and hold the result.
    return _combination_dot(weights, lax.optimization_barrier(rows), task_mask)


def _read(rows, scale, dtype):
    rows = rows.astype(dtype)
    if scale is None:
        return rows
    return rows * (lax.expand_dims(scale, range(1, rows.ndim)) if scale.ndim else scale)


def _sharded_over(rows):
    """The mesh, and the explicit axes of it that the coordinates of the rows are sharded over."""
    sharding = jax.typeof(rows).sharding
    _, *named = sharding.spec
    if _is_sharded_by_task(sharding):
        named = []
    names = [(name,) if isinstance(name, str) else name for name in named if name]
    return sharding.mesh, sum(names, start=())


def _is_sharded_by_task(sharding):
    return sharding.spec[0] is not None


def may_be_partitioned(rows):
    """Whether XLA may split this array over devices behind our back.

    An array on a mesh says so in its type, and within `shard_map` it is a device's own shard.
    Without a mesh the shardings may come later, from `jit`, if there are several devices.
    """
    mesh = jax.typeof(rows).sharding.mesh
    if mesh.empty:
        return jax.device_count() > 1
    return any(kind == AxisType.Auto for kind in mesh.axis_types) and mesh.size > 1
