"""What a base is recognised by, and what trained weights are."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from rosa_lightning.models.loading import hub_commit
from rosa_lightning.models.location import base_name, whole_name
from rosa_lightning.models.quantization import is_packed, is_quantized
from rosa_lightning.roae.inject import base_modules

_SAMPLE_SIZE = 4
"""Values kept of every weight to recognise a base by."""


@dataclass(frozen=True, kw_only=True)
class BaseFingerprint:
    """What tells whether a base is the one that an adapter was trained on."""

    base: str
    """Hub id, folder, or ``tiny``."""
    revision: str | None
    """Commit of the hub repository, where there is one."""
    samples: dict[str, list[float]]
    """Middle values of every weight, by name. None of a quantised weight, which is known by its
    name alone: the same base goes quantised or not."""

    def check(self, trained: Self, what: str = "adapter") -> None:
        """Raise ValueError for other weights; their name, folder or quantization may differ."""
        ours, theirs = self.samples, trained.samples
        differing = [name for name in theirs if not _same_values(theirs[name], ours.get(name))]
        differing += [name for name in ours if name not in theirs]
        if differing:
            revision = f" at revision {trained.revision}" if trained.revision else ""
            raise ValueError(
                f"the {what} was trained on base {trained.base!r}{revision}, and the base given, "
                f"{self.base!r}, is another one: {differing[0]} differs. Set model.base to the one "
                f"that the {what} was trained on."
            )


def fingerprint(model: nn.Module, base: str | None = None) -> BaseFingerprint:
    """The fingerprint of a loaded base, with RoAE or without; named as it was loaded by default."""
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
                known = not (is_packed(parameter) or parameter.is_meta)
                samples[f"{path}.{name}"] = _middle(parameter.detach()) if known else []
    named = base_name(model) if base is None else whole_name(base)
    return BaseFingerprint(base=named, revision=hub_commit(model), samples=samples)


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """A hash that trained weights alone have: of names, data types, shapes and values.

    A of RoAE is drawn at random and counts for nothing as long as B is zero, so only B counts.
    """
    found = hashlib.sha256()  # the fastest where processors have it
    for name in sorted(one for one in weights if not one.endswith("roae_A")):
        values = weights[name].detach().cpu().contiguous()
        found.update(f"{name} {values.dtype} {[*values.shape]}\n".encode())
        found.update(values.flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def _middle(weight: Tensor) -> list[float]:
    """A few values from the middle: the first ones are often padding or all alike."""
    flat = weight.flatten()
    start = max(0, flat.numel() // 2 - _SAMPLE_SIZE // 2)
    values: list[float] = flat[start : start + _SAMPLE_SIZE].float().tolist()
    return values


def _same_values(theirs: list[float], ours: list[float] | None) -> bool:
    """Equal up to the rounding of a load in another dtype (bfloat16 keeps 8 bits)."""
    if ours is None or not ours or not theirs:  # the latter: quantised on either side
        return ours is not None
    return is_close(ours, theirs, rtol=2**-8, atol=1e-6)


def is_close(ours: list[float], theirs: list[float], rtol: float, atol: float) -> bool:
    """Whether two lists hold the same values, about."""
    pair = torch.tensor(ours), torch.tensor(theirs)
    return len(ours) == len(theirs) and torch.allclose(*pair, rtol=rtol, atol=atol)
