"""Renders an episode for people and marks which text the policy wrote.

The provenance comes with the text, not from tags, so a document cannot pass for the policy.
"""

import unicodedata
from collections.abc import Sequence
from itertools import groupby
from operator import itemgetter

_DIM, _CYAN, _RESET = "\x1b[2m", "\x1b[36m", "\x1b[0m"
_MARGIN = "│ "


def render_segments(segments: Sequence[tuple[str, bool]], color: bool) -> str:
    """Renders an episode.

    Args:
      segments: (text, whether the policy wrote it), in order.
      color: True, for a terminal: the policy's text is coloured, inserted text is dim, and the
        layout is unchanged. False: inserted lines have a `│ ` margin. Each change of writer
        begins a new line, and blank lines there are dropped.

    Returns:
      The rendering, without a final line break.
    """
    merged = _merge(segments)
    if color:
        return "".join(f"{_CYAN if own else _DIM}{_safe(text)}{_RESET}" for text, own in merged)
    lines: list[str] = []
    for text, by_policy in merged:
        margin = "" if by_policy else _MARGIN
        lines += [(margin + line).rstrip() for line in _safe(text).strip("\n").split("\n")]
    return "\n".join(lines)


def _merge(segments: Sequence[tuple[str, bool]]) -> list[tuple[str, bool]]:
    """Joins adjacent segments of one writer and drops empty ones."""
    shown = [segment for segment in segments if segment[0]]
    runs = groupby(shown, key=itemgetter(1))
    return [("".join(text for text, _ in run), by_policy) for by_policy, run in runs]


def _safe(text: str) -> str:
    """Replaces control characters, with which a document could overwrite other text."""
    return "".join(
        ch if ch in "\n\t" or unicodedata.category(ch) != "Cc" else "\ufffd" for ch in text
    )
