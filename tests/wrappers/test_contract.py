"""What all wrappers promise, alone, in chains, under masks and around other surgeries."""

import functools
import pickle

import flax.serialization
import jax
import jax.numpy as jnp
import optax
import pytest

import optax_surgery as surgery
from tests.common import described, same, task_gradients
from tests.core.test_contract import assert_moved
from tests.wrappers.cases import (
    LOSSES,
    NAN_ROW,
    NUM_TASKS,
    PARAMS,
    WRAPPERS,
    all_finite,
    assert_close,
    compiled,
    every_wrapper,
    gradients,
    in_trunk,
    run,
    stack,
    transformation,
    with_nan_row,
)


@every_wrapper
def test_state_keeps_its_structure_shapes_and_dtypes(name):
    state = transformation(name).init(PARAMS)
    _, new_state = run(name, gradients(1), losses=LOSSES)
    assert jax.tree.structure(state) == jax.tree.structure(new_state)
    assert described(state) == described(new_state)
    assert not any(
        jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) for leaf in jax.tree.leaves(state)
    )


@every_wrapper
def test_scan_and_vmap_over_seeds_equal_loops(name):
    seeds = [gradients(5, seed) for seed in (0, 10)]
    starts = [(PARAMS, transformation(name).init(PARAMS))] * len(seeds)

    def body(carry, task_grads):
        return compiled(name)(*carry, task_grads, losses=LOSSES), None

    @jax.jit
    @jax.vmap
    def scan(start, steps):
        return jax.lax.scan(body, start, steps)[0]

    expected = [run(name, steps, losses=LOSSES) for steps in seeds]
    assert_close(scan(stack(starts), stack(list(map(stack, seeds)))), stack(expected), atol=1e-5)


@every_wrapper
def test_without_jit(name):
    tx, (task_grads,) = transformation(name), gradients(1)
    updates, state = tx.update(task_grads, tx.init(PARAMS), PARAMS, losses=LOSSES)
    assert described(updates) == described(PARAMS)
    params = jax.tree.map(lambda param, update: param - 0.1 * update, PARAMS, updates)
    assert_close((params, state), run(name, [task_grads], losses=LOSSES), atol=1e-5)


@every_wrapper
def test_a_fresh_state_may_be_donated(name):
    buffers = [
        leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(transformation(name).init(PARAMS))
    ]
    assert len(set(buffers)) == len(buffers)


@every_wrapper
def test_masked_rows_may_be_undefined(name):
    steps = gradients(4)
    nan = [with_nan_row(task_grads) for task_grads in steps]
    losses = LOSSES.at[1].set(jnp.nan)
    params, state = run(name, nan, losses=losses, task_mask=NAN_ROW)
    assert all_finite((params, state))
    assert same((params, state), run(name, steps, losses=LOSSES, task_mask=NAN_ROW))


@every_wrapper
def test_everything_masked_gives_zero(name):
    """Except for Adam, whose update of a zero gradient is that of its momentum."""
    nothing = jnp.zeros(NUM_TASKS, bool)
    steps = [with_nan_row(task_grads) for task_grads in gradients(1)]
    params, _ = run(name, steps, losses=LOSSES, task_mask=nothing)
    assert same(params, PARAMS)


@every_wrapper
def test_zero_gradients_divide_by_no_zero(name):
    tx, zeros = transformation(name), jax.tree.map(jnp.zeros_like, gradients(1)[0])
    with jax.debug_nans(True):
        updates, state = tx.update(zeros, tx.init(PARAMS), PARAMS, losses=LOSSES)
    assert_close(updates, optax.tree.zeros_like(PARAMS))
    assert all_finite(state)


@every_wrapper
@pytest.mark.parametrize("through", ["pickle", "flax"])
def test_resumes_from_a_checkpoint_to_the_bit(name, through):
    params, state = run(name, gradients(3), losses=LOSSES)
    if through == "pickle":
        restored = pickle.loads(pickle.dumps(state))
    else:
        restored = flax.serialization.from_bytes(state, flax.serialization.to_bytes(state))
    for task_grads in gradients(3, seed=5):
        expected = compiled(name)(params, state, task_grads, losses=LOSSES)
        assert same(compiled(name)(params, restored, task_grads, losses=LOSSES), expected)


@every_wrapper
def test_the_count_of_the_optimiser_can_be_read(name):
    tx = transformation(name)
    if name == "per_task" or "ScaleByAdamState" not in repr(tx.init(PARAMS)):
        tx = optax.chain(tx, optax.adam(1e-3))
    filtering = None
    if name == "per_task":  # it has the counts of Adam for each task
        filtering = lambda path, _: "PerTaskState" not in str(path)  # noqa: E731
    assert optax.tree.get(tx.init(PARAMS), "count", filtering=filtering).shape == ()


@every_wrapper
def test_updates_have_the_dtypes_of_the_gradients(name):
    tx = transformation(name)
    dtypes = {"trunk": {"kernel": "bfloat16", "bias": "float16"}, "head": "float32"}
    params = jax.tree.map(lambda leaf, dtype: leaf.astype(dtype), PARAMS, dtypes)
    task_grads = task_gradients(NUM_TASKS, params=params)
    state = tx.init(params)
    abstract = functools.partial(jax.eval_shape, functools.partial(tx.update, losses=LOSSES))
    updates, new_state = abstract(task_grads, state, params)
    assert described(updates) == described(params)
    assert described(state) == described(new_state)


@every_wrapper
def test_float64(name):
    with jax.enable_x64(True):
        tx, params = (
            WRAPPERS[name](NUM_TASKS),
            jax.tree.map(lambda leaf: leaf.astype(float), PARAMS),
        )
        state = tx.init(params)
        task_grads = jax.tree.map(lambda leaf: leaf.astype(float), gradients(1)[0])
        update = functools.partial(tx.update, losses=LOSSES)
        updates, new_state = jax.eval_shape(update, task_grads, state, params)
        assert described(updates) == described(params)
        assert described(state) == described(new_state)


@pytest.mark.parametrize("name", [name for name in WRAPPERS if "leafwise" not in name])
def test_optax_maps_over_what_is_like_the_parameters(name):
    tx = transformation(name)
    state = tx.init(PARAMS)
    marked = optax.tree.map_params(tx, lambda leaf: leaf, state)
    assert same(state, marked)


@every_wrapper
def test_a_state_of_another_number_of_tasks_is_refused(name):
    """Where it has anything of each task; none is broadcast, and none changes its shape."""
    tx, (task_grads,) = transformation(name), gradients(1)
    for other in (1, NUM_TASKS + 1):
        state = WRAPPERS[name](other).init(PARAMS)
        update = functools.partial(tx.update, losses=LOSSES)
        if described(state) == described(tx.init(PARAMS)):
            _, new_state = jax.eval_shape(update, task_grads, state, PARAMS)
            assert described(new_state) == described(state)
        else:
            with pytest.raises(ValueError, match=r"Expected .*, got shape \(.* at '.*/.*'. Begin"):
                jax.eval_shape(update, task_grads, state, PARAMS)


@every_wrapper
def test_a_state_is_moved_to_another_number_of_tasks(name):
    assert_moved(WRAPPERS[name], PARAMS)


@every_wrapper
def test_every_wrapper_of_a_surgery_is_a_surgery(name):
    of_a_chain = ("monitor, before", "per_task", "accumulate", "on_nonfinite", "all at once")
    assert isinstance(transformation(name), surgery.Surgery) != name.startswith(of_a_chain)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda inner: surgery.accumulate(inner, 2, NUM_TASKS),
        surgery.on_nonfinite,
    ],
)
def test_what_wraps_surgeries_and_chains_alike_keeps_their_kind(wrap):
    assert isinstance(wrap(surgery.pcgrad()), surgery.Surgery)
    assert isinstance(wrap(surgery.Surgery(*optax.chain(surgery.pcgrad()))), surgery.Surgery)
    assert not isinstance(wrap(optax.chain(surgery.pcgrad())), surgery.Surgery)


@pytest.mark.parametrize(
    "name",
    ["monitor", "monitor, before", "per_task", "normalize_tasks, ema", "every", "accumulate"],
)
def test_another_number_of_tasks_is_refused(name):
    tx, task_grads = transformation(name), task_gradients(NUM_TASKS + 1, params=PARAMS)
    wrapper = name.partition(",")[0]
    message = f"Expected the gradients of 3 tasks, got 4 at '{wrapper}'. Make it `{wrapper}\\("
    with pytest.raises(ValueError, match=message):
        tx.update(task_grads, tx.init(PARAMS), PARAMS)


@every_wrapper
def test_unstacked_gradients_are_refused(name):
    tx = transformation(name)
    with pytest.raises(ValueError, match=r"Expected task gradients of shape \(T\) .* at 'head'"):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS, losses=LOSSES)


@every_wrapper
def test_losses_of_the_wrong_shape_are_refused(name):
    tx, (task_grads,) = transformation(name), gradients(1)
    with pytest.raises(ValueError, match=r"Expected losses of shape \(3,\), got shape \(\)"):
        tx.update(task_grads, tx.init(PARAMS), PARAMS, losses=jnp.ones(()))


@every_wrapper
def test_a_group_of_a_partition_may_be_empty(name):
    tx = optax.partition({"one": transformation(name), "none": surgery.sum()}, lambda _: "none")
    (task_grads,) = gradients(1)
    update = functools.partial(tx.update, losses=LOSSES)
    updates, _ = jax.eval_shape(update, task_grads, tx.init(PARAMS), PARAMS)
    assert described(updates) == described(PARAMS)


ON_COORDINATES = {
    "leafwise": lambda: surgery.leafwise(surgery.pcgrad()),
    "per_task": lambda: surgery.per_task(optax.identity(), NUM_TASKS),
    "accumulate": lambda: surgery.accumulate(surgery.pcgrad(), 2, NUM_TASKS),
}


@pytest.mark.parametrize("name", ON_COORDINATES)
def test_a_gramian_is_refused_where_it_cannot_be_used(name):
    tx, (task_grads,) = ON_COORDINATES[name](), gradients(1)
    message = f"Expected stacked gradients.*, got .*Gramian.* at '{name}'. "
    for gramian in (jnp.eye(NUM_TASKS), lambda: jnp.eye(NUM_TASKS)):
        with pytest.raises(ValueError, match=message):
            tx.update(task_grads, tx.init(PARAMS), gramian=gramian)


BAD_ARGUMENTS = {
    "k": lambda: surgery.every(surgery.pcgrad(), 0, NUM_TASKS),
    "step": lambda: surgery.start_after(surgery.pcgrad(), -3),
    "every_k": lambda: surgery.accumulate(surgery.pcgrad(), 0, NUM_TASKS),
    "action": lambda: surgery.on_nonfinite(surgery.pcgrad(), "drop"),
    "others": lambda: surgery.on_shared(surgery.pcgrad(), in_trunk, "mean"),
    "kind": lambda: surgery.normalize_tasks(surgery.pcgrad(), "l1"),
    "num_tasks": lambda: surgery.normalize_tasks(surgery.pcgrad(), "ema"),
    "decay": lambda: surgery.normalize_tasks(surgery.pcgrad(), "ema", NUM_TASKS, 1.0),
    "max_norm": lambda: surgery.clip_tasks(surgery.pcgrad(), 0.0),
    "tasks": lambda: surgery.on_tasks(surgery.pcgrad(), []),
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_bad_arguments_are_refused(name):
    with pytest.raises(ValueError, match=f"Expected .*, got .* at '{name}'. "):
        BAD_ARGUMENTS[name]()


OF_A_SURGERY = {
    "every": lambda inner: surgery.every(inner, 3, NUM_TASKS),
    "start_after": lambda inner: surgery.start_after(inner, 100),
    "on_shared": lambda inner: surgery.on_shared(inner, in_trunk),
    "leafwise": surgery.leafwise,
    "on_tasks": lambda inner: surgery.on_tasks(inner, [0, 1]),
    "monitor": lambda inner: surgery.monitor(NUM_TASKS, inner),
    "normalize_tasks": surgery.normalize_tasks,
    "clip_tasks": lambda inner: surgery.clip_tasks(inner, 1.0),
    "on_log_losses": surgery.on_log_losses,
    "cr_mogm": lambda inner: surgery.cr_mogm(inner, NUM_TASKS),
}


@pytest.mark.parametrize("name", OF_A_SURGERY)
def test_what_needs_a_surgery_refuses_an_optimiser_within(name):
    """The mean of `start_after`, or heads of `on_shared`, would climb with a rate of one."""
    wrap, after = OF_A_SURGERY[name], r"Put the optimiser after it, `chain\("
    with pytest.raises(ValueError, match=rf"a surgery, got Grad.*{after}{name}\(.*, optimizer\)`"):
        wrap(optax.chain(surgery.pcgrad(), optax.adam(1e-3)))
    with pytest.raises(ValueError, match=r"Expected a surgery, got the function pcgrad at"):
        wrap(surgery.pcgrad)


@pytest.mark.parametrize("name", OF_A_SURGERY)
def test_a_chain_that_is_declared_a_surgery_is_taken_for_one(name):
    declared = surgery.Surgery(*optax.chain(surgery.pcgrad(), optax.scale(0.5)))
    assert isinstance(OF_A_SURGERY[name](declared), surgery.Surgery)
