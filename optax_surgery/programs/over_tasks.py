"""A function of one task run for all of them, which may lie over the devices of a mesh.

What the tasks' data lie over, no parameter's T gradients can lie over as well, so that these are
moved to where the parameter is: with tasks over chips and parameters over the same chips, each then
holds all tasks' gradients of its own part, and the Gramian is one sum over the chips.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core as jax_core
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from optax_surgery import products
from optax_surgery.programs import flat

try:
    from jax.experimental.shard_alike import shard_alike
except ImportError:  # JAX 0.12 has it no more; the partitioner is then left to choose
    shard_alike = None


class OverTasks:
    """How the tasks are run.

    Attributes:
      num_tasks: T.
      params: the parameters as each task takes them: on an Explicit mesh, not sharded over the axes
        that the tasks lie over.
    """

    def __init__(self, params: list[Any], args: Any, chunk_size: int | None, spmd_axis_name: Any):
        """Finds out where the tasks lie.

        Args:
          params: the leaves of the parameters.
          args: of all tasks, with a leading axis.
          chunk_size: how many tasks are run at once.
          spmd_axis_name: the axes of the mesh over which the tasks lie, None if it is known.
        """
        leaf = jax.tree.leaves(args)[0]
        self.num_tasks, self._chunk_size = leaf.shape[0], chunk_size
        self._axes = spmd_axis_name
        mesh = _explicit_mesh(leaf)
        self._explicit: Any = mesh
        if mesh is not None and self._axes is None:
            self._axes = jax.typeof(leaf).sharding.spec[0]
        if isinstance(self._axes, str):
            self._axes = (self._axes,)
        if mesh is not None:
            kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
            if any(kinds.get(name) != AxisType.Explicit for name in self._axes or ()):
                self._explicit = None
        self._own = params  # where they lie
        self.params = [self._without_axes(param) for param in params]

    def map(self, function: Callable[[Any], Any], operands: Any) -> Any:
        """What a function of one task returns for all of them."""
        if self._chunk_size is None:
            return self._at_once(function, operands)
        if self._axes is None:
            return lax.map(function, operands, batch_size=self._chunk_size)

        def some(operands):
            return self.whole(self._at_once(function, operands))

        size, operands = self._chunk_size, self.whole(operands)
        even = self.num_tasks // size * size
        parts = []
        if even:
            chunks = jax.tree.map(lambda x: x[:even].reshape(-1, size, *x.shape[1:]), operands)
            found = lax.map(some, chunks)
            parts.append(jax.tree.map(lambda x: x.reshape(even, *x.shape[2:]), found))
        if even < self.num_tasks:
            parts.append(some(jax.tree.map(lambda x: x[even:], operands)))
        return jax.tree.map(lambda *parts: jnp.concatenate(parts), *parts)

    def _at_once(self, function, operands):
        if self._explicit is None:
            return jax.vmap(function, spmd_axis_name=self._axes)(operands)
        axes = self._axes and _if_divisible(self._explicit, self._axes, operands)
        return jax.vmap(function)(jax.tree.map(lambda x: self._along(x, axes), operands))

    def whole(self, tree: Any) -> Any:
        """Arrays with a leading task axis, every task's on each device of an Explicit mesh."""
        return jax.tree.map(lambda x: self._along(x, None), tree)

    def one_task(self, leaf: jax.Array) -> jax.ShapeDtypeStruct:
        """What a task sees of an array of all."""
        sharding = None
        if self._explicit is not None:
            spec = jax.typeof(leaf).sharding.spec[1:]
            sharding = NamedSharding(self._explicit, P(*spec))
        return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype, sharding=sharding)

    def as_params(self, grads: list[Any]) -> list[Any]:
        """Gradients, one of each parameter, where it lies on an Explicit mesh."""
        if self._explicit is None:
            return grads
        return [self._as(grad, param) for grad, param in zip(grads, self._own, strict=True)]

    def stacked(self, grads: list[Any], traced: Callable[[], jax_core.ClosedJaxpr]) -> list[Any]:
        """T gradients of each parameter, which then lie as it does.

        Args:
          grads: `(T, *param.shape)`, or None.
          traced: returns the program of a task, which names the mesh where it is not set.
        """
        if self._explicit is not None:
            pairs = zip(grads, self._own, strict=True)
            return [self._as(grad, param, None) for grad, param in pairs]
        if self._axes is None:
            return grads
        mesh = jax.sharding.get_abstract_mesh()
        mesh = _named_mesh(traced().jaxpr, set(self._axes)) if mesh.empty else mesh
        if mesh is None:
            return grads
        return [
            _not_over_tasks(grad, param, mesh) if flat.is_differentiable(grad) else grad
            for grad, param in zip(grads, self._own, strict=True)
        ]

    def _as(self, grad, param, *before):
        if not flat.is_differentiable(grad):  # nor is None, of what is not stacked
            return grad
        spec = P(*before, *jax.typeof(param).sharding.spec)
        return jax.sharding.reshard(grad, NamedSharding(self._explicit, spec))

    def _along(self, array, axes):
        if self._explicit is None:
            return array
        spec = jax.typeof(array).sharding.spec[1:]
        return jax.sharding.reshard(array, NamedSharding(self._explicit, P(axes, *spec)))

    def _without_axes(self, param):
        if self._explicit is None or not self._axes:
            return param
        spec = [_without(names, self._axes) for names in jax.typeof(param).sharding.spec]
        return jax.sharding.reshard(param, NamedSharding(self._explicit, P(*spec)))


@functools.partial(jax.jit, static_argnums=2)
def _not_over_tasks(stack: jax.Array, param: jax.Array, mesh: Any) -> jax.Array:
    """Each gradient as the parameter, whose place the partitioner knows; on all chips a part."""
    spec = P(None, *[P.UNCONSTRAINED] * (stack.ndim - 1))
    return _alike(lax.with_sharding_constraint(stack, NamedSharding(mesh, spec)), param)


def as_param(stack: jax.Array, param: jax.Array) -> jax.Array:
    """T gradients of one parameter, where the partitioner puts the parameter."""
    is_known = AxisType.Explicit in jax.typeof(param).sharding.mesh.axis_types
    if is_known or not products.may_be_partitioned(param):
        return stack
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or any(kind != AxisType.Auto for kind in mesh.axis_types):
        return _alike(stack, param)
    return _not_over_tasks(stack, param, mesh)


def _alike(stack, param):
    """What the partitioner is to shard as the parameter."""
    if shard_alike is None:
        return stack
    return shard_alike(stack, jnp.broadcast_to(param, stack.shape).astype(stack.dtype))[0]


def _explicit_mesh(leaf: Any) -> Any:
    mesh = jax.typeof(leaf).sharding.mesh
    return mesh if AxisType.Explicit in mesh.axis_types else None


def _if_divisible(mesh: Any, axes: tuple[str, ...], operands: Any) -> tuple[str, ...] | None:
    size = 1
    for name in axes:
        size *= mesh.shape[name]
    return None if jax.tree.leaves(operands)[0].shape[0] % size else axes


def _without(names: Any, axes: tuple[str, ...]) -> Any:
    """One axis' part of a spec, without some of the mesh's axes."""
    if names is None:
        return None
    names = (names,) if isinstance(names, str) else names
    return tuple(name for name in names if name not in axes) or None


def _named_mesh(jaxpr: Any, axes: set[str]) -> Any:
    """The mesh with such axes that a program's constraints name, None if there is none."""
    for eqn in jaxpr.eqns:
        mesh = getattr(eqn.params.get("sharding"), "mesh", None)
        if mesh is not None and axes <= set(mesh.axis_names):
            return mesh
        for value in jax.tree.leaves(eqn.params, is_leaf=_is_program):
            if _is_program(value):
                mesh = _named_mesh(getattr(value, "jaxpr", value), axes)
                if mesh is not None:
                    return mesh
    return None


def _is_program(value: Any) -> bool:
    return isinstance(value, jax_core.Jaxpr | jax_core.ClosedJaxpr)
