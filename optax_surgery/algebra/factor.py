"""Positive definite systems of T equations, for the solvers.

LAPACK is called through a thread pool of its own, which on a CPU competes with XLA's, and which
batches under `jax.vmap` have been seen to wait for without end. So small systems are eliminated
here, elementwise, by a loop that is the same for a batch and on every platform; large systems
reach LAPACK one at a time.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import jax.scipy.linalg
from jax import lax

# Where a solver's run on one CPU core, its other work included, takes as long by either way.
# Microseconds, by elimination and by LAPACK, for `min_norm_point` and, in brackets, for T
# projections in a batch: T = 4, 22 and 22 (35 and 49); 8, 22 and 28 (75 and 90); 12, 41 and 41
# (229 and 148); 16, 51 and 45 (570 and 265); 32, 78 and 65 (2,070 and 1,360).
_MAX_ELIMINATED = 12


def positive_definite_solver(matrix: jax.Array) -> Callable[[jax.Array], jax.Array]:
    """Factors a positive definite matrix.

    Args:
      matrix: (T, T), symmetric. Rounding may have made it indefinite: up to T = 12, a pivot that
        is not above the rounding of its diagonal entry counts as that; beyond, the solutions are
        NaN. They are NaN, too, where the matrix is not finite.

    Returns:
      What solves with it, for right sides (T,) or (T, k).
    """
    if len(matrix) <= _MAX_ELIMINATED:
        return _elimination_solver(matrix)
    return _lapack_solver(matrix)


def _elimination_solver(matrix: jax.Array) -> Callable[[jax.Array], jax.Array]:
    """M A M' = D by Gauss's elimination, with M the inverse of a unit lower triangle.

    With M, a solution is two products; substitution would be a loop again.
    """
    eliminated = _eliminate(matrix)
    pivots = jnp.diagonal(eliminated)
    inverse = jnp.tril(eliminated, -1) + jnp.eye(len(matrix), dtype=matrix.dtype)

    def solve_one(right_side):
        reduced = jnp.sum(inverse * right_side[None, :], axis=1) / pivots
        return jnp.sum(inverse * reduced[:, None], axis=0)

    def solve(right_side):
        if right_side.ndim == 1:
            return solve_one(right_side)
        return jax.vmap(solve_one, in_axes=1, out_axes=1)(right_side)

    return solve


def _eliminate(matrix: jax.Array) -> jax.Array:
    """The pivots D on the diagonal, and below it M, in the place of the zeros."""
    index = jnp.arange(len(matrix))
    limits = jnp.finfo(matrix.dtype)
    least = jnp.maximum(limits.eps * jnp.abs(jnp.diagonal(matrix)), limits.tiny)

    def step(k, reduced):
        row = lax.dynamic_index_in_dim(reduced, k, 0, keepdims=False)
        column = lax.dynamic_index_in_dim(reduced, k, 1, keepdims=False)
        pivot = lax.dynamic_index_in_dim(row, k, 0, keepdims=False)
        pivot = jnp.maximum(pivot, lax.dynamic_index_in_dim(least, k, 0, keepdims=False))
        here, below = index == k, index > k
        ratio = jnp.where(below, column / pivot, 0)
        reduced = jnp.where(below[:, None] & here[None, :], 0, reduced)
        return reduced - ratio[:, None] * jnp.where(here, 1, row)[None, :]

    eliminated = lax.fori_loop(0, len(matrix), step, matrix)
    pivots = jnp.maximum(jnp.diagonal(eliminated), least)
    return jnp.where(index[:, None] == index[None, :], pivots[:, None], eliminated)


def _one_at_a_time(function: Callable) -> Callable:
    """Of a batch under vmap, lets one after the other reach LAPACK on a CPU.

    `jax.custom_batching.sequential_vmap` would do so everywhere; a GPU factors a batch at once.
    """
    one_by_one = jax.custom_batching.custom_vmap(function)

    @one_by_one.def_vmap
    def batched(size, in_batched, *arguments):
        def in_turn(*arguments):
            return lax.map(lambda xs: one_by_one(*xs), arguments)

        spread = [
            argument if is_batched else jnp.broadcast_to(argument, (size, *argument.shape))
            for argument, is_batched in zip(arguments, in_batched, strict=True)
        ]
        return lax.platform_dependent(*spread, cpu=in_turn, default=jax.vmap(function)), True

    return one_by_one


@_one_at_a_time
def _cholesky(matrix: jax.Array) -> jax.Array:
    return jnp.linalg.cholesky(matrix, symmetrize_input=False)


@_one_at_a_time
def _substitute(factor: jax.Array, right_side: jax.Array) -> jax.Array:
    return jax.scipy.linalg.cho_solve((factor, True), right_side)


def _lapack_solver(matrix: jax.Array) -> Callable[[jax.Array], jax.Array]:
    factor = _cholesky(matrix)

    def multiply(x):
        return jnp.dot(matrix, x, precision=lax.Precision.HIGHEST)

    def solve(right_side):
        # says that the matrix is its own transpose: `custom_vmap` cannot be transposed
        return lax.custom_linear_solve(
            multiply, right_side, lambda _, b: _substitute(factor, b), symmetric=True
        )

    return solve
