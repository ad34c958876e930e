"""What a judge is asked about a search's documents, and how its answer is read.

The rest of the project's strings is in `text.prompts`. Like it, this must not know tokens, engines
or episodes.
"""

import re
from collections.abc import Sequence

from zerosearch_jax.text.prompts import format_documents

JUDGE = (
    "You judge the results of a search engine. Below are a question, its correct answer and the "
    "documents that a search returned.\n"
    "\n"
    "Question: {question}\n"
    "Correct answer: {answer}\n"
    "\n"
    "{documents}\n"
    "\n"
    "Do these documents, taken together, support the correct answer to the question? Reply with "
    "one word: yes or no."
)

_MOST_ALIASES = 5
_VERDICT = re.compile(r"\W*(yes|no)\b", re.IGNORECASE)


def judge_prompt(question: str, golden_answers: Sequence[str], documents: Sequence[str]) -> str:
    """The judge's user turn. Of many gold answers it is told the first five."""
    fields = {
        "question": " ".join(question.split()),
        "answer": " or ".join(golden_answers[:_MOST_ALIASES]),
        "documents": format_documents(documents),
    }
    return JUDGE.format_map(fields)


def parse_verdict(text: str) -> bool | None:
    """Whether the judge said yes; None when its answer begins with neither yes nor no.

    What a reasoning model thinks first, up to `</think>`, is not its answer.
    """
    match = _VERDICT.match(text.rpartition("</think>")[2])
    return None if match is None else match.group(1).lower() == "yes"
