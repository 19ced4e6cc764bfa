"""Measure what RoAE and a scoring step cost, against the frozen base.

python tests/benchmarks/roae_cost.py [--threads 2] [--rounds 9] [--layers 12] [--rows 8]

A random Llama, 512 wide with 32k tokens, in float32 on CPU; the head at the last 8 positions.
Forward and backward of each variant take turns, so that whatever else the machine does meets all of
them; `--cpu-time` counts this process's own time, for a machine that others use too. Printed are
medians of the ratios within a round, with quartiles:

- over the frozen floor (the input of layer 0 requires gradients, no adapters): the same with
  recomputed activations; RoAE of rank 16 and 64 on all layers and RoAE on the upper half, with
  recomputed activations as trainings have it; PEFT LoRA of rank 16 on q, k, v, up and down;
- a scoring step over one with all layers active, RoAE of rank 16;
- the extra time of scoring steps over ordinary ones with the upper half of the layers active, as a
  share of a run, at the default `interval` of `DynamicLayerSelection`.

Exits with 1 if a median misses its bar: 1.05 of the floor, 1.35 of an all-active step, 1 % of a
run.
"""

from __future__ import annotations

import argparse
import inspect
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from rosa_lightning import DynamicLayerSelection, RoAEConfig, inject_roae
from rosa_lightning.training.recompute import recomputable, recomputed

TOKENS, ANSWER = 100, 8
LORA = "PEFT LoRA on q, k, v, up, down"
FLOORS = "floor", "floor, recomputing"


def base(num_layers: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=num_layers,
        num_attention_heads=8,
        num_key_value_heads=8,
    )
    return LlamaForCausalLM(config).requires_grad_(False)


def adapted(num_layers: int, rank: int, lowest: int = 0, scoring: bool = False) -> nn.Module:
    model = base(num_layers)
    inject_roae(model, RoAEConfig(rank=rank))
    layers = model.model.layers
    layers[:lowest].requires_grad_(False)
    for name, weight in layers.named_parameters():
        if scoring and "layernorm" in name:
            weight.requires_grad_(True)
    return model


def lora(num_layers: int) -> nn.Module:
    targets = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
    return get_peft_model(base(num_layers), LoraConfig(r=16, target_modules=targets))


def step(model: nn.Module, ids_BT: torch.Tensor, from_input: bool, ours: bool) -> None:
    """Forward and backward, with the gradients of the embeddings where nothing else has any."""
    given = {"input_ids": ids_BT}
    if from_input:
        given = {"inputs_embeds": model.model.embed_tokens(ids_BT).requires_grad_(True)}
    with recomputed(recomputable(model)) if ours else nullcontext():
        logits = model(**given, logits_to_keep=ANSWER + 1, use_cache=False).logits[:, :-1]
    F.cross_entropy(logits.flatten(0, 1), ids_BT[:, -ANSWER:].flatten()).backward()
    model.zero_grad(set_to_none=True)


def measure(
    models: dict[str, nn.Module], ids_BT: torch.Tensor, rounds: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Seconds of each variant in each round; the first round warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for number in range(rounds + 1):
        for name, model in models.items():
            start = clock()
            ours = name not in ("floor", LORA)
            step(model, ids_BT, from_input=name in FLOORS, ours=ours)
            if number:
                seconds[name].append(clock() - start)
    return seconds


def line(name: str, values: list[float], bar: float | None = None) -> bool:
    """Print a median and its quartiles; whether the median misses the bar."""
    low, middle, high = statistics.quantiles(values, n=4)
    wanted = "" if bar is None else f"   at most {bar:g}"
    print(f"{name:46} {middle:7.3f}   {low:.3f} to {high:.3f}{wanted}", flush=True)
    return bar is not None and middle > bar


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument(
        "--cpu-time", action="store_true", help="of this process, on a busy machine"
    )
    parser.add_argument(
        "--json", type=Path, help="file for what has a bar, as training_speed.py reads"
    )
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    num = given.layers
    models = {
        "floor": base(num),
        FLOORS[1]: base(num),
        "RoAE, rank 16": adapted(num, 16),
        "RoAE, rank 64": adapted(num, 64),
        "RoAE, upper half active": adapted(num, 16, lowest=num // 2),
        "scoring step": adapted(num, 16, scoring=True),
        LORA: lora(num),
    }
    clock = time.process_time if given.cpu_time else time.perf_counter
    ids_BT = torch.randint(3, 32_000, (given.rows, TOKENS))
    seconds = measure(models, ids_BT, given.rounds, clock)
    print(
        f"{platform.processor() or platform.machine()}, {given.threads} threads, torch "
        f"{torch.__version__}, transformers {transformers.__version__}; {num} layers, "
        f"{given.rows} x {TOKENS} tokens, floor {statistics.median(seconds['floor']):.2f} s"
    )

    def ratios(name: str, to: str) -> list[float]:
        return [a / b for a, b in zip(seconds[name], seconds[to], strict=True)]

    missed, figures = False, []

    def tell(name: str, values: list[float], bar: float | None = None) -> None:
        nonlocal missed
        missed |= line(name, values, bar)
        if bar is not None:
            figures.append({"name": name, "values": values, "bar": bar})

    for name, bar in zip(list(models)[1:], (None, 1.05, 1.05, None, None, None), strict=True):
        tell(f"{name} / floor", ratios(name, "floor"), bar)
    tell("scoring step / all active", ratios("scoring step", "RoAE, rank 16"), 1.35)
    interval = inspect.signature(DynamicLayerSelection).parameters["interval"].default
    extra = [r - 1 for r in ratios("scoring step", "RoAE, upper half active")]
    tell(f"scoring, % of a run, interval {interval}", [100 * r / (interval + r) for r in extra], 1)
    if given.json:
        given.json.write_text(json.dumps(figures))
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
