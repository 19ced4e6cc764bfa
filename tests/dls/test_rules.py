import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from rosa_lightning.dls.layers import Layer
from rosa_lightning.dls.rules import SelectionRules

RULES = SelectionRules(
    num_active=2,
    interval=10,
    policy="top_k",
    temperature=1.0,
    score_share=0.5,
    score_smoothing=0.0,
    score_normalization="none",
    backward_budget=1.0,
    warmup_steps=0,
    final_steps_all=0,
    always_active=(),
    fixed_layers=(),
    seed=0,
)


def layers(positions, depth):
    return [
        Layer(
            name=f"blocks.{index}",
            index=index,
            num_above=depth - 1 - index,
            norms=(nn.Parameter(torch.ones(3)),),
            candidates={},
        )
        for index in positions
    ]


def chosen(rules, scores, positions=range(4), depth=4, sizes=None, steps=math.inf):
    found = layers(positions, depth)
    selector = rules.selector(found, sizes or [3] * len(found), steps)
    selector.select(torch.tensor(scores, dtype=torch.float64), 0)
    return selector


def test_positions_are_those_of_blocks_and_choices_places_among_the_layers():
    rules = replace(RULES, always_active=(-1, 3))
    assert chosen(rules, [9, 5, 1], positions=(1, 3, 6), depth=8).active == (1, 2)


def test_sizes_reach_the_normalization():
    rules = replace(RULES, num_active=1, score_normalization="sqrt_size")
    assert chosen(rules, [3.0, 2.0], (0, 1), 2, sizes=[100, 4]).active == (1,)


def test_a_budget_counts_blocks_in_which_nothing_trains():
    rules = replace(RULES, num_active=1, backward_budget=0.5, interval=1001)
    # The lowest candidate is a full backward: 6 blocks, of which layer 4 needs 2.
    selector = chosen(rules, [9.0, 8.0, 7.0], positions=(0, 2, 4), depth=6)
    assert selector.active == (2,)
    assert selector.backward_share(1001) == pytest.approx((1 + 1000 * 2 / 6) / 1001)


def test_only_what_depends_on_the_length_of_the_run_asks_for_it():
    assert not replace(RULES, warmup_steps=5).needs_length
    assert replace(RULES, backward_budget=0.5).needs_length
    assert replace(RULES, final_steps_all=5).needs_length


def test_policies_that_draw_or_take_all_claim_alike():
    rules = replace(RULES, policy="all", backward_budget=0.7, interval=1001)
    one, two = chosen(rules, [1.0, 0, 0, 0]), chosen(rules, [0, 0, 0, 1.0])
    for selector in (one, two):
        for step in range(1001, 8008, 1001):
            selector.select(torch.tensor([float(selector is one), 0, 0, 1.0]), step)
    assert one.counts == two.counts
