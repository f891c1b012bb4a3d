"""The rules of the methods on coordinates, averages or two batches, in float64 numpy.

Oracles as those of `gramian.py`: vectors, loops over tasks and steps, no code of the library.
Those with a state take the gradients of all steps, (steps, T, n), and return all updates.
"""

import itertools

import numpy as np


def graddrop(jacobian, draws, leak=0.0, function=lambda purity: purity):
    """Lines 10 to 15 of Algorithm 1 of Chen et al. 2020, for given draws in [0, 1)."""
    update = np.zeros(jacobian.shape[1])
    for k, column in enumerate(jacobian.T):
        if not column.any():
            continue
        purity = 0.5 * (1 + column.sum() / np.abs(column).sum())
        for gradient in column:
            kept = gradient > 0 if function(purity) > draws[k] else gradient < 0
            update[k] += (leak + (1 - leak) * kept) * gradient
    return update


def trimmed_mean(jacobian, num_trimmed):
    """Definition 2 of Yin et al. 2018."""
    columns = [sorted(column)[num_trimmed : len(jacobian) - num_trimmed] for column in jacobian.T]
    return np.array([sum(column) / len(column) for column in columns])


def coordinate_median(jacobian):
    return np.median(jacobian, axis=0)


def excess_mtl(jacobians, learning_rate=0.01, num_warmup_steps=1):
    """He et al. 2024, Equations 6, 7 and 9; also returns the weights of all steps."""
    num_steps, num_tasks, _ = jacobians.shape
    sums = np.zeros(jacobians.shape[1:])
    weights = np.full(num_tasks, 1 / num_tasks)
    risks, updates, all_weights = np.zeros((num_steps, num_tasks)), [], []
    for step, jacobian in enumerate(jacobians):
        sums += jacobian**2
        for i in range(num_tasks):
            risks[step, i] = jacobian[i] @ (jacobian[i] / np.sqrt(sums[i]))
        if step >= num_warmup_steps:
            weights = weights * np.exp(
                learning_rate * risks[step] / risks[:num_warmup_steps].mean(axis=0)
            )
            weights /= weights.sum()
        updates.append(weights @ jacobian)
        all_weights.append(weights)
    return np.stack(updates), np.stack(all_weights)


def annealed(jacobians, residual=0, decay=0.9):
    """Algorithm 1 of Wang, Teng and Perdikaris 2021; also returns the weights of all steps."""
    num_steps, num_tasks, _ = jacobians.shape
    current, updates, weights = np.ones(num_tasks), [], np.ones((num_steps, num_tasks))
    for step, jacobian in enumerate(jacobians):
        update = jacobian[residual].copy()
        for i in range(num_tasks):
            if i != residual:
                ratio = np.abs(jacobian[residual]).max() / np.abs(jacobian[i]).mean()
                current[i] = decay * current[i] + (1 - decay) * ratio
                update += current[i] * jacobian[i]
        updates.append(update)
        weights[step] = current
    return np.stack(updates), weights


def db_mtl(jacobians, losses, decay=0.9, decay_power=0.0):
    """Algorithm 1 of Lin et al. 2023; losses (steps, T)."""
    averages, updates = np.zeros(jacobians.shape[1:]), []
    for step, jacobian in enumerate(jacobians, start=1):
        kept = decay / step**decay_power
        of_logarithms = jacobian / (losses[step - 1, :, None] + 1e-8)
        averages = kept * averages + (1 - kept) * of_logarithms
        norms = np.linalg.norm(averages, axis=1)
        updates.append(sum(norms.max() * averages[i] / norms[i] for i in range(len(norms))))
    return np.stack(updates)


def projected(values):
    """The nearest point of the simplex, by Michelot's elimination."""
    support, values = np.ones(values.size, bool), values - values.max()
    while True:
        shift = (values[support].sum() - 1) / support.sum()
        smaller = support & (values > shift)
        if (smaller == support).all():
            return np.where(support, values - shift, 0)
        support = smaller


def moco(
    jacobians,
    tracking_rate=0.5,
    learning_rate=0.1,
    regularization=0.0,
    tracking_power=0.5,
    learning_rate_power=0.5,
):
    """Algorithm 1 of Fernando et al. 2023; also returns the weights of all steps."""
    _, num_tasks, _ = jacobians.shape
    averages = np.zeros(jacobians.shape[1:])
    weights = np.full(num_tasks, 1 / num_tasks)
    updates, all_weights = [], []
    for step, jacobian in enumerate(jacobians, start=1):
        averages = averages - tracking_rate / step**tracking_power * (averages - jacobian)
        curvature = averages @ averages.T + regularization * np.eye(num_tasks)
        weights = projected(
            weights - learning_rate / step**learning_rate_power * curvature @ weights
        )
        updates.append(averages.T @ weights)
        all_weights.append(weights)
    return np.stack(updates), np.stack(all_weights)


def conflict_free(jacobian):
    """Equation 2 of Liu et al. 2024, by the pseudo-inverse of the unit gradients."""
    units = jacobian / np.linalg.norm(jacobian, axis=1, keepdims=True)
    direction = np.linalg.pinv(units, rcond=1e-6) @ np.ones(len(jacobian))
    if np.linalg.norm(direction) < 1e-6:  # opposite gradients
        return np.zeros(jacobian.shape[1])
    direction /= np.linalg.norm(direction)
    return (jacobian @ direction).sum() * direction


def momentum_conflict_free(jacobians, fresh, learning_rate, first=0.9, second=0.999):
    """Algorithm 1 of Liu et al. 2024: the steps of the parameters, Adam's part included.

    `fresh` (steps, T) says which gradients are computed in which step.
    """
    _, num_tasks, size = jacobians.shape
    momenta, counts = np.zeros((num_tasks, size)), np.zeros(num_tasks, int)
    pseudo, square, steps = np.zeros(size), np.zeros(size), []
    for t, jacobian in enumerate(jacobians, start=1):
        for i in np.flatnonzero(fresh[t - 1]):
            counts[i] += 1
            momenta[i] = first * momenta[i] + (1 - first) * jacobian[i]
        if (counts == 0).any():
            steps.append(np.zeros(size))
            continue
        corrected = np.stack([momenta[i] / (1 - first ** counts[i]) for i in range(num_tasks)])
        combined = conflict_free(corrected)
        gradient = (combined * (1 - first**t) - first * pseudo) / (1 - first)
        pseudo = first * pseudo + (1 - first) * gradient
        square = second * square + (1 - second) * gradient**2
        root = np.sqrt(square / (1 - second**t))
        steps.append(-learning_rate * combined / (root + 1e-8))
    return np.stack(steps)


def sam_gs(jacobians, decay=0.9, similarity_decay=0.99, threshold=0.1):
    """Algorithm 1 of Borsani et al. 2025 as their code has it; also returns all similarities."""
    momenta, spread, updates, similarities = np.zeros(jacobians.shape[1:]), 0.0, [], []
    for t, jacobian in enumerate(jacobians, start=1):
        norms = [np.linalg.norm(gradient) for gradient in jacobian]
        pairs = [2 * a * b / (a**2 + b**2) for a, b in itertools.combinations(norms, 2)]
        similarity = np.mean(pairs) if pairs else 1.0
        momenta = decay * momenta + (1 - decay) * jacobian
        spread = similarity_decay * spread + (1 - similarity_decay) * (1 - similarity) ** 2 + 1e-8
        if similarity < threshold:
            update = sum(np.mean(norms) / a * g for a, g in zip(norms, jacobian, strict=True))
        else:
            gains = np.abs(momenta / (1 - decay**t)) / np.sqrt(spread / (1 - similarity_decay**t))
            update = (gains * jacobian).sum(axis=0)
        updates.append(update)
        similarities.append(similarity)
    return np.stack(updates), np.array(similarities)


def modo(jacobians, first, second, learning_rate=0.1, regularization=0.1):
    """Chen et al. 2023, Equation 2.9; also returns the weights of all steps."""
    num_tasks = jacobians.shape[1]
    weights = np.full(num_tasks, 1 / num_tasks)
    updates, all_weights = [], []
    for jacobian, one, two in zip(jacobians, first, second, strict=True):
        gradient = one @ (two.T @ weights) + regularization * weights
        weights = projected(weights - learning_rate * gradient)
        updates.append(jacobian.T @ weights)
        all_weights.append(weights)
    return np.stack(updates), np.stack(all_weights)


def sdmgrad(
    jacobians,
    first,
    second,
    regularization=0.3,
    preference=None,
    learning_rate=10.0,
    momentum=0.5,
    num_iterations=20,
):
    """Algorithm 1 of Xiao et al. 2023 with the solver of the authors' code, and its weights."""
    num_tasks = jacobians.shape[1]
    preference = np.full(num_tasks, 1 / num_tasks) if preference is None else preference
    weights = np.full(num_tasks, 1 / num_tasks)
    updates, all_weights = [], []
    for jacobian, one, two in zip(jacobians, first, second, strict=True):
        cross = one @ two.T
        cross = cross / np.mean(np.sqrt(np.maximum(np.diagonal(cross), 0))) ** 2
        velocity = np.zeros(num_tasks)
        for _ in range(num_iterations):
            velocity = momentum * velocity + cross @ (weights + regularization * preference)
            weights = projected(weights - learning_rate * velocity)
        target = weights + regularization * preference
        updates.append(jacobian.T @ target / (1 + regularization))
        all_weights.append(weights)
    return np.stack(updates), np.stack(all_weights)
