"""Two nodes as docs/recipes.md starts them: two torchrun launchers on one machine, over gloo."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

CONFIG = Path(__file__).parents[2] / "configs" / "tiny.yaml"


@pytest.mark.slow
def test_two_nodes_train_one_model(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
    launcher += ["--master-addr=127.0.0.1", f"--master-port={port}"]
    fit = ["-m", "rosa_lightning", "fit", f"--config={CONFIG}", "--trainer.num_nodes=2"]
    fit += ["--trainer.devices=1", "--trainer.strategy=ddp", "--trainer.max_steps=4"]
    fit += ["--trainer.val_check_interval=4", "--data.loading.val_generate=0"]
    fit += [
        "--trainer.callbacks+=rosa_lightning.RunRecorder",
        "--trainer.enable_progress_bar=false",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    logs = [tmp_path / f"node{node}.log" for node in range(2)]
    nodes = []
    for node, log in enumerate(logs):
        with log.open("w") as out:
            command = [*launcher, f"--node-rank={node}", *fit]
            nodes.append(
                subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=out, stderr=out)
            )
    try:
        codes = [node.wait(400) for node in nodes]
    finally:
        for node in nodes:
            node.kill()
            node.wait()
    assert codes == [0, 0], "\n".join(log.read_text()[-3000:] for log in logs)
    records = [*tmp_path.rglob("run.json")]
    assert len(records) == 1  # of the first node
    record = json.loads(records[0].read_text())
    assert (record["status"], record["step"]) == ("finished", 4)
    assert record["examples"] == 4 * 16 * 2
    assert Path(record["checkpoint"]).exists()
