"""Hostile texts of a megabyte are parsed in linear time.

Run as a module, this file does the work of the test. The test runs it as a process, because only
the end of a process stops a regular expression.
"""

import contextlib
import subprocess
import sys
from pathlib import Path

from zerosearch_jax.data.rows import as_list
from zerosearch_jax.errors import UserError
from zerosearch_jax.rl.rewards import cover_exact_match, has_valid_format
from zerosearch_jax.search.web import filter_results
from zerosearch_jax.simulator.pairs import parse_prompt
from zerosearch_jax.text.matching import words
from zerosearch_jax.text.prompts import cut_documents, neutralise_tags

ROOT = Path(__file__).parents[2]
SIZE = 1_000_000
SPACES = " " * SIZE
MARKS = "\u0301\u0316" * (SIZE // 2)  # combining characters that are not in canonical order
TASK = 'answer the question: "q" whose answer is a.\n'
DEADLINE_SECS = 120  # far above the linear time; the quadratic time of each text is longer


def _link(text: str) -> list[dict]:
    results = [{"title": "t", "snippet": "s", "link": text}]
    return filter_results(results, blocked_domains=(), topk=1)


CASES = {
    "prompt without its end": (parse_prompt, TASK + "\n" * SIZE + "Query: x"),
    "prompt of tasks": (parse_prompt, TASK * (SIZE // len(TASK)) + "\nQuery: x\nUseful Output"),
    "prompt of queries": (parse_prompt, TASK + "\nQuery: " * (SIZE // 8) + "\n Output:"),
    "prompt of answers": (
        parse_prompt,
        "answer the question:" + " whose answer is " * (SIZE // 17) + "\n\nQuery:\nUseful Output:",
    ),
    "list of digits": (as_list, f"[{'1' * SIZE}x]"),
    "list of spaces": (as_list, f"[{SPACES}x]"),
    "list with spaces after an item": (as_list, f"[1{SPACES}x]"),
    "tag with spaces": (neutralise_tags, f"<{SPACES}x"),
    "tag of combining characters": (neutralise_tags, MARKS),
    "information tag with spaces": (
        lambda text: has_valid_format([f"<think>a</think><answer>{text}"], ["answer"]),
        f"<{SPACES}",
    ),
    "documents without a colon": (lambda text: cut_documents(text, 5), f"Doc {'1' * SIZE} x"),
    "combining characters": (words, MARKS),
    "tibetan vowel signs": (words, "\u0f73" * (SIZE // 4)),
    "host of combining characters": (_link, f"http://{MARKS}"),
    "repeated word": (
        lambda text: cover_exact_match(text, [text[: SIZE // 4] + " 2"]),
        "1 " * (SIZE // 2),
    ),
}


def test_hostile_texts_of_a_megabyte_take_linear_time(tally):
    command = [sys.executable, "-m", "tests.reliability.test_linear_time"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE_SECS)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == list(CASES)
    tally("hostile texts of 1 MB", len(CASES))


if __name__ == "__main__":
    for name, (parse, text) in CASES.items():
        with contextlib.suppress(UserError):
            parse(text)
        print(name)
