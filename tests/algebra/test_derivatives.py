"""Derivatives of what the solvers find, against central differences in float64.

The problems are functions of the task gradients, so that a Gramian stays one when they move.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_surgery as surgery
from optax_surgery.algebra import solvers
from tests.algebra.test_solvers import DEGENERATE

NUM_PROBLEMS = 24
STEP = 1e-6
NUM_TASKS = pytest.mark.parametrize("num_tasks", [1, 2, 5, 13])


def everyone(rows):
    return jnp.ones(len(rows), bool)


def gramian(rows):
    return jnp.dot(rows, rows.T, precision="highest")


# Each takes (T, n) gradients, (T,) numbers around one and a number around one.
SOLVERS = {
    "min_norm_point": lambda rows, vector, scalar: solvers.min_norm_point(
        gramian(rows * vector[:, None]), everyone(rows)
    ),
    "nonnegative_quadratic": lambda rows, vector, scalar: solvers.nonnegative_quadratic(
        gramian(rows), scalar - 2 * vector, everyone(rows)
    ),
    "dual_cone_projection": lambda rows, vector, scalar: solvers.dual_cone_projection(
        gramian(rows), scalar * vector, everyone(rows)
    ),
    "cagrad_dual": lambda rows, vector, scalar: solvers.cagrad_dual(
        gramian(rows), vector, 0.5 * scalar, everyone(rows)
    ),
    "fair_weights": lambda rows, vector, scalar: solvers.fair_weights(
        gramian(rows), 1.5 * scalar, everyone(rows), vector
    ),
}
BY_SOLVER = pytest.mark.parametrize("name", SOLVERS)


# Each for T tasks.
SURGERIES = {
    "mgda": lambda num_tasks: surgery.mgda(),
    "mgda, l2": lambda num_tasks: surgery.mgda(normalize="l2"),
    "upgrad": lambda num_tasks: surgery.upgrad(),
    "dualproj": lambda num_tasks: surgery.dualproj(),
    "cagrad": lambda num_tasks: surgery.cagrad(),
    "nash_mtl": lambda num_tasks: surgery.nash_mtl(),
    "fairgrad": lambda num_tasks: surgery.fairgrad(),
    "pivrg": lambda num_tasks: surgery.pivrg(scores=10.0 * jnp.arange(num_tasks)),
    "pcd": lambda num_tasks: surgery.pcd(primary=0, num_tasks=num_tasks),
}
BY_SURGERY = pytest.mark.parametrize("name", SURGERIES)


def update_of(name, num_tasks):
    method = SURGERIES[name](num_tasks)

    def update(rows, vector, scalar):
        rows = scalar * rows * vector[:, None]
        return method.update(rows, method.init(rows[0]))[0]

    return update


def problems(rng, num_tasks):
    """Half of them lean to a common direction, half conflict."""
    rows = rng.standard_normal((NUM_PROBLEMS, num_tasks, num_tasks + 3))
    lean = rng.choice([0.0, 1.5], (NUM_PROBLEMS, 1, 1))
    rows = rows + lean * rng.standard_normal((NUM_PROBLEMS, 1, num_tasks + 3))
    rows = rows * rng.uniform(0.3, 3, (NUM_PROBLEMS, num_tasks, 1))
    vector = rng.uniform(0.5, 1.5, (NUM_PROBLEMS, num_tasks))
    return rows, vector, rng.uniform(0.7, 1.3, NUM_PROBLEMS)


def derivatives(function, arguments, directions, cotangents):
    """Of a batch: changes of the values along the directions; forward, and reverse derivatives."""

    def reverse(arguments, cotangent):
        return jax.grad(lambda xs: jnp.vdot(cotangent, function(*xs)))(arguments)

    def forward(arguments, direction):
        return jax.jvp(function, arguments, direction)[1]

    values = jax.jit(jax.vmap(function))
    points = [
        values(*(x + step * dx for x, dx in zip(arguments, directions, strict=True)))
        for step in (-STEP, 0, STEP)
    ]
    gradients = jax.jit(jax.vmap(reverse))(arguments, cotangents)
    tangents = jax.jit(jax.vmap(forward))(arguments, directions)
    return jax.tree.map(np.asarray, (points, tangents, gradients))


def check_against_differences(function, num_tasks):
    rng = np.random.default_rng(num_tasks)
    arguments = problems(rng, num_tasks)
    directions = tuple(rng.standard_normal(leaf.shape) for leaf in arguments)
    with jax.enable_x64(True):
        shape = jax.eval_shape(function, *(leaf[0] for leaf in arguments)).shape
        cotangents = rng.standard_normal((NUM_PROBLEMS, *shape))
        outcome = derivatives(function, arguments, directions, cotangents)
    (back, here, ahead), tangents, gradients = outcome
    differences = (ahead - back) / (2 * STEP)
    size = 1 + np.abs(differences).max(axis=1)
    along = sum(
        np.sum((gradient * direction).reshape(NUM_PROBLEMS, -1), axis=1)
        for gradient, direction in zip(gradients, directions, strict=True)
    )
    expected = np.sum(cotangents * tangents, axis=1)
    np.testing.assert_allclose(along / size, expected / size, rtol=1e-9, atol=1e-9)
    # a constraint that comes or goes within a step leaves a kink
    bend = np.abs(ahead - 2 * here + back).max(axis=1) / STEP
    smooth = bend < 1e-3 * size
    assert smooth.mean() >= 0.9
    error = np.abs(tangents - differences).max(axis=1) / size
    assert error[smooth].max() <= 1e-5


@NUM_TASKS
@BY_SOLVER
def test_derivatives_are_those_of_central_differences(name, num_tasks):
    check_against_differences(lambda *xs: SOLVERS[name](*xs).weights, num_tasks)


@pytest.mark.parametrize("num_tasks", [2, 4])
@BY_SURGERY
def test_derivatives_of_updates_are_those_of_central_differences(name, num_tasks):
    check_against_differences(update_of(name, num_tasks), num_tasks)


@BY_SOLVER
def test_the_report_has_no_derivative(name):
    rows, vector, scalar = (leaf[0] for leaf in problems(np.random.default_rng(0), 3))
    with jax.enable_x64(True):
        gradient = jax.grad(lambda *xs: SOLVERS[name](*xs).residual)(rows, vector, scalar)
    assert not np.asarray(gradient).any()


def test_closed_form_of_two_tasks():
    """w_1 = (g_2 - g_1) . g_2 / |g_2 - g_1|^2."""
    rows = np.array([[1.0, 2.0, -0.5], [0.5, -1.0, 1.0]])
    apart = rows[1] - rows[0]
    share = apart @ rows[1] / (apart @ apart)
    wanted = [
        (-rows[1] + 2 * share * apart) / (apart @ apart),
        (rows[1] + apart - 2 * share * apart) / (apart @ apart),
    ]
    with jax.enable_x64(True):
        found = jax.grad(
            lambda rows: solvers.min_norm_point(gramian(rows), everyone(rows)).weights[0]
        )(rows)
        np.testing.assert_allclose(found, wanted, rtol=1e-12)


KINKS = {
    "min_norm_point": [[1.0, 0.0, 0.0], [1.0, 1.0, 0.0]],
    "dual_cone_projection": [[1.0, 0.0, 0.0], [0.0, 2.0, 0.0]],
    "nonnegative_quadratic": [[1.0, 0.0, 0.0], [0.0, 2.0, 0.0]],
}


@pytest.mark.parametrize("name", KINKS)
def test_at_a_kink_the_derivative_lies_between_the_one_sided_ones(name):
    """Where a constraint is about to bind: a variable and its slack are both zero."""
    rows, vector, scalar = np.array(KINKS[name]), np.ones(2), 1.0
    if name == "nonnegative_quadratic":
        scalar = 2.0  # scalar - 2 vector is zero
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        function = jax.jit(lambda rows: SOLVERS[name](rows, vector, scalar).weights)
        forward = jax.jit(lambda direction: jax.jvp(function, (rows,), (direction,))[1])
        for _ in range(20):
            direction = rng.standard_normal(rows.shape)
            found = np.asarray(forward(direction))
            sides = [
                np.asarray(function(rows + step * direction) - function(rows)) / step
                for step in (STEP, -STEP)
            ]
            assert (found >= np.minimum(*sides) - 1e-5).all()
            assert (found <= np.maximum(*sides) + 1e-5).all()


@functools.cache
def solver_gradient(name):
    def loss(*arguments):
        return jnp.sum(SOLVERS[name](*arguments).weights * jnp.arange(4.0))

    return jax.jit(jax.grad(loss, (0, 1, 2)))


@functools.cache
def update_gradient(name):
    update = update_of(name, 4)
    return jax.jit(jax.grad(lambda *arguments: jnp.sum(update(*arguments))))


@pytest.mark.parametrize("kind", DEGENERATE)
@BY_SOLVER
def test_derivatives_at_degenerate_gradients_are_finite(name, kind):
    rows = DEGENERATE[kind].astype(np.float32)
    with jax.debug_nans(True):
        gradients = solver_gradient(name)(rows, np.full(4, 0.25, np.float32), np.float32(1))
    assert all(np.isfinite(leaf).all() for leaf in gradients)


@pytest.mark.parametrize("kind", DEGENERATE)
@BY_SURGERY
def test_derivatives_of_updates_at_degenerate_gradients_are_finite(name, kind):
    rows = DEGENERATE[kind].astype(np.float32)
    gradients = update_gradient(name)(rows, np.ones(4, np.float32), np.float32(1))
    assert np.isfinite(gradients).all()


@BY_SOLVER
def test_masked_tasks_have_no_share_in_the_derivative(name):
    rows, vector, _ = (leaf[0] for leaf in problems(np.random.default_rng(1), 4))
    kept = np.array([True, False, True, True])

    def loss(rows, mask):
        system = gramian(rows)
        found = {
            "min_norm_point": lambda: solvers.min_norm_point(system, mask),
            "nonnegative_quadratic": lambda: solvers.nonnegative_quadratic(
                system, -vector[: len(rows)], mask
            ),
            "dual_cone_projection": lambda: solvers.dual_cone_projection(
                system, vector[: len(rows)], mask
            ),
            "cagrad_dual": lambda: solvers.cagrad_dual(system, mask / jnp.sum(mask), 0.4, mask),
            "fair_weights": lambda: solvers.fair_weights(system, 2.0, mask),
        }[name]()
        return jnp.vdot(found.weights, jnp.arange(1, 1 + len(rows)) * mask / jnp.sum(mask))

    with jax.enable_x64(True):
        gradient = np.asarray(jax.grad(loss)(rows, kept))
    assert not gradient[1].any()
    assert np.isfinite(gradient).all()


def test_float32_derivatives_are_near_those_in_float64():
    rows, vector, scalar = problems(np.random.default_rng(5), 5)
    for solver in SOLVERS.values():
        gradient = jax.jit(
            jax.vmap(jax.grad(lambda *xs: jnp.sum(solver(*xs).weights ** 2)))  # noqa: B023
        )
        singles = [leaf.astype(np.float32) for leaf in (rows, vector, scalar)]
        rough = np.asarray(gradient(*singles))
        assert rough.dtype == np.float32
        with jax.enable_x64(True):
            exact = np.asarray(gradient(*[leaf.astype(float) for leaf in singles]))
        size = 1 + np.abs(exact).max(axis=(1, 2))
        error = np.abs(rough - exact).max(axis=(1, 2)) / size
        assert np.median(error) <= 1e-4
        assert error.max() <= 2e-2


def test_a_loss_of_an_update_trains_through_scan():
    """Reverse mode through steps of a surgery, as hyperparameter gradients take it."""
    method = surgery.upgrad()

    def descend(rate):
        def step(point, _):
            rows = jnp.stack([point - 1, jnp.array([1.0, -2.0]) * (point + 1)])
            updates, _ = method.update(rows, method.init(point))
            return point - rate * updates, None

        return jnp.sum(jax.lax.scan(step, jnp.array([0.3, 0.2]), None, length=5)[0] ** 2)

    with jax.enable_x64(True):
        ahead, back = jax.jit(descend)(0.1 + 1e-6), jax.jit(descend)(0.1 - 1e-6)
        np.testing.assert_allclose(jax.grad(descend)(0.1), (ahead - back) / 2e-6, rtol=1e-5)
