"""Converts text to token ids and back, and maps each id to its exact bytes.

A thin layer over `transformers` and `tokenizers`.
"""

import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from itertools import takewhile
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from zerosearch_jax.errors import UserError
from zerosearch_jax.text import thoughts

END_OF_TEXT = "<|endoftext|>"
_PLACEHOLDER = "\ue000"  # marks the position of the user's text in a chat template
_MARK = "\U0010fffd"  # begins and ends the names of control tokens; inserted text loses it

_SURPLUS = 64  # tokens that `encode_start` reads beyond twice the requested ones

# Added tokens that text may spell: words, whitespace and single characters, and the tags of the
# episode's grammar, which `text.prompts` neutralises in all text from outside.
_PLAIN = re.compile(r"[\w\s]+|.")
# Some policies have these tags as special tokens. They are text all the same: actions consist of
# them, so they keep their bytes and are decoded.
_TAG = re.compile(r"</?(think|search|information|answer)>")


def load_tokenizer(directory_or_name: str | Path) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a Hugging Face model directory or, if the hub is reachable, hub name.

    Raises:
      UserError: there is no tokenizer, or its files cannot be read.
    """
    # The model was trained with tokenizer.json. AutoTokenizer would follow config.json's model_type
    # and, for Qwen2, replace the file's pre-tokenizer by its own.
    in_file = (Path(directory_or_name) / "tokenizer.json").is_file()
    loader = PreTrainedTokenizerFast if in_file else AutoTokenizer
    try:
        return loader.from_pretrained(str(directory_or_name))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"no tokenizer could be loaded from {directory_or_name} "
            f"({str(error).splitlines()[0]}); give a directory that holds tokenizer.json "
            "and tokenizer_config.json"
        ) from error


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> list[bytes]:
    """Returns the bytes of each vocabulary id, `[V]`.

    Special tokens other than tags such as `</search>`, and ids without a token, are `b""`, so they
    never complete a stop string. The joined bytes of encoded text equal the text in UTF-8, except
    for characters that `encode` replaces. A SentencePiece vocabulary adds a space before the text.

    Raises:
      UserError: the vocabulary is neither byte-level BPE nor SentencePiece.
    """
    vocabulary = tokenizer.get_vocab()
    added, special = tokenizer.added_tokens_decoder, _control_ids(tokenizer)
    piece_bytes = _piece_reader(tokenizer)
    result = [b""] * (max(vocabulary.values()) + 1)
    for piece, token_id in vocabulary.items():
        if token_id not in special:
            is_added = token_id in added
            result[token_id] = added[token_id].content.encode() if is_added else piece_bytes(piece)
    return result


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Encodes `text` without adding tokens before or after it.

    A control token spelled out in `text` is ordinary text, so that a document cannot end a turn.
    Control tokens are the special tokens and all other added tokens, except words, whitespace,
    single characters and the tags of the episode's grammar. A tag that is an added token becomes
    that token, as in the policy's own text. A character that the tokenizer refuses or drops, such
    as a lone surrogate, becomes U+FFFD, so that the text around it cannot join into a tag.
    """
    backend, _, replaced = _unspellable(tokenizer)
    return backend.encode(replaced.sub("\ufffd", text), add_special_tokens=False).ids


def encode_start(tokenizer: PreTrainedTokenizerBase, text: str, count: int) -> list[int]:
    """Returns the first `count` tokens of `encode(tokenizer, text)`, or all if it has fewer.

    The work is bounded by `count`: growing prefixes of `text` are encoded until one has about
    twice as many tokens. The end of a prefix changes the tokens of its last word and of its last
    run of combining characters, which the surplus covers. Only a single word or run that is
    longer than the surplus may get other tokens than in the whole text, since Unicode
    normalisation sorts a run as a whole. The tokens always spell a prefix of `text`.
    """
    size, enough = 16 * (count + _SURPLUS), 2 * count + _SURPLUS
    while True:
        ids = encode(tokenizer, text[:size])
        if len(text) <= size or len(ids) >= enough:
            return ids[:count]
        size *= 4


def cut_text(tokenizer: PreTrainedTokenizerBase, text: str, count: int) -> str:
    """Returns `text`, cut to its first `count` tokens if it has more."""
    ids = encode_start(tokenizer, text, count + 1)
    return text if len(ids) <= count else decode(tokenizer, ids[:count])


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, user_text: str, system: str | None = None
) -> list[int]:
    """Encodes a prompt up to the point where the model continues.

    With a chat template, the prompt is a system turn (unless `system` is None; it may be empty),
    the user turn and the opening of the assistant's turn. Without a template, it is the plain text
    after the special tokens that the tokenizer adds in front, such as a BOS token. Tokens that it
    would append, such as an EOS token, are left out, because the model continues the prompt. A
    control token spelled out in `user_text` is ordinary text, so that a question cannot end its
    turn. `system` is trusted.
    """
    if tokenizer.chat_template is None:
        text = f"{system}\n\n{user_text}" if system else user_text
        return _added_in_front(tokenizer) + encode(tokenizer, text)
    backend, names, replaced = _unspellable(tokenizer)
    text = _render(tokenizer, user_text, system)
    head, _, tail = _render(tokenizer, _PLACEHOLDER, system).partition(_PLACEHOLDER)
    user = replaced.sub("\ufffd", text[len(head) : len(text) - len(tail)])
    contents = sorted(names, key=len, reverse=True)
    control = re.compile("|".join(map(re.escape, contents)) or "(?!)")
    head, tail = (control.sub(lambda match: names[match[0]], part) for part in (head, tail))
    return backend.encode(head + user + tail, add_special_tokens=False).ids


def opens_thought(tokenizer: PreTrainedTokenizerBase, system: str | None = None) -> bool:
    """Returns whether a prompt of `encode_prompt` ends inside a thought.

    The chat templates of DeepSeek-R1 and its distillations, for example, end with `<think>`.
    """
    if tokenizer.chat_template is None:
        return False
    tail = _render(tokenizer, _PLACEHOLDER, system).partition(_PLACEHOLDER)[2]
    return tail.rfind(thoughts.OPEN) > tail.rfind(thoughts.CLOSE)


@lru_cache(maxsize=8)
def _unspellable(
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[Tokenizer, dict[str, str], re.Pattern[str]]:
    """Copies the tokenizer and gives its control tokens names that no text spells.

    Returns:
      The copy, with the same ids; the name of each control token by its content; and a pattern of
      the characters to replace. The copy is kept, so tokens must be added before the first text is
      encoded.
    """
    data = json.loads(tokenizer.backend_tokenizer.to_str())
    data |= dict(truncation=None, padding=None, post_processor=None)
    names: dict[str, str] = {}
    for token in data["added_tokens"]:
        content = token["content"]
        if _TAG.fullmatch(content):
            token["normalized"] = False  # so that normalisation turns no other text into a tag
        elif token["special"] or not _PLAIN.fullmatch(content):
            names[content] = f"{_MARK}{len(names)}{_MARK}"
            token |= dict(content=names[content], normalized=False, single_word=False)
    model = data["model"]
    vocab, merges = model["vocab"], model.get("merges", [])
    if isinstance(vocab, dict):
        model["vocab"] = {names.get(piece, piece): token_id for piece, token_id in vocab.items()}
    else:  # Unigram: pieces with their scores
        model["vocab"] = [(names.get(piece, piece), score) for piece, score in vocab]
    if merges:
        model["merges"] = [(a, b) for a, b in merges if names.keys().isdisjoint((a, b, a + b))]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    backend = Tokenizer.from_str(json.dumps(data))
    return backend, names, re.compile(f"[\ud800-\udfff{_MARK}{re.escape(_dropped(backend))}]")


def _dropped(backend: Tokenizer) -> str:
    """Returns the control and format characters that the tokenizer drops.

    The vocabulary of SmolLM2, for example, lacks the bytes of six control characters. Without the
    replacement, a "</" and an "answer>" with such a character in between would become a tag.
    """

    def tokens(text: str) -> list[int]:
        return backend.encode(text, add_special_tokens=False).ids

    characters = (c for c in map(chr, range(0x10000)) if unicodedata.category(c) in ("Cc", "Cf"))
    return "".join(c for c in characters if tokens(f"<{c}>") == tokens("<>"))


def _added_in_front(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Returns the special tokens that the tokenizer adds before a text."""
    encoded = tokenizer("x", return_special_tokens_mask=True)
    pairs = zip(encoded["input_ids"], encoded["special_tokens_mask"], strict=True)
    return [token_id for token_id, _ in takewhile(lambda pair: pair[1], pairs)]


def _render(tokenizer: PreTrainedTokenizerBase, user_text: str, system: str | None) -> str:
    """Renders the chat template up to the point where the assistant continues."""
    turns = [] if system is None else [{"role": "system", "content": system}]
    turns.append({"role": "user", "content": user_text})
    return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    added = tokenizer.added_tokens_decoder
    return {*tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}


def _control_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Returns the special ids that are not text, which are all but the tags."""
    return _cached_control_ids(tokenizer, len(tokenizer))


@lru_cache(maxsize=16)
def _cached_control_ids(tokenizer: PreTrainedTokenizerBase, size: int) -> frozenset[int]:
    """Computes `_control_ids` once per tokenizer; Llama 3 has 256 special tokens.

    Args:
      size: number of tokens, which grows when one is added.
    """
    added = tokenizer.added_tokens_decoder
    tags = {token_id for token_id, token in added.items() if _TAG.fullmatch(token.content)}
    return frozenset(_special_ids(tokenizer) - tags)


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Decodes `ids` without special tokens other than tags; invalid UTF-8 becomes U+FFFD."""
    control = _control_ids(tokenizer)
    kept = [i for i in ids if i not in control]
    return tokenizer.decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, directory: str | Path
) -> PreTrainedTokenizerBase:
    """Trains a byte-level BPE tokenizer on `texts`, saves it and returns the loaded result.

    Pre-tokens are those of GPT-2, except that each digit is separate. Tags such as `<search>` are
    ordinary text of several tokens. `<|endoftext|>` ends a text and pads. Training is
    deterministic.

    Args:
      vocab_size: maximum number of tokens; texts with too few pairs to merge give fewer.

    Raises:
      UserError: `vocab_size` is too small for the 256 bytes and `<|endoftext|>`.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if vocab_size <= len(alphabet):
        raise UserError(
            f"a vocabulary of {vocab_size} is too small; use {len(alphabet) + 1} or more"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=alphabet,
        special_tokens=[END_OF_TEXT],
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    save_tokenizer(tokenizer, directory, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT)
    return load_tokenizer(directory)


def save_tokenizer(tokenizer: Tokenizer, directory: str | Path, **settings: str) -> None:
    """Writes the files of a tokenizer; `settings` name its special tokens and chat template."""
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **settings
    ).save_pretrained(str(directory))


def _piece_reader(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], bytes]:
    """Returns the function from a piece of this kind of vocabulary to its bytes."""
    decoder = str(tokenizer.backend_tokenizer.decoder)
    if "ByteLevel" in decoder:
        table = {character: byte for byte, character in bytes_to_unicode().items()}
        # The caller handles added tokens, so every piece consists of the 256 characters.
        return lambda piece: bytes(table[character] for character in piece)
    if "ByteFallback" in decoder or "Metaspace" in decoder:
        return _sentencepiece_bytes
    raise UserError(
        f"{tokenizer.name_or_path}: the tokenizer is neither byte-level BPE nor SentencePiece; "
        "use a Llama, SmolLM2 or Qwen tokenizer"
    )


def _sentencepiece_bytes(piece: str) -> bytes:
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return bytes([int(piece[3:5], 16)])
    return piece.replace("▁", " ").encode()
