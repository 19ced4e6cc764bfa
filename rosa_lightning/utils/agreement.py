"""What the ranks of a run must agree on, and how they fail together.

They speak through the store of the process group and not through collectives. So a rank whose
configuration lets it do other collectives than the rest is found before it does any.
"""

import inspect
import json
import os
import platform
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, is_dataclass
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelSummary, ProgressBar

LIMIT_S = 1800.0
"""How long a rank waits for another, in seconds: as long as a process group does by default."""

_SHOWN = 6  # differences in a message
_RELEASES = ("rosa-lightning", "torch", "lightning", "transformers")
_OWN = {"dirpath", "path", "folder", "save_dir", "root_dir", "default_root_dir", "cache_dir"}
_OWN |= {"verbose", "logger", "profiler", "callbacks"}
"""Settings that may differ from rank to rank or from node to node."""

_run = 0
_rounds: Counter[str] = Counter()


class RanksError(ValueError):
    """What all ranks raise together: they disagree, or one of them has failed."""


def several_ranks() -> bool:
    """Whether this process is one of several that work together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def new_run() -> int:
    """Count a run of a trainer with several ranks; every rank counts each."""
    global _run
    _run += 1
    _rounds.clear()
    return _run


def shared_store() -> Any:
    """The key-value store of the process group, which rank 0 holds."""
    group: Any = dist.group.WORLD
    return group.get_group_store()


def exchange(name: str, value: object) -> list[Any]:
    """What every rank gives under a name, in the order of the ranks; plain values.

    RanksError if a rank gives nothing in `LIMIT_S` seconds.
    """
    store, rank, world = shared_store(), dist.get_rank(), dist.get_world_size()
    _rounds[name] += 1
    key = f"rosa/{_run}/{name}/{_rounds[name]}"
    keys = [f"{key}/{other}" for other in range(world)]
    store.set(keys[rank], json.dumps(value))
    store.add(f"{key}/told", 1)
    if not _counts_to(world, f"{key}/told", LIMIT_S):
        missing = [other for other in range(world) if not store.check([keys[other]])]
        raise RanksError(
            f"{_ranks(missing)} did not get to the {name} within {LIMIT_S:.0f} s. See its own log."
        )
    told = [json.loads(store.get(one)) for one in keys]
    store.add(f"{key}/read", 1)
    if rank == 0:  # whose store this is: it must not end before all have read
        _counts_to(world, f"{key}/read", 10.0)
    return told


def _counts_to(world: int, key: str, limit_s: float) -> bool:
    """Wait until all ranks have counted; False if not in time. Signals are handled meanwhile."""
    until = time.monotonic() + limit_s
    while int(shared_store().add(key, 0)) < world:
        if time.monotonic() > until:
            return False
        time.sleep(0.01)
    return True


def agree(name: str, told: Mapping[str, Any]) -> None:
    """Raise RanksError, naming what differs, unless all ranks give the same values by setting.

    A setting is compared among the ranks that have it.
    """
    if not several_ranks():
        return
    plain = json.loads(json.dumps(told, default=_plain, skipkeys=True))
    ranks = exchange(name, dict(_leaves("", plain)))
    found = []
    for key in dict.fromkeys(key for one in ranks for key in one):
        where: dict[str, list[int]] = {}
        for rank, one in enumerate(ranks):
            if key in one:
                where.setdefault(json.dumps(one[key]).strip('"'), []).append(rank)
        if len(where) > 1:
            said = [f"{v:.60} on {_ranks(numbers)}" for v, numbers in where.items()]
            found.append(f"{key} ({', '.join(said)})")
    if found:
        more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        raise RanksError(
            f"the ranks disagree on {', '.join(found[:_SHOWN])}{more}. Start all of them with the "
            "same configuration, data and releases."
        )


def _plain(value: Any) -> Any:
    """A value as JSON has it, the same on every rank; objects by their class alone."""
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, set | frozenset):
        return sorted(value, key=str)
    if isinstance(value, Path | timedelta | torch.dtype | torch.device):
        return str(value)
    if isinstance(value, torch.Tensor):
        return value.tolist()
    return getattr(value, "__qualname__", type(value).__qualname__)


def _leaves(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Plain values by dotted keys, lists of settings by their positions too."""
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        yield f"number of {key}", len(value)
        value = dict(enumerate(value))
    if not isinstance(value, dict):
        yield key, value
        return
    for name, item in value.items():
        yield from _leaves(f"{key}.{name}".removeprefix("."), item)


def _ranks(numbers: Sequence[int]) -> str:
    more = f" and {len(numbers) - 4} more" if len(numbers) > 4 else ""
    return f"rank{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers[:4]))}{more}"


@contextmanager
def together(name: str) -> Iterator[None]:
    """Let every rank fail where one does; within, ranks must not wait for each other.

    Raises:
        RanksError: Says which rank failed and why.
        Exception: What was raised here, where all ranks failed alike or it is a defect.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as failure:
        if not several_ranks() or isinstance(failure, RanksError):
            raise
        error = failure
    if not several_ranks():
        return
    told = exchange(name, None if error is None else f"{type(error).__name__}: {error}")
    failed = [rank for rank, message in enumerate(told) if message is not None]
    if not failed:
        return
    if error is not None:
        alike = len(set(told)) == 1
        if alike or not isinstance(error, ValueError | OSError | TypeError):
            mark_told(error)
            raise error
    reason = told[failed[0]].partition(": ")[2]
    raise RanksError(f"{_ranks(failed)} failed: {reason}") from error


def mark_told(error: BaseException) -> None:
    """Remember that all ranks know of an error."""
    error.told_to_all_ranks = True  # type: ignore[attr-defined]


def is_told(error: BaseException) -> bool:
    """Whether all ranks know of an error."""
    return isinstance(error, RanksError) or getattr(error, "told_to_all_ranks", False)


def configuration(trainer: Trainer) -> dict[str, Any]:
    """All settings that the ranks of a run must have in common.

    Module and data module add what ``agreed_settings()`` of theirs gives.
    """
    parts: list[Any] = [trainer.lightning_module, getattr(trainer, "datamodule", None)]
    callbacks = [c for c in trainer.callbacks if _is_compared(c)]  # type: ignore[attr-defined]
    told: dict[str, Any] = {
        "command": trainer.state.fn,
        "model and data": [type(part).__name__ for part in parts],
        "trainer.callbacks": [callback.state_key for callback in callbacks],
        "seed_everything": os.environ.get("PL_GLOBAL_SEED"),
        "python": ".".join(platform.python_version_tuple()[:2]),
        **{name: _release(name) for name in _RELEASES},
        **_settings("trainer", trainer),
    }
    for callback in callbacks:
        told |= _settings(callback.state_key, callback)
    for part in parts:
        told |= part.agreed_settings() if hasattr(part, "agreed_settings") else {}
    return told


def _is_compared(callback: Callback) -> bool:
    ours = ("rosa_lightning", "lightning", "pytorch_lightning")
    shows = isinstance(callback, ProgressBar | ModelSummary)
    return type(callback).__module__.partition(".")[0] in ours and not shows


def _settings(key: str, made: object) -> dict[str, Any]:
    """What an object was made with, as far as it shows that under the names of its arguments."""
    names = inspect.signature(type(made)).parameters.keys() - _OWN
    return {f"{key}.{name}": getattr(made, name) for name in names if hasattr(made, name)}


def _release(name: str) -> str | None:
    with suppress(PackageNotFoundError):
        return version(name)
    return None


def optimization(trainer: Trainer) -> dict[str, Any]:
    """The optimizers and schedules of a run, as they were made."""
    told: dict[str, Any] = {}
    for number, optimizer in enumerate(trainer.optimizers):
        name = f"optimizer{number or ''}"
        told[name] = type(optimizer).__name__
        groups = [{**g, "params": len(g["params"])} for g in optimizer.param_groups]
        for key in dict.fromkeys(key for group in groups for key in group):
            values = [group.get(key) for group in groups]
            told[f"{name}.{key}"] = values[0] if len(values) == 1 else values
    for number, config in enumerate(trainer.lr_scheduler_configs):
        name = f"lr_scheduler{number or ''}"
        told[name] = [type(config.scheduler).__name__, config.interval, config.frequency]
        told |= {f"{name}.{key}": value for key, value in config.scheduler.state_dict().items()}
    return told
