"""What is told of a way to run a model that differs from the model's own."""

import pytest
import torch
from torch import nn

from rosa_lightning.training import pack_attention
from rosa_lightning.training.probes import RefusedError, difference
from tests.conftest import build


@pytest.mark.parametrize(
    ("way", "told"),
    [
        (lambda model, x: model(x), ""),
        (lambda model, x: model(x) + 1, "Linear gives other logits after a prefix"),
        (lambda model, x: model(x.detach()) + 0 * x, ""),
        (lambda model, x: model(x) + 0 * model.weight.sum() / 0, "Linear gives other logits"),
        (
            lambda model, x: model(2 * x) - 2 * model(x).detach() + model(x).detach(),
            "the gradients",
        ),
        (lambda model, x: model(None), "Linear cannot go on: TypeError: "),
    ],
)
def test_logits_gradients_and_errors_are_told(way, told):
    torch.manual_seed(0)
    model, x = nn.Linear(4, 4, bias=False), torch.randn(3, 4)

    def run() -> torch.Tensor:
        return way(model, x)

    about = {"to": "go on", "where": "after a prefix", "gradients": True}
    found = difference(model, run, model(x), **about)
    assert found.startswith(told)
    assert bool(found) == bool(told)


def test_a_reason_stands_by_itself():
    def run() -> torch.Tensor:
        raise RefusedError("this kernel keeps rows apart by itself")

    about = {"to": "go on", "where": "after a prefix"}
    wanted = torch.zeros(1, 4)
    assert (
        difference(nn.Linear(4, 4), run, wanted, **about)
        == "this kernel keeps rows apart by itself"
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of transformers and torch
def test_a_kernel_that_keeps_rows_apart_is_named():
    model = build("llama", attn_implementation="flex_attention")
    reason = pack_attention.unsupported_reason(model, training=False)
    assert reason == "flex_attention keeps rows apart by itself"
