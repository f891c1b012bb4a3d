"""The Gramian of parameters within loops and rematerialised parts, which hand nothing out.

A tap is a vector of T zeros beside the parameters, and what comes back for it, in a backward pass
that `vmap` runs for all tasks, is by definition a row of the Gramian. Where tasks have data of
their own, each has a tap of its own: what comes back of a term without data is the same for all,
and `vmap` would pass it by. Within the body of a `scan` it is summed up as any constant's
derivative is: one layer's products live as long as that layer's part of the pass. What is not
multiplied in the body as a matrix is tapped where it comes in, as it is: its T gradients are
formed, contracted and let go.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jax.extend import core as jax_core
from jax.sharding import AxisType

from optax_surgery import trees
from optax_surgery.programs import flat, outer_products, over_tasks

REMATERIALISED = frozenset(["checkpoint", "remat", "remat2"])
_CHAIN = frozenset(["convert_element_type", "reshape", "transpose", "copy", "copy_p"])


def goes_on(equation: flat.Equation) -> bool:
    """Whether this makes of a parameter the same numbers in another dtype, shape or order."""
    return equation.name in _CHAIN and flat.is_floating(equation.eqn.outvars[0].aval)


def marked_places(equation: flat.Equation) -> range:
    """The operands of an equation that can be tapped within: slices of a loop, all of a part."""
    if equation.name == "scan":
        return range(sum(flat.scan_parts(equation.eqn)), len(equation.inputs))
    if equation.name in REMATERIALISED:
        return range(len(equation.inputs))
    return range(0)


def run(
    equation: flat.Equation, operands: Sequence[Any], marks: Sequence[bool], tap: jax.Array
) -> list[Any]:
    """Runs a loop or a rematerialised part, with the marked operands tapped.

    Args:
      equation: one of those that `marked_places` knows.
      operands: all of its operands, literals too.
      marks: which of them are parameters.
      tap: (T,) zeros.
    """
    if equation.name == "scan":
        return _scan(equation.eqn, operands, marks, tap)
    params = equation.eqn.params
    inner = jax_core.ClosedJaxpr(params["jaxpr"], ())
    names = ("prevent_cse", "policy")
    run_part = jax.checkpoint(
        lambda tap, *operands: _run(inner, operands, marks, tap),
        **{name: params[name] for name in names},
    )
    return run_part(tap, *operands)


def _scan(
    eqn: jax_core.JaxprEqn, operands: Sequence[Any], marks: Sequence[bool], tap: jax.Array
) -> list[Any]:
    params = eqn.params
    num_consts, num_carry = flat.scan_parts(eqn)
    consts, carry = operands[:num_consts], operands[num_consts : num_consts + num_carry]

    def body(carry, slices):
        outputs = _run(params["jaxpr"], [*consts, *carry, *slices], marks, tap)
        return outputs[:num_carry], outputs[num_carry:]

    carry, stacked = lax.scan(
        body,
        list(carry),
        list(operands[num_consts + num_carry :]),
        length=params["length"],
        reverse=params["reverse"],
        unroll=params["unroll"],
    )
    return [*carry, *stacked]


def _run(
    closed: jax_core.ClosedJaxpr, operands: Sequence[Any], marks: Sequence[bool], tap: jax.Array
) -> list[Any]:
    """Runs a program; each marked value meets the tap once, where it is multiplied or comes in."""
    program = flat.flatten(closed)
    number_of_uses = Counter(
        number for equation in program.equations for number in equation.inputs if number is not None
    )
    number_of_uses.update(number for number in program.outputs if isinstance(number, int))
    values: dict[int, Any] = dict(program.constants)
    chains: dict[int, list[flat.Equation]] = {}  # of values that have not met the tap

    def write(number, value, chain):
        if chain is not None and number_of_uses[number] != 1:
            value, chain = _tapped(value, tap), None
        values[number] = value
        if chain is not None:
            chains[number] = chain

    for number, operand, mark in zip(program.inputs, operands, marks, strict=True):
        write(number, operand, [] if mark else None)
    for equation in program.equations:
        untapped = [place for place, number in enumerate(equation.inputs) if number in chains]
        if untapped and goes_on(equation):
            chain = [*chains[equation.inputs[0]], equation]  # pyright: ignore[reportArgumentType]
            (value,) = flat.run_equation(equation, [values[equation.inputs[0]]])  # pyright: ignore
            write(equation.outputs[0], value, chain)
            continue
        outputs = _outputs(equation, untapped, chains, values, tap)
        for number, value in zip(equation.outputs, outputs, strict=True):
            values[number] = value
    return [
        output.value if isinstance(output, flat.Literal) else _settled(output, chains, values, tap)
        for output in program.outputs
    ]


def _settled(number: int, chains: dict[int, Any], values: dict[int, Any], tap: jax.Array) -> Any:
    return _tapped(values[number], tap) if number in chains else values[number]


def _outputs(
    equation: flat.Equation,
    untapped: Sequence[int],
    chains: dict[int, list[flat.Equation]],
    values: dict[int, Any],
    tap: jax.Array,
) -> list[Any]:
    within = marked_places(equation)
    if untapped and all(place in within for place in untapped):
        marks = [place in untapped for place in range(len(equation.inputs))]
        return run(equation, operands_of(equation, values), marks, tap)
    if len(untapped) == 1:
        (place,) = untapped
        use = outer_products.use_of((), equation, place)
        if use is not None and equation.name == "dot_general":
            x, matrix = values[equation.inputs[1 - place]], values[equation.inputs[place]]  # pyright: ignore
            return [_multiplied(use, tap)(x, matrix, tap)]
    operands = [
        _settled(number, chains, values, tap) for number in equation.inputs if number is not None
    ]
    return flat.run_equation(equation, operands)


def operands_of(equation: flat.Equation, values: dict[int, Any]) -> list[Any]:
    """The values of all operands of an equation, literals too."""
    return [
        var.val if number is None else values[number]
        for var, number in zip(equation.eqn.invars, equation.inputs, strict=True)
    ]


def _tapped(leaf: jax.Array, tap: jax.Array) -> jax.Array:
    """A parameter as it is, of which the tap takes the inner products."""

    @custom_vmap
    def row(gradient, leaf, tap):  # of one task, as of a weighted sum, nobody asks
        return jnp.zeros_like(tap)

    @row.def_vmap
    def rows(axis_size, in_batched, gradients, leaf, tap):
        has_gradient, has_leaf, has_tap = in_batched
        if axis_size != tap.shape[-1]:  # such a sum, for several seeds
            return jnp.zeros_like(tap), has_tap
        gradients = _for_tasks(gradients, has_gradient, axis_size)
        if not has_leaf:
            gradients = over_tasks.as_param(gradients, leaf)
        return _like_tap(trees.gramian(gradients), tap), True

    @jax.custom_vjp
    def identity(leaf, tap):
        return leaf

    def forward(leaf, tap):
        return leaf, (leaf, tap)

    def backward(kept, gradient):
        return gradient, row(gradient, *kept)

    identity.defvjp(forward, backward)
    return identity(leaf, tap)


def _like_tap(gramian: jax.Array, tap: jax.Array) -> jax.Array:
    sharding = jax.typeof(tap).sharding
    if tap.ndim == gramian.ndim and AxisType.Explicit in sharding.mesh.axis_types:
        gramian = jax.sharding.reshard(gramian, sharding)  # a row for each task, where it lies
    return flat.varying_over(gramian.astype(tap.dtype), flat.varying_axes(tap))


def _for_tasks(array: jax.Array, has_axis: bool, num_tasks: int) -> jax.Array:
    return array if has_axis else jnp.broadcast_to(array, (num_tasks, *array.shape))


def _multiplied(use: outer_products.Use, tap: jax.Array) -> Callable[..., jax.Array]:
    """The product of x and a matrix, of whose gradients the tap takes the inner products."""

    def product(x, matrix):
        operands = [x, matrix] if use.place else [matrix, x]
        return flat.run_equation(use.equation, operands)[0]

    @custom_vmap
    def row(x, cotangent, matrix, tap):
        return jnp.zeros_like(tap)

    @row.def_vmap
    def rows(axis_size, in_batched, x, cotangent, matrix, tap):
        owned, has_d, has_matrix, has_tap = in_batched
        if axis_size != tap.shape[-1]:
            return jnp.zeros_like(tap), has_tap
        cotangent = _for_tasks(cotangent, has_d, axis_size)
        x = outer_products.left(use, x, owned)
        d = outer_products.right(use, cotangent, stacked=True)
        factors = outer_products.Factors(use, x, d)
        return _like_tap(_inner_products(factors, None if has_matrix else matrix), tap), True

    @jax.custom_vjp
    def multiply(x, matrix, tap):
        return product(x, matrix)

    def forward(x, matrix, tap):
        return product(x, matrix), (x, matrix, tap)

    def backward(kept, cotangent):
        x, matrix, tap = kept
        derivatives = jax.vjp(product, x, matrix)[1](cotangent)
        return *derivatives, row(x, cotangent, matrix, tap)

    multiply.defvjp(forward, backward)
    return multiply


def _inner_products(factors: outer_products.Factors, matrix: jax.Array | None) -> jax.Array:
    """By what is cheaper; either way no more than one matrix's gradients are formed."""
    use, num_tasks = factors.use, factors.d.shape[0]
    costs = [
        cost([use], num_tasks, factors.owned)
        for cost in (outer_products.product_cost, outer_products.stack_cost)
    ]
    if costs[0] <= costs[1]:
        return outer_products.gramian([factors])
    subscripts = "tpk,tpo->tko" if factors.owned else "pk,tpo->tko"
    x, d = outer_products.same_dtype(factors.x, factors.d)
    stack = jnp.einsum(subscripts, x, d, precision=use.equation.eqn.params["precision"])
    if matrix is not None and matrix.ndim == 2 and use.axes is not None:
        (rows,) = use.equation.eqn.params["dimension_numbers"][0][use.place]
        stack = over_tasks.as_param(stack, matrix.T if rows else matrix)
    return trees.gramian(stack)
