"""Settings that make a training step faster or smaller."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

NumTokens = int | Literal["auto"] | None

BUILT_LEVERS = ("gradient_checkpointing", "compile")
"""Levers that a model is built with."""


@dataclass(frozen=True, kw_only=True)
class SpeedConfig:
    """What a training step does to be fast or to fit.

    Loss and gradients stay those of the batch, but for ``prompt_gradients: false``.

    Args:
        share_prefix: Compute once what all rows of a batch begin with, such as an instruction
            template, and in a packed row what neighbouring rows do, where loss and gradients stay
            as they are; where not, the log says why.
        loss_chunk: Response tokens of a batch whose logits are held at once (chunked
            cross-entropy, whose gradients are taken in the forward pass); null is all. ``auto`` is
            chunks of up to 128 MiB of logits in float32, and all under 16-mixed, with hooks on
            parameters and where the head cannot run at tokens with loss alone.
        microbatch_tokens: Tokens of a batch, padding included, that run forward and backward at
            once; a larger batch is taken in parts, in one step and with its own gradients.
            ``auto`` is 2048 on a CPU and for bases from 2e9 weights on, else all; null is all. All,
            too, where the model is in shards, under 16-mixed and with hooks on parameters.
        recompute_activations: Compute the outputs of activation functions and norms again in the
            backward pass and hold the rest; gradients stay bit for bit. No effect with
            ``gradient_checkpointing`` and ``compile``.
        gradient_checkpointing: Compute all activations again in the backward pass instead of
            keeping them: less memory, more time.
        supervised_only: Run the head and the last feed-forward block at tokens with loss alone,
            where that is exact; false computes the logits of all tokens, as other trainers do.
        compile: Compile the decoder layers, one by one, for training on one device or under DDP.
        prompt_gradients: Take gradients through the tokens before a row's first label, too; false
            runs them without a graph. The loss stays as it is and its gradient is approximate, as
            in TokenTune (Simoulin et al., 2024): less time and memory, the more so the longer the
            prompts. Not for packed rows, models in shards, ``compile`` and
            ``gradient_checkpointing``.

    Raises:
        ValueError: A number below 1, or settings that do not go together.
    """

    share_prefix: bool = True
    loss_chunk: NumTokens = "auto"
    microbatch_tokens: NumTokens = "auto"
    recompute_activations: bool = True
    gradient_checkpointing: bool = False
    supervised_only: bool = True
    compile: bool = False
    prompt_gradients: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.loss_chunk, int) and not self.supervised_only:
            raise ValueError(
                "loss_chunk has no effect without supervised_only. Set model.speed.loss_chunk to "
                "null, or model.speed.supervised_only to true."
            )
        if not self.prompt_gradients and (found := [n for n in BUILT_LEVERS if getattr(self, n)]):
            raise ValueError(
                f"prompt_gradients=false and {found[0]}=true do not go together. Set "
                f"model.speed.{found[0]}: false, or model.speed.prompt_gradients: true."
            )
        for name in ("loss_chunk", "microbatch_tokens"):
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
            if value is not None and not whole and value != "auto":
                raise ValueError(
                    f"{name}={value!r} is not a whole number of at least 1. Set model.speed.{name} "
                    "to a number of tokens, auto, or null for no limit."
                )


def check_batching(speed: SpeedConfig, batching: str) -> None:
    """Refuse, before a model is loaded, what cannot be done with the batches of a data module."""
    if not speed.prompt_gradients and batching in ("packed", "best_fit"):
        raise ValueError(
            f"prompt_gradients=false cannot be kept with batching={batching}: packed rows stand in "
            "one row. Set data.batching: length, or model.speed.prompt_gradients: true."
        )
