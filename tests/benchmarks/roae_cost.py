"""Measure what RoAE and a scoring step cost, against the frozen base.

python tests/benchmarks/roae_cost.py [--threads 2] [--rounds 9] [--layers 12] [--rows 8]

A random Llama, 512 wide with 32k tokens, in float32 on CPU; the head at the last 8 positions.
Forward and backward of each variant take turns, so that whatever else the machine does meets all of
them; `--cpu-time` counts this process's own time, for a machine that others use too. Printed are
medians of the ratios within a round, with quartiles:

- over the frozen base (the input of layer 0 requires gradients, no adapters): the same with
  recomputed activations; RoAE of rank 16 and 64 on all layers and RoAE on the upper half, with
  recomputed activations as trainings have it; PEFT LoRA of rank 16 on q, k, v, up and down;
- a scoring step over one with all layers active, RoAE of rank 16;
- the extra time of scoring steps over ordinary ones with the upper half of the layers active, as a
  share of a run, at the default `interval` of `DynamicLayerSelection`.

Exits with 1 if a median misses its bar: 1.05 of the frozen base, 1.35 of an all-active step, 1 % of
a run.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import platform
import statistics
import sys
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from timing import LORA_TARGETS, Figure, in_turn, lora_on, random_llama, ratios
from torch import nn

from rosa_lightning import DynamicLayerSelection, RoAEConfig, inject_roae
from rosa_lightning.training.recompute import recomputable, recomputed

TOKENS, ANSWER = 100, 8
LORA = "PEFT LoRA on q, k, v, up, down"
FLOORS = "floor", "floor, recomputing"


def base(num_layers: int) -> nn.Module:
    return random_llama(num_hidden_layers=num_layers).requires_grad_(False)


def adapted(num_layers: int, rank: int, lowest: int = 0, scoring: bool = False) -> nn.Module:
    model = base(num_layers)
    inject_roae(model, RoAEConfig(rank=rank))
    layers = model.model.layers
    layers[:lowest].requires_grad_(False)
    for name, weight in layers.named_parameters():
        if scoring and "layernorm" in name:
            weight.requires_grad_(True)
    return model


def step(name: str, model: nn.Module, ids_BT: torch.Tensor) -> None:
    """Forward and backward, with the gradients of the embeddings where nothing else has any."""
    given = {"input_ids": ids_BT}
    if name in FLOORS:
        given = {"inputs_embeds": model.model.embed_tokens(ids_BT).requires_grad_(True)}
    plain = name in (FLOORS[0], LORA)
    with nullcontext() if plain else recomputed(recomputable(model)):
        logits = model(**given, logits_to_keep=ANSWER + 1, use_cache=False).logits[:, :-1]
    F.cross_entropy(logits.flatten(0, 1), ids_BT[:, -ANSWER:].flatten()).backward()
    model.zero_grad(set_to_none=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("threads", 2), ("rounds", 9), ("layers", 12), ("rows", 8)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--cpu-time", action="store_true", help="of this process")
    parser.add_argument("--json", type=Path, help="file for the figures of training_speed.py")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    num = given.layers
    models = {
        **{name: base(num) for name in FLOORS},
        "RoAE, rank 16": adapted(num, 16),
        "RoAE, rank 64": adapted(num, 64),
        "RoAE, upper half active": adapted(num, 16, lowest=num // 2),
        "scoring step": adapted(num, 16, scoring=True),
        LORA: lora_on(base(num), r=16, target_modules=LORA_TARGETS),
    }
    ids_BT = torch.randint(3, 32_000, (given.rows, TOKENS))
    steps = {name: partial(step, name, model, ids_BT) for name, model in models.items()}
    seconds = in_turn(
        steps, given.rounds, time.process_time if given.cpu_time else time.perf_counter
    )
    print(
        f"{platform.processor() or platform.machine()}, {given.threads} threads, torch "
        f"{torch.__version__}, transformers {transformers.__version__}; {num} layers, "
        f"{given.rows} x {TOKENS} tokens, floor {statistics.median(seconds['floor']):.2f} s"
    )
    figures = []

    def tell(name: str, values: list[float], bar: float | None = None) -> None:
        low, middle, high = statistics.quantiles(values, n=4)
        wanted = "" if bar is None else f"   at most {bar:g}"
        print(f"{name:46} {middle:7.3f}   {low:.3f} to {high:.3f}{wanted}", flush=True)
        figures.extend([] if bar is None else [Figure(name, values, bar)])

    for name in list(models)[1:]:
        bar = 1.05 if "rank" in name and name != LORA else None
        tell(f"{name} / floor", ratios(seconds[name], seconds["floor"]), bar)
    scoring = seconds["scoring step"]
    tell("scoring step / all active", ratios(scoring, seconds["RoAE, rank 16"]), 1.35)
    interval = inspect.signature(DynamicLayerSelection).parameters["interval"].default
    extra = [r - 1 for r in ratios(scoring, seconds["RoAE, upper half active"])]
    tell(f"scoring, % of a run, interval {interval}", [100 * r / (interval + r) for r in extra], 1)
    if given.json:
        given.json.write_text(json.dumps([dataclasses.asdict(figure) for figure in figures]))
    return int(not all(figure.met for figure in figures))


if __name__ == "__main__":
    sys.exit(main())
