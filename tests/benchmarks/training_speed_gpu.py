"""The part of `training_speed.py` for a GPU: `--device cuda` runs it.

Qwen3-0.6B and Llama-3.2-3B by their shapes, with random weights in bfloat16: batches of 4 x 768
tokens, all of them supervised in the last 64. RoSA with all layers and with the upper half active,
and PEFT LoRA r=32 on q and v, take turns, some steps each, in one process, so that each has the
same card; memory is what one takes beside the others, and its own weights.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
import transformers
from lightning.fabric.utilities.throughput import get_available_flops
from timing import lora_on, ratios, spread
from torch import nn

from rosa_lightning import RoAEConfig, RoSAModule, inject_roae
from rosa_lightning.comparison.speed import machine
from rosa_lightning.inspection.throughput import flops_per_token, head_flops
from rosa_lightning.training.loss import LossComputer

COMMON = {
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": True,
}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen3-0.6B": (
        "Qwen3Config",
        {
            "vocab_size": 151_936,
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "num_attention_heads": 16,
        },
    ),
    "Llama-3.2-3B": (
        "LlamaConfig",
        {
            "vocab_size": 128_256,
            "hidden_size": 3072,
            "intermediate_size": 8192,
            "num_attention_heads": 24,
        },
    ),
}
TINY = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
BATCH_SIZE, TOKENS, RESPONSE = 4, 768, 64
LORA, ALL, UPPER = "PEFT LoRA r=32 on q, v", "RoSA, all layers", "RoSA, upper half"


def new_model(shape: str, small: bool, device: str) -> Any:
    name, settings = SHAPES[shape]
    config = getattr(transformers, name)(**{**COMMON, **settings, **(TINY if small else {})})
    torch.manual_seed(0)
    with torch.device(device):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


class Way:
    """One way to train: its model, its optimizer, and what its turns took."""

    def __init__(self, model: nn.Module, module: RoSAModule | None) -> None:
        self.model, self.module = model.train(), module
        trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4)
        self.seconds: list[float] = []
        self.peak_mib = 0.0

    def step(self, batch: dict[str, Any]) -> None:
        if self.module is None:
            named = ("input_ids", "attention_mask", "labels")
            loss = self.model(**{name: batch[name] for name in named}).loss
        else:
            loss = self.module.loss(batch)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def turn(self, batches: list[dict[str, Any]], device: str) -> None:
        held = 0
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated()
        since = time.perf_counter()
        for batch in batches:
            self.step(batch)
        if device == "cuda":
            torch.cuda.synchronize()
            own = sum(p.numel() * p.element_size() for p in self.model.parameters())
            taken = torch.cuda.max_memory_allocated() - held + own
            self.peak_mib = max(self.peak_mib, taken / 2**20)
        self.seconds.append(time.perf_counter() - since)

    def flops(self, blocks: list[nn.Module]) -> int:
        """Of a batch, as `throughput/mfu` counts them: what the training needs, not what it does.

        The base is the same whichever adapter is on it, so that a LoRA is counted alike.
        """
        in_head = BATCH_SIZE * RESPONSE * head_flops(self.model)
        return BATCH_SIZE * TOKENS * flops_per_token(blocks) + in_head


def layers_of(model: Any) -> list[nn.Module]:
    inner = model.base_model.model if hasattr(model, "peft_config") else model
    return list(inner.model.layers)


def ways_of(shape: str, small: bool, device: str) -> dict[str, Way]:
    settings = {"r": 32, "lora_alpha": 64, "target_modules": ["q_proj", "v_proj"]}
    ways = {LORA: Way(lora_on(new_model(shape, small, device), **settings), None)}
    for name in (ALL, UPPER):
        model = new_model(shape, small, device)
        inject_roae(model, RoAEConfig(rank=32))
        if name == UPPER:
            layers = layers_of(model)
            for layer in layers[: len(layers) // 2]:
                layer.requires_grad_(False)
        module = RoSAModule("tiny")  # its loss; the model is the one here
        module.model, module.loss_computer = model, LossComputer(model)
        ways[name] = Way(model, module)
    return ways


def new_batch(vocab_size: int, device: str) -> dict[str, Any]:
    """A batch as the data module makes it; rows have nothing in common."""
    ids_BT = torch.randint(3, vocab_size, (BATCH_SIZE, TOKENS), device=device)
    labels_BT = ids_BT.clone()
    labels_BT[:, :-RESPONSE] = -100
    return {
        "input_ids": ids_BT,
        "attention_mask": torch.ones_like(ids_BT),
        "position_ids": torch.arange(TOKENS, device=device).expand(BATCH_SIZE, -1),
        "labels": labels_BT,
        "answer_mask": labels_BT != -100,
        "num_label_positions": RESPONSE,
        "num_shared": 0,
    }


def compare_on_gpu(options: argparse.Namespace, device: str = "cuda") -> None:
    steps, rounds = (2, 2) if options.small else (10, options.rounds or 5)
    peak = get_available_flops(torch.device(device), torch.bfloat16)
    print(machine())
    for shape in SHAPES:
        ways = ways_of(shape, options.small, device)
        vocab_size = ways[ALL].model.config.vocab_size
        for number in range(rounds + 1):
            batches = [new_batch(vocab_size, device) for _ in range(2 if number == 0 else steps)]
            for way in ways.values():
                way.turn(batches, device)
        print(f"\n{shape}, batches of {BATCH_SIZE} x {TOKENS} tokens, {RESPONSE} supervised")
        print("| training | tokens/s | time by LoRA's | peak memory, MiB | by LoRA's | MFU |")
        print("|---|---|---|---|---|---|")
        for name, way in ways.items():
            seconds = way.seconds[1:]  # the first turn warms up
            middle = statistics.median(seconds) / steps
            memory = [f"{way.peak_mib:,.0f}", f"{way.peak_mib / (ways[LORA].peak_mib or 1):.2f}"]
            mfu = f"{way.flops(layers_of(way.model)) / middle / peak:.1%}" if peak else "unknown"
            print(
                f"| {name} | {BATCH_SIZE * TOKENS / middle:,.0f} | "
                f"{spread(ratios(seconds, ways[LORA].seconds[1:]))} | "
                f"{' | '.join(memory if device == 'cuda' else ['', ''])} | {mfu} |"
            )
        del ways
        if device == "cuda":
            torch.cuda.empty_cache()
