"""What the benchmarks say of their figures: relative loss, ranks, intervals, paired tests."""

import warnings
from collections.abc import Hashable, Mapping

import numpy as np
from scipy import stats

SIGNIFICANT = 0.05


def delta_m(metrics, references, higher_is_better):
    r"""The mean relative loss against single-task networks, in per cent. Lower is better.

    .. math:: \Delta_m = \frac{100}{S} \sum_i (-1)^{\delta_i} \frac{M_i - R_i}{R_i}

    with :math:`\delta_i = 1` where higher is better: the mean goes over metrics, not over tasks.

    Args:
      metrics: (..., S) metrics M of a method.
      references: (S,) those of the single-task networks, R.
      higher_is_better: (S,) bool, or one for all.

    Returns:
      An array of shape (...).
    """
    signs = np.where(higher_is_better, -1, 1)
    relative = (np.asarray(metrics) - references) / np.abs(references)
    return 100 * np.mean(signs * relative, axis=-1)


def mean_ranks(metrics, higher_is_better):
    """The rank of each method in a metric, from 1 for the best, averaged over metrics.

    Args:
      metrics: (methods, S) metrics; NaN, of a run that diverged, comes last.
      higher_is_better: (S,) bool, or one for all.

    Returns:
      (methods,) mean ranks. Equal metrics share the mean of their ranks.
    """
    costs = np.where(higher_is_better, -1, 1) * np.asarray(metrics, float)
    return stats.rankdata(np.nan_to_num(costs, nan=np.inf), axis=0).mean(axis=-1)


def interval_95(values, axis=0):
    """How far the 95% confidence interval of the mean reaches to either side (Student's t)."""
    size = np.shape(values)[axis]
    return stats.t.ppf(0.975, size - 1) * stats.sem(values, axis=axis)


def paired_tests(differences: Mapping[Hashable, np.ndarray]) -> dict[Hashable, dict]:
    """Paired t-tests of several methods against one baseline, with Holm's correction.

    Args:
      differences: {method: (seeds,) differences to the baseline with the same seed}.

    Returns:
      For each method `points` (the differences), `mean`, `interval_95`, `p`, `p_holm` (corrected
      for the number of methods) and `differs`, whether that is below 0.05.
    """
    found = {}
    for method, points in differences.items():
        # All differences alike, as of a method that does nothing: NaN, and no evidence. SciPy
        # warns where they are nearly alike.
        with np.errstate(invalid="ignore", divide="ignore"), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Precision loss", category=RuntimeWarning)
            test = stats.ttest_1samp(points, 0)
            p = float(np.nan_to_num(test.pvalue, nan=1))  # pyright: ignore[reportAttributeAccessIssue]
        reach = interval_95(points)
        found[method] = {"points": points, "mean": np.mean(points), "interval_95": reach, "p": p}
    adjusted = 0.0
    for rank, one in enumerate(sorted(found.values(), key=lambda one: one["p"])):
        adjusted = max(adjusted, min(1.0, (len(found) - rank) * one["p"]))
        one |= {"p_holm": adjusted, "differs": adjusted < SIGNIFICANT}
    return found


def leaderboard(metrics, higher_is_better, baselines=("sum", "linear")):
    """Every method against single-task networks and, seed by seed, against the baselines.

    Args:
      metrics: {method: (seeds, S) metrics}, with the single-task networks as "single".
      higher_is_better: (S,) bool, or one for all.
      baselines: names of methods; those that are not there are left out.

    Returns:
      {method: row}, the best mean delta-m first. A row has the mean `metrics` (S,), the `points`
      (seeds,) of delta-m, their mean `delta_m` and `interval_95`, the mean `rank` among the
      multi-task methods, and `against`: {baseline: what `paired_tests` says of delta-m}.
    """
    references = np.mean(metrics["single"], axis=0)
    points = {name: delta_m(each, references, higher_is_better) for name, each in metrics.items()}
    joint = [name for name in metrics if name != "single"]
    means = [np.mean(metrics[name], axis=0) for name in joint]
    ranks = dict(zip(joint, mean_ranks(means, higher_is_better), strict=True))
    tests = {
        baseline: paired_tests(
            {name: points[name] - points[baseline] for name in joint if name != baseline}
        )
        for baseline in baselines
        if baseline in metrics
    }
    rows = {
        name: {
            "metrics": np.mean(each, axis=0),
            "points": points[name],
            "delta_m": float(np.mean(points[name])),
            "interval_95": float(interval_95(points[name])),
            "rank": ranks.get(name),
            "against": {other: found[name] for other, found in tests.items() if name in found},
        }
        for name, each in metrics.items()
    }
    # A method that diverged in some seed is last.
    key = {name: np.nan_to_num(row["delta_m"], nan=np.inf) for name, row in rows.items()}
    return {name: rows[name] for name in sorted(rows, key=lambda name: key[name])}


def verdict(test, digits=2):
    """A cell of a table: the mean difference where there is one, else =."""
    if test is None:
        return ""
    return f"{test['mean']:+.{digits}f}" if test["differs"] else "="
