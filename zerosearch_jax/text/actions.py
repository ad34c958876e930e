"""Parses the action of a policy's turn: a search, an answer, or an invalid action.

The parser gets only the policy's own text, one turn at a time, never the prompt or a document.
The prompt's own `<answer> Beijing </answer>` and an `<answer>` inside a document therefore cannot
count as the policy's answer (in the released code they can).

Grammar of a turn. Generation stops at the first `</search>` or `</answer>`, so the closing tag
ends the text. Only spare bytes of the token that completed the tag ('>\\n') may follow; they are
ignored. The action is the block that this tag closes. The block begins at the *last* `<search>` or
`<answer>` before the closing tag, and the two names must agree. A query or answer therefore
contains no search or answer tag. (The released code uses the first opening tag instead.) Tags are
exact: lower case, without spaces.

Thoughts do not count (`text.thoughts` defines them). A search or an answer inside a thought is no
action, also if the thought is never closed: its turn is invalid. (The released code accepts both.)
The action that ends an episode is also the one that is scored.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from zerosearch_jax.text.thoughts import without_thoughts

_TAG = re.compile(r"<(/?)(search|answer)>")


@dataclass(frozen=True)
class Action:
    """Action of one turn.

    Attributes:
      kind: "search", "answer" or "invalid".
      content: the query or the answer, stripped and not empty; "" if invalid.
    """

    kind: Literal["search", "answer", "invalid"]
    content: str = ""


INVALID = Action("invalid")


def parse_action(text: str, open_tag: str = "") -> Action:
    """Parses the action of one turn by the module's grammar.

    Args:
      text: the policy's own text of this turn.
      open_tag: "answer" or "search" if the caller inserted that opening tag right before `text`,
        as for a forced answer. `text` then needs only the closing tag.

    Returns:
      The action of the first complete block outside thoughts. It is invalid if there is no block,
      if the closing tag does not match the last opening tag, or if the block is empty.

    Raises:
      ValueError: `open_tag` is unknown.
    """
    if open_tag not in ("", "search", "answer"):
        raise ValueError(f'open_tag is {open_tag!r}: use "", "search" or "answer"')
    text = without_thoughts(text)
    opened, start = open_tag, 0
    for tag in _TAG.finditer(text):
        closing, name = tag.groups()
        if closing:
            content = text[start : tag.start()].strip()
            return Action(name, content) if content and name == opened else INVALID
        opened, start = name, tag.end()
    return INVALID


def final_answer(policy_texts: Sequence[str], open_tag: str = "") -> str | None:
    """Returns the last answer of an episode, or None if the policy gave none.

    Args:
      policy_texts: the policy's own text of every turn, in order. Each turn is parsed separately,
        so a block cannot span inserted text.
      open_tag: as in `parse_action`, for the last turn.
    """
    for i, text in enumerate(reversed(policy_texts)):
        action = parse_action(text, open_tag if i == 0 else "")
        if action.kind == "answer":
            return action.content
    return None
