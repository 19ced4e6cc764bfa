"""Checks that a model keeps packed rows apart.

Models of `transformers` tell where rows begin from position ids that start again at 0, when they
get neither an attention mask nor a cache.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rosa_lightning.utils.modules import in_mode

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_LONG, _SHORT = 24, 8
"""Tokens of two probe rows; the long one would show in the short one after it."""
_BOUNDS = {2: (0.01, 0.1), 4: (1e-4, 0.01), 8: (1e-8, 1e-6)}
"""What is rounding, by the bytes of a logit and as a part of the largest: the difference that
another row in front makes, in products of the same shapes, and the difference to the row alone,
in others. Float32 stands for TF32 too."""


def check_can_pack(model: PreTrainedModel) -> None:
    """Check that a row after another has the logits that it has alone, whatever the other says.

    Raises:
        ValueError: The rows mix, as with recurrent layers or attention that does not read position
            ids, or the model cannot read them packed.
    """
    name = type(model).__name__
    tokens = torch.arange(_LONG + _SHORT, device=model.device)
    positions = torch.where(tokens < _LONG, tokens, tokens - _LONG)
    tokens = probe_ids(model, _LONG + _SHORT)
    others = torch.cat([tokens[:_LONG].flip(0), tokens[_LONG:]])
    with torch.no_grad(), in_mode(model, False):
        try:
            packed, elsewhere = (_logits(model, ids, positions)[_LONG:] for ids in (tokens, others))
        except (TypeError, ValueError, RuntimeError, IndexError) as error:
            raise ValueError(
                f"{name} cannot read packed rows ({type(error).__name__}: {error}). "
                "Set data.batching: length."
            ) from error
        alone = _logits(model, tokens[_LONG:], positions[_LONG:])
    seen, moved = ((packed - other).abs().max() for other in (elsewhere, alone))
    mixing, rounding = _BOUNDS[packed.dtype.itemsize]
    largest = alone.abs().max()
    if not (seen <= mixing * largest and moved <= rounding * largest):  # NaN too
        raise ValueError(
            f"{name} mixes packed rows: after another row a row's logits differ by "
            f"{(max(seen, moved) / largest).item():.2g} of the largest, as layers carry a state "
            "on or do not read position_ids. Set data.batching: length."
        )


def probe_ids(model: PreTrainedModel, count: int) -> Tensor:
    """Ids that are no special tokens of most models, as many differ as the vocabulary allows."""
    vocabulary: int = model.config.get_text_config().vocab_size
    return torch.arange(count, device=model.device) * 7 % (vocabulary - 3) + 3


def _logits(model: PreTrainedModel, ids_T: Tensor, positions_T: Tensor) -> Tensor:
    output = model(input_ids=ids_T[None], position_ids=positions_T[None], use_cache=False)
    logits: Tensor = output.logits[0]
    return logits
