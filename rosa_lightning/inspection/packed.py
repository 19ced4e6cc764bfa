"""A quantised base on paper: what its layers hold and keep, without weights and their library.

`estimate_memory` runs such a model as any other, so whatever is unpacked, kept and freed on the way
is in its figures.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rosa_lightning.models.quantization import Quantization
from rosa_lightning.roae.inject import base_modules
from rosa_lightning.roae.layer import RoAELinear

_BLOCK = 64
"""Values that share a scale in four bits, unless bitsandbytes is told otherwise."""
_BLOCK_OF_SCALES = 256
"""Scales that share a scale themselves."""


def pack_on_paper(model: nn.Module, scheme: Quantization) -> None:
    """Put a `PackedLinear` in the place of every layer that ``scheme`` quantises; in place.

    Args:
        model: A `transformers` language model on the meta device, with RoAE or without. It can be
            measured by `estimate_memory` afterwards, and computes nothing any more.
        scheme: As for `load_base`.

    Raises:
        ValueError: The model is quantised already, or its experts would be taken apart first.
    """
    from transformers.quantizers import base
    from transformers.quantizers.quantizers_utils import should_convert_module

    source: Any = model
    if getattr(source.config, "quantization_config", None) is not None:
        raise ValueError(
            f"the base is quantised already, so model.quantization={scheme} cannot be had. Take "
            "model.quantization out."
        )
    of_torchao = scheme == "int8"
    rebuilt = () if of_torchao else base.MODULES_TO_PATCH_FOR_QUANTIZATION
    for module in model.modules():
        if type(module).__name__ in rebuilt:
            raise ValueError(
                f"the memory of model.quantization={scheme} cannot be estimated, since "
                f"transformers makes other layers of {type(module).__name__}. Leave it out."
            )
    kept = base.HfQuantizer.get_modules_to_not_convert(source, None, source._keep_in_fp32_modules)
    names = {module: name for name, module in base_modules(model)}
    for path, module in list(model.named_modules()):
        # torchao takes subclasses, too, and speaks of weights.
        taken = isinstance(module, nn.Linear) if of_torchao else type(module) is nn.Linear
        suffix = ".weight" if of_torchao else ""
        if taken and should_convert_module(names[module] + suffix, kept):
            model.set_submodule(path, PackedLinear(cast(nn.Linear, module), scheme))
    for module in model.modules():
        if isinstance(module, RoAELinear) and isinstance(module.base, PackedLinear):
            module.copies_output = True


class PackedLinear(nn.Module):
    """A quantised linear layer of which only the sizes are true.

    It holds what the library's layer holds, and for the backward pass it keeps what that keeps:

    * ``int8`` (torchao): the weight in the input's dtype, which autograd sees in a product.
    * ``llm_int8`` (bitsandbytes): the input, though the weight is frozen. It does so beside
      autograd, so that gradient checkpointing does not drop it.
    * ``nf4``, ``fp4`` (bitsandbytes): nothing. The weight is unpacked a second time.

    Args:
        linear: The layer to quantise.
        scheme: How.
    """

    weight: Tensor
    scale: Tensor

    def __init__(self, linear: nn.Linear, scheme: Quantization) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.scheme = scheme
        self.bias = linear.bias
        for name, (shape, dtype) in self._storage().items():
            empty = torch.empty(shape, dtype=dtype, device=linear.weight.device)
            self.register_buffer(name, empty)

    def _storage(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shapes and data types of what is stored."""
        shape = self.out_features, self.in_features
        if self.scheme == "int8":
            column = self.out_features, 1
            return {
                "weight": (shape, torch.int8),
                "scale": (column, torch.float32),
                "zero_point": (column, torch.int8),
            }
        if self.scheme == "llm_int8":
            return {
                "weight": (shape, torch.int8),
                "scale": ((self.out_features,), torch.float32),
            }
        num_blocks = -(-shape[0] * shape[1] // _BLOCK)
        num_scales = -(-num_blocks // _BLOCK_OF_SCALES)
        return {
            "weight": ((-(-shape[0] * shape[1] // 2), 1), torch.uint8),
            "code": ((16,), torch.float32),  # what the 16 values of four bits stand for
            "scale": ((num_blocks,), torch.uint8),
            "scale_of_scales": ((num_scales,), torch.float32),
            "mean_of_scales": ((), torch.float32),
        }

    def forward(self, x: Tensor) -> Tensor:
        """Shapes (..., D) to (..., rows)."""
        return self._by_cast(x) if self.scheme == "int8" else self._by_unpacking(x)

    def _by_cast(self, x: Tensor) -> Tensor:
        """As torchao does it where a row has one scale."""
        product = torch.mm(x.reshape(-1, self.in_features), self.weight.t().to(x.dtype))
        z = product * self.scale.to(product.dtype).flatten()
        z = z.reshape(*x.shape[:-1], self.out_features)
        if self.bias is not None:
            z += self.bias
        return z.to(x.dtype)

    def _by_unpacking(self, x: Tensor) -> Tensor:
        """As bitsandbytes does it; its kernels for four bits heed no autocast."""
        eight_bits = self.scheme == "llm_int8"
        autocast = eight_bits and torch.is_autocast_enabled(x.device.type)
        with torch.autocast(x.device.type, enabled=autocast):
            z: Tensor = _Product.apply(  # type: ignore[no-untyped-call]
                x, self.out_features, eight_bits
            )
        return z if self.bias is None else z + self.bias


class _Product(torch.autograd.Function):
    """A product with a weight that is unpacked in both passes, as in bitsandbytes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, out_features: int, keep_input: bool) -> Tensor:
        """(..., D) to (..., rows)."""
        ctx.kept = x if keep_input else None
        ctx.shape, ctx.dtype = (out_features, x.shape[-1]), x.dtype
        return F.linear(x, x.new_empty(ctx.shape))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """(..., rows) to (..., D)."""
        (gradient,) = gradients
        gradient = gradient.to(ctx.dtype)
        return gradient @ gradient.new_empty(ctx.shape), None, None
