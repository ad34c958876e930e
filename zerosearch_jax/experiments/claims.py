"""The paper's claims as comparisons of two arms, and the statistics that evaluate them.

An arm is one way to train, or the policy before training. An arm run is an arm with one seed.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from zerosearch_jax.errors import UserError

MARGIN = 0.05  # of exact match; a ">=" claim tolerates a loss below this
# Policies before training. They have one run, which is compared with every seed.
UNTRAINED = ("base", "instruct_base")


@dataclass(frozen=True)
class Claim:
    """One of the paper's claims, as a comparison of exact match.

    Attributes:
      name: the claim's letter, a to e, with a number if the claim needs several comparisons.
      text: the claim in words.
      kind: ">" (better) or ">=" (not worse by `MARGIN` or more).
      arm, against: the claim says that `arm` is better, or not worse, than `against`.
      noise: noise of the evaluation engine, a key of an arm run's "noise". None: no noise.
    """

    name: str
    text: str
    kind: str
    arm: str
    against: str
    noise: str | None = None


CLAIMS = (
    Claim(
        "a",
        f"training on the simulator is no worse than on the real engine (margin {MARGIN})",
        ">=",
        "zerosearch",
        "real_engine",
    ),
    Claim(
        "b",
        "a fine-tuned simulator teaches better than a prompted one",
        ">",
        "zerosearch",
        "prompted_simulator",
    ),
    Claim("c1", "rising noise beats constant noise", ">", "zerosearch", "constant_noise"),
    Claim("c2", "rising noise beats falling noise", ">", "zerosearch", "reversed_noise"),
    Claim(
        "c3",
        "rising noise beats constant noise, evaluated under noise 0.75",
        ">",
        "zerosearch",
        "constant_noise",
        "0.75",
    ),
    Claim("d", "masking the documents beats training on them", ">", "zerosearch", "no_mask"),
    Claim("e1", "training works with GRPO", ">", "zerosearch", "base"),
    Claim("e2", "training works with REINFORCE", ">", "reinforce", "base"),
    Claim("e3", "training works with PPO", ">", "ppo", "base"),
    Claim("e4", "training works from the other start policy", ">", "instruct", "instruct_base"),
)


def mean_interval(
    per_seed_means: Sequence[float],
) -> tuple[float, float | None, float | None]:
    """Mean over S seeds and its 95% interval by Student's t with S - 1 degrees of freedom.

    The interval covers the variance between training seeds on fixed test questions. It is clipped
    to [0, 1], the range of the scores. With one seed both bounds are None.

    Raises:
      ValueError: there are no seeds.
    """
    means = np.asarray(per_seed_means, np.float64)
    if means.ndim != 1 or means.size == 0:
        raise ValueError(f"per_seed_means must be [S] with S >= 1, not {list(means.shape)}")
    mean = float(means.mean())
    if means.size == 1:
        return mean, None, None
    half = float(stats.t.ppf(0.975, means.size - 1) * stats.sem(means))
    return mean, max(0.0, mean - half), min(1.0, mean + half)


def paired_difference(
    a: Sequence[Sequence[float]],
    b: Sequence[Sequence[float]],
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float, float]:
    """Mean of a - b over seeds and questions, and its 95% interval by a two-level bootstrap.

    Each resample draws S seeds and Q questions independently, with replacement, and averages over
    their grid (Owen 2007, "The pigeonhole bootstrap"). The interval spans the 2.5% and 97.5%
    quantiles. Both arms use the same draws, because they share the test set.
    (`scipy.stats.bootstrap` resamples one level only.)

    Assumptions: row s of both arms is one pair (or one arm repeats the same row), seeds are
    exchangeable, questions are independent. With few seeds the interval is too narrow if the
    variance between seeds dominates: a bootstrap of S seeds sees (S - 1) / S of it, two thirds
    with 3. With one seed the interval covers question sampling only.

    Args:
      a, b: [S, Q] scores, higher is better.

    Raises:
      ValueError: the shapes of `a` and `b` differ or are not [S, Q].
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape or a.ndim != 2 or a.size == 0:
        raise ValueError(f"a and b must both be [S, Q], not {list(a.shape)} and {list(b.shape)}")
    difference = a - b
    seeds, questions = difference.shape
    rng = np.random.default_rng(seed)
    seed_counts = rng.multinomial(seeds, np.full(seeds, 1 / seeds), resamples)  # [R, S]
    question_counts = rng.multinomial(questions, np.full(questions, 1 / questions), resamples)
    means = ((seed_counts @ difference) * question_counts).sum(1) / difference.size  # [R]
    low, high = np.quantile(means, [0.025, 0.975])
    return float(difference.mean()), float(low), float(high)


def verdict(low: float, high: float, *, claim: Claim) -> str:
    """Returns "holds", "does not hold" or "undecided" for the interval of arm - against."""
    bar = -MARGIN if claim.kind == ">=" else 0.0
    if low > bar:
        return "holds"
    return "does not hold" if high < bar else "undecided"


def evaluate_claims(runs: Sequence[dict]) -> list[dict]:
    """Evaluates each of `CLAIMS` on the seeds that both of its arms have.

    Args:
      runs: arm runs, see `miniature.arm_run`; the keys "arm", "seed", "em" and "noise" are read.

    Returns:
      One row per claim: "claim", "text", "kind", "arm", "against", "noise", "seeds" (a list),
      "means" (of arm and against), "difference", "interval" and "verdict". If the arms share no
      seed, "seeds" is empty, the numbers are None and the verdict is "not run".

    Raises:
      UserError: an arm run occurs twice, or two compared runs differ in their number of questions.
    """
    names = [(run["arm"], run["seed"]) for run in runs]
    for arm, seed in sorted(set(names)):
        if names.count((arm, seed)) > 1:
            raise UserError(f"arm {arm}, seed {seed} occurs twice; remove one of its runs")
    return [_row(claim, runs) for claim in CLAIMS]


def _row(claim: Claim, runs: Sequence[dict]) -> dict:
    arm = _scores(runs, claim.arm, claim.noise)
    against = _scores(runs, claim.against, claim.noise)
    if claim.against in UNTRAINED and len(against) == 1:
        against = dict.fromkeys(arm, *against.values())
    seeds = sorted(arm.keys() & against.keys())
    row = dict(
        claim=claim.name,
        text=claim.text,
        kind=claim.kind,
        arm=claim.arm,
        against=claim.against,
        noise=claim.noise,
        seeds=seeds,
    )
    if not seeds:
        return row | dict(means=None, difference=None, interval=None, verdict="not run")
    a, b = [arm[seed] for seed in seeds], [against[seed] for seed in seeds]
    lengths = sorted({len(scores) for scores in a + b})
    if len(lengths) > 1:
        raise UserError(
            f"arms {claim.arm} and {claim.against} were evaluated on {lengths} questions; "
            "evaluate all arm runs on the same questions"
        )
    difference, low, high = paired_difference(a, b)
    return row | dict(
        means=[float(np.mean(a)), float(np.mean(b))],
        difference=difference,
        interval=[low, high],
        verdict=verdict(low, high, claim=claim),
    )


def _scores(runs: Sequence[dict], arm: str, noise: str | None) -> dict[int, list[float]]:
    """Seed → exact match per question, for the arm's runs that were evaluated at `noise`."""
    runs = [run for run in runs if run["arm"] == arm]
    if noise is None:
        return {run["seed"]: run["em"] for run in runs}
    return {run["seed"]: run["noise"][noise] for run in runs if noise in run.get("noise", {})}
