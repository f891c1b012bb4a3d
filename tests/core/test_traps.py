"""Every known trap of surgeries in optax, one test each.

A trap is made to work, or is an error of ours that says what to do. Where optax alone decides,
what it does is shown, so that a change of optax is noticed, and the way around it is tested.
docs/traps.md lists the ways around.
"""

import inspect
import pickle

import flax.errors
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from flax.training.train_state import TrainState
from optax.experimental import aggregating

import optax_surgery as surgery
from optax_surgery.flax import SurgeryTrainState
from tests.common import described, same, task_gradients

T = 3
PARAMS = {"trunk": {"kernel": jnp.ones((5, 4)), "bias": jnp.ones(4)}, "head": jnp.ones(4)}
GRADS = task_gradients(T, params=PARAMS)
LOSSES = jnp.array([1.0, 2.0, 3.0])
SHARED = {"trunk": True, "head": False}
NOT_SHARED = {"trunk": False, "head": True}
STACKED = r"Expected an update of shape \(4,\), got shape \(3, 4\) at "


@pytest.fixture(autouse=True)
def _broadcasting_as_users_have_it():
    with jax.numpy_rank_promotion("allow"):
        yield


def target(params):
    """Losses of three tasks that share all parameters."""
    flat = jnp.concatenate([params["trunk"]["kernel"].ravel(), params["trunk"]["bias"]])
    return jnp.array([1.0, 2.0, 3.0]) + jnp.stack(
        [jnp.mean((flat - task) ** 2) + jnp.mean(params["head"] ** 2) for task in range(T)]
    )


def pcgrad_update(task_grads=GRADS, params=PARAMS):
    tx = surgery.pcgrad()
    return tx.update(task_grads, tx.init(params), params)[0]


def after_surgery(tx, params=PARAMS, task_grads=GRADS, **extra_args):
    """One update of an optimiser that is given what PCGrad makes of the gradients."""
    tx = optax.with_extra_args_support(tx)
    update = jax.jit(lambda *args: tx.update(*args, **extra_args))
    return update(pcgrad_update(task_grads, params), tx.init(params), params)[0]


def first_update(tx, task_grads=GRADS, params=PARAMS, jit=True, **extra_args):
    def update(task_grads, state, params):
        return tx.update(task_grads, state, params, **extra_args)

    return (jax.jit(update) if jit else update)(task_grads, tx.init(params), params)[0]


def assert_close(left, right, atol=1e-5):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol), left, right)


def is_stacked(updates):
    return jax.tree.leaves(updates)[0].ndim > jax.tree.leaves(PARAMS)[0].ndim


def micro_batches(k, seed=0):
    return [task_gradients(T, seed=seed + step, params=PARAMS) for step in range(k)]


def mean_of(batches):
    return jax.tree.map(lambda *leaves: sum(leaves) / len(leaves), *batches)


def with_nan(task_grads, task=1):
    return jax.tree.map(lambda leaf: leaf.at[task].set(jnp.nan), task_grads)


# chain(surgery, optimiser)

OPTIMISERS = {
    "adam": lambda: optax.adam(1e-2),
    "adamw": lambda: optax.adamw(1e-2),
    "sgd": lambda: optax.sgd(1e-2, momentum=0.9),
    "lamb": lambda: optax.lamb(1e-2),
    "adafactor": lambda: optax.adafactor(1e-2),
    "muon": lambda: optax.contrib.muon(1e-2),
    "prodigy": lambda: optax.contrib.prodigy(),
    "dadapt": lambda: optax.contrib.dadapt_adamw(),
    "momo": lambda: optax.contrib.momo(),
    "galore": lambda: optax.contrib.galore(1e-2, rank=2),
    "polyak": lambda: optax.polyak_sgd(),
    "schedule_free": lambda: optax.contrib.schedule_free_sgd(1e-2),
    "lbfgs": lambda: optax.lbfgs(1e-2, linesearch=None),
}


@pytest.mark.parametrize("name", OPTIMISERS)
def test_chain_of_surgery_and_optimiser(name):
    tx, value = OPTIMISERS[name](), jnp.sum(LOSSES)
    chain = optax.chain(surgery.pcgrad(), tx)
    updates = first_update(chain, value=value, losses=LOSSES)
    assert_close(updates, after_surgery(tx, value=value))


# The surgery is forgotten


def test_forgotten_surgery_in_plain_jax():
    adam = optax.adam(1e-2)
    updates, _ = adam.update(GRADS, adam.init(PARAMS), PARAMS)
    assert is_stacked(optax.apply_updates(PARAMS, updates))
    with pytest.raises(ValueError, match=STACKED + "'head'. Combine the gradients"):
        surgery.apply_updates(PARAMS, updates)


def test_forgotten_surgery_in_a_train_state():
    create = {"apply_fn": None, "params": PARAMS, "tx": optax.adam(1e-2)}
    assert is_stacked(TrainState.create(**create).apply_gradients(grads=GRADS).params)
    with pytest.raises(ValueError, match=STACKED + "'head'. Combine the gradients"):
        SurgeryTrainState.create(**create).apply_gradients(grads=GRADS)


class Model(nnx.Module):
    """A linear model of three tasks."""

    def __init__(self):
        self.linear = nnx.Linear(5, T, rngs=nnx.Rngs(0))

    def __call__(self, inputs):
        return self.linear(inputs)


INPUTS = jax.random.normal(jax.random.key(0), (8, 5))


def nnx_losses(model):
    return jnp.mean((model(INPUTS) - 1) ** 2, axis=0)


def nnx_task_grads(model):
    graph, params = nnx.split(model)
    return jax.jacrev(lambda params: nnx_losses(nnx.merge(graph, params)))(params)


def test_forgotten_surgery_in_an_nnx_optimizer():
    adam, fixed = optax.adam(1e-2), optax.chain(surgery.mean(), optax.adam(1e-2))
    for tx, shape in [(adam, (T, 5, T)), (fixed, (5, T))]:
        model = Model()
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        optimizer.update(model, nnx_task_grads(model))
        assert model.linear.kernel[...].shape == shape


# Gradients that are not stacked


def test_unstacked_gradients_whose_leaves_share_a_dimension():
    params = {"a": jnp.ones((4, 2)), "b": jnp.ones(4)}
    tx = surgery.pcgrad()
    tx.update(params, tx.init(params))  # nothing tells them from four tasks
    with pytest.raises(ValueError, match=r"Expected task gradients of shape \(T, 4, 2\)"):
        tx.update(params, tx.init(params), params)


def test_a_list_of_gradient_trees():
    task_grads = [jax.tree.map(lambda leaf, t=task: leaf[t], GRADS) for task in range(T)]
    tx = surgery.pcgrad()
    with pytest.raises(ValueError, match=r"Expected one tree .* Stack them, `jax.tree.map"):
        tx.update(task_grads, tx.init(PARAMS), PARAMS)
    stacked = jax.tree.map(lambda *grads: jnp.stack(grads), *task_grads)
    assert same(first_update(tx, stacked), first_update(tx))


@pytest.mark.parametrize("jit", [False, True])
def test_numpy_gradients(jit):
    task_grads = jax.tree.map(np.asarray, GRADS)
    chain = optax.chain(surgery.normalize_tasks(surgery.pcgrad()), optax.adam(1e-2))
    tx = surgery.on_nonfinite(surgery.accumulate(chain, 1, T))
    numpy = first_update(tx, task_grads, jit=jit, losses=np.asarray(LOSSES))
    assert_close(numpy, first_update(tx, losses=LOSSES))


# Accumulation


def run(tx, batches, **extra_args):
    state, history = tx.init(PARAMS), []
    for task_grads in batches:
        updates, state = tx.update(task_grads, state, PARAMS, **extra_args)
        history.append(updates)
    return history, state


def test_multi_steps_around_a_surgery():
    chain = optax.chain(surgery.pcgrad(), optax.adam(1e-2))
    multi_steps = optax.MultiSteps(chain, 2)
    with pytest.raises((TypeError, ValueError)):
        jax.jit(multi_steps.update)(GRADS, multi_steps.init(PARAMS), PARAMS)

    batches = micro_batches(2)
    history, _ = run(surgery.accumulate(chain, 2, T), batches)
    assert_close(history[0], optax.tree.zeros_like(PARAMS))
    assert_close(history[1], first_update(chain, mean_of(batches)))


def test_multi_steps_with_room_for_the_stack_operates_on_every_micro_batch():
    calls = []

    def count(task_updates, state, params=None, **extra_args):
        jax.debug.callback(lambda: calls.append(1))
        return surgery.pcgrad().update(task_updates, state, params)

    counted = optax.GradientTransformationExtraArgs(surgery.pcgrad().init, count)
    chain, batches = optax.chain(counted, optax.sgd(0.1)), micro_batches(4)
    multi_steps = optax.MultiSteps(chain, 4)
    state = multi_steps.init(PARAMS)
    state = state._replace(acc_grads=optax.tree.zeros_like(GRADS))
    step = jax.jit(multi_steps.update)
    for task_grads in batches:
        updates, state = step(task_grads, state, PARAMS)
    jax.effects_barrier()
    assert len(calls) == 4

    calls.clear()
    tx = surgery.accumulate(chain, 4, T)
    state, step = tx.init(PARAMS), jax.jit(tx.update)
    for task_grads in batches:
        ours, state = step(task_grads, state, PARAMS)
    jax.effects_barrier()
    assert len(calls) == 1
    assert_close(ours, updates)


def test_accumulation_after_the_surgery_is_another_algorithm():
    batches = micro_batches(2)
    after = optax.MultiSteps(optax.sgd(1.0), 2).gradient_transformation()
    history, _ = run(optax.chain(surgery.pcgrad(), after), batches)
    one_batch = first_update(optax.chain(surgery.pcgrad(), optax.sgd(1.0)), mean_of(batches))
    difference = optax.tree.norm(optax.tree.sub(history[-1], one_batch))
    assert difference > 0.01 * optax.tree.norm(one_batch)
    ours, _ = run(surgery.accumulate(optax.chain(surgery.pcgrad(), optax.sgd(1.0)), 2, T), batches)
    assert_close(ours[-1], one_batch)


def test_accumulation_in_process():
    batches = micro_batches(4)
    tx = aggregating.process(
        optax.identity(), surgery.accumulate(surgery.pcgrad(), 2, T), optax.adam(1e-2)
    )
    state, step = tx.init(PARAMS), jax.jit(tx.update)
    expected_chain = optax.chain(surgery.pcgrad(), optax.adam(1e-2))
    expected_state = expected_chain.init(PARAMS)
    for number, task_grads in enumerate(batches):
        updates, new_state = step(task_grads, state, PARAMS)
        assert described(new_state) == described(state)
        state = new_state
        if number % 2:
            mean = mean_of(batches[number - 1 : number + 1])
            expected, expected_state = expected_chain.update(mean, expected_state, PARAMS)
            assert_close(updates, expected)
        else:
            assert_close(updates, optax.tree.zeros_like(PARAMS))
    assert optax.tree.get(state, "count") == 2  # Adam rests where nothing is ready


def test_extra_arguments_in_process():
    famo, plain = surgery.famo(T), optax.with_extra_args_support
    tx = aggregating.process(optax.identity(), famo, optax.sgd(1.0))
    with pytest.raises(TypeError):
        first_update(tx, losses=LOSSES)
    tx = aggregating.process(plain(optax.identity()), famo, plain(optax.sgd(1.0)))
    expected = first_update(optax.chain(famo, optax.sgd(1.0)), losses=LOSSES)
    assert_close(first_update(tx, losses=LOSSES), expected)


# What is not finite


def test_apply_if_finite():
    adam = optax.adam(1e-2)
    with pytest.raises((TypeError, ValueError)):
        first_update(optax.apply_if_finite(optax.chain(surgery.pcgrad(), adam), 5))
    after = optax.chain(surgery.pcgrad(), optax.apply_if_finite(adam, 5))
    assert_close(first_update(after), after_surgery(adam))
    ours = surgery.on_nonfinite(optax.chain(surgery.pcgrad(), adam), "skip")
    assert_close(first_update(ours), after_surgery(adam))
    assert_close(first_update(ours, with_nan(GRADS)), optax.tree.zeros_like(PARAMS))


def test_one_undefined_gradient_in_a_surgery_with_a_memory():
    batches = micro_batches(4)
    batches[1] = with_nan(batches[1])
    chain = optax.chain(surgery.moco(T), optax.apply_if_finite(optax.adam(1e-2), 100))
    history, _ = run(chain, batches)
    for frozen in history[1:]:
        assert_close(frozen, optax.tree.zeros_like(PARAMS))

    ours, state = run(surgery.on_nonfinite(optax.chain(surgery.moco(T), optax.adam(1e-2))), batches)
    for updates in ours:
        assert optax.tree.norm(updates) > 0.01
    assert state.nonfinite_steps == 1


def test_predicates_that_skip_updates():
    """They judge the update where they come after the surgery, and not the stack."""

    def skip_large(updates, step, params):
        return optax.skip_large_updates(updates, step, params, max_squared_norm=1.0)

    for predicate, bad in [(optax.skip_not_finite, jnp.nan), (skip_large, 1e3)]:
        after = optax.MultiSteps(optax.sgd(1.0), 1, should_skip_update_fn=predicate)
        tx = optax.chain(surgery.mean(), after.gradient_transformation())
        good = jax.tree.map(lambda leaf: 0.1 * leaf, GRADS)
        history, _ = run(tx, [good, jax.tree.map(lambda leaf, by=bad: leaf * by, GRADS)])
        assert optax.tree.norm(history[0]) > 0
        assert_close(history[1], optax.tree.zeros_like(PARAMS))


def test_conditional_transformations():
    adam = optax.adam(1e-2)
    for conditionally in (optax.conditionally_transform, optax.conditionally_mask):
        with pytest.raises((TypeError, ValueError)):
            first_update(conditionally(optax.chain(surgery.pcgrad(), adam), lambda step: step > 0))
        after = conditionally(adam, lambda step: step >= 0)
        assert_close(first_update(optax.chain(surgery.pcgrad(), after)), after_surgery(adam))
    late = optax.chain(surgery.start_after(surgery.pcgrad(), 0), adam)
    assert_close(first_update(late), after_surgery(adam))
    early = optax.chain(surgery.start_after(surgery.pcgrad(), 1), adam)
    assert_close(first_update(early), first_update(optax.chain(surgery.mean(), adam)))


# Some of the leaves


def shared_and_summed():
    return {
        "trunk": pcgrad_update(GRADS["trunk"], PARAMS["trunk"]),
        "head": GRADS["head"].sum(axis=0),
    }


def test_masked():
    masked = optax.chain(optax.masked(surgery.pcgrad(), SHARED), optax.sgd(1.0))
    updates, _ = masked.update(GRADS, masked.init(PARAMS), PARAMS)
    assert updates["head"].shape == (T, 4)
    with pytest.raises(ValueError, match=STACKED + "'head'"):
        surgery.apply_updates(PARAMS, updates)

    assert_close(first_update(surgery.on_shared(surgery.pcgrad(), SHARED)), shared_and_summed())
    both = optax.chain(
        optax.masked(surgery.pcgrad(), SHARED), optax.masked(surgery.sum(), NOT_SHARED)
    )
    assert_close(first_update(both), shared_and_summed())


def test_labels_from_shapes():
    """A function of the leaves sees parameters in `init`, and stacked gradients in `update`."""

    def by_shape(tree):
        return jax.tree.map(lambda leaf: "matrix" if leaf.ndim == 2 else "vector", tree)

    def by_path(tree):
        return jax.tree.map_with_path(
            lambda path, _: "matrix" if "kernel" in str(path) else "vector", tree
        )

    groups = {"matrix": surgery.pcgrad(), "vector": surgery.sum()}
    updates = first_update(optax.partition(groups, by_path))
    kernel = {"kernel": GRADS["trunk"]["kernel"]}
    assert_close(updates["trunk"]["kernel"], pcgrad_update(kernel, None)["kernel"])
    assert_close(updates["head"], GRADS["head"].sum(axis=0))
    silent = first_update(optax.partition(groups, by_shape))  # the groups are other ones
    assert not np.allclose(silent["trunk"]["kernel"], updates["trunk"]["kernel"])
    with pytest.raises((TypeError, ValueError)):
        first_update(optax.partition(groups | {"matrix": surgery.moco(T)}, by_shape))

    assert_close(first_update(optax.partition(groups, by_shape(PARAMS))), updates)
    ours = surgery.on_shared(surgery.pcgrad(), lambda path: path.endswith("kernel"))
    assert_close(first_update(ours), updates)


def test_partition():
    tx = optax.partition(
        {
            "trunk": optax.chain(surgery.famo(T), optax.sgd(1.0)),
            "head": optax.chain(surgery.sum(), optax.sgd(1.0)),
        },
        {"trunk": "trunk", "head": "head"},
    )
    updates = first_update(tx, losses=LOSSES)
    famo, _ = surgery.famo(T).update(
        GRADS["trunk"], surgery.famo(T).init(PARAMS["trunk"]), losses=LOSSES
    )
    assert_close(updates["trunk"], jax.tree.map(jnp.negative, famo))
    assert_close(updates["head"], -GRADS["head"].sum(axis=0))


FROZEN_HEAD = {
    "summed, then set to zero, in a partition": lambda: optax.partition(
        {"trunk": surgery.pcgrad(), "head": optax.chain(surgery.sum(), optax.set_to_zero())},
        {"trunk": "trunk", "head": "head"},
    ),
    "frozen before": lambda: optax.chain(optax.freeze(NOT_SHARED), surgery.pcgrad()),
    "frozen after": lambda: optax.chain(
        surgery.on_shared(surgery.pcgrad(), SHARED), optax.freeze(NOT_SHARED)
    ),
}


def test_frozen_leaves():
    silent = {
        "set_to_zero": optax.partition(
            {"trunk": surgery.pcgrad(), "head": optax.set_to_zero()},
            {"trunk": "trunk", "head": "head"},
        ),
        "selective_transform": optax.selective_transform(surgery.pcgrad(), freeze_mask=NOT_SHARED),
    }
    for tx in silent.values():
        updates, _ = tx.update(GRADS, tx.init(PARAMS), PARAMS)
        assert updates["head"].shape == (T, 4)
        with pytest.raises(ValueError, match=STACKED + "'head'"):
            surgery.apply_updates(PARAMS, updates)
    for make in FROZEN_HEAD.values():
        updates = first_update(make())
        assert_close(updates["trunk"], shared_and_summed()["trunk"])
        assert_close(updates["head"], jnp.zeros(4))


# inject_hyperparams


def test_inject_hyperparams_with_a_number_of_tasks():
    with pytest.raises((TypeError, ValueError, jax.errors.JAXTypeError)):
        first_update(optax.inject_hyperparams(surgery.famo)(num_tasks=T), losses=LOSSES)
    make = optax.inject_hyperparams(surgery.famo, static_args="num_tasks")
    expected = first_update(surgery.famo(T), losses=LOSSES)
    assert_close(first_update(make(num_tasks=T), losses=LOSSES), expected)


def numbers_of(method):
    """The arguments whose default is a float."""
    arguments = inspect.signature(method).parameters.values()
    return {each.name: each.default for each in arguments if isinstance(each.default, float)}


def methods_with_numbers():
    return [
        getattr(surgery, name)
        for name in dir(surgery)
        if getattr(getattr(surgery, name), "__module__", "").startswith("optax_surgery.methods.")
        and numbers_of(getattr(surgery, name))
    ]


REQUIRED = {  # what methods ask for by name
    "num_tasks": T,
    "weights": LOSSES,
    "preference": LOSSES,
    "scores": LOSSES,
    "temperature": 0.5,
    "num_byzantine": 0,
    "num_trimmed": 1,
    "num_groups": 2,
    "window": 1,
    "primary": 0,
    "residual": 0,
    "inner": surgery.ntkmtl(),
}


@pytest.mark.parametrize("method", methods_with_numbers(), ids=lambda method: method.__name__)
def test_inject_hyperparams_with_numbers_under_jit(method):
    """They are injected, as schedules of them would be; the other arguments are static."""
    numbers = numbers_of(method)
    arguments = inspect.signature(method).parameters.values()
    required = {
        other.name: REQUIRED[other.name]
        for other in arguments
        if other.default is inspect.Parameter.empty
    }
    static = [other.name for other in arguments if other.name not in numbers]
    extra = {"losses": LOSSES}
    if method in (surgery.modo, surgery.sdmgrad):
        extra["gramian"] = surgery.gramian(GRADS)
    make = optax.inject_hyperparams(method, static_args=static)
    injected = make(**required, **numbers)
    assert numbers.keys() <= injected.init(PARAMS).hyperparams.keys()
    assert_close(first_update(injected, **extra), first_update(method(**required), **extra))


def test_inject_hyperparams_around_a_chain():
    def make(learning_rate, weights):
        return optax.chain(surgery.constant(weights), optax.sgd(learning_rate))

    tx = optax.inject_hyperparams(make)(learning_rate=0.5, weights=LOSSES)
    expected = jax.tree.map(lambda leaf: -0.5 * jnp.tensordot(LOSSES, leaf, 1), GRADS)
    assert_close(first_update(tx, losses=LOSSES), expected)

    low = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), (GRADS, PARAMS))
    updates = first_update(tx, *low)
    assert described(updates) == described(low[1])
    assert_close(jax.tree.map(jnp.float32, updates), expected, atol=0.1)


# Extra arguments


CONTAINERS = {
    "chain": lambda tx: optax.chain(tx, optax.sgd(1.0)),
    "named_chain": lambda tx: optax.named_chain(("surgery", tx), ("sgd", optax.sgd(1.0))),
    "partition": lambda tx: optax.partition({"all": optax.chain(tx, optax.sgd(1.0))}, "all"),
    "masked": lambda tx: optax.chain(optax.masked(tx, True), optax.sgd(1.0)),
    "inject_hyperparams": lambda tx: optax.inject_hyperparams(
        lambda rate: optax.chain(tx, optax.sgd(rate))
    )(1.0),
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_extra_arguments_pass_through(name):
    expected, _ = surgery.famo(T).update(GRADS, surgery.famo(T).init(PARAMS), losses=LOSSES)
    updates = first_update(CONTAINERS[name](surgery.famo(T)), losses=LOSSES, colour="red")
    assert_close(updates, jax.tree.map(jnp.negative, expected))


def test_reduce_on_plateau_takes_a_scalar_beside_the_losses():
    tx = optax.chain(surgery.famo(T), optax.sgd(1.0), optax.contrib.reduce_on_plateau())
    updates = first_update(tx, losses=LOSSES, value=jnp.sum(LOSSES))
    expected = first_update(optax.chain(surgery.famo(T), optax.sgd(1.0)), losses=LOSSES)
    assert_close(updates, expected)


def test_a_linen_train_state_with_losses():
    tx = optax.chain(surgery.famo(T), optax.sgd(1.0))
    create = {"apply_fn": None, "params": PARAMS, "tx": tx}
    with pytest.raises((TypeError, ValueError), match="losses"):
        TrainState.create(**create).apply_gradients(grads=GRADS, losses=LOSSES)
    state = SurgeryTrainState.create(**create).apply_gradients(grads=GRADS, losses=LOSSES)
    assert_close(state.params, optax.apply_updates(PARAMS, first_update(tx, losses=LOSSES)))


def test_nnx_with_every_way_to_stack():
    """jacrev over a split state, `jax.vmap(nnx.grad)` and `nnx.vmap(nnx.grad)` over tasks."""

    def loss_fn(model, task):
        return nnx_losses(model)[task]

    def step(model, optimizer, stack):
        optimizer.update(model, stack(model), losses=nnx_losses(model))

    tasks = jnp.arange(T)
    stacks = {
        "jacrev": nnx_task_grads,
        "nnx": lambda model: nnx.vmap(nnx.grad(loss_fn), in_axes=(None, 0))(model, tasks),
        "jax": lambda model: jax.vmap(nnx.grad(loss_fn), in_axes=(None, 0))(model, tasks),
    }
    results = []
    for stack in stacks.values():
        model = Model()
        tx = optax.chain(surgery.famo(T), optax.adam(1e-2))
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        nnx.jit(step, static_argnums=2)(model, optimizer, stack)
        results.append(nnx.to_pure_dict(nnx.state(model)))
    assert_close(results[0], results[1])
    assert_close(results[0], results[2])


# Transformations before the surgery


@pytest.mark.parametrize(
    "make", [lambda: optax.trace(0.9), lambda: optax.ema(0.9), optax.scale_by_adam]
)
def test_momentum_before_the_surgery(make):
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *micro_batches(3))

    def train(tx):
        def step(state, task_grads):
            return tx.update(task_grads, state, PARAMS)[::-1]

        return jax.lax.scan(step, tx.init(PARAMS), stacked)[1]

    with pytest.raises(TypeError):
        train(optax.chain(make(), surgery.pcgrad()))
    updates = train(optax.chain(surgery.per_task(make(), T), surgery.pcgrad()))
    assert updates["head"].shape == (3, 4)


def rows(tree):
    return np.concatenate([np.reshape(leaf, (T, -1)) for leaf in jax.tree.leaves(tree)], axis=1)


def test_clipping_before_the_surgery():
    clip = optax.clip_by_global_norm(1.0)
    joint, _ = clip.update(GRADS, clip.init(PARAMS))
    assert (np.linalg.norm(rows(joint), axis=1) < 0.9).all()
    each, _ = surgery.per_task(clip, T).update(GRADS, surgery.per_task(clip, T).init(PARAMS))
    np.testing.assert_allclose(np.linalg.norm(rows(each), axis=1), np.ones(T), rtol=1e-5)


def test_centralize_before_the_surgery():
    """It takes a stack of vectors for a matrix, and a stack of matrices for a larger kernel."""
    centralize = optax.centralize()
    per_task = surgery.per_task(centralize, T)
    stacked, _ = centralize.update(GRADS, centralize.init(PARAMS), PARAMS)
    np.testing.assert_allclose(stacked["head"].sum(axis=1), np.zeros(T), atol=1e-5)
    each, _ = per_task.update(GRADS, per_task.init(PARAMS), PARAMS)
    assert_close(each["head"], GRADS["head"])  # a vector is not centralised
    own, _ = centralize.update(jax.tree.map(lambda leaf: leaf[1], GRADS), centralize.init(PARAMS))
    assert_close(jax.tree.map(lambda leaf: leaf[1], each), own)
    assert not np.allclose(stacked["trunk"]["kernel"], each["trunk"]["kernel"])


def test_adaptive_clipping_before_the_surgery():
    clip = optax.adaptive_grad_clip(0.1)
    with pytest.raises((TypeError, ValueError)):
        first_update(optax.chain(clip, surgery.pcgrad()))
    assert_close(first_update(optax.chain(surgery.pcgrad(), clip)), after_surgery(clip))
    each, _ = surgery.per_task(clip, T).update(
        GRADS, surgery.per_task(clip, T).init(PARAMS), PARAMS
    )
    own, _ = clip.update(jax.tree.map(lambda leaf: leaf[1], GRADS), clip.init(PARAMS), PARAMS)
    assert_close(jax.tree.map(lambda leaf: leaf[1], each), own)


def test_weight_decay_before_the_surgery_is_an_objective_of_every_task():
    decay = optax.add_decayed_weights(0.1)
    before = first_update(optax.chain(decay, surgery.sum()))
    after = first_update(optax.chain(surgery.sum(), decay))
    expected = jax.tree.map(lambda leaf, param: leaf + 0.1 * (T - 1) * param, after, PARAMS)
    assert_close(before, expected)


AFTER_ONLY = {
    "flatten": lambda tx: optax.flatten(tx),
    "mechanize": lambda tx: optax.contrib.mechanize(tx),
}


@pytest.mark.parametrize("name", AFTER_ONLY)
def test_wrappers_of_optax_that_mix_gradients_and_parameters(name):
    wrap = AFTER_ONLY[name]
    with pytest.raises((TypeError, ValueError)):
        first_update(wrap(optax.chain(surgery.pcgrad(), optax.adam(1e-2))))
    tx = wrap(optax.adam(1e-2))
    assert_close(first_update(optax.chain(surgery.pcgrad(), tx)), after_surgery(tx))


# Wrappers that evaluate more than once


def ascent():
    return optax.chain(optax.contrib.normalize(), optax.sgd(0.1))


@pytest.mark.parametrize("key", [0, jax.random.key(0)], ids=["seed", "typed key"])
def test_sharpness_aware_minimisation(key):
    """The second update of SAM is the surgery at the first one's point."""
    raw = optax.contrib.sam(optax.chain(surgery.pcgrad(), optax.sgd(0.1)), ascent())
    updates, _ = raw.update(GRADS, raw.init(PARAMS), PARAMS)
    assert is_stacked(updates)
    with pytest.raises(ValueError, match=STACKED):
        surgery.apply_updates(PARAMS, updates)

    pcgrad = surgery.pcgrad(key=key)
    each = optax.contrib.sam(
        optax.chain(pcgrad, optax.sgd(0.1)), optax.chain(surgery.mean(), ascent())
    )
    first = optax.chain(pcgrad, optax.contrib.sam(optax.sgd(0.1), ascent()))
    for tx in (each, first):
        params, state = PARAMS, tx.init(PARAMS)
        for _ in range(4):
            updates, state = tx.update(jax.jacrev(target)(params), state, params)
            params = surgery.apply_updates(params, updates)
        assert (target(params) < target(PARAMS)).all()


def test_line_search():
    def value_fn(params):
        return jnp.sum(target(params))

    task_grads = jax.jacrev(target)(PARAMS)
    search = optax.scale_by_backtracking_linesearch(max_backtracking_steps=15)
    tx = optax.chain(surgery.pcgrad(), optax.sgd(1.0), search)
    value = {"value": value_fn(PARAMS), "value_fn": value_fn}
    with pytest.raises((TypeError, ValueError)):
        first_update(tx, task_grads, grad=task_grads, **value)
    summed = jax.tree.map(lambda leaf: leaf.sum(axis=0), task_grads)
    updates = first_update(tx, task_grads, grad=summed, **value)
    assert value_fn(optax.apply_updates(PARAMS, updates)) < value_fn(PARAMS)


# What works, and has to go on doing so


def test_lookahead():
    tx = optax.lookahead(optax.chain(surgery.pcgrad(), optax.sgd(0.1)), 2, 0.5)
    params = optax.LookaheadParams.init_synced(PARAMS)
    state = tx.init(params)
    start = target(params.fast)
    for _ in range(4):
        updates, state = tx.update(jax.jacrev(target)(params.fast), state, params)
        params = optax.apply_updates(params, updates)
    assert (target(params.slow) < start).all()


def test_schedule_free_around_a_surgery():
    tx = optax.contrib.schedule_free(
        optax.chain(surgery.pcgrad(), optax.sgd(0.1)), learning_rate=0.1
    )
    params, state = PARAMS, tx.init(PARAMS)
    for _ in range(5):
        updates, state = tx.update(jax.jacrev(target)(params), state, params)
        params = surgery.apply_updates(params, updates)
    assert (target(optax.contrib.schedule_free_eval_params(state, params)) < target(PARAMS)).all()


def test_complex_parameters():
    params = {"wave": jnp.ones(3, complex)}
    task_grads = {"wave": jnp.ones((T, 3), complex) * jnp.array([1, 1j, -1])[:, None]}
    chain = optax.chain(surgery.pcgrad(), optax.sgd(1.0))
    with pytest.raises(ValueError, match="split_real_and_imaginary"):
        first_update(chain, task_grads, params)
    updates = first_update(optax.contrib.split_real_and_imaginary(chain), task_grads, params)
    assert updates["wave"].dtype == params["wave"].dtype


def test_missing_leaves_vmap_one_task_and_abstract_init():
    chain = optax.chain(surgery.pcgrad(), optax.adam(1e-2))
    grads = {**GRADS, "none": None}
    assert first_update(chain, grads, {**PARAMS, "none": None})["none"] is None

    seeds = jax.tree.map(lambda *leaves: jnp.stack(leaves), *micro_batches(2))
    params = jax.tree.map(lambda leaf: jnp.stack([leaf] * 2), PARAMS)
    states = jax.vmap(chain.init)(params)
    updates, _ = jax.vmap(chain.update)(seeds, states, params)
    for seed, task_grads in enumerate(micro_batches(2)):
        alone = first_update(chain, task_grads)
        assert_close(jax.tree.map(lambda leaf, s=seed: leaf[s], updates), alone)

    one = jax.tree.map(lambda leaf: leaf[:1], GRADS)
    assert_close(
        first_update(surgery.pcgrad(), one), jax.tree.map(lambda leaf: leaf[0], GRADS), atol=1e-6
    )
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), PARAMS)
    assert described(jax.eval_shape(chain.init, abstract)) == described(chain.init(PARAMS))


def test_map_params():
    chain = optax.chain(surgery.moco(T), optax.adam(1e-2))
    state = optax.tree.map_params(chain, lambda leaf: leaf + 1, chain.init(PARAMS))
    assert (state[0].weighting_state.averages["head"] == 1).all()
    assert (state[1][0].mu["head"] == 1).all()
    assert state[1][0].count == 0


def test_snapshot():
    """Before a surgery it measures the parameters at first; `monitor` keeps the Gramian."""
    snapshot = optax.snapshot("gramian", surgery.gramian)
    with pytest.raises(ValueError, match="Expected"):
        optax.chain(snapshot, surgery.pcgrad()).init(PARAMS)
    monitored = optax.chain(surgery.monitor(T), surgery.pcgrad())
    _, state = monitored.update(GRADS, monitored.init(PARAMS), PARAMS)
    assert_close(optax.tree.get(state, "gramian"), surgery.gramian(GRADS))
    after = optax.chain(surgery.pcgrad(), optax.snapshot("norm", optax.tree.norm))
    _, state = after.update(GRADS, after.init(PARAMS), PARAMS)
    assert_close(optax.tree.get(state, "norm"), optax.tree.norm(pcgrad_update()))


def test_the_count_of_the_optimiser():
    chain = optax.chain(surgery.monitor(T), surgery.famo(T), optax.adam(1e-2))
    tx = surgery.on_nonfinite(surgery.accumulate(chain, 1, T))
    _, state = run(tx, micro_batches(2), losses=LOSSES)
    assert optax.tree.get(state, "count") == 2


def test_checkpoints_of_a_surgery_made_with_a_typed_key():
    tx = optax.chain(surgery.pcgrad(key=jax.random.key(3)), optax.adam(1e-2))
    _, state = run(tx, micro_batches(2))
    through_flax = flax.serialization.from_bytes(state, flax.serialization.to_bytes(state))
    for restored in (through_flax, pickle.loads(pickle.dumps(state))):
        assert same(tx.update(GRADS, restored, PARAMS), tx.update(GRADS, state, PARAMS))


class Normalised(linen.Module):
    """A layer with batch normalisation and one output a task."""

    @linen.compact
    def __call__(self, inputs, train):
        hidden = linen.BatchNorm(use_running_average=not train)(linen.Dense(4)(inputs))
        return linen.Dense(T)(hidden)


def test_batch_normalisation():
    network = Normalised()
    variables = network.init(jax.random.key(0), INPUTS, train=False)
    params, batch_stats = variables["params"], variables["batch_stats"]

    def losses_fn(params, inputs):
        outputs, new = network.apply(
            {"params": params, "batch_stats": batch_stats},
            inputs,
            train=True,
            mutable="batch_stats",
        )
        return jnp.mean(outputs**2, axis=0), new["batch_stats"]

    def evaluate(batch_stats):
        return network.apply({"params": params, "batch_stats": batch_stats}, INPUTS, train=False)

    # One batch for all tasks: one copy.
    fn = surgery.task_value_and_grad(losses_fn, has_aux=True)
    (_, new_stats), _ = fn(params, INPUTS)
    assert described(new_stats) == described(batch_stats)
    evaluate(new_stats)

    # A batch for each task: one copy per task, to be averaged.
    def loss_fn(params, task, inputs):
        losses, new_stats = losses_fn(params, inputs)
        return losses[task], new_stats

    fn = surgery.per_task_value_and_grad(loss_fn, has_aux=True)
    (_, stacked), _ = fn(params, jnp.arange(T), jnp.stack([INPUTS, 2 * INPUTS, INPUTS + 1]))
    with pytest.raises((TypeError, ValueError, flax.errors.FlaxError)):
        evaluate(stacked)
    evaluate(jax.tree.map(lambda leaf: leaf.mean(axis=0), stacked))


def test_batch_statistics_of_every_task_in_a_train_state():
    class State(SurgeryTrainState):
        batch_stats: dict | None = None

    tx, stats = surgery.mean(), {"mean": jnp.zeros(4)}
    state = State.create(apply_fn=None, params=PARAMS, tx=tx, batch_stats=stats)
    message = r"Expected batch_stats of shape \(4,\), got shape \(3, 4\) at 'batch_stats/mean'"
    with pytest.raises(ValueError, match=message):
        state.apply_gradients(grads=GRADS, batch_stats={"mean": jnp.zeros((T, 4))})
