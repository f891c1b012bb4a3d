"""What every surgery promises as an optax transformation, walked over the table of methods."""

import pickle

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import optax_surgery as surgery
from tests.cases import CASES

NUM_TASKS = 4
PARAMS = {"dense": {"kernel": jnp.ones((5, 3)), "bias": jnp.ones(3)}, "scale": jnp.ones(())}

every_method = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def task_gradients(num_tasks=NUM_TASKS, seed=0, params=PARAMS):
    generator = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(generator.normal(size=(num_tasks, *leaf.shape)), leaf.dtype),
        params,
    )


def same(left, right):
    return jax.tree.all(jax.tree.map(lambda a, b: bool(jnp.array_equal(a, b)), left, right))


def described(tree):
    return jax.tree.map(lambda leaf: (jnp.shape(leaf), jnp.result_type(leaf)), tree)


@every_method
def test_updates_have_the_shapes_and_dtypes_of_the_parameters(case):
    updates, _ = case.step(task_gradients())
    assert described(updates) == described(PARAMS)


@every_method
def test_the_number_of_tasks_is_read_off_the_gradients(case):
    for num_tasks in (1, 2, 7):
        updates, _ = case.step(task_gradients(num_tasks))
        assert jax.tree.all(jax.tree.map(lambda leaf: bool(jnp.isfinite(leaf).all()), updates))


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


@every_method
def test_unknown_extra_arguments_are_ignored(case):
    plain, _ = case.step(task_gradients())
    extra, _ = case.step(task_gradients(), value=1.0, colour="red")
    assert same(plain, extra)


@every_method
def test_compiles_once(case):
    step = jax.jit(case.step)
    state = case.surgery(NUM_TASKS).init(PARAMS)
    for seed in range(3):
        _, state = step(task_gradients(seed=seed), state)
    assert step._cache_size() == 1


@every_method
def test_scan_donation_and_a_python_loop_agree(case):
    tx = optax.chain(case.surgery(NUM_TASKS), optax.adam(1e-2))
    grads = [task_gradients(seed=seed) for seed in range(4)]

    def step(carry, task_grads):
        params, state = carry
        extra_args = case.extra_args(task_grads)
        updates, state = tx.update(task_grads, state, params, **extra_args)
        return (optax.apply_updates(params, updates), state), None

    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *grads)
    scanned, _ = jax.lax.scan(step, (PARAMS, tx.init(PARAMS)), stacked)

    donating = jax.jit(step, donate_argnums=0)
    carry = (jax.tree.map(jnp.array, PARAMS), tx.init(PARAMS))
    for task_grads in grads:
        carry, _ = donating(carry, task_grads)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), scanned, carry)


@every_method
def test_vmap_over_seeds_equals_a_loop(case):
    tx = case.surgery(NUM_TASKS)
    states = jax.vmap(tx.init)(jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), PARAMS))
    grads = [task_gradients(seed=seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *grads)
    updates, _ = jax.vmap(case.step)(stacked, states)
    for seed in range(3):
        alone, _ = case.step(grads[seed])
        jax.tree.map(
            lambda leaf, all_leaves, seed=seed: np.testing.assert_allclose(
                all_leaves[seed], leaf, atol=1e-5
            ),
            alone,
            updates,
        )


@every_method
def test_a_surgery_of_the_identity_is_its_weights(case):
    grads = task_gradients()
    if case.coordinates:
        with pytest.raises(ValueError, match="Expected no Gramian, got one at"):
            case.step(grads, gramian=surgery.gramian(grads))
        return
    weights, _ = case.step(jnp.eye(NUM_TASKS), gramian=surgery.gramian(grads))
    updates, _ = case.step(grads)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
        updates,
        surgery.combine(weights, grads),
    )


def through_orbax(state, folder):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "state", state)
        checkpointer.wait_until_finished()
        return checkpointer.restore(folder / "state", state)


CHECKPOINTS = {
    "orbax": through_orbax,
    "pickle": lambda state, folder: pickle.loads(pickle.dumps(state)),
    "flax": lambda state, folder: flax.serialization.from_bytes(
        state, flax.serialization.to_bytes(state)
    ),
}


@every_method
def test_the_ten_steps_after_a_checkpoint_are_the_same_to_the_bit(case, tmp_path):
    tx = optax.chain(surgery.monitor(NUM_TASKS), case.surgery(NUM_TASKS), optax.adam(1e-2))

    @jax.jit
    def step(params, state, task_grads):
        extra_args = case.extra_args(task_grads)
        updates, state = tx.update(task_grads, state, params, **extra_args)
        return optax.apply_updates(params, updates), state

    def run(params, state, seeds):
        for seed in seeds:
            params, state = step(params, state, task_gradients(seed=seed))
        return params, state

    params, state = run(PARAMS, tx.init(PARAMS), range(3))
    uninterrupted = run(params, state, range(3, 13))
    for name, through in CHECKPOINTS.items():
        resumed = run(*through((params, state), tmp_path), range(3, 13))
        assert same(resumed, uninterrupted), name


@every_method
def test_missing_and_empty_leaves_pass(case):
    params = {"a": jnp.ones(3), "none": None, "empty": jnp.ones((0, 2))}
    grads = task_gradients(params=params)
    updates, _ = case.step(grads)
    assert updates["none"] is None
    assert updates["empty"].shape == (0, 2)
    alone, _ = case.step({"a": grads["a"]})
    np.testing.assert_allclose(updates["a"], alone["a"], atol=1e-6)


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
