"""What surrounds a command: whose fault an error is, its files, and the output of libraries."""

import io
import os
import re
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, suppress
from pathlib import Path
from typing import Any

from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger

from rosa_lightning.cli.strict_yaml import read_configuration
from rosa_lightning.dls.callback import DynamicLayerSelection
from rosa_lightning.evaluation.writers import PREDICTIONS, RESULTS
from rosa_lightning.inspection.loggers import RunBoard
from rosa_lightning.inspection.progress import RunProgressBar
from rosa_lightning.inspection.run_record import RunRecorder
from rosa_lightning.inspection.run_summary import RunSummary
from rosa_lightning.utils.errors import ConfigurationError, explain
from rosa_lightning.utils.files import writing
from rosa_lightning.utils.text import one_line
from rosa_lightning.utils.trainer import folder_of, run_folder


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


_OF_ANY_RUN = re.compile(
    r"events\.out\.tfevents\..*|(hparams|config)\.yaml|metrics\.csv|layers\.jsonl|run\.json"
)
"""Files that a run may begin with."""


@contextmanager
def no_empty_run(trainer: Trainer) -> Iterator[None]:
    """Remove what a command that fails before it has anything to keep has begun to log.

    Of W&B the local folder, and of MLflow the run in a local store, whose database stays: others
    may have opened it.
    """
    logged = [one.log_dir for one in trainer.loggers if trainer.is_global_zero and one.log_dir]
    new, since = [folder for folder in map(Path, logged) if not folder.exists()], time.time()
    try:
        yield
    except BaseException:
        if trainer.is_global_zero and not trainer.global_step:
            for folder in new:
                _remove_empty(folder)
            for logger in trainer.loggers:
                with suppress(Exception):  # of clients; the error at hand is the one to be seen
                    _remove_begun(logger, trainer.default_root_dir, since)
        raise


def _remove_begun(logger: Logger, root: str, since: float) -> None:
    """Remove a run of W&B or MLflow that has begun since then, unless its folder has more."""
    if isinstance(logger, WandbLogger):
        import wandb

        run = wandb.run
        if run is None or run.start_time < since or not _remove_empty(folder_of(logger, root)):
            return
        folder = Path(run.dir).parent
        assert folder.name.endswith(run.id)
        with redirect_stderr(io.StringIO()):  # it tells how to upload what is removed
            wandb.finish(exit_code=1)
        shutil.rmtree(folder, ignore_errors=True)  # none where W&B is disabled
        for link in folder.parent.iterdir():
            if link.is_symlink() and not link.exists():
                link.unlink()
        folder.parent.rmdir()
    elif isinstance(logger, MLFlowLogger):
        import mlflow

        if mlflow.get_tracking_uri().startswith(("http:", "https:", "databricks")):
            return
        client, run_id = logger.experiment, logger.run_id
        is_new = client.get_run(run_id).info.start_time >= 1000 * since
        if is_new and _remove_empty(folder_of(logger, root)):
            client.delete_run(run_id)


def _remove_empty(folder: Path) -> bool:
    """Remove a folder that holds the beginning of a run alone, and the one around if left empty.

    Whether there is none any more.
    """
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
    return not folder.exists()


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

    A TensorBoardLogger that they have shows what the default one does. ``selection`` selects layers
    in a training, and is None for the other commands.
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
    for logger in listed(given.logger):
        if type(logger) is TensorBoardLogger:
            logger.__class__ = RunBoard  # which has no state of its own
    return found


def listed(given: Any) -> list[Any]:
    """Callbacks or loggers as Lightning takes them, one, several or none, as a list."""
    return given if isinstance(given, list) else [given] if given else []


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
