"""The two products that read the stacked gradients of one leaf.

What XLA makes of one `dot_general` is ideal on some platforms and for some shapes, and takes
30 times as long as one read of the rows on others. So there is one form per platform, chosen
when the program is lowered. All give the same sums, at the highest precision, and none makes
a copy of the rows.
"""

import collections
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from optax_surgery.products import cpu, dot, gpu, placement, tpu
from optax_surgery.products.placement import may_be_partitioned

__all__ = ["gramian_of_leaves", "leaf_combination", "may_be_partitioned"]


def gramian_of_leaves(
    leaves: list[tuple[jax.Array, ...]], *, dtype: jnp.dtype, scale: jax.Array | None = None
) -> jax.Array:
    """The inner products of rows, over all coordinates of all leaves.

    Args:
      leaves: for each leaf the rows `(T, *shape)`, or two such stacks of which to multiply each
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
        alike[placement.sharded_over(stacks[0])].append(stacks)

    def sum_of_gramians(leaves, scale):
        # Of hundreds of leaves, `jnp.add` would take a third of the time to trace.
        return functools.reduce(
            lax.add, [_leaf_gramian(stacks, scale, dtype=dtype) for stacks in leaves]
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


@jax.jit
def leaf_combination(
    weights: jax.Array, rows: jax.Array, *, task_mask: jax.Array | None = None
) -> jax.Array:
    """The weighted sum of the rows of one leaf.

    Args:
      weights: (T,) of the dtype of the sums, float32 or float64.
      rows: `(T, *shape)`, of any floating dtype.
      task_mask: (T,) bool, False for rows to leave out, whatever they hold; or None.

    Returns:
      `(*shape)`, sum_i weights_i rows_i.
    """
    operands = (weights, rows) if task_mask is None else (weights, rows, task_mask)
    sharding = jax.typeof(rows).sharding
    if placement.is_sharded_by_task(sharding):
        result = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
        return dot.combination(*operands, sharding=result)
    return lax.platform_dependent(
        *operands,
        cpu=cpu.combination,
        cuda=gpu.combination,
        default=dot.combination,
    )


@functools.partial(jax.jit, static_argnames="dtype")
def _leaf_gramian(stacks, scale, *, dtype):
    left, right = stacks[0], stacks[-1]
    operands = (left, right) if scale is None else (left, right, scale)
    sharding = jax.typeof(left).sharding
    if placement.is_sharded_by_task(sharding):  # what to multiply is not on one device yet
        replicated = NamedSharding(sharding.mesh, PartitionSpec(None, None))
        return dot.gramian(*operands, dtype=dtype, sharding=replicated)
    # A loop over blocks of a leaf that the partitioner shards would gather it.
    on_cpu = dot.gramian if may_be_partitioned(left) else cpu.gramian
    forms = {"cpu": on_cpu, "tpu": tpu.gramian, "cuda": gpu.gramian, "default": dot.gramian}
    symmetric = len(stacks) == 1
    forms = {
        name: functools.partial(form, dtype=dtype, symmetric=symmetric)
        for name, form in forms.items()
    }
    return lax.platform_dependent(*operands, **forms)
