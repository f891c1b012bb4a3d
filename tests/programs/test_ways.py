"""Which way the parameters of common layers go: one that only works is not what is wanted."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import optax_surgery as surgery
from tests.programs.programs import filled, normal, three

WIDTH = 32
ROWS = normal(2, WIDTH)


class Block(nn.Module):
    @nn.compact
    def __call__(self, hidden, _):
        return hidden + nn.tanh(nn.Dense(WIDTH)(hidden)), None


def scan_of(block):
    return nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)()


class First(nn.Module):
    inner: nn.Module

    def __call__(self, inputs):
        return self.inner(inputs, None)[0]


class Tied(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(64, WIDTH)
        return embed.attend(nn.tanh(embed(tokens)))


TOKENS = jnp.array([[3, 1, 3]])
IMAGES = normal(1, 4, 4, 8)
LAYERS = {
    "Dense": (nn.Dense(WIDTH), ROWS, {"kernel": "product", "bias": "stack"}),
    "DenseGeneral": (nn.DenseGeneral((4, 8)), ROWS, {"kernel": "product", "bias": "stack"}),
    "DenseGeneral from heads": (
        nn.DenseGeneral(WIDTH, axis=(-2, -1)),
        normal(2, 4, 8),
        {"kernel": "product", "bias": "stack"},
    ),
    "Dense in bfloat16": (
        nn.Dense(WIDTH, dtype=jnp.bfloat16),
        ROWS,
        {"kernel": "product", "bias": "stack"},
    ),
    "Embed": (nn.Embed(64, WIDTH), TOKENS, {"embedding": "product"}),
    "tied": (Tied(), TOKENS, {"Embed_0/embedding": "product"}),
    "Conv": (nn.Conv(8, (3, 3)), IMAGES, {"kernel": "stack", "bias": "stack"}),
    "scan": (
        First(scan_of(Block)),
        ROWS,
        {"inner/Dense_0/kernel": "slices", "inner/Dense_0/bias": "slices"},
    ),
    "remat": (
        First(nn.remat(Block)()),
        ROWS,
        {"inner/Dense_0/kernel": "slices", "inner/Dense_0/bias": "slices"},
    ),
    "scan of remat": (
        First(scan_of(nn.remat(Block, prevent_cse=False))),
        ROWS,
        {"inner/Dense_0/kernel": "slices", "inner/Dense_0/bias": "slices"},
    ),
}


def ways_of(losses_fn, params, *args):
    tx = surgery.pcgrad()
    fn = surgery.surgery_value_and_grad(losses_fn, tx)
    found = surgery.explain_leaves(fn, params, tx.init(params), *args)
    return {path: text.split(":")[0] for path, text in found.items()}


@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_goes_this_way(layer):
    module, inputs, ways = LAYERS[layer]
    params = filled(jax.eval_shape(module.init, jax.random.key(0), inputs))["params"]

    def losses_fn(params):
        return three(module.apply({"params": params}, inputs))

    assert ways_of(losses_fn, params) == ways


PLAIN = {
    "adapters": (lambda p: ROWS @ p["a"] @ p["b"], {"a": (WIDTH, 16), "b": (16, WIDTH)}),
    "used twice": (lambda p: jnp.tanh(ROWS @ p["w"]) @ p["w"], {"w": (WIDTH, WIDTH)}),
    "on either side": (lambda p: jnp.tanh(ROWS @ p["w"]) @ p["w"].T, {"w": (WIDTH, WIDTH)}),
    "reshaped and cast": (
        lambda p: ROWS @ p["w"].reshape(WIDTH, WIDTH).astype(jnp.bfloat16).astype(jnp.float32),
        {"w": (WIDTH * WIDTH,)},
    ),
    "jit within": (lambda p: jax.jit(jnp.matmul)(ROWS, p["w"]), {"w": (WIDTH, WIDTH)}),
}


@pytest.mark.parametrize("use", PLAIN)
def test_a_matrix_that_is_multiplied_goes_by_products(use):
    outputs_of, shapes = PLAIN[use]
    params = {key: normal(*shape) for key, shape in shapes.items()}
    found = ways_of(lambda params: three(outputs_of(params)), params)
    assert found == dict.fromkeys(params, "product")


def test_no_gradient_of_a_task_is_formed_within_a_scan_of_remat():
    module = First(scan_of(nn.remat(Block, prevent_cse=False)))
    params = filled(jax.eval_shape(module.init, jax.random.key(0), ROWS))
    tx = surgery.pcgrad()
    fn = surgery.surgery_value_and_grad(lambda params: three(module.apply(params, ROWS)), tx)
    compiled = jax.jit(fn).lower(params, tx.init(params)).compile()
    assert f"f32[3,{WIDTH},{WIDTH}]" not in compiled.as_text()
    assert f"f32[{WIDTH},{WIDTH}]" in compiled.as_text()


def test_the_way_of_data_of_their_own_is_told_whether_or_not_the_surgery_looks():
    params = {"w": normal(WIDTH, WIDTH)}

    def loss_fn(params, inputs):
        return jnp.sum(jnp.sin(inputs @ params["w"]))

    for tx in (surgery.pcgrad(), surgery.sum()):
        fn = surgery.per_task_surgery_value_and_grad(loss_fn, tx)
        found = surgery.explain_leaves(fn, params, tx.init(params), normal(3, 1, WIDTH))
        assert found["w"].startswith("product")
