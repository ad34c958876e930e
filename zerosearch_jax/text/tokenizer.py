"""Text to token ids and back, and the exact bytes behind each id.

A thin layer over `transformers` and `tokenizers`. It knows nothing of prompts' wording, of tags
or of models.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from zerosearch_jax.errors import UserError

END_OF_TEXT = "<|endoftext|>"
_STAND_IN = "\ue000"  # for the user's text, to see where a chat template puts it


def load_tokenizer(directory_or_name: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a Hugging Face model directory, or of a hub name if the hub can be had.

    Raises:
      UserError: there is none, or its files cannot be read.
    """
    # tokenizer.json is what the model was trained with. AutoTokenizer would go by config.json's
    # model_type instead and, for Qwen2, put its own pre-tokenizer in the place of the file's.
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
    """The bytes that each vocabulary id stands for, `[V]`.

    Special tokens (and ids without a token) are `b""`, so they never complete a tag that is
    looked for in the text. The bytes of encoded text, joined, are the text in UTF-8; for a
    SentencePiece vocabulary, after the one space that it puts before the text.

    Raises:
      UserError: the vocabulary is neither byte-level BPE nor SentencePiece.
    """
    vocabulary = tokenizer.get_vocab()
    added, special = tokenizer.added_tokens_decoder, _special_ids(tokenizer)
    piece_bytes = _piece_reader(tokenizer)
    result = [b""] * (max(vocabulary.values()) + 1)
    for piece, token_id in vocabulary.items():
        if token_id not in special:
            ours = token_id in added
            result[token_id] = added[token_id].content.encode() if ours else piece_bytes(piece)
    return result


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of `text`, nothing added before or after it.

    A special token spelled out in `text` is ordinary text, so that a document cannot end a turn.
    """
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, user_text: str, system: str | None = None
) -> list[int]:
    """Ids of a prompt up to where the model is to go on.

    With a chat template: a system turn (if `system` is not None; it may be empty), the user turn
    and the opening of the assistant's. Without one: the plain text, with the special tokens that
    the tokenizer puts first. A special token spelled out in `user_text` is ordinary text, so that
    a question cannot end its turn; `system` is trusted.
    """
    if tokenizer.chat_template is None:
        text = f"{system}\n\n{user_text}" if system else user_text
        return tokenizer(text, split_special_tokens=True)["input_ids"]
    text = _render(tokenizer, user_text, system)
    head, _, tail = _render(tokenizer, _STAND_IN, system).partition(_STAND_IN)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    special = _special_ids(tokenizer)
    ids = []
    for token_id, (start, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
        by_user = len(head) <= start < len(text) - len(tail)
        if by_user and token_id in special:
            ids += encode(tokenizer, text[start:end])
        else:
            ids.append(token_id)
    return ids


def _render(tokenizer: PreTrainedTokenizerBase, user_text: str, system: str | None) -> str:
    """The chat template's text up to where the assistant is to go on."""
    turns = [] if system is None else [{"role": "system", "content": system}]
    turns.append({"role": "user", "content": user_text})
    return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    added = tokenizer.added_tokens_decoder
    return {*tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The text of `ids` without special tokens; broken UTF-8 becomes U+FFFD."""
    return tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, directory: str | Path
) -> PreTrainedTokenizerBase:
    """Trains a byte-level BPE tokenizer on `texts`, saves it and returns it as loaded again.

    Pre-tokens are GPT-2's, with every digit alone; tags such as `<search>` stay ordinary text of
    several tokens. `<|endoftext|>` ends a text and pads. The same texts give the same files.

    Args:
      vocab_size: at most this many tokens (fewer if the texts have no more pairs to merge).

    Raises:
      UserError: `vocab_size` has no room for the 256 bytes and `<|endoftext|>`.
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
    """Writes files that `load_tokenizer` reads; `settings` name special tokens and the template."""
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **settings
    ).save_pretrained(str(directory))


def _piece_reader(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], bytes]:
    """The function from a vocabulary piece to its bytes, by the kind of vocabulary."""
    decoder = str(tokenizer.backend_tokenizer.decoder)
    if "ByteLevel" in decoder:
        table = _byte_level_table()
        # Added tokens are dealt with by the caller, so every piece is made of the 256 signs.
        return lambda piece: bytes(table[sign] for sign in piece)
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


@lru_cache
def _byte_level_table() -> dict[str, int]:
    """Sign -> byte of byte-level BPE: printable Latin-1 bytes stand for themselves, the others
    are numbered from U+0100 (GPT-2, Radford et al. 2019)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(0x100 + i): byte for i, byte in enumerate(others)}
