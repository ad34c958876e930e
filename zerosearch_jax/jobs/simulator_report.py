"""What a simulator is worth, before a policy is trained on it (paper §3.2, its last step).

For every held-out search the simulator writes both useful and noisy documents, and a fixed reader
answers the question from them: it should from the useful ones and should not from the noisy ones.
The real engine's documents stand beside it as the ceiling, no documents as the floor. Searches that
the engine answered usefully are told apart from those that it did not, most of which are badly put:
a document true to a bad query need not hold the answer.
"""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random

from ml_collections import ConfigDict

from zerosearch_jax.errors import UserError
from zerosearch_jax.evaluation.markdown import table
from zerosearch_jax.files import write_atomically
from zerosearch_jax.rl.rewards import exact_match
from zerosearch_jax.search.engine import SearchEngine, SearchRequest
from zerosearch_jax.simulator.gate import asked_of
from zerosearch_jax.simulator.pairs import LABELS, Pair, load_pairs
from zerosearch_jax.simulator.reader import Reader, make_reader
from zerosearch_jax.text.matching import mentions, words
from zerosearch_jax.training import factory
from zerosearch_jax.training.episode_metrics import wilson_interval

FEW_WORDS, MANY_WORDS = 15, 60  # a document is asked to have about 30
LENGTH_BIN = 5  # words
EXAMPLES = 5
Documents = Sequence[Sequence[str]]  # of each pair, best first


def run(config: ConfigDict, workdir: str) -> None:
    """Writes `workdir/report.md` and `workdir/report.json`, and prints the former."""
    for name, search in config.simulators.items():
        if search.engine != "simulated":
            raise UserError(f"config.simulators.{name}.engine is {search.engine!r}, not simulated")
    asked = {name: asked_of(search) for name, search in config.simulators.items()}
    pairs = held_out(config.pairs, config.limit, config.seed)
    print(f"{len(pairs)} held-out searches", flush=True)
    reader = make_reader(config.reader, config.mesh)
    rows, written = [], {}
    for name, search in config.simulators.items():
        engine = factory.make_engine(search, config.seed, config.mesh)
        written[name] = {label: ask(engine, pairs, label) for label in LABELS}
        for label, documents in written[name].items():
            answers = read(reader, pairs, documents)
            for queries in LABELS:
                those = [
                    row
                    for row in zip(pairs, documents, answers, strict=True)
                    if row[0].label == queries
                ]
                row = source_row(name, label, queries, those, search.topk)
                rows.append(row | (divergences(those) if queries == label else {}))
    for label in LABELS:
        those = [pair for pair in pairs if pair.label == label]
        documents = [pair.documents for pair in those]
        answers = read(reader, those, documents)
        found = list(zip(those, documents, answers, strict=True))
        rows.append(source_row("engine", label, label, found, None))
        nothing = [()] * len(those)
        answers = read(reader, those, nothing)
        found = list(zip(those, nothing, answers, strict=True))
        rows.append(source_row("none", "", label, found, None))
    report = {
        "pairs": config.pairs,
        "reader": config.reader.model,
        "simulators": {
            name: {"model": search.simulator.model} | asked[name]
            for name, search in config.simulators.items()
        },
        "rows": rows,
        "examples": {name: examples(pairs, documents) for name, documents in written.items()},
    }
    text = markdown(report)
    workdir = Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    write_atomically(workdir / "report.md", text)
    write_atomically(workdir / "report.json", json.dumps(report, indent=1) + "\n")
    print(f"\n{text}\nwritten to {workdir / 'report.md'} and {workdir / 'report.json'}")


def held_out(path: str, limit: int, seed: int) -> list[Pair]:
    """A draw of at most `limit` pairs of either label, of episodes' last searches.

    Only the last search can bring the answer; earlier ones of a multi-hop question bring bridges.

    Raises:
      UserError: no such pair that is useful, or `limit` is below 1.
    """
    if limit < 1:
        raise UserError(f"config.limit={limit}: it must be at least 1")
    pairs = [pair for pair in load_pairs(path) if pair.last]
    if not any(pair.label == "useful" for pair in pairs):
        raise UserError(
            f"{path}: no useful pair is an episode's last search; collect more episodes"
        )
    drawn = []
    for label in LABELS:
        those = [pair for pair in pairs if pair.label == label]
        drawn += Random(seed).sample(those, min(limit, len(those)))
    return drawn


def ask(engine: SearchEngine, pairs: Sequence[Pair], label: str) -> list[tuple[str, ...]]:
    """The documents that the simulator writes for each pair's query when asked for `label` ones.

    Raises:
      UserError: a search failed.
    """
    requests = [
        SearchRequest(
            episode=i,
            turn=LABELS.index(label),  # a draw of its own for either label
            query=pair.query,
            question=pair.question,
            golden_answers=pair.golden_answers,
            noisy=label == "noisy",
        )
        for i, pair in enumerate(pairs)
    ]
    results = {result.key: result for result in engine.search(requests)}
    failures = [result.failure for result in results.values() if result.failure]
    if failures:
        raise UserError(f"{len(failures)} of {len(requests)} searches failed ({failures[0]})")
    return [results[request.key].documents for request in requests]


def read(reader: Reader, pairs: Sequence[Pair], documents: Documents) -> list[str | None]:
    """The reader's answer to each pair's question from the documents beside it."""
    return reader([pair.question for pair in pairs], [pair.query for pair in pairs], documents)


Found = tuple[Pair, Sequence[str], str | None]  # a search, its documents, the reader's answer


def source_row(
    source: str, label: str, queries: str, found: Sequence[Found], topk: int | None
) -> dict[str, object]:
    """One row of the report; None where there is nothing to count.

    Args:
      label: what kind of documents was asked for.
      queries: how the engine's documents for these searches were labelled.
      topk: documents that each search should have; None: as many as there are.

    Returns:
      questions: how many.
      reader_em (with its 95% Wilson interval): share of exact matches of the reader's answers.
      gold_in_documents: share of questions with a document that mentions the gold answer.
      exactly_topk: share of searches with exactly `topk` documents; None without `topk`.
      words_a_document: mean.
      documents_15_to_60_words: share of the documents.
      word_jsd_bits, length_jsd_bits: see `divergences`; None here.
    """
    matches = sum(exact_match(answer, pair.golden_answers) for pair, _, answer in found)
    held = sum(
        any(mentions(document, gold) for document in documents for gold in pair.golden_answers)
        for pair, documents, _ in found
    )
    counts = [len(documents) for _, documents, _ in found]
    lengths = [len(words(document)) for _, documents, _ in found for document in documents]
    low, high = wilson_interval(matches, len(found))
    return {
        "source": source,
        "label": label,
        "queries": queries,
        "questions": len(found),
        "reader_em": share(matches, len(found)),
        "reader_em_low": low,
        "reader_em_high": high,
        "gold_in_documents": share(held, len(found)),
        "exactly_topk": None if topk is None else share(counts.count(topk), len(counts)),
        "words_a_document": share(sum(lengths), len(lengths)),
        "documents_15_to_60_words": share(
            sum(FEW_WORDS <= length <= MANY_WORDS for length in lengths), len(lengths)
        ),
        "word_jsd_bits": None,
        "length_jsd_bits": None,
    }


def divergences(found: Sequence[Found]) -> dict[str, float | None]:
    """How far the documents are in style from those that the engine found for the same searches.

    Returns:
      word_jsd_bits: Jensen-Shannon divergence of the distributions of words (unigrams).
      length_jsd_bits: that of the histograms of documents' lengths, in bins of 5 words.
    """
    ours = [words(document) for _, documents, _ in found for document in documents]
    real = [words(document) for pair, *_ in found for document in pair.documents]
    counts = [Counter(word for document in side for word in document) for side in (ours, real)]
    lengths = [Counter(len(document) // LENGTH_BIN for document in side) for side in (ours, real)]
    return {
        "word_jsd_bits": jensen_shannon_bits(*counts),
        "length_jsd_bits": jensen_shannon_bits(*lengths),
    }


def jensen_shannon_bits(left: Counter, right: Counter) -> float | None:
    """Divergence of two distributions, given as counts, from their mean (Lin 1991), in [0, 1].

        JSD(P, Q) = KL(P ‖ M) / 2 + KL(Q ‖ M) / 2,  M = (P + Q) / 2, logarithms to base 2

    None when either is empty.
    """
    if not left.total() or not right.total():
        return None
    total = 0.0
    for key in sorted(left.keys() | right.keys()):
        p, q = left[key] / left.total(), right[key] / right.total()
        mean = (p + q) / 2
        total += sum(x / 2 * math.log2(x / mean) for x in (p, q) if x)
    return total


def share(part: float, whole: int) -> float | None:
    """`part / whole`, None of nothing."""
    return part / whole if whole else None


def examples(pairs: Sequence[Pair], documents: Mapping[str, Documents]) -> list[dict[str, str]]:
    """The first pairs with the first document of either kind that the simulator wrote."""
    return [
        {"query": pair.query, "gold": pair.golden_answers[0]}
        | {label: documents[label][i][0] if documents[label][i] else "–" for label in LABELS}
        for i, pair in enumerate(pairs[:EXAMPLES])
    ]


def markdown(report: Mapping) -> str:
    """The report for people."""
    parts = ["# Simulator report"]
    parts.append(f"Reader: `{report['reader']}`. Held-out searches: `{report['pairs']}`.")
    parts += [
        f"- {name}: `{one['model']}`, form {one['form']}, temperature {one['temperature']}, "
        f"sha256 {one['weights'][:12]}"
        for name, one in report["simulators"].items()
    ]
    parts.append(table(report["rows"]))
    parts.append(
        "label: the kind of documents that was asked for; queries: how the engine's own documents "
        "for the same searches were labelled. reader_em: exact match of a fixed reader that "
        "answers from the documents, with its 95% Wilson interval. *engine*: the real engine's "
        "documents; where the labels are this reader's own verdicts on them, its figures there "
        "say no more than that. *none*: the reader is told that nothing was found. *jsd*: "
        "Jensen-Shannon divergence from the engine's documents for the same searches, of words "
        "and of lengths."
    )
    for name, rows in report["examples"].items():
        parts += [f"## Examples: {name}", table(rows)]
    return "\n\n".join(parts) + "\n"
