"""What the compiler makes of an update: nothing is computed that is not used."""

import re

import jax
import jax.numpy as jnp
import optax
import pytest

import optax_surgery as surgery

# The embedding is large enough for the CPU to read it block by block, in a loop.
PARAMS = {"kernel": jnp.ones((30, 40)), "bias": jnp.ones(70), "embedding": jnp.ones((300, 300))}
TASK_GRADS = jax.tree.map(lambda leaf: jnp.ones((4, *leaf.shape)), PARAMS)


def num_products(tx):
    """The matrix products and the loops that an update compiles to."""
    program = jax.jit(tx.update).lower(TASK_GRADS, tx.init(PARAMS), PARAMS).compile().as_text()
    return len(re.findall(r" (?:dot|custom-call|while)\(", program))


@pytest.mark.parametrize("make", [surgery.pcgrad, surgery.aligned_mtl, surgery.mean])
def test_a_monitor_adds_no_gramian_to_a_surgery(make):
    alone, monitored = make(), optax.chain(surgery.monitor(4), make())
    in_monitor = num_products(surgery.monitor(4))
    assert in_monitor >= len(PARAMS)
    if make is surgery.mean:  # which needs no Gramian of its own
        assert num_products(monitored) == num_products(alone) + in_monitor
    else:
        assert num_products(monitored) == num_products(alone)


@pytest.mark.parametrize("make", [surgery.mean, surgery.sum, lambda: surgery.constant(jnp.ones(4))])
def test_a_method_that_needs_no_gramian_computes_none(make):
    tx = make()
    program = jax.jit(tx.update).lower(TASK_GRADS, tx.init(PARAMS), PARAMS).compile().as_text()
    assert "f32[4,4]" not in program
    assert " while(" not in program


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("num_tasks", [4, 40])
@pytest.mark.parametrize("make", [surgery.pcgrad, surgery.aligned_mtl, surgery.mean])
def test_an_update_holds_no_copy_of_the_gradients(make, num_tasks, masked):
    stack = jax.ShapeDtypeStruct((num_tasks, 500, 500), jnp.float32)
    mask = {"task_mask": jax.ShapeDtypeStruct((num_tasks,), bool)} if masked else {}
    update = jax.jit(lambda stack, **mask: make().update(stack, make().init(None), **mask)[0])
    memory = update.lower(stack, **mask).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 0.3 * 4 * stack.size


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
