"""Torch's fake tensors, with a product that they lack and without what they log."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._subclasses import fake_tensor
from torch.utils._python_dispatch import TorchDispatchMode


@contextmanager
def fake_tensors() -> Iterator[None]:
    """Compute shapes and data types alone; new tensors hold no numbers."""
    # It logs a traceback of every error, which whoever catches the error has no use for.
    logger = logging.getLogger(fake_tensor.__name__)
    disabled, logger.disabled = logger.disabled, True
    try:
        products = _GroupedProducts()  # type: ignore[no-untyped-call]
        with fake_tensor.FakeTensorMode(), products:
            yield
    finally:
        logger.disabled = disabled


class _GroupedProducts(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The product of rows with the experts that they go to, in any data type and width.

    Torch's fake one is for bfloat16 on one kind of GPU.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute, or make an empty result of the product's shape."""
        if func.overloadpacket == torch.ops.aten._grouped_mm:
            rows_ND, experts_EDF = args[:2]
            if (rows_ND.ndim, experts_EDF.ndim) == (2, 3):
                return rows_ND.new_empty(rows_ND.shape[0], experts_EDF.shape[2])
        return func(*args, **(kwargs or {}))
