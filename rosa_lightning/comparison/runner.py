"""Runs of a comparison: each in a process of its own, resumable; results as plain values."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from rosa_lightning.comparison.plan import nested
from rosa_lightning.utils.files import atomic_write, read_text

RESULT = "result.json"
LOG = "log.txt"
_OVERRIDES = "overrides.yaml"
_RECORD = "run.json"
_RECORDER = "rosa_lightning.inspection.run_record.RunRecorder"
_POLL_SECONDS = 0.5

Progress = Callable[[int, int], None]
"""Takes the step that a run is at, and how many it has."""


class RunFailedError(RuntimeError):
    """A run that ended with an error; its message is that of the run."""

    def __init__(self, message: str, *, killed: bool = False) -> None:
        super().__init__(message)
        self.killed = killed
        """By a signal, so that it may well go on another time."""


def command(name: str, base: str, overrides: Path, *options: str) -> list[str]:
    """The command line of a run: the shared configuration, and what is different in this one."""
    head = [sys.executable, "-m", "rosa_lightning", name]
    return [*head, "--config", base, "--config", str(overrides), *options]


def fit(
    base: str, overrides: Mapping[str, Any], folder: Path, progress: Progress
) -> dict[str, Any]:
    """Train, or go on with a training that was stopped; the record that `RunRecorder` wrote.

    Args:
        base: The configuration that all runs share.
        overrides: What is different in this one, nested.
        folder: Of the run.
        progress: Told of each step that the record shows.

    Raises:
        RunFailedError: The training ended with an error.
        ValueError: The folder holds a run with other settings.
    """
    file = write_overrides(overrides, folder)
    record = read_json(folder / _RECORD)
    if record.get("status") != "finished":
        last = folder / "checkpoints" / "last.ckpt"
        options = [f"--trainer.callbacks+={_RECORDER}"]
        options += [f"--ckpt_path={last}"] if last.exists() else []
        if not last.exists():  # what was written before the first checkpoint
            for name in ("config.yaml", _RECORD):
                (folder / name).unlink(missing_ok=True)
        _run(command("fit", base, file, *options), folder, progress)
        record = read_json(folder / _RECORD)
        if record.get("status") != "finished":
            raise RunFailedError(
                f"the training ended without its last step; {folder / LOG} says more"
            )
    return record


def evaluate(
    base: str, folder: Path, ckpt_path: str | None, overrides: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Answer the test sources with a checkpoint; the content of ``results.json``.

    Args:
        base: The configuration that all runs share.
        folder: Of the run, with its overrides.
        ckpt_path: The checkpoint; None for the base itself.
        overrides: Of the base, whose folder has none yet; keys may be dotted.
    """
    if overrides is not None:
        write_overrides(nested(overrides), folder)
    results = folder / "results.json"
    if not read_json(results).get("complete"):
        options = [] if ckpt_path is None else [f"--ckpt_path={ckpt_path}"]
        _run(command("test", base, folder / _OVERRIDES, *options), folder, lambda *_: None)
    return read_json(results)


def write_overrides(overrides: Mapping[str, Any], folder: Path) -> Path:
    """Write what is different in a run, into its folder."""
    path = folder / _OVERRIDES
    write_once(path, yaml.safe_dump(dict(overrides), sort_keys=True))
    return path


def write_once(path: Path, text: str) -> None:
    """Write a file of settings; ValueError if there is one with others."""
    if path.exists() and read_text(path) != text:
        raise ValueError(
            f"{path.parent} holds what was run with other settings. Give another folder, or remove "
            "that one."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, text.encode())


def read_json(path: Path) -> dict[str, Any]:
    """The mapping in a JSON file; empty where there is none, or where it is not whole."""
    with suppress(OSError, ValueError):
        found = json.loads(read_text(path))
        return found if isinstance(found, dict) else {}
    return {}


def _run(arguments: Sequence[str], folder: Path, progress: Progress) -> None:
    """Run a command, with its output in the run's log; a signal is handed on, and waited for."""
    log = folder / LOG
    start = log.stat().st_size if log.exists() else 0
    environment = {**os.environ, "TERM": "dumb", "PYTHONUNBUFFERED": "1"}
    with log.open("ab") as output:
        process = subprocess.Popen(
            arguments,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # Ctrl-C reaches this process alone, which hands it on
        )
        with _handed_on(process):
            while process.poll() is None:
                record = read_json(folder / _RECORD)
                progress(record.get("step", 0), record.get("max_steps", 0))
                time.sleep(_POLL_SECONDS)
    if process.returncode:
        reason = failure_reason(log, start, process.returncode)
        raise RunFailedError(reason, killed=process.returncode < 0)


@contextmanager
def _handed_on(process: subprocess.Popen[bytes]) -> Iterator[None]:
    try:
        yield
    except BaseException:
        process.send_signal(signal.SIGTERM)  # a training saves a checkpoint
        try:
            process.wait(timeout=600)
        finally:
            process.kill()
        raise


def failure_reason(log: Path, start: int, status: int) -> str:
    """What a run said last, its error if it named one.

    Args:
        log: Its output.
        start: Where that begins, in bytes.
        status: With which it ended.
    """
    with log.open("rb") as file:
        file.seek(start)
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines()]
    errors = [line for line in lines if line.startswith("error: ")]
    said = [line for line in lines if line]
    last = errors[-1].removeprefix("error: ") if errors else (said or [""])[-1]
    return f"exit status {status}: {last}"
