"""An attention module run alone, with chosen numbers in place of its projections' outputs.

Its states are caught at the moment they meet, so code after that never runs.

Axes: N runs at once, T = 2 tokens, H heads, D head dimension, R rows of all projections together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from rosa_lightning.roae.capture import AttentionCall, hidden_states
from rosa_lightning.roae.meeting import ByHand, at_interface


@dataclass(frozen=True)
class States:
    """The states of one attention call, (N, H, T, D) each."""

    query: Tensor
    key: Tensor
    value: Tensor
    norm_inputs: dict[str, list[Tensor]]
    """What each norm inside the attention module was given, call by call, by its dotted path."""


class _Met(Exception):  # noqa: N818
    """Carries the states out of an attention module, past code that needs no running."""

    def __init__(self, *states: Tensor) -> None:
        self.states = states


@torch.no_grad()
def states_of(call: AttentionCall, rows_NTR: Tensor) -> States:
    """The states when the projections' outputs are the given rows, and norms change nothing.

    Raises:
        ValueError: The queries and keys never meet.
    """
    try:
        return _replay(call, rows_NTR)
    except Exception:
        # Code that does not broadcast over the batch: one run at a time.
        runs = [_replay(call, row_TR[None]) for row_TR in rows_NTR]
    return States(
        torch.cat([run.query for run in runs]),
        torch.cat([run.key for run in runs]),
        torch.cat([run.value for run in runs]),
        {
            path: [
                torch.cat(parts) for parts in zip(*(r.norm_inputs[path] for r in runs), strict=True)
            ]
            for path in runs[0].norm_inputs
        },
    )


def _replay(call: AttentionCall, rows_NTR: Tensor) -> States:
    num_runs, device = rows_NTR.shape[0], hidden_states(call.args, call.kwargs).device
    args, kwargs = _with_batch(call, num_runs)
    parts = {f"{call.path}.{name}": part for name, part in call.module.named_modules() if name}
    norm_inputs: dict[str, list[Tensor]] = {}
    widths = [output.shape[-1] for output in call.projections.values()]
    outputs = torch.split(rows_NTR.to(device), widths, -1)
    with ExitStack() as stack:
        for (path, like), output in zip(call.projections.items(), outputs, strict=True):
            shape = (num_runs, *like.shape[1:]) if like.ndim > 2 else (-1, like.shape[-1])
            output = output.reshape(shape)
            stack.enter_context(patch.object(parts[path], "forward", _constant(output)))
        for path, part in parts.items():
            if path not in call.projections and "norm" in type(part).__name__.lower():
                # A norm on Q or K scales unit vectors; it does not turn them.
                forward = _identity(norm_inputs.setdefault(path, []))
                stack.enter_context(patch.object(part, "forward", forward))
        stack.enter_context(_stopping(call))
        try:
            call.module(*args, **kwargs)
        except _Met as met:
            # Products over (N * H, T, D) come apart again.
            query, key, value = (
                s.reshape(num_runs, -1, *s.shape[-2:]) if s.ndim == 3 else s for s in met.states
            )
            return States(query, key, value, norm_inputs)
    raise ValueError("its queries and keys never met when it was run alone.")


def _constant(output: Tensor) -> Callable[..., Tensor]:
    return lambda *_, **__: output


def _identity(seen: list[Tensor]) -> Callable[..., Tensor]:
    def forward(x: Tensor, *_: Any, **__: Any) -> Tensor:
        seen.append(x)
        return x

    return forward


@contextmanager
def _stopping(call: AttentionCall) -> Iterator[None]:
    """Raise `_Met` once queries, keys and values are known."""
    scores: list[tuple[Tensor, Tensor]] = []

    def meet(module: nn.Module, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        raise _Met(query, key, value)

    def meet_values(value: Tensor) -> None:
        if scores:
            raise _Met(*scores[0], value)

    by_hand = ByHand(lambda query, key: scores.append((query, key)), meet_values)
    with at_interface(call.module, meet), nullcontext() if call.by_interface else by_hand:
        yield


def _with_batch(call: AttentionCall, size: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same call in float32 with its hidden states repeated."""
    hidden = hidden_states(call.args, call.kwargs)
    repeated = hidden[:1].float().expand(size, *hidden.shape[1:])

    def swap(value: Any) -> Any:
        return repeated if value is hidden else value

    return tuple(map(swap, call.args)), {name: swap(v) for name, v in call.kwargs.items()}
