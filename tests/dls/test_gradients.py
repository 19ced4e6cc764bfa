from __future__ import annotations

import torch
from torch import nn

from rosa_lightning.dls.gradients import global_gradients


def two_weights() -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(3)) for _ in range(2)]


def test_in_one_process_the_gradients_are_those_at_hand():
    weights = two_weights()
    weights[1].grad = torch.ones(3)
    gradients = global_gradients([[weights[0]], [weights[1]]], nn.Module(), torch.device("cpu"))
    assert gradients[0] == [None]
    assert gradients[1][0] is weights[1].grad
