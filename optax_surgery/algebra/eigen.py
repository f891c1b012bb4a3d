"""Eigenvalues of Gramians, each right relative to itself.

A Gramian is G = D C D with the norms D and the cosines C. Its entries are right relative to
the norms of their two rows, so that it knows of a short gradient as much as of a long one.
LAPACK's eigenvalues are right relative to the largest only: of gradients that are shorter by a
factor of 2,000 than the longest, nothing is left in float32. Jacobi's method keeps all that the
cosines let one know, however much the norms differ (Demmel and Veselic, Jacobi's method is more
accurate than QR, SIAM J. Matrix Anal. Appl. 13(4), 1992). Three steps:

1. A Cholesky factorisation of the cosines, C = L L', which stops where no gradient has a part
   left that is independent of those before. What depends on what does not depend on lengths.
2. The rows of D L, the longest first, are brought to triangular form by rotations, which makes
   small what the third step has to do.
3. Rotations of pairs of columns until all are orthogonal (one-sided Jacobi): their lengths are
   then the singular values, their directions the eigenvectors of G. T / 2 disjoint pairs are
   rotated side by side, in the order of Brent and Luk (The solution of singular-value and
   symmetric eigenvalue problems on multiprocessor arrays, SIAM J. Sci. Stat. Comput. 6(1),
   1985), in which partners stay side by side and the pairs move on by one place.

No step calls LAPACK: all are the same on every platform, under `vmap`, in any number of threads.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from optax_surgery.algebra.arithmetic import dot, or_one

_MAX_SWEEPS = 20


class Spectrum(NamedTuple):
    """What the eigendecomposition of a Gramian says, without its eigenvectors.

    They have no derivative where eigenvalues are equal, and what is made of them here has one.

    Attributes:
      values: (T,) singular values of the gradient matrix, the roots of the Gramian's eigenvalues,
        ascending; zero for what depends on others, zero gradients among them.
      inverse_root: (T, T), the pseudo-inverse of the Gramian's square root.
      independence: (T,) in [0, 1], the share of each task that the kept eigenvectors span. Of a
        matrix of cosines it is 1 where a gradient is linearly independent of the others, and less
        where it is a part of a combination that vanishes; 0 for a zero gradient.
    """

    values: jax.Array
    inverse_root: jax.Array
    independence: jax.Array


def spectrum(gramian: jax.Array) -> Spectrum:
    """Singular values and the inverse square root, each right relative to itself.

    A gradient counts as dependent on others if the square of the sine of its angle to them is at
    most 4 T eps: as two parallel gradients whose matrix of cosines has an eigenvalue of T eps
    of the other.

    Args:
      gramian: (T, T) inner products; rows of absent tasks are zero. Of one that is not symmetric,
        the symmetric part counts; what is not positive semidefinite counts as dependent.

    Returns:
      A `Spectrum`, not finite if the Gramian is not. It can be differentiated, at equal
      eigenvalues too: the mean of their derivatives is that of each. Where gradients are
      dependent the derivative is that for changes that leave the rank as it is.
    """
    symmetric = (gramian + gramian.T) / 2
    # The result is homogeneous, so that its unit is a constant also for derivatives.
    peak = lax.stop_gradient(jnp.max(jnp.diagonal(symmetric)))
    peak = jnp.where(peak == 0, 1, jnp.abs(peak))
    found = _unit_spectrum(symmetric / peak)
    unit = jnp.sqrt(peak)
    return Spectrum(found.values * unit, found.inverse_root / unit, found.independence)


@jax.custom_jvp
def _unit_spectrum(gramian):
    return _assemble(*_decompose(gramian))


def _assemble(values, vectors):
    scaled = vectors / or_one(values)[None, :]
    return Spectrum(values, dot(scaled, vectors.T), jnp.sum(vectors**2, axis=1))


@_unit_spectrum.defjvp
def _unit_spectrum_jvp(primals, tangents):
    """Daleckii and Krein's formula; the divided differences of 1 / sqrt have a closed form."""
    (gramian,), (change,) = primals, tangents
    values, vectors = _decompose(gramian)
    found = _assemble(values, vectors)
    kept, safe = values != 0, or_one(values)

    moved = dot(change, vectors)
    inner = dot(vectors.T, moved)
    pairs = kept[:, None] & kept[None, :]
    sums = safe[:, None] + safe[None, :]
    divided = jnp.where(pairs, -1 / (safe[:, None] * safe[None, :] * sums), 0)
    change_of_root = dot(vectors, dot(divided * inner, vectors.T))

    # Between the span of the gradients and what is beyond it.
    dependent = jnp.sum(kept) < jnp.sum(jnp.diagonal(gramian) != 0)
    beyond = jnp.where(dependent, moved - dot(vectors, inner), 0)
    across = dot(beyond / safe[None, :] ** 3, vectors.T)
    change_of_root = change_of_root + across + across.T

    noise = 8 * values.size * jnp.finfo(values.dtype).eps
    alike = pairs & (jnp.abs(values[:, None] - values[None, :]) <= noise * safe[None, :])
    alike = alike.astype(values.dtype)
    means = dot(alike, jnp.diagonal(inner)) / or_one(jnp.sum(alike, axis=1))
    change_of_values = jnp.where(kept, means / (2 * safe), 0)
    none = jnp.zeros_like(found.independence)
    return found, Spectrum(change_of_values, change_of_root, none)


def _decompose(gramian):
    """Ascending singular values and, in columns, the eigenvectors; zero for what is dropped."""
    squared_norms = jnp.diagonal(gramian)
    present = ~(squared_norms <= 0)  # a NaN is, and goes through to the result
    norms = jnp.sqrt(jnp.where(present, squared_norms, 1))
    cosines = gramian / norms[:, None] / norms[None, :]
    cosines = jnp.where(present[:, None] & present[None, :], cosines, 0)
    factor = _independent_parts(cosines)
    columns = _orthogonal(_triangular(factor, jnp.where(present, norms, 0)))
    values = jnp.sqrt(jnp.sum(columns**2, axis=1))
    order = jnp.argsort(values)
    values, columns = values[order], columns[order]
    return values, (columns / or_one(values)[:, None]).T


def _independent_parts(cosines):
    """The Cholesky factor of the cosines by columns, in rows, which are zero from the rank on."""
    num_tasks = cosines.shape[0]
    task = jnp.arange(num_tasks)
    tolerance = 4 * num_tasks * jnp.finfo(cosines.dtype).eps

    def step(number, state):
        squared_sines, factor, left = state
        pivots = jnp.where(left, squared_sines, 0)
        chosen = jnp.argmax(pivots)
        independent = ~(pivots[chosen] <= tolerance)
        root = jnp.sqrt(jnp.where(independent, pivots[chosen], 1))
        rest = cosines[chosen] - dot(factor[:, chosen], factor)
        column = jnp.where(left & independent, rest / root, 0)
        factor = lax.dynamic_update_index_in_dim(factor, column, number, 0)
        return squared_sines - column**2, factor, left & (task != chosen)

    state = (jnp.diagonal(cosines), jnp.zeros_like(cosines), jnp.full_like(task, True, bool))
    return lax.fori_loop(0, num_tasks, step, state)[1]


def _triangular(factor, norms):
    """Rotates D L from the right so that the longest rows have the fewest entries.

    Gram and Schmidt's method on the rows, of which only the unit vectors are ever rounded; each
    is made orthogonal twice, since what is left of it may be little more than rounding (Daniel,
    Gragg, Kaufman and Stewart, Reorthogonalization and stable algorithms for updating the
    Gram-Schmidt QR factorization, Math. Comp. 30(136), 1976).
    """
    num_tasks = factor.shape[0]
    task = jnp.arange(num_tasks)
    # What is left of a dependent row is rounding, of an independent one more than the root.
    rounding = jnp.finfo(factor.dtype).eps ** 0.75

    def step(_, state):
        axes, columns, squared_sines, left, number = state
        # The next axis is that of the longest rest. These lengths are rough, the axis' own is not.
        chosen = jnp.argmax(jnp.where(left, norms**2 * jnp.maximum(squared_sines, 0), -1))
        axis = factor[:, chosen]
        for _ in range(2):
            axis = axis - dot(dot(axes, axis), axes)
        length = jnp.sqrt(jnp.sum(axis**2))
        used = left[chosen] & ~(length <= rounding)
        axis = jnp.where(used, axis / or_one(length), 0)
        column = jnp.where(left, dot(axis, factor), 0)
        # What is put down without a new axis is zero, as it was.
        axes = lax.dynamic_update_index_in_dim(axes, axis, number, 0)
        columns = lax.dynamic_update_index_in_dim(columns, column, number, 0)
        number = number + used.astype(number.dtype)
        return axes, columns, squared_sines - column**2, left & (task != chosen), number

    empty, number = jnp.zeros_like(factor), jnp.zeros((), task.dtype)
    state = (empty, empty, jnp.sum(factor**2, axis=0), jnp.full_like(task, True, bool), number)
    columns = lax.fori_loop(0, num_tasks, step, state)[1]
    # The rounding of a long row would stand beside shorter rows as if it were something.
    squared_rests = lax.cumsum(columns**2, axis=0, reverse=True)
    return norms[None, :] * jnp.where(squared_rests <= rounding**2, 0, columns)


def _orthogonal(columns):
    """Rotates pairs of columns, given in rows, until all are orthogonal."""
    num_tasks = columns.shape[0]
    if num_tasks == 1:
        return columns
    columns = jnp.pad(columns, ((0, num_tasks % 2), (0, 0)))
    half = columns.shape[0] // 2
    dtype = columns.dtype
    eps = float(jnp.finfo(dtype).eps)
    tolerance = eps * num_tasks**0.5

    def sweep(state):
        left, right, before, _, num_sweeps = state
        state = (left, right, jnp.zeros((), dtype))
        left, right, worst = lax.fori_loop(0, 2 * half - 1, lambda _, state: _round(state), state)
        # Near the end the rest halves at least, unless it is rounding.
        stalls = (worst <= eps**0.5) & (worst > before / 2)
        return left, right, worst, (worst > tolerance) & ~stalls, num_sweeps + 1

    def unfinished(state):
        return state[3] & (state[4] < _MAX_SWEEPS)

    left, right = columns[:half], columns[half:]
    infinity = jnp.full((), jnp.inf, dtype)
    if half == 1:  # one rotation is all there is
        left, right, _ = _round((left, right, infinity))
    else:
        state = (left, right, infinity, jnp.bool_(True), jnp.int32(0))
        left, right = lax.while_loop(unfinished, sweep, state)[:2]
    return jnp.concatenate([left, right])[:num_tasks]


def _round(state):
    """Rotates each column on the left with its partner on the right; then the partners change.

    Two columns are orthogonal if their product is small beside the square of the shorter one: of
    a short column all has to be right, and the longer one is what would spoil it.
    """
    left, right, worst = state
    product = jnp.sum(left * right, axis=1)
    squared_left, squared_right = jnp.sum(left**2, axis=1), jnp.sum(right**2, axis=1)
    shorter = jnp.minimum(squared_left, squared_right)
    rest = jnp.where(shorter == 0, 0, jnp.abs(product) / or_one(shorter))
    turns = rest > jnp.finfo(left.dtype).eps / 4

    ratio = (squared_right - squared_left) / (2 * jnp.where(turns, product, 1))
    tangent = jnp.where(ratio < 0, -1.0, 1.0) / (jnp.abs(ratio) + jnp.sqrt(1 + ratio**2))
    tangent = jnp.where(turns, tangent, 0)[:, None]
    cosine = 1 / jnp.sqrt(1 + tangent**2)
    left, right = cosine * (left - tangent * right), cosine * (tangent * left + right)
    if len(left) > 1:
        left, right = (
            jnp.concatenate([left[:1], right[:1], left[1:-1]]),
            jnp.concatenate([right[1:], left[-1:]]),
        )
    return left, right, jnp.maximum(worst, jnp.max(rest))
