"""Which inputs of a function reach which of its losses, read off its program.

A zero gradient does not tell whether a task uses a parameter; the traced program does.
`reached_by` follows every input through it to the elements of the losses. `split_uses`
finds out whether each use of an input serves one loss only, and if so makes a function
of one copy of the input per loss: one backward pass over the copies is then the
gradient of every loss.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
from jax.extend import core as jax_core

# Primitives whose output element k depends on element k of each operand.
_ELEMENTWISE = frozenset(
    """abs add add_any and atan2 ceil clamp convert_element_type copy cos div eq erf exp exp2 expm1
    floor ge gt integer_pow is_finite le log log1p logistic lt max min mul ne neg not or pow rem
    round rsqrt select_n sign sin sqrt square stop_gradient sub tan tanh""".split()  # noqa: SIM905
)
_REDUCTIONS = frozenset(["reduce_sum", "reduce_max", "reduce_min", "reduce_prod"])
_CALLS = frozenset(["jit", "pjit"])  # they run their program as it stands: we may look inside


class Reach(NamedTuple):
    """What an array depends on: one set, or one for every index along an axis."""

    sets: tuple[frozenset[int], ...]
    axis: int | None = None

    def union(self) -> frozenset[int]:
        """The inputs that any element depends on."""
        return frozenset().union(*self.sets)

    def at(self, axis: int, size: int) -> tuple[frozenset[int], ...]:
        """What the `size` indices along `axis` depend on."""
        return self.sets if self.axis == axis else (self.union(),) * size


NOTHING = Reach((frozenset(),))


def reached_by(function: Callable[..., jax.Array], tree: Any, *args: Any) -> list[frozenset[int]]:
    """For each element of the vector `function(tree, *args)`, the leaves of `tree` that reach it.

    Args:
      function: returns an array of shape (T,).
      tree: pytree of arrays.
      *args: further arguments.

    Returns:
      T sets of indices into `jax.tree.leaves(tree)`.
    """
    program = jax.make_jaxpr(function)(tree, *args)
    num_leaves = len(jax.tree.leaves(tree))
    inputs = [Reach((frozenset([leaf]),)) for leaf in range(num_leaves)]
    inputs += [NOTHING] * (len(program.jaxpr.invars) - num_leaves)
    (losses,) = _follow(program.jaxpr, inputs, lambda operands: operands)
    return list(losses.at(0, program.out_avals[0].shape[0]))


def depends(function: Callable[..., Any], tree: Any) -> bool:
    """Whether any leaf of `tree` reaches any output of `function(tree)`."""
    program = jax.make_jaxpr(function)(tree).jaxpr
    outputs = _follow(program, [Reach((frozenset([0]),))] * len(program.invars), lambda ops: ops)
    return any(output.union() for output in outputs)


def split_uses(
    function: Callable[..., jax.Array], tree: Any, *args: Any
) -> Callable[..., jax.Array] | None:
    """Makes `function` see one copy of `tree` per loss, if no use of a leaf serves two losses.

    Args:
      function: `function(tree, *args)` returns losses of shape (T,).
      tree: pytree of arrays.
      *args: further arguments.

    Returns:
      `split(copies, *args)`, of which the leaves of `copies` have a leading axis of length T and
      loss t uses copy t only; None where a use serves two losses.
    """
    program = jax.make_jaxpr(function)(tree, *args)
    num_leaves = len(jax.tree.leaves(tree))
    source = Reach((frozenset([-1]),))
    equations = itertools.count()

    def use(operands):  # all operands of one equation serve the same losses
        if not any(operand is source for operand in operands):
            return operands
        here = Reach((frozenset([next(equations)]),))
        return [here if operand is source else operand for operand in operands]

    inputs = [source] * num_leaves + [NOTHING] * (len(program.jaxpr.invars) - num_leaves)
    (losses,) = _follow(program.jaxpr, inputs, use)
    loss_of_use: dict[int, int] = {-1: -1}  # the input itself is no loss
    for loss, uses in enumerate(losses.at(0, program.out_avals[0].shape[0])):
        for each in uses:
            if loss_of_use.setdefault(each, loss) != loss:
                return None

    def split(copies: Any, *args: Any) -> jax.Array:
        inputs = [*map(_Copies, jax.tree.leaves(copies)), *jax.tree.leaves(args)]
        uses = itertools.count()
        (losses,) = _evaluate(program.jaxpr, program.consts, inputs, uses, loss_of_use)
        return losses

    return split


def _follow(
    jaxpr: jax_core.Jaxpr,
    inputs: list[Reach],
    use: Callable[[list[Reach]], list[Reach]],
) -> list[Reach]:
    """What each output of a program depends on. `use` sees the operands of every equation."""
    reach = dict.fromkeys(jaxpr.constvars, NOTHING) | dict(zip(jaxpr.invars, inputs, strict=True))

    def read(variables):
        return [NOTHING if isinstance(var, jax_core.Literal) else reach[var] for var in variables]

    for eqn in jaxpr.eqns:
        if eqn.primitive.name in _CALLS:
            outputs = _follow(eqn.params["jaxpr"].jaxpr, read(eqn.invars), use)
        else:
            outputs = _outputs(eqn, use(read(eqn.invars)))
        reach.update(zip(eqn.outvars, outputs, strict=True))
    return read(jaxpr.outvars)


def _outputs(eqn: jax_core.JaxprEqn, operands: list[Reach]) -> list[Reach]:
    """What each output of one equation depends on: `split` and `unstack` take an array apart."""
    name, params = eqn.primitive.name, eqn.params
    if name in ("split", "unstack") and operands[0].axis is not None:
        operand, axis = operands[0], params["axis"]
        if name == "split":
            if operand.axis != axis:
                return [operand] * len(eqn.outvars)
            sets = iter(operand.sets)
            return [Reach(tuple(itertools.islice(sets, size)), axis) for size in params["sizes"]]
        if operand.axis != axis:
            return [operand._replace(axis=operand.axis - (axis < operand.axis))] * len(eqn.outvars)
        return [Reach((reached,)) for reached in operand.sets]
    return [_through(eqn, operands)] * len(eqn.outvars)


def _through(eqn: jax_core.JaxprEqn, operands: list[Reach]) -> Reach:
    """What the outputs of one equation depend on, index by index where that can be told."""
    name, params = eqn.primitive.name, eqn.params
    shapes = [_shape(var) for var in eqn.invars]
    shape = _shape(eqn.outvars[0])
    if name == "stack":
        return Reach(tuple(operand.union() for operand in operands), params["axis"])
    if name == "concatenate":
        axis = params["dimension"]
        parts = [op.at(axis, shape[axis]) for op, shape in zip(operands, shapes, strict=True)]
        return Reach(tuple(itertools.chain(*parts)), axis)

    axes = {operand.axis for operand in operands if operand.axis is not None}
    if len(axes) == 1:
        (axis,) = axes
        if name in _ELEMENTWISE:
            rows = zip(*(operand.at(axis, shape[axis]) for operand in operands), strict=True)
            return Reach(tuple(frozenset().union(*sets) for sets in rows), axis)
        if name == "slice":
            strides = params["strides"] or (1,) * len(shape)
            kept = slice(
                params["start_indices"][axis], params["limit_indices"][axis], strides[axis]
            )
            return Reach(operands[0].sets[kept], axis)
        moved = None
        if name in _REDUCTIONS or name == "squeeze":
            gone = params["dimensions" if name == "squeeze" else "axes"]
            moved = None if axis in gone else axis - sum(other < axis for other in gone)
        elif name == "broadcast_in_dim":
            moved = params["broadcast_dimensions"][axis]
        elif name == "transpose":
            moved = params["permutation"].index(axis)
        elif name == "reshape" and shape[: axis + 1] == shapes[0][: axis + 1]:
            moved = axis
        if moved is not None and shape[moved] == shapes[0][axis]:
            return operands[0]._replace(axis=moved)
    return Reach((frozenset().union(*(operand.union() for operand in operands)),))


def _shape(var: Any) -> tuple[int, ...]:
    return var.aval.shape


class _Copies(NamedTuple):
    """An input of which loss t reads copy t."""

    leaf: jax.Array


def _evaluate(
    jaxpr: jax_core.Jaxpr,
    consts: list[Any],
    inputs: list[Any],
    uses: Iterator[int],
    loss_of_use: dict[int, int],
) -> list[Any]:
    """Runs a program, handing copy t of an input to the equations that serve loss t.

    It meets the equations in the order of `_follow`, so that uses have the same numbers.
    """
    values = dict(zip(jaxpr.constvars, consts, strict=True))
    values |= dict(zip(jaxpr.invars, inputs, strict=True))

    for eqn in jaxpr.eqns:
        variables = [var for var in eqn.invars if not isinstance(var, jax_core.Literal)]
        operands = [values[var] for var in variables]
        if eqn.primitive.name in _CALLS:
            inner = eqn.params["jaxpr"]
            operands = [
                var.val if isinstance(var, jax_core.Literal) else values[var] for var in eqn.invars
            ]
            outputs = _evaluate(inner.jaxpr, inner.consts, operands, uses, loss_of_use)
        else:
            if any(isinstance(operand, _Copies) for operand in operands):
                copy = loss_of_use.get(next(uses), 0)  # one that serves no loss reads any copy
                operands = [op.leaf[copy] if isinstance(op, _Copies) else op for op in operands]
            program = jaxpr.replace(
                constvars=[],
                invars=variables,
                outvars=eqn.outvars,
                eqns=[eqn],
                debug_info=jaxpr.debug_info.with_unknown_names(),
            )
            outputs = jax_core.jaxpr_as_fun(jax_core.ClosedJaxpr(program, ()))(*operands)
        values.update(zip(eqn.outvars, outputs, strict=True))
    return [var.val if isinstance(var, jax_core.Literal) else values[var] for var in jaxpr.outvars]
