"""Code bases of others, in small: what their training steps need of a surgery."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen
from flax.training.train_state import TrainState
from jax import lax

import optax_surgery as surgery

# metaworld-algorithms: actor and critic, each a linen `TrainState` with a head for every task

T = 3


class MultiHead(linen.Module):
    """A trunk, and heads in leaves with a leading axis of tasks, as `linen.vmap` stacks them."""

    @linen.compact
    def __call__(self, inputs):
        hidden = linen.tanh(linen.Dense(4, name="trunk")(inputs))  # (T, batch, 4)
        heads = linen.vmap(linen.Dense, variable_axes={"params": 0}, split_rngs={"params": True})
        return heads(1, name="heads")(hidden)[..., 0]


def make_train_state(tx, seed):
    network = MultiHead()
    params = network.init(jax.random.key(seed), jnp.ones((T, 1, 2)))["params"]
    return TrainState.create(apply_fn=network.apply, params=params, tx=tx)


def test_actor_and_critic_with_a_head_for_every_task():
    """The actor's losses are negative; heads get their own gradients and the trunk is shared."""
    observations = jax.random.normal(jax.random.key(0), (T, 6, 2))
    returns = jnp.sum(observations, axis=-1)

    def critic_losses(params, state):
        return jnp.mean((state.apply_fn({"params": params}, observations) - returns) ** 2, axis=1)

    def actor_losses(params, state):
        actions = jnp.tanh(state.apply_fn({"params": params}, observations))
        return -5 + jnp.mean(-actions * returns, axis=1)

    tx = optax.chain(
        surgery.on_shared(surgery.pcgrad(), "trunk"),
        optax.clip_by_global_norm(1.0),
        optax.adam(1e-2),
    )
    states = {"actor": make_train_state(tx, 1), "critic": make_train_state(tx, 2)}
    losses_fns = {"actor": actor_losses, "critic": critic_losses}
    assert states["actor"].params["heads"]["kernel"].shape == (T, 4, 1)

    @jax.jit
    def step(states):
        new_states, losses = {}, {}
        for name, losses_fn in losses_fns.items():
            fn = surgery.task_value_and_grad(losses_fn)
            losses[name], task_grads = fn(states[name].params, states[name])
            new_states[name] = states[name].apply_gradients(grads=task_grads)
        return new_states, losses

    first = None
    for _ in range(20):
        states, losses = step(states)
        first = losses if first is None else first
    assert (first["actor"] < 0).all()
    for name in losses_fns:
        assert (losses[name] < first[name]).all()


# jinns: an Equinox model, a dict of losses, and the loop inside of `lax.while_loop`


class Network(eqx.Module):
    """The solution of an equation, with a coefficient that is learnt beside it."""

    layers: list
    coefficient: jax.Array

    def __init__(self, key):
        first, second = jax.random.split(key)
        self.layers = [eqx.nn.Linear(1, 8, key=first), eqx.nn.Linear(8, 1, key=second)]
        self.coefficient = jnp.ones(())

    def __call__(self, x):
        return self.layers[1](jnp.tanh(self.layers[0](x[None])))[0]


POINTS = jnp.linspace(0, 1, 8)


def pinn_losses(model):
    slopes = jax.vmap(jax.grad(model))(POINTS)
    values = jax.vmap(model)(POINTS)
    return {
        "dyn_loss": jnp.mean((slopes + model.coefficient * values) ** 2),
        "initial_condition": (model(jnp.zeros(())) - 1) ** 2,
        "observations": jnp.mean((values - jnp.exp(-2 * POINTS)) ** 2),
    }


def train_pinn(tx, num_steps):
    """All in one `while_loop`, with an Equinox model and the surgery's state in its carry."""
    params, static = eqx.partition(Network(jax.random.key(0)), eqx.is_inexact_array)
    fn = surgery.task_value_and_grad(lambda params: pinn_losses(eqx.combine(params, static)))

    def body(carry):
        number, params, state, _ = carry
        losses, task_grads = fn(params)
        updates, state = tx.update(task_grads, state, params, losses=losses)
        return number + 1, eqx.apply_updates(params, updates), state, losses

    start = 0, params, tx.init(params), jax.jit(fn)(params)[0]
    run = jax.jit(lambda carry: lax.while_loop(lambda carry: carry[0] < num_steps, body, carry))
    _, _, state, losses = run(start)
    return start[-1], losses, state


PINNS = {
    "conflict_free": lambda: surgery.conflict_free(
        {"dyn_loss": 0.5, "initial_condition": 0.25, "observations": 0.25}
    ),
    "famo": lambda: surgery.famo(3),
    "on_shared": lambda: surgery.on_shared(surgery.pcgrad(), "layers"),
    "leafwise": lambda: surgery.leafwise(surgery.upgrad(), lambda path: path.split("/")[0]),
}


@pytest.mark.parametrize("name", PINNS)
def test_a_pinn_with_a_dict_of_losses_inside_of_while_loop(name):
    tx = optax.chain(PINNS[name](), optax.adam(1e-2))
    before, after, _ = train_pinn(tx, 60)
    assert list(after) == ["dyn_loss", "initial_condition", "observations"]
    assert sum(after.values()) < 0.8 * sum(before.values())


# jaxpi: weights of the losses that are renewed every k steps


def test_weights_of_a_pinn_renewed_every_k_steps():
    """Weights are those of the norms at the last renewal, as `update_weights` keeps them."""
    tx = surgery.every(surgery.normalize_tasks(surgery.sum()), 5, 3)
    chain = optax.chain(tx, optax.adam(1e-2))
    for num_steps, renewed in ((5, 1), (6, 2)):
        before, after, state = train_pinn(chain, num_steps)
        every_state = state[0].weighting_state
        assert every_state.inner_state.surgery_step == renewed
        assert every_state.age == num_steps % 5
        assert (every_state.weights_in_use > 0).all()
    assert sum(after.values()) < sum(before.values())


# sequel: continual learning with a memory of earlier tasks


def a_gem(grad, memory_grad):
    """Chaudhry et al. 2019, eq. 11: the new gradient without what worsens the memory's loss."""
    product = grad @ memory_grad
    if product >= 0:
        return grad
    return grad - product / (memory_grad @ memory_grad) * memory_grad


@pytest.mark.parametrize("named", [False, True])
def test_a_gem_is_dualproj_with_all_preference_for_the_new_task(named):
    preference = {"memory": 0.0, "current": 1.0} if named else jnp.array([1.0, 0.0])
    tx = surgery.dualproj(preference)
    losses = {"current": 1.0, "memory": 2.0} if named else None
    state, update = tx.init(jnp.zeros(4)), jax.jit(tx.update)
    conflicts = 0
    for seed in range(6):
        grads = np.random.default_rng(seed).normal(size=(2, 4))
        updates, state = update(jnp.asarray(grads, "f4"), state, losses=losses)
        np.testing.assert_allclose(updates, a_gem(*grads), atol=1e-5)
        conflicts += grads[0] @ grads[1] < 0
    assert 0 < conflicts < 6


def test_a_gem_before_there_is_a_memory_is_the_plain_gradient():
    grads = jnp.array([[1.0, -2.0], [0.0, 0.0]])
    tx = surgery.dualproj(jnp.array([1.0, 0.0]))
    np.testing.assert_array_equal(tx.update(grads, tx.init(None))[0], grads[0])
    mask = jnp.array([True, False])
    nan = grads.at[1].set(jnp.nan)
    np.testing.assert_array_equal(tx.update(nan, tx.init(None), task_mask=mask)[0], grads[0])
