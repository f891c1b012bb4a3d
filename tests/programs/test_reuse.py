"""Steps that reuse weights run one forward and one backward pass, and nothing else."""

import collections

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import optax_surgery as surgery
from tests.programs import comparison
from tests.programs.programs import normal

NUM_TASKS, WIDTH = 4, 24
PARAMS = [normal(WIDTH, WIDTH, seed=layer) for layer in range(3)]
HEADS = normal(WIDTH, NUM_TASKS)
INPUTS = normal(8, WIDTH)


def losses_fn(params):
    hidden = INPUTS
    for kernel in params:
        hidden = jnp.tanh(hidden @ kernel)
    return jnp.mean((hidden @ HEADS) ** 2, axis=0)


def scanned_losses(params):
    hidden = lax.scan(lambda h, w: (jnp.tanh(h @ w), None), INPUTS, jnp.stack(params))[0]
    return jnp.mean((hidden @ HEADS) ** 2, axis=0)


def own_loss(params, inputs):
    return jnp.mean(losses_fn(params)) * jnp.mean(inputs) + jnp.mean(jnp.tanh(inputs @ params[0]))


def products(jaxpr, within_branches):
    """How often a product of matrices of each size runs, in branches of a `cond` or outside."""
    found = collections.Counter()
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            sizes = sorted(var.aval.size for var in eqn.invars)
            if sizes[0] >= WIDTH * NUM_TASKS:  # the others are of weights and losses
                found[eqn.outvars[0].aval.size] += 1
        if within_branches or eqn.primitive.name != "cond":
            for inner in comparison.inner_programs(eqn):
                found.update(products(inner, within_branches))
    return found


def products_of(fn, *args, within_branches=False):
    return products(jax.make_jaxpr(fn)(*args).jaxpr, within_branches)


RESTING = {
    "every": lambda: surgery.every(surgery.nash_mtl(), 1000, NUM_TASKS),
    "start_after": lambda: surgery.start_after(surgery.pcgrad(), 10**6),
    "every, masked": lambda: surgery.on_nonfinite(
        surgery.every(surgery.nash_mtl(), 1000, NUM_TASKS), "mask"
    ),
}


@pytest.mark.parametrize("losses", [losses_fn, scanned_losses])
@pytest.mark.parametrize("rest", RESTING)
def test_outside_of_the_branch_lies_one_plain_gradient(rest, losses):
    tx = RESTING[rest]()
    step = surgery.surgery_value_and_grad(losses, tx)
    plain = products_of(jax.value_and_grad(lambda params: losses(params).sum()), PARAMS)
    assert products_of(step, PARAMS, tx.init(PARAMS)) == plain
    everything = products_of(step, PARAMS, tx.init(PARAMS), within_branches=True)
    assert everything.total() > plain.total()


@pytest.mark.parametrize("rest", ["every", "start_after"])
def test_outside_of_the_branch_lies_one_plain_gradient_of_data_of_their_own(rest):
    tx, data = RESTING[rest](), normal(NUM_TASKS, 8, WIDTH)
    step = surgery.per_task_surgery_value_and_grad(own_loss, tx)

    def plain(params):
        return jax.vmap(own_loss, (None, 0))(params, data).sum()

    assert products_of(step, PARAMS, tx.init(PARAMS), data) == products_of(
        jax.value_and_grad(plain), PARAMS
    )


def test_weights_in_use_make_the_update_of_a_resting_step():
    tx = surgery.every(surgery.mgda(), 3, NUM_TASKS)
    step = jax.jit(surgery.surgery_value_and_grad(losses_fn, tx))
    _, state = step(PARAMS, tx.init(PARAMS))
    moved = [0.5 * leaf for leaf in PARAMS]
    (_, grads), after = step(moved, state)
    expected = surgery.combine(state.weighting_state.weights_in_use, jax.jacrev(losses_fn)(moved))
    assert jax.tree.all(jax.tree.map(lambda a, b: jnp.allclose(a, b, atol=1e-6), grads, expected))
    assert (after.weighting_state.weights_in_use == state.weighting_state.weights_in_use).all()
