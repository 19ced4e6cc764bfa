"""Give the embedded base norms on Q and K, and train it on until it can do without the old lengths.

python tests/benchmarks/tiny_with_norms.py --output tiny_qwen3 [--steps 200]

A Qwen3 with the weights of the embedded Llama. Each norm starts with the root mean square of its
states over a batch, which alone keeps most of the skill; training on the last steps' text of the
recipe restores the rest. Stopped, it goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from random import Random

import torch
from torch import Tensor
from transformers import PreTrainedModel, Qwen3ForCausalLM

from rosa_lightning.models.loading import load_base, load_tokenizer
from tests.tiny_model import problems, recipe

PROGRESS = 0.99
"""Of the recipe: its hardest text."""


@torch.no_grad()
def with_norms(llama: PreTrainedModel, ids_BT: Tensor, used_BT: Tensor) -> PreTrainedModel:
    """The same weights with norms whose outputs have, on the whole, the old lengths."""
    kept = recipe.new_model(load_tokenizer("tiny"), "qwen3").config
    model: PreTrainedModel = Qwen3ForCausalLM(kept)
    model.load_state_dict(llama.state_dict(), strict=False)
    hidden: dict[str, Tensor] = {}
    for name, module in llama.named_modules():
        if name.endswith(("q_proj", "k_proj")):
            module.register_forward_hook(
                lambda _, args, out, name=name: hidden.update({name: out[used_BT]})
            )
    llama(input_ids=ids_BT)
    for name, states in hidden.items():
        norm = model.get_submodule(name.replace("_proj", "_norm"))
        norm.weight.fill_(float(states.pow(2).mean().sqrt()))
    return model


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=200)
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    tokenizer, llama = load_tokenizer("tiny"), load_base("tiny").eval()
    rows = recipe.encode(tokenizer, problems.batch_of_turns(Random("conversion"), PROGRESS))
    ids_BT, weights_BT = recipe.pad(rows, tokenizer.pad_token_id)
    model = with_norms(llama, ids_BT, weights_BT > 0)
    skill_turns = problems.skill_problems(Random("skill 0"), recipe.NUM_SKILL)
    before = recipe.accuracy(model, tokenizer, skill_turns)
    recipe.PEAK_LEARNING_RATE, recipe.WARMUP_STEPS, recipe.CHECK_EVERY = 1e-3, 20, 25
    easier = problems.batch_of_turns
    problems.batch_of_turns = lambda rng, _: easier(rng, PROGRESS)
    checkpoint = args.output / f"pretraining-norms-steps-{args.steps}.pt"
    recipe.pretrain(model, tokenizer, Random("pretraining norms"), args.steps, checkpoint)
    model.bfloat16().float().eval()
    after = recipe.accuracy(model, tokenizer, skill_turns)
    recipe.write(args.output, model, tokenizer, {})
    checkpoint.unlink()
    print(f"accuracy on its own family {before:.1%} before, {after:.1%} after")


if __name__ == "__main__":
    main()
