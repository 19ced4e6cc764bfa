"""How fast the likelihood protocol is beside the plain ways to do the same, in one run.

    python tests/benchmarks/evaluation.py openbookqa.json [--batch-size 32] [--rounds 5]

Batches of like length, as `test` takes them, spread evenly over the file, by the embedded base in
float32. The ways are measured in turn, round by round; each figure is the median of the rounds.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from rosa_lightning.data.records import load_records
from rosa_lightning.data.sources import Source
from rosa_lightning.data.tokenization import Encoder, Example
from rosa_lightning.evaluation.likelihood import log_likelihoods, uncached_log_likelihoods
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
        f"full prompts, {size} rows at a time": way(
            lambda p, c: uncached_log_likelihoods(model, p, c, PAD, size)
        ),
        "one candidate at a time": way(lambda p, c: uncached_log_likelihoods(model, p, c, PAD, 1)),
    }
    shared, *others = (one() for one in ways.values())
    for other in others:
        for first, second in zip(shared, other, strict=True):
            assert max(abs(a - b) for a, b in zip(first, second, strict=True)) < 1e-3
    compare(ways, options.rounds)


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
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    model = load_base("tiny").float().eval().to(options.device)
    tokenizer = load_tokenizer("tiny")
    records = load_records(Source(path=options.file, task=options.task), "test")
    examples = Encoder(tokenizer, with_response=False)(records)
    examples.sort(key=lambda example: -len(example.prompt))
    examples = spread(examples, options.batch_size, options.batches)
    tokens = sum(len(example.prompt) for example in examples) / len(examples)
    print(
        f"{model.num_parameters() / 1e6:.1f} million parameters, {len(examples)} records, "
        f"{tokens:.0f} tokens a prompt, {options.device}, {torch.get_num_threads()} threads; the "
        "last column: times the seconds of the first way"
    )
    compare_likelihood(model, tokenizer, examples, options)


if __name__ == "__main__":
    main()
