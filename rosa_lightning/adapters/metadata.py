"""What an adapter was trained on: the base, its settings, and how the base rotated at each term."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from rosa_lightning.models.loading import base_name, whole_name
from rosa_lightning.models.quantization import is_packed, is_quantized
from rosa_lightning.roae.inject import base_modules, roae_report
from rosa_lightning.roae.layer import RoAEConfig, Target
from rosa_lightning.roae.rope import PairTable
from rosa_lightning.roae.targets import AdaptedProjection

_TERM = ("name", "target", "projection", "norm", "low_pairs")
"""The fields of `AdaptedProjection` that are kept in a file, beside the number of its table."""

_SAMPLE_SIZE = 4
"""Values kept of every weight to recognise a base by."""


@dataclass(frozen=True, kw_only=True)
class BaseIdentity:
    """What a checkpoint remembers of the base it was trained on."""

    base: str
    """Hub id, folder, or ``tiny``, as given."""
    revision: str | None
    """Commit of the hub repository, where there is one."""
    samples: dict[str, list[float]]
    """Middle values of every weight, by name: they tell bases apart that share name and shape. None
    of a quantised weight, which is known by its name alone: the same base goes quantised or not."""

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for a checkpoint."""
        return asdict(self)

    def check(self, trained_on: dict[str, Any], what: str = "checkpoint") -> None:
        """Compare with the base that a checkpoint or an adapter remembers.

        Raises:
            ValueError: The weights differ. Another name or folder for the same weights is fine,
                and so is another quantization of them.
        """
        theirs = trained_on["samples"]
        differing = [
            name for name in theirs if not _same_values(theirs[name], self.samples.get(name))
        ]
        if differing or theirs.keys() != self.samples.keys():
            name = differing[0] if differing else next(iter(self.samples.keys() - theirs.keys()))
            revision = f" at revision {trained_on['revision']}" if trained_on["revision"] else ""
            raise ValueError(
                f"the {what} was trained on base {trained_on['base']!r}{revision}, and the base "
                f"given, {self.base!r}, is another one: {name} differs. Set model.base to the base "
                f"that the {what} was trained on."
            )


def identify(model: nn.Module, base: str) -> BaseIdentity:
    """The identity of a loaded base, with RoAE or without.

    Args:
        model: The base.
        base: What to call it: hub id, folder, or ``tiny``.
    """
    samples: dict[str, list[float]] = {}
    seen: set[Tensor] = set()
    for path, module in base_modules(model):
        quantized = is_quantized(module)
        if quantized:
            samples[f"{path}.weight"] = []
        for name, parameter in module.named_parameters(recurse=False):
            # Scales and the like beside a packed weight are no weights of the base.
            if parameter not in seen and (not quantized or name == "bias"):
                seen.add(parameter)
                values = (
                    [] if is_packed(parameter) or parameter.is_meta else _middle(parameter.detach())
                )
                samples[f"{path}.{name}"] = values
    revision = getattr(getattr(model, "config", None), "_commit_hash", None)
    return BaseIdentity(base=whole_name(base), revision=revision, samples=samples)


def _middle(weight: Tensor) -> list[float]:
    """A few values from the middle: the first ones are often padding or all alike."""
    flat = weight.flatten()
    start = max(0, flat.numel() // 2 - _SAMPLE_SIZE // 2)
    values: list[float] = flat[start : start + _SAMPLE_SIZE].float().tolist()
    return values


def _same_values(theirs: list[float], ours: list[float] | None) -> bool:
    """Equal up to the rounding of a load in another dtype (bfloat16 keeps 8 bits)."""
    if ours is None:
        return False
    if not ours or not theirs:  # quantised on either side
        return True
    if len(ours) != len(theirs):
        return False
    return torch.allclose(torch.tensor(theirs), torch.tensor(ours), rtol=2**-8, atol=1e-6)


@dataclass(frozen=True)
class Origin:
    """What an adapter was trained on."""

    base: dict[str, Any]
    """The base's identity, as plain values."""
    config: RoAEConfig
    terms: tuple[AdaptedProjection, ...]
    """In the order of the model's layers."""

    def to_dict(self) -> dict[str, Any]:
        """As plain values: ``base``, ``roae``, ``tables`` (each once) and ``terms``."""
        tables = list(dict.fromkeys(term.table for term in self.terms))
        return {
            "base": self.base,
            "roae": asdict(self.config),
            "tables": [asdict(table) for table in tables],
            "terms": [
                {**{key: getattr(term, key) for key in _TERM}, "table": tables.index(term.table)}
                for term in self.terms
            ],
        }

    @classmethod
    def from_dict(cls, plain: Any) -> Origin:
        """From the values of `to_dict`, which may have gone through JSON and other hands.

        Raises:
            ValueError: Something is missing, of another type, or makes no sense.
        """
        try:
            base = asdict(BaseIdentity(**plain["base"]))
            base["samples"] = {
                str(name): [float(value) for value in values]
                for name, values in base["samples"].items()
            }
            tables = [_table(table) for table in plain["tables"]]
            terms = tuple(_term(term, tables) for term in plain["terms"])
            return cls(base, RoAEConfig(**plain["roae"]), terms)
        except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
            raise ValueError(
                f"what it was trained on is not told as export tells it; {type(error).__name__}: "
                f"{error}"
            ) from error

    def check_base(self, model: nn.Module) -> None:
        """Compare a base, with RoAE or without, with the one that the adapter was trained on.

        Raises:
            ValueError: The weights differ; names the first that does.
        """
        identify(model, base_name(model)).check(self.base, what="adapter")

    def check_rotation(self, model: nn.Module) -> None:
        """Refuse a base with the same weights and another rotation, scaled for longer text say.

        Args:
            model: The base with RoAE. Under settings other than the adapter's own, only the terms
                that both have are compared.

        Raises:
            ValueError: Names the first term that stands elsewhere.
        """
        report = roae_report(model)
        own_settings = replace(report.config, dropout=self.config.dropout) == self.config
        here = {(term.projection, term.target): term for term in report.projections}
        trained = {(term.projection, term.target): term for term in self.terms}
        if own_settings and (here.keys() != trained.keys() or len(here) != len(self.terms)):
            raise ValueError(
                f"the adapter lists {len(self.terms)} terms, and its settings make {len(here)} of "
                f"this {type(model).__name__}, or on other projections. Export the adapter again."
            )
        for key in (key for key in here if key in trained):
            own, other = here[key], trained[key]
            same = not own_settings or (own.norm, own.low_pairs) == (other.norm, other.low_pairs)
            if not (same and own.table.is_close(other.table, rtol=1e-3, atol=1e-9)):
                raise ValueError(
                    f"the adapter was trained where {other.projection} rotates other dimensions, "
                    f"or at other frequencies, than in this {type(model).__name__}. Give the base "
                    "that it was trained on, with the same rope settings in its config.json."
                )


def origin_of(model: nn.Module) -> Origin:
    """The origin of the adapter that a model carries.

    Raises:
        ValueError: It carries no RoAE.
    """
    report = roae_report(model)
    return Origin(identify(model, base_name(model)).to_dict(), report.config, report.projections)


def _table(plain: Mapping[str, Any]) -> PairTable:
    pairs = tuple((operator.index(a), operator.index(b)) for a, b in plain["pairs"])
    return PairTable(operator.index(plain["head_dim"]), pairs, tuple(map(float, plain["inv_freq"])))


def _term(plain: Mapping[str, Any], tables: list[PairTable]) -> AdaptedProjection:
    number = operator.index(plain["table"])
    if number not in range(len(tables)):
        raise ValueError(f"there is no table {number}")
    return AdaptedProjection(
        name=str(plain["name"]),
        target=cast(Target, str(plain["target"])),
        projection=str(plain["projection"]),
        norm=str(plain["norm"]),
        table=tables[number],
        low_pairs=tuple(map(operator.index, plain["low_pairs"])),
    )
