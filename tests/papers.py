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
