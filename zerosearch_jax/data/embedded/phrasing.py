"""Templates of the embedded world: attributes, statements, questions and search queries.

A template takes a name and a value.
"""

from dataclasses import dataclass

from zerosearch_jax.text.matching import words


@dataclass(frozen=True)
class Attribute:
    """One kind of fact and its wording.

    Attributes:
      noun: completes "the {noun} of Chad".
      inverse: describes the entity by the value `{v}`: "country whose capital is {v}". None if
        a value does not identify an entity.
      unit: follows the value in statements (" km"); "" if there is none.
      statements: sentences with `{e}` (name), `{v}` (value with unit) and `{n}` (noun).
    """

    noun: str
    inverse: str | None
    unit: str = ""
    statements: tuple[str, ...] = (
        "The {n} of {e} is {v}.",
        "{e} has {v} as its {n}.",
        "{v} is the {n} of {e}.",
        "For {e}, the {n} is {v}.",
    )

    def statement(self, index: int, name: str, value: str) -> str:
        """Returns the fact as a sentence, in phrasing `index` modulo their number."""
        template = self.statements[index % len(self.statements)]
        return capitalise(template.format(e=name, v=value + self.unit, n=self.noun))

    def query(self, name: str) -> str:
        """Returns a good search query for this fact of `name`."""
        return f"{self.noun} of {name}"


def _attributes(kind: str, *rows: tuple[str, str, str, bool]) -> dict[str, Attribute]:
    return {
        key: Attribute(noun, f"{kind} whose {noun} is {{v}}{unit}" if invertible else None, unit)
        for key, noun, unit, invertible in rows
    }


# The attributes that questions ask about, by kind of entity. Other keys of `Entity.facts` occur
# in filler sentences only.
ATTRIBUTES: dict[str, dict[str, Attribute]] = {
    "country": _attributes(
        "country",
        ("capital", "capital", "", True),
        ("currency", "currency", "", True),
        ("domain", "internet domain", "", True),
        ("aircraft_prefix", "aircraft prefix", "", True),
        ("peak", "highest point", "", True),
        ("peak_elevation", "peak elevation", " m", False),
        ("lowest_point", "lowest point", "", True),
        ("regional_city", "largest regional city", "", True),
        ("anthem", "national anthem", "", True),
        ("national_day", "national day", "", False),
        ("coastline", "coastline length", " km", False),
    ),
    "element": _attributes(
        "element",
        ("symbol", "symbol", "", True),
        ("atomic_number", "atomic number", "", True),
        ("atomic_weight", "atomic weight", "", True),
        ("melting_point", "melting point", " K", True),
        ("boiling_point", "boiling point", " K", True),
        ("density", "density", " g/cm3", False),
        ("discovery_year", "discovery year", "", False),
    ),
}

# Sentences that fill a passage up to about 30 words, as (required fact or "", text). They answer
# no question.
FILLERS: dict[str, tuple[tuple[str, str], ...]] = {
    "country": (
        ("region", "{e} is a country in {region}."),
        ("", "Much has been written about {e}."),
        ("", "These are short notes about {e}."),
        ("", "Any good atlas has more to say about {e}."),
        ("", "The notes on {e} come from a public book of facts about the world."),
    ),
    "element": (
        ("group", "{e} belongs to group {group} of the periodic table."),
        ("period", "{e} stands in period {period} of the table."),
        ("", "{e} is a chemical element."),
        ("", "These are short notes about {e}."),
        ("", "The notes on {e} come from a public table of chemical elements."),
    ),
}

# The passage that a search for a bare name finds. It answers no question.
OVERVIEW = {
    "country": (
        "{e} is a country.",
        "The people of {e} are proud of {e}.",
        "Books on {e} tell of the past of {e}.",
        "Maps of {e} show where {e} lies.",
        "There are songs about {e}.",
    ),
    "element": (
        "{e} is a chemical element.",
        "Textbooks on {e} tell how {e} is found.",
        "The uses of {e} depend on how pure {e} is.",
        "Samples of {e} are kept with care.",
        "There are books about {e}.",
    ),
}


def capitalise(sentence: str) -> str:
    """Returns `sentence` with its first letter in upper case."""
    return sentence[:1].upper() + sentence[1:]


def guessable(name: str, value: str) -> bool:
    """Whether `name` gives `value` away: Mexico, Mexico City; helium, He; Kenya, .ke."""
    if any(w[:4] == v[:4] for w in words(name) for v in words(value) if min(len(w), len(v)) > 3):
        return True
    compact, letters = "".join(words(value)), "".join(words(name))
    initials = "".join(w[0] for w in words(name))
    return compact.isalpha() and (letters.startswith(compact) or compact in initials)
