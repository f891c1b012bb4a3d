"""From losses to gradients: stacked per task, or operated on without ever being stacked.

All follow `jax.value_and_grad`: they take a function of the parameters and return a function of
the same arguments, by position and by keyword. They run under `jit`, `vmap` and `scan`.
"""

from __future__ import annotations  # `help` shows them as they are written

import functools
from collections.abc import Callable, Mapping
from typing import Any, Concatenate, Literal, ParamSpec, Protocol, TypeVar

import jax

from optax_surgery import checks, core, trees
from optax_surgery.programs import flat, own_data, plan, reach, shared_data
from optax_surgery.programs.over_tasks import OverTasks

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
      `(T, *param.shape)`, tasks in the order of `jax.tree.leaves(losses)`, which
      `task_names(losses)` spells out. There is one `aux`, not one per task.

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
        passes = shared_data.Backward(stacked_losses, params, with_products=False)
        return passes.value, passes.stacks(chunk_size)

    return fn


def per_task_value_and_grad(
    loss_fn: Callable[Concatenate[Params, P], Losses],
    has_aux: bool = False,
    chunk_size: int | None = None,
    spmd_axis_name: Any = None,
) -> Callable[Concatenate[Params, P], tuple[Losses, Any]]:
    """Makes a function of the losses and gradients of tasks that have data of their own.

    Args:
      loss_fn: `loss_fn(params, *task_args, **kwargs)` returns the scalar loss of one task; with
        `has_aux` a pair of it and anything.
      has_aux: whether `loss_fn` returns a pair.
      chunk_size: how many tasks are differentiated at once, at least 1; all by default.
      spmd_axis_name: the axis of a mesh over which the tasks lie, or a tuple of axes, as of
        `jax.vmap`: constraints on shardings within `loss_fn` then leave each task where it is, and
        the stack is moved to where the parameters lie. On an Explicit mesh it is known from the
        positional arguments.

    Returns:
      `fn(params, *args, **kwargs)`, with the positional arguments of all tasks stacked on a leading
      axis of length T and keyword arguments that all tasks share, giving `losses, task_grads` or
      `(losses, aux), task_grads`: losses of shape (T,), gradients whose leaves have shape
      `(T, *param.shape)`, and `aux` stacked.

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
    checks.axis_names("spmd_axis_name", spmd_axis_name)

    def fn(params: Params, /, *args: P.args, **kwargs: P.kwargs) -> tuple[Losses, Any]:
        checks.differentiable(params)
        checks.mapped(args)

        def loss_of(params, task_args):
            value = loss_fn(params, *task_args, **kwargs)
            return checks.loss(checks.before_aux(value, has_aux, call)), value

        leaves, structure = jax.tree.flatten(params)
        over = OverTasks(leaves, args, chunk_size, spmd_axis_name)
        params = jax.tree.unflatten(structure, over.params)

        def value_and_grad(task_args):
            grad, value = jax.grad(loss_of, has_aux=True)(params, task_args)
            return value, jax.tree.leaves(grad)

        value, grads = over.map(value_and_grad, args)
        one_task = jax.tree.map(over.one_task, args)
        grads = over.stacked(grads, lambda: jax.make_jaxpr(loss_of)(params, one_task))
        return value, jax.tree.unflatten(structure, grads)

    return fn


def surgery_value_and_grad(
    losses_fn: Callable[..., Any],
    surgery: core.Surgery,
    has_aux: bool = False,
    shared: Shared | None = None,
    others: Literal["sum", "weighted"] = "sum",
) -> SurgeryFn:
    r"""Makes a function of the losses and the update of a surgery, at about the price of a step.

    The result is that of the surgery on stacked gradients, but they are never stacked. The
    gradient of a matrix is what went in times what came back, :math:`x^\top d_i` for loss i, and
    its inner products :math:`\sum_{pq} (x_p \cdot x_q)(d_{ip} \cdot d_{jq})` need no gradient.
    One forward pass, one pass for all :math:`d_i`, and one product per matrix are an update: about
    (T + 2) / 3 plain steps where the tasks share their data and the rows of x are fewer than the
    matrix's. Of other parameters, and where it is cheaper, the T gradients are formed leaf by leaf,
    contracted and let go; `explain_leaves` tells which. Where the surgery does not look at the
    Gramian, as in the steps in which `every` reuses weights, there is one plain backward pass.

    Args:
      losses_fn: as in `task_value_and_grad`.
      surgery: a surgery that works on the Gramian or the losses. The optimiser comes after: it
        takes the gradients that this returns.
      has_aux: whether `losses_fn` returns a pair.
      shared: the parameters that the tasks share, whose Gramian decides: a tree of booleans like
        the parameters, a list of a boolean per leaf, paths ('encoder/layer_0/kernel', or 'encoder'
        for all in it), or a function of a leaf's path that returns a boolean. All by default.
      others: one of "sum" (the leaves that are not shared get their summed gradient, which for a
        head of one task is its own) and "weighted" (they are summed with the weights that the
        surgery finds for the shared ones).

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
      What comes back for each of T losses is held side by side: where activations take most of the
      memory, that is T times theirs, as with stacked gradients.

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
    call = checks.arguments(
        surgery_value_and_grad, locals(), has_aux=bool, others=("sum", "weighted")
    )
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
        stacked_losses = _stacked_losses(losses_fn, args, kwargs, has_aux, call)
        passes = shared_data.Backward(stacked_losses, params)
        losses = passes.value[0] if has_aux else passes.value
        for_surgery = _with_losses(losses, extra_args)
        grads, new_state = _operated(passes, surgery, state, mask, others, for_surgery)
        return (passes.value, grads), new_state

    return fn


def per_task_surgery_value_and_grad(
    loss_fn: Callable[..., Any],
    surgery: core.Surgery,
    has_aux: bool = False,
    shared: Shared | None = None,
    others: Literal["sum", "weighted"] = "sum",
    chunk_size: int | None = None,
    spmd_axis_name: Any = None,
) -> SurgeryFn:
    r"""Makes a function of the losses and the update, for tasks that have data of their own.

    A task may be a client, a micro-batch, or a single sample. All of their derivatives together
    are one backward pass, and `surgery_value_and_grad` says how the Gramian and the update come
    out of it without T gradients: for samples, at little more than the price of a plain step.

    Args:
      loss_fn: as in `per_task_value_and_grad`, the scalar loss of one task. Where samples of a task
        are missing, let the loss take a mask of them.
      surgery: as in `surgery_value_and_grad`.
      has_aux: whether `loss_fn` returns a pair.
      shared: as in `surgery_value_and_grad`.
      others: one of "sum" and "weighted", as in `surgery_value_and_grad`.
      chunk_size: how many tasks are run at once, at least 1; all by default. Fewer take less memory
        for activations, which are then computed twice.
      spmd_axis_name: as in `per_task_value_and_grad`.

    Returns:
      `fn(params, state, *args, extra_args=None, **kwargs)`, with the positional arguments of all
      tasks stacked on a leading axis of length T and keyword arguments that all tasks share, giving
      `(losses, grads), state` or `((losses, aux), grads), state`: losses of shape (T,), `grads` of
      the shapes of the parameters, and `aux` stacked. What is in `extra_args` goes to the surgery.

    Raises:
      ValueError: at once, as `surgery_value_and_grad`; at trace time, as
        `per_task_value_and_grad`, if `shared` matches no leaf or one that is not real, or if the
        surgery works on coordinates or on the Gramian of two batches.

    Examples:
      Every sample is a task:

      >>> import jax.numpy as jnp
      >>> import optax_surgery as surgery
      >>> upgrad = surgery.upgrad()
      >>> def loss_fn(params, sample):
      ...     return jnp.sum((params - sample) ** 2)
      >>> fn = surgery.per_task_surgery_value_and_grad(loss_fn, upgrad)
      >>> params, samples = jnp.zeros(2), jnp.array([[1.0, 0.0], [0.0, 1.0]])
      >>> (losses, grads), state = fn(params, upgrad.init(params), samples)
      >>> print(losses, jnp.round(grads, 5))
      [1. 1.] [-1. -1.]
    """
    call = checks.arguments(
        per_task_surgery_value_and_grad,
        locals(),
        has_aux=bool,
        others=("sum", "weighted"),
        chunk_size="int [1, inf)",
    )
    checks.function("loss_fn", loss_fn, reserved="extra_args")
    checks.axis_names("spmd_axis_name", spmd_axis_name)
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
        checks.mapped(args)

        def loss_of(params, task_args):
            value = loss_fn(params, *task_args, **kwargs)
            return checks.loss(checks.before_aux(value, has_aux, call)), value

        passes = own_data.Backward(loss_of, params, args, chunk_size, spmd_axis_name)
        for_surgery = _with_losses(passes.losses, extra_args)
        grads, new_state = _operated(passes, surgery, state, mask, others, for_surgery)
        return (passes.value, grads), new_state

    return fn


def explain_leaves(fn: SurgeryFn, params: Any, *args: Any, **kwargs: Any) -> dict[str, str]:
    """Tells how the inner products of each parameter's task gradients are found, and why.

    Args:
      fn: what `surgery_value_and_grad` or `per_task_surgery_value_and_grad` returned.
      params: pytree of parameters, arrays or their `jax.ShapeDtypeStruct`.
      *args: further arguments of `fn`, its state first.
      **kwargs: those by keyword.

    Returns:
      From the path of each leaf to a text that begins with "product" (of what went in and what
      came back: no gradient is formed), "stack" (of T gradients), "slices" (within a loop or a
      rematerialised part, a slice at a time), or "unused".

    Raises:
      ValueError: if `fn` is another function.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_surgery as surgery
      >>> def losses_fn(params, inputs):
      ...     return jnp.mean((inputs @ params["kernel"] + params["bias"][None]) ** 2, axis=0)
      >>> params = {"kernel": jnp.ones((64, 64)), "bias": jnp.ones(64)}
      >>> fn = surgery.surgery_value_and_grad(losses_fn, surgery.mgda())
      >>> ways = surgery.explain_leaves(fn, params, surgery.mgda().init(params), jnp.ones((2, 64)))
      >>> {path: way.split(":")[0] for path, way in ways.items()}
      {'bias': 'stack', 'kernel': 'product'}
    """
    checks.function("fn", fn)
    found: list[Any] = []
    with plan.watched(found.append):
        jax.eval_shape(lambda params: fn(params, *args, **kwargs), params)
    checks.explained(found)
    texts = [f"{way.name}: {way.why}" for way in found[-1]]
    return dict(zip(checks.paths(params), texts, strict=True))


def _operated(
    passes: shared_data.Backward | own_data.Backward,
    surgery: core.Surgery,
    state: Any,
    mask: list[bool],
    others: str,
    for_surgery: dict[str, Any],
) -> tuple[Any, Any]:
    """The update of a surgery on the chosen leaves, and its state."""
    # Where the surgery looks within a branch, what is found for the update stays there.
    found = core.Once(lambda: passes.gramian(mask))
    dtype, num_tasks = trees.gramian_dtype(passes.losses), passes.num_tasks
    made = core.MadeGramian(lambda: found()[0], differences=lambda: passes.differences(mask))
    weights, new_state = core.identity_update(surgery, state, num_tasks, dtype, for_surgery, made)
    rest = weights
    if others == "sum" and not all(mask):
        rest = trees.active_tasks(num_tasks, for_surgery).astype(weights.dtype)
    of_leaves = [weights if take else rest for take in mask]
    return passes.update(of_leaves, found.found and found.found[1]), new_state


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
        program = flat.flatten(jax.make_jaxpr(features_of)(encoder_params))
        dependents = flat.dependents(program, program.inputs)
        checks.features(not dependents.isdisjoint(program.outputs))
        both = (features, head_params)
        passes = shared_data.Backward(lambda both: losses_of(*both), both, with_products=False)
        value, num_tasks = passes.value, passes.num_tasks
        for_surgery = _with_losses(value[0] if has_aux else value, extra_args)
        feature_grads, _ = passes.stacks()

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
                core.MadeGramian(
                    lambda: trees.gramian_in_range(feature_grads, active),
                    differences=lambda: functools.partial(
                        trees.differences, feature_grads, task_mask=active
                    ),
                ),
            )
        num_leaves = len(jax.tree.leaves(both))
        _, head_grads = passes.update([weights.astype(passes.losses.dtype)] * num_leaves)
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
      shared. So does what goes into an operation that mixes the tasks, or into a `custom_vjp` for
      several of them, whose rule may. What is rounded to integers or compared takes no part.

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
    program = flat.flatten(jax.make_jaxpr(losses_of)(params, shapes))
    structure = jax.tree.structure(params)
    reached, _ = reach.reached(program, flat.as_number(program, 0))
    shared = [len(reached[leaf].union()) > 1 for leaf in program.inputs[: structure.num_leaves]]
    return jax.tree.unflatten(structure, shared)


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
