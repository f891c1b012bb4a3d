"""Which losses each value of a program reaches, read off the program.

A zero gradient does not tell whether a task uses a parameter; the traced program does. From the
losses back to the parameters, `reached` finds for every value the set of losses that it takes part
in: one set, or one for every index along an axis, as of outputs that have a column for each task.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from jax.extend import core as jax_core

from optax_surgery.programs import flat

# Primitives whose output element k depends on element k of each operand of the same shape.
_ELEMENTWISE = frozenset(
    """abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt ceil
    clamp conj convert_element_type copy copy_p cos cosh digamma div eq eq_to erf erf_inv erfc exp
    exp2 expm1 floor ge gt imag integer_pow is_finite le le_to lgamma log log1p logistic lt lt_to
    max min mul ne neg nextafter not or polygamma pow pvary real reduce_precision rem round rsqrt
    select_n sharding_constraint shift_left shift_right_arithmetic shift_right_logical sign sin sinh
    sqrt square sub tan tanh xor""".split()  # noqa: SIM905
)
_CALLS = frozenset(
    """jit pjit closed_call core_call checkpoint remat remat2 custom_jvp_call
    custom_vmap_call""".split()  # noqa: SIM905
)
# What comes back through these is the user's choice, whatever the function within does.
_WITH_RULES_BACK = frozenset(["custom_vjp_call", "custom_vjp_call_jaxpr"])


class Reach(NamedTuple):
    """The losses that a value reaches: one set, or one for every index along an axis.

    It reaches those whose derivative by it may be something else than zero: what is rounded to
    integers or compared on the way does not.
    """

    sets: tuple[frozenset[int], ...] = (frozenset(),)
    axis: int | None = None

    def union(self) -> frozenset[int]:
        """The losses that any element reaches."""
        return frozenset().union(*self.sets)

    def whole(self) -> "Reach":
        """The same without telling elements apart."""
        return self if self.axis is None else Reach((self.union(),))

    def is_single(self) -> bool:
        """Whether no element reaches two losses."""
        return all(len(losses) < 2 for losses in self.sets)

    def joined(self, other: "Reach") -> "Reach":
        """What a value reaches that is used in two places."""
        if self == other or not other.union():
            return self
        if not self.union():
            return other
        if self.axis is not None and other.axis is not None and self.axis != other.axis:
            return Reach((self.union() | other.union(),))
        axis = other.axis if self.axis is None else self.axis
        size = max(len(self.sets), len(other.sets))
        rows = zip(_repeated(self.sets, size), _repeated(other.sets, size), strict=True)
        return Reach(tuple(left | right for left, right in rows), axis)


NOTHING = Reach()


def reached(program: flat.Program, losses: int) -> tuple[list[Reach], list[list[Reach]]]:
    """Which losses each value reaches, and each operand of each equation by this use.

    Args:
      program: the program.
      losses: the number of the value of shape (T,) that holds the losses.

    Returns:
      For every value what it reaches; and for every equation what its operands reach through it.
    """
    found = [NOTHING] * len(program.avals)
    (num_losses,) = program.avals[losses].shape
    found[losses] = Reach(tuple(frozenset([loss]) for loss in range(num_losses)), 0)
    uses: list[list[Reach]] = []
    for equation in reversed(program.equations):
        operands = _operands(equation.eqn, [found[number] for number in equation.outputs])
        for number, operand in zip(equation.inputs, operands, strict=True):
            if number is not None:
                found[number] = found[number].joined(operand)
        uses.append(operands)
    return found, uses[::-1]


def _operands(eqn: jax_core.JaxprEqn, outputs: list[Reach]) -> list[Reach]:
    """What the operands of an equation reach through it."""
    outputs = [
        output if flat.is_differentiable(var.aval) else NOTHING
        for output, var in zip(outputs, eqn.outvars, strict=True)
    ]
    if not any(output.union() for output in outputs):
        return [NOTHING] * len(eqn.invars)
    name, params = eqn.primitive.name, eqn.params
    if name == "scan":
        return _through_scan(eqn, outputs)
    if name == "cond":
        branches = [_through(flat.opened(branch), outputs) for branch in params["branches"]]
        joined = [_joined(same) for same in zip(*branches, strict=True)]
        return [_everything(outputs), *joined]
    if name == "stop_gradient":
        return [NOTHING]
    if name in _WITH_RULES_BACK:
        return [_everything(outputs)] * len(eqn.invars)
    inner = _inner(eqn)
    if inner is not None and len(inner.invars) == len(eqn.invars):
        operands = _through(inner, outputs)
        if name == "custom_jvp_call":  # whose rule may use what its function does not
            everything = _everything(outputs)
            operands = [operand if operand.union() else everything for operand in operands]
        return operands
    shapes = [flat.shape_of(var.aval) for var in eqn.invars]
    if name in ("split", "unstack"):
        return [_put_together(eqn, shapes[0], outputs)]
    (output,) = outputs if len(outputs) == 1 else (_everything(outputs),)
    if name == "slice":
        return [_sliced(params, shapes[0], output)]
    if output.axis is None:
        return [output] * len(shapes)
    shape = flat.shape_of(eqn.outvars[0].aval)
    if name == "concatenate":
        return _taken_apart(params["dimension"], shapes, output)
    if name == "stack":
        return _unstacked(params["axis"], shapes, output)
    axes = _axes(name, params, shapes, shape, output.axis)
    return [output.whole() if axis is None else Reach(output.sets, axis) for axis in axes]


def _axes(
    name: str,
    params: dict[str, Any],
    shapes: Sequence[tuple[int, ...]],
    shape: tuple[int, ...],
    axis: int,
) -> list[int | None]:
    """For each operand the axis that becomes `axis` of the output, or None where none does."""
    if name in _ELEMENTWISE:
        return [axis if operand == shape else None for operand in shapes]
    if name == "dot_general":
        return _product_axes(params["dimension_numbers"], shapes, axis)
    moved = None
    if name.startswith("reduce_") and "axes" in params and len(shapes) == 1:
        moved = _others(params["axes"], len(shapes[0]))[axis]
    elif name == "squeeze":
        moved = _others(params["dimensions"], len(shapes[0]))[axis]
    elif name == "transpose":
        moved = params["permutation"][axis]
    elif name == "broadcast_in_dim":
        places = params["broadcast_dimensions"]
        moved = places.index(axis) if axis in places else None
    elif name == "reshape":
        before = [math.prod(shapes[0][:place]) for place in range(len(shapes[0]))]
        same = [
            place
            for place, size in enumerate(shapes[0])
            if size == shape[axis] and before[place] == math.prod(shape[:axis])
        ]
        moved = same[0] if same else None
    if moved is not None and shapes[0][moved] != shape[axis]:
        moved = None
    return ([moved] + [None] * len(shapes))[: len(shapes)]


def _product_axes(numbers: Any, shapes: Sequence[tuple[int, ...]], axis: int) -> list[int | None]:
    """Those of a product of matrices, whose output has batch axes, free ones left, and right."""
    contracted, batch = numbers
    if axis < len(batch[0]):
        return [batch[0][axis], batch[1][axis]]
    axis -= len(batch[0])
    left, right = (
        _others((*contracted[side], *batch[side]), len(shapes[side])) for side in range(2)
    )
    if axis < len(left):
        return [left[axis], None]
    return [None, right[axis - len(left)]]


def _others(axes: Sequence[int], ndim: int) -> list[int]:
    return [axis for axis in range(ndim) if axis not in axes]


def _taken_apart(dimension: int, shapes: Sequence[tuple[int, ...]], output: Reach) -> list[Reach]:
    """What the parts of a concatenation reach."""
    if output.axis != dimension:
        return [output] * len(shapes)
    sets = iter(output.sets)
    return [Reach(tuple(itertools.islice(sets, shape[dimension])), dimension) for shape in shapes]


def _unstacked(axis: int, shapes: Sequence[tuple[int, ...]], output: Reach) -> list[Reach]:
    assert output.axis is not None
    if output.axis == axis:
        return [Reach((losses,)) for losses in output.sets]
    return [output._replace(axis=output.axis - (axis < output.axis))] * len(shapes)


def _put_together(eqn: jax_core.JaxprEqn, shape: tuple[int, ...], outputs: list[Reach]) -> Reach:
    """What an array reaches that is split into parts along an axis."""
    axis = eqn.params["axis"]
    sizes = eqn.params.get("sizes", (1,) * len(outputs))
    if eqn.primitive.name == "unstack":  # whose parts have not the axis
        outputs = [
            output
            if output.axis is None
            else output._replace(axis=output.axis + (axis <= output.axis))
            for output in outputs
        ]
    if all(output.axis in (None, axis) for output in outputs):
        rows = [_repeated(output.sets, size) for output, size in zip(outputs, sizes, strict=True)]
        return Reach(tuple(itertools.chain(*rows)), axis)
    return _joined([output.whole() if output.axis == axis else output for output in outputs])


def _sliced(params: dict[str, Any], shape: tuple[int, ...], output: Reach) -> Reach:
    """What an array reaches of which a part is taken."""
    strides = params["strides"] or (1,) * len(shape)
    starts, limits = params["start_indices"], params["limit_indices"]
    kept = [slice(*of_axis) for of_axis in zip(starts, limits, strides, strict=True)]
    cut = [axis for axis, size in enumerate(shape) if len(range(size)[kept[axis]]) < size]
    axis = output.axis
    if axis is None:  # what is cut off reaches nothing
        if not cut:
            return output
        axis = cut[0]
    sets = [frozenset()] * shape[axis]
    sets[kept[axis]] = _repeated(output.sets, len(sets[kept[axis]]))
    return Reach(tuple(sets), axis)


def _through(jaxpr: jax_core.Jaxpr, outputs: Sequence[Reach]) -> list[Reach]:
    """What the arguments of a program within an equation reach."""
    found: dict[Any, Reach] = {}

    def join(variables, reaches):
        for var, reach in zip(variables, reaches, strict=True):
            if not isinstance(var, jax_core.Literal):
                found[var] = found.get(var, NOTHING).joined(reach)

    join(jaxpr.outvars, outputs)
    for eqn in reversed(jaxpr.eqns):
        join(eqn.invars, _operands(eqn, [found.get(var, NOTHING) for var in eqn.outvars]))
    return [found.get(var, NOTHING) for var in jaxpr.invars]


def _through_scan(eqn: jax_core.JaxprEqn, outputs: list[Reach]) -> list[Reach]:
    """What the operands of a loop reach, in any of its rounds."""
    consts, carries = flat.scan_parts(eqn)
    body = flat.opened(eqn.params["jaxpr"])
    stacked = [_along(reach, -1) for reach in outputs[carries:]]
    carry = outputs[:carries]
    while True:
        operands = _through(body, [*carry, *stacked])
        before = carry
        carry = [a.joined(b) for a, b in zip(carry, operands[consts:], strict=False)]
        if carry == before:
            break
    slices = [_along(reach, 1) for reach in operands[consts + carries :]]
    return [*operands[:consts], *carry, *slices]


def _along(reach: Reach, step: int) -> Reach:
    """That of a slice for an array with a leading axis more (1), or the other way round (-1)."""
    if reach.axis is None:
        return reach
    return reach.whole() if reach.axis + step < 0 else reach._replace(axis=reach.axis + step)


def _inner(eqn: jax_core.JaxprEqn) -> jax_core.Jaxpr | None:
    """The program within an equation that runs one, once, with the operands as they are."""
    if eqn.primitive.name not in _CALLS:
        return None
    params = eqn.params
    inner = next(params[name] for name in ("call_jaxpr", "jaxpr", "fun_jaxpr") if name in params)
    return getattr(inner, "jaxpr", inner)


def _everything(outputs: Sequence[Reach]) -> Reach:
    return Reach((frozenset().union(*(output.union() for output in outputs)),))


def _joined(reaches: Sequence[Reach]) -> Reach:
    joined = reaches[0]
    for reach in reaches[1:]:
        joined = joined.joined(reach)
    return joined


def _repeated(sets: tuple[frozenset[int], ...], size: int) -> tuple[frozenset[int], ...]:
    return sets if len(sets) == size else sets * size
