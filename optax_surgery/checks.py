"""Every refusal of the library, in one wording: "Expected X, got Y at 'path/of/leaf'. Do W."

What stands in backticks in W is a call that works as it stands, with a parameter's own name for
what is no number and no string. This file knows what is wrong and how to say it; nothing else in
the library raises a `ValueError`.
"""

import inspect
import math
import numbers
import re
import sys
import typing
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

Names = dict[str, list[str]]  # from an argument to the names in its tree, for those that have one


def refuse(expected: str, got: Any, where: str, remedy: str) -> NoReturn:
    """Raises a ValueError in the words of all our messages."""
    raise ValueError(f"Expected {expected}, got {got} at '{where}'. {remedy}")


# The path of a leaf


def keys(tree: Any) -> list[tuple[str, ...]]:
    """The path of each leaf, key by key, the same for an `nnx.Variable` as for its array."""
    return list(_keys(tree))


def paths(tree: Any) -> list[str]:
    """The path of each leaf as messages and users have it: 'encoder/layer_0/kernel'.

    A bare array is 'updates'. Where two leaves would have the same path, as keys hold slashes,
    those keys are quoted.
    """
    of_leaves = keys(tree)
    joined = Counter("/".join(names) for names in of_leaves)

    def path(names):
        plain = "/".join(names)
        if joined[plain] > 1:
            plain = "/".join(repr(name) if "/" in name else name for name in names)
        return plain or "updates"

    return [path(names) for names in of_leaves]


def _keys(tree: Any) -> Iterator[tuple[str, ...]]:
    variables = _variables()
    is_variable = lambda node: isinstance(node, variables)  # noqa: E731
    for path, node in jax.tree.leaves_with_path(tree, is_leaf=is_variable):
        names = tuple(map(_key_name, path))
        if not is_variable(node):
            yield names
            continue
        for inner, _ in jax.tree.leaves_with_path(node):
            yield names + tuple(map(_key_name, inner[1:]))  # without the variable's `value`


def _key_name(key: Any) -> str:
    return jax.tree_util.keystr((key,), simple=True)


def _variables() -> tuple[type, ...]:
    """Flax's boxes around an array, where Flax is in use."""
    nnx = sys.modules.get("flax.nnx")
    found = {} if nnx is None else vars(nnx)  # newer ones warn where the second is asked for
    return tuple(found[kind] for kind in ("Variable", "VariableState") if kind in found)


# How a factory was called, and what it takes


class Call(str):
    """The name of a factory, which remembers the call, so that hints can be typed as they stand.

    Attributes:
      factory: what was called.
      given: its arguments by name.
      ranges: what `arguments` was told of them.
    """

    factory: Callable[..., Any]
    given: dict[str, Any]
    ranges: dict[str, Any]

    def text(self, changes: dict[str, Any] | None = None, num_tasks: int | None = None) -> str:
        """The call with some arguments changed, so that it is a valid one.

        Args:
          changes: arguments that are to be different; `...` shows one by its name.
          num_tasks: T, if it is known.
        """
        changes = dict(changes or {})
        parameters = inspect.signature(self.factory).parameters
        if num_tasks is not None and "num_tasks" in parameters:
            changes["num_tasks"] = num_tasks
        given = self.given | changes
        shown, by_position = [], True
        for name, parameter in parameters.items():
            by_position &= parameter.kind is not parameter.KEYWORD_ONLY
            is_rest = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
            if is_rest or (name not in changes and parameter.default is not parameter.empty):
                by_position = False
                continue
            value, allowed = given[name], self.ranges.get(name)
            if isinstance(allowed, str) and value is not ...:
                if _violated(value, allowed, given, num_tasks):
                    value = _valid(parameter.default, allowed, given, num_tasks)
            elif isinstance(allowed, type) and not isinstance(value, allowed):
                value = ...
            if isinstance(value, bool | numbers.Number | str):
                shown.append(f"{name}={_plain(value)!r}")
                by_position = False
            else:
                shown.append(name if by_position else f"{name}={name}")
        return f"{self}({', '.join(shown)})"


def arguments(factory: Callable[..., Any], given: dict[str, Any], **ranges: Any) -> Call:
    """Checks the arguments of a factory; its first line is `name = arguments(factory, locals())`.

    Args:
      factory: the factory itself.
      given: its arguments by name.
      **ranges: for each argument what it may be. For a number an interval, such as "[0, 1)" or,
        for an integer that has to be known when the program is made, "int [1, inf)"; bounds may
        be other arguments, and T, which is looked at in `update`. For an array or tree with an
        entry per task "per task (0, inf)". For one of several strings, a tuple of them. Else a
        type.

    Returns:
      The name of the factory, for `gradient_surgery` and for `text`.
    """
    call = Call(factory.__name__)
    call.factory, call.given, call.ranges = factory, dict(given), ranges
    # Bounds that are other arguments come last: by then those are known to be right.
    for name in sorted(ranges, key=lambda name: _depends(ranges[name], given)):
        _argument(call, name, given[name], ranges[name])
    return call


def hint(name: str, num_tasks: int | None = None) -> str:
    """The call of a factory, for so many tasks, also of one whose arguments are not known."""
    if isinstance(name, Call):
        return name.text(num_tasks=num_tasks)
    return f"{name}()" if num_tasks is None else f"{name}(num_tasks={num_tasks})"


def _argument(call: Call, name: str, value: Any, allowed: Any) -> None:
    default = inspect.signature(call.factory).parameters[name].default
    if value is None and default is None:
        return
    if isinstance(allowed, tuple):
        if not isinstance(value, str) or value not in allowed:
            choices = tuple(choice for choice in allowed if choice != default)
            remedy = call.text({name: default if isinstance(default, str) else choices[0]})
            expected = f"one of {', '.join(map(repr, allowed))}"
            if default is None:
                expected = f"None or {expected}"
            refuse(expected, repr(value), name, f"Make it `{remedy}`.")
    elif isinstance(allowed, str):
        _number(call, name, value, allowed, None)
    elif allowed is bool:
        if not isinstance(value, bool | np.bool):
            is_array = isinstance(value, jax.Array | np.ndarray)
            changed = {name: default if isinstance(default, bool) else False}
            remedy = (is_array and _make_static(call)) or f"Make it `{call.text(changed)}`."
            refuse("True or False", _described(value), name, remedy)
    elif not isinstance(value, allowed):
        if issubclass(allowed, optax.GradientTransformation):
            _transformation(call, name, value, allowed)
        refuse(f"a {allowed.__name__}", _described(value), name, f"Make it `{call.text()}`.")


def _number(call: Call, name: str, value: Any, allowed: str, num_tasks: int | None) -> None:
    violated = _violated(value, allowed, call.given, num_tasks)
    if not violated:
        return
    kind, interval = _split(allowed)
    expected = {"int": "an integer", "per task": "numbers", "": "a number"}[kind]
    expected = f"{expected} in {interval}" if "-inf, inf" not in interval else expected
    if num_tasks is not None and "T" in interval:
        expected += f" with T = {num_tasks}"
    default = inspect.signature(call.factory).parameters[name].default
    if violated == "traced":
        expected = f"{expected}, known when the program is made"
        remedy = _make_static(call)
        if remedy:
            refuse(expected, "an array", name, remedy)
    where, got = name, _described(value)
    if kind == "per task":
        change = {name: ... if default in (None, inspect.Parameter.empty) else default}
        entries = "one number per task" if "-inf, inf" in interval else f"entries in {interval}"
        remedy = f"Pass {entries}: `{call.text(change, num_tasks)}`."
        path, got = _first_outside(value, allowed, call.given, num_tasks)
        where = "/".join([name, *path])
    else:
        valid = _valid(default, allowed, call.given, num_tasks)
        if isinstance(value, list | tuple | Mapping) and kind == "int":
            counted = len(value)  # the tasks themselves, where their number is wanted
            valid = valid if _violated(counted, allowed, call.given, num_tasks) else counted
        remedy = f"Make it `{call.text({name: valid}, num_tasks)}`."
        if isinstance(value, str) and "num_tasks" in interval:  # a task by its name
            remedy = f"{remedy[:-1]}, with the place that {value!r} has in task_names(losses)."
    if callable(value) and kind != "int" and _makes_transformations(call):
        by_name = call.text({name: ...}, num_tasks).removeprefix(call)
        remedy = f"For a schedule: `{_injected(call)}{by_name}`."
    refuse(expected, got, where, remedy)


def _makes_transformations(call: Call) -> bool:
    made = inspect.signature(call.factory).return_annotation
    return isinstance(made, type) and issubclass(made, optax.GradientTransformation)


def _injected(call: Call) -> str:
    static = [
        name
        for name, allowed in call.ranges.items()
        if allowed is bool or (isinstance(allowed, str) and allowed.startswith("int"))
    ]
    names = ", ".join(f'"{name}"' for name in static)
    return f"inject_hyperparams({call}{f', static_args=[{names}]' if static else ''})"


def _make_static(call: Call) -> str:
    """Where optax has traced a size, how it does not; nothing for what optax does not call."""
    return f"Make it static: `{_injected(call)}`." if _makes_transformations(call) else ""


def _transformation(call: Call, name: str, value: Any, allowed: Any) -> NoReturn:
    is_surgery = isinstance(allowed, type) and allowed is not optax.GradientTransformation
    expected = "a surgery" if is_surgery else "an optax transformation"
    got = _described(value)
    if callable(value) and getattr(value, "__name__", "").isidentifier():
        refuse(expected, got, name, f"Call it: `{_called(value)}`.")
    if not isinstance(value, optax.GradientTransformation) or not is_surgery:
        refuse(expected, got, name, f"Make it `{call.text({name: ...})}`.")
    refuse(
        expected,
        got,
        name,
        f"Put the optimiser after it, `chain({call.text()}, optimizer)`; or say that this is one "
        f"as a whole, `Surgery(*{name})`.",
    )


def _called(function: Callable[..., Any]) -> str:
    """A call of a function, with the names of the parameters that it cannot do without."""
    needed = [
        f"{one.name}={one.name}" if one.kind is one.KEYWORD_ONLY else one.name
        for one in _required(function)
    ]
    return f"{function.__name__}({', '.join(needed)})"


def _required(function: Callable[..., Any]) -> list[inspect.Parameter]:
    """The parameters that a function cannot do without."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # of some built-in functions it cannot be had
        return []
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [one for one in parameters if one.default is one.empty and one.kind not in kinds]


def surgery(value: Any, kind: type) -> None:
    """Refuses what is no surgery for a function from losses to updates."""
    if isinstance(value, kind):
        return
    if isinstance(value, optax.GradientTransformation):
        remedy = "The optimiser takes the gradients that come back: hand over the surgery alone, "
        remedy += "or say that this is one as a whole, `Surgery(*surgery)`."
    elif callable(value) and getattr(value, "__name__", "").isidentifier():
        remedy = f"Call it: `{_called(value)}`."
    else:
        remedy = "Hand over a surgery, as `pcgrad()` makes one."
    refuse("a surgery", _described(value), "surgery", remedy)


def _split(allowed: str) -> tuple[str, str]:
    kind, interval = re.fullmatch(r"(int|per task|) ?(.*)", allowed).groups()  # pyright: ignore
    return kind, interval


def _bounds(
    interval: str, given: dict[str, Any], num_tasks: int | None
) -> tuple[float, float, bool, bool]:
    """Lower and upper bound, and whether each belongs to the interval."""
    known = {name: value for name, value in given.items() if isinstance(value, numbers.Number)}
    known |= {"inf": math.inf} | ({} if num_tasks is None else {"T": num_tasks})

    def bound(text, unknown):
        try:
            return eval(text, {}, known)  # our own text, of numbers and names
        except NameError:
            return unknown

    lower, upper = interval[1:-1].split(", ")
    return (
        bound(lower, -math.inf),
        bound(upper, math.inf),
        interval[0] == "[",
        interval[-1] == "]",
    )


def _violated(
    value: Any, allowed: str, given: dict[str, Any], num_tasks: int | None
) -> typing.Literal["", "range", "traced"]:
    """Whether a value is not allowed. Values that are traced are not looked at."""
    kind, interval = _split(allowed)
    lower, upper, with_lower, with_upper = _bounds(interval, given, num_tasks)

    def inside(number):
        above = number >= lower if with_lower else number > lower
        below = number <= upper if with_upper else number < upper
        return above and below

    if kind == "per task":
        leaves = jax.tree.leaves(value)
        good = bool(leaves) and all(map(_is_real, leaves))
        return "" if good and all(map(inside, _known(leaves))) else "range"
    if isinstance(value, jax.Array | np.ndarray):
        if kind == "int":
            return "traced"
        good = _is_real(value) and not value.shape
        return "" if good and all(map(inside, _known([value]))) else "range"
    wanted = numbers.Integral if kind == "int" else numbers.Real
    if isinstance(value, bool) or not isinstance(value, wanted):
        return "range"
    return "" if inside(value) else "range"


def _first_outside(
    value: Any, allowed: str, given: dict[str, Any], num_tasks: int | None
) -> tuple[tuple[str, ...], str]:
    """The path of the first entry that is not allowed, and what it is."""
    for path, leaf in zip(keys(value), jax.tree.leaves(value), strict=True):
        entries = _known([leaf]) if _is_real(leaf) else []
        odd = [entry for entry in entries if _violated([entry], allowed, given, num_tasks)]
        if odd or not _is_real(leaf):
            return path, repr(odd[0]) if odd else _described(leaf)
    return (), _described(value)


def _is_real(leaf: Any) -> bool:
    """Whether this is a number or an array of them, and no boolean."""
    dtype = _dtype(leaf)
    return dtype is not None and any(
        jnp.issubdtype(dtype, kind) for kind in (jnp.floating, jnp.integer)
    )


def _known(leaves: list[Any]) -> list[float]:
    """The numbers in arrays, but for those that are traced or lie on other machines."""
    there = [
        leaf
        for leaf in leaves
        if not isinstance(leaf, Tracer) and getattr(leaf, "is_fully_addressable", True)
    ]
    return [entry for leaf in jax.device_get(there) for entry in np.ravel(leaf).tolist()]


def _depends(allowed: Any, given: dict[str, Any]) -> bool:
    """Whether bounds are other arguments."""
    return isinstance(allowed, str) and any(re.search(rf"\b{name}\b", allowed) for name in given)


def _valid(default: Any, allowed: str, given: dict[str, Any], num_tasks: int | None) -> Any:
    """A value that is allowed: the default, else the least one or one near it."""
    _, interval = _split(allowed)
    lower, upper, with_lower, _ = _bounds(interval, given, num_tasks)
    least = 0 if lower == -math.inf else lower
    candidates = [default, least if with_lower else least + 1, (least + upper) / 2, upper]
    return next(
        value
        for value in candidates
        if isinstance(value, numbers.Number) and not _violated(value, allowed, given, num_tasks)
    )


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def _described(value: Any) -> str:
    if isinstance(value, optax.GradientTransformation):
        return type(value).__name__
    if isinstance(value, jax.Array | np.ndarray):
        is_known = not isinstance(value, Tracer) and not value.shape
        return repr(value.item()) if is_known else f"an array of shape {value.shape}"
    if callable(value) and hasattr(value, "__name__"):
        return f"the function {value.__name__}"
    return repr(value)


# Stacked gradients


def stacked(task_updates: Any, params: Any = None) -> int:
    """Checks that every leaf stacks the same number of real gradients.

    Args:
      task_updates: pytree whose leaves have shape `(T, *param.shape)`.
      params: the parameters, or None where they are not known. With them the structure and the
        trailing shapes are checked too, which is the only way to tell an unstacked gradient whose
        leaves happen to share their first dimension.

    Returns:
      The number of tasks T, 0 for a tree without leaves.
    """
    if params is not None:
        _structure(task_updates, params)
        shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(params)]
    else:
        shapes = [jnp.shape(leaf)[1:] for leaf in jax.tree.leaves(task_updates)]
    named = list(zip(paths(task_updates), jax.tree.leaves(task_updates), strict=True))
    stack = "Stack the gradients of the T tasks on a leading axis, as "
    stack += "`task_value_and_grad(losses_fn)` does."

    num_tasks = 0
    for (path, leaf), param_shape in zip(named, shapes, strict=True):
        _real_gradient(path, leaf)
        shape = jnp.shape(leaf)
        if not shape or shape[0] == 0 or shape[1:] != param_shape:
            expected = ", ".join(["T", *map(str, param_shape)])
            expected = f"task gradients of shape ({expected}) with T >= 1"
            if shape == param_shape:
                stack += " In place of optax.MultiSteps, which sees no stack, take `accumulate`."
            refuse(expected, f"shape {shape}", path, stack)
        num_tasks = num_tasks or shape[0]
        if shape[0] != num_tasks:
            expected = f"a leading axis of {num_tasks} tasks as at '{named[0][0]}'"
            refuse(expected, f"shape {shape}", path, stack)
    return num_tasks


def two_batches(task_updates: Any, other: Any) -> None:
    """Checks that the gradients of a second batch are those of the same tasks and parameters."""
    expected = stacked(task_updates)
    params = jax.tree.map(lambda leaf: np.broadcast_to(0, jnp.shape(leaf)[1:]), task_updates)
    got = stacked(other, params)
    if got != expected:
        remedy = "Pass gradients of the same tasks: `gramian(task_updates, other)`."
        refuse(f"a second batch of gradients of {expected} tasks", got, "other", remedy)


def some_leaves(num_tasks: int) -> None:
    """Refuses a tree without leaves, which has no number of tasks."""
    if not num_tasks:
        remedy = "Pass the gradients that `task_value_and_grad(losses_fn)` returns."
        refuse("gradients with at least one leaf", "none", "updates", remedy)


def _structure(task_updates: Any, params: Any) -> None:
    structure = jax.tree.structure(params)
    if jax.tree.structure(task_updates) == structure:
        return
    like_params = lambda node: jax.tree.structure(node) == structure  # noqa: E731
    trees = jax.tree.leaves(task_updates, is_leaf=like_params)
    if trees and all(map(like_params, trees)):
        like = "lambda node: jax.tree.structure(node) == jax.tree.structure(params)"
        unpacked = f"*jax.tree.leaves(updates, is_leaf={like})"
        if isinstance(task_updates, list | tuple) and all(map(like_params, task_updates)):
            unpacked = "*updates"
        elif type(task_updates) is dict and all(map(like_params, task_updates.values())):
            unpacked = "*map(updates.get, sorted(updates))"
        refuse(
            "one tree of stacked gradients",
            f"a {type(task_updates).__name__} of {len(trees)} trees",
            "updates",
            f"Stack them, `jax.tree.map(lambda *grads: jnp.stack(grads), {unpacked})`, or let "
            "`task_value_and_grad(losses_fn)` do it.",
        )
    ours, theirs = paths(task_updates), paths(params)
    odd = next((path for path in theirs if path not in ours), None)
    if odd is not None:
        expected, got = "a gradient for every parameter", "none"
    else:
        odd = next((path for path in ours if path not in theirs), "updates")
        expected, got = "the tree structure of the parameters", "another one"
    remedy = "Differentiate with respect to the same parameters that you pass as `params`."
    refuse(expected, got, odd, remedy)


def _real_gradient(path: str, leaf: Any) -> None:
    dtype = _dtype(leaf)
    if dtype is not None and jnp.issubdtype(dtype, jnp.floating):
        return
    if dtype is not None and jnp.issubdtype(dtype, jnp.complexfloating):
        remedy = (
            "Wrap the whole chain, which then gets real gradients: "
            "`optax.contrib.split_real_and_imaginary(chain(surgery, optimizer))`."
        )
    else:
        remedy = "Differentiate floating-point parameters only, and leave the others out."
    refuse("real floating-point gradients", _kind(leaf), path, remedy)


def real(mask: Iterable[bool], params: Any, what: str = "parameters") -> None:
    """Refuses chosen leaves that have no real derivative: integers, complex numbers."""
    leaves = jax.tree.leaves(params)
    for take, path, leaf in zip(mask, paths(params), leaves, strict=True):
        dtype = _dtype(leaf)
        if take and (dtype is None or not jnp.issubdtype(dtype, jnp.floating)):
            refuse(
                f"real floating-point {what}",
                _kind(leaf),
                path,
                "Pass other leaves as arguments of their own, complex ones as their real and "
                "imaginary parts.",
            )


def updates(new: Any, params: Any) -> None:
    """Refuses updates that have not the shapes of the parameters."""
    if jax.tree.structure(new) != jax.tree.structure(params):
        missing = [path for path in paths(params) if path not in paths(new)]
        odd = missing + [path for path in paths(new) if path not in paths(params)]
        expected = "an update of every parameter" if missing else "updates like the parameters"
        got = "none" if missing else "another tree"
        remedy = "Pass the parameters first, and the updates that were made for them: "
        remedy += "`apply_updates(params, updates)`."
        refuse(expected, got, odd[0] if odd else "updates", remedy)
    named = zip(paths(params), jax.tree.leaves(params), jax.tree.leaves(new), strict=True)
    for path, param, update in named:
        if jnp.shape(update) != jnp.shape(param):
            remedy = "Combine the gradients of the tasks before the optimiser: "
            remedy += "`chain(pcgrad(), optimizer)`."
            if jnp.shape(update)[1:] != jnp.shape(param):
                remedy = "Pass the updates of these parameters: `apply_updates(params, updates)`."
            expected, got = f"an update of shape {jnp.shape(param)}", f"shape {jnp.shape(update)}"
            refuse(expected, got, path, remedy)


# From losses to gradients


def function(name: str, value: Any, reserved: str | None = None) -> None:
    """Refuses what is no function, or one with a parameter that is kept for the surgery."""
    if not callable(value):
        remedy = "Hand over the function itself, and not what it returns."
        refuse("a function", _described(value), name, remedy)
    try:
        parameters = inspect.signature(value).parameters
    except (TypeError, ValueError):  # of some built-in functions it cannot be had
        return
    if reserved in parameters:
        remedy = f"Give it another name: what is passed as {reserved} goes to the surgery."
        refuse(f"a function without a parameter {reserved}", "one that has it", name, remedy)


def axis_names(name: str, value: Any) -> None:
    """Refuses what is no name of a mesh's axis and no tuple of names."""
    names = value if isinstance(value, tuple) else (value,)
    if value is not None and not all(isinstance(one, str) for one in names):
        remedy = "Name the axis of the mesh over which the tasks lie, or a tuple of axes."
        refuse("the name of an axis", _described(value), name, remedy)


def extra_args(value: Any) -> None:
    """Refuses what is no dict of extra arguments."""
    if value is not None and not isinstance(value, Mapping):
        remedy = "Pass what is meant for the surgery by name: `dict(task_mask=task_mask)`."
        refuse("a dict of arguments for the surgery", _described(value), "extra_args", remedy)


def explained(found: list[Any]) -> None:
    """Refuses a function in which no surgery chose ways for its parameters."""
    if not found:
        remedy = "Pass what `surgery_value_and_grad(losses_fn, surgery)` returns."
        refuse("a function of losses and updates", "another one", "fn", remedy)


def differentiable(params: Any) -> None:
    """Refuses parameters that have no derivative, as `jax.grad` does; they may be complex."""
    for path, leaf in zip(paths(params), jax.tree.leaves(params), strict=True):
        dtype = _dtype(leaf)
        if dtype is None or not jnp.issubdtype(dtype, jnp.inexact):
            remedy = "Pass other leaves as arguments of their own."
            refuse("floating-point parameters", _kind(leaf), path, remedy)


def before_aux(value: Any, has_aux: bool, call: Call | None) -> Any:
    """The losses alone of what the user's function returned.

    Args:
      value: what it returned.
      has_aux: whether it is to be a pair of losses and anything.
      call: of the function that takes `has_aux`, or None where there is no such argument.
    """
    is_pair = isinstance(value, tuple | list) and len(value) == 2
    if has_aux:
        if not is_pair:
            remedy = "Return both, or leave has_aux out."
            refuse("a pair of losses and aux", _kind(value), "losses", remedy)
        return value[0]
    # Two scalars, or a tuple with a name and fields, are losses of two tasks.
    if type(value) is tuple and is_pair and _are_losses(value[0]):
        remedy = (
            "Return the losses alone: `infer_shared(lambda *args: losses_fn(*args)[0], params)`."
        )
        if call is not None:
            remedy = f"Say that it is aux: `{call.text({'has_aux': True})}`."
        refuse("losses alone", "a pair of losses and something else", "losses", remedy)
    return value


def loss(value: Any) -> jax.Array:
    """What `loss_fn` returned for one task, a scalar."""
    if is_tree(value) or jnp.ndim(value):
        got = f"a {type(value).__name__}" if is_tree(value) else f"shape {jnp.shape(value)}"
        remedy = "Return one number, and more only with it: "
        remedy += "`per_task_value_and_grad(loss_fn, has_aux=True)`."
        refuse("the loss of one task, a scalar", got, "loss", remedy)
    return losses([value])[0]


def mapped(args: tuple[Any, ...]) -> None:
    """Refuses positional arguments that are not those of T tasks, stacked."""
    shared = "Stack what each task has of its own, and pass by keyword what all tasks share."
    named = [("/".join(["args", *names])) for names in keys(args)]
    num_tasks = 0
    for path, leaf in zip(named, jax.tree.leaves(args), strict=True):
        shape = getattr(leaf, "shape", ())
        if not shape or not shape[0]:
            got = f"shape {shape}" if hasattr(leaf, "shape") else _kind(leaf)
            refuse("an array with a leading axis of T >= 1 tasks", got, path, shared)
        num_tasks = num_tasks or shape[0]
        if shape[0] != num_tasks:
            expected = f"a leading axis of {num_tasks} tasks as at '{named[0]}'"
            refuse(expected, f"one of {shape[0]}", path, shared)
    if not num_tasks:
        refuse("positional arguments with a leading axis of T tasks", "none", "args", shared)


def features(depend: bool) -> None:
    """Refuses features that do not depend on the encoder's parameters."""
    if not depend:
        remedy = "Compute the features from the parameters that come first."
        refuse("features that depend on the encoder's parameters", "constants", "encode", remedy)


def unstacked(field: str, new: Any, old: Any) -> None:
    """Refuses a field of a training state that has become one per task."""
    if jax.tree.structure(new) != jax.tree.structure(old):
        return
    leaves = zip(keys(new), jax.tree.leaves(new), jax.tree.leaves(old), strict=True)
    for names, leaf, old_leaf in leaves:
        shape, old_shape = getattr(leaf, "shape", None), getattr(old_leaf, "shape", None)
        if shape and shape[1:] == old_shape:
            remedy = "Keep one copy for all tasks, as "
            remedy += "`task_value_and_grad(losses_fn, has_aux=True)` does, or average over the "
            remedy += "leading axis."
            where = "/".join([field, *names])
            refuse(f"{field} of shape {old_shape}", f"shape {shape}", where, remedy)


def _are_losses(value: Any) -> bool:
    """Whether this is a vector, or a tree of scalars, of real numbers."""
    leaves = jax.tree.leaves(value)
    dtypes = [_dtype(leaf) for leaf in leaves]
    numeric = all(dtype is not None and jnp.issubdtype(dtype, jnp.floating) for dtype in dtypes)
    num_axes = 0 if is_tree(value) else 1
    return bool(leaves) and numeric and all(jnp.ndim(leaf) == num_axes for leaf in leaves)


def _dtype(leaf: Any) -> Any:
    """The dtype of a leaf, or None of what is no array and no number."""
    if leaf is None or isinstance(leaf, str | type):  # which name a dtype
        return None
    try:
        return jnp.result_type(leaf)
    except (TypeError, ValueError):
        return None


def _kind(value: Any) -> str:
    """The dtype of a leaf or, of what has none, its type."""
    dtype = _dtype(value)
    return f"a {type(value).__name__}" if dtype is None else str(dtype)


# One entry per task


def is_tree(value: Any) -> bool:
    """Whether an argument with one entry per task is a tree of them, and no array."""
    leaf = jax.tree.structure(0)
    return not hasattr(value, "__jax_array__") and jax.tree.structure(value) != leaf


def per_task(name: str, value: Any, num_tasks: int, names: Names | None = None) -> jax.Array:
    """An argument with one entry per task as an array of shape (T,).

    Args:
      name: of the argument.
      value: an array of shape (T,), or a tree of T scalars.
      num_tasks: T.
      names: those of the trees that were given beside it.
    """
    order = "Pass one entry per task, in the order of the stacked gradients."
    for path, leaf in zip(keys(value), jax.tree.leaves(value), strict=True):
        dtype = _dtype(leaf)
        if dtype is None or jnp.issubdtype(dtype, jnp.complexfloating):
            remedy = "Pass one real number per task, in the order of the stacked gradients."
            refuse("real numbers", _kind(leaf), "/".join([name, *path]), remedy)
    if not is_tree(value):
        array = jnp.asarray(value)
        if array.shape != (num_tasks,):
            refuse(f"{name} of shape {(num_tasks,)}", f"shape {array.shape}", name, order)
        return array
    leaves, own = jax.tree.leaves(value), tree_names(value)
    for path, leaf in zip(own, leaves, strict=True):
        if jnp.shape(leaf):
            got = f"shape {jnp.shape(leaf)}"
            refuse(
                f"{name} of shape {(num_tasks,)} or a tree of scalars", got, f"{name}/{path}", order
            )
    for other, theirs in (names or {}).items():
        if own != theirs:
            remedy = "Give both the same keys, or pass an array in the order of the losses: "
            remedy += "`task_names(losses)`."
            refuse(f"the tasks {theirs} of `{other}`", own, name, remedy)
    if len(leaves) != num_tasks:
        refuse(f"{num_tasks} {name}, one per task", f"{len(leaves)}: {own}", name, order)
    return jnp.stack([jnp.asarray(leaf) for leaf in leaves])


def tree_names(tree: Any) -> list[str]:
    """The names of the scalars in a tree with one entry per task."""
    return ["/".join(names) for names in keys(tree)]


def task_mask(value: Any, num_tasks: int, names: Names | None = None) -> jax.Array:
    """The mask as an array of shape (T,), or a refusal of what is no mask."""
    mask = per_task("task_mask", value, num_tasks, names)
    if mask.dtype != bool:
        remedy = "Pass True for the tasks that take part in this step."
        refuse("a task_mask of booleans", mask.dtype, "task_mask", remedy)
    return mask


def beside(extra_args: dict[str, Any], num_tasks: int) -> None:
    """What was given beside the gradients has one entry per task, also where nobody looks."""
    names: Names = {}
    if "losses" in extra_args:
        per_task("losses", extra_args["losses"], num_tasks)
        if is_tree(extra_args["losses"]):
            names["losses"] = tree_names(extra_args["losses"])
    if "task_mask" in extra_args:
        task_mask(extra_args["task_mask"], num_tasks, names)
    if "key" in extra_args:
        key(extra_args["key"])
    if "gramian" in extra_args:
        if not callable(extra_args["gramian"]):
            gramian(extra_args["gramian"], num_tasks)
        elif _required(extra_args["gramian"]):
            remedy = "Pass one that returns it: `lambda: gramian(updates)`."
            refuse("a function without arguments", "one that needs some", "gramian", remedy)


def key(value: Any) -> None:
    """Refuses what is no seed and no PRNG key, or several of them."""
    dtype, shape = _dtype(value), jnp.shape(value) if _dtype(value) is not None else ()
    is_typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    is_seed = dtype is not None and jnp.issubdtype(dtype, jnp.integer)
    if not (is_typed and not shape) and not (is_seed and shape in ((), (2,))):
        got = f"{_kind(value)} of shape {shape}" if shape else _kind(value)
        refuse("a seed or one PRNG key", got, "key", "Make one: `jax.random.key(0)`.")


def gramian(value: Any, num_tasks: int) -> jax.Array:
    """The Gramian as an array of shape (T, T)."""
    remedy = "Pass the inner products of the stacked gradients: `gramian(task_updates)`."
    if value is None or not all(map(_is_real, jax.tree.leaves(value))):
        refuse("a Gramian of real numbers", _kind(value), "gramian", remedy)
    array = jnp.asarray(value)
    if array.shape != (num_tasks, num_tasks):
        expected = f"a Gramian of shape {(num_tasks, num_tasks)}"
        refuse(expected, f"shape {array.shape}", "gramian", remedy)
    return array


def square(name: str, value: Any, *others: str) -> jax.Array:
    """A Gramian of any number of tasks as an array, for the metric of this name.

    Args:
      name: of the metric.
      value: the Gramian.
      *others: the metric's other arguments, by name.
    """
    remedy = "Pass the inner products of the stacked gradients: `gramian(task_updates)`."
    if value is None or not all(map(_is_real, jax.tree.leaves(value))):
        refuse("a Gramian of real numbers", _kind(value), "gramian", remedy)
    array = jnp.asarray(value)
    if array.ndim != 2 or array.shape[0] != array.shape[1]:
        if array.ndim > 2:
            call = f"jax.vmap({name})({', '.join(['gramian', *others])})"
            remedy = f"Map over a history of Gramians: `{call}`."
        refuse("a Gramian of shape (T, T)", f"shape {array.shape}", "gramian", remedy)
    return array if jnp.issubdtype(array.dtype, jnp.floating) else array.astype(float)


def losses(value: Any) -> jax.Array:
    """What `losses_fn` returned as an array of shape (T,)."""
    leaves = jax.tree.leaves(value)
    one_per_task = "Return one loss per task: `jnp.stack([first_loss, second_loss])`."
    if not leaves or getattr(value, "shape", None) == (0,):
        refuse("at least one loss", "none", "losses", one_per_task)
    if is_tree(value):
        for path, leaf in zip(tree_names(value), leaves, strict=True):
            if _dtype(leaf) is None or jnp.ndim(leaf):
                got = _kind(leaf) if _dtype(leaf) is None else f"shape {jnp.shape(leaf)}"
                refuse("a tree of scalar losses", got, f"losses/{path}", one_per_task)
        stack = jnp.stack([jnp.asarray(leaf) for leaf in leaves])
    else:
        if _dtype(value) is None or jnp.ndim(value) != 1:
            expected = "losses of shape (T,) or a tree of scalar losses"
            got = _kind(value) if _dtype(value) is None else f"shape {jnp.shape(value)}"
            refuse(expected, got, "losses", one_per_task)
        stack = jnp.asarray(value)
    if not jnp.issubdtype(stack.dtype, jnp.floating):
        remedy = "Return the losses before they are rounded or compared."
        refuse("floating-point losses", stack.dtype, "losses", remedy)
    return stack


# Which leaves are chosen


def chosen(name: str, choice: Any, tree: Any) -> list[bool]:
    """Which leaves of a tree a user has chosen, at least one.

    Args:
      name: of the argument.
      choice: a function of a leaf's path, a path or a list of them (of leaves, or of what they
        are in), a tree of booleans like the tree or like its upper part, or a list of a boolean
        per leaf.
      tree: the parameters, or gradients like them.
    """
    of_leaves, all_keys = paths(tree), keys(tree)
    booleans = jax.tree.leaves(choice)
    if booleans and all(isinstance(leaf, bool | np.bool) for leaf in booleans):
        mask = _by_tree(name, choice, booleans, all_keys, of_leaves)
    elif booleans and all(isinstance(leaf, str) for leaf in booleans):
        mask = _by_names(name, booleans, of_leaves)
    elif callable(choice):
        mask = [bool(choice(path)) for path in of_leaves]
    else:
        refuse(
            "a function of a path, paths, or a tree of booleans",
            _described(choice),
            name,
            "Choose leaves by their paths: `lambda path: path.startswith('trunk')`.",
        )
    if not any(mask):
        remedy = "Choose leaves by their paths as they stand in this list."
        refuse("a choice that holds a leaf", f"none of {of_leaves}", name, remedy)
    return mask


def _by_tree(name, choice, booleans, all_keys, of_leaves):
    if isinstance(choice, list | tuple) and len(booleans) == len(choice) == len(all_keys):
        return [bool(leaf) for leaf in booleans]
    known = dict(zip(keys(choice), booleans, strict=True))

    def find(names, path):
        above = (names[:length] for length in range(len(names), -1, -1))
        prefix = next((prefix for prefix in above if prefix in known), None)
        if prefix is None:
            remedy = "Choose leaves by a tree of booleans like the parameters."
            refuse("a boolean for every leaf", "none", f"{name}/{path}", remedy)
        return bool(known[prefix])

    mask = [find(names, path) for names, path in zip(all_keys, of_leaves, strict=True)]
    return mask


def _by_names(name, choices, of_leaves):
    def within(path, choice):
        return path == choice or path.startswith(f"{choice}/")

    for choice in choices:
        if not any(within(path, choice) for path in of_leaves):
            remedy = "Choose leaves by their paths as they stand in this list."
            refuse(f"paths among {of_leaves}", repr(choice), name, remedy)
    return [any(within(path, choice) for choice in choices) for path in of_leaves]


def groups(group_of: Callable[[str], str] | None, tree: Any) -> list[str]:
    """The name of each leaf's group, by default its path."""
    of_leaves = paths(tree)
    if group_of is None:
        return of_leaves
    found = [group_of(path) for path in of_leaves]
    for path, group in zip(of_leaves, found, strict=True):
        if not isinstance(group, str):
            remedy = "Return a string from `group_of` for every leaf."
            refuse("the name of a group", repr(group), path, remedy)
    return found


# What a surgery cannot do without, or with


def one_gradient(name: str, tx: optax.GradientTransformation, kind: type) -> None:
    """Refuses a surgery where a transformation of one gradient is wanted."""
    if isinstance(tx, kind):
        remedy = "Pass what takes gradients that are not stacked: `adam(0.025)`."
        refuse("an optax transformation of one gradient", "a surgery", name, remedy)


def num_tasks(name: str, expected: int | None, got: int) -> None:
    """Refuses more or fewer tasks than a method is made for."""
    if expected is not None and got != expected:
        remedy = f"Make it `{hint(name, got)}`."
        refuse(f"the gradients of {expected} tasks", got, name, remedy)
    if isinstance(name, Call):
        for argument, allowed in name.ranges.items():
            if isinstance(allowed, str) and re.search(r"\bT\b", allowed):
                _number(name, argument, name.given[argument], allowed, got)


def state(name: str, expected: Any, got: Any) -> None:
    """Refuses a state with the shapes of another number of tasks."""
    same = jax.tree.structure(expected) == jax.tree.structure(got)
    remedy = _ANEW
    if not same:
        refuse("the state that `init(params)` makes", "another one", name, remedy)
    leaves = zip(keys(expected), jax.tree.leaves(expected), jax.tree.leaves(got), strict=True)
    for path, wanted, leaf in leaves:
        if jnp.shape(leaf) != wanted.shape:
            where = "/".join([name, *path])
            refuse(f"a state of shape {wanted.shape}", f"shape {jnp.shape(leaf)}", where, remedy)


def state_kind(name: str, expected: type, got: Any) -> None:
    """Refuses what is no state of this transformation: another one's, or the parameters."""
    if not isinstance(got, expected):
        remedy = "Begin with `init(params)`, and pass it before `params`."
        refuse(f"the {expected.__name__} that `init(params)` makes", _kind(got), name, remedy)


def needed(name: str, argument: str, value: Any) -> Any:
    """An extra argument of `update` that a rule looks at, or a word that it is missing."""
    if value is None:
        given = "gramian(updates, other)" if argument == "gramian" else argument
        remedy = f"Pass it: `update(updates, state, params, {argument}={given})`."
        refuse(f"the extra argument `{argument}`", "None", name, remedy)
    return value


def given_gramian(name: str) -> NoReturn:
    """For a rule of two batches where another surgery has made the Gramian of one."""
    refuse(
        "the Gramian of two batches, from the caller",
        "that of one batch",
        name,
        f"Use it by itself, on stacked gradients: `{hint(name)}`.",
    )


def no_gramian(name: str, value: Any, instead: str = "") -> None:
    """For what works on the gradients themselves; `instead` says what else there is to do."""
    if value is not None:
        refuse(
            "stacked gradients alone",
            "a Gramian",
            name,
            "It works on the gradients and not on their Gramian: leave out `gramian`, and what "
            "makes one (`every`, `monitor`, `surgery_value_and_grad`, ...); `task_value_and_grad` "
            f"makes gradients for it.{instead}",
        )


def outermost(name: str, has_gramian: bool) -> None:
    """For what operates on parts of the gradients, each of which has a Gramian of its own."""
    if has_gramian:
        refuse(
            "stacked gradients",
            "one Gramian for all of them",
            name,
            f"Put it outermost, and what makes a Gramian (`every`, `monitor`, ...) inside of it: "
            f"`{hint(name)}`. In `surgery_value_and_grad`, choose leaves by its `shared`.",
        )


def missing(call: Call, argument: str, why: str, **others: Any) -> NoReturn:
    """For an argument that another one makes necessary."""
    values = others | {argument: 2 if argument == "num_tasks" else None}
    refuse(
        f"an argument `{argument}`",
        "None",
        argument,
        f"{why}; for two of them: `{call.text(values)}`.",
    )


def leading_axis(name: str, expected: int, state: Any) -> None:
    """Refuses a state whose entries per task are those of another number of tasks."""
    for path, leaf in zip(keys(state), jax.tree.leaves(state), strict=True):
        if jnp.shape(leaf)[:1] != (expected,):
            refuse(
                f"a state with entries for {expected} tasks",
                f"shape {jnp.shape(leaf)}",
                "/".join([name, *path]),
                _ANEW,
            )


def state_of_leaves(name: str, expected: Iterable[str], got: Iterable[str]) -> None:
    """Refuses a state that was made for other leaves, or for other groups of them."""
    expected, got = sorted(expected), sorted(got)
    if expected != got:
        remedy = "Begin with `init(params)` of these parameters."
        refuse(f"a state for {expected}", f"one for {got}", name, remedy)


_ANEW = "Begin with `init(params)`, or take over what fits: "
_ANEW += "`move_state(state, init(params), tasks)`."


def movable(state: Any, new_state: Any, tasks: Any) -> None:
    """Refuses states that differ in more than the number of tasks."""
    remedy = "Make the new state by `init(params)` of the same chain for the new number of tasks."
    if hasattr(state, "opt_state") and not isinstance(state, tuple):
        remedy = "Pass `state.opt_state` and `new_state.opt_state`."
        refuse("the state of an optimiser", type(state).__name__, "state", remedy)
    if jax.tree.structure(state) != jax.tree.structure(new_state):
        refuse("two states of one chain", "other structures", "new_state", remedy)
    is_list = hasattr(tasks, "__len__") and not isinstance(tasks, str)
    if not is_list or not all(task is None or _is_number(task) for task in tasks):
        expected = "for each new task the number of an old one, or None"
        remedy = "Count the old tasks from 0: `[0, 1, None]`."
        refuse(expected, _described(tasks), "tasks", remedy)
    leaves = zip(paths(state), jax.tree.leaves(state), jax.tree.leaves(new_state), strict=True)
    old_numbers = set()
    for path, old, new in leaves:
        old, new = jnp.shape(old), jnp.shape(new)
        changed = [(a, b) for a, b in zip(old, new, strict=False) if a != b]
        if len(old) != len(new) or any(b != len(tasks) for _, b in changed):
            expected = f"shape {old}, or {len(tasks)} in the place of the number of tasks,"
            refuse(expected, f"shape {new}", path, remedy)
        old_numbers |= {a for a, _ in changed}
    if len(old_numbers) > 1:
        refuse("one number of old tasks", sorted(old_numbers), "state", remedy)
    if not any(len(tasks) in jnp.shape(leaf) for leaf in jax.tree.leaves(new_state)):
        return  # there is nothing of single tasks in it
    least = min(old_numbers, default=len(tasks))
    for task in tasks:
        if task is not None and task not in range(least):
            expected = f"numbers of old tasks, 0 to {least - 1}, or None"
            refuse(expected, repr(task), "tasks", "Count the old tasks from 0, in their order.")
    if not old_numbers and list(tasks) != list(range(len(tasks))):
        remedy = "With as many tasks as before, the state can stay as it is."
        refuse("another number of tasks", len(tasks), "tasks", remedy)


def _is_number(task: Any) -> bool:
    return isinstance(task, numbers.Integral) and not isinstance(task, bool)


def subset(tasks: Any) -> None:
    """Refuses what are no names or numbers of tasks."""
    entries = [] if isinstance(tasks, str) or not hasattr(tasks, "__iter__") else list(tasks)
    kinds = {
        str if isinstance(task, str) else int
        for task in entries
        if isinstance(task, str) or (_is_number(task) and int(task) >= 0)
    }
    if len(kinds) != 1 or len(set(entries)) != len(entries):
        remedy = "Name each task once: `on_tasks(surgery, tasks=['image', 'reward'])`."
        refuse("names or numbers of some tasks", _described(tasks), "tasks", remedy)


def rows_of(tasks: Iterable[Any], extra_args: dict[str, Any], num_tasks: int) -> np.ndarray:
    """The rows of tasks that are known by name or by number, in ascending order."""
    tasks = list(tasks)
    known: list[Any] = list(range(num_tasks))
    if isinstance(tasks[0], str):
        trees = [extra_args.get("losses"), extra_args.get("task_mask")]
        named = next((tree for tree in trees if tree is not None and is_tree(tree)), None)
        if named is None:
            remedy = "Pass it: `update(updates, state, params, losses=losses)`."
            refuse("a tree of losses or of a mask, with names", "none", "losses", remedy)
        known = tree_names(named)
    for task in tasks:
        if task not in known:
            remedy = "Choose among those: `task_names(losses)`."
            refuse(f"tasks among {known}", repr(task), "tasks", remedy)
    return np.array(sorted(known.index(task) for task in tasks))
