"""Task gradients as pytrees: the Gramian, the combination, masks, parts of a tree.

This is the only file of the library that knows about leaves, dtypes and
precision. Everything else sees a (T, T) matrix and T weights.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from optax_surgery import checks, products

PerTask = Any  # an array of shape (T,), or a tree of T scalars


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


def gramian(task_updates: optax.Updates, other: optax.Updates | None = None) -> jax.Array:
    """The inner products of the task gradients, summed over all leaves.

    Every leaf is contracted where it lies: nothing is flattened or concatenated,
    so a leaf may be sharded on any axis. Products are accumulated in float32 (in
    float64 for float64 leaves) at the highest precision, as rounding the factors
    to TF32 or bfloat16 flips the sign of small inner products.

    Args:
      task_updates: pytree whose leaves have shape (T, *param.shape).
      other: task gradients of the same shapes from another batch, for the methods that
        take the cross-Gramian of two independent batches.

    Returns:
      G of shape (T, T), G[i, j] = g_i . g_j (g_i . other_j), float32 or float64.

    Raises:
      ValueError: a leaf is not stacked, not real, or disagrees on T.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_surgery as surgery
      >>> surgery.gramian({"w": jnp.array([[3.0, 0.0], [0.0, 1.0]]), "b": jnp.array([1.0, -1.0])})
      Array([[10., -1.],
             [-1.,  2.]], dtype=float32)
    """
    checks.some_leaves(checks.stacked(task_updates))
    if other is not None:
        checks.two_batches(task_updates, other)
    return _scaled_gramian(task_updates, other, None)


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
        normal = jnp.isfinite(peaks) & (peaks > 0)
        exponents = jnp.frexp(jnp.where(normal, peaks, 1))[1]
        scales = jnp.exp2(
            jnp.clip(-exponents, info.minexp + 2, info.maxexp - 2).astype(plain.dtype)
        )
        return mask_gramian(task_mask, _scaled_gramian(task_updates, None, scales)), scales

    ones = jnp.ones_like(squares)
    return lax.cond(everywhere(jnp.all(in_range)), lambda: (plain, ones), apart)


def largest_coordinates(task_updates: optax.Updates) -> jax.Array:
    """(T,) the largest absolute value in each gradient."""
    dtype = gramian_dtype(task_updates)
    largest = jax.tree.map(
        lambda leaf: jnp.max(
            jnp.abs(leaf).astype(dtype), axis=tuple(range(1, jnp.ndim(leaf))), initial=0
        ),
        task_updates,
    )
    return jax.tree.reduce(jnp.maximum, largest)


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
      task_updates: pytree whose leaves have shape (T, *param.shape).
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
    """One number per task, of shape (T, 1, ..., 1) to go with a leaf (T, *shape)."""
    return lax.expand_dims(numbers, range(1, jnp.ndim(rows)))


def map_rows(
    rule: Callable[[jax.Array, jax.Array], jax.Array], task_updates: optax.Updates, key: jax.Array
) -> optax.Updates:
    """Applies a rule to the (T, *shape) gradients of each leaf, in float32 at least.

    Args:
      rule: (rows, key) -> update of the leaf, with a key that differs from leaf to leaf.
      task_updates: pytree whose leaves have shape (T, *shape).
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
    """The sum over all coordinates of leaves (T, *shape), for each task."""
    sums = jax.tree.map(lambda rows: jnp.sum(rows, axis=tuple(range(1, rows.ndim))), tree)
    return jax.tree.reduce(jnp.add, sums)


def middle_mean(rows: jax.Array, num_trimmed: int, task_mask: jax.Array) -> jax.Array:
    """For each coordinate the mean over tasks without the largest and the least values.

    Args:
      rows: (T, *shape) gradients of one leaf.
      num_trimmed: how many are left out on either side, fewer if less than one were left.
      task_mask: (T,) bool, at least one True; the others are left out of account.

    Returns:
      (*shape) means.
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
