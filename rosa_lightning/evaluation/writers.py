"""What ``predict`` and ``test`` write: answers as JSON lines, and the results of an evaluation."""

import json
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import rank_zero_info
from rich.console import Console

from rosa_lightning.evaluation.evaluator import item_id
from rosa_lightning.evaluation.results import results_table, versions, write_results
from rosa_lightning.tasks.records import scored_as
from rosa_lightning.utils.files import atomic_write, shown, writing
from rosa_lightning.utils.rng import of_all_ranks
from rosa_lightning.utils.strict_json import read_object, read_objects
from rosa_lightning.utils.text import one_line
from rosa_lightning.utils.trainer import log_folder

PREDICTIONS = "predictions.jsonl"
RESULTS = "results.json"
Items = list[dict[str, Any]]
_FIELDS = {
    **dict.fromkeys(("protocol", "source", "task", "response"), str),
    "index": int | None,
    "answer": object,
    "correct": bool,
}
"""What is read of an earlier answer, and its types."""


class PredictionWriter(BasePredictionWriter):
    """Prints answers as they come, and writes their records in the order of the input.

    Args:
        path: The file; by default ``predictions.jsonl`` in the run's log folder.
    """

    def __init__(self, path: str | None = None) -> None:
        super().__init__(write_interval="epoch")
        self.path = path

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Print the answers of a batch, of rank 0, above the progress bar."""
        if trainer.is_global_zero:
            for item in outputs:
                asked = one_line(f"{item.get('prompt', '')} {item.get('input') or ''}", 200)
                sys.stdout.write(f"> {asked}\n{item.get('response', '').strip()}\n\n")
            sys.stdout.flush()

    def write_on_epoch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        predictions: Sequence[Any],
        batch_indices: Sequence[Any],
    ) -> None:
        """Write the records of all ranks."""
        path = log_folder(trainer) / PREDICTIONS if self.path is None else Path(self.path)
        by_loader = [predictions] if len(batch_indices) == 1 else predictions
        # A sampler may repeat a record to give all ranks as many.
        found: dict[tuple[int, int], Any] = {}
        for loader, (batches, indices) in enumerate(zip(by_loader, batch_indices, strict=True)):
            records = [record for batch in batches for record in batch]
            # Lightning knows no indices of a stream.
            places = [place for batch in indices for place in batch] or range(len(records))
            found |= {(loader, p): one for p, one in zip(places, records, strict=True)}
        everywhere = {place: one for own in of_all_ranks(found) for place, one in own.items()}
        if trainer.is_global_zero:
            atomic_write(path, *(_line(everywhere[place]) for place in sorted(everywhere)))
            rank_zero_info(f"{len(everywhere):,} answers are in {shown(path)}")


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
        self._file: FileIO | None = None
        self._num_resumed = 0
        self._since = 0.0

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read what a stopped run of this evaluation has answered, and go on from there."""
        self._since = time.perf_counter()
        module: Any = pl_module
        folder = self._target = log_folder(trainer) if self.folder is None else Path(self.folder)
        self._about = module.about_evaluation()
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
            atomic_write(folder / PREDICTIONS, *map(_line, earlier))
        trainer.strategy.barrier("files made")
        # Unbuffered: a batch is one write at the end of the file, whoever else writes.
        self._file = (folder / PREDICTIONS).open("ab", buffering=0)

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
        assert self._file is not None
        module: Any = pl_module
        known = module.evaluated.answered
        new = [item for item in outputs["items"] if known.get(item_id(item)) is not item]
        lines = b"".join(map(_line, new))
        with writing(self._target / PREDICTIONS):
            while lines:  # a disk that fills up takes a part
                lines = lines[self._file.write(lines) :]

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the answers in order, write the results and show them."""
        assert self._file is not None
        self._file.close()
        trainer.strategy.barrier("answers written")
        if not trainer.is_global_zero:
            return
        seconds = time.perf_counter() - self._since
        evaluated: Any = pl_module.evaluated
        datamodule: Any = getattr(trainer, "datamodule", None)
        path = self._target / PREDICTIONS
        items = {item_id(item): item for item in _read_items(path)}
        sources = [source.label for source in getattr(datamodule, "test_sources", [])]
        order = {name: i for i, name in enumerate([*evaluated.config.protocols, *sources])}

        def position(key: tuple[Any, ...]) -> tuple[int, int, int]:
            protocol, source, index = key
            return order.get(protocol, len(order)), order.get(source, len(order)), index or 0

        atomic_write(path, *(_line(items[key]) for key in sorted(items, key=position)))
        contaminated, places, note = _contamination(datamodule)
        about = {
            **self._about,
            "contaminated_by": places,
            "wall_time_s": round(seconds, 3),
            "resumed_answers": self._num_resumed,
            "world_size": trainer.world_size,
        }
        results = self._target / RESULTS
        write_results(results, evaluated.scores, contaminated, **about, complete=True)
        notes = [*note, f"{seconds:.1f} s; {shown(results)} and {PREDICTIONS}"]
        console = Console()
        console.width = max(console.width, 100)  # a file, say, is as wide as it must be
        console.print(results_table(about["model"], evaluated.scores, contaminated, notes))

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Close the answers, which stay to go on from."""
        if self._file is not None:
            self._file.close()


def _line(value: Any) -> bytes:
    text = json.dumps(value, ensure_ascii=False) + "\n"
    return text.encode(errors="backslashreplace")  # names of files may not be UTF-8


def _is_stopped(folder: Path, about: Mapping[str, Any]) -> bool:
    """Whether an evaluation of the same settings has begun here, and not ended."""
    same = json.loads(json.dumps({**about, "versions": versions(), "complete": False}))
    return bool(same.items() <= read_object(folder / RESULTS).items())


def _read_items(path: Path) -> Items:
    """The whole answers in a file; none where there is no file."""
    items: Items = []
    with suppress(FileNotFoundError):
        for item in read_objects(path):
            whole = item.keys() >= _FIELDS.keys()
            if whole and all(isinstance(item[name], kind) for name, kind in _FIELDS.items()):
                items.append(item)
    return items


def _contamination(datamodule: Any) -> tuple[Mapping[str, int] | None, list[str] | None, list[str]]:
    """How many test records of each task were trained on, from where, and a note on it."""
    if not hasattr(datamodule, "contaminated_records"):
        return None, None, []
    try:
        records, places = datamodule.contaminated_records()
    except (OSError, ValueError) as error:
        return None, None, [one_line(error)]
    note = f"Contaminated: test questions that are also in the training data ({', '.join(places)})."
    counts = Counter(scored_as(record.task, record.source) for record in records)
    return counts, places, [note] if counts else []
