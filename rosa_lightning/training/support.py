"""What a model and the settings allow a training step to leave out or to compute once.

Each lever is tried on the model when it is first needed; where it would change loss or gradients,
the log says once why, and what is done instead.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

from rosa_lightning.data.collators import is_packed_batch
from rosa_lightning.training import head, pack_attention, prompts, shared_prefix
from rosa_lightning.training.packing import check_can_pack
from rosa_lightning.training.probes import tried
from rosa_lightning.training.recompute import has_gradient_hooks, is_reentrant
from rosa_lightning.training.speed import SpeedConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SHARDED = "the ranks that share a model in shards must all run it equally often"


class Support:
    """The levers that a model supports."""

    def __init__(self, model: PreTrainedModel, speed: SpeedConfig) -> None:
        self._model, self._speed = model, speed
        self.sharded = any(
            isinstance(module, FSDPModule | FullyShardedDataParallel) for module in model.modules()
        )
        self.block: nn.Module | None = None
        """Runs at supervised positions alone, as the head does; known once `head` was asked."""
        self._reasons: dict[str, str] = {}
        """Why something cannot be done, by what; empty where it can."""
        self._window: int | None = None

    def assume(self, ids_BT: Tensor) -> None:
        """Take levers to be right, as for fake tensors, which cannot be compared.

        ValueError where prompts without gradients are asked for and impossible.
        """
        cuts = not self._speed.prompt_gradients
        if cuts and (reason := shared_prefix.cache_reason(self._model, training=True)):
            raise _prompts_refused(reason)
        narrow = head.decoder_of(self._model) is not self._model
        self._reasons["head"] = "" if narrow else "no decoder"
        self.block = head.last_block(self._model, ids_BT, compare=False) if narrow else None

    def head(self, batch: dict[str, Any]) -> bool:
        """Whether the head runs at supervised positions alone."""
        if not self._speed.supervised_only:
            return False
        if "head" not in self._reasons:
            reason = self._tried(self._look_at_head, batch["input_ids"])
            instead = "logits are computed at the last columns of all rows"
            if isinstance(self._speed.loss_chunk, int):
                instead += ", all at once in spite of model.speed.loss_chunk"
            self._note("head", reason, instead)
        return not self._reasons["head"]

    def shared_prefix(self, batch: dict[str, Any]) -> bool:
        """Whether what all padded rows begin with is computed once."""
        training = self._model.training
        mode = "training" if training else "evaluation"
        if mode not in self._reasons:
            longest_T = batch["input_ids"][batch["position_ids"][:, -1].argmax()]
            reason = self._tried(shared_prefix.unsupported_reason, longest_T, training=training)
            self._read_window()
            self._note(mode, reason, f"in {mode} the shared prefix is computed for each row")
        if self._reasons[mode]:
            return False
        width = batch["input_ids"].shape[1]
        if self._window is not None and width > self._window:
            self._note(
                "window",
                f"a window of {self._window} tokens is shorter than a batch of {width} columns",
                "the shared prefix of such batches is computed for each row",
            )
            return False
        return True

    def rows_of_pack(self, batch: dict[str, Any]) -> bool:
        """Whether a pack is run row by row."""
        training = self._model.training
        what = "packed training" if training else "packed evaluation"
        instead = "packed rows are not run one by one"
        if what not in self._reasons:
            check_can_pack(self._model)
            torch.clear_autocast_cache()
            reason = self._tried(pack_attention.unsupported_reason, training=training)
            self._read_window()
            self._note(what, reason, instead)
        longest = int(batch["row_lengths"].max())
        if self._window is not None and longest > self._window:
            reason = f"a window of {self._window} tokens is shorter than a row of {longest}"
            self._note("packed window", reason, instead)
            return False
        return not self._reasons[what]

    def beginnings_in_pack(self, batch: dict[str, Any]) -> bool:
        """Whether what rows of a pack begin with in common is run once."""
        if self._model.training:
            if "packed prefix" not in self._reasons:
                reason = shared_prefix.random_part(self._model)
                self._note("packed prefix", reason, "what packed rows share is run for each")
            if self._reasons["packed prefix"]:
                return False
        return self.rows_of_pack(batch)

    def check_prompts(self, batch: dict[str, Any]) -> None:
        """Raise ValueError where prompts cannot be run apart."""
        if "prompts" not in self._reasons:
            reason = "packed rows stand in one row" if is_packed_batch(batch) else ""
            self._reasons["prompts"] = reason or self._tried(prompts.unsupported_reason)
            self._read_window()
        if reason := self._reasons["prompts"]:
            raise _prompts_refused(reason)

    def holds(self, num_columns: int) -> bool:
        """Whether so many columns are within an attention window, and what the model was made for.

        A window counts columns, those between a short row and what rows share among them.
        """
        positions = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        return all(most is None or num_columns <= most for most in (self._window, positions))

    def check_window(self, num_columns: int) -> None:
        """Raise ValueError for prompts and responses that an attention window does not hold."""
        if self._window is not None and num_columns > self._window:
            raise _prompts_refused(
                f"a window of {self._window} tokens is shorter than the {num_columns} columns of a "
                "batch's prompts and responses"
            )

    def parts(self, device: str) -> bool:
        """Whether a batch is taken in parts, each with a backward pass."""
        reason = _SHARDED if self.sharded else self.later_backward_reason(device)
        if not reason and any(is_reentrant(module) for module in self._model.modules()):
            reason = "reentrant checkpointing has but one backward pass"
        if reason:
            self._note(reason, reason, "batches are run whole")
        return not reason

    def later_backward_reason(self, device: str) -> str:
        """Why no gradient may be taken before the backward pass; empty if it may."""
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        if autocast == torch.float16:
            return (
                "16-mixed scales the loss for a backward pass that comes later (set "
                "trainer.precision to bf16-mixed for parts)"
            )
        if has_gradient_hooks(self._model):
            return "hooks on parameters would see gradients of parts"
        return ""

    def _tried(self, unsupported_reason: Callable[..., str], *args: Any, **kwargs: Any) -> str:
        if self.sharded:
            return _SHARDED
        reason = tried(self._model, partial(unsupported_reason, self._model, *args, **kwargs))
        torch.clear_autocast_cache()  # of weights cast without a graph
        return reason

    def _look_at_head(self, model: PreTrainedModel, ids_BT: Tensor) -> str:
        reason = head.unsupported_reason(model, ids_BT)
        self.block = None if reason else head.last_block(model, ids_BT)
        return reason

    def _read_window(self) -> None:
        if not self.sharded:
            self._window = shared_prefix.attention_window(self._model)

    def _note(self, what: str, reason: str, instead: str) -> None:
        if reason and what not in self._reasons:
            rank_zero_info(f"{instead}: {reason}.")
        self._reasons.setdefault(what, reason)


def _prompts_refused(reason: str) -> ValueError:
    return ValueError(
        f"model.speed.prompt_gradients=false cannot be kept: {reason}. "
        "Set model.speed.prompt_gradients: true."
    )
