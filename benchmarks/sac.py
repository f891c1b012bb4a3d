"""Soft actor-critic on several tasks: networks, the losses of one task, and one step of all.

Haarnoja et al. (2018, arXiv 1812.05905) with two critics, a target network, and a temperature for
each task. Every task has transitions of its own. Actor and critic are two networks with two
systems of task gradients: each has an optimiser with a surgery of its own. A temperature concerns
its task alone, so that no surgery has anything to do there.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax.training.train_state import TrainState

import optax_surgery as surgery
from optax_surgery.flax import SurgeryTrainState

LOG_DEVIATIONS = (-10.0, 2.0)  # beyond, the logarithm of the deviation is cut off


class Transitions(NamedTuple):
    """What was seen, with leading axes (T, samples), or (samples,) for one task."""

    observation: jax.Array
    action: jax.Array
    reward: jax.Array
    next_observation: jax.Array
    continues: jax.Array  # 0 where the episode ended by itself, and not by its time limit


class Network(nn.Module):
    """A perceptron, with an output layer for each task if there are `num_heads` of them."""

    features: int
    width: int
    depth: int
    num_heads: int | None = None

    @nn.compact
    def __call__(self, x: jax.Array, task: jax.Array) -> jax.Array:
        for _ in range(self.depth):
            x = nn.relu(nn.Dense(self.width, kernel_init=nn.initializers.he_normal())(x))
        small = nn.initializers.variance_scaling(0.02, "fan_in", "normal")
        if self.num_heads is None:
            return nn.Dense(self.features, kernel_init=small, name="output")(x)
        per_head = nn.initializers.variance_scaling(0.02, "fan_in", "normal", batch_axis=(0,))
        kernels = self.param("head_kernel", per_head, (self.num_heads, self.width, self.features))
        biases = self.param("head_bias", nn.initializers.zeros, (self.num_heads, self.features))
        return x @ kernels[task] + jnp.broadcast_to(biases[task], (*x.shape[:-1], self.features))


class Actor(nn.Module):
    """The mean and the logarithm of the deviation of an action before it is squashed by tanh."""

    num_actions: int
    width: int
    depth: int
    num_heads: int | None = None

    @nn.compact
    def __call__(self, observation: jax.Array, task: jax.Array) -> tuple[jax.Array, jax.Array]:
        network = Network(2 * self.num_actions, self.width, self.depth, self.num_heads)
        mean, log_deviation = jnp.split(network(observation, task), 2, axis=-1)
        return mean, jnp.clip(log_deviation, *LOG_DEVIATIONS)


class Critic(nn.Module):
    """The values (2, samples) that two networks give to an action."""

    width: int
    depth: int
    num_heads: int | None = None

    @nn.compact
    def __call__(self, observation: jax.Array, action: jax.Array, task: jax.Array) -> jax.Array:
        two = nn.vmap(
            Network,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=None,  # pyright: ignore[reportArgumentType]
            axis_size=2,
        )
        network = two(1, self.width, self.depth, self.num_heads)
        return network(jnp.concatenate([observation, action], axis=-1), task)[..., 0]


class Agent(NamedTuple):
    """Everything that is learnt. `target` holds parameters that follow the critic's."""

    actor: SurgeryTrainState
    critic: SurgeryTrainState
    target: Any
    temperature: TrainState

    @property
    def temperatures(self) -> jax.Array:
        """(T,) what the entropy of each task's actions is worth."""
        return jnp.exp(jax.tree.leaves(self.temperature.params)[0])


def make_agent(
    actor: Actor,
    critic: Critic,
    make_optimiser: Callable[[], optax.GradientTransformation],
    temperature_optimiser: optax.GradientTransformation,
    observation: jax.Array,
    num_tasks: int,
    key: jax.Array,
    temperature: float = 1.0,
) -> Agent:
    """An agent before its first step.

    Args:
      actor: its network.
      critic: its networks.
      make_optimiser: gives surgery and optimiser, once for the actor and once for the critic.
      temperature_optimiser: the temperatures' optimiser.
      observation: one observation of one task.
      num_tasks: how many temperatures there are.
      key: a PRNG key.
      temperature: what all temperatures begin with.
    """
    actor_key, critic_key = jax.random.split(key)
    action, task = jnp.zeros(actor.num_actions), jnp.zeros((), int)
    critic_params = critic.init(critic_key, observation, action, task)
    return Agent(
        actor=SurgeryTrainState.create(
            apply_fn=actor.apply,
            params=actor.init(actor_key, observation, task),
            tx=make_optimiser(),
        ),
        critic=SurgeryTrainState.create(
            apply_fn=critic.apply, params=critic_params, tx=make_optimiser()
        ),
        # A copy, so that both can be donated.
        target=jax.tree.map(jnp.copy, critic_params),
        temperature=TrainState.create(
            apply_fn=jnp.exp,
            # Not of a weak type, which training would change: all would be compiled twice.
            params={"logarithms": jnp.log(jnp.full(num_tasks, temperature, float))},
            tx=temperature_optimiser,
        ),
    )


def act(actor, params, observation, task, key):
    """A random action in [-1, 1] and the logarithm of its density."""
    mean, log_deviation = actor(params, observation, task)
    noise = jax.random.normal(key, mean.shape)
    before = mean + jnp.exp(log_deviation) * noise
    normal = -0.5 * noise**2 - log_deviation - 0.5 * jnp.log(2 * jnp.pi)
    # log(1 - tanh(x)^2), without the cancellation
    squashed = 2 * (jnp.log(2.0) - before - nn.softplus(-2 * before))
    return jnp.tanh(before), jnp.sum(normal - squashed, axis=-1)


def act_greedily(actor, params, observation, task):
    """The action at the mode."""
    return jnp.tanh(actor(params, observation, task)[0])


def critic_loss(params, agent: Agent, batch: Transitions, task, temperature, key, discount):
    """The squared error of both critics of one task against one common target."""
    action, log_density = act(
        agent.actor.apply_fn, agent.actor.params, batch.next_observation, task, key
    )
    next_values = agent.critic.apply_fn(agent.target, batch.next_observation, action, task)
    soft_value = jnp.min(next_values, axis=0) - temperature * log_density
    target = jax.lax.stop_gradient(batch.reward + discount * batch.continues * soft_value)
    values = agent.critic.apply_fn(params, batch.observation, batch.action, task)
    return jnp.mean((values - target[None]) ** 2)


def actor_loss(params, agent: Agent, batch: Transitions, task, temperature, key):
    """Minus the value of one task's actions, and what their entropy is worth. It may be negative.

    The second result is the mean logarithm of their density, for the temperature.
    """
    action, log_density = act(agent.actor.apply_fn, params, batch.observation, task, key)
    values = agent.critic.apply_fn(agent.critic.params, batch.observation, action, task)
    loss = jnp.mean(temperature * log_density - jnp.min(values, axis=0))
    return loss, jnp.mean(log_density)


def joint_value_and_grad(loss_fn, has_aux=False):
    """Losses of all tasks and the gradient of their mean, from one backward pass.

    It is called like `per_task_value_and_grad`. What it gives is one gradient, not a stack.
    """

    def fn(params, *args):
        def mean_loss(params):
            values = jax.vmap(lambda *each: loss_fn(params, *each))(*args)
            return jnp.mean(values[0] if has_aux else values), values

        (_, values), grads = jax.value_and_grad(mean_loss, has_aux=True)(params)
        return values, grads

    return fn


def train_critic(agent, batch, tasks, key, discount, value_and_grad):
    """The critic after one step, and the losses (T,)."""

    def loss_fn(params, batch, task, temperature, key):
        return critic_loss(params, agent, batch, task, temperature, key, discount)

    keys = jax.random.split(key, tasks.size)
    losses, grads = value_and_grad(loss_fn)(
        agent.critic.params, batch, tasks, agent.temperatures, keys
    )
    return agent.critic.apply_gradients(grads=grads, losses=losses), losses


def train_actor(agent, batch, tasks, key, value_and_grad):
    """The actor after one step, the losses (T,), and mean logarithms of densities (T,)."""

    def loss_fn(params, batch, task, temperature, key):
        return actor_loss(params, agent, batch, task, temperature, key)

    keys = jax.random.split(key, tasks.size)
    (losses, log_densities), grads = value_and_grad(loss_fn, has_aux=True)(
        agent.actor.params, batch, tasks, agent.temperatures, keys
    )
    return agent.actor.apply_gradients(grads=grads, losses=losses), losses, log_densities


def train_temperatures(agent, log_densities, num_actions):
    """Temperatures after one step towards an entropy of minus the number of actions."""
    grads = {"logarithms": -agent.temperatures * (log_densities - num_actions)}
    return agent.temperature.apply_gradients(grads=grads)


def train_step(
    agent: Agent,
    batch: Transitions,
    tasks: jax.Array,
    key: jax.Array,
    *,
    discount: float,
    polyak: float,
    value_and_grad=surgery.per_task_value_and_grad,
) -> tuple[Agent, dict[str, jax.Array]]:
    """One step of critic, target, actor and temperatures.

    Args:
      agent: the agent.
      batch: transitions of all tasks, with leading axes (T, samples).
      tasks: (T,) numbers of the tasks; they choose the heads.
      key: a PRNG key.
      discount: of the next step's value, 0 to 1.
      polyak: how far the target goes towards the critic, 0 to 1.
      value_and_grad: `per_task_value_and_grad`, or `joint_value_and_grad` without a surgery.

    Returns:
      The next agent, and `critic_loss` and `actor_loss`, each of shape (T,).
    """
    critic_key, actor_key = jax.random.split(key)
    critic, critic_losses = train_critic(agent, batch, tasks, critic_key, discount, value_and_grad)
    target = optax.incremental_update(critic.params, agent.target, polyak)
    agent = agent._replace(critic=critic, target=target)
    actor, actor_losses, log_densities = train_actor(agent, batch, tasks, actor_key, value_and_grad)
    temperature = train_temperatures(agent, log_densities, batch.action.shape[-1])
    agent = agent._replace(actor=actor, temperature=temperature)
    return agent, {"critic_loss": critic_losses, "actor_loss": actor_losses}
