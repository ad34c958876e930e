"""How the embedded world talks: attributes, statements, questions and search queries.

Everything here is a template over a name and a value; it knows no entity and no split.
"""

from dataclasses import dataclass

from zerosearch_jax.text.matching import words


@dataclass(frozen=True)
class Attribute:
    """One kind of fact and its wording.

    Attributes:
      noun: as in "the {noun} of Chad".
      inverse: what a question calls the entity by this value, `{v}` standing for it:
        "country whose capital is {v}". None when values do not point back to an entity.
      unit: follows a value in statements (" km"), "" for none.
      statements: sentences over `{e}` (name), `{v}` (value with unit) and `{n}` (noun).
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
        """Phrasing `index` (modulo their number) of the fact, as one sentence."""
        template = self.statements[index % len(self.statements)]
        return capitalise(template.format(e=name, v=value + self.unit, n=self.noun))

    def query(self, name: str) -> str:
        """A good search query for this fact of `name`."""
        return f"{self.noun} of {name}"


def _attributes(kind: str, *rows: tuple[str, str, str, bool]) -> dict[str, Attribute]:
    return {
        key: Attribute(noun, f"{kind} whose {noun} is {{v}}{unit}" if invertible else None, unit)
        for key, noun, unit, invertible in rows
    }


# What is asked about, by kind of entity. Keys of `Entity.facts` that are not here only colour
# the filler sentences.
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

# Sentences that fill a passage up to about 30 words: (fact they need or "", text). They state
# nothing that a question asks.
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


# Sentences of a passage that says nothing worth asking: what a search for a bare name finds.
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
    """First letter in upper case, the rest untouched."""
    return sentence[:1].upper() + sentence[1:]


def guessable(name: str, value: str) -> bool:
    """Whether `value` can be had from `name` alone: Mexico, Mexico City; helium, He; Kenya, .ke."""
    if any(w[:4] == v[:4] for w in words(name) for v in words(value) if min(len(w), len(v)) > 3):
        return True
    compact, letters = "".join(words(value)), "".join(words(name))
    initials = "".join(w[0] for w in words(name))
    return compact.isalpha() and (letters.startswith(compact) or compact in initials)
