"""What a user writes, for the type checker: nothing here runs."""

from collections.abc import Mapping
from typing import Any, assert_type

import jax
import jax.numpy as jnp
import optax

import optax_surgery as surgery
from optax_surgery.flax import (
    SurgeryTrainState,
    scaled_task_value_and_grad,
    task_dynamic_scale,
)

Params = Mapping[str, jax.Array]
Losses = dict[str, jax.Array]


def losses_fn(params: Params, inputs: jax.Array, *, train: bool = True) -> Losses:
    outputs = jnp.tanh(inputs @ params["trunk"]) * (2.0 if train else 1.0)
    return {"fit": jnp.mean(outputs), "decay": jnp.sum(params["trunk"] ** 2)}


def losses_and_aux(params: Params, inputs: jax.Array) -> tuple[jax.Array, Losses]:
    losses = jnp.stack(list(losses_fn(params, inputs).values()))
    return losses, {"inputs": inputs}


def stacked(params: Params, inputs: jax.Array) -> Any:
    tx = optax.chain(surgery.pcgrad(), optax.adam(1e-3))
    state = tx.init(params)
    losses, task_grads = surgery.task_value_and_grad(losses_fn)(params, inputs, train=False)
    assert_type(losses, Losses)
    updates, state = tx.update(task_grads, state, params, losses=losses)
    new_params = optax.apply_updates(params, updates)
    surgery.scalars(state, names=surgery.task_names(losses))

    # The parameters of the user's function are known: these are errors.
    surgery.task_value_and_grad(losses_fn)(params, inputs, trian=False)  # pyright: ignore[reportCallIssue]
    surgery.task_value_and_grad(losses_fn)(params)  # pyright: ignore[reportCallIssue]
    surgery.task_value_and_grad(losses_fn)(params, "inputs")  # pyright: ignore[reportArgumentType]

    fn = surgery.task_value_and_grad(losses_and_aux, has_aux=True, chunk_size=2)
    (vector, aux), _ = fn(params, inputs)
    assert_type(vector, jax.Array)
    assert_type(aux, Losses)
    return new_params, aux


def own_data(params: Params, batches: jax.Array) -> jax.Array:
    def loss_fn(params: Params, batch: jax.Array, scale: float) -> jax.Array:
        return scale * jnp.mean(batch @ params["trunk"])

    fn = surgery.per_task_value_and_grad(loss_fn)
    losses, _ = fn(params, batches, scale=0.5)
    return losses


def streamed(params: Params, inputs: jax.Array) -> Any:
    tx = surgery.every(surgery.aligned_mtl(preference=[0.3, 0.7]), k=10, num_tasks=2)
    optimizer = optax.adam(1e-3)
    shared = surgery.infer_shared(losses_fn, params, inputs, train=False)
    fn = surgery.surgery_value_and_grad(losses_fn, tx, shared=shared)
    mask = {"fit": True, "decay": False}
    (losses, grads), _ = fn(
        params, tx.init(params), inputs, train=True, extra_args={"task_mask": mask}
    )
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    return losses, optax.apply_updates(params, updates)


def on_features(trunk: jax.Array, heads: Params, inputs: jax.Array) -> Any:
    def encode(trunk: jax.Array, inputs: jax.Array) -> jax.Array:
        return inputs @ trunk

    def task_losses(heads: Params, features: jax.Array, inputs: jax.Array) -> list[jax.Array]:
        return [jnp.mean(features @ head) for head in heads.values()]

    tx = surgery.mgda("l2")
    fn = surgery.feature_surgery_value_and_grad(encode, task_losses, tx, heads="weighted")
    (losses, (trunk_grads, head_grads)), state = fn(trunk, heads, tx.init(trunk), inputs)
    return losses, trunk_grads, head_grads, state


def surgeries() -> list[surgery.Surgery]:
    clip = surgery.per_task(optax.clip_by_global_norm(1.0), num_tasks=2)
    return [
        surgery.constant({"a": 1.0, "b": 2.0}),
        surgery.constant([1.0, 2.0]),
        surgery.aligned_mtl(preference=jnp.array([0.3, 0.7])),
        surgery.on_shared(surgery.pcgrad(), lambda path: path.startswith("trunk")),
        surgery.on_shared(surgery.pcgrad(), ["trunk", "norm"]),
        surgery.leafwise(surgery.famo(num_tasks=2)),
        surgery.on_tasks(surgery.cagrad(0.4), ["fit"]),
        surgery.every(surgery.start_after(surgery.pcgrad(), 100), k=10, num_tasks=2),
        surgery.monitor(2, surgery.clip_tasks(surgery.nash_mtl(), max_norm=1.0)),
        surgery.normalize_tasks(surgery.mean(), "ema", num_tasks=2),
        surgery.Surgery(*optax.chain(clip, surgery.pcgrad())),
        surgery.Surgery(*optax.inject_hyperparams(surgery.cagrad)(c=optax.constant_schedule(0.4))),
    ]


def own_rule() -> surgery.Surgery:
    def normalised(tasks: surgery.Tasks, state: tuple[()]) -> tuple[jax.Array, tuple[()]]:
        return 1 / jnp.maximum(surgery.task_norms(tasks.gramian), 1e-12), state

    weighting = surgery.Weighting(init=tuple, update=normalised)
    return surgery.gradient_surgery(weighting, name="normalised")


def train_state(params: Params, inputs: jax.Array) -> SurgeryTrainState:
    tx = surgery.on_nonfinite(optax.chain(surgery.famo(num_tasks=2), optax.adam(1e-3)), "mask")
    state = SurgeryTrainState.create(apply_fn=losses_fn, params=params, tx=tx)
    losses, task_grads = surgery.task_value_and_grad(losses_fn)(state.params, inputs)
    state = state.apply_gradients(grads=task_grads, losses=losses)
    fn = scaled_task_value_and_grad(losses_fn)
    result = fn(task_dynamic_scale(num_tasks=2), params, inputs, train=True)
    return state.apply_gradients(grads=result.grad)
