"""Exact surgery on programs of every kind: the inner products and sums of stacked gradients."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import optax_surgery as surgery
from tests.programs import comparison
from tests.programs.programs import NARROW, PROGRAMS, TOKENS, filled, normal, three


@functools.cache
def found_for(program):
    """In float32, each leaf by the way that is the cheaper."""
    return comparison.both_ways(*PROGRAMS[program]())


@functools.cache
def found_in_float64(program):
    """In float64, each leaf by products wherever it is multiplied."""
    with jax.enable_x64(True), comparison.multiplied():
        return comparison.both_ways(*PROGRAMS[program]())


# Where numbers are of 8 binary digits, so is the stack.
def tolerance_for(program):
    return 1e-2 if program in NARROW else 2e-5


WIDE = [name for name in PROGRAMS if name not in NARROW]
SOME = [*WIDE[::5], *sorted(NARROW)]
some_programs = pytest.mark.parametrize("program", SOME)
every_program = pytest.mark.parametrize("program", WIDE)


@some_programs
def test_the_gramian_is_that_of_the_stack(program):
    comparison.assert_gramian(found_for(program), tolerance_for(program))


@some_programs
def test_the_sum_of_given_weights_is_that_of_the_stack(program):
    comparison.assert_sums(found_for(program), tolerance_for(program))


@every_program
def test_the_gramian_is_that_of_the_stack_in_float64_by_products(program):
    comparison.assert_gramian(found_in_float64(program), 1e-12)


@every_program
def test_the_sum_of_given_weights_is_that_of_the_stack_in_float64_by_products(program):
    comparison.assert_sums(found_in_float64(program), 1e-12)


def recorder(within):
    """A surgery that keeps the Gramian in its state, looked at in a branch or not."""

    def rule(tasks, state):
        del state
        gramian = tasks.gramian
        if within:
            gramian = lax.cond(
                tasks.step == 0, lambda: tasks.gramian, lambda: 0 * tasks.losses[None]
            )
        return jnp.asarray(comparison.weights_for(tasks.num_tasks), tasks.dtype), gramian

    return surgery.gradient_surgery(
        surgery.Weighting(lambda: jnp.zeros((3, 3)), rule), name="recorder"
    )


@pytest.mark.parametrize("program", ["linen Dense", "linen Embed", "scan over layers, reversed"])
def test_a_surgery_sees_that_gramian_and_its_weights_make_that_sum(program):
    losses_fn, params = PROGRAMS[program]()
    tx = recorder(within=False)
    (_, grads), state = jax.jit(surgery.surgery_value_and_grad(losses_fn, tx))(
        params, tx.init(params)
    )
    seen = comparison.Found(
        np.asarray(state.weighting_state, np.float64),
        {"the update": comparison.by_rows(grads, 1)[0]},
        found_in_float64(program).rows,
    )
    comparison.assert_gramian(seen, 2e-5)
    comparison.assert_sums(seen, 2e-5)


def test_products_of_bfloat16_are_nearer_to_the_truth_than_the_stack():
    params, inputs = normal(6, 3), normal(9, 6).astype(jnp.bfloat16)

    def losses_of_outputs(outputs):
        return three(outputs)

    def losses_fn(params):
        return losses_of_outputs(inputs @ params.astype(jnp.bfloat16))

    outputs = inputs @ params.astype(jnp.bfloat16)
    back = np.asarray(jax.jacrev(losses_of_outputs)(outputs), np.float64)
    rows = np.einsum("pk,tpo->tko", np.asarray(inputs, np.float64), back).reshape(3, -1)
    with comparison.multiplied():
        found = comparison.both_ways(losses_fn, params)
    truth = rows @ rows.T
    lengths = np.linalg.norm(rows, axis=1)
    assert np.all(np.abs(found.gramian - truth) <= 2e-6 * np.outer(lengths, lengths))
    assert np.abs(found.gramian - truth).max() < np.abs(found.rows @ found.rows.T - truth).max()
    found = found._replace(rows=rows, sums={"ours": found.sums["what was kept"]})
    comparison.assert_sums(found, 2e-6)


# Tasks with data of their own


def linen_own(module, *args, head=jnp.sum):
    one = [jax.ShapeDtypeStruct(arg.shape[1:], arg.dtype) for arg in args]
    params = filled(jax.eval_shape(module.init, jax.random.key(0), *one))

    def loss_fn(params, *args):
        return head(jnp.sin(module.apply(params, *args)))

    return loss_fn, params, args


def plain_own(loss_fn, *args, **shapes):
    params = {key: normal(*shape, seed=seed) for seed, (key, shape) in enumerate(shapes.items())}
    return loss_fn, params, args


def scan_loss(p, x):
    def layer(hidden, w):
        return jnp.tanh(hidden @ w), None

    return jnp.mean(lax.scan(layer, x, p["w"])[0] ** 2)


def remat_loss(p, x):
    return jnp.mean(jax.checkpoint(lambda w, v: jnp.tanh(x @ w) @ v)(p["w"], p["v"]) ** 2)


def penalised_loss(p, x):
    """With a term of which the tasks' data are no part."""
    penalty = jax.checkpoint(lambda v: jnp.sum(jnp.sin(v)))(p["v"])
    decay = lax.scan(lambda total, u: (total + jnp.sum(u**2), None), 0.0, p["u"])[0]
    return jnp.mean((x @ p["w"]) ** 2) + penalty + decay + jnp.sum(p["b"] ** 2)


def tied_loss(p, tokens):
    return jnp.mean(jnp.sin(jnp.tanh(p["w"][tokens]) @ p["w"].T))


def weighted_loss(p, x, weight):
    return weight * jnp.mean(jnp.tanh(x @ p["a"] @ p["b"] + p["c"][None]) ** 2)


OWN = {
    "Dense": lambda: linen_own(nn.Dense(4), normal(5, 3, 6)),
    "Dense, one sample": lambda: linen_own(nn.Dense(4), normal(5, 6)),
    "layers": lambda: linen_own(
        nn.Sequential([nn.Dense(4), nn.relu, nn.LayerNorm(), nn.Dense(3)]), normal(5, 3, 6)
    ),
    "DenseGeneral": lambda: linen_own(nn.DenseGeneral((2, 2), axis=(-2, -1)), normal(4, 2, 3, 2)),
    "Embed": lambda: linen_own(nn.Embed(7, 4), jnp.tile(TOKENS, (3, 1)).reshape(3, 8)),
    "tied": lambda: plain_own(tied_loss, jnp.tile(TOKENS, (2, 1)), w=(7, 3)),
    "Conv": lambda: linen_own(nn.Conv(2, (2, 2)), normal(3, 2, 4, 4, 2)),
    "attention": lambda: linen_own(nn.MultiHeadDotProductAttention(2), normal(3, 2, 4)),
    "scan": lambda: plain_own(scan_loss, normal(4, 2, 5), w=(2, 5, 5)),
    "remat": lambda: plain_own(remat_loss, normal(4, 2, 5), w=(5, 4), v=(4, 3)),
    "terms without data": lambda: plain_own(
        penalised_loss, normal(4, 2, 5), w=(5, 2), v=(3,), u=(2, 3), b=(2,)
    ),
    "weights of their own": lambda: plain_own(
        weighted_loss, normal(4, 2, 5), normal(4), a=(5, 2), b=(2, 3), c=(3,)
    ),
    "a parameter that is the loss": lambda: plain_own(lambda p, x: p["w"], normal(3), w=()),
}


@functools.cache
def own_found_for(program, chunk_size):
    with jax.enable_x64(True), comparison.multiplied():
        return comparison.both_ways_of_own_data(*OWN[program](), chunk_size)


every_own_program = pytest.mark.parametrize(
    ("program", "chunk_size"),
    [(name, None) for name in OWN] + [(name, 2) for name in ("layers", "Embed", "scan", "remat")],
)


@every_own_program
def test_the_gramian_of_tasks_with_data_of_their_own_is_that_of_the_stack(program, chunk_size):
    comparison.assert_gramian(own_found_for(program, chunk_size), 1e-12)


@every_own_program
def test_the_sum_of_tasks_with_data_of_their_own_is_that_of_the_stack(program, chunk_size):
    comparison.assert_sums(own_found_for(program, chunk_size), 1e-12)


@pytest.mark.parametrize("program", ["layers", "Embed", "weights of their own"])
def test_data_of_their_own_in_float32_by_the_way_that_is_the_cheaper(program):
    found = comparison.both_ways_of_own_data(*OWN[program]())
    comparison.assert_gramian(found, 2e-5)
    comparison.assert_sums(found, 2e-5)
