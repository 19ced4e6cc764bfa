"""Token ids to batches.

Axes: B batch, T tokens. Batches are padded on the left: all responses end in the last column.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rosa_lightning.data.tokenization import Example
from rosa_lightning.models.kv_cache import common_start
from rosa_lightning.tasks.records import candidates, reference

IGNORED = -100
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
    """Batches to train and validate on."""

    source_names: tuple[str, ...]
    """Names that `source` indexes."""
    pad_id: int
    """Token id that fills the left."""

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        """Inputs, `labels` and `answer_mask` (B, T); `source` and `index` (B,); `task`.

        Labels are aligned with the input ids, IGNORED off the response; the answer mask marks
        the tokens of the final answer with EOS. `num_label_positions` is the number of last
        columns outside which no row has a label. `num_shared` tokens stand at the beginning of
        every row and predict no label.
        """
        rows = [example.prompt + example.response for example in examples]
        inputs = _inputs(rows, self.pad_id)
        labels_BT = torch.full_like(inputs["input_ids"], IGNORED)
        answer_mask_BT = torch.zeros_like(labels_BT, dtype=torch.bool)
        width = labels_BT.shape[1]
        for row, example in enumerate(examples):
            start = width - len(example.response)
            labels_BT[row, start:] = inputs["input_ids"][row, start:]
            answer_mask_BT[row, start + example.answer :] = True
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
class PromptCollator:
    """Batches to test and predict on: prompts alone."""

    pad_id: int
    """Token id that fills the left."""

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        """Inputs (B, T); `index` (B,); lists of what the records say.

        These are `task`, `source`, `prompt`, `input`, `reference` and `candidates`.
        """
        records = [example.record for example in examples]
        return {
            **_inputs([example.prompt for example in examples], self.pad_id),
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
    """Makes the batch whose loss is taken."""
    collate_prompts: PromptCollator
    """Makes the batch of prompts."""
    answered: frozenset[tuple[str, int]]
    """Source and index of the records whose answers are written."""

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        """The batch, and under ``to_answer`` its prompts to answer, or None where it has none."""
        chosen = [one for one in examples if (one.record.source, one.record.index) in self.answered]
        prompts = self.collate_prompts(chosen) if chosen else None
        return {**self.collate(examples), "to_answer": prompts}
