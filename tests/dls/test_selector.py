import math

import pytest
import torch

from rosa_lightning.dls.budget import BackwardBudget, layer_costs
from rosa_lightning.dls.policies import select_layers
from rosa_lightning.dls.scores import ScoreHistory
from rosa_lightning.dls.selector import Selector, Timing


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def selector(timing, policy="top_k", budget=None, smoothing=0.0):
    def choose(scores, floor, generator):
        return select_layers(policy, scores, 2, generator=generator, floor=floor)

    history = ScoreHistory(smoothing, "none", [1] * 4)
    return Selector(choose, layer_costs([3, 2, 1, 0]), history, budget, timing, seed=3)


def test_steps_are_due_every_interval_from_the_start_to_the_end():
    timing = Timing(4, 3, 13)
    due = [step for step in range(20) if timing.is_due(step, num_selections=1)]
    assert due == [3, 7, 11]
    assert [timing.steps_ahead(step) for step in due] == [3, 3, 1]
    # Each choice holds until the next one is due, or until the end.
    assert [step + 1 + timing.steps_ahead(step) for step in due] == [7, 11, 13]


def test_without_any_selection_every_step_is_due():
    timing = Timing(4, 3, math.inf)
    assert [step for step in range(7) if timing.is_due(step, num_selections=0)] == [3, 4, 5, 6]
    assert timing.steps_ahead(5) == 1


def test_cost_is_the_mean_over_steps():
    run = selector(Timing(4, 2, 10))
    spent = []
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


def test_scores_are_remembered_as_measured_and_chosen_by_as_smoothed():
    run = selector(Timing(1, 0, math.inf), smoothing=0.9)
    run.select(tensor([9, 9, 0, 0]), 0)
    run.select(tensor([0, 0, 1, 1]), 1)
    assert run.active == (0, 1)
    assert run.scores == (0, 0, 1, 1)
    assert run.counts == [2, 2, 0, 0]


def budget():
    return BackwardBudget(0.5, layer_costs([3, 2, 1, 0]))


@pytest.mark.parametrize("policy", ["top_k", "sample", "random"])
def test_a_restored_selector_goes_on_exactly(policy, tmp_path):
    rows = torch.rand(20, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    straight, first, second = (
        selector(Timing(5, 0, math.inf), policy, budget(), 0.5) for _ in range(3)
    )
    history = []
    for index, row in enumerate(rows):
        straight.select(row, 5 * index)
        history.append(straight.active)
        if index < 8:
            first.select(row, 5 * index)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    first.select(rows[0], 40)
    for index in range(8, 20):
        second.select(rows[index], 5 * index)
        assert second.active == history[index]
    assert second.counts == straight.counts
    assert second.backward_share(100) == straight.backward_share(100)


def test_a_state_without_a_budget_can_be_gone_on_with_under_one():
    before, after = (
        selector(Timing(5, 0, math.inf)),
        selector(Timing(5, 0, math.inf), "top_k", budget()),
    )
    before.select(tensor([1, 2, 3, 4]), 0)
    after.load_state_dict(before.state_dict())
    assert after.active == (2, 3)
    after.select(tensor([4, 3, 2, 1]), 5)
    assert after.num_selections == 2


def test_a_kept_choice_is_paid_for():
    spends, saves = (selector(Timing(11, 0, math.inf), "all", budget()) for _ in range(2))
    for run in (spends, saves):
        run.select(torch.ones(4), 0)
    assert spends.active == saves.active == (3,)
    spends.select(torch.ones(4), 11)
    spends.select(torch.ones(4), 22)
    saves.keep(11)
    saves.select(torch.ones(4), 22)
    # Two intervals at a quarter save what the third spends, chosen or kept.
    assert spends.active == saves.active == (0, 1, 2, 3)
