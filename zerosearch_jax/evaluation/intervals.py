"""95% confidence intervals of shares and means over questions."""

from collections.abc import Sequence

import numpy as np
from scipy import stats


def wilson_interval(successes: float, total: int) -> tuple[float, float]:
    """Returns the 95% score interval of the share `successes / total` (Wilson 1927).

    The interval is (0, 1) if `total` is 0.
    """
    if total == 0:
        return 0.0, 1.0
    interval = stats.binomtest(round(successes), total).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)


def bootstrap_interval(
    values: Sequence[float], resamples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Returns the 95% percentile interval of the mean of `values` in [0, 1] (Efron 1979).

    The interval is (0, 1) without values, and the value itself for a single one.
    """
    if len(values) < 2:
        return (float(values[0]), float(values[0])) if len(values) else (0.0, 1.0)
    result = stats.bootstrap(
        (np.asarray(values),),
        np.mean,
        n_resamples=resamples,
        batch=100,  # resamples held in memory at once
        confidence_level=0.95,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)
