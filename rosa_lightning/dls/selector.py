"""The settings of layer selection, and the state of all selections of a run.

Pure torch, no trainer: ties scores, a policy and a budget together.
"""

import math
import operator
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, get_args

from torch import Generator, Tensor

from .budget import BackwardBudget, layer_costs, steps_share
from .layers import Layer
from .optimizer_state import OptimizerState
from .policies import (
    Normalization,
    Policy,
    normalize_scores,
    resolve_indices,
    resolve_num_active,
    select_layers,
)

Indices = tuple[int, ...]


def _one_of(names: Any) -> tuple[Any, Callable[[Any], bool], str]:
    return object, lambda given: given in get_args(names), f"one of {', '.join(get_args(names))}"


def _whole(given: list[object]) -> bool:
    return all(isinstance(index, Integral) for index in given)


_STEPS = (Integral, lambda n: n >= 0, "a whole number of steps, 0 for none")
_PATH = (str | None, lambda path: True, "a path or pattern as text")
_RANGES: dict[str, tuple[Any, Callable[[Any], bool], str]] = {
    "interval": (Integral, lambda n: n >= 1, "a whole number of steps, at least 1"),
    "warmup_steps": _STEPS,
    "final_steps_all": _STEPS,
    "seed": (Integral, lambda n: True, "a whole number"),
    "policy": _one_of(Policy),
    "optimizer_state": _one_of(OptimizerState),
    "backward_budget": (Real, lambda x: 0 < x <= 1, "a share in (0, 1], 1 for no budget"),
    "layers": _PATH,
    "norms": _PATH,
    "trainable": _PATH,
    "temperature": (Real, lambda x: 0 < x < math.inf, "a number above 0, 1 for shares by score"),
    "score_share": (Real, lambda x: 0 < x <= 1, "a share of the total score, in (0, 1]"),
    "score_smoothing": (Real, lambda x: 0 <= x < 1, "a weight in [0, 1), 0 for no memory"),
    "score_normalization": _one_of(Normalization),
    "always_active": (list | tuple, _whole, "a list of whole numbers"),
    "fixed_layers": (list | tuple, _whole, "a list of whole numbers"),
}
"""The type and range of each setting, and what to set."""

_STATE = (
    *("active", "scores", "num_selections", "selection_counts"),
    *("spent", "first_step", "counted_steps"),
)
"""Attributes of `LayerSelector` that a checkpoint holds under the same names."""


def check_settings(config: object) -> None:
    """Refuse attributes of a config that are out of range."""
    for name in _RANGES.keys() & vars(config).keys():
        (kind, holds, advice), given = _RANGES[name], getattr(config, name)
        if isinstance(given, bool) or not isinstance(given, kind) or not holds(given):
            raise ValueError(f"{name}={given!r} is out of range. Set {advice}.")


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
        check_settings(self)


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
        check_settings(self)
        fixed = self.policy_options.fixed_layers
        if (self.policy == "fixed") != bool(fixed):
            raise ValueError(
                f"policy={self.policy!r} with fixed_layers={fixed}: policy 'fixed' needs "
                "fixed_layers, and only it reads them. Set both or neither."
            )
        if fixed and self.backward_budget < 1:
            raise ValueError(
                "Policy 'fixed' leaves a backward_budget nothing to share. Set it to 1."
            )

    def resolve(self, candidate_layers: Sequence[int]) -> tuple[int, Indices, Indices]:
        """num_active, always_active and fixed_layers among the layers that can be selected."""
        options = self.policy_options
        count = resolve_num_active(self.num_active, len(candidate_layers))
        always = resolve_indices("always_active", options.always_active, candidate_layers)
        fixed = resolve_indices("fixed_layers", options.fixed_layers, candidate_layers)
        if len(always) > count and self.policy in ("top_k", "sample", "random"):
            raise ValueError(
                f"always_active={options.always_active} holds more layers than num_active="
                f"{self.num_active} lets train ({count}). Raise num_active or shorten it."
            )
        return count, always, fixed


class LayerSelector:
    """The selections of a run.

    Args:
        config: The settings.
        layers: The layers that can be selected: the candidates, counted from 0.
        num_weights: How many norm weights each has.
        total_steps: The optimizer step at which the run ends; infinite if unknown.
        first_step: The one at which it begins, later than 0 in a second fit.

    Attributes:
        active: Sorted indices of the candidates that train; all before the first selection.
        scores: Each candidate's score at the last selection, as measured; None before the first.
        num_selections: Selections so far.
        selection_counts: How often each candidate was selected.
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
                f"final_steps_all={config.final_steps_all} needs an end of the run. Set "
                "trainer.max_steps, or trainer.max_epochs with a data set that has a length."
            )
        self.config = config
        self._names = [layer.name for layer in layers]
        self._candidate_layers = [layer.index for layer in layers]
        self._num_active, self._always, self._fixed = config.resolve(self._candidate_layers)
        self._num_weights = tuple(num_weights)
        num_layers = layers[0].num_layers
        self._costs = layer_costs(self._candidate_layers, num_layers)
        self._end = total_steps - config.final_steps_all
        self._budget: BackwardBudget | None = None
        if config.backward_budget < 1:
            costs = layer_costs(self._candidate_layers, num_layers, self._always)
            full_steps = max(0, config.warmup_steps - first_step) + config.final_steps_all
            share = steps_share(
                *(config.backward_budget, config.interval, costs),
                *(total_steps - first_step, full_steps),
            )
            by_score = config.policy in ("top_k", "sample", "threshold")
            self._budget = BackwardBudget(share, costs, self._always, by_score=by_score)
        self._generator = Generator().manual_seed(config.seed)
        self.active: Indices = tuple(range(len(layers)))
        self.scores: tuple[float, ...] | None = None
        self.num_selections = 0
        self.selection_counts = (0,) * len(layers)
        self.history = {
            name: {"weight": 0.0, "sums": [0.0] * len(layers)} for name in ("recent", "ever")
        }
        self.spent = 0.0
        self.first_step = self.counted_steps = first_step

    @property
    def active_layers(self) -> Indices:
        """The active candidates by their indices in the list of layers."""
        return tuple(self._candidate_layers[index] for index in self.active)

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
        """Choose anew by finite scores of 0 or above, shape (num_candidates,)."""
        self._count_cost(step)
        values, options = scores.tolist(), self.config.policy_options
        smoothed = _update_mean(self.history["recent"], values, options.score_smoothing)
        means = _update_mean(self.history["ever"], values, 1.0)
        usual = means if self.num_selections > 0 else None
        kind = options.score_normalization
        comparable = normalize_scores(smoothed, kind, self._num_weights, usual)
        if self._budget is None:
            self.active = self._apply_policy(comparable, 0)
        else:
            ahead = self.steps_ahead(step)
            self.active = self._budget.select(comparable, ahead, self._apply_policy)
        self.scores = tuple(values)
        self.num_selections += 1
        chosen = (int(index in self.active) for index in range(len(values)))
        self.selection_counts = tuple(map(operator.add, self.selection_counts, chosen))

    def keep(self, step: int) -> None:
        """Go on with the active layers, where scores cannot be used."""
        self._count_cost(step)
        # Before the first selection the next step scores again.
        if self._budget is not None and self.num_selections > 0:
            self._budget.spend(self.active, self.steps_ahead(step))

    def activate_all(self, step: int) -> bool:
        """At the end, let all layers train from this step on; whether that changes anything."""
        everything = tuple(range(len(self._costs)))
        if step < self._end or self.active == everything:
            return False
        self._count_cost(step)
        self.active = everything
        return True

    def backward_share(self, step: int) -> float:
        """Mean share of a full backward that the steps before this one have cost."""
        since = (step - self.counted_steps) * self._costs[min(self.active)]
        return (self.spent + since) / max(1, step - self.first_step)

    def metrics(self, step: int) -> dict[str, float]:
        """What to log of the choice of this step, by name."""
        active = self.active_layers
        return {
            "lowest_active": min(active),
            "num_active": len(active),
            "backward_share": self.backward_share(step + 1),
        }

    def _apply_policy(self, scores: Tensor, floor: int) -> Indices:
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

    def _count_cost(self, step: int) -> None:
        """Add what the steps up to this one have cost, and a full backward for this one."""
        self.spent += (step - self.counted_steps) * self._costs[min(self.active)] + 1.0
        self.counted_steps = step + 1

    def state_dict(self) -> dict[str, Any]:
        """All that later selections depend on, as plain numbers and one tensor."""
        return {
            **{name: getattr(self, name) for name in _STATE},
            "layers": self._names,
            "generator": self._generator.get_state(),
            "history": deepcopy(self.history),
            "budget": None if self._budget is None else self._budget.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from such a state; a budget that it does not know starts afresh."""
        saved = state_dict["layers"]
        if saved != self._names:
            raise ValueError(
                f"The checkpoint selects among {len(saved)} layers, {saved[0]} to {saved[-1]}; "
                f"this model has {len(self._names)}, {self._names[0]} to {self._names[-1]}. Resume "
                "with the model and layers= that wrote it."
            )
        for name in _STATE:
            value = state_dict[name]
            setattr(self, name, tuple(value) if isinstance(value, list) else value)
        self._generator.set_state(state_dict["generator"].cpu())
        self.history = deepcopy(state_dict["history"])
        if self._budget is not None and state_dict["budget"] is not None:
            self._budget.load_state_dict(state_dict["budget"])


def _update_mean(mean: dict[str, Any], values: Sequence[float], decay: float) -> list[float]:
    """The mean of all lists so far, each weighing `decay` times the one after it."""
    mean["weight"] = decay * mean["weight"] + 1
    pairs = zip(mean["sums"], values, strict=True)
    mean["sums"] = [decay * total + value for total, value in pairs]
    return [total / mean["weight"] for total in mean["sums"]]
