"""The runs of a comparison in TensorBoard's HParams: what was set, and what came of it."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rosa_lightning.comparison.plan import Method
from rosa_lightning.utils.files import atomic_write

EVENTS = "events.out.tfevents.0.hparams"
"""Named as TensorBoard looks for it; always the same, so that it can be written anew."""


def write_run(folder: Path, method: Method, result: Mapping[str, Any]) -> None:
    """Write what was set and measured in a run, by its row; nothing for a run that failed."""
    if not (metrics := metrics_of(result)):
        return
    settings = settings_of(method.name, method.rank, result)
    summaries = [*_summaries(settings, metrics)[1:]]
    summaries += [_writer().scalar(name, value) for name, value in metrics.items()]
    record = folder / "run.json"
    ended = record.stat().st_mtime if record.exists() else 0.0
    _write(folder / EVENTS, summaries, int(result["steps"]), ended)


def write_experiment(root: Path, rows: Mapping[str, Mapping[str, Any]]) -> None:
    """Write which settings and metrics there are in any run; TensorBoard reads it in one place.

    ``rows`` are the methods' results, as ``comparison.json`` has them under ``methods``.
    """
    settings, metrics = dict[str, Any](), dict[str, float]()
    for name, row in rows.items():
        for result in (*row["grid"], *row["runs"]):
            if own := metrics_of(result):
                settings |= settings_of(name, row["rank"], result)
                metrics |= own
    if metrics:
        _write(root / EVENTS, _summaries(settings, metrics)[:1], 0, 0.0)


def settings_of(name: str, rank: int | None, result: Mapping[str, Any]) -> dict[str, Any]:
    """What was set in a run, by its name in TensorBoard."""
    keys = ("learning_rate", "seed", "trainable_parameters", "steps")
    found = {"method": name, "rank": rank, **{key: result[key] for key in keys}}
    return {key: value for key, value in found.items() if value is not None}


def metrics_of(result: Mapping[str, Any]) -> dict[str, float]:
    """What was measured of a run, by its name in TensorBoard."""
    names = ("val_loss", "val_accuracy", "train_seconds", "peak_mib", "backward_share")
    found = {f"result/{name}": result.get(name) for name in names}
    found["result/text_loss"] = result.get("text_loss", {}).get("loss")
    for task in result.get("tasks", []):
        found[f"result/{task['protocol']}/{task['task']}"] = task["accuracy"]
    return {name: float(value) for name, value in found.items() if value is not None}


def _writer() -> Any:
    from torch.utils.tensorboard import summary  # its functions have no types

    return summary


def _summaries(settings: dict[str, Any], metrics: dict[str, float]) -> Sequence[Any]:
    """Of an experiment, of the start of a run, and of its end."""
    found: Sequence[Any] = _writer().hparams(settings, metrics)
    return found


def _write(path: Path, summaries: Sequence[Any], step: int, time: float) -> None:
    """Write an event file, unless it is there already."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.summary.writer.record_writer import RecordWriter

    events = [Event(file_version="brain.Event:2", wall_time=time)]
    events += [Event(summary=one, step=step, wall_time=time) for one in summaries]
    written = io.BytesIO()
    writer = RecordWriter(written)
    for event in events:
        writer.write(event.SerializeToString(deterministic=True))
    content = written.getvalue()
    if not path.exists() or path.read_bytes() != content:
        atomic_write(path, content)
