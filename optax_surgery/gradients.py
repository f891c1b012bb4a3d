"""From losses to gradients: stacked per task, or operated on without ever being stacked.

All follow `jax.value_and_grad`: they take a function of the parameters and return a
function of the same arguments. They run under `jit`, `vmap` and `scan`.
"""

import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax import lax

from optax_surgery import dependence, trees

Shared = Any  # a tree of booleans like the parameters, or a function of a leaf's path


def task_value_and_grad(
    losses_fn: Callable[..., Any], has_aux: bool = False, chunk_size: int | None = None
) -> Callable[..., tuple[Any, optax.Updates]]:
    """Makes a function of the losses and the stacked gradient of each.

    There is one forward pass, whatever the number of tasks, and one backward pass per task.

    Args:
      losses_fn: `losses_fn(params, *args)` returns losses of shape (T,), or a tree of scalar
        losses, such as a dict of task names; with `has_aux` a pair of those and anything.
      has_aux: whether `losses_fn` returns a pair.
      chunk_size: how many tasks are differentiated at once, at least 1; all by default. Fewer take
        less memory, for the backward passes but not for the stack.

    Returns:
      `fn(params, *args)` giving `losses, task_grads`, or `(losses, aux), task_grads`: the losses
      as `losses_fn` returned them, and gradients whose leaves have shape (T, *param.shape), tasks
      in the order of `jax.tree.leaves(losses)`. There is one `aux`, not one per task.

    Raises:
      ValueError: at trace time, if the losses are not one floating-point scalar per task.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_surgery as surgery
      >>> def losses_fn(params, inputs):
      ...     return {"fit": jnp.sum((params * inputs - 1) ** 2), "decay": jnp.sum(params**2)}
      >>> fn = surgery.task_value_and_grad(losses_fn)
      >>> losses, task_grads = fn(jnp.ones(2), jnp.array([1.0, 2.0]))
      >>> losses["fit"], task_grads
      (Array(1., dtype=float32), Array([[2., 2.],
             [0., 4.]], dtype=float32))
    """

    def fn(params: optax.Params, *args: Any) -> tuple[Any, optax.Updates]:
        losses, transpose, value = jax.vjp(
            _stacked_losses(losses_fn, has_aux, args), params, has_aux=True
        )
        cotangents = jnp.eye(losses.size, dtype=losses.dtype)

        def gradient(cotangent):
            return transpose(cotangent)[0]

        if chunk_size is None:
            return value, jax.vmap(gradient)(cotangents)
        return value, lax.map(gradient, cotangents, batch_size=chunk_size)

    return fn


def per_task_value_and_grad(
    loss_fn: Callable[..., Any], has_aux: bool = False, chunk_size: int | None = None
) -> Callable[..., tuple[Any, optax.Updates]]:
    """Makes a function of the losses and gradients of tasks that have data of their own.

    Args:
      loss_fn: `loss_fn(params, *task_args)` returns the scalar loss of one task; with `has_aux`
        a pair of it and anything.
      has_aux: whether `loss_fn` returns a pair.
      chunk_size: how many tasks are differentiated at once, at least 1; all by default.

    Returns:
      `fn(params, *args)`, with the arguments of all tasks stacked on a leading axis of length T,
      giving `losses, task_grads` or `(losses, aux), task_grads`: losses of shape (T,), gradients
      whose leaves have shape (T, *param.shape), and `aux` stacked.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_surgery as surgery
      >>> fn = surgery.per_task_value_and_grad(lambda params, batch: jnp.sum((params - batch) ** 2))
      >>> losses, task_grads = fn(jnp.zeros(2), jnp.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]))
      >>> losses, task_grads.shape
      (Array([ 5., 25., 61.], dtype=float32), (3, 2))
    """
    value_and_grad = jax.value_and_grad(loss_fn, has_aux=has_aux)

    def fn(params: optax.Params, *args: Any) -> tuple[Any, optax.Updates]:
        if chunk_size is None:
            return jax.vmap(lambda *task_args: value_and_grad(params, *task_args))(*args)
        return lax.map(
            lambda task_args: value_and_grad(params, *task_args), args, batch_size=chunk_size
        )

    return fn


def surgery_value_and_grad(
    losses_fn: Callable[..., Any],
    surgery: optax.GradientTransformation,
    has_aux: bool = False,
    shared: Shared | None = None,
) -> Callable[..., tuple[tuple[Any, optax.Updates], Any]]:
    r"""Makes a function of the losses and the update of a surgery, in the memory of one gradient.

    The result is that of the surgery on stacked gradients, but no two task gradients are ever
    held: for each task one pass backward gives :math:`g_j`, and one forward in its direction the
    column :math:`J g_j` of the Gramian. The surgery turns the Gramian into weights, and one
    backward pass of the weighted losses is the update. From one pass to the next only small
    activations are kept (products smaller than their larger factor, most often the weights); the
    others are computed anew.

    Args:
      losses_fn: as in `task_value_and_grad`.
      surgery: a surgery, or a chain of `monitor` and a surgery; it is to work on the Gramian or
        the losses. The optimiser comes after: it takes the gradients that this returns.
      has_aux: whether `losses_fn` returns a pair.
      shared: the parameters that the tasks share, whose Gramian decides: a tree of booleans like
        the parameters, or a function of a leaf's path ('encoder/layer_0/kernel') that returns a
        boolean. The other leaves get their summed gradient. All parameters by default.

    Returns:
      `fn(params, state, *args, **extra_args)` giving `(losses, grads), state`, or
      `((losses, aux), grads), state`, where `state` begins with `surgery.init(params)`, `grads`
      have the shapes of the parameters, and extra arguments (`task_mask`, ...) go to the surgery,
      which also gets the losses.

    Raises:
      ValueError: at trace time, if the losses are not one floating-point scalar per task, if
        `shared` matches no leaf or one that is not real, or if the surgery works on coordinates.

    Note:
      It takes two to three times the operations of stacking, and less time where writing and
      reading the stack is what takes the time: networks with many parameters and few activations.
      Methods that only use the losses take one backward pass, as plain training does. Inner
      products go through the network's own arithmetic: with bfloat16 activations they are that
      precise, and no more. A masked task must still have a finite derivative: zero times infinity
      in its backward pass is NaN, where a stacked gradient could be left out.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_surgery as surgery
      >>> pcgrad = surgery.pcgrad()
      >>> targets = jnp.array([[1.0, 0.0], [-1.0, 1.0]])
      >>> fn = surgery.surgery_value_and_grad(lambda params: targets @ params, pcgrad)
      >>> params = jnp.array([1.0, 1.0])
      >>> (losses, grads), state = fn(params, pcgrad.init(params))
      >>> losses, grads
      (Array([1., 0.], dtype=float32), Array([0.5, 1.5], dtype=float32))
    """
    update = optax.with_extra_args_support(surgery).update

    def fn(
        params: optax.Params, state: Any, *args: Any, **extra_args: Any
    ) -> tuple[tuple[Any, optax.Updates], Any]:
        mask = trees.path_mask(shared, params)
        trees.check_real(mask, params)
        operated, others = trees.split(mask, params)
        stacked_losses = _stacked_losses(losses_fn, has_aux, args)

        def losses_of(operated, others):
            return stacked_losses(trees.merge(mask, operated, others, params))

        losses, transpose, value = jax.vjp(losses_of, operated, others, has_aux=True)
        identity = jnp.eye(losses.size, dtype=losses.dtype)
        extra_args = {"losses": losses} | extra_args

        def weights_of(gramian):
            weights, new_state = update(identity, state, None, **extra_args, gramian=gramian)
            return jnp.asarray(weights), new_state

        if dependence.depends(weights_of, identity):
            lean = jax.checkpoint(lambda leaves: losses_of(leaves, others)[0], policy=_is_small)
            _, apply = jax.linearize(lean, operated)
            transpose_operated = jax.linear_transpose(apply, operated)

            def column(task):
                one_task, loss = task
                return _apart(apply, _apart(transpose_operated, one_task, loss)[0], loss)

            weights, new_state = weights_of(lax.map(column, (identity, losses)))
            (operated_grads,) = _apart(transpose_operated, weights, weights.sum())
        else:
            weights, new_state = weights_of(identity)
            operated_grads, _ = transpose(weights)
        other_grads = transpose(_active(losses, extra_args))[1] if others else others
        return (value, trees.merge(mask, operated_grads, other_grads, params)), new_state

    return fn


def feature_surgery_value_and_grad(
    encode: Callable[..., Any],
    task_losses: Callable[..., Any],
    surgery: optax.GradientTransformation,
    has_aux: bool = False,
    heads: Literal["sum", "weighted"] = "sum",
) -> Callable[..., tuple[tuple[Any, tuple[optax.Updates, optax.Updates]], Any]]:
    r"""Makes a function of the losses and the update of a surgery on shared features.

    The surgery operates on the gradients with respect to :math:`Z = encode(params)`, and one
    backward pass takes its update on to the encoder: the upper bounds MGDA-UB and
    Aligned-MTL-UB. It costs one pass through the encoder, whatever the number of tasks. Where no
    operation of `task_losses` uses the features for two tasks at once, all T gradients
    are found in one backward pass over T copies of the features, each task's in its own copy.

    Args:
      encode: `encode(encoder_params, *args)` returns the features, an array or a tree.
      task_losses: `task_losses(head_params, features, *args)` returns losses of shape (T,) or a
        tree of scalar losses; with `has_aux` a pair of those and anything.
      surgery: a surgery, or a chain of `monitor` and a surgery.
      has_aux: whether `task_losses` returns a pair.
      heads: "sum": heads get the gradient of the summed losses, which for a head of one task is
        its own; "weighted": of the losses with the surgery's weights.

    Returns:
      `fn(encoder_params, head_params, state, *args, **extra_args)` giving
      `(losses, (encoder_grads, head_grads)), state`, or `((losses, aux), ...), state`, where
      `state` begins with `surgery.init(encoder_params)`.

    Raises:
      ValueError: at trace time, if the losses are not one floating-point scalar per task, or if
        the features do not depend on the encoder's parameters.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_surgery as surgery
      >>> def encode(encoder, inputs):
      ...     return jnp.tanh(inputs @ encoder)
      >>> def task_losses(heads, features, inputs):
      ...     return [jnp.mean((features @ heads[task] - task) ** 2) for task in range(3)]
      >>> mgda_ub = surgery.aligned_mtl()
      >>> fn = surgery.feature_surgery_value_and_grad(encode, task_losses, mgda_ub)
      >>> encoder, heads = jnp.ones((4, 8)), jnp.ones((3, 8))
      >>> state = mgda_ub.init(encoder)
      >>> (losses, (encoder_grads, head_grads)), state = fn(encoder, heads, state, jnp.eye(4))
      >>> encoder_grads.shape, head_grads.shape
      ((4, 8), (3, 8))

    References:
      Sener and Koltun, `Multi-Task Learning as Multi-Objective Optimization
      <https://arxiv.org/abs/1810.04650>`_, NeurIPS 2018, Section 3.3.
    """
    update = optax.with_extra_args_support(surgery).update

    def fn(
        encoder_params: optax.Params,
        head_params: optax.Params,
        state: Any,
        *args: Any,
        **extra_args: Any,
    ) -> tuple[tuple[Any, tuple[optax.Updates, optax.Updates]], Any]:
        if not dependence.depends(lambda params: encode(params, *args), encoder_params):
            raise ValueError(
                "Expected features that depend on the encoder's parameters, got constants at "
                "'encode'. Compute the features from `encoder_params`."
            )
        features, transpose_encoder = jax.vjp(lambda params: encode(params, *args), encoder_params)
        value = task_losses(head_params, features, *args)
        losses = trees.stack_losses(value[0] if has_aux else value)
        extra_args = {"losses": losses} | extra_args

        def losses_of(features, heads):
            return _stacked_losses(task_losses, has_aux, (features, *args))(heads)[0]

        separate_losses = dependence.split_uses(losses_of, features, head_params)
        if separate_losses is None:
            _, transpose = jax.vjp(losses_of, features, head_params)
            identity = jnp.eye(losses.size, dtype=losses.dtype)
            feature_grads = jax.vmap(lambda one_task: transpose(one_task)[0])(identity)
        else:
            copies = jax.tree.map(
                lambda leaf: jnp.broadcast_to(leaf, (losses.size, *leaf.shape)), features
            )
            _, transpose = jax.vjp(separate_losses, copies, head_params)
            feature_grads, _ = transpose(jnp.ones_like(losses))

        if heads == "weighted":
            identity = jnp.eye(losses.size, dtype=losses.dtype)
            hook = extra_args | {"gramian": trees.gramian(feature_grads)}
            weights = jnp.asarray(update(identity, state, None, **hook)[0])
        else:
            weights = _active(losses, extra_args)
        _, head_grads = transpose(weights)
        feature_update, state = update(feature_grads, state, features, **extra_args)
        (encoder_grads,) = transpose_encoder(feature_update)
        return (value, (encoder_grads, head_grads)), state

    return fn


def infer_shared(losses_fn: Callable[..., Any], params: optax.Params, *args: Any) -> Any:
    """Finds the parameters that more than one task reaches.

    It reads the traced program and not the values of gradients: a parameter whose gradient
    happens to be zero counts.

    Args:
      losses_fn: as in `task_value_and_grad`, without aux.
      params: pytree of parameters.
      *args: further arguments of `losses_fn`, arrays or their `jax.ShapeDtypeStruct`.

    Returns:
      A tree of booleans like `params`, True where a leaf takes part in two losses or more.

    Note:
      One leaf that holds the heads of all tasks, a matrix with a column for each, counts as
      shared. So does what goes into an operation that mixes the tasks.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_surgery as surgery
      >>> def losses_fn(params):
      ...     return [jnp.sum(params["trunk"] * params["a"]), jnp.sum(params["trunk"])]
      >>> surgery.infer_shared(losses_fn, {"trunk": jnp.ones(2), "a": jnp.ones(2)})
      {'a': False, 'trunk': True}
    """
    reached = dependence.reached_by(
        lambda params, *args: _stacked_losses(losses_fn, False, args)(params)[0], params, *args
    )
    leaves, structure = jax.tree.flatten(params)
    shared = [sum(leaf in by for by in reached) > 1 for leaf in range(len(leaves))]
    return jax.tree.unflatten(structure, shared)


def _is_small(primitive: Any, *factors: Any, **params: Any) -> bool:
    """Whether this is a product of matrices that takes less memory than its larger factor."""
    if primitive is not lax.dot_general_p:
        return False
    left, right = factors
    (contracted, _), (batch, _) = params["dimension_numbers"]
    summed = math.prod(left.shape[axis] for axis in contracted)
    batches = math.prod(left.shape[axis] for axis in batch)
    product_size = left.size * right.size // (summed**2 * batches) if summed * batches else 0
    return product_size < max(left.size, right.size)


def _apart(function: Callable[[Any], Any], argument: Any, number: jax.Array) -> Any:
    """`function(argument)` in a computation of its own; NaN, if `number` is, without computing it.

    A compiler that sees two passes over a network merges their forward passes, or takes one out of
    a loop, and holds what it computed from the first use to the last: many times the memory of a
    pass. It moves nothing out of a branch that depends on data. Barriers do not stop XLA on a CPU.
    """

    def not_a_number(_):
        shapes = jax.eval_shape(function, argument)
        return jax.tree.map(lambda leaf: jnp.full(leaf.shape, jnp.nan, leaf.dtype), shapes)

    return lax.cond(jnp.isnan(number), not_a_number, function, argument)


def _active(losses: jax.Array, extra_args: dict[str, Any]) -> jax.Array:
    """1 for the tasks that take part in the step."""
    task_mask = extra_args.get("task_mask")
    return jnp.ones_like(losses) if task_mask is None else jnp.asarray(task_mask, losses.dtype)


def _stacked_losses(
    losses_fn: Callable[..., Any], has_aux: bool, args: tuple[Any, ...]
) -> Callable[[optax.Params], tuple[jax.Array, Any]]:
    """A function of the parameters alone: losses of shape (T,), and what the user gets to see."""

    def stacked(params: optax.Params) -> tuple[jax.Array, Any]:
        value = losses_fn(params, *args)
        return trees.stack_losses(value[0] if has_aux else value), value

    return stacked
