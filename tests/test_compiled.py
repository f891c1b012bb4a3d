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
