"""What surrounds a command: whose fault an error is, signals, and the log output of libraries."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback

from rosa_lightning.cli.strict_yaml import read_configuration
from rosa_lightning.utils.errors import ConfigurationError, explain
from rosa_lightning.utils.files import writing
from rosa_lightning.utils.text import one_line


@contextmanager
def configuration_errors(what: str, remedy: str = "") -> Iterator[None]:
    """Raise what parsing and making objects raises as ConfigurationError, but for the machine's."""
    try:
        yield
    except (ConfigurationError, OSError, MemoryError):
        raise
    except Exception as error:
        told = explain(error)
        if told is None or remedy:
            reason = one_line(told or f"{type(error).__name__}: {error}").rstrip(".;")
            told = f"{what}: {reason}. {remedy}"
        raise ConfigurationError(one_line(told)) from error


@contextmanager
def termination() -> Iterator[None]:
    """Let SIGTERM unwind the stack, so that nothing half-written stays behind."""

    def leave(number: int, _: FrameType | None) -> NoReturn:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def quiet_log_writers() -> Iterator[None]:
    """Show no traceback of TensorBoard's thread, whose error the next value logged raises."""
    before = threading.excepthook

    def unless_told_later(args: threading.ExceptHookArgs) -> None:
        is_writer = type(args.thread).__module__.startswith("tensorboard.")
        if not (is_writer and issubclass(args.exc_type, OSError)):
            before(args)

    threading.excepthook = unless_told_later
    try:
        yield
    finally:
        threading.excepthook = before


def quiet_quantizers() -> None:
    """Leave out what quantization libraries log whenever they are imported, and repeat nothing."""
    beside = ("Failed to load", "Skipping import of cpp extensions", "<enum '")
    said: set[str] = set()

    def first(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        is_new = message not in said
        said.add(message)
        return is_new and not message.startswith(beside)

    for name in ("torchao", "torch.utils._pytree", "bitsandbytes.autograd._functions"):
        logging.getLogger(name).addFilter(first)


def read_pipes(args: Sequence[str]) -> list[str]:
    """A command line with the content of a configuration that is a pipe in place of its name."""
    read = list(args)
    for index, arg in enumerate(args):
        option, equals, name = arg.partition("=")
        if option != "--config" or (not equals and index + 1 == len(args)):
            continue
        name = name if equals else args[index + 1]  # or the configuration itself
        try:
            is_pipe = os.path.exists(name) and not (os.path.isfile(name) or os.path.isdir(name))
        except ValueError:  # a NUL
            is_pipe = False
        if is_pipe:
            text = read_configuration(name)
            read[index + (not equals)] = f"--config={text}" if equals else text
    return read


class SaveRunConfig(SaveConfigCallback):
    """Saves the configuration beside a run's logs, and nowhere else.

    Lightning would write config.yaml into the working folder where a run has no logger, and refuse
    to run a second time.
    """

    resumes = False
    """Whether the run goes on from another, in whose folder it may log."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Save it when training starts.

        Raises:
            FileExistsError: Another run has logged there, and this one does not go on from it.
        """
        if stage != "fit" or trainer.logger is None or self.already_saved:
            return
        path = Path(trainer.log_dir or ".") / self.config_filename
        # Rank 0 says so for all: it may have written the file when the others look.
        taken = trainer.strategy.broadcast(path.exists())
        if taken and not self.resumes:
            raise FileExistsError(
                f"{path.parent} holds the logs of another run. Leave trainer.logger.version out "
                "for a new folder, or go on with that run by --ckpt_path."
            )
        self.overwrite = True
        with writing(path):
            super().setup(trainer, pl_module, stage)
