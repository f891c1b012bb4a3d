"""Small tasks count: weights found in float32 are those of float64, however much norms differ."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_surgery as surgery
from tests.cases import FROM_THE_GRAMIAN, losses_of

SPREADS = [1, 1e2, 1e4, 1e6, 1e7]
SEEDS = range(3)
MODES = ["min", "median", "rmse"]
METHODS = {
    name: case
    for name, case in FROM_THE_GRAMIAN.items()
    if not case.needs_gramian and name not in ("krum", "multi_krum")  # their ties are decided anew
}


def jacobians(num_tasks, num_coordinates=300):
    """Unit gradients of condition up to 50, in conflict, times norms that are spread."""
    random = np.random.default_rng(num_tasks)
    shape = (len(SPREADS), len(SEEDS), num_tasks)
    found = random.standard_normal((*shape, num_coordinates))
    found += 0.5 * random.standard_normal((*shape[:2], 1, num_coordinates))
    found[:, :, ::3] *= -1
    norms = np.stack([np.geomspace(1, 1 / spread, num_tasks) for spread in SPREADS])
    norms = random.permuted(np.broadcast_to(norms[:, None], shape), axis=-1)
    found *= (norms / np.linalg.norm(found, axis=-1))[..., None]
    return found.astype("f4").astype(float).reshape(-1, num_tasks, num_coordinates)


def weights_of(tx, gramians, dtype):
    num_tasks = gramians.shape[-1]

    def weights(gramian):
        identity = jnp.eye(num_tasks, dtype=dtype)
        losses = jnp.asarray(losses_of(num_tasks), dtype)
        update, _ = tx.update(identity, tx.init(identity[0]), gramian=gramian, losses=losses)
        return update

    return np.asarray(jax.jit(jax.vmap(weights))(gramians), float)


def errors(found, expected, rows):
    found, expected = (np.einsum("st,stn->sn", weights, rows) for weights in (found, expected))
    return np.linalg.norm(found - expected, axis=1) / np.linalg.norm(expected, axis=1)


def condition_of_cosines(rows):
    units = rows / np.linalg.norm(rows, axis=-1, keepdims=True)
    return np.linalg.cond(units @ units.swapaxes(1, 2))


def allowed(rows):
    condition = condition_of_cosines(rows)
    beyond = 4 * np.finfo("f4").eps * np.sqrt(rows.shape[1]) * condition
    return np.where(condition <= 50, 1e-5, beyond)


def singular_value_rule(rows, preference, mode):
    """Weights of Aligned-MTL from J itself, in float64."""
    left, values, _ = np.linalg.svd(rows, full_matrices=False)
    scale = {
        "min": values[-1],
        "median": values[len(values) // 2],  # they descend: the lower of two
        "rmse": np.sqrt(np.mean(values**2)),
    }[mode]
    return scale * (left / values) @ (left.T @ preference)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("num_tasks", [2, 3, 11, 64])
def test_aligned_mtl_keeps_every_task(num_tasks, mode):
    rows = jacobians(num_tasks)
    assert num_tasks < 64 or condition_of_cosines(rows).max() > 20
    gramians = jax.vmap(surgery.gramian)(jnp.asarray(rows, "f4"))
    preference = np.linspace(1, 2, num_tasks)
    tx = surgery.aligned_mtl(preference.astype("f4"), mode)
    found = weights_of(tx, gramians, jnp.float32)
    expected = np.stack([singular_value_rule(one, preference, mode) for one in rows])
    assert (errors(found, expected, rows) <= allowed(rows)).all()


def test_aligned_mtl_of_nearly_parallel_gradients_is_as_right_as_their_cosines_are():
    random = np.random.default_rng(0)
    common = random.standard_normal(300)
    rows = np.stack(
        [common + distance * random.standard_normal((4, 300)) for distance in (0.3, 0.1, 0.03)]
    )
    rows = (rows * np.geomspace(1, 1e-6, 4)[:, None]).astype("f4").astype(float)
    gramians = jax.vmap(surgery.gramian)(jnp.asarray(rows, "f4"))
    found = weights_of(surgery.aligned_mtl(), gramians, jnp.float32)
    expected = np.stack([singular_value_rule(one, np.full(4, 0.25), "min") for one in rows])
    assert (condition_of_cosines(rows)[1:] > 50).all()
    assert (errors(found, expected, rows) <= allowed(rows)).all()


def test_aligned_mtl_says_how_many_components_it_kept():
    rows = jnp.asarray(np.random.default_rng(0).normal(size=(3, 9)), "f4")
    rows = jnp.concatenate([rows, 1e-4 * rows[:1]]) * jnp.array([[1], [1e-6], [1], [1]])
    tx = surgery.aligned_mtl()
    _, state = tx.update(rows, tx.init(None))
    assert surgery.scalars(state)["num_components"] == 3


def test_aligned_mtl_of_bfloat16_leaves_keeps_every_task():
    rows = jacobians(3)
    rows = np.asarray(jnp.asarray(rows, jnp.bfloat16), float)
    gramians = jax.vmap(surgery.gramian)(jnp.asarray(rows, jnp.bfloat16))
    found = weights_of(surgery.aligned_mtl(), gramians, jnp.float32)
    expected = np.stack([singular_value_rule(one, np.full(3, 1 / 3), "min") for one in rows])
    assert (errors(found, expected, rows) <= allowed(rows)).all()


@pytest.mark.parametrize("num_tasks", [2, 8])
@pytest.mark.parametrize("name", METHODS)
def test_weights_in_float32_are_those_of_float64(name, num_tasks):
    rows = jacobians(num_tasks)
    tx = METHODS[name].surgery(num_tasks)
    gramians = jax.vmap(surgery.gramian)(jnp.asarray(rows, "f4"))
    found = weights_of(tx, gramians, jnp.float32)
    with jax.enable_x64(True):
        expected = weights_of(tx, rows @ rows.swapaxes(1, 2), jnp.float64)
    assert (errors(found, expected, rows) <= allowed(rows)).all()


def test_the_condition_number_of_the_stack_is_right_up_to_ten_million():
    rows = jacobians(2)
    gramians = jax.vmap(surgery.gramian)(jnp.asarray(rows, "f4"))
    expected = np.linalg.cond(rows)
    assert expected.max() > 5e6
    found = jax.vmap(surgery.condition_number)(gramians)
    np.testing.assert_allclose(found, expected, rtol=1e-3)
