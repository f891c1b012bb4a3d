"""The geometric median of the task gradients, from their differences."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from optax_surgery import trees
from optax_surgery.algebra import solvers
from optax_surgery.algebra.arithmetic import dot

_MAX_ITERATIONS, _MAX_BASES, _MAX_DIRECTIONS = 300, 12, 24
_NUM_LENGTHS = 8  # of Newton's step, each half of the one before
# A base is good enough where rounding hides at most so many times the machine epsilon.
_TOLERANCE = 256
# Longer differences, in units of the others, only have a direction.
_FAR = 2.0**40


class _Frame(NamedTuple):
    """The gradients as seen from one of them, the base, which is at zero.

    Points are combinations of the unit vectors towards the others, with numbers of one size
    wherever the median is: `Tasks.differences` in a unit.
    """

    cosines: jax.Array
    lengths: jax.Array
    sizes: jax.Array
    shares: jax.Array  # of the tasks in the sum of distances; 1 in sum, 0 for masked tasks


def geometric_median(
    differences: Callable[[jax.Array], trees.Differences], shares: jax.Array
) -> solvers.Solution:
    """The weights of the geometric median, seen from a gradient near to it.

    What is near to the base is right relative to its distance from there. So the gradient that is
    nearest to the median becomes the next base, unless what is known is exact enough as it is.

    Args:
      differences: see `Tasks.differences`.
      shares: (T,) not negative, by which the distances are multiplied; 0 for masked tasks.

    Returns:
      Weights on the simplex. The residual is how far the unit vectors towards the gradients are
      from adding up to zero, or how much of them rounding hides, whichever is larger.
    """
    total = jnp.sum(shares)
    shares = shares / jnp.where(total > 0, total, 1)
    eps = jnp.finfo(shares.dtype).eps
    constant = lax.stop_gradient(shares)

    def unfinished(state):
        return (state.base != state.nearest) & (state.num_bases < _MAX_BASES)

    def look(state):
        found = lax.stop_gradient(differences(state.nearest))
        weights, place, nearest, residual, hidden = _solved(_frame(found, constant))
        good = hidden <= _TOLERANCE * eps
        return _Look(
            differences=found,
            place=place,
            weights=weights,
            residual=jnp.maximum(residual, hidden),
            base=state.nearest,
            nearest=jnp.where(good, state.nearest, nearest),
            num_bases=state.num_bases + 1,
        )

    first = jnp.argmax(shares > 0).astype(jnp.int32)
    zero = jnp.zeros((), shares.dtype)
    nothing = trees.Differences(jnp.zeros((shares.size,) * 2, shares.dtype), constant, constant)
    start = _Look(nothing, constant, constant, zero, first - 1, first, jnp.zeros((), jnp.int32))
    found = lax.while_loop(unfinished, look, start)
    # Newton's step from the median is zero and has the median's derivative; the loop needs none.
    frame = _frame(_in_place_of(differences(found.base), found.differences), shares)
    step = _newton(frame, _measured(frame, found.place))
    place = found.place + (step - lax.stop_gradient(step))
    weights = jnp.where(jnp.all(found.place == 0), found.weights, _measured(frame, place).weights)
    weights = _adding_up_to_one(weights)
    return solvers.Solution(weights, found.residual <= 4 * jnp.sqrt(eps), found.residual)


@jax.custom_jvp
def _in_place_of(again, found):
    """What was found in a loop, with the derivative of what finds it again, which is not run."""
    del again
    return found


@_in_place_of.defjvp
def _in_place_of_jvp(primals, tangents):
    return primals[1], tangents[0]


class _Look(NamedTuple):
    differences: trees.Differences
    place: jax.Array
    weights: jax.Array
    residual: jax.Array
    base: jax.Array
    nearest: jax.Array
    num_bases: jax.Array


def _frame(found: trees.Differences, shares: jax.Array) -> _Frame:
    """What is seen from a base, in units of the distance that more than half of the shares have."""
    lengths = found.lengths
    order = jnp.argsort(lengths)
    middle = order[jnp.argmax(jnp.cumsum(shares[order]) > 0.5)]
    longest = jnp.max(jnp.where(shares > 0, lengths, 0))
    unit = jnp.where(lengths[middle] > 0, lengths[middle], jnp.where(longest > 0, longest, 1))
    lengths, sizes = (jnp.minimum(each / unit, _FAR) for each in (lengths, found.sizes))
    return _Frame(found.cosines, lengths, sizes, shares)


def _solved(frame: _Frame) -> tuple[jax.Array, ...]:
    """The weights, the median if it is no gradient, the nearest task, and the residual in parts.

    These are the violation of the optimality, and what rounding hides.
    """
    cosines, lengths, sizes, shares = frame
    eps = jnp.finfo(shares.dtype).eps
    error = trees.ROUNDING * eps
    active = shares > 0
    distances, near = _distances(frame)
    pulls = _over(shares[None, :], distances, near > 0)  # row k: from gradient k to the others
    away = pulls - jnp.diag(jnp.sum(pulls, axis=1))
    forces = jnp.sqrt(jnp.maximum(_squares(cosines, away * lengths[None, :]), 0))
    own = jnp.sum(jnp.where(near > 0, 0, shares[None, :]), axis=1)
    # Where others pull no harder than a gradient itself, that is the median. Weiszfeld's iteration
    # would come near only as slowly as one over the steps.
    excess = jnp.where(active, forces - own, 1)
    medians = active & (excess <= 16 * eps)
    is_gradient = jnp.any(medians)

    # Of the others the one with the least sum of distances, and from there downhill.
    gain = lengths[:, None] * (lengths[:, None] - 2 * lengths[None, :] * cosines)
    gain = _over(gain, distances + lengths[None, :], distances + lengths[None, :] > 0)
    best = jnp.argmin(jnp.where(active, jnp.sum(shares[None, :] * gain, axis=1), jnp.inf))
    step = jnp.maximum(excess[best], 0) / jnp.maximum(forces[best] * jnp.sum(pulls[best]), eps**4)
    start = (jnp.eye(shares.size, dtype=shares.dtype)[best] + step * away[best]) * lengths
    point = _descended(frame, start, ~is_gradient)

    alone = jnp.argmax(medians)
    of_medians = medians.astype(shares.dtype)
    of_medians = of_medians / jnp.maximum(jnp.sum(of_medians), 1)
    weights = jnp.where(is_gradient, of_medians, point.weights)
    radii = jnp.where(is_gradient, distances[alone], point.radii)
    residual = jnp.where(is_gradient, 0, point.force)
    # The rounding error of each distance relative to it, as its unit vector is off by that.
    reach = jnp.where(is_gradient, sizes[alone], jnp.sum(point.weights * sizes))
    errors = error * (reach + sizes) ** 2
    hidden = jnp.minimum(_over(errors, radii**2, radii > 0), 1)
    hidden = jnp.where((radii > 0) | (errors <= 0), hidden, 1)
    hidden = jnp.where(is_gradient & (jnp.arange(shares.size) == alone), 0, hidden)
    nearest = jnp.argmin(jnp.where(active, radii, jnp.inf)).astype(jnp.int32)
    nearest = jnp.where(is_gradient, alone, nearest).astype(jnp.int32)
    place = jnp.where(is_gradient, 0, point.place)
    return weights, place, nearest, residual, jnp.sum(shares * hidden)


def _distances(frame: _Frame) -> tuple[jax.Array, jax.Array]:
    found = trees.Differences(frame.cosines, frame.lengths, frame.sizes)
    near, distances, _ = found.distances()
    return distances, near


class _Point(NamedTuple):
    """A point, and what there is to know of the sum of distances there.

    Attributes:
      place: (T,) the point, as a combination of the unit vectors.
      radii: (T,) the distances.
      weights: (T,) inverse to them, those of the next point of Weiszfeld's iteration.
      pull: () the sum of the shares over the distances.
      force: () the length of the sum of the unit vectors times the shares.
    """

    place: jax.Array
    radii: jax.Array
    weights: jax.Array
    pull: jax.Array
    force: jax.Array


def _measured(frame: _Frame, place: jax.Array) -> _Point:
    cosines, lengths, _, shares = frame
    image = dot(cosines, place)
    squares = jnp.maximum(jnp.sum(place * image) + lengths * (lengths - 2 * image), 0)
    # What is nearer than that is no distance but a rounding error.
    least = jnp.finfo(shares.dtype).eps ** 2 * (jnp.sum(place**2) + lengths**2)
    radii = jnp.sqrt(jnp.maximum(squares, jnp.maximum(least, jnp.finfo(shares.dtype).tiny)))
    pulls = shares / radii
    pull = jnp.sum(pulls)
    weights = pulls / jnp.where(pull > 0, pull, 1)
    force = pull * jnp.sqrt(jnp.maximum(_squares(cosines, weights * lengths - place), 0))
    return _Point(place, radii, weights, pull, force)


def _descended(frame: _Frame, start: jax.Array, wanted: jax.Array) -> _Point:
    """Goes downhill by Newton's steps, shortened where need be, or by one of Weiszfeld's.

    That one always goes downhill, but slowly where gradients are nearly on a line.
    """
    eps = jnp.finfo(start.dtype).eps
    shortened = 0.5 ** jnp.arange(_NUM_LENGTHS).astype(start.dtype)

    def unfinished(state):
        point, _, number, stuck = state
        return wanted & (point.force > 4 * eps) & (number < _MAX_ITERATIONS) & ~stuck

    def step(state):
        point, least, number, _ = state
        newton = point.place[None, :] + shortened[:, None] * _newton(frame, point)[None, :]
        weiszfeld = point.weights * frame.lengths
        places = jnp.concatenate([newton, weiszfeld[None, :]])
        points = jax.vmap(lambda place: _measured(frame, place))(places)
        # Near the median a sum of distances is equal to the next one but for rounding.
        halves = points.force[0] <= 0.5 * least
        sums = jnp.sum(frame.shares[None, :] * points.radii, axis=1)
        best = jnp.where(halves, 0, jnp.argmin(sums))
        chosen = jax.tree.map(lambda leaf: leaf[best], points)
        stuck = ~halves & (point.force <= 64 * eps)
        better = jnp.minimum(least, chosen.force)
        chosen = jax.tree.map(lambda new, old: jnp.where(stuck, old, new), chosen, point)
        return chosen, better, number + 1, stuck

    point = _measured(frame, start)
    state = point, point.force, jnp.zeros((), jnp.int32), jnp.zeros((), bool)
    return lax.while_loop(unfinished, step, state)[0]


def _newton(frame: _Frame, point: _Point) -> jax.Array:
    """Newton's step, by conjugate gradients.

    The Hessian is the pull times the identity less the outer products of the unit vectors, of
    which the inner products with a combination are at hand.
    """
    cosines, lengths, _, _ = frame
    place, radii, weights = point.place, point.radii, point.weights
    inverse = 1 / radii

    def apply(vector, image):
        along = weights * inverse * (jnp.sum(place * image) - lengths * image)
        return vector - jnp.sum(along * inverse) * place + along * inverse * lengths

    def improve(_, state):
        found, rest, direction, square = state
        image = dot(cosines, direction)
        applied = apply(direction, image)
        curvature = jnp.sum(applied * image)
        length = _over(square, curvature, curvature > 0)
        found, rest = found + length * direction, rest - length * applied
        new = jnp.maximum(jnp.sum(rest * dot(cosines, rest)), 0)
        return found, rest, rest + _over(new, square, square > 0) * direction, new

    right = weights * lengths - place
    square = jnp.maximum(jnp.sum(right * dot(cosines, right)), 0)
    number = min(lengths.size, _MAX_DIRECTIONS)
    start = (jnp.zeros_like(right), right, right, square)
    return lax.fori_loop(0, number, improve, start)[0]


def _adding_up_to_one(weights: jax.Array) -> jax.Array:
    """Takes out the rounding error of their sum, which multiplies what gradients have in common."""
    largest = jnp.arange(weights.size) == jnp.argmax(weights)

    def add(carry, weight):
        total, lost = carry
        new = total + weight
        return (
            new,
            lost + jnp.where(total >= weight, total - new + weight, weight - new + total),
        ), ()

    zero = jnp.zeros((), weights.dtype)
    (total, lost), _ = lax.scan(add, (zero, zero), jnp.where(largest, 0, weights))
    return jnp.where(largest & (total > 0), (1 - total) - lost, weights)


def _squares(cosines: jax.Array, combinations: jax.Array) -> jax.Array:
    return jnp.sum(combinations * dot(combinations, cosines), axis=-1)


def _over(numbers: Any, divisors: jax.Array, where: jax.Array) -> jax.Array:
    """Quotients, 0 where they are not wanted."""
    return jnp.where(where, numbers / jnp.where(where, divisors, 1), 0)
