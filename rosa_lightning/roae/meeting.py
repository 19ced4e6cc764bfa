"""The moment queries and keys meet, wherever a model lets them.

Nearly all models hand their states to the attention interface of `transformers`. The others
multiply queries with keys by hand; a torch function mode sees that product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

Meet = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]
"""Takes an attention module and its states, (N, heads, T, dims) each; returns its output."""

_PROBE = "rosa_probe"
_MATMULS = (
    *(torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm),
    *(torch.baddbmm, Tensor.baddbmm),
)


@contextmanager
def at_interface(module: nn.Module, meet: Meet) -> Iterator[None]:
    """Let every attention module inside hand its states to ``meet`` instead of a kernel."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    def probe(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        return meet(module, query, key, value), query.new_zeros(*query.shape[:3], key.shape[2])

    AttentionInterface.register(_PROBE, probe)
    AttentionMaskInterface.register(_PROBE, eager_mask)
    before = [(config, config._attn_implementation) for config in _configs(module)]
    for config, _ in before:
        config._attn_implementation = _PROBE
    try:
        yield
    finally:
        # The setter reaches down into sub-configs, which stand later in the list.
        for config, value in before:
            config._attn_implementation = value


@contextmanager
def watched_interface(see: Callable[[Tensor, Tensor], None]) -> Iterator[None]:
    """Show queries and keys on their way to any attention kernel, and let it attend as ever."""
    from transformers import AttentionInterface

    find = AttentionInterface.get_interface

    def get_interface(self: Any, *args: Any, **kwargs: Any) -> Any:
        attend = find(self, *args, **kwargs)

        def watched(module: nn.Module, query: Tensor, key: Tensor, *rest: Any, **more: Any) -> Any:
            see(query, key)
            return attend(module, query, key, *rest, **more)

        return watched

    with patch.object(AttentionInterface, "get_interface", get_interface):
        yield


def _configs(module: nn.Module) -> list[Any]:
    """All configurations held inside a module that name an attention kernel, outer ones first."""
    waiting = [part.config for part in module.modules() if hasattr(part, "config")]
    found: list[Any] = []
    while waiting:
        config = waiting.pop(0)
        if hasattr(config, "_attn_implementation") and not any(config is one for one in found):
            found.append(config)
            names = getattr(config, "sub_configs", {})
            waiting += [getattr(config, name) for name in names if hasattr(config, name)]
    return found


class ByHand(TorchFunctionMode):
    """Sees the tokens' queries meet keys, and their scores meet values, in plain products.

    Args:
        on_scores: Called with queries and keys.
        on_values: Called with values, which follow the scores.
        num_tokens: T. Where it is the size of a head as well, scores and values look alike, and
            ``on_scores`` is called for both.
    """

    def __init__(
        self,
        on_scores: Callable[[Tensor, Tensor], None],
        on_values: Callable[[Tensor], None],
        num_tokens: int = 2,
    ) -> None:
        super().__init__()
        self.on_scores, self.on_values, self.num_tokens = on_scores, on_values, num_tokens

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Look at the operands of a product, then compute it."""
        tensors = [one for one in (*args, *(kwargs or {}).values()) if isinstance(one, Tensor)]
        if func is F.scaled_dot_product_attention:
            self.on_scores(tensors[0], tensors[1])
            self.on_values(tensors[2])
        elif func in _MATMULS and len(tensors) >= 2:
            # The last two: the first of baddbmm's three is what the product is added to.
            self._look(*tensors[-2:])
        return func(*args, **(kwargs or {}))

    def _look(self, left: Tensor, right: Tensor) -> None:
        """Scores are (..., T, D) times (..., D, T); then come (..., T, T) times values."""
        num_tokens = self.num_tokens
        outer = zip(left.shape[:-2], right.shape[:-2], strict=False)
        if left.ndim < 3 or left.ndim != right.ndim or any(a != b and b != 1 for a, b in outer):
            return
        if left.shape[-2] == right.shape[-1] == num_tokens:
            self.on_scores(left, right.transpose(-1, -2))
        elif left.shape[-2:] == (num_tokens, num_tokens):
            self.on_values(right)
