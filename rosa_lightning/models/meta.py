"""Run models without their weights: on the meta device, or with fake tensors.

Uses `torch._subclasses.fake_tensor`, `torch.utils._python_dispatch` and `_pytree` (torch 2.13).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import fake_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

_aten = torch.ops.aten
_PRODUCTS = {
    *(_aten.mm, _aten.addmm, _aten.mv, _aten.addmv, _aten.bmm, _aten.baddbmm, _aten._grouped_mm),
    *(_aten.convolution, _aten.embedding),
}
_COPIES = {_aten._to_copy, _aten.clone, _aten.index, _aten.index_select}


@contextmanager
def replaced_tensors(model: nn.Module, replace: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Exchange a model's parameters and buffers for others, and put them back at the end.

    `replace` is called once for a tensor that several modules share; it makes a parameter of a
    parameter.
    """
    held = [
        (module, name, tensor)
        for module in model.modules()
        for tensors in (module.named_parameters, module.named_buffers)
        for name, tensor in tensors(recurse=False, remove_duplicate=False)
    ]
    made: dict[int, Tensor] = {}
    try:
        for module, name, tensor in held:
            if id(tensor) not in made:
                made[id(tensor)] = replace(tensor)
            setattr(module, name, made[id(tensor)])
        yield
    finally:
        for module, name, tensor in held:
            setattr(module, name, tensor)


@contextmanager
def run_on_meta(model: nn.Module) -> Iterator[None]:
    """Let a model whose parameters are on the meta device run on the CPU, without gradients.

    Each such parameter becomes one number expanded to its shape, which takes no memory. Products
    with it are random numbers, so no two outputs of a projection are alike; other operations are
    computed. Models that have their weights run as they are.

    Raises:
        ValueError: A buffer, such as rotary frequencies, is on the meta device.
    """
    if not any(parameter.is_meta for parameter in model.parameters()):
        yield
        return
    lost = next((name for name, buffer in model.named_buffers() if buffer.is_meta), None)
    if lost is not None:
        raise ValueError(
            f"{type(model).__name__}: buffer {lost} is on the meta device, so its rotation cannot "
            "be read. Make the model with load_skeleton, which computes its buffers."
        )
    mode = _RandomProducts()
    with replaced_tensors(model, mode.parameter), mode:
        yield


class _RandomProducts(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Replaces meta parameters, and answers products with them by random numbers."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.generator = torch.Generator().manual_seed(0)
        self.numbers: dict[torch.dtype, Tensor] = {}

    def parameter(self, tensor: Tensor) -> Tensor:
        return nn.Parameter(self.like(tensor), requires_grad=False) if tensor.is_meta else tensor

    def like(self, tensor: Tensor) -> Tensor:
        """One number, the same for all replacements of a data type, expanded."""
        one = self.numbers.setdefault(tensor.dtype, torch.ones((), dtype=tensor.dtype))
        return one.expand(tensor.shape)

    def is_replacement(self, tensor: Tensor) -> bool:
        one = self.numbers.get(tensor.dtype)
        return one is not None and (
            tensor.untyped_storage().data_ptr() == one.untyped_storage().data_ptr()
        )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute, unless a replacement would have to be multiplied or copied."""
        kwargs = kwargs or {}
        kind = func.overloadpacket
        if kind not in _PRODUCTS | _COPIES:
            return func(*args, **kwargs)
        given = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        replacement = next((value for value in given if self.is_replacement(value)), None)
        if replacement is None:
            return func(*args, **kwargs)
        if kind in _COPIES:
            return self.like(func(*_to_meta(args), **_to_meta(kwargs)))
        # bfloat16, as some products are declared for nothing else.
        shape = func(*_to_meta(args, torch.bfloat16), **_to_meta(kwargs, torch.bfloat16)).shape
        return torch.empty(shape, dtype=replacement.dtype).normal_(generator=self.generator)


def _to_meta(values: Any, dtype: torch.dtype | None = None) -> Any:
    """Shapes alone; floating tensors in another dtype, if one is given."""
    return tree_map_only(
        Tensor, lambda t: t.to("meta", dtype if t.is_floating_point() else None), values
    )


@contextmanager
def fake_tensors() -> Iterator[None]:
    """Compute shapes and data types alone; new tensors hold no numbers."""
    # It logs a traceback of every error, also of those that are handled.
    logger = logging.getLogger(fake_tensor.__name__)
    disabled, logger.disabled = logger.disabled, True
    try:
        products = _GroupedProducts()  # type: ignore[no-untyped-call]
        with fake_tensor.FakeTensorMode(), products:
            yield
    finally:
        logger.disabled = disabled


class _GroupedProducts(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Products of experts in any data type and width; torch's fake ones are for few."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute, or make an empty result of the product's shape."""
        if func.overloadpacket == torch.ops.aten._grouped_mm:
            rows_ND, experts_EDF = args[:2]
            if (rows_ND.ndim, experts_EDF.ndim) == (2, 3):
                return rows_ND.new_empty(rows_ND.shape[0], experts_EDF.shape[2])
        return func(*args, **(kwargs or {}))
