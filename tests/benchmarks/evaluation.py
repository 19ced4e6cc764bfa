"""How fast the two protocols are, beside the plain way to do the same, in one run.

    python tests/benchmarks/evaluation.py openbookqa.json [--batch-size 32] [--rounds 5]

The embedded base in float32, on the longest records first, as `test` takes them. The ways are
measured in turn, round by round, on the same records; each figure is the median of the rounds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from rosa_lightning.base import load_base, load_tokenizer
from rosa_lightning.batching import Example, PromptCollator, encode
from rosa_lightning.evaluate import generate
from rosa_lightning.greedy import write_greedily
from rosa_lightning.likelihood import in_full, log_likelihoods
from rosa_lightning.sources import Source, load_records
from rosa_lightning.tasks import candidates

PAD = 0
Ways = dict[str, Callable[[], list[Any]]]


def compare(ways: Ways, count: int, rounds: int) -> None:
    """Print items a second of each way, and how many times as fast the first is."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            since = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - since)
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    first = next(iter(ways))
    for name, value in middle.items():
        print(f"{name:36} {count / value:8.2f} items/s   {value / middle[first]:5.2f}")


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
    compare(ways, len(examples), options.rounds)


def compare_generate(model, tokenizer, examples: list[Example], options) -> None:
    size, longest = options.batch_size, options.max_new_tokens

    def inputs(part: list[Example]) -> dict[str, Any]:
        batch = PromptCollator(PAD)(part)
        return {k: batch[k].to(model.device) for k in ("input_ids", "attention_mask")}

    def own(part: list[Example]) -> list[str]:
        return generate(model, tokenizer, inputs(part), longest)

    def transformers_own(part: list[Example]) -> list[str]:
        given = inputs(part)
        ids = model.generate(**given, max_new_tokens=longest, do_sample=False)
        new = ids[:, given["input_ids"].shape[1] :]
        return tokenizer.batch_decode(new, skip_special_tokens=True)

    def endless(part: list[Example]) -> list[list[int]]:
        return write_greedily(model, [e.prompt for e in part], 128, PAD)

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
    compare(ways, len(examples), options.rounds)

    def endless_transformers(part: list[Example]) -> list[list[int]]:
        given = inputs(part)
        ids = model.generate(
            **given, min_new_tokens=128, max_new_tokens=128, do_sample=False, eos_token_id=-1
        )
        return ids[:, given["input_ids"].shape[1] :].tolist()

    ways = {
        f"128 tokens each, batch {size}": way(endless, size),
        "128 tokens each, batch 1": way(endless, 1),
        f"128 tokens each, transformers' generate, batch {size}": way(endless_transformers, size),
        "128 tokens each, transformers' generate, batch 1": way(endless_transformers, 1),
    }
    compare(ways, len(examples), options.rounds)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("file")
    parser.add_argument("--task", default="openbookqa")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--batches", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    model = load_base("tiny", dtype="float32").eval().to(options.device)
    tokenizer = load_tokenizer("tiny")
    records = load_records(Source(path=options.file, task=options.task), "test")
    records = records[: options.batch_size * options.batches]
    examples, _ = encode(records, tokenizer, with_response=False)
    examples.sort(key=lambda example: -len(example.prompt))
    tokens = sum(len(example.prompt) for example in examples) / len(examples)
    print(
        f"{len(records)} records, {tokens:.0f} tokens a prompt, {options.device}, "
        f"{torch.get_num_threads()} threads; the last column: times the seconds of the first way"
    )
    with torch.no_grad():
        if candidates(records[0]):
            compare_likelihood(model, tokenizer, examples, options)
        compare_generate(model, tokenizer, examples, options)


if __name__ == "__main__":
    main()
