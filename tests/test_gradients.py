"""From losses to gradients: the stacked way is the oracle of the others."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_surgery as surgery
from tests.cases import METHODS

NUM_TASKS = 4
INPUTS = jax.random.normal(jax.random.key(0), (16, 5))
TARGETS = jax.random.normal(jax.random.key(1), (16, NUM_TASKS))
PARAMS = {
    "trunk": {
        "kernel": jax.random.normal(jax.random.key(2), (5, 6)),
        "bias": jnp.zeros(6),
    },
    "heads": [jax.random.normal(jax.random.key(3 + task), (6,)) for task in range(NUM_TASKS)],
}

every_case = pytest.mark.parametrize("case", METHODS.values(), ids=METHODS)


def encode(trunk, inputs):
    return jnp.tanh(inputs @ trunk["kernel"] + trunk["bias"][None, :])


def task_losses(heads, features, inputs):
    return jnp.stack(
        [jnp.mean((features @ head - TARGETS[:, task]) ** 2) for task, head in enumerate(heads)]
    )


def losses_fn(params, inputs):
    return task_losses(params["heads"], encode(params["trunk"], inputs), inputs)


def assert_close(left, right, tolerance=1e-5):
    scale = max(np.abs(leaf).max() for leaf in jax.tree.leaves(right))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=tolerance * scale), left, right)


@pytest.mark.parametrize("chunk_size", [None, 1, 3, 4])
def test_task_gradients_are_those_of_jacrev(chunk_size):
    fn = jax.jit(surgery.task_value_and_grad(losses_fn, chunk_size=chunk_size))
    losses, task_grads = fn(PARAMS, INPUTS)
    np.testing.assert_allclose(losses, losses_fn(PARAMS, INPUTS), rtol=1e-6)
    assert_close(task_grads, jax.jacrev(losses_fn)(PARAMS, INPUTS))


def test_a_tree_of_losses_comes_back_as_it_is():
    def named(params, inputs):
        losses = losses_fn(params, inputs)
        return {"a": losses[0], "c": losses[2], "b": losses[1]}

    losses, task_grads = surgery.task_value_and_grad(named)(PARAMS, INPUTS)
    assert set(losses) == {"a", "b", "c"}
    stacked = jax.jacrev(losses_fn)(PARAMS, INPUTS)
    assert_close(task_grads, jax.tree.map(lambda leaf: leaf[:3], stacked))


def test_there_is_one_aux_and_one_forward_pass():
    calls = []

    def with_aux(params, inputs):
        calls.append(1)
        return losses_fn(params, inputs), {"statistics": inputs.mean(axis=0)}

    (_, aux), _ = surgery.task_value_and_grad(with_aux, has_aux=True)(PARAMS, INPUTS)
    np.testing.assert_allclose(aux["statistics"], INPUTS.mean(axis=0), rtol=1e-6)
    assert len(calls) == 1


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_tasks_with_data_of_their_own(chunk_size):
    def loss_fn(params, inputs, targets):
        return jnp.mean((encode(params["trunk"], inputs) @ params["heads"][0] - targets) ** 2)

    inputs = jax.random.normal(jax.random.key(9), (NUM_TASKS, 7, 5))
    targets = jax.random.normal(jax.random.key(10), (NUM_TASKS, 7))
    fn = surgery.per_task_value_and_grad(loss_fn, chunk_size=chunk_size)
    losses, task_grads = jax.jit(fn)(PARAMS, inputs, targets)
    for task in range(NUM_TASKS):
        loss, grad = jax.value_and_grad(loss_fn)(PARAMS, inputs[task], targets[task])
        np.testing.assert_allclose(losses[task], loss, rtol=1e-5)
        assert_close(jax.tree.map(lambda leaf, task=task: leaf[task], task_grads), grad)


def assert_streamed_is_stacked(case, dtype, tolerance):
    params, inputs = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), (PARAMS, INPUTS))
    tx = case.surgery(NUM_TASKS)
    state = tx.init(params)
    fn = jax.jit(surgery.surgery_value_and_grad(losses_fn, tx))
    (losses, grads), new_state = fn(params, state, inputs)
    task_grads = jax.jacrev(losses_fn)(params, inputs)
    extra_args = {"losses": losses}
    if case.needs_gramian:
        extra_args["gramian"] = surgery.gramian(task_grads)
    expected, expected_state = tx.update(task_grads, state, params, **extra_args)
    assert_close(grads, expected, tolerance)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4),
        new_state,
        expected_state,
    )


@every_case
def test_the_streamed_update_is_the_stacked_one(case):
    if case.coordinates:
        tx = case.surgery(NUM_TASKS)
        with pytest.raises(ValueError, match="Expected no Gramian, got one at"):
            surgery.surgery_value_and_grad(losses_fn, tx)(PARAMS, tx.init(PARAMS), INPUTS)
        return
    with jax.enable_x64(True):
        assert_streamed_is_stacked(case, jnp.float64, 10 * case.tolerance_x64)


@pytest.mark.parametrize("name", ["pcgrad", "aligned_mtl", "mgda", "famo"])
def test_the_streamed_update_is_the_stacked_one_in_float32(name):
    assert_streamed_is_stacked(METHODS[name], jnp.float32, 10 * METHODS[name].tolerance)


SHARED = {
    "a function of the path": lambda path: path.startswith("trunk"),
    "a tree of booleans": {"trunk": True, "heads": False},
}


@pytest.mark.parametrize("kind", SHARED)
def test_heads_get_their_summed_gradient_and_do_not_count(kind):
    tx = surgery.aligned_mtl()
    fn = surgery.surgery_value_and_grad(losses_fn, tx, shared=SHARED[kind])
    (_, grads), _ = jax.jit(fn)(PARAMS, tx.init(PARAMS), INPUTS)
    task_grads = jax.jacrev(losses_fn)(PARAMS, INPUTS)
    trunk, _ = tx.update(task_grads["trunk"], tx.init(None))
    heads = jax.tree.map(lambda leaf: leaf.sum(axis=0), task_grads["heads"])
    assert_close(grads, {"trunk": trunk, "heads": heads})


def test_a_masked_task_reaches_neither_trunk_nor_head():
    tx = surgery.pcgrad()
    mask = jnp.array([True, False, True, False])
    fn = surgery.surgery_value_and_grad(losses_fn, tx, shared=SHARED["a tree of booleans"])
    (_, grads), _ = fn(PARAMS, tx.init(PARAMS), INPUTS, task_mask=mask)
    task_grads = jax.jacrev(losses_fn)(PARAMS, INPUTS)
    expected, _ = tx.update(task_grads["trunk"], tx.init(None), task_mask=mask)
    assert_close(grads["trunk"], expected)
    np.testing.assert_array_equal(grads["heads"][1], 0)
    assert np.abs(grads["heads"][0]).max() > 0


def test_aux_and_a_chain_with_a_monitor():
    tx = optax.chain(surgery.monitor(NUM_TASKS), surgery.pcgrad())

    def with_aux(params, inputs):
        return losses_fn(params, inputs), inputs.sum()

    fn = surgery.surgery_value_and_grad(with_aux, tx, has_aux=True)
    ((_, aux), _), state = jax.jit(fn)(PARAMS, tx.init(PARAMS), INPUTS)
    np.testing.assert_allclose(aux, INPUTS.sum(), rtol=1e-6)
    gramian = surgery.gramian(jax.jacrev(losses_fn)(PARAMS, INPUTS))
    np.testing.assert_allclose(optax.tree.get(state, "gramian"), gramian, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("heads", ["sum", "weighted"])
@pytest.mark.parametrize("mixed", [False, True])
def test_feature_level_surgery_operates_on_the_gradients_of_the_features(heads, mixed):
    def losses_of(head_params, features, inputs):
        # A common operation on the features keeps their uses from being told apart.
        return task_losses(head_params, 2 * features if mixed else features, inputs)

    tx = surgery.aligned_mtl()
    fn = surgery.feature_surgery_value_and_grad(encode, losses_of, tx, heads=heads)
    trunk, head_params = PARAMS["trunk"], PARAMS["heads"]
    (losses, (trunk_grads, head_grads)), _ = jax.jit(fn)(trunk, head_params, tx.init(trunk), INPUTS)
    features, transpose = jax.vjp(lambda trunk: encode(trunk, INPUTS), trunk)
    np.testing.assert_allclose(losses, losses_of(head_params, features, INPUTS), rtol=1e-6)
    by_features = jax.jacrev(losses_of, argnums=1)(head_params, features, INPUTS)
    update, _ = tx.update(by_features, tx.init(None))
    assert_close(trunk_grads, transpose(update)[0])
    weights = jnp.ones(NUM_TASKS)
    if heads == "weighted":
        weights, _ = tx.update(
            jnp.eye(NUM_TASKS), tx.init(None), gramian=surgery.gramian(by_features)
        )
    by_heads = jax.jacrev(losses_of)(head_params, features, INPUTS)
    assert_close(head_grads, surgery.combine(weights, by_heads))


def test_feature_level_surgery_may_work_on_coordinates():
    tx = surgery.graddrop()
    fn = surgery.feature_surgery_value_and_grad(encode, task_losses, tx)
    trunk, heads = PARAMS["trunk"], PARAMS["heads"]
    (_, (trunk_grads, _)), _ = jax.jit(fn)(trunk, heads, tx.init(trunk), INPUTS)
    assert jax.tree.all(jax.tree.map(lambda leaf: bool(jnp.isfinite(leaf).all()), trunk_grads))


def test_shared_parameters_are_found_in_the_program_and_not_by_zeros():
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    for params in (PARAMS, zeros):
        found = surgery.infer_shared(losses_fn, params, INPUTS)
        assert found["trunk"] == {"kernel": True, "bias": True}
        assert found["heads"] == [False] * NUM_TASKS


def test_taking_the_outputs_of_the_heads_apart_does_not_make_the_heads_shared():
    def losses_fn(params):
        outputs = jnp.stack([params["trunk"] * params["first"], params["trunk"] * params["second"]])
        first, second = list(outputs.T.T)
        return [jnp.sum(first), jnp.sum(second**2)]

    params = {name: jnp.ones(3) for name in ("trunk", "first", "second")}
    found = surgery.infer_shared(losses_fn, params)
    assert found == {"trunk": True, "first": False, "second": False}


def test_heads_are_told_apart_through_concatenation_jit_and_reduction():
    def concatenated(params, inputs):
        features = jax.jit(encode)(params["trunk"], inputs)
        outputs = jnp.concatenate([(features @ head)[:, None] for head in params["heads"]], axis=1)
        return jnp.mean(jnp.square(outputs - TARGETS), axis=0)

    found = surgery.infer_shared(concatenated, PARAMS, INPUTS)
    assert found["trunk"] == {"kernel": True, "bias": True}
    assert found["heads"] == [False] * NUM_TASKS


def test_a_parameter_that_no_task_uses_is_not_shared():
    found = surgery.infer_shared(
        lambda params: jnp.stack([params["used"], params["used"] * 2]),
        {"used": jnp.ones(()), "unused": jnp.ones(())},
    )
    assert found == {"used": True, "unused": False}


BAD_LOSSES = {
    "a scalar": (lambda params, inputs: losses_fn(params, inputs).sum(), r"got shape \(\) at ''"),
    "a matrix": (lambda params, inputs: jnp.ones((2, 2)), r"got shape \(2, 2\) at ''"),
    "a tree with a vector": (
        lambda params, inputs: {"a": jnp.ones(()), "b": jnp.ones(3)},
        r"got shape \(3,\) at 'b'",
    ),
    "integers": (lambda params, inputs: jnp.arange(3), r"floating-point losses, got int32"),
}
FUNCTIONS = {
    "task_value_and_grad": lambda fn: surgery.task_value_and_grad(fn)(PARAMS, INPUTS),
    "surgery_value_and_grad": lambda fn: surgery.surgery_value_and_grad(fn, surgery.mean())(
        PARAMS, surgery.mean().init(PARAMS), INPUTS
    ),
    "feature_surgery_value_and_grad": lambda fn: surgery.feature_surgery_value_and_grad(
        encode, lambda heads, features, inputs: fn(PARAMS, inputs), surgery.mean()
    )(PARAMS["trunk"], PARAMS["heads"], surgery.mean().init(None), INPUTS),
    "infer_shared": lambda fn: surgery.infer_shared(fn, PARAMS, INPUTS),
}


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("kind", BAD_LOSSES)
def test_losses_that_are_not_one_scalar_per_task_are_refused(kind, function):
    losses, message = BAD_LOSSES[kind]
    with pytest.raises(ValueError, match=message):
        FUNCTIONS[function](losses)


def test_a_group_that_matches_no_leaf_is_refused():
    fn = surgery.surgery_value_and_grad(losses_fn, surgery.mean(), shared=lambda path: "x" in path)
    with pytest.raises(ValueError, match=r"Expected a group that holds a leaf.*trunk/kernel"):
        fn(PARAMS, surgery.mean().init(PARAMS), INPUTS)


def test_parameters_without_a_real_derivative_are_refused_unless_they_are_left_out():
    params = {"kernel": jnp.ones(2), "steps": jnp.array(3)}

    def losses_fn(params):
        return jnp.stack([params["kernel"].sum(), -params["kernel"][0] * params["steps"]])

    tx = surgery.pcgrad()
    fn = surgery.surgery_value_and_grad(losses_fn, tx)
    with pytest.raises(ValueError, match=r"Expected real floating-point.*got int32 at 'steps'"):
        fn(params, tx.init(params))
    with pytest.raises(
        ValueError, match=r"Expected real floating-point.*got complex64 at 'kernel'"
    ):
        fn({**params, "kernel": jnp.ones(2, complex)}, tx.init(params))

    fn = surgery.surgery_value_and_grad(losses_fn, tx, shared=lambda path: path == "kernel")
    (_, grads), _ = fn(params, tx.init(params))
    expected = tx.update(jnp.array([[1.0, 1.0], [-3.0, 0.0]]), tx.init(None))[0]
    np.testing.assert_allclose(grads["kernel"], expected, rtol=1e-6)


def test_features_that_do_not_depend_on_the_encoder_are_refused():
    fn = surgery.feature_surgery_value_and_grad(
        lambda trunk, inputs: inputs @ jnp.ones((5, 6)), task_losses, surgery.mean()
    )
    with pytest.raises(ValueError, match="Expected features that depend on the encoder"):
        fn(PARAMS["trunk"], PARAMS["heads"], surgery.mean().init(None), INPUTS)


def test_another_number_of_tasks_is_refused_where_the_state_keeps_one_number_each():
    tx = surgery.famo(num_tasks=3)
    fn = surgery.surgery_value_and_grad(losses_fn, tx)
    with pytest.raises(ValueError, match="Expected the gradients of 3 tasks, got 4"):
        fn(PARAMS, tx.init(PARAMS), INPUTS)


def deep_losses(num_tasks, width=256, depth=6, batch=16):
    """The MLP on which memory and FLOPs are compared, smaller than the benchmark's."""
    keys = jax.random.split(jax.random.key(0), depth + 1)
    params = [jax.random.normal(key, (width, width)) / width**0.5 for key in keys[:-1]]
    params.append(jax.random.normal(keys[-1], (width, num_tasks)))
    inputs = jax.random.normal(jax.random.key(1), (batch, width))

    def losses_fn(params):
        hidden = inputs
        for kernel in params[:-1]:
            hidden = jax.nn.relu(hidden @ kernel)
        return jnp.mean((hidden @ params[-1]) ** 2, axis=0)

    return losses_fn, params


def attentive_losses(num_tasks):
    """A network whose activations take far more memory than its parameters: a transformer."""
    layers = [nn.MultiHeadDotProductAttention(4), nn.LayerNorm(), nn.Dense(128), nn.gelu]
    layers += [
        nn.Dense(32),
        nn.LayerNorm(),
        nn.MultiHeadDotProductAttention(4),
        nn.Dense(num_tasks),
    ]
    network = nn.Sequential(layers)
    tokens = jax.random.normal(jax.random.key(0), (16, 32, 32))

    def losses_fn(params):
        return jnp.mean(network.apply(params, tokens) ** 2, axis=(0, 1))

    return losses_fn, network.init(jax.random.key(1), tokens)


@pytest.mark.parametrize("num_tasks", [8, 64])
@pytest.mark.parametrize("make_losses", [deep_losses, attentive_losses])
def test_streaming_takes_the_memory_of_one_gradient(make_losses, num_tasks):
    losses_fn, params = make_losses(num_tasks)
    tx = surgery.pcgrad()

    def memory(fn, *args):
        analysis = jax.jit(fn).lower(*args).compile().memory_analysis()
        return analysis.temp_size_in_bytes + analysis.output_size_in_bytes

    plain = memory(jax.value_and_grad(lambda params: losses_fn(params).sum()), params)
    streamed = memory(surgery.surgery_value_and_grad(losses_fn, tx), params, tx.init(params))
    assert streamed < 1.3 * plain


def test_a_loss_that_is_not_a_number_is_seen_in_the_update_streamed_as_stacked():
    params = jnp.array([1.0, -1.0])

    def losses_fn(params):
        return jnp.sqrt(params) * params  # NaN for the second task, and so is its gradient

    tx = surgery.pcgrad()
    (_, streamed), _ = surgery.surgery_value_and_grad(losses_fn, tx)(params, tx.init(params))
    _, task_grads = surgery.task_value_and_grad(losses_fn)(params)
    stacked, _ = tx.update(task_grads, tx.init(params), params)
    assert jnp.isnan(stacked).any()
    assert jnp.isnan(streamed).any()


LOSSES_ALONE = [surgery.sum, surgery.gls, surgery.scale_invariant, partial(surgery.famo, 8)]
LOSSES_ALONE += [
    partial(surgery.dwa, 8, window=2),
    partial(surgery.uncertainty_weighting, 8),
    surgery.stch,
]


@pytest.mark.parametrize("make", LOSSES_ALONE)
def test_methods_of_the_losses_alone_cost_one_backward_pass(make):
    losses_fn, params = deep_losses(8)
    tx = make()

    def flops(fn, *args):
        return jax.jit(fn).lower(*args).compile().cost_analysis()["flops"]

    plain = flops(jax.value_and_grad(lambda params: losses_fn(params).sum()), params)
    streamed = flops(surgery.surgery_value_and_grad(losses_fn, tx), params, tx.init(params))
    assert streamed < 1.05 * plain
