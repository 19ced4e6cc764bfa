"""What a GPU must give as a CPU does: ``pytest -m gpu``.

The oracles are float64 on the CPU, and losses of an earlier version (`pinned/`). Each test runs on
the CPU, too, so that it is known to work before a GPU is at hand.
"""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities import move_data_to_device
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from rosa_lightning.data.collators import PackedCollator, TrainCollator
from rosa_lightning.evaluation.generation import generate
from rosa_lightning.evaluation.likelihood import log_likelihoods
from rosa_lightning.models import tiny
from rosa_lightning.models.loading import load_base, load_tokenizer
from rosa_lightning.training.compile import compile_layers
from rosa_lightning.training.loss import LossComputer
from rosa_lightning.training.speed import SpeedConfig
from tests.conftest import build
from tests.integration.test_pinned import PINNED, losses_of
from tests.training.test_loss import adapted, batch_of, gradients, single_rows
from tests.training.test_packing import examples

GPU = pytest.param(
    "cuda",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is at hand"),
        pytest.mark.filterwarnings("default"),  # libraries warn of what a CPU has not
    ],
)
devices = pytest.mark.parametrize("device", ["cpu", GPU])
long_on_cpu = pytest.mark.parametrize("device", [pytest.param("cpu", marks=pytest.mark.slow), GPU])

LEVERS: dict[str, dict[str, Any]] = {
    "none": dict.fromkeys(("share_prefix", "supervised_only", "recompute_activations"), False),
    "default": {},
    "chunks and parts": {"loss_chunk": 5, "microbatch_tokens": 40},
}
CLOSE = {torch.float32: (1e-5, 1e-4), torch.bfloat16: (4e-3, 6e-2)}
"""Largest relative error of a loss, and of gradients by their norm, in each precision."""


@pytest.fixture(autouse=True)
def _exact_products():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def check(model, batch: dict[str, Any], device: str, dtype: torch.dtype, rows=None, **levers):
    """Loss and gradients are those of single rows in float64 on the CPU."""
    exact = copy.deepcopy(model).double()
    loss = single_rows(exact, rows or batch)
    gradient_N = gradients(exact, loss)
    model, batch = model.to(device), move_data_to_device(batch, torch.device(device))
    if levers.pop("compile", False):
        compile_layers(model)
    with torch.autocast(device, torch.bfloat16, enabled=dtype == torch.bfloat16):
        found = LossComputer(model, SpeedConfig(**levers)).loss(batch)
    error_N = gradients(model, found).double().cpu() - gradient_N
    of_loss, of_gradients = CLOSE[dtype]
    assert_close(found.double().cpu(), loss, rtol=of_loss, atol=0)
    assert error_N.norm() < of_gradients * gradient_N.norm()


@devices
@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("levers", LEVERS.values(), ids=LEVERS)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_each_lever_keeps_loss_and_gradients(family, levers, dtype, device):
    check(adapted(build(family)), batch_of(), device, dtype, **levers)


@devices
@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
def test_packs_have_the_loss_and_gradients_of_single_rows(kernel, dtype, device):
    model, rows = adapted(build("llama", attn_implementation=kernel)), examples()
    padded = TrainCollator(("a",), pad_id=0)(rows)
    check(model, PackedCollator(("a",))(rows), device, dtype, rows=padded)


@pytest.mark.filterwarnings("default")  # the compiler warns of what torch itself does
@long_on_cpu
@pytest.mark.parametrize("dtype", CLOSE)
def test_compiled_layers_have_the_loss_and_gradients_of_single_rows(dtype, device):
    check(adapted(build("llama")), batch_of(), device, dtype, compile=True)


@long_on_cpu
@pytest.mark.parametrize(("precision", "close"), [("32-true", 1e-3), ("bf16-mixed", 5e-2)])
def test_the_demonstration_trains_and_resumes_with_the_losses_of_a_cpu(
    precision, close, device, tmp_path
):
    here = {
        "trainer.accelerator": "gpu" if device == "cuda" else "cpu",
        "trainer.devices": 1,
        "trainer.precision": precision,
    }
    first = losses_of(tmp_path / "a", **here, **{"trainer.max_steps": 3})
    (saved,) = (tmp_path / "a").rglob("last.ckpt")
    second = losses_of(tmp_path / "b", **here, **{"trainer.max_steps": 6, "ckpt_path": saved})
    pinned = json.loads((PINNED / "losses.json").read_text())
    assert first + second == pytest.approx(pinned[:6], rel=close)


@devices
def test_answers_and_likelihoods_are_those_of_a_cpu(device):
    tokenizer = load_tokenizer(str(tiny.folder()))
    cpu = AutoModelForCausalLM.from_pretrained(tiny.folder()).eval()
    texts = ["Ann has 3 pens . Bob has 5 pens . Ann buys 2 pens .", "Bob has 7 pens ."]
    batch = dict(tokenizer(texts, padding=True, padding_side="left", return_tensors="pt"))
    prompts = [tokenizer(text).input_ids for text in texts]
    answers = [[[5], [9, 4], [9, 6, 7]], [[8], [3, 3]]]
    wanted = generate(cpu, tokenizer, batch, 8), log_likelihoods(cpu, prompts, answers, 0)
    model = load_base(str(tiny.folder()), dtype="float32").to(device).eval()
    assert generate(model, tokenizer, move_data_to_device(batch, model.device), 8) == wanted[0]
    found = log_likelihoods(model, prompts, answers, 0)
    for one, other in zip(found, wanted[1], strict=True):
        assert one == pytest.approx(other, rel=1e-3, abs=1e-4)
