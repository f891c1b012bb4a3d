"""A traced program as one flat list of equations, which can be run one by one.

What `jit` wraps is opened, so that a parameter is followed through it; what changes how a program
is differentiated or repeated (`scan`, `checkpoint`, `custom_vjp`, ...) stays one equation.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core as jax_core

_CALLS = frozenset(["jit", "pjit", "closed_call", "core_call"])


class Equation(NamedTuple):
    """One equation.

    Attributes:
      eqn: as it was traced; its variables are those of the program that it came from.
      inputs: for each of its operands the number of a value, or None for a literal.
      outputs: the numbers of its values.
    """

    eqn: Any  # a JaxprEqn, whose parts depend on its primitive
    inputs: tuple[int | None, ...]
    outputs: tuple[int, ...]

    @property
    def name(self) -> str:
        """The name of what it does."""
        return self.eqn.primitive.name


class Program(NamedTuple):
    """A program.

    Attributes:
      equations: in the order in which they run.
      inputs: the numbers of its arguments' leaves.
      outputs: the numbers of what it returns, or a literal.
      constants: from the number of a value to the value.
      avals: for each number the shape and dtype.
    """

    equations: list[Equation]
    inputs: list[int]
    outputs: list[Any]
    constants: dict[int, Any]
    avals: list[Any]


class Literal(NamedTuple):
    """A value that stands in the program."""

    value: Any


def flatten(closed: jax_core.ClosedJaxpr) -> Program:
    """The program with all plain calls opened."""
    equations, constants, avals = [], {}, []

    def new(var):
        avals.append(var.aval)
        return len(avals) - 1

    def walk(jaxpr, consts, operands):
        numbers = dict(zip(jaxpr.invars, operands, strict=True))
        for var, const in zip(jaxpr.constvars, consts, strict=True):
            numbers[var] = new(var)
            constants[numbers[var]] = const

        def read(var):
            return Literal(var.val) if isinstance(var, jax_core.Literal) else numbers[var]

        for eqn in jaxpr.eqns:
            operands = [read(var) for var in eqn.invars]
            if eqn.primitive.name in _CALLS and _is_plain(eqn):
                inner = eqn.params["jaxpr"]
                # A literal that goes into a call becomes a constant of the program.
                for place, operand in enumerate(operands):
                    if isinstance(operand, Literal):
                        operands[place] = new(inner.jaxpr.invars[place])
                        constants[operands[place]] = operand.value
                outputs = walk(inner.jaxpr, inner.consts, operands)
                numbers.update(zip(eqn.outvars, outputs, strict=True))
                continue
            numbers.update((var, new(var)) for var in eqn.outvars)
            # What is no number is a literal, or one that a call returned.
            for place, operand in enumerate(operands):
                is_read = not isinstance(eqn.invars[place], jax_core.Literal)
                if is_read and isinstance(operand, Literal):
                    operands[place] = new(eqn.invars[place])
                    constants[operands[place]] = operand.value
            equations.append(
                Equation(
                    eqn,
                    tuple(None if isinstance(each, Literal) else each for each in operands),
                    tuple(numbers[var] for var in eqn.outvars),
                )
            )
        return [read(var) for var in jaxpr.outvars]

    inputs = [new(var) for var in closed.jaxpr.invars]
    outputs = walk(closed.jaxpr, closed.consts, inputs)
    return Program(equations, inputs, outputs, constants, avals)


def evaluate(
    equations: Iterable[Equation],
    values: dict[int, Any],
    outputs_of: Callable[[Equation, list[Any]], list[Any]] | None = None,
) -> None:
    """Runs equations, and writes what they return to `values`.

    Args:
      equations: some of a program, in its order.
      values: from numbers to values, of all that the equations read and others do not write.
      outputs_of: what an equation returns for the values of its inputs, without literals, in place
        of what it says itself.
    """
    run = outputs_of or run_equation
    for equation in equations:
        operands = [values[number] for number in equation.inputs if number is not None]
        values.update(zip(equation.outputs, run(equation, operands), strict=True))


def run_equation(equation: Equation, operands: list[Any]) -> list[Any]:
    """What an equation returns for the values of its inputs, literals left out."""
    return _function(equation.eqn)(*operands)


def _function(eqn: jax_core.JaxprEqn) -> Callable[..., list[Any]]:
    # One for each operand: those that were one value may differ, as where each has its own copy.
    invars = [
        var if isinstance(var, jax_core.Literal) else jax_core.Var(var.aval) for var in eqn.invars
    ]
    eqn = eqn.replace(invars=invars)
    variables = [var for var in invars if not isinstance(var, jax_core.Literal)]
    jaxpr = jax_core.Jaxpr(
        constvars=[],
        invars=variables,
        outvars=eqn.outvars,
        eqns=[eqn],
        effects=eqn.effects,
        debug_info=_debug_info(),
    )
    return jax_core.jaxpr_as_fun(jax_core.ClosedJaxpr(jaxpr, ()))


@functools.cache
def _debug_info() -> Any:
    """That of a program of which nothing is known."""
    return jax.make_jaxpr(lambda: 0)().jaxpr.debug_info.with_unknown_names()


def _is_plain(eqn: jax_core.JaxprEqn) -> bool:
    """Whether a call says nothing of where its arguments lie."""
    shardings = [*eqn.params.get("in_shardings", ()), *eqn.params.get("out_shardings", ())]
    return all(type(sharding).__name__ == "UnspecifiedValue" for sharding in shardings)


def shape_of(aval: Any) -> tuple[int, ...]:
    """The shape of a value, () of one that has none, such as a token."""
    return getattr(aval, "shape", ())


def is_differentiable(aval: Any) -> bool:
    """Whether a value of this kind has a derivative."""
    dtype = getattr(aval, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jnp.inexact)


def is_floating(aval: Any) -> bool:
    """Whether a value of this kind is of real floating-point numbers."""
    dtype = getattr(aval, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jnp.floating)


def is_sharded(aval: Any) -> bool:
    """Whether the type of a value says over which axes of a mesh it is sharded."""
    spec = getattr(getattr(aval, "sharding", None), "spec", None)
    return spec is not None and any(axis is not None for axis in spec)


def varying_axes(array_or_aval: Any) -> frozenset[str]:
    """The axes of a mesh that a value varies over from device to device, within `shard_map`."""
    aval = jax.typeof(array_or_aval) if isinstance(array_or_aval, jax.Array) else array_or_aval
    kind = getattr(aval, "manual_axis_type", None)  # of JAX 0.10; before, an attribute of its own
    return kind.varying if kind is not None else getattr(aval, "vma", frozenset())


def varying_over(array: jax.Array, axes: frozenset[str]) -> jax.Array:
    """The same on each device, as a value that varies over these axes too."""
    missing = tuple(sorted(axes - varying_axes(array)))
    return lax.pcast(array, missing, to="varying") if missing else array


def dependents(program: Program, leaves: Sequence[int]) -> set[int]:
    """The values that have a derivative by the leaves."""
    found = {leaf for leaf in leaves if is_differentiable(program.avals[leaf])}
    for equation in program.equations:
        if equation.name != "stop_gradient" and not found.isdisjoint(equation.inputs):
            found.update(
                number for number in equation.outputs if is_differentiable(program.avals[number])
            )
    return found


def as_number(program: Program, place: int) -> int:
    """The number of an output, which may be a literal."""
    output = program.outputs[place]
    if isinstance(output, Literal):
        value = jnp.asarray(output.value)
        program.avals.append(jax.typeof(value))
        program.outputs[place] = output = len(program.avals) - 1
        program.constants[output] = value
    return output


def returned(program: Program, values: dict[int, Any]) -> list[Any]:
    """What a program returns, of all values."""
    return [
        output.value if isinstance(output, Literal) else values[output]
        for output in program.outputs
    ]


def scan_parts(eqn: Any) -> tuple[int, int]:
    """How many constants and how many carried values a `scan` has.

    Slices have an axis more outside of its body, and so have outputs that are stacked. (What JAX
    calls these numbers differs from version to version.)
    """
    body = opened(eqn.params["jaxpr"])

    def are_whole(outside, inside):
        return sum(
            len(shape_of(a.aval)) == len(shape_of(b.aval))
            for a, b in zip(outside, inside, strict=True)
        )

    num_carry = are_whole(eqn.outvars, body.outvars)
    return are_whole(eqn.invars, body.invars) - num_carry, num_carry


def opened(jaxpr: Any) -> jax_core.Jaxpr:
    """A program within an equation, without its constants if it holds them."""
    return getattr(jaxpr, "jaxpr", jaxpr)
