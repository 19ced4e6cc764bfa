"""What is compared: methods as overrides of one configuration, budgets, and the runs they make."""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

_OF_A_METHOD = {"learning_rates", "seeds"}
"""Keys of the comparison that a method may have of its own."""

_SHARED = {
    "optimizer.init_args.lr": "comparison.learning_rates",
    "seed_everything": "comparison.seeds",
    "data.seed": "comparison.seeds",
    "data.loading.split_seed": "it for all methods",
    "trainer.max_steps": "comparison.max_steps",
    "trainer.max_epochs": "comparison.max_steps",
    "trainer.accumulate_grad_batches": "it for all methods",
    "trainer.callbacks": "them for all methods",
    "trainer.logger": "none: each run has its own",
    "trainer.val_check_interval": "it for all methods",
}
"""Keys that no method has of its own, and what to set in their place."""


@dataclass(frozen=True, kw_only=True)
class ComparisonConfig:
    """A comparison of methods on one base with the same data.

    Args:
        methods: What each method has otherwise than the shared configuration, by its name, such as
            ``{"LoRA": {"model.peft": {...}, "dls.policy": "all"}}``; keys may be dotted.
            ``comparison.learning_rates`` and ``comparison.seeds`` there are those of the method.
        reference: The method that the others are tested against; by default the first.
        trainable_parameters: Budget of every method: its rank is set to come closest to it, and
            its alpha in proportion. None leaves ranks as they are.
        learning_rates: Tried with the first seed; each method takes its best by validation loss.
        extend_grid: Go on beyond the grid, by its last ratio, where the best stands at its edge.
        seeds: Of a run's start and the order of its data.
        max_steps: Optimizer steps of each run; by default trainer.max_steps.
        train_seconds: Seconds of training in place of steps: each method gets as many steps as it
            takes in that time, by a measurement before its first run.
        test: Answer the test sources with the best checkpoint of each run at the chosen rate.
        general_text: Texts on which the loss is computed before and after training, to see what is
            forgotten: demo (40 paragraphs in the package), a .txt file with a text a line, .jsonl,
            .json or .parquet with the field text, or a source, such as ``{"hub": ...}``.
        folder: Where to: one run folder for each run, ``comparison.json`` and ``report.html``.
    """

    # Of plain values: for dict[str, Any] the parser adds the defaults of a class that is named.
    methods: dict[str, dict]  # type: ignore[type-arg]
    reference: str | None = None
    trainable_parameters: int | None = None
    learning_rates: list[float] = field(default_factory=lambda: [1e-3])
    extend_grid: bool = False
    seeds: list[int] = field(default_factory=lambda: [0])
    max_steps: int | None = None
    train_seconds: float | None = None
    test: bool = True
    general_text: str | dict[str, Any] | None = None
    folder: str = "comparison"

    def __post_init__(self) -> None:
        """Check what can be checked without a model."""
        if not self.methods:
            raise ValueError("methods is empty. Name at least one method.")
        if self.reference is not None and self.reference not in self.methods:
            raise ValueError(
                f"reference={self.reference!r} is none of the methods: {', '.join(self.methods)}."
            )
        self._check_lists()
        slugs = [slug(name) for name in self.methods]
        if len({*slugs, "base", "time"}) != len(slugs) + 2:
            raise ValueError(
                f"methods={', '.join(self.methods)} make equal names of folders, or base or time. "
                "Give each another name."
            )
        for name in ("max_steps", "train_seconds", "trainable_parameters"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name}={value} is not above 0. Set comparison.{name}, or null.")
        if self.extend_grid and len(self.learning_rates) < 2:
            raise ValueError(
                "extend_grid goes on by the ratio of two learning rates, and one is given. Give "
                "another in comparison.learning_rates, or set extend_grid to false."
            )
        if self.max_steps is not None and self.train_seconds is not None:
            raise ValueError("max_steps and train_seconds are both set. Leave one of them out.")

    def _check_lists(self) -> None:
        lists = [("learning_rates", self.learning_rates), ("seeds", self.seeds)]
        for method, given in self.methods.items():
            overrides = nested(given)
            for key, instead in _SHARED.items():
                if _holds(overrides, key):
                    raise ValueError(f"the method {method} sets {key}. Set {instead}.")
            own = set(overrides.get("comparison", {}))
            if own - _OF_A_METHOD:
                raise ValueError(
                    f"the method {method} sets comparison.{min(own - _OF_A_METHOD)}. Of the "
                    f"comparison's keys a method can have these: {', '.join(sorted(_OF_A_METHOD))}."
                )
            lists += [(f"{key} of {method}", self.of(method, key)) for key in sorted(own)]
        for name, values in lists:
            if not isinstance(values, list) or not values or len(set(values)) != len(values):
                raise ValueError(f"{name}={values} must hold at least one value, and each once.")

    @property
    def compared_with(self) -> str:
        """The reference, or the first method."""
        return self.reference or next(iter(self.methods))

    def of(self, method: str, key: str) -> list[Any]:
        """``learning_rates`` or ``seeds`` of a method: its own, or those of all."""
        own = nested(self.methods[method]).get("comparison", {})
        found: list[Any] = own.get(key, getattr(self, key))
        return found

    def overrides(self, method: str) -> dict[str, Any]:
        """What a method has otherwise than the shared configuration, nested."""
        found = nested(self.methods[method])
        found.pop("comparison", None)
        return found


def _holds(settings: Any, key: str) -> bool:
    for name in key.split("."):
        if not isinstance(settings, Mapping) or name not in settings:
            return False
        settings = settings[name]
    return True


@dataclass(frozen=True)
class Run:
    """One training: a method at a learning rate, with a seed."""

    method: str
    learning_rate: float
    seed: int

    def folder(self, root: Path) -> Path:
        """Where the run lies."""
        return root / slug(self.method) / f"lr-{self.learning_rate:g}-seed-{self.seed}"


@dataclass(frozen=True)
class Method:
    """A method as it is run."""

    name: str
    overrides: dict[str, Any]
    """Of the shared configuration, with the rank that the budget gives."""
    rank: int | None
    trainable_parameters: int


def finished(method: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The runs of a method's row, one for each seed, that came to their end."""
    return [run for run in method["runs"] if run["status"] == "finished"]


def mean_losses(content: Mapping[str, Any]) -> dict[str, float]:
    """The mean validation loss over the seeds, of each method that has one."""
    return {
        name: mean(run["val_loss"] for run in runs)
        for name, method in content["methods"].items()
        if (runs := finished(method))
    }


def slug(name: str) -> str:
    """A method's name as the name of a folder."""
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in name).strip(".") or "method"


def nested(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Overrides with dotted keys as nested mappings, as a configuration file has them.

    Keys within a value are left as they are: PEFT has some with dots, which name modules.
    """
    found: dict[str, Any] = {}
    for key, value in overrides.items():
        *path, last = key.split(".")
        level = found
        for name in path:
            level = level.setdefault(name, {})
        old = level.get(last)
        if isinstance(value, Mapping) and isinstance(old, Mapping):
            value = {**old, **value}
        level[last] = deepcopy(value)
    return found


@dataclass(frozen=True)
class LearningRate:
    """The rate that a method takes, and where it stands in what was tried."""

    value: float
    at_edge: bool
    """It is the lowest or the highest that was tried, so a better one may lie beyond."""


def best_learning_rate(losses: Mapping[float, float | None]) -> LearningRate | None:
    """The rate with the lowest validation loss; None where every run failed or diverged."""
    sound = {rate: loss for rate, loss in losses.items() if loss is not None and loss == loss}
    if not sound:
        return None
    best = min(sound, key=lambda rate: (sound[rate], rate))
    return LearningRate(best, len(losses) > 1 and best in (min(losses), max(losses)))


def next_learning_rate(losses: Mapping[float, float | None]) -> float | None:
    """The rate beyond the edge at which the best stands, by the grid's ratio there; else None."""
    best = best_learning_rate(losses)
    if best is None or not best.at_edge:
        return None
    rates = sorted(losses)
    if best.value == rates[0]:
        return rates[0] * rates[0] / rates[1]
    return rates[-1] * rates[-1] / rates[-2]
