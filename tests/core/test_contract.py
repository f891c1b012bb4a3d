"""What every surgery promises as an optax transformation, walked over the table of methods."""

import functools
import itertools
import pickle
import re

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import optax_surgery as surgery
from tests.cases import METHODS
from tests.common import NUM_TASKS, PARAMS, described, same, task_gradients

every_method = pytest.mark.parametrize("case", METHODS.values(), ids=METHODS)


@every_method
def test_updates_have_the_shapes_and_dtypes_of_the_parameters(case):
    updates, _ = case.step(task_gradients())
    assert described(updates) == described(PARAMS)


@every_method
def test_the_number_of_tasks_is_read_off_the_gradients(case):
    tx = case.surgery(NUM_TASKS)
    for num_tasks in (1, 7):
        task_grads = task_gradients(num_tasks)
        update = functools.partial(tx.update, **case.extra_args(task_grads))
        refusal = ""
        try:
            updates, _ = jax.eval_shape(update, task_grads, tx.init(PARAMS))
        except ValueError as error:  # of a method that is made for so many tasks
            updates, refusal = PARAMS, str(error)
        assert described(updates) == described(PARAMS)
        assert re.match(r"(Expected .*\d.*, got .*\d.* at '.*'\. .*)?$", refusal)


@every_method
def test_state_keeps_its_structure_shapes_and_dtypes(case):
    state = case.surgery(NUM_TASKS).init(PARAMS)
    _, new_state = case.step(task_gradients(), state)
    assert jax.tree.structure(state) == jax.tree.structure(new_state)
    assert described(state) == described(new_state)
    for leaf in jax.tree.leaves(state):
        assert not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


@every_method
def test_no_field_of_the_state_is_called_count(case):
    tx = optax.chain(case.surgery(NUM_TASKS), optax.adam(1e-3))
    assert optax.tree.get(tx.init(PARAMS), "count").shape == ()


def filled(state):
    """A state of the same shapes with other numbers in every entry."""
    number = itertools.count(1)

    def fill(leaf):
        first = 97 * next(number)
        entries = np.arange(first, first + leaf.size) % (2 if leaf.dtype == bool else 1009)
        return jnp.asarray(entries.reshape(leaf.shape), leaf.dtype)

    return jax.tree.map(fill, state)


def assert_moved(make, params):
    """Moves a state of 3 tasks to 5, and compares each task that goes on, to the bit."""
    old, new = filled(make(3).init(params)), filled(make(5).init(params))
    tasks = [2, None, 0, None, 1]
    moved = surgery.move_state(old, new, tasks)
    assert jax.tree.structure(moved) == jax.tree.structure(new)
    assert described(moved) == described(new)
    known = [row for row, task in enumerate(tasks) if task is not None]
    from_rows = [tasks[row] for row in known]
    for before, fresh, leaf in zip(*map(jax.tree.leaves, (old, new, moved)), strict=True):
        of_tasks = [axis for axis in range(leaf.ndim) if before.shape[axis] != leaf.shape[axis]]
        expected = np.array(fresh) if of_tasks else np.asarray(before)
        if of_tasks:
            here = tuple(
                known if axis in of_tasks else range(n) for axis, n in enumerate(leaf.shape)
            )
            there = tuple(
                from_rows if axis in of_tasks else range(n) for axis, n in enumerate(leaf.shape)
            )
            expected[np.ix_(*here)] = np.asarray(before)[np.ix_(*there)]
        np.testing.assert_array_equal(leaf, expected)


@every_method
def test_a_state_is_moved_to_another_number_of_tasks(case):
    assert_moved(case.surgery, PARAMS)


@every_method
def test_a_state_of_another_number_of_tasks_is_refused(case):
    task_grads, shapes = task_gradients(), described(case.surgery(NUM_TASKS).init(PARAMS))
    for other in (1, NUM_TASKS - 1, NUM_TASKS + 1):
        state = case.surgery(other).init(PARAMS)
        if described(state) == shapes:
            _, new_state = jax.eval_shape(case.step, task_grads, state)
            assert described(new_state) == shapes
        else:
            with pytest.raises(ValueError, match=r"Expected a state .*'. Begin with `init"):
                jax.eval_shape(case.step, task_grads, state)


@every_method
def test_unknown_extra_arguments_are_ignored(case):
    """What is no array, by the program without it, and arrays by one that looks at none of them."""
    task_grads = task_gradients()
    plain, _ = case.step(task_grads)
    extra, _ = case.step(task_grads, colour="red")
    assert same(plain, extra)
    with_value = jax.make_jaxpr(lambda value: case.step(task_grads, value=value))(1.0)
    assert is_unused(with_value.jaxpr, with_value.jaxpr.invars[0])


def is_unused(jaxpr, variable):
    """Whether no equation takes it, except to hand it to a program within that does not either."""
    for equation in jaxpr.eqns:
        places = [place for place, taken in enumerate(equation.invars) if taken is variable]
        if places and equation.primitive.name != "jit":
            return False
        within = equation.params["jaxpr"].jaxpr if places else None
        if not all(is_unused(within, within.invars[place]) for place in places):
            return False
    return True


@functools.cache
def chained(case):
    return optax.chain(surgery.monitor(NUM_TASKS), case.surgery(NUM_TASKS), optax.adam(1e-2))


def step_of_the_chain(case, carry, task_grads):
    params, state = carry
    extra_args = case.extra_args(task_grads)
    updates, state = chained(case).update(task_grads, state, params, **extra_args)
    return optax.apply_updates(params, updates), state


@functools.cache
def compiled_step(case):
    return jax.jit(functools.partial(step_of_the_chain, case))


def stack(trees):
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)


@every_method
def test_scan_and_vmap_over_seeds_agree_with_python_loops_that_compile_once(case):
    runs = [[task_gradients(seed=10 * run + step) for step in range(4)] for run in range(2)]
    starts = [(PARAMS, chained(case).init(PARAMS)) for run in range(2)]

    def scan(start, grads):
        return jax.lax.scan(
            lambda carry, task_grads: (step_of_the_chain(case, carry, task_grads), None),
            start,
            grads,
        )[0]

    found = jax.jit(jax.vmap(scan))(stack(starts), stack([stack(grads) for grads in runs]))
    step, expected = compiled_step(case), []
    for carry, grads in zip(starts, runs, strict=True):
        carry = step(carry, grads[0])
        programs = step._cache_size()
        for task_grads in grads[1:]:
            carry = step(carry, task_grads)
        assert step._cache_size() == programs
        expected.append(carry)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found, stack(expected))


@every_method
def test_a_fresh_state_may_be_donated(case):
    leaves = jax.tree.leaves(case.surgery(NUM_TASKS).init(PARAMS))
    assert len({leaf.unsafe_buffer_pointer() for leaf in leaves}) == len(leaves)


@every_method
def test_a_surgery_of_the_identity_is_its_weights(case):
    grads = task_gradients()
    if case.coordinates:
        with pytest.raises(ValueError, match="Expected stacked gradients alone, got a Gramian at"):
            case.step(grads, gramian=surgery.gramian(grads))
        return
    weights, _ = case.step(np.eye(NUM_TASKS, dtype="f4"), gramian=surgery.gramian(grads))
    updates, _ = case.step(grads)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
        updates,
        surgery.combine(weights, grads),
    )


CHECKPOINTS = {
    "pickle": lambda state: pickle.loads(pickle.dumps(state)),
    "flax": lambda state: flax.serialization.from_bytes(state, flax.serialization.to_bytes(state)),
}


@every_method
def test_the_ten_steps_after_a_checkpoint_are_the_same_to_the_bit(case):
    def run(carry, seeds):
        for seed in seeds:
            carry = compiled_step(case)(carry, task_gradients(seed=seed))
        return carry

    carry = run((PARAMS, chained(case).init(PARAMS)), range(3))
    uninterrupted = run(carry, range(3, 13))
    for name, through in CHECKPOINTS.items():
        assert same(run(through(carry), range(3, 13)), uninterrupted), name


def test_orbax_restores_the_state_of_every_method_to_the_bit(tmp_path):
    states = {name: case.surgery(NUM_TASKS).init(PARAMS) for name, case in METHODS.items()}
    states = {name: filled(state) for name, state in states.items() if jax.tree.leaves(state)}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "states", states)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "states", states)
    assert jax.tree.structure(restored) == jax.tree.structure(states)
    assert described(restored) == described(states)
    assert same(restored, states)


@every_method
def test_missing_and_empty_leaves_pass(case):
    params = {"a": jnp.ones(6), "none": None, "empty": jnp.ones((0, 2))}
    grads = task_gradients(params=params)
    updates, _ = case.step(grads)
    assert updates["none"] is None
    assert updates["empty"].shape == (0, 2)
    alone, _ = case.step(grads["a"])
    np.testing.assert_allclose(updates["a"], alone, atol=1e-6)


@every_method
def test_abstract_evaluation_needs_no_arrays(case):
    tx = case.surgery(NUM_TASKS)
    shapes = jax.eval_shape(tx.init, PARAMS)
    assert described(shapes) == described(tx.init(PARAMS))


@every_method
def test_lowers_for_every_platform(case):
    state = case.surgery(NUM_TASKS).init(PARAMS)
    platforms = ("cpu", "cuda", "tpu")
    exported = jax.export.export(jax.jit(case.step), platforms=platforms)(task_gradients(), state)
    assert exported.platforms == platforms
