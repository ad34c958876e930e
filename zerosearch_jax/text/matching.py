"""Word matching: folds accents, splits text into words, finds names as whole words."""

import re
import unicodedata

_LETTERS = str.maketrans(
    {"’": "'", "‘": "'", "–": "-", "—": "-", "ı": "i", "ł": "l", "Ł": "L", "ø": "o", "Ø": "O",
     "đ": "d", "Đ": "D", "ß": "ss", "æ": "ae", "Æ": "Ae", "“": '"', "”": '"', "ʻ": "'", "ə": "e"}
)  # fmt: skip


def fold(text: str) -> str:
    """`text` without accents and typographic quotes. Letters it does not know stay."""
    text = unicodedata.normalize("NFKD", text.translate(_LETTERS))
    return "".join(c for c in text if not unicodedata.combining(c))


def words(text: str) -> list[str]:
    """Lower-case words of folded `text`; an apostrophe or a decimal point stays inside one."""
    return re.findall(r"\w+(?:['.]\w+)*", fold(text).lower())


def padded(text: str) -> str:
    """The words of `text` with a space on either side of each, so that `in` finds whole words."""
    return f" {' '.join(words(text))} "


def mentions(text: str, name: str) -> bool:
    """Whether `name` occurs in `text` as whole words, whatever the case and the accents."""
    return padded(name) in padded(text)
