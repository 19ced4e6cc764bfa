"""The end of a run: by a signal to any of its processes, or where another rank has failed.

While a training runs, a signal is only noted: all ranks stop together after the optimizer step,
with a checkpoint to resume from. Elsewhere a signal ends the process at once, and a thread of each
rank looks whether another one has left.
"""

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NoReturn, Self

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.connectors import signal_connector
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException

from rosa_lightning.utils.agreement import (
    RanksError,
    agree,
    configuration,
    is_told,
    mark_told,
    new_run,
    optimization,
    several_ranks,
    shared_store,
)
from rosa_lightning.utils.trainer import callbacks_of

LOOK_S = 0.5
"""How often a rank looks whether another has left, in seconds."""
GRACE_S = 10.0
"""How long a rank may take to follow another that has left, in seconds."""

_REQUEUE, _INTERRUPT, _TERMINATE = 1, 2, 3
"""What was asked for; of several the highest counts."""


class Stopping(Callback):
    """Ends a run of one rank or several in order, and compares the ranks before they work together.

    `RoSAModule` brings it along.
    """

    def __init__(self) -> None:
        super().__init__()
        self._asked = 0
        self._training = self._over = self._agreed = False
        self._key = ""
        self._news: dict[str, Any] | None = None
        self._done = threading.Event()
        self._before: Any = None
        self._requeue: Callable[[], None] | None = None
        self._group: Any = None
        self._common_batches = 0

    @classmethod
    def of(cls, trainer: Trainer | None) -> Self | None:
        """The one of a trainer's run, if there is one."""
        return next(iter(callbacks_of(trainer, cls)), None)

    @classmethod
    def for_run(cls, trainer: Any) -> Self:
        """A new one for the run that a trainer begins, in place of that of the run before."""
        trainer.callbacks = [one for one in trainer.callbacks if not isinstance(one, cls)]
        new = cls()
        if trainer.world_size > 1:
            new._key = f"rosa/left/{new_run()}"
            new._before = signal.getsignal(signal.SIGTERM)
            _handle([signal.SIGTERM], new._on_signal)
            threading.Thread(target=new._look, name="other-ranks", daemon=True).start()
        return new

    def __reduce__(self) -> tuple[type[Self], tuple[()]]:
        """A new one: a copied trainer, or one in another process, has no signals of its own."""
        return type(self), ()

    # Comparing the ranks.

    def agree(self, trainer: Trainer) -> None:
        """Compare the ranks' configurations, once a run; RanksError names what differs."""
        if not self._agreed:
            self._agreed = True
            agree("settings", configuration(trainer))

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Compare the ranks, where the data module has not."""
        self.agree(trainer)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare what has been made since."""
        if several_ranks():
            agree("optimizers", optimization(trainer))

    # Signals.

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the place of Lightning's handler, which waits for what other ranks will not do."""
        _handle([signal.SIGTERM], self._on_signal)

    on_predict_start = on_test_start

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count the batches that all ranks have, and correct what a resumed one has counted."""
        _handle([signal.SIGTERM], self._on_signal)
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            loop = trainer.fit_loop.epoch_loop.val_loop
            number = min(sum(loop.max_batches), 2**31)
            self._common_batches = -self._highest(-int(number))
            total: Any = loop.batch_progress.total
            total.ready = total.started = total.processed = total.completed

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From here on signals wait for the end of a step."""
        if several_ranks() and dist.get_backend() != "gloo":
            self._group = dist.new_group(backend="gloo")  # no wait for the device
        self._training = True
        numbers: list[int] = [signal.SIGTERM]
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            numbers.append(signal.SIGINT)
        for number in signal.valid_signals() - {signal.SIGTERM}:
            handler: Any = signal.getsignal(number)
            # Lightning's, which asks SLURM to requeue the job; the number is a setting.
            if type(handler).__module__ == signal_connector.__name__:
                self._requeue = lambda number=number, handler=handler: handler(number, None)
                numbers.append(number)
        _handle(numbers, self._on_signal)  # Lightning puts the former ones back

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._over:
            if callable(self._before):
                self._before(number, frame)
            return
        if self._news is not None:
            _follow(self._news)
        if not self._training:
            if number == signal.SIGTERM:
                raise SIGTERMException(128 + number)
            return
        if number == signal.SIGINT and self._asked >= _INTERRUPT:
            raise KeyboardInterrupt  # asked for again: at once
        kinds = {int(signal.SIGTERM): _TERMINATE, int(signal.SIGINT): _INTERRUPT}
        self._asked = max(self._asked, kinds.get(number, _REQUEUE))

    def after_batch(self, trainer: Trainer, batch_idx: int) -> None:
        """Stop here, where that was asked of any rank; all ranks must call this.

        Not between the batches of one optimizer step, nor before a validation that is due: what
        comes next in it is where to stop then.
        """
        count = batch_idx + 1
        last = trainer.is_last_batch or count >= trainer.num_training_batches
        if not last and count % trainer.accumulate_grad_batches:
            return
        asked = self._highest(self._asked)
        if asked and not validation_is_due(trainer):
            self._obey(trainer, asked)

    def after_validation_batch(self, trainer: Trainer) -> None:
        """Stop in a validation of a training, which is made anew when the training goes on."""
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return
        progress: Any = trainer.fit_loop.epoch_loop.val_loop.batch_progress
        if progress.current.processed > self._common_batches:
            return  # other ranks have no such batch
        if asked := self._highest(self._asked):
            with _before_its_first_batch(progress):
                self._obey(trainer, asked)

    def _obey(self, trainer: Trainer, asked: int) -> None:
        self._asked = 0
        if asked == _REQUEUE and self._requeue is not None:
            self._requeue()  # here, as a checkpoint in the midst of a step would be of no state
            return
        path = _save(trainer)
        name = "SIGTERM" if asked == _TERMINATE else "Ctrl-C"
        advice = (
            f"Go on with --ckpt_path {path}" if path else "There is no checkpoint to go on from"
        )
        rank_zero_info(f"{name}: stopped after step {trainer.global_step}. {advice}.")
        ending: BaseException = KeyboardInterrupt()
        if asked == _TERMINATE:
            ending = SIGTERMException(128 + signal.SIGTERM)
        mark_told(ending)
        raise ending

    def _highest(self, value: int) -> int:
        """The highest value of all ranks."""
        if not several_ranks():
            return value
        shared = torch.tensor(value)
        dist.all_reduce(shared, op=dist.ReduceOp.MAX, group=self._group)
        return int(shared)

    # Other ranks.

    def _look(self) -> None:
        """Look now and then whether another rank has left, and see to it that this one follows."""
        store = None
        while not self._done.wait(LOOK_S):
            try:
                if store is None and dist.is_initialized():
                    store = shared_store().clone()  # not held up by what waits in the other
                if store is None or not store.check([self._key]):
                    continue
                news = json.loads(store.get(self._key))
                if news["rank"] != dist.get_rank():
                    store.add(f"{self._key}/seen", 1)
            except Exception:  # the store went with rank 0
                news = {"rank": 0, "status": 1, "reason": "its process has ended"}
            if not self._done.is_set() and news["rank"] != dist.get_rank():
                self._leave(news)
            return

    def _leave(self, news: dict[str, Any]) -> None:
        self._news = news
        os.kill(os.getpid(), signal.SIGTERM)
        if not self._done.wait(GRACE_S):
            # Stuck where Python handles no signal, waiting for the one that has left.
            sys.stderr.write(f"error: {_in_words(news)}\n")
            sys.stderr.flush()
            os._exit(news["status"])

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Tell the other ranks that this one leaves; or say which one left first."""
        self._done.set()
        over, self._over = self._over, True
        if over or not several_ranks() or is_told(exception):
            return
        news = self._news or self._tell(exception)
        if news is not None and not isinstance(exception, SIGTERMException):
            _follow(news, exception)

    def _tell(self, exception: BaseException) -> dict[str, Any] | None:
        """Tell that this rank leaves; returns what another one told before."""
        status = 1
        if isinstance(exception, SystemExit) and isinstance(exception.code, int):
            status = exception.code or 1
        elif isinstance(exception, KeyboardInterrupt):
            status = 128 + signal.SIGINT
        reason, *_ = [*str(exception).strip().splitlines(), type(exception).__name__]
        own = {"rank": dist.get_rank(), "status": status, "reason": reason}
        with suppress(Exception):  # the store may be gone
            store = shared_store()
            first = json.loads(store.compare_set(self._key, "", json.dumps(own)))
            if first["rank"] != own["rank"]:
                return dict(first)
            until = time.monotonic() + 4 * LOOK_S
            while own["rank"] == 0 and time.monotonic() < until:
                if int(store.add(f"{self._key}/seen", 0)) >= dist.get_world_size() - 1:
                    break
                time.sleep(0.01)
        return None

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """All is done: no rank leaves before the others have stopped to look."""
        self._done.set()
        self._training = False
        if several_ranks():
            trainer.strategy.barrier("ended")
        self._over = True
        if self._before is not None:
            _handle([signal.SIGTERM], self._before)


@contextmanager
def unwinding(number: int) -> Iterator[None]:
    """Let a signal unwind the stack, so that nothing half-written stays behind."""

    def leave(number: int, _: FrameType | None) -> NoReturn:
        raise SystemExit(128 + number)

    before = signal.signal(number, leave)
    try:
        yield
    finally:
        signal.signal(number, before)


def _handle(numbers: list[int], handler: Any) -> None:
    """Handle signals, where that can be set."""
    if threading.current_thread() is threading.main_thread():
        for number in numbers:
            signal.signal(number, handler)


def _follow(news: dict[str, Any], cause: BaseException | None = None) -> NoReturn:
    """Leave as another rank has left."""
    if news["status"] > 128:
        raise SIGTERMException(news["status"]) from cause
    raise RanksError(_in_words(news)) from cause


def _in_words(news: dict[str, Any]) -> str:
    if news["status"] > 128:
        return f"rank {news['rank']} was stopped by {signal.Signals(news['status'] - 128).name}."
    return f"rank {news['rank']} failed: {news['reason']}"


def validation_is_due(trainer: Trainer) -> bool:
    """Whether a validation follows on the batch that has been trained, but for one by the clock."""
    fit: Any = trainer.fit_loop
    every = trainer.check_val_every_n_epoch
    interval: Any = trainer.val_check_batch  # None by the clock, infinite without a known length
    if not sum(trainer.num_val_batches) or (every and (trainer.current_epoch + 1) % every):
        return False
    if interval is None:
        return False
    epochs = fit.epoch_progress.current.processed
    can_stop = epochs >= (fit.min_epochs or 0) and trainer.global_step >= (fit.min_steps or 0)
    if trainer.should_stop and can_stop:
        return True
    batch = fit.epoch_loop.batch_idx + 1
    if interval == float("inf"):
        return bool(trainer.is_last_batch or batch >= trainer.num_training_batches)
    count = fit.epoch_loop.total_batch_idx + 1 if every is None else batch
    return bool(count % interval == 0)


@contextmanager
def _before_its_first_batch(progress: Any) -> Iterator[None]:
    """Let a validation look as if it had begun its first batch: so it begins anew when resumed."""
    now = progress.state_dict()
    total, current = progress.total, progress.current
    total.processed = total.completed = total.ready - current.ready
    total.ready = total.started = total.completed + 1
    current.ready = current.started = 1
    current.processed = current.completed = 0
    try:
        yield
    finally:
        progress.load_state_dict(now)


def _save(trainer: Trainer) -> str | None:
    """Save the last checkpoint of the first callback that saves any; all ranks must call this."""
    saving = callbacks_of(trainer, ModelCheckpoint)
    if not saving:
        return None
    callback = max(saving, key=lambda one: bool(one.save_last))
    if not callback.last_model_path:
        counts: Any = {"epoch": trainer.current_epoch, "step": trainer.global_step}
        values, name = trainer.callback_metrics | counts, callback.CHECKPOINT_NAME_LAST
        path, version = callback.format_checkpoint_name(values, name), callback.STARTING_VERSION
        while callback.file_exists(path, trainer):
            path = callback.format_checkpoint_name(values, name, version)
            version += 1
        callback.last_model_path = path  # before saving, as it is part of the state
    trainer.save_checkpoint(callback.last_model_path, weights_only=False)
    return str(callback.last_model_path)
