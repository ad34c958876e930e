"""Thoughts of a model: its text between `<think>` and `</think>`.

The think tags cut a text into pieces. A piece is a thought if `<think>` precedes it or `</think>`
follows it. A thought without a closing tag therefore lasts to the end of the text. The text before
a first `</think>` is also a thought: its opening tag belongs to the prompt. Tags are exact: lower
case, without spaces.
"""

import re

OPEN, CLOSE = "<think>", "</think>"
_TAG = re.compile(f"({OPEN}|{CLOSE})")


def without_thoughts(text: str) -> str:
    """Returns `text` without its thoughts; a space joins the rest, so that no tag can form."""
    pieces = _TAG.split(text)
    texts, tags = pieces[::2], pieces[1::2]
    around = zip(texts, ["", *tags], [*tags, ""], strict=True)
    return " ".join(text for text, before, after in around if before != OPEN and after != CLOSE)


def continue_thought(text: str) -> str:
    """Returns `text` as it continues a prompt that ends inside a thought.

    A text that begins with a thought continues that thought; any other text ends it first.
    """
    return text.removeprefix(OPEN) if text.startswith(OPEN) else CLOSE + text
