"""The curriculum of noise: the probability of noisy searches, and the draw for each search.

Probability and draw depend only on the run's settings and on the step, episode and turn. The noise
is therefore independent of the order of episodes, of the number of processes and of restarts.
"""

import hashlib
import math

from zerosearch_jax.errors import UserError


def noise_probability(
    step: int, total_steps: int, *, start: float, end: float, base: float = 4.0
) -> float:
    """Returns the probability that a search of this step is noisy (ZeroSearch, arXiv 2505.04588).

        p_i = p_s + (b^(i/m) - 1) / (b - 1) * (p_e - p_s)

    Args:
      step: i, in [0, total_steps].
      total_steps: m, at least 1. Step m has probability p_e.
      start: p_s, in [0, 1].
      end: p_e, in [0, 1]; below `start` for a reversed curriculum, equal for a constant one.
      base: b > 0. Above 1 most of the change is late, below 1 early; 1 gives a straight line.

    Raises:
      UserError: a value is out of its range.
    """
    if total_steps < 1:
        raise UserError(f"curriculum: total_steps is {total_steps}; it must be at least 1")
    if not 0 <= step <= total_steps:
        raise UserError(f"curriculum: step {step} is outside [0, total_steps={total_steps}]")
    check_probability("curriculum: start", start)
    check_probability("curriculum: end", end)
    if not (base > 0 and math.isfinite(base)):
        raise UserError(f"curriculum: base is {base}; it must be a finite number above 0")
    progress = step / total_steps
    if base != 1:
        # expm1 stays accurate for a base close to 1, where b^x - 1 cancels.
        progress = math.expm1(progress * math.log(base)) / math.expm1(math.log(base))
    return (1 - progress) * start + progress * end


def draw_noisy(seed: int, step: int, episode: int, turn: int, probability: float) -> bool:
    """Draws whether one search is noisy; the same arguments always give the same draw.

    The draw compares `probability` with a uniform number in [0, 1), a hash of the other arguments.
    Probability 0 never draws noisy and 1 always does. With the other arguments fixed, a noisy
    search stays noisy at any higher probability.

    Raises:
      UserError: `probability` is not in [0, 1].
    """
    check_probability("curriculum: probability", probability)
    key = f"noise/{int(seed)}/{int(step)}/{int(episode)}/{int(turn)}".encode()
    bits = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big")
    return (bits >> 11) * 2.0**-53 < probability


def check_probability(name: str, value: float) -> None:
    """Raises UserError for a value outside [0, 1]."""
    if not 0 <= value <= 1:
        raise UserError(f"{name} is {value}; it must be in [0, 1]")
