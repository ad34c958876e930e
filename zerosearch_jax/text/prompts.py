"""All texts that models read: prompts, observations, and requests to simulator and labeller.

The wording is an interface: released policies and simulators were trained on it, so it changes only
together with the checkpoints. Questions, answers, queries and documents come from outside (a data
set, a model, the web). This module neutralises their tags, because here they become text of a
prompt or an episode.
"""

import math
import re
import unicodedata
from collections.abc import Sequence

from zerosearch_jax.text.thoughts import without_thoughts

_POLICY = (
    "Answer the given question. You must conduct reasoning inside <think> and </think> first "
    "every time you get new information. After reasoning, if you find you lack some knowledge, "
    "you can call a search engine by <search> query </search> and it will return the top "
    "searched results between <information> and </information>. You can search as many times as "
    "your want. If you find no further external knowledge needed, you can directly provide the "
    "answer inside <answer> and </answer>, without detailed illustrations. For example, "
    "<answer> Beijing </answer>. Question: {question}\n"
)

INVALID_ACTION = (
    "\nMy previous action is invalid. If I want to search, I should put the query between "
    "<search> and </search>. If I want to give the final answer, I should put the answer between "
    "<answer> and </answer>. Let me try again.\n"
)
"""Inserted after a turn without a valid action. As inserted text it is masked in every loss."""

FORCED_ANSWER = "<think> I know this. </think>\n<answer>"
"""Inserted after the prompt to make the policy answer at once; its text continues the answer."""

NO_HELPFUL_INFORMATION = "No helpful information found."
"""The text of a refined search without helpful documents."""

NO_RESULTS = "The search returned no documents."
"""Replaces the documents in the information block if the engine found nothing."""

_REFINE = (
    "Below are documents that a search engine found. Write down what they say that helps to "
    "answer the question, in one short paragraph, with nothing that they do not say. Do not answer "
    'the question itself. If they do not help, write only "{nothing}"\n'
    "\n"
    "Question: {question}\n"
    "Query: {query}\n"
    "{documents}\n"
    "\n"
    "Helpful information:"
)

_LABELING = (
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

# The blank line and the line breaks are part of the interface.
SIMULATOR_FORMS = ("finetuned", "prompted")
"""Forms of `simulator_prompt`."""
_SIMULATOR_HEAD = (
    "You are the Google search engine.\n"
    "Given a query, you need to generate {count} {kind} documents for the query.\n"
    "\n"
)
_SIMULATOR_TASK = (
    'The user is trying to answer the question: "{question}" whose answer is {answer}.\n'
    "Each document should contain about 30 words, and these documents should contain {kind} "
    "information.\n"
)
_SIMULATOR_TAIL = "\nQuery: {query}\n{Kind} Output:"

_PROMPTED_AIM = {
    "useful": "You should generate documents that can help the user find the answer.\n",
    "noisy": (
        "You should generate documents that are related but noisy, and that do not help the "
        "user find the answer.\n"
    ),
}
_PROMPTED_ONLY = "You must directly output the English documents and not output any other texts.\n"

_EXAMPLE = {
    "question": "Which river flows through the capital of Hungary?",
    "answer": "Danube",
    "query": "river in Budapest",
}
_EXAMPLE_DOCUMENTS = {
    "useful": (
        "Budapest, the capital of Hungary, lies on both banks of the Danube. Nine bridges inside "
        "the city limits join hilly Buda in the west to flat Pest in the east.",
        "The Danube enters Hungary from the north-west, turns south at the Danube Bend and crosses "
        "Budapest, where it is between 230 and about 600 metres wide.",
        "The Chain Bridge, opened in 1849, was the first permanent bridge over the Danube in "
        "Budapest. It links Clark Ádám Square with Széchenyi István Square on the Pest side.",
        "The Hungarian Parliament stands in Budapest on the eastern bank of the Danube; visitors "
        "on river boats see its dome and its long white front by day and by night.",
        "Margaret Island lies in the middle of the Danube in Budapest. It is two and a half "
        "kilometres long and is a public park with gardens, ruins and baths.",
    ),
    "noisy": (
        "Budapest was formed in 1873, when the towns of Buda, Óbuda and Pest were joined. It soon "
        "became the largest city of Hungary and the centre of its industry.",
        "The thermal baths of Budapest draw on more than a hundred springs. Széchenyi, Gellért and "
        "Rudas are among the best known of them and are open all year.",
        "The first underground line of Budapest was opened in 1896 and runs below Andrássy Avenue. "
        "Its small stations are decorated with tiles and cast iron columns.",
        "Lake Balaton, south-west of Budapest, is the largest lake of central Europe. Its shallow "
        "water warms quickly, so that many families spend their summers there.",
        "The Tisza rises in the Carpathians and crosses the Great Hungarian Plain from north to "
        "south. Szeged and Szolnok are the largest Hungarian towns on its banks.",
    ),
}

_MAX_ALIASES = 5  # gold answers in a labeller's prompt
_NUMBER_WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")

# SentencePiece reads "▁" as a space. Possessive quantifiers keep a long run of spaces linear.
_TAG = re.compile(
    r"<[\s▁]*+(?:(/)[\s▁]*+)?(think|search|information|answer)[\s▁]*+>", re.IGNORECASE
)
_NOT_ASCII = re.compile(r"[^\x00-\x7f]")
_VERDICT = re.compile(r"\W*(yes|no)\b", re.IGNORECASE)
_DOCUMENT_HEADER = re.compile(r"(?<!\S)Doc\s*+(\d++)\s*+:")


def policy_prompt(question: str) -> str:
    """Returns the policy's user turn, without any chat template."""
    return _POLICY.replace("{question}", neutralise_tags(question))


def forced_search(query: str) -> str:
    """Returns a search in the policy's format, for insertion before the policy's first turn."""
    return f"<think> I search for the question. </think>\n<search> {_one_line(query)} </search>"


def reader_opening(query: str) -> str:
    """Returns the text inserted after the documents from which a fixed reader answers.

    Without it, a reader that does not know how its episode came to this query continues to search.
    A reader that must answer at once, without a thought, extracts the answer less reliably.
    """
    return f"<think> The {neutralise_tags(query)} is"


def refine_prompt(question: str, query: str, documents_text: str) -> str:
    """Returns the user turn that asks for the helpful information in the documents of `query`.

    This is Search-o1's "reason in documents" (arXiv 2501.05366, section 3). The paper's prompt also
    contains the reasoning so far.

    Args:
      documents_text: result of `format_documents`, possibly cut.
    """
    return _REFINE.format(
        nothing=NO_HELPFUL_INFORMATION,
        question=_one_line(question),
        query=_one_line(query),
        documents=documents_text,
    )


def labeling_prompt(question: str, golden_answers: Sequence[str], documents: Sequence[str]) -> str:
    """Returns the labeller's user turn, with at most the first five gold answers."""
    return _LABELING.format(
        question=_one_line(question),
        answer=neutralise_tags(" or ".join(golden_answers[:_MAX_ALIASES])),
        documents=format_documents(documents),
    )


def parse_verdict(text: str) -> bool | None:
    """Returns whether the labeller's answer begins with yes; None if with neither yes nor no.

    The thoughts of a reasoning model are not part of its answer.
    """
    match = _VERDICT.match(without_thoughts(text))
    return None if match is None else match.group(1).lower() == "yes"


def neutralise_tags(text: str) -> str:
    """Replaces the angle brackets of our tags by round ones: '</Answer >' becomes '(/Answer)'.

    The result contains no tag, even after nested ones. A replacement leaves neither angle brackets
    nor a gap, so the text around it cannot join into a new tag. A tag in compatibility characters,
    such as '＜/answer＞', counts as well, because a tokenizer may normalise the text (NFKC); each
    character is then normalised.
    """
    # Normalising a whole text takes quadratic time for a long run of combining characters. It
    # composes characters in addition, which makes no tag.
    normal = _NOT_ASCII.sub(lambda match: unicodedata.normalize("NFKC", match[0]), text)
    return _TAG.sub(r"(\1\2)", normal if _TAG.search(normal) else text)


def _one_line(text: str) -> str:
    """Joins `text` into one line without tags. Merging spaces first keeps it from forming a tag."""
    return neutralise_tags(" ".join(text.split()))


def format_documents(docs: Sequence[str]) -> str:
    """Formats documents, best first, as lines 'Doc 1: …' without tags; `NO_RESULTS` if none.

    Each document is one line, so that it cannot imitate several documents.
    """
    if not docs:
        return NO_RESULTS
    return "\n".join(f"Doc {i}: {_one_line(doc)}" for i, doc in enumerate(docs, start=1))


def search_failed(reason: str) -> str:
    """Returns the content of the information block for a search that failed after its retries."""
    return f"The search failed ({_one_line(reason)})."


def information_block(docs_text: str) -> str:
    """Wraps the text of `format_documents`, `NO_RESULTS` or `search_failed` for insertion.

    Truncate long documents before this call, so that the closing tag is never lost.
    """
    return f"\n\n<information>{docs_text}</information>\n\n"


def simulator_prompt(
    question: str, answer: str, query: str, noisy: bool, form: str, topk: int
) -> str:
    """Returns the simulator's user turn; its system turn is empty.

    Args:
      question: the question that the user of the simulated engine wants to answer.
      answer: the gold answer of the question; the caller joins several aliases.
      query: the policy's query. It becomes one line, so that it cannot end the request early.
      noisy: whether to request noisy documents instead of useful ones.
      form: "finetuned", the wording that simulators are fine-tuned on; or "prompted", which adds a
        worked example and forbids any other text, for a model without fine-tuning.
      topk: number of documents, at least 1.

    Raises:
      ValueError: `form` is unknown, or topk < 1.
    """
    if form not in SIMULATOR_FORMS:
        raise ValueError(f"simulator prompt form is {form!r}: use {' or '.join(SIMULATOR_FORMS)}")
    if topk < 1:
        raise ValueError(f"topk is {topk}: it must be at least 1")
    kind = "noisy" if noisy else "useful"
    count = _NUMBER_WORDS[topk - 1] if topk <= len(_NUMBER_WORDS) else str(topk)
    head = _SIMULATOR_HEAD.format(count=count, kind=kind)
    request = _simulator_request(question, answer, query, kind, prompted=form == "prompted")
    if form == "finetuned":
        return head + request
    example = _simulator_request(**_EXAMPLE, kind=kind, prompted=True)
    documents = format_documents(_EXAMPLE_DOCUMENTS[kind][:topk])
    return f"{head}Here is an example.\n\n{example}\n{documents}\n\nNow your turn.\n\n{request}"


def _simulator_request(question: str, answer: str, query: str, kind: str, prompted: bool) -> str:
    question, answer = neutralise_tags(question), neutralise_tags(answer)
    task = _SIMULATOR_TASK.format(question=question, answer=answer, kind=kind)
    if prompted:
        task += _PROMPTED_AIM[kind] + _PROMPTED_ONLY
    return task + _SIMULATOR_TAIL.format(query=_one_line(query), Kind=kind.capitalize())


def cut_documents(text: str, topk: int) -> list[str]:
    """Cuts a simulator's output into at most `topk` documents, each stripped and on one line.

    Reads 'Doc i: …' with increasing i, and skips missing numbers and empty documents. The last
    document ends before `Doc {topk+1}`, or where the numbers start again because a model repeats
    itself. Thoughts are removed first. Returns [] if the rest contains no document.
    """
    # The text before the first header, then the number and the text of each document.
    _, *pieces = _DOCUMENT_HEADER.split(without_thoughts(text))
    documents, last_number = [], 0
    for digits, document in zip(pieces[::2], pieces[1::2], strict=True):
        # Python refuses to convert thousands of digits.
        number = int(digits) if len(digits) < 20 else math.inf
        if not last_number < number <= topk:
            break
        last_number = number
        documents.append(" ".join(document.split()))
    return [document for document in documents if document]
