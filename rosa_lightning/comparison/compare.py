"""A comparison from its plan to ``comparison.json``: rates chosen, all seeds run, tested."""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from rosa_lightning.comparison.hparams import write_experiment, write_run
from rosa_lightning.comparison.paired import forgetting, paired_tests
from rosa_lightning.comparison.plan import (
    ComparisonConfig,
    Method,
    Run,
    best_learning_rate,
    nested,
    next_learning_rate,
)
from rosa_lightning.comparison.progress import ProgressDisplay
from rosa_lightning.comparison.runner import RESULT, RunFailedError, Runner
from rosa_lightning.evaluation.results import versions
from rosa_lightning.utils.files import file_digest
from rosa_lightning.utils.strict_json import read_object, write_json

COMPARISON = "comparison.json"
SHARED = "shared.yaml"
"""The configuration that all methods share."""
_MAX_EXTENSIONS = 4
"""Learning rates tried beyond a grid."""
_PROBE_STEPS = (5, 25)
"""Steps of two short runs whose difference is the time of a step."""


@dataclass
class Comparison:
    """Runs a plan. What is done already is taken from the folder."""

    config: ComparisonConfig
    methods: list[Method]
    shared_steps: int
    """Optimizer steps of the configuration that all share, which lies in the folder."""
    runner: Runner
    display: ProgressDisplay
    interval: int = 1
    """Optimizer steps from one validation to the next; a run ends with one."""
    split_seed: int = 0
    """Chooses the validation records, which are the same for all runs."""
    texts: Path | None = None
    """File of general texts, for the loss on them before and after."""
    data: dict[str, Any] = field(default_factory=dict)
    """What `describe_data` says of the data."""
    _rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    _base: dict[str, Any] = field(default_factory=dict)
    _seen: set[Run] = field(default_factory=set)

    @property
    def root(self) -> Path:
        """Folder of all runs."""
        return Path(self.config.folder).absolute()

    def run(self) -> dict[str, Any]:
        """Do what is left of the plan; the content of ``comparison.json``.

        Raises:
            ValueError: The folder holds runs with other settings, or the base cannot be tested.
        """
        if self.config.test or self.texts is not None:
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
                    row["runs"].append(self._tested(method, run, self._trained(method, run)))
                    self._write()
        return self._write(with_tests=True)  # which draw thousands of samples, so once

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
        result = {"folder": str(folder.relative_to(self.root)), **asdict(run)}
        known: dict[str, Any] = {}
        try:
            overrides = self._overrides(method, run, self._steps(method))
            self.runner.prepare(overrides, folder)
            known = read_object(folder / RESULT)
            if known:
                result = known
            else:
                self.display.begin("train", run)
                since = time.monotonic()
                result |= summary(self.runner.fit(folder, self.display.at))
                result["wall_seconds"] = {"train": round(time.monotonic() - since, 1)}
                write_json(folder / RESULT, result)
        except RunFailedError as error:
            result |= {"status": "failed", "error": str(error), "val_loss": None}
            if not error.killed:  # which may well go on another time
                write_json(folder / RESULT, result)
        if is_new:
            write_run(folder, method, result)
            self.display.end("train", run, result, known=bool(known))
        return result

    def _tested(self, method: Method, run: Run, result: dict[str, Any]) -> dict[str, Any]:
        """A finished run with its answers, and its loss on general text, where asked for."""
        if result["status"] != "finished":
            return result
        result, errors = self._evaluated(run, run.folder(self.root), result)
        write_json(run.folder(self.root) / RESULT, result)
        write_run(run.folder(self.root), method, result)
        return result | errors  # which are tried again: the training stands

    def _tested_base(self) -> dict[str, Any]:
        """The base itself, before any training."""
        run, folder = Run("base", 0.0, self.config.seeds[0]), self.root / "base"
        self.runner.prepare(nested(self._shared(folder, run)), folder)
        known = read_object(folder / RESULT) or {"status": "finished", "folder": "base"}
        result, errors = self._evaluated(run, folder, known)
        if errors:
            raise ValueError(
                f"the test of the base failed: {next(iter(errors.values()))}. Set "
                "data.test_sources, or comparison.test to false and comparison.general_text to "
                "null."
            )
        write_json(folder / RESULT, result)
        return result

    def _evaluated(
        self, run: Run, folder: Path, result: dict[str, Any]
    ) -> tuple[dict[str, Any], dict[str, str]]:
        """A result with what is asked for of its checkpoint, and the errors of what failed."""
        checkpoint, texts, tick = result.get("checkpoint"), self.texts, self.display.at
        result, errors = dict(result), dict[str, str]()
        jobs: dict[str, Callable[[], Any]] = {}
        if self.config.test:
            jobs["test"] = lambda: self.runner.test(folder, checkpoint, tick)["results"]
        if texts is not None:
            jobs["text"] = lambda: without_texts(
                self.runner.text_loss(folder, checkpoint, texts, tick)
            )
        for kind, job in jobs.items():
            name = {"test": "tasks", "text": "text_loss"}[kind]
            known = name in result and (kind == "test" or result[name]["texts"] == self._digest)
            try:
                if not known:
                    self.display.begin(kind, run)
                    since = time.monotonic()
                    result[name] = job()
                    took = {kind: round(time.monotonic() - since, 1)}
                    result["wall_seconds"] = result.get("wall_seconds", {}) | took
            except RunFailedError as error:
                errors[f"{kind}_error"] = str(error)
            self.display.end(kind, run, result | errors, known=known)
        return result, errors

    @cached_property
    def _digest(self) -> str | None:
        return None if self.texts is None else file_digest(self.texts)

    def _steps(self, method: Method) -> int:
        """Optimizer steps of a run of a method."""
        if self.config.train_seconds is None:
            return self.config.max_steps or self.shared_steps
        folder = self.root / "time" / Run(method.name, 0.0, 0).folder(Path()).parent
        known = read_object(folder / RESULT)
        if not known:
            first = [self.config.of(method.name, key)[0] for key in ("learning_rates", "seeds")]
            run = Run(method.name, *first)
            took = []
            self.display.begin("time", run)
            for steps in _PROBE_STEPS:
                probe = folder / str(steps)
                self.runner.prepare(self._overrides(method, run, steps, probe), probe)
                took.append(self.runner.fit(probe, self.display.at)["train_seconds"])
            a_step = (took[1] - took[0]) / (_PROBE_STEPS[1] - _PROBE_STEPS[0])
            a_step = a_step if a_step > 0 else took[1] / _PROBE_STEPS[1]
            known = {"seconds_per_step": a_step}
            write_json(folder / RESULT, known)
            self.display.end("time", run, known)
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
            "data.loading.split_seed": self.split_seed,
            "validate_first": False,
            "trainer.enable_progress_bar": False,
            "trainer.logger": logger,
        }

    def _write(self, *, with_tests: bool = False) -> dict[str, Any]:
        reference, trained = self.config.compared_with, self.data.get("trained_tasks", [])
        content = {
            "config": asdict(self.config),
            "reference": reference,
            "data": self.data,
            "base": self._base,
            "methods": self._rows,
            "tests": paired_tests(self._rows, reference, self.root) if with_tests else [],
            "forgetting": (
                forgetting(self._rows, self._base, self.root, trained) if with_tests else {}
            ),
            "versions": versions(),
        }
        write_json(self.root / COMPARISON, content)
        write_experiment(self.root, self._rows)
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


def without_texts(found: dict[str, Any]) -> dict[str, Any]:
    """What is kept of a loss on texts beside its file, which has each text."""
    return {name: found[name] for name in ("loss", "tokens", "texts")}
