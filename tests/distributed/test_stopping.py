from __future__ import annotations

import copy
import json
import os
import pickle
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import Callback, Trainer
from torch.testing import assert_close

from rosa_lightning.cli.main import main
from rosa_lightning.utils import stopping
from tests import ranks
from tests.conftest import save_base, write_records

STEPS = 6


@pytest.fixture(autouse=True)
def _as_a_command(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["rosa"])
    monkeypatch.chdir(tmp_path)


class Sends(Callback):
    """Sends a signal to its own process at some place, once."""

    def __init__(self, number: int, hook: str, batch: int, rank: int = 0) -> None:
        self.number, self.batch, self.rank = number, batch, rank
        setattr(self, hook, self._hook)

    def _hook(self, trainer, pl_module, *rest) -> None:
        if trainer.sanity_checking:
            return
        if trainer.global_rank == self.rank and self._count() == self.batch:
            os.kill(os.getpid(), self.number)
            signal.sigtimedwait([], 0.01)  # let the handler run

    def _count(self) -> int:
        self.met = getattr(self, "met", -1) + 1
        return self.met


def settings(folder: Path, **trainer) -> dict:
    return {
        "model": {
            "base": str(folder / "base"),
            "roae": {"rank": 4, "dropout": 0.1},
            "evaluation": {"max_new_tokens": 2},
        },
        "data": {
            "sources": [{"path": str(folder / "numbers.json"), "task": "gsm8k"}],
            "batch_size": 2,
            "val_fraction": 0.1,
            "loading": {"cache_dir": None},
        },
        "dls": {"interval": 2, "num_active": 2, "policy": "sample"},
        "trainer": {
            "accelerator": "cpu",
            "max_steps": STEPS,
            "val_check_interval": 3,
            "check_val_every_n_epoch": None,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "callbacks": [
                {
                    "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                    "init_args": {"monitor": "val/loss", "save_last": True, "filename": "{step}"},
                },
            ],
            **trainer,
        },
    }


def sends(number: int, hook: str, batch: int, rank: int = 0) -> dict:
    options = {"number": int(number), "hook": hook, "batch": batch, "rank": rank}
    return {"class_path": "tests.distributed.test_stopping.Sends", "init_args": options}


def run(command: str, given: dict, name: str, *arguments: str, also: dict | None = None) -> int:
    """A command's exit status; its logs go into a folder of that name."""
    given = json.loads(json.dumps(given))
    if also is not None:
        given["trainer"]["callbacks"].append(also)
    given["trainer"]["default_root_dir"] = name
    path = Path(f"{name}.{os.environ.get('LOCAL_RANK', 0)}.yaml")
    path.write_text(yaml.safe_dump(given))
    try:
        return main([command, "--config", str(path), *arguments])
    except SystemExit as ending:
        return int(ending.code or 0)


def newest(folder: str) -> dict:
    """The last checkpoint that is under a folder."""
    path = max(Path(folder).rglob("last*.ckpt"), key=lambda file: file.stat().st_mtime_ns)
    return torch.load(path, weights_only=True) | {"path": str(path)}


def assert_equal_runs(one: dict, other: dict) -> None:
    assert one["global_step"] == other["global_step"] == STEPS
    for part in ("state_dict", "optimizer_states", "lr_schedulers"):
        assert_close(one[part], other[part], rtol=0, atol=0)
    assert one["ReasoningDataModule"]["seen"] == other["ReasoningDataModule"]["seen"]


def validations(folder: str) -> list[int]:
    """The steps at which validations have been logged."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    steps = set()
    for events in Path(folder).rglob("events.out.tfevents.*"):
        log = EventAccumulator(str(events))
        log.Reload()
        if "val/loss" in log.Tags()["scalars"]:
            steps |= {(event.step, event.value) for event in log.Scalars("val/loss")}
    return sorted(steps)


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A base, data, and the run that nothing stops."""
    folder = tmp_path_factory.mktemp("home")
    save_base(folder / "base")
    write_records(folder / "numbers.json", 40)
    before = Path.cwd()
    os.chdir(folder)
    try:
        assert run("fit", settings(folder), "straight") == 0
    finally:
        os.chdir(before)
    return folder


@pytest.mark.parametrize(
    ("number", "hook", "batch", "step"),
    [
        (signal.SIGTERM, "on_before_optimizer_step", 1, 2),
        (signal.SIGTERM, "on_validation_batch_start", 1, 3),
        # Then a validation is due.
        pytest.param(signal.SIGTERM, "on_train_batch_start", 2, 3, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, "on_train_batch_start", 3, 4, marks=pytest.mark.slow),
    ],
)
def test_a_signal_stops_a_training_with_a_checkpoint_that_goes_on_bit_for_bit(
    home, number, hook, batch, step
):
    given = settings(home)
    assert run("fit", given, "stopped", also=sends(number, hook, batch)) == 128 + number
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    checkpoint = newest("stopped")
    assert checkpoint["global_step"] == step
    assert run("fit", given, "resumed", "--ckpt_path", checkpoint["path"]) == 0
    assert_equal_runs(newest("resumed"), newest(str(home / "straight")))
    found = {*validations("stopped"), *validations("resumed")}
    assert sorted(found) == validations(str(home / "straight"))


def test_a_trainer_can_be_copied_and_sent_after_a_run_began():
    trainer = Trainer(devices=1, accelerator="cpu", logger=False)
    own = stopping.Stopping.for_run(trainer)
    trainer.callbacks.append(own)
    for other in (copy.deepcopy(trainer), pickle.loads(pickle.dumps(trainer))):
        assert stopping.Stopping.of(other) is not None


@pytest.mark.slow
@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_before_zero_grad"])
def test_within_an_accumulation_a_signal_waits_for_the_optimizer_step(home, hook):
    given = settings(home, accumulate_grad_batches=3, val_check_interval=9)
    assert run("fit", given, "straight") == 0
    assert run("fit", given, "stopped", also=sends(signal.SIGTERM, hook, 1)) == 143
    checkpoint = newest("stopped")
    assert run("fit", given, "resumed", "--ckpt_path", checkpoint["path"]) == 0
    assert_equal_runs(newest("resumed"), newest("straight"))


@pytest.mark.parametrize(
    "command",
    ["test", *(pytest.param(name, marks=pytest.mark.slow) for name in ("predict", "validate"))],
)
def test_a_signal_ends_what_trains_nothing_at_once(home, command):
    given = settings(home)
    given["data"]["loading"]["decontaminate"] = False
    for kind in ("test", "predict"):
        given["data"][f"{kind}_sources"] = [given["data"]["sources"][0]["path"]]
    given["data"]["test_sources"] = given["data"]["sources"]
    for number in (signal.SIGTERM, signal.SIGINT):
        stop = sends(number, f"on_{command.replace('validate', 'validation')}_batch_start", 1)
        assert run(command, given, "stopped", also=stop) == 128 + number
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        signal.signal(signal.SIGINT, signal.default_int_handler)  # Lightning ignores it from then
    assert not list(Path("stopped").rglob("*.rank0"))
    assert run(command, given, "stopped") == 0
    if command == "test":
        found = {path.parent for path in Path("stopped").rglob("results.json")}
        newest = max(found, key=lambda folder: (folder / "results.json").stat().st_mtime_ns)
        lines = (newest / "predictions.jsonl").read_text().splitlines()
        assert len({json.loads(line)["prompt"] for line in lines}) == len(lines) == 40


@pytest.mark.slow
@pytest.mark.parametrize("logger", ["of the job", "of the configuration"])
def test_slurm_requeues_a_training_that_goes_on_bit_for_bit(home, logger, monkeypatch):
    called = Path("called")
    Path("bin").mkdir()
    Path("bin/scontrol").write_text(f'#!/bin/sh\necho "$@" >> {called.absolute()}\n')
    Path("bin/scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{Path('bin').absolute()}{os.pathsep}{os.environ['PATH']}")
    for name, value in {"JOB_ID": 77, "NTASKS": 1, "PROCID": 0, "LOCALID": 0, "NODEID": 0}.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    given = settings(home, plugins=["lightning.pytorch.plugins.environments.SLURMEnvironment"])
    given["validate_first"] = True
    if logger == "of the configuration":
        given["trainer"]["logger"] = {
            "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
            "init_args": {"save_dir": "logs"},
        }
    # Asked to requeue within a step, and then stopped as SLURM does.
    requeue = sends(signal.SIGUSR1, "on_before_optimizer_step", 1)
    given["trainer"]["callbacks"].append(sends(signal.SIGTERM, "on_train_batch_start", 3))
    assert run("fit", given, "job", also=requeue) == 143
    assert called.read_text() == "requeue 77\n"
    checkpoint = torch.load("job/hpc_ckpt_1.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 2
    del given["trainer"]["callbacks"][-1]
    assert run("fit", given, "job") == 0
    where = "job" if logger == "of the job" else "logs"
    assert_equal_runs(newest(where), newest(str(home / "straight")))


def of_two_ranks(folder: Path) -> dict:
    """Signals to either rank, in turn; each training goes on."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    sys.argv = ["rosa"]
    given = settings(folder, devices=2, strategy="ddp")
    seen = {"straight": run("fit", given, "straight")}
    places = [
        (signal.SIGTERM, "on_before_optimizer_step", 1),
        (signal.SIGTERM, "on_validation_batch_start", 0),
        (signal.SIGINT, "on_train_batch_start", 3),
    ]
    for index, (number, hook, batch) in enumerate(places):
        name = f"stopped{index}"
        stop = sends(number, hook, batch, rank=1)
        seen[name] = run("fit", given, name, also=stop)
        path = newest(name)["path"]
        seen[f"resumed{index}"] = run("fit", given, f"resumed{index}", "--ckpt_path", path)
    return seen


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_all_with_a_checkpoint_that_goes_on(home, tmp_path):
    (tmp_path / "base").symlink_to(home / "base")
    (tmp_path / "numbers.json").symlink_to(home / "numbers.json")
    first, second = ranks.launch(of_two_ranks, tmp_path)
    assert first == second
    assert first["straight"] == 0
    straight = newest("straight")
    for index, status in enumerate([143, 143, 130]):
        assert first[f"stopped{index}"] == status
        assert first[f"resumed{index}"] == 0
        assert_equal_runs(newest(f"resumed{index}"), straight)


def left_alone(folder: Path) -> dict:
    """One rank is stopped, or fails, while the other goes on: see what becomes of that."""
    sys.argv = ["rosa"]
    given = settings(folder, devices=2, strategy="ddp")
    given["data"]["loading"]["decontaminate"] = False
    given["data"]["test_sources"] = given["data"]["sources"]
    work = json.loads((folder / "work.json").read_text())
    since = time.monotonic()
    status = run(work.pop("command"), given, "run", also=work)
    return {"status": status, "seconds": time.monotonic() - since}


class Fails(Callback):
    """Fails on one rank, where the others wait for it or are at work."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def on_test_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0) -> None:
        if trainer.global_rank == self.rank and batch_idx == 1:
            raise OSError("the disk is gone")
        time.sleep(1)  # at work for longer than anyone would wait

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if trainer.global_rank == self.rank and batch_idx == 1:
            raise OSError("the disk is gone")


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    "work",
    [
        {"command": "test", "class_path": "tests.distributed.test_stopping.Sends"},
        {"command": "test", "class_path": "tests.distributed.test_stopping.Fails"},
        {"command": "fit", "class_path": "tests.distributed.test_stopping.Fails"},
    ],
    ids=["stopped in test", "failed in test", "failed in fit"],
)
def test_where_one_rank_leaves_the_others_follow_within_seconds(home, tmp_path, work, rank):
    (tmp_path / "base").symlink_to(home / "base")
    (tmp_path / "numbers.json").symlink_to(home / "numbers.json")
    options = {"number": int(signal.SIGTERM), "hook": "on_test_batch_start", "batch": 1}
    sends_it = work["class_path"].endswith("Sends")
    work = {**work, "init_args": {**options, "rank": rank} if sends_it else {"rank": rank}}
    (tmp_path / "work.json").write_text(json.dumps(work))
    seen = ranks.launch(left_alone, tmp_path)
    assert [one["status"] for one in seen] == [143 if sends_it else 1] * 2
    logs = [(tmp_path / f"rank{one}.log").read_text() for one in (0, 1)]
    if not sends_it:
        assert "the disk is gone" in logs[rank]
        assert f"error: rank {rank} failed: the disk is gone" in logs[1 - rank]
        assert "Traceback" not in "".join(logs)
