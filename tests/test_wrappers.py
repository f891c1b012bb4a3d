"""Wrappers: what each promises, alone, in chains, under masks and around other surgeries."""

import functools
import pickle

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_surgery as surgery
from tests.test_contract import described, same, task_gradients

NUM_TASKS = 3
PARAMS = {"trunk": {"kernel": jnp.ones((5, 3)), "bias": jnp.ones(3)}, "head": jnp.ones(())}
LOSSES = jnp.array([1.0, 2.0, 3.0])
NAN_ROW = jnp.array([True, False, True])


def in_trunk(path):
    return path.startswith("trunk")


def module(path):
    return path.split("/")[0]


WRAPPERS = {
    "monitor": lambda: optax.chain(surgery.monitor(NUM_TASKS), surgery.pcgrad()),
    "leafwise": lambda: surgery.leafwise(surgery.pcgrad()),
    "leafwise by group": lambda: surgery.leafwise(surgery.moco(NUM_TASKS), module),
    "on_shared": lambda: surgery.on_shared(surgery.moco(NUM_TASKS), in_trunk),
    "on_shared, weighted": lambda: surgery.on_shared(surgery.famo(NUM_TASKS), in_trunk, "weighted"),
    "per_task": lambda: optax.chain(
        surgery.per_task(optax.scale_by_adam(), NUM_TASKS), surgery.pcgrad()
    ),
    "normalize_tasks, l2": lambda: optax.chain(surgery.normalize_tasks("l2"), surgery.pcgrad()),
    "normalize_tasks, ema": lambda: optax.chain(
        surgery.normalize_tasks("ema", NUM_TASKS), surgery.pcgrad()
    ),
    "every": lambda: surgery.every(surgery.famo(NUM_TASKS), 3, NUM_TASKS),
    "start_after": lambda: surgery.start_after(surgery.gradvac(NUM_TASKS), 2),
    "accumulate": lambda: surgery.accumulate(
        optax.chain(surgery.famo(NUM_TASKS), optax.adam(1e-2)), 2, NUM_TASKS
    ),
    "on_nonfinite, mask": lambda: surgery.on_nonfinite(
        optax.chain(surgery.moco(NUM_TASKS), optax.adam(1e-2)), "mask"
    ),
    "on_nonfinite, skip": lambda: surgery.on_nonfinite(
        optax.chain(surgery.moco(NUM_TASKS), optax.adam(1e-2)), "skip"
    ),
    "on_nonfinite, propagate": lambda: surgery.on_nonfinite(
        optax.chain(surgery.moco(NUM_TASKS), optax.adam(1e-2)), "propagate"
    ),
    "all at once": lambda: surgery.on_nonfinite(
        surgery.accumulate(
            optax.chain(
                surgery.normalize_tasks("ema", NUM_TASKS),
                surgery.per_task(optax.clip_by_global_norm(1.0), NUM_TASKS),
                surgery.on_shared(
                    surgery.start_after(surgery.every(surgery.pcgrad(), 2, NUM_TASKS), 1), in_trunk
                ),
                optax.adam(1e-2),
            ),
            2,
            NUM_TASKS,
        )
    ),
}
every_wrapper = pytest.mark.parametrize("name", WRAPPERS)


@functools.cache
def transformation(name):
    return WRAPPERS[name]()


@functools.cache
def compiled(name):
    """A step of a chain with a gradient step at its end, compiled once in the whole run."""
    tx = transformation(name)

    def step(params, state, task_grads, **extra_args):
        updates, state = tx.update(task_grads, state, params, **extra_args)
        return jax.tree.map(lambda param, update: param - 0.1 * update, params, updates), state

    return jax.jit(step)


def gradients(num_steps, seed=0):
    return [task_gradients(NUM_TASKS, seed=seed + i, params=PARAMS) for i in range(num_steps)]


def stack(trees):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def with_nan_row(task_grads, task=1):
    return jax.tree.map(lambda leaf: leaf.at[task].set(jnp.nan), task_grads)


def all_finite(tree):
    return all(np.isfinite(np.asarray(leaf, float)).all() for leaf in jax.tree.leaves(tree))


def run(name, steps, **extra_args):
    params, state = PARAMS, transformation(name).init(PARAMS)
    for task_grads in steps:
        params, state = compiled(name)(params, state, task_grads, **extra_args)
    return params, state


def assert_close(left, right, atol=1e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol, rtol=0), left, right)


# What all of them promise


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
def test_scan_equals_a_loop(name):
    steps = gradients(5)

    def body(carry, task_grads):
        return compiled(name)(*carry, task_grads, losses=LOSSES), None

    scanned, _ = jax.lax.scan(body, (PARAMS, transformation(name).init(PARAMS)), stack(steps))
    assert_close(scanned, run(name, steps, losses=LOSSES), atol=1e-5)


@every_wrapper
def test_without_jit(name):
    tx, (task_grads,) = transformation(name), gradients(1)
    updates, state = tx.update(task_grads, tx.init(PARAMS), PARAMS, losses=LOSSES)
    params = jax.tree.map(lambda param, update: param - 0.1 * update, PARAMS, updates)
    assert_close((params, state), run(name, [task_grads], losses=LOSSES), atol=1e-5)


@every_wrapper
def test_a_fresh_state_may_be_donated(name):
    buffers = [
        leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(transformation(name).init(PARAMS))
    ]
    assert len(set(buffers)) == len(buffers)


@every_wrapper
def test_vmap_over_seeds_equals_a_loop(name):
    tx, seeds = transformation(name), [gradients(3, seed) for seed in (0, 10)]
    params = stack([PARAMS] * len(seeds))
    state = jax.vmap(tx.init)(params)
    for task_grads in map(stack, zip(*seeds, strict=True)):
        params, state = jax.vmap(functools.partial(compiled(name), losses=LOSSES))(
            params, state, task_grads
        )
    assert_close((params, state), stack([run(name, steps, losses=LOSSES) for steps in seeds]), 1e-5)


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
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_updates_have_the_dtype_of_the_gradients(name, dtype):
    tx = transformation(name)
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), PARAMS)
    task_grads = task_gradients(NUM_TASKS, params=params)
    state = tx.init(params)
    abstract = functools.partial(jax.eval_shape, functools.partial(tx.update, losses=LOSSES))
    updates, new_state = abstract(task_grads, state, params)
    assert described(updates) == described(params)
    assert described(state) == described(new_state)


@every_wrapper
def test_float64(name):
    with jax.enable_x64(True):
        tx, params = WRAPPERS[name](), jax.tree.map(lambda leaf: leaf.astype(float), PARAMS)
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


@pytest.mark.parametrize(
    "name", ["monitor", "per_task", "normalize_tasks, ema", "every", "accumulate"]
)
def test_another_number_of_tasks_is_refused(name):
    tx, task_grads = transformation(name), task_gradients(NUM_TASKS + 1, params=PARAMS)
    with pytest.raises(ValueError, match="Expected the gradients of 3 tasks, got 4 at 'num_tasks'"):
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


@pytest.mark.parametrize(
    "make",
    [
        lambda: surgery.leafwise(surgery.pcgrad()),
        lambda: surgery.per_task(optax.identity(), NUM_TASKS),
        lambda: surgery.normalize_tasks(),
        lambda: surgery.accumulate(surgery.pcgrad(), 2, NUM_TASKS),
    ],
)
def test_a_gramian_is_refused_where_it_cannot_be_used(make):
    tx, (task_grads,) = make(), gradients(1)
    with pytest.raises(ValueError, match="Expected no Gramian, got one at '"):
        tx.update(task_grads, tx.init(PARAMS), gramian=jnp.eye(NUM_TASKS))


BAD_ARGUMENTS = {
    "k": lambda: surgery.every(surgery.pcgrad(), 0, NUM_TASKS),
    "every_k": lambda: surgery.accumulate(surgery.pcgrad(), 0, NUM_TASKS),
    "action": lambda: surgery.on_nonfinite(surgery.pcgrad(), "drop"),
    "others": lambda: surgery.on_shared(surgery.pcgrad(), in_trunk, "mean"),
    "kind": lambda: surgery.normalize_tasks("l1"),
    "num_tasks": lambda: surgery.normalize_tasks("ema"),
    "decay": lambda: surgery.normalize_tasks("ema", NUM_TASKS, 1.0),
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_bad_arguments_are_refused(name):
    with pytest.raises(ValueError, match=f"Expected .*, got .* at '{name}'. "):
        BAD_ARGUMENTS[name]()


# leafwise and on_shared


def test_leafwise_is_a_surgery_of_each_leaf():
    tx, (task_grads,) = surgery.leafwise(surgery.pcgrad()), gradients(1)
    updates, state = tx.update(task_grads, tx.init(PARAMS), PARAMS)
    pcgrad = surgery.pcgrad()
    for got, leaf in zip(jax.tree.leaves(updates), jax.tree.leaves(task_grads), strict=True):
        np.testing.assert_allclose(got, pcgrad.update(leaf, pcgrad.init(None))[0], atol=1e-6)
    assert sorted(state.group_states) == ["head", "trunk/bias", "trunk/kernel"]


def test_groups_of_leaves_have_a_gramian_each():
    tx, (task_grads,) = surgery.leafwise(surgery.pcgrad(), module), gradients(1)
    updates, state = tx.update(task_grads, tx.init(PARAMS), PARAMS)
    pcgrad = surgery.pcgrad()
    for name in ("head", "trunk"):
        alone, _ = pcgrad.update(task_grads[name], pcgrad.init(None))
        assert_close(updates[name], alone)
    assert sorted(state.group_states) == ["head", "trunk"]
    whole, _ = pcgrad.update(task_grads, pcgrad.init(None))
    assert not same(updates, whole)


def test_one_group_of_all_leaves_is_the_surgery():
    tx, (task_grads,) = surgery.leafwise(surgery.pcgrad(), lambda path: "all"), gradients(1)
    updates, _ = tx.update(task_grads, tx.init(PARAMS), PARAMS)
    assert_close(updates, surgery.pcgrad().update(task_grads, surgery.pcgrad().init(None))[0])


def test_a_group_without_a_name_is_refused():
    tx = surgery.leafwise(surgery.pcgrad(), lambda path: "trunk" if in_trunk(path) else None)
    message = "Expected the name of a group, got None at 'head'. Return a string"
    with pytest.raises(ValueError, match=message):
        tx.init(PARAMS)


MASKS = {
    "tree": {"trunk": {"kernel": True, "bias": True}, "head": False},
    "prefix": {"trunk": True, "head": False},
    "path": in_trunk,
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("others", ["sum", "weighted"])
def test_the_gramian_is_that_of_the_shared_leaves(mask, others):
    tx, (task_grads,) = surgery.on_shared(surgery.pcgrad(), MASKS[mask], others), gradients(1)
    task_mask = jnp.array([True, True, False])
    updates, _ = jax.jit(tx.update)(task_grads, tx.init(PARAMS), PARAMS, task_mask=task_mask)

    pcgrad = surgery.pcgrad()
    trunk, _ = pcgrad.update(task_grads["trunk"], pcgrad.init(None), task_mask=task_mask)
    assert_close(updates["trunk"], trunk)
    weights = jnp.ones(NUM_TASKS)
    if others == "weighted":
        hook = {"gramian": surgery.gramian(task_grads["trunk"]), "task_mask": task_mask}
        weights, _ = pcgrad.update(jnp.eye(NUM_TASKS), pcgrad.init(None), **hook)
    expected = jnp.sum(jnp.where(task_mask, weights, 0) * task_grads["head"])
    np.testing.assert_allclose(updates["head"], expected, atol=1e-6)


def test_a_given_gramian_decides_for_the_shared_leaves():
    gramian, (task_grads,) = jnp.eye(NUM_TASKS), gradients(1)
    tx = surgery.on_shared(surgery.pcgrad(), in_trunk)
    updates, _ = tx.update(task_grads, tx.init(PARAMS), PARAMS, gramian=gramian)
    assert_close(updates, jax.tree.map(lambda leaf: leaf.sum(axis=0), task_grads))


def test_all_leaves_may_be_shared():
    tx, (task_grads,) = surgery.on_shared(surgery.pcgrad(), lambda path: True), gradients(1)
    updates, _ = tx.update(task_grads, tx.init(PARAMS), PARAMS)
    assert_close(updates, surgery.pcgrad().update(task_grads, surgery.pcgrad().init(None))[0])


def test_a_mask_that_matches_no_leaf_is_refused():
    tx = surgery.on_shared(surgery.pcgrad(), lambda path: path == "encoder")
    with pytest.raises(ValueError, match=r"Expected a group that holds a leaf, .*'trunk/kernel'"):
        tx.init(PARAMS)


def test_weights_for_other_leaves_cannot_come_from_coordinates():
    tx = surgery.on_shared(surgery.graddrop(), in_trunk, "weighted")
    with pytest.raises(ValueError, match="Expected no Gramian, got one at 'graddrop'"):
        tx.update(*gradients(1), tx.init(PARAMS), PARAMS)


def test_infer_shared_finds_the_mask():
    def losses_fn(params):
        kernel = jnp.sum(params["trunk"]["kernel"])
        return jnp.stack([kernel * params["head"], kernel + jnp.sum(params["trunk"]["bias"])])

    shared = surgery.infer_shared(lambda params: list(losses_fn(params)), PARAMS)
    tx, task_grads = surgery.on_shared(surgery.pcgrad(), shared), jax.jacrev(losses_fn)(PARAMS)
    updates, _ = tx.update(task_grads, tx.init(PARAMS), PARAMS)
    assert_close(updates["head"], task_grads["head"].sum())


# per_task


def test_clipping_of_each_task():
    """Of norms 4, 3 and 0.5, the joint clip leaves less than one in all."""
    task_grads = jnp.array([[4.0, 0.0], [0.0, 3.0], [0.3, 0.4]])
    clip = optax.clip_by_global_norm(1.0)
    tx = surgery.per_task(clip, NUM_TASKS)
    clipped, _ = tx.update(task_grads, tx.init(jnp.zeros(2)))
    np.testing.assert_allclose(clipped, [[1.0, 0.0], [0.0, 1.0], [0.3, 0.4]], atol=1e-6)
    joint, _ = clip.update(task_grads, clip.init(None))
    assert np.linalg.norm(joint) < 1.001


def test_momentum_of_each_task_equals_a_loop_over_tasks():
    tx = surgery.per_task(optax.trace(0.9), NUM_TASKS)
    steps = gradients(4)
    state = tx.init(PARAMS)
    for task_grads in steps:
        got, state = jax.jit(tx.update)(task_grads, state, PARAMS)
    for task in range(NUM_TASKS):
        momentum = optax.trace(0.9)
        alone = momentum.init(PARAMS)
        for task_grads in steps:
            row, alone = momentum.update(jax.tree.map(lambda g, t=task: g[t], task_grads), alone)
        assert_close(jax.tree.map(lambda leaf, t=task: leaf[t], got), row)


def test_transformations_that_use_the_parameters():
    tx, (task_grads,) = surgery.per_task(optax.add_decayed_weights(0.1), NUM_TASKS), gradients(1)
    updates, _ = tx.update(task_grads, tx.init(PARAMS), PARAMS)
    expected = jax.tree.map(lambda leaf, param: leaf + 0.1 * param[None], task_grads, PARAMS)
    assert_close(updates, expected)


def test_a_masked_task_keeps_its_momentum():
    tx = surgery.per_task(optax.trace(0.9), NUM_TASKS)
    first, second = gradients(2)
    _, state = tx.update(first, tx.init(PARAMS))
    updates, new_state = tx.update(with_nan_row(second), state, task_mask=NAN_ROW)
    rows = functools.partial(jax.tree.map, lambda leaf: leaf[1])
    assert same(rows(new_state.task_states), rows(state.task_states))
    assert all_finite((updates, new_state))


def test_a_transformation_with_a_random_key_in_its_state():
    noise = surgery.per_task(optax.add_noise(0.1, 0.5, key=0), NUM_TASKS)
    tx = surgery.on_nonfinite(optax.chain(noise, surgery.pcgrad()))
    first, second = gradients(2)
    update = jax.jit(tx.update)
    _, state = update(first, tx.init(PARAMS), PARAMS)
    _, state = update(with_nan_row(second), state, PARAMS)
    counts = state.inner_state[0].task_states.count
    np.testing.assert_array_equal(counts, [2, 1, 2])
    assert (state.nonfinite_steps, state.nonfinite_tasks) == (1, 1)


# normalize_tasks


def test_l2_gives_every_task_the_norm_1():
    (task_grads,) = gradients(1)
    scales = jnp.array([1e30, 1.0, 1e-30])
    task_grads = jax.tree.map(
        lambda leaf: leaf * scales.reshape(NUM_TASKS, *[1] * (leaf.ndim - 1)), task_grads
    )
    tx = surgery.normalize_tasks("l2")
    normal, _ = jax.jit(tx.update)(task_grads, tx.init(PARAMS), PARAMS)
    gramian = surgery.gramian(normal)
    np.testing.assert_allclose(jnp.diagonal(gramian), np.ones(NUM_TASKS), rtol=1e-5)


def test_a_zero_gradient_stays_zero():
    task_grads = jnp.array([[0.0, 0.0], [3.0, 4.0]])
    for tx in (surgery.normalize_tasks(), surgery.normalize_tasks("ema", 2)):
        state = tx.init(jnp.zeros(2))
        for _ in range(2):
            normal, state = tx.update(task_grads, state)
        np.testing.assert_allclose(normal, [[0.0, 0.0], [0.6, 0.8]], atol=1e-6)


def test_averages_of_norms_with_their_bias_corrected():
    decay, norms = 0.8, np.array([[1.0, 10.0], [3.0, 5.0], [2.0, 1.0], [8.0, 7.0]])
    tx = surgery.normalize_tasks("ema", num_tasks=2, decay=decay)
    seen = np.array([[True, True], [True, False], [False, True], [True, True]])
    state, average, number = tx.init(jnp.zeros(2)), np.zeros(2), np.zeros(2)
    for step_norms, mask in zip(norms, seen, strict=True):
        task_grads = np.outer(step_norms, [0.6, 0.8])
        task_grads[~mask] = np.nan
        normal, state = jax.jit(tx.update)(jnp.asarray(task_grads, "f4"), state, task_mask=mask)
        average = np.where(mask, decay * average + (1 - decay) * step_norms, average)
        number += mask
        corrected = average / (1 - decay**number)
        lengths = np.linalg.norm(normal, axis=1)
        np.testing.assert_allclose(lengths[mask], (step_norms / corrected)[mask], rtol=1e-5)
        np.testing.assert_allclose(state.norms, corrected, rtol=1e-5)
    assert all_finite(state)


# every and start_after


def test_weights_are_found_once_in_k_steps():
    tx = surgery.every(surgery.pcgrad(), 3, NUM_TASKS)
    state, weights = tx.init(PARAMS), []
    steps = gradients(7)
    for number, task_grads in enumerate(steps):
        updates, state = jax.jit(tx.update)(task_grads, state, PARAMS)
        weights.append(state.weights)
        assert_close(updates, surgery.combine(weights[number // 3 * 3], task_grads), 1e-5)
        assert state.inner_state.surgery_step == number // 3 + 1
    assert same(weights[0], weights[2])
    assert not same(weights[2], weights[3])
    pcgrad = surgery.pcgrad()
    first, _ = pcgrad.update(steps[0], pcgrad.init(None))
    assert_close(first, surgery.combine(weights[0], steps[0]))


def test_the_gramian_is_in_a_branch_of_its_own():
    tx, (task_grads,) = surgery.every(surgery.pcgrad(), 3, NUM_TASKS), gradients(1)
    lowered = jax.jit(tx.update).lower(task_grads, tx.init(PARAMS)).as_text()
    (call,) = [line for line in lowered.splitlines() if "call @gramian_and_scale(" in line]
    assert " = func.call " in call  # within a region, which a call at the top level is not


def test_every_step_is_the_surgery():
    tx, famo = surgery.every(surgery.famo(NUM_TASKS), 1, NUM_TASKS), surgery.famo(NUM_TASKS)
    state, expected_state = tx.init(PARAMS), famo.init(PARAMS)
    for task_grads in gradients(3):
        updates, state = tx.update(task_grads, state, PARAMS, losses=LOSSES)
        expected, expected_state = famo.update(task_grads, expected_state, PARAMS, losses=LOSSES)
        assert_close(updates, expected)


def test_a_task_that_is_masked_at_renewal_keeps_its_weight():
    tx = surgery.every(surgery.constant(LOSSES), 2, NUM_TASKS)
    (task_grads,) = gradients(1)
    _, state = tx.update(task_grads, tx.init(PARAMS), task_mask=NAN_ROW)
    np.testing.assert_allclose(state.weights, [1.0, 0.0, 3.0])
    updates, state = tx.update(task_grads, state)
    assert_close(updates, surgery.combine(jnp.array([1.0, 0.0, 3.0]), task_grads))
    _, state = tx.update(task_grads, state)
    _, state = tx.update(task_grads, state)
    _, state = tx.update(with_nan_row(task_grads), state, task_mask=NAN_ROW)
    np.testing.assert_allclose(state.weights, LOSSES)


def test_every_needs_a_surgery_with_weights():
    tx = surgery.every(surgery.graddrop(), 2, NUM_TASKS)
    with pytest.raises(ValueError, match="Expected no Gramian, got one at 'graddrop'"):
        tx.update(*gradients(1), tx.init(PARAMS))


def test_weights_are_reused_in_surgery_value_and_grad():
    tx = surgery.every(surgery.pcgrad(), 2, 2)
    targets = jnp.array([[1.0, 0.0], [-1.0, 1.0]])
    fn = surgery.surgery_value_and_grad(lambda params, scale: scale * targets @ params, tx)
    state = tx.init(jnp.ones(2))
    _, state = fn(jnp.ones(2), state, jnp.ones((2, 1)))
    (_, second), state = fn(jnp.ones(2), state, jnp.array([[5.0], [1.0]]))
    np.testing.assert_allclose(second, jnp.array([5.0, 1.0]) * state.weights @ targets, atol=1e-6)


@pytest.mark.parametrize("name", ["on_nonfinite", "start_after", "every"])
def test_a_wrapped_surgery_of_the_identity_is_its_weights(name):
    make = {
        "on_nonfinite": lambda inner: surgery.on_nonfinite(inner),
        "start_after": lambda inner: surgery.start_after(inner, 0),
        "every": lambda inner: surgery.every(inner, 2, NUM_TASKS),
    }[name]
    tx, (task_grads,) = make(surgery.ntkmtl()), gradients(1)
    gramian = surgery.gramian(task_grads)
    weights, _ = tx.update(jnp.eye(NUM_TASKS), tx.init(None), gramian=gramian)
    updates, _ = tx.update(task_grads, tx.init(PARAMS), PARAMS)
    assert_close(surgery.combine(weights, task_grads), updates, 1e-5)


def test_the_mean_before_and_the_surgery_after():
    tx = surgery.start_after(surgery.gradvac(NUM_TASKS), 2)
    gradvac = surgery.gradvac(NUM_TASKS)
    state, expected_state = tx.init(PARAMS), gradvac.init(PARAMS)
    for number, task_grads in enumerate(gradients(4)):
        updates, state = jax.jit(tx.update)(task_grads, state, PARAMS)
        if number < 2:
            expected = jax.tree.map(lambda leaf: leaf.mean(axis=0), task_grads)
            assert same(state.inner_state, gradvac.init(PARAMS))
        else:
            expected, expected_state = gradvac.update(task_grads, expected_state)
            assert_close(state.inner_state, expected_state, 1e-5)
        assert_close(updates, expected, 1e-5)


def test_the_mean_before_is_that_of_the_tasks_with_data():
    tx, (task_grads,) = surgery.start_after(surgery.pcgrad(), 5), gradients(1)
    updates, _ = tx.update(with_nan_row(task_grads), tx.init(PARAMS), task_mask=NAN_ROW)
    assert_close(updates, jax.tree.map(lambda leaf: (leaf[0] + leaf[2]) / 2, task_grads))


# accumulate


def regression(num_examples=24):
    """Losses of three tasks on a linear model, their data, and a mask of examples."""
    generator = np.random.default_rng(0)
    inputs = jnp.asarray(generator.normal(size=(num_examples, 5)), "f4")
    targets = jnp.asarray(generator.normal(size=(num_examples, 3)), "f4")

    def losses_fn(params, inputs, targets):
        predictions = jnp.tanh(inputs @ params["trunk"]["kernel"]) * params["head"]
        return jnp.mean((predictions + params["trunk"]["bias"][None] - targets) ** 2, axis=0)

    return losses_fn, inputs, targets


@pytest.mark.parametrize("make", [surgery.pcgrad, lambda: surgery.famo(NUM_TASKS)])
def test_k_micro_batches_equal_one_big_batch_under_scan(make):
    losses_fn, inputs, targets = regression()
    value_and_grad = surgery.task_value_and_grad(losses_fn)
    num_updates, k, size = 2, 3, 4
    chain = optax.chain(make(), optax.adam(1e-2))

    def train(tx, params, batches):
        def step(carry, batch):
            params, state = carry
            losses, task_grads = value_and_grad(params, *batch)
            updates, state = tx.update(task_grads, state, params, losses=losses)
            return (optax.apply_updates(params, updates), state), params

        carry, history = jax.lax.scan(step, (params, tx.init(params)), batches)
        return carry, history

    big = [data.reshape(num_updates, k * size, -1) for data in (inputs, targets)]
    micro = [data.reshape(num_updates * k, size, -1) for data in (inputs, targets)]
    (expected, expected_state), _ = train(chain, PARAMS, big)
    tx = surgery.accumulate(chain, k, NUM_TASKS)
    (params, state), history = train(tx, PARAMS, micro)
    assert_close(params, expected)
    assert_close(state.inner_state, expected_state)
    assert state.inner_state[0].surgery_step == num_updates  # once in k
    assert optax.tree.get(state, "count") == num_updates
    for start in (0, k):  # parameters rest between two updates
        window = jax.tree.map(lambda leaf, s=start: leaf[s : s + k], history)
        assert same(window, jax.tree.map(lambda leaf: jnp.stack([leaf[0]] * k), window))


def test_a_task_is_averaged_over_the_micro_batches_in_which_it_takes_part():
    masks = jnp.array([[True, True, False], [True, False, False], [False, True, False]])
    seen = []

    def look(task_updates, state, params=None, *, losses, task_mask, **extra_args):
        seen.append((task_updates, losses, task_mask, extra_args))
        return surgery.sum().update(task_updates, state, task_mask=task_mask)

    inner = optax.GradientTransformationExtraArgs(surgery.sum().init, look)
    tx = surgery.accumulate(inner, 3, NUM_TASKS)
    state, steps = tx.init(PARAMS), gradients(3)
    losses = jnp.arange(9.0).reshape(3, 3)
    for number, task_grads in enumerate(steps):
        mask = masks[number]
        nan = jax.tree.map(
            lambda leaf, mask=mask: jnp.where(
                mask.reshape(NUM_TASKS, *[1] * (leaf.ndim - 1)), leaf, jnp.nan
            ),
            task_grads,
        )
        step_losses = jnp.where(mask, losses[number], jnp.nan)
        extra = {"losses": step_losses, "task_mask": mask, "value": number}
        updates, state = tx.update(nan, state, PARAMS, **extra)
        assert state.ready == (number == 2)
        assert state.micro_step == (number + 1) % 3
    averages, mean_losses, mask, extra = seen[-1]
    first, second, third = steps
    expected = jax.tree.map(
        lambda a, b, c: jnp.stack([(a[0] + b[0]) / 2, (a[1] + c[1]) / 2]), first, second, third
    )
    assert_close(jax.tree.map(lambda leaf: leaf[:2], averages), expected)
    np.testing.assert_allclose(mean_losses[:2], [(0 + 3) / 2, (1 + 7) / 2])
    np.testing.assert_array_equal(mask, [True, True, False])
    assert extra == {"value": 2}
    assert_close(updates, jax.tree.map(lambda leaf: leaf.sum(axis=0), expected))
    assert all_finite(state)


def test_the_next_window_starts_afresh():
    tx = surgery.accumulate(surgery.sum(), 2, NUM_TASKS)
    state = tx.init(PARAMS)
    inf = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.inf), gradients(1)[0])
    for _ in range(2):
        _, state = jax.jit(tx.update)(inf, state)
    first, second = gradients(2)
    _, state = jax.jit(tx.update)(first, state)
    updates, state = jax.jit(tx.update)(second, state)
    assert_close(updates, jax.tree.map(lambda a, b: (a + b).sum(axis=0) / 2, first, second))


def test_averages_are_in_float32_for_low_precision():
    params = {"w": jnp.ones(4, jnp.bfloat16)}
    tx = surgery.accumulate(surgery.sum(), 300, 2)
    state = tx.init(params)
    assert state.averages["w"].dtype == jnp.float32
    task_grads = {"w": jnp.ones((2, 4), jnp.bfloat16)}

    def step(state, scale):
        updates, state = tx.update({"w": task_grads["w"] * scale}, state, params)
        return state, updates

    scales = jnp.linspace(0.5, 1.5, 300).astype(jnp.bfloat16)
    state, updates = jax.lax.scan(step, state, scales)
    np.testing.assert_allclose(state.averages["w"], scales.astype("f4").mean(), rtol=1e-5)
    assert updates["w"].dtype == jnp.bfloat16


def test_one_micro_batch_is_the_transformation():
    chain = optax.chain(surgery.pcgrad(), optax.adam(1e-2))
    tx, (task_grads,) = surgery.accumulate(chain, 1, NUM_TASKS), gradients(1)
    updates, state = tx.update(task_grads, tx.init(PARAMS), PARAMS)
    assert_close(updates, chain.update(task_grads, chain.init(PARAMS), PARAMS)[0])
    assert state.ready


# on_nonfinite


BAD_TASKS = {
    "a gradient": lambda g, losses: (jax.tree.map(lambda leaf: leaf.at[1].set(jnp.inf), g), losses),
    "a coordinate": lambda g, losses: ({**g, "head": g["head"].at[1].set(jnp.nan)}, losses),
    "a loss": lambda g, losses: (g, losses.at[1].set(jnp.nan)),
}
SURGERIES = {"famo": surgery.famo, "moco": surgery.moco, "gradvac": surgery.gradvac}


@pytest.mark.parametrize("name", SURGERIES)
def test_a_task_that_is_not_finite_is_masked_and_counted(name):
    chain = optax.chain(SURGERIES[name](NUM_TASKS), optax.adam(1e-2))
    tx = surgery.on_nonfinite(chain, "mask")
    guarded, plain = jax.jit(tx.update), jax.jit(chain.update)
    state, expected_state = tx.init(PARAMS), chain.init(PARAMS)
    spoil = dict(zip((1, 2, 4), BAD_TASKS.values(), strict=True))
    for number, task_grads in enumerate(gradients(5)):
        task_mask = jnp.ones(NUM_TASKS, bool).at[1].set(number not in spoil)
        expected, expected_state = plain(
            task_grads, expected_state, PARAMS, losses=LOSSES, task_mask=task_mask
        )
        losses = LOSSES
        if number in spoil:
            task_grads, losses = spoil[number](task_grads, losses)
        updates, state = guarded(task_grads, state, PARAMS, losses=losses)
        assert_close(updates, expected, 1e-5)
    assert_close(state.inner_state, expected_state, 1e-5)
    assert all_finite(state)
    assert (state.nonfinite_steps, state.nonfinite_tasks) == (3, 3)


def test_a_step_that_is_not_finite_is_skipped_and_counted():
    chain = optax.chain(surgery.moco(NUM_TASKS), optax.adam(1e-2))
    tx = surgery.on_nonfinite(chain, "skip")
    update = jax.jit(tx.update)
    first, second = gradients(2)
    _, state = update(first, tx.init(PARAMS), PARAMS, losses=LOSSES)
    for count, spoil in enumerate(BAD_TASKS.values(), start=1):
        bad, losses = spoil(second, LOSSES)
        updates, new_state = update(bad, state, PARAMS, losses=losses)
        assert_close(updates, optax.tree.zeros_like(PARAMS))
        assert same(new_state.inner_state, state.inner_state)
        assert (new_state.nonfinite_steps, new_state.nonfinite_tasks) == (count, count)
        state = new_state


def test_propagate_only_counts():
    chain = optax.chain(surgery.sum(), optax.adam(1e-2))
    tx, (task_grads,) = surgery.on_nonfinite(chain, "propagate"), gradients(1)
    updates, state = tx.update(with_nan_row(task_grads), tx.init(PARAMS), PARAMS)
    assert not all_finite(updates)
    assert (state.nonfinite_steps, state.nonfinite_tasks) == (1, 1)


@pytest.mark.parametrize("action", ["mask", "skip", "propagate"])
def test_finite_steps_are_as_without(action):
    chain = optax.chain(surgery.moco(NUM_TASKS), optax.adam(1e-2))
    tx, (task_grads,) = surgery.on_nonfinite(chain, action), gradients(1)
    updates, state = tx.update(task_grads, tx.init(PARAMS), PARAMS)
    assert_close(updates, chain.update(task_grads, chain.init(PARAMS), PARAMS)[0])
    assert (state.nonfinite_steps, state.nonfinite_tasks) == (0, 0)


@pytest.mark.parametrize("action", ["mask", "skip"])
def test_where_all_tasks_are_bad_the_step_is_skipped(action):
    chain = optax.chain(surgery.moco(NUM_TASKS), optax.adam(1e-2))
    tx, (first, second) = surgery.on_nonfinite(chain, action), gradients(2)
    _, state = tx.update(first, tx.init(PARAMS), PARAMS)
    nan = jax.tree.map(lambda leaf: leaf * jnp.nan, second)
    updates, new_state = jax.jit(tx.update)(nan, state, PARAMS)
    assert_close(updates, optax.tree.zeros_like(PARAMS))
    assert same(new_state.inner_state, state.inner_state)
    assert (new_state.nonfinite_steps, new_state.nonfinite_tasks) == (1, NUM_TASKS)


@pytest.mark.parametrize("action", ["mask", "skip", "propagate"])
def test_masked_tasks_are_not_counted(action):
    tx, (task_grads,) = surgery.on_nonfinite(surgery.pcgrad(), action), gradients(1)
    updates, state = tx.update(with_nan_row(task_grads), tx.init(PARAMS), task_mask=NAN_ROW)
    assert all_finite(updates)
    assert (state.nonfinite_steps, state.nonfinite_tasks) == (0, 0)


OVERFLOWS = {
    "a sum in float16": (surgery.sum(), jnp.float16, 60_000.0),
    "a square in Adam": (optax.chain(surgery.sum(), optax.adam(1e-2)), jnp.float32, 1e30),
}


@pytest.mark.parametrize("action", ["mask", "skip"])
@pytest.mark.parametrize("name", OVERFLOWS)
def test_finite_gradients_that_overflow_later_are_skipped(name, action):
    inner, dtype, size = OVERFLOWS[name]
    params = {"w": jnp.ones(4, dtype)}
    tx = surgery.on_nonfinite(inner, action)
    state = tx.init(params)
    task_grads = {"w": jnp.full((2, 4), size, dtype)}
    updates, new_state = jax.jit(tx.update)(task_grads, state, params)
    assert_close(updates, optax.tree.zeros_like(params))
    assert same(new_state.inner_state, state.inner_state)
    assert (new_state.nonfinite_steps, new_state.nonfinite_tasks) == (1, 0)


def test_infinities_that_a_state_begins_with_are_kept():
    plateau = optax.contrib.reduce_on_plateau()
    chain = optax.chain(surgery.sum(), optax.sgd(0.1), plateau)
    assert not all_finite(chain.init(PARAMS))
    tx, (task_grads,) = surgery.on_nonfinite(chain), gradients(1)
    updates, state = tx.update(task_grads, tx.init(PARAMS), PARAMS, value=1.0)
    assert_close(updates, jax.tree.map(lambda leaf: -0.1 * leaf.sum(axis=0), task_grads))
    assert state.nonfinite_steps == 0


def test_a_bad_micro_batch_is_left_out_of_the_average():
    tx = surgery.on_nonfinite(surgery.accumulate(surgery.sum(), 2, NUM_TASKS))
    first, second = gradients(2)
    _, state = tx.update(first, tx.init(PARAMS))
    updates, state = tx.update(with_nan_row(second), state)
    expected = jax.tree.map(
        lambda a, b: (a[0] + b[0]) / 2 + a[1] + (a[2] + b[2]) / 2, first, second
    )
    assert_close(updates, expected)


def test_a_gramian_that_is_not_finite_masks_its_task():
    tx = surgery.on_nonfinite(surgery.sum())
    gramian = jnp.eye(NUM_TASKS).at[1].set(jnp.nan).at[:, 1].set(jnp.nan)
    weights, state = tx.update(jnp.eye(NUM_TASKS), tx.init(jnp.zeros(3)), gramian=gramian)
    np.testing.assert_allclose(weights, [1.0, 0.0, 1.0])
    assert state.nonfinite_tasks == 1


# apply_updates


def test_apply_updates():
    updates = jax.tree.map(lambda leaf: 0.5 * leaf, PARAMS)
    assert same(surgery.apply_updates(PARAMS, updates), optax.apply_updates(PARAMS, updates))


def test_stacked_updates_are_refused():
    message = r"Expected an update of shape \(\), got shape \(3,\) at 'head'. Chain a surgery"
    with pytest.raises(ValueError, match=message):
        surgery.apply_updates(PARAMS, gradients(1)[0])
