"""Surgeries in what the users of optax and Flax have: chains, partitions, training states."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from optax.experimental import aggregating

import optax_surgery as surgery

INPUTS = jax.random.normal(jax.random.key(0), (8, 5))
TARGETS = jax.random.normal(jax.random.key(1), (8, 2))
NUM_TASKS = 2


class Network(nn.Module):
    """A trunk and one linear head a task."""

    @nn.compact
    def __call__(self, inputs):
        hidden = nn.relu(nn.Dense(6, name="trunk")(inputs))
        heads = [nn.Dense(1, name=f"head_{task}")(hidden) for task in range(NUM_TASKS)]
        return jnp.concatenate(heads, axis=-1)


NETWORK = Network()
PARAMS = NETWORK.init(jax.random.key(2), INPUTS)["params"]


def losses_fn(params):
    return jnp.mean((NETWORK.apply({"params": params}, INPUTS) - TARGETS) ** 2, axis=0)


def plain_step(params):
    """One step of Adam on what PCGrad makes of the gradients, written out."""
    tx = surgery.pcgrad()
    update, _ = tx.update(jax.jacrev(losses_fn)(params), tx.init(params), params)
    adam = optax.adam(1e-3)
    update, _ = adam.update(update, adam.init(params), params)
    return optax.apply_updates(params, update)


def assert_close(left, right):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), left, right)


def test_linen_train_state():
    tx = optax.chain(surgery.pcgrad(), optax.adam(1e-3))
    state = TrainState.create(apply_fn=NETWORK.apply, params=PARAMS, tx=tx)
    step = jax.jit(lambda state: state.apply_gradients(grads=jax.jacrev(losses_fn)(state.params)))
    assert_close(step(state).params, plain_step(PARAMS))


def test_nnx_optimizer():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.trunk = nnx.Linear(5, 6, rngs=rngs)
            self.heads = nnx.Linear(6, NUM_TASKS, rngs=rngs)

        def __call__(self, inputs):
            return self.heads(nnx.relu(self.trunk(inputs)))

    model = Model(nnx.Rngs(0))
    graph, params = nnx.split(model)

    def task_losses(params):
        return jnp.mean((nnx.merge(graph, params)(INPUTS) - TARGETS) ** 2, axis=0)

    task_grads = jax.jacrev(task_losses)(params)
    surgeon = surgery.pcgrad()
    expected, _ = surgeon.update(task_grads, surgeon.init(params), params)
    before = jax.tree.map(jnp.array, params)

    optimizer = nnx.Optimizer(model, optax.chain(surgery.pcgrad(), optax.sgd(0.1)), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, task_grads):
        optimizer.update(model, task_grads, losses=jnp.ones(NUM_TASKS))

    step(model, optimizer, task_grads)
    after = nnx.state(model, nnx.Param)
    assert_close(after, jax.tree.map(lambda leaf, update: leaf - 0.1 * update, before, expected))


def test_partition_of_shared_parameters_and_heads():
    def labels(params):
        return jax.tree.map_with_path(
            lambda path, _: "shared" if path[0].key == "trunk" else "heads", params
        )

    tx = optax.partition(
        {
            "shared": optax.chain(surgery.pcgrad(), optax.sgd(1.0)),
            "heads": optax.chain(surgery.sum(), optax.sgd(1.0)),
        },
        labels,
    )
    task_grads = jax.jacrev(losses_fn)(PARAMS)
    updates, _ = jax.jit(tx.update)(task_grads, tx.init(PARAMS), PARAMS)

    trunk, _ = surgery.pcgrad().update(task_grads["trunk"], surgery.pcgrad().init(None))
    assert_close(updates["trunk"], jax.tree.map(jnp.negative, trunk))
    for head in ("head_0", "head_1"):
        own = jax.tree.map(lambda leaf: -leaf.sum(axis=0), task_grads[head])
        assert_close(updates[head], own)


def test_a_group_of_a_partition_may_be_empty():
    task_grads = {"a": jnp.ones((2, 3))}
    params = {"a": jnp.ones(3)}
    tx = optax.partition({"shared": surgery.pcgrad(), "heads": surgery.sum()}, {"a": "shared"})
    updates, _ = tx.update(task_grads, tx.init(params), params)
    np.testing.assert_allclose(updates["a"], 2 * np.ones(3))


def test_named_chain():
    tx = optax.named_chain(("surgery", surgery.pcgrad()), ("adam", optax.adam(1e-3)))
    updates, state = tx.update(jax.jacrev(losses_fn)(PARAMS), tx.init(PARAMS), PARAMS)
    assert_close(optax.apply_updates(PARAMS, updates), plain_step(PARAMS))
    assert state["surgery"].surgery_step == 1


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize(
    ("make", "kwargs"),
    [
        (surgery.pcgrad, {"key": 0}),
        (surgery.aligned_mtl, {"preference": jnp.array([0.5, 0.5])}),
        (surgery.constant, {"weights": jnp.array([1.0, 2.0])}),
    ],
)
def test_inject_hyperparams(make, kwargs, jit):
    injected, plain = optax.inject_hyperparams(make)(**kwargs), make(**kwargs)
    task_grads = jax.jacrev(losses_fn)(PARAMS)
    update = jax.jit(injected.update) if jit else injected.update
    updates, _ = update(task_grads, injected.init(PARAMS), PARAMS)
    expected, _ = plain.update(task_grads, plain.init(PARAMS), PARAMS)
    assert_close(updates, expected)


def test_a_schedule_of_the_learning_rate_around_a_surgery():
    def make(learning_rate):
        return optax.chain(surgery.pcgrad(), optax.adam(learning_rate))

    tx = optax.inject_hyperparams(make)(learning_rate=optax.constant_schedule(1e-3))
    updates, _ = tx.update(jax.jacrev(losses_fn)(PARAMS), tx.init(PARAMS), PARAMS)
    assert_close(optax.apply_updates(PARAMS, updates), plain_step(PARAMS))


def test_process_of_optax_experimental_aggregating():
    tx = aggregating.process(optax.identity(), surgery.pcgrad(), optax.adam(1e-3))
    updates, _ = jax.jit(tx.update)(jax.jacrev(losses_fn)(PARAMS), tx.init(PARAMS), PARAMS)
    assert_close(optax.apply_updates(PARAMS, updates), plain_step(PARAMS))


def test_training_fits_both_tasks():
    tx = optax.chain(surgery.pcgrad(), optax.adam(1e-2))

    @jax.jit
    def train(params):
        def step(carry, _):
            params, state = carry
            updates, state = tx.update(jax.jacrev(losses_fn)(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), length=500)[0][0]

    assert (losses_fn(train(PARAMS)) < 0.2 * losses_fn(PARAMS)).all()
