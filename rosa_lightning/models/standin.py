"""Stand-ins for weights that are not there, so that a model of any size can be run and measured.

A skeleton keeps its parameters on the meta device: shapes without numbers. What is measured of a
model (which rows become which head dimension, and how RoPE turns them) does not depend on its
weights, so any numbers will do, as long as no two outputs of a projection are alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
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
    """Put other tensors in place of a model's parameters and buffers, and put them back.

    Args:
        model: The model.
        replace: Makes the tensor to use from the one that is there. It is called once for a tensor
            that stands in several places.
    """
    places = [
        (held, name, tensor)
        for module in model.modules()
        for held in (module._parameters, module._buffers)
        for name, tensor in held.items()
        if tensor is not None
    ]
    made: dict[int, Tensor] = {}
    try:
        for held, name, tensor in places:
            if id(tensor) not in made:
                made[id(tensor)] = replace(tensor)
            held[name] = made[id(tensor)]  # type: ignore[assignment]
        yield
    finally:
        for held, name, tensor in places:
            held[name] = tensor  # type: ignore[assignment]


@contextmanager
def stand_ins(model: nn.Module) -> Iterator[None]:
    """Let a model whose parameters are on the meta device run, on the CPU and without gradients.

    Each such parameter becomes one number expanded to its shape, which takes no memory. Products
    with it are not computed: they give random numbers. Other parameters, and so models that have
    their weights, stay as they are.

    Raises:
        ValueError: A buffer is on the meta device. Rotary frequencies are kept in buffers.
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
    invented = _Invented()
    with replaced_tensors(model, invented.parameter), invented:
        yield


class _Invented(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Makes stand-ins and answers what is asked of them."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.generator = torch.Generator().manual_seed(0)
        self.numbers: dict[torch.dtype, Tensor] = {}

    def parameter(self, tensor: Tensor) -> Tensor:
        """A stand-in for a tensor on the meta device; any other as it is."""
        return nn.Parameter(self.like(tensor), requires_grad=False) if tensor.is_meta else tensor

    def like(self, tensor: Tensor) -> Tensor:
        """One number, the same for every stand-in of a data type, seen in the shape of a tensor."""
        one = self.numbers.setdefault(tensor.dtype, torch.ones((), dtype=tensor.dtype))
        return one.expand(tensor.shape)

    def is_stand_in(self, tensor: Tensor) -> bool:
        """Whether a tensor is a stand-in or a view of one."""
        one = self.numbers.get(tensor.dtype)
        return one is not None and tensor.untyped_storage()._cdata == one.untyped_storage()._cdata

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute, unless a stand-in would have to be multiplied or copied."""
        kwargs = kwargs or {}
        kind = func.overloadpacket
        if kind not in _PRODUCTS | _COPIES:
            return func(*args, **kwargs)
        given = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        invented = next((value for value in given if self.is_stand_in(value)), None)
        if invented is None:
            return func(*args, **kwargs)
        if kind in _COPIES:
            return self.like(func(*_to_meta(args), **_to_meta(kwargs)))
        # bfloat16, as some products are declared for nothing else.
        shape = func(*_to_meta(args, torch.bfloat16), **_to_meta(kwargs, torch.bfloat16)).shape
        return torch.empty(shape, dtype=invented.dtype).normal_(generator=self.generator)


def _to_meta(values: Any, dtype: torch.dtype | None = None) -> Any:
    """Shapes alone; floating tensors in another dtype, if one is given."""

    def to_meta(tensor: Tensor) -> Tensor:
        return tensor.to("meta", dtype if tensor.is_floating_point() else None)

    return tree_map_only(Tensor, to_meta, values)
