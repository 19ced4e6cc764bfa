"""Write checkpoints whole or not at all, and check before a run that they can be written.

Lightning writes a checkpoint into the folder for temporary files and moves it, which across file
systems is a copy: a kill or a full disk leaves half of it under its final name. Checkpoints in
shards it writes file by file over the older ones.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import Strategy
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor

from rosa_lightning.utils.agreement import together
from rosa_lightning.utils.files import (
    SHARDED_METADATA,
    atomic_write,
    check_writable,
    part_beside,
    put_in_place,
    writing,
)


def save_atomically(
    checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
) -> None:
    """Write a checkpoint beside its final place, to the disk, and rename it; not local, directly.

    Raises:
        OSError: It cannot be written; names the file. An older one of that name is still there.
        ValueError: It could not be loaded again; names the entry, as a callback's state.
    """
    local = _local(path)
    if local is None or storage_options is not None:
        TorchCheckpointIO().save_checkpoint(checkpoint, path, storage_options)
        return
    # Not straight into the file: torch's writer hides what the file system says.
    buffer, unsafe = _saved(checkpoint)
    if unsafe:
        states = checkpoint.get("callbacks", {})
        found = [f"state of callback {name}" for name in states if _saved(states[name])[1]]
        raise ValueError(
            "the checkpoint is not saved, since it could not be loaded again: "
            f"{found[0] if found else 'it'} holds {', '.join(unsafe)}. Let it hold numbers, "
            "strings, lists, dictionaries and tensors."
        )
    atomic_write(local, buffer.getbuffer())


def _saved(value: Any) -> tuple[io.BytesIO, list[str]]:
    """A saved file, and the classes in it that loading with `weights_only` refuses."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return buffer, torch.serialization.get_unsafe_globals_in_checkpoint(buffer)


def use_atomic_checkpoints(strategy: Strategy) -> None:
    """Let a strategy write checkpoints whole or not at all; a user's own `CheckpointIO` stays."""
    plugin: Any = strategy.checkpoint_io
    while hasattr(plugin, "checkpoint_io"):  # AsyncCheckpointIO wraps another
        plugin = plugin.checkpoint_io
    if type(plugin) is TorchCheckpointIO:
        plugin.save_checkpoint = save_atomically  # type: ignore[method-assign]
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
    """Save, a folder of shards beside its final place; what fails on one rank fails on all."""
    path = _local(filepath)
    # Lightning would remove shards that are in the way of a file before that is written.
    in_the_way = path is not None and Path(path, SHARDED_METADATA).is_file()
    in_shards = _is_in_shards(checkpoint)
    with ExitStack() as stack:
        target, part = None, filepath
        if path is not None and strategy.broadcast(in_the_way or in_shards):
            target = strategy.broadcast(path)
            stack.enter_context(writing(target, beside=True))
            part = stack.enter_context(_part(strategy, target, in_shards))
        with together("saving of the checkpoint"), _disk_errors():
            save(checkpoint, part, storage_options=storage_options)
        if target is not None:
            with together("renaming of the checkpoint"):
                if strategy.is_global_zero:
                    put_in_place(Path(part), target)


def _is_in_shards(checkpoint: dict[str, Any]) -> bool:
    """Whether all ranks write a part of it, into a folder."""
    values = checkpoint.get("state_dict", {}).values()
    return any(isinstance(value, DTensor) or hasattr(value, "local_shards") for value in values)


@contextmanager
def _part(strategy: Strategy, path: Path, is_folder: bool) -> Iterator[Path]:
    """A path beside the final one, the same on all ranks; rank 0 makes and removes it."""
    part = path
    with ExitStack() as stack:
        with together("preparation of the checkpoint"):
            if strategy.is_global_zero:
                is_checkpoint = (path / SHARDED_METADATA).is_file()
                if path.is_dir() and any(path.iterdir()) and not is_checkpoint:
                    raise OSError("there is a folder that holds no checkpoint")
                part = stack.enter_context(part_beside(path, is_folder=is_folder))
        yield strategy.broadcast(part)


@contextmanager
def _disk_errors() -> Iterator[None]:
    """Raise OSError for what torch's writers say when they cannot write."""
    try:
        yield
    except CheckpointException as error:
        causes = [cause for cause, _ in error.failures.values()]
        known = [cause for cause in causes if isinstance(cause, OSError)]
        raise (known[0] if known else OSError(str(causes[0]).strip().splitlines()[-1])) from error
    except Exception as error:
        if "PytorchStreamWriter" in str(error) or "inline_container" in str(error):
            raise OSError("not all of it could be written, as on a full disk") from error
        raise


def _local(path: str | Path) -> Path | None:
    """A path on this machine; None for one elsewhere."""
    system, stripped = url_to_fs(str(path))
    return Path(stripped) if isinstance(system, LocalFileSystem) else None


def check_outputs(trainer: Trainer) -> None:
    """Raise OSError for the first folder of checkpoints or logs that cannot be written.

    Folders that callbacks have yet to choose inside those of loggers are left out.
    """
    with together("check of the output folders"):
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            for folder, what, setting in _outputs(trainer):
                local = _local(folder) if isinstance(folder, str | Path) else None
                if local is not None:
                    check_writable(local, what, f"Set {setting} to a folder that can be.")


def _outputs(trainer: Trainer) -> Iterator[tuple[Any, str, str]]:
    for logger in trainer.loggers:
        folder = getattr(logger, "log_dir", None) or logger.save_dir
        yield folder, "logs", "trainer.default_root_dir, or the logger's save_dir,"
    for callback in trainer.checkpoint_callbacks:
        folder = getattr(callback, "dirpath", None)
        if folder is None and not trainer.loggers:
            folder = Path(trainer.default_root_dir, "checkpoints")
        if getattr(callback, "save_top_k", 1) or getattr(callback, "save_last", False):
            what = f"dirpath of {type(callback).__name__}, or trainer.default_root_dir,"
            yield folder, "checkpoints", what
