"""Scores of evaluated episodes with 95% intervals, and the table that shows them."""

from collections.abc import Sequence

from tabulate import tabulate

from zerosearch_jax.evaluation.intervals import bootstrap_interval, wilson_interval
from zerosearch_jax.rollout.trajectory import Trajectory
from zerosearch_jax.search.engine import describe_failures, failure_counts
from zerosearch_jax.training.episode_metrics import answer_scores, episode_metrics

SUMMARY = {
    "em": float,
    "em_interval": (float, float),
    "f1": float,
    "f1_interval": (float, float),
    "questions": int,
    "searches_per_episode": float,
    "failed_search_ratio": float,
    "failed_searches": {str: int},
}
"""The shape of a `summary` in a file; see `files`."""
_HEADERS = ("", "EM", "95% interval", "F1", "95% interval", "searches", "questions")
_FLOAT_FORMATS = ("", ".3f", "", ".3f", "", ".2f", "")


def summary(trajectories: Sequence[Trajectory]) -> dict[str, float | list[float] | dict[str, int]]:
    """Returns the scores of one evaluation.

    Returns:
      em, f1: mean exact match and token F1, in [0, 1].
      em_interval: 95% Wilson interval, `[low, high]`.
      f1_interval: 95% bootstrap interval of the mean, `[low, high]`.
      questions: number of questions.
      searches_per_episode: mean number of searches.
      failed_search_ratio: share of the searches that failed. The policy saw a "search failed"
        observation instead of documents, so the scores include its effect.
      failed_searches: number of failed searches by kind, see `search.engine.FAILURE_KINDS`.
    """
    exact_matches = answer_scores(trajectories, "em")
    metrics = episode_metrics(trajectories)
    return {
        "em": metrics["em"],
        "em_interval": list(wilson_interval(sum(exact_matches), len(exact_matches))),
        "f1": metrics["f1"],
        "f1_interval": list(bootstrap_interval(answer_scores(trajectories, "f1"))),
        "questions": len(exact_matches),
        "searches_per_episode": metrics["searches_per_episode"],
        "failed_search_ratio": metrics["failed_search_ratio"],
        "failed_searches": failure_counts(result for t in trajectories for _, result in t.searches),
    }


def search_failures(trajectories: Sequence[Trajectory], accepted: float) -> str:
    """Returns the reason if too many searches failed for the scores to be a result; else "".

    A query that is too long for the engine is not counted: it is the policy's fault and belongs to
    the result.

    Args:
      accepted: largest share of failed searches, 0 to 1, with which the scores are a result.
    """
    results = [result for t in trajectories for _, result in t.searches]
    failed = [result for result in results if result.failure and not result.too_long]
    if len(failed) <= accepted * len(results):
        return ""
    return f"{len(failed)} of {len(results)} searches failed ({describe_failures(failed)})"


def text_table(summaries: dict[str, dict], title: str) -> str:
    """Returns a plain-text table below `title`, one line per name and its `summary`.

    Names whose searches failed in part are listed below the table.
    """
    lines = [
        [
            name,
            row["em"],
            _interval(row["em_interval"]),
            row["f1"],
            _interval(row["f1_interval"]),
            row["searches_per_episode"],
            row["questions"],
        ]
        for name, row in summaries.items()
    ]
    table = tabulate(
        lines, _HEADERS, tablefmt="plain", floatfmt=_FLOAT_FORMATS, disable_numparse=[0, 2, 4]
    )
    failures = [
        f"{name}: {row['failed_search_ratio']:.1%} of its searches failed ({_kinds(row)})"
        for name, row in summaries.items()
        if row["failed_search_ratio"]
    ]
    return "\n".join([title, table, *failures]) + "\n"


def _kinds(row: dict) -> str:
    return ", ".join(f"{kind} {count}" for kind, count in row["failed_searches"].items())


def _interval(bounds: Sequence[float]) -> str:
    low, high = bounds
    return f"[{low:.3f}, {high:.3f}]"
