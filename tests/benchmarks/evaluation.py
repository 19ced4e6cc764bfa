"""How fast the two protocols are, beside the plain way to do the same, in one run.

    python tests/benchmarks/evaluation.py openbookqa.json [--batch-size 32] [--rounds 5]
    python tests/benchmarks/evaluation.py gsm8k.json --task gsm8k --layers 12 --hidden 512

Batches of like length, as `test` takes them, spread evenly over the file. The embedded base in
float32; with `--layers`, a Llama with random weights instead, which writes as many tokens as it is
told to: unlike the embedded base it does not fit into a CPU's cache. The ways are measured in turn,
round by round; each figure is the median of the rounds. Ways of batch 1 take every eighth record
where all must be written to the end.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rosa_lightning.data.collators import PromptCollator
from rosa_lightning.data.records import load_records
from rosa_lightning.data.sources import Source
from rosa_lightning.data.tokenization import Example, encode
from rosa_lightning.evaluation.evaluator import generate
from rosa_lightning.evaluation.generation import write_greedily
from rosa_lightning.evaluation.likelihood import in_full, log_likelihoods
from rosa_lightning.models.loading import load_base, load_tokenizer
from rosa_lightning.tasks.records import candidates

PAD = 0
Ways = dict[str, Callable[[], list[Any]]]


def compare(ways: Ways, rounds: int) -> None:
    """Print items a second of each way, and how many times as fast the first is."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            since = time.perf_counter()
            count = len(way())
            seconds[name].append((time.perf_counter() - since) / count)
            print(f"  {name}: {seconds[name][-1]:.3f} s an item", file=sys.stderr, flush=True)
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    first = next(iter(ways))
    for name, value in middle.items():
        print(f"{name:56} {1 / value:8.3f} items/s   {value / middle[first]:5.2f}", flush=True)


def batches(examples: list[Example], size: int) -> Iterator[list[Example]]:
    for start in range(0, len(examples), size):
        yield examples[start : start + size]


def compare_likelihood(model, tokenizer, examples: list[Example], options) -> None:
    def ids(example: Example) -> list[list[int]]:
        texts = candidates(example.record)
        return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]

    own = {id(example): ids(example) for example in examples}
    size = options.batch_size

    def way(score) -> Callable[[], list[Any]]:
        return lambda: [
            scores
            for part in batches(examples, size)
            for scores in score([e.prompt for e in part], [own[id(e)] for e in part])
        ]

    ways = {
        "likelihood, shared prompt": way(lambda p, c: log_likelihoods(model, p, c, PAD)),
        f"full prompts, {size} rows at a time": way(lambda p, c: in_full(model, p, c, PAD, size)),
        "one candidate at a time": way(lambda p, c: in_full(model, p, c, PAD, 1)),
    }
    shared, *others = (one() for one in ways.values())
    for other in others:
        for first, second in zip(shared, other, strict=True):
            assert max(abs(a - b) for a, b in zip(first, second, strict=True)) < 1e-3
    compare(ways, options.rounds)


def inputs(model, part: list[Example]) -> dict[str, Any]:
    batch = PromptCollator(PAD)(part)
    return {k: batch[k].to(model.device) for k in ("input_ids", "attention_mask")}


def compare_generate(model, tokenizer, examples: list[Example], options) -> None:
    size, longest = options.batch_size, options.max_new_tokens

    def own(part: list[Example]) -> list[str]:
        return generate(model, tokenizer, inputs(model, part), longest)

    def transformers_own(part: list[Example]) -> list[str]:
        given = inputs(model, part)
        ids = model.generate(**given, max_new_tokens=longest, do_sample=False)
        new = ids[:, given["input_ids"].shape[1] :]
        return tokenizer.batch_decode(new, skip_special_tokens=True)

    def way(write, width: int) -> Callable[[], list[Any]]:
        return lambda: [text for part in batches(examples, width) for text in write(part)]

    ways = {
        f"generate, batch {size}": way(own, size),
        "generate, batch 1": way(own, 1),
        f"transformers' generate, batch {size}": way(transformers_own, size),
        "transformers' generate, batch 1": way(transformers_own, 1),
    }
    together, *others = (one() for one in ways.values())
    assert all(texts == together for texts in others)
    compare(ways, options.rounds)


def compare_long(model, examples: list[Example], count: int, options) -> None:
    """Answers of so many tokens each, whatever is written."""
    size = options.batch_size

    def own(part: list[Example]) -> list[list[int]]:
        return write_greedily(model, [e.prompt for e in part], count, PAD)

    def transformers_own(part: list[Example]) -> list[list[int]]:
        given = inputs(model, part)
        ids = model.generate(
            **given, min_new_tokens=count, max_new_tokens=count, do_sample=False, eos_token_id=-1
        )
        return ids[:, given["input_ids"].shape[1] :].tolist()

    def way(write, width: int) -> Callable[[], list[Any]]:
        some = examples if width > 1 else examples[:: min(8, len(examples))]
        return lambda: [row for part in batches(some, width) for row in write(part)]

    compare(
        {
            f"{count} tokens each, batch {size}": way(own, size),
            f"{count} tokens each, batch 1": way(own, 1),
            f"{count} tokens each, transformers' generate, batch {size}": way(
                transformers_own, size
            ),
            f"{count} tokens each, transformers' generate, batch 1": way(transformers_own, 1),
        },
        options.rounds,
    )


def made_base(layers: int, hidden: int):
    """A Llama with random weights and a usual vocabulary."""
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        max_position_embeddings=2048,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


def spread(examples: list[Example], size: int, count: int) -> list[Example]:
    """So many batches from the middles of equal parts, of examples in order of length."""
    whole = list(batches(examples, size))
    picked = [whole[(2 * i + 1) * len(whole) // (2 * count)] for i in range(count)]
    return [example for part in picked for example in part]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("file")
    parser.add_argument("--task", default="openbookqa")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--batches", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--tokens", type=int, nargs="*", default=[128])
    parser.add_argument("--layers", type=int)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    model = made_base(options.layers, options.hidden) if options.layers else load_base("tiny")
    model = model.float().eval().to(options.device)
    tokenizer = load_tokenizer("tiny")
    records = load_records(Source(path=options.file, task=options.task), "test")
    examples, _ = encode(records, tokenizer, with_response=False)
    examples.sort(key=lambda example: -len(example.prompt))
    examples = spread(examples, options.batch_size, options.batches)
    tokens = sum(len(example.prompt) for example in examples) / len(examples)
    print(
        f"{model.num_parameters() / 1e6:.1f} million parameters, {len(examples)} records, "
        f"{tokens:.0f} tokens a prompt, {options.device}, {torch.get_num_threads()} threads; the "
        "last column: times the seconds of the first way"
    )
    with torch.no_grad():
        if not options.layers:
            if candidates(records[0]):
                compare_likelihood(model, tokenizer, examples, options)
            compare_generate(model, tokenizer, examples, options)
        for count in options.tokens:
            compare_long(model, examples, count, options)


if __name__ == "__main__":
    main()
