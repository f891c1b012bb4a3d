"""Which rows are on several devices, or may come to be."""

import jax
from jax.sharding import AxisType


def sharded_over(rows):
    """The mesh, and the explicit axes of it that the coordinates of the rows are sharded over."""
    sharding = jax.typeof(rows).sharding
    _, *named = sharding.spec
    if is_sharded_by_task(sharding):
        named = []
    names = [(name,) if isinstance(name, str) else name for name in named if name]
    return sharding.mesh, sum(names, start=())


def is_sharded_by_task(sharding):
    """Whether the gradients of several tasks are on several devices."""
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
