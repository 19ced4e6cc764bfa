"""What a model was trained to read: prompt style, length, tokenizer, and the base's precision."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PROBE = "Ada's 12,345 apples: \t 3.5 % of <b>'éß 東京\U0001f600'</b>\n\n"
"""Text whose tokens tell tokenizers apart that have the same vocabulary."""
_PRECISIONS = {
    None: "32-true",
    "32": "32-true",
    "64": "64-true",
    "16": "16-mixed",
    "bf16": "bf16-mixed",
}
"""Shorter names of the trainer's precisions."""
COMPARED = (
    *("data.template", "data.max_length", "trainer.precision"),
    *("model.dtype", "model.quantization"),
)
"""Settings whose values tell by themselves whether they agree; tokenizers go by digest."""


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """All beside the weights and RoAE that changes what a model reads and writes.

    None for what is not known.
    """

    template: str | None = None
    """Prompt style: data.template."""
    max_length: int | None = None
    """data.max_length, in tokens."""
    tokenizer: str | None = None
    """data.tokenizer, where a name was given; else the base's own is meant, or an object's."""
    tokenizer_digest: str | None = None
    """As `tokenizer_digest` gives it."""
    precision: str | None = None
    """trainer.precision."""
    dtype: str | None = None
    """model.dtype."""
    quantization: str | None = None
    """model.quantization; None for none, as well."""

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, plain: Any) -> Conditions:
        """From `to_dict`, by this release or another: what is not known here is passed over.

        Raises:
            ValueError: It is no mapping, or a value has another type.
        """
        if not isinstance(plain, Mapping):
            raise ValueError(f"the conditions of the training are {plain!r}, and no mapping.")
        known = {field.name: plain.get(field.name) for field in fields(cls)}
        for name, value in known.items():
            kind = int if name == "max_length" else str
            if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
                raise ValueError(f"{name} of the training is {value!r}, and no {kind.__name__}.")
        return cls(**known)

    def settings(self) -> dict[str, Any]:
        """The values that are known, by configuration key."""
        named = {
            "data.template": self.template,
            "data.max_length": self.max_length,
            "data.tokenizer": self.tokenizer,
            "trainer.precision": self.precision,
            "model.dtype": self.dtype,
            "model.quantization": self.quantization,
        }
        return {key: value for key, value in named.items() if value is not None}

    def contradictions(self, given: Mapping[str, Any], trained: str) -> list[str]:
        """As `contradictions`, where no quantization is known as well as any other."""
        known = self.settings()
        if self.dtype is not None:
            known["model.quantization"] = self.quantization
        return contradictions(known, given, trained)


def contradictions(known: Mapping[str, Any], given: Mapping[str, Any], trained: str) -> list[str]:
    """A line for each setting that is given otherwise than in the training.

    Args:
        known: The training's values by configuration key; of others than `COMPARED` nothing is
            said.
        given: This run's; keys that are left out are not compared.
        trained: What was trained, such as "the checkpoint".
    """
    lines = []
    for key in COMPARED:
        if key not in known or key not in given:
            continue
        now, then = given[key], known[key]
        if key == "trainer.precision":
            now, then = plain_precision(now), plain_precision(then)
        if now != then:
            lines.append(
                f"{key} is {_shown(now)}, and {trained} was trained with {_shown(then)}: results "
                f"may suffer. Leave {key} out to take what it was trained with."
            )
    return lines


def plain_precision(precision: Any) -> str:
    """A precision of the trainer by its full name."""
    name = None if precision is None else str(precision)
    return _PRECISIONS.get(name) or str(name)


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """A digest of what a tokenizer does: vocabulary, special tokens, chat template, and a sample.

    Equal for the fast and the slow form of one tokenizer, where they encode alike.
    """
    template = json.dumps(getattr(tokenizer, "chat_template", None), sort_keys=True, default=str)
    return _digest(tokenizer, template, tokenizer.eos_token_id)


@lru_cache(maxsize=2)
def _digest(tokenizer: PreTrainedTokenizerBase, template: str, eos_token_id: Any) -> str:
    vocabulary = sorted(tokenizer.get_vocab().items())
    sample = tokenizer(_PROBE, add_special_tokens=True)["input_ids"]
    content = json.dumps([vocabulary, template, eos_token_id, sample], default=str)
    return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _shown(value: Any) -> str:
    return "null" if value is None else str(value)
