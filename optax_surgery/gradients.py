"""From losses to gradients: stacked per task, or operated on without ever being stacked.

All follow `jax.value_and_grad`: they take a function of the parameters and return a function of
the same arguments, by position and by keyword. They run under `jit`, `vmap` and `scan`.
"""

from __future__ import annotations  # `help` shows them as they are written

import math
from collections.abc import Callable, Mapping
from typing import Any, Concatenate, Literal, ParamSpec, Protocol, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from optax_surgery import checks, core, trees
from optax_surgery.programs import reach

Shared = Any  # booleans like the parameters, paths, or a function of a leaf's path
Params = TypeVar("Params")
Losses = TypeVar("Losses")
P = ParamSpec("P")


class SurgeryFn(Protocol):
    """What `surgery_value_and_grad` returns: the losses, the gradients and the next state."""

    def __call__(
        self,
        params: Any,
        state: Any,
        /,
        *args: Any,
        extra_args: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> tuple[tuple[Any, Any], Any]:
        """Returns `(losses, grads), state`.

        Args:
          params: pytree of parameters.
          state: of the surgery.
          *args: of the user's function.
          extra_args: what is meant for the surgery, by name: `{"task_mask": task_mask}`.
          **kwargs: of the user's function.
        """
        ...


class FeatureSurgeryFn(Protocol):
    """What `feature_surgery_value_and_grad` returns, a `SurgeryFn` of two sets of parameters."""

    def __call__(
        self,
        encoder_params: Any,
        head_params: Any,
        state: Any,
        /,
        *args: Any,
        extra_args: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> tuple[tuple[Any, tuple[Any, Any]], Any]:
        """Returns `(losses, (encoder_grads, head_grads)), state`.

        Args:
          encoder_params: pytree of parameters.
          head_params: pytree of parameters.
          state: of the surgery.
          *args: of both of the user's functions.
          extra_args: what is meant for the surgery, by name: `{"task_mask": task_mask}`.
          **kwargs: of both of the user's functions.
        """
        ...


def task_value_and_grad(
    losses_fn: Callable[Concatenate[Params, P], Losses],
    has_aux: bool = False,
    chunk_size: int | None = None,
) -> Callable[Concatenate[Params, P], tuple[Losses, Any]]:
    """Makes a function of the losses and the stacked gradient of each.

    There is one forward pass, whatever the number of tasks, and one backward pass per task.

    Args:
      losses_fn: `losses_fn(params, *args, **kwargs)` returns losses of shape (T,), or a tree of
        scalar losses, such as a dict of task names; with `has_aux` a pair of those and anything.
      has_aux: whether `losses_fn` returns a pair.
      chunk_size: how many tasks are differentiated at once, at least 1; all by default. Fewer take
        less memory, for the backward passes but not for the stack.

    Returns:
      `fn(params, *args, **kwargs)` giving `losses, task_grads`, or `(losses, aux), task_grads`:
      the losses as `losses_fn` returned them, and gradients whose leaves have shape
      (T, *param.shape), tasks in the order of `jax.tree.leaves(losses)`, which `task_names(losses)`
      spells out. There is one `aux`, not one per task.

    Raises:
      ValueError: at once, for an argument out of its range; at trace time, if the losses are not
        one floating-point scalar per task, or if a parameter is no floating-point number.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_surgery as surgery
      >>> def losses_fn(params, inputs):
      ...     return {"fit": jnp.sum((params * inputs - 1) ** 2), "decay": jnp.sum(params**2)}
      >>> fn = surgery.task_value_and_grad(losses_fn)
      >>> losses, task_grads = fn(jnp.ones(2), inputs=jnp.array([1.0, 2.0]))
      >>> losses["fit"], task_grads
      (Array(1., dtype=float32), Array([[2., 2.],
             [0., 4.]], dtype=float32))
    """
    call = checks.arguments(task_value_and_grad, locals(), has_aux=bool, chunk_size="int [1, inf)")
    checks.function("losses_fn", losses_fn)

    def fn(params: Params, /, *args: P.args, **kwargs: P.kwargs) -> tuple[Losses, Any]:
        checks.differentiable(params)
        stacked_losses = _stacked_losses(losses_fn, args, kwargs, has_aux, call)
        losses, transpose, value = jax.vjp(stacked_losses, params, has_aux=True)
        cotangents = jnp.eye(losses.size, dtype=losses.dtype)

        def gradient(cotangent):
            return transpose(cotangent)[0]

        if chunk_size is None:
            return value, jax.vmap(gradient)(cotangents)
        return value, lax.map(gradient, cotangents, batch_size=chunk_size)

    return fn


def per_task_value_and_grad(
    loss_fn: Callable[Concatenate[Params, P], Losses],
    has_aux: bool = False,
    chunk_size: int | None = None,
) -> Callable[Concatenate[Params, P], tuple[Losses, Any]]:
    """Makes a function of the losses and gradients of tasks that have data of their own.

    Args:
      loss_fn: `loss_fn(params, *task_args, **kwargs)` returns the scalar loss of one task; with
        `has_aux` a pair of it and anything.
      has_aux: whether `loss_fn` returns a pair.
      chunk_size: how many tasks are differentiated at once, at least 1; all by default.

    Returns:
      `fn(params, *args, **kwargs)`, with the positional arguments of all tasks stacked on a leading
      axis of length T and keyword arguments that all tasks share, giving `losses, task_grads` or
      `(losses, aux), task_grads`: losses of shape (T,), gradients whose leaves have shape
      (T, *param.shape), and `aux` stacked.

    Raises:
      ValueError: at once, for an argument out of its range; at trace time, if the positional
        arguments have not one leading axis in common, if the loss is no floating-point scalar, or
        if a parameter is no floating-point number.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_surgery as surgery
      >>> def loss_fn(params, batch, scale):
      ...     return scale * jnp.sum((params - batch) ** 2)
      >>> fn = surgery.per_task_value_and_grad(loss_fn)
      >>> batches = jnp.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
      >>> losses, task_grads = fn(jnp.zeros(2), batches, scale=0.5)
      >>> losses, task_grads.shape
      (Array([ 2.5, 12.5, 30.5], dtype=float32), (3, 2))
    """
    call = checks.arguments(
        per_task_value_and_grad, locals(), has_aux=bool, chunk_size="int [1, inf)"
    )
    checks.function("loss_fn", loss_fn)

    def fn(params: Params, /, *args: P.args, **kwargs: P.kwargs) -> tuple[Losses, Any]:
        checks.differentiable(params)
        checks.mapped(args)

        def loss_of(params, task_args):
            value = loss_fn(params, *task_args, **kwargs)
            return checks.loss(checks.before_aux(value, has_aux, call)), value

        def value_and_grad(task_args):
            grad, value = jax.grad(loss_of, has_aux=True)(params, task_args)
            return value, grad

        if chunk_size is None:
            return jax.vmap(value_and_grad)(args)
        return lax.map(value_and_grad, args, batch_size=chunk_size)

    return fn


def surgery_value_and_grad(
    losses_fn: Callable[..., Any],
    surgery: core.Surgery,
    has_aux: bool = False,
    shared: Shared | None = None,
) -> SurgeryFn:
    r"""Makes a function of the losses and the update of a surgery, in the memory of one gradient.

    The result is that of the surgery on stacked gradients, but no two task gradients are ever
    held: for each task one pass backward gives :math:`g_j`, and one forward in its direction the
    column :math:`J g_j` of the Gramian. The surgery turns the Gramian into weights, and one
    backward pass of the weighted losses is the update. From one pass to the next only small
    activations are kept (products smaller than their larger factor, most often the weights); the
    others are computed anew. Where the surgery does not look at the Gramian, as in the steps in
    which `every` reuses weights, there are no such passes.

    Args:
      losses_fn: as in `task_value_and_grad`.
      surgery: a surgery that works on the Gramian or the losses. The optimiser comes after: it
        takes the gradients that this returns.
      has_aux: whether `losses_fn` returns a pair.
      shared: the parameters that the tasks share, whose Gramian decides: a tree of booleans like
        the parameters, a list of a boolean per leaf, paths ('encoder/layer_0/kernel', or 'encoder'
        for all in it), or a function of a leaf's path that returns a boolean. The other leaves get
        their summed gradient. All parameters by default.

    Returns:
      `fn(params, state, *args, extra_args=None, **kwargs)` giving `(losses, grads), state`, or
      `((losses, aux), grads), state`, where `state` begins with `surgery.init(params)` and `grads`
      have the shapes of the parameters. Other arguments go to `losses_fn`; those in `extra_args`,
      a dict (`{"task_mask": task_mask}`), go to the surgery, which also gets the losses.

    Raises:
      ValueError: at once, for what is no surgery or an argument out of its range, or if
        `losses_fn` has a parameter `extra_args`; at trace time, if the losses are not one
        floating-point scalar per task, if `shared` matches no leaf or one that is not real, or if
        the surgery works on coordinates or on the Gramian of two batches.

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

      Without the second task:

      >>> mask = jnp.array([True, False])
      >>> (losses, grads), state = fn(params, state, extra_args={"task_mask": mask})
      >>> grads
      Array([1., 0.], dtype=float32)
    """
    call = checks.arguments(surgery_value_and_grad, locals(), has_aux=bool)
    checks.function("losses_fn", losses_fn, reserved="extra_args")
    checks.surgery(surgery, core.Surgery)

    def fn(
        params: Any,
        state: Any,
        /,
        *args: Any,
        extra_args: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> tuple[tuple[Any, Any], Any]:
        mask = _mask(shared, params)
        checks.real(mask, params)
        operated, others = trees.split(mask, params)
        stacked_losses = _stacked_losses(losses_fn, args, kwargs, has_aux, call)

        def losses_of(operated, others):
            return stacked_losses(trees.merge(mask, operated, others, params))

        losses, transpose, value = jax.vjp(losses_of, operated, others, has_aux=True)
        identity = jnp.eye(losses.size, dtype=losses.dtype)
        for_surgery = _with_losses(value[0] if has_aux else value, extra_args)

        def linearize():
            lean = jax.checkpoint(lambda leaves: losses_of(leaves, others)[0], policy=_is_small)
            _, apply = jax.linearize(lean, operated)
            return apply, jax.linear_transpose(apply, operated)

        # What is linearized in a branch of the surgery's may not leave it.
        passes, looks = core.Once(linearize), []

        def gramian():
            looks.append(True)
            apply, transpose_operated = passes()

            def column(task):
                one_task, loss = task
                return _apart(apply, _apart(transpose_operated, one_task, loss)[0], loss)

            return lax.map(column, (identity, losses))

        dtype = trees.gramian_dtype(losses)
        weights, new_state = core.identity_update(
            surgery, state, losses.size, dtype, for_surgery, gramian
        )
        weights = weights.astype(losses.dtype)
        if looks:
            (operated_grads,) = _apart(passes()[1], weights, weights.sum())
        else:
            operated_grads, _ = transpose(weights)
        active = trees.active_tasks(losses.size, for_surgery).astype(losses.dtype)
        other_grads = others if all(mask) else transpose(active)[1]
        return (value, trees.merge(mask, operated_grads, other_grads, params)), new_state

    return fn


def feature_surgery_value_and_grad(
    encode: Callable[..., Any],
    task_losses: Callable[..., Any],
    surgery: core.Surgery,
    has_aux: bool = False,
    heads: Literal["sum", "weighted"] = "sum",
) -> FeatureSurgeryFn:
    r"""Makes a function of the losses and the update of a surgery on shared features.

    The surgery operates on the gradients with respect to :math:`Z = encode(params)`, and one
    backward pass takes its update on to the encoder: the upper bounds MGDA-UB and
    Aligned-MTL-UB. It costs one pass through the encoder, whatever the number of tasks. Where no
    operation of `task_losses` uses the features for two tasks at once, all T gradients
    are found in one backward pass over T copies of the features, each task's in its own copy.

    Args:
      encode: `encode(encoder_params, *args, **kwargs)` returns the features, an array or a tree.
      task_losses: `task_losses(head_params, features, *args, **kwargs)` returns losses of shape
        (T,) or a tree of scalar losses; with `has_aux` a pair of those and anything.
      surgery: a surgery.
      has_aux: whether `task_losses` returns a pair.
      heads: one of "sum": heads get the gradient of the summed losses, which for a head of one task
        is its own; "weighted": of the losses with the surgery's weights.

    Returns:
      `fn(encoder_params, head_params, state, *args, extra_args=None, **kwargs)` giving
      `(losses, (encoder_grads, head_grads)), state`, or `((losses, aux), ...), state`, where
      `state` begins with `surgery.init(encoder_params)`, or `surgery.init(features)` where the
      state has the shapes of what it operates on. Other arguments go to `encode` and
      `task_losses`; those in `extra_args`, a dict (`{"task_mask": task_mask}`), go to the surgery,
      which also gets the losses.

    Raises:
      ValueError: at once, for what is no surgery or an argument out of its range, or if `encode`
        or `task_losses` has a parameter `extra_args`; at trace time, if the losses are not one
        floating-point scalar per task, if the features are not real or do not depend on the
        encoder's parameters, or, for heads that are "weighted", if the surgery works on
        coordinates or on the Gramian of two batches.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_surgery as surgery
      >>> def encode(encoder, inputs):
      ...     return jnp.tanh(inputs @ encoder)
      >>> def task_losses(heads, features, inputs):
      ...     return [jnp.mean((features @ heads[task] - task) ** 2) for task in range(3)]
      >>> mgda_ub = surgery.mgda()
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
    call = checks.arguments(
        feature_surgery_value_and_grad, locals(), has_aux=bool, heads=("sum", "weighted")
    )
    checks.function("encode", encode, reserved="extra_args")
    checks.function("task_losses", task_losses, reserved="extra_args")
    checks.surgery(surgery, core.Surgery)

    def fn(
        encoder_params: Any,
        head_params: Any,
        state: Any,
        /,
        *args: Any,
        extra_args: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> tuple[tuple[Any, tuple[Any, Any]], Any]:
        def features_of(params):
            features = encode(params, *args, **kwargs)
            checks.real([True] * len(jax.tree.leaves(features)), features, what="features")
            return features

        def losses_of(features, heads):
            inputs = (features, *args)
            return _stacked_losses(task_losses, inputs, kwargs, has_aux, call)(heads)

        checks.differentiable(encoder_params)
        features, transpose_encoder = jax.vjp(features_of, encoder_params)
        checks.features(reach.depends(features_of, encoder_params))
        losses, value = losses_of(features, head_params)
        num_tasks, identity = losses.size, jnp.eye(losses.size, dtype=losses.dtype)
        for_surgery = _with_losses(value[0] if has_aux else value, extra_args)

        def losses_alone(features, heads):
            return losses_of(features, heads)[0]

        separate_losses = reach.split_uses(losses_alone, features, head_params)
        if separate_losses is None:
            _, transpose = jax.vjp(losses_alone, features, head_params)
            feature_grads = jax.vmap(lambda one_task: transpose(one_task)[0])(identity)
        else:
            copies = jax.tree.map(
                lambda leaf: jnp.broadcast_to(leaf, (num_tasks, *leaf.shape)), features
            )
            _, transpose = jax.vjp(separate_losses, copies, head_params)
            feature_grads, _ = transpose(jnp.ones_like(losses))

        feature_update, new_state = surgery.update(feature_grads, state, features, **for_surgery)
        (encoder_grads,) = transpose_encoder(feature_update)
        active = trees.active_tasks(num_tasks, for_surgery)
        weights = active
        if heads == "weighted":
            weights, _ = core.identity_update(
                surgery,
                state,
                num_tasks,
                trees.gramian_dtype(feature_grads),
                for_surgery,
                lambda: trees.gramian_in_range(feature_grads, active),
            )
        _, head_grads = transpose(weights.astype(losses.dtype))
        return (value, (encoder_grads, head_grads)), new_state

    return fn


def infer_shared(
    losses_fn: Callable[Concatenate[Params, P], Any],
    params: Params,
    *args: P.args,
    **kwargs: P.kwargs,
) -> Any:
    """Finds the parameters that more than one task reaches.

    It reads the traced program and not the values of gradients: a parameter whose gradient
    happens to be zero counts.

    Args:
      losses_fn: as in `task_value_and_grad`, without aux.
      params: pytree of parameters, arrays or their `jax.ShapeDtypeStruct`.
      *args: further arguments of `losses_fn`, arrays or their `jax.ShapeDtypeStruct`, or anything
        else that it takes, such as flags.
      **kwargs: those by keyword.

    Returns:
      A tree of booleans like `params`, True where a leaf takes part in two losses or more.

    Raises:
      ValueError: if the losses are not one floating-point scalar per task.

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
    checks.function("losses_fn", losses_fn)
    leaves, structure = jax.tree.flatten((args, kwargs))
    # Only shapes have to be traced: a flag has to keep its value.
    traced = [isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves]

    def losses_of(params, shapes):
        shapes = iter(shapes)
        filled = [
            next(shapes) if trace else leaf for trace, leaf in zip(traced, leaves, strict=True)
        ]
        args, kwargs = jax.tree.unflatten(structure, filled)
        return _stacked_losses(losses_fn, args, kwargs, False, None)(params)[0]

    shapes = [leaf for trace, leaf in zip(traced, leaves, strict=True) if trace]
    reached = reach.reached_by(losses_of, params, shapes)
    params_structure = jax.tree.structure(params)
    num_reached = [sum(leaf in by for by in reached) for leaf in range(params_structure.num_leaves)]
    return jax.tree.unflatten(params_structure, [number > 1 for number in num_reached])


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


def _mask(shared: Shared | None, params: Any) -> list[bool]:
    """Which leaves the surgery operates on."""
    if shared is None:
        return [True] * len(jax.tree.leaves(params))
    return checks.chosen("shared", shared, params)


def _with_losses(losses: Any, extra_args: Mapping[str, Any] | None) -> dict[str, Any]:
    """What the surgery gets to see, with the losses as the user's function returned them."""
    checks.extra_args(extra_args)
    given = {name: value for name, value in (extra_args or {}).items() if value is not None}
    return {"losses": losses} | given


def _stacked_losses(
    losses_fn: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    has_aux: bool,
    call: checks.Call | None,
) -> Callable[[Any], tuple[jax.Array, Any]]:
    """A function of the parameters alone: losses of shape (T,), and what the user gets to see."""

    def stacked(params: Any) -> tuple[jax.Array, Any]:
        value = losses_fn(params, *args, **kwargs)
        return checks.losses(checks.before_aux(value, has_aux, call)), value

    return stacked
