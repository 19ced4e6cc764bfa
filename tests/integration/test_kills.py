"""Runs of the shipped configurations that are killed many times end as runs that are not."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest
import torch
import yaml

from rosa_lightning.cli.main import main
from tests import forked
from tests.conftest import write_records
from tests.integration.test_resume import CONFIGS, differences

KILLS = 104


def options(name: str, folder: Path) -> list[str]:
    """The shipped file as it is, but for what a machine without a hub and a GPU needs."""
    config = ["--config", str(CONFIGS / f"{name}.yaml")]
    if name == "tiny":
        return config
    # An epoch has 100 batches, so that the last of 300 is one that a checkpoint follows.
    numbers = write_records(folder / "numbers.json", 1000)
    labels = write_records(folder / "labels.json", 598, "the correct answer is true", "true")
    sources = [
        {"path": str(numbers), "task": "gsm8k", "weight": 0.7},
        {"path": str(labels), "task": "boolq", "weight": 0.3},
    ]
    values = {
        "model.base": "tiny",
        "data.sources": yaml.safe_dump(sources),
        "data.test_sources": yaml.safe_dump([{"path": str(folder / "numbers.json")}]),
        "data.loading.decontaminate": "false",
        "trainer.accelerator": "cpu",
        "trainer.precision": "32-true",
    }
    return [*config, *(f"--{key}={value}" for key, value in values.items())]


def last(folder: Path) -> Path | None:
    """The newest checkpoint to go on from; each start has a folder of its own."""
    found = folder.glob("lightning_logs/version_*/checkpoints/last.ckpt")
    return max(found, key=lambda path: path.stat().st_mtime_ns, default=None)


def step(path: Path) -> int:
    number: int = torch.load(path, weights_only=True, mmap=True)["global_step"]
    return number


def wait(until: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not (done := until()) and time.monotonic() < end:
        time.sleep(0.01)
    return done


def strike(run: ForkServerProcess, moments: random.Random, folder: Path) -> bool:
    """Kill a run: as it starts, as it trains, or as it saves. False if it came to its end."""
    before = last(folder)
    mtime = before.stat().st_mtime_ns if before else 0

    def ended() -> bool:
        return run.exitcode is not None

    def saved() -> bool:
        path = last(folder)
        return ended() or (path is not None and path.stat().st_mtime_ns > mtime)

    kind = moments.choices(["start", "train", "save"], [0.75, 0.15, 0.1])[0]
    if kind == "save":
        assert wait(saved, 600.0)
    seconds = {"start": 3.0, "train": 12.0, "save": 0.3}[kind]
    if wait(ended, moments.uniform(0.0, seconds)):
        assert run.exitcode == 0, (folder / "killed.log").read_text()[-2000:]
        return False
    run.kill()
    run.join()
    return True


@pytest.mark.slow
def test_runs_of_the_shipped_files_killed_a_hundred_times_end_as_if_they_had_not_been(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(sys, "argv", ["rosa"])
    moments, kills, runs = random.Random(0), 0, 0
    straight = {}
    for name in ("tiny", "rosa"):
        folder = tmp_path / f"straight-{name}"
        folder.mkdir()
        run = forked.start(main, ["fit", *options(name, tmp_path)], log=folder / "straight.log")
        run.join(1800.0)
        assert run.exitcode == 0, (folder / "straight.log").read_text()[-2000:]
        straight[name] = last(folder)
    while kills < KILLS:
        name = ("tiny", "rosa")[runs % 2]
        folder = tmp_path / f"killed-{runs}"
        folder.mkdir()
        end, here = step(straight[name]), 0
        while (path := last(folder)) is None or step(path) < end:
            resume = ["--ckpt_path", str(path)] if path else []
            arguments = ["fit", *options(name, tmp_path), *resume]
            run = forked.start(main, arguments, log=folder / "killed.log")
            here += strike(run, moments, folder)
        assert not differences(straight[name], path)
        kills, runs = kills + here, runs + 1
