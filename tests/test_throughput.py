from __future__ import annotations

import pytest
import torch

from rosa_lightning import throughput


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: now[0])
    return now


def test_rates_are_counts_over_seconds_without_the_pauses(clock):
    throughput_ = throughput.Throughput()
    clock[0] += 1
    assert throughput_.add(2, tokens=torch.tensor(30), examples=4) == {}
    throughput_.pause()
    clock[0] += 50
    throughput_.resume()
    clock[0] += 2
    rates = throughput_.add(2, tokens=torch.tensor(60), examples=2)
    assert rates == pytest.approx({"tokens": 90 / 3, "examples": 6 / 3})
    clock[0] += 4
    assert throughput_.add(1, tokens=torch.tensor(8)) == pytest.approx({"tokens": 2.0})


def test_no_interval_gives_no_rate(clock):
    assert throughput.Throughput().add(0, tokens=torch.tensor(30)) == {}
