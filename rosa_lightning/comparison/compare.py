"""A comparison from its plan to ``comparison.json``: rates chosen, all seeds run, tested."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from rosa_lightning.comparison.paired import paired_tests
from rosa_lightning.comparison.plan import (
    ComparisonConfig,
    Run,
    best_learning_rate,
    nested,
    next_learning_rate,
)
from rosa_lightning.comparison.runner import (
    RESULT,
    RunFailedError,
    evaluate,
    fit,
    read_json,
    write_overrides,
)
from rosa_lightning.evaluation.results import versions
from rosa_lightning.utils.files import atomic_write

COMPARISON = "comparison.json"
SHARED = "shared.yaml"
"""The configuration that all methods share."""
_MAX_EXTENSIONS = 4
"""Learning rates tried beyond a grid."""
_PROBE_STEPS = (5, 25)
"""Steps of two short runs whose difference is the time of a step."""


@dataclass(frozen=True)
class Method:
    """A method as it is run."""

    name: str
    overrides: dict[str, Any]
    """Of the shared configuration, with the rank that the budget gives."""
    rank: int | None
    trainable_parameters: int


class Display(Protocol):
    """Shows how far a comparison is."""

    def begin(self, run: Run) -> None:
        """A run begins."""

    def at(self, step: int, steps: int) -> None:
        """The step that it is at."""

    def end(self, run: Run, result: dict[str, Any]) -> None:
        """It has ended, now or earlier."""


@dataclass
class Comparison:
    """Runs a plan. What is done already is taken from the folder."""

    config: ComparisonConfig
    methods: list[Method]
    shared_steps: int
    """Optimizer steps of the configuration that all share, which lies in the folder."""
    display: Display
    interval: int = 1
    """Optimizer steps from one validation to the next; a run ends with one."""
    _rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    _base: dict[str, Any] = field(default_factory=dict)
    _seen: set[Run] = field(default_factory=set)

    @property
    def root(self) -> Path:
        """Folder of all runs."""
        return Path(self.config.folder).absolute()

    @property
    def _shared_file(self) -> str:
        return str(self.root / SHARED)

    def run(self) -> dict[str, Any]:
        """Do what is left of the plan; the content of ``comparison.json``.

        Raises:
            ValueError: The folder holds runs with other settings, or the base cannot be tested.
        """
        if self.config.test:
            self._base = self._tested_base()
        for method in self.methods:
            self._rows[method.name] = self._grid(method)
            self._write()
        seeds = dict.fromkeys(s for m in self.methods for s in self.config.of(m.name, "seeds"))
        for seed in seeds:  # all methods have as many seeds wherever this stops
            for method in self.methods:
                row = self._rows[method.name]
                is_due = seed in self.config.of(method.name, "seeds")
                if row["learning_rate"] is not None and is_due:
                    run = Run(method.name, row["learning_rate"], seed)
                    row["runs"].append(self._tested(run, self._trained(method, run)))
                    self._write()
        # They draw thousands of samples of every task, so once.
        return self._write(paired_tests(self._rows, self.config.compared_with, self.root))

    def _grid(self, method: Method) -> dict[str, Any]:
        """Train at all learning rates with the first seed, and take the best."""
        rates = list(self.config.of(method.name, "learning_rates"))
        seed = self.config.of(method.name, "seeds")[0]
        most = len(rates) + (_MAX_EXTENSIONS if self.config.extend_grid else 0)
        tried: dict[float, dict[str, Any]] = {}
        for rate in rates:
            tried[rate] = self._trained(method, Run(method.name, rate, seed))
            losses = {r: result["val_loss"] for r, result in tried.items()}
            beyond = next_learning_rate(losses) if len(tried) == len(rates) else None
            if beyond is not None and len(rates) < most:
                rates.append(beyond)
        best = best_learning_rate(losses)
        return {
            "rank": method.rank,
            "trainable_parameters": method.trainable_parameters,
            "overrides": method.overrides,
            "learning_rate": None if best is None else best.value,
            "at_edge": best is not None and best.at_edge,
            "grid": [tried[rate] for rate in sorted(tried)],
            "runs": [],
        }

    def _trained(self, method: Method, run: Run) -> dict[str, Any]:
        """The result of a training, as a row; one that failed is a row, too."""
        folder = run.folder(self.root)
        is_new = run not in self._seen
        self._seen.add(run)
        if is_new:
            self.display.begin(run)
        result = {"folder": str(folder.relative_to(self.root)), **asdict(run)}
        try:
            overrides = self._overrides(method, run, self._steps(method))
            write_overrides(overrides, folder)  # which refuses what was run with other settings
            if known := read_json(folder / RESULT):
                result = known
            else:
                result |= summary(fit(self._shared_file, overrides, folder, self.display.at))
                _write_json(folder / RESULT, result)
        except RunFailedError as error:
            result |= {"status": "failed", "error": str(error), "val_loss": None}
            if not error.killed:  # which may well go on another time
                _write_json(folder / RESULT, result)
        if is_new:
            self.display.end(run, result)
        return result

    def _tested(self, run: Run, result: dict[str, Any]) -> dict[str, Any]:
        if not self.config.test or result["status"] != "finished" or "tasks" in result:
            return result
        folder = run.folder(self.root)
        try:
            result["tasks"] = evaluate(self._shared_file, folder, result["checkpoint"])["results"]
        except RunFailedError as error:
            return {**result, "test_error": str(error)}  # the training stands
        _write_json(folder / RESULT, result)
        return result

    def _tested_base(self) -> dict[str, Any]:
        """The base itself, before any training."""
        run = Run("base", 0.0, self.config.seeds[0])
        folder = self.root / "base"
        self.display.begin(run)
        try:
            found = evaluate(self._shared_file, folder, None, self._shared(folder, run))
        except RunFailedError as error:
            raise ValueError(
                f"the test of the base failed: {error}. Set data.test_sources, or comparison.test "
                "to false."
            ) from error
        result = {"status": "finished", "folder": "base", "tasks": found["results"]}
        self.display.end(run, result)
        return result

    def _steps(self, method: Method) -> int:
        """Optimizer steps of a run of a method."""
        if self.config.train_seconds is None:
            return self.config.max_steps or self.shared_steps
        folder = self.root / "time" / Run(method.name, 0.0, 0).folder(Path()).parent
        known = read_json(folder / RESULT)
        if not known:
            first = [self.config.of(method.name, key)[0] for key in ("learning_rates", "seeds")]
            run = Run(method.name, *first)
            took = []
            for steps in _PROBE_STEPS:
                overrides = self._overrides(method, run, steps, folder / str(steps))
                record = fit(self._shared_file, overrides, folder / str(steps), self.display.at)
                took.append(record["train_seconds"])
            a_step = (took[1] - took[0]) / (_PROBE_STEPS[1] - _PROBE_STEPS[0])
            a_step = a_step if a_step > 0 else took[1] / _PROBE_STEPS[1]
            known = {"seconds_per_step": a_step}
            _write_json(folder / RESULT, known)
        seconds: float = known["seconds_per_step"]
        steps = round(self.config.train_seconds / seconds)
        return max(1, round(steps / self.interval)) * self.interval

    def _overrides(
        self, method: Method, run: Run, steps: int, folder: Path | None = None
    ) -> dict[str, Any]:
        own = {
            "optimizer.init_args.lr": run.learning_rate,
            "trainer.max_steps": steps,
            "trainer.max_epochs": -1,
        }
        shared = self._shared(folder or run.folder(self.root), run)
        return nested({**method.overrides, **own, **shared})

    def _shared(self, folder: Path, run: Run) -> dict[str, Any]:
        logger = {
            "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
            "init_args": {"save_dir": str(folder), "name": "", "version": ""},
        }
        return {
            "seed_everything": run.seed,
            "data.seed": run.seed,
            "data.loading.split_seed": self.config.split_seed,
            "validate_first": False,
            "trainer.enable_progress_bar": False,
            "trainer.logger": logger,
        }

    def _write(self, tests: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
        content = {
            "config": asdict(self.config),
            "reference": self.config.compared_with,
            "base": self._base,
            "methods": self._rows,
            "tests": list(tests),
            "versions": versions(),
        }
        _write_json(self.root / COMPARISON, content)
        return content


def summary(record: dict[str, Any]) -> dict[str, Any]:
    """What a comparison takes of the record of a finished run; the best validation counts."""
    sound = [v for v in record["validations"] if math.isfinite(v["val/loss"])]
    best = min(sound, key=lambda validation: validation["val/loss"], default=None)
    seconds = record["train_seconds"]
    return {
        "status": "finished" if best else "diverged",
        "val_loss": best and best["val/loss"],
        "val_accuracy": best and best.get("val/accuracy"),
        "best_step": best and best["step"],
        "steps": record["step"],
        "train_seconds": seconds,
        "examples_per_s": record["examples"] / seconds if seconds else None,
        "peak_mib": record["peak_mib"],
        "backward_share": record["backward_share"],
        "trainable_parameters": record["trainable_parameters"],
        "checkpoint": record["checkpoint"],
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, json.dumps(content, indent=1).encode())
