"""How fast the likelihood protocol is beside the plain ways to do the same, in one run.

    python tests/benchmarks/evaluation.py openbookqa.json [--batch-size 32] [--rounds 5]

Batches of like length, as `test` takes them, spread evenly over the file, by the embedded base in
float32. The ways are measured in turn, round by round; each figure is the median of the rounds.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
from timing import in_turn

from rosa_lightning.data.encoding import Encoder, Example
from rosa_lightning.data.records import load_records
from rosa_lightning.data.sources import Source
from rosa_lightning.evaluation.likelihood import log_likelihoods, uncached_log_likelihoods
from rosa_lightning.models.loading import load_base, load_tokenizer
from rosa_lightning.tasks.records import candidates

PAD = 0


def ways_of(model, tokenizer, batches: list[list[Example]], size: int) -> dict[str, Callable]:
    def ids(example: Example) -> list[list[int]]:
        texts = candidates(example.record)
        return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]

    given = [([e.prompt for e in part], [ids(e) for e in part]) for part in batches]

    def way(score: Callable[..., list[Any]]) -> Callable[[], list[Any]]:
        return lambda: [scores for part in given for scores in score(*part)]

    return {
        "likelihood, shared prompt": way(lambda p, c: log_likelihoods(model, p, c, PAD)),
        f"full prompts, {size} rows at a time": way(
            lambda p, c: uncached_log_likelihoods(model, p, c, PAD, size)
        ),
        "one candidate at a time": way(lambda p, c: uncached_log_likelihoods(model, p, c, PAD, 1)),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("file")
    parser.add_argument("--task", default="openbookqa")
    parser.add_argument("--device", default="cpu")
    for name, default in (("batch-size", 32), ("batches", 2), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    size, count = options.batch_size, options.batches
    model = load_base("tiny").float().eval().to(options.device)
    tokenizer = load_tokenizer("tiny")
    records = load_records(Source(path=options.file, task=options.task), "test")
    examples = Encoder(tokenizer, with_response=False)(records)
    examples.sort(key=lambda example: -len(example.prompt))
    whole = [examples[start : start + size] for start in range(0, len(examples), size)]
    # From the middles of equal parts, in order of length.
    batches = [whole[(2 * i + 1) * len(whole) // (2 * count)] for i in range(count)]
    lengths = [len(example.prompt) for part in batches for example in part]
    print(
        f"{model.num_parameters() / 1e6:.1f} million parameters, {len(lengths)} records, "
        f"{statistics.mean(lengths):.0f} tokens a prompt, {options.device}, "
        f"{torch.get_num_threads()} threads; the last column: times the seconds of the first way"
    )
    ways = ways_of(model, tokenizer, batches, size)
    shared, *others = (way() for way in ways.values())
    for other in others:
        for first, second in zip(shared, other, strict=True):
            assert max(abs(a - b) for a, b in zip(first, second, strict=True)) < 1e-3
    seconds = in_turn(ways, options.rounds, warm_up=0)
    middle = {name: statistics.median(values) / len(lengths) for name, values in seconds.items()}
    for name, value in middle.items():
        times = value / next(iter(middle.values()))
        print(f"{name:56} {1 / value:8.3f} items/s   {times:5.2f}", flush=True)


if __name__ == "__main__":
    main()
