"""Evaluations of SmolLM2-135M-Instruct for `speed.py`: the same questions by other tools.

All are asked in float32, in batches of 32 of like length, the longest first. Ways take turns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from harness_tasks import row_of
from timing import Figure, in_turn, ratios

from rosa_lightning import ReasoningDataModule
from rosa_lightning.evaluation.generation import generate
from rosa_lightning.evaluation.likelihood import log_likelihoods
from rosa_lightning.models.loading import load_base, load_tokenizer

OURS, PLAIN, HARNESS = "ours", "transformers, generate", "lm-evaluation-harness"
BATCH_SIZE = 32


def asked(options: Any, task: str, style: str) -> tuple[list[dict[str, Any]], ReasoningDataModule]:
    path = options.data / "test" / f"{task}.json"
    data = ReasoningDataModule(
        test_sources=[{"name": task, "path": str(path), "max_examples": options.questions}],
        tokenizer="smollm2",
        batch_size=BATCH_SIZE,
        prompt_style=style,
    )
    data.setup("test")
    return list(data.test_dataloader()), data


def texts_of(batch: dict[str, Any], tokenizer: Any) -> list[str]:
    """The prompts with all that the style adds."""
    pairs = zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True)
    return [tokenizer.decode(row[mask]) for row, mask in pairs]


def harness(model: Any, tokenizer: Any, kind: str, given: list[tuple[str, Any]]) -> list[Any]:
    """What lm-evaluation-harness answers to its own kind of requests."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    tool = HFLM(model, tokenizer=tokenizer, batch_size=BATCH_SIZE, device="cpu")
    requests = [Instance(kind, {}, arguments, number) for number, arguments in enumerate(given)]
    answers: list[Any] = getattr(tool, kind)(requests, disable_tqdm=True)
    return answers


def measured(
    ways: dict[str, Callable[[], list[Any]]], options: Any, count: int, bars: dict[str, float]
) -> tuple[dict[str, Any], list[Figure]]:
    """Items a second of each way, and what it answers beside what ours does."""
    answers: dict[str, list[Any]] = {}

    def kept(name: str, way: Callable[[], list[Any]]) -> Callable[[], None]:
        return lambda: answers.update({name: way()})

    with torch.inference_mode():
        told = {name: kept(name, way) for name, way in ways.items()}
        seconds = in_turn(told, options.rounds, warm_up=0)
    rows, figures = {}, []
    for name, values in seconds.items():
        same = [one == other for one, other in zip(answers[OURS], answers[name], strict=True)]
        rows[name] = {
            "items_per_s": [count / value for value in values],
            "ours_over_it": ratios(values, seconds[OURS]),
            "same_answers": sum(same) / count,
        }
        if name in bars:
            figures.append(Figure(f"times {name}", rows[name]["ours_over_it"], bars[name], False))
    return rows, figures


def generated(options: Any, task: str) -> dict[str, Any]:
    """Greedy answers with the chat template, up to so many tokens."""
    model, tokenizer = load_base("smollm2").float().eval(), load_tokenizer("smollm2")
    batches, data = asked(options, task, "chat")
    text, longest = data.text_info, options.new_tokens
    ends = {"stop": text.next_prompt, "stop_ids": text.stop_ids}

    def plain() -> list[str]:
        answers: list[str] = []
        for batch in batches:
            ids_BT = batch["input_ids"]
            output = model.generate(
                input_ids=ids_BT,
                attention_mask=batch["attention_mask"],
                max_new_tokens=longest,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
            )
            new = output[:, ids_BT.shape[1] :]
            answers += tokenizer.batch_decode(new, skip_special_tokens=True)
        return answers

    prompts = [text for batch in batches for text in texts_of(batch, tokenizer)]
    settings = {"until": [tokenizer.eos_token], "max_gen_toks": longest, "do_sample": False}
    given = [(prompt, settings) for prompt in prompts]
    ways = {
        OURS: lambda: [
            answer
            for batch in batches
            for answer in generate(model, tokenizer, batch, longest, **ends)
        ],
        PLAIN: plain,
        HARNESS: lambda: harness(model, tokenizer, "generate_until", given),
    }
    rows, figures = measured(ways, options, len(given), {PLAIN: 1.5})
    setting = {"questions": len(given), "new_tokens": longest, "rounds": options.rounds}
    return {"setting": setting, "rows": rows, "figures": figures}


def likelihood(options: Any, task: str, what: str) -> dict[str, Any]:
    """The likeliest of the candidate answers, which are labels that a prompt lists, or texts."""
    model, tokenizer = load_base("smollm2").float().eval(), load_tokenizer("smollm2")
    batches, _ = asked(options, task, "alpaca")
    candidates = [
        [choices(batch, row, what) for row in range(len(batch["task"]))] for batch in batches
    ]
    given = [
        (prompt, text)
        for batch, rows in zip(batches, candidates, strict=True)
        for prompt, texts in zip(texts_of(batch, tokenizer), rows, strict=True)
        for text in texts
    ]

    def ids(text: str) -> list[int]:
        found: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return found

    def ours() -> list[int]:
        chosen = []
        for batch, rows in zip(batches, candidates, strict=True):
            pairs = zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True)
            prompts = [row[mask].tolist() for row, mask in pairs]
            encoded = [[ids(text) for text in texts] for texts in rows]
            scores = log_likelihoods(model, prompts, encoded, tokenizer.pad_token_id)
            chosen += [own.index(max(own)) for own in scores]
        return chosen

    def theirs() -> list[int]:
        scores = iter([score for score, _ in harness(model, tokenizer, "loglikelihood", given)])
        found = [[next(scores) for _ in texts] for rows in candidates for texts in rows]
        return [own.index(max(own)) for own in found]

    count = sum(map(len, candidates))
    rows, figures = measured({OURS: ours, HARNESS: theirs}, options, count, {HARNESS: 3.0})
    setting = {"questions": count, "candidates": len(given), "rounds": options.rounds}
    return {"setting": setting, "rows": rows, "figures": figures}


def choices(batch: dict[str, Any], row: int, what: str) -> list[str]:
    if what == "labels":
        return list(batch["candidates"][row])
    record = {"instruction": batch["prompt"][row], "answer": batch["reference"][row]}
    texts: list[str] = row_of(record)["choices"]["text"]
    return texts
