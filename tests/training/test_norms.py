"""RMSNorm in few passes: error against float64, and which norms are left as they are."""

import pytest
import torch
from torch import Tensor, nn
from transformers.models.cohere.modeling_cohere import CohereLayerNorm
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from rosa_lightning.training.loss import LossComputer
from rosa_lightning.training.norms import fast_norms, rms_norms
from tests.conftest import build
from tests.training.test_loss import adapted, batch_of, check, gradients

KINDS = {
    "llama": lambda: LlamaRMSNorm(24, 1e-5),
    "gemma": lambda: GemmaRMSNorm(24, 1e-6),
    "gemma3": lambda: Gemma3RMSNorm(24, 1e-6),
    "torch": lambda: nn.RMSNorm(24, 1e-5),
}


def frozen(module: nn.Module, dtype=torch.float32) -> nn.Module:
    for weight in module.parameters():
        nn.init.normal_(weight)
    return module.to(dtype).requires_grad_(False)


def run(module: nn.Module, x: Tensor, seed: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    out = module(x)
    return [out, *torch.autograd.grad(out, x, seed.to(out.dtype))]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 0.01)])
def test_output_and_gradient_are_those_of_float64(kind, dtype, bound):
    module = frozen(KINDS[kind](), dtype)
    norms = rms_norms(module)
    assert len(norms) == 1
    sizes = torch.tensor([1e-3, 1.0, 100.0])[:, None]
    x, seed = (sizes * torch.randn(2, 3, 24)).to(dtype), torch.randn(2, 3, 24).to(dtype)
    with fast_norms(norms):
        found = run(module, x, seed)
    assert "forward" not in vars(module)
    double = module.double()
    double.forward = lambda x: (
        x * (x.square().mean(-1, keepdim=True) + norms[0].eps).rsqrt() * (norms[0].offset + w)
    )
    w = double.weight
    for one, wanted in zip(found, run(double, x.double(), seed.double()), strict=True):
        assert one.dtype == dtype
        gaps, lengths = (one - wanted).norm(dim=-1), wanted.norm(dim=-1)
        assert (gaps <= bound * lengths).all()


class Outside(LlamaRMSNorm):
    """With eps added to the root."""

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x / (x.square().mean(-1, keepdim=True).sqrt() + self.variance_epsilon)


class Clipped(LlamaRMSNorm):
    """Of the usual formula up to a size."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.clamp(-20, 20))


class WithBias(LlamaRMSNorm):
    """With a weight more."""

    def __init__(self) -> None:
        super().__init__(24)
        self.bias = nn.Parameter(torch.zeros(24))


@pytest.mark.parametrize(
    "module",
    [
        nn.LayerNorm(24, bias=False),
        CohereLayerNorm(24),
        Outside(24, 1e-2),
        Clipped(24),
        WithBias(),
        nn.Linear(24, 1, bias=False),
    ],
)
def test_other_formulas_are_left_alone(module):
    assert rms_norms(frozen(module)) == []


def test_a_norm_that_trains_has_its_gradient():
    model = adapted(build("llama"))
    model.model.norm.weight.requires_grad_(True)
    check(model, batch_of())


def test_inputs_of_another_dtype_are_left_to_the_module():
    module = frozen(LlamaRMSNorm(24))
    x = torch.randn(2, 24).bfloat16()
    with fast_norms(rms_norms(module)):
        found = module(x)
    assert found.dtype == torch.float32  # as the product with the weight has it
    torch.testing.assert_close(found, module(x), rtol=0, atol=0)


def test_a_training_step_runs_them_and_leaves_the_model_as_it_was(monkeypatch):
    model = adapted(build("qwen3"))
    computer = LossComputer(model)
    seen = []
    own = LossComputer.loss_at

    def watched(self, *args, **kwargs):
        seen.append(sum("forward" in vars(module) for module in model.modules()))
        return own(self, *args, **kwargs)

    monkeypatch.setattr(LossComputer, "loss_at", watched)
    gradients(model, computer.loss(batch_of()))
    num_norms = sum("Norm" in type(module).__name__ for module in model.modules())
    assert seen == [num_norms]
    assert not any("forward" in vars(module) for module in model.modules())
