"""Weights that are finite floating-point numbers, and the refusal of all others.

Pure torch. A tensor can be whole, or this rank's part of one (`DTensor`, `ShardedTensor`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from rosa_lightning.models.quantization import is_packed

_BLOCK = 2**20
"""Values of a weight that are looked at at once."""


def check_weights(tensors: Mapping[str, Any]) -> None:
    """Check that an adapter's weights are finite floating-point numbers, in float32 too.

    Of a tensor in shards, those on this rank are looked at.

    Raises:
        ValueError: Names the first that is anything else.
    """
    parts = [(key, part) for key, value in tensors.items() for part in local_parts(value)]
    for key, part in parts:
        if not isinstance(part, Tensor):
            raise ValueError(f"{key} is no tensor, but of type {type(part).__name__}.")
        if not part.is_floating_point():
            raise ValueError(f"{key} has dtype {part.dtype}, and weights are floating-point.")
    for (key, _), good in zip(parts, _are_finite([part for _, part in parts]), strict=True):
        if not good:
            raise ValueError(
                f"{key} holds values that are not finite in float32 (NaN or infinity), from which "
                "no training recovers. Give an adapter from before they appeared."
            )


def check_base(model: nn.Module, base: str) -> None:
    """Check that the weights of a base are finite; those that are packed in few bits are not read.

    Args:
        model: As it was loaded.
        base: What to call it.

    Raises:
        ValueError: Names the first weight that holds NaN or infinity.
    """
    for name, weight in model.named_parameters():
        if weight.is_meta or is_packed(weight):
            continue
        if not _is_finite(weight.detach()):
            raise ValueError(
                f"base {base!r} holds NaN or infinity in {name} ({weight.dtype}). Set model.base "
                "to an undamaged copy, or, if the numbers are too large for this data type, "
                "model.dtype to bfloat16 or float32."
            )


def _is_finite(weight: Tensor) -> bool:
    """Whether all values are, block by block of rows: a sum of 16-bit values makes a copy."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    rows = weight if weight.ndim else weight[None]
    for part in torch.split(rows, max(1, _BLOCK // max(1, rows[:1].numel()))):
        # A sum is finite only if all of its terms are, and large terms may add up to infinity.
        if not part.sum(dtype=dtype).isfinite() and not part.isfinite().all():
            return False
    return True


def check_states(states: Sequence[Any]) -> None:
    """Check that the saved states of optimizers hold no NaN.

    Raises:
        ValueError: Names the entry that does.
    """
    leaves = _leaves("optimizer_states", list(states))
    for name, part in ((name, part) for name, value in leaves for part in local_parts(value)):
        if isinstance(part, Tensor) and part.is_floating_point() and bool(part.isnan().any()):
            raise ValueError(
                f"{name} of the checkpoint holds NaN, from which no training recovers. Give a "
                "checkpoint from before it appeared."
            )


def _leaves(name: str, value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, Mapping):
        entries = [(f"{name}.{key}", entry) for key, entry in value.items()]
    elif isinstance(value, list | tuple):
        entries = [(f"{name}.{index}", entry) for index, entry in enumerate(value)]
    else:
        return [(name, value)]
    return [leaf for path, entry in entries for leaf in _leaves(path, entry)]


def local_parts(value: Any) -> list[Any]:
    """What of a tensor is on this rank; the value itself if it is no tensor in shards."""
    if isinstance(value, DTensor):
        return [value.to_local()]
    if hasattr(value, "local_shards"):  # a ShardedTensor, as FSDP1 saves them
        return [shard.tensor for shard in value.local_shards()]
    if hasattr(value, "_load_tensor"):  # as Lightning reads whole ones for FSDP1: at first use
        return [value._load_tensor()]
    return [value]


def _are_finite(tensors: Sequence[Tensor]) -> list[bool]:
    """Whether each holds finite numbers alone, with one wait for the device."""
    if not tensors:
        return []
    flags = [tensor.detach().float().isfinite().all() for tensor in tensors]
    found: list[bool] = torch.stack([flag.to(flags[0].device) for flag in flags]).tolist()
    return found
