from __future__ import annotations

import logging

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor

from rosa_lightning.models.meta import fake_tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_rows_are_multiplied_with_their_experts_and_back_in_any_dtype(dtype):
    with fake_tensors():
        # Widths that the kernels of GPUs refuse.
        rows_ND = torch.empty(10, 6, dtype=dtype, requires_grad=True)
        experts_EFD = torch.empty(4, 7, 6, dtype=dtype)
        offsets_E = torch.empty(4, dtype=torch.int32)
        out_NF = torch.nn.functional.grouped_mm(rows_ND, experts_EFD.mT, offs=offsets_E)
        out_NF.sum().backward()
    assert isinstance(out_NF, FakeTensor)
    assert (out_NF.shape, out_NF.dtype) == ((10, 7), dtype)
    assert (rows_ND.grad.shape, rows_ND.grad.dtype) == ((10, 6), dtype)


def test_errors_are_raised_and_not_logged(caplog, capsys):
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    logger.addHandler(caplog.handler)

    def fail() -> None:
        with fake_tensors():
            torch.empty(2, 3) @ torch.empty(2, 3)

    try:
        with pytest.raises(RuntimeError):
            fail()
        assert not caplog.records
        assert capsys.readouterr().err == ""
        logger.error("as before")
    finally:
        logger.removeHandler(caplog.handler)
    assert [record.message for record in caplog.records] == ["as before"]
