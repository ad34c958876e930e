"""Converts text to token ids and back, and maps each id to its exact bytes.

A thin layer over `transformers` and `tokenizers`.
"""

import json
import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import lru_cache
from itertools import takewhile
from pathlib import Path
from threading import Thread

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from zerosearch_jax.errors import UserError, named_errors
from zerosearch_jax.files import read_json
from zerosearch_jax.text import thoughts

END_OF_TEXT = "<|endoftext|>"
TEMPLATE_SECS = 30.0  # limit of rendering a chat template, which usually takes milliseconds
_PLACEHOLDER = "\ue000"  # marks the position of the user's text in a chat template
_MARK = "\U0010fffd"  # begins and ends the names of control tokens; inserted text loses it

_SURPLUS = 64  # tokens that `encode_start` reads beyond twice the requested ones

# Added tokens that text may spell: words, whitespace and single characters, and the tags of the
# episode's grammar, which `text.prompts` neutralises in all text from outside.
_PLAIN = re.compile(r"[\w\s]+|.")
# Some policies have these tags as special tokens. They are text all the same: actions consist of
# them, so they keep their bytes and are decoded.
_TAG = re.compile(r"</?(think|search|information|answer)>")


def load_tokenizer(directory: str | Path, vocab_size: int | None = None) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a Hugging Face model directory from its `tokenizer.json`.

    No code of the directory is run: an `auto_map` and Python files have no effect.

    Args:
      vocab_size: number of the model's embedding rows; by default, the number of tokens.

    Raises:
      UserError: a file is missing or damaged, names a file outside the directory, or the tokenizer
        has an id of `vocab_size` or more.
    """
    path = Path(directory) / "tokenizer.json"
    fix = (
        "give a directory that holds the tokenizer.json and tokenizer_config.json of a Llama, "
        "SmolLM2 or Qwen model"
    )
    if not os.path.isfile(path):
        raise UserError(f"no tokenizer could be loaded from {directory}: no tokenizer.json; {fix}")
    settings = Path(directory) / "tokenizer_config.json"
    if os.path.lexists(settings) and "fast_tokenizer_files" in read_json(settings, dict, fix):
        # transformers would load one of these, also from outside the directory.
        raise UserError(f"{settings}: fast_tokenizer_files is not supported; remove the key")
    # AutoTokenizer would follow config.json's model_type and, for Qwen2, replace the file's
    # pre-tokenizer by its own.
    with named_errors(f"no tokenizer could be loaded from {directory}", fix):
        tokenizer = PreTrainedTokenizerFast.from_pretrained(str(directory))
        # Some settings take effect only in a call. A post-processor can add ids without a token.
        tokenizer("Chad, 12 \u00e9t\u00e9s.\n", return_special_tokens_mask=True)
        added = tokenizer("")["input_ids"]
        # An export writes the settings as UTF-8, which has no lone surrogates.
        kept = [tokenizer.init_kwargs, tokenizer.chat_template]
        json.dumps(kept, default=str, ensure_ascii=False).encode()
    check_ids(directory, tokenizer, added, vocab_size)
    return tokenizer


def check_ids(
    directory: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    added: Sequence[int],
    vocab_size: int | None,
) -> None:
    """Raises UserError if the tokenizer has an id without an embedding row.

    A tokenizer with fewer ids than rows is normal: many models pad their vocabulary. Tables with a
    row for each id are built only after this check, so one huge id cannot fill the memory.

    Args:
      added: ids that the post-processor adds to every text.
      vocab_size: as for `load_tokenizer`.
    """
    vocabulary = tokenizer.get_vocab()
    largest = max([*vocabulary.values(), *added], default=0)
    if vocab_size is None:
        size, limit = len(vocabulary), f"its vocabulary has {len(vocabulary)} tokens"
    else:
        size, limit = vocab_size, f"the model's embedding has {vocab_size} rows"
    if largest >= size:
        raise UserError(
            f"{directory}: the tokenizer has ids up to {largest} "
            f"({tokenizer.convert_ids_to_tokens(largest)!r}), but {limit}; use the "
            "model's own tokenizer, or resize the embedding"
        )


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> list[bytes]:
    """Returns the bytes of each vocabulary id, `[V]`.

    Special tokens other than tags such as `</search>`, and ids without a token, are `b""`, so they
    never complete a stop string. The joined bytes of encoded text equal the text in UTF-8, except
    for characters that `encode` replaces. A SentencePiece vocabulary adds a space before the text.

    Raises:
      UserError: the vocabulary is neither byte-level BPE nor SentencePiece, or one of its pieces
        spells no bytes.
    """
    vocabulary = tokenizer.get_vocab()
    added, special = tokenizer.added_tokens_decoder, _control_ids(tokenizer)
    piece_bytes = _piece_reader(tokenizer)
    result = [b""] * (max(vocabulary.values(), default=-1) + 1)
    for piece, token_id in vocabulary.items():
        if token_id in added and token_id not in special:
            result[token_id] = added[token_id].content.encode()
        elif token_id not in special:
            try:
                result[token_id] = piece_bytes(piece)
            except (KeyError, ValueError) as error:
                raise UserError(
                    f"{tokenizer.name_or_path}: tokenizer.json has the piece {piece!r}, which "
                    "spells no bytes; fetch the model again"
                ) from error
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

    The work is bounded by `count`: growing prefixes of `text` are encoded until one has more than
    twice as many tokens. The cut can change the tokens of a prefix's last word and of its last run
    of combining characters, which the surplus covers. Only a longer word or run may get other
    tokens than in the whole text. The tokens always spell a prefix of `text`.
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

    Raises:
      UserError: the chat template refuses these turns, or leaves out the user turn.
    """
    if tokenizer.chat_template is None:
        text = f"{system}\n\n{user_text}" if system else user_text
        return _added_in_front(tokenizer) + encode(tokenizer, text)
    backend, names, replaced = _unspellable(tokenizer)
    text = _render(tokenizer, user_text, system)
    head, tail = _around_user_text(tokenizer, system)
    user = replaced.sub("\ufffd", text[len(head) : len(text) - len(tail)])
    contents = sorted(names, key=len, reverse=True)
    control = re.compile("|".join(map(re.escape, contents)) or "(?!)")
    head, tail = (control.sub(lambda match: names[match[0]], part) for part in (head, tail))
    return backend.encode(head + user + tail, add_special_tokens=False).ids


def check_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises UserError if the chat template renders no user turn within `TEMPLATE_SECS` seconds.

    A template is code, and its sandbox does not limit its time.
    """
    templates = tokenizer.chat_template
    if templates is None:
        return
    named = templates if isinstance(templates, dict) else {"chat_template": templates}
    for name, template in named.items():
        if not isinstance(template, str):
            raise UserError(
                f"{tokenizer.name_or_path}: the chat template {name!r} is not a text; fix "
                "chat_template in tokenizer_config.json"
            )

    def render():
        with suppress(Exception):  # `_around_user_text` raises it again
            _render(tokenizer, _PLACEHOLDER, None)

    thread = Thread(target=render, daemon=True)  # an endless template must not delay the exit
    thread.start()
    thread.join(TEMPLATE_SECS)
    if thread.is_alive():
        raise UserError(
            f"{tokenizer.name_or_path}: the chat template takes more than {TEMPLATE_SECS:g} s for "
            "a user turn; fix chat_template, or use another model"
        )
    _around_user_text(tokenizer, None)


def opens_thought(tokenizer: PreTrainedTokenizerBase, system: str | None = None) -> bool:
    """Returns whether a prompt of `encode_prompt` ends inside a thought.

    The chat templates of DeepSeek-R1 and its distillations, for example, end with `<think>`.
    """
    if tokenizer.chat_template is None:
        return False
    _, tail = _around_user_text(tokenizer, system)
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
    names = " and a ".join(turn["role"] for turn in turns)
    with named_errors(
        f"{tokenizer.name_or_path}: the chat template cannot render a {names} turn",
        "fix chat_template, or use a model whose template can",
    ):
        return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)


def _around_user_text(tokenizer: PreTrainedTokenizerBase, system: str | None) -> tuple[str, str]:
    """Returns the text that the chat template renders before and after the user's text."""
    head, found, tail = _render(tokenizer, _PLACEHOLDER, system).partition(_PLACEHOLDER)
    if not found:
        raise UserError(
            f"{tokenizer.name_or_path}: the chat template leaves out the user turn; fix "
            "chat_template, or use another model"
        )
    with named_errors(
        f"{tokenizer.name_or_path}: the chat template renders text that is not UTF-8", "fix it"
    ):
        (head + tail).encode()
    return head, tail


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
