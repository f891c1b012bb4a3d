"""What the compiler makes of an update: nothing is computed that is not used."""

import re

import jax
import jax.numpy as jnp
import optax
import pytest

import optax_surgery as surgery

PARAMS = {"kernel": jnp.ones((30, 40)), "bias": jnp.ones(70)}
TASK_GRADS = jax.tree.map(lambda leaf: jnp.ones((4, *leaf.shape)), PARAMS)


def num_matrix_products(tx):
    program = jax.jit(tx.update).lower(TASK_GRADS, tx.init(PARAMS), PARAMS).compile().as_text()
    return len(re.findall(r" (?:dot|custom-call)\(", program))


@pytest.mark.parametrize("make", [surgery.pcgrad, surgery.aligned_mtl, surgery.mean])
def test_a_monitor_adds_no_matrix_product_to_a_surgery(make):
    alone, monitored = make(), optax.chain(surgery.monitor(4), make())
    gramian_products = num_matrix_products(surgery.monitor(4))
    assert gramian_products >= len(PARAMS)
    if make is surgery.mean:  # which needs no Gramian of its own
        assert num_matrix_products(monitored) == num_matrix_products(alone) + gramian_products
    else:
        assert num_matrix_products(monitored) == num_matrix_products(alone)


@pytest.mark.parametrize("make", [surgery.mean, surgery.sum, lambda: surgery.constant(jnp.ones(4))])
def test_a_method_that_needs_no_gramian_computes_none(make):
    assert num_matrix_products(make()) == len(PARAMS)  # the combination of each leaf


def test_under_vmap_the_rare_second_gramian_stays_a_branch():
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), TASK_GRADS)
    program = jax.jit(jax.vmap(surgery.pcgrad().update, in_axes=(0, None)))
    compiled = program.lower(stacked, surgery.pcgrad().init(None)).compile().as_text()
    assert re.findall(r" conditional\(", compiled)


def test_under_vmap_each_member_keeps_a_gramian_in_its_range():
    scales = jnp.array([1e-30, 1.0, 1e30])
    jacobian = jnp.array([[1.0, 0.0], [-1.0, 1.0]])
    tx = surgery.pcgrad()
    batch = scales[:, None, None] * jacobian[None]
    updates = jax.vmap(lambda rows: tx.update(rows, tx.init(None))[0])(batch)
    expected = scales[:, None] * jnp.array([[0.5, 1.5]])
    assert jnp.allclose(updates / scales[:, None], expected / scales[:, None], rtol=1e-5)
