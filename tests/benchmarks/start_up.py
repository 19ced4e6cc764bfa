"""Start of a training and tokenising for `speed.py`, beside TRL's `SFTTrainer` on the same file.

    python tests/benchmarks/start_up.py WHAT FOLDER    # what a fresh process does, for speed.py

The start is the time from the command to the end of the first optimizer step on SmolLM2-135M-
Instruct, batches of 16 in float32; both find tokenised data in their caches, as each did a round
before. Tokenising is that of a JSON file, from opening it on, with empty caches. Without TRL its
side is not measured.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from timing import Figure, in_turn, lora_on, quiet, ratios
from training_speed import NAMES, peak_rss

HERE = Path(__file__).parent
OURS, TRL = "ours", "TRL"
CONFIG = """
trainer:
  accelerator: cpu
  devices: 1
  max_steps: 10
  logger:
    class_path: lightning.pytorch.loggers.TensorBoardLogger
    init_args: {{save_dir: {folder}}}
  callbacks:
    - class_path: rosa_lightning.RunMonitor
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args: {{monitor: val/loss, save_last: true}}
    - class_path: first_step.StopAfterFirstStep
model: {{base: smollm2}}
data:
  sources: [{{path: {folder}/records.json}}]
  batch_size: {batch_size}
  loading: {{cache_dir: {folder}/cache}}
"""


# --- what fresh processes do ------------------------------------------------------------------


def trainer_of_trl(folder: Path, model: Any, base: str, callbacks: list[Any]) -> Any:
    """As a user would set it up: prompt and completion out of a JSON file."""
    from datasets import load_dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    def split(row: dict[str, str]) -> dict[str, str]:
        return {"prompt": f"{row['instruction']}\n", "completion": row["output"]}

    rows = load_dataset("json", data_files=str(folder / "records.json"), split="train")
    rows = rows.map(split, remove_columns=rows.column_names)
    size = int((folder / "batch_size").read_text())
    settings = {"per_device_train_batch_size": size, "max_steps": 10, "max_length": 512}
    args = SFTConfig(
        output_dir=str(folder / "trl"), report_to="none", use_cpu=True, bf16=False, **settings
    )
    tokenizer = AutoTokenizer.from_pretrained(base)
    return SFTTrainer(
        model, args, train_dataset=rows, processing_class=tokenizer, callbacks=callbacks
    )


def first_step_of_trl(folder: Path, base: str) -> None:
    from speed_training import LORA
    from transformers import AutoModelForCausalLM, TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            os._exit(0)

    model = lora_on(AutoModelForCausalLM.from_pretrained(base), **LORA)
    trainer_of_trl(folder, model, base, [Stop()]).train()


def tokenise(what: str, folder: Path, base: str) -> None:
    """Write the seconds and the peak memory, MiB; imports and the model are not counted."""
    if what == "trl":
        import trl  # noqa: F401
        from timing import random_llama

        model = random_llama(num_hidden_layers=1, hidden_size=64, intermediate_size=64)
    else:
        from rosa_lightning import ReasoningDataModule
        from rosa_lightning.data.settings import LoadingConfig
    since = time.perf_counter()
    if what == "trl":
        trainer_of_trl(folder, model, base, [])
    else:
        data = ReasoningDataModule(
            sources=[str(folder / "records.json")],
            tokenizer="smollm2",
            val_fraction=0,
            loading=LoadingConfig(cache_dir=str(folder / "cache")),
        )
        data.setup("fit")
    found = {"seconds": time.perf_counter() - since, "peak_mib": peak_rss()}
    (folder / "found.json").write_text(json.dumps(found))


# --- sections ---------------------------------------------------------------------------------


def run(command: list[str], folder: Path) -> None:
    """Run a process, which must succeed."""
    paths = [str(HERE.parents[1]), str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    own = {"PYTHONPATH": os.pathsep.join(paths), "HF_DATASETS_CACHE": str(folder / "datasets")}
    environment = {**os.environ, **own}
    done = subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")


def write_records(data: Path, folder: Path, count: int, batch_size: int) -> None:
    """So many records, all different."""
    files = [json.loads((data / "train" / f"{name}.json").read_text()) for name in NAMES]
    rows = itertools.cycle(row for rows in files for row in rows)
    numbered = [
        {**row, "instruction": f"{number}. {row['instruction']}"}
        for number, row in zip(range(count), rows, strict=False)
    ]
    (folder / "records.json").write_text(json.dumps(numbered))
    (folder / "batch_size").write_text(str(batch_size))


def first_step(options: Any) -> dict[str, Any]:
    size = 2 if options.try_out else 16
    with TemporaryDirectory() as name:
        folder = Path(name)
        write_records(options.data, folder, min(options.records, 10_000), size)
        config = folder / "config.yaml"
        config.write_text(CONFIG.format(folder=folder, batch_size=size))
        commands = {OURS: ["-m", "rosa_lightning", "fit", "--config", str(config)]}
        if find_spec("trl"):
            commands[TRL] = [__file__, "first_step", str(folder)]
        ways = {name: partial(run, command, folder) for name, command in commands.items()}
        took = in_turn(ways, options.rounds)  # after one that fills the caches
    rows = {name: {"seconds": values} for name, values in took.items()}
    figures = []
    if TRL in took:
        figures.append(Figure("time by TRL's", ratios(took[OURS], took[TRL]), 0.9))
    return {
        "setting": {"batch_size": size, "rounds": options.rounds},
        "rows": rows,
        "figures": figures,
    }


def tokenising(options: Any) -> dict[str, Any]:
    """Time of all records and of a tenth of them, and memory."""
    rows: dict[str, dict[str, list[float]]] = {}
    counts = (options.records // 10, options.records)
    for _ in range(options.rounds):
        for count, what in itertools.product(
            counts, ("ours", "trl") if find_spec("trl") else ("ours",)
        ):
            with TemporaryDirectory() as name:
                folder = Path(name)
                write_records(options.data, folder, count, 16)
                run([__file__, what, str(folder)], folder)
                found = json.loads((folder / "found.json").read_text())
            row = rows.setdefault(f"{what}, {count:,}", {"seconds": [], "peak_mib": []})
            for key, value in found.items():
                row[key].append(value)
    few, many = (rows[f"ours, {count:,}"] for count in counts)
    figures = [
        Figure(
            "peak memory, by that of a tenth of the records",
            ratios(many["peak_mib"], few["peak_mib"]),
            1.2,
        )
    ]
    if find_spec("trl"):
        times = ratios(many["seconds"], rows[f"trl, {counts[1]:,}"]["seconds"])
        figures.insert(0, Figure("time by TRL's", times, 0.9))
    return {
        "setting": {"records": options.records, "rounds": options.rounds},
        "rows": rows,
        "figures": figures,
    }


def main() -> None:
    from rosa_lightning.models.gguf import gguf_folder

    quiet()
    what, folder, base = sys.argv[1], Path(sys.argv[2]), str(gguf_folder("smollm2"))
    if what == "first_step":
        first_step_of_trl(folder, base)
    else:
        tokenise(what, folder, base)


if __name__ == "__main__":
    main()
