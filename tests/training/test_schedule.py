from __future__ import annotations

import math

import pytest
import torch

from rosa_lightning.training.schedule import WarmupCosine


def rates(steps: int, **options) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = WarmupCosine(optimizer, **options)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


@pytest.mark.parametrize("warmup", [4, 0.4])
def test_it_warms_up_linearly_decays_by_half_a_cosine_and_stays(warmup):
    found = rates(12, warmup=warmup, total_steps=10, final_ratio=0.1)
    assert found[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0])
    wanted = [2 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * k / 6))) for k in range(7)]
    assert found[4:] == pytest.approx([*wanted, wanted[-1]])


def test_a_length_given_later_is_the_same_as_one_given_at_once():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = WarmupCosine(optimizer, warmup=0.5)
    schedule.set_total_steps(10)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(rates(1, warmup=0.5, total_steps=10)[0])


OUT_OF_RANGE = [("warmup", value) for value in (-1, math.nan, math.inf, 1.5)]


@pytest.mark.parametrize(
    ("name", "value"), [*OUT_OF_RANGE, ("total_steps", 0), ("final_ratio", 2.0)]
)
def test_a_setting_out_of_range_is_refused(name, value):
    with pytest.raises(ValueError, match=f"{name}={value}"):
        rates(1, **{name: value})
