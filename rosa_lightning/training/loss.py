"""A batch to its loss, in the cheapest way that is exactly equal to computing all of it.

The head is run where a token is predicted that carries loss, and nowhere else. What all rows
begin with is computed once. A batch too large to be run at once is taken in parts. Where a model or
a setting does not allow it, that is said once, and the whole is computed.

Axes: B rows, T tokens, N supervised positions, V vocabulary.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.utils.checkpoint import checkpoint

from rosa_lightning.data.collators import (
    IGNORE_INDEX,
    complete_batch,
    is_packed_batch,
    num_rows,
    row_of,
)
from rosa_lightning.dls.checks import is_reentrant
from rosa_lightning.models.kv_cache import WORTH_SHARING, forward_arguments
from rosa_lightning.training.head import last_block, logits_at, states_at, why_not_narrowed
from rosa_lightning.training.microbatches import (
    MicrobatchTokens,
    busy_tokens,
    microbatches,
    sum_of_parts,
)
from rosa_lightning.training.packing import check_can_pack
from rosa_lightning.training.recompute import recomputable, recomputed
from rosa_lightning.training.shared_prefix import (
    rows_behind,
    why_not_in_training,
    why_not_shared,
    window,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PACKED = ("input_ids", "position_ids")

_SHARDED = "the ranks that share a model in shards must all run it equally often"


@dataclass(frozen=True)
class Scored:
    """What a model makes of a batch."""

    loss: Tensor
    """Mean cross-entropy over the supervised positions, in nats."""
    count: int
    """Supervised positions."""
    correct: Tensor
    """Whether a row's answer is what the model writes by itself, bool, shape (B,)."""


class Forward:
    """Runs batches through a model.

    Args:
        model: An adapted causal language model.
        share_prefix: Compute once what all rows of a batch begin with, where that is equal.
        loss_chunk: Supervised positions whose logits are held at once; None for all.
        recompute_activations: Make again in the backward pass what is cheap, instead of holding it.
        microbatch_tokens: Most tokens run at once, padding included, where gradients are taken.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        share_prefix: bool = True,
        loss_chunk: int | None = None,
        recompute_activations: bool = True,
        microbatch_tokens: MicrobatchTokens = "auto",
    ) -> None:
        self.model = model
        self.share_prefix = share_prefix
        self.loss_chunk = loss_chunk
        self.recompute_activations = recompute_activations
        self.microbatch_tokens = microbatch_tokens
        self.sharded = any(
            isinstance(module, FSDPModule | FullyShardedDataParallel) for module in model.modules()
        )
        self.forget()

    def forget(self) -> None:
        """Find out anew what can be done, as after a change of the model."""
        self._findings: dict[str, str] = {}
        """Why something cannot be done, by what; empty where it can."""
        self._window: int | None = None
        self.block: nn.Module | None = None
        """What is run at supervised positions alone, beside the head."""
        self._cheap: list[nn.Module] | None = None
        self._tokens_at_once = self.microbatch_tokens

    def recomputing(self) -> AbstractContextManager[None]:
        """Within it, what is cheap to make again is not held for the backward pass."""
        if not (self.recompute_activations and torch.is_grad_enabled()):
            return nullcontext()
        if self._cheap is None:
            self._cheap = recomputable(self.model)
        return recomputed(self._cheap) if self._cheap else nullcontext()

    def loss(self, batch: dict[str, Any]) -> Tensor:
        """Mean cross-entropy of a batch over its supervised positions, in nats.

        Args:
            batch: As `TrainCollator` or `PackedCollator` makes it, or with the fields of
                `transformers`. Of one with more than `microbatch_tokens`, gradients of all parts
                but the last are taken here, and the loss can be differentiated once, by leaves;
                hooks see each part.

        Raises:
            ValueError: No token of the batch carries loss, fields are missing or cannot be used, or
                it is packed, and the model mixes packed rows.
        """
        parts = self._parts(self.complete_batch(batch))
        # Counted apart, which waits for the device, where parts do not know of each other.
        count = sum(_num_supervised(part) for part in parts) if len(parts) > 1 else None

        def part_of_loss(part: dict[str, Any]) -> Tensor:
            with self.recomputing():
                total, _, rows_N, _ = self._read(part, predict=False)
            return total / (count or len(rows_N))

        return sum_of_parts(parts, part_of_loss)

    def score(self, batch: dict[str, Any]) -> Scored:
        """The loss, and which answers the model would write by itself.

        Args:
            batch: As for `loss`.
        """
        batch = self.complete_batch(batch)
        total, predicted_N, rows_N, columns_N = self._read(batch, predict=True)
        labels_N = batch["labels"][rows_N, columns_N]
        missed_N = (predicted_N != labels_N) & batch["answer_mask"][rows_N, columns_N]
        if is_packed_batch(batch):
            rows_N = row_of(batch, columns_N)
        correct_B = torch.ones(num_rows(batch), dtype=torch.bool, device=total.device)
        correct_B[rows_N[missed_N]] = False
        return Scored(total / len(labels_N), len(labels_N), correct_B)

    def complete_batch(self, batch: Any) -> dict[str, Any]:
        """The batch with all fields that `loss` and `score` need, derived where it lacks them."""
        found: dict[str, Any] = complete_batch(batch, self.model)
        return found

    def _read(self, batch: dict[str, Any], predict: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Summed loss, tokens predicted (N,) if wanted, where labels stand: rows and columns."""
        rows_N, columns_N = (batch["labels"][:, 1:] != IGNORE_INDEX).nonzero(as_tuple=True)
        if not len(rows_N):
            raise ValueError(
                f"a batch of {num_rows(batch)} rows has no token that carries loss: all labels "
                f"behind the first column are {IGNORE_INDEX}. Give every row a response."
            )
        labels_N = batch["labels"][rows_N, columns_N + 1]
        narrow = self._can_narrow(batch)
        inputs, num_shared = self._inputs(batch)
        columns = columns_N - num_shared
        if narrow:
            places_N = rows_N * inputs["input_ids"].shape[1] + columns
            total, predicted = self.total_at(inputs, places_N, labels_N, predict=predict)
        else:
            logits_NV = self._right_end(inputs, batch, rows_N, columns)
            total = cross_entropy_sum(logits_NV, labels_N)
            predicted = logits_NV.argmax(-1) if predict else labels_N
        return total, predicted, rows_N, columns_N + 1

    def _parts(self, batch: dict[str, Any]) -> list[dict[str, Any]]:
        """The batch, in as many parts as it takes to run few enough tokens at once."""
        if self.microbatch_tokens is None or not torch.is_grad_enabled():
            return [batch]
        device = batch["labels"].device.type
        if self._tokens_at_once == "auto":
            self._tokens_at_once = busy_tokens(self.model, device)
        if self._tokens_at_once is None:
            return [batch]
        parts = microbatches(batch, self._tokens_at_once, self._num_shared(batch))
        if len(parts) > 1 and (reason := self._why_not_in_parts(device)):
            self._note(reason, reason, "batches are run whole, model.microbatch_tokens or not")
            return [batch]
        return parts

    def _why_not_in_parts(self, device: str) -> str:
        if self.sharded:
            return _SHARDED
        if torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16:
            return (
                "16-mixed scales the loss for a backward pass that comes later (set "
                "trainer.precision to bf16-mixed for parts)"
            )
        if any(
            weight.requires_grad and weight._backward_hooks for weight in self.model.parameters()
        ):
            return "hooks on parameters would see gradients of parts"
        if any(is_reentrant(module) for module in self.model.modules()):
            return "reentrant checkpointing has but one backward pass"
        return ""

    # The head.

    def total_at(
        self, inputs: dict[str, Any], places_N: Tensor, labels_N: Tensor, *, predict: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Sum of the losses at some positions, and the tokens predicted there, if wanted.

        Args:
            inputs: What the model's forward takes; its head can be narrowed.
            places_N: Indices into the flattened (B, T) of the inputs, each once.
            labels_N: The tokens that follow.
            predict: Whether to say which tokens are predicted; else the labels come back.
        """
        if self.loss_chunk is not None and len(labels_N) > self.loss_chunk:
            return self._in_chunks(inputs, places_N, labels_N, predict)
        logits_NV = logits_at(self.model, inputs, places_N, self.block)
        predicted = logits_NV.argmax(-1) if predict else labels_N
        return cross_entropy_sum(logits_NV, labels_N), predicted

    def _in_chunks(
        self, inputs: dict[str, Any], places_N: Tensor, labels_N: Tensor, predict: bool
    ) -> tuple[Tensor, Tensor]:
        """Sum of losses and the predicted tokens, the logits of one chunk held at a time."""
        states_ND, head = states_at(self.model, inputs, places_N, self.block)

        def one(states: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            logits = head(states)
            predicted = logits.argmax(-1) if predict else labels
            return cross_entropy_sum(logits, labels), predicted

        size = self.loss_chunk or len(labels_N)
        parts = [
            checkpoint(one, states, labels, use_reentrant=False, preserve_rng_state=False)
            for states, labels in zip(
                torch.split(states_ND, size), torch.split(labels_N, size), strict=True
            )
        ]
        losses, predicted = zip(*parts, strict=True)
        return torch.stack(losses).sum(), torch.cat(predicted)

    def _right_end(
        self, inputs: dict[str, Any], batch: dict[str, Any], rows_N: Tensor, columns_N: Tensor
    ) -> Tensor:
        """Logits (N, V), through what a model's forward itself can leave out, if anything."""
        width = inputs["input_ids"].shape[1]
        packed = is_packed_batch(batch)
        if "logits_to_keep" in forward_arguments(self.model):
            keep = columns_N if packed else batch["num_label_positions"] + 1
            inputs = {**inputs, "logits_to_keep": keep}
        logits_BKV: Tensor = self.model(**inputs).logits
        if packed:
            return logits_BKV[0] if "logits_to_keep" in inputs else logits_BKV[0, columns_N]
        return logits_BKV[rows_N, columns_N - (width - logits_BKV.shape[1])]

    def _can_narrow(self, batch: dict[str, Any]) -> bool:
        if "head" not in self._findings:
            reason = _SHARDED if self.sharded else why_not_narrowed(self.model, batch["input_ids"])
            if not reason:
                self.block = last_block(self.model, batch["input_ids"])
            torch.clear_autocast_cache()  # of weights cast without a graph
            instead = "logits are computed at the last columns of all rows"
            if self.loss_chunk is not None:
                instead += ", all at once in spite of model.loss_chunk"
            self._note("head", reason, instead)
        return not self._findings["head"]

    # The beginning.

    def _inputs(self, batch: dict[str, Any]) -> tuple[dict[str, Any], int]:
        """What the model's forward takes, and how many columns are left out of it."""
        if is_packed_batch(batch):
            if "packed" not in self._findings:
                check_can_pack(self.model, type(self.model).__name__)
                torch.clear_autocast_cache()  # of weights cast without a graph
                self._note("packed", "", "")
            return {**{name: batch[name] for name in _PACKED}, "use_cache": False}, 0
        if num_shared := self._num_shared(batch):
            return rows_behind(self.model, batch, num_shared), num_shared
        names = ("input_ids", "attention_mask", "position_ids")
        return {**{name: batch[name] for name in names}, "use_cache": False}, 0

    def _num_shared(self, batch: dict[str, Any]) -> int:
        """Tokens of the rows' beginning that are computed once."""
        num_shared: int = batch.get("num_shared", 0)
        worth = num_shared >= WORTH_SHARING and len(batch["labels"]) > 1
        return num_shared if self.share_prefix and worth and self._can_share(batch) else 0

    def _can_share(self, batch: dict[str, Any]) -> bool:
        mode = "training" if self.model.training else "evaluation"
        if mode not in self._findings:
            self._find_out(mode, batch)
        if self._findings[mode]:
            return False
        width = batch["input_ids"].shape[1]
        if self._window is not None and width > self._window:
            self._note(
                "window",
                f"a window of {self._window} tokens is shorter than a batch of {width} columns",
                "what rows of such batches begin with is computed for each",
            )
            return False
        return True

    def _find_out(self, mode: str, batch: dict[str, Any]) -> None:
        """Whether this model can share a beginning in a mode, said if it cannot."""
        training = mode == "training"
        reason = _SHARDED if self.sharded else ""
        if not reason and training:
            reason = why_not_in_training(self.model)
        if not reason:
            longest = batch["position_ids"][:, -1].argmax()
            ids_T = batch["input_ids"][longest]
            reason = why_not_shared(self.model, ids_T, gradients=training)
            torch.clear_autocast_cache()
            self._window = window(self.model)
        self._note(mode, reason, f"in {mode} what all rows begin with is computed for each")

    def _note(self, what: str, reason: str, instead: str) -> None:
        if reason and what not in self._findings:
            rank_zero_info(f"{instead}: {reason}.")
        self._findings.setdefault(what, reason)


def _num_supervised(batch: dict[str, Any]) -> int:
    return int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())


def cross_entropy_sum(logits_NV: Tensor, labels_N: Tensor) -> Tensor:
    """Summed cross-entropy in nats, in float32 or better."""
    dtype = torch.promote_types(logits_NV.dtype, torch.float32)
    return F.cross_entropy(logits_NV.to(dtype), labels_N, reduction="sum")
