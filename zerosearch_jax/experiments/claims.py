"""The paper's claims, each as a comparison of two arms, and how one is judged.

An arm is a way to train (or the policy before it), a cell is an arm with one seed. The statistics
here know nothing of how a cell came about.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from zerosearch_jax.errors import UserError

MARGIN = 0.05  # of exact match; what ">=" may lose and still hold
UNTRAINED = ("base", "instruct_base")  # a policy before training: its one cell meets every seed


@dataclass(frozen=True)
class Claim:
    """One of the paper's claims, a to e, as a comparison of exact match.

    Attributes:
      name: the claim's letter, with a number where it takes several comparisons.
      kind: ">" (better) or ">=" (not worse by `MARGIN` or more).
      arm, against: the claim says that `arm` is better, or no worse, than `against`.
      noise: the evaluation noise at which it is judged, a key of a cell's "noise"; None: the
        engine's documents as they are.
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
        "rising noise beats constant noise, judged under noise 0.75",
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
    """Mean over seeds and its 95% interval by Student's t (S - 1 degrees of freedom).

    The scores are in [0, 1], and so is the interval: of the mean over training seeds, on the test
    questions as they are. One seed has none: None, None. Raises ValueError on no seeds.
    """
    means = np.asarray(per_seed_means, np.float64)
    if means.ndim != 1 or means.size == 0:
        raise ValueError(f"per_seed_means must be [S] with S >= 1, not {list(means.shape)}")
    mean = float(means.mean())
    if means.size == 1:
        return mean, None, None
    error = means.std(ddof=1) / np.sqrt(means.size)
    half = float(stats.t.ppf(0.975, means.size - 1) * error)
    return mean, max(0.0, mean - half), min(1.0, mean + half)


def paired_difference(
    a: Sequence[Sequence[float]],
    b: Sequence[Sequence[float]],
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float, float]:
    """Mean of a - b over seeds and questions, and its 95% interval by a two-level bootstrap.

    Each resample draws S seeds and Q questions with replacement, apart from one another, and takes
    the mean over their grid (Owen 2007, "The pigeonhole bootstrap"); the interval
    is between the 2.5% and 97.5% quantiles. Both arms meet the same draws, because they share the
    test set.

    It assumes that row s of both arms belongs together (or that one arm has the same row for every
    seed), that seeds are exchangeable, and that questions are independent of each other. Few
    seeds make the seed level coarse: a bootstrap of S seeds sees (S - 1) / S of the variance
    between them, two thirds with 3, and the interval is too narrow where that variance prevails.
    With one seed it is of the questions alone.

    Args:
      a, b: [S, Q] scores, higher is better.

    Raises:
      ValueError: the arms' shapes differ or are not [S, Q].
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
    """ "holds", "does not hold" or "undecided", from the interval of arm - against."""
    bar = -MARGIN if claim.kind == ">=" else 0.0
    if low > bar:
        return "holds"
    return "does not hold" if high < bar else "undecided"


def judge(cells: Sequence[dict]) -> list[dict]:
    """One row for each of `CLAIMS`, over the seeds that both of its arms have.

    Args:
      cells: what `miniature.cell` reads; of them "arm", "seed", "em" and "noise" are read.

    Returns:
      Rows with "claim", "text", "kind", "arm", "against", "noise", "seeds" (list), "means" (of arm
      and against), "difference", "interval" and "verdict". Where no seed has both arms: no seeds,
      None for the figures, and "not run".

    Raises:
      UserError: a cell is there twice, or two that are compared differ in number of questions.
    """
    names = [(cell["arm"], cell["seed"]) for cell in cells]
    for arm, seed in sorted(set(names)):
        if names.count((arm, seed)) > 1:
            raise UserError(f"arm {arm}, seed {seed} is there twice; remove one of the cells")
    return [_row(claim, cells) for claim in CLAIMS]


def _row(claim: Claim, cells: Sequence[dict]) -> dict:
    arm = _scores(cells, claim.arm, claim.noise)
    against = _scores(cells, claim.against, claim.noise)
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
            f"arms {claim.arm} and {claim.against} were judged on {lengths} questions; "
            "judge every cell on the same ones"
        )
    difference, low, high = paired_difference(a, b)
    return row | dict(
        means=[float(np.mean(a)), float(np.mean(b))],
        difference=difference,
        interval=[low, high],
        verdict=verdict(low, high, claim=claim),
    )


def _scores(cells: Sequence[dict], arm: str, noise: str | None) -> dict[int, list[float]]:
    """{seed: exact match of each question} of the arm's cells that were judged so."""
    mine = [cell for cell in cells if cell["arm"] == arm]
    if noise is None:
        return {cell["seed"]: cell["em"] for cell in mine}
    return {cell["seed"]: cell["noise"][noise] for cell in mine if noise in cell.get("noise", {})}
