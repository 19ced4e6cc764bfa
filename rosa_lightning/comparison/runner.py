"""Runs of a comparison: each in a process of its own, resumable; results as plain values."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from rosa_lightning.comparison.child import GRACE_S
from rosa_lightning.inspection.text_loss import TEXT_LOSS
from rosa_lightning.utils.files import atomic_write, file_digest, read_text
from rosa_lightning.utils.stopping import unwinding
from rosa_lightning.utils.strict_json import read_object

RESULT = "result.json"
LOG = "log.txt"
_OVERRIDES = "overrides.yaml"
_RECORD = "run.json"
_TEXT_LOSS = "rosa_lightning.TextLoss"
_POLL_SECONDS = 0.5

Progress = Callable[[int, int], None]
"""Takes the step that a run is at, and how many it has."""
Whole = Callable[[Sequence[Path | str]], str]


class RunFailedError(RuntimeError):
    """A run that ended with an error; its message is that of the run."""

    def __init__(self, message: str, *, killed: bool = False) -> None:
        super().__init__(message)
        self.killed = killed
        """By a signal, so that it may well go on another time."""


@dataclass(frozen=True)
class Runner:
    """Runs the commands of a comparison, each in a process of its own.

    Args:
        shared: The configuration that all runs share, a file.
        whole: Gives the whole configuration that a list of files or texts makes. By it settings
            are told apart: a key may have been added since a run, or be written in another way.
    """

    shared: Path
    whole: Whole | None = None

    def prepare(self, overrides: Mapping[str, Any], folder: Path, name: str = _OVERRIDES) -> Path:
        """Write what differs from the shared configuration as a file, and return its path.

        Raises:
            ValueError: There is one with other settings.
        """
        path, text = folder / name, yaml.safe_dump(dict(overrides), sort_keys=True)
        whole, shared = self.whole, self.shared
        same = None if whole is None else lambda: whole([shared, path]) == whole([shared, text])
        write_once(path, text, same)
        return path

    def fit(self, folder: Path, progress: Progress) -> dict[str, Any]:
        """Train, or go on with a training that was stopped; the record of `RunRecorder`.

        The folder holds the run's overrides; progress is told of each step that the record shows.

        Raises:
            RunFailedError: The training ended with an error.
        """
        record = read_object(folder / _RECORD)
        if record.get("status") != "finished":
            last = folder / "checkpoints" / "last.ckpt"
            # `hparams` shows each run in TensorBoard, with its test.
            options = ["--trainer.callbacks+=rosa_lightning.RunRecorder"]
            options += ["--trainer.callbacks.hparams=false"]
            options += [f"--ckpt_path={last}"] if last.exists() else []
            if not last.exists():  # what was written before the first checkpoint
                for name in ("config.yaml", _RECORD):
                    (folder / name).unlink(missing_ok=True)
            self._run("fit", folder, options, progress)
            record = read_object(folder / _RECORD)
            if record.get("status") != "finished":
                raise RunFailedError(
                    f"the training ended without its last step; {folder / LOG} says more"
                )
        return record

    def test(self, folder: Path, ckpt_path: str | None, progress: Progress) -> dict[str, Any]:
        """Answer the test sources with a checkpoint, or the base; what ``results.json`` holds."""
        results = folder / "results.json"
        if not read_object(results).get("complete"):
            self._run("test", folder, _of(ckpt_path), progress)
        return read_object(results)

    def text_loss(
        self, folder: Path, ckpt_path: str | None, texts: Path, progress: Progress
    ) -> dict[str, Any]:
        """Loss of a checkpoint, or of the base, on a file of texts; what `TextLoss` wrote."""
        found = folder / TEXT_LOSS
        digest = file_digest(texts)
        if read_object(found).get("texts") != digest:
            made = {"path": str(found), "texts": str(texts)}
            options = [f"--trainer.callbacks+={_TEXT_LOSS}"]
            options += [f"--trainer.callbacks.{name}={value}" for name, value in made.items()]
            # A validation as short as can be, for what it brings along: devices and precision.
            options += ["--trainer.limit_val_batches=1", "--trainer.logger=false"]
            options.append(f"--trainer.default_root_dir={folder}")
            options += ["--data.loading.val_generate=0", *_of(ckpt_path)]
            self._run("validate", folder, options, progress)
        return read_object(found)

    def _run(self, name: str, folder: Path, options: Sequence[str], progress: Progress) -> None:
        """Run a command, with its output in the run's log; a signal is handed on."""
        head = ["rosa_lightning.comparison.child", str(folder / ".lock"), name]
        files = [f"--config={self.shared}", f"--config={folder / _OVERRIDES}"]
        log = folder / LOG
        start = log.stat().st_size if log.exists() else 0
        # It notices by its standard input that this process is gone.
        process = start_module([*head, *files, *options], log)
        with _handed_on(process):
            while process.poll() is None:
                record = read_object(folder / _RECORD) if name == "fit" else {}
                progress(record.get("step", 0), record.get("max_steps", 0))
                time.sleep(_POLL_SECONDS)
        if process.returncode:
            reason = failure_reason(log, start, process.returncode)
            # Or a signal was answered as this package's commands do.
            by_signal = process.returncode < 0 or process.returncode > 128
            raise RunFailedError(reason, killed=by_signal)


def start_module(arguments: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    """Start a Python module, with its arguments, in a process that adds what it says to a log."""
    with log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", *arguments],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "TERM": "dumb", "PYTHONUNBUFFERED": "1"},
            start_new_session=True,  # Ctrl-C reaches this process alone
        )


def _of(ckpt_path: str | None) -> list[str]:
    return [] if ckpt_path is None else [f"--ckpt_path={ckpt_path}"]


def write_once(path: Path, text: str, same: Callable[[], bool] | None = None) -> None:
    """Write a file of settings; ValueError if there is one with others.

    ``same`` says of one with another text whether it means the same; it is kept then.
    """
    if path.exists():
        if read_text(path) == text or (same is not None and same()):
            return
        raise ValueError(
            f"{path} is of a comparison with other settings. Set comparison.folder to another "
            "folder, or remove that one."
        )
    atomic_write(path, text.encode())


@contextmanager
def _handed_on(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """End a process with this one, by a signal that lets a training save a checkpoint."""
    try:
        yield
    except BaseException:
        process.send_signal(signal.SIGTERM)
        sys.stderr.write(
            "stopping: the run at hand writes its state, and the same command goes on from there. "
            "Ctrl-C again ends it at once.\n"
        )
        try:
            process.wait(timeout=GRACE_S)
        finally:
            process.kill()
        raise
    finally:
        if process.stdin is not None:
            process.stdin.close()


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold a folder for this process; ValueError where another comparison works in it."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise ValueError(
            f"another comparison works in {folder}. Wait for its end, or set comparison.folder to "
            "another folder."
        ) from None
    try:
        yield
    finally:
        lock.release()


def hangup_ends() -> AbstractContextManager[None]:
    """Let SIGHUP, a terminal's end, unwind the stack, unless it is ignored, as by nohup."""
    number = getattr(signal, "SIGHUP", None)  # Windows has none
    if number is None or signal.getsignal(number) == signal.SIG_IGN:
        return nullcontext()
    return unwinding(number)


def failure_reason(log: Path, start: int, status: int) -> str:
    """What a run said last in a log, from a byte on: its error if it named one."""
    with log.open("rb") as file:
        file.seek(start)
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines()]
    errors = [line for line in lines if line.startswith("error: ")]
    said = [line for line in lines if line]
    last = errors[-1].removeprefix("error: ") if errors else (said or [""])[-1]
    return f"exit status {status}: {last}"
