from __future__ import annotations

import pytest
import torch

from rosa_lightning import throughput


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: now[0])
    return now


def test_the_rate_is_tokens_over_seconds_without_the_pauses(clock):
    rate = throughput.TokenRate()
    clock[0] += 1
    assert rate.add(torch.tensor(30), every=2) is None
    rate.pause()
    clock[0] += 50
    rate.resume()
    clock[0] += 2
    assert rate.add(torch.tensor(60), every=2) == pytest.approx(90 / 3)
    clock[0] += 4
    assert rate.add(torch.tensor(8), every=1) == pytest.approx(2.0)


def test_no_interval_gives_no_rate(clock):
    assert throughput.TokenRate().add(torch.tensor(30), every=0) is None
