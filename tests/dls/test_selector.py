import math

import pytest
import torch
from torch import nn

from rosa_lightning.dls.layers import Layer
from rosa_lightning.dls.selector import LayerSelector, PolicyOptions, SelectionConfig


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def selector(interval=5, layers=range(4), num_layers=4, sizes=None, steps=math.inf, **settings):
    names = PolicyOptions.__dataclass_fields__.keys() & settings.keys()
    options = PolicyOptions(**{name: settings.pop(name) for name in names})
    config = SelectionConfig(
        **{"num_active": 2, "interval": interval, **settings}, policy_options=options
    )
    norm = nn.Parameter(torch.ones(3))
    candidates = [Layer(f"{i}", i, num_layers, norms=(norm,), candidates={}) for i in layers]
    return LayerSelector(config, candidates, sizes or [3] * len(candidates), steps)


def chosen(scores, **settings):
    made = selector(**settings)
    made.select(tensor(scores), 0)
    return made


def test_steps_are_due_every_interval_from_the_start_to_the_end():
    made = selector(4, warmup_steps=3, final_steps_all=2, steps=15)
    made.num_selections = 1
    due = [step for step in range(20) if made.is_due(step)]
    assert due == [3, 7, 11]
    # Each choice holds until the next one is due, or until the end.
    assert [step + 1 + made.steps_ahead(step) for step in due] == [7, 11, 13]


def test_without_any_selection_every_step_is_due():
    made = selector(4, warmup_steps=3)
    assert [step for step in range(7) if made.is_due(step)] == [3, 4, 5, 6]
    assert made.steps_ahead(5) == 1


def test_cost_is_the_mean_over_steps():
    run = selector(4, warmup_steps=2, final_steps_all=2, steps=12)
    for step, scores in [(2, [1, 2, 3, 4]), (6, [0, 9, 9, 0])]:
        run.select(tensor(scores), step)
    # Two full steps, one that scores, three that end at layer 2, one that scores, then layer 1.
    spent = [1, 1, 1, 0.5, 0.5, 0.5, 1, 0.75, 0.75, 0.75]
    for steps in range(7, 11):
        assert run.backward_share(steps) == pytest.approx(sum(spent[:steps]) / steps)
    assert not run.activate_all(9)
    assert run.activate_all(10)
    assert run.active == (0, 1, 2, 3)
    assert not run.activate_all(11)
    assert run.backward_share(12) == pytest.approx((sum(spent) + 2) / 12)


def test_smoothing_agrees_with_a_bias_corrected_average_as_adam_keeps_it():
    beta, averages = 0.9, [0.0, 0.0]
    run = selector(1, layers=(0, 1), num_layers=2, num_active=1, score_smoothing=beta)
    for t in range(1, 30):
        row = torch.rand(2).tolist()
        averages = [beta * a + (1 - beta) * x for a, x in zip(averages, row, strict=True)]
        run.select(tensor(row), t - 1)
        corrected = [average / (1 - beta**t) for average in averages]
        assert run.active == (corrected.index(max(corrected)),)
    assert run.scores == tuple(row)  # as measured


def test_sizes_and_earlier_scores_reach_the_normalization():
    options = {"num_active": 1, "layers": (0, 1), "num_layers": 2}
    by_size = chosen([3.0, 2.0], score_normalization="sqrt_size", sizes=[100, 4], **options)
    assert by_size.active == (1,)
    usual = chosen([9.0, 1.0], score_normalization="running_mean", **options)
    assert usual.active == (0,)  # the first selection has nothing to compare with
    usual.select(tensor([9.0, 3.0]), 5)
    assert usual.active == (1,)


def test_a_choice_is_of_candidates_and_settings_name_layers():
    made = chosen([9, 5, 1], always_active=[-1, 3], layers=(1, 3, 6), num_layers=8)
    assert (made.active, made.active_layers) == ((1, 2), (3, 6))


def test_a_budget_counts_layers_in_which_nothing_trains():
    options = {"num_active": 1, "backward_budget": 0.5, "interval": 1001}
    # The lowest candidate is a full backward: 6 layers, of which layer 4 needs 2.
    made = chosen([9.0, 8.0, 7.0], layers=(0, 2, 4), num_layers=6, **options)
    assert made.active == (2,)
    assert made.backward_share(1001) == pytest.approx((1 + 1000 * 2 / 6) / 1001)


def test_policies_that_draw_or_take_all_claim_alike():
    options = {"policy": "all", "backward_budget": 0.7, "interval": 1001}
    one, two = chosen([1.0, 0, 0, 0], **options), chosen([0, 0, 0, 1.0], **options)
    for made in (one, two):
        for step in range(1001, 8008, 1001):
            made.select(torch.tensor([float(made is one), 0, 0, 1.0]), step)
    assert one.selection_counts == two.selection_counts


def test_a_restored_selector_goes_on_exactly(tmp_path):
    rows = torch.rand(20, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    options = {
        "policy": "sample",
        "backward_budget": 0.6,
        "score_normalization": "running_mean",
        "score_smoothing": 0.5,
    }
    straight, first, second, unbudgeted = (selector(**options) for _ in range(4))
    for index in range(8):
        straight.select(rows[index], 5 * index)
        first.select(rows[index], 5 * index)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    first.select(rows[0], 40)  # which leaves the state alone
    for index in range(8, 20):
        straight.select(rows[index], 5 * index)
        second.select(rows[index], 5 * index)
        assert second.active == straight.active
    assert second.selection_counts == straight.selection_counts
    assert second.backward_share(100) == straight.backward_share(100)
    # A state of a run without a budget, whose lists torch.load gave back as lists.
    state = {k: list(v) if isinstance(v, tuple) else v for k, v in second.state_dict().items()}
    unbudgeted.load_state_dict(state | {"budget": None})
    unbudgeted.select(rows[0], 100)
    assert unbudgeted.num_selections == 21


def test_a_kept_choice_is_paid_for():
    budget = (1 + 10 * 0.5) / 11  # half a backward on the steps between
    spends, saves = (
        chosen([1.0] * 4, interval=11, policy="all", backward_budget=budget) for _ in "ab"
    )
    assert spends.active == saves.active == (3,)
    spends.select(torch.ones(4), 11)
    spends.select(torch.ones(4), 22)
    saves.keep(11)
    saves.select(torch.ones(4), 22)
    # Two intervals at a quarter save what the third spends, chosen or kept.
    assert spends.active == saves.active == (0, 1, 2, 3)
