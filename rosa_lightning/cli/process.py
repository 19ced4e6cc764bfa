"""What surrounds a command: whose fault an error is, signals, and the log output of libraries."""

from __future__ import annotations

import os
import re
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import SaveConfigCallback

from rosa_lightning.cli.strict_yaml import read_configuration
from rosa_lightning.dls.callback import DynamicLayerSelection
from rosa_lightning.evaluation.writers import PREDICTIONS, RESULTS
from rosa_lightning.inspection.loggers import RunBoard
from rosa_lightning.inspection.progress import RunProgressBar
from rosa_lightning.inspection.run_record import RunRecorder
from rosa_lightning.inspection.run_summary import RunSummary
from rosa_lightning.utils.errors import ConfigurationError, explain
from rosa_lightning.utils.files import writing
from rosa_lightning.utils.run_folder import run_folder
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


_OF_ANY_RUN = re.compile(
    r"events\.out\.tfevents\..*|(hparams|config)\.yaml|metrics\.csv|layers\.jsonl"
)
"""Files that a run may begin with."""


@contextmanager
def no_empty_run(trainer: Trainer) -> Iterator[None]:
    """Remove the new log folders of a command that fails before it has anything to keep."""
    logged = [one.log_dir for one in trainer.loggers if trainer.is_global_zero and one.log_dir]
    new = [folder for folder in map(Path, logged) if not folder.exists()]
    try:
        yield
    except BaseException:
        for folder in new if not trainer.global_step else []:
            _remove_empty(folder)
        raise


def _remove_empty(folder: Path) -> None:
    """Remove a folder that holds the beginning of a run alone, and the one around if left empty."""
    found = {path.name: path for path in folder.glob("*")}
    answers = found.get(PREDICTIONS)
    if answers is not None and not answers.stat().st_size:  # of a test that answered nothing
        (folder / RESULTS).unlink(missing_ok=True)
        answers.unlink()
        found = {name: path for name, path in found.items() if path.exists()}
    if all(map(_OF_ANY_RUN.fullmatch, found)):
        with suppress(OSError):  # it may not have been made
            for path in found.values():
                path.unlink()
            folder.rmdir()
            folder.parent.rmdir()


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


def run_defaults(given: Any, selection: DynamicLayerSelection | None) -> dict[str, Any]:
    """Logger and callbacks of every run, where the settings of the trainer have none of their kind.

    Args:
        given: The settings of the trainer.
        selection: What selects layers in a training; None for the other commands.
    """
    callbacks, wanted = listed(given.callbacks), list[tuple[type, Callback]]()
    if selection is not None:
        wanted = [(RunSummary, RunSummary([selection])), (RunRecorder, RunRecorder())]
    if given.enable_progress_bar is not False:
        wanted.append((ProgressBar, RunProgressBar()))
    missing = [one for kind, one in wanted if not any(isinstance(c, kind) for c in callbacks)]
    found: dict[str, Any] = {"callbacks": [*missing, *callbacks]}
    if given.logger in (None, True):
        folder, job = given.default_root_dir or os.getcwd(), SLURMEnvironment.job_id()
        found["logger"] = RunBoard(folder, version=job, default_hp_metric=False)
    return found


def listed(callbacks: Any) -> list[Any]:
    """Callbacks as Lightning takes them, one, several or none, as a list."""
    return callbacks if isinstance(callbacks, list) else [callbacks] if callbacks else []


class SaveRunConfig(SaveConfigCallback):
    """Saves the configuration in a run's folder, and nowhere else.

    Lightning would write config.yaml into the working folder where a run has no logger, and into
    one for all runs under loggers of W&B and MLflow.
    """

    resumes = False
    """Whether the run goes on from another, in whose folder it may log."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Save it when training starts.

        Raises:
            FileExistsError: Another run has logged there, and this one does not go on from it.
        """
        folder = run_folder(trainer)
        if stage != "fit" or folder is None or self.already_saved:
            return
        path = folder / self.config_filename
        # Rank 0 says so for all: it may have written the file when the others look.
        taken = trainer.strategy.broadcast(path.exists())
        if taken and not self.resumes:
            raise FileExistsError(
                f"{path.parent} holds the logs of another run. Leave trainer.logger.version out "
                "for a new folder, or go on with that run by --ckpt_path."
            )
        self.already_saved = True
        if trainer.is_global_zero:
            with writing(path):
                folder.mkdir(parents=True, exist_ok=True)
                self.parser.save(
                    self.config, path, skip_none=False, overwrite=True, multifile=self.multifile
                )
