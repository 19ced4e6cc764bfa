"""The settings of layer selection, and the state of all selections of a run.

Pure torch, no trainer: ties scores, a policy and a budget together.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, get_args

from torch import Generator, Tensor

from .budget import BackwardBudget, layer_costs, steps_share
from .layers import Layer
from .policies import (
    Normalization,
    Policy,
    normalize_scores,
    resolve_indices,
    resolve_num_active,
    select_layers,
)

_RANGES: dict[str, tuple[Any, Callable[[Any], bool], str]] = {
    "interval": (Integral, lambda n: n >= 1, "a whole number of steps, at least 1"),
    "warmup_steps": (Integral, lambda n: n >= 0, "a whole number of steps, 0 for none"),
    "final_steps_all": (Integral, lambda n: n >= 0, "a whole number of steps, 0 for none"),
    "seed": (Integral, lambda n: True, "a whole number"),
    "backward_budget": (Real, lambda x: 0 < x <= 1, "a share in (0, 1], 1 for no budget"),
    "temperature": (Real, lambda x: 0 < x < math.inf, "a number above 0, 1 for shares by score"),
    "score_share": (Real, lambda x: 0 < x <= 1, "a share of the total score, in (0, 1]"),
    "score_smoothing": (Real, lambda x: 0 <= x < 1, "a weight in [0, 1), 0 for no memory"),
    "always_active": (list | tuple, lambda given: _whole(given), "a list of whole numbers"),
    "fixed_layers": (list | tuple, lambda given: _whole(given), "a list of whole numbers"),
}
"""The type and range of each setting, and what to set."""


def _whole(given: Sequence[object]) -> bool:
    return all(isinstance(index, Integral) and not isinstance(index, bool) for index in given)


def _check(config: object, *names: str) -> None:
    for name in names:
        (kind, holds, advice), given = _RANGES[name], getattr(config, name)
        if isinstance(given, bool) or not isinstance(given, kind) or not holds(given):
            raise ValueError(f"{name}={given!r} is out of range. Set {advice}.")


def check_choice(name: str, given: object, known: Sequence[str]) -> None:
    """Refuse a name that is none of those known."""
    if given not in known:
        raise ValueError(f"{name}={given!r} is unknown. Set one of {', '.join(known)}.")


@dataclass(frozen=True, kw_only=True)
class PolicyOptions:
    """What policies read besides the number of active layers."""

    temperature: float = 1.0
    """For sample: below 1 nearer to top_k, above 1 nearer to random."""
    score_share: float = 0.5
    """For threshold, which does not read num_active: a share of the total score, in (0, 1]."""
    score_smoothing: float = 0.0
    """Weight of earlier selections in a score, in [0, 1): a moving average with its bias corrected.
    0 takes each score as it is."""
    score_normalization: Normalization = "none"
    """Divides a layer's score by the square root of the number of its norm weights (sqrt_size), by
    the mean of its scores so far (running_mean), or by nothing (none)."""
    always_active: list[int] = field(default_factory=list)
    """Layers that always train; they count towards num_active. Negative indices count from the last
    layer."""
    fixed_layers: list[int] = field(default_factory=list)
    """For fixed: the layers that train."""

    def __post_init__(self) -> None:
        """Check each value."""
        _check(self, "temperature", "score_share", "score_smoothing")
        _check(self, "always_active", "fixed_layers")
        check_choice("score_normalization", self.score_normalization, get_args(Normalization))


@dataclass(frozen=True, kw_only=True)
class SelectionConfig:
    """How layers are selected; the arguments of `DynamicLayerSelection` say what each means."""

    num_active: int | float = 0.5
    interval: int = 100
    policy: Policy = "top_k"
    policy_options: PolicyOptions = field(default_factory=PolicyOptions)
    backward_budget: float = 1.0
    warmup_steps: int = 0
    final_steps_all: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        """Check what can be checked without a model."""
        resolve_num_active(self.num_active)
        _check(self, "interval", "warmup_steps", "final_steps_all", "backward_budget", "seed")
        check_choice("policy", self.policy, get_args(Policy))
        fixed = self.policy_options.fixed_layers
        if (self.policy == "fixed") != bool(fixed):
            raise ValueError(
                f"policy={self.policy!r} with fixed_layers={fixed}: policy 'fixed' needs "
                "fixed_layers, and only it reads them. Set both or neither."
            )
        if fixed and self.backward_budget < 1:
            raise ValueError(
                f"backward_budget={self.backward_budget} has nothing to share under policy "
                "'fixed'. Set another policy, or fixed_layers that cost no more."
            )

    @property
    def needs_length(self) -> bool:
        """Whether selecting depends on how many steps the run will have."""
        return self.final_steps_all > 0 or self.backward_budget < 1

    def resolve(self, layers: Sequence[Layer]) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
        """What the settings mean for these layers: num_active, always_active and fixed_layers."""
        positions, options = [layer.index for layer in layers], self.policy_options
        count = resolve_num_active(self.num_active, len(layers))
        always = resolve_indices("always_active", options.always_active, positions)
        if len(always) > count and self.policy in ("top_k", "sample", "random"):
            raise ValueError(
                f"always_active={options.always_active} holds more layers than num_active="
                f"{self.num_active} lets train ({count}). Raise num_active or shorten it."
            )
        return count, always, resolve_indices("fixed_layers", options.fixed_layers, positions)


class LayerSelector:
    """The selections of a run; layers are counted from 0 among those that can be selected.

    Args:
        config: The settings.
        layers: The layers that can be selected.
        num_weights: How many norm weights each has.
        total_steps: The optimizer step at which the run ends; infinite if unknown.
        first_step: The one at which it begins, later than 0 in a second fit.

    Attributes:
        active: Sorted indices of the layers that train; all before the first selection.
        scores: Each layer's score at the last selection, as measured; None before the first.
        num_selections: Selections so far.
        counts: How often each layer was selected.
    """

    def __init__(
        self,
        config: SelectionConfig,
        layers: Sequence[Layer],
        num_weights: Sequence[int],
        total_steps: float = math.inf,
        first_step: int = 0,
    ) -> None:
        if config.final_steps_all and math.isinf(total_steps):
            raise ValueError(
                f"final_steps_all={config.final_steps_all} needs to know where the run ends. Set "
                "trainer.max_steps, or trainer.max_epochs with a data set that has a length."
            )
        self.config = config
        self._num_active, self._always, self._fixed = config.resolve(layers)
        self._num_weights = tuple(num_weights)
        above = [layer.num_above for layer in layers]
        self._costs = layer_costs(above)
        self._end = total_steps - config.final_steps_all
        self._budget: BackwardBudget | None = None
        if config.backward_budget < 1:
            costs = layer_costs(above, self._always)
            full_steps = max(0, config.warmup_steps - first_step) + config.final_steps_all
            share = steps_share(
                *(config.backward_budget, config.interval, costs),
                *(total_steps - first_step, full_steps),
            )
            by_score = config.policy in ("top_k", "sample", "threshold")
            self._budget = BackwardBudget(share, costs, self._always, by_score=by_score)
        self._generator = Generator().manual_seed(config.seed)
        self.active: tuple[int, ...] = tuple(range(len(layers)))
        self.scores: tuple[float, ...] | None = None
        self.num_selections = 0
        self.counts = [0] * len(layers)
        self._recent = _DecayingMean(config.policy_options.score_smoothing, len(layers))
        self._ever = _DecayingMean(1.0, len(layers))
        self._spent = 0.0
        self._first_step = self._counted_steps = first_step

    def is_due(self, step: int) -> bool:
        """Whether this optimizer step, counted from 0, selects."""
        # Without any selection yet (a fit that starts late, a first score that was not finite)
        # the next step scores, whatever the interval.
        start = self.config.warmup_steps
        on_time = (step - start) % self.config.interval == 0 or self.num_selections == 0
        return start <= step < self._end and on_time

    def steps_ahead(self, step: int) -> int:
        """Steps after this one for which its choice holds."""
        interval = self.config.interval
        whole = interval - (step - self.config.warmup_steps) % interval
        return int(min(whole, self._end - step)) - 1

    def select(self, scores: Tensor, step: int) -> None:
        """Choose anew by finite scores of 0 or above, shape (num_layers,), at an optimizer step."""
        self._count_cost(step, 1.0)
        values: list[float] = scores.tolist()
        smoothed, means = self._recent.update(values), self._ever.update(values)
        comparable = normalize_scores(
            smoothed,
            self.config.policy_options.score_normalization,
            self._num_weights,
            means if self._ever.weight > 1 else None,
        )
        if self._budget is None:
            self.active = self._take(comparable, 0)
        else:
            self.active = self._budget.select(comparable, self.steps_ahead(step), self._take)
        self.scores = tuple(values)
        self.num_selections += 1
        for index in self.active:
            self.counts[index] += 1

    def keep(self, step: int) -> None:
        """Go on with the active layers, where scores cannot be used."""
        self._count_cost(step, 1.0)
        # Before the first selection the next step scores again.
        if self._budget is not None and self.num_selections > 0:
            self._budget.spend(self.active, self.steps_ahead(step))

    def activate_all(self, step: int) -> bool:
        """At the end, let all layers train from this step on; whether that changes anything."""
        everything = tuple(range(len(self._costs)))
        if step < self._end or self.active == everything:
            return False
        self._count_cost(step, 1.0)
        self.active = everything
        return True

    def backward_share(self, step: int) -> float:
        """Mean share of a full backward that the steps before this one have cost."""
        since = (step - self._counted_steps) * self._costs[min(self.active)]
        return (self._spent + since) / max(1, step - self._first_step)

    def metrics(self, positions: Sequence[int], step: int) -> dict[str, float]:
        """What to log of the choice of this step, by name; layers go by their positions."""
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
        return select_layers(
            self.config.policy,
            scores,
            self._num_active,
            generator=self._generator,
            temperature=self.config.policy_options.temperature,
            score_share=self.config.policy_options.score_share,
            always_active=self._always,
            fixed_layers=self._fixed,
            floor=floor,
        )

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
            "history": {"recent": self._recent.state_dict(), "ever": self._ever.state_dict()},
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
        self._recent.load_state_dict(state_dict["history"]["recent"])
        self._ever.load_state_dict(state_dict["history"]["ever"])
        if self._budget is not None and state_dict["budget"] is not None:
            self._budget.load_state_dict(state_dict["budget"])
        self._spent = state_dict["spent"]
        self._first_step = state_dict["first_step"]
        self._counted_steps = state_dict["counted_steps"]


class _DecayingMean:
    """The mean of all lists so far, each weighing `decay` times the one after it.

    After t lists the weights are decay**(t - i): an exponential moving average, bias corrected.
    """

    def __init__(self, decay: float, length: int) -> None:
        self.decay = decay
        self.weight = 0.0
        self.sums = [0.0] * length

    def update(self, values: Sequence[float]) -> list[float]:
        self.weight = self.decay * self.weight + 1
        pairs = zip(self.sums, values, strict=True)
        self.sums = [self.decay * total + value for total, value in pairs]
        return [total / self.weight for total in self.sums]

    def state_dict(self) -> dict[str, Any]:
        return {"weight": self.weight, "sums": list(self.sums)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.weight = state_dict["weight"]
        self.sums = list(state_dict["sums"])
