"""Shows an episode to people: what the policy wrote, set apart from what was inserted.

It is given text with its provenance and reads no tags: a document cannot pass for the policy.
"""

import unicodedata
from collections.abc import Sequence

_DIM, _CYAN, _RESET = "\x1b[2m", "\x1b[36m", "\x1b[0m"
_MARGIN = "│ "


def render_segments(segments: Sequence[tuple[str, bool]], color: bool) -> str:
    """Renders an episode.

    Args:
      segments: in order, (text, whether the policy wrote it).
      color: True for a terminal: inserted text is dim, the policy's coloured, and the text is
        otherwise as it is. False: inserted lines stand behind a `│ ` margin and begin on a
        line of their own, so the two never share a line; blank lines at a border go.

    Returns:
      The rendering, without a final line break.
    """
    merged = _merge(segments)
    if color:
        return "".join(f"{_CYAN if ours else _DIM}{_safe(t)}{_RESET}" for t, ours in merged)
    lines: list[str] = []
    for text, by_policy in merged:
        margin = "" if by_policy else _MARGIN
        lines += [(margin + line).rstrip() for line in _safe(text).strip("\n").split("\n")]
    return "\n".join(lines)


def _merge(segments: Sequence[tuple[str, bool]]) -> list[tuple[str, bool]]:
    """Joins neighbours of one writer, so that a border is always a change of writer."""
    merged: list[tuple[str, bool]] = []
    for text, by_policy in segments:
        if not text:
            continue
        if merged and merged[-1][1] == by_policy:
            merged[-1] = (merged[-1][0] + text, by_policy)
        else:
            merged.append((text, by_policy))
    return merged


def _safe(text: str) -> str:
    """Without control characters, which a document could use to write over other text."""
    return "".join(
        ch if ch in "\n\t" or unicodedata.category(ch) != "Cc" else "\ufffd" for ch in text
    )
