from __future__ import annotations

import random

import numpy as np
import torch

from rosa_lightning.utils.rng import of_all_ranks, rng_state, set_rng_state


def draw() -> list[float]:
    return [
        random.random(),
        random.gauss(0, 1),
        np.random.rand(),
        np.random.randn(),
        float(torch.rand(())),
    ]


def test_a_restored_state_draws_the_same_numbers_after_a_checkpoint(tmp_path):
    draw()
    torch.save(rng_state(), tmp_path / "state.pt")
    wanted = draw()
    draw()
    set_rng_state(torch.load(tmp_path / "state.pt", weights_only=True))
    assert draw() == wanted


def test_a_single_process_has_one_state():
    assert len(of_all_ranks(rng_state())) == 1
