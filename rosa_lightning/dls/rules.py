"""The settings of layer selection: checked on their own, then fitted to the layers of a model.

Pure torch, no trainer.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, get_args

from torch import Generator, Tensor

from rosa_lightning.dls.budget import BackwardBudget, layer_costs, steps_share
from rosa_lightning.dls.layers import Layer
from rosa_lightning.dls.policies import Policy, resolve_indices, resolve_num_active, select_layers
from rosa_lightning.dls.scores import Normalization, ScoreHistory
from rosa_lightning.dls.selector import Selector, Timing


@dataclass(frozen=True, kw_only=True)
class SelectionRules:
    """How layers are selected; the arguments of `DynamicLayerSelection` say what each means.

    Raises:
        ValueError: A setting that no model could have.
    """

    num_active: int | float
    interval: int
    policy: Policy
    temperature: float
    score_share: float
    score_smoothing: float
    score_normalization: Normalization
    backward_budget: float
    warmup_steps: int
    final_steps_all: int
    always_active: Sequence[int]
    fixed_layers: Sequence[int]
    seed: int

    def __post_init__(self) -> None:
        resolve_num_active(self.num_active)
        for name in ("interval", "warmup_steps", "final_steps_all", "seed"):
            check_type(name, getattr(self, name), Integral, "a whole number")
        for name in ("temperature", "score_share", "score_smoothing", "backward_budget"):
            check_type(name, getattr(self, name), Real, "a number")
        check_choice("policy", self.policy, get_args(Policy))
        check_choice("score_normalization", self.score_normalization, get_args(Normalization))
        for name, holds, advice in (
            ("interval", self.interval >= 1, "is below 1. Set the optimizer steps to wait"),
            ("warmup_steps", self.warmup_steps >= 0, "is below 0. Set 0 to select at once"),
            (
                "final_steps_all",
                self.final_steps_all >= 0,
                "is below 0. Set 0 to select to the end",
            ),
            (
                "temperature",
                self.temperature > 0 and math.isfinite(self.temperature),
                "is not above 0. Set 1 for shares by score",
            ),
            (
                "score_share",
                0 < self.score_share <= 1,
                "is outside (0, 1]. Set the share of the total score that is to train",
            ),
            (
                "score_smoothing",
                0 <= self.score_smoothing < 1,
                "is outside [0, 1). Set the weight of earlier scores, 0 for none",
            ),
            (
                "backward_budget",
                0 < self.backward_budget <= 1,
                "is outside (0, 1]. Set the mean share of a full backward, 1 for no budget",
            ),
        ):
            if not holds:
                raise ValueError(f"{name}={getattr(self, name)} {advice}.")
        if (self.policy == "fixed") != bool(self.fixed_layers):
            raise ValueError(
                f"policy={self.policy!r} with fixed_layers={self.fixed_layers}: policy 'fixed' "
                "needs fixed_layers, and only it reads them. Set both or neither."
            )
        if self.policy == "fixed" and self.backward_budget < 1:
            raise ValueError(
                f"backward_budget={self.backward_budget} has nothing to share under policy "
                "'fixed'. Set another policy, or fixed_layers that cost no more."
            )

    @property
    def needs_length(self) -> bool:
        """Whether selecting depends on how many steps the run will have."""
        return self.final_steps_all > 0 or self.backward_budget < 1

    def fit(self, layers: Sequence[Layer]) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
        """What the settings mean for these layers: num_active, always_active and fixed_layers.

        Raises:
            ValueError: A setting that this model cannot have.
        """
        positions = [layer.index for layer in layers]
        count = resolve_num_active(self.num_active, len(layers))
        always = resolve_indices("always_active", self.always_active, positions)
        if len(always) > count and self.policy in ("top_k", "sample", "random"):
            raise ValueError(
                f"always_active={list(self.always_active)} holds more layers than num_active="
                f"{self.num_active} lets train ({count}). Raise num_active or shorten it."
            )
        return count, always, resolve_indices("fixed_layers", self.fixed_layers, positions)

    def selector(
        self,
        layers: Sequence[Layer],
        num_weights: Sequence[int],
        total_steps: float,
        first_step: int = 0,
    ) -> Selector:
        """A selector among these layers that has not selected yet.

        Args:
            layers: The layers that can be selected.
            num_weights: How many norm weights each has.
            total_steps: The optimizer step at which the run ends; infinite if unknown.
            first_step: The one at which it begins.

        Raises:
            ValueError: A setting that this model or this run cannot have.
        """
        if self.final_steps_all and math.isinf(total_steps):
            raise ValueError(
                f"final_steps_all={self.final_steps_all} needs to know where the run ends. Set "
                "trainer.max_steps, or trainer.max_epochs with a data set that has a length."
            )
        count, always, fixed = self.fit(layers)
        options: dict[str, Any] = {
            "temperature": self.temperature,
            "score_share": self.score_share,
            "always_active": always,
            "fixed_layers": fixed,
        }

        def choose(scores: Tensor, floor: int, generator: Generator) -> tuple[int, ...]:
            return select_layers(
                self.policy, scores, count, floor=floor, generator=generator, **options
            )

        return Selector(
            choose,
            layer_costs([layer.num_above for layer in layers]),
            ScoreHistory(self.score_smoothing, self.score_normalization, num_weights),
            self._budget(layers, always, total_steps, first_step),
            Timing(self.interval, self.warmup_steps, total_steps - self.final_steps_all),
            self.seed,
            first_step,
        )

    def _budget(
        self, layers: Sequence[Layer], always: Sequence[int], total_steps: float, first_step: int
    ) -> BackwardBudget | None:
        if self.backward_budget == 1:
            return None
        costs = layer_costs([layer.num_above for layer in layers], always)
        full_steps = max(0, self.warmup_steps - first_step) + self.final_steps_all
        share = steps_share(
            self.backward_budget, self.interval, costs, total_steps - first_step, full_steps
        )
        reads_scores = self.policy in ("top_k", "sample", "threshold")
        return BackwardBudget(share, costs, always, by_score=reads_scores)


def layer_indices(name: str, given: Sequence[int] | None) -> tuple[int, ...]:
    """A setting that lists layers; None means none.

    Raises:
        ValueError: It is no list of whole numbers.
    """
    if given is not None:
        check_type(name, given, list | tuple, "a list of layers")
    for index in given or ():
        check_type(name, index, Integral, "whole numbers")
    return tuple(given or ())


def check_type(name: str, given: object, wanted: Any, what: str) -> None:
    """Refuse a setting of another type, which may have come from a file or a command line.

    Raises:
        ValueError: Names the setting.
    """
    if isinstance(given, bool) or not isinstance(given, wanted):
        raise ValueError(f"{name}={given!r} is a {type(given).__name__}. Set {what}.")


def check_choice(name: str, given: str, known: Sequence[str]) -> None:
    """Refuse a name that is none of those known.

    Raises:
        ValueError: Names the setting and what is known.
    """
    if given not in known:
        raise ValueError(f"{name}={given!r} is unknown. Set one of {', '.join(known)}.")
