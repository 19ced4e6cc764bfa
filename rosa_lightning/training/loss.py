"""The cross-entropy loss of a batch, computed where a token carries loss, equal to the full one.

The head runs at supervised positions alone, a shared prefix is computed once, and a large batch is
taken in parts. Where a model or a setting does not allow one of these, that is logged once, and the
whole is computed.

Axes: B rows, T tokens, N supervised positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rosa_lightning.data.collators import (
    IGNORE_INDEX,
    complete_batch,
    is_packed_batch,
    num_rows,
    row_of,
)
from rosa_lightning.models.kv_cache import WORTH_SHARING, forward_arguments
from rosa_lightning.models.vocabulary import num_embeddings
from rosa_lightning.training import head, prompts, shared_prefix
from rosa_lightning.training.attention import is_half_on_cpu, short_rows_by_products
from rosa_lightning.training.compile import is_compiled
from rosa_lightning.training.microbatches import (
    accumulate_loss,
    default_microbatch_tokens,
    microbatches,
    sum_at_once,
)
from rosa_lightning.training.norms import RMSNorm, fast_norms, rms_norms
from rosa_lightning.training.pack_attention import Pack
from rosa_lightning.training.products import HalfProducts
from rosa_lightning.training.recompute import recomputable, recomputed
from rosa_lightning.training.rotary import fast_rotation, rotating_files
from rosa_lightning.training.speed import SpeedConfig
from rosa_lightning.training.support import Support
from rosa_lightning.utils.modules import is_checkpointed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LOGITS_AT_ONCE = 2**27
"""Bytes of a chunk's logits in float32 under ``auto``; their gradients take as many again."""
WIDTH_STEP, POSITIONS_STEP = 8, 32
"""In bfloat16 on a CPU the numbers of columns and of supervised positions are rounded up to these:
each new shape of a product takes half a MiB of the process for good (oneDNN 3.12), whether or not
oneDNN keeps it, and a width has some 35."""


@dataclass(frozen=True)
class Scored:
    """The loss of a batch, and which answers are right."""

    loss: Tensor
    """Mean cross-entropy over the supervised positions, in nats."""
    count: int
    """Supervised positions."""
    correct: Tensor
    """Whether each token of a row's answer is the model's first choice, bool, shape (B,)."""


class LossComputer:
    """Computes losses of batches for training, validation and the memory estimate."""

    def __init__(
        self,
        model: PreTrainedModel,
        speed: SpeedConfig | None = None,
        *,
        attn_implementation: str | None = None,
        device: str | None = None,
    ) -> None:
        """An attention kernel that is named is kept.

        `device` is the kind on which a step would run that is estimated on another.
        """
        self.model = model
        self._device = device
        self._chooses_attention = attn_implementation is None and device in (None, "cpu")
        self.speed = speed or SpeedConfig()
        self.reset()

    def reset(self) -> None:
        """Test again what the model supports, as after a change of it."""
        self.support = Support(self.model, self.speed)
        self._assumed_widths: tuple[int, int] | None = None
        self._cheap: list[nn.Module] | None = None
        self._norms: list[RMSNorm] | None = None
        self._rotating: list[tuple[Any, bool]] = []
        self._products: HalfProducts | None = None
        self._tokens_at_once = self.speed.microbatch_tokens

    def let_go(self) -> None:
        """Hold no weights in bfloat16, as after the last step of a training."""
        self._products = None

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Within it, a model runs for a backward pass with less work and memory.

        Cheap activations are not held, norms and rotations take few passes over memory, and short
        rows attend as is fastest.
        """
        if self._cheap is None:
            self._cheap = recomputable(self.model)
        with ExitStack() as stack:
            if not self._runs_as_written():
                stack.enter_context(fast_norms(self._norms or ()))
                stack.enter_context(fast_rotation(self._rotating))
                if self._products and self._computes_in_half():
                    stack.enter_context(self._products.running())
                if self._chooses_attention:
                    stack.enter_context(short_rows_by_products())
            if self._cheap and self.speed.recompute_activations and torch.is_grad_enabled():
                stack.enter_context(recomputed(self._cheap))
            yield

    def _runs_as_written(self) -> bool:
        """Whether layers must be left alone: what they compute again has to be the same."""
        return is_compiled(self.model) or is_checkpointed(self.model)

    def _look(self, ids_BT: Tensor) -> None:
        """Find what `saving` can do in fewer passes, once."""
        if self.support.sharded or self._runs_as_written():
            return
        if self._norms is None:
            with torch.autocast(ids_BT.device.type, enabled=False):
                self._norms, self._rotating = rms_norms(self.model), rotating_files(self.model)
        if self._products is None and self._computes_in_half():
            self._products = HalfProducts(self.model, ids_BT[:1, -8:], use_cache=False)
            torch.clear_autocast_cache()  # of weights cast without a graph

    def loss(self, batch: dict[str, Any]) -> Tensor:
        """Mean cross-entropy of a batch over its supervised positions, in nats.

        Of a batch with more than `microbatch_tokens`, gradients of all parts but the last are taken
        here. The loss can then be differentiated once, by leaves, and hooks see each part.
        ValueError for batches that cannot be used, and packed ones whose rows the model mixes.
        """
        batch = self.complete_batch(batch)
        self._look(batch["input_ids"])
        parts = self._parts(batch)
        # Counted apart, which waits for the device, where parts do not know of each other.
        count = sum(_num_supervised(part) for part in parts) if len(parts) > 1 else None

        def part_of_loss(part: dict[str, Any]) -> Tensor:
            rows_N, columns_N = _supervised(part)
            with self.saving():
                total, _ = self.loss_at(part, rows_N, columns_N)
            return total / (count or len(rows_N))

        return accumulate_loss(parts, part_of_loss)

    def score(self, batch: dict[str, Any]) -> Scored:
        """The loss, and which answers are the model's first choice, token by token."""
        batch = self.complete_batch(batch)
        rows_N, columns_N = _supervised(batch)
        total, predicted_N = self.loss_at(batch, rows_N, columns_N, predict=True)
        columns_N = columns_N + 1
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

    def loss_at(
        self, batch: dict[str, Any], rows_N: Tensor, columns_N: Tensor, *, predict: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Summed loss at some positions, whose labels are one column to the right, and predictions.

        Without `predict` the labels are returned as predictions.
        """
        labels_N = batch["labels"][rows_N, columns_N + 1]
        count = len(labels_N)
        narrow = self.support.head(batch)
        pack = self._pack(batch)
        if pack is None:
            inputs, num_left_out = self._inputs(batch)
            columns_N = columns_N - num_left_out
        else:
            inputs, columns_N = pack.inputs(batch), pack.place_N[columns_N]
        with pack.attending() if pack else nullcontext():
            if not narrow:
                logits_NV = self._last_columns(inputs, batch, rows_N, columns_N)
            else:
                positions_N = rows_N * inputs["input_ids"].shape[1] + columns_N
                if self._rounds_up(batch):
                    positions_N, labels_N = _filled_up(positions_N, labels_N, inputs["input_ids"])
                size = self._chunk_size(len(labels_N), labels_N.device.type)
                if size < len(labels_N):
                    of_chunks = self._in_chunks(inputs, positions_N, labels_N, size, predict)
                    return of_chunks[0], of_chunks[1][:count]
                logits_NV = head.logits_at(self.model, inputs, positions_N, self.support.block)
        predicted_N = logits_NV.argmax(-1) if predict else labels_N
        return cross_entropy_sum(logits_NV, labels_N), predicted_N[:count]

    def _chunk_size(self, count: int, device: str) -> int:
        """Of so many positions, how many have logits at once."""
        size = self.speed.loss_chunk
        if size == "auto":
            num_rows = num_embeddings(self.model)
            # Where gradients have to be taken later, chunks would compute the head twice.
            late = torch.is_grad_enabled() and self.support.later_backward_reason(device)
            if late or num_rows is None:
                return count
            num_chunks = -(-count * num_rows * 4 // LOGITS_AT_ONCE)
            return -(-count // num_chunks)
        return count if size is None else size

    def _in_chunks(
        self,
        inputs: dict[str, Any],
        positions_N: Tensor,
        labels_N: Tensor,
        size: int,
        predict: bool,
    ) -> tuple[Tensor, Tensor]:
        """`loss_at`, the logits of one chunk held at a time."""
        states_ND, head_of = head.states_at(self.model, inputs, positions_N, self.support.block)
        predicted_N = torch.empty_like(labels_N)

        def one(states_nD: Tensor, start: int) -> Tensor:
            chunk = slice(start, start + len(states_nD))
            logits_nV = head_of(states_nD)
            predicted_N[chunk] = logits_nV.argmax(-1) if predict else labels_N[chunk]
            return cross_entropy_sum(logits_nV, labels_N[chunk])

        starts = range(0, len(labels_N), size)
        if torch.is_grad_enabled() and not self.support.later_backward_reason(labels_N.device.type):
            return sum_at_once(states_ND, starts, one), predicted_N
        # The function is run again in the backward pass, with the same predictions.
        losses = [
            checkpoint(
                one,
                states_ND[start : start + size],
                start,
                use_reentrant=False,
                preserve_rng_state=False,
            )
            for start in starts
        ]
        return torch.stack(losses).sum(), predicted_N

    def _last_columns(
        self, inputs: dict[str, Any], batch: dict[str, Any], rows_N: Tensor, columns_N: Tensor
    ) -> Tensor:
        """Logits (N, V), by what a model's forward itself can leave out, if anything."""
        width = inputs["input_ids"].shape[1]
        packed = is_packed_batch(batch)
        if self.speed.supervised_only and "logits_to_keep" in forward_arguments(self.model):
            keep = columns_N if packed else batch["num_label_positions"] + 1
            inputs = {**inputs, "logits_to_keep": keep}
        logits_BKV: Tensor = self.model(**inputs).logits
        if packed:
            return logits_BKV[0] if "logits_to_keep" in inputs else logits_BKV[0, columns_N]
        return logits_BKV[rows_N, columns_N - (width - logits_BKV.shape[1])]

    def _inputs(self, batch: dict[str, Any]) -> tuple[dict[str, Any], int]:
        """What the model's forward takes, and how many columns are left out."""
        num_shared, more = self._num_shared(batch), 0
        width = batch["labels"].shape[1]
        if self._rounds_up(batch):
            more = -(width - num_shared) % WIDTH_STEP
            more = more if self.support.holds(width + more) else 0
            batch = _padded(batch, more)
        if self._cuts_prompts():
            widths = self._assumed_widths or self._prompt_widths(batch, num_shared)
            inputs = prompts.rows_after_prompts(self.model, batch, widths, num_shared)
            return inputs, width - widths[1]
        if num_shared:
            inputs = shared_prefix.rows_after_prefix(self.model, batch, num_shared)
            return inputs, num_shared - more
        names = ["input_ids", "position_ids"]
        if not is_packed_batch(batch):
            names.append("attention_mask")
        return {**{name: batch[name] for name in names}, "use_cache": False}, -more

    def _rounds_up(self, batch: dict[str, Any]) -> bool:
        """Whether columns and positions are added, so that few shapes occur."""
        return self._computes_in_half() and not is_packed_batch(batch)

    def _computes_in_half(self) -> bool:
        return is_half_on_cpu(self._device or self.model.device.type, self.model.dtype)

    def _pack(self, batch: dict[str, Any]) -> Pack | None:
        """How a packed batch is run row by row; None for others, and where that is impossible."""
        if (
            not is_packed_batch(batch)
            or self._cuts_prompts()
            or not self.support.rows_of_pack(batch)
        ):
            return None
        lengths = batch["row_lengths"].tolist()
        return Pack(lengths, self._shared_lengths(batch), batch["labels"].device)

    def _shared_lengths(self, batch: dict[str, Any]) -> list[int]:
        """Tokens that each row of a packed batch has in common with the one before, run once."""
        shares = self.speed.share_prefix and "shared_lengths" in batch
        if not (shares and self.support.beginnings_in_pack(batch)):
            return [0] * num_rows(batch)
        found: list[int] = batch["shared_lengths"].tolist()
        return found

    def _cuts_prompts(self) -> bool:
        return not self.speed.prompt_gradients and self.model.training and torch.is_grad_enabled()

    def _prompt_widths(self, batch: dict[str, Any], num_shared: int) -> tuple[int, int]:
        """Columns of prompts and responses; ValueError where prompts cannot be run apart."""
        self.support.check_prompts(batch)
        P, R = prompts.widths(batch)
        rounded = P + -(P - num_shared) % WIDTH_STEP, R + -R % WIDTH_STEP
        if self._rounds_up(batch) and self.support.holds(sum(rounded)):
            return rounded
        self.support.check_window(P + R)
        return P, R

    def _num_shared(self, batch: dict[str, Any]) -> int:
        """Tokens of the shared prefix that are computed once."""
        num_shared: int = batch.get("num_shared", 0)
        worth = num_shared >= WORTH_SHARING and len(batch["labels"]) > 1
        shares = self.speed.share_prefix and worth and self.support.shared_prefix(batch)
        return num_shared if shares else 0

    def assume_supported(self, ids_BT: Tensor, response_length: int) -> None:
        """Take levers to be right, as for fake tensors, which cannot be compared.

        All responses are taken to be of one length, in tokens.
        """
        self.support.assume(ids_BT)
        self._norms = rms_norms(self.model, compare=False)
        self._look(ids_BT)
        self._assumed_widths = (ids_BT.shape[1] - response_length - 1, response_length + 1)

    def _parts(self, batch: dict[str, Any]) -> list[dict[str, Any]]:
        """The batch in as many parts as it takes to run few enough tokens at once."""
        if self.speed.microbatch_tokens is None or not torch.is_grad_enabled():
            return [batch]
        device = batch["labels"].device.type
        if self._tokens_at_once == "auto":
            self._tokens_at_once = default_microbatch_tokens(self.model, device)
        if self._tokens_at_once is None:
            return [batch]
        if is_packed_batch(batch):
            batch = {**batch, "shared_lengths": torch.tensor(self._shared_lengths(batch))}
        parts = microbatches(batch, self._tokens_at_once, self._num_shared(batch))
        return parts if len(parts) == 1 or self.support.parts(device) else [batch]


def _supervised(batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Rows and columns (N,) of the positions whose next token is a label."""
    rows_N, columns_N = (batch["labels"][:, 1:] != IGNORE_INDEX).nonzero(as_tuple=True)
    if not len(rows_N):
        raise ValueError(
            f"a batch of {num_rows(batch)} rows has no token that carries loss: all labels "
            f"after the first column are {IGNORE_INDEX}. Give every row a response."
        )
    return rows_N, columns_N


def _num_supervised(batch: dict[str, Any]) -> int:
    return int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())


def _padded(batch: dict[str, Any], num_columns: int) -> dict[str, Any]:
    """A batch with more columns of padding on the left."""
    fillers = {"input_ids": 0, "attention_mask": 0, "position_ids": 0, "labels": IGNORE_INDEX}
    more = {name: F.pad(batch[name], (num_columns, 0), value=v) for name, v in fillers.items()}
    return {**batch, **more}


def _filled_up(positions_N: Tensor, labels_N: Tensor, ids_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Positions and labels with positions without loss behind them, so that their number is round.

    As many as there are.
    """
    free = torch.ones(ids_BT.numel(), dtype=torch.bool, device=ids_BT.device)
    free[positions_N] = False
    count = min(-len(positions_N) % POSITIONS_STEP, len(free) - len(positions_N))
    # Not by nonzero, whose number fake tensors do not know.
    others = free.int().argsort(descending=True, stable=True)[:count]
    ignored = torch.full_like(others, IGNORE_INDEX)
    return torch.cat([positions_N, others]), torch.cat([labels_N, ignored])


def cross_entropy_sum(logits_NV: Tensor, labels_N: Tensor) -> Tensor:
    """Summed cross-entropy in nats, in float32 or float64."""
    dtype = torch.promote_types(logits_NV.dtype, torch.float32)
    return F.cross_entropy(logits_NV.to(dtype), labels_N, reduction="sum")
