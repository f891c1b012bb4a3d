"""Task gradients as pytrees: the Gramian, the combination, masks, parts of a tree.

This is the only file of the library that knows about leaves, dtypes and
precision. Everything else sees a (T, T) matrix and T weights.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from optax_surgery import checks, products

PerTask = Any  # an array of shape (T,), or a tree of T scalars

# What is subtracted goes through a leaf in blocks of up to so many numbers.
_BLOCK_SIZE = 2**22
# How many times the machine epsilon the rounding error of a squared difference is at most.
ROUNDING = 8


def task_names(losses: Any) -> list[str]:
    """The names of the tasks, in the order of the rows of stacked gradients.

    Rows follow `jax.tree.leaves`, so those of a dict its sorted keys, whatever order they were
    written in. Arrays with one entry per task have this order.

    Args:
      losses: (T,) losses, or a tree of them.

    Returns:
      T names: the paths in the tree; '0', '1', ... for an array.

    Examples:
      >>> import optax_surgery as surgery
      >>> surgery.task_names({"residual": 0.1, "boundary": 0.2})
      ['boundary', 'residual']
    """
    if checks.is_tree(losses):
        return checks.tree_names(losses)
    return [str(number) for number in range(jnp.size(losses))]


def gramian(
    task_updates: optax.Updates,
    other: optax.Updates | None = None,
    scale: float | jax.Array | None = None,
) -> jax.Array:
    """The inner products of the task gradients, summed over all leaves.

    Every leaf is contracted where it lies: nothing is flattened or concatenated,
    so a leaf may be sharded on any axis. Products are accumulated in float32 (in
    float64 for float64 leaves) at the highest precision, as rounding the factors
    to TF32 or bfloat16 flips the sign of small inner products.

    Args:
      task_updates: pytree whose leaves have shape `(T, *param.shape)`.
      other: task gradients of the same shapes from another batch, for the methods that
        take the cross-Gramian of two independent batches.
      scale: () number above 0 by which all gradients are multiplied first, or None for 1. Squares
        of gradients have to fit float32, norms between 1e-16 and 1e18; for others take a power of
        two that brings them there. Surgeries find one by themselves, of gradients that they are
        given.

    Returns:
      G of shape (T, T), G[i, j] = g_i . g_j (g_i . other_j), float32 or float64; times the square
      of `scale`.

    Raises:
      ValueError: a leaf is not stacked, not real, or disagrees on T; `scale` is out of its range.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_surgery as surgery
      >>> surgery.gramian({"w": jnp.array([[3.0, 0.0], [0.0, 1.0]]), "b": jnp.array([1.0, -1.0])})
      Array([[10., -1.],
             [-1.,  2.]], dtype=float32)
    """
    checks.arguments(gramian, locals(), scale="(0, inf)")
    checks.some_leaves(checks.stacked(task_updates))
    if other is not None:
        checks.two_batches(task_updates, other)
    if scale is not None:
        scale = jnp.asarray(scale, gramian_dtype((task_updates, other)))
    return _scaled_gramian(task_updates, other, scale)


def gramian_in_range(task_updates: optax.Updates, task_mask: jax.Array | None = None) -> jax.Array:
    """The Gramian, with its scale changed where squares would not fit the dtype.

    The square of a gradient of norm 1e30 or 1e-30 is not a float32. The Gramian of
    such gradients is gathered once more, from the gradients times a power of two.
    The ratios that weights are made of are then right; where the Gramian was in
    range, it is returned as it is and the stack is read only once. Rows and columns of tasks
    that `task_mask` leaves out are zero, whatever their gradients hold.
    """
    return gramian_and_scale(task_updates, task_mask)[0]


@jax.jit
def gramian_and_scale(
    task_updates: optax.Updates, task_mask: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """`gramian_in_range`, and the power of two that it has multiplied the gradients by.

    For the rules that depend on the common scale of the gradients.
    """
    plain = mask_gramian(task_mask, gramian(task_updates))
    least, largest = _range_of_squares(task_updates, plain.dtype)
    shift = 2.0 ** (jnp.finfo(plain.dtype).maxexp * 5 // 8)
    peak = jnp.max(jnp.diagonal(plain))
    scale = jnp.where(peak < least, shift, 1.0 / shift).astype(plain.dtype)
    in_range = (peak >= least) & (peak <= largest)
    found = lax.cond(
        everywhere(in_range),
        lambda: plain,
        lambda: jnp.where(
            in_range, plain, mask_gramian(task_mask, _scaled_gramian(task_updates, None, scale))
        ),
    )
    return found, jnp.where(in_range, 1, scale)


def relative_gramian(
    task_updates: optax.Updates, task_mask: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """The Gramian, with a scale for each task where common ones would not do.

    For what looks at cosines and norms. Where all squares are in range it is the Gramian itself,
    and the stack is read once; where norms of 1e30 and 1e-30 stand side by side, each gradient is
    multiplied by the power of two that brings its largest coordinate near to 1.

    Returns:
      (T, T) inner products, and the (T,) powers of two.
    """
    plain = mask_gramian(task_mask, gramian(task_updates))
    info = jnp.finfo(plain.dtype)
    least, largest = _range_of_squares(task_updates, plain.dtype)
    squares = jnp.diagonal(plain)
    in_range = (squares >= least) & (squares <= largest)  # a zero may have been a small number
    if task_mask is not None:
        in_range |= ~task_mask

    def apart():
        peaks = largest_coordinates(task_updates)
        peaks = peaks if task_mask is None else jnp.where(task_mask, peaks, 0)
        scales = scales_to_one(peaks, info)
        return mask_gramian(task_mask, _scaled_gramian(task_updates, None, scales)), scales

    ones = jnp.ones_like(squares)
    return lax.cond(everywhere(jnp.all(in_range)), lambda: (plain, ones), apart)


def largest_coordinates(task_updates: optax.Updates) -> jax.Array:
    """(T,) the largest absolute value in each gradient."""
    dtype = gramian_dtype(task_updates)
    largest = jax.tree.map(lambda leaf: _peaks(jnp.asarray(leaf), dtype), task_updates)
    return jax.tree.reduce(jnp.maximum, largest)


def _peaks(rows: jax.Array, dtype: jnp.dtype) -> jax.Array:
    return jnp.max(jnp.abs(rows).astype(dtype), axis=tuple(range(1, rows.ndim)), initial=0)


# Differences of gradients, of which a common part that is large leaves nothing in the Gramian


class Differences(NamedTuple):
    """The differences of the task gradients from the gradient of one task.

    Attributes:
      cosines: (T, T) of the differences; zero in rows and columns of those that are zero.
      lengths: (T,) their lengths.
      sizes: (T,) the lengths that rounding errors are relative to: that of the inner product of two
        differences is at most a few times eps times the product of theirs. These are the lengths
        themselves, or more where the differences were not taken number by number.
    """

    cosines: jax.Array
    lengths: jax.Array
    sizes: jax.Array

    def distances(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The (T, T) distances of the gradients, between which bounds they are, and they.

        Returns:
          The lower bounds, the distances, and the upper bounds.
        """
        largest = longest(self.lengths.dtype)
        longer = jnp.maximum(self.lengths[:, None], self.lengths[None, :])
        unit = jnp.where(longer > 0, longer, 1)
        one, other = self.lengths[:, None] / unit, self.lengths[None, :] / unit
        squares = (one - other) ** 2 + 2 * one * other * jnp.maximum(1 - self.cosines, 0)
        both = jnp.minimum((self.sizes[:, None] + self.sizes[None, :]) / unit, 2.0**40)
        error = ROUNDING * jnp.finfo(unit.dtype).eps * both**2
        near, far = jnp.maximum(squares - error, 0), squares + error
        same = jnp.eye(self.lengths.size, dtype=bool)
        return tuple(  # pyright: ignore[reportReturnType]
            jnp.where(same, 0, unit * jnp.minimum(_root(each), largest / unit))
            for each in (near, squares, far)
        )


def _root(squares: jax.Array) -> jax.Array:
    """The root, 0 for what is not above 0, where it has a derivative too."""
    above = squares > 0
    return jnp.where(above, jnp.sqrt(jnp.where(above, squares, 1)), 0)


def longest(dtype: jnp.dtype) -> float:
    """The largest length that is told from others, of which the inverse is a normal number."""
    return float(jnp.finfo(dtype).max) / 16


def differences(
    task_updates: optax.Updates,
    base: jax.Array,
    task_mask: jax.Array | None = None,
    factors: jax.Array | None = None,
) -> Differences:
    """The differences of the task gradients from that of one task, taken number by number.

    Args:
      task_updates: pytree whose leaves have shape `(T, *shape)`.
      base: () the number of the task whose gradient is subtracted.
      task_mask: (T,) bool, False for gradients to leave out, whatever they hold; or None.
      factors: (T,) not negative, by which the gradients are multiplied beforehand; or None.
    """
    dtype = gramian_dtype(task_updates)
    leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(task_updates)]
    taken = jnp.ones(leaves[0].shape[0], bool) if task_mask is None else task_mask
    subtracted = [_Subtracted(leaf, base, factors, dtype) for leaf in leaves]

    def products_of(scales):
        total = functools.reduce(jnp.add, [each.gramian(scales) for each in subtracted])
        return mask_gramian(task_mask, total)

    plain = products_of(None)
    info = jnp.finfo(dtype)
    least, largest = _range_of_squares(task_updates, dtype)
    squares = jnp.diagonal(plain)
    in_range = (squares >= least) & (squares <= largest)
    in_range |= ~taken | (jnp.arange(taken.size) == base)

    def apart():
        peaks = functools.reduce(jnp.maximum, [each.peaks() for each in subtracted])
        scales = scales_to_one(jnp.where(taken, peaks, 0), info)
        return products_of(scales), scales

    found, scales = lax.cond(
        everywhere(jnp.all(in_range)), lambda: (plain, jnp.ones_like(squares)), apart
    )
    return differences_of_products(found, scales)


class _Subtracted:
    """The rows of one leaf less one of them, in the dtype of sums."""

    def __init__(self, rows, base, factors, dtype):
        self._rows, self._base, self._factors, self._dtype = rows, base, factors, dtype

    def _read(self, rows):
        rows = rows.astype(self._dtype)
        if self._factors is not None:
            rows = rows * along_tasks(self._factors.astype(self._dtype), rows)
        if jax.typeof(rows).sharding.spec[0] is None:
            return rows - lax.dynamic_index_in_dim(rows, self._base, 0)
        # Of rows that lie on several devices one is taken by a sum that all of them take part in.
        chosen = jnp.arange(rows.shape[0]) == self._base
        row = products.leaf_combination(chosen.astype(self._dtype), rows, task_mask=chosen)
        return rows - row[None]

    def _gramian(self, rows, scales):
        return products.gramian_of_leaves([(self._read(rows),)], dtype=self._dtype, scale=scales)

    def gramian(self, scales):
        rows = self._rows
        # A loop over blocks of a leaf that the partitioner shards would gather it.
        if rows.size <= _BLOCK_SIZE or products.may_be_partitioned(rows):
            return self._gramian(rows, scales)
        # A block at a time, so that there is no copy of all rows.
        num_tasks = rows.shape[0]
        rows = rows.reshape(num_tasks, -1)
        size = max(_BLOCK_SIZE // num_tasks, 1)
        num_blocks = rows.shape[1] // size

        def add_block(number, total):
            block = lax.dynamic_slice_in_dim(rows, number * size, size, axis=1)
            return total + self._gramian(block, scales)

        # Zeros that vary over a manual mesh as the rows do.
        zeros = lax.full_like(rows, 0, self._dtype, (num_tasks, num_tasks))
        total = lax.fori_loop(0, num_blocks, add_block, zeros)
        return total + self._gramian(rows[:, num_blocks * size :], scales)

    def peaks(self):
        return _peaks(self._read(self._rows), self._dtype)


def differences_of_products(products: jax.Array, scales: jax.Array | None = None) -> Differences:
    """The differences whose inner products are known as exactly as they can be.

    Args:
      products: (T, T), of the differences times their scales.
      scales: (T,) powers of two, or None for 1.
    """
    squares = jnp.diagonal(products)
    scaled = _root(squares)
    present = scaled > 0
    inverse = jnp.where(present, 1 / jnp.where(present, scaled, 1), 0)
    cosines = jnp.clip(products * inverse[:, None] * inverse[None, :], -1, 1)
    lengths = scaled if scales is None else jnp.minimum(scaled / scales, longest(scaled.dtype))
    return Differences(cosines, lengths, lengths)


def differences_by_gramian(
    gramian: jax.Array, scales: jax.Array, base: jax.Array, factors: jax.Array | None = None
) -> Differences:
    """The differences of gradients of which only the Gramian is known, and how far they are.

    Args:
      gramian: (T, T) inner products of the gradients times their scales.
      scales: (T,) powers of two.
      base: () the number of the task whose gradient is subtracted.
      factors: as of `differences`.
    """
    known = differences_of_products(gramian, scales)  # the gradients are their difference from 0
    norms = known.lengths if factors is None else known.lengths * factors
    peak = jnp.max(norms)
    peak = jnp.where(peak > 0, peak, 1)
    norms = norms / peak
    inner = known.cosines * norms[:, None] * norms[None, :]
    row, square = jnp.take(inner, base, axis=0), jnp.take(norms, base) ** 2
    found = differences_of_products(inner - row[:, None] - row[None, :] + square)
    is_base = jnp.arange(norms.size) == base
    lengths = jnp.where(is_base, 0, found.lengths)
    sizes = jnp.where(is_base, jnp.take(norms, base), norms + jnp.take(norms, base))
    either = is_base[:, None] | is_base[None, :]
    return Differences(jnp.where(either, 0, found.cosines), peak * lengths, peak * sizes)


def scales_to_one(peaks: jax.Array, info: Any) -> jax.Array:
    """(T,) powers of two that bring the largest coordinates near to 1; 1 where there is none."""
    normal = jnp.isfinite(peaks) & (peaks > 0)
    exponents = jnp.frexp(jnp.where(normal, peaks, 1))[1]
    return jnp.exp2(jnp.clip(-exponents, info.minexp + 2, info.maxexp - 2).astype(peaks.dtype))


def _range_of_squares(task_updates: optax.Updates, dtype: jnp.dtype) -> tuple[float, float]:
    """Between which bounds the square of a norm is right."""
    info = jnp.finfo(dtype)
    num_coordinates = sum(math.prod(jnp.shape(leaf)[1:]) for leaf in jax.tree.leaves(task_updates))
    # The least square that still counts stays 14 binary digits above the subnormal numbers, which
    # hardware flushes to zero; the largest leaves 20 for T-sized sums.
    return max(num_coordinates, 1) * 2.0 ** (info.minexp + 14), 2.0 ** (info.maxexp - 20)


@jax.custom_batching.custom_vmap
def everywhere(condition: jax.Array) -> jax.Array:
    """The condition, and under `vmap` whether it holds in the whole batch.

    `vmap` turns a `cond` with a batched predicate into a choice between both branches, which would
    read the stack twice; with this one it stays a branch.
    """
    return condition


@everywhere.def_vmap
def _everywhere_in_a_batch(axis_size, in_batched, condition):
    del axis_size, in_batched
    return everywhere(jnp.all(condition, axis=0)), False


def gramian_dtype(tree: Any) -> jnp.dtype:
    """float64 if a leaf is float64, else float32."""
    dtypes = [jnp.result_type(leaf) for leaf in jax.tree.leaves(tree)]
    return jnp.dtype(jnp.float64 if jnp.float64 in dtypes else jnp.float32)


def combine(
    weights: PerTask, task_updates: optax.Updates, task_mask: PerTask | None = None
) -> optax.Updates:
    """The weighted sum of the task gradients, leaf by leaf.

    Args:
      weights: (T,) or a tree of any numbers.
      task_updates: pytree whose leaves have shape `(T, *param.shape)`.
      task_mask: (T,) bool, or a tree of booleans, False for task gradients to leave out, NaN too;
        or None.

    Returns:
      Pytree whose leaves have shape param.shape and the dtype of the gradients,
      sum_i weights[i] * task_updates[i]. Sums are in float32 at least.

    Raises:
      ValueError: a leaf is not stacked, not real, or disagrees on T; or `weights`
        or `task_mask` do not have one entry per task, or the mask is not of booleans.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_surgery as surgery
      >>> surgery.combine(jnp.array([1.0, 2.0]), {"w": jnp.array([[3.0, 0.0], [0.0, 1.0]])})
      {'w': Array([3., 2.], dtype=float32)}
    """
    num_tasks = checks.stacked(task_updates)
    weights = checks.per_task("weights", weights, num_tasks)
    if task_mask is not None:
        task_mask = checks.task_mask(task_mask, num_tasks)
        weights = jnp.where(task_mask, weights, jnp.zeros_like(weights))

    def combine_leaf(leaf):
        leaf = jnp.asarray(leaf)
        total = products.leaf_combination(
            weights.astype(gramian_dtype(leaf)), leaf, task_mask=task_mask
        )
        return total.astype(leaf.dtype)

    return jax.tree.map(combine_leaf, task_updates)


def mask_gramian(task_mask: jax.Array | None, gramian: jax.Array) -> jax.Array:
    """Puts zeros in the rows and columns of masked tasks, whatever stood there."""
    if task_mask is None:
        return gramian
    return jnp.where(task_mask[:, None] & task_mask[None, :], gramian, 0)


def mask_tasks(task_mask: jax.Array, task_updates: optax.Updates) -> optax.Updates:
    """Puts zeros in the place of masked gradients, whatever stood there."""

    def mask_leaf(leaf):
        return jnp.where(along_tasks(task_mask, leaf), leaf, jnp.zeros_like(leaf))

    return jax.tree.map(mask_leaf, task_updates)


def along_tasks(numbers: jax.Array, rows: jax.Array) -> jax.Array:
    """One number per task, of shape (T, 1, ..., 1) to go with a leaf `(T, *shape)`."""
    return lax.expand_dims(numbers, range(1, jnp.ndim(rows)))


def map_rows(
    rule: Callable[[jax.Array, jax.Array], jax.Array], task_updates: optax.Updates, key: jax.Array
) -> optax.Updates:
    """Applies a rule to the `(T, *shape)` gradients of each leaf, in float32 at least.

    Args:
      rule: (rows, key) -> update of the leaf, with a key that differs from leaf to leaf.
      task_updates: pytree whose leaves have shape `(T, *shape)`.
      key: of this step.
    """
    leaves, structure = jax.tree.flatten(task_updates)
    results = [
        rule(leaf.astype(gramian_dtype(leaf)), jax.random.fold_in(key, number))
        for number, leaf in enumerate(map(jnp.asarray, leaves))
    ]
    return jax.tree.unflatten(structure, results)


def zeros_per_task(params: optax.Params, num_tasks: int) -> optax.Updates:
    """Zeros of shape (num_tasks, *param.shape), in float32 at least, where the parameters lie."""
    return jax.tree.map(
        lambda leaf: lax.broadcast(jnp.zeros_like(leaf, gramian_dtype(leaf)), (num_tasks,)), params
    )


def scale_tasks(factors: jax.Array, task_updates: optax.Updates) -> optax.Updates:
    """The gradient of each task times its factor, in float32 at least."""

    def scale_leaf(leaf):
        rows = jnp.asarray(leaf).astype(gramian_dtype(leaf))
        return rows * along_tasks(factors.astype(rows.dtype), rows)

    return jax.tree.map(scale_leaf, task_updates)


def move_tasks(
    rates: jax.Array, averages: optax.Updates, task_updates: optax.Updates
) -> optax.Updates:
    """Moves the average of each task towards its gradient by its rate, a share of the way.

    A task whose rate is zero keeps its average to the bit.
    """

    def move_leaf(average, leaf):
        rate = along_tasks(rates.astype(average.dtype), average)
        moved = average + rate * (jnp.asarray(leaf).astype(average.dtype) - average)
        return jnp.where(rate > 0, moved, average)

    return jax.tree.map(move_leaf, averages, task_updates)


def sum_coordinates(tree: optax.Updates) -> jax.Array:
    """The sum over all coordinates of leaves `(T, *shape)`, for each task."""
    sums = jax.tree.map(lambda rows: jnp.sum(rows, axis=tuple(range(1, rows.ndim))), tree)
    return jax.tree.reduce(jnp.add, sums)


def middle_mean(rows: jax.Array, num_trimmed: int, task_mask: jax.Array) -> jax.Array:
    """For each coordinate the mean over tasks without the largest and the least values.

    Args:
      rows: `(T, *shape)` gradients of one leaf.
      num_trimmed: how many are left out on either side, fewer if less than one were left.
      task_mask: (T,) bool, at least one True; the others are left out of account.

    Returns:
      `(*shape)` means.
    """
    num_active = jnp.sum(task_mask)
    first = jnp.minimum(num_trimmed, (num_active - 1) // 2)
    num_kept = num_active - 2 * first
    # Those without a task come last.
    ordered = jnp.sort(jnp.where(along_tasks(task_mask, rows), rows, jnp.inf), axis=0)
    ranks = jnp.arange(task_mask.size)
    kept = (ranks >= first) & (ranks < first + num_kept)
    total = jnp.sum(jnp.where(along_tasks(kept, rows), ordered, 0), axis=0)
    return total / num_kept.astype(rows.dtype)


def split(mask: list[bool], tree: Any) -> tuple[Any, Any]:
    """The chosen leaves of a tree and the others, each in the tree itself, so with their paths.

    In the place of a leaf that is not there stands an `optax.MaskedNode`.
    """
    leaves, structure = jax.tree.flatten(tree)

    def keep(wanted):
        kept = [
            leaf if take == wanted else optax.MaskedNode()
            for leaf, take in zip(leaves, mask, strict=True)
        ]
        return jax.tree.unflatten(structure, kept)

    return keep(True), keep(False)


def merge(mask: list[bool], chosen: Any, others: Any, like: Any) -> Any:
    """The tree that `split` took apart, with the structure of `like`."""
    chosen_leaves, other_leaves = iter(jax.tree.leaves(chosen)), iter(jax.tree.leaves(others))
    leaves = [next(chosen_leaves if take else other_leaves) for take in mask]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def like(tree: Any, array: jax.Array) -> Any:
    """T numbers as a tree of scalars, if `tree` is one and no array, so that names stay."""
    if tree is None or not checks.is_tree(tree):
        return array
    return jax.tree.unflatten(jax.tree.structure(tree), list(array))


def active_tasks(num_tasks: int, extra_args: dict[str, Any]) -> jax.Array:
    """The (T,) mask of the tasks that take part in the step, all if the caller gave none."""
    task_mask = extra_args.get("task_mask")
    if task_mask is None:
        return jnp.ones(num_tasks, bool)
    return checks.task_mask(task_mask, num_tasks)


def _scaled_gramian(
    task_updates: optax.Updates, other: optax.Updates | None, scale: jax.Array | None
) -> jax.Array:
    trees = [task_updates] if other is None else [task_updates, other]
    leaves = zip(*(map(jnp.asarray, jax.tree.leaves(tree)) for tree in trees), strict=True)
    return products.gramian_of_leaves(list(leaves), dtype=gramian_dtype(trees), scale=scale)
