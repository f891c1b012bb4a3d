"""The papers' rules, stated once more in float64 numpy, on vectors and not on Gramians.

These are the oracles of the tests. They share no code with the library and follow the
text of the papers, however slow that is.
"""

import itertools

import numpy as np


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


def conflict_free(jacobian, preference=None):
    """Equation 2 of Liu et al. 2024: u = U^+ p, and the sum of the projections on it."""
    preference = np.ones(len(jacobian)) if preference is None else preference
    units = jacobian / np.linalg.norm(jacobian, axis=1, keepdims=True)
    direction = np.linalg.pinv(units, rcond=1e-6) @ preference
    if np.linalg.norm(direction) < 1e-6:  # opposite gradients
        return np.zeros(jacobian.shape[1])
    direction /= np.linalg.norm(direction)
    return (jacobian @ direction).sum() * direction


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
