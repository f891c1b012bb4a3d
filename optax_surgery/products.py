"""The two products that read the stacked gradients of one leaf.

What XLA makes of one `dot_general` is ideal on some platforms and for some shapes, and takes
30 times as long as one read of the rows on others. So there is one form per platform, chosen
when the program is lowered. All give the same sums, at the highest precision, and none makes
a copy of the rows.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

# Up to this many tasks, products on a CPU are sums of vectors; beyond, small matrix products.
_FEW_TASKS = 16
# Blocks of few tasks have _CHUNKS x _TERMS x _LANES coordinates: the threads share out the
# chunks, terms are added up in registers, and lanes keep sums of their own, as vector
# instructions need. A chunk fits the first cache; with 136 lanes, not 128, its rows do not lie
# 4,096 bytes apart, where all would compete for the same lines of it.
_CHUNKS, _TERMS, _LANES = 8, 8, 136
# Blocks of many tasks have this many numbers, 2 MB.
_BLOCK_SIZE = 2**19
# Up to this many coordinates, the Gramian on a GPU is one kernel that reads them again and again.
_FEW_COORDINATES = 2048


def leaf_gramian(
    left: jax.Array, right: jax.Array, *, dtype: jnp.dtype, scale: jax.Array | None = None
) -> jax.Array:
    """The inner products of the rows of one leaf, over all its coordinates.

    Args:
      left: (T, *shape), of any floating dtype.
      right: the same shape; mostly the same array, whose Gramian is symmetric.
      dtype: of the sums, float32 or float64.
      scale: () a factor for all rows, or None.

    Returns:
      (T, T), entry (i, j) is left_i . right_j.
    """
    sharding = jax.typeof(left).sharding
    axes = _explicit_axes(sharding)
    operands = (left, right) if scale is None else (left, right, scale)
    form = functools.partial(_gramian, symmetric=right is left, dtype=dtype)
    if not axes:
        return form(*operands)
    if sharding.spec[0] is not None or jax.typeof(right).sharding != sharding:
        return _gramian_dot(*operands, dtype=dtype, sharding=_replicated(sharding, 2))
    # Every device takes the form of its own shard.
    specs = (sharding.spec, sharding.spec, PartitionSpec())[: len(operands)]
    return jax.shard_map(
        lambda *shards: lax.psum(form(*shards), axes),
        mesh=sharding.mesh,
        in_specs=specs,
        out_specs=PartitionSpec(),
        axis_names=set(axes),
    )(*operands)


def leaf_combination(weights: jax.Array, rows: jax.Array) -> jax.Array:
    """The weighted sum of the rows of one leaf.

    Args:
      weights: (T,) of the dtype of the sums, float32 or float64.
      rows: (T, *shape), of any floating dtype.

    Returns:
      (*shape), sum_i weights_i rows_i.
    """
    sharding = jax.typeof(rows).sharding
    if _explicit_axes(sharding) and sharding.spec[0] is not None:
        result = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
        return _combination_dot(weights, rows, sharding=result)
    return lax.platform_dependent(
        weights,
        rows,
        cpu=_combination_cpu,
        tpu=_combination_tpu,
        cuda=_combination_gpu,
        default=_combination_dot,
    )


def _gramian(left, right, scale=None, *, symmetric, dtype):
    # A loop over blocks of a leaf that the partitioner shards would gather it.
    blocked = functools.partial(_gramian_cpu, symmetric=symmetric)
    forms = {
        "cpu": _gramian_dot if _may_be_partitioned(left) else blocked,
        "tpu": functools.partial(_gramian_tpu, symmetric=symmetric),
        "cuda": functools.partial(_gramian_gpu, symmetric=symmetric),
        "default": _gramian_dot,
    }
    forms = {name: functools.partial(form, dtype=dtype) for name, form in forms.items()}
    operands = (left, right) if scale is None else (left, right, scale)
    return lax.platform_dependent(*operands, **forms)


def _gramian_dot(left, right, scale=None, *, dtype, axes=None, sharding=None):
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
        *_, rows, columns = left.shape
        if _tiled(columns, rows) < _tiled(rows, columns):
            axes[-2:] = axes[:-3:-1]
    return _gramian_dot(left, right, scale, dtype=dtype, axes=tuple(axes))


def _tiled(sublanes, lanes):
    """How many numbers a matrix takes in a TPU's memory."""
    return math.ceil(sublanes / 8) * math.ceil(lanes / 128)


def _gramian_gpu(left, right, scale=None, *, symmetric, dtype):
    """A batch of products over short pieces of the rows, then their sum.

    To occupy a whole GPU, XLA splits a product of few rows into many, and where their length
    does not divide evenly it first copies the rows to pad them. It leaves a batch alone that is
    already large, or whose pieces are short.
    """
    if _may_be_partitioned(left):
        return _gramian_dot(left, right, scale, dtype=dtype)
    num_tasks = left.shape[0]
    left, right = (rows.reshape(num_tasks, -1) for rows in (left, right))
    num_coordinates = left.shape[1]
    if num_coordinates <= _FEW_COORDINATES:
        return _gramian_elementwise(left, right, scale, dtype=dtype)
    if length := _piece_length(num_coordinates):
        return _gramian_pieces(left, right, scale, dtype=dtype, length=length)
    if num_coordinates <= 8 * _FEW_COORDINATES:
        return _gramian_elementwise(left, right, scale, dtype=dtype)

    # No divisor will do: a loop over blocks that have one, of 16 MB, which the cache holds.
    num_blocks = max(8, left.nbytes // 2**24)
    size = num_coordinates // num_blocks // 128 * 128
    num_blocks = num_coordinates // size

    def add_block(number, total):
        block = [lax.dynamic_slice_in_dim(rows, number * size, size, 1) for rows in (left, right)]
        return total + _gramian_pieces(*block, scale, dtype=dtype, length=_piece_length(size))

    total = lax.fori_loop(0, num_blocks, add_block, jnp.zeros((num_tasks, num_tasks), dtype))
    rest = [rows[:, num_blocks * size :] for rows in (left, right)]
    return total + _gramian_elementwise(*rest, scale, dtype=dtype)


def _piece_length(num_coordinates):
    """The greatest divisor that gives many pieces or short ones, 0 if it is very short."""
    longest = max(511, num_coordinates // 512)
    length = next(size for size in range(longest, 0, -1) if num_coordinates % size == 0)
    return length if length >= 64 else 0


def _gramian_pieces(left, right, scale=None, *, dtype, length):
    left, right = (
        _read(rows, scale, dtype).reshape(rows.shape[0], -1, length) for rows in (left, right)
    )
    axes = (((2,), (2,)), ((1,), (1,)))
    return jnp.sum(lax.dot_general(left, right, axes, precision=lax.Precision.HIGHEST), axis=0)


def _gramian_elementwise(left, right, scale=None, *, dtype):
    left, right = (_read(rows, scale, dtype) for rows in (left, right))
    return jnp.sum(left[:, None] * right[None, :], axis=2)


def _gramian_cpu(left, right, scale=None, *, symmetric, dtype):
    """Reads the rows block by block, so that a block is in the caches for all its products.

    XLA hands matrix products to libraries that first bring both factors into another layout,
    which for few rows costs as much as the product, and reads all of a long row before the
    next. For few tasks, elementwise products make one kernel of loads and multiply-adds.
    """
    num_tasks = left.shape[0]
    left, right = (rows.reshape(num_tasks, -1) for rows in (left, right))
    num_coordinates = left.shape[1]
    few = num_tasks <= _FEW_TASKS
    size = _CHUNKS * _TERMS * _LANES if few else max(1, _BLOCK_SIZE // num_tasks)
    num_blocks = num_coordinates // size
    if num_blocks < 8:
        return _gramian_dot(left, right, scale, dtype=dtype)

    def block(rows, number):
        part = lax.dynamic_slice_in_dim(rows, number * size, size, axis=1)
        return _read(part, scale, dtype)

    def zeros(*shape):
        return lax.full_like(left, 0, dtype, shape)

    def vector_products(number, sums):
        lefts, rights = (_chunks(block(rows, number)) for rows in (left, right))
        return [
            functools.reduce(
                jnp.add,
                [lefts[:, i:j, None, k] * rights[:, None, first:, k] for k in range(_TERMS)],
                total,
            )
            for (i, j, first), total in zip(groups, sums, strict=True)
        ]

    def matrix_product(number, total):
        return total + _gramian_dot(block(left, number), block(right, number), dtype=dtype)

    if few:
        # the upper triangle, in a few rectangles
        height = -(-num_tasks // 4)
        starts = range(0, num_tasks, height) if symmetric else [0]
        groups = [
            (i, min(i + height, num_tasks), i) if symmetric else (0, num_tasks, 0) for i in starts
        ]
        sums = [zeros(_CHUNKS, j - i, num_tasks - first, _LANES) for i, j, first in groups]
        sums = lax.fori_loop(0, num_blocks, vector_products, sums)
        total = jnp.concatenate(
            [
                jnp.pad(jnp.sum(part, axis=(0, 3)), ((0, 0), (first, 0)))
                for part, (_, _, first) in zip(sums, groups, strict=True)
            ]
        )
        if symmetric:
            total = jnp.triu(total) + jnp.triu(total, 1).T
    else:
        total = lax.fori_loop(0, num_blocks, matrix_product, zeros(num_tasks, num_tasks))
    rest = [rows[:, num_blocks * size :] for rows in (left, right)]
    return total + _gramian_dot(*rest, scale, dtype=dtype)


def _chunks(block):
    """(T, _CHUNKS * _TERMS * _LANES) as (_CHUNKS, T, _TERMS, _LANES), a chunk in one piece."""
    split = block.reshape(block.shape[0], _CHUNKS, _TERMS, _LANES)
    return lax.optimization_barrier(split.swapaxes(0, 1))


def _combination_dot(weights, rows, sharding=None):
    return lax.dot_general(
        weights,
        rows.astype(weights.dtype),
        (((0,), (0,)), ((), ())),
        precision=lax.Precision.HIGHEST,
        out_sharding=sharding,
    )


def _combination_cpu(weights, rows):
    if rows.shape[0] > _FEW_TASKS:
        return _combination_dot(weights, rows)
    terms = [weights[i] * rows[i].astype(weights.dtype) for i in range(rows.shape[0])]
    return functools.reduce(jnp.add, terms)


def _combination_tpu(weights, rows):
    return _combination_dot(weights, rows)


def _combination_gpu(weights, rows):
    return _combination_dot(weights, rows)


def _read(rows, scale, dtype):
    rows = rows.astype(dtype)
    return rows if scale is None else rows * scale


def _explicit_axes(sharding):
    """The axes of a mesh that are explicit, and that the type of an array therefore names."""
    types = zip(sharding.mesh.axis_names, sharding.mesh.axis_types, strict=True)
    return tuple(name for name, kind in types if kind == AxisType.Explicit)


def _replicated(sharding, ndim):
    return NamedSharding(sharding.mesh, PartitionSpec(*[None] * ndim))


def _may_be_partitioned(rows):
    """Whether XLA may split this array over devices behind our back.

    An array on a mesh says so in its type, and within `shard_map` it is a device's own shard.
    Without a mesh the shardings may come later, from `jit`, if there are several devices.
    """
    mesh = jax.typeof(rows).sharding.mesh
    if mesh.empty:
        return jax.device_count() > 1
    return any(kind == AxisType.Auto for kind in mesh.axis_types) and mesh.size > 1
