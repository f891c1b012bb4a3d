"""The solvers against float64 statements of their problems on the Jacobian itself.

The problems, of 1 to 20 tasks, are padded with masked tasks to 20, and come in batches of 40,
so that each solver is compiled once for a dtype.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_surgery as surgery
from optax_surgery.algebra import solvers

NUM_TASKS = 20
BATCH = 40
FLOATS = pytest.mark.parametrize("dtype", [np.float32, np.float64])
FAIRNESS = pytest.mark.parametrize("fairness", [0.3, 1.0, 2.0, 5.0])
RADII = pytest.mark.parametrize("c", [0.1, 0.4, 0.9])


def _full_rank(rng, num_tasks):
    return rng.standard_normal((num_tasks, num_tasks + 5))


def _deficient(rng, num_tasks):
    """Half the rank, exactly: the entries are integers. Often zero is in the convex hull."""
    rank = (num_tasks + 1) // 2
    left, right = rng.integers(1, 10, (num_tasks, rank)), rng.integers(1, 10, (rank, num_tasks))
    signs = rng.choice([-1.0, 1.0], (num_tasks, rank)), rng.choice([-1.0, 1.0], (rank, num_tasks))
    return (signs[0] * left) @ (signs[1] * right)


def _spread(rng, num_tasks):
    """Row norms over six orders of magnitude: squared norms over twelve."""
    return _full_rank(rng, num_tasks) * 10 ** rng.uniform(-3, 3, (num_tasks, 1))


def _conflicting(rng, num_tasks):
    """A common direction that is a hundredth of what the tasks disagree about."""
    rows = _full_rank(rng, num_tasks)
    return rows - rows.mean(axis=0) + 0.01 * rng.standard_normal((1, num_tasks + 5))


def _nearly_parallel(rng, num_tasks):
    return rng.standard_normal((1, num_tasks + 5)) + 1e-3 * _full_rank(rng, num_tasks)


def _ill_conditioned(rng, num_tasks):
    """Gramian of condition 1e6 whose least eigenvector is positive: the tasks nearly cancel."""
    positive = np.abs(rng.standard_normal(num_tasks)) + 0.1
    others = rng.standard_normal((num_tasks, num_tasks - 1))
    left = np.linalg.qr(np.column_stack([positive, others]))[0]
    right = np.linalg.qr(rng.standard_normal((num_tasks + 5, num_tasks)))[0]
    return left * np.logspace(-3, 0, num_tasks) @ right.T


MAKERS = {
    "full rank": _full_rank,
    "deficient": _deficient,
    "spread": _spread,
    "conflicting": _conflicting,
    "nearly parallel": _nearly_parallel,
    "ill-conditioned": _ill_conditioned,
}
KINDS = pytest.mark.parametrize("kind", MAKERS)
# What float32 may lose of the objective, relative to it. Rounding the entries of a Gramian of
# condition 1e6 alone costs about as much.
LOSS = dict.fromkeys(MAKERS, 1e-6) | {"ill-conditioned": 2e-4}
# Newton's method stops at the rounding of its gradient. Most problems of these kinds lose 1e-12,
# but one that is nearly unsolvable 3e-6, and two of norms far apart, for a fairness of 0.3, 4e-5.
FAIR_LOSS = LOSS | {"deficient": 1e-5, "spread": 1e-4}


@functools.cache
def problems(kind):
    """Two Jacobians for every T from 1 to 20, of entries that float32 holds exactly."""
    rng = np.random.default_rng(list(MAKERS).index(kind))
    sizes = [num_tasks for num_tasks in range(1, NUM_TASKS + 1) for _ in range(2)]
    return [MAKERS[kind](rng, size).astype(np.float32).astype(float) for size in sizes]


@functools.cache
def preferences(kind):
    rng = np.random.default_rng(7)
    return [
        rng.uniform(0.1, 2, len(rows)).astype(np.float32).astype(float) for rows in problems(kind)
    ]


def means(kind):
    return [np.full(len(rows), 1 / len(rows), np.float32).astype(float) for rows in problems(kind)]


def dual_cone(gramian, task_mask, preference):
    return solvers.dual_cone_projection(gramian, preference, task_mask)


def quadratic(gramian, task_mask, linear):
    return solvers.nonnegative_quadratic(gramian, linear, task_mask)


def cagrad(gramian, task_mask, mean_weights, c):
    return solvers.cagrad_dual(gramian, mean_weights, c, task_mask)


def boxed(gramian, task_mask, centre, radius):
    norms = jnp.sqrt(jnp.where(task_mask, jnp.diagonal(gramian), 1))
    lower, upper = box_around(centre, radius)
    return solvers.min_norm_in_box(
        gramian / norms[:, None] / norms[None, :],
        jnp.where(task_mask, lower, 0),
        jnp.where(task_mask, upper, 0),
    )


def box_around(centre, radius):
    return jnp.maximum(centre - radius, 0), jnp.minimum(centre + radius, 1)


def fair(gramian, task_mask, factors, fairness):
    return solvers.fair_weights(gramian, fairness, task_mask, factors)


@functools.cache
def batched(solver):
    return jax.jit(jax.vmap(solver))


def solve(solver, jacobians, dtype, vectors=None, scalar=None):
    """Solves a batch padded with masked tasks; returns float64 weights and the Solution.

    `vectors` and `scalar` are what the solver takes for each problem beside Gramian and mask.
    """
    gramians = np.zeros((BATCH, NUM_TASKS, NUM_TASKS), dtype)
    masks = np.zeros((BATCH, NUM_TASKS), bool)
    padded = np.zeros((BATCH, NUM_TASKS), dtype)
    for i, rows in enumerate(jacobians):
        gramians[i, : len(rows), : len(rows)] = rows @ rows.T
        masks[i, : len(rows)] = True
        if vectors is not None:
            padded[i, : len(rows)] = vectors[i]
    arguments = [] if vectors is None else [padded]
    arguments += [] if scalar is None else [np.full(BATCH, scalar, dtype)]
    with jax.enable_x64(dtype == np.float64):
        solution = jax.tree.map(np.asarray, batched(solver)(gramians, masks, *arguments))
    solution = jax.tree.map(lambda leaf: leaf[: len(jacobians)], solution)
    masks = masks[: len(jacobians)]
    assert solution.weights.dtype == solution.residual.dtype == dtype
    assert not solution.weights[~masks].any()
    return [w[m].astype(float) for w, m in zip(solution.weights, masks, strict=True)], solution


def squared_length(rows, weights):
    return np.sum((rows.T @ weights) ** 2)


def rounding(rows, weights, dtype):
    """What rounding the Gramian changes a squared length by."""
    return np.finfo(dtype).eps * np.sum(np.abs(weights) * np.linalg.norm(rows, axis=1)) ** 2


def faces(num_tasks):
    for size in range(1, num_tasks + 1):
        yield from (list(face) for face in itertools.combinations(range(num_tasks), size))


def enumerated_min_norm(rows):
    """The least squared length over the simplex, from the stationary points of its faces."""
    norms = np.linalg.norm(rows, axis=1)
    units, normal, best = rows / norms[:, None], norms.min() / norms, np.inf
    for face in faces(len(rows)):
        border = normal[face][:, None]
        system = np.block([[units[face] @ units[face].T, border], [border.T, np.zeros((1, 1))]])
        x = np.linalg.pinv(system)[:-1, -1]
        if (x >= 0).all() and abs(normal[face] @ x - 1) < 1e-9:
            best = min(best, squared_length(units[face], x) * norms.min() ** 2)
    return best


def enumerated_dual_cone(rows, preference):
    """The least squared length over v >= p, from the stationary points of its faces."""
    units, start = rows / np.linalg.norm(rows, axis=1)[:, None], rows.T @ preference
    best = np.sum(start**2)
    for face in faces(len(rows)):
        x = -np.linalg.pinv(units[face].T) @ start
        if (x >= 0).all():
            best = min(best, np.sum((start + units[face].T @ x) ** 2))
    return best


def min_norm_violation(rows, weights):
    """Of g_i . d >= d . d, as a cosine."""
    d = rows.T @ weights
    return np.max((d @ d - rows @ d) / np.linalg.norm(rows, axis=1)) / np.linalg.norm(d)


def dual_cone_violation(rows, preference, weights):
    """Of g_i . d >= 0 as a cosine, and of (v - p) . Jd = 0, relative to the length of J'p."""
    d, length = rows.T @ weights, np.linalg.norm(rows.T @ preference)
    conflict = np.max(-(rows @ d) / np.linalg.norm(rows, axis=1)) / length
    return max(conflict, abs((weights - preference) @ (rows @ d)) / length**2)


def cagrad_dual_objective(rows, mean_weights, c, weights):
    mean, change = rows.T @ mean_weights, rows.T @ weights
    return weights @ (rows @ mean) + c * np.linalg.norm(mean) * np.linalg.norm(change)


def cagrad_primal_objective(rows, mean_weights, c, weights):
    """Of the update in the direction that the weights give, cut back to the ball."""
    mean, change = rows.T @ mean_weights, rows.T @ weights
    length, radius = np.linalg.norm(change), c * np.linalg.norm(mean)
    return np.min(rows @ (mean + change * min(1, radius / length if length else 1)))


def fair_loss(rows, factors, fairness, weights):
    """Half the squared Newton decrement, which is the loss of the objective, over w'Gw."""
    gains = (factors / weights) ** (1 / fairness)
    gradient = rows @ (rows.T @ weights) - gains
    hessian = rows @ rows.T + np.diag(gains / (fairness * weights))
    scale = 1 / np.sqrt(np.diag(hessian))
    newton = scale * np.linalg.solve(hessian * scale[:, None] * scale, scale * gradient)
    return gradient @ newton / 2 / np.sum(gains * weights)


@KINDS
def test_min_norm_point_meets_the_optimality_conditions(kind):
    jacobians = problems(kind)
    weights, solution = solve(solvers.min_norm_point, jacobians, np.float64)
    assert solution.converged.all()
    for rows, found in zip(jacobians, weights, strict=True):
        assert (found >= 0).all()
        assert abs(found.sum() - 1) < 1e-14
        noise = rounding(rows, found, np.float64)
        if squared_length(rows, found) > noise:
            assert min_norm_violation(rows, found) < 1e-12
        if len(rows) <= 7:
            assert squared_length(rows, found) <= enumerated_min_norm(rows) * (1 + 1e-12) + noise


@KINDS
def test_min_norm_point_in_float32(kind):
    jacobians = problems(kind)
    weights, solution = solve(solvers.min_norm_point, jacobians, np.float32)
    certified, _ = solve(solvers.min_norm_point, jacobians, np.float64)
    assert solution.converged.all()
    for rows, found, best in zip(jacobians, weights, certified, strict=True):
        assert abs(found.sum() - 1) < 1e-6
        loss = squared_length(rows, found) - squared_length(rows, best)
        vanishing = 1e-5 * rounding(rows, found, np.float32)
        assert loss <= LOSS[kind] * squared_length(rows, best) + vanishing


@pytest.mark.parametrize("radius", [0.01, 0.1, 0.5, 1.0])
@KINDS
def test_min_norm_in_box_meets_the_optimality_conditions(kind, radius):
    """No weight can go from one unit gradient to another and make the update shorter."""
    jacobians = problems(kind)
    centres = [wanted / wanted.sum() for wanted in preferences(kind)]
    weights, solution = solve(boxed, jacobians, np.float64, centres, radius)
    assert solution.converged.all()
    for rows, centre, found in zip(jacobians, centres, weights, strict=True):
        units = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        lower, upper = np.maximum(centre - radius, 0), np.minimum(centre + radius, 1)
        assert abs(found.sum() - 1) < 1e-12
        assert (found >= lower - 1e-15).all()
        assert (found <= upper + 1e-15).all()
        products = units @ (units.T @ found)
        could_give, could_take = found > lower + 1e-9, found < upper - 1e-9
        if could_give.any() and could_take.any():
            assert products[could_give].max() - products[could_take].min() < 1e-8


@pytest.mark.parametrize("radius", [0.01, 0.1, 0.5, 1.0])
@KINDS
def test_min_norm_in_box_in_float32(kind, radius):
    jacobians = problems(kind)
    units = [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in jacobians]
    centres = [wanted / wanted.sum() for wanted in preferences(kind)]
    weights, solution = solve(boxed, jacobians, np.float32, centres, radius)
    certified, _ = solve(boxed, jacobians, np.float64, centres, radius)
    assert solution.converged.all()
    for rows, found, best in zip(units, weights, certified, strict=True):
        assert abs(found.sum() - 1) < 1e-6
        loss = squared_length(rows, found) - squared_length(rows, best)
        assert loss <= LOSS[kind] * squared_length(rows, best) + 1e-6


@FLOATS
def test_a_box_without_room_has_one_point(dtype):
    with jax.enable_x64(dtype == np.float64):
        opposite = np.array([[1, -1, 1], [-1, 1, -1], [1, -1, 1]], dtype)
        centre = np.array([0.5, 0.3, 0.2], dtype)
        for radius in (0.0, 1e-9):
            found = solvers.min_norm_in_box(opposite, *box_around(centre, dtype(radius)))
            np.testing.assert_allclose(found.weights, centre, atol=1e-7)
            assert found.converged
        alone = solvers.min_norm_in_box(np.ones((1, 1), dtype), np.full(1, 0.9, dtype), np.ones(1))
        np.testing.assert_allclose(alone.weights, 1, rtol=1e-6)
        unknown = solvers.min_norm_in_box(
            np.full((3, 3), np.nan, dtype), *box_around(centre, dtype(0.1))
        )
        assert not unknown.converged
        nobody = solvers.min_norm_in_box(np.zeros((2, 2), dtype), np.zeros(2), np.zeros(2))
        np.testing.assert_array_equal(nobody.weights, 0)


@KINDS
def test_dual_cone_projection_meets_the_optimality_conditions(kind):
    jacobians, wanted = problems(kind), preferences(kind)
    weights, solution = solve(dual_cone, jacobians, np.float64, wanted)
    assert solution.converged.all()
    for rows, preference, found in zip(jacobians, wanted, weights, strict=True):
        assert (found >= preference).all()
        assert dual_cone_violation(rows, preference, found) < 1e-9
        if len(rows) <= 7:
            best, noise = enumerated_dual_cone(rows, preference), rounding(rows, found, np.float64)
            assert squared_length(rows, found) <= best * (1 + 1e-12) + noise


@KINDS
def test_dual_cone_projection_in_float32(kind):
    jacobians, wanted = problems(kind), preferences(kind)
    weights, solution = solve(dual_cone, jacobians, np.float32, wanted)
    certified, _ = solve(dual_cone, jacobians, np.float64, wanted)
    outcome = zip(jacobians, wanted, weights, certified, solution.converged, strict=True)
    for rows, preference, found, best, converged in outcome:
        noise = rounding(rows, best, np.float32)
        if not converged:  # honest: the weights are so large that they drown in rounding
            assert noise > 1e-3 * squared_length(rows, preference)
            continue
        assert (found >= preference).all()
        loss = squared_length(rows, found) - squared_length(rows, best)
        assert loss <= LOSS[kind] * squared_length(rows, best) + 1e-3 * noise


def test_no_problem_in_thousands_makes_the_interior_point_method_cycle():
    """Mehrotra's own choice of target and corrector cycles for a few of these."""
    rng = np.random.default_rng(8)
    rows = np.stack([_ill_conditioned(rng, 4) for _ in range(3000)])
    wanted = rng.uniform(0.1, 2, (3000, 4))
    with jax.enable_x64(True):
        project = jax.jit(jax.vmap(solvers.dual_cone_projection, in_axes=(0, 0, None)))
        solution = project(rows @ rows.transpose(0, 2, 1), wanted, np.ones(4, bool))
        assert solution.converged.all()


@pytest.mark.parametrize("c", [0.1, 0.4, 0.9, 3.0])
@KINDS
def test_cagrad_dual_closes_the_duality_gap(kind, c):
    jacobians, mean_weights = problems(kind), means(kind)
    weights, solution = solve(cagrad, jacobians, np.float64, mean_weights, c)
    others, _ = solve(solvers.min_norm_point, jacobians, np.float64)
    assert solution.converged.all()
    for rows, mean, found, other in zip(jacobians, mean_weights, weights, others, strict=True):
        assert (found >= 0).all()
        above = cagrad_dual_objective(rows, mean, c, other)
        if found.any():
            above = min(above, cagrad_dual_objective(rows, mean, c, found / found.sum()))
        gap = above - cagrad_primal_objective(rows, mean, c, found)
        # what remains is the rounding of the largest gradient's product with the update
        assert gap <= 1e-10 * np.linalg.norm(rows.T @ mean) * np.linalg.norm(rows, axis=1).max()


@pytest.mark.parametrize("c", [0.1, 0.4, 0.9])
@KINDS
def test_cagrad_dual_in_float32(kind, c):
    jacobians, mean_weights = problems(kind), means(kind)
    radius = float(np.float32(c))
    weights, solution = solve(cagrad, jacobians, np.float32, mean_weights, radius)
    certified, _ = solve(cagrad, jacobians, np.float64, mean_weights, radius)
    assert solution.converged.all()
    for rows, mean, found, best in zip(jacobians, mean_weights, weights, certified, strict=True):
        unit = np.linalg.norm(rows.T @ mean) * np.linalg.norm(rows, axis=1).min()
        optimum = cagrad_primal_objective(rows, mean, radius, best)
        primal = optimum - cagrad_primal_objective(rows, mean, radius, found)
        dual = np.inf
        if found.any():
            dual = cagrad_dual_objective(rows, mean, radius, found / found.sum()) - optimum
        assert dual <= LOSS[kind] * abs(optimum) or primal <= 1e-4 * unit


@FLOATS
@FAIRNESS
@KINDS
def test_fair_weights_minimise_their_objective_wherever_it_has_a_minimum(kind, fairness, dtype):
    jacobians, factors = problems(kind), preferences(kind)
    weights, solution = solve(fair, jacobians, dtype, factors, fairness)
    shortest, _ = solve(solvers.min_norm_point, jacobians, np.float64)
    tolerance = {np.float32: FAIR_LOSS[kind] * max(fairness, 1), np.float64: 1e-14}[dtype]
    outcome = zip(jacobians, factors, weights, shortest, solution.converged, strict=True)
    for rows, factor, found, nearest, converged in outcome:
        assert np.isfinite(found).all()
        assert (found > 0).all()
        solvable = squared_length(rows, nearest) > rounding(rows, nearest, np.float32)
        # so near to cancelling that a Gramian made in this dtype could say nothing
        blurred = squared_length(rows, found) <= 65 * rounding(rows, found, dtype)
        assert converged == solvable or (solvable and blurred)
        if solvable:
            assert fair_loss(rows, factor, fairness, found) <= tolerance


FAIR_METHODS = {
    "nash_mtl": lambda num_tasks: surgery.nash_mtl(),
    "fairgrad": lambda num_tasks: surgery.fairgrad(),
    "pivrg": lambda num_tasks: surgery.pivrg(scores=jnp.arange(num_tasks)),
}


@functools.cache
def fair_updates(name, num_tasks):
    """Updates and reports of a method on a batch of stacked gradients (B, T, n)."""
    method = FAIR_METHODS[name](num_tasks)

    def update(stacked):
        updates, state = method.update(stacked, method.init(stacked[0]))
        reports = jax.tree.leaves(state, is_leaf=lambda leaf: hasattr(leaf, "converged"))
        return updates, next(leaf for leaf in reports if hasattr(leaf, "converged"))

    return jax.jit(jax.vmap(update))


def fair_update(name, stacks, dtype):
    with jax.enable_x64(dtype == np.float64):
        outcome = fair_updates(name, stacks.shape[1])(stacks.astype(dtype))
        return jax.tree.map(np.asarray, outcome)


@FLOATS
@pytest.mark.parametrize("num_tasks", [2, 3, 5, 8])
@pytest.mark.parametrize("name", FAIR_METHODS)
def test_no_factor_between_opposite_gradients_passes_for_a_balance(name, num_tasks, dtype):
    rng = np.random.default_rng(num_tasks)
    stacks = rng.standard_normal((300, num_tasks, 10))
    stacks[:, 1] = -(10 ** rng.uniform(-2, 2, (300, 1))) * stacks[:, 0]
    for scale in (1e-10, 1e-3, 1.0, 1e10):
        updates, report = fair_update(name, scale * stacks, dtype)
        assert not report.converged.any()
        assert np.isfinite(updates).all()


@FLOATS
@pytest.mark.parametrize("num_tasks", [2, 3, 5, 8])
@pytest.mark.parametrize("name", FAIR_METHODS)
def test_conflicts_short_of_cancelling_are_balanced(name, num_tasks, dtype):
    """Cosines of condition 1e3, whose least eigenvector is positive."""
    rng = np.random.default_rng(num_tasks)
    stacks = []
    for _ in range(100):
        left = np.linalg.qr(
            np.column_stack([np.ones(num_tasks), rng.standard_normal((num_tasks, num_tasks - 1))])
        )[0]
        right = np.linalg.qr(rng.standard_normal((10, num_tasks)))[0]
        rows = left * np.geomspace(10**-1.5, 1, num_tasks) @ right.T
        stacks.append(rows * 10 ** rng.uniform(-2, 2, (num_tasks, 1)))
    for scale in (1e-10, 1.0, 1e10):
        updates, report = fair_update(name, scale * np.stack(stacks), dtype)
        assert report.converged.all()
        assert np.isfinite(updates).all()


@FLOATS
@pytest.mark.parametrize("kind", ["full rank", "spread", "conflicting"])
def test_what_is_held_at_its_bound_is_exactly_zero(kind, dtype):
    """A variable is above zero, or its slack is: strictly, as these problems are generic."""
    jacobians, wanted = problems(kind), preferences(kind)
    least, _ = solve(solvers.min_norm_point, jacobians, dtype)
    dual, _ = solve(dual_cone, jacobians, dtype, wanted)
    held = 0
    for rows, preference, shortest, projected in zip(jacobians, wanted, least, dual, strict=True):
        norms = np.linalg.norm(rows, axis=1)
        d = rows.T @ shortest
        slack = (rows @ d - d @ d) / norms / np.linalg.norm(d)
        assert (shortest[slack > 1e-3] == 0).all()
        assert (slack[shortest == 0] > 0).all()
        d = rows.T @ projected
        slack = (rows @ d) / norms / np.linalg.norm(rows.T @ preference)
        assert (projected[slack > 1e-3] == preference[slack > 1e-3]).all()
        held += np.sum(shortest == 0) + np.sum(projected == preference)
    assert held > 20


@FLOATS
def test_a_preference_that_conflicts_with_no_task_is_left_exactly(dtype):
    rng = np.random.default_rng(9)
    stacks = np.abs(rng.standard_normal((50, 5, 8))).astype(dtype)
    preference = rng.uniform(0.1, 1, 5).astype(dtype)
    with jax.enable_x64(dtype == np.float64):
        project = jax.jit(jax.vmap(solvers.dual_cone_projection, in_axes=(0, None, None)))
        found = project(stacks @ stacks.transpose(0, 2, 1), preference, np.ones(5, bool))
        np.testing.assert_array_equal(found.weights, np.tile(preference, (50, 1)))


@FLOATS
@pytest.mark.parametrize("num_tasks", [2, 3, 5])
def test_the_shortest_vector_between_opposite_gradients_is_zero(num_tasks, dtype):
    rng = np.random.default_rng(num_tasks)
    stacks = rng.standard_normal((100, num_tasks, 10))
    stacks[:, 1] = -(10 ** rng.uniform(-2, 2, (100, 1))) * stacks[:, 0]
    method = surgery.mgda()
    with jax.enable_x64(dtype == np.float64):
        update = jax.jit(jax.vmap(lambda rows: method.update(rows, method.init(rows[0]))[0]))
        updates = np.asarray(update(stacks.astype(dtype)))
    longest = np.linalg.norm(stacks, axis=2).max(axis=1)
    assert (np.linalg.norm(updates, axis=1) <= 20 * np.finfo(dtype).eps * longest).all()


def test_strict_promotion_of_dtypes_is_met():
    gramian, mask, preference = example(4)
    with jax.numpy_dtype_promotion("strict"):
        jax.eval_shape(all_solvers, gramian, mask, preference)
        jax.eval_shape(
            jax.grad(lambda g: sum(jnp.sum(s.weights) for s in all_solvers(g, mask, preference))),
            gramian,
        )


def test_closed_forms():
    rows = np.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
    weights, _ = solve(solvers.min_norm_point, [rows], np.float64)
    np.testing.assert_allclose(rows.T @ weights[0], [0, 1, 1], atol=1e-12)
    weights, _ = solve(dual_cone, [rows], np.float64, [[0.5, 0.5]])
    np.testing.assert_allclose(rows.T @ weights[0], [5 / 9, 10 / 9, 10 / 9], rtol=1e-12)
    parts, _ = solve(dual_cone, [rows, rows], np.float64, [[0.5, 0], [0, 0.5]])
    upgrad = rows.T @ (parts[0] + parts[1])
    np.testing.assert_allclose(upgrad, [50 / 171, 325 / 171, 325 / 171], rtol=1e-12)
    weights, _ = solve(fair, [rows], np.float64, [[1.0, 1.0]], 1.0)
    norms = np.linalg.norm(rows, axis=1)
    cosine = rows[0] @ rows[1] / norms.prod()
    np.testing.assert_allclose(weights[0], 1 / (norms * np.sqrt(1 + cosine)), rtol=1e-12)
    weights, _ = solve(cagrad, [rows[:1]], np.float64, [[1.0]], 0.4)
    np.testing.assert_allclose(weights[0], [0.4], rtol=1e-12)


def test_nonnegative_quadratic_projects_on_a_polyhedron():
    rng = np.random.default_rng(3)
    jacobians = [_full_rank(rng, num_tasks) for num_tasks in range(1, NUM_TASKS + 1)]
    bounds = [rng.standard_normal(len(rows)) for rows in jacobians]
    weights, solution = solve(quadratic, jacobians, np.float64, [-bound for bound in bounds])
    assert solution.converged.all()
    for rows, bound, found in zip(jacobians, bounds, weights, strict=True):
        excess = rows @ (rows.T @ found) - bound
        assert (found >= 0).all()
        assert excess.min() > -1e-12 * np.abs(bound).max()
        assert abs(found @ excess) < 1e-12 * np.abs(bound).max() ** 2


@FLOATS
def test_nonnegative_quadratic_tells_of_an_empty_polyhedron(dtype):
    """g . e >= 1 and -g . e >= 1, or a combination of several gradients in the place of -g."""
    rng = np.random.default_rng(4)
    jacobians = []
    for num_tasks in range(2, NUM_TASKS + 1):
        rows = rng.integers(-9, 10, (num_tasks - 1, num_tasks + 3)).astype(float)
        jacobians.append(np.vstack([rows, -rng.integers(1, 4, num_tasks - 1) @ rows]))
    linear = [np.full(len(rows), -1.0) for rows in jacobians]
    weights, solution = solve(quadratic, jacobians, dtype, linear)
    assert all(np.isfinite(found).all() for found in weights)
    assert not solution.converged.any()
    assert (solution.residual > 0.1).all()


def all_solvers(gramian, task_mask, preference):
    return (
        solvers.min_norm_point(gramian, task_mask),
        solvers.dual_cone_projection(gramian, preference, task_mask),
        solvers.cagrad_dual(gramian, preference, 0.4, task_mask),
        solvers.fair_weights(gramian, 1.0, task_mask, preference),
        solvers.nonnegative_quadratic(gramian, -preference, task_mask),
    )


run_all = jax.jit(all_solvers)


def example(num_tasks, seed=5):
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((num_tasks, num_tasks + 2)).astype(np.float32)
    preference = rng.uniform(0.5, 1.5, num_tasks).astype(np.float32)
    return rows @ rows.T, np.ones(num_tasks, bool), preference


def test_masked_tasks_may_hold_anything_and_are_left_out():
    gramian, mask, preference = example(4)
    kept = np.array([True, False, True, True])
    part = run_all(gramian[np.ix_(kept, kept)], mask[:3], preference[kept])
    gramian[1], gramian[:, 1], preference[1] = np.nan, np.inf, np.nan
    whole = run_all(gramian, kept, preference)
    for with_mask, without in zip(whole, part, strict=True):
        assert with_mask.converged
        assert with_mask.weights[1] == 0
        np.testing.assert_allclose(with_mask.weights[kept], without.weights, rtol=1e-5, atol=1e-6)


def test_all_tasks_masked_is_solved_by_zero():
    gramian, mask, preference = example(4)
    for solution in run_all(gramian, ~mask, preference):
        assert solution.converged
        assert solution.residual == 0
        np.testing.assert_array_equal(solution.weights, 0)


@pytest.mark.parametrize("exponent", [-50, 50])
def test_scale_of_the_gramian_does_not_matter(exponent):
    """Gramians of 1e-30 and 1e30, exactly: the scale is a power of four."""
    gramian, mask, preference = example(4)
    scale = np.float32(4.0**exponent)
    degrees = (0, 0, 0, -0.5, -1)  # of the weights in the Gramian
    outcome = zip(
        run_all(gramian, mask, preference),
        run_all(gramian * scale, mask, preference),
        degrees,
        strict=True,
    )
    for plain, scaled, degree in outcome:
        assert scaled.converged
        expected = np.asarray(plain.weights) * np.float32(4.0 ** (exponent * degree))
        np.testing.assert_allclose(scaled.weights, expected, rtol=1e-5, atol=0)


DEGENERATE = {
    "zero": np.zeros((4, 3)),
    "a zero row": np.array([[1.0, 2, 0], [0, 0, 0], [-1, 0, 1], [0, 1, 1]]),
    "duplicates": np.array([[1.0, 2, 0]] * 2 + [[-1.0, 0, 1]] * 2),
    "opposite": np.array([[1.0, 2, 0], [-1, -2, 0], [1, 1, 1], [-1, -1, -1]]),
    "rank one": np.array([[1.0], [-2], [3], [-1e3]]) * np.array([1.0, 2, 3]),
    "rank one, one side": np.array([[1.0], [2], [3], [1e3]]) * np.array([1.0, 2, 3]),
}


@pytest.mark.parametrize("kind", DEGENERATE)
def test_degenerate_gradients_make_no_nan(kind):
    rows = DEGENERATE[kind].astype(np.float32)
    preference = np.full(4, 0.25, np.float32)
    with jax.debug_nans(True):
        least, dual, cautious, fair_one, _ = run_all(rows @ rows.T, np.ones(4, bool), preference)
    for solution in (least, dual, cautious):
        assert solution.converged
        assert np.isfinite(solution.weights).all()
    assert np.isfinite(fair_one.weights).all()
    assert np.isfinite(fair_one.residual)
    assert fair_one.converged == (kind in ("duplicates", "rank one, one side"))
    scale = np.linalg.norm(rows, axis=1).max()
    assert (rows @ (rows.T @ dual.weights)).min() >= -1e-6 * scale**2
    if kind in ("zero", "a zero row", "opposite", "rank one"):
        assert np.linalg.norm(rows.T @ least.weights) <= 1e-6 * scale


def test_an_unsolvable_balance_makes_no_nan_outside_of_jit():
    with jax.debug_nans(True):
        solution = solvers.fair_weights(
            jnp.array([[1.0, -1.0], [-1.0, 1.0]]), 1.0, jnp.ones(2, bool)
        )
    assert not solution.converged
    assert solution.residual > 0.5
    assert np.isfinite(solution.weights).all()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_gramian_that_is_not_finite_is_not_solved(value):
    gramian, mask, preference = example(4)
    gramian[1], gramian[:, 1] = value, value
    for solution in run_all(gramian, mask, preference):
        assert not solution.converged


def test_order_of_the_tasks_does_not_matter():
    gramian, mask, preference = example(4)
    order = np.array([2, 0, 3, 1])
    permuted = run_all(gramian[np.ix_(order, order)], mask, preference[order])
    for plain, other in zip(run_all(gramian, mask, preference), permuted, strict=True):
        np.testing.assert_allclose(plain.weights[order], other.weights, rtol=1e-5, atol=1e-6)


def test_float32_stays_float32_under_x64():
    gramian, mask, preference = example(4)
    with jax.enable_x64(True):
        for solution in jax.eval_shape(all_solvers, gramian, mask, preference.astype(np.float64)):
            assert solution.weights.dtype == solution.residual.dtype == np.float32
        for solution in jax.eval_shape(all_solvers, gramian.astype(np.float64), mask, preference):
            assert solution.weights.dtype == solution.residual.dtype == np.float64


def test_scan_and_vmap_give_what_single_solves_give():
    """Under vmap the loops run until the slowest problem of the batch is solved."""
    gramians, masks, factors = (
        np.stack(leaf) for leaf in zip(*[example(4, i) for i in range(3)], strict=True)
    )
    gramians[1] = np.ones((4, 4))
    single = [run_all(*arguments) for arguments in zip(gramians, masks, factors, strict=True)]
    single = jax.tree.map(lambda *leaves: np.stack(leaves), *single)
    together = jax.jit(jax.vmap(all_solvers))(gramians, masks, factors)
    _, in_turn = jax.jit(
        lambda *arguments: jax.lax.scan(lambda _, xs: (None, all_solvers(*xs)), None, arguments)
    )(gramians, masks, factors)
    for one, batch, scanned in zip(single, together, in_turn, strict=True):
        np.testing.assert_allclose(batch.weights, one.weights, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(scanned.weights, one.weights, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(batch.converged, one.converged)


def test_lowers_for_every_platform():
    exported = jax.export.export(run_all, platforms=("cpu", "cuda", "tpu"))(*example(4))
    assert not any("callback" in line for line in exported.mlir_module().splitlines())


def test_128_tasks_in_float32():
    rng = np.random.default_rng(6)
    rows = rng.standard_normal((128, 140)).astype(np.float32).astype(float)
    gramian, mask = (rows @ rows.T).astype(np.float32), np.ones(128, bool)
    least = jax.jit(solvers.min_norm_point)(gramian, mask)
    assert min_norm_violation(rows, np.asarray(least.weights, float)) < 1e-5
    preference = rng.uniform(0.1, 1, 128).astype(np.float32)
    dual = jax.jit(solvers.dual_cone_projection)(gramian, preference, mask)
    violation = dual_cone_violation(rows, preference, np.asarray(dual.weights, float))
    assert violation < 1e-5
    balanced = jax.jit(solvers.fair_weights)(gramian, 1.0, mask)
    assert fair_loss(rows, np.ones(128), 1.0, np.asarray(balanced.weights, float)) < 1e-9
    assert least.converged
    assert dual.converged
    assert balanced.converged


def test_report_is_the_worst_of_a_batch():
    solution = solvers.Solution(
        weights=jnp.ones((2, 3)),
        converged=jnp.array([True, False]),
        residual=jnp.array([1e-6, 0.5]),
    )
    assert not solution.report().converged
    assert solution.report().residual == 0.5
    shapes = [
        jax.tree.map(jnp.shape, report) for report in (solution.report(), solvers.initial_report())
    ]
    assert shapes[0] == shapes[1]
    assert solvers.initial_report().converged
