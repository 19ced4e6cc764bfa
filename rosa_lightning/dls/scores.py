"""Scores of layers: from the gradients of their norm weights to numbers that can be compared.

Pure torch, no trainer. Scores are 1-D float64 tensors, one entry per layer.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

Normalization = Literal["none", "sqrt_size", "running_mean"]


def layer_scores(gradients: Sequence[Sequence[Tensor | None]], scale: float = 1.0) -> Tensor:
    """L2 norm over each layer's gradients, shape (num_layers,), float64 on the CPU.

    Args:
        gradients: For each layer the gradients of its norm weights; None counts as zero.
        scale: The loss scale contained in the gradients; scores are divided by it.
    """
    norms: list[Tensor] = []
    for layer in gradients:
        parts = [_norm(gradient) for gradient in layer if gradient is not None]
        norms.append(_norm(torch.stack(parts)) if parts else torch.zeros(()))
    # Gathered on the first gradient's device, so that the whole model costs one transfer.
    device = next((norm.device for norm in norms if norm.device.type != "cpu"), None)
    return torch.stack([norm.to(device) for norm in norms]).cpu().double() / scale


def _norm(gradient: Tensor) -> Tensor:
    # Apple's GPUs have no float64.
    dtype = torch.float32 if gradient.device.type == "mps" else torch.float64
    norm: Tensor = torch.linalg.vector_norm(gradient.detach(), dtype=dtype)
    return norm


class ScoreHistory:
    """Smooths scores over selections, then makes those of different layers comparable.

    At selection t, with scores s_1 to s_t of a layer and smoothing b:

    - smoothed: the mean of s_1 to s_t with weights b**(t - i), which is an exponential moving
      average with its bias corrected; b = 0 is s_t itself;
    - `none` leaves that; `sqrt_size` divides it by the square root of the number of the layer's
      norm weights; `running_mean` divides it by the plain mean of s_1 to s_t, so that a layer
      whose gradients have always been large counts only when they are larger than it is used to.
      The first selection has nothing to compare with: there `running_mean` is `none`.
    """

    def __init__(
        self, smoothing: float, normalization: Normalization, num_weights: Sequence[int]
    ) -> None:
        """Start without any score.

        Args:
            smoothing: Weight of the past, in [0, 1).
            normalization: What scores are divided by.
            num_weights: How many norm weights each layer has.
        """
        self._smoothing = smoothing
        self._normalization = normalization
        self._num_weights = tuple(num_weights)
        self._recent = _DecayingMean(smoothing, len(num_weights))
        self._ever = _DecayingMean(1.0, len(num_weights))

    def update(self, scores: Tensor) -> Tensor:
        """Take the scores of one more selection and return what to choose by, same shape."""
        values: list[float] = scores.tolist()
        smoothed, usual = self._recent.update(values), self._ever.update(values)
        if self._normalization == "sqrt_size":
            units = [math.sqrt(count) for count in self._num_weights]
        elif self._normalization == "running_mean" and self._ever.weight > 1:
            units = usual
        else:
            return torch.tensor(smoothed, dtype=torch.float64)
        # A layer whose scores were all zero has no unit, and stays at zero.
        divided = [
            value / unit if unit > 0 else 0.0 for value, unit in zip(smoothed, units, strict=True)
        ]
        return torch.tensor(divided, dtype=torch.float64)

    def state_dict(self) -> dict[str, Any]:
        """The sums so far, as plain numbers."""
        return {"recent": self._recent.state_dict(), "ever": self._ever.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from such sums."""
        self._recent.load_state_dict(state_dict["recent"])
        self._ever.load_state_dict(state_dict["ever"])


class _DecayingMean:
    """The mean of all lists so far, each weighing `decay` times the one after it."""

    def __init__(self, decay: float, length: int) -> None:
        self.decay = decay
        self.weight = 0.0
        self.sums = [0.0] * length

    def update(self, values: Sequence[float]) -> list[float]:
        self.weight = self.decay * self.weight + 1
        self.sums = [
            self.decay * total + value for total, value in zip(self.sums, values, strict=True)
        ]
        return [total / self.weight for total in self.sums]

    def state_dict(self) -> dict[str, Any]:
        return {"weight": self.weight, "sums": list(self.sums)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.weight = state_dict["weight"]
        self.sums = list(state_dict["sums"])
