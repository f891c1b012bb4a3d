"""The rules of the methods from the losses, stated once more in float64 numpy.

Each scalar loss is written as its paper has it, and differentiated by a complex step, which is
exact to rounding. Methods with a state are simulated step by step. Nothing here is shared with
the library.
"""

import itertools

import numpy as np


def derivative(scalar, losses):
    """The gradient of an analytic function of the losses: Im f(L + i h e_k) / h."""
    losses = np.asarray(losses, np.float64)
    steps = 1e-30j * np.eye(losses.size)
    return np.array([scalar(losses + step).imag / 1e-30 for step in steps])


def norm(vector):
    return np.sqrt((vector**2).sum())  # without a modulus, so that it stays analytic


def chosen(preference, losses):
    """The preference in float64, 1 / T each by default."""
    if preference is None:
        preference = np.full(len(losses), 1 / len(losses))
    return np.asarray(preference, np.float64)


def softmax(values):
    values = np.exp(values - np.max(values))
    return values / values.sum()


class Adam:
    """Kingma and Ba 2015, Algorithm 1, with its default moments."""

    def __init__(self, learning_rate):
        self.learning_rate, self.step, self.mean, self.square = learning_rate, 0, 0.0, 0.0

    def update(self, params, gradient):
        self.step += 1
        self.mean = 0.9 * self.mean + 0.1 * gradient
        self.square = 0.999 * self.square + 0.001 * gradient**2
        mean = self.mean / (1 - 0.9**self.step)
        square = self.square / (1 - 0.999**self.step)
        return params - self.learning_rate * mean / (np.sqrt(square) + 1e-8)


def gls(losses):
    """Chennupati et al. 2019: the geometric mean."""
    return derivative(lambda values: np.prod(values) ** (1 / len(values)), losses)


def scale_invariant(losses):
    """Navon et al. 2022: the sum of the logarithms."""
    return derivative(lambda values: np.log(values).sum(), losses)


def stch(losses, smoothing, preference=None, reference=0.0, log_losses=False):
    """Lin et al. 2024: mu log sum exp(lambda (f - z) / mu)."""
    preference = chosen(preference, losses)

    def scalar(values):
        values = np.log(values) if log_losses else values
        return smoothing * np.log(np.exp(preference * (values - reference) / smoothing).sum())

    return derivative(scalar, losses)


def cosmos(losses, penalty, preference=None):
    """Ruchte and Grabocka 2021: r . L - lambda cos(r, L)."""
    preference = chosen(preference, losses)

    def scalar(values):
        product = (preference * values).sum()
        return product - penalty * product / norm(preference) / norm(values)

    return derivative(scalar, losses)


def pbi(losses, penalty=5.0, preference=None, reference=0.0):
    """Zhang and Li 2007: d_1 + theta d_2."""
    preference = chosen(preference, losses)
    ray = preference / norm(preference)

    def scalar(values):
        along = ((values - reference) * ray).sum()
        return along + penalty * norm(values - reference - along * ray)

    return derivative(scalar, losses)


def uncertainty_weighting(history, learning_rate=0.025):
    """Kendall et al. 2018: the weights of every step, s stepped along with the network."""
    variances, adam, weights = np.zeros(history.shape[1]), Adam(learning_rate), []
    for losses in history:
        weights.append(np.exp(-variances) / 2)
        variances = adam.update(variances, 0.5 - 0.5 * np.exp(-variances) * losses)
    return np.array(weights)


def imtl_l(history, learning_rate=0.025):
    """Liu et al. 2021, Section 3.2: the weights of every step."""
    scales, adam, weights = np.zeros(history.shape[1]), Adam(learning_rate), []
    for losses in history:
        weights.append(np.exp(scales))
        scales = adam.update(scales, np.exp(scales) * losses - 1)
    return np.array(weights)


def imtl(jacobians, history):
    """Liu et al. 2021, Algorithm 1: the updates of every step.

    Equal projections on the unit gradients, and weights of the scaled gradients that add up to 1.
    """
    updates = []
    for jacobian, scales in zip(jacobians, imtl_l(history), strict=True):
        scaled = scales[:, None] * jacobian
        lengths = np.linalg.norm(scaled, axis=1)
        inverse = np.linalg.pinv(scaled / lengths[:, None], rcond=1e-6)
        direction = inverse @ np.ones(len(lengths))
        total = (inverse.T @ direction / lengths).sum()
        reached = np.linalg.norm(direction) > 1e-6  # not for opposite gradients
        updates.append(direction / total if reached else 0 * direction)
    return np.array(updates)


def imtl_authors(jacobian):
    """The closed form of Liu et al. 2021 for the weights, where gradients are independent.

    alpha_{2:T} = g_1 U^T (D U^T)^-1 with the differences D of the gradients and U of the unit
    gradients to those of task 1.
    """
    units = jacobian / np.linalg.norm(jacobian, axis=1, keepdims=True)
    differences, turns = jacobian[0] - jacobian[1:], units[0] - units[1:]
    others = np.linalg.solve((differences @ turns.T).T, turns @ jacobian[0])
    return np.concatenate([[1 - others.sum()], others])


def dwa(history, window, temperature=2.0):
    """Liu et al. 2019, Equation 7: the weights of every step, a window in place of an epoch."""
    num_steps, num_tasks = history.shape
    weights = np.ones((num_steps, num_tasks))
    means = [history[i : i + window].mean(axis=0) for i in range(0, num_steps, window)]
    for step in range(2 * window, num_steps):
        epoch = step // window
        rates = np.exp(means[epoch - 1] / means[epoch - 2] / temperature)
        weights[step] = num_tasks * rates / rates.sum()
    return weights


def softadapt(history, focus=0.1, kind="plain"):
    """Heydari et al. 2019: the weights of every step; in the first, losses count as unchanged."""
    changes = np.diff(history, axis=0, prepend=history[:1])
    if kind == "normalized":
        totals = np.abs(changes).sum(axis=1, keepdims=True)
        changes = changes / np.where(totals > 0, totals, 1)
    shares = np.exp(focus * changes) * (history if kind == "loss_weighted" else 1)
    return shares / shares.sum(axis=1, keepdims=True)


def relobralo(history, temperature=0.1, decay=0.999, keeps=None):
    """Bischof and Kraus 2021: the weights of every step, given the draws of rho."""
    num_steps, num_tasks = history.shape

    def balance(now, then):
        return num_tasks * softmax(now / then / temperature)

    weights = [np.ones(num_tasks)]
    for step in range(1, num_steps):
        since_last = balance(history[step], history[step - 1])
        past = weights[-1] if keeps is None or keeps[step] else balance(history[step], history[0])
        weights.append(decay * past + (1 - decay) * since_last)
    return np.array(weights)


def famo(history, lower_bounds=0.0, decay=1e-3, learning_rate=0.025):
    """Liu et al. 2023, Algorithm 1: the weights of every step.

    The losses after a step are those of the next one, as in the authors' toy problem.
    """
    logits, adam, weights = np.zeros(history.shape[1]), Adam(learning_rate), []
    gaps = history - lower_bounds + 1e-8
    for step, gap in enumerate(gaps):
        if step > 0:
            shares = softmax(logits)
            jacobian = np.diag(shares) - np.outer(shares, shares)
            gains = jacobian.T @ (np.log(gaps[step - 1]) - np.log(gap))
            logits = adam.update(logits, gains + decay * logits)
        weights.append(softmax(logits) / gap / (softmax(logits) / gap).sum())
    return np.array(weights)


def k_means(values, num_groups):
    """The best split of the sorted values; the mean of its group in the place of each value."""
    ranks, size = np.argsort(values), len(values)
    best = (np.inf, None)
    for cuts in itertools.combinations(range(1, size), min(num_groups, size) - 1):
        means = np.empty(size)
        for group in np.split(ranks, cuts):
            means[group] = values[group].mean()
        best = min(best, (((values - means) ** 2).sum(), means), key=lambda pair: pair[0])
    return best[1]


def go4align(history, num_groups, learning_rate=1e-4):
    """Shen et al. 2024, their released code with a k-means that finds the optimum."""
    shares, weights = chosen(None, history[0]), []
    for losses in history:
        shares = shares * np.exp(-learning_rate * losses)
        shares = shares / shares.sum()
        weights.append(k_means(shares * losses.sum() / losses, num_groups))
    return np.array(weights)


def gradnorm(jacobians, history, asymmetry=1.5, learning_rate=0.025):
    """Chen et al. 2018, Algorithm 1: the weights of every step."""
    num_tasks = history.shape[1]
    current, adam, weights = np.ones(num_tasks), Adam(learning_rate), []
    for jacobian, losses in zip(jacobians, history, strict=True):
        weights.append(current)
        norms = np.linalg.norm(jacobian, axis=1)
        rates = losses / history[0]
        targets = (current * norms).mean() * (rates / rates.mean()) ** asymmetry
        current = adam.update(current, np.sign(current * norms - targets) * norms)
        current = num_tasks * current / current.sum()
    return np.array(weights)
