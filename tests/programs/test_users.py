"""Programs as users have them: what is read off them, and all that they are run within."""

import json
import os
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import optax_surgery as surgery
from tests.programs import comparison
from tests.programs.programs import normal

A, B, C = normal(3, seed=1), normal(3, seed=2), normal(3, seed=3)


def stacked(p):
    return jnp.stack([p["a"], p["b"]])


def head_outputs(p):
    return jnp.stack([jnp.sin(p["c"]) * p["a"], jnp.sin(p["c"]) * p["b"]], axis=1)


def batches(p, fn=lambda p: head_outputs(p).sum(axis=0)):
    total, _ = lax.scan(lambda total, x: (total + x * fn(p), None), jnp.zeros(2), jnp.arange(3.0))
    return total


def printed(p, where):
    if where == "callback":
        jax.debug.callback(lambda *_: None, p["a"], p["c"])
    elif where == "print":
        jax.debug.print("{}", p["a"][0] * 0)
    elif where == "ordered":
        jax.debug.print("{}", p["b"].size, ordered=True)
    elif where == "pure":
        shape = jax.ShapeDtypeStruct((), p["c"].dtype)
        scale = jax.pure_callback(np.sum, shape, lax.stop_gradient(p["c"]))
        return scale * head_outputs(p).sum(axis=0)
    return head_outputs(p).sum(axis=0)


@jax.custom_vjp
def fused(x):
    return x * 2


fused.defvjp(lambda x: (2 * x, None), lambda _, d: (2 * d,))

HEADS_ALONE = {
    # behind what wraps a program
    "relu": lambda p: jax.nn.relu(head_outputs(p)).sum(axis=0),
    "softplus": lambda p: jax.nn.softplus(head_outputs(p)).sum(axis=0),
    "gelu": lambda p: jax.nn.gelu(head_outputs(p)).sum(axis=0),
    "an optax loss": lambda p: optax.sigmoid_binary_cross_entropy(
        head_outputs(p), jnp.ones((3, 2))
    ).sum(axis=0),
    "another optax loss": lambda p: optax.huber_loss(head_outputs(p)).sum(axis=0),
    "checkpoint": jax.checkpoint(lambda p: head_outputs(p).sum(axis=0)),
    "checkpoint of checkpoint": jax.checkpoint(jax.checkpoint(lambda p: head_outputs(p).sum(0))),
    "jit": jax.jit(lambda p: head_outputs(p).sum(axis=0)),
    "micro-batches": batches,
    "micro-batches of checkpoint": partial(
        batches, fn=jax.checkpoint(lambda p: head_outputs(p).sum(axis=0))
    ),
    "cond": lambda p: lax.cond(p["c"][0] > 9, batches, lambda p: head_outputs(p).sum(axis=0), p),
    "custom_vjp before the heads": lambda p: head_outputs(p | {"c": fused(p["c"])}).sum(axis=0),
    # axes of size 1
    "times one row": lambda p: (head_outputs(p) * jnp.stack([p["c"]], axis=1)).sum(axis=0),
    "times one column": lambda p: (head_outputs(p) * p["c"].sum()[None, None]).sum(axis=0),
    "with an axis more": lambda p: (head_outputs(p)[:, None] * p["c"][:, None, None]).sum((0, 1)),
    "with a last axis": lambda p: (head_outputs(p)[..., None] + p["c"][:, None, None]).sum((0, 2)),
    # effects
    "debug.callback": partial(printed, where="callback"),
    "debug.print": partial(printed, where="print"),
    "debug.print in order": partial(printed, where="ordered"),
    "pure_callback": partial(printed, where="pure"),
}


@pytest.mark.parametrize("kind", HEADS_ALONE)
def test_heads_are_told_from_what_is_shared(kind):
    found = surgery.infer_shared(HEADS_ALONE[kind], {"a": A, "b": B, "c": C})
    assert found == {"a": False, "b": False, "c": True}


def test_one_row_is_broadcast_to_both_losses():
    """A.10 of the reports of users: one equation between axes of size 1 and 2."""

    def losses_fn(p):
        return (jnp.stack([p["a"], p["b"]]) * jnp.stack([p["a"]])).sum(axis=1)

    assert surgery.infer_shared(losses_fn, {"a": A, "b": B}) == {"a": True, "b": False}


MIXED = {
    "rounded to integers": lambda p: [(p["a"] * jnp.argmax(p["b"])).sum(), p["c"].sum()],
    "stopped": lambda p: [(p["a"] * lax.stop_gradient(p["c"])).sum(), p["c"].sum()],
    "compared": lambda p: [jnp.where(p["c"] > 0, p["a"], 0.0).sum(), (p["b"] * p["c"]).sum()],
}


@pytest.mark.parametrize("kind", MIXED)
def test_what_has_no_derivative_shares_nothing(kind):
    found = surgery.infer_shared(MIXED[kind], {"a": A, "b": B, "c": C})
    assert found == {"a": False, "b": False, "c": False}


def test_what_comes_back_through_a_rule_of_the_user_may_be_of_any_loss():
    def losses_fn(p):
        return fused(head_outputs(p)).sum(axis=0)

    found = surgery.infer_shared(losses_fn, {"a": A, "b": B, "c": C})
    assert found == {"a": True, "b": True, "c": True}


def test_feature_surgery_takes_a_callback_in_the_encoder_and_in_the_heads():
    tx, trunk, heads = surgery.mgda(), normal(5, 3), normal(3, 2)

    def encode(trunk):
        jax.debug.callback(lambda _: None, trunk)
        return jnp.tanh(normal(4, 5) @ trunk)

    def task_losses(heads, features):
        jax.debug.callback(lambda _: None, features)
        return jnp.mean((features @ heads) ** 2, axis=0)

    fn = surgery.feature_surgery_value_and_grad(encode, task_losses, tx)
    (losses, (grads, _)), _ = jax.jit(fn)(trunk, heads, tx.init(trunk))
    by_features = jax.jacrev(task_losses, 1)(heads, encode(trunk))
    update, _ = tx.update(by_features, tx.init(None))
    expected = jax.vjp(encode, trunk)[1](update)[0]
    np.testing.assert_allclose(grads, expected, atol=1e-5)
    np.testing.assert_allclose(losses, task_losses(heads, encode(trunk)), rtol=1e-5)


# What a step is run within

PARAMS = {
    "table": normal(7, 5),
    "w": normal(5, 6),
    "layers": normal(2, 6, 6) / 2,
    "head": normal(6, 3),
    "b": normal(3),
}
INPUTS, TOKENS = normal(8, 5), jnp.arange(8) % 7


def losses_fn(params, inputs, tokens, *, scale=1.0, mode="plain"):
    """A matrix used twice, a table, a loop, and a part that is computed again."""
    hidden = jnp.tanh(inputs @ params["w"] + params["table"][tokens] @ params["w"])
    hidden = lax.scan(lambda h, w: (jnp.tanh(h @ w), None), hidden, params["layers"])[0]
    if mode == "half":
        hidden = hidden / 2
    part = jax.checkpoint(lambda head, b, hidden: jnp.sin(hidden @ head) + b[None])
    return scale * jnp.mean(part(params["head"], params["b"], hidden) ** 2, axis=0)


TX = surgery.pcgrad()


def exact(params, *args, tx=TX, **kwargs):
    step = surgery.surgery_value_and_grad(losses_fn, tx)
    return step(params, tx.init(params), *args, **kwargs)[0][1]


def by_stack(params, *args, tx=TX, **kwargs):
    stack = jax.jacrev(partial(losses_fn, **kwargs))(params, *args)
    return tx.update(stack, tx.init(params), params)[0]


compiled = jax.jit(by_stack, static_argnames="mode")


def assert_same(found, expected, tolerance=1e-5):
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, atol=tolerance * np.abs(other).max())


def test_arguments_by_keyword_and_static_ones():
    keywords = {"scale": 2.0, "mode": "half"}
    step = jax.jit(exact, static_argnames="mode")
    expected = compiled(PARAMS, INPUTS, TOKENS, **keywords)
    assert_same(step(PARAMS, INPUTS, tokens=TOKENS, **keywords), expected)


@pytest.mark.parametrize("num_seeds", [3, 4])  # as many as tasks, and more
def test_over_seeds(num_seeds):
    seeds = [scaled(1 - 0.1 * seed) for seed in range(num_seeds)]
    many = jax.tree.map(lambda *leaves: jnp.stack(leaves), *seeds)
    found = jax.jit(jax.vmap(lambda params: exact(params, INPUTS, TOKENS)))(many)
    expected = [compiled(params, INPUTS, TOKENS) for params in seeds]
    assert_same(found, jax.tree.map(lambda *leaves: jnp.stack(leaves), *expected))


def scaled(factor):
    return jax.tree.map(lambda leaf: factor * leaf, PARAMS)


def test_over_steps_in_one_loop():
    tx = surgery.every(surgery.pcgrad(), 2, 3)

    def moved(params, grads):
        return jax.tree.map(lambda leaf, grad: leaf - 0.1 * grad, params, grads)

    def body(carry, _):
        params, state = carry
        step = surgery.surgery_value_and_grad(losses_fn, tx)
        (losses, grads), state = step(params, state, INPUTS, TOKENS)
        return (moved(params, grads), state), losses

    _, found = lax.scan(body, (PARAMS, tx.init(PARAMS)), length=3)
    params, state, expected = PARAMS, tx.init(PARAMS), []
    gradients = jax.jit(jax.jacrev(losses_fn))
    for _ in range(3):
        expected.append(losses_fn(params, INPUTS, TOKENS))
        grads, state = tx.update(gradients(params, INPUTS, TOKENS), state, params)
        params = moved(params, grads)
    assert_same(found, jnp.stack(expected))


def test_under_strict_promotion_in_float64():
    with (
        jax.enable_x64(True),
        jax.numpy_dtype_promotion("strict"),
        jax.numpy_rank_promotion("raise"),
    ):
        params, inputs = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), (PARAMS, INPUTS))
        with comparison.multiplied():
            found = jax.jit(exact)(params, inputs, TOKENS)
        assert_same(found, jax.jit(by_stack)(params, inputs, TOKENS), 1e-10)


def test_data_of_their_own_under_strict_promotion():
    inputs, tokens = INPUTS.reshape(4, 2, 5), TOKENS.reshape(4, 2)

    def loss_fn(params, inputs, tokens):
        return jnp.sum(losses_fn(params, inputs, tokens))

    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        fn = surgery.per_task_surgery_value_and_grad(loss_fn, TX)
        (_, found), _ = jax.jit(fn)(PARAMS, TX.init(PARAMS), inputs, tokens)
    stack = jax.jit(jax.vmap(jax.grad(loss_fn), (None, 0, 0)))(PARAMS, inputs, tokens)
    assert_same(found, TX.update(stack, TX.init(PARAMS))[0])


def test_the_update_can_be_differentiated_where_nothing_lies_in_loops():
    params = {"w": PARAMS["w"], "head": PARAMS["head"]}

    def losses(params):
        return jnp.mean(jnp.sin(jnp.tanh(INPUTS @ params["w"]) @ params["head"]) ** 2, axis=0)

    def length(update):
        return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(update))

    def ours(params):
        return length(surgery.surgery_value_and_grad(losses, TX)(params, TX.init(params))[0][1])

    def of_stack(params):
        return length(TX.update(jax.jacrev(losses)(params), TX.init(params), params)[0])

    with comparison.multiplied():
        assert_same(jax.jit(jax.grad(ours))(params), jax.jit(jax.grad(of_stack))(params))


# Devices have to be asked for before JAX starts.
PROGRAM = """
import contextlib, json, sys
import jax, jax.numpy as jnp, numpy as np
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import optax_surgery as surgery
from tests.programs import comparison
from tests.programs.test_users import INPUTS, PARAMS, TOKENS, TX, by_stack, exact, losses_fn

report = {}
def compare(name, found, expected):
    errors = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max() / jnp.abs(b).max()),
                          jax.device_get(found), jax.device_get(expected))
    report[name] = max(jax.tree.leaves(errors))

stacked = jax.jit(by_stack)
expected = stacked(PARAMS, INPUTS, TOKENS)
scales = [1.0, 0.9, 0.8, 0.7]
many = [jax.tree.map(lambda leaf: scale * leaf, PARAMS) for scale in scales]
of_many = [stacked(params, INPUTS, TOKENS) for params in many]
join = lambda trees: jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
of_parts = [stacked(PARAMS, INPUTS[2 * i:2 * i + 2], TOKENS[2 * i:2 * i + 2]) for i in range(4)]
mean_of_parts = jax.tree.map(lambda leaves: leaves.mean(axis=0), join(of_parts))

def averaged(params, inputs, tokens):
    step = surgery.surgery_value_and_grad(
        lambda params, *args: lax.pmean(losses_fn(params, *args), "d"), TX)
    return step(params, TX.init(params), inputs, tokens)[0][1]

def a_seed_a_device(params, inputs, tokens):
    one = jax.tree.map(lambda leaf: leaf[0], params)
    return jax.tree.map(lambda leaf: leaf[None], exact(one, inputs, tokens))

def a_surgery_a_device(params, inputs, tokens):
    params = jax.tree.map(lambda leaf: lax.pcast(leaf, "d", to="varying"), params)
    return lax.pmean(exact(params, inputs, tokens), "d")

def reused(params, inputs, tokens):
    tx = surgery.every(TX, 2, 3)
    params, state = jax.tree.map(
        lambda leaf: lax.pcast(leaf, "d", to="varying"), (params, tx.init(params)))
    step = surgery.surgery_value_and_grad(losses_fn, tx)
    return lax.pmean(step(params, state, inputs, tokens)[0][1], "d")

mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))
rows = (P(), P("d"), P("d"))
def mapped(fn, specs=rows, out=P()):
    return jax.jit(jax.shard_map(fn, mesh=mesh, in_specs=specs, out_specs=out))
def put(tree, spec):
    return jax.device_put(tree, NamedSharding(mesh, spec))
with comparison.multiplied():
    compare("shard_map", mapped(averaged)(PARAMS, INPUTS, TOKENS), expected)
    found = mapped(a_surgery_a_device)(PARAMS, INPUTS, TOKENS)
    compare("a surgery a device", found, mean_of_parts)
    compare("reuse", mapped(reused)(PARAMS, INPUTS, TOKENS), mean_of_parts)
    found = mapped(a_seed_a_device, (P("d"), P(), P()), P("d"))(join(many), INPUTS, TOKENS)
    compare("a seed a device", found, join(of_many))
    found = jax.jit(exact)(put(PARAMS, P()), put(INPUTS, P("d")), put(TOKENS, P("d")))
    compare("jit over a mesh", found, expected)
found = jax.pmap(lambda params: exact(params, INPUTS, TOKENS))(join(many))
compare("pmap", found, join(of_many))

explicit = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Explicit,))
def dense(params, inputs):
    hidden = lax.scan(lambda h, w: (jnp.tanh(h @ w), None), inputs @ params["w"], params["layers"])
    return jnp.mean(jax.checkpoint(jnp.matmul)(hidden[0], params["head"]) ** 2, axis=0)
few = {name: PARAMS[name] for name in ("w", "layers", "head")}
step = jax.jit(lambda params, inputs: surgery.surgery_value_and_grad(dense, TX)(
    params, TX.init(params), inputs)[0][1])
with jax.set_mesh(explicit), comparison.multiplied():
    found = step(jax.device_put(few, NamedSharding(explicit, P())),
                 jax.device_put(INPUTS, NamedSharding(explicit, P("d"))))
compare("explicit mesh", found, TX.update(jax.jacrev(dense)(few, INPUTS), TX.init(few))[0])
json.dump(report, sys.stdout)
"""


@pytest.fixture(scope="module")
def report():
    flags = "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": root},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout)


def test_over_devices_updates_are_those_of_one(report):
    assert len(report) == 7
    assert {name: error for name, error in report.items() if not error < 1e-5} == {}
