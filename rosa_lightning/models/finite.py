"""Refuse weights and optimizer states that are not finite floating-point numbers."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from rosa_lightning.models.quantization import is_packed


def check_weights(tensors: Mapping[str, Any]) -> None:
    """Raise ValueError for the first weight (of shards, on this rank) not finite in float32."""
    flags = []
    parts = [(key, part) for key, value in tensors.items() for part in local_parts(value)]
    for key, part in parts:
        if not isinstance(part, Tensor):
            raise ValueError(f"{key} is no tensor, but of type {type(part).__name__}.")
        if not part.is_floating_point():
            raise ValueError(f"{key} has dtype {part.dtype}, and weights are floating-point.")
        flags.append(part.detach().float().isfinite().all())
    # One wait for the device.
    finite = torch.stack([flag.to(flags[0].device) for flag in flags]).tolist() if flags else []
    if not all(finite):
        raise ValueError(
            f"{parts[finite.index(False)][0]} holds values that are not finite in float32 (NaN or "
            "infinity), from which no training recovers. Give an adapter from before they appeared."
        )


def check_base(model: nn.Module, base: str) -> None:
    """Raise ValueError for the first plain weight that holds NaN or infinity."""
    for name, weight in model.named_parameters():
        if not (weight.is_meta or is_packed(weight) or _is_finite(weight.detach())):
            raise ValueError(
                f"base {base!r} holds NaN or infinity in {name} ({weight.dtype}). Set model.base "
                "to an undamaged copy, or, if the numbers are too large for this data type, "
                "model.dtype to bfloat16 or float32."
            )


def _is_finite(weight: Tensor) -> bool:
    # NaN spreads to both, and no copy is made.
    return not weight.numel() or all(bool(one.isfinite()) for one in torch.aminmax(weight))


def check_states(states: Sequence[Any]) -> None:
    """Raise ValueError for an entry of saved optimizer states that holds NaN."""
    for name, value in _leaves("optimizer_states", list(states)):
        for part in local_parts(value):
            if isinstance(part, Tensor) and part.is_floating_point() and bool(part.isnan().any()):
                raise ValueError(
                    f"{name} of the checkpoint holds NaN, from which no training recovers. Give a "
                    "checkpoint from before it appeared."
                )


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping | list | tuple):
        for key, entry in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from _leaves(f"{name}.{key}", entry)
    else:
        yield name, value


def local_parts(value: Any) -> list[Any]:
    """This rank's part of a tensor in shards; any other value itself."""
    if isinstance(value, DTensor):
        return [value.to_local()]
    if hasattr(value, "local_shards"):  # a ShardedTensor, as FSDP1 saves them
        return [shard.tensor for shard in value.local_shards()]
    if hasattr(type(value), "__torch_function__") and not isinstance(value, Tensor):
        return [torch.detach(value)]  # Lightning loads the whole ones of FSDP1 at first use
    return [value]
