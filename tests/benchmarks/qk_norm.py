"""Measure how far adapting slow dimensions reaches the fast ones through a norm on Q and K.

python tests/benchmarks/qk_norm.py COMPARISON [--control CONTROL]

COMPARISON is the folder that docs/results/qk_norm.yaml fills, CONTROL one on `tiny`, without norms.
docs/results/qk_norm.json gets both comparisons, without times and paths, and more measurements:

- measured: of each run at the chosen rate the share of the demonstration's test problems that are
  solved. With norms also, on the first 64 of them, for Q and K of each layer, given what this layer
  is given in the trained model: how far the states after the norm, slow and fast half of each head
  apart, are from those of the frozen projection and norm (relative L2 distance), and the factor on
  the fast dimensions. And the loss of the answers with all fast dimensions put back to frozen ones.
- shapes: Qwen3-0.6B and Gemma-3-1B shaped layers with random weights and a random term, by the
  length of the term over that of the projection's output.

The frozen states are computed here, by the formula of RMSNorm and with the base's own weights.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import mean

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from rosa_lightning import RoAEConfig, RoSAModule, inject_roae
from rosa_lightning.models.loading import load_base, load_tokenizer
from rosa_lightning.models.tiny import folder
from tests.tiny_model import problems, recipe

NUM_PROBLEMS = 64
RATIOS = (0.1, 0.3, 1.0, 3.0)
SHAPES = {
    "Qwen3-0.6B": (
        transformers.Qwen3Config,
        transformers.Qwen3ForCausalLM,
        {"hidden_size": 1024, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128},
    ),
    "Gemma-3-1B": (
        transformers.Gemma3TextConfig,
        transformers.Gemma3ForCausalLM,
        {"hidden_size": 1152, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256},
    ),
}
# A loaded machine makes up times; folders are those of the machine.
DROPPED = {"train_seconds", "examples_per_s", "peak_mib", "checkpoint", "folder"}

State = tuple[Tensor, Tensor, Tensor]
"""Projection's output, norm's output, and the frozen norm's output, (B, T, H, D) each."""


def slow_dims(head_dim: int, ratio: float) -> Tensor:
    """A mask (D,) of the slowest pairs of a head whose pairs are (i, i + D / 2)."""
    pairs = head_dim // 2
    mask = torch.zeros(pairs, dtype=torch.bool)
    mask[pairs - max(1, round(ratio * pairs)) :] = True
    return mask.repeat(2)


def rms_norm(z: Tensor, norm: nn.Module) -> Tensor:
    """RMSNorm over the last axis; Gemma's weights are stored minus one."""
    gemma = type(norm).__name__.startswith("Gemma")
    weight = norm.weight + 1 if gemma else norm.weight
    epsilon = norm.eps if gemma else norm.variance_epsilon
    return weight * z * torch.rsqrt(z.pow(2).mean(-1, keepdim=True) + epsilon)


@contextmanager
def states(
    model: nn.Module, base: nn.Module, change: Callable[[State], Tensor] | None = None
) -> Iterator[dict[tuple[int, str], State]]:
    """States of Q and K in each layer; `change` gives another output of the norm."""
    seen: dict[tuple[int, str], State] = {}
    handles = []
    for index, layer in enumerate(model.model.layers):
        frozen = base.model.layers[index].self_attn
        for kind in "qk":
            projection = getattr(layer.self_attn, f"{kind}_proj")
            norm = getattr(layer.self_attn, f"{kind}_norm")
            given: dict[str, Tensor] = {}

            def keep(_, args, out, given=given):
                given["x"], given["z"] = args[0], out.clone()

            def after(_, args, out, given=given, frozen=frozen, kind=kind, index=index):
                old, old_norm = getattr(frozen, f"{kind}_proj"), getattr(frozen, f"{kind}_norm")
                shape = (*given["x"].shape[:2], -1, frozen.head_dim)
                z0 = F.linear(given["x"], old.weight, old.bias).view(shape)
                y0 = rms_norm(z0, old_norm)
                # The same axes: Gemma's norm comes after the transposition in some versions.
                y = out if out.shape == y0.shape else out.transpose(1, 2)
                state = (given["z"].view(shape) - z0, z0, y, y0)
                seen[index, kind] = state
                if change is None:
                    return None
                changed = change(state)
                return changed if out.shape == y0.shape else changed.transpose(1, 2)

            handles.append(projection.register_forward_hook(keep))
            handles.append(norm.register_forward_hook(after))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def distance(y: Tensor, y0: Tensor, dims: Tensor) -> float:
    """Relative L2 distance over some dimensions."""
    return float((y - y0)[..., dims].norm() / y0[..., dims].norm())


def row(state: State, slow: Tensor, used: Tensor | None = None) -> dict[str, float]:
    """What one kind of state of a layer shows; `used` (B, T) leaves padding out."""
    delta, z0, y, y0 = (part if used is None else part[used] for part in state)
    return {
        "term": float(delta.norm() / z0.norm()),
        "slow": distance(y, y0, slow),
        "fast": distance(y, y0, ~slow),
        "factor": float((y * y0)[..., ~slow].sum() / y0[..., ~slow].pow(2).sum()),
    }


@torch.no_grad()
def trained(checkpoint: Path, base_name: str) -> dict[str, object]:
    """Accuracy on the demonstration's test problems; of a base with norms, what they pass on."""
    module = RoSAModule.load_from_checkpoint(checkpoint, base=base_name)
    model, base = module.ensure_model().eval(), load_base(base_name).eval()
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    tokenizer = load_tokenizer(base_name)
    lines = (folder() / "demo_test.jsonl").read_text(encoding="utf-8").splitlines()
    turns = [problems.as_turn(json.loads(line)) for line in lines]
    found: dict[str, object] = {"accuracy": recipe.accuracy(model, tokenizer, turns)}
    if not hasattr(base.model.layers[0].self_attn, "q_norm"):
        return found
    rows = recipe.encode(tokenizer, [[turn] for turn in turns[:NUM_PROBLEMS]])
    ids_BT, weights_BT = recipe.pad(rows, tokenizer.pad_token_id)
    answers_BT = (weights_BT == 1).float()
    slow = slow_dims(base.config.head_dim, 0.5)
    with states(model, base) as seen:
        found["loss"] = float(recipe.weighted_loss(model, ids_BT, answers_BT))
    used_BT = weights_BT[:, :-1] > 0
    with states(model, base, lambda state: torch.where(slow, state[2], state[3])):
        put_back = recipe.weighted_loss(model, ids_BT, answers_BT)
    found["loss_with_frozen_fast_dims"] = float(put_back)
    found["layers"] = [
        {"layer": i, "state": kind, **row(s, slow, used_BT)} for (i, kind), s in seen.items()
    ]
    return found


@torch.no_grad()
def shape(name: str, ratio: float) -> dict[str, object]:
    """Mean over Q and K of a random layer, under a random term of a length."""
    torch.manual_seed(0)
    make_config, make, sizes = SHAPES[name]
    config = make_config(
        **sizes, vocab_size=512, num_hidden_layers=1, intermediate_size=64, pad_token_id=0
    )
    base, model = make(config).eval(), make(config).eval()
    model.load_state_dict(base.state_dict())
    report = inject_roae(model, RoAEConfig(rank=16, placement="projection"))
    ids = torch.randint(1, 512, (4, 64))
    layers = [model.get_submodule(projection.name) for projection in report.projections]
    for layer in layers:
        nn.init.normal_(layer.roae_B)
    with states(model, base) as seen:
        model(ids)
    for layer, (delta, z0, _, _) in zip(layers, seen.values(), strict=True):
        layer.roae_B.mul_(ratio * z0.norm() / delta.norm())
    with states(model, base) as seen:
        model(ids)
    slow = slow_dims(config.head_dim, report.config.low_freq_ratio)
    rows = [row(state, slow) for state in seen.values()]
    means = {key: mean(one[key] for one in rows) for key in rows[0]}
    return {"model": name, **means, "expected_factor": 1 / math.sqrt(1 + ratio**2)}


def without(found: object) -> object:
    """A comparison without times and folders."""
    if isinstance(found, dict):
        return {key: without(value) for key, value in found.items() if key not in DROPPED}
    return [without(value) for value in found] if isinstance(found, list) else found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("comparison", type=Path)
    parser.add_argument("--control", type=Path)
    parser.add_argument("--base", default="tiny_qwen3", help="base of the comparison")
    parser.add_argument("--output", type=Path, default=Path("docs/results/qk_norm.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    folders = {"comparison": args.comparison, "control": args.control}
    read = {
        name: json.loads((path / "comparison.json").read_text())
        for name, path in folders.items()
        if path
    }
    measured = {
        name: [
            {"method": method, "seed": run["seed"], **trained(Path(run["checkpoint"]), base)}
            for method, one in read[name]["methods"].items()
            for run in one["runs"]
        ]
        for name, base in zip(read, (args.base, "tiny"), strict=False)
    }
    shapes = [shape(name, ratio) for name in SHAPES for ratio in RATIOS]
    found = {**without(read), "measured": measured, "shapes": shapes}
    args.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
