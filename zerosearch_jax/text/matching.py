"""Word matching: folds accents, splits text into words, finds names as whole words.

Chinese and Japanese put no spaces between words, so a split at spaces would return sentences. Each
Han, Hiragana and Katakana character is therefore one word, as in the Chinese part of MLQA's metric
(arXiv 1910.07475, "mixed segmentation"). Korean, Thai, Lao, Khmer and Burmese are split at spaces,
also as in MLQA. Text without such characters is split exactly as in SQuAD's metric.
"""

import re
import string
import unicodedata

_LETTERS = str.maketrans(
    {"’": "'", "‘": "'", "–": "-", "—": "-", "ı": "i", "ł": "l", "Ł": "L", "ø": "o", "Ø": "O",
     "đ": "d", "Đ": "D", "ß": "ss", "æ": "ae", "Æ": "Ae", "“": '"', "”": '"', "ʻ": "'", "ə": "e"}
)  # fmt: skip
# Signs that turn か into が and は into ぱ. They tell words apart, unlike accents.
_VOICING = "\u3099\u309a"
# Han with its iteration mark 々 and zero 〇, Hiragana, Katakana (also small and half-width ones).
_CJK = (
    "\u3005\u3007\u3021-\u3029\u3038-\u303b\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\U00020000-\U0003ffff\u3041-\u309a\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff"
    "\uff66-\uff9f\U0001b000-\U0001b16f"
)
_WORD = re.compile(rf"[{_CJK}]|[^\W{_CJK}]+(?:['.][^\W{_CJK}]+)*")
_CHARACTER = re.compile(f"[{_CJK}]")
# Punctuation of these scripts: the blocks of CJK punctuation and full-width forms, and ・.
_CJK_PUNCTUATION = re.compile(
    "[\u3001-\u3003\u3008-\u3011\u3014-\u301f\u3030\u303d\u30a0\u30fb"
    "\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65]"
)


class _Folding(dict):
    """Map from a code point to its folded text, which is computed at the first look-up.

    NFKD of a whole text would take quadratic time for a long run of combining characters.
    """

    def __missing__(self, code: int) -> str:
        decomposed = unicodedata.normalize("NFKD", chr(code))
        self[code] = "".join(c for c in decomposed if not unicodedata.combining(c) or c in _VOICING)
        return self[code]


_FOLDING = _Folding(_LETTERS)
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLE = re.compile(r"\b(a|an|the)\b")


def fold(text: str) -> str:
    """Removes accents and typographic punctuation from `text`; other letters are unchanged."""
    return unicodedata.normalize("NFC", text.translate(_FOLDING))


def words(text: str) -> list[str]:
    """Splits folded `text` into lower-case words; apostrophes and decimal points stay."""
    return _WORD.findall(fold(text).lower())


def normalise(text: str) -> str:
    """Returns SQuAD's normal form: lower case, no ASCII punctuation, no a/an/the, single spaces.

    Rajpurkar et al. 2016 (arXiv 1606.05250). Nothing more is normalised, so that scores are
    comparable with published ones.
    """
    return " ".join(_ARTICLE.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def score_tokens(text: str) -> list[str]:
    """Returns the tokens of F1: the words of the normal form, and each CJK character.

    Like MLQA's metric, it drops the punctuation of Chinese and Japanese, such as 。 and 「.
    """
    text = normalise(text)
    if text.isascii():
        return text.split()
    return _CHARACTER.sub(r" \g<0> ", _CJK_PUNCTUATION.sub(" ", text)).split()


def padded(text: str) -> str:
    """Returns the words of `text` with a space around each, so that `in` finds whole words."""
    return f" {' '.join(words(text))} "


def mentions(text: str, name: str) -> bool:
    """Returns whether `name` occurs in `text` as whole words, ignoring case and accents."""
    return padded(name) in padded(text)
