"""A recording of a web search service over the embedded world."""

from collections.abc import Iterable, Sequence
from random import Random

from zerosearch_jax.search.engine import Passage
from zerosearch_jax.search.web import Organic, record_of


def world_recording(passages: Iterable[Passage], seed: int) -> list[dict]:
    """Returns Serper-shaped replies about the embedded world: one per entity, for its name.

    A reply lists all passages of the entity. The passage without a fact comes first, as a search
    for a bare name would rank it. The reply also has the flaws of real pages: repeated results,
    results mirrored on another site, results without a snippet, and pages on "huggingface.co" with
    all the answers. `filter_results` with that domain blocked keeps exactly the passages.

    The recording is deterministic in (passages, seed).
    """
    by_entity: dict[str, list[Passage]] = {}
    for passage in passages:
        by_entity.setdefault(passage.entity_id, []).append(passage)
    return [
        record_of(group[0].title, _pages(group, Random(f"web/{seed}/{entity_id}")))
        for entity_id, group in by_entity.items()
    ]


def _pages(passages: Sequence[Passage], rng: Random) -> list[Organic]:
    results: list[Organic] = []
    if rng.random() < 0.3:
        results.append(_leak(passages, rng))
    for passage in sorted(passages, key=lambda p: bool(p.attributes)):
        link = f"https://notes.example/{passage.id}"
        page = {"title": passage.title, "snippet": passage.text, "link": link}
        results.append(page)
        flaw = rng.random()
        if flaw < 0.1:
            results.append({**page, "link": f"{link}#more"})
        elif flaw < 0.2:
            results.append({**page, "link": f"https://mirror.example/{passage.id}"})
        elif flaw < 0.3:
            picture = f"https://pictures.example/{passage.id}"
            results.append({"title": f"{passage.title} in pictures", "link": picture})
    return results


def _leak(passages: Sequence[Passage], rng: Random) -> Organic:
    """Returns a page that publishes every answer about the entity."""
    host = rng.choice(("huggingface.co", "datasets.huggingface.co"))
    return {
        "title": f"{passages[0].title}: questions with answers",
        "snippet": " ".join(passage.text for passage in passages),
        "link": f"https://{host}/datasets/world/{passages[0].entity_id}",
    }
