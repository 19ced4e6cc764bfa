"""RMSNorm in a few passes over memory, where a model's own takes some twenty.

Its formula (Zhang and Sennrich, 2019, arXiv 1910.07467) has a gradient that needs the input and one
number a row. Whether a norm of a model computes it is tried on the norm itself.

Axes: D features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rosa_lightning.utils.modules import replaced

_EPSILON = ("variance_epsilon", "eps", "epsilon")
"""Names under which norms keep what they add to the mean square."""


class RMSNorm:
    """What a frozen norm of a model computes: ``x / sqrt(mean(x^2) + eps) * (offset + weight)``."""

    def __init__(self, module: nn.Module, eps: float, offset: float) -> None:
        self.module, self.eps, self.offset = module, eps, offset
        self._own: Callable[..., Any] = module.forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The norm of one tensor of the weight's dtype; else what the module itself gives."""
        weight: Any = self.module.weight
        given = args[0] if len(args) == 1 and not kwargs else None
        if not isinstance(given, Tensor) or given.dtype != weight.dtype or weight.requires_grad:
            return self._own(*args, **kwargs)
        wide = torch.promote_types(given.dtype, torch.float32)
        # Without a copy where none is needed: kernels widen what they read.
        scale_D = weight.to(wide) + self.offset if self.offset else weight.detach()
        return _RMSNorm.apply(given, scale_D, self.eps, wide)  # type: ignore[no-untyped-call]


def rms_norms(model: nn.Module, *, compare: bool = True) -> list[RMSNorm]:
    """The norms of a model that compute this formula; by name, where nothing can be compared."""
    known = (_known(module, compare) for module in model.modules())
    return [norm for norm in known if norm is not None]


@contextmanager
def fast_norms(norms: Sequence[RMSNorm]) -> Iterator[None]:
    """Within it, these norms are computed in few passes."""
    with ExitStack() as stack:
        for norm in norms:
            stack.enter_context(replaced(norm.module, "forward", norm))
        yield


@torch.no_grad()
def _known(module: nn.Module, compare: bool) -> RMSNorm | None:
    """The formula that a module computes, if it holds no more than such a norm does."""
    weights, eps = dict(module.named_parameters()), _epsilon(module)
    if [*weights] != ["weight"] or weights["weight"].ndim != 1 or not isinstance(eps, float):
        return None
    weight = weights["weight"]
    if [*module.children(), *module.buffers()] or not weight.is_floating_point():
        return None
    if not compare:
        return RMSNorm(module, eps, 0.0) if "RMSNorm" in type(module).__name__ else None
    # So small that eps counts, and so large that it does not.
    sizes = weight.new_tensor([[1e-3], [1.0], [30.0]])
    numbers = torch.linspace(-1, 1, weight.numel(), device=weight.device).sin().to(weight.dtype)
    given = sizes * torch.stack([numbers, numbers.roll(1), 1 + numbers])
    try:
        wanted = module.forward(given)
    except Exception:  # it takes more than one tensor
        return None
    for offset in (0.0, 1.0):
        norm = RMSNorm(module, eps, offset)
        found = norm(given)
        if isinstance(wanted, Tensor) and wanted.dtype == found.dtype and _same(found, wanted):
            return norm
    return None


def _epsilon(module: nn.Module) -> Any:
    return next((vars(module)[name] for name in _EPSILON if name in vars(module)), None)


def _same(found: Tensor, wanted: Tensor) -> bool:
    """Whether each row is equal but for rounding, of which a model may have one more."""
    bound = 1e-5 if wanted.element_size() > 2 else 0.01
    found, wanted = found.double(), wanted.double()
    gaps, lengths = (found - wanted).norm(dim=-1), wanted.norm(dim=-1)
    return found.shape == wanted.shape and bool((gaps <= bound * lengths).all())


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale_D: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        wide = x.to(dtype)
        lengths = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        inverse = lengths.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, scale_D, inverse)
        scaled: Tensor = (wide * inverse).mul_(scale_D)
        return scaled.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        x, scale_D, inverse = ctx.saved_tensors
        wide, same = x.to(inverse.dtype), grad.dtype == inverse.dtype
        scaled = grad * scale_D if same else grad.to(inverse.dtype).mul_(scale_D)
        along = torch.linalg.vecdot(scaled, wide)[..., None] * inverse.pow(3).div_(-x.shape[-1])
        return scaled.mul_(inverse).addcmul_(wide, along).to(x.dtype), None, None, None
