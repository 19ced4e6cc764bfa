"""Answers of a model, written or chosen, and how right they are.

Axes: B batch, T tokens.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

import torch
from torch import Tensor
from torchmetrics import MetricCollection

from rosa_lightning.evaluation.generation import write_greedily
from rosa_lightning.evaluation.likelihood import log_likelihoods
from rosa_lightning.evaluation.metrics import (
    AccuracyInterval,
    FormatFailures,
    TaskAccuracy,
    TaskCount,
)
from rosa_lightning.evaluation.results import Score, averages, scores_of, versions
from rosa_lightning.models.vocabulary import num_embeddings, padding_id
from rosa_lightning.tasks.records import (
    TASKS,
    Record,
    Rules,
    Task,
    candidates,
    extract_answer,
    needs_end,
    reference,
    same_answer,
    task_of,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Protocol = Literal["generate", "likelihood"]

NEXT_EXERCISE = {"alpaca": ("### Instruction:",)}
"""By template: what a model writes when it has answered and makes up the next exercise."""


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """How ``test`` finds and reads answers."""

    protocols: tuple[Protocol, ...] = ("generate",)
    """``generate``: the model writes, and the answer is read out of its text. ``likelihood``: of
    the task's candidate answers the likeliest is taken; tasks without candidates are left out. Both
    are reported side by side; their numbers do not compare."""
    num_beams: int = 1
    """Beams of ``generate``; 1 is greedy."""
    rules: Rules = "strict"
    """How ``generate`` reads texts: ``strict``, the last stated answer, or ``paper``, as
    LLM-Adapters does, so that numbers compare with those of papers."""
    length_normalized: bool = False
    """Divide each candidate's log-likelihood by its number of tokens."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "protocols", tuple(self.protocols))
        known = get_args(Protocol)
        wrong = [name for name in self.protocols if name not in known]
        if wrong or not self.protocols or len(set(self.protocols)) < len(self.protocols):
            raise ValueError(
                f"protocols={list(self.protocols)}; expected {' or '.join(known)}, or both, each "
                "once. Set model.evaluation.protocols."
            )
        if not isinstance(self.num_beams, int) or self.num_beams < 1:
            raise ValueError(
                f"num_beams={self.num_beams} is not a whole number of at least 1. Set "
                "model.evaluation.num_beams; 1 is greedy."
            )
        if self.rules not in get_args(Rules):
            raise ValueError(
                f"rules={self.rules!r}; there are {' and '.join(get_args(Rules))}. Set "
                "model.evaluation.rules."
            )


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batch: dict[str, Any],
    max_new_tokens: int,
    *,
    num_beams: int = 1,
    stop: Sequence[str] = (),
    stop_ids: Sequence[int] = (),
) -> list[str]:
    """Continuations of left-padded prompts, without special tokens, greedy or by beam search.

    Each row ends by itself: at an end-of-sequence token of the tokenizer or the model, or where a
    text of ``stop`` begins.

    Args:
        model: The causal language model, in evaluation mode.
        tokenizer: Its tokenizer.
        batch: ``input_ids`` and ``attention_mask``, shape (B, T).
        max_new_tokens: Longest continuation, in tokens.
        num_beams: Beams of the search; 1 is greedy.
        stop: Texts that are not part of a continuation, nor is what follows them.
        stop_ids: Tokens that end a continuation, besides those of tokenizer and model.
    """
    own: Any = model.generation_config
    ends = _ends(list(stop_ids), tokenizer.eos_token_id, own.eos_token_id)
    longest = max((len(text.encode()) for text in stop), default=0) + 4

    def stopped(ids: Sequence[int]) -> bool:
        """Whether a text of ``stop`` stands at the end; a token holds a byte of it at least."""
        tail = str(tokenizer.decode(list(ids[-longest:]))) if stop else ""
        return any(text in tail for text in stop)

    new = None
    if num_beams == 1:
        masks = batch["attention_mask"].bool()
        prompts = [ids[mask].tolist() for ids, mask in zip(batch["input_ids"], masks, strict=True)]
        pad_id = padding_id(tokenizer, num_embeddings(model))
        new = write_greedily(model, prompts, max_new_tokens, pad_id, ends=ends, has_ended=stopped)
    if new is None:
        new = _search(model, tokenizer, batch, max_new_tokens, num_beams, ends, stopped)
    texts = list(tokenizer.batch_decode(new, skip_special_tokens=True))
    for end in stop:
        texts = [text.split(end, 1)[0] for text in texts]
    return texts


def _search(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batch: dict[str, Any],
    max_new_tokens: int,
    num_beams: int,
    ends: list[int],
    stopped: Callable[[Sequence[int]], bool],
) -> Any:
    """Continuations as `transformers` writes them, for beams and for any kind of model."""
    from transformers import GenerationConfig

    config = GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=False,
        num_beams=num_beams,
        max_new_tokens=max_new_tokens,
        pad_token_id=padding_id(tokenizer, num_embeddings(model)),
        eos_token_id=ends or None,
    )
    width = batch["input_ids"].shape[1]

    def row_by_row(ids_BT: Tensor, scores: Any, **_: Any) -> Tensor:
        return torch.tensor(
            [stopped(ids) for ids in ids_BT[:, width:].tolist()], device=ids_BT.device
        )

    # What a call leaves unset `transformers` takes from the model's own settings: sampling and
    # penalties that would change the answer.
    own, model.generation_config = model.generation_config, config
    try:
        output = cast("Any", model).generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            stopping_criteria=[row_by_row],
        )
    finally:
        model.generation_config = own
    return output[:, width:]


def _ends(*token_ids: int | list[int] | None) -> list[int]:
    """All of these tokens, each once."""
    found = [one for ids in token_ids for one in (ids if isinstance(ids, list) else [ids])]
    return list(dict.fromkeys(one for one in found if one is not None))


class Evaluation:
    """One pass over test prompts, under one or more protocols.

    Args:
        model: The causal language model, in evaluation mode.
        tokenizer: The tokenizer that the prompts were encoded with.
        config: How answers are found and read.
        max_new_tokens: Longest answer, in tokens.
        tasks: Names of all tasks, the same on every rank.
        known_tasks: The tasks by name, a user's own among them.
        template: Of the prompts, if that is known.
        stop_ids: Tokens that end an answer, beside those that tokenizer and model name.
        made_with: Whatever else the answers depend on, as values that JSON holds.
        encode_response: Makes token ids of a response, as they follow a prompt, with what ends it
            or without; by default the tokenizer, and EOS.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        config: EvaluationConfig,
        max_new_tokens: int,
        *,
        tasks: Sequence[str],
        known_tasks: Mapping[str, Task] = TASKS,
        template: str | None = None,
        stop_ids: Sequence[int] = (),
        made_with: Mapping[str, Any] | None = None,
        encode_response: Callable[[str, bool], list[int]] | None = None,
    ) -> None:
        self.model, self.tokenizer, self.config = model, tokenizer, config
        self.max_new_tokens = max_new_tokens
        self.known_tasks, self.stop_ids = known_tasks, tuple(stop_ids)
        # Papers read all that was written, the next exercise included.
        strict = config.rules == "strict" and template is not None
        self.stop = NEXT_EXERCISE.get(str(template), ()) if strict else ()
        asked = {name: known_tasks[name] for name in tasks if name in known_tasks}
        kinds = {name: [task.format, task.labels, task.response] for name, task in asked.items()}
        settings = [kinds, config.num_beams, config.rules, config.length_normalized, max_new_tokens]
        self.digest = _digest([settings, template, made_with, versions()])
        """Of all that decides the answer to a prompt; equal for equal evaluations."""
        self.answered: Mapping[str, dict[str, Any]] = {}
        """Answers of an earlier run of this evaluation, by ``key``."""
        self.scores: list[Score] = []
        """Of all ranks, after `compute`."""
        self._metrics = {name: _metrics(name, tasks).to(model.device) for name in config.protocols}
        self._encode = encode_response or self._tokenized
        self._candidate_ids: dict[tuple[str, bool], list[int]] = {}

    def step(self, batch: dict[str, Any]) -> list[dict[str, Any]]:
        """Answer a batch of prompts and count what is right.

        Returns:
            A record for each prompt and protocol: ``response`` is the text written or chosen,
            ``answer`` what it states, ``correct`` whether that is the ``reference``. Candidates
            come with their ``scores``, in nats. ``key`` stands for all that the answer depends on.
        """
        items: list[dict[str, Any]] = []
        for protocol in self.config.protocols:
            rows = [
                row
                for row in range(len(batch["task"]))
                if protocol == "generate" or _of(batch, "candidates", row)
            ]
            own = self._answers(protocol, batch, rows) if rows else []
            self._count(protocol, own)
            items += own
        return items

    def _answers(
        self, protocol: Protocol, batch: dict[str, Any], rows: Sequence[int]
    ) -> list[dict[str, Any]]:
        asked = [self._asked(protocol, batch, row) for row in rows]
        known = [self.answered.get(one["key"]) for one in asked]
        if all(known):
            return [one for one in known if one]
        # The whole batch, as the run that was stopped would have: in low precision an answer may
        # depend on its neighbours.
        found = self._write(batch) if protocol == "generate" else self._choose(batch, rows)
        for one, own in zip(asked, found, strict=True):
            one |= own
            one["correct"] = same_answer(self._task(one["task"]), one["answer"], one["reference"])
        return [old or new for old, new in zip(known, asked, strict=True)]

    def _asked(self, protocol: Protocol, batch: dict[str, Any], row: int) -> dict[str, Any]:
        """What is known of an item before it is answered."""
        ids = batch["input_ids"][row][batch["attention_mask"][row].bool()].tolist()
        names = ("source", "index", "task", "prompt", "input", "reference")
        asked = {"protocol": protocol, **{name: _of(batch, name, row) for name in names}}
        choices = _of(batch, "candidates", row) or () if protocol == "likelihood" else ()
        return {**asked, "key": _digest([self.digest, asked, self._ids(choices), ids])}

    def _write(self, batch: dict[str, Any]) -> list[dict[str, Any]]:
        texts = generate(
            self.model,
            self.tokenizer,
            batch,
            self.max_new_tokens,
            num_beams=self.config.num_beams,
            stop=self.stop,
            stop_ids=self.stop_ids,
        )
        return [
            {"response": text, "answer": extract_answer(self._task(task), text, self.config.rules)}
            for task, text in zip(batch["task"], texts, strict=True)
        ]

    def _choose(self, batch: dict[str, Any], rows: Sequence[int]) -> list[dict[str, Any]]:
        masks, prompts = batch["attention_mask"].bool(), batch["input_ids"]
        choices = [batch["candidates"][row] for row in rows]
        ids = [self._ids(own) for own in choices]
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
            chosen = texts[max(range(len(own)), key=own.__getitem__)]
            answer = extract_answer(self._task(batch["task"][row]), chosen)
            found.append(
                {
                    "response": chosen,
                    "answer": answer,
                    "candidates": list(texts),
                    "scores": own,
                }
            )
        return found

    def _task(self, name: str) -> Task | str:
        return self.known_tasks.get(name, name)

    def _ids(self, candidates: Sequence[str]) -> list[list[int]]:
        """Tokens of candidates, as responses are encoded in training."""
        # Of two candidates of which one begins the other, the shorter would always win.
        end = needs_end(candidates)
        for text in candidates:
            if (text, end) not in self._candidate_ids:
                self._candidate_ids[text, end] = self._encode(text, end)
        return [self._candidate_ids[text, end] for text in candidates]

    def _tokenized(self, text: str, end: bool) -> list[int]:
        ids = cast("list[int]", self.tokenizer(text, add_special_tokens=False)["input_ids"])
        return [*ids, *([cast("int", self.tokenizer.eos_token_id)] if end else [])]

    def _count(self, protocol: Protocol, items: Sequence[dict[str, Any]]) -> None:
        def flags(values: Iterable[bool]) -> Tensor:
            return torch.tensor(list(values), dtype=torch.bool, device=self.model.device)

        self._metrics[protocol].update(
            tasks=[item["task"] for item in items],
            correct=flags(item["correct"] for item in items),
            stated=flags(item["answer"] is not None for item in items),
        )

    def compute(self) -> dict[str, Tensor]:
        """Shares over all ranks, which all must call this; `scores` are there afterwards.

        Returns:
            Of ``generate`` under ``accuracy``, ``accuracy/<task>``, ``macro_accuracy/<group>``,
            ``format_failures`` and ``format_failures/<task>``; of ``likelihood`` under the same
            names after ``likelihood/``.
        """
        shares: dict[str, Tensor] = {}
        self.scores = []
        for protocol, metrics in self._metrics.items():
            values = metrics.compute()
            own = scores_of(protocol, values)
            self.scores += own
            prefix = "" if protocol == "generate" else f"{protocol}/"
            named = {name: v for name, v in values.items() if name.startswith(("acc", "form"))}
            for average in averages(own):
                if average.group != "all":
                    macro = torch.tensor(average.macro_accuracy, device=self.model.device)
                    named[f"macro_accuracy/{average.group}"] = macro
            shares |= {f"{prefix}{name}": value for name, value in named.items()}
        return shares


def _metrics(protocol: Protocol, tasks: Sequence[str]) -> MetricCollection:
    kinds: list[Any] = [TaskAccuracy, AccuracyInterval, TaskCount]
    if protocol == "generate":  # a candidate always states an answer
        kinds.append(FormatFailures)
    return MetricCollection({kind.name: kind(tasks) for kind in kinds})


def _of(batch: Mapping[str, Any], name: str, row: int) -> Any:
    """One row's value of a batch's column, if it has the column."""
    column = batch.get(name)
    value = None if column is None else column[row]
    return value.item() if isinstance(value, Tensor) else value


def _digest(content: Any) -> str:
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """A digest of named tensors: equal for equal names, shapes and values."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        value = weights[name].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]


def check_exercises(
    exercises: Iterable[tuple[Record, int]], config: EvaluationConfig, context: int | None
) -> list[str]:
    """Check before a base is loaded that each test record can be answered as it is asked.

    Args:
        exercises: Each record, with the number of its prompt's tokens.
        config: How they will be answered.
        context: Most tokens that the base reads, if it says so.

    Returns:
        Tasks that ``likelihood`` leaves out, for they have no candidates.

    Raises:
        ValueError: Names task, record and source of the first that cannot, and how to mend it.
    """
    without: dict[str, bool] = {}
    for record, length in exercises:
        where = f"task {record.task}: record {record.index} of source {record.source}"
        if context is not None and length >= context:
            raise ValueError(
                f"{where} has a prompt of {length} tokens, and model.base reads {context} at most, "
                f"answers included. Set data.max_length below {context} to cut the prompt's "
                "beginning, or take the record out."
            )
        if "likelihood" in config.protocols:
            try:
                texts = candidates(record)
            except ValueError as error:
                raise ValueError(f"{where}: {error}. Mend the record, or take it out.") from error
            without[record.task] = without.get(record.task, True) and not texts
            _check_candidates(record, texts, where)
    left_out = [task for task, empty in without.items() if empty]
    if left_out and len(left_out) == len(without) and config.protocols == ("likelihood",):
        raise ValueError(
            f"no task of data.test_sources ({', '.join(left_out)}) has candidates to choose from. "
            "Set model.evaluation.protocols to [generate]."
        )
    return left_out


def _check_candidates(record: Record, texts: Sequence[str], where: str) -> None:
    twice = [text for text in texts if texts.count(text) > 1]
    if twice:
        raise ValueError(f"{where} has the candidate {twice[0]!r} twice. Give each once.")
    gold = reference(record)
    if texts and not any(
        same_answer(task_of(record), extract_answer(task_of(record), text), gold) for text in texts
    ):
        raise ValueError(
            f"{where} has the answer {gold!r}, and none of its candidates states it: "
            f"{', '.join(map(repr, texts))}. Mend the record, or take it out."
        )
