"""What a message advises works: every text in backticks is executed, and mends the misuse."""

import collections
import inspect
from typing import NamedTuple

import equinox
import flax.core
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import optax_surgery as surgery
import optax_surgery.flax
from tests.checks.hints import LOSSES, OBJECTS, PARAMS, UPDATES, execute, losses_fn, message_of
from tests.checks.test_arguments import ARGUMENTS, FUNCTIONS, make

TRANSFORMATIONS = [
    name
    for name in FUNCTIONS
    if name not in ("gradient_surgery", "stacked_surgery")
    and isinstance(make(name), optax.GradientTransformation)
]
OF_T_TASKS = [name for name in TRANSFORMATIONS if "num_tasks" in ARGUMENTS[name]]
OTHERS = {  # arguments with which a transformation is made for a number of tasks
    "normalize_tasks": {"kind": "ema"},
    "monitor": {"surgery": surgery.cagrad()},
    "per_task": {"tx": optax.trace(0.9)},
    "accumulate": {"tx": surgery.pcgrad()},
}


def refusal(call):
    """The ValueError of a call."""
    with pytest.raises(ValueError, match=r"^Expected ") as caught:
        call()
    return caught.value


def rows(num_tasks):
    """Stacked gradients of so many tasks."""
    return {"trunk": jnp.ones((num_tasks, 2)), "head": jnp.arange(1.0, num_tasks + 1)}


def try_update(tx, state=None, num_tasks=3, **extra_args):
    """Traces one update, with losses."""
    losses = {f"task {number}": jnp.ones(()) for number in range(num_tasks)}
    state = jax.eval_shape(tx.init, PARAMS) if state is None else state
    given = {"losses": losses} | extra_args
    jax.eval_shape(lambda state: tx.update(rows(num_tasks), state, PARAMS, **given), state)


def of_two_batches(name, num_tasks):
    return {"gramian": jnp.eye(num_tasks)} if name in ("modo", "sdmgrad") else {}


def with_source(*texts):
    """The transformations in whose files one of these stands."""
    source = {name: inspect.getsource(inspect.getmodule(FUNCTIONS[name])) for name in FUNCTIONS}
    return [name for name in TRANSFORMATIONS if any(text in source[name] for text in texts)]


# The wrong number of tasks


def of_tasks(name, num_tasks, **others):
    return make(name, num_tasks=num_tasks, **OTHERS.get(name, {}) | others)


@pytest.mark.parametrize("name", OF_T_TASKS)
def test_the_hint_for_another_number_of_tasks_is_accepted_by_that_update(name):
    refused = refusal(lambda: try_update(of_tasks(name, 2)))
    assert f"Expected the gradients of 2 tasks, got 3 at '{name}'" in str(refused)
    (mended,) = execute(refused, **OTHERS.get(name, {}))
    try_update(mended, **of_two_batches(name, 3))


@pytest.mark.parametrize(
    "tx",
    [
        surgery.krum(3),
        surgery.krum(0, num_selected=4),
        surgery.trimmed_mean(2),
        surgery.on_tasks(surgery.famo(3), [0, 2]),
        surgery.every(surgery.imtl_l(2), k=3, num_tasks=3),
        optax.chain(surgery.clip_tasks(surgery.dwa(5, window=2), 1.0), optax.sgd(0.1)),
    ],
)
def test_the_hint_for_a_number_that_depends_on_T_is_accepted_by_that_update(tx):
    (mended,) = execute(refusal(lambda: try_update(tx)))
    num_tasks = 2 if "on_tasks" in str(tx) else 3
    try_update(mended, num_tasks=num_tasks)


def test_the_hint_for_a_rule_of_ones_own_has_its_name():
    def mine(num_tasks):
        weighting = OBJECTS["weighting"]
        return surgery.gradient_surgery(weighting, name="mine", num_tasks=num_tasks)

    (mended,) = execute(refusal(lambda: try_update(mine(2))), mine=mine)
    try_update(mended)


# What a surgery cannot do without, or with


@pytest.mark.parametrize("name", with_source("tasks.losses", "tasks.given_gramian"))
def test_what_a_surgery_cannot_do_without_is_named(name):
    tx = of_tasks(name, 3) if name in OF_T_TASKS else make(name)
    try:
        try_update(tx, losses=None)
    except ValueError as refused:
        message = refused  # the name is gone after this block

        def again(state):
            return execute(message, update=tx.update, state=state)[-1]

        jax.eval_shape(again, jax.eval_shape(tx.init, PARAMS))


@pytest.mark.parametrize("name", with_source("stacked_surgery", "no_gramian", "outermost"))
def test_what_works_on_the_gradients_says_so_of_a_gramian(name):
    tx = of_tasks(name, 3) if name in OF_T_TASKS else make(name)
    try:
        try_update(tx, gramian=jnp.eye(3))
    except ValueError as refused:
        execute(refused)


INSIDE = {
    "of two batches": surgery.modo(3),
    "on coordinates": surgery.graddrop(),
    "with averages": surgery.moco(3),
    "on groups": surgery.leafwise(surgery.pcgrad()),
    "on the shared leaves": surgery.on_shared(surgery.pcgrad(), "trunk"),
    "on micro-batches": surgery.accumulate(surgery.pcgrad(), every_k=2, num_tasks=3),
}
AROUND = {
    "every": lambda inner: surgery.every(inner, k=2, num_tasks=3),
    "monitor": lambda inner: surgery.monitor(3, inner),
    "normalize_tasks": surgery.normalize_tasks,
    "clip_tasks": lambda inner: surgery.clip_tasks(inner, max_norm=1.0),
    "cr_mogm": lambda inner: surgery.cr_mogm(inner, num_tasks=3),
    "on_shared weighted": lambda inner: surgery.on_shared(inner, "trunk", "weighted"),
}


@pytest.mark.parametrize("inner", INSIDE)
@pytest.mark.parametrize("around", AROUND)
def test_what_makes_a_gramian_refuses_what_cannot_use_it(around, inner):
    tx = AROUND[around](INSIDE[inner])
    execute(refusal(lambda: try_update(tx, state=tx.init(PARAMS))))


@pytest.mark.parametrize("inner", INSIDE)
def test_gradients_that_are_never_stacked_refuse_what_needs_them(inner):
    tx = INSIDE[inner]
    fn = surgery.surgery_value_and_grad(losses_fn, tx)
    refused = refusal(lambda: jax.eval_shape(fn, PARAMS, tx.init(PARAMS)))
    execute(refused)
    if inner == "on the shared leaves":
        assert "`shared`" in str(refused)


# A state of other tasks


@pytest.mark.parametrize("name", OF_T_TASKS)
@pytest.mark.parametrize(("before", "after"), [(1, 3), (4, 3)])
def test_a_state_of_other_tasks_is_refused_and_can_be_moved(name, before, after):
    old, new = of_tasks(name, before), of_tasks(name, after)
    state, wanted = (jax.eval_shape(tx.init, PARAMS) for tx in (old, new))
    assert state != wanted, f"{name} has num_tasks and keeps nothing for each task"
    gramian = of_two_batches(name, after)
    refused = refusal(lambda: try_update(new, state=state, num_tasks=after, **gramian))
    assert name in str(refused)
    tasks = [task if task < before else None for task in range(after)]

    def anew_or_moved(state):
        return execute(refused, state=state, init=new.init, tasks=tasks)

    anew, moved = jax.eval_shape(anew_or_moved, state)
    assert anew == moved == wanted
    try_update(new, state=moved, num_tasks=after, **gramian)


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_what_is_no_state_of_a_surgery_is_refused(name):
    tx = of_tasks(name, 3) if name in OF_T_TASKS else make(name)
    state = jax.eval_shape(tx.init, PARAMS)
    for given in (PARAMS, (), jax.tree.leaves(state)):
        refused = refusal(lambda given=given: try_update(tx, state=given))
        jax.eval_shape(lambda refused=refused: execute(refused, init=tx.init)[0])


# Gradients that are not stacked


class Grads(NamedTuple):
    image: dict
    reward: dict


class Module(equinox.Module):
    image: dict
    reward: dict


ONE, TWO = ({"trunk": jnp.full(2, number), "head": jnp.array(number)} for number in (1.0, 2.0))
NOT_STACKED = {
    "a dict": {"reward": TWO, "image": ONE},
    "an ordered dict": collections.OrderedDict(reward=ONE, image=TWO),
    "a frozen dict": flax.core.FrozenDict({"reward": TWO, "image": ONE}),
    "a list": [ONE, TWO],
    "a tuple": (ONE, TWO),
    "a named tuple": Grads(ONE, TWO),
    "a module": Module(ONE, TWO),
    "a dict of dicts": {"pixels": {"image": ONE}, "scalars": {"reward": TWO}},
    "a list of lists": [[ONE], [TWO]],
    "an nnx.State": nnx.State({"image": ONE, "reward": TWO}),
}


@pytest.mark.parametrize("kind", NOT_STACKED)
def test_a_tree_of_trees_is_stacked_by_the_hint(kind):
    tx, updates = surgery.constant([1.0, 0.0]), NOT_STACKED[kind]
    refused = refusal(lambda: tx.update(updates, tx.init(PARAMS), PARAMS))
    assert "Expected one tree of stacked gradients" in str(refused)
    stacked, _ = execute(refused, updates=updates, params=PARAMS)
    update, _ = tx.update(stacked, tx.init(PARAMS), PARAMS)
    np.testing.assert_array_equal(update["trunk"], 1.0)


def test_a_dict_of_gradients_of_a_bare_array_is_stacked_by_the_hint():
    updates, params, tx = {"a": jnp.zeros(2), "b": jnp.ones(2)}, jnp.ones(2), surgery.mean()
    refused = refusal(lambda: tx.update(updates, tx.init(params), params))
    stacked, _ = execute(refused, updates=updates, params=params)
    np.testing.assert_array_equal(tx.update(stacked, tx.init(params), params)[0], 0.5)


def test_complex_gradients_are_split_by_the_hint():
    params = {"wave": jnp.ones(2, complex)}
    updates = {"wave": jnp.array([[1.0 + 2.0j, 0.0], [3.0 + 0.0j, 1.0j]])}
    tx = surgery.mean()
    refused = refusal(lambda: tx.update(updates, tx.init(params), params))
    (tx,) = execute(refused, surgery=surgery.mean(), optimizer=optax.sgd(1.0))
    update, _ = tx.update(updates, tx.init(params), params)
    np.testing.assert_allclose(update["wave"], [-2.0 - 1.0j, -0.5j])


# All other misuses


def updated(tx, updates=UPDATES, params=PARAMS, **extra_args):
    return lambda: tx.update(updates, tx.init(params), params, **extra_args)


PCGRAD = surgery.pcgrad()
SHARED = surgery.on_shared(surgery.pcgrad(), "trunk")


def value_and_grad(function, *args, **kwargs):
    """A call of what `task_value_and_grad` and the like return."""
    return lambda: function()(PARAMS, *args, **kwargs)


def scalar(params):
    return jnp.sum(params["trunk"])


class TrainState(optax_surgery.flax.SurgeryTrainState):
    batch_stats: dict


MISUSES = {
    # Trees that disagree, and what is no number
    "losses of too many tasks": updated(PCGRAD, losses={**LOSSES, "value": 1.0}),
    "losses that are vectors": updated(PCGRAD, losses={"a": jnp.ones(3)}),
    "losses that are strings": updated(PCGRAD, losses=["a", "b", "c"]),
    "losses that are one string": updated(PCGRAD, losses="abc"),
    "losses that are complex": updated(PCGRAD, losses=jnp.ones(3, complex)),
    "losses swapped with the gradients": updated(PCGRAD, losses=UPDATES),
    "a mask of other tasks": updated(
        PCGRAD, losses=LOSSES, task_mask={"actor": True, "image": True, "value": True}
    ),
    "a mask that is a list beside losses that are a dict": updated(
        PCGRAD, losses=LOSSES, task_mask=[True, True, False]
    ),
    "a mask of integers": updated(PCGRAD, task_mask=[1, 0, 1]),
    "a preference of other tasks": updated(
        surgery.upgrad({"a": 1.0, "b": 1.0, "c": 1.0}), losses=LOSSES
    ),
    "weights of other tasks than the mask": updated(
        surgery.constant({"a": 1.0, "b": 1.0, "c": 1.0}),
        task_mask={"actor": True, "image": True, "reward": True},
    ),
    "weights of too few tasks": updated(surgery.constant([1.0, 2.0])),
    "a share of too many tasks": updated(surgery.graddrop([0.1] * 4)),
    "one weight for all tasks": updated(surgery.constant(1.0)),
    "combine, swapped": lambda: surgery.combine(UPDATES, jnp.ones(3)),
    "combine, a number of weights": lambda: surgery.combine(jnp.ones(2), UPDATES),
    "combine, a mask of numbers": lambda: surgery.combine(jnp.ones(3), UPDATES, jnp.ones(3)),
    "names of too few tasks": lambda: surgery.scalars(
        surgery.monitor(3).init(PARAMS), ["image", "reward"]
    ),
    "gradients that are strings": updated(PCGRAD, {**UPDATES, "head": "relu"}),
    # The Gramian and the key
    "a Gramian of other tasks": updated(PCGRAD, gramian=jnp.eye(2)),
    "a Gramian from a function of other tasks": updated(PCGRAD, gramian=lambda: jnp.eye(2)),
    "a Gramian that is the function itself": updated(PCGRAD, gramian=surgery.gramian),
    "a Gramian that is a string": updated(PCGRAD, gramian="gramian"),
    "a Gramian from a function of nothing": updated(PCGRAD, gramian=lambda: None),
    "a Gramian that is complex": updated(PCGRAD, gramian=jnp.eye(3) * 1j),
    "several keys": updated(PCGRAD, key=jax.random.split(jax.random.key(0), 3)),
    "a key that is a string": updated(PCGRAD, key="key"),
    "a seed that is a float": lambda: surgery.pcgrad(key=1.5),
    "a seed that is None": lambda: surgery.pcgrad(key=None),
    "a metric of the gradients": lambda: surgery.task_norms(jnp.ones((3, 2))),
    "a metric of a string": lambda: surgery.task_norms("gramian"),
    "gramian of gradients of other tasks": lambda: surgery.gramian(rows(3), rows(2)),
    "gramian times no number": lambda: surgery.gramian(rows(3), scale="2"),
    "gramian times zero": lambda: surgery.gramian(rows(3), scale=0.0),
    "gramian of no leaf": lambda: surgery.gramian({}),
    "gramian of other gradients": lambda: surgery.gramian(UPDATES, {"trunk": UPDATES["trunk"]}),
    # Which leaves
    "no surgery": lambda: surgery.on_shared(surgery.pcgrad, "trunk"),
    "an optimiser inside": lambda: surgery.every(
        optax.chain(surgery.pcgrad(), optax.adam(1e-3)), k=3, num_tasks=3
    ),
    "an optimiser inside, with an argument": lambda: surgery.start_after(
        optax.chain(surgery.pcgrad(), optax.adam(1e-3)), 100
    ),
    "an optimiser instead": lambda: surgery.leafwise(optax.adam(1e-3)),
    "a factory with arguments": lambda: surgery.every(surgery.famo, k=3, num_tasks=3),
    "an optimiser that is no call": lambda: surgery.famo(3, optimizer=optax.adam),
    "a surgery as the optimiser": lambda: surgery.famo(3, optimizer=surgery.pcgrad()),
    "a surgery for each task": lambda: surgery.per_task(surgery.pcgrad(), num_tasks=3),
    "swapped arguments": lambda: surgery.monitor(surgery.pcgrad(), 3),
    "a path that is not there": updated(surgery.on_shared(PCGRAD, "trnk")),
    "one path that is not there": updated(surgery.on_shared(PCGRAD, ["trunk", "heads"])),
    "a part of a path": updated(surgery.on_shared(PCGRAD, "tru")),
    "no path": updated(surgery.on_shared(PCGRAD, [])),
    "no leaf": updated(surgery.on_shared(PCGRAD, lambda path: False)),
    "no leaf, by a tree": updated(surgery.on_shared(PCGRAD, {"trunk": False, "head": False})),
    "a tree of booleans without a leaf": updated(surgery.on_shared(PCGRAD, {"trunk": True})),
    "a list of too few booleans": updated(surgery.on_shared(PCGRAD, [True])),
    "numbers of leaves": updated(surgery.on_shared(PCGRAD, [0, 1])),
    "nothing of leaves": updated(surgery.on_shared(PCGRAD, None)),
    "a path for a function of paths": lambda: surgery.leafwise(PCGRAD, "trunk"),
    "no name of a group": updated(surgery.leafwise(PCGRAD, lambda path: None)),
    "a number of a group": updated(surgery.leafwise(PCGRAD, lambda path: 1)),
    # Which tasks
    "no tasks": lambda: surgery.on_tasks(PCGRAD, []),
    "one string of tasks": lambda: surgery.on_tasks(PCGRAD, "image"),
    "a mask of tasks": lambda: surgery.on_tasks(PCGRAD, [True, False]),
    "a negative task": lambda: surgery.on_tasks(PCGRAD, [-1]),
    "a task twice": lambda: surgery.on_tasks(PCGRAD, ["image", "image"]),
    "names and numbers of tasks": lambda: surgery.on_tasks(PCGRAD, ["image", 1]),
    "a number for tasks": lambda: surgery.on_tasks(PCGRAD, 2),
    "a task that is not there": updated(surgery.on_tasks(PCGRAD, ["imag"]), losses=LOSSES),
    "a row that is not there": updated(surgery.on_tasks(PCGRAD, [0, 3])),
    "names without losses": updated(surgery.on_tasks(PCGRAD, ["image"])),
    "names, and losses without": updated(surgery.on_tasks(PCGRAD, ["image"]), losses=jnp.ones(3)),
    "a state of another method": lambda: surgery.famo(3).update(
        UPDATES, surgery.cagrad().init(PARAMS), PARAMS, losses=LOSSES
    ),
    "a state for other groups": lambda: surgery.leafwise(PCGRAD).update(
        UPDATES, surgery.leafwise(PCGRAD).init({"trunk": jnp.ones(2)})
    ),
    "averages of other leaves": lambda: surgery.accumulate(PCGRAD, 2, 3).update(
        UPDATES, surgery.accumulate(PCGRAD, 2, 3).init({"trunk": jnp.ones(2)})
    ),
    "a surgery as the rule": lambda: surgery.gradient_surgery(PCGRAD, name="mine"),
    "a rule of another kind": lambda: surgery.stacked_surgery(OBJECTS["weighting"], name="mine"),
    "averages of no number of tasks": lambda: surgery.normalize_tasks(PCGRAD, "ema"),
    # Another number of tasks
    "a state to be moved from another chain": lambda: surgery.move_state(
        surgery.famo(2).init(PARAMS), surgery.imtl_l(3).init(PARAMS), [0, 1, None]
    ),
    "a state to be moved to other tasks than are named": lambda: surgery.move_state(
        surgery.famo(2).init(PARAMS), surgery.famo(3).init(PARAMS), [0, 1]
    ),
    "a state to be moved from a task that is not there": lambda: surgery.move_state(
        surgery.famo(2).init(PARAMS), surgery.famo(3).init(PARAMS), [0, 1, 2]
    ),
    "a state to be moved from a negative task": lambda: surgery.move_state(
        surgery.famo(2).init(PARAMS), surgery.famo(3).init(PARAMS), [0, 1, -1]
    ),
    "a state to be moved by names": lambda: surgery.move_state(
        surgery.famo(2).init(PARAMS), surgery.famo(3).init(PARAMS), ["a", "b", None]
    ),
    "states to be moved that have several numbers of tasks": lambda: surgery.move_state(
        [surgery.famo(1).init(PARAMS), surgery.famo(2).init(PARAMS)],
        [surgery.famo(3).init(PARAMS)] * 2,
        [0, None, None],
    ),
    "a state to be moved to a number of tasks": lambda: surgery.move_state(
        surgery.famo(2).init(PARAMS), surgery.famo(3).init(PARAMS), 3
    ),
    "a state to be moved by a mask": lambda: surgery.move_state(
        surgery.famo(2).init(PARAMS), surgery.famo(3).init(PARAMS), [True, False, None]
    ),
    "a state to be moved in another order": lambda: surgery.move_state(
        surgery.famo(2).init(PARAMS), surgery.famo(2).init(PARAMS), [1, 0]
    ),
    # After the optimiser
    "updates that are stacked": lambda: surgery.apply_updates(PARAMS, UPDATES),
    "updates of another shape": lambda: surgery.apply_updates({"w": 1.0}, {"w": jnp.ones(2)}),
    "updates of fewer parameters": lambda: surgery.apply_updates(PARAMS, {"trunk": jnp.ones(2)}),
    "updates of more parameters": lambda: surgery.apply_updates({"trunk": jnp.ones(2)}, PARAMS),
    "updates, swapped with a state": lambda: surgery.apply_updates(PARAMS, PCGRAD.init(PARAMS)),
    # From losses to gradients
    "one loss": value_and_grad(lambda: surgery.task_value_and_grad(scalar)),
    "no losses": value_and_grad(lambda: surgery.task_value_and_grad(lambda params: {})),
    "losses that are None": value_and_grad(
        lambda: surgery.task_value_and_grad(lambda params: None)
    ),
    "losses that are a string": value_and_grad(
        lambda: surgery.task_value_and_grad(lambda params: "loss")
    ),
    "losses that are a matrix": value_and_grad(
        lambda: surgery.task_value_and_grad(lambda params: jnp.ones((2, 2)) * scalar(params))
    ),
    "a tree of vectors": value_and_grad(
        lambda: surgery.task_value_and_grad(lambda params: [params["trunk"]])
    ),
    "a tree with a name in it": value_and_grad(
        lambda: surgery.task_value_and_grad(lambda params: {"a": scalar(params), "b": "name"})
    ),
    "losses that are rounded": value_and_grad(
        lambda: surgery.task_value_and_grad(lambda params: jnp.ones(3, int))
    ),
    "aux that was not announced": value_and_grad(
        lambda: surgery.task_value_and_grad(lambda params: (losses_fn(params), {"acc": 1.0}))
    ),
    "aux that is not there": value_and_grad(
        lambda: surgery.task_value_and_grad(losses_fn, has_aux=True)
    ),
    "losses for the function": lambda: surgery.task_value_and_grad(losses_fn(PARAMS)),
    "integers as parameters": lambda: surgery.task_value_and_grad(losses_fn)(
        {"trunk": jnp.ones(2, int), "head": 1.0}
    ),
    "strings as parameters": lambda: surgery.task_value_and_grad(losses_fn)(
        {"trunk": "relu", "head": 1.0}
    ),
    "a loss that is a vector": value_and_grad(
        lambda: surgery.per_task_value_and_grad(lambda params, target: params["trunk"] * target),
        jnp.ones(3),
    ),
    "a loss that is a tree": value_and_grad(
        lambda: surgery.per_task_value_and_grad(lambda params, target: {"loss": 1.0}), jnp.ones(3)
    ),
    "data of unequal numbers of tasks": value_and_grad(
        lambda: surgery.per_task_value_and_grad(lambda params, x, y: scalar(params)),
        jnp.ones((3, 2)),
        jnp.ones(2),
    ),
    "data that are shared": value_and_grad(
        lambda: surgery.per_task_value_and_grad(lambda params, x: scalar(params)), jnp.ones(())
    ),
    "data that are a flag": value_and_grad(
        lambda: surgery.per_task_value_and_grad(lambda params, x: scalar(params)), "train"
    ),
    "no data": value_and_grad(lambda: surgery.per_task_value_and_grad(scalar)),
    "an optimiser for the surgery": lambda: surgery.surgery_value_and_grad(
        losses_fn, optax.chain(surgery.pcgrad(), optax.adam(1e-3))
    ),
    "a factory for the surgery": lambda: surgery.surgery_value_and_grad(losses_fn, surgery.famo),
    "a name for the surgery": lambda: surgery.surgery_value_and_grad(losses_fn, "pcgrad"),
    "extra arguments that are a mask": value_and_grad(
        lambda: surgery.surgery_value_and_grad(losses_fn, PCGRAD),
        PCGRAD.init(PARAMS),
        extra_args=jnp.ones(3, bool),
    ),
    "extra arguments of the loss": lambda: surgery.surgery_value_and_grad(
        lambda params, extra_args: losses_fn(params), PCGRAD
    ),
    "shared leaves that are not there": value_and_grad(
        lambda: surgery.surgery_value_and_grad(losses_fn, PCGRAD, shared="trnk"),
        PCGRAD.init(PARAMS),
    ),
    "another function to explain": lambda: surgery.explain_leaves(losses_fn, PARAMS),
    "integers among the parameters": lambda: surgery.surgery_value_and_grad(losses_fn, PCGRAD)(
        {**PARAMS, "step": 1}, PCGRAD.init(PARAMS)
    ),
    "features that are booleans": lambda: surgery.feature_surgery_value_and_grad(
        lambda params: params["trunk"] > 0, lambda heads, features: jnp.ones(2), PCGRAD
    )(PARAMS, PARAMS, PCGRAD.init(PARAMS)),
    "features that are constants": lambda: surgery.feature_surgery_value_and_grad(
        lambda params: jnp.ones(2), lambda heads, features: features, PCGRAD
    )(PARAMS, PARAMS, PCGRAD.init(PARAMS)),
    "heads with a slip": lambda: surgery.feature_surgery_value_and_grad(
        losses_fn, losses_fn, PCGRAD, heads="wieghted"
    ),
    # Of Flax
    "a field of a training state that is stacked": lambda: TrainState.create(
        apply_fn=None, params=PARAMS, tx=PCGRAD, batch_stats={"mean": jnp.ones(2)}
    ).apply_gradients(grads=UPDATES, batch_stats={"mean": jnp.ones((3, 2))}),
    "no scale for each task": lambda: optax_surgery.flax.scaled_task_value_and_grad(losses_fn)(
        optax_surgery.flax.task_dynamic_scale(2), PARAMS
    ),
    "no tasks to scale": lambda: optax_surgery.flax.task_dynamic_scale(0),
    "a scale of zero": lambda: optax_surgery.flax.task_dynamic_scale(3, 0.0),
}


@pytest.mark.parametrize("misuse", MISUSES)
def test_what_a_message_has_in_backticks_can_be_executed(misuse):
    execute(refusal(MISUSES[misuse]), **({"updates": PARAMS} if "updates" in misuse else {}))


# Hints that need what the user had


def test_the_hint_for_a_history_of_gramians():
    gramian = jnp.stack([jnp.eye(3)] * 4)
    for metric in (surgery.task_norms, surgery.condition_number, surgery.cosine_similarities):
        (mapped,) = execute(refusal(lambda metric=metric: metric(gramian)), gramian=gramian)
        assert mapped.shape[0] == 4
    refused = refusal(lambda: surgery.update_alignment(gramian, jnp.ones(3)))
    (mapped,) = execute(refused, gramian=gramian, weights=jnp.ones((4, 3)))
    assert mapped.shape == (4, 3)


def test_the_hint_for_aux_that_was_not_announced():
    pair = lambda params: (losses_fn(params), {"accuracy": 1.0})  # noqa: E731
    for make_fn in (surgery.task_value_and_grad, surgery.surgery_value_and_grad):
        extra = [PCGRAD] if make_fn is surgery.surgery_value_and_grad else []
        arguments = [PCGRAD.init(PARAMS)] if extra else []
        fn = make_fn(pair, *extra)
        refused = refusal(lambda fn=fn, arguments=arguments: fn(PARAMS, *arguments))
        (mended,) = execute(refused, losses_fn=pair, surgery=PCGRAD)
        jax.eval_shape(mended, PARAMS, *arguments)
    refused = refusal(lambda: surgery.infer_shared(pair, PARAMS))
    (found,) = execute(refused, losses_fn=pair)
    assert found == {"trunk": True, "head": False}


def test_the_hint_for_an_optimiser_inside_takes_it_outside():
    inner = optax.chain(surgery.pcgrad(), optax.sgd(0.1))
    refused = refusal(lambda: surgery.every(inner, k=3, num_tasks=3))
    outside, _ = execute(refused, optimizer=optax.sgd(0.1))
    try_update(outside)
    assert "`Surgery(*surgery)`" in message_of(refused)
