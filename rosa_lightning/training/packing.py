"""Checks that a model keeps packed rows apart.

Models of `transformers` tell where rows begin from position ids that start again at 0, when they
get neither an attention mask nor a cache. N tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rosa_lightning.utils.modules import in_mode

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PROBE_ROWS = (24, 8)
"""Tokens of the rows that tell whether a model can be packed: a long one, which would show in the
short one behind it."""
_BOUNDS = {2: (0.01, 0.1), 4: (1e-4, 0.01), 8: (1e-8, 1e-6)}
"""What is rounding, by the bytes of a logit and as a part of the largest: the difference that
another row in front makes, in products of the same shapes, and the difference to the row alone,
in others. Float32 stands for TF32 too."""


def check_can_pack(model: PreTrainedModel, name: str) -> None:
    """Check that a row behind another has the logits that it has alone, whatever the other says.

    It has not with recurrent layers, nor with attention that does not look at position ids.

    Raises:
        ValueError: The rows mix, or the model, called `name`, cannot read them packed.
    """
    first, second = _PROBE_ROWS
    vocabulary = model.config.get_text_config().vocab_size
    tokens = torch.arange(first + second, device=model.device)
    positions = torch.where(tokens < first, tokens, tokens - first)
    tokens = tokens * 7 % (vocabulary - 3) + 3
    others = torch.cat([tokens[:first].flip(0), tokens[first:]])
    with torch.no_grad(), in_mode(model, False):
        try:
            packed, elsewhere = (
                _logits(model, some, positions)[first:] for some in (tokens, others)
            )
        except (TypeError, ValueError, RuntimeError, IndexError) as error:
            raise ValueError(
                f"{name} cannot read packed rows ({type(error).__name__}: {error}). "
                "Set data.batching: length."
            ) from error
        alone = _logits(model, tokens[first:], positions[first:])
    seen, moved = ((packed - other).abs().max() for other in (elsewhere, alone))
    mixing, rounding = _BOUNDS[packed.dtype.itemsize]
    largest = alone.abs().max()
    if not (seen <= mixing * largest and moved <= rounding * largest):  # NaN too
        raise ValueError(
            f"{name} mixes packed rows: behind another row a row's logits differ by "
            f"{(max(seen, moved) / largest).item():.2g} of the largest, as layers carry a state "
            "on or do not read position_ids. Set data.batching: length."
        )


def _logits(model: PreTrainedModel, tokens_N: Tensor, positions_N: Tensor) -> Tensor:
    output = model(input_ids=tokens_N[None], position_ids=positions_N[None], use_cache=False)
    logits: Tensor = output.logits[0]
    return logits
