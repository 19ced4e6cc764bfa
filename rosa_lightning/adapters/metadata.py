"""What an adapter was trained on: base, RoAE settings, rotation, prompt style, precision."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from torch import nn

from rosa_lightning.adapters.fingerprint import BaseFingerprint, fingerprint, is_close
from rosa_lightning.adapters.methods import Method, method_from_dict, method_to_dict
from rosa_lightning.roae.inject import RoAEReport, roae_report
from rosa_lightning.roae.layer import RoAEConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SAMPLE_TEXT = "Ada's 12,345 apples: \t 3.5 % of <b>'éß 東京\U0001f600'</b>\n\n"
"""Text whose tokens tell tokenizers apart that have the same vocabulary."""
_PRECISIONS = {"None": "32-true", "32": "32-true", "64": "64-true"}
_PRECISIONS |= {"16": "16-mixed", "bf16": "bf16-mixed"}
"""Shorter names of the trainer's precisions."""
_SETTINGS = {
    "prompt_style": "data.prompt_style",
    "max_length": "data.max_length",
    "tokenizer": "data.tokenizer",
    "precision": "trainer.precision",
    "dtype": "model.dtype",
    "quantization": "model.quantization",
}
"""Configuration keys of `Conditions`."""


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """What changes what a model reads and writes, beside the weights and RoAE; None if unknown."""

    prompt_style: str | None = None
    """``template`` in what is stored."""
    max_length: int | None = None
    tokenizer: str | None = None
    """Where a name was given; else the base's own is meant, or an object's."""
    tokenizer_digest: str | None = None
    precision: str | None = None
    dtype: str | None = None
    quantization: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        plain = asdict(self)
        return {"template": plain.pop("prompt_style"), **plain}

    @classmethod
    def from_dict(cls, plain: Any) -> Conditions:
        """From `to_dict` of any release: unknown entries are ignored; ValueError if damaged."""
        if not isinstance(plain, Mapping):
            raise ValueError(f"the conditions of the training are {plain!r}, not a mapping.")
        plain = {"prompt_style": plain.get("template"), **plain}
        known = {field.name: plain.get(field.name) for field in fields(cls)}
        for name, value in known.items():
            kind = int if name == "max_length" else str
            if not isinstance(value, kind | None):
                raise ValueError(f"{name} of the training is {value!r}, not a {kind.__name__}.")
        return cls(**known)

    def settings(self) -> dict[str, Any]:
        """The values that are known, by configuration key."""
        values = {key: getattr(self, name) for name, key in _SETTINGS.items()}
        unknown = {key for key, value in values.items() if value is None}
        if self.dtype is not None:  # then no quantization is known, too
            unknown.discard("model.quantization")
        return {key: value for key, value in values.items() if key not in unknown}

    def conflicts(self, here: Conditions) -> list[str]:
        """A line for each thing that a run does otherwise than the training of an adapter."""
        lines = contradictions(self.settings(), here.settings(), "the adapter")
        digests = (self.tokenizer_digest, here.tokenizer_digest)
        if None not in digests and digests[0] != digests[1]:
            was = self.tokenizer or "the base's own"
            lines.append(
                f"data.tokenizer is {here.tokenizer or 'the tokenizer of the base'}, and the "
                f"adapter was trained with another one ({was}, or that as it was then): it reads "
                "other tokens or another chat template. Set data.tokenizer to that one."
            )
        return lines


def contradictions(known: Mapping[str, Any], given: Mapping[str, Any], trained: str) -> list[str]:
    """A line for each setting, by configuration key, that is given otherwise than in the training.

    Keys that only one of them has are not compared. ``trained`` says what was trained.
    """
    lines = []
    for key in _SETTINGS.values():
        if key in known and key in given and key != "data.tokenizer":  # see `conflicts`
            both = str(given[key]), str(known[key])
            if key == "trainer.precision":
                both = _PRECISIONS.get(both[0], both[0]), _PRECISIONS.get(both[1], both[1])
            if both[0] != both[1]:
                now, then = ("null" if value == "None" else value for value in both)
                lines.append(
                    f"{key} is {now}, and {trained} was trained with {then}: results may suffer. "
                    f"Leave {key} out to take what it was trained with."
                )
    return lines


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """A digest of what a tokenizer does: vocabulary, special tokens, chat template, and a sample.

    Equal for the fast and the slow form of one tokenizer, where they encode alike.
    """
    template = json.dumps(getattr(tokenizer, "chat_template", None), sort_keys=True, default=str)
    return _digest(tokenizer, template, tokenizer.eos_token_id)


@lru_cache(maxsize=2)
def _digest(tokenizer: PreTrainedTokenizerBase, template: str, eos_token_id: Any) -> str:
    vocabulary = sorted(tokenizer.get_vocab().items())
    sample = tokenizer(_SAMPLE_TEXT, add_special_tokens=True)["input_ids"]
    content = json.dumps([vocabulary, template, eos_token_id, sample], default=str)
    return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()[:16]


@dataclass(frozen=True, kw_only=True)
class AdapterMetadata:
    """What an adapter or a checkpoint remembers beside its weights."""

    base: BaseFingerprint
    method: Method
    rotation: dict[str, list[float]] | None = None
    """How the base rotated where the adapter stands; not in adapters of earlier versions."""
    conditions: Conditions | None = None

    @property
    def roae(self) -> RoAEConfig:
        """The settings of RoAE; ValueError where something else was trained."""
        if not isinstance(self.method, RoAEConfig):
            raise ValueError("what was trained is not RoAE. Give an adapter that is.")
        return self.method

    @classmethod
    def of(cls, model: nn.Module, conditions: Conditions | None = None) -> AdapterMetadata:
        """Of the adapter that a model carries; ValueError if it carries none."""
        report = roae_report(model)
        rotation = _rotation(report)
        base = fingerprint(model)
        return cls(base=base, method=report.config, rotation=rotation, conditions=conditions)

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        plain = {"base": asdict(self.base), **method_to_dict(self.method)}
        plain["rotation"] = self.rotation
        if self.conditions is not None:
            plain["roae_conditions"] = self.conditions.to_dict()
        return plain

    @classmethod
    def from_dict(cls, plain: Any) -> AdapterMetadata:
        """From `to_dict`, which may have gone through JSON; ValueError if damaged."""
        try:
            base = BaseFingerprint(**plain["base"])
            rotation, conditions = plain.get("rotation"), plain.get("roae_conditions")
            return cls(
                base=replace(base, samples=_floats(base.samples)),
                method=method_from_dict(plain),
                rotation=None if rotation is None else _floats(rotation),
                conditions=None if conditions is None else Conditions.from_dict(conditions),
            )
        except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
            raise ValueError(
                f"its metadata is damaged, or was not written by export ({type(error).__name__}: "
                f"{error})"
            ) from error

    def check_rotation(self, report: RoAEReport) -> None:
        """Raise ValueError for a base of the same weights that rotates otherwise."""
        if self.rotation is None:
            return
        for name, ours in _rotation(report).items():
            if not is_close(ours, self.rotation.get(name, []), rtol=1e-3, atol=1e-9):
                raise ValueError(
                    f"the adapter was trained where {name} rotates other dimensions, or at other "
                    "frequencies, than in this base. Give the base that it was trained on, with "
                    "the same rope settings in its config.json."
                )


def _floats(lists: Mapping[Any, Any]) -> dict[str, list[float]]:
    return {str(name): [float(value) for value in values] for name, values in lists.items()}


def _rotation(report: RoAEReport) -> dict[str, list[float]]:
    """Head dimension, number, sum and frequencies' sum of the adapted dimensions, by projection."""
    found: dict[str, list[float]] = {}
    for p in report.projections:
        frequency = sum(p.table.inv_freq[pair] for pair in p.adapted_pairs)
        found[p.name] = [*map(float, (p.table.head_dim, len(p.dims), sum(p.dims), frequency))]
    return found
