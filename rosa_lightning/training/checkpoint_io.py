"""Checkpoints that are written whole or not at all, and folders that cannot be written, seen early.

Lightning writes a checkpoint into the folder for temporary files and moves it, which across file
systems is a copy: a kill or a full disk leaves half of it under its final name. Checkpoints in
shards it writes file by file over the older ones.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO
from lightning.pytorch.strategies import Strategy
from torch.distributed.checkpoint.api import CheckpointException

from rosa_lightning.training.sharding import SHARDED_METADATA, raise_together
from rosa_lightning.utils.files import (
    atomic_write,
    check_writable,
    part_beside,
    put_in_place,
    writing,
)


class WholeCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its final place, to the disk, and renames it."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        """Write a checkpoint; elsewhere than on a local file system as Lightning does.

        Raises:
            OSError: It cannot be written, or the disk is full; names the file. One that was there
                is there still.
            ValueError: It could not be loaded again; names the entry, as a callback's state.
        """
        local = _local(path)
        if local is None or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        # Not straight into the file: torch's writer hides what the file system says.
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        if _unsafe(buffer):
            raise ValueError(_why_unsafe(checkpoint))
        atomic_write(local, buffer.getbuffer())


def _unsafe(buffer: io.BytesIO) -> list[str]:
    """The classes in a saved file that loading it without running code refuses."""
    buffer.seek(0)
    return torch.serialization.get_unsafe_globals_in_checkpoint(buffer)


def _why_unsafe(checkpoint: dict[str, Any]) -> str:
    entries = {f"entry {name}": value for name, value in checkpoint.items() if name != "callbacks"}
    states = checkpoint.get("callbacks", {})
    entries |= {f"state of callback {name}": value for name, value in states.items()}
    holds = []
    for name, value in entries.items():
        buffer = io.BytesIO()
        torch.save(value, buffer)
        if found := _unsafe(buffer):
            holds.append(f"{name} holds {', '.join(found)}")
    return (
        "the checkpoint is not saved, since it could not be loaded again: the "
        f"{'; the '.join(holds)}. Let it return numbers, strings, lists, dictionaries and tensors."
    )


def write_checkpoints_whole(strategy: Strategy) -> None:
    """Let a strategy write checkpoints whole or not at all; a user's own `CheckpointIO` stays."""
    plugin: Any = strategy.checkpoint_io
    if type(plugin) is TorchCheckpointIO:
        strategy.checkpoint_io = WholeCheckpointIO()
    while isinstance(plugin, _WrappingCheckpointIO):
        if type(plugin._checkpoint_io) is TorchCheckpointIO:
            plugin._checkpoint_io = WholeCheckpointIO()
        plugin = plugin._checkpoint_io
    if not isinstance(strategy.save_checkpoint, partial):
        save = partial(_save, strategy, strategy.save_checkpoint)
        strategy.save_checkpoint = save  # type: ignore[method-assign]


def _save(
    strategy: Strategy,
    save: Callable[..., None],
    checkpoint: dict[str, Any],
    filepath: str | Path,
    storage_options: Any | None = None,
) -> None:
    """Save, a folder of shards beside its final place; what fails on one rank fails on all.

    Raises:
        OSError: A rank cannot write.
    """
    write = partial(save, checkpoint, storage_options=storage_options)
    path, in_shards = _local(filepath), _writes_shards(strategy)
    # Lightning would remove shards that are in the way of a file before that is written.
    in_the_way = path is not None and Path(path, SHARDED_METADATA).is_file()
    if path is None or not strategy.broadcast(in_shards or in_the_way):
        raise_together(_failure(partial(write, filepath)))
        return
    target: Path = strategy.broadcast(path)
    is_zero = strategy.is_global_zero
    with ExitStack() as stack, writing(target, beside=True):
        part = strategy.broadcast(_part(target, in_shards, stack) if is_zero else target)
        if isinstance(part, Exception):
            raise part
        raise_together(_failure(partial(write, part)))
        raise_together(_failure(partial(put_in_place, part, target)) if is_zero else None)


def _writes_shards(strategy: Any) -> bool:
    """Whether its checkpoints are folders that all ranks write into."""
    of_fsdp = getattr(strategy, "_state_dict_type", None) == "sharded"
    return of_fsdp or getattr(strategy, "_save_distributed_checkpoint", None) is True


def _part(path: Path, is_folder: bool, stack: ExitStack) -> Path | Exception:
    """Where to write a checkpoint that then replaces what is there."""
    if path.is_dir() and any(path.iterdir()) and not (path / SHARDED_METADATA).is_file():
        return OSError("there is a folder that holds no checkpoint")
    try:
        return stack.enter_context(part_beside(path, is_folder=is_folder))
    except OSError as error:
        return error


def _failure(work: Callable[[], None]) -> Exception | None:
    """What goes wrong, if anything; what the writers of shards hide behind other errors."""
    try:
        work()
    except CheckpointException as error:
        found = [cause for cause, _ in error.failures.values()]
        return next((cause for cause in found if isinstance(cause, OSError)), _disk_error(found[0]))
    except Exception as error:
        return _disk_error(error)
    return None


def _disk_error(error: BaseException) -> Exception:
    """An `OSError` for what torch's writer of archives says when it cannot write."""
    text = str(error)
    if "PytorchStreamWriter" in text or "inline_container" in text:
        return OSError("not all of it could be written, as on a full disk")
    return error if isinstance(error, Exception) else OSError(text.strip().splitlines()[-1])


def _local(path: str | Path) -> Path | None:
    """A path on this machine; None for one elsewhere."""
    system, stripped = url_to_fs(str(path))
    return Path(stripped) if isinstance(system, LocalFileSystem) else None


def check_outputs(trainer: Trainer) -> None:
    """Check that checkpoints and logs of a run can be written where they will be.

    Before the trainer has set up its callbacks, folders that they have yet to choose are left out
    where there are loggers, whose folders they would choose.

    Raises:
        OSError: Names the first folder that cannot be written, on every rank.
    """
    error = None
    if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
        error = _failure(partial(_check_outputs, trainer))
    raise_together(error)


def _check_outputs(trainer: Trainer) -> None:
    for logger in trainer.loggers:
        folder = getattr(logger, "log_dir", None) or logger.save_dir
        _check_folder(folder, "logs", "trainer.logger.init_args.save_dir")
    for callback in trainer.checkpoint_callbacks:
        folder = getattr(callback, "dirpath", None)
        if folder is None and not trainer.loggers:
            folder = Path(trainer.default_root_dir, "checkpoints")
        if getattr(callback, "save_top_k", 1) or getattr(callback, "save_last", False):
            what = f"dirpath of {type(callback).__name__}, or trainer.default_root_dir,"
            _check_folder(folder, "checkpoints", what)


def _check_folder(folder: Any, what: str, setting: str) -> None:
    local = _local(folder) if isinstance(folder, str | Path) else None
    if local is not None:
        check_writable(local, what, f"Set {setting} to a folder that can be.")
