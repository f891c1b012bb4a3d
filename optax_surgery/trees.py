"""Task gradients as pytrees: the checks, the Gramian and the combination.

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

from optax_surgery import products

_STACK = (
    "Stack the gradients of the T tasks on a leading axis, as "
    "`jax.jacrev(losses_fn)(params)` returns them."
)


def check_task_updates(task_updates: optax.Updates, params: optax.Params | None = None) -> int:
    """Checks that every leaf stacks the same number of real gradients.

    Args:
      task_updates: pytree whose leaves have shape (T, *param.shape).
      params: the parameters, or None where they are not known. With them the
        structure and the trailing shapes are checked too, which is the only way
        to tell an unstacked gradient whose leaves happen to share their first
        dimension.

    Returns:
      The number of tasks T, 0 for a tree without leaves.

    Raises:
      ValueError: names the first leaf that is wrong, and what to do.
    """
    leaves = [(leaf_path(path), leaf) for path, leaf in jax.tree.leaves_with_path(task_updates)]
    if params is not None:
        _check_structure(task_updates, params)
        shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(params)]
    else:
        shapes = [jnp.shape(leaf)[1:] for _, leaf in leaves]

    num_tasks, first_path = 0, ""
    for (path, leaf), param_shape in zip(leaves, shapes, strict=True):
        _check_dtype(path, leaf)
        shape = jnp.shape(leaf)
        if not shape or shape[0] == 0 or shape[1:] != param_shape:
            expected = ", ".join(["T", *map(str, param_shape)])
            raise ValueError(
                f"Expected task gradients of shape ({expected}) with T >= 1, "
                f"got shape {shape} at '{path}'. {_STACK}"
            )
        if not num_tasks:
            num_tasks, first_path = shape[0], path
        if shape[0] != num_tasks:
            raise ValueError(
                f"Expected a leading axis of {num_tasks} tasks as at '{first_path}', "
                f"got shape {shape} at '{path}'. {_STACK}"
            )
    return num_tasks


def check_real(mask: list[bool], params: optax.Params) -> None:
    """Refuses chosen parameters that have no real derivative: integers, complex numbers."""
    for take, (path, leaf) in zip(mask, jax.tree.leaves_with_path(params), strict=True):
        if take and not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise ValueError(
                f"Expected real floating-point parameters, got {jnp.result_type(leaf)} at "
                f"'{leaf_path(path)}'. Pass other leaves to `losses_fn` as arguments of their own, "
                "complex ones as their real and imaginary parts."
            )


def check_shape(name: str, array: Any, shape: tuple[int, ...]) -> jax.Array:
    """Returns `array` as a JAX array, or raises a ValueError if its shape is not `shape`."""
    array = jnp.asarray(array)
    if array.shape != shape:
        raise ValueError(
            f"Expected {name} of shape {shape}, got shape {array.shape} at '{name}'. "
            "Pass one entry per task, in the order of the stacked gradients."
        )
    return array


def check_task_mask(task_mask: Any, num_tasks: int) -> jax.Array:
    """Returns the mask as a JAX array, or raises a ValueError if it is not (T,) booleans."""
    task_mask = check_shape("task_mask", task_mask, (num_tasks,))
    if task_mask.dtype != bool:
        raise ValueError(
            f"Expected a task_mask of booleans, got {task_mask.dtype} at 'task_mask'. "
            "Pass True for the tasks that take part in this step."
        )
    return task_mask


def leaf_path(path: jax.tree_util.KeyPath) -> str:
    """A key path as it stands in our messages, 'path/of/leaf'."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


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
    check_task_updates(task_updates)
    if other is not None:
        check_task_updates(other, jax.tree.map(lambda leaf: leaf[0], task_updates))
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
    info = jnp.finfo(plain.dtype)
    num_coordinates = sum(math.prod(jnp.shape(leaf)[1:]) for leaf in jax.tree.leaves(task_updates))
    # The least square that still counts stays 14 binary digits above the subnormal
    # numbers, which hardware flushes to zero; the largest leaves 20 for T-sized sums.
    least = max(num_coordinates, 1) * 2.0 ** (info.minexp + 14)
    largest = 2.0 ** (info.maxexp - 20)
    shift = 2.0 ** (info.maxexp * 5 // 8)
    peak = jnp.max(jnp.diagonal(plain))
    scale = jnp.where(peak < least, shift, 1.0 / shift).astype(plain.dtype)
    in_range = (peak >= least) & (peak <= largest)
    found = lax.cond(
        _everywhere(in_range),
        lambda: plain,
        lambda: jnp.where(
            in_range, plain, mask_gramian(task_mask, _scaled_gramian(task_updates, None, scale))
        ),
    )
    return found, jnp.where(in_range, 1, scale)


@jax.custom_batching.custom_vmap
def _everywhere(condition: jax.Array) -> jax.Array:
    """The condition, and under `vmap` whether it holds in the whole batch.

    `vmap` turns a `cond` with a batched predicate into a choice between both branches, which would
    read the stack twice; with this one it stays a branch.
    """
    return condition


@_everywhere.def_vmap
def _everywhere_in_a_batch(axis_size, in_batched, condition):
    del axis_size, in_batched
    return _everywhere(jnp.all(condition, axis=0)), False


def gramian_dtype(tree: Any) -> jnp.dtype:
    """float64 if a leaf is float64, else float32."""
    dtypes = [jnp.result_type(leaf) for leaf in jax.tree.leaves(tree)]
    return jnp.dtype(jnp.float64 if jnp.float64 in dtypes else jnp.float32)


def combine(
    weights: jax.Array, task_updates: optax.Updates, task_mask: jax.Array | None = None
) -> optax.Updates:
    """The weighted sum of the task gradients, leaf by leaf.

    Args:
      weights: shape (T,).
      task_updates: pytree whose leaves have shape (T, *param.shape).
      task_mask: shape (T,), bool, False for task gradients to leave out, NaN too; or None.

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
    num_tasks = check_task_updates(task_updates)
    weights = check_shape("weights", weights, (num_tasks,))
    if task_mask is not None:
        task_mask = check_task_mask(task_mask, num_tasks)
        weights = jnp.where(task_mask, weights, 0)

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
    rule: Callable[..., jax.Array], task_updates: optax.Updates, *, key: jax.Array, **kwargs: Any
) -> optax.Updates:
    """Applies a rule to the (T, *shape) gradients of each leaf, in float32 at least.

    The key that the rule gets differs from leaf to leaf: the number of the leaf is folded in.
    """
    leaves, structure = jax.tree.flatten(task_updates)
    results = [
        rule(leaf.astype(gramian_dtype(leaf)), key=jax.random.fold_in(key, number), **kwargs)
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


def stack_losses(losses: Any) -> jax.Array:
    """Losses of shape (T,) from an array of that shape or from a tree of scalars."""
    leaves = jax.tree.leaves(losses)
    if len(leaves) == 1 and jnp.ndim(leaves[0]) == 1:
        stacked = jnp.asarray(leaves[0])
    else:
        for path, leaf in jax.tree.leaves_with_path(losses):
            if jnp.ndim(leaf) or jax.tree.structure(losses) == jax.tree.structure(0):
                raise ValueError(
                    "Expected losses of shape (T,) or a tree of scalar losses, got shape "
                    f"{jnp.shape(leaf)} at '{leaf_path(path)}'. Return one loss per task: "
                    "`jnp.stack([first_loss, second_loss])`."
                )
        stacked = jnp.stack(leaves)
    if not jnp.issubdtype(stacked.dtype, jnp.floating):
        raise ValueError(
            f"Expected floating-point losses, got {stacked.dtype} at 'losses'. "
            "Return the losses before they are rounded or compared."
        )
    return stacked


def path_mask(chosen: Any, tree: Any) -> list[bool]:
    """Which leaves are chosen: by a tree of booleans, a function of their path, or all by None."""
    paths = [leaf_path(path) for path, _ in jax.tree.leaves_with_path(tree)]
    if chosen is None:
        return [True] * len(paths)
    if callable(chosen):
        mask = [bool(chosen(path)) for path in paths]
    else:
        mask = jax.tree.leaves(jax.tree.broadcast(chosen, tree))
    if not any(mask):
        raise ValueError(
            f"Expected a group that holds a leaf, got none of {paths} at 'shared'. "
            "Choose leaves by their paths as they stand in this list."
        )
    return mask


def split(mask: list[bool], tree: Any) -> tuple[list[Any], list[Any]]:
    """The leaves of a tree that are chosen, and the others."""
    leaves = jax.tree.leaves(tree)
    chosen = [leaf for leaf, take in zip(leaves, mask, strict=True) if take]
    return chosen, [leaf for leaf, take in zip(leaves, mask, strict=True) if not take]


def merge(mask: list[bool], chosen: list[Any], others: list[Any], like: Any) -> Any:
    """The tree that `split` took apart, with the structure of `like`."""
    chosen_leaves, other_leaves = iter(chosen), iter(others)
    leaves = [next(chosen_leaves if take else other_leaves) for take in mask]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def _scaled_gramian(
    task_updates: optax.Updates, other: optax.Updates | None, scale: jax.Array | None
) -> jax.Array:
    trees = [task_updates] if other is None else [task_updates, other]
    leaves = zip(*(map(jnp.asarray, jax.tree.leaves(tree)) for tree in trees), strict=True)
    return products.gramian_of_leaves(list(leaves), dtype=gramian_dtype(trees), scale=scale)


def _check_structure(task_updates: optax.Updates, params: optax.Params) -> None:
    structure = jax.tree.structure(params)
    if jax.tree.structure(task_updates) == structure:
        return
    if isinstance(task_updates, list | tuple) and all(
        jax.tree.structure(tree) == structure for tree in task_updates
    ):
        raise ValueError(
            f"Expected one tree of stacked gradients, got a {type(task_updates).__name__} of "
            f"{len(task_updates)} trees at ''. Stack them: "
            "`jax.tree.map(lambda *grads: jnp.stack(grads), *task_grads)`."
        )
    ours = [leaf_path(path) for path, _ in jax.tree.leaves_with_path(task_updates)]
    theirs = [leaf_path(path) for path, _ in jax.tree.leaves_with_path(params)]
    odd = next((path for path in theirs if path not in ours), None)
    if odd is not None:
        expected, got = "a gradient for every parameter", "none"
    else:
        odd = next((path for path in ours if path not in theirs), "")
        expected, got = "the tree structure of the parameters", "another one"
    raise ValueError(
        f"Expected {expected}, got {got} at '{odd}'. Differentiate with respect to the same "
        "parameters that you pass as `params`."
    )


def _check_dtype(path: str, leaf: Any) -> None:
    dtype = jax.dtypes.result_type(leaf)
    if jnp.issubdtype(dtype, jnp.complexfloating):
        remedy = (
            "Wrap the whole chain, surgery first, in `optax.contrib.split_real_and_imaginary`, "
            "which hands on real gradients."
        )
    elif not jnp.issubdtype(dtype, jnp.floating):
        remedy = "Differentiate floating-point parameters only, and leave the others out."
    else:
        return
    raise ValueError(f"Expected real floating-point gradients, got {dtype} at '{path}'. {remedy}")
