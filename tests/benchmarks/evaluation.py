"""How fast the two protocols are, beside the plain way to do the same, in one run.

    python tests/benchmarks/evaluation.py openbookqa.json [--batch-size 32] [--rounds 5]

The embedded base in float32; the ways are measured in turn, round by round, on the same records.
Each figure is the median of the rounds.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from rosa_lightning.base import load_base, load_tokenizer
from rosa_lightning.batching import PromptCollator, encode
from rosa_lightning.evaluate import generate
from rosa_lightning.likelihood import in_full, log_likelihoods
from rosa_lightning.sources import Source, load_records
from rosa_lightning.tasks import candidates


def rates(ways: dict, items: dict[str, int], rounds: int) -> dict[str, float]:
    """Items a second of each way."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            since = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - since)
    return {name: items[name] / statistics.median(values) for name, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("file")
    parser.add_argument("--task", default="openbookqa")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--batches", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    size, pad = options.batch_size, 0
    model = load_base("tiny", dtype="float32").eval().to(options.device)
    tokenizer = load_tokenizer("tiny")
    records = load_records(Source(path=options.file, task=options.task), "test")
    records = records[: size * options.batches]
    examples, _ = encode(records, tokenizer, with_response=False)
    prompts = [list(example.prompt) for example in examples]
    own = [
        [tokenizer(text, add_special_tokens=False)["input_ids"] for text in candidates(record)]
        for record in records
    ]
    tokens = sum(map(len, prompts)) / len(prompts)
    print(f"{len(records)} records, {tokens:.0f} tokens a prompt, batch {size}, {options.device}")

    def chosen(score):
        def way() -> list[list[float]]:
            scores: list[list[float]] = []
            for start in range(0, len(prompts), size):
                rows = slice(start, start + size)
                scores += score(prompts[rows], own[rows])
            return scores

        return way

    def written(width: int, count: int):
        def way() -> list[str]:
            texts = []
            for start in range(0, count, width):
                batch = PromptCollator(pad)(examples[start : start + width])
                moved = {k: v.to(model.device) for k, v in batch.items() if torch.is_tensor(v)}
                texts += generate(model, tokenizer, moved, options.max_new_tokens)
            return texts

        return way

    ways = {
        "likelihood, shared prompt": chosen(lambda p, c: log_likelihoods(model, p, c, pad)),
        f"full prompts, {size} rows at a time": chosen(
            lambda p, c: in_full(model, p, c, pad, size)
        ),
        "one candidate at a time": chosen(lambda p, c: in_full(model, p, c, pad, 1)),
    }
    with torch.no_grad():
        shared, full, single = (way() for way in ways.values())
        for other in (full, single):
            for one, two in zip(shared, other, strict=True):
                assert max(abs(a - b) for a, b in zip(one, two, strict=True)) < 1e-3
        show(rates(ways, dict.fromkeys(ways, len(records)), options.rounds))
        few = max(4, size // 4)  # alone, these take long enough
        ways = {f"generate, batch {size}": written(size, len(records)), "batch 1": written(1, few)}
        together, alone = (way() for way in ways.values())
        assert together[:few] == alone
        show(rates(ways, dict(zip(ways, (len(records), few), strict=True)), options.rounds))


def show(found: dict[str, float]) -> None:
    (first, fastest), *_ = found.items()
    for name, rate in found.items():
        ratio = "" if name == first else f"; {first} is {fastest / rate:.2f} times as fast"
        print(f"{name}: {rate:.2f} items/s{ratio}")


if __name__ == "__main__":
    main()
