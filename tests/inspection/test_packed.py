from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from rosa_lightning.inspection.memory import estimate_memory
from rosa_lightning.inspection.packed import PackedLinear, pack_on_paper
from rosa_lightning.models.loading import load_skeleton
from rosa_lightning.roae.inject import inject_roae
from rosa_lightning.roae.layer import RoAEConfig
from tests.conftest import build
from tests.model_zoo.small import build_small

SCHEMES = ["int8", "llm_int8", "nf4", "fp4"]
STEP = {"batch_size": 2, "length": 40, "response_length": 8}


def packed(model: nn.Module) -> set[str]:
    return {path for path, module in model.named_modules() if isinstance(module, PackedLinear)}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_all_linear_layers_but_the_head_are_packed_adapted_or_not(scheme):
    model = load_skeleton("tiny")
    linears = {path for path, m in model.named_modules() if isinstance(m, nn.Linear)}
    plain = load_skeleton("tiny")
    pack_on_paper(plain, scheme)
    assert packed(plain) == linears - {"lm_head"}
    inject_roae(model, RoAEConfig(rank=2))
    pack_on_paper(model, scheme)
    assert {path.replace(".base", "") for path in packed(model)} == linears - {"lm_head"}


@pytest.mark.parametrize(
    ("scheme", "num_bytes"),
    [
        ("int8", 96 * 1000 + 96 * 4 + 96),
        ("llm_int8", 96 * 1000 + 96 * 4),
        # 1500 blocks of 64, in 6 blocks of 256; 16 values and a mean.
        ("nf4", 48 * 1000 + 1500 + 6 * 4 + 16 * 4 + 4),
        ("fp4", 48 * 1000 + 1500 + 6 * 4 + 16 * 4 + 4),
    ],
)
def test_a_layer_holds_the_bytes_of_its_format(scheme, num_bytes):
    linear = nn.Linear(1000, 96, device="meta")
    layer = PackedLinear(linear, scheme)
    assert sum(buffer.nbytes for buffer in layer.buffers()) == num_bytes
    assert layer.bias is linear.bias


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_gives_the_shapes_and_dtypes_of_a_plain_one(scheme, dtype):
    with FakeTensorMode():
        linear = nn.Linear(12, 7, dtype=dtype)
        x = torch.empty(2, 3, 12, dtype=dtype, requires_grad=True)
        out = PackedLinear(linear, scheme)(x)
        out.sum().backward()
    assert (out.shape, out.dtype) == ((2, 3, 7), dtype)
    assert (x.grad.shape, x.grad.dtype) == (x.shape, dtype)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_packed_base_is_a_line_of_the_estimate_and_smaller(scheme):
    model = load_skeleton("tiny", dtype="bfloat16")
    inject_roae(model, RoAEConfig(rank=2))
    plain = estimate_memory(model, **STEP)
    pack_on_paper(model, scheme)
    estimate = estimate_memory(model, **STEP)
    assert set(estimate.base) == {"bfloat16", "float32", scheme}
    bits = 8 if "int8" in scheme else 4
    layers = plain.base["bfloat16"] - estimate.base["bfloat16"]
    assert estimate.base[scheme] == pytest.approx(layers * bits / 16, rel=0.06)
    assert estimate.base[scheme] > layers * bits / 16


@pytest.mark.filterwarnings("ignore")
def test_experts_that_share_a_parameter_stay_as_they_are():
    model = build_small("MixtralConfig")
    inject_roae(model, RoAEConfig(rank=2))
    pack_on_paper(model, "nf4")
    assert {path.rpartition(".")[2] for path in packed(model)} == {
        *("v_proj", "o_proj"),
        "base",
    }
    experts = sum(p.nbytes for name, p in model.named_parameters() if "experts" in name)
    assert experts < estimate_memory(model, **STEP).base["float32"]


def test_a_base_that_is_quantised_already_is_refused():
    model = build("llama")
    model.config.quantization_config = {"quant_method": "awq", "bits": 4}
    with pytest.raises(ValueError, match=r"quantised already, so model\.quantization=nf4"):
        pack_on_paper(model, "nf4")
    assert not packed(model)


@pytest.mark.filterwarnings("ignore")
def test_experts_that_a_library_takes_apart_are_refused():
    model = build_small("Llama4TextConfig")
    with pytest.raises(ValueError, match="makes other layers of Llama4TextExperts"):
        pack_on_paper(model, "nf4")
    assert not packed(model)
    pack_on_paper(model, "int8")
    assert packed(model)
