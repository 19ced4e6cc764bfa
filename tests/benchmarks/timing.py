"""What the benchmarks share: ways that take turns, ratios within a round, and small set-ups."""

from __future__ import annotations

import logging
import os
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SHAPE = {
    "vocab_size": 32_000,
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
}
LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]


def quiet() -> None:
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    os.environ["HF_HUB_OFFLINE"] = "1"


def in_turn(
    ways: Mapping[str, Callable[[], Any]],
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
    warm_up: int = 1,
) -> dict[str, list[float]]:
    """Seconds of each way in each round. Ways take turns, so that all meet the same machine."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + warm_up):
        for name, way in ways.items():
            since = clock()
            way()
            if number >= warm_up:
                seconds[name].append(clock() - since)
    return seconds


def ratios(values: Sequence[float], to: Sequence[float]) -> list[float]:
    """Of each round."""
    return [a / b for a, b in zip(values, to, strict=True)]


def spread(values: Sequence[float]) -> str:
    """Median, and the lowest and the highest."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


@dataclass(frozen=True)
class Figure:
    """What was measured in each round, and the bar for its median."""

    name: str
    values: list[float]
    bar: float
    at_most: bool = True

    @property
    def met(self) -> bool:
        middle = statistics.median(self.values)
        return middle <= self.bar if self.at_most else middle >= self.bar

    def row(self) -> str:
        bar = f"at {'most' if self.at_most else 'least'} {self.bar:g}"
        return f"| {self.name} | {spread(self.values)} | {bar} | {'yes' if self.met else 'no'} |"


def random_llama(**changes: Any) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**SHAPE, **changes}))


def lora_on(model: Any, **settings: Any) -> Any:
    import peft

    return peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **settings))


def lightning_trainer(**settings: Any) -> Any:
    """On the CPU; it writes and shows nothing."""
    from lightning.pytorch import Trainer

    off = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    return Trainer(accelerator="cpu", **dict.fromkeys(off, False), **settings)


def hf_trainer(model: Any, folder: str, rows: Any, tokenizer: Any, callback: Any, **more: Any):
    """The trainer of transformers on the CPU; it writes and shows nothing."""
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    return Trainer(
        model=model,
        args=TrainingArguments(output_dir=folder, report_to="none", use_cpu=True, **more),
        train_dataset=rows,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        callbacks=[callback],
    )


def encoded(paths: list[str], tokenizer: Any, max_length: int = 1024) -> list[dict[str, list[int]]]:
    """The records as `ReasoningDataModule` encodes them, prompts without loss."""
    from rosa_lightning.data.collators import IGNORE_INDEX
    from rosa_lightning.data.encoding import Encoder
    from rosa_lightning.data.records import load_records
    from rosa_lightning.data.sources import Source

    records = [r for path in paths for r in load_records(Source(path=path), "train")]
    examples = Encoder(tokenizer, max_length=max_length)(records)
    return [
        {
            "input_ids": [*example.prompt, *example.response],
            "attention_mask": [1] * len(example.prompt + example.response),
            "labels": [IGNORE_INDEX] * len(example.prompt) + list(example.response),
        }
        for example in examples
    ]
