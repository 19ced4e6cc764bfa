"""What ``predict`` and ``test`` write: answers as JSON lines, and the results of an evaluation."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import rank_zero_info
from rich.console import Console

from rosa_lightning.evaluation.evaluator import item_id
from rosa_lightning.evaluation.results import results_table, versions, write_results
from rosa_lightning.utils.files import atomic_write, open_input, read_lines, read_text, writing
from rosa_lightning.utils.strict_json import parse
from rosa_lightning.utils.text import one_line

PREDICTIONS = "predictions.jsonl"
RESULTS = "results.json"
Items = list[dict[str, Any]]
_TYPES: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("protocol", "source", "task", "response"), str),
    "index": (int, type(None)),
    "answer": (str, type(None)),
    "correct": bool,
}
"""Types of the fields that are read of an earlier answer."""


class _JSONLines:
    """A file of JSON lines that all ranks append to, a batch at a time.

    Args:
        path: The file, which all ranks see.
        trainer: Its ranks must all come here.
        first: What the file begins with.
    """

    def __init__(self, path: Path, trainer: Trainer, first: Iterable[Any] = ()) -> None:
        self.path = path
        if trainer.is_global_zero:
            atomic_write(path, *map(_line, first))
        trainer.strategy.barrier("file made")
        # Unbuffered: a batch is one write at the end of the file, whoever else writes.
        self._file = path.open("ab", buffering=0)

    def append(self, items: Iterable[Any]) -> None:
        lines = b"".join(map(_line, items))
        with writing(self.path):
            while lines:  # a disk that fills up takes a part
                lines = lines[self._file.write(lines) :]

    def close(self) -> None:
        self._file.close()


class PredictionWriter(BasePredictionWriter):
    """Writes the records that ``predict_step`` returns, in the order of the input.

    The file takes its name when the last record is in it.

    Args:
        path: The file; by default ``predictions.jsonl`` in the run's log folder.
    """

    def __init__(self, path: str | None = None) -> None:
        super().__init__(write_interval="batch")
        self.path = path
        self._target = Path()
        self._part: _JSONLines | None = None
        self._count = 0

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin a hidden file."""
        self._target = _log_folder(trainer) / PREDICTIONS if self.path is None else Path(self.path)
        self._part = _JSONLines(self._target.with_name(f".{self._target.name}.part"), trainer)
        self._count = 0

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Append a batch, each record with its position in the input."""
        assert self._part is not None
        indices = batch_indices or range(self._count, self._count + len(prediction))
        self._count += len(prediction)
        pairs = zip(indices, prediction, strict=True)
        self._part.append([dataloader_idx, index, record] for index, record in pairs)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the records in order."""
        assert self._part is not None
        self._part.close()
        trainer.strategy.barrier("predictions written")
        if trainer.is_global_zero:
            with open_input(self._part.path) as file:
                rows = [json.loads(line) for line in file]
            # A sampler may repeat a record to give all ranks as many.
            found = {(loader, index): record for loader, index, record in rows}
            atomic_write(self._target, *(_line(found[place]) for place in sorted(found)))
            self._part.path.unlink()
            rank_zero_info(f"predictions: {self._target}")

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Remove what is not complete."""
        if self._part is not None:
            self._part.close()
            self._part.path.unlink(missing_ok=True)


class ResultWriter(Callback):
    """Writes what ``test`` finds: ``predictions.jsonl``, ``results.json`` and a table.

    Answers are appended to ``predictions.jsonl`` as they come. After a stop the next evaluation
    with the same settings, in this folder or in the next one that a logger makes beside it, goes on
    from them. ``results.json`` holds the settings from the start, and the results at the end.

    Args:
        folder: Where to; by default the run's log folder.
    """

    def __init__(self, folder: str | None = None) -> None:
        self.folder = folder
        self._target = Path()
        self._about: dict[str, Any] = {}
        self._lines: _JSONLines | None = None
        self._num_resumed = 0
        self._since = 0.0

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read what a stopped run of this evaluation has answered, and go on from there."""
        self._since = time.perf_counter()
        module: Any = pl_module
        folder = self._target = _log_folder(trainer) if self.folder is None else Path(self.folder)
        weights = module.state_dict()
        norms = [float(weights[k].float().norm()) for k in sorted(weights) if k.endswith("roae_B")]
        # The norm tells apart adapters that were loaded from the same path.
        self._about = {**module.about_evaluation(), "adapter_norm": sum(norms)}
        own = bool(trainer.loggers) and self.folder is None  # a folder of this run alone
        near = [folder, *(folder.parent.glob("*/") if own else ())]
        stopped = [path for path in near if _is_stopped(path, self._about)]
        earlier = _read_items(stopped[0] / PREDICTIONS) if stopped else []
        if earlier:
            rank_zero_info(f"going on with {len(earlier)} answers of {stopped[0] / PREDICTIONS}")
        module.evaluated.answered = {item_id(item): item for item in earlier}
        self._num_resumed = len(earlier)
        trainer.strategy.barrier("earlier answers read")
        if trainer.is_global_zero:
            write_results(folder / RESULTS, [], None, **self._about, complete=False)
        self._lines = _JSONLines(folder / PREDICTIONS, trainer, earlier)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep a batch's answers."""
        assert self._lines is not None
        module: Any = pl_module
        known = module.evaluated.answered
        self._lines.append(i for i in outputs["items"] if known.get(item_id(i)) is not i)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the answers in order, write the results and show them."""
        assert self._lines is not None
        self._lines.close()
        trainer.strategy.barrier("answers written")
        if not trainer.is_global_zero:
            return
        seconds = time.perf_counter() - self._since
        evaluated: Any = pl_module.evaluated
        path = self._target / PREDICTIONS
        items = {item_id(item): item for item in _read_items(path)}
        datamodule: Any = getattr(trainer, "datamodule", None)
        sources = [source.label for source in getattr(datamodule, "test_sources", [])]
        order = [*evaluated.config.protocols, *sources]

        def position(key: tuple[Any, ...]) -> list[int]:
            return [order.index(name) if name in order else len(order) for name in key[:2]]

        keys = sorted(items, key=lambda key: (position(key), key[2] or 0))
        atomic_write(path, *(_line(items[key]) for key in keys))
        contaminated, places, reason = _contamination(datamodule)
        about = {
            **self._about,
            "contaminated_by": places,
            "wall_time_s": round(seconds, 3),
            "resumed_answers": self._num_resumed,
            "world_size": trainer.world_size,
        }
        write_results(
            self._target / RESULTS, evaluated.scores, contaminated, **about, complete=True
        )
        notes = [*reason, f"{path}, {PREDICTIONS}: {seconds:.1f} s"]
        console = Console()
        console.width = max(console.width, 100)  # a file, say, is as wide as it must be
        console.print(results_table(about["model"], evaluated.scores, contaminated, notes))

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Close the answers, which stay to go on from."""
        if self._lines is not None:
            self._lines.close()


def _log_folder(trainer: Trainer) -> Path:
    """Where a run's files go. All ranks must ask at once: rank 0 tells the others."""
    return Path(trainer.log_dir or trainer.default_root_dir)


def _line(value: Any) -> bytes:
    text = json.dumps(value, ensure_ascii=False) + "\n"
    return text.encode(errors="backslashreplace")  # names of files may not be UTF-8


def _is_stopped(folder: Path, about: Mapping[str, Any]) -> bool:
    """Whether an evaluation of the same settings has begun here, and not ended."""
    with suppress(OSError, ValueError):
        found = parse(read_text(folder / RESULTS))
        same = json.loads(json.dumps({**about, "versions": versions(), "complete": False}))
        return isinstance(found, dict) and same.items() <= found.items()
    return False


def _read_items(path: Path) -> Items:
    """The answers in a file, without lines that are none, such as one that was cut off."""
    items: Items = []
    with suppress(FileNotFoundError), open_input(path) as file:
        for line in read_lines(file, path):
            with suppress(ValueError, KeyError, TypeError):
                item = parse(line.decode("utf-8", "replace"))
                if all(isinstance(item[name], _TYPES[name]) for name in _TYPES):
                    items.append(item)
    return items


def _contamination(datamodule: Any) -> tuple[dict[str, int] | None, list[str] | None, list[str]]:
    """How many test records of each task were trained on, from where, or why that is not known."""
    if not hasattr(datamodule, "contaminated_records"):
        return None, None, []
    try:
        records, places = datamodule.contaminated_records()
    except (OSError, ValueError) as error:
        return None, None, [one_line(error)]
    counts = Counter(record.task for record in records)
    return (
        counts,
        places,
        [f"Contaminated counts questions that stand in the training data, {', '.join(places)}."],
    )
