"""Attention of a pack row by row, with what rows begin with in common computed once.

`transformers` masks the scores of all pairs of tokens of a pack, most of which stand in different
rows. Here the model's own kernel is called for each row, or on CUDA `varlen_attn` of torch for all.
Rows come in an order in which those with a common beginning follow one another; such a row is run
from where it differs from the one before, and its queries see the keys of what is left out.

Axes: N tokens of all rows, n of those that are run, R of a row, H heads, D features of a head.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rosa_lightning.training.compile import is_compiled
from rosa_lightning.training.packing import probe_ids
from rosa_lightning.training.probes import RefusedError, difference
from rosa_lightning.utils.modules import in_mode, is_checkpointed, replaced

if TYPE_CHECKING:
    from transformers import PreTrainedModel

varlen_attn: Any = None
with suppress(ImportError):  # before torch 2.10
    from torch.nn.attention import varlen

    varlen_attn = varlen.varlen_attn

_BY_ROW = ("eager", "sdpa")
"""Kernels that do not keep packed rows apart by themselves."""
_HALF = (torch.float16, torch.bfloat16)


class Pack:
    """How the rows of a pack are run.

    Args:
        lengths: Tokens of each row.
        shared: Tokens that a row has in common with the one before it and that are not run again,
            fewer than the row has; 0 for the first.
        device: Where the model is.
    """

    def __init__(
        self, lengths: Sequence[int], shared: Sequence[int], device: torch.device | str = "cpu"
    ) -> None:
        self._lengths = list(lengths)
        self._own = [length - n for length, n in zip(lengths, shared, strict=True)]
        self._is_shared = any(shared)
        ends = [*accumulate(self._own)]
        rows, kept = [torch.arange(0)], []
        for row, (n, end) in enumerate(zip(shared, ends, strict=True)):
            rows.append(torch.cat([rows[-1][:n], torch.arange(end - self._own[row], end)]))
            kept.append(torch.arange(n, self._lengths[row]) + sum(self._lengths[:row]))
        self.place_N = torch.cat(rows).to(device)
        """Where each token stands among those that are run."""
        self.run_n = torch.cat(kept).to(device)
        """The tokens that are run."""
        self._bounds = tuple(
            torch.tensor([0, *accumulate(sizes)], dtype=torch.int32, device=device)
            for sizes in (self._own, self._lengths)
        )
        self._masks: dict[tuple[int, int, torch.dtype], Tensor] = {}

    def inputs(self, batch: dict[str, Any]) -> dict[str, Any]:
        """What a model's forward takes within `attending`."""
        named = {name: batch[name][:, self.run_n] for name in ("input_ids", "position_ids")}
        # Models take a mask of four axes as it is, and make none of all pairs of tokens.
        mask = torch.empty(1, 1, 0, 0, dtype=torch.bool, device=self.run_n.device)
        return {**named, "attention_mask": mask, "use_cache": False}

    @contextmanager
    def attending(self) -> Iterator[None]:
        """Within it, models of `transformers` attend within rows alone."""
        from transformers import AttentionInterface

        find = AttentionInterface.get_interface

        def get_interface(interface: Any, kernel: str, default: Any) -> Callable[..., Any]:
            if kernel not in _BY_ROW:
                raise RefusedError(f"{kernel} keeps rows apart by itself")
            attend = find(interface, kernel, default)

            def by_row(
                module: Any, query: Tensor, key: Tensor, value: Tensor, _mask: Any, **more: Any
            ) -> tuple[Tensor, None]:
                if more.get("position_bias") is not None or key.shape[2] != len(self.run_n):
                    raise ValueError(f"{type(module).__name__} adds to scores, or sees other keys")
                dtype = varlen_dtype(query, value, more.get("dropout", 0.0))
                if kernel == "sdpa" and dtype is not None:
                    states = (one.to(dtype) for one in (query, key, value))
                    return self._at_once(*states, scale=more.get("scaling")), None
                return self._by_row(attend, module, query, key, value, **more), None

            return by_row

        with replaced(AttentionInterface, "get_interface", get_interface):
            yield

    def _at_once(self, query: Tensor, key: Tensor, value: Tensor, **more: Any) -> Tensor:
        states = query, *self._of_rows(key, value)
        longest = max(self._own), max(self._lengths)
        # Causal from the last query of a row and its last key back.
        options: dict[str, Any] = {"window_size": (-1, 0), "enable_gqa": True, **more}
        flat = (one[0].transpose(0, 1) for one in states)
        output: Tensor = varlen_attn(*flat, *self._bounds, *longest, **options)
        return output[None]

    def _by_row(
        self, attend: Any, module: Any, query: Tensor, key: Tensor, value: Tensor, **more: Any
    ) -> Tensor:
        queries = query.split_with_sizes(self._own, 2)
        keys, values = (one.split_with_sizes(self._lengths, 2) for one in self._of_rows(key, value))
        outputs = [
            attend(module, *row, self._mask(row[0].shape[2], row[1]), **more)[0]
            for row in zip(queries, keys, values, strict=True)
        ]
        return torch.cat(outputs, 1)

    def _of_rows(self, *states: Tensor) -> list[Tensor]:
        """Keys or values of whole rows, (1, H, N, D), from those of the tokens that are run."""
        return [one.index_select(2, self.place_N) if self._is_shared else one for one in states]

    def _mask(self, num_queries: int, key: Tensor) -> Tensor:
        """What a row's last queries do not see, to be added to their scores."""
        shape = num_queries, key.shape[2]
        found = self._masks.get((*shape, key.dtype))
        if found is None:
            later = key.new_full(shape, torch.finfo(key.dtype).min)
            found = later.triu(1 + shape[1] - shape[0])[None, None]
            self._masks[*shape, key.dtype] = found
        return found


def varlen_dtype(query: Tensor, value: Tensor, dropout: float) -> torch.dtype | None:
    """The type in which torch has a kernel for rows of different lengths; None without one."""
    if varlen_attn is None or not query.is_cuda or dropout:
        return None
    if torch.cuda.get_device_capability(query.device) < (8, 0):  # FlashAttention's own condition
        return None
    autocast = torch.is_autocast_enabled("cuda")
    dtype = torch.get_autocast_dtype("cuda") if autocast else query.dtype
    size = query.shape[-1]
    options = {"window_size", "enable_gqa"}  # later than the function
    fits = size == value.shape[-1] and size <= 256 and size % 8 == 0
    known = options <= {*inspect.signature(varlen_attn).parameters}
    return dtype if fits and known and dtype in _HALF else None


def unsupported_reason(model: PreTrainedModel, *, training: bool) -> str:
    """Why a model cannot run a pack row by row; empty if it can.

    Logits of rows with common beginnings, and in training gradients, are compared with single ones.
    """
    if training and is_checkpointed(model):
        return "with gradient checkpointing attention is computed again in the backward pass"
    if training and is_compiled(model):
        return "layers are compiled"
    ids = probe_ids(model, 40)
    first, other = ids[:16], ids[24:]
    rows = [first, torch.cat([first[:9], other[:3]]), torch.cat([first[:4], other[:8]]), other]
    run = partial(_packed, model, rows, [0, 9, 4, 0])
    to, where = "run rows apart", "for rows run apart"
    with in_mode(model, False), torch.inference_mode(False), torch.set_grad_enabled(training):
        wanted = torch.cat([model(input_ids=row[None], use_cache=False).logits[0] for row in rows])
        return difference(model, run, wanted, to=to, where=where, gradients=training)


def _packed(model: PreTrainedModel, rows: Sequence[Tensor], shared: Sequence[int]) -> Tensor:
    """Logits of all tokens of rows that are run as a pack."""
    ids_N = torch.cat([*rows])
    positions_N = torch.cat([torch.arange(len(row), device=ids_N.device) for row in rows])
    pack = Pack([*map(len, rows)], shared, ids_N.device)
    batch = {"input_ids": ids_N[None], "position_ids": positions_N[None]}
    with pack.attending():
        logits: Tensor = model(**pack.inputs(batch)).logits[0]
    return logits[pack.place_N]
