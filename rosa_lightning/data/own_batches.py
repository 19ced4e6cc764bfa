"""Batches with the fields of `transformers`, made complete.

Axes: B rows, T tokens, P tokens that all rows begin with.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rosa_lightning.data.collators import IGNORED
from rosa_lightning.data.packing import is_packed_batch
from rosa_lightning.models.vocabulary import num_embeddings

_WANTED = (
    "RoSAModule trains on batches with the fields of transformers: input_ids and labels, and "
    "attention_mask where rows are padded, each a tensor of shape (rows, tokens)"
)


def completed(batch: Any, model: nn.Module) -> Any:
    """A batch with all fields that a loss is computed from; one of our own collators as it is.

    Rows padded on the right, or on both sides, are moved to the right end, as all else expects.
    Positions are counted from a row's first token if they are not given. A row's first token has no
    label: nothing stands before it, where `transformers` predicts it from padding. What padding
    says is not looked at.

    Args:
        batch: `input_ids` and `labels`, shape (B, T), aligned; `attention_mask`, of ones if it is
            not given, and `position_ids`, likewise.
        model: What it is for: its embedding bounds the token ids.

    Returns:
        The batch with `position_ids`, `answer_mask` (all labels), `num_label_positions`,
        `num_shared` and `task` ("all"), where it has none.

    Raises:
        ValueError: It lacks a field, or a field cannot be used. Says which.
    """
    if isinstance(batch, Mapping) and (is_packed_batch(batch) or "num_label_positions" in batch):
        return batch
    given = _fields(batch)
    mask_BT = given["attention_mask"].bool()
    lengths_B, width = mask_BT.sum(1), mask_BT.shape[1]
    first_B = mask_BT.int().argmax(1)
    places_T = torch.arange(width, device=mask_BT.device)
    inside_BT = (places_T >= first_B[:, None]) & (places_T < (first_B + lengths_B)[:, None])
    _check(given, mask_BT, inside_BT, num_embeddings(model))

    def moved(field: Tensor, begin_B: Tensor) -> Tensor:
        """Rows turned so that each begins at its own column."""
        return field.gather(1, (places_T + (first_B - begin_B)[:, None]) % width)

    begin_B = width - lengths_B
    own_BT = places_T >= begin_B[:, None]
    labels_BT = moved(given["labels"], begin_B)
    labels_BT = labels_BT.masked_fill(places_T <= begin_B[:, None], IGNORED)
    counted_BT = (own_BT.cumsum(1) - 1).clamp(min=0)
    positions_BT = counted_BT
    if "position_ids" in given:
        positions_BT = moved(given["position_ids"], begin_B).masked_fill(~own_BT, 0)
    has_label_BT = labels_BT != IGNORED
    first_label = int(_first(has_label_BT.any(0)))
    shared = 0
    if torch.equal(positions_BT, counted_BT):
        ids_BT = moved(given["input_ids"], torch.zeros_like(begin_B))  # at the left end
        same_T = (ids_BT == ids_BT[:1]).all(0)
        # The token before a row's first label predicts it, and each row goes on by one at least.
        before_B = torch.minimum(_first(has_label_BT) - begin_B, lengths_B) - 1
        shared = max(0, int(torch.minimum(_first(~same_T), before_B.min())))
    return {
        **batch,
        "input_ids": moved(given["input_ids"], begin_B).masked_fill(~own_BT, 0),
        "attention_mask": own_BT.long(),
        "position_ids": positions_BT,
        "labels": labels_BT,
        "answer_mask": has_label_BT,
        "num_label_positions": width - first_label,
        "num_shared": shared,
        "task": batch.get("task", ["all"] * len(labels_BT)),
    }


def _fields(batch: Any) -> dict[str, Tensor]:
    """The fields to work with, of equal shapes."""
    if not isinstance(batch, Mapping):
        raise ValueError(f"a batch is a {type(batch).__name__}. {_WANTED}.")
    missing = [name for name in ("input_ids", "labels") if name not in batch]
    if missing:
        held = ", ".join(map(str, batch)) or "nothing"
        raise ValueError(f"a batch lacks {' and '.join(missing)}; it has {held}. {_WANTED}.")
    names = ("input_ids", "labels", "attention_mask", "position_ids")
    found = {name: batch[name] for name in names if batch.get(name) is not None}
    for name, field in found.items():
        shape = tuple(field.shape) if isinstance(field, Tensor) else type(field).__name__
        if not isinstance(field, Tensor) or field.ndim != 2 or field.is_floating_point():
            kind = f"of {field.dtype}, shape {shape}" if isinstance(field, Tensor) else f"a {shape}"
            raise ValueError(f"{name} of a batch is {kind}. {_WANTED} and whole numbers.")
        if shape != (wanted := tuple(found["input_ids"].shape)):
            raise ValueError(
                f"{name} of a batch has shape {shape}, and input_ids {wanted}. {_WANTED}."
            )
    if "attention_mask" not in found:
        positions = found.get("position_ids")
        if positions is not None and (positions.diff(dim=1) != 1).any():
            raise ValueError(
                "position_ids of a batch start again within a row, and it has no attention_mask: "
                "rows laid end to end come from ReasoningDataModule with data.batching: packed. "
                "Give a row each, and attention_mask."
            )
        found["attention_mask"] = torch.ones_like(found["input_ids"])
    return {name: field.long() for name, field in found.items()}


def _check(
    given: Mapping[str, Tensor], mask_BT: Tensor, inside_BT: Tensor, num_rows: int | None
) -> None:
    """Raises ValueError for what would be trained on otherwise than it is meant."""
    if not torch.equal(mask_BT, inside_BT):
        row = int((mask_BT != inside_BT).any(1).int().argmax())
        raise ValueError(
            f"attention_mask of a batch leaves out tokens in the midst of row {row}. Pad rows on "
            "the right or on the left only."
        )
    stray_BT = (given["labels"] != IGNORED) & ~mask_BT
    if stray_BT.any():
        row = int(stray_BT.any(1).int().argmax())
        raise ValueError(
            f"labels of a batch train on padding, in row {row} first. Set labels of padding to "
            f"{IGNORED}, as DataCollatorForSeq2Seq of transformers does."
        )
    ids_N = given["input_ids"][mask_BT]
    if num_rows is not None and len(ids_N):
        least, most = (int(one) for one in ids_N.aminmax())
        if least < 0 or most >= num_rows:
            raise ValueError(
                f"a batch has the token id {least if least < 0 else most}, but the embedding of "
                f"the base has rows 0 to {num_rows - 1}. Tokenise with the base's own tokenizer."
            )


def _first(flags: Tensor) -> Tensor:
    """Index of the first true one along the last axis; the axis's size where there is none."""
    padded = torch.nn.functional.pad(flags, (0, 1), value=True)
    return padded.int().argmax(-1)
