"""A budget for the backward pass: which layers an interval may train, so that the mean cost holds.

A step costs the layers from the top to the lowest one that trains, as a share of a full backward; a
step that scores costs a full one.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_ROUNDING = 1e-9  # of sums of costs, in full backwards


def layer_costs(
    candidate_layers: Sequence[int], num_layers: int, always_active: Sequence[int] = ()
) -> tuple[float, ...]:
    """What a step costs whose lowest active candidate is this one: (L - l) / L for layer l of L.

    Indices of always_active are those of candidates, which train whatever is selected.
    """
    costs = [
        (num_layers - layer) / (num_layers - candidate_layers[0]) for layer in candidate_layers
    ]
    least = max((costs[index] for index in always_active), default=0.0)
    return tuple(max(cost, least) for cost in costs)


def steps_share(
    budget: float,
    interval: int,
    costs: Sequence[float],
    total_steps: float = math.inf,
    full_steps: int = 0,
) -> float:
    """What the steps between selections may cost on average, so that the run keeps the budget.

    Args:
        budget: Mean share of a full backward that a step of the run may cost, above 0, below 1.
        interval: Steps from one selection to the next; the first of them costs a full backward.
        costs: What each layer costs as the lowest one.
        total_steps: Steps of the whole run; infinite if unknown.
        full_steps: How many of them train all layers. They are paid for over the whole run, and
            for nothing where its length is unknown.
    """
    if math.isinf(total_steps):
        full, between = 1.0, interval - 1.0
    else:
        selected = max(0, total_steps - full_steps)
        between = selected - math.ceil(selected / interval)
        full = total_steps - between
    least = (full + between * min(costs)) / (full + between) if full + between else 1.0
    if budget <= least:
        raise ValueError(
            f"backward_budget={budget} leaves nothing to share in a run of {total_steps} optimizer "
            f"steps: those with all layers and the top layer or always_active alone cost "
            f"{least:.3g} of a full backward. Set it above that, interval higher, fewer layers "
            "always_active or less warmup_steps and final_steps_all, or train for longer; for a "
            "trial such as fast_dev_run set backward_budget to 1."
        )
    return (budget * (full + between) - full) / between


class BackwardBudget:
    """Shares the time of a run among layers in proportion to their scores, within a mean cost.

    Each layer has a claim: its shares of the total score, summed over the selections since it last
    trained, and what it carries over from before. Policies choose by the claims. What is not spent
    is saved up. If the layer with the highest claim can be afforded, all that can be may be
    selected; if not, the interval saves for it, and only layers may be selected that cost no more
    than half way from the cheapest to the mean.

    A layer that trains pays the highest claim that goes without, and carries over the rest, but no
    more than it has earned since it last trained. So layers train about in proportion to their
    scores, those that the budget holds back among themselves, and none with a score waits forever.
    Over full intervals the mean cost stays within the budget.
    """

    def __init__(
        self,
        share: float,
        costs: Sequence[float],
        always_active: Sequence[int] = (),
        by_score: bool = True,
    ) -> None:
        self._share = share
        self._by_score = by_score
        self._costs = tuple(costs)
        self._free = [index for index in range(len(costs)) if index not in always_active]
        saving = (share + min(costs)) / 2
        self._saving_floor = next(i for i, cost in enumerate(costs) if cost <= saving)
        self._saved = 0.0
        self._earned = [0.0] * len(costs)
        self._carried = [0.0] * len(costs)

    def select(
        self, scores: Tensor, steps: int, choose: Callable[[Tensor, int], tuple[int, ...]]
    ) -> tuple[int, ...]:
        """Choose the layers of one interval, and pay for its steps without the one that selects.

        A policy chooses by claims, shape (num_candidates,), and the lowest index allowed.
        """
        weights = scores.tolist() if self._by_score else [1.0] * len(self._costs)
        earned = zip(self._earned, _shares(weights), strict=True)
        self._earned = [before + now for before, now in earned]
        claims = [sum(parts) for parts in zip(self._earned, self._carried, strict=True)]
        floor = self._floor(claims, steps)
        active = choose(torch.tensor(claims, dtype=torch.float64), floor)
        waiting = [claims[index] for index in self._free if index not in active]
        # Where none waits, the whole claim is met.
        price = max(waiting, default=math.inf)
        for index in active:
            self._carried[index] = max(0.0, min(claims[index] - price, self._earned[index]))
            self._earned[index] = 0.0
        self.spend(active, steps)
        return active

    def spend(self, active: Sequence[int], steps: int) -> None:
        """Pay for steps that train these layers, where there is nothing to choose."""
        self._saved += steps * (self._share - self._costs[min(active)])

    def _floor(self, claims: Sequence[float], steps: int) -> int:
        """The lowest layer that the coming interval may train."""
        left = [self._saved + steps * (self._share - cost) for cost in self._costs]
        affordable = next((i for i, rest in enumerate(left) if rest >= -_ROUNDING), None)
        first = max(self._free, key=lambda index: (claims[index], -index), default=0)
        return self._saving_floor if affordable is None or first < affordable else affordable

    def state_dict(self) -> dict[str, Any]:
        """What was saved, earned and carried over so far, as plain numbers."""
        return {"saved": self._saved, "earned": [*self._earned], "carried": [*self._carried]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from such a state."""
        self._saved = state_dict["saved"]
        self._earned = list(state_dict["earned"])
        self._carried = list(state_dict["carried"])


def _shares(values: Sequence[float]) -> list[float]:
    """Each value's share of their sum; equal shares if all are zero."""
    peak = max(values)
    scaled = [value / peak if peak > 0 else 1.0 for value in values]
    total = math.fsum(scaled)
    return [value / total for value in scaled]
