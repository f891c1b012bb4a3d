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


def flagged_losses(params, inputs, *, scale=1.0, mode="plain"):
    """With arguments by keyword, of which one is no array."""
    losses = scale * losses_fn(params, inputs)
    return losses if mode == "plain" else losses[:2]


def test_arguments_by_keyword_go_to_the_function_of_the_losses():
    tx, keywords = surgery.pcgrad(), {"scale": 3.0, "mode": "two"}
    losses, task_grads = surgery.task_value_and_grad(flagged_losses)(PARAMS, INPUTS, **keywords)
    np.testing.assert_allclose(losses, 3 * losses_fn(PARAMS, INPUTS)[:2], rtol=1e-6)

    fn = surgery.surgery_value_and_grad(flagged_losses, tx)
    (streamed, grads), _ = fn(PARAMS, tx.init(PARAMS), inputs=INPUTS, **keywords)
    np.testing.assert_allclose(streamed, losses, rtol=1e-6)
    assert_close(grads, tx.update(task_grads, tx.init(PARAMS), PARAMS)[0])
    with pytest.raises(TypeError, match="task_mask"):
        fn(PARAMS, tx.init(PARAMS), INPUTS, task_mask=jnp.ones(2, bool))

    found = surgery.infer_shared(flagged_losses, PARAMS, INPUTS, **keywords)
    assert found == {"trunk": {"kernel": True, "bias": True}, "heads": [False] * NUM_TASKS}


def test_arguments_by_keyword_go_to_encoder_and_heads():
    def scaled_encode(trunk, inputs, *, scale):
        return scale * encode(trunk, inputs)

    def scaled_losses(heads, features, inputs, *, scale):
        return scale * task_losses(heads, features, inputs)

    tx, trunk, heads = surgery.pcgrad(), PARAMS["trunk"], PARAMS["heads"]
    fn = surgery.feature_surgery_value_and_grad(scaled_encode, scaled_losses, tx)
    (losses, _), _ = fn(trunk, heads, tx.init(trunk), INPUTS, scale=2.0)
    expected = 2 * task_losses(heads, 2 * encode(trunk, INPUTS), INPUTS)
    np.testing.assert_allclose(losses, expected, rtol=1e-6)


def test_a_function_with_a_parameter_that_is_kept_for_the_surgery_is_refused():
    def taken(params, extra_args):
        return losses_fn(params, extra_args)

    message = "Expected a function without a parameter extra_args, got one that has it at"
    with pytest.raises(ValueError, match=f"{message} 'losses_fn'"):
        surgery.surgery_value_and_grad(taken, surgery.mean())
    with pytest.raises(ValueError, match=f"{message} 'encode'"):
        surgery.feature_surgery_value_and_grad(taken, task_losses, surgery.mean())
    with pytest.raises(ValueError, match=f"{message} 'task_losses'"):
        surgery.feature_surgery_value_and_grad(encode, taken, surgery.mean())
    # Signatures cannot always be had.
    surgery.surgery_value_and_grad(jax.tree_util.Partial(dict.get), surgery.mean())


def test_what_is_meant_for_the_surgery_is_a_dict_and_none_in_it_is_nothing():
    tx = surgery.pcgrad()
    fn = surgery.surgery_value_and_grad(losses_fn, tx)
    with pytest.raises(ValueError, match="Expected a dict of arguments for the surgery, got"):
        fn(PARAMS, tx.init(PARAMS), INPUTS, extra_args=jnp.ones(NUM_TASKS, bool))
    nothing = dict.fromkeys(["losses", "task_mask", "gramian", "key"])
    (_, grads), _ = fn(PARAMS, tx.init(PARAMS), INPUTS, extra_args=nothing)
    assert_close(grads, fn(PARAMS, tx.init(PARAMS), INPUTS)[0][1])


def test_the_surgery_sees_the_names_of_the_losses():
    def named(params, inputs):
        losses = losses_fn(params, inputs)
        return {"residual": losses[0], "boundary": losses[1]}

    tx = surgery.constant({"residual": 1.0, "boundary": 0.0})
    fn = surgery.surgery_value_and_grad(named, tx)
    (_, grads), _ = fn(PARAMS, tx.init(PARAMS), INPUTS)
    assert_close(grads, jax.grad(lambda params: losses_fn(params, INPUTS)[0])(PARAMS))
    mask = {"residual": True, "initial": False}
    with pytest.raises(ValueError, match=r"Expected the tasks \['boundary', 'residual'\]"):
        fn(PARAMS, tx.init(PARAMS), INPUTS, extra_args={"task_mask": mask})


def test_a_pair_of_scalars_is_two_losses():
    losses, _ = surgery.task_value_and_grad(lambda params: (params, 2 * params))(jnp.ones(()))
    assert losses == (1, 2)


@pytest.mark.parametrize("kind", ["a number", "a list", "an array"])
def test_a_pair_is_needed_where_there_is_aux(kind):
    def losses_fn(params):
        return {"a number": params, "a list": [params] * 3, "an array": jnp.stack([params] * 2)}[
            kind
        ]

    message = "Expected a pair of losses and aux, got"
    tx, params = surgery.mean(), jnp.ones(())
    with pytest.raises(ValueError, match=message):
        surgery.task_value_and_grad(losses_fn, has_aux=True)(params)
    with pytest.raises(ValueError, match=message):
        surgery.surgery_value_and_grad(losses_fn, tx, has_aux=True)(params, tx.init(params))


ODD_LEAVES = {"int32": jnp.array(3), "bool": True, "a str": "float32", "a custom_jvp": jax.nn.relu}


@pytest.mark.parametrize("kind", ODD_LEAVES)
def test_parameters_without_a_derivative_are_refused(kind):
    params = {"kernel": jnp.ones(2), "odd": ODD_LEAVES[kind]}
    message = f"Expected floating-point parameters, got {kind} at 'odd'"
    with pytest.raises(ValueError, match=message):
        surgery.task_value_and_grad(lambda params: params["kernel"])(params)
    fn = surgery.per_task_value_and_grad(lambda params, scale: scale * params["kernel"].sum())
    with pytest.raises(ValueError, match=message):
        fn(params, jnp.ones(3))


def test_a_surgery_that_does_not_look_costs_no_pass_and_one_that_looks_sometimes_leaks_nothing():
    calls = []

    def look(gramian):
        calls.append(1)
        return gramian

    def rule(tasks, state):
        looked = jax.lax.cond(tasks.step > 0, lambda: tasks.gramian[0], lambda: tasks.gramian[1])
        return looked + look(tasks.gramian)[2], state

    both = surgery.gradient_surgery(surgery.Weighting(tuple, rule), name="both")
    every = surgery.every(surgery.every(surgery.pcgrad(), 2, NUM_TASKS), 3, NUM_TASKS)
    task_grads = jax.jacrev(losses_fn)(PARAMS, INPUTS)
    for tx in (both, every, surgery.on_nonfinite(every, "mask"), surgery.start_after(both, 1)):
        step = jax.jit(surgery.surgery_value_and_grad(losses_fn, tx))
        state = stacked_state = tx.init(PARAMS)
        with jax.check_tracer_leaks():
            for _ in range(2):
                (losses, grads), state = step(PARAMS, state, INPUTS)
                expected, stacked_state = tx.update(
                    task_grads, stacked_state, PARAMS, losses=losses
                )
                assert_close(grads, expected)
    assert calls


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


def test_keyword_arguments_are_shared_by_tasks_with_data_of_their_own():
    def loss_fn(params, inputs, *, scale, mode):
        assert mode == "plain"
        return (scale * inputs * params).sum()

    fn = surgery.per_task_value_and_grad(loss_fn)
    inputs, scale = jnp.arange(6.0).reshape(3, 2), jnp.array([1.0, 2.0])
    losses, _ = fn(jnp.ones(2), inputs, scale=scale, mode="plain")
    np.testing.assert_allclose(losses, (inputs * scale[None, :]).sum(axis=1))


ONES = {"x": jnp.ones((3, 2)), "y": [jnp.ones(3)]}
BAD_DATA = {
    "another size": (
        (ONES, jnp.ones(4)),
        "axis of 3 tasks as at 'args/0/x', got one of 4 at 'args/1'",
    ),
    "another size within": (
        ({**ONES, "y": [jnp.ones(2)]},),
        "axis of 3 tasks as at 'args/0/x', got one of 2 at 'args/0/y/0'",
    ),
    "a number": ((ONES, 2.0), "leading axis of T >= 1 tasks, got float32 at 'args/1'"),
    "a flag": ((ONES, "train"), "leading axis of T >= 1 tasks, got a str at 'args/1'"),
    "a scalar": ((ONES, jnp.ones(())), r"T >= 1 tasks, got shape \(\) at 'args/1'"),
    "no task": ((jnp.ones((0, 2)),), r"T >= 1 tasks, got shape \(0, 2\) at 'args/0'"),
    "nothing": ((), "Expected positional arguments with a leading axis of T tasks, got none"),
}


@pytest.mark.parametrize("kind", BAD_DATA)
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_data_without_one_axis_of_tasks_is_refused(kind, chunk_size):
    args, message = BAD_DATA[kind]
    fn = surgery.per_task_value_and_grad(lambda params, *data: params.sum(), chunk_size=chunk_size)
    with pytest.raises(ValueError, match=message):
        fn(jnp.ones(2), *args)


BAD_LOSS = {
    "a pair": (lambda params, data: (params.sum(), data), "a scalar, got a tuple at 'loss'"),
    "a vector": (lambda params, data: params, r"a scalar, got shape \(2,\) at 'loss'"),
    "an integer": (lambda params, data: 3, "floating-point losses, got int32"),
}


@pytest.mark.parametrize("kind", BAD_LOSS)
def test_a_loss_of_one_task_that_is_no_scalar_is_refused(kind):
    loss_fn, message = BAD_LOSS[kind]
    with pytest.raises(ValueError, match=message):
        surgery.per_task_value_and_grad(loss_fn)(jnp.ones(2), jnp.ones(3))


WRONG_ARGUMENTS = {
    "chunk_size=0": (
        lambda: surgery.task_value_and_grad(losses_fn, chunk_size=0),
        r"an integer in \[1, inf\), got 0 at 'chunk_size'.*losses_fn, chunk_size=1\)`",
    ),
    "chunk_size=-1": (
        lambda: surgery.per_task_value_and_grad(losses_fn, chunk_size=-1),
        r"an integer in \[1, inf\), got -1 at 'chunk_size'.*loss_fn, chunk_size=1\)`",
    ),
    "spmd_axis_name": (
        lambda: surgery.per_task_value_and_grad(losses_fn, spmd_axis_name=3),
        "the name of an axis, got 3 at 'spmd_axis_name'",
    ),
    "spmd_axis_name for a surgery": (
        lambda: surgery.per_task_surgery_value_and_grad(
            losses_fn, surgery.mean(), spmd_axis_name=("chips", None)
        ),
        r"the name of an axis, got \('chips', None\) at 'spmd_axis_name'",
    ),
    "chunk_size for has_aux": (
        lambda: surgery.task_value_and_grad(losses_fn, 4),
        r"True or False, got 4 at 'has_aux'. Make it `task_value_and_grad\(losses_fn, has_aux=F",
    ),
    "heads": (
        lambda: surgery.feature_surgery_value_and_grad(
            encode, task_losses, surgery.mean(), heads="wieghted"
        ),
        "one of 'sum', 'weighted', got 'wieghted' at 'heads'",
    ),
    "no function": (
        lambda: surgery.task_value_and_grad(losses_fn(PARAMS, INPUTS)),
        "a function, got an array of shape .* at 'losses_fn'",
    ),
    "swapped": (
        lambda: surgery.surgery_value_and_grad(surgery.mean(), losses_fn),
        "a function, got Surgery at 'losses_fn'",
    ),
    "a chain with the optimiser": (
        lambda: surgery.surgery_value_and_grad(
            losses_fn, optax.chain(surgery.mean(), optax.sgd(0.1))
        ),
        "a surgery, got .* at 'surgery'. The optimiser takes the gradients that come back",
    ),
    "an uncalled surgery": (
        lambda: surgery.surgery_value_and_grad(losses_fn, surgery.pcgrad),
        r"a surgery, got the function pcgrad at 'surgery'. Call it: `pcgrad\(\)`",
    ),
    "text": (
        lambda: surgery.feature_surgery_value_and_grad(encode, task_losses, "pcgrad"),
        "a surgery, got 'pcgrad' at 'surgery'",
    ),
}


@pytest.mark.parametrize("kind", WRONG_ARGUMENTS)
def test_wrong_arguments_are_refused_at_once(kind):
    make, message = WRONG_ARGUMENTS[kind]
    with pytest.raises(ValueError, match=f"Expected {message}"):
        make()


def assert_streamed_is_stacked(case, dtype, tolerance):
    params, inputs = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), (PARAMS, INPUTS))
    tx = case.surgery(NUM_TASKS)
    state = tx.init(params)
    fn = jax.jit(surgery.surgery_value_and_grad(losses_fn, tx))
    (losses, grads), new_state = fn(params, state, inputs)
    task_grads = jax.jacrev(losses_fn)(params, inputs)
    expected, expected_state = tx.update(task_grads, state, params, losses=losses)
    assert_close(grads, expected, tolerance)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4),
        new_state,
        expected_state,
    )


@every_case
def test_the_streamed_update_is_the_stacked_one(case):
    if case.coordinates or case.needs_gramian:
        tx = case.surgery(NUM_TASKS)
        message = "Expected stacked gradients alone, got a Gramian"
        if case.needs_gramian:
            message = "Expected the Gramian of two batches, from the caller, got that of one batch"
        with pytest.raises(ValueError, match=message):
            surgery.surgery_value_and_grad(losses_fn, tx)(PARAMS, tx.init(PARAMS), INPUTS)
        return
    with jax.enable_x64(True):
        assert_streamed_is_stacked(case, jnp.float64, 10 * case.tolerance_x64)


@pytest.mark.parametrize("name", ["pcgrad", "aligned_mtl", "mgda", "famo"])
def test_the_streamed_update_is_the_stacked_one_in_float32(name):
    assert_streamed_is_stacked(METHODS[name], jnp.float32, 10 * METHODS[name].tolerance)


SHARED = {
    "a path": "trunk",
    "paths": ["trunk/kernel", "trunk/bias"],
    "a boolean per leaf": [False] * NUM_TASKS + [True, True],
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
    (_, grads), _ = fn(PARAMS, tx.init(PARAMS), INPUTS, extra_args={"task_mask": mask})
    task_grads = jax.jacrev(losses_fn)(PARAMS, INPUTS)
    expected, _ = tx.update(task_grads["trunk"], tx.init(None), task_mask=mask)
    assert_close(grads["trunk"], expected)
    np.testing.assert_array_equal(grads["heads"][1], 0)
    assert np.abs(grads["heads"][0]).max() > 0


def test_aux_and_a_monitor():
    tx = surgery.monitor(NUM_TASKS, surgery.pcgrad())

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


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("take_apart", ["unstack", "split"])
def test_parts_of_stacked_outputs_are_told_apart(take_apart, axis):
    def losses_fn(params):
        outputs = jnp.stack([params["trunk"] * params["first"], params["trunk"] * params["second"]])
        parts = jnp.unstack(outputs, axis=axis)
        if take_apart == "split":
            parts = jnp.split(outputs, outputs.shape[axis], axis=axis)
        return [jnp.sum(part**2) for part in parts]

    params = {name: jnp.ones(3) for name in ("trunk", "first", "second")}
    found = surgery.infer_shared(losses_fn, params)
    assert found == {"trunk": True, "first": axis == 1, "second": axis == 1}


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
    "a scalar": (
        lambda params, inputs: losses_fn(params, inputs).sum(),
        r"got shape \(\) at 'losses'",
    ),
    "a matrix": (lambda params, inputs: jnp.ones((2, 2)), r"got shape \(2, 2\) at 'losses'"),
    "a tree with a vector": (
        lambda params, inputs: {"a": jnp.ones(()), "b": jnp.ones(3)},
        r"got shape \(3,\) at 'losses/b'",
    ),
    "integers": (lambda params, inputs: jnp.arange(3), r"floating-point losses, got int32"),
    "an empty array": (lambda params, inputs: jnp.zeros(0), "at least one loss, got none"),
    "an empty tree": (lambda params, inputs: {}, "at least one loss, got none"),
    "text": (lambda params, inputs: "text", "got a str at 'losses'"),
    "a tree with text": (
        lambda params, inputs: (jnp.ones(()), "text"),
        "got a str at 'losses/1'",
    ),
    "an array and aux": (
        lambda params, inputs: (losses_fn(params, inputs), {"accuracy": jnp.ones(())}),
        "Expected losses alone, got a pair of losses and something else at 'losses'",
    ),
    "a dict and aux": (
        lambda params, inputs: ({"fit": inputs.sum()}, {"accuracy": jnp.ones(())}),
        "Expected losses alone, got a pair of losses and something else at 'losses'",
    ),
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
    with pytest.raises(ValueError, match=r"Expected a choice that holds a leaf.*trunk/kernel"):
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


def test_features_that_are_not_real_are_refused():
    def encode(trunk, inputs):
        return {"hidden": inputs @ trunk["kernel"], "present": inputs > 0}

    fn = surgery.feature_surgery_value_and_grad(encode, task_losses, surgery.mean())
    with pytest.raises(ValueError, match=r"real floating-point features, got bool at 'present'"):
        fn(PARAMS["trunk"], PARAMS["heads"], surgery.mean().init(None), INPUTS)


def test_static_arguments_and_shapes_may_stand_beside_each_other_where_the_program_is_read():
    def losses_fn(params, kind, batch):
        assert kind == "sums"
        shared = params["trunk"].sum() * batch["inputs"].sum()
        return [shared + params["head"] if batch["flag"] else shared, shared]

    batch = {"inputs": jax.ShapeDtypeStruct((3,), jnp.float32), "flag": True, "rest": None}
    params = {"trunk": jax.ShapeDtypeStruct((2,), jnp.float32), "head": jnp.ones(())}
    found = surgery.infer_shared(losses_fn, params, "sums", batch=batch)
    assert found == {"trunk": True, "head": False}


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
def test_an_exact_update_takes_no_more_memory_than_the_stack(make_losses, num_tasks):
    losses_fn, params = make_losses(num_tasks)
    tx = surgery.pcgrad()

    def memory(fn, *args):
        analysis = jax.jit(fn).lower(*args).compile().memory_analysis()
        return analysis.temp_size_in_bytes + analysis.output_size_in_bytes

    def by_stack(params, state):
        _, task_grads = surgery.task_value_and_grad(losses_fn)(params)
        return tx.update(task_grads, state, params)

    state = tx.init(params)
    stacked = memory(by_stack, params, state)
    exact = memory(surgery.surgery_value_and_grad(losses_fn, tx), params, state)
    assert exact <= 1.02 * stacked
    if make_losses is deep_losses:  # whose matrices have more rows than go in
        assert exact < 0.3 * stacked


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
