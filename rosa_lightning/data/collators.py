"""Token ids to batches.

Axes: B batch, T tokens. Batches are padded on the left: all responses end in the last column.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from rosa_lightning.data.encoding import Example
from rosa_lightning.models.kv_cache import common_start
from rosa_lightning.models.vocabulary import num_embeddings
from rosa_lightning.tasks.records import candidates, reference

IGNORE_INDEX = -100
"""Label of a token without loss, as in `torch.nn.functional.cross_entropy`."""


def _left_padded(rows: Sequence[Sequence[int]], filler: int) -> Tensor:
    width = max(len(row) for row in rows)
    padded_BT = torch.full((len(rows), width), filler, dtype=torch.int64)
    for row, ids in enumerate(rows):
        if len(ids):
            padded_BT[row, width - len(ids) :] = torch.tensor(ids, dtype=torch.int64)
    return padded_BT


def _inputs(rows: Sequence[Sequence[int]], pad_id: int) -> dict[str, Tensor]:
    mask_BT = _left_padded([[1] * len(row) for row in rows], 0)
    return {
        "input_ids": _left_padded(rows, pad_id),
        "attention_mask": mask_BT,
        "position_ids": (mask_BT.cumsum(1) - 1).clamp(min=0),
    }


def origins(examples: Sequence[Example], source_names: Sequence[str]) -> dict[str, Any]:
    """Where rows come from: `source`, which indexes the names, and `index` (B,); `task`."""
    records = [example.record for example in examples]
    return {
        "source": torch.tensor([source_names.index(record.source) for record in records]),
        "task": [record.task for record in records],
        "index": torch.tensor([record.index for record in records]),
    }


@dataclass(frozen=True)
class TrainCollator:
    """Batches to train and validate on, padded with `pad_id`; `source` indexes `source_names`."""

    source_names: tuple[str, ...]
    pad_id: int

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        """Inputs, `labels` and `answer_mask` (B, T); `source` and `index` (B,); `task`.

        Labels are aligned with the input ids, IGNORE_INDEX where there is no loss; the answer mask
        marks the tokens of the final answer with EOS. `num_label_positions` is the number of last
        columns outside which no row has a label. `num_shared` tokens stand at the beginning of
        every row and predict no label.
        """
        rows = [example.prompt + example.response for example in examples]
        inputs = _inputs(rows, self.pad_id)
        labels_BT = _left_padded([one.labels(IGNORE_INDEX) for one in examples], IGNORE_INDEX)
        answer_mask_BT = torch.zeros_like(labels_BT, dtype=torch.bool)
        for row, example in enumerate(examples):
            answer_mask_BT[row, example.answer - len(example.response) :] = True
        before = min(len(example.prompt) for example in examples) - 1
        return {
            **inputs,
            "labels": labels_BT,
            "answer_mask": answer_mask_BT,
            "num_label_positions": max(len(example.response) for example in examples),
            "num_shared": min(len(common_start(rows)), before),
            **origins(examples, self.source_names),
        }


@dataclass(frozen=True)
class PackedCollator:
    """Packed batches to train and validate on; `source` indexes `source_names`."""

    source_names: tuple[str, ...]

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        """Inputs, `labels`, `answer_mask` (1, N); `row_lengths`, `source`, `index` (B,); `task`.

        As the padded batch's, but for `position_ids`, which start again at 0 with each row, and
        the attention mask, which is of ones and for counting alone. Rows that begin alike follow
        one another; `shared_lengths` (B,) is how many tokens that predict no label a row has in
        common with the one before it.
        """
        examples = sorted(examples, key=lambda one: one.prompt + one.response)
        shared = [0] * len(examples)
        for row, (one, other) in enumerate(pairwise(examples), 1):
            common = common_start([one.prompt + one.response, other.prompt])
            shared[row] = max(0, min(len(common), len(other.prompt) - 1))
        ids: list[int] = []
        labels: list[int] = []
        is_answer: list[bool] = []
        positions: list[int] = []
        for example in examples:
            ids += [*example.prompt, *example.response]
            labels += example.labels(IGNORE_INDEX)
            before = len(example.prompt) + example.answer
            is_answer += [False] * before + [True] * (example.num_tokens - before)
            positions += range(example.num_tokens)
        return {
            "input_ids": torch.tensor([ids]),
            "attention_mask": torch.ones(1, len(ids), dtype=torch.int64),
            "position_ids": torch.tensor([positions]),
            "labels": torch.tensor([labels]),
            "answer_mask": torch.tensor([is_answer]),
            "row_lengths": torch.tensor([example.num_tokens for example in examples]),
            "shared_lengths": torch.tensor(shared),
            **origins(examples, self.source_names),
        }


@dataclass(frozen=True)
class PromptCollator:
    """Batches to test and predict on: prompts alone."""

    pad_id: int

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        """Inputs (B, T); `index` (B,); lists of what the records say."""
        records = [example.record for example in examples]
        return {
            **_inputs([example.asked for example in examples], self.pad_id),
            "task": [record.task for record in records],
            "source": [record.source for record in records],
            "index": torch.tensor([record.index for record in records]),
            "prompt": [record.instruction for record in records],
            "input": [record.input for record in records],
            "reference": [reference(record) for record in records],
            "candidates": [candidates(record) for record in records],
        }


@dataclass(frozen=True)
class ValidationCollator:
    """Batches to validate on, with the prompts of those records whose answers are written."""

    collate: Callable[[Sequence[Example]], dict[str, Any]]
    collate_prompts: PromptCollator
    answered: frozenset[tuple[str, int]]
    """Source and index of the records whose answers are written."""

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        """The batch, and under ``to_answer`` its prompts to answer, or None where it has none."""
        chosen = [one for one in examples if (one.record.source, one.record.index) in self.answered]
        prompts = self.collate_prompts(chosen) if chosen else None
        return {**self.collate(examples), "to_answer": prompts}


# --- any batch ---


def is_packed_batch(batch: Mapping[str, Any]) -> bool:
    """Whether the batch's rows are laid end to end."""
    return "row_lengths" in batch


def num_rows(batch: Mapping[str, Any]) -> int:
    """Rows of a batch, padded or packed."""
    return len(batch["row_lengths" if is_packed_batch(batch) else "labels"])


def row_of(batch: Mapping[str, Any], positions_N: Tensor) -> Tensor:
    """The row that each position of a packed batch belongs to, both of shape (N,)."""
    return torch.bucketize(positions_N, batch["row_lengths"].cumsum(0), right=True)


# --- batches of other collators ---

_WANTED = (
    "RoSAModule trains on batches with the fields of transformers: input_ids and labels, and "
    "attention_mask where rows are padded, each a tensor of shape (rows, tokens)"
)


def complete_batch(batch: Any, model: nn.Module) -> Any:
    """A batch with all fields that a loss is computed from; one of our own collators as it is.

    Of others, `input_ids` and `labels` (B, T), aligned, and `attention_mask` and `position_ids`, if
    any, are read. Rows are moved to the right end, and positions counted from a row's first token
    if they are not given. A row's first token has no label: nothing stands before it. Raises
    ValueError for a field that is missing or cannot be used, also by the rows of `model`'s
    embedding.
    """
    if isinstance(batch, Mapping) and (is_packed_batch(batch) or "num_label_positions" in batch):
        return batch
    given = _fields(batch)
    mask_BT = given["attention_mask"].bool()
    lengths_B, width = mask_BT.sum(1), mask_BT.shape[1]
    first_B = mask_BT.int().argmax(1)
    columns_T = torch.arange(width, device=mask_BT.device)
    inside_BT = (columns_T >= first_B[:, None]) & (columns_T < (first_B + lengths_B)[:, None])
    _check(given, mask_BT, inside_BT, num_embeddings(model))

    def moved(field: Tensor, begin_B: Tensor) -> Tensor:
        """Rows turned so that each begins at its own column."""
        return field.gather(1, (columns_T + (first_B - begin_B)[:, None]) % width)

    begin_B = width - lengths_B
    own_BT = columns_T >= begin_B[:, None]
    labels_BT = moved(given["labels"], begin_B)
    labels_BT = labels_BT.masked_fill(columns_T <= begin_B[:, None], IGNORE_INDEX)
    counted_BT = (own_BT.cumsum(1) - 1).clamp(min=0)
    positions_BT = counted_BT
    if "position_ids" in given:
        positions_BT = moved(given["position_ids"], begin_B).masked_fill(~own_BT, 0)
    has_label_BT = labels_BT != IGNORE_INDEX
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
        if not isinstance(field, Tensor):
            raise ValueError(f"{name} of a batch is a {type(field).__name__}. {_WANTED}.")
        shape, wanted = tuple(field.shape), tuple(found["input_ids"].shape)
        if len(shape) != 2 or field.is_floating_point() or shape != wanted:
            raise ValueError(
                f"{name} of a batch is of {field.dtype}, shape {shape}, and input_ids are of shape "
                f"{wanted}. {_WANTED} and whole numbers."
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
    stray_BT = (given["labels"] != IGNORE_INDEX) & ~mask_BT
    if stray_BT.any():
        row = int(stray_BT.any(1).int().argmax())
        raise ValueError(
            f"labels of a batch train on padding, in row {row} first. Set labels of padding to "
            f"{IGNORE_INDEX}, as DataCollatorForSeq2Seq of transformers does."
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
