"""The losses of soft actor-critic: a baseline and a surgery train on the same targets."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_surgery as surgery
from benchmarks import sac

NUM_TASKS, SAMPLES, OBSERVATION, ACTIONS = 3, 5, 4, 2


def make(num_heads, optimiser=lambda: optax.sgd(0.1)):
    actor = sac.Actor(ACTIONS, width=8, depth=2, num_heads=num_heads)
    critic = sac.Critic(width=8, depth=2, num_heads=num_heads)
    return sac.make_agent(
        actor,
        critic,
        optimiser,
        optax.sgd(0.1),
        jnp.zeros(OBSERVATION),
        NUM_TASKS,
        jax.random.key(0),
        temperature=0.3,
    )


def batch_of(continues=1.0):
    keys = jax.random.split(jax.random.key(1), 4)
    shape = (NUM_TASKS, SAMPLES)
    return sac.Transitions(
        observation=jax.random.normal(keys[0], (*shape, OBSERVATION)),
        action=jax.random.uniform(keys[1], (*shape, ACTIONS), minval=-1, maxval=1),
        reward=3 * jax.random.normal(keys[2], shape),
        next_observation=jax.random.normal(keys[3], (*shape, OBSERVATION)),
        continues=jnp.full(shape, continues),
    )


def stacked_mean():
    return optax.chain(surgery.mean(), optax.sgd(0.1))


@pytest.mark.parametrize(
    ("num_heads", "continues", "train"),
    list(itertools.product([None, NUM_TASKS], [0.0, 1.0], ["critic", "actor"])),
)
def test_the_joint_gradient_is_the_mean_of_the_stacked_ones(num_heads, continues, train):
    tasks, key, batch = jnp.arange(NUM_TASKS), jax.random.key(2), batch_of(continues)
    found = []
    for tx, value_and_grad in (
        (lambda: optax.sgd(0.1), sac.joint_value_and_grad),
        (stacked_mean, surgery.per_task_value_and_grad),
    ):
        agent = make(num_heads, tx)
        if train == "critic":
            state, losses = sac.train_critic(agent, batch, tasks, key, 0.9, value_and_grad)
        else:
            state, losses, _ = sac.train_actor(agent, batch, tasks, key, value_and_grad)
        found.append((state.params, losses))
        moved = jax.tree.map(
            lambda new, old: jnp.abs(new - old).max(), state.params, getattr(agent, train).params
        )
        assert all(size > 0 for size in jax.tree.leaves(moved))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), *found)


@pytest.mark.parametrize("train", ["critic", "actor"])
def test_another_target_would_be_noticed(train, monkeypatch):
    """What went wrong elsewhere: one branch samples its actions from the wrong observations."""
    tasks, key, batch = jnp.arange(NUM_TASKS), jax.random.key(2), batch_of()
    wrong = batch._replace(next_observation=batch.observation, observation=batch.next_observation)
    agent = make(None, stacked_mean)
    run = {
        "critic": lambda batch: sac.train_critic(
            agent, batch, tasks, key, 0.9, surgery.per_task_value_and_grad
        ),
        "actor": lambda batch: sac.train_actor(
            agent, batch, tasks, key, surgery.per_task_value_and_grad
        ),
    }[train]
    right, other = run(batch)[1], run(wrong)[1]
    assert np.abs(right - other).max() > 1e-3


def test_the_density_of_an_action_is_that_of_a_squashed_normal():
    """Against the change of variables, in float64, with actions away from the ends."""
    mean, log_deviation = jnp.array([[0.3, -0.5]]), jnp.array([[-0.7, 0.1]])
    action, log_density = sac.act(
        lambda *_: (mean, log_deviation), None, jnp.zeros((1, 1)), 0, jax.random.key(0)
    )
    action = np.asarray(action, np.float64)
    before, deviation = np.arctanh(action), np.exp(np.asarray(log_deviation, np.float64))
    normal = np.exp(-0.5 * ((before - mean) / deviation) ** 2) / deviation / np.sqrt(2 * np.pi)
    expected = np.log(normal / (1 - action**2)).sum(axis=-1)
    np.testing.assert_allclose(log_density, expected, rtol=1e-4)


def test_temperatures_rise_where_actions_are_too_certain():
    agent = make(None)
    state = sac.train_temperatures(agent, jnp.array([5.0, 5.0, -9.0]), ACTIONS)
    after = agent._replace(temperature=state).temperatures
    assert (np.sign(after - agent.temperatures) == [1, 1, -1]).all()


def test_one_step_is_one_jit_and_moves_the_target_by_polyak():
    agent = make(NUM_TASKS, stacked_mean)
    step = jax.jit(sac.train_step, static_argnames=("discount", "polyak"))
    after, losses = step(
        agent, batch_of(), jnp.arange(NUM_TASKS), jax.random.key(3), discount=0.9, polyak=0.25
    )
    assert losses["critic_loss"].shape == losses["actor_loss"].shape == (NUM_TASKS,)
    expected = jax.tree.map(
        lambda new, old: 0.25 * new + 0.75 * old, after.critic.params, agent.target
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), expected, after.target)
