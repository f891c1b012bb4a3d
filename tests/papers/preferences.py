"""The rules of the methods with exact preferences, on vectors, with linear programs by HiGHS."""

import numpy as np
import scipy.optimize

from tests.papers.gramian import nearest_to_zero
from tests.papers.losses import chosen


def best(objective, matrix, bounds, normal):
    """The x >= 0 with Ax >= b and n'x = 1 of the largest c'x, None where there is none."""
    found = scipy.optimize.linprog(
        -objective / np.abs(objective).max(),
        A_ub=-matrix,
        b_ub=-bounds,
        A_eq=normal[None],
        b_eq=[1.0],
        bounds=(0, None),
        method="highs-ds",
        options={"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10},
    )
    return found.x if found.status == 0 else None


def epo(jacobian, losses, preference=None, tolerance=1e-4):
    """Mahapatra and Rajan 2020, the linear program; NaN where the program has no solution.

    The variables are the shares of unit vectors, in units of the shortest gradient.
    """
    preference = chosen(preference, losses)
    weighted = preference * losses
    shares = weighted / weighted.sum()
    logs = np.log(shares * len(shares))
    divergence = shares @ logs
    norms = np.linalg.norm(jacobian, axis=1)
    units, shortest = jacobian / norms[:, None], norms.min()
    balancing = (preference * (logs - divergence)) @ jacobian / shortest
    gains = units @ balancing
    rows, bounds = units @ units.T, np.zeros(len(losses))
    if divergence > tolerance:
        objective = gains
        if (gains > 0).any():
            bounds = np.where(gains > 0, -np.inf, gains)
            bounds[weighted == weighted.max()] = 0
    else:
        objective = units @ jacobian.sum(axis=0) / shortest
        rows = np.concatenate([rows, gains[None]])
        bounds = np.append(bounds, min(0, (gains * norms / shortest).max()))
    finite = np.isfinite(bounds)
    x = best(objective, rows[finite], bounds[finite], shortest / norms)
    return np.full(jacobian.shape[1], np.nan) if x is None else x * shortest @ units


def pmgda(jacobian, losses, preference=None, correction=0.95, tolerance=0.01):
    """Zhang et al. 2024, both steps, with the distance from the ray as h."""
    ray = chosen(preference, losses)
    ray = ray / np.linalg.norm(ray)
    aside = losses - (losses @ ray) * ray
    distance = np.linalg.norm(aside)
    if distance < 1e-12:
        return nearest_to_zero(jacobian)
    to_ray = aside / distance @ jacobian
    to_ray = to_ray / np.linalg.norm(to_ray)
    if distance <= tolerance:
        return nearest_to_zero(jacobian - np.outer(jacobian @ to_ray, to_ray))
    # The least gain is gain[0] - gain[1], in units of the shortest gradient.
    norms = np.linalg.norm(jacobian, axis=1)
    directions = np.concatenate([jacobian / norms[:, None], to_ray[None]])
    gain = np.append(norms.min() / norms, 0)[:, None]
    rows = np.concatenate([directions @ directions.T, -gain, gain], axis=1)
    objective = np.append(np.zeros(len(directions)), [1, -1])
    bounds = np.append(np.zeros(len(jacobian)), correction)
    x = best(objective, rows, bounds, np.append(np.ones(len(directions)), [0, 0]))
    assert x is not None
    return x[:-2] @ directions
