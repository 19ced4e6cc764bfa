"""Whose an error is: the user's to mend, the machine's, or a defect that shows its traceback."""

from __future__ import annotations

import dis
import errno
import re
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import lightning
import torch
import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException

from rosa_lightning.utils.files import printable

_PACKAGE = Path(__file__).parents[1]
_LIGHTNING = Path(lightning.__file__).parent

_RESTORED = {
    "restore_datamodule": "ReasoningDataModule",
    "restore_model": "state_dict",
    "restore_precision_plugin_state": "MixedPrecision",
    "restore_callbacks": "callbacks",
    "restore_loops": "loops",
    "restore_optimizers": "optimizer_states",
    "restore_lr_schedulers": "lr_schedulers",
}
"""The trainer's functions that restore an entry of a checkpoint."""

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors of a disk that is full; of a library's files, they come without a name."""

_OF_SETTINGS = ("Early stopping conditioned on metric",)
"""How errors of another kind begin that speak of a setting."""


class ConfigurationError(ValueError):
    """A command line or a configuration that nothing can be made of."""


def one_line(message: str) -> str:
    """A message on one line, without runs of blanks."""
    return re.sub(r"\s+", " ", message).strip()


def explain(error: BaseException) -> str | None:
    """What to tell the user of an error, in one line; None for a defect.

    The user's are what this package refuses, what Lightning calls a misconfiguration, and whatever
    goes wrong while a checkpoint's content is restored. The machine's are files that cannot be read
    or written and memory that is spent. All else is a defect, also where a library raises the
    same classes: its message would not say what to mend.
    """
    for link in _chain(error):
        if (told := _of_machine(link)) is not None:
            return told
        if isinstance(link, ValueError | TypeError | ImportError) and _is_refusal(link, _PACKAGE):
            return one_line(str(link))
        if isinstance(link, ValueError) and _is_refusal(link, _LIGHTNING):
            return one_line(str(link))
        if (told := _told_by_worker(link)) is not None:
            return told
    entry = _restored_entry(error)
    if entry is not None:
        return (
            f"the checkpoint's entry {entry} cannot be restored ({type(error).__name__}: "
            f"{one_line(str(error))[:300]}). It is damaged, or was written by another kind of run. "
            "Give another checkpoint as ckpt_path."
        )
    message = _of_file(error) if isinstance(error, OSError) else one_line(str(error))
    if isinstance(error, OSError | MisconfigurationException) or message.startswith(_OF_SETTINGS):
        return message or type(error).__name__
    return None


def _of_machine(error: BaseException) -> str | None:
    """What the machine lacks: room, memory, a name that it can spell, another process."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return _of_memory(error)
    if isinstance(error, dist.DistNetworkError | dist.DistStoreError):
        return f"another process of the run cannot be reached: {one_line(str(error))[:300]}"
    if isinstance(error, UnicodeEncodeError) and error.reason == "surrogates not allowed":
        return _of_name(error)
    return _of_logs(error)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error, then those that it was raised from or over."""
    link: BaseException | None = error
    seen: set[int] = set()
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or link.__context__


def _frames(error: BaseException) -> Iterator[TracebackType]:
    frame = error.__traceback__
    while frame is not None:
        yield frame
        frame = frame.tb_next


def _is_refusal(error: BaseException, package: Path) -> bool:
    """Whether a statement of a package raised it, and not some call or operation in it.

    `int("x")` in a package is a defect of it, and says nothing of what was given.
    """
    frames = list(_frames(error))
    if not frames:
        return False
    innermost = frames[-1]
    code = innermost.tb_frame.f_code
    raised = dis.opname[code.co_code[innermost.tb_lasti]] == "RAISE_VARARGS"
    return raised and package in Path(code.co_filename).parents


def _told_by_worker(error: BaseException) -> str | None:
    """What this package refused in a process that prepares batches; torch hands it on as text."""
    found = re.match(r"Caught (\w+) in DataLoader worker process.*?\nOriginal Tr", str(error), re.S)
    if found is None:
        return None
    *_, last = re.finditer(r'  File "([^"]+)", line \d+, in .+\n    (.+)\n', str(error))
    told = str(error).partition(f"\n{found[1]}: ")[2]
    is_refusal = _PACKAGE in Path(last[1]).parents and last[2].startswith("raise ")
    is_ours = found[1] in ("ValueError", "TypeError", "ImportError") and is_refusal
    return one_line(told) if is_ours or found[1].endswith("OSError") else None


def _restored_entry(error: BaseException) -> str | None:
    """The entry of a checkpoint that was being restored when an error was raised."""
    for frame in _frames(error):
        code = frame.tb_frame.f_code
        if Path(code.co_filename).name == "checkpoint_connector.py" and code.co_name in _RESTORED:
            return _RESTORED[code.co_name]
    return None


def _of_name(error: UnicodeEncodeError) -> str:
    """Of a name with bytes that are no UTF-8, which Python keeps as halves of surrogate pairs."""
    about = one_line(printable(error.object))
    shown = about if len(about) < 300 else f"...{about[-300:]}"
    return (
        f"a name is not UTF-8, and a library needs it in UTF-8: {shown}. Rename the file or "
        "folder, or give another."
    )


def _of_file(error: OSError) -> str:
    """What the machine says of a file; where a library wrote it, its name is not told."""
    # One that names the file in its own words has an errno, but no strerror.
    if error.filename is None and error.strerror and error.errno in _FULL:
        return (
            f"a file of the run cannot be written: {error.strerror}. Make room, or set "
            "trainer.default_root_dir to another place."
        )
    return one_line(str(error))


def _of_memory(error: BaseException) -> str:
    return (
        f"memory is spent: {one_line(str(error))[:300] or 'nothing more can be allocated'}. Lower "
        "data.batch_size, data.max_length or model.speed.microbatch_tokens, or set "
        "model.gradient_checkpointing."
    )


def _of_logs(error: BaseException) -> str | None:
    """What the file system refused a logger; TensorBoard's hides it behind another error."""
    logs = any("loggers" in Path(f.tb_frame.f_code.co_filename).parts for f in _frames(error))
    cause = error if isinstance(error, OSError) else error.__cause__
    if not (logs and isinstance(cause, OSError)):
        return None
    return (
        f"the logs cannot be written: {one_line(str(cause))}. Make room for them, or set "
        "trainer.logger.init_args.save_dir to another place."
    )


def is_configuration(error: BaseException) -> bool:
    """Whether the command line or a configuration is at fault, and no run has begun."""
    return any(isinstance(link, ConfigurationError) for link in _chain(error))
