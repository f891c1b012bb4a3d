"""Linear programs of some T variables, by the simplex method.

A step exchanges one basic variable of the tableau for another. All steps are the same elementwise
operations on one array, for a batch too, and the solution is a vertex: what is zero is exactly
zero. The inverse of the last basis is improved by Newton's iteration, so that rounding errors of
the exchanges do not stay.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from optax_surgery.algebra import solvers
from optax_surgery.algebra.arithmetic import dot, or_one

# 1 to 4 exchanges a row were seen, over Gramians of 2 to 48 tasks.
_MAX_EXCHANGES_PER_ROW = 10


def maximise(
    objective: jax.Array, matrix: jax.Array, bounds: jax.Array, normal: jax.Array
) -> solvers.Solution:
    """Maximises c'x over x >= 0 with Ax >= b and n'x = 1.

    The numbers in A should be of order 1: that is what rounding is measured by. Where the
    constraints exclude one another, x violates Ax >= b least, in sum. There is a derivative: the
    vertex moves with the constraints that it lies on. The objective has no share in it.

    Args:
      objective: (n,) c.
      matrix: (m, n) A. A row of zeros with a bound below zero is no constraint.
      bounds: (m,) b.
      normal: (n,) n, not negative.

    Returns:
      A `Solution` whose weights are x, (n,). Its residual is the larger of two: the largest
      violation of a constraint, relative to the largest variable, where that is above 1; and what
      a unit of a variable that is zero could add to the objective, relative to its largest
      coefficient. It counts as converged up to 4 sqrt(eps) of the dtype.
    """
    unit = lax.stop_gradient(or_one(jnp.max(jnp.abs(objective))))
    x, residual = _vertex(objective / unit, matrix, bounds, normal)
    residual = lax.stop_gradient(residual)
    tolerance = 4 * float(jnp.finfo(x.dtype).eps) ** 0.5
    return solvers.Solution(x, residual <= tolerance, residual)


class _Basis(NamedTuple):
    """The variables that may differ from zero, one a row, and the inverse of their columns."""

    variables: jax.Array
    inverse: jax.Array


@jax.custom_jvp
def _vertex(objective, matrix, bounds, normal):
    return _solve(objective, matrix, bounds, normal)[:2]


@_vertex.defjvp
def _vertex_jvp(primals, tangents):
    """B x = b holds for the basic variables while the others stay at zero."""
    objective, _, bounds, _ = primals
    _, dmatrix, dbounds, dnormal = tangents
    x, residual, basis = _solve(*primals)
    moved = jnp.append(_signs(bounds) * (dbounds - dot(dmatrix, x)), -dot(dnormal, x))
    dx = dot(dot(basis.inverse, moved), _selected(basis, objective.size))
    return (x, residual), (dx, jnp.zeros_like(residual))


def _solve(objective, matrix, bounds, normal) -> tuple[jax.Array, jax.Array, _Basis]:
    """The vertex, its residual and its basis, for an objective of size 1."""
    columns, right_side = _equations(matrix, bounds, normal)
    costs = _costs(objective, columns)
    basis = _simplex(columns, right_side, costs)
    values = jnp.maximum(dot(basis.inverse, right_side), 0)
    x = dot(values, _selected(basis, objective.size))

    shortfall = jnp.append(bounds - dot(matrix, x), jnp.abs(dot(normal, x) - 1))
    prices = dot(costs[1, basis.variables], basis.inverse)
    gains = dot(prices, columns) - costs[1]
    gain = jnp.max(gains[: gains.size - right_side.size])
    violation = jnp.max(shortfall) / jnp.maximum(jnp.max(x), 1)
    return x, jnp.maximum(violation, gain), basis


def _signs(bounds):
    return jnp.where(bounds > 0, 1, -1).astype(bounds.dtype)


def _equations(matrix, bounds, normal):
    """The constraints as equations between variables, slacks and, last, shortfalls.

    A x - slacks + shortfalls = b, each row with the sign that makes its right side positive, and
    n'x + shortfall = 1.
    """
    num_rows = len(bounds) + 1
    signs = _signs(bounds)
    rows = jnp.concatenate([signs[:, None] * matrix, normal[None, :]])
    shortfalls = jnp.diag(jnp.append(signs, jnp.ones((), matrix.dtype)))
    columns = jnp.concatenate([rows, -shortfalls[:, : num_rows - 1], shortfalls], axis=1)
    return columns, jnp.append(jnp.abs(bounds), jnp.ones((), matrix.dtype))


def _costs(objective, columns):
    """(2, N) what is minimised: first the sum of the shortfalls, then -c'x.

    That of n'x = 1 counts more than all others together, and is zero even if others cannot be.
    """
    num_rows, num_columns = columns.shape
    first = jnp.ones(num_rows, objective.dtype).at[-1].set(2 * num_rows)
    first = jnp.pad(first, (num_columns - num_rows, 0))
    second = jnp.pad(-objective, (0, num_columns - objective.size))
    return jnp.stack([first, second])


def _selected(basis, num_variables):
    """(m + 1, n) which variable each row of the basis is, if it is one of the first n."""
    chosen = basis.variables[:, None] == jnp.arange(num_variables)[None, :]
    return chosen.astype(basis.inverse.dtype)


def _simplex(columns, right_side, costs) -> _Basis:
    """The best basis; where no basis fulfils the equations, one that violates them least."""
    num_rows, num_columns = columns.shape
    first_shortfall = num_columns - num_rows
    # At first, what has the sign +1 in a row is basic: its shortfall or its slack.
    rows = jnp.arange(num_rows)
    has_shortfall = jnp.diagonal(columns[:, first_shortfall:]) > 0
    basic = first_shortfall + rows - jnp.where(has_shortfall, 0, num_rows - 1)
    basis = _Basis(basic, jnp.eye(num_rows, dtype=columns.dtype))
    # The second time begins where the first ended, without the rounding errors on the way.
    return lax.fori_loop(
        0, 2, lambda _, basis: _exchange_variables(basis, columns, right_side, costs), basis
    )


def _exchange_variables(basis, columns, right_side, costs) -> _Basis:
    """Exchanges basic variables until no exchange pays, or the limit is reached."""
    dtype = columns.dtype
    num_rows, num_columns = columns.shape
    first_shortfall = num_columns - num_rows
    rounding = 16 * num_rows * float(jnp.finfo(dtype).eps)
    index = jnp.arange(num_columns)

    def step(state):
        tableau, basic, num_stalls, _, num_steps = state
        body, right = tableau[:num_rows, :-1], jnp.maximum(tableau[:num_rows, -1], 0)
        short = basic >= first_shortfall
        infeasible = jnp.sum(jnp.where(short, right, 0)) > rounding
        reduced = jnp.where(infeasible, tableau[num_rows, :-1], tableau[num_rows + 1, :-1])
        improving = (reduced < -rounding) & (infeasible | (index < first_shortfall))
        # Bland's rule where steps keep changing nothing, so that no basis comes again.
        stalls = num_stalls > num_rows
        best = jnp.argmin(jnp.where(improving, reduced, jnp.inf))
        enters = jnp.where(stalls, jnp.argmax(improving), best)
        column = jnp.take(body, enters, axis=1)
        least = rounding * jnp.maximum(jnp.max(jnp.abs(column)), 1)
        # Once they can be zero, shortfalls leave whatever the sign: they must not grow again.
        zero = ~infeasible & short & (jnp.abs(column) > least)
        limits = zero | (column > least)
        divisors = jnp.where(column > least, column, 1)
        ratios = jnp.where(zero, 0, jnp.where(limits, right / divisors, jnp.inf))
        # Harris's rule: of the rows that are as near as rounding can tell, the largest pivot.
        reach = jnp.min(jnp.where(limits, ratios + rounding / divisors, jnp.inf))
        tied = limits & (ratios <= reach)
        largest = jnp.argmax(jnp.where(tied, jnp.abs(column), -1))
        leaves = jnp.where(stalls, jnp.argmin(jnp.where(tied, basic, num_columns)), largest)
        goes_on = jnp.any(improving) & jnp.any(limits)
        tableau = jnp.where(goes_on, _exchange(tableau, leaves, enters), tableau)
        basic = jnp.where((jnp.arange(num_rows) == leaves) & goes_on, enters, basic)
        num_stalls = jnp.where(jnp.take(ratios, leaves) <= rounding, num_stalls + 1, 0)
        return tableau, basic, num_stalls, goes_on, num_steps + 1

    def unfinished(state):
        return state[3] & (state[4] < _MAX_EXCHANGES_PER_ROW * num_rows)

    tableau = dot(basis.inverse, jnp.concatenate([columns, right_side[:, None]], axis=1))
    # The costs of the basic variables are taken out of the rows below.
    below = jnp.pad(costs, ((0, 0), (0, 1))) - dot(costs[:, basis.variables], tableau)
    tableau = jnp.concatenate([tableau, below])
    state = (tableau, basis.variables, 0, jnp.bool_(True), 0)
    tableau, basic = lax.while_loop(unfinished, step, state)[:2]

    signs = jnp.diagonal(columns[:, first_shortfall:])
    inverse = signs[None, :] * tableau[:num_rows, first_shortfall:num_columns]
    base = jnp.take(columns, basic, axis=1)
    gap = jnp.eye(num_rows, dtype=dtype) - dot(base, inverse)
    converges = jnp.sum(gap**2) < 0.5
    return _Basis(basic, jnp.where(converges, inverse + dot(inverse, gap), inverse))


def _exchange(tableau, row, column):
    """Gauss's elimination of a column from all rows but one."""
    pivot_row = jnp.take(tableau, row, axis=0)
    pivot_row = pivot_row / or_one(jnp.take(pivot_row, column))
    factors = jnp.take(tableau, column, axis=1)
    here = (jnp.arange(len(tableau)) == row)[:, None]
    return jnp.where(here, pivot_row[None, :], tableau - factors[:, None] * pivot_row[None, :])
