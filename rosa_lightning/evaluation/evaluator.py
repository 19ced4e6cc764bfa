"""One pass over test prompts: answers written or chosen, and how right they are.

Axes: B batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

import torch
from torch import Tensor

from rosa_lightning.data.text_info import TextInfo
from rosa_lightning.evaluation.generation import Sampling, generate
from rosa_lightning.evaluation.likelihood import log_likelihoods
from rosa_lightning.evaluation.metrics import TaskCounts
from rosa_lightning.evaluation.results import Score, averages, scores_of
from rosa_lightning.models.vocabulary import num_embeddings, padding_id
from rosa_lightning.tasks.records import (
    Rules,
    Task,
    extract_answer,
    needs_end,
    same_answer,
    scored_as,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Protocol = Literal["generate", "likelihood"]
Items = list[dict[str, Any]]

_UNKNOWN_TEXT = TextInfo()
_ASKED = ("source", "index", "task", "prompt", "input")
"""What an answer's record says of its question."""


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """How ``test`` finds and reads answers."""

    protocols: tuple[Protocol, ...] = ("generate",)
    """``generate``: the model writes, and the answer is read out of its text. ``likelihood``: of
    the task's candidate answers the likeliest is taken; tasks without candidates are left out. Both
    are reported side by side; their numbers do not compare."""
    max_new_tokens: int = 256
    """Longest answer written by ``test`` and ``predict``, in tokens."""
    num_beams: int = 1
    """Beams of ``generate``; 1 is greedy."""
    temperature: float = 0.0
    """Of ``predict``: divides the logits before tokens are drawn; 0 takes the likeliest token, as
    ``test`` always does."""
    top_p: float = 1.0
    """Of ``predict``: tokens are drawn from the likeliest that hold this probability together."""
    rules: Rules = "strict"
    """How ``generate`` reads texts: ``strict``, the last stated answer, or ``paper``, as
    LLM-Adapters does, so that numbers compare with those of papers."""
    length_normalized: bool = False
    """Divide each candidate's log-likelihood by its number of tokens."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "protocols", tuple(dict.fromkeys(self.protocols)))
        if not self.protocols or not set(self.protocols) <= set(get_args(Protocol)):
            raise ValueError(
                f"protocols={list(self.protocols)}; expected {' or '.join(get_args(Protocol))}, or "
                "both. Set model.evaluation.protocols."
            )
        for name, usual in (("max_new_tokens", "256 is usual"), ("num_beams", "1 is greedy")):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(
                    f"{name}={value} is not a whole number of at least 1. Set "
                    f"model.evaluation.{name}; {usual}."
                )
        Sampling(self.temperature, self.top_p)  # which checks them
        if self.rules not in get_args(Rules):
            raise ValueError(
                f"rules={self.rules!r}; there are {' and '.join(get_args(Rules))}. Set "
                "model.evaluation.rules."
            )


class Evaluation:
    """One pass over test prompts, under one or more protocols.

    Args:
        model: The causal language model, in evaluation mode.
        tokenizer: The tokenizer that the prompts were encoded with.
        config: How answers are found and read.
        text: What the data module says of tasks, prompts and responses.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        config: EvaluationConfig,
        text: TextInfo = _UNKNOWN_TEXT,
    ) -> None:
        self.model, self.tokenizer, self.config = model, tokenizer, config
        self.text = text
        # Papers read all that was written, a made-up next instruction included.
        self.stop = text.next_prompt if config.rules == "strict" else ()
        self.answered: Mapping[tuple[Any, ...], dict[str, Any]] = {}
        """Items of a stopped run of this evaluation, by `item_id`."""
        self.scores: list[Score] = []
        """Of all ranks, after `compute`."""
        names = text.task_names
        self._counts = {one: TaskCounts(names).to(model.device) for one in config.protocols}
        self._encode = cache(text.encode_response or self._tokenized)

    def step(self, batch: dict[str, Any]) -> Items:
        """Answer a batch of prompts and count what is right.

        Returns:
            A record for each prompt and protocol: ``response`` is the text written or chosen,
            ``answer`` what it states, ``correct`` whether that is the ``reference``. Candidates
            come with their ``scores``, in nats.
        """
        items: Items = []
        for protocol in self.config.protocols:
            rows = [
                row
                for row in range(len(batch["task"]))
                if protocol == "generate" or _cell(batch, "candidates", row)
            ]
            own = self._answers(protocol, batch, rows) if rows else []
            flags = [[item["correct"], item["answer"] is None] for item in own]
            flags_B2 = torch.tensor(flags, dtype=torch.bool, device=self.model.device).view(-1, 2)
            self._counts[protocol].update(list(map(self._name, own)), *flags_B2.unbind(1))
            items += own
        return items

    def _answers(self, protocol: Protocol, batch: dict[str, Any], rows: Sequence[int]) -> Items:
        asked: Items = [
            {"protocol": protocol, **_question(batch, row)}
            | {"reference": _cell(batch, "reference", row)}
            for row in rows
        ]
        known = [self.answered.get(item_id(one), {}) for one in asked]
        if all(one.items() <= old.items() for one, old in zip(asked, known, strict=True)):
            return known
        # The whole batch, as the run that was stopped would have: in low precision an answer may
        # depend on its neighbours.
        found = self._generate(batch) if protocol == "generate" else self._choose(batch, rows)
        for one, own in zip(asked, found, strict=True):
            one |= own
            one["correct"] = same_answer(self._task(one["task"]), one["answer"], one["reference"])
        return asked

    def _generate(self, batch: dict[str, Any]) -> Items:
        texts = generate(
            self.model,
            self.tokenizer,
            batch,
            self.config.max_new_tokens,
            num_beams=self.config.num_beams,
            stop=self.stop,
            stop_ids=self.text.stop_ids,
        )
        return [
            {"response": text, "answer": extract_answer(self._task(task), text, self.config.rules)}
            for task, text in zip(batch["task"], texts, strict=True)
        ]

    def _choose(self, batch: dict[str, Any], rows: Sequence[int]) -> Items:
        masks, prompts = batch["attention_mask"].bool(), batch["input_ids"]
        choices = [batch["candidates"][row] for row in rows]
        ids = [[self._encode(text, needs_end(own)) for text in own] for own in choices]
        scores = log_likelihoods(
            self.model,
            [prompts[row][masks[row]].tolist() for row in rows],
            ids,
            padding_id(self.tokenizer, num_embeddings(self.model)),
        )
        found = []
        for row, texts, tokens, own in zip(rows, choices, ids, scores, strict=True):
            if self.config.length_normalized:
                own = [score / len(one) for score, one in zip(own, tokens, strict=True)]
            chosen = texts[own.index(max(own))]
            answer = extract_answer(self._task(batch["task"][row]), chosen)
            choice = {"response": chosen, "answer": answer}
            found.append({**choice, "candidates": list(texts), "scores": own})
        return found

    def _name(self, item: Mapping[str, Any]) -> str:
        name = scored_as(item["task"], str(item["source"]))
        return name if name in self.text.task_names else cast("str", item["task"])

    def _task(self, name: str) -> Task | str:
        return self.text.tasks.get(name, name)

    def _tokenized(self, text: str, end: bool) -> list[int]:
        ids = cast("list[int]", self.tokenizer(text, add_special_tokens=False)["input_ids"])
        return [*ids, cast("int", self.tokenizer.eos_token_id)] if end else ids

    def compute(self) -> dict[str, float]:
        """Shares over all ranks, which all must call this; `scores` are there afterwards.

        Returns:
            Of ``generate`` under ``accuracy``, ``accuracy/<task>``, ``macro_accuracy/<group>``,
            ``format_failures`` and ``format_failures/<task>``, a source of no task by its own
            name; of ``likelihood`` under the same names after ``likelihood/``.
        """
        shares: dict[str, float] = {}
        self.scores = []
        for protocol, metric in self._counts.items():
            counts = metric.compute()
            own = scores_of(protocol, counts)
            self.scores += own
            prefix = "" if protocol == "generate" else f"{protocol}/"
            names = {"accuracy": 1} if prefix else {"accuracy": 1, "format_failures": 2}
            for name, column in names.items() if counts else ():
                total, hits = (sum(row[i] for row in counts.values()) for i in (0, column))
                shares[f"{prefix}{name}"] = hits / total
                for task, row in counts.items():
                    shares[f"{prefix}{name}/{task}"] = row[column] / row[0]
            for average in averages(own):
                if average.group != "all":
                    shares[f"{prefix}macro_accuracy/{average.group}"] = average.macro_accuracy
        return shares


def item_id(item: Mapping[str, Any]) -> tuple[Any, ...]:
    """What tells an answer from all others of an evaluation."""
    return item["protocol"], item["source"], item["index"]


def _cell(batch: Mapping[str, Any], name: str, row: int) -> Any:
    """One row's value of a batch's column; None if the batch has no such column."""
    column = batch.get(name)
    value = None if column is None else column[row]
    return value.item() if isinstance(value, Tensor) else value


def _question(batch: Mapping[str, Any], row: int) -> dict[str, Any]:
    return {name: _cell(batch, name, row) for name in _ASKED}


def predictions(batch: Mapping[str, Any], texts: Sequence[str], tasks: Mapping[str, Task]) -> Items:
    """A record for each text that was written to a batch of prompts, in the batch's order.

    Returns:
        source, index, task, prompt and input (what is asked), response (the text written) and
        answer (what the task's format finds in it, or None).
    """
    answers = [
        extract_answer(tasks.get(task, task), text)
        for task, text in zip(batch["task"], texts, strict=True)
    ]
    return [
        {**_question(batch, row), "response": text, "answer": answer}
        for row, (text, answer) in enumerate(zip(texts, answers, strict=True))
    ]
