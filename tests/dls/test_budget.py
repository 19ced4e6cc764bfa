import math
from itertools import pairwise
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rosa_lightning.dls.budget import BackwardBudget, layer_costs, steps_share
from rosa_lightning.dls.policies import top_k


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def costs_of(num_layers, always=()):
    return layer_costs(range(num_layers), num_layers, always)


class Run:
    """Selections under a budget, and what each costs, by a plain sum over steps."""

    def __init__(self, num_layers, budget, interval, always=()):
        self.costs = costs_of(num_layers, always)
        self.interval = interval
        share = steps_share(budget, interval, self.costs)
        self.budget = BackwardBudget(share, self.costs, always)
        self.active, self.steps = [], []

    def select(self, scores, choose):
        active = self.budget.select(tensor(scores), self.interval - 1, choose)
        self.active.append(active)
        layers = len(self.costs)
        self.steps += [1.0] + [(layers - min(active)) / layers] * (self.interval - 1)
        return active

    def top_k(self, scores, count, selections):
        def choose(claims, floor):
            free = [index for index in range(len(claims)) if index >= floor]
            return tuple(free[i] for i in top_k(claims[free], min(count, len(free))))

        for _ in range(selections):
            self.select(scores, choose)
        return self

    def shares(self, skip=0):
        active = self.active[skip:]
        return [sum(i in chosen for chosen in active) / len(active) for i in range(len(self.costs))]


@st.composite
def set_ups(draw, always=False):
    num_layers = draw(st.integers(2, 10))
    interval = draw(st.integers(2, 30))
    # Layer 0 always active would cost a full backward.
    held = draw(st.sets(st.integers(1, num_layers - 1))) if always else set()
    least = (1 + (interval - 1) * min(costs_of(num_layers, held))) / interval
    budget = draw(st.floats(least, 1.0, exclude_min=True, exclude_max=True))
    # So near to the least cost, savings would drown in rounding.
    budget = max(budget, least + 1e-3 * (1 - least))
    return num_layers, budget, interval, tuple(sorted(held))


def positive_scores(num_layers):
    return st.lists(st.floats(0.01, 1.0), min_size=num_layers, max_size=num_layers)


def test_a_step_costs_the_layers_that_its_backward_runs_through():
    assert costs_of(4) == (1.0, 0.75, 0.5, 0.25)
    # Layers in which nothing trains are run through, but not below the lowest that can train.
    assert layer_costs([1, 2, 4, 5], 7) == pytest.approx((1.0, 5 / 6, 3 / 6, 2 / 6))
    assert costs_of(4, always=[2]) == (1.0, 0.75, 0.5, 0.5)


@given(
    st.integers(2, 12),
    st.integers(2, 40),
    st.floats(0.01, 0.99),
    st.integers(1, 2000),
    st.integers(0, 300),
)
def test_what_is_left_for_the_steps_between_selections_adds_up(
    layers, interval, budget, steps, full
):
    costs = costs_of(layers)
    selecting = len(range(full, steps, interval))
    between = max(0, steps - full - selecting)
    least = (steps - between + between * costs[-1]) / steps
    if budget <= least:
        with pytest.raises(ValueError, match=r"backward_budget=.*leaves nothing"):
            steps_share(budget, interval, costs, steps, full)
    else:
        share = steps_share(budget, interval, costs, steps, full)
        assert costs[-1] < share < 1
        assert (steps - between + between * share) / steps == pytest.approx(budget)


@pytest.mark.parametrize(
    ("budget", "interval", "always", "least"),
    [(0.3, 4, (), "0.438"), (0.9, 1, (), "1"), (0.6, 100, (1,), "0.752")],
)
def test_a_budget_that_leaves_nothing_is_refused_with_the_least(budget, interval, always, least):
    with pytest.raises(ValueError, match=f"alone cost {least} of a full") as error:
        steps_share(budget, interval, costs_of(4, always))
    assert "\n" not in str(error.value)


@given(set_ups(always=True), st.data())
@settings(deadline=None)
def test_the_mean_cost_never_exceeds_the_budget_whatever_is_chosen(set_up, data):
    num_layers, budget, interval, always = set_up
    run = Run(num_layers, budget, interval, always)
    floors = []

    def anything(claims, floor):
        floors.append(floor)
        chosen = data.draw(st.sets(st.integers(floor, num_layers - 1), min_size=1))
        return tuple(sorted({*chosen, *always}))

    for _ in range(data.draw(st.integers(1, 25))):
        run.select(
            data.draw(st.lists(st.floats(0, 9), min_size=num_layers, max_size=num_layers)), anything
        )
    spent = 0.0
    for step, cost in enumerate(run.steps, start=1):
        spent += cost
        # A selection's own step is paid for by the end of its interval.
        due = 0 if step % interval == 0 else 1 - budget
        assert spent <= budget * step + due + 1e-6
    # No floor is higher than where the layers that always train end the backward anyway.
    assert all(floor <= min(always, default=num_layers) for floor in floors)


@given(set_ups(), st.data())
@settings(deadline=None, max_examples=30)
def test_every_layer_with_a_score_trains_again_within_a_bound(set_up, data):
    num_layers, budget, interval, _ = set_up
    run = Run(num_layers, budget, interval)
    scores = data.draw(positive_scores(num_layers))
    count = data.draw(st.integers(1, num_layers))
    share, cheapest = steps_share(budget, interval, run.costs), run.costs[-1]
    # After so many selections that save, a full backward can be afforded.
    saving = math.ceil((1 - share) / ((share - cheapest) / 2) + 1e-9)
    # Others have the highest claim at most twice before a claim has outgrown all they can earn.
    window = (saving + 1) * (2 * (num_layers - 1) + 1)
    bounds = [window * sum(scores) / score + window + 1 for score in scores]
    run.top_k(scores, count, min(1500, math.ceil(max(bounds))))
    for layer, bound in enumerate(bounds):
        trained = [t for t, active in enumerate(run.active) if layer in active]
        ends = [-1, *trained, len(run.active)]
        assert max(b - a for a, b in pairwise(ends)) <= bound


def proportional(scores, count):
    """Shares in proportion to the scores that add up to count, none above 1."""
    always = set()
    while True:
        rest = [i for i in range(len(scores)) if i not in always]
        unit = (count - len(always)) / sum(scores[i] for i in rest)
        more = {i for i in rest if unit * scores[i] > 1}
        if not more:
            return [1.0 if i in always else unit * score for i, score in enumerate(scores)]
        always |= more


@given(st.integers(2, 10), st.data(), st.integers(0, 2**32))
@settings(deadline=None, max_examples=20)
def test_layers_train_in_proportion_to_their_scores_where_the_budget_allows(layers, data, seed):
    scores = data.draw(st.lists(st.floats(0.05, 1), min_size=layers, max_size=layers))
    count = data.draw(st.integers(1, layers - 1))
    noise = Random(seed)
    run, still = (Run(layers, 1 - 1e-9, 100) for _ in range(2))
    for _ in range(700):
        run.top_k([score * noise.uniform(0.8, 1.2) for score in scores], count, 1)
    assert run.shares(100) == pytest.approx(proportional(scores, count), abs=0.06)
    # Scores that never change make layers take turns in a fixed order, which is less fair.
    still.top_k(scores, count, 700)
    assert still.shares(100) == pytest.approx(proportional(scores, count), abs=0.15)


def test_layers_that_the_budget_holds_back_share_in_proportion_among_themselves():
    scores = [8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0]
    shares = Run(8, 0.505, 100).top_k(scores, 4, 2000).shares()
    # Layers 6 and 7 train in the intervals that save.
    unit = sum(shares[:6]) / sum(scores[:6])
    assert shares[:6] == pytest.approx([unit * score for score in scores[:6]], abs=0.06)
    assert shares[:6] == sorted(shares[:6], reverse=True)
    assert min(shares[6:]) > 0.6


def test_a_claim_that_was_long_too_large_to_be_met_does_not_outlast_its_score():
    # Layer 0 asks for nine tenths of the time and gets a third of it.
    run = Run(8, 0.505, 100).top_k([9.0, *[0.1] * 7], 3, 1000)
    assert run.shares()[0] == pytest.approx(1 / 3, abs=0.01)
    run.top_k([0.1, *[1.0] * 7], 3, 60)
    assert run.shares(1010)[0] < 0.05
