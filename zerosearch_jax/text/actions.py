"""Finds what the policy wants: to search, to answer, or nothing that can be understood.

It is given only text that the policy itself wrote, one turn at a time, never the prompt and
never a document: the prompt's own `<answer> Beijing </answer>` and an `<answer>` inside a
document cannot be read as the policy's (in the released code it can). This module must not know
tokens, prompts or engines.

Grammar of a turn. Generation stops at the first `</search>` or `</answer>`, so the closing tag
ends the text, save for the spare bytes of the token that completed it ('>\\n'); these are
ignored. The action is the block that this tag closes: it begins at the *last* `<search>` or
`<answer>` before it, and the names must agree. So tags that the policy only talks about while
thinking do not count, and a query or answer holds no search or answer tag. (The released code
takes the first opening tag instead.) Tags are exact: lower case, no spaces inside.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

_TAG = re.compile(r"<(/?)(search|answer)>")


@dataclass(frozen=True)
class Action:
    """What one turn asks for.

    Attributes:
      kind: "search", "answer" or "invalid".
      content: the query or the answer, stripped and not empty; "" when invalid.
    """

    kind: Literal["search", "answer", "invalid"]
    content: str = ""


INVALID = Action("invalid")


def parse_action(text: str, open_tag: str = "") -> Action:
    """The action of one turn; see the module's grammar.

    Args:
      text: what the policy wrote in this turn, and nothing else.
      open_tag: "answer" or "search" when the caller has inserted that opening tag right before
        `text` (a forced answer), so that only the closing tag is expected.

    Returns:
      The first complete block's action. Invalid when there is none, when the closing tag
      does not fit the last opened one, and when the block is empty.

    Raises:
      ValueError: unknown `open_tag`.
    """
    if open_tag not in ("", "search", "answer"):
        raise ValueError(f'open_tag is {open_tag!r}: use "", "search" or "answer"')
    opened, start = open_tag, 0
    for tag in _TAG.finditer(text):
        closing, name = tag.group(1) == "/", tag.group(2)
        if not closing:
            opened, start = name, tag.end()
        elif name == opened:
            content = text[start : tag.start()].strip()
            return Action(name, content) if content else INVALID
        else:
            return INVALID
    return INVALID


def final_answer(policy_texts: Sequence[str], open_tag: str = "") -> str | None:
    """The last answer of an episode, or None when the policy gave none.

    Args:
      policy_texts: the policy's own text of every turn, in order. Turns are read one by one: a
        block cannot begin in one turn and end in another, across inserted text.
      open_tag: as in `parse_action`, for the last turn.
    """
    for i, text in enumerate(reversed(policy_texts)):
        action = parse_action(text, open_tag if i == 0 else "")
        if action.kind == "answer":
            return action.content
    return None
