"""Stop strings as an automaton over vocabulary tokens.

The device runs the automaton, so a stop string that straddles tokens is detected at the token
that completes it. The table is built once per tokenizer, on the host.
"""

from collections import deque
from collections.abc import Sequence

import numpy as np

from zerosearch_jax.errors import UserError


def build_stop_table(token_bytes: Sequence[bytes], stop_strings: Sequence[str]) -> np.ndarray:
    """Returns the transition table of an Aho-Corasick automaton with one step per token.

    Args:
      token_bytes: the exact bytes of every vocabulary id; b"" for special tokens.
      stop_strings: non-empty strings. With none, the table never accepts.

    Returns:
      `[A, V]` int16. State 0 is the start. State `A - 1` accepts and is never left: a stop string
      was completed at the end of the last token or inside it.

    Raises:
      ValueError: a stop string is empty.
    """
    step = _byte_automaton([text.encode() for text in stop_strings])
    table = np.broadcast_to(
        np.arange(len(step), dtype=np.int16)[:, None], (len(step), len(token_bytes))
    ).copy()
    # No padding: one long token would make a table of its length times all tokens.
    joined = np.frombuffer(b"".join(token_bytes), np.uint8)
    sizes = np.fromiter(map(len, token_bytes), np.int64, len(token_bytes))
    starts = np.cumsum(sizes) - sizes
    position, here = 0, np.flatnonzero(sizes)
    while len(here):
        table[:, here] = step[table[:, here], joined[starts[here] + position]]
        position += 1
        here = here[sizes[here] > position]
    return table


def check_spellable(
    token_bytes: Sequence[bytes], stop_strings: Sequence[str], name: str = "the tokenizer"
) -> None:
    """Raises UserError if no sequence of tokens contains one of the stop strings.

    Args:
      token_bytes: as for `build_stop_table`.
      name: names the tokenizer in the message.
    """
    vocabulary = set(token_bytes)
    for text in stop_strings:
        data = text.encode()
        if all(bytes([byte]) in vocabulary for byte in data):
            continue
        # With one string, state i of the automaton means that its first i bytes are written.
        table = build_stop_table(token_bytes, [text])
        reached, new = set(), {0}
        while new:
            reached |= new
            new = {int(after) for state in new for after in np.unique(table[state])} - reached
        if len(table) - 1 not in reached:
            written = max(reached)
            raise UserError(
                f"{name} cannot spell {text!r}, which must end a text: its tokens write at most "
                f"{data[:written]!r}, and none continues with {data[written:]!r}; use a tokenizer "
                "with these bytes"
            )


def _byte_automaton(patterns: list[bytes]) -> np.ndarray:
    """Returns transitions `[A, 256]` over bytes; the last state accepts and is absorbing."""
    if any(not pattern for pattern in patterns):
        raise ValueError("a stop string is empty; every stop string needs at least one byte")
    children: list[dict[int, int]] = [{}]
    ends = set()
    for pattern in patterns:
        state = 0
        for byte in pattern:
            if byte not in children[state]:
                children[state][byte] = len(children)
                children.append({})
            state = children[state][byte]
        ends.add(state)
    accept = len(children)
    step = np.zeros((accept + 1, 256), np.int16)
    step[accept] = accept
    fail = [0] * accept
    queue = deque([0])
    while queue:
        state = queue.popleft()
        # In breadth-first order the row of the fallback state is complete, so it is inherited.
        if state:
            step[state] = step[fail[state]]
        for byte, child in children[state].items():
            if state:
                fail[child] = int(step[fail[state], byte])
            # Falling back inside a longer stop string can complete a shorter one.
            if child in ends or fail[child] == accept:
                step[state, byte] = accept
            else:
                step[state, byte] = child
                queue.append(child)
    return step
