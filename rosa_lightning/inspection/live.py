"""The bytes of tensors that are alive while code runs."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of all storages that are alive, and apart those that the head made.

    Args:
        tensors: What is alive from the start.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self.at_head = False
        self.now_of_head = self.peak_of_head = 0
        self.known: set[int] = set()
        for tensor in tensors:
            self.add(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute, and count what is new."""
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, Tensor):
                self.add(value)
        return out

    def add(self, tensor: Tensor) -> None:
        """Count a tensor's storage until it is freed, unless it is counted already."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return
        self.known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        if self.at_head:
            self.now_of_head += size
            self.peak_of_head = max(self.peak_of_head, self.now_of_head)
        weakref.finalize(storage, self._forget, key, size, self.at_head)

    def _forget(self, key: int, size: int, of_head: bool) -> None:
        self.known.discard(key)
        self.now -= size
        self.now_of_head -= size * of_head
