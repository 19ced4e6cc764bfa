"""All selections of a run: the layers that train now, how they came to it, and what it has cost.

Pure torch, no trainer. It ties scores, a policy and a budget together, and is all that has to be
saved to go on selecting as if a run had never stopped.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Generator, Tensor

from rosa_lightning.dls.budget import BackwardBudget
from rosa_lightning.dls.scores import ScoreHistory


@dataclass(frozen=True)
class Timing:
    """When layers are selected."""

    interval: int
    """Optimizer steps from one selection to the next."""
    start: int
    """The first step that may select; all layers train before it."""
    end: float
    """The step from which all layers train to the end of the run."""

    def is_due(self, step: int, num_selections: int) -> bool:
        """Whether this optimizer step, counted from 0, selects."""
        # Without any selection yet (a fit that starts late, a first score that was not finite)
        # the next step scores, whatever the interval.
        on_time = (step - self.start) % self.interval == 0 or num_selections == 0
        return self.start <= step < self.end and on_time

    def steps_ahead(self, step: int) -> int:
        """Steps after this one for which its choice holds."""
        whole = self.interval - (step - self.start) % self.interval
        return int(min(whole, self.end - step)) - 1


class Selector:
    """Selects again and again, and remembers.

    Layers are counted from 0 among those that can be selected.

    Attributes:
        active: Sorted indices of the layers that train; all before the first selection.
        scores: Each layer's score at the last selection, as it was measured; None before the first.
        num_selections: Selections so far.
        counts: How often each layer was selected.
    """

    def __init__(
        self,
        choose: Callable[[Tensor, int, Generator], tuple[int, ...]],
        costs: Sequence[float],
        history: ScoreHistory,
        budget: BackwardBudget | None,
        timing: Timing,
        seed: int,
        first_step: int = 0,
    ) -> None:
        """Start with all layers active.

        Args:
            choose: Turns scores, the lowest index that may be taken and a generator into indices.
            costs: What a step costs whose lowest active layer is this one; shares of a full
                backward.
            history: Makes scores comparable.
            budget: Shares time; None leaves the choice to the scores alone.
            timing: When it is time to select.
            seed: Seed of the generator.
            first_step: The optimizer step at which the run begins, later than 0 in a second fit.
        """
        self._choose = choose
        self._costs = tuple(costs)
        self._history = history
        self._budget = budget
        self.timing = timing
        self._generator = Generator().manual_seed(seed)
        self.active: tuple[int, ...] = tuple(range(len(costs)))
        self.scores: tuple[float, ...] | None = None
        self.num_selections = 0
        self.counts = [0] * len(costs)
        self._spent = 0.0
        self._first_step = self._counted_steps = first_step

    def is_due(self, step: int) -> bool:
        """Whether this optimizer step selects."""
        return self.timing.is_due(step, self.num_selections)

    def select(self, scores: Tensor, step: int) -> None:
        """Choose anew.

        Args:
            scores: Finite scores of 0 or above, shape (num_layers,).
            step: The optimizer step, counted from 0.
        """
        self._count_cost(step, 1.0)
        comparable = self._history.update(scores)
        if self._budget is None:
            self.active = self._take(comparable, 0)
        else:
            self.active = self._budget.select(comparable, self.timing.steps_ahead(step), self._take)
        self.scores = tuple(scores.tolist())
        self.num_selections += 1
        for index in self.active:
            self.counts[index] += 1

    def keep(self, step: int) -> None:
        """Go on with the active layers, where scores cannot be used."""
        self._count_cost(step, 1.0)
        # Before the first selection the next step scores again.
        if self._budget is not None and self.num_selections > 0:
            self._budget.spend(self.active, self.timing.steps_ahead(step))

    def activate_all(self, step: int) -> bool:
        """At the end, let all layers train from this step on; whether that changes anything."""
        everything = tuple(range(len(self._costs)))
        if step < self.timing.end or self.active == everything:
            return False
        self._count_cost(step, 1.0)
        self.active = everything
        return True

    def backward_share(self, step: int) -> float:
        """Mean share of a full backward that the steps before this one have cost.

        Args:
            step: No earlier than the one after the last that scored.
        """
        since = (step - self._counted_steps) * self._costs[min(self.active)]
        return (self._spent + since) / max(1, step - self._first_step)

    def metrics(self, positions: Sequence[int], step: int) -> dict[str, float]:
        """What to log of the choice that this step has made, by name.

        Args:
            positions: Numbers of the layers, ascending.
            step: The optimizer step, counted from 0.
        """
        active = {positions[index] for index in self.active}
        metrics: dict[str, float] = {
            "lowest_active": min(active),
            "num_active": len(active),
            "backward_share": self.backward_share(step + 1),
        }
        width = max(2, len(str(positions[-1])))
        for position, score in zip(positions, self.scores or (), strict=True):
            metrics[f"score/{position:0{width}d}"] = score
            metrics[f"active/{position:0{width}d}"] = float(position in active)
        return metrics

    def _take(self, scores: Tensor, floor: int) -> tuple[int, ...]:
        return self._choose(scores, floor, self._generator)

    def _count_cost(self, step: int, cost: float) -> None:
        """Add what the steps up to this one have cost, and the cost of this one."""
        self._spent += (step - self._counted_steps) * self._costs[min(self.active)] + cost
        self._counted_steps = step + 1

    def state_dict(self) -> dict[str, Any]:
        """All that later selections depend on, as plain numbers and one tensor."""
        return {
            "active": list(self.active),
            "scores": None if self.scores is None else list(self.scores),
            "num_selections": self.num_selections,
            "selection_counts": list(self.counts),
            "generator": self._generator.get_state(),
            "history": self._history.state_dict(),
            "budget": None if self._budget is None else self._budget.state_dict(),
            "spent": self._spent,
            "first_step": self._first_step,
            "counted_steps": self._counted_steps,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from such a state; a budget that it does not know starts afresh."""
        self.active = tuple(state_dict["active"])
        self.scores = None if state_dict["scores"] is None else tuple(state_dict["scores"])
        self.num_selections = state_dict["num_selections"]
        self.counts = list(state_dict["selection_counts"])
        self._generator.set_state(state_dict["generator"].cpu())
        self._history.load_state_dict(state_dict["history"])
        if self._budget is not None and state_dict["budget"] is not None:
            self._budget.load_state_dict(state_dict["budget"])
        self._spent = state_dict["spent"]
        self._first_step = state_dict["first_step"]
        self._counted_steps = state_dict["counted_steps"]
