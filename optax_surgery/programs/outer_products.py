r"""The gradient of a matrix as what went in times what came back, and what its ways cost.

Where a program uses a matrix W of K x O numbers in y = x W, the gradient of loss i is
:math:`x^\top d_i`, with :math:`d_i` the derivative of the loss by y. Its inner products
:math:`\langle x^\top d_i, x^\top d_j\rangle = \sum_{pq} (x_p \cdot x_q) (d_{ip} \cdot d_{jq})`
need no gradient, and the weighted sum :math:`x^\top \sum_i w_i d_i` needs but one. An embedding is
the product whose x has a one in each row; there :math:`x_p \cdot x_q` asks for equal tokens.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from optax_surgery import products
from optax_surgery.programs import flat

# What it costs to write a number and to read it again, in multiplications. An estimate: with it, no
# network of `benchmarks.systems.step_cost` takes a way on a CPU that is much slower than its stack.
_MOVE = 16


class Use(NamedTuple):
    """A use of a parameter in a product, or as the table of an embedding.

    Attributes:
      chain: the equations that make the matrix of the parameter: casts, reshapes, transpositions.
      equation: the product.
      place: of the matrix among its operands.
      size: (P, K, O), rows of x, rows and columns of the matrix as it is used.
      axes: the parameter's axis that is the matrix's rows, where it has two axes of which the
        product takes one; None where that cannot be told.
    """

    chain: tuple[flat.Equation, ...]
    equation: flat.Equation
    place: int
    size: tuple[int, int, int]
    axes: tuple[int, ...] | None

    @property
    def output(self) -> int:
        """The number of y."""
        return self.equation.outputs[0]


def use_of(chain: Sequence[flat.Equation], equation: flat.Equation, place: int) -> Use | None:
    """The use of a parameter in this equation, None where it is no product."""
    eqn = equation.eqn
    shapes = [flat.shape_of(var.aval) for var in eqn.invars]
    if any(flat.is_sharded(var.aval) for var in (*eqn.invars, *eqn.outvars)):
        return None  # products of such rows want to be told where they lie
    if equation.name == "dot_general":
        if not all(flat.is_floating(var.aval) for var in eqn.invars):
            return None
        (contracted, batch) = eqn.params["dimension_numbers"]
        if batch[0] or eqn.params.get("out_sharding") is not None:
            return None
        rows = contracted[place]
        size = math.prod(shapes[place][axis] for axis in rows)
        other = math.prod(shapes[1 - place])
        sizes = (other // max(size, 1), size, math.prod(shapes[place]) // max(size, 1))
    elif equation.name == "gather" and place == 0 and _takes_rows(eqn, shapes[0]):
        rows = (0,)
        columns = math.prod(shapes[0][1:])
        sizes = (math.prod(eqn.outvars[0].aval.shape) // max(columns, 1), shapes[0][0], columns)
    else:
        return None
    if not all(sizes):
        return None
    return Use(tuple(chain), equation, place, sizes, _axes(chain, rows, shapes[place]))


def _takes_rows(eqn: Any, shape: tuple[int, ...]) -> bool:
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    return (
        not numbers.operand_batching_dims
        and len(shape) > 1
        and tuple(sizes) == (1, *shape[1:])
        and jnp.issubdtype(eqn.invars[1].aval.dtype, jnp.integer)
    )


def _axes(
    chain: Sequence[flat.Equation], rows: Sequence[int], shape: tuple[int, ...]
) -> tuple[int, ...] | None:
    """The rows' axes before the chain, of a matrix that is cast and transposed only."""
    if len(shape) != 2 or len(rows) != 1:
        return None
    axes = tuple(rows)
    for equation in reversed(chain):
        if equation.name == "transpose":
            axes = tuple(equation.eqn.params["permutation"][axis] for axis in axes)
        elif equation.name == "reshape":
            return None
    return axes


# What goes in and what comes back, as matrices


def left(use: Use, operand: jax.Array, owned: bool = False) -> jax.Array:
    """x of shape (P, K), or (P,) tokens, of what the equation's other operand is.

    With data of each task's own, the operand and x have a leading task axis.
    """
    eqn = use.equation.eqn
    if use.equation.name == "gather":
        tokens = functools.partial(_tokens, eqn)
        return (jax.vmap(tokens) if owned else tokens)(operand)
    axes = eqn.params["dimension_numbers"][0][1 - use.place]
    x = _at_the_end(operand, [axis + owned for axis in axes])
    return x.reshape(*operand.shape[:owned], *use.size[:2])


def _tokens(eqn: Any, indices: jax.Array) -> jax.Array:
    """The row that each index takes, after clipping; -1 where it is out of bounds and dropped."""
    rows = lax.broadcasted_iota(jnp.int32, eqn.invars[0].aval.shape, 0)
    rows = flat.varying_over(rows, flat.varying_axes(indices))
    taken = eqn.primitive.bind(rows, indices, **{**eqn.params, "fill_value": -1})
    for axis in reversed(eqn.params["dimension_numbers"].offset_dims):
        taken = lax.index_in_dim(taken, 0, axis, keepdims=False)
    return taken.reshape(-1)


def right(use: Use, cotangent: jax.Array, stacked: bool = False) -> jax.Array:
    """d of shape (P, O) of the derivative by y; (T, P, O) if T of them are stacked."""
    eqn, (num_rows, _, columns) = use.equation.eqn, use.size
    columns_at: Sequence[int] = ()
    if use.equation.name == "gather":
        columns_at = eqn.params["dimension_numbers"].offset_dims
    elif use.place == 0:
        contracted = eqn.params["dimension_numbers"][0][0]
        columns_at = range(eqn.invars[0].aval.ndim - len(contracted))
    d = _at_the_end(cotangent, [axis + stacked for axis in columns_at])
    return d.reshape(*cotangent.shape[:stacked], num_rows, columns)


def _at_the_end(array: jax.Array, axes: Sequence[int]) -> jax.Array:
    others = [axis for axis in range(array.ndim) if axis not in axes]
    order = [*others, *axes]
    return array if order == list(range(array.ndim)) else lax.transpose(array, order)


def gradient(use: Use, x: jax.Array, d: jax.Array, like: Any) -> jax.Array:
    """The gradient of the parameter, of its shape and dtype, for one d of shape (P, O)."""
    eqn = use.equation.eqn
    matrix = eqn.invars[use.place].aval
    if use.equation.name == "gather":
        return _back(use, _scattered(x, d, use.size[1]).reshape(matrix.shape), like)
    found = _x_times_d(x, d, eqn.params["precision"])
    contracted = eqn.params["dimension_numbers"][0][use.place]
    order = [*contracted, *(axis for axis in range(matrix.ndim) if axis not in contracted)]
    found = found.reshape([matrix.shape[axis] for axis in order])
    if order != sorted(order):
        found = jnp.transpose(found, [order.index(axis) for axis in range(matrix.ndim)])
    return _back(use, found, like)


def weighted_gradient(weights: jax.Array, factors: "Factors", like: Any) -> jax.Array:
    """The weighted sum of the gradients, in one product.

    What has no weight takes no part, also if it is not a number.
    """
    use, x, d = factors
    if factors.owned:  # what comes back for each task's own rows
        if not factors.is_embedding:
            x = _where_weighted(weights, x)
        return gradient(use, x.reshape(-1, *x.shape[2:]), _weighted_rows(weights, d), like)
    weights = weights.astype(accumulation_dtype(d))
    mixed = products.leaf_combination(weights, d, task_mask=weights != 0)
    return gradient(use, x, mixed, like)


# Matrices of one shape are traced and lowered once.


@functools.partial(jax.jit, static_argnames="precision")
def _x_times_d(x, d, precision):
    wide = accumulation_dtype(x, d)
    x, d = same_dtype(x, d)
    dimensions = (((0,), (0,)), ((), ()))
    return lax.dot_general(x, d, dimensions, precision=precision, preferred_element_type=wide)


@functools.partial(jax.jit, static_argnames="num_rows")
def _scattered(tokens, d, num_rows):
    d = d.astype(accumulation_dtype(d))
    rows = jnp.where(tokens < 0, num_rows, tokens)
    return lax.full_like(d, 0, shape=(num_rows, d.shape[1])).at[rows].add(d, mode="drop")


@jax.jit
def _where_weighted(weights, rows):
    has_weight = lax.expand_dims(weights != 0, range(1, rows.ndim))
    return jnp.where(has_weight, rows, jnp.zeros((), rows.dtype))


@jax.jit
def _weighted_rows(weights, d):
    wide = accumulation_dtype(d)
    rows = lax.expand_dims(weights.astype(wide), (1, 2)) * _where_weighted(weights, d).astype(wide)
    return rows.reshape(-1, d.shape[-1])


def _back(use: Use, found: jax.Array, like: Any) -> jax.Array:
    """From the matrix's gradient to the parameter's: the chain's reshapes turned round."""
    for equation in reversed(use.chain):
        if equation.name == "transpose":
            permutation = equation.eqn.params["permutation"]
            found = jnp.transpose(found, [permutation.index(axis) for axis in range(found.ndim)])
        else:
            found = found.reshape(equation.eqn.invars[0].aval.shape)
    return found.astype(like.dtype)


def accumulation_dtype(*arrays: jax.Array) -> jnp.dtype:
    """The dtype of sums of such numbers: float32, float64 for float64."""
    is_wide = any(array.dtype == jnp.float64 for array in arrays)
    return jnp.dtype(jnp.float64 if is_wide else jnp.float32)


def same_dtype(x: jax.Array, d: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Both in one dtype that holds them."""
    dtype = x.dtype if x.dtype == d.dtype else accumulation_dtype(x, d)
    return x.astype(dtype), d.astype(dtype)


# The Gramian of the products, without a gradient


class Factors(NamedTuple):
    """One use of a matrix by T tasks.

    Attributes:
      use: of the matrix.
      x: (P, K) or (P,) tokens, the same for all tasks; or (T, P, K), (T, P) where each has data of
        its own.
      d: (T, P, O).
    """

    use: Use
    x: jax.Array
    d: jax.Array

    @property
    def owned(self) -> bool:
        """Whether each task has data of its own."""
        return self.x.ndim == (2 if self.is_embedding else 3)

    @property
    def is_embedding(self) -> bool:
        """Whether x is tokens."""
        return jnp.issubdtype(self.x.dtype, jnp.integer)


def gramian(uses: Sequence[Factors]) -> jax.Array:
    """The (T, T) inner products of the gradients of one parameter, of all its uses."""
    total = None
    for place, one in enumerate(uses):
        if one.is_embedding:
            own = _equal_tokens(one.x, one.d)
        else:
            own = _cross_products((one.x, one.d), (one.x, one.d), one.owned, True)
        total = own if total is None else total + own
        for other in uses[:place]:
            same_sides = one.use.axes == other.use.axes
            cross = _cross_products((one.x, one.d), (other.x, other.d), one.owned, same_sides)
            total = total + cross + cross.T
    assert total is not None
    return total


@jax.jit
def _equal_tokens(x: jax.Array, d: jax.Array) -> jax.Array:
    """Sums what came back for equal tokens, of which there are at most as many as rows."""
    num_tasks, num_rows, columns = d.shape
    tokens = x.reshape(-1)
    _, place = jnp.unique(tokens, return_inverse=True, size=tokens.size, fill_value=-1)
    place = jnp.where(tokens < 0, tokens.size, place.reshape(-1)).reshape(-1, num_rows)
    place = jnp.broadcast_to(place, (num_tasks, num_rows))
    # Of data of their own, tasks have at most all their tokens in common.
    sums = lax.full_like(d, 0, accumulation_dtype(d), (num_tasks, tokens.size, columns))
    task = jnp.arange(num_tasks)[:, None]
    sums = sums.at[task, place].add(d.astype(sums.dtype), mode="drop")
    return products.gramian_of_leaves([(sums,)], dtype=sums.dtype)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _cross_products(
    one: tuple[jax.Array, jax.Array],
    other: tuple[jax.Array, jax.Array],
    owned: bool,
    same_sides: bool,
) -> jax.Array:
    """The (T, T) inner products of the gradients from two uses of one matrix, x and d of each.

    Args:
      one: x and d of the one use.
      other: those of the other.
      owned: whether each task has data of its own.
      same_sides: whether the x of both go with the rows of the matrix.
    """
    (one_x, one_d), (other_x, other_d) = one, other
    if not owned:
        one_x, other_x = one_x[None], other_x[None]
    if same_sides:
        by_rows = _inner(one_x, other_x)
        if not owned:  # no task in it: T times fewer products than by columns
            return _mixed_products(by_rows[0, :, 0], one_d, other_d)
        return jnp.sum(by_rows * _inner(one_d, other_d), axis=(1, 3))
    # The rows of the one are the columns of the other.
    by_rows, by_columns = _inner(one_x, other_d), _inner(one_d, other_x)
    if not owned:
        return _product("psq,tpq->ts", by_rows[0], by_columns[:, :, 0])
    return jnp.sum(by_rows * by_columns, axis=(1, 3))


def _mixed_products(inner: jax.Array, one: jax.Array, other: jax.Array) -> jax.Array:
    """The sums over p and q of inner_pq one_tp . other_sq, for inner products of (P, Q)."""

    def natural(inner, one, other):
        return _product("tpo,spo->ts", one, _product("pq,sqo->spo", inner, other))

    def flattened(inner, one, other):  # XLA would bring both products into another layout
        inner = jnp.broadcast_to(inner, (len(other), *inner.shape))
        mixed = _product("spq,sqo->spo", inner, other)
        return _product("tn,sn->ts", one.reshape(len(one), -1), mixed.reshape(len(other), -1))

    cpu = natural if products.may_be_partitioned(one) else flattened
    return lax.platform_dependent(inner, one, other, cpu=cpu, default=natural)


def _inner(one: jax.Array, other: jax.Array) -> jax.Array:
    """(T, P, T, Q) inner products of rows; one of them, or both, may be tokens."""
    if one.ndim == 2 and other.ndim == 2:
        equal = (one[:, :, None, None] == other[None, None]) & (one >= 0)[:, :, None, None]
        return equal.astype(jnp.float32)
    if other.ndim == 2:
        return jnp.moveaxis(_inner(other, one), (0, 1), (2, 3))
    if one.ndim == 2:  # the products with ones at the tokens' places
        taken = jnp.take(other, jnp.maximum(one, 0), axis=2)
        taken = jnp.where((one >= 0)[None, None], taken, 0)
        return jnp.moveaxis(taken, (2, 3), (0, 1)).astype(accumulation_dtype(other))
    return _product("tpk,sqk->tpsq", one, other)


def _product(subscripts: str, one: jax.Array, other: jax.Array) -> jax.Array:
    one, other = same_dtype(one, other)
    return jnp.einsum(
        subscripts,
        one,
        other,
        precision=lax.Precision.HIGHEST,
        preferred_element_type=accumulation_dtype(one, other),
    )


# What the ways cost, in multiplications


def product_cost(uses: Sequence[Use], num_tasks: int, owned: bool) -> int:
    """Of the inner products by what went in and what came back."""
    total = 0
    for place, use in enumerate(uses):
        num_rows, rows, columns = use.size
        everywhere = num_tasks * num_rows
        if use.equation.name == "gather":
            tokens = everywhere if owned else num_rows
            total += num_tasks**2 * tokens * columns + 2 * _MOVE * num_tasks * tokens * columns
        elif owned:
            total += everywhere**2 * (rows + columns + 2 * _MOVE)
            total += num_tasks * num_rows * rows * columns  # the update
        else:
            total += num_rows**2 * (rows + num_tasks * columns + _MOVE)
            total += num_tasks * num_rows * columns * (num_tasks + 2 * _MOVE)
            total += num_rows * rows * columns  # the update
        for other in uses[:place]:
            pairs = num_rows * other.size[0]
            total += num_tasks**2 * pairs * (2 * _MOVE)
            total += (num_tasks if not owned else num_tasks**2) * pairs * (rows + columns)
    return total


def stack_cost(uses: Sequence[Use], num_tasks: int, owned: bool) -> int:
    """Of T gradients, their inner products, and their weighted sum."""
    del owned  # a task's gradient takes its own rows, or all: as many
    num_entries = uses[0].size[1] * uses[0].size[2]
    total = num_tasks * num_entries * (num_tasks + 3 * _MOVE)
    for use in uses:
        if use.equation.name == "gather":
            total += 2 * _MOVE * num_tasks * use.size[0] * use.size[2]
        else:
            total += num_tasks * use.size[0] * num_entries
    return total


def kept_numbers(use: Use, num_tasks: int, owned: bool) -> int:
    """How many numbers x and d are."""
    num_rows, rows, columns = use.size
    x = num_rows * (1 if use.equation.name == "gather" else rows)
    return num_tasks * num_rows * columns + (num_tasks * x if owned else x)
