"""What a rule may look at, when, and what that costs; what a Gramian may be, and goes through."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax import lax

import optax_surgery as surgery
from tests.common import described, same

T = 2
PARAMS = {"trunk": jnp.zeros(2), "head": jnp.zeros(())}
GRADS = {"trunk": jnp.array([[1.0, 0.0], [-1.0, 1.0]]), "head": jnp.array([0.0, 1.0])}
LOSSES = {"fit": jnp.asarray(1.0), "decay": jnp.asarray(2.0)}  # in the order decay, fit


def traced(update, *args, **kwargs):
    """The shapes of its results; nothing outlives its trace."""
    with jax.check_tracer_leaks():
        return jax.eval_shape(update, *args, **kwargs)


def checked(update, jit=True):
    """It, with `jit` or without; nothing outlives its trace.

    Under that check JAX keeps no program, so that with `jit` it is traced, and then run without.
    """
    compiled = jax.jit(update)

    def run(*args, **kwargs):
        if jit:
            traced(update, *args, **kwargs)
            return compiled(*args, **kwargs)
        with jax.check_tracer_leaks():
            return update(*args, **kwargs)

    return run


def rule(look, name="rule"):
    return surgery.gradient_surgery(surgery.Weighting(tuple, look), name=name)


def counted(gramian=None):
    """A function for `gramian=`, and a list that grows with each call where it runs."""
    calls = []

    def function():
        jax.debug.callback(lambda: calls.append(1))
        return surgery.gramian(GRADS) if gramian is None else gramian

    return function, calls


def num_calls(calls):
    jax.effects_barrier()
    return len(calls)


def refuse_to_run():
    raise AssertionError("nobody was to look")


def assert_close(left, right):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), left, right)


# Where a rule looks


def in_both_branches(tasks, state):
    found = lax.cond(tasks.step > 0, lambda: tasks.gramian[0], lambda: 2 * tasks.gramian[1])
    return found, state


def in_one_branch(tasks, state):
    return lax.cond(tasks.step > 0, lambda: tasks.gramian[0], lambda: jnp.ones(T)), state


def in_one_branch_and_afterwards(tasks, state):
    found, _ = in_one_branch(tasks, state)
    return found + tasks.gramian[1], state


def before_and_in_a_branch(tasks, state):
    return tasks.gramian[1] + in_one_branch(tasks, state)[0], state


GRAMIAN = np.array([[1.0, -1.0], [-1.0, 3.0]])
LOOKS = {  # and the weights of the first two steps
    in_both_branches: (2 * GRAMIAN[1], GRAMIAN[0]),
    in_one_branch: (np.ones(T), GRAMIAN[0]),
    in_one_branch_and_afterwards: (1 + GRAMIAN[1], GRAMIAN[0] + GRAMIAN[1]),
    before_and_in_a_branch: (1 + GRAMIAN[1], GRAMIAN[0] + GRAMIAN[1]),
}


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("jit", [False, True])
def test_a_rule_may_look_in_any_branch_and_afterwards(look, jit):
    tx = rule(look)
    state = tx.init(PARAMS)
    update = checked(tx.update, jit)
    for weights in LOOKS[look]:
        updates, state = update(GRADS, state, PARAMS)
        assert_close(updates, surgery.combine(jnp.asarray(weights, "f4"), GRADS))


@pytest.mark.parametrize("look", LOOKS)
def test_a_rule_within_others_may_look_in_any_branch_and_afterwards(look):
    tx = surgery.every(surgery.monitor(T, surgery.clip_tasks(rule(look), 100.0)), 1, T)
    state, update = tx.init(PARAMS), checked(tx.update)
    for weights in LOOKS[look]:
        updates, state = update(GRADS, state, PARAMS)
        assert_close(updates, surgery.combine(jnp.asarray(weights, "f4"), GRADS))


NEVER_LOOK = {
    "sum": lambda: surgery.sum(),
    "famo": lambda: surgery.famo(T),
    "every, famo": lambda: surgery.every(surgery.famo(T), 2, T),
    "cr_mogm, famo": lambda: surgery.cr_mogm(surgery.famo(T), T),
    "start_after": lambda: surgery.start_after(surgery.famo(T), 5),
    "on_tasks, famo": lambda: surgery.on_tasks(surgery.famo(T), [0, 1]),
    "on_shared, mean": lambda: surgery.on_shared(surgery.mean(), "trunk"),
    "a user's rule": lambda: rule(lambda tasks, state: (tasks.losses, state)),
}


@pytest.mark.parametrize("name", NEVER_LOOK)
def test_a_rule_that_never_looks_calls_for_no_gramian(name):
    tx = NEVER_LOOK[name]()
    update = functools.partial(tx.update, gramian=refuse_to_run, losses=LOSSES)
    traced(update, GRADS, tx.init(PARAMS), PARAMS)
    if name in ("sum", "every, famo"):  # without `jit`, too
        checked(update, jit=False)(GRADS, tx.init(PARAMS), PARAMS)


def test_the_given_gramian_need_not_be_symmetric():
    seen = rule(lambda tasks, state: (tasks.given_gramian[0], state))
    updates, _ = seen.update(jnp.eye(T), seen.init(None), gramian=jnp.array([[1.0, 2.0], [3.0, 4]]))
    assert_close(updates, jnp.array([1.0, 2.0]))


# What a function for `gramian=` goes through


def test_every_within_every_finds_weights_in_common_steps_only():
    inner = surgery.every(surgery.pcgrad(), 2, T)
    tx = surgery.every(inner, 3, T)
    function, calls = counted()
    update = checked(functools.partial(tx.update, gramian=function))
    state, history = tx.init(PARAMS), []
    for _ in range(7):
        updates, state = update(GRADS, state, PARAMS)
        history.append(num_calls(calls))
    # The inner one is asked in steps 0, 3 and 6, and renews its weights in every other of those.
    assert history == [1, 1, 1, 1, 1, 1, 2]
    assert_close(updates, surgery.pcgrad().update(GRADS, surgery.pcgrad().init(PARAMS))[0])


THROUGH = {
    "alone": lambda tx: tx,
    "chain": lambda tx: optax.chain(tx, optax.identity()),
    "partition": lambda tx: optax.partition({"all": tx, "none": surgery.sum()}, "all"),
    "on_nonfinite": surgery.on_nonfinite,
    "on_nonfinite of a chain": lambda tx: surgery.on_nonfinite(optax.chain(tx, optax.identity())),
    "start_after": lambda tx: surgery.start_after(tx, 0),
    "monitor": lambda tx: surgery.monitor(T, tx),
    "monitor, before": lambda tx: optax.chain(surgery.monitor(T), tx),
    "on_tasks": lambda tx: surgery.on_tasks(tx, ["decay", "fit"]),
    "on_shared": lambda tx: surgery.on_shared(tx, "trunk"),
    "clip_tasks": lambda tx: surgery.clip_tasks(tx, 100.0),
}


WITHOUT_JIT = [("alone", False), ("on_nonfinite", False), ("start_after", False)]


@pytest.mark.parametrize(("name", "jit"), [(name, True) for name in THROUGH] + WITHOUT_JIT)
def test_a_function_for_the_gramian_passes_through(name, jit):
    """Its Gramian is not that of the gradients, so that it is seen who was asked."""
    gramian = jnp.array([[1.0, -2.0], [-2.0, 16.0]])
    tx = THROUGH[name](surgery.pcgrad())
    updates, _ = surgery.pcgrad().update(GRADS, surgery.pcgrad().init(None), gramian=gramian)
    expected = updates | ({"head": GRADS["head"].sum()} if name == "on_shared" else {})
    update = functools.partial(tx.update, gramian=lambda: gramian, losses=LOSSES)
    got, _ = checked(update, jit)(GRADS, tx.init(PARAMS), PARAMS)
    assert_close(got, expected)


@pytest.mark.parametrize("jit", [False, True])
def test_a_function_for_the_gramian_in_an_nnx_optimizer(jit):
    model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    tx = optax.chain(surgery.every(surgery.pcgrad(), 2, T), optax.sgd(1.0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    def step(model, optimizer):
        before = jnp.copy(model.bias[...])
        grads = jax.tree.map(
            lambda leaf: jnp.stack([jnp.ones_like(leaf), jnp.zeros_like(leaf)]),
            nnx.state(model, nnx.Param),
        )
        gramian = jnp.array([[1.0, -2.0], [-2.0, 16.0]])
        optimizer.update(model, grads, gramian=lambda: gramian, losses=LOSSES)
        return before - model.bias[...]

    with jax.check_tracer_leaks():
        update = (nnx.jit(step) if jit else step)(model, optimizer)
    weights, _ = surgery.pcgrad().update(
        jnp.eye(T), surgery.pcgrad().init(None), gramian=jnp.array([[1.0, -2.0], [-2.0, 16.0]])
    )
    np.testing.assert_allclose(update, np.full(2, weights[0]), rtol=1e-6)


@pytest.mark.parametrize("jit", [False, True])
def test_an_average_of_gramians_is_refused_under_accumulate(jit):
    tx = surgery.accumulate(surgery.pcgrad(), 2, T)
    update = functools.partial(tx.update, gramian=lambda: jnp.eye(T))
    message = "Expected stacked gradients alone, got a Gramian at 'accumulate'"
    with pytest.raises(ValueError, match=message):
        checked(update, jit)(GRADS, tx.init(PARAMS), PARAMS)
    fn = surgery.surgery_value_and_grad(lambda params: [params["head"], params["head"] ** 2], tx)
    with pytest.raises(ValueError, match=f"{message}.*surgery_value_and_grad"):
        fn(PARAMS, tx.init(PARAMS))


@pytest.mark.parametrize("make", [surgery.pcgrad, lambda: surgery.every(surgery.pcgrad(), 3, T)])
def test_on_nonfinite_and_a_surgery_within_make_the_gramian_once(make):
    tx = surgery.on_nonfinite(make())
    function, calls = counted()
    update = checked(functools.partial(tx.update, gramian=function), jit=False)
    update(GRADS, tx.init(PARAMS), PARAMS)
    assert num_calls(calls) == 1


def test_where_weights_are_reused_on_nonfinite_sees_losses_and_the_update_only():
    chain = optax.chain(surgery.every(surgery.pcgrad(), 2, T), optax.adam(1e-2))
    tx = surgery.on_nonfinite(chain)
    function, calls = counted()
    update = checked(functools.partial(tx.update, gramian=function))
    _, first = update(GRADS, tx.init(PARAMS), PARAMS, losses=LOSSES)
    looked = num_calls(calls)
    assert looked >= 1

    updates, state = update(GRADS, first, PARAMS, losses=LOSSES)
    assert num_calls(calls) == looked
    assert (state.nonfinite_tasks, state.nonfinite_steps) == (0, 0)

    updates, state = update(GRADS, first, PARAMS, losses=LOSSES | {"fit": jnp.asarray(jnp.nan)})
    assert num_calls(calls) == looked
    assert (state.nonfinite_tasks, state.nonfinite_steps) == (1, 1)
    assert optax.tree.norm(updates) > 0  # the task is masked

    bad = GRADS | {"head": jnp.array([jnp.nan, 1.0])}
    updates, state = update(bad, first, PARAMS, losses=LOSSES)
    assert num_calls(calls) == looked
    assert (state.nonfinite_tasks, state.nonfinite_steps) == (0, 1)
    assert optax.tree.norm(updates) == 0  # the step is skipped
    assert same(state.inner_state, first.inner_state)

    _, second = update(GRADS, first, PARAMS, losses=LOSSES)
    updates, state = update(bad, second, PARAMS, losses=LOSSES)  # where weights are renewed
    assert num_calls(calls) > looked
    assert (state.nonfinite_tasks, state.nonfinite_steps) == (1, 1)
    assert optax.tree.norm(updates) > 0


# Two batches

OF_TWO_BATCHES = {
    "modo": lambda: surgery.modo(T),
    "sdmgrad": lambda: surgery.sdmgrad(T),
}
MAKE_A_GRAMIAN = {
    "every": lambda tx: surgery.every(tx, 2, T),
    "monitor": lambda tx: surgery.monitor(T, tx),
    "normalize_tasks": surgery.normalize_tasks,
    "clip_tasks": lambda tx: surgery.clip_tasks(tx, 1.0),
    "cr_mogm": lambda tx: surgery.cr_mogm(tx, T),
    "on_shared": lambda tx: surgery.on_shared(tx, "trunk", "weighted"),
    "on_tasks": lambda tx: surgery.every(surgery.on_tasks(tx, [0, 1]), 2, T),
}
REFUSED = "Expected the Gramian of two batches, from the caller, got that of one batch at '{}'"


@pytest.mark.parametrize("name", OF_TWO_BATCHES)
@pytest.mark.parametrize("around", MAKE_A_GRAMIAN)
def test_what_needs_two_batches_is_refused_where_one_gramian_is_made(name, around):
    tx = MAKE_A_GRAMIAN[around](OF_TWO_BATCHES[name]())
    with pytest.raises(ValueError, match=REFUSED.format(name)):
        traced(tx.update, GRADS, tx.init(PARAMS), PARAMS)


@pytest.mark.parametrize("name", OF_TWO_BATCHES)
def test_what_needs_two_batches_is_refused_by_surgery_value_and_grad(name):
    tx = OF_TWO_BATCHES[name]()
    fn = surgery.surgery_value_and_grad(lambda params: [params["head"], params["head"] ** 2], tx)
    with pytest.raises(ValueError, match=REFUSED.format(name)):
        traced(fn, PARAMS, tx.init(PARAMS))


@pytest.mark.parametrize("name", OF_TWO_BATCHES)
@pytest.mark.parametrize("around", ["every", "monitor", "cr_mogm", "on_tasks"])
def test_a_gramian_of_two_batches_from_the_caller_reaches_the_rule(name, around):
    """Scaled ones it is refused: `normalize_tasks` and `clip_tasks` make one of their own."""
    cross = jnp.array([[1.0, -0.5], [0.25, 2.0]])
    plain = OF_TWO_BATCHES[name]()
    tx = MAKE_A_GRAMIAN[around](plain)
    for given in (cross, lambda: cross):
        update = functools.partial(tx.update, gramian=given)
        traced(update, GRADS, tx.init(PARAMS), PARAMS)
    if around == "every":
        expected, _ = plain.update(GRADS, plain.init(PARAMS), gramian=cross)
        assert_close(checked(update)(GRADS, tx.init(PARAMS), PARAMS)[0], expected)


# What is declared a surgery

DECLARED = {
    "a chain": lambda: surgery.Surgery(
        *optax.chain(surgery.per_task(optax.clip_by_global_norm(1.0), T), surgery.pcgrad())
    ),
    "inject_hyperparams": lambda: surgery.Surgery(
        *optax.inject_hyperparams(surgery.cagrad)(c=optax.linear_schedule(0.4, 0.9, 3))
    ),
}


@pytest.mark.parametrize("name", DECLARED)
@pytest.mark.parametrize(
    "wrap",
    [
        lambda tx: surgery.start_after(tx, 0),
        lambda tx: surgery.on_tasks(tx, [0, 1]),
        surgery.leafwise,
        lambda tx: surgery.on_shared(tx, ["trunk", "head"]),
        lambda tx: surgery.accumulate(tx, 1, T),
        surgery.on_nonfinite,
    ],
)
def test_what_is_declared_a_surgery_is_one_for_wrappers(name, wrap):
    declared = DECLARED[name]()
    tx = wrap(declared)
    assert isinstance(tx, surgery.Surgery)
    if wrap is surgery.leafwise or name == "inject_hyperparams":
        updates, _ = traced(tx.update, GRADS, tx.init(PARAMS), PARAMS)
        assert described(updates) == described(PARAMS)
    else:
        updates, _ = checked(tx.update)(GRADS, tx.init(PARAMS), PARAMS)
        assert_close(updates, declared.update(GRADS, declared.init(PARAMS), PARAMS)[0])


@pytest.mark.parametrize("around", ["every", "monitor", "normalize_tasks", "clip_tasks", "cr_mogm"])
def test_a_schedule_of_a_number_within_what_makes_a_gramian(around):
    """The schedule goes on with the steps in which the weights are found."""
    tx = MAKE_A_GRAMIAN[around](DECLARED["inject_hyperparams"]())
    state, update = tx.init(PARAMS), checked(tx.update)
    for _ in range(3):
        _, state = update(GRADS, state, PARAMS)
    injected = state.weighting_state.inner_state
    steps = 2 if around == "every" else 3
    np.testing.assert_allclose(injected.hyperparams["c"], 0.4 + 0.5 * (steps - 1) / 3, rtol=1e-6)


def test_a_chain_that_works_on_coordinates_says_so_where_there_are_none():
    tx = surgery.every(DECLARED["a chain"](), 2, T)
    with pytest.raises(
        ValueError, match="Expected stacked gradients alone, got a Gramian at 'per_"
    ):
        tx.update(GRADS, tx.init(PARAMS))


# Names

KEEP_NAMES = {
    "alone": lambda tx: tx,
    "accumulate": lambda tx: surgery.accumulate(tx, 1, T),
    "on_nonfinite": surgery.on_nonfinite,
    "every": lambda tx: surgery.every(tx, 2, T),
    "monitor": lambda tx: surgery.monitor(T, tx),
    "clip_tasks": lambda tx: surgery.clip_tasks(tx, 100.0),
    "start_after": lambda tx: surgery.start_after(tx, 0),
    "on_shared": lambda tx: surgery.on_shared(tx, ["trunk", "head"]),
    "on_tasks": lambda tx: surgery.on_tasks(tx, ["fit", "decay"]),
    "leafwise": surgery.leafwise,
    "all": lambda tx: surgery.on_nonfinite(
        surgery.accumulate(surgery.every(surgery.monitor(T, tx), 2, T), 1, T)
    ),
    "usable losses": lambda tx: surgery.every(surgery.cr_mogm(tx, T), 2, T),
}


@pytest.mark.parametrize("name", KEEP_NAMES)
def test_names_of_losses_reach_a_tree_of_the_method(name):
    """A tree with other names is refused, which an array would not be."""
    mask, others = {"fit": True, "decay": True}, {"fit": 0.75, "other": 0.25}

    def run(run, preference, **extra_args):
        preferred = rule(lambda tasks, state: (tasks.preference(preference), state))
        tx = KEEP_NAMES[name](preferred)
        update = functools.partial(tx.update, **extra_args)
        return run(update, GRADS, tx.init(PARAMS), PARAMS)[0]

    of_both = {"fit": 0.5, "decay": 0.25}
    updates = run(lambda update, *args: checked(update)(*args), of_both, losses=LOSSES)
    expected = surgery.combine(jnp.array([0.25, 0.5]), GRADS)
    assert_close(updates, expected)
    message = r"Expected the tasks \['decay', 'fit'\] of `{}`, got"
    with pytest.raises(ValueError, match=message.format("losses")):
        run(traced, others, losses=LOSSES)
    if name not in ("accumulate", "all"):  # whose own masks have the names of the losses
        with pytest.raises(ValueError, match=message.format("task_mask")):
            run(traced, others, task_mask=mask)


def test_names_reach_a_method_that_cannot_use_all_losses():
    tx = surgery.famo(T, lower_bounds={"fit": 0.5, "decay": 5.0})
    weights, state = tx.update(jnp.eye(T), tx.init(None), losses=LOSSES)
    assert_close(weights, jnp.array([0.0, 1.0]))
    assert state.unusable_losses == 1
    with pytest.raises(ValueError, match="of `losses`, got"):
        surgery.famo(T, lower_bounds={"fit": 0.0, "other": 0.0}).update(
            jnp.eye(T), tx.init(None), losses=LOSSES
        )
