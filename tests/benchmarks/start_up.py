"""Wall time from the command to the end of the first step, beside HF Trainer with PEFT LoRA.

    python tests/benchmarks/start_up.py boolq.json [--rounds 5] [--base FOLDER] [--batch-size 16]

Each figure is of a fresh process, from its start to the end of its first optimizer step; `--help`
to its end. The ways take turns, round by round. Last comes what tokenising the records takes, and
finding them tokenised. The base is by default a Llama of 12 layers, 512
wide, with 32,000 tokens, in float32, and random weights, or the one given. Both sides find their
tokenised data on disk: ours in its cache, the baseline's saved by `datasets`. The baseline trains
LoRA with r=16 on q, k, v, up and down. Needs the extra `test`, and accelerate.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from timing import LORA_TARGETS, encoded, hf_trainer, in_turn, lora_on, random_llama, ratios

HERE = Path(__file__).parent
CONFIG = """
trainer:
  accelerator: cpu
  devices: 1
  max_steps: 10
  log_every_n_steps: 10
  logger:
    class_path: lightning.pytorch.loggers.TensorBoardLogger
    init_args: {{save_dir: {folder}}}
  callbacks:
    - class_path: rosa_lightning.RunMonitor
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args: {{monitor: val/loss, save_last: true}}
    - class_path: first_step.StopAfterFirstStep
model: {{base: {base}}}
data:
  sources: [{{path: {records}}}]
  batch_size: {batch_size}
  loading: {{cache_dir: {folder}/cache}}
"""


def baseline(base: str, data: str, batch_size: int) -> None:
    """The script that a user would write, up to the end of the first step."""
    from datasets import load_from_disk
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            os._exit(0)

    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    model = lora_on(model, r=16, lora_alpha=32, target_modules=LORA_TARGETS)
    settings = {"per_device_train_batch_size": batch_size, "max_steps": 10}
    with tempfile.TemporaryDirectory() as folder:
        hf_trainer(model, folder, load_from_disk(data), tokenizer, Stop(), **settings).train()


def save_base(folder: Path) -> Path:
    """A Llama with random weights and the tokenizer of the embedded base."""
    from transformers import AutoTokenizer

    from rosa_lightning.models import tiny

    random_llama().save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny.folder()).save_pretrained(folder)
    return folder


def save_tokenised(records: Path, base: Path, folder: Path) -> Path:
    """The records in token ids, as the baseline takes them."""
    from datasets import Dataset

    from rosa_lightning.models.loading import load_tokenizer

    rows = encoded([str(records)], load_tokenizer(str(base)), max_length=512)
    Dataset.from_list(rows).save_to_disk(folder)
    return folder


def run(command: list[str]) -> None:
    """Run a process, which must succeed."""
    paths = [str(HERE.parents[1]), str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")


def tokenise(records: Path, base: Path, cache: Path) -> None:
    """Print the seconds of `ReasoningDataModule.setup`, with an empty cache and a filled one."""
    from rosa_lightning import ReasoningDataModule
    from rosa_lightning.data.settings import LoadingConfig

    for name in ("tokenised anew", "found in the cache"):
        data = ReasoningDataModule(
            sources=[str(records)],
            tokenizer=str(base),
            val_fraction=0,
            loading=LoadingConfig(cache_dir=str(cache)),
        )
        since = time.perf_counter()
        data.setup("fit")
        took = time.perf_counter() - since
        print(f"{len(data.train_dataloader().dataset)} records {name}: {took:.2f} s")


def compare(commands: dict[str, list[str]], rounds: int) -> dict[str, list[float]]:
    """Print the median seconds of each way, and its ratio to the first, with the ratios' range."""
    ways = {name: partial(run, command) for name, command in commands.items()}
    took = in_turn(ways, rounds)  # the first round fills the caches, the disk's too
    first = next(iter(took.values()))
    found = {name: sorted(ratios(values, first)) for name, values in took.items()}
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores")
    for name, values in took.items():
        low, middle, high = found[name][0], statistics.median(found[name]), found[name][-1]
        median = statistics.median(values)
        print(f"{name:26} {median:6.2f} s   {middle:5.2f}  ({low:.2f} to {high:.2f})")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("records", type=Path)
    parser.add_argument("--base", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--json", type=Path, help="file for the figures of training_speed.py")
    parser.add_argument("--baseline", type=Path, help=argparse.SUPPRESS)  # its tokenised data
    options = parser.parse_args()
    if options.baseline:
        baseline(str(options.base), str(options.baseline), options.batch_size)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = options.base or save_base(folder / "base")
        data = save_tokenised(options.records, base, folder / "tokenised")
        config = folder / "config.yaml"
        places = {"folder": folder, "base": base, "records": options.records.resolve()}
        config.write_text(CONFIG.format(**places, batch_size=options.batch_size))
        size = ["--base", str(base), "--batch-size", str(options.batch_size)]
        commands = {
            "LoRA, HF Trainer": [__file__, str(options.records), "--baseline", str(data), *size],
            "fit": ["-m", "rosa_lightning", "fit", "--config", str(config)],
            "--help": ["-m", "rosa_lightning", "--help"],
            "import torch": ["-c", "import torch"],
            "import lightning.pytorch": ["-c", "import lightning.pytorch"],
        }
        found = compare(commands, options.rounds)
        tokenise(options.records, base, folder / "anew")
        if options.json:
            name = "start of fit to the end of step 1 over LoRA's"
            figure = {"name": name, "values": found["fit"], "bar": 1.0}
            options.json.write_text(json.dumps([figure]))


if __name__ == "__main__":
    main()
