"""Executes what our messages advise: every text in backticks is evaluated as it stands."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_surgery as surgery
import optax_surgery.flax

MESSAGE = r"^Expected .+, got .+ at '.+'\. .+"

PUBLIC = {name: getattr(surgery, name) for name in [*surgery.__all__, "sum"]}
PARAMS = {"trunk": jnp.ones(2), "head": jnp.ones(())}
UPDATES = {"trunk": jnp.array([[1.0, 0.0], [-1.0, 1.0], [0.0, 2.0]]), "head": jnp.arange(3.0)}
LOSSES = {"actor": 1.0, "image": 2.0, "reward": 3.0}
TX = surgery.mean()


def losses_fn(params):
    total = jnp.sum(params["trunk"])
    return {"actor": total, "image": total * params["head"], "reward": total**2}


# What a user has under the names of our parameters.
OBJECTS = {
    "T": 3,
    "encode": lambda params: params["trunk"],
    "every_k": 2,
    "first_loss": jnp.ones(()),
    "extra_args": {"task_mask": jnp.array([True, False, True])},
    "group_of": lambda path: path.split("/")[0],
    "init": TX.init,
    "inner": surgery.mgda(),
    "k": 2,
    "key": 0,
    "learning_rate": 0.1,
    "leak": np.full(3, 0.5),
    "loss_fn": lambda params, target: jnp.sum((params["trunk"] - target) ** 2),
    "losses": LOSSES,
    "losses_fn": losses_fn,
    "lower_bounds": np.zeros(3),
    "initial_weights": np.zeros(3),
    "max_norm": 1.0,
    "new_state": TX.init(PARAMS),
    "num_tasks": 3,
    "optimizer": optax.sgd(0.1),
    "other": UPDATES,
    "params": PARAMS,
    "penalty": 1.0,
    "preference": np.ones(3),
    "reference": np.zeros(3),
    "rule": surgery.StackedRule(lambda params: (), lambda tasks, updates, state: (updates, state)),
    "scores": np.ones(3),
    "second_loss": jnp.ones(()),
    "shared": "trunk",
    "state": TX.init(PARAMS),
    "surgery": surgery.pcgrad(),
    "task_losses": lambda params, features: jnp.stack([jnp.sum(features), params["head"]]),
    "task_mask": {"actor": True, "image": False, "reward": True},
    "task_updates": UPDATES,
    "tasks": [0, 1, 2],
    "tx": optax.chain(surgery.pcgrad(), optax.sgd(0.1)),
    "update": TX.update,
    "updates": UPDATES,
    "weighting": surgery.Weighting(tuple, lambda tasks, state: (tasks.losses, state)),
    "weights": np.ones(3),
}
NAMES = (
    vars(optax)
    | {
        name: getattr(optax_surgery.flax, name)
        for name in ("scaled_task_value_and_grad", "task_dynamic_scale")
    }
    | PUBLIC
    | OBJECTS
    | {"jax": jax, "jnp": jnp, "optax": optax}
)


def message_of(refused):
    """The message of a ValueError, without what JAX adds to it; its form is checked."""
    message = str(refused).split("\n----")[0]
    assert re.search(MESSAGE, message), message
    return message


def execute(refused, **names):
    """Evaluates all that a refusal has in backticks, and returns what comes of it.

    Args:
      refused: the ValueError.
      **names: what the user has under other names, or instead of `OBJECTS`.
    """
    texts = re.findall(r"`([^`]*)`", message_of(refused))
    with_module = r"\b(optax_surgery|surgery|optax(?!\.contrib))\."
    assert not [text for text in texts if re.search(with_module, text)], texts
    return [eval(text, NAMES | names) for text in texts]
