"""The papers' rules, stated once more in float64 numpy, on vectors and not on Gramians.

These are the oracles of the tests. They share no code with the library and follow the
text of the papers, however slow that is.
"""

import itertools

import numpy as np
import scipy.optimize


def pcgrad(jacobian, orders):
    """Algorithm 1 of Yu et al. 2020, `orders[i]` being the order in which i meets the others."""
    jacobian = np.asarray(jacobian, np.float64)
    update = np.zeros(jacobian.shape[1])
    for i, order in enumerate(orders):
        gradient = jacobian[i].copy()
        for j in order:
            product = gradient @ jacobian[j]
            if product < 0:
                gradient -= product / (jacobian[j] @ jacobian[j]) * jacobian[j]
        update += gradient
    return update


def pcgrad_all(jacobian):
    """Every update that Algorithm 1 can give, one for each choice of orders."""
    tasks = range(len(jacobian))
    orders = [list(itertools.permutations([j for j in tasks if j != i])) for i in tasks]
    return np.stack([pcgrad(jacobian, choice) for choice in itertools.product(*orders)])


def aligned_mtl(jacobian, preference=None, scale_mode="min"):
    """Algorithm 1 of Senushkin et al. 2023, by the singular value decomposition.

    The aligned matrix is sigma U V^T over the singular values that are not zero.
    """
    jacobian = np.asarray(jacobian, np.float64)
    num_tasks = len(jacobian)
    if preference is None:
        preference = np.full(num_tasks, 1 / num_tasks)
    left, values, right = np.linalg.svd(jacobian, full_matrices=False)
    kept = values > 1e-6 * values[0]
    left, values, right = left[:, kept], values[kept], right[kept]
    if not kept.any():
        return np.zeros(jacobian.shape[1])
    scale = {
        "min": values[-1],
        # values descend: the lower of the two in the middle is the later one
        "median": values[values.size // 2],
        "rmse": np.sqrt(np.mean(values**2)),
    }[scale_mode]
    return scale * preference @ left @ right


def imtl_g(jacobian):
    """Liu et al. 2021: equal projections on the unit gradients, weights that add up to 1."""
    units = jacobian / np.linalg.norm(jacobian, axis=1, keepdims=True)
    inverse = np.linalg.pinv(units, rcond=1e-6)
    direction = inverse @ np.ones(len(jacobian))
    if np.linalg.norm(direction) < 1e-6:  # opposite gradients: no projection is equal
        return np.zeros(jacobian.shape[1])
    weights = inverse.T @ direction / np.linalg.norm(jacobian, axis=1)
    return direction / weights.sum()


def conflict_free(jacobian, preference=None, length="projections"):
    """Equation 2 of Liu et al. 2024: u = U^+ p; the length rules are those of their library."""
    preference = np.ones(len(jacobian)) if preference is None else preference
    units = jacobian / np.linalg.norm(jacobian, axis=1, keepdims=True)
    direction = np.linalg.pinv(units, rcond=1e-6) @ preference
    if np.linalg.norm(direction) < 1e-6:  # opposite gradients
        return np.zeros(jacobian.shape[1])
    direction /= np.linalg.norm(direction)
    norms = np.linalg.norm(jacobian, axis=1)
    means = {
        "projections": norms,
        "minimum": norms.min(),
        "harmonic": 1 / np.mean(1 / norms),
        "geometric": np.exp(np.mean(np.log(norms))),
        "arithmetic": norms.mean(),
    }
    return (means[length] * (units @ direction)).sum() * direction


def gradops(jacobian, preference=None):
    """Zhu et al. 2025: what least squares on all other gradients leaves of each."""
    preference = np.ones(len(jacobian)) if preference is None else preference
    update = np.zeros(jacobian.shape[1])
    for i, gradient in enumerate(jacobian):
        others = np.delete(jacobian, i, axis=0)
        others = others / np.linalg.norm(others, axis=1, keepdims=True)
        explained = np.linalg.pinv(others, rcond=1e-6) @ (others @ gradient)
        update += preference[i] * (gradient - explained)
    return update


def ntkmtl(jacobian):
    squared_norms = (jacobian**2).sum(axis=1)
    return np.sqrt(squared_norms.sum() / squared_norms) @ jacobian


def krum(jacobian, num_byzantine, num_selected):
    """Blanchard et al. 2017: squared distances to the T - f - 2 nearest, at least one."""
    num_tasks = len(jacobian)
    scores = []
    for i in range(num_tasks):
        distances = sorted(
            ((jacobian[i] - jacobian[j]) ** 2).sum() for j in range(num_tasks) if j != i
        )
        scores.append(np.sum(distances[: max(num_tasks - num_byzantine - 2, 1)]))
    chosen = np.argsort(scores, kind="stable")[:num_selected]
    return jacobian[chosen].mean(axis=0)


def gradvac(jacobian, orders, targets, decay):
    """Algorithm 1 of Wang et al. 2021. Changes `targets`."""
    update = np.zeros(jacobian.shape[1])
    for i, order in enumerate(orders):
        gradient = jacobian[i].copy()
        for j in order:
            length, other = np.linalg.norm(gradient), np.linalg.norm(jacobian[j])
            cosine, goal = gradient @ jacobian[j] / length / other, targets[i, j]
            if cosine < goal:
                gradient += (
                    length
                    * (goal * np.sqrt(1 - cosine**2) - cosine * np.sqrt(1 - goal**2))
                    / (other * np.sqrt(1 - goal**2))
                    * jacobian[j]
                )
            targets[i, j] = decay * goal + (1 - decay) * cosine
        update += gradient
    return update


def nearest_to_zero(points):
    """The point of the convex hull of the rows that is nearest to zero.

    Over v >= 0, ||P^T v||^2 + (1^T v - 1)^2 is least on the ray of the min-norm point (P. Wolfe,
    Finding the nearest point in a polytope, 1976); columns are scaled to unit length.
    """
    norms = np.linalg.norm(points, axis=1)
    if not norms.all():
        return np.zeros(points.shape[1])
    system = np.concatenate([(points / norms[:, None]).T, (norms.min() / norms)[None, :]])
    target = np.zeros(len(system))
    target[-1] = 1
    ray, _ = scipy.optimize.nnls(system, target, maxiter=10_000)
    return ray @ (points / norms[:, None]) / (ray @ (1 / norms))


def mgda(jacobian, scales=1.0):
    """The min-norm point of the scaled gradients; its weights on the unscaled ones."""
    scales = scales * np.ones(len(jacobian))
    nearest = nearest_to_zero(jacobian / scales[:, None])
    norms = np.linalg.norm(jacobian, axis=1)
    units = jacobian / norms[:, None]
    system = np.concatenate([units.T * norms.min(), (scales / norms * norms.min())[None, :]])
    target = np.concatenate([nearest * norms.min(), [norms.min()]])
    coefficients, _ = scipy.optimize.nnls(system, target, maxiter=10_000)
    weights = coefficients / norms * scales
    return weights @ jacobian


def cone_projection(jacobian, vector):
    """The vector nearest to `vector` that conflicts with no row: vector + J^T s, s >= 0."""
    units = jacobian / np.linalg.norm(jacobian, axis=1, keepdims=True)
    size = np.linalg.norm(vector) or 1.0
    steps, _ = scipy.optimize.nnls(units.T, -vector / size, maxiter=10_000)
    return vector + size * steps @ units


def dualproj(jacobian, preference=None):
    weights = np.full(len(jacobian), 1 / len(jacobian)) if preference is None else preference
    return cone_projection(jacobian, weights @ jacobian)


def upgrad(jacobian, preference=None):
    weights = np.full(len(jacobian), 1 / len(jacobian)) if preference is None else preference
    projections = [
        cone_projection(jacobian, weight * row)
        for weight, row in zip(weights, jacobian, strict=True)
    ]
    return np.sum(projections, axis=0)


def cagrad(jacobian, c):
    """max_d min_i g_i . d over ||d - g_0|| <= c ||g_0||, by the dual of Liu et al. 2021.

    sqrt(q) is the least (q / m + m) / 2 over m > 0: for fixed m, the dual asks for the point of
    the convex hull that is nearest to a multiple of -g_0, and the right multiple is a root.
    """
    mean = jacobian.mean(axis=0)
    radius = c * np.linalg.norm(mean)

    def nearest(log_shift):
        return nearest_to_zero(jacobian + np.exp(log_shift) * mean) - np.exp(log_shift) * mean

    def excess(log_shift):
        return np.log(np.linalg.norm(nearest(log_shift)) / radius + 1e-300) - log_shift

    low, high = -25.0, 25.0
    if excess(low) < 0:  # no direction helps all: the projection that hurts none
        return cone_projection(jacobian, mean)
    log_shift = scipy.optimize.brentq(excess, low, high, xtol=1e-13)
    direction = nearest(log_shift)
    return mean + radius * direction / np.linalg.norm(direction)


def fair(jacobian, fairness, factors=None):
    """G w = (p / w)^(1/a) by Newton's method with line search; NaN where there is no solution.

    In the variables y_i = w_i ||g_i|| the matrix is that of cosines.
    """
    num_tasks = len(jacobian)
    factors = np.ones(num_tasks) if factors is None else factors
    norms = np.linalg.norm(jacobian, axis=1)
    units = jacobian / norms[:, None]
    if np.linalg.norm(nearest_to_zero(units)) < 1e-6:
        return np.full(jacobian.shape[1], np.nan)
    cosines = units @ units.T
    # C y = (p n^(1-a) / y)^(1/a); the common unit is taken out of the loads
    log_loads = np.log(factors) + (1 - fairness) * np.log(norms)
    log_unit = log_loads.max() / (1 + fairness)
    loads = np.exp(log_loads - (1 + fairness) * log_unit)
    y = loads ** (1 / (1 + fairness))

    def gap(y):
        return cosines @ y - (loads / y) ** (1 / fairness)

    def values(points):
        power = 1 - 1 / fairness
        gains = np.log(points) if fairness == 1 else points**power / power
        squares = np.sum(points @ cosines * points, axis=1)
        return squares / 2 - gains @ loads ** (1 / fairness)

    lengths = 0.5 ** np.arange(41)
    for _ in range(2000):
        gradient = gap(y)
        curvature = (loads ** (1 / fairness)) / fairness * y ** (-1 / fairness - 1)
        step = -np.linalg.solve(cosines + np.diag(curvature), gradient)
        decrement = -gradient @ step
        tried = lengths * min(1.0, 0.9 / max(np.max(-step / y), 1e-9))
        enough = values(y + tried[:, None] * step) <= values(y[None])[0] - 1e-4 * tried * decrement
        # Full steps end it where the change of the objective drowns in its rounding.
        y = y + tried[np.argmax(enough)] * step
        if decrement < 1e-26 * (y @ cosines @ y) or not enough.any():
            break
    return np.exp(log_unit) * y @ units


def pivrg_factors(scores, bound, min_temperature):
    temperature = max((scores.max() - scores.min()) / np.log(bound), min_temperature)
    shares = np.exp(scores / temperature)
    return len(scores) * shares / shares.sum()


def pcd(jacobian, primary, margin, scales):
    """The least-distance problem of PCD by Lawson and Hanson's reduction to NNLS."""
    scaled = jacobian / scales[:, None]
    others = [i for i in range(len(jacobian)) if i != primary]
    norms = np.linalg.norm(scaled[others], axis=1)
    rows = scaled[others] / norms[:, None]
    margins = np.broadcast_to(margin, len(jacobian))[others]
    bounds = margins * norms - rows @ scaled[primary]
    size = max(np.abs(bounds).max(initial=0), 1e-300)
    system = np.concatenate([rows.T, bounds[None, :] / size])
    target = np.zeros(len(system))
    target[-1] = 1
    step = np.zeros(jacobian.shape[1])
    if others:
        multipliers, _ = scipy.optimize.nnls(system, target, maxiter=10_000)
        residual = system @ multipliers - target
        if np.linalg.norm(residual) > 1e-7:  # else no direction meets the constraints
            step = -size * residual[:-1] / residual[-1]
    direction = scaled[primary] + step
    return direction * np.linalg.norm(jacobian[primary]) / np.linalg.norm(direction)


def geometric_median(jacobian):
    """Newton's method on the sum of distances, or the gradient at which it is least."""
    medians = []
    for i, row in enumerate(jacobian):
        away = np.delete(jacobian, i, axis=0) - row
        lengths = np.linalg.norm(away, axis=1, keepdims=True)
        if np.linalg.norm((away / lengths).sum(axis=0)) <= 1 + 1e-9:
            medians.append(row)
    if medians:  # all of them, if the median is not unique
        return np.mean(medians, axis=0)

    def total(point):
        return np.linalg.norm(jacobian - point, axis=1).sum()

    point = jacobian.mean(axis=0)
    for _ in range(500):  # Weiszfeld's steps lead into the range of Newton's method
        pull = 1 / np.linalg.norm(jacobian - point, axis=1)
        point = pull @ jacobian / pull.sum()
    for _ in range(50):
        away = jacobian - point
        lengths = np.linalg.norm(away, axis=1)
        units = away / lengths[:, None]
        gradient = -units.sum(axis=0)
        hessian = np.eye(len(point)) * (1 / lengths).sum() - (units / lengths[:, None]).T @ units
        step = -np.linalg.solve(hessian, gradient)
        length = 1.0
        while total(point + length * step) > total(point) + 1e-4 * length * (gradient @ step):
            length /= 2
            if length < 1e-14:
                return point
        point = point + length * step
    return point


def fedmgda(jacobian, radius, preference=None):
    """Hu et al. 2022: the min-norm point of the vertices that lie in the direction against it."""
    units = jacobian / np.linalg.norm(jacobian, axis=1, keepdims=True)
    centre = np.ones(len(units)) if preference is None else np.asarray(preference, np.float64)
    centre = centre / centre.sum()
    lower, upper = np.maximum(centre - radius, 0), np.minimum(centre + radius, 1)

    def farthest_against(direction):
        weights = lower.copy()
        for i in np.argsort(units @ direction):
            weights[i] += min(upper[i] - lower[i], 1 - weights.sum())
        return weights @ units

    vertices = [farthest_against(units.sum(axis=0))]
    while True:
        nearest = nearest_to_zero(np.array(vertices))
        vertex = farthest_against(nearest)
        if nearest @ (nearest - vertex) < 1e-13:
            return nearest
        vertices.append(vertex)


def inverse_norms(jacobians, decay=0.9):
    """Wang et al. 2023, with the mean of the norms as in their code: the updates of every step."""
    averages, updates = np.ones(len(jacobians[0])), []
    for jacobian in jacobians:
        norms = np.linalg.norm(jacobian, axis=1)
        present = norms > 0
        fresh = norms[present].mean() / norms[present]
        averages[present] = decay * averages[present] + (1 - decay) * fresh
        updates.append(averages[present] @ jacobian[present])
    return np.array(updates)
