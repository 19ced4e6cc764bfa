"""What a command says while it runs: to the terminal as it is then, and without others' noise."""

import logging
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rosa_lightning.models.quantization import quiet_libraries

_LOGGERS = ("lightning", "lightning.pytorch", "lightning.fabric")
_SAID_BY_NONE_OF_US = re.compile(
    r"💡 Tip|Seed set to|(GPU|TPU|HPU) available|LOCAL_RANK|Loading `train_dataloader` to estimate|"
    r"`Trainer\.fit` stopped|`Trainer\(.*\)` was configured|Using .* Automatic Mixed Precision|"
    r"Restoring states from|Restored all states|Loaded model weights from|\nDetected Keyboard"
)
"""How lines of Lightning begin that tell a user nothing, or what is said in other words."""
_WARNED_OF_NOTHING = (
    r"The dirpath has changed from",
    r"Be aware that when using `ckpt_path`, callbacks used to create",
    r"The number of training batches \(\d+\) is smaller than the logging interval",
    r"The '\w+' does not have many workers",
    r"Checkpoint directory .* exists and is not empty",
    r"Precision .* is not supported by the model summary",
    r"Found \d+ module\(s\) in eval mode",
    # Lightning still uses a name that torch 2.13 deprecates.
    r".*treespec, LeafSpec\)` is deprecated",
)


class _ToTerminal(logging.Handler):
    """Writes to what the error stream is at that time: the console of a bar that is shown, say."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line."""
        if not _SAID_BY_NONE_OF_US.match(record.getMessage()):
            sys.stderr.write(f"{self.format(record)}\n")


@contextmanager
def messages() -> Iterator[None]:
    """Show messages and warnings as lines of their own, without those that tell a user nothing."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    before = [logger.handlers for logger in loggers], warnings.formatwarning
    for logger in loggers:
        # Handlers of others, such as of a test or of a file, stay.
        own = [one for one in logger.handlers if type(one) is logging.StreamHandler]
        others = [one for one in logger.handlers if one not in own]
        logger.handlers = [*others, _ToTerminal()] if own else others
    warnings.formatwarning = _one_line
    try:
        with quiet_libraries(), warnings.catch_warnings():
            for message in _WARNED_OF_NOTHING:
                warnings.filterwarnings("ignore", message=message)
            yield
    finally:
        warnings.formatwarning = before[1]
        for logger, handlers in zip(loggers, before[0], strict=True):
            logger.handlers = handlers


def _one_line(message: Warning | str, *_: Any, **__: Any) -> str:
    """A warning without the line of code that warns."""
    return f"warning: {' '.join(str(message).split())}\n"
