"""Make the embedded base model and the demonstration set, from nothing but a seed.

    python -m tests.tiny_model.recipe [--output DIR] [--seed 0] [--steps 1500]
    python -m tests.tiny_model.recipe --family qwen3 --output DIR

The files in rosa_lightning/models/tiny are those of the default seed, made with OMP_NUM_THREADS=1
in 13 minutes on an AMD EPYC (bfloat16 in AVX-512): 98.0 % of fresh problems of the base's own
family solved, and 0.7 % of the demonstration's test problems. Other thread counts and processors
round otherwise and yield other weights; tokenizer and demonstration set depend on the seed alone.

`qwen3` is a base of the same size with norms on Q and K, which the package does not hold. A run
that was stopped goes on from its last checkpoint, one every 100 steps.
"""

import argparse
import json
import math
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any, Literal, get_args

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from rosa_lightning.models.tiny import folder
from tests.tiny_model import problems

# B rows, T tokens, V vocabulary
VOCAB_SIZE = 1024
MAX_POSITIONS = 2048
PEAK_LEARNING_RATE = 4e-3
FINAL_LEARNING_RATE_SHARE = 0.05
WARMUP_STEPS = 100
# Prompts carry many tokens that cannot be predicted (names, counts); responses none.
PROMPT_WEIGHT = 0.2
# Tokens that each head of the first layer looks back at the start: 2 and 3 lead to a count's name,
# 7 from the end of a prompt to the name in the question.
OFFSETS = (1, 2, 3, 5, 7)
# Six fast pairs of this length give the wanted token some 0.97 of the attention.
NUM_POSITION_PAIRS, POSITION_STRENGTH = 6, 6.0
NUM_STEPS = 1500
CHECK_EVERY = 100
NUM_TRAIN, NUM_TEST, NUM_SKILL, NUM_CHECK = 3000, 300, 300, 100

Family = Literal["llama", "qwen3"]
FAMILIES: dict[Family, tuple[Any, Any]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
Row = tuple[list[int], list[float]]


def train_tokenizer(rng: Random) -> PreTrainedTokenizerFast:
    """A byte-level BPE over the recipe's own text: every byte has a token, so has 10 to 99."""
    bpe = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=False)
    text = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([digits, text])
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<|pad|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    stories = [problems.make_story(rng, [2] * 6) for _ in range(1500)]
    turns = [turn for story in stories for turn in problems.first_family(rng, story, 4, 0.3)]
    texts = [turn.prompt for turn in turns]
    texts += [problems.second_family(rng)["instruction"] for _ in range(1500)]
    texts += list(problems.ECHO_INSTRUCTIONS) * 300
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=bpe,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        clean_up_tokenization_spaces=False,
        model_max_length=MAX_POSITIONS,
    )


def encode(tokenizer: PreTrainedTokenizerFast, dialogues: list[list[problems.Turn]]) -> list[Row]:
    """Token ids and loss weights; each prompt and each response is tokenised on its own."""
    texts = [text for turns in dialogues for turn in turns for text in (turn.prompt, turn.response)]
    encoded = iter(tokenizer(texts, add_special_tokens=False)["input_ids"])
    rows = []
    for turns in dialogues:
        ids: list[int] = []
        weights: list[float] = []
        for _ in turns:
            prompt, response = next(encoded), [*next(encoded), tokenizer.eos_token_id]
            ids += prompt + response
            weights += [PROMPT_WEIGHT] * len(prompt) + [1.0] * len(response)
        rows.append((ids[:MAX_POSITIONS], weights[:MAX_POSITIONS]))
    return rows


def pad(rows: list[Row], pad_id: int) -> tuple[Tensor, Tensor]:
    """Ids and weights, both (B, T); padding stands right and weighs nothing."""
    width = max(len(ids) for ids, _ in rows)
    ids_BT = torch.tensor([ids + [pad_id] * (width - len(ids)) for ids, _ in rows])
    weights_BT = torch.tensor([row + [0.0] * (width - len(row)) for _, row in rows])
    return ids_BT, weights_BT


def weighted_loss(model: PreTrainedModel, ids_BT: Tensor, weights_BT: Tensor) -> Tensor:
    """Mean cross-entropy of the next token, in nats, under the weights."""
    logits_BTV = model(input_ids=ids_BT[:, :-1]).logits
    losses = functional.cross_entropy(
        logits_BTV.flatten(0, 1).float(), ids_BT[:, 1:].flatten(), reduction="none"
    )
    weights = weights_BT[:, 1:].flatten()
    return (losses * weights).sum() / weights.sum()


@torch.no_grad()
def accuracy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, turns: list[problems.Turn]
) -> float:
    """Share of problems whose whole response, end token included, greedy decoding would give."""
    num_right = 0
    for start in range(0, len(turns), 50):
        rows = encode(tokenizer, [[turn] for turn in turns[start : start + 50]])
        ids_BT, weights_BT = pad(rows, tokenizer.pad_token_id)
        guesses_BT = model(input_ids=ids_BT[:, :-1]).logits.argmax(-1)
        unread_BT = weights_BT[:, 1:] < 1
        num_right += int(((guesses_BT == ids_BT[:, 1:]) | unread_BT).all(1).sum())
    return num_right / len(turns)


def learning_rate(step: int, num_steps: int) -> float:
    """Linear warm-up, then a cosine down to a small share of the peak."""
    if step < WARMUP_STEPS:
        return PEAK_LEARNING_RATE * (step + 1) / WARMUP_STEPS
    done = (step - WARMUP_STEPS) / max(1, num_steps - WARMUP_STEPS)
    low = FINAL_LEARNING_RATE_SHARE
    return PEAK_LEARNING_RATE * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * done)))


def new_model(tokenizer: PreTrainedTokenizerFast, family: Family = "llama") -> PreTrainedModel:
    """A small model with random weights, seeded by torch's generator."""
    make_config, make = FAMILIES[family]
    config = make_config(
        vocab_size=len(tokenizer),
        hidden_size=160,
        intermediate_size=432,
        num_hidden_layers=4,
        num_attention_heads=5,
        num_key_value_heads=5,
        head_dim=32,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        attention_bias=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model: PreTrainedModel = make(config)
    look_back(model)
    return model


@torch.no_grad()
def look_back(model: PreTrainedModel) -> None:
    """Start head h of the first layer as one that reads the token OFFSETS[h] positions back.

    Looking a count up by its name is an induction circuit: on bare lists such heads learn it in 250
    steps; without them there was no sign of it after 500. The bias of q is a fixed vector in the
    fast RoPE pairs, that of k the same vector rotated by that many tokens. Norms on q and k start
    with a weight that gives these vectors their length back.
    """
    attention: Any = model.model.layers[0].self_attn
    config = model.config
    head_dim: int = attention.head_dim
    half = head_dim // 2
    angles = model.model.rotary_emb.inv_freq[:NUM_POSITION_PAIRS]
    fast = torch.arange(NUM_POSITION_PAIRS)
    for head in range(config.num_attention_heads):
        dims = head * head_dim + fast
        attention.q_proj.bias[dims] = POSITION_STRENGTH
        attention.k_proj.bias[dims] = POSITION_STRENGTH * torch.cos(angles * OFFSETS[head])
        attention.k_proj.bias[dims + half] = POSITION_STRENGTH * torch.sin(angles * OFFSETS[head])
    for norm in ("q_norm", "k_norm"):
        if hasattr(attention, norm):
            root_mean_square = POSITION_STRENGTH * math.sqrt(NUM_POSITION_PAIRS / head_dim)
            getattr(attention, norm).weight.fill_(root_mean_square)


def optimizers(model: PreTrainedModel) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for the rest."""
    named = dict(model.named_parameters())
    inner = [weight for name, weight in named.items() if weight.ndim == 2 and "layers" in name]
    rest = [weight for weight in named.values() if all(weight is not one for one in inner)]
    return [
        torch.optim.Muon(inner, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def pretrain(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    rng: Random,
    num_steps: int,
    checkpoint: Path,
) -> None:
    """Train on fresh text at every step, in bfloat16 autocast; goes on from the checkpoint."""
    steppers = optimizers(model)
    check = problems.skill_problems(Random("check"), NUM_CHECK)
    start, before = (
        load_state(checkpoint, model, steppers, rng) if checkpoint.exists() else (0, 0.0)
    )
    started = time.monotonic()
    for step in range(start, num_steps):
        rows = encode(tokenizer, problems.batch_of_turns(rng, step / num_steps))
        ids_BT, weights_BT = pad(rows, tokenizer.pad_token_id)
        with torch.autocast("cpu", torch.bfloat16):
            loss = weighted_loss(model, ids_BT, weights_BT)
        model.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for stepper in steppers:
            for group in stepper.param_groups:
                group["lr"] = learning_rate(step, num_steps)
            stepper.step()
        if (step + 1) % CHECK_EVERY == 0:
            seconds = before + time.monotonic() - started
            skill = accuracy(model, tokenizer, check)
            told = f"loss {loss.item():.3f}, skill {skill:.0%}, {seconds:.0f} s"
            print(f"step {step + 1}: {told}", flush=True)
            save_state(checkpoint, model, steppers, rng, (step + 1, seconds))


def save_state(
    path: Path,
    model: PreTrainedModel,
    steppers: list[torch.optim.Optimizer],
    rng: Random,
    done: tuple[int, float],
) -> None:
    """Store all that `pretrain` goes on from; `done` is steps and seconds."""
    holders: list[Any] = [model, *steppers]
    parts = [holder.state_dict() for holder in holders]
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".part")
    torch.save({"parts": parts, "rng": rng.getstate(), "done": done}, beside)
    beside.replace(path)


def load_state(
    path: Path, model: PreTrainedModel, steppers: list[torch.optim.Optimizer], rng: Random
) -> tuple[int, float]:
    """Take over what `save_state` has stored; returns steps and seconds."""
    state = torch.load(path, weights_only=True)
    holders: list[Any] = [model, *steppers]
    for holder, stored in zip(holders, state["parts"], strict=True):
        holder.load_state_dict(stored)
    rng.setstate(state["rng"])
    done: tuple[int, float] = state["done"]
    return done


def write(
    output: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    records: dict[str, list[dict[str, str]]],
) -> None:
    """Write every file beside its place first, so that an interrupted run leaves the old ones."""
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output) as beside:
        model.bfloat16().save_pretrained(beside)
        # Stored in half the bytes, loaded in float32 where nothing else is asked for.
        config = Path(beside) / "config.json"
        config.write_text(config.read_text().replace('"dtype": "bfloat16"', '"dtype": "float32"'))
        tokenizer.save_pretrained(beside)
        for name, rows in records.items():
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
            (Path(beside) / name).write_text("".join(lines), encoding="utf-8")
        for path in Path(beside).iterdir():
            path.chmod(0o644)  # weights are saved readable by their owner alone
            path.replace(output / path.name)


def main(argv: Sequence[str] | None = None) -> None:
    """Pretrain, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, help="where the files go")
    parser.add_argument("--family", choices=get_args(Family), default="llama")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=NUM_STEPS)
    args = parser.parse_args(argv)
    if args.output is None and args.family != "llama":
        parser.error("--output is missing; the package's own folder holds the llama")
    output: Path = args.output or folder()
    torch.manual_seed(args.seed)
    # One generator for each purpose: other step counts leave the demonstration set as it is.
    tokenizer = train_tokenizer(Random(f"tokenizer {args.seed}"))
    records = problems.demonstration(Random(f"demonstration {args.seed}"), NUM_TRAIN + NUM_TEST)
    train, test = records[:NUM_TRAIN], records[NUM_TRAIN:]
    model = new_model(tokenizer, args.family)
    checkpoint = output / f"pretraining-{args.family}-seed-{args.seed}-steps-{args.steps}.pt"
    pretrain(model, tokenizer, Random(f"pretraining {args.seed}"), args.steps, checkpoint)
    # What is stored is what is measured: bfloat16 weights, computed with in float32.
    model.bfloat16().float().eval()  # type: ignore[no-untyped-call]
    skill_turns = problems.skill_problems(Random(f"skill {args.seed}"), NUM_SKILL)
    skill = accuracy(model, tokenizer, skill_turns)
    base = accuracy(model, tokenizer, [problems.as_turn(record) for record in test])
    write(output, model, tokenizer, {"demo_train.jsonl": train, "demo_test.jsonl": test})
    checkpoint.unlink(missing_ok=True)
    print(f"parameters {model.num_parameters()}, accuracy on its own family {skill:.1%}")
    print(f"accuracy on the demonstration set's test problems {base:.1%}")


if __name__ == "__main__":
    main()
