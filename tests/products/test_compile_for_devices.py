"""The forms of the two products for accelerators: right on any device, compiled where possible."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.systems import compiled  # before JAX looks for devices
from optax_surgery.products import gpu, tpu

# A scalar, few coordinates, a divisor that is a good length, none (elementwise, then blocks), and
# an array that fills a TPU's tiles better the other way round.
SHAPES = [(), (3, 5), (64, 96), (2503,), (17_389,), (20, 1000)]
FORMS = {"tpu": tpu.gramian, "gpu": gpu.gramian}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_the_form_for_an_accelerator_gives_the_gramian(form, shape):
    random = np.random.default_rng(0)
    left, right = random.normal(size=(2, 3, *shape))
    gramian = jax.jit(lambda *rows: FORMS[form](*rows, symmetric=False, dtype=jnp.float32))
    found = gramian(jnp.float32(left), jnp.float32(right), jnp.float32(2))
    left, right = (rows.reshape(3, -1) for rows in (left, right))
    norms = np.linalg.norm(left, axis=1)[:, None] * np.linalg.norm(right, axis=1)
    np.testing.assert_allclose(found / norms, 4 * left @ right.T / norms, atol=1e-6)


@pytest.mark.parametrize("device", ["v5e", "h100"])
def test_the_compiled_products_copy_no_rows(device):
    if not importlib.util.find_spec(compiled.COMPILERS[device]):
        pytest.skip('the compilers come with pip install -e ".[compiled]"')
    for shape in [(300, 500), (3, 3, 64, 64), (104_729,)]:
        found = compiled.measure_leaf(device, 10, shape)
        assert found["temporaries"] < 0.2 * 10 * 4 * np.prod(shape), shape
