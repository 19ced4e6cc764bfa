"""What a trainer has: callbacks of a kind, and the folder of its run."""

from pathlib import Path
from typing import TypeVar

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.loggers.logger import DummyLogger

Kind = TypeVar("Kind", bound=Callback)


def callbacks_of(trainer: Trainer | None, kind: type[Kind]) -> list[Kind]:
    """The callbacks of a class that a trainer has, in their order; none without a trainer."""
    held: list[Callback] = getattr(trainer, "callbacks", [])  # which is not declared
    return [one for one in held if isinstance(one, kind)]


def logs_since(trainer: Trainer, step: int) -> bool:
    """Whether an optimizer step after this one is one that the trainer logs."""
    # Steps, not batches: under accumulation most batches end no step.
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
    return bool(every) and trainer.global_step // every != step // every


def run_folder(trainer: Trainer) -> Path | None:
    """The folder of a run: that of its first logger, or None without one.

    Loggers that keep their own files elsewhere, such as those of W&B and MLflow, have a folder by
    their name and version, which is where `ModelCheckpoint` writes too. All ranks must ask at once:
    rank 0 tells the others.
    """
    logger = trainer.logger
    if logger is None or isinstance(logger, DummyLogger):
        return None
    found: Path = trainer.strategy.broadcast(folder_of(logger, trainer.default_root_dir))
    return found


def log_folder(trainer: Trainer) -> Path:
    """Where the files of a command go: `run_folder`, or without a logger the trainer's own."""
    return run_folder(trainer) or Path(trainer.default_root_dir)


def folder_of(logger: Logger, root: str) -> Path:
    """The folder of a run by a logger of it, on rank 0."""
    if isinstance(logger, TensorBoardLogger | CSVLogger):
        return Path(logger.log_dir)
    version = logger.version
    name = version if isinstance(version, str) else f"version_{version}"
    return Path(logger.save_dir or root, str(logger.name), name)
