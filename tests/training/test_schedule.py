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


def test_it_warms_up_linearly_and_decays_by_half_a_cosine():
    found = rates(10, warmup=4, total_steps=10, final_ratio=0.1)
    assert found[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0])
    wanted = [2 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * k / 6))) for k in range(6)]
    assert found[4:] == pytest.approx(wanted)


def test_a_share_of_the_steps_warms_up():
    assert rates(10, warmup=0.4, total_steps=10) == pytest.approx(
        rates(10, warmup=4, total_steps=10)
    )


def test_it_stays_at_the_end_after_the_last_step():
    assert rates(8, warmup=0, total_steps=5, final_ratio=0.5)[5:] == pytest.approx([1.0] * 3)


def test_a_length_given_later_is_the_same_as_one_given_at_once():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = WarmupCosine(optimizer, warmup=0.5)
    schedule.set_total_steps(10)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(rates(1, warmup=0.5, total_steps=10)[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"warmup": -1}, "warmup=-1"),
        ({"warmup": math.nan}, "warmup=nan"),
        ({"warmup": math.inf}, "warmup=inf"),
        ({"warmup": 1.5}, "warmup=1.5"),
        ({"total_steps": 0}, "total_steps=0"),
        ({"final_ratio": 2.0}, "final_ratio=2.0"),
    ],
)
def test_a_setting_out_of_range_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        rates(1, **options)
