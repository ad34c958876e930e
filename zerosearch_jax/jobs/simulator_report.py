"""Measures simulators before a policy trains on them (paper §3.2, last step).

For every held-out search, a simulator writes useful and noisy documents, and a fixed reader answers
the question from each kind. A good simulator lets the reader answer from the useful documents and
not from the noisy ones. The real engine's documents are the ceiling, no documents the floor.

Rows are split by the label of the engine's own documents. Most searches labeled noisy have a bad
query, and documents that match a bad query need not hold the answer.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random

import numpy as np
from ml_collections import ConfigDict
from scipy.spatial.distance import jensenshannon
from tabulate import tabulate

from zerosearch_jax import config_flags
from zerosearch_jax.errors import UserError
from zerosearch_jax.evaluation.intervals import wilson_interval
from zerosearch_jax.files import write_atomically, write_json
from zerosearch_jax.rl.rewards import exact_match
from zerosearch_jax.rollout.scheduler import STOP_STRINGS
from zerosearch_jax.search.engine import SearchEngine, SearchRequest, describe_failures
from zerosearch_jax.simulator.gate import simulator_identity
from zerosearch_jax.simulator.pairs import LABELS, Pair, load_pairs
from zerosearch_jax.simulator.reader import Reader, make_reader
from zerosearch_jax.text.matching import mentions, words
from zerosearch_jax.training import factory
from zerosearch_jax.training.inputs import check_job
from zerosearch_jax.training.job_configs import SimulatorReportConfig

FEW_WORDS, MANY_WORDS = 15, 60  # The prompt asks for documents of about 30 words.
LENGTH_BIN_WORDS = 5
EXAMPLES = 5
Documents = Sequence[Sequence[str]]  # of each pair, best first
ReadSearch = tuple[Pair, Sequence[str], str | None]  # a search, its documents, the reader's answer


def run(config: ConfigDict, workdir: str) -> None:
    """Writes `report.md` and `report.json` to `workdir`, and prints the former."""
    config = config_flags.typed(SimulatorReportConfig, config)
    check_job(config)
    factory.check_model(config.reader.model, STOP_STRINGS)
    for search in config.simulators.values():
        factory.check_simulator_model(search)
    identities = {name: simulator_identity(search) for name, search in config.simulators.items()}
    pairs = held_out(config.pairs, config.limit, config.seed)
    print(f"{len(pairs)} held-out searches", flush=True)
    reader = make_reader(config.reader, config.mesh)
    rows, examples = [], {}
    for name, search in config.simulators.items():
        engine = factory.make_engine(search, config.seed, config.mesh)
        documents = {label: write_documents(engine, pairs, label) for label in LABELS}
        rows += simulator_rows(name, reader, pairs, documents, search.topk)
        examples[name] = example_rows(pairs, documents)
    report = {
        "pairs": config.pairs,
        "reader": config.reader.model,
        "simulators": {
            name: {"model": search.simulator.model} | identities[name]
            for name, search in config.simulators.items()
        },
        "rows": rows + reference_rows(reader, pairs),
        "examples": examples,
    }
    text = markdown(report)
    workdir = Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    write_atomically(workdir / "report.md", text)
    write_json(workdir / "report.json", report)
    print(f"\n{text}\nwritten to {workdir / 'report.md'} and {workdir / 'report.json'}")


def held_out(path: str, limit: int, seed: int) -> list[Pair]:
    """Draws at most `limit` pairs of each label among the last searches of episodes.

    Only the last search can find the answer; earlier ones of a multi-hop question find bridges.

    Raises:
      UserError: no last search is useful.
    """
    pairs = [pair for pair in load_pairs(path) if pair.last]
    if not any(pair.label == "useful" for pair in pairs):
        raise UserError(
            f"{path}: no useful pair is an episode's last search; collect more episodes"
        )
    drawn = []
    for label in LABELS:
        candidates = [pair for pair in pairs if pair.label == label]
        drawn += Random(seed).sample(candidates, min(limit, len(candidates)))
    return drawn


def write_documents(
    engine: SearchEngine, pairs: Sequence[Pair], label: str
) -> list[tuple[str, ...]]:
    """Returns the documents that the simulator writes for each pair's query under `label`.

    A search that is too long for the simulator has no documents; their number is printed.

    Raises:
      UserError: another search failed.
    """
    requests = [
        SearchRequest(
            episode=i,
            turn=LABELS.index(label),  # The turn keys the draw, so the labels draw independently.
            query=pair.query,
            question=pair.question,
            golden_answers=pair.golden_answers,
            noisy=label == "noisy",
        )
        for i, pair in enumerate(pairs)
    ]
    results = {result.key: result for result in engine.search(requests)}
    if long := sum(result.too_long for result in results.values()):
        print(f"{long} of {len(requests)} searches have no documents: too long for the simulator")
    failed = [r for r in results.values() if r.failure and not r.too_long]
    if failed:
        raise UserError(
            f"{len(failed)} of {len(requests)} searches failed ({describe_failures(failed)}); fix "
            "the simulator or its server and repeat the command"
        )
    return [results[request.key].documents for request in requests]


def read_documents(reader: Reader, pairs: Sequence[Pair], documents: Documents) -> list[ReadSearch]:
    """Returns each pair with its documents and the reader's answer from them."""
    questions, queries = [pair.question for pair in pairs], [pair.query for pair in pairs]
    return list(zip(pairs, documents, reader(questions, queries, documents), strict=True))


def simulator_rows(
    name: str,
    reader: Reader,
    pairs: Sequence[Pair],
    documents: Mapping[str, Documents],
    topk: int,
) -> list[dict[str, object]]:
    """Returns a simulator's report rows: one per requested label and label of the engine.

    Args:
      documents: label -> the simulator's documents for each pair.
    """
    rows = []
    for label in LABELS:
        read = read_documents(reader, pairs, documents[label])
        for queries in LABELS:
            selected = [search for search in read if search[0].label == queries]
            row = source_row(name, label, queries, selected, topk)
            rows.append(row | (divergences(selected) if queries == label else {}))
    return rows


def reference_rows(reader: Reader, pairs: Sequence[Pair]) -> list[dict[str, object]]:
    """Returns the rows of the real engine (ceiling) and of no documents (floor), by label."""
    rows = []
    for label in LABELS:
        selected = [pair for pair in pairs if pair.label == label]
        read = read_documents(reader, selected, [pair.documents for pair in selected])
        rows.append(source_row("engine", label, label, read, None))
        read = read_documents(reader, selected, [()] * len(selected))
        rows.append(source_row("none", "", label, read, None))
    return rows


def source_row(
    source: str, label: str, queries: str, read: Sequence[ReadSearch], topk: int | None
) -> dict[str, object]:
    """Returns one row of the report. A share or mean over nothing is None.

    Args:
      label: the requested label of the documents.
      queries: the label of the engine's documents for these searches.
      topk: number of documents that each search should have; None if any number is right.

    Returns:
      questions: number of searches.
      reader_em: share of exact matches of the reader's answers, with its 95% Wilson interval.
      gold_in_documents: share of searches with a document that mentions a gold answer.
      exactly_topk: share of searches with exactly `topk` documents; None without `topk`.
      words_a_document: mean number of words.
      documents_15_to_60_words: share of the documents with 15 to 60 words.
      word_jsd_bits, length_jsd_bits: None here; see `divergences`.
    """
    matches = sum(exact_match(answer, pair.golden_answers) for pair, _, answer in read)
    mentioned = sum(
        any(mentions(document, alias) for document in documents for alias in pair.golden_answers)
        for pair, documents, _ in read
    )
    counts = [len(documents) for _, documents, _ in read]
    lengths = [len(words(document)) for _, documents, _ in read for document in documents]
    low, high = wilson_interval(matches, len(read))
    return {
        "source": source,
        "label": label,
        "queries": queries,
        "questions": len(read),
        "reader_em": _share(matches, len(read)),
        "reader_em_low": low,
        "reader_em_high": high,
        "gold_in_documents": _share(mentioned, len(read)),
        "exactly_topk": None if topk is None else _share(counts.count(topk), len(counts)),
        "words_a_document": _share(sum(lengths), len(lengths)),
        "documents_15_to_60_words": _share(
            sum(FEW_WORDS <= length <= MANY_WORDS for length in lengths), len(lengths)
        ),
        "word_jsd_bits": None,
        "length_jsd_bits": None,
    }


def divergences(read: Sequence[ReadSearch]) -> dict[str, float | None]:
    """Measures how far the documents differ in style from the engine's for the same searches.

    Returns:
      word_jsd_bits: Jensen-Shannon divergence of the word (unigram) distributions.
      length_jsd_bits: divergence of the histograms of document lengths, in bins of 5 words.
    """
    written = [words(document) for _, documents, _ in read for document in documents]
    real = [words(document) for pair, *_ in read for document in pair.documents]
    sides = (written, real)
    word_counts = [Counter(word for document in side for word in document) for side in sides]
    lengths = [Counter(len(document) // LENGTH_BIN_WORDS for document in side) for side in sides]
    return {
        "word_jsd_bits": jensen_shannon_bits(*word_counts),
        "length_jsd_bits": jensen_shannon_bits(*lengths),
    }


def jensen_shannon_bits(left: Counter, right: Counter) -> float | None:
    """Returns the divergence of two distributions, given as counts, in [0, 1] bits (Lin 1991).

        JSD(P, Q) = KL(P ‖ M) / 2 + KL(Q ‖ M) / 2,  M = (P + Q) / 2, logarithms to base 2

    None if either is empty.
    """
    if not left.total() or not right.total():
        return None
    keys = sorted(left.keys() | right.keys())
    counts = np.array([[side[key] for key in keys] for side in (left, right)], np.float64)
    # scipy returns the distance, the square root of the divergence.
    return float(jensenshannon(*counts, base=2) ** 2)


def example_rows(pairs: Sequence[Pair], documents: Mapping[str, Documents]) -> list[dict[str, str]]:
    """Returns the first pairs with the simulator's first document under each label."""
    return [
        {"query": pair.query, "gold": pair.golden_answers[0]}
        | {label: documents[label][i][0] if documents[label][i] else "–" for label in LABELS}
        for i, pair in enumerate(pairs[:EXAMPLES])
    ]


def markdown(report: Mapping) -> str:
    """Renders the report as Markdown."""
    simulators = [
        f"- {name}: `{simulator['model']}`, form {simulator['form']}, temperature "
        f"{simulator['temperature']}, sha256 {simulator['weights'][:12]}"
        for name, simulator in report["simulators"].items()
    ]
    parts = [
        "# Simulator report",
        f"Reader: `{report['reader']}`. Held-out searches: `{report['pairs']}`.",
        *simulators,
        _table(report["rows"]),
        "- label: the requested kind of documents; queries: the label of the engine's own "
        "documents for the same searches.\n"
        "- reader_em: exact match of a fixed reader that answers from the documents, with its 95% "
        "Wilson interval.\n"
        "- *engine*: the real engine's documents. If this reader also labeled them, its exact "
        "match on them only repeats the labels.\n"
        "- *none*: the reader sees that nothing was found.\n"
        "- *jsd*: Jensen-Shannon divergence from the engine's documents for the same searches, of "
        "words and of lengths.",
    ]
    for name, rows in report["examples"].items():
        lines = [{key: _cell(text) for key, text in row.items()} for row in rows]
        parts += [f"## Examples: {name}", _table(lines)]
    return "\n\n".join(parts) + "\n"


def _table(rows: Sequence[Mapping]) -> str:
    return tabulate(rows, headers="keys", tablefmt="github", floatfmt=".3f", missingval="–")


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _share(part: float, whole: int) -> float | None:
    return part / whole if whole else None
