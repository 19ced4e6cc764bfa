"""Attention by products: error against float64, where it is used and where not."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from rosa_lightning.models.loading import enable_checkpointing
from rosa_lightning.training import attention
from rosa_lightning.training.attention import attend
from rosa_lightning.training.loss import LossComputer
from tests.conftest import build
from tests.training.test_loss import adapted, batch_of

FULL = torch.ones(7, 9, dtype=torch.bool)
CAUSAL = FULL.tril(2)
PADDED = CAUSAL & (torch.arange(9) >= torch.tensor([3, 0])[:, None, None, None])
MASKS = {
    "none": None,
    "causal": CAUSAL,
    "padded, so that some queries see nothing": PADDED & (torch.arange(9) != 3),
    "added": torch.where(PADDED, 0.5 * torch.arange(9), torch.finfo(torch.float32).min),
}


def with_gradients(function, given: list[Tensor], weights: Tensor, dtype) -> list[Tensor]:
    leaves = [one.detach().to(dtype).requires_grad_() for one in given]
    out = function(*leaves)
    return [out, *torch.autograd.grad(out, leaves, weights.to(dtype))]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("key_heads", "scale"), [(6, 0.25), (2, 0.25), (1, 0.3)])
def test_products_are_as_exact_as_the_kernel_of_torch(mask, key_heads, scale):
    shapes = [(2, 6, 7, 16), (2, key_heads, 9, 16), (2, key_heads, 9, 8)]
    given = [torch.randn(shape).bfloat16() for shape in shapes]
    weights, seen = torch.randn(2, 6, 7, 8).bfloat16(), MASKS[mask]
    if mask.startswith("padded"):  # nothing reads what a query gives that sees nothing
        weights = weights * PADDED[..., 4:].any(-1)[..., None]

    def kernel(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        added = seen if seen is None or seen.dtype == torch.bool else seen.to(query.dtype)
        options = {"scale": scale, "attn_mask": added, "enable_gqa": True}
        return scaled_dot_product_attention(query, key, value, **options)

    def products(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attend(query, key, value, seen, scale)

    wanted = with_gradients(kernel, given, weights, torch.float64)
    for found, exact in zip(
        with_gradients(products, given, weights, torch.bfloat16), wanted, strict=True
    ):
        assert found.dtype == torch.bfloat16
        assert found.isfinite().all()
        live = weights.any(-1)[..., None] if found.shape == weights.shape else torch.tensor(True)
        assert ((found - exact) * live).norm() <= 0.012 * exact.norm()


class Calls:
    """Shapes of the queries that are attended to by products."""

    def __init__(self, monkeypatch) -> None:
        self.shapes = []

        def watched(query: Tensor, *rest) -> Tensor:
            self.shapes.append(tuple(query.shape))
            return attend(query, *rest)

        monkeypatch.setattr(attention, "attend", watched)


def gradients(run: LossComputer, batch, autocast: bool) -> Tensor:
    weights = [weight for weight in run.model.parameters() if weight.requires_grad]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = run.loss(batch)
    return torch.cat([one.flatten().double() for one in torch.autograd.grad(loss, weights)])


@pytest.mark.parametrize("family", ["llama", "gemma", "neox"])
@pytest.mark.parametrize("share", [0, 20])
def test_a_model_in_bfloat16_has_gradients_as_exact_as_by_its_own_products(
    family, share, monkeypatch
):
    calls, model, batch = Calls(monkeypatch), adapted(build(family)), batch_of(share)
    gradients(LossComputer(model, attn_implementation="sdpa"), batch, autocast=True)
    assert not calls.shapes
    chosen = gradients(LossComputer(model), batch, autocast=True)
    assert len(calls.shapes) >= 2
    model.set_attn_implementation("eager")
    eager = gradients(LossComputer(model), batch, autocast=True)
    model.set_attn_implementation("sdpa")
    exact = gradients(LossComputer(model.double()), batch, autocast=False)
    assert (chosen - exact).norm() <= 1.3 * (eager - exact).norm()


@pytest.mark.parametrize("what", ["float32", "eager", "long rows", "evaluation"])
def test_elsewhere_a_model_attends_as_it_is_told_to(what, monkeypatch):
    calls, model, batch = Calls(monkeypatch), adapted(build("llama")), batch_of(20)
    run = LossComputer(model)
    if what == "eager":
        model.set_attn_implementation("eager")
    if what == "long rows":
        monkeypatch.setattr(attention, "MOST_KEYS", 1)
    with torch.autocast("cpu", torch.bfloat16, enabled=what != "float32"):
        if what == "evaluation":
            run.score(batch)
        else:
            run.loss(batch)
    assert not calls.shapes


def test_layers_that_are_computed_again_attend_as_they_did_at_first(monkeypatch):
    calls, model = Calls(monkeypatch), adapted(build("llama"))
    enable_checkpointing(model)
    assert gradients(LossComputer(model), batch_of(20), autocast=True).isfinite().all()
    assert not calls.shapes
