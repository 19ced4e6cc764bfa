"""Runs in processes of their own: locks, signals, and what goes on after them."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import yaml
from filelock import FileLock

from rosa_lightning.comparison.runner import alone, hangup_ends, write_once
from rosa_lightning.utils.strict_json import read_object

CHILD = """
import runpy, time
from rosa_lightning.comparison import child

def wait(*_, **__):
    print("runs", flush=True)
    time.sleep(99)

runpy.run_module = wait
child.main()
"""


def child(lock):
    command = [sys.executable, "-c", CHILD, str(lock), "fit"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    return subprocess.Popen(command, **pipes, start_new_session=True)


def test_a_run_ends_with_its_parent(tmp_path):
    with child(tmp_path / ".lock") as running:
        assert running.stdout.readline() == b"runs\n"
        running.stdin.close()  # as the system does when the parent is gone
        assert running.wait(timeout=60) == -signal.SIGTERM


def test_a_run_waits_for_another_in_its_folder(tmp_path):
    lock = FileLock(tmp_path / ".lock")
    lock.acquire()
    with child(tmp_path / ".lock") as running:
        os.set_blocking(running.stdout.fileno(), False)
        time.sleep(3.0)
        assert not running.stdout.read()
        lock.release()
        os.set_blocking(running.stdout.fileno(), True)
        assert running.stdout.readline() == b"runs\n"
        running.kill()


def test_a_folder_is_for_one_comparison(tmp_path):
    with (
        alone(tmp_path / "compared"),
        pytest.raises(ValueError, match=r"another comparison works in .*compared"),
        alone(tmp_path / "compared"),
    ):
        pass
    with alone(tmp_path / "compared"):
        pass


def test_a_hangup_unwinds_the_stack_unless_it_is_ignored():
    with pytest.raises(SystemExit) as ending, hangup_ends():
        signal.raise_signal(signal.SIGHUP)
    assert ending.value.code == 128 + signal.SIGHUP
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as by nohup
    try:
        with hangup_ends():
            signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_settings_are_written_once(tmp_path):
    path = tmp_path / "a" / "settings.yaml"
    write_once(path, "a: 1\n")
    write_once(path, "a: 1\n", lambda: False)
    with pytest.raises(ValueError, match="other settings"):
        write_once(path, "a: 2\n", lambda: False)
    write_once(path, "{a: 1}\n", lambda: True)
    assert path.read_text() == "a: 1\n"


class Compare:
    """`compare` of one method on the embedded base, as a process."""

    def __init__(self, folder, steps=100):
        self.folder = folder / "compared"
        self.run = self.folder / "RoSA" / "lr-0.003-seed-0"
        plan = {"methods": {"RoSA": {}}, "learning_rates": [3e-3], "test": False}
        plan |= {"max_steps": steps, "folder": str(self.folder)}
        file = folder / "plan.yaml"
        data = {"val_fraction": 0.01, "loading": {"val_generate": 0}}
        trainer = {"val_check_interval": 20}
        file.write_text(yaml.safe_dump({"comparison": plan, "trainer": trainer, "data": data}))
        self.command = [sys.executable, "-m", "rosa_lightning", "compare"]
        self.command += ["--config", "configs/tiny.yaml", "--config", str(file)]

    def start(self):
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(self.command, **pipes, start_new_session=True)

    def ends(self):
        process = self.start()
        _, said = process.communicate(timeout=900)
        return process.returncode, said

    def record(self):
        return read_object(self.run / "run.json")

    def reaches(self, step, process):
        until = time.monotonic() + 300
        while self.record().get("step", 0) < step:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < until
            time.sleep(0.2)


@pytest.mark.slow
def test_signals_leave_no_training_behind_and_the_same_command_goes_on(tmp_path):
    (tmp_path / "whole").mkdir()
    (tmp_path / "stopped").mkdir()
    whole, stopped = Compare(tmp_path / "whole"), Compare(tmp_path / "stopped")
    assert whole.ends()[0] == 0
    with alone(stopped.folder):
        status, said = stopped.ends()
    assert status == 1
    first, error = said.splitlines()
    assert first.startswith("compare: starting")
    assert error.startswith("error: another comparison works in")
    step = 0
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGKILL):
        process = stopped.start()
        stopped.reaches(step + 5, process)
        process.send_signal(number)
        process.communicate(timeout=300)
        assert process.returncode in (128 + number, -number)
        with FileLock(stopped.run / ".lock", timeout=60):  # which a training would hold
            record = stopped.record()
        assert record["status"] == "stopped"
        assert step < record["step"] < 100
        step = record["step"]
    status, said = stopped.ends()
    assert status == 0, said
    results = [json.loads((one.run / "result.json").read_text()) for one in (whole, stopped)]
    for key in ("val_loss", "best_step", "steps", "trainable_parameters", "backward_share"):
        assert results[0][key] == results[1][key]
    assert whole.record()["validations"] == stopped.record()["validations"]


@pytest.mark.slow
def test_equal_time(tmp_path):
    """Two methods of which one takes longer for a step, each with as many steps as fit."""
    compared = Compare(tmp_path)
    file = tmp_path / "plan.yaml"
    given = yaml.safe_load(file.read_text())
    plan = given["comparison"]
    del plan["max_steps"]
    plan |= {"methods": {"RoSA": {}, "RoAE": {"dls.policy": "all"}}, "train_seconds": 12.0}
    given["trainer"]["val_check_interval"] = 5
    file.write_text(yaml.safe_dump(given))
    status, said = compared.ends()
    assert status == 0, said
    content = json.loads((compared.folder / "comparison.json").read_text())
    for row in content["methods"].values():
        (run,) = row["runs"]
        assert run["status"] == "finished"
        assert run["steps"] % 5 == 0
        assert 4.0 < run["train_seconds"] < 36.0  # under whatever load
