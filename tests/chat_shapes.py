"""Chat templates in the shapes that model families publish, without tools and other modalities."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

_FILE = Path(__file__).with_name("chat_templates.json")


@dataclass(frozen=True)
class Shape:
    """A chat template and the special tokens that it is made of."""

    template: str
    tokens: tuple[str, ...] = ()
    bos: str = "<s>"
    eos: str = "</s>"
    stop: str = ""
    """What ends a turn; EOS by default."""
    header: str = ""
    """What stands before a reply, behind the question."""


SHAPES = {
    name: Shape(**{**fields, "tokens": tuple(fields.get("tokens", ()))})
    for name, fields in json.loads(_FILE.read_text("utf-8")).items()
}

_TEXTS = ["It is", " It is", " an", " 4", ": I", "\nIt", "\n\n", " [/INST]", "  ", "Reply"]


def _byte_level(merges: list[str]) -> Tokenizer:
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=256 + 3 * len(merges), initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator(merges * 2, trainer)
    return inner


def _words() -> Tokenizer:
    """As SentencePiece has it: a space belongs to the word behind it, and one begins a text."""
    inner = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))],
        initial_alphabet=[*map(chr, range(33, 127)), "▁", "\n"],
        show_progress=False,
    )
    inner.train_from_iterator([text for text in _TEXTS if ":" not in text] * 2, trainer)
    return inner


KINDS = {
    "bytes": lambda: _byte_level([]),
    "merging bytes": lambda: _byte_level(_TEXTS),
    "words": _words,
}


def shaped_tokenizer(
    name: str, kind: str = "merging bytes", texts: list[str] | None = None
) -> PreTrainedTokenizerFast:
    """A small tokenizer with the template and the special tokens of a shape.

    Of bytes, it has tokens for the given texts.
    """
    shape = SHAPES[name]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_byte_level(texts) if texts else KINDS[kind](),
        bos_token=shape.bos,
        eos_token=shape.eos,
        extra_special_tokens=list(shape.tokens),
    )
    if name in ("qwen 3", "deepseek r1"):  # of which they say that these are not special
        tokenizer.add_tokens([AddedToken("<think>"), AddedToken("</think>")])
    tokenizer.chat_template = shape.template
    return tokenizer
