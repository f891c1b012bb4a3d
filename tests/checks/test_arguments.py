"""Each argument's range stands in its docstring, and what is outside of it is refused at once.

The cases are made from the `Args:` of every public function: an argument without a word on its
range fails, and so does a word that the code does not keep.
"""

import ast
import inspect
import math
import re
import textwrap
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_surgery as surgery
from optax_surgery import checks
from tests.checks.hints import MESSAGE, PUBLIC, execute

FUNCTIONS = {name: value for name, value in PUBLIC.items() if inspect.isfunction(value)}

# What the arguments are that have no default, by their names.
FILLED = {
    "encode": lambda params: params,
    "every_k": 2,
    "fn": lambda params: surgery.surgery_value_and_grad(lambda params: params, surgery.mgda())(
        params, surgery.mgda().init(params)
    ),
    "gramian": np.eye(3),
    "inner": surgery.mgda(),
    "k": 2,
    "loss_fn": lambda params, target: jnp.sum((params - target) ** 2),
    "losses": np.ones(3),
    "losses_fn": lambda params: params,
    "max_norm": 1.0,
    "name": "rule",
    "new_state": (),
    "num_byzantine": 0,
    "num_groups": 2,
    "num_tasks": 3,
    "num_trimmed": 1,
    "params": np.ones(2),
    "penalty": 1.0,
    "primary": 0,
    "residual": 0,
    "rule": surgery.StackedRule(lambda params: (), lambda tasks, updates, state: (updates, state)),
    "scores": np.ones(3),
    "shared": "trunk",
    "state": (),
    "step": 1,
    "surgery": surgery.pcgrad(),
    "task_losses": lambda params, features: params,
    "task_updates": np.eye(3),
    "tasks": [0, 1],
    "tx": optax.sgd(0.1),
    "updates": np.ones(2),
    "weighting": surgery.Weighting(tuple, lambda tasks, state: (tasks.losses, state)),
    "weights": np.ones(3),
    "window": 2,
}


class Range(NamedTuple):
    """An interval, whose bounds may be other arguments or T, or one of several strings."""

    opening: str = ""
    lower: str = ""
    upper: str = ""
    closing: str = ""
    choices: tuple[str, ...] = ()

    def bounds(self):
        known = FILLED | {"T": 3, "inf": math.inf}
        return eval(self.lower, {}, known), eval(self.upper, {}, known)

    def values(self, is_integer):
        """What is just outside at both ends, and what is just inside."""
        after = (lambda number, side: number + side) if is_integer else _next
        outside, inside = [], []
        for bound, side, closed in zip(
            self.bounds(), (1, -1), (self.opening == "[", self.closing == "]"), strict=True
        ):
            if math.isinf(bound):
                outside += [] if is_integer else [bound]
                continue
            outside.append(after(bound, -side) if closed else bound)
            inside += [bound] if closed else []
            inside.append(after(bound, side))
        return outside, [value for value in inside if value not in outside]


def _next(number, side):
    return math.nextafter(number, side * math.inf)


class Argument(NamedTuple):
    annotation: str
    default: object
    entry: str

    @property
    def is_per_task(self):
        return "PerTask" in self.annotation and "bool" not in self.entry

    @property
    def is_numeric(self):
        kinds = set(re.split(r"\W+", self.annotation))
        return (self.is_per_task or bool(kinds & {"int", "float"})) and not (
            {"Array", "Sequence", "Callable"} & kinds  # a key, or several of them
        )

    @property
    def range(self):
        return range_of(self.entry)


NUMBER = r"(-?\d+(?:\.\d+)?)"
BOUND = r"((?:[^()\[\],]|\([^()]*\))+)"  # which may have brackets of its own
FORMS = {
    rf"\bin ([\[(]){BOUND}, {BOUND}([\])])": lambda *interval: Range(*interval),
    rf"\bat least {NUMBER}": lambda least: Range("[", least, "inf", ")"),
    rf"\babove {NUMBER}": lambda bound: Range("(", bound, "inf", ")"),
    r"\bany numbers?\b": lambda: Range("(", "-inf", "inf", ")"),
}


def range_of(entry):
    """The range in an argument's entry: the first of the forms that it has."""
    found = [(match.start(), form, match) for form in FORMS if (match := re.search(form, entry))]
    if "one of" in entry:
        choices = re.findall(r'"([^"]+)"', entry[entry.index("one of") :])
        return Range(choices=tuple(sorted(set(choices))))
    if not found:
        return None
    _, form, match = min(found, key=lambda one: one[0])
    return FORMS[form](*match.groups())


def arguments_of(function):
    """The arguments of a function as its source and its docstring have them."""
    definition = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0].args
    annotations = {
        one.arg: ast.unparse(one.annotation)
        for one in [*definition.posonlyargs, *definition.args, *definition.kwonlyargs]
    }
    section = re.search(r"\nArgs:\n(.*?)\n\n", inspect.getdoc(function), re.DOTALL)
    text = section.group(1) + "\n" if section else ""
    entries = {
        name: " ".join(entry.split())
        for name, entry in re.findall(r"^  (\w+): (.*\n(?:    .*\n)*)", text, re.MULTILINE)
    }
    parameters = inspect.signature(function).parameters
    return {
        name: Argument(annotation, parameters[name].default, entries.get(name, ""))
        for name, annotation in annotations.items()
    }


ARGUMENTS = {name: arguments_of(function) for name, function in FUNCTIONS.items()}
RANGED = [
    pytest.param(name, argument, id=f"{name}-{argument}")
    for name, arguments in ARGUMENTS.items()
    for argument, one in arguments.items()
    if one.range and (one.is_numeric or one.range.choices)
]
OTHERS = [
    pytest.param(name, argument, id=f"{name}-{argument}")
    for name, arguments in ARGUMENTS.items()
    for argument, one in arguments.items()
    if one.annotation == "bool" or re.search(r"GradientTransformation|\bSurgery\b", one.annotation)
]


def make(name, **arguments):
    """A call with the arguments that have no default filled in."""
    filled = {
        argument: FILLED[argument]
        for argument, one in ARGUMENTS[name].items()
        if one.default is inspect.Parameter.empty
    }
    return FUNCTIONS[name](**filled | arguments)


def make_and_use(name, **arguments):
    """A call and, as what depends on T is found there, an update."""
    made = make(name, **arguments)
    if isinstance(made, optax.GradientTransformation):
        jax.eval_shape(made.update, jnp.eye(3), jax.eval_shape(made.init, jnp.zeros(3)))


def refused(name, argument, value):
    with pytest.raises(ValueError, match=MESSAGE) as caught:
        make_and_use(name, **{argument: value})
    assert f"at '{argument}" in str(caught.value)
    execute(caught.value, **{argument: value} if "a schedule" in str(caught.value) else {})


def ranges_in_the_code(name, monkeypatch):
    """What a function tells `checks.arguments`, of its arguments."""
    told = {}

    def record(factory, given, **ranges):
        if factory.__name__ == name:
            told.update(ranges)
        return original(factory, given, **ranges)

    original = checks.arguments
    monkeypatch.setattr(checks, "arguments", record)
    make(name)
    return told


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_argument_has_an_entry_and_every_number_a_range(name):
    for argument, one in ARGUMENTS[name].items():
        assert one.entry, f"{name} has no `Args:` entry for {argument}"
        assert one.range or not one.is_numeric, (
            f"{name}: `{argument}: {one.annotation}` has no range. Say 'in [a, b)', 'at least a', "
            f"'above a' or 'any number': {one.entry!r}"
        )


@pytest.mark.parametrize(("name", "argument"), RANGED)
def test_what_is_outside_of_a_range_is_refused(name, argument):
    one = ARGUMENTS[name][argument]
    nothing = [] if one.default is None else [None]
    if one.range.choices:
        values = [*nothing, "no such", 1, True]
    elif one.is_per_task:
        outside, inside = one.range.values(is_integer=False)
        good = [*inside, 0.5][0]
        values = [*nothing, "abc", [], {"a": "x"}, [1j, good, good]]
        if name not in ("combine", "update_alignment"):  # which take any, NaN and True
            values.append([True, False, True])
            outside.append(math.nan)
            values += [[bad, good, good] for bad in outside]
            values += [np.array([good, bad, good]) for bad in outside]
            values += [{"a": good, "b": {"c": bad}} for bad in outside]
            values += [jnp.array([good, good, jnp.nan])]
    else:
        is_integer = "int" in one.annotation
        outside, (good, *_) = one.range.values(is_integer)
        values = [*nothing, *outside, "3", True, 1j, [good], lambda step: good]
        values += [good + 0.5, float(good), jnp.array(good)] if is_integer else [math.nan]
        values += [] if is_integer else [jnp.array([good, good]), jnp.array(jnp.nan)]
        if name == "excess_mtl" and argument == "num_warmup_steps":  # it may be traced
            values = [value for value in values if not isinstance(value, float | jax.Array)]
    for value in values:
        refused(name, argument, value)


@pytest.mark.parametrize(("name", "argument"), RANGED)
def test_what_is_inside_of_a_range_is_accepted(name, argument):
    one = ARGUMENTS[name][argument]
    if one.range.choices:
        for choice in one.range.choices:
            others = {"num_tasks": 3} if choice == "ema" else {}
            make(name, **{argument: choice} | others)
        return
    for value in one.range.values("int" in one.annotation)[1]:
        if one.is_per_task:
            for values in ([value] * 3, {"a": value, "b": value, "c": value}, jnp.full(3, value)):
                if isinstance(values, list | dict) or float(np.float32(value)) == value:
                    make(name, **{argument: values})
        else:
            make(name, **{argument: value})
            make(name, **{argument: np.asarray(value)[()]})
    if one.default is None:
        make(name, **{argument: None})


@pytest.mark.parametrize(("name", "argument"), OTHERS)
def test_what_is_of_another_kind_is_refused(name, argument):
    one = ARGUMENTS[name][argument]
    values = [] if one.default is None else [None]
    if one.annotation == "bool":
        values += [1, "yes", jnp.array(True)]
    else:
        values += [3, surgery.famo, lambda params: params]
        values += [optax.sgd(0.1)] if "Surgery" in one.annotation else [surgery.pcgrad()]
        if name in ("accumulate", "on_nonfinite"):  # which take surgeries and others
            values.pop()
    for value in values:
        refused(name, argument, value)


@pytest.mark.parametrize("name", [*dict.fromkeys(ranged.values[0] for ranged in RANGED)])
def test_the_ranges_in_the_docstring_are_those_in_the_code(name, monkeypatch):
    told = ranges_in_the_code(name, monkeypatch)
    for argument, one in ARGUMENTS[name].items():
        in_code = told.get(argument)
        if isinstance(in_code, tuple):
            choices = tuple(sorted(choice for choice in in_code if choice is not None))
            assert one.range == Range(choices=choices), (name, argument)
        elif isinstance(in_code, str):
            kind, interval = re.fullmatch(r"(int|per task|) ?(.*)", in_code).groups()
            assert range_of(f"in {interval}") == one.range, (name, argument)
            assert (kind == "per task") == one.is_per_task, (name, argument)
            assert kind != "int" or "int" in one.annotation, (name, argument)
        elif name not in ("combine", "update_alignment"):  # which look at numbers of one step
            assert not one.is_numeric, f"{name} does not check {argument}"
            assert (in_code is bool) == (one.annotation == "bool"), (name, argument)


TRACED = {  # with every argument that has no default
    "krum": {"num_byzantine": 0},
    "excess_mtl": {"num_tasks": 3},
    "pcd": {"primary": 0, "num_tasks": 3},
    "dwa": {"num_tasks": 3, "window": 2},
    "start_after": {"surgery": surgery.krum(0), "step": 1},
}


@pytest.mark.parametrize("name", TRACED)
def test_a_size_that_is_traced_is_refused_with_a_hint_that_works(name):
    task_grads, params = {"w": jnp.eye(3)}, {"w": jnp.ones(3)}
    tx = optax.inject_hyperparams(FUNCTIONS[name])(**TRACED[name])
    with pytest.raises(ValueError, match=MESSAGE) as caught:
        tx.init(params)
    assert "known when the program is made" in str(caught.value)
    hint = re.search("Make it static: `(.+)`", str(caught.value)).group(1)
    tx = eval(hint, vars(optax) | PUBLIC)(**TRACED[name])

    @jax.jit
    def step(state):
        return tx.update(task_grads, state, params, losses=jnp.ones(3))

    updates, _ = step(tx.init(params))
    assert updates["w"].shape == (3,)


def test_tasks_in_place_of_their_number_are_counted_and_a_name_is_led_to_its_place():
    for tasks in (["residual", "edge"], {"residual": 1.0, "edge": 2.0}):
        with pytest.raises(ValueError, match=r"Make it `monitor\(num_tasks=2\)`"):
            surgery.monitor(tasks)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"the place that 'fit' has in task_names\(losses\)"):
        surgery.pcd("fit", 2)  # pyright: ignore[reportArgumentType]
