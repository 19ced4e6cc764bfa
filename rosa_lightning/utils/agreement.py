"""What the ranks of a run must agree on, and how they fail together.

They speak through the store of the process group and not through collectives. So a rank whose
configuration lets it do other collectives than the rest is found before it does any.
"""

from __future__ import annotations

import inspect
import json
import os
import platform
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, is_dataclass
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelSummary, ProgressBar

LIMIT_S = 1800.0
"""How long a rank waits for another, in seconds: as long as a process group does by default."""

_SHOWN = 6
"""Most differences that a message names."""
_RELEASES = ("rosa-lightning", "torch", "lightning", "transformers")
_TRAINER = (
    *("max_steps", "max_epochs", "min_steps", "min_epochs", "accumulate_grad_batches"),
    *("precision", "gradient_clip_val", "gradient_clip_algorithm", "val_check_interval"),
    *("check_val_every_n_epoch", "limit_train_batches", "limit_val_batches", "limit_test_batches"),
    *("limit_predict_batches", "overfit_batches", "log_every_n_steps", "num_sanity_val_steps"),
    *("reload_dataloaders_every_n_epochs", "fast_dev_run", "world_size"),
)
_OF_A_NODE = {"dirpath", "path", "folder", "save_dir", "root_dir", "cache_dir", "verbose"}
"""Settings of callbacks that may differ from node to node."""

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


def exchange(name: str, value: object, limit_s: float = LIMIT_S) -> list[Any]:
    """What every rank gives under a name, in the order of the ranks; plain values.

    RanksError if a rank gives nothing in ``limit_s`` seconds.
    """
    store, rank, world = shared_store(), dist.get_rank(), dist.get_world_size()
    _rounds[name] += 1
    key = f"rosa/{_run}/{name}/{_rounds[name]}"
    keys = [f"{key}/{other}" for other in range(world)]
    store.set(keys[rank], json.dumps(value))
    store.add(f"{key}/told", 1)
    if not _wait_until(lambda: int(store.add(f"{key}/told", 0)) >= world, limit_s):
        missing = [other for other in range(world) if not store.check([keys[other]])]
        raise RanksError(
            f"{_ranks(missing)} did not get to the {name} within {limit_s:.0f} s. See its own log."
        )
    told = [json.loads(store.get(one)) for one in keys]
    store.add(f"{key}/read", 1)
    if rank == 0:  # whose store this is: it must not end before all have read
        _wait_until(lambda: int(store.add(f"{key}/read", 0)) >= world, 10.0)
    return told


def _wait_until(done: Callable[[], bool], limit_s: float) -> bool:
    """Wait until something is so; false if it is not in time. Signals are handled meanwhile."""
    until = time.monotonic() + limit_s
    while not done():
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
    # Objects are compared by their class alone.
    plain = json.loads(json.dumps(told, default=_plain, skipkeys=True))
    ranks = exchange(name, dict(_leaves("", plain)))
    found = []
    for key in dict.fromkeys(key for one in ranks for key in one):
        where: dict[str, list[int]] = {}
        for rank, one in enumerate(ranks):
            if key in one:
                where.setdefault(json.dumps(one[key]), []).append(rank)
        if len(where) > 1:
            said = (f"{_short(value)} on {_ranks(numbers)}" for value, numbers in where.items())
            found.append(f"{key} ({', '.join(said)})")
    if found:
        more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        raise RanksError(
            f"the ranks disagree on {', '.join(found[:_SHOWN])}{more}. Start all of them with the "
            "same configuration, data and releases."
        )


def _plain(value: Any) -> Any:
    """A value as JSON has it, the same on every rank."""
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, set | frozenset):
        return sorted(value, key=str)
    if isinstance(value, Path | timedelta | torch.dtype | torch.device):
        return str(value)
    if isinstance(value, torch.Tensor):
        return value.tolist() if value.numel() <= 64 else list(value.shape)
    return getattr(value, "__qualname__", type(value).__qualname__)


def _leaves(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Plain values by dotted keys, lists of settings by their positions too."""
    items: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        yield f"number of {key}", len(value)
        items = list(enumerate(value))
    else:
        yield key, value
    for name, item in items:
        yield from _leaves(f"{key}.{name}" if key else str(name), item)


def _short(value: str) -> str:
    text = value.strip('"')
    return text if len(text) <= 60 else f"{text[:57]}..."


def _ranks(numbers: Sequence[int]) -> str:
    """The ranks in words: the first few of many."""
    shown = ", ".join(map(str, numbers[:4]))
    more = f" and {len(numbers) - 4} more" if len(numbers) > 4 else ""
    return f"rank{'s' if len(numbers) > 1 else ''} {shown}{more}"


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
    first = told[failed[0]]
    alike = len(failed) == len(told) and all(message == first for message in told)
    if error is not None and (alike or not isinstance(error, ValueError | OSError | TypeError)):
        mark_told(error)
        raise error
    raise RanksError(f"{_ranks(failed)} failed: {first.partition(': ')[2]}") from error


def mark_told(error: BaseException) -> None:
    """Remember that all ranks know of an error."""
    error.told_to_all_ranks = True  # type: ignore[attr-defined]


def is_told(error: BaseException) -> bool:
    """Whether all ranks know of an error."""
    return isinstance(error, RanksError) or getattr(error, "told_to_all_ranks", False)


# What is compared.


def configuration(trainer: Trainer) -> dict[str, Any]:
    """All that the ranks of a run must have in common, by setting, as far as it is known here.

    The module and the data module add what ``agreed_settings()`` of theirs gives.
    """
    module: Any = trainer.lightning_module
    datamodule: Any = getattr(trainer, "datamodule", None)
    told: dict[str, Any] = {
        "command": trainer.state.fn,
        "model": type(module).__name__,
        "data": type(datamodule).__name__,
        "trainer.strategy": type(trainer.strategy).__name__,
        "seed_everything": os.environ.get("PL_GLOBAL_SEED"),
        "python": ".".join(platform.python_version_tuple()[:2]),
        **{name: _release(name) for name in _RELEASES},
        **{f"trainer.{name}": getattr(trainer, name, None) for name in _TRAINER},
    }
    names: list[str] = []
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        package = type(callback).__module__.partition(".")[0]
        shows = isinstance(callback, ProgressBar | ModelSummary)
        if package in ("rosa_lightning", "lightning", "pytorch_lightning") and not shows:
            name = type(callback).__name__
            names.append(name)
            number = f" {names.count(name)}" if names.count(name) > 1 else ""
            told |= {f"{name}{number}.{k}": v for k, v in settings_of(callback).items()}
    told["trainer.callbacks"] = names
    for part in (module, datamodule):
        told |= part.agreed_settings() if hasattr(part, "agreed_settings") else {}
    return told


def _release(name: str) -> str | None:
    with suppress(PackageNotFoundError):
        return version(name)
    return None


def settings_of(made: object) -> dict[str, Any]:
    """What an object was made with, as far as it keeps that under the names of its arguments."""
    found = {}
    for name in inspect.signature(type(made).__init__).parameters.keys() - _OF_A_NODE:
        for holder in (made, getattr(made, "config", None)):
            for attribute in (name, f"_{name}"):
                if hasattr(holder, attribute) and name not in found:
                    found[name] = getattr(holder, attribute)
    return found


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
