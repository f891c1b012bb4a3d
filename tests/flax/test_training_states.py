"""Surgeries in what the users of optax and Flax have: chains, partitions, training states."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import equinox as eqx
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


TASK_GRADS = jax.jit(jax.jacrev(losses_fn))(PARAMS)


@jax.jit
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
    task_grads = TASK_GRADS
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
    updates, state = tx.update(TASK_GRADS, tx.init(PARAMS), PARAMS)
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
    task_grads = TASK_GRADS
    update = jax.jit(injected.update) if jit else injected.update
    updates, _ = update(task_grads, injected.init(PARAMS), PARAMS)
    expected, _ = plain.update(task_grads, plain.init(PARAMS), PARAMS)
    assert_close(updates, expected)


def test_a_schedule_of_the_learning_rate_around_a_surgery():
    def make(learning_rate):
        return optax.chain(surgery.pcgrad(), optax.adam(learning_rate))

    tx = optax.inject_hyperparams(make)(learning_rate=optax.constant_schedule(1e-3))
    updates, _ = tx.update(TASK_GRADS, tx.init(PARAMS), PARAMS)
    assert_close(optax.apply_updates(PARAMS, updates), plain_step(PARAMS))


def test_process_of_optax_experimental_aggregating():
    tx = aggregating.process(optax.identity(), surgery.pcgrad(), optax.adam(1e-3))
    updates, _ = jax.jit(tx.update)(TASK_GRADS, tx.init(PARAMS), PARAMS)
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


# Recipes: plain JAX, Equinox, nnx


def every_wrapper(num_tasks):
    """A surgery and an optimiser with all that can be around them."""
    operate = surgery.start_after(surgery.every(surgery.pcgrad(), 2, num_tasks), 1)
    return surgery.on_nonfinite(
        surgery.accumulate(
            optax.chain(
                surgery.per_task(optax.trace(0.5), num_tasks),
                surgery.normalize_tasks(operate, "ema", num_tasks),
                optax.adam(3e-2),
            ),
            2,
            num_tasks,
        )
    )


def test_plain_jax():
    tx = every_wrapper(NUM_TASKS)
    value_and_grad = surgery.task_value_and_grad(losses_fn)

    @jax.jit
    def step(params, state):
        losses, task_grads = value_and_grad(params)
        updates, state = tx.update(task_grads, state, params, losses=losses)
        return surgery.apply_updates(params, updates), state

    params, state = PARAMS, tx.init(PARAMS)
    for _ in range(200):
        params, state = step(params, state)
    assert (losses_fn(params) < 0.7 * losses_fn(PARAMS)).all()
    assert state.nonfinite_steps == 0


def test_equinox():
    model = eqx.nn.MLP(5, NUM_TASKS, 6, 1, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def task_losses(params):
        return jnp.mean((jax.vmap(eqx.combine(params, static))(INPUTS) - TARGETS) ** 2, axis=0)

    tx = optax.chain(
        surgery.leafwise(surgery.pcgrad(), lambda path: path.rpartition("/")[0]), optax.adam(1e-2)
    )

    @eqx.filter_jit
    def step(params, state):
        losses, task_grads = surgery.task_value_and_grad(task_losses)(params)
        updates, state = tx.update(task_grads, state, params, losses=losses)
        return surgery.apply_updates(params, updates), state

    state = tx.init(params)
    assert sorted(state[0].group_states) == ["layers/0", "layers/1"]
    before = task_losses(params)
    for _ in range(100):
        params, state = step(params, state)
    assert (task_losses(params) < 0.7 * before).all()
    assert isinstance(eqx.combine(params, static), eqx.nn.MLP)


class NormalisedModel(nnx.Module):
    """A trunk with batch normalisation, and heads in one layer."""

    def __init__(self, rngs):
        self.trunk = nnx.Linear(5, 6, rngs=rngs)
        self.norm = nnx.BatchNorm(6, momentum=0.5, rngs=rngs)
        self.heads = nnx.Linear(6, NUM_TASKS, rngs=rngs)

    def __call__(self, inputs):
        return self.heads(nnx.relu(self.norm(self.trunk(inputs))))


def in_trunk(path):
    return path.startswith(("trunk", "norm")) and not path.endswith("value")


NNX_SURGERIES = {
    "pcgrad": surgery.pcgrad,
    "leafwise": lambda: surgery.leafwise(surgery.pcgrad()),
    "on_shared": lambda: surgery.on_shared(surgery.moco(NUM_TASKS), in_trunk),
    "famo": lambda: surgery.famo(NUM_TASKS),
}


@pytest.mark.parametrize("name", [*NNX_SURGERIES, "every_wrapper"])
def test_nnx_optimizer_with_losses_and_batch_statistics(name):
    model = NormalisedModel(nnx.Rngs(0))
    if name == "every_wrapper":
        tx = every_wrapper(NUM_TASKS)
    else:
        tx = optax.chain(NNX_SURGERIES[name](), optax.adam(3e-2))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        graph, params, rest = nnx.split(model, nnx.Param, ...)

        def task_losses(params):
            merged = nnx.merge(graph, params, rest, copy=True)
            losses = jnp.mean((merged(INPUTS) - TARGETS) ** 2, axis=0)
            return losses, nnx.state(merged, nnx.BatchStat)

        fn = surgery.task_value_and_grad(task_losses, has_aux=True)
        (losses, batch_stats), task_grads = fn(params)
        nnx.update(model, batch_stats)
        optimizer.update(model, task_grads, losses=losses)

    def evaluate():
        model.eval()
        loss = jnp.mean((model(INPUTS) - TARGETS) ** 2)
        model.train()
        return loss

    before, shape = evaluate(), model.norm.mean[...].shape
    for _ in range(100):
        step(model, optimizer)
    assert model.norm.mean[...].shape == shape
    assert evaluate() < 0.7 * before


# A job that is killed

TRAINING = """
import sys

import jax, jax.numpy as jnp, numpy as np, optax
import orbax.checkpoint as ocp
import optax_surgery as surgery

folder, hang_at = sys.argv[1], int(sys.argv[2])
tx = surgery.on_nonfinite(
    surgery.accumulate(
        optax.chain(
            surgery.per_task(optax.trace(0.9), 3),
            surgery.normalize_tasks(surgery.every(surgery.pcgrad(), 2, 3), "ema", 3),
            optax.adam(1e-2),
        ),
        3,
        3,
    )
)


@jax.jit
def step(params, state, number):
    inputs = jax.random.normal(jax.random.fold_in(jax.random.key(0), number), (8, 4))
    losses_fn = lambda params: jnp.mean((jnp.tanh(inputs @ params) - inputs[:, :3]) ** 2, axis=0)
    losses, task_grads = surgery.task_value_and_grad(losses_fn)(params)
    updates, state = tx.update(task_grads, state, params, losses=losses)
    return surgery.apply_updates(params, updates), state


params = jnp.ones((4, 3))
carry, start = (params, tx.init(params)), 0
with ocp.CheckpointManager(folder) as manager:
    if manager.latest_step() is not None:
        start = manager.latest_step()
        carry = manager.restore(start, args=ocp.args.StandardRestore(carry))
    for number in range(start, 30):
        carry = step(*carry, number)
        if (number + 1) % 10 == 0:
            manager.save(number + 1, args=ocp.args.StandardSave(carry))
            manager.wait_until_finished()
        print(number + 1, flush=True)
        if number + 1 == hang_at:
            sys.stdin.read()
print(start, np.asarray(carry[0]).tobytes().hex(), flush=True)
"""


def test_a_job_killed_between_two_checkpoints_resumes_to_the_bit(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(TRAINING)

    def start(folder, hang_at=0):
        return subprocess.Popen(
            [sys.executable, script, tmp_path / folder, str(hang_at)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        )

    whole, killed = start("whole"), start("killed", hang_at=17)
    for line in killed.stdout:
        if line == "17\n":
            break
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    killed.communicate()

    expected = whole.communicate()[0].splitlines()[-1]
    resumed = start("killed").communicate()[0].splitlines()
    assert resumed[0] == "11"  # from the checkpoint of step 10
    assert expected.split()[0] == "0"
    assert resumed[-1].split() == ["10", expected.split()[1]]
    params = np.frombuffer(bytes.fromhex(expected.split()[1]), "f4")
    assert np.isfinite(params).all()
    assert (params != 1).all()
