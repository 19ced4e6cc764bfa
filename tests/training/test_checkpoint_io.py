"""Checkpoints are written whole or not at all, and where they cannot be, a run says so at once."""

from __future__ import annotations

import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import AsyncCheckpointIO

from rosa_lightning import RoAEConfig, RoSAModule
from rosa_lightning.cli.main import main
from rosa_lightning.training.checkpoint_io import save_atomically
from rosa_lightning.utils.files import part_beside, put_in_place
from tests import ranks
from tests.conftest import save_base, write_records
from tests.test_module import data, module, trainer

TINY = Path(__file__).parents[2] / "configs/tiny.yaml"


@pytest.fixture
def mount(tmp_path):
    """Mounts a small file system in memory at a folder."""
    mounted = []

    def mounting(name: str, options: str) -> Path:
        place = tmp_path / name
        place.mkdir(exist_ok=True)
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("no file system can be mounted here: that takes root")
        mounted.append(place)
        return place

    yield mounting
    for place in mounted:
        subprocess.run(["umount", str(place)], check=True)


def demonstration(tmp_path, monkeypatch, *more: str) -> int:
    """The shipped demonstration, for a few small steps."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["rosa"])
    small = ["--data.batch_size=2", "--trainer.max_steps=3", "--trainer.val_check_interval=2"]
    few = ["--trainer.limit_val_batches=1", "--trainer.enable_progress_bar=false"]
    return main(["fit", "--config", str(TINY), *small, *few, *more])


def error_line(capsys) -> str:
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    return line


# Who writes.


def test_every_training_writes_whole_checkpoints_unless_told_otherwise(
    base_folder, sources, tmp_path
):
    def plugin_after(*plugins):
        run = trainer(tmp_path, plugins=list(plugins), max_steps=1, limit_val_batches=0)
        run.fit(module(base_folder), data(sources))
        return run.strategy.checkpoint_io

    own = type("Own", (TorchCheckpointIO,), {})()  # a user's
    assert plugin_after().save_checkpoint is save_atomically
    assert plugin_after(AsyncCheckpointIO()).checkpoint_io.save_checkpoint is save_atomically
    assert plugin_after(AsyncCheckpointIO(own)).checkpoint_io is own


# A kill.


def save_for_ever(path: Path) -> None:
    for number in range(100_000):
        save_atomically(
            {"state_dict": {"w": torch.full((20_000,), float(number))}, "number": number}, path
        )


def test_a_kill_at_any_moment_leaves_a_whole_checkpoint_and_the_next_save_tidies_up(tmp_path):
    path = tmp_path / "last.ckpt"
    save_atomically({"state_dict": {"w": torch.zeros(1)}, "number": 0}, path)
    draw, seen = random.Random(0), set()
    for _ in range(20):
        before = path.stat().st_ino
        child = multiprocessing.get_context("fork").Process(target=save_for_ever, args=(path,))
        child.start()
        while child.is_alive() and path.stat().st_ino == before:
            time.sleep(0.001)  # until it saves
        time.sleep(draw.uniform(0, 0.02))
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        loaded = torch.load(path, weights_only=True)
        assert (loaded["state_dict"]["w"] == loaded["number"]).all()
        seen.add(loaded["number"])
    assert seen
    save_atomically({"state_dict": {}}, path)
    assert os.listdir(tmp_path) == ["last.ckpt"]


# A full disk.


def test_a_full_disk_keeps_the_older_file_of_that_name(tmp_path, mount):
    place = mount("small", "size=200k")
    path = place / "last.ckpt"
    save_atomically({"state_dict": {"w": torch.zeros(10_000)}}, path)
    before = path.read_bytes()
    for _ in range(2):
        with pytest.raises(OSError, match=r"last\.ckpt cannot be written: No space left") as caught:
            save_atomically({"state_dict": {"w": torch.zeros(50_000)}}, path)
        assert caught.value.errno == 28
        assert path.read_bytes() == before
        assert os.listdir(place) == ["last.ckpt"]


# Folders that cannot be written.


class Steps(Callback):
    taken = 0

    def on_train_batch_start(self, *args) -> None:
        self.taken += 1


def stopped(base_folder, sources, tmp_path, **options) -> str:
    steps = Steps()
    options["callbacks"] = [steps, *options.get("callbacks", [])]
    with pytest.raises(OSError, match="cannot be written") as caught:
        trainer(tmp_path, **options).fit(module(base_folder), data(sources))
    assert steps.taken == 0
    return str(caught.value)


def test_a_folder_that_cannot_be_written_stops_before_training(
    base_folder, sources, tmp_path, mount
):
    (tmp_path / "file").touch()
    options = {
        "callbacks": [ModelCheckpoint(tmp_path / "file" / "a")],
        "enable_checkpointing": True,
    }
    assert str(tmp_path / "file") in stopped(base_folder, sources, tmp_path, **options)
    place = mount("ro", "ro,size=1m")
    for dirpath in (place, place / "deep" / "er"):
        saves = ModelCheckpoint(dirpath=dirpath)
        options = {"callbacks": [saves], "enable_checkpointing": True}
        message = stopped(base_folder, sources, tmp_path, **options)
        assert f"checkpoints cannot be written to {dirpath}: Read-only file system" in message
        assert "dirpath of ModelCheckpoint" in message
    # One that saves nothing needs no folder.
    saves = ModelCheckpoint(dirpath=place, save_top_k=0)
    options = {"callbacks": [saves], "enable_checkpointing": True, "max_steps": 1}
    trainer(tmp_path, **options).fit(module(base_folder), data(sources))


class KeepsAPath(Callback):
    """One whose state is no plain value."""

    def state_dict(self):
        return {"folder": Path("here")}


def test_a_state_that_could_not_be_loaded_again_is_not_saved(base_folder, sources, tmp_path):
    options = {"callbacks": [KeepsAPath()], "enable_checkpointing": True, "max_steps": 1}
    with pytest.raises(ValueError, match="state of callback KeepsAPath holds pathlib"):
        trainer(tmp_path, **options).fit(module(base_folder), data(sources))
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.parametrize("kind", ["CSVLogger", "TensorBoardLogger"])
def test_a_log_folder_that_cannot_be_written_is_one_line(
    kind, tmp_path, mount, monkeypatch, capsys
):
    place = mount("ro", "ro,size=1m")
    logger = {"class_path": f"lightning.pytorch.loggers.{kind}"}
    logger["init_args"] = {"save_dir": str(place)}
    assert demonstration(tmp_path, monkeypatch, f"--trainer.logger={logger}") == 1
    error = error_line(capsys)
    assert f"logs cannot be written to {place}/lightning_logs/version_0: Read-only file" in error
    assert re.search(r"trainer\.(logger\.init_args\.save_dir|default_root_dir)", error)


class Fills(Callback):
    """Leaves no room on a file system, once training has begun."""

    def __init__(self, place: str) -> None:
        self.place = Path(place)

    def on_train_start(self, *args) -> None:
        with (self.place / "filler").open("wb", buffering=0) as file, suppress(OSError):
            while True:
                file.write(bytes(4096))


@pytest.mark.parametrize(("kind", "steps"), [("CSVLogger", 2), ("TensorBoardLogger", 60)])
def test_a_full_disk_of_the_logs_is_one_line(kind, steps, tmp_path, mount, monkeypatch, capsys):
    place = mount("small", "size=100k")
    logger = {"class_path": f"lightning.pytorch.loggers.{kind}"}
    logger["init_args"] = {"save_dir": str(place)}
    fills = {
        "class_path": "tests.training.test_checkpoint_io.Fills",
        "init_args": {"place": str(place)},
    }
    often = [f"--trainer.max_steps={steps}", "--trainer.log_every_n_steps=1"]
    quiet = [f"--trainer.callbacks=[{fills}]", "--trainer.enable_checkpointing=false", *often]
    more = [f"--trainer.logger={logger}", "--trainer.limit_val_batches=0", *quiet]
    assert demonstration(tmp_path, monkeypatch, *more) == 1
    errors = capsys.readouterr().err
    assert "Traceback" not in errors
    (error,) = [line for line in errors.splitlines() if "error: " in line]
    assert re.search("cannot be written: .*No space left on device", error)
    assert re.search(r"trainer\.(logger\.init_args\.save_dir|default_root_dir)", error)


# Words for checkpoints.


@pytest.mark.parametrize(("command", "word"), [("test", "last"), ("fit", "best")])
def test_a_checkpoint_that_is_not_there_is_one_line(command, word, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["rosa"])
    assert main([command, "--config", str(TINY), "--ckpt_path", word]) == 1
    assert f"ckpt_path={word}: there is no such checkpoint" in error_line(capsys)


def test_the_last_checkpoint_is_taken_where_there_is_one(tmp_path, monkeypatch, capsys):
    saves = {"dirpath": str(tmp_path / "kept"), "save_last": True}
    callback = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": saves}
    where = f"--trainer.callbacks=[{callback}]"
    assert demonstration(tmp_path, monkeypatch, where) == 0
    capsys.readouterr()
    few = ["--trainer.limit_test_batches=1", "--data.batch_size=2"]
    for name in ("last.ckpt", None):
        if name is None:
            (tmp_path / "kept" / "last.ckpt").unlink()
        status = main(["test", "--config", str(TINY), where, "--ckpt_path", "last", *few])
        assert status == (0 if name else 1)
    assert f"there is no such checkpoint in {tmp_path / 'kept'}" in error_line(capsys)


# Folders of shards.


def folder_with(path: Path, content: str) -> Path:
    path.mkdir()
    (path / "in").mkdir()
    (path / "in" / "a").write_text(content)
    return path


@pytest.mark.parametrize("older", ["folder", "file", "link", None])
def test_a_folder_takes_the_place_of_what_is_there(older, tmp_path):
    path, kept = tmp_path / "last.ckpt", folder_with(tmp_path / "kept", "kept")
    if older == "folder":
        folder_with(path, "older")
    elif older == "file":
        path.write_text("older")
    elif older == "link":
        path.symlink_to(kept)
    with part_beside(path, is_folder=True) as part:
        (part / "in").mkdir()
        (part / "in" / "a").write_text("newer")
        put_in_place(part, path)
    assert (path / "in" / "a").read_text() == "newer"
    assert not path.is_symlink()
    assert (kept / "in" / "a").read_text() == "kept"
    assert sorted(os.listdir(tmp_path)) == ["kept", "last.ckpt"]


class Full(Callback):
    """Lets the disk be full on one rank, halfway through a checkpoint."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.is_on = False

    def on_train_start(self, *args) -> None:
        save = torch.save

        def full(content, file, *args, **kwargs):
            pickles = kwargs.get("_use_new_zipfile_serialization") is False  # to another rank
            if self.is_on and ranks.rank() == self.rank and not pickles:
                raise OSError(28, os.strerror(28))
            return save(content, file, *args, **kwargs)

        torch.save = full


def save_twice(place: Path, strategy, full_on: int) -> dict:
    """Saves under one name; at the second a rank has no room, at the third there is again."""
    built = RoSAModule(str(place / "base"), RoAEConfig(rank=4))
    full = Full(full_on)
    options = {"devices": 2, "strategy": strategy, "max_steps": 1, "limit_val_batches": 0}
    run = trainer(place, callbacks=[full], **options)
    save, path = torch.save, place / f"{type(strategy).__name__}{full_on}.ckpt"
    try:
        run.fit(built, data([{"path": str(place / "numbers.json"), "task": "gsm8k"}]))
        run.save_checkpoint(path)
        run.strategy.barrier()
        before = content(path)
        run.strategy.barrier()
        full.is_on = True
        try:
            run.save_checkpoint(path)
            error = ""
        except (OSError, ValueError) as refused:
            error = str(refused)
        run.strategy.barrier()
        after, names = content(path), sorted(os.listdir(place))
        run.strategy.barrier()
        full.is_on = False
        run.save_checkpoint(path)
        last = content(path)
    finally:
        torch.save = save
    return {
        "error": error,
        "kept": before == after,
        "left": [name for name in names if name.endswith(".part")],
        "last": last.keys() == before.keys(),
    }


def content(path: Path) -> dict[str, bytes]:
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    return {file.name: file.read_bytes() for file in files}


def on_every_strategy(place: Path) -> dict:
    return {
        "ddp": save_twice(place, ranks.ddp(), 0),
        "fsdp1 full": save_twice(place, ranks.fsdp(), 0),
        "fsdp1 sharded": save_twice(place, ranks.fsdp(state_dict_type="sharded"), 0),
        "fsdp2 sharded": save_twice(place, ranks.fsdp2(), 1),
    }


@pytest.mark.slow
def test_a_full_disk_of_one_rank_stops_all_and_keeps_the_older_checkpoint(tmp_path):
    save_base(tmp_path / "base")
    write_records(tmp_path / "numbers.json", 40)
    one, other = ranks.launch(on_every_strategy, tmp_path)
    for name, seen in one.items():
        assert seen["error"] == other[name]["error"], name
        assert "No space left on device" in seen["error"], name
        for rank in (seen, other[name]):
            assert (rank["kept"], rank["left"], rank["last"]) == (True, [], True), name
