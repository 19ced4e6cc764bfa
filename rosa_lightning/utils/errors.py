"""Whose an error is: the user's to mend, the machine's, or a defect that shows its traceback."""

import dis
import errno
import re
import traceback
from collections.abc import Iterator
from pathlib import Path

import lightning
import torch
import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException

from rosa_lightning.utils.files import printable
from rosa_lightning.utils.text import one_line

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


class ConfigurationError(ValueError):
    """A command line or a configuration that nothing can be made of."""


def is_configuration(error: BaseException) -> bool:
    """Whether the command line or a configuration is at fault, and no run has begun."""
    return any(isinstance(link, ConfigurationError) for link in _chain(error))


def explain(error: BaseException) -> str | None:
    """What to tell the user of an error, in one line; None for a defect.

    The user's are what this package refuses, what Lightning calls a misconfiguration, and whatever
    goes wrong while a checkpoint's content is restored; the machine's are files and memory. All
    else is a defect, also where a library raises the same classes.
    """
    for link in _chain(error):
        if (told := _of_machine(link) or _refused(link) or _refused_by_worker(link)) is not None:
            return told
    said = one_line(str(error))
    for path, function in _frames(error):
        if path.name == "checkpoint_connector.py" and function in _RESTORED:
            return (
                f"the checkpoint's entry {_RESTORED[function]} cannot be restored "
                f"({type(error).__name__}: {said[:300]}). It is damaged, or was written by another "
                "kind of run. Give another checkpoint as ckpt_path."
            )
    known = isinstance(error, OSError | MisconfigurationException)
    if known or said.startswith("Early stopping conditioned on metric"):
        return said or type(error).__name__
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error, then those that it was raised from or over."""
    link: BaseException | None = error
    seen: set[int] = set()
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or link.__context__


def _frames(error: BaseException) -> list[tuple[Path, str]]:
    """The file and the function of each frame that an error went through."""
    codes = [frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__)]
    return [(Path(code.co_filename), code.co_name) for code in codes]


def _of_machine(error: BaseException) -> str | None:
    """What the machine lacks: room, memory, a name that it can spell, another process."""
    said = one_line(str(error))
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return (
            f"memory is spent: {said[:300] or 'nothing more can be allocated'}. Lower "
            "data.batch_size, data.max_length or model.speed.microbatch_tokens, or set "
            "model.speed.gradient_checkpointing."
        )
    if isinstance(error, dist.DistNetworkError | dist.DistStoreError):
        return f"another process of the run cannot be reached: {said[:300]}"
    if isinstance(error, UnicodeEncodeError) and error.reason == "surrogates not allowed":
        shown = one_line(printable(error.object))[-300:]
        return (
            f"a name is not UTF-8, and a library needs it in UTF-8: {shown}. Rename the file or "
            "folder, or give another."
        )
    # TensorBoard's writer hides what the file system says behind another error.
    cause = error if isinstance(error, OSError) else error.__cause__
    if isinstance(cause, OSError) and any("loggers" in path.parts for path, _ in _frames(error)):
        return (
            f"the logs cannot be written: {one_line(str(cause))}. Make room for them, or set "
            "trainer.default_root_dir, or the logger's save_dir, to another place."
        )
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    reason = getattr(error, "strerror", None)
    if full and reason and getattr(error, "filename", None) is None:  # a library's file
        return (
            f"a file of the run cannot be written: {reason}. Make room, or set "
            "trainer.default_root_dir to another place."
        )
    return None


def _refused(error: BaseException) -> str | None:
    """What a raise statement of this package or of Lightning refused, no operation that failed."""
    link = error.__traceback__
    if link is None or not isinstance(error, ValueError | TypeError | ImportError):
        return None
    while link.tb_next is not None:
        link = link.tb_next
    code = link.tb_frame.f_code
    folders = Path(code.co_filename).parents
    ours = _PACKAGE in folders or (_LIGHTNING in folders and isinstance(error, ValueError))
    raised = dis.opname[code.co_code[link.tb_lasti]] == "RAISE_VARARGS"
    return one_line(str(error)) if ours and raised else None


def _refused_by_worker(error: BaseException) -> str | None:
    """What this package refused in a process that prepares batches; torch hands it on as text."""
    found = re.match(r"Caught (\w+) in DataLoader worker process.*?\nOriginal Tr", str(error), re.S)
    if found is None:
        return None
    *_, last = re.finditer(r'  File "([^"]+)", line \d+, in .+\n    (.+)\n', str(error))
    told = str(error).partition(f"\n{found[1]}: ")[2]
    is_refusal = _PACKAGE in Path(last[1]).parents and last[2].startswith("raise ")
    is_ours = found[1] in ("ValueError", "TypeError", "ImportError") and is_refusal
    return one_line(told) if is_ours or found[1].endswith("OSError") else None
