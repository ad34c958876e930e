"""Word matching: removes accents, splits text into words, finds names as whole words."""

import re
import unicodedata

_LETTERS = str.maketrans(
    {"’": "'", "‘": "'", "–": "-", "—": "-", "ı": "i", "ł": "l", "Ł": "L", "ø": "o", "Ø": "O",
     "đ": "d", "Đ": "D", "ß": "ss", "æ": "ae", "Æ": "Ae", "“": '"', "”": '"', "ʻ": "'", "ə": "e"}
)  # fmt: skip


def fold(text: str) -> str:
    """Removes accents and typographic punctuation from `text`; other letters are unchanged."""
    text = unicodedata.normalize("NFKD", text.translate(_LETTERS))
    return "".join(c for c in text if not unicodedata.combining(c))


def words(text: str) -> list[str]:
    """Splits folded `text` into lower-case words; apostrophes and decimal points stay."""
    return re.findall(r"\w+(?:['.]\w+)*", fold(text).lower())


def padded(text: str) -> str:
    """Returns the words of `text` with a space around each, so that `in` finds whole words."""
    return f" {' '.join(words(text))} "


def mentions(text: str, name: str) -> bool:
    """Returns whether `name` occurs in `text` as whole words, ignoring case and accents."""
    return padded(name) in padded(text)
