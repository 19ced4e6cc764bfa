"""What `RoSAModule` does in ``test`` and ``predict``."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, cast

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from rosa_lightning.adapters.metadata import (
    BaseFingerprint,
    Conditions,
    contradictions,
    tokenizer_digest,
)
from rosa_lightning.evaluation.evaluator import (
    Evaluation,
    EvaluationConfig,
    check_test_records,
)
from rosa_lightning.evaluation.generation import generate
from rosa_lightning.models.loading import Dtype, context_length, whole_name
from rosa_lightning.models.quantization import Quantization
from rosa_lightning.tasks.records import TASKS, extract_answer
from rosa_lightning.training.sharding import is_sharded

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Answering(LightningModule, ABC):
    """The hooks of ``test`` and ``predict``, and what they need of the module."""

    base: str
    adapter: str | None
    revision: str | None
    dtype_of_base: Dtype
    quantization: Quantization | None
    attn_implementation: str | None
    trust_remote_code: bool
    max_new_tokens: int
    evaluation: EvaluationConfig
    identity: BaseFingerprint | None
    trained_under: Conditions | None = None
    """Of the checkpoint or adapter that was loaded, if it says so."""
    evaluated: Evaluation | None = None
    """The last test, with its scores."""
    _written: Evaluation | None = None
    """Answers written in the validation at hand."""

    @property
    @abstractmethod
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The base's tokenizer."""

    @abstractmethod
    def _built(self) -> PreTrainedModel:
        """The adapted model, made if it is not there yet."""

    def setup(self, stage: str) -> None:
        """Refuse, before a model is loaded, what cannot be answered.

        With a model in shards nothing can: ranks finish at different lengths, and would wait for
        each other's shards forever.
        """
        if stage in ("test", "predict") and is_sharded(self.trainer.strategy):
            raise ValueError(
                f"{self.trainer.strategy.__class__.__name__} cannot write answers: their lengths "
                "differ from rank to rank, and ranks with shards go in step. Set trainer.strategy "
                "to auto or ddp, and --ckpt_path to a full checkpoint."
            )
        if stage == "test":
            self._check_exercises()
        elif stage in ("fit", "validate"):
            self._check_length()

    def _check_length(self) -> None:
        longest = getattr(getattr(self.trainer, "datamodule", None), "max_length", None)
        context = context_length(
            self.base, revision=self.revision, trust_remote_code=self.trust_remote_code
        )
        if longest is not None and context is not None and longest > context:
            rank_zero_warn(
                f"data.max_length={longest} is beyond the {context} tokens that model.base reads: "
                "longer records would stand at positions that it does not know. Set "
                f"data.max_length to {context} or less."
            )

    def _check_exercises(self) -> None:
        examples = getattr(getattr(self.trainer, "datamodule", None), "test_examples", [])
        exercises = ((example.record, len(example.prompt)) for example in examples)
        context = context_length(
            self.base, revision=self.revision, trust_remote_code=self.trust_remote_code
        )
        for task in check_test_records(exercises, self.evaluation, context):
            rank_zero_info(f"likelihood leaves out {task}: it has no candidates to choose from.")

        lengths = [len(example.prompt) for example in examples]
        short = sum(length + self.max_new_tokens > (context or math.inf) for length in lengths)
        if short and "generate" in self.evaluation.protocols:
            rank_zero_warn(
                f"{short} of {len(lengths)} test prompts leave fewer than max_new_tokens="
                f"{self.max_new_tokens} of the {context} tokens that model.base reads. Lower "
                "model.max_new_tokens, or data.max_length to cut them."
            )

    def conditions(self) -> Conditions:
        """What this run reads and writes with, beside weights and RoAE."""
        datamodule = getattr(self.trainer, "datamodule", None)
        name = getattr(datamodule, "tokenizer", None)
        tokenizer = getattr(datamodule, "text_tokenizer", None)
        return Conditions(
            template=getattr(datamodule, "prompt_style", None),
            max_length=getattr(datamodule, "max_length", None),
            tokenizer=whole_name(name) if isinstance(name, str) else None,
            tokenizer_digest=None if tokenizer is None else tokenizer_digest(tokenizer),
            precision=str(self.trainer.precision),
            dtype=self.dtype_of_base,
            quantization=self.quantization,
        )

    def warn_of_other_conditions(self) -> None:
        """Say, once, what this run does otherwise than the training of what was loaded."""
        trained, self.trained_under = self.trained_under, None
        if trained is None:
            return
        here = self.conditions()
        known, given = trained.settings(), here.settings()
        if trained.dtype is not None:  # then no quantization is known, too
            known["model.quantization"] = trained.quantization
            given["model.quantization"] = here.quantization
        lines = contradictions(known, given, "the adapter")
        if None not in (here.tokenizer_digest, trained.tokenizer_digest) and (
            here.tokenizer_digest != trained.tokenizer_digest
        ):
            was = trained.tokenizer or "the base's own"
            lines.append(
                f"data.tokenizer is {here.tokenizer or 'the tokenizer of the base'}, and the "
                f"adapter was trained with another one ({was}, or that as it was then): it reads "
                "other tokens or another chat template. Set data.tokenizer to that one."
            )
        for line in lines:
            rank_zero_warn(line)

    def on_predict_start(self) -> None:
        """Say what differs from the training."""
        self.warn_of_other_conditions()

    def on_test_start(self) -> None:
        """Get ready to answer and to count, under each protocol."""
        self.warn_of_other_conditions()
        self.evaluated = self._new_evaluation(self.evaluation)

    def _new_evaluation(self, config: EvaluationConfig) -> Evaluation:
        datamodule = getattr(self.trainer, "datamodule", None)
        return Evaluation(
            self._built(),
            self._text_tokenizer(),
            config,
            self.max_new_tokens,
            tasks=self._task_names(),
            known_tasks=getattr(datamodule, "tasks", TASKS),
            template=getattr(datamodule, "prompt_style", None),
            stop_ids=getattr(datamodule, "stop_ids", ()),
            encode_response=getattr(datamodule, "response_ids", None),
        )

    def _write_answers(self, prompts: dict[str, Any] | None) -> None:
        """Write and count the answers to some validation prompts.

        A model in shards cannot: ranks would finish at different lengths.
        """
        if is_sharded(self.trainer.strategy):
            return
        if self._written is None:  # on every rank at its first batch, with prompts or without
            self._written = self._new_evaluation(replace(self.evaluation, protocols=("generate",)))
        self._written.step({"task": []} if prompts is None else prompts)

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        """Answer each prompt under each protocol.

        Returns:
            Under ``items``, what `Evaluation.step` does.
        """
        return {"items": cast(Evaluation, self.evaluated).step(batch)}

    def on_test_epoch_end(self) -> None:
        """Log ``test/accuracy``, ``test/accuracy/<task>`` and what else `Evaluation` counts."""
        for name, value in cast(Evaluation, self.evaluated).compute().items():
            # Of all ranks already; said again, or Lightning warns.
            self.log(f"test/{name}", value, prog_bar=name == "accuracy", sync_dist=True)

    def about_evaluation(self) -> dict[str, Any]:
        """What was evaluated and how, as plain values, for ``results.json``."""
        added, here = self._is_adapted(), self.conditions()
        origin = self.trainer.ckpt_path or self.adapter or "an adapter trained in this process"
        datamodule = getattr(self.trainer, "datamodule", None)
        return {
            "model": f"{self.base} + {origin}" if added else f"{self.base}, without an adapter",
            "base": self.base,
            "revision": cast(BaseFingerprint, self.identity).revision,
            "roae": self.hparams["roae"] if added else None,
            "template": getattr(datamodule, "prompt_style", None),
            **asdict(self.evaluation),
            "max_new_tokens": self.max_new_tokens,
            "max_length": getattr(datamodule, "max_length", None),
            "cut_prompts": getattr(datamodule, "cut_prompts", None),
            "dtype": self.dtype_of_base,
            "quantization": self.quantization,
            "precision": self.trainer.precision,
            "tokenizer": here.tokenizer,
            "tokenizer_digest": here.tokenizer_digest,
        }

    def _is_adapted(self) -> bool:
        """Whether RoAE adds anything; where every B is zero, the outputs are the base's own."""
        state = self.state_dict()
        return any(bool(state[name].any()) for name in state if name.endswith("roae_B"))

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> list[dict[str, Any]]:
        """Write an answer to each prompt, greedily.

        Returns:
            A record for each: source, index, task, prompt and input (what is asked), response (the
            text written) and answer (what the task's format finds in it, or None).
        """
        texts = self._write(batch)
        names = ("source", "task", "prompt", "input")
        known = getattr(getattr(self.trainer, "datamodule", None), "tasks", TASKS)
        columns = zip(*(batch[name] for name in names), batch["index"].tolist(), texts, strict=True)
        return [
            {
                "source": source,
                "index": index,
                "task": task,
                "prompt": prompt,
                "input": context,
                "response": text,
                "answer": extract_answer(known.get(task, task), text),
            }
            for source, task, prompt, context, index, text in columns
        ]

    def _write(self, batch: dict[str, Any]) -> list[str]:
        stop_ids = getattr(getattr(self.trainer, "datamodule", None), "stop_ids", ())
        return generate(
            self._built(), self._text_tokenizer(), batch, self.max_new_tokens, stop_ids=stop_ids
        )

    def _text_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that the prompts were encoded with."""
        datamodule = getattr(self.trainer, "datamodule", None)
        return getattr(datamodule, "text_tokenizer", None) or self.tokenizer

    def _task_names(self) -> list[str]:
        datamodule = getattr(self.trainer, "datamodule", None)
        return getattr(datamodule, "task_names", None) or ["all", *TASKS]
