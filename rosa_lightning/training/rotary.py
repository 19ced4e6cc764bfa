"""The rotation of queries and keys (RoPE) in a few passes over memory.

Models of `transformers` rotate by a function of their file, ``apply_rotary_pos_emb``, which makes
some ten tensors. Whether it computes the usual rotation of halves is tried on the function itself.

Axes: B rows, H heads, T tokens, D head width.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rosa_lightning.utils.modules import replaced

_NAME = "apply_rotary_pos_emb"


def rotating_files(model: nn.Module) -> list[tuple[Any, bool]]:
    """The Python modules of a model's code that rotate queries and keys as `_Rotate` does.

    And whether what they return has the dtype of queries and keys even where that is narrower than
    that of sines and cosines.
    """
    files = {type(module).__module__: None for module in model.modules()}
    found = [sys.modules.get(name) for name in files]
    named: list[tuple[Any, Any]] = [(file, getattr(file, _NAME, None)) for file in found]
    return [(file, _keeps_dtype(own)) for file, own in named if _is_usual(own)]


@contextmanager
def fast_rotation(files: Sequence[tuple[Any, bool]]) -> Iterator[None]:
    """Within it, models rotate in few passes by what `rotating_files` found."""
    with ExitStack() as stack:
        for file, keeps in files:
            own = getattr(file, _NAME)
            stack.enter_context(replaced(file, _NAME, partial(_rotated, own, keeps)))
        yield


def _rotated(own: Callable[..., Any], keeps: bool, *args: Any, **kwargs: Any) -> Any:
    """Queries and keys (B, H, T, D) by cosines and sines (B, T, D); others by the file's own."""
    tensors = args[:4]
    usual = len(args) == 4 and not kwargs and all(isinstance(one, Tensor) for one in tensors)
    if not usual or not _fits(*tensors):
        return own(*args, **kwargs)
    query, key, cos, sin = tensors
    cos, sin = cos[:, None], sin[:, None]
    # Products of attention read no more than that under autocast.
    keeps = keeps or torch.is_autocast_enabled(query.device.type)
    return tuple(_Rotate.apply(x, cos, sin, keeps) for x in (query, key))  # type: ignore[no-untyped-call]


def _fits(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether whole heads are rotated, by numbers that take no gradient."""
    shape = query.shape[2:]
    four = query.ndim == key.ndim == 4 and cos.ndim == 3 and key.shape[2:] == shape
    fixed = not (cos.requires_grad or sin.requires_grad)
    return four and fixed and cos.shape[1:] == sin.shape[1:] == shape and shape[-1] % 2 == 0


@torch.no_grad()
def _is_usual(own: Any) -> bool:
    """Whether a function rotates the halves of a head against each other."""
    if not callable(own):
        return False
    given = _sample(torch.float32)
    try:
        wanted, found = own(*given), _rotated(own, False, *given)
    except Exception:  # it takes something else
        return False
    return all(torch.allclose(*pair) for pair in zip(found, wanted, strict=True))


@torch.no_grad()
def _keeps_dtype(own: Callable[..., Any]) -> bool:
    return bool(own(*_sample(torch.bfloat16))[0].dtype == torch.bfloat16)


def _sample(dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Queries and keys of a dtype, and cosines and sines in float32."""
    numbers = torch.arange(1.0, 1 + 2 * 3 * 8).sin().view(1, 2, 3, 8)
    return numbers.to(dtype), numbers.flip(-1).to(dtype), numbers[:, 0].cos(), numbers[:, 1].sin()


class _Rotate(torch.autograd.Function):
    """``x * cos + rotate_half(x) * sin``, with one rounding at the end."""

    @staticmethod
    def forward(ctx: Any, x_BHTD: Tensor, cos: Tensor, sin: Tensor, keeps: bool) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.dtype = x_BHTD.dtype
        out = _turned(x_BHTD, cos, sin)
        return out.to(ctx.dtype, memory_format=torch.contiguous_format) if keeps else out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors
        # The transposed rotation, in the order (B, T, H, D) in which projections write.
        turned = _turned(grad, cos, -sin.roll(sin.shape[-1] // 2, -1))
        back = turned.transpose(1, 2).to(ctx.dtype, memory_format=torch.contiguous_format)
        return back.transpose(1, 2), None, None, None


def _turned(x_BHTD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x_BHTD.shape[-1] // 2
    wide = x_BHTD.to(torch.promote_types(x_BHTD.dtype, cos.dtype))
    out = wide * cos
    out[..., :half].addcmul_(wide[..., half:], sin[..., :half], value=-1)
    out[..., half:].addcmul_(wide[..., :half], sin[..., half:])
    return out
