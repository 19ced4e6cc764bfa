"""What ``predict`` and ``test`` leave behind: answers, one JSON object a line, and results."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, TextIO

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import rank_zero_info
from rich.console import Console

from rosa_lightning.evaluation.results import results_table, write_results
from rosa_lightning.utils.files import atomic_write, open_input, open_new_text, read_lines, writing
from rosa_lightning.utils.strict_json import parse

PREDICTIONS = "predictions.jsonl"
RESULTS = "results.json"
_PART = re.compile(r"predictions\.part[0-9]{1,9}\.rank[0-9]{1,9}\.jsonl")
_ITEM: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("key", "protocol", "source", "task", "response"), str),
    "index": (int, type(None)),
    "answer": (str, type(None)),
    "correct": bool,
    "elapsed_s": (int, float),
}
"""What the fields of an answer that are looked at must be."""


class PredictionWriter(BasePredictionWriter):
    """Writes the records that ``predict_step`` returns, as they come.

    The file takes its name when the last record is in it, so that it is never seen half-written.

    Args:
        path: The file; by default ``predictions.jsonl`` in the run's log folder.
    """

    def __init__(self, path: str | None = None) -> None:
        super().__init__(write_interval="batch")
        self.path = path
        self._target = Path(PREDICTIONS)
        self._file: TextIO | None = None
        self._count = 0

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open this rank's part."""
        self._target = _log_folder(trainer) / PREDICTIONS if self.path is None else Path(self.path)
        part = self._part(trainer.global_rank)
        part.parent.mkdir(parents=True, exist_ok=True)
        self._file = open_new_text(part)
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
        """Append a batch, each record behind its place in the input."""
        assert self._file is not None
        places: Sequence[int] = batch_indices or range(self._count, self._count + len(prediction))
        self._count += len(prediction)
        with writing(self._target):
            for place, record in zip(places, prediction, strict=True):
                line = json.dumps(record, ensure_ascii=False)
                self._file.write(f"{dataloader_idx} {place} {line}\n")

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Join the ranks' parts and give the file its name."""
        self._close()
        trainer.strategy.barrier("predictions written")
        if not trainer.is_global_zero:
            return
        parts = [self._part(rank) for rank in range(trainer.world_size)]
        # A record that a sampler has repeated, to give ranks equal numbers, has one place.
        found = dict(pair for part in parts for pair in _placed(part))
        atomic_write(self._target, *(found[place] for place in sorted(found)))
        for part in parts:
            part.unlink()
        rank_zero_info(f"predictions: {self._target}")

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Leave nothing half-written."""
        if self._file is not None:
            with suppress(OSError):  # of a full disk, which is what has been raised already
                self._close()
            self._file = None
            self._part(trainer.global_rank).unlink(missing_ok=True)

    def _close(self) -> None:
        if self._file is not None:
            with writing(self._target):
                self._file.close()
            self._file = None

    def _part(self, rank: int) -> Path:
        return self._target.with_name(f".{self._target.name}.rank{rank}")


class ResultWriter(Callback):
    """Writes what ``test`` finds: ``predictions.jsonl``, ``results.json`` and a table.

    Answers are kept as they come, in ``predictions.part<n>.rank<r>.jsonl``. If the evaluation is
    stopped, these stay, and the next run of the same evaluation (equal weights, settings and
    prompts, releases) goes on from them, in this folder or in one beside it, where loggers put each
    run into a folder of its own. Parts that another process is writing are left to it. When all is
    answered they give way to the files above, which appear whole.

    Args:
        folder: Where to; by default the run's log folder.
    """

    def __init__(self, folder: str | None = None) -> None:
        self.folder = folder
        self._target = Path()
        self._part: TextIO | None = None
        self._earlier: list[Path] = []
        self._num_resumed = 0
        self._earlier_seconds = 0.0
        self._number = 0
        self._since = 0.0

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read what an earlier run of this evaluation has answered, and open this rank's part."""
        self._since = time.perf_counter()
        evaluation: Any = pl_module.evaluated
        folder = _log_folder(trainer) if self.folder is None else Path(self.folder)
        self._target = folder
        own = bool(trainer.loggers) and self.folder is None  # of this run alone
        near = [folder, *_beside(folder)] if own else [folder]
        found = sorted(
            part
            for place in near
            for part in place.glob("predictions.part*.jsonl")
            if _PART.fullmatch(part.name) and part.is_file()
        )
        parts = [part for part in found if not _is_being_written(part)]
        self._earlier, evaluation.answered = _read_parts(parts, evaluation.digest)
        self._num_resumed = len(evaluation.answered)
        self._earlier_seconds = _seconds(evaluation.answered.values())
        if self._earlier:
            names = ", ".join(map(str, self._earlier))
            rank_zero_info(f"going on with {self._num_resumed} answers of {names}")
        elif parts:
            rank_zero_info(
                f"{parts[-1]} is of an evaluation with other weights or settings; this one begins "
                "anew."
            )
        taken = [int(part.name.split(".")[1].removeprefix("part")) for part in found]
        # Rank 0 says it for all, before any part is there.
        self._number = trainer.strategy.broadcast(max(taken, default=-1) + 1)
        folder.mkdir(parents=True, exist_ok=True)
        self._part = open_new_text(self._path(trainer.global_rank))
        _lock(self._part)

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
        assert self._part is not None
        digest = pl_module.evaluated.digest  # type: ignore[union-attr]
        made = {"evaluation": digest, "elapsed_s": self._elapsed()}
        lines = [_line(made | item) for item in outputs["items"]]
        with writing(self._part.name):
            self._part.write("".join(lines))
            self._part.flush()

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Join the parts, write the results and show them."""
        assert self._part is not None
        self._part.close()
        trainer.strategy.barrier("answers written")
        if not trainer.is_global_zero:
            return
        seconds = self._elapsed()
        own = [self._path(rank) for rank in range(trainer.world_size)]
        module: Any = pl_module
        _, answered = _read_parts(own, module.evaluated.digest)
        items = _in_order(answered.values(), module.evaluated.config.protocols, trainer)
        for item in items:
            del item["evaluation"], item["elapsed_s"], item["key"]
        lines = "".join(map(_line, items)).encode(errors="backslashreplace")
        atomic_write(self._target / PREDICTIONS, lines)
        leaked, places, reason = _leaked(trainer)
        about = module.about_evaluation() | {
            "leaked_from": places,
            "wall_time_s": round(seconds, 3),
            "resumed_answers": self._num_resumed,
            "world_size": trainer.world_size,
        }
        write_results(self._target / RESULTS, module.evaluated.scores, leaked, **about)
        for part in {*own, *self._earlier}:
            part.unlink(missing_ok=True)
        notes = [*reason, f"{self._target / RESULTS}, {PREDICTIONS}: {seconds:.1f} s"]
        console = Console()
        console.width = max(console.width, 100)  # a file, say, is as wide as it must be
        console.print(results_table(about["model"], module.evaluated.scores, leaked, notes))

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Close this rank's part, which stays to go on from."""
        if self._part is not None:
            self._part.close()

    def _elapsed(self) -> float:
        """Seconds that this evaluation took so far, earlier runs of it included."""
        return self._earlier_seconds + time.perf_counter() - self._since

    def _path(self, rank: int) -> Path:
        return self._target / f"predictions.part{self._number}.rank{rank}.jsonl"


def _placed(part: Path) -> Iterator[tuple[tuple[int, int], bytes]]:
    """The lines of a rank's part, each with the place of its record in the input."""
    with open_input(part) as file:
        for line in file:
            loader, place, record = line.split(b" ", 2)
            yield (int(loader), int(place)), record


def _log_folder(trainer: Trainer) -> Path:
    """Where a run's files go. All ranks must ask at once: rank 0 tells the others."""
    return Path(trainer.log_dir or trainer.default_root_dir)


def _beside(folder: Path) -> Iterator[Path]:
    """Other folders in the same place."""
    return (place for place in folder.parent.glob("*/") if place != folder)


def _lock(file: IO[Any], *, shared: bool = False) -> bool:
    """Lock a file until it is closed; false if another process has.

    True where there are no such locks: on Windows, and on some file systems.

    Args:
        file: An open file.
        shared: Let others share the lock, as ranks that look at the same file do.
    """
    try:
        import fcntl

        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):
        return True
    return True


def _is_being_written(part: Path) -> bool:
    """Whether another process has locked a part."""
    with open_input(part) as file:
        return not _lock(file, shared=True)


def _line(item: dict[str, Any]) -> str:
    return json.dumps(item, ensure_ascii=False) + "\n"


def _read_parts(parts: Iterable[Path], digest: str) -> tuple[list[Path], dict[str, dict[str, Any]]]:
    """The parts that belong to an evaluation, and their answers by key.

    A last line that was cut off is passed over, and so are lines that are no answers.
    """
    found: list[Path] = []
    answered: dict[str, dict[str, Any]] = {}
    for part in parts:
        with open_input(part) as file:
            for line in read_lines(file, part):
                with suppress(ValueError, KeyError, TypeError):
                    item = parse(line.decode("utf-8", "replace"))
                    if item["evaluation"] != digest:
                        break
                    if not all(isinstance(item[name], _ITEM[name]) for name in _ITEM):
                        continue
                    answered[item["key"]] = item
                    if part not in found:
                        found.append(part)
    return found, answered


def _seconds(answered: Iterable[dict[str, Any]]) -> float:
    """How long earlier runs took, those before them included, up to their last answers."""
    return max((float(item["elapsed_s"]) for item in answered), default=0.0)


def _in_order(
    items: Iterable[dict[str, Any]], protocols: Sequence[str], trainer: Trainer
) -> list[dict[str, Any]]:
    """Items as one process would have met them, protocol by protocol."""
    datamodule: Any = getattr(trainer, "datamodule", None)
    labels = [source.label for source in getattr(datamodule, "test_sources", [])]
    place = {label: number for number, label in enumerate(labels)}

    def position(item: dict[str, Any]) -> tuple[int, int, int]:
        source = place.get(item["source"], len(place))
        return protocols.index(item["protocol"]), source, item["index"] or 0

    return sorted(items, key=position)


def _leaked(trainer: Trainer) -> tuple[dict[str, int] | None, list[str] | None, list[str]]:
    """How many test records of each task were trained on, from where, or why that is not known."""
    datamodule: Any = getattr(trainer, "datamodule", None)
    if not hasattr(datamodule, "leaked_records"):
        return None, None, []
    try:
        records, places = datamodule.leaked_records()
    except (OSError, ValueError) as error:
        return None, None, [" ".join(str(error).split())]
    counts: dict[str, int] = {}
    for record in records:
        counts[record.task] = counts.get(record.task, 0) + 1
    return counts, places, [f"Leaked: questions that stand in {', '.join(places)}."]
