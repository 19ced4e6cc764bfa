"""`ReasoningDataModule`: several sources, one training stream."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from copy import copy
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from rosa_lightning.data.collators import (
    PackedCollator,
    PromptCollator,
    TrainCollator,
    ValidationCollator,
)
from rosa_lightning.data.contamination import (
    contaminated,
    question_digest,
    questions_of,
    trained_questions,
    training_of,
)
from rosa_lightning.data.loading import (
    LengthSortedSampler,
    Mixture,
    MixtureSampler,
    ResumableLoader,
)
from rosa_lightning.data.prompts import STYLES, StyleName
from rosa_lightning.data.records import Records, content_digest, load_records
from rosa_lightning.data.sampling import Batching, BatchPlanner, epoch_length, shares_by_size
from rosa_lightning.data.settings import CHECKED, LoadingConfig, check_settings
from rosa_lightning.data.sources import Purpose, Source, source_list, weighted_sources
from rosa_lightning.data.splitting import validation_split
from rosa_lightning.data.tokenization import (
    Encoder,
    Example,
    Examples,
    cache_folder,
    count_altered,
    tokenize,
    tokens_digest,
)
from rosa_lightning.models.loading import load_tokenizer
from rosa_lightning.models.vocabulary import check_vocabulary, padding_id
from rosa_lightning.tasks.custom import with_own_tasks
from rosa_lightning.tasks.records import Record, reference
from rosa_lightning.utils.agreement import RanksError, agree, configuration, several_ranks, together
from rosa_lightning.utils.stopping import Stopping

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    SourceLike = dict[str, Any] | Source | str
    """A source, its fields, or its path; or demo."""
    TaskLike = dict[str, Any]
    TokenizerLike = str | PreTrainedTokenizerBase
else:
    # What a configuration can say. With a class among these types jsonargparse would read a file
    # that is named as a configuration, fill fields with those of an earlier one, and call what a
    # class_path names; and with Any it would make a number of '5', and import what is named.
    SourceLike, TaskLike, TokenizerLike = dict | str, dict, str

_DEFAULT_LOADING = LoadingConfig()
_SOURCES: dict[str, Literal["train", "test"]] = {
    "sources": "train",
    "test_sources": "test",
    "predict_sources": "test",
}
"""The settings that name sources, and which part of the demonstration set each means by demo."""


class SampleCounter:
    """Counts the examples of each source that a run has trained on, resumed parts included."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)
        self.start()

    def start(self, before: Mapping[str, int] | None = None) -> None:
        """Begin anew, or from the counts of a checkpoint."""
        self._here = torch.zeros(len(self.names), dtype=torch.long)  # on this rank
        self._before = torch.tensor([(before or {}).get(name, 0) for name in self.names])

    def add(self, source_B: Tensor) -> None:
        """Count a batch, by the sources of its examples, shape (B,)."""
        self._here += torch.bincount(source_B.cpu(), minlength=len(self.names))

    def counts(self, trainer: Trainer | None) -> dict[str, int]:
        """Examples of each source so far, on all ranks; every rank must call this."""
        here = self._here
        if trainer is not None and trainer.world_size > 1:
            strategy = trainer.strategy
            here = strategy.reduce(here.clone().to(strategy.root_device), reduce_op="sum").cpu()
        return dict(zip(self.names, (here + self._before).tolist(), strict=True))


class ReasoningDataModule(LightningDataModule):
    """Mixes data sources by weight into one training stream; evaluates on others.

    Each prefix of the stream is mixed as the whole is. All records of a source come before one
    comes again. The order is a function of seed and epoch alone, and a run that is resumed in
    the middle of an epoch goes on with the very record that would have followed.

    Args:
        sources: What to train on: a source or a list of them, each its fields, a path, or demo.
            Weights are relative; either all sources have one or none has. Files from 256 MiB on
            stay on disk.
        test_sources: What `test` answers: a source or a list of them.
        predict_sources: What `predict` answers: a source without outputs or a list of them; a .txt
            file holds one prompt a line.
        tasks: Tasks of your own, each a mapping: name; format (label, letter, number or text);
            labels, the answers that there are, for the first two; aliases, other names; response,
            the wording of a response, with {answer} in it; prompt, what is asked, with the rows'
            fields in braces, and answer, the field of the answer or of its label's number from 0.
            Sources name them with task.
        tokenizer: Hub id or folder of the tokenizer, or tiny. By default the model's own. From
            Python also a tokenizer object.
        batch_size: Records a batch, on each device.
        batching: Records of a training batch: length puts those of like length together, so that
            little is padded; random takes them as they follow one another; packed lays them end
            to end, without padding, where the model allows it.
        max_length: Longest record, in tokens, prompt and response together.
        prompt_style: Text around the instruction: alpaca, as LLM-Adapters has it; chat, the
            tokenizer's own chat template, whose prompt is what a whole conversation has before the
            reply; or plain. Special tokens that records spell are encoded as text.
        val_fraction: Part of each source to validate on, at least one record; 0 for none. Equal
            prompts stay on one side. Trainer(limit_val_batches) uses fewer.
        seed: Decides the order, the validation split and what max_examples leaves out.
        loading: How records are chosen, mixed, cut and loaded.
    """

    def __init__(
        self,
        *,
        sources: SourceLike | list[SourceLike] = "demo",
        test_sources: SourceLike | list[SourceLike] | None = None,
        predict_sources: SourceLike | list[SourceLike] | None = None,
        tasks: list[TaskLike] | None = None,
        tokenizer: TokenizerLike | None = None,
        batch_size: int = 16,
        batching: Batching = "length",
        max_length: int = 512,
        prompt_style: StyleName = "alpaca",
        val_fraction: float = 0.02,
        seed: int = 0,
        loading: LoadingConfig = _DEFAULT_LOADING,
    ) -> None:
        """Checks the settings; files are read in `setup`.

        Raises ValueError or TypeError for a setting that cannot be used.
        """
        super().__init__()
        self.batch_size, self.batching, self.max_length = batch_size, batching, max_length
        self.prompt_style, self.val_fraction, self.seed = prompt_style, val_fraction, seed
        self.loading = loading
        check_settings(**{key: getattr(self, key) for key in CHECKED})
        self.tasks: Any = tasks
        self.sources: Any = sources
        self.test_sources: Any = test_sources
        self.predict_sources: Any = predict_sources
        self.tokenizer = tokenizer
        self._counter = SampleCounter(self.source_names)
        self._logged_step = 0
        self._trained_on: list[dict[str, Any]] = []  # a training each, resumed ones too
        self._left_out: list[str] = []
        self._content: dict[str, str] = {}  # digests by source
        self.cut_prompts: dict[str, int] = {}
        """Prompts of each test and predict source that lost their beginning."""
        self._train: list[Examples] | None = None
        self._lengths: dict[bool, NDArray[np.int32]] = {}  # of its examples; exact or estimated
        self._val: list[Examples] = []
        self._prompts: dict[str, list[Example]] = {}
        self._read_as: dict[str, dict[str, Any]] = {}  # each stage's settings when it was read
        self._tokenizer: Any = None
        self.num_embeddings: int | None = None
        """Rows of the embedding that the batches are for, if there is no trainer to ask."""
        self._tokenizer_given: Any = None

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute. A setting is checked, and what follows from it will follow.

        Raises ValueError or TypeError for a setting that cannot be used.
        """
        if name in CHECKED and "_tokenizer_given" in vars(self):  # else __init__ checks
            check_settings(**{**{key: getattr(self, key) for key in CHECKED}, name: value})
        if name == "tasks" and not isinstance(value, Mapping):
            value = with_own_tasks(value)
        elif name in _SOURCES:
            value = source_list(name, value, _SOURCES[name], self.tasks)
        if name == "sources":
            value = weighted_sources(value, self.loading.temperature)
        elif name == "loading" and "sources" in vars(self):
            weighted_sources(self.sources, value.temperature)
        elif name == "prompt_style":
            self._tokenizer = None  # it may lack this one
        super().__setattr__(name, value)

    @property
    def longest_rows(self) -> int:
        """Records of max_length tokens that a training batch may have."""
        tokens = self.loading.tokens_per_batch
        return tokens // self.max_length if tokens else self.batch_size

    @property
    def source_names(self) -> list[str]:
        """Names of the training sources, which a batch's `source` indexes."""
        return [source.label for source in self.sources]

    @property
    def task_names(self) -> list[str]:
        """All tasks that validation and test may meet, sorted; complete after `setup`."""
        held = zip(self.sources, self._val, strict=False)  # none before setup
        validated = {source.benchmark for source, examples in held if len(examples)}
        return sorted(validated | {source.benchmark for source in self.test_sources})

    @property
    def test_examples(self) -> list[Example]:
        """The prompts of the test sources in their order; there after `setup("test")`."""
        return self._prompts.get("test", [])

    def contaminated_records(self) -> tuple[list[Record], list[str]]:
        """The test records whose question was trained on, and the sources compared with.

        These are the sources of the training, as the checkpoint names them, without questions that
        were left out of it; without a checkpoint those of `sources`. Raises OSError or ValueError
        for sources that cannot be read.
        """
        trainings = self._trained_on or [self._training()]
        return trained_questions(trainings, [e.record for e in self.test_examples], self.tasks)

    def _training(self) -> dict[str, Any]:
        return training_of(self.sources, self.seed, self._left_out)

    # --- reading ---

    def prepare_data(self) -> None:
        """Fetches hub data sets once a node, so that the ranks find them in the cache."""
        stage = getattr(getattr(self.trainer, "state", None), "fn", None)
        sources, purpose = self._of_stage(str(stage.value) if stage else "fit")
        for source in sources:
            if source.hub:
                load_records(source, purpose, self.tasks)
        if purpose == "train" and self.loading.decontaminate:
            for source in self.test_sources:
                if source.hub:
                    with suppress(OSError):  # `setup` warns
                        load_records(source, "audit", self.tasks)

    def setup(self, stage: str) -> None:
        """Reads and tokenizes what the stage needs; once, until a setting of that changes.

        Raises OSError or ValueError for sources that cannot be read, ValueError for a stage
        whose sources are not named.
        """
        stage = str(getattr(stage, "value", stage))  # Lightning gives an enumeration
        self._agree_on_settings()
        what = stage if stage in {"test", "predict"} else "train"
        with together("loading of the tokenizer"):
            settings = self._settings_of(what)
        if self._read_as.get(what) != settings:
            if what == "train":
                self._read_training()
            else:
                with together(f"reading of data.{what}_sources"):
                    self._prompts[what] = self._read_prompts(what)
            self._read_as[what] = settings
        if what != "train":
            self._agree_on_data({f"data.{what}_sources": self._prompts[what]})
            self._check_prompts(what)
            return
        parts = {"training": self._train or [], "validation": self._val}
        self._agree_on_data(
            {
                f"{name} ({part})": examples
                for part, found in parts.items()
                for name, examples in zip(self.source_names, found, strict=False)
            }
        )
        if stage == "fit" and self._batches_trained_on() == 0:
            # Another training. One that is resumed loads its state after this.
            self._counter.start()
            self._logged_step = 0
        if stage == "validate" and not any(map(len, self._val)):
            raise ValueError(
                f"There is nothing to validate on: data.val_fraction={self.val_fraction} selects "
                "no record. Set data.val_fraction, or name more data in data.sources."
            )

    def _agree_on_settings(self) -> None:
        """Compare the ranks before any does what the others might not, a broadcast say."""
        if self.trainer is None or not several_ranks():
            return
        if (stopping := Stopping.of(self.trainer)) is not None:
            stopping.agree(self.trainer)
        else:
            agree("settings", configuration(self.trainer))

    def _agree_on_data(self, examples: Mapping[str, Sequence[Example]]) -> None:
        if several_ranks():
            with together("comparison of the data"):
                found = {k: f"{len(v)} records, {tokens_digest(v)}" for k, v in examples.items()}
            agree("data", found | {"lengths of the records": self._planner().digest()})

    def _check_prompts(self, stage: str) -> None:
        """Refuse fewer prompts than ranks: one without any would not take part in what all do."""
        world = 1 if self.trainer is None else self.trainer.world_size
        number = len(self._prompts[stage])
        if number < world:
            raise RanksError(
                f"data.{stage}_sources hold {number} prompts for {world} processes, and each needs "
                f"one. Set trainer.devices and trainer.num_nodes to {number} processes or fewer."
            )

    def agreed_settings(self) -> dict[str, Any]:
        """What all ranks must have in common, by configuration key; data are seen by content."""
        own = {name: getattr(self, name) for name in CHECKED if name != "loading"}
        loading = asdict(self.loading)
        for name in ("num_workers", "cache_dir"):  # each rank's own
            del loading[name]
        own |= {f"loading.{name}": value for name, value in loading.items()}
        for name in _SOURCES:
            own[name] = [
                asdict(replace(source, path=source.path and Path(source.path).name))
                for source in getattr(self, name)
            ]
        return {f"data.{key}": value for key, value in own.items()}

    def _settings_of(self, what: str) -> dict[str, Any]:
        """The settings that decide what is read for train, test or predict, as they are now."""
        names = ["tasks", "max_length", "prompt_style", "seed"]
        if what == "train":
            names += ["sources", "val_fraction"]
            names += ["test_sources"] if self.loading.decontaminate else []
        else:
            names.append(f"{what}_sources")
        read = ("overlong", "cache_dir", "decontaminate")
        # Lists and mappings may be changed in place.
        return {name: copy(getattr(self, name)) for name in names} | {
            "tokenizer": self._current_tokenizer(),
            "loading": [getattr(self.loading, name) for name in read],
        }

    def _of_stage(self, stage: str) -> tuple[list[Source], Purpose]:
        if stage == "test":
            return self.test_sources, "test"
        return (self.predict_sources, "predict") if stage == "predict" else (self.sources, "train")

    def _read_prompts(self, stage: str) -> list[Example]:
        sources, purpose = self._of_stage(stage)
        if not sources:
            raise ValueError(
                f"There is nothing to {stage}: data.{stage}_sources names no source. Set it, "
                f"such as data.{stage}_sources: [{{path: FILE.jsonl}}]."
            )
        encoder = self._encoder(with_response=False)
        found: list[Example] = []
        for source in sources:
            examples = encoder(load_records(source, purpose, self.tasks, self.seed))
            too_long = [one.record.index for one in examples if one.too_long]
            self.cut_prompts[source.label] = len(too_long)
            if too_long:
                rank_zero_warn(
                    f"source {source.label}: {len(too_long)} of {len(examples)} prompts, record "
                    f"{too_long[0]} first, are longer than data.max_length={self.max_length} "
                    "tokens and lost their beginning; raise it."
                )
            found += examples
        return found

    def _read_training(self) -> None:
        cache = cache_folder(self.loading.cache_dir)
        compared = self.loading.decontaminate and bool(self.test_sources)
        with together("reading of data.sources"):
            records = [
                load_records(source, "train", self.tasks, self.seed, cache)
                for source in self.sources
            ]
            tested = questions_of(self.test_sources, self.tasks) if compared else frozenset()
        if compared and self.trainer is not None and self.trainer.world_size > 1:
            # A rank that did not reach the hub would train on other records than the rest.
            tested = self.trainer.strategy.broadcast(tested)
        kept, self._left_out = [np.ones(len(some), np.bool_) for some in records], []
        if compared:
            kept = self._decontaminated(records, tested)
        with together("tokenization of data.sources"):
            self._encode(records, kept, cache)
        self._lengths = {}
        if self._counter.names != self.source_names:
            self._counter = SampleCounter(self.source_names)
        self._trained_on = [self._training()]
        self._report_mixture()

    def _decontaminated(
        self, records: Sequence[Any], tested: frozenset[str]
    ) -> list[NDArray[np.bool_]]:
        """Which records of each source are not test questions."""
        kept, left_out = [], set[str]()
        for name, some in zip(self.source_names, records, strict=True):
            leaked = contaminated(some, tested)
            left_out |= {question_digest(record) for record in some.select(leaked)}
            if leaked.all():
                raise ValueError(
                    f"source {name}: the questions of all {len(some)} records stand in "
                    "data.test_sources, so data.loading.decontaminate leaves none. Take the "
                    "source out of data.sources, or set data.loading.decontaminate: false to train "
                    "on test questions."
                )
            if leaked.any():
                rank_zero_info(
                    f"{name}: {leaked.sum()} of {len(some)} records left out, as their questions "
                    "stand in data.test_sources"
                )
            kept.append(~leaked)
        self._left_out = sorted(left_out)
        return kept

    def _encode(
        self, records: Sequence[Any], kept: Sequence[NDArray[np.bool_]], cache: Path | None
    ) -> None:
        """Tokenize each source's records and split them into those of training and validation."""
        encoder, train, val = self._encoder(), list[Examples](), list[Examples]()
        self._content = {}
        left: list[Records] = [
            some if mask.all() else some.select(mask)
            for some, mask in zip(records, kept, strict=True)
        ]
        held = validation_split(left, self.val_fraction, self.seed)
        for name, some, mask, rest, validated in zip(
            self.source_names, records, kept, left, held, strict=True
        ):
            in_memory = rest is not some and not some.on_disk
            self._content[name] = content_digest(rest) if in_memory else some.content
            examples = tokenize(some, encoder, cache).select(mask)
            too_long = count_altered(name, examples)
            used = ~too_long if encoder.overlong == "drop" else np.ones(len(examples), np.bool_)
            train.append(examples.select(used & ~validated))
            val.append(examples.select(used & validated))
            if not len(train[-1]):
                raise ValueError(
                    f"source {name}: all {len(examples)} records are longer than data.max_length="
                    f"{self.max_length} tokens. Raise it, or set data.loading.overlong: cut."
                )
        self._train, self._val = train, val

    def _report_mixture(self) -> None:
        """Say how much each source has and gives, and warn of one that gives nothing."""
        assert self._train is not None
        shares = self._weights()
        total = epoch_length(self._sizes(), shares, self.loading.stop)
        for name, share, examples in zip(self.source_names, shares, self._train, strict=True):
            if round(total * share) == 0:
                rank_zero_warn(
                    f"source {name}: weight {share:.2g} of an epoch's {total} records is not one "
                    "record, so it is never trained on; raise its weight in data.sources, or "
                    "data.loading.temperature."
                )
            where = " on disk" if examples.records.on_disk else ""
            rank_zero_info(
                f"{name}: {len(examples)} records{where}, weight {share:.3g}, seen "
                f"{total * share / len(examples):.2g} times an epoch"
            )
        if held := sum(map(len, self._val)):
            rank_zero_info(f"validation split: {held} records")

    def _encoder(self, with_response: bool = True) -> Encoder:
        return Encoder(
            self.text_tokenizer,
            self.prompt_style,
            self.max_length,
            self.loading.overlong,
            with_response,
            self._num_rows,
        )

    @property
    def _num_rows(self) -> int | None:
        """Rows of the base's embedding, where a module or who uses the data says it."""
        module = getattr(self.trainer, "lightning_module", None)
        return getattr(module, "num_embeddings", self.num_embeddings)

    @property
    def text_tokenizer(self) -> Any:
        """The tokenizer that texts are encoded with, loaded at first use.

        Raises ValueError where there is none, or one without an end-of-sequence token or the prompt
        style, or one of another model.
        """
        given = self._current_tokenizer()
        if given is None:
            raise ValueError(
                "There is no tokenizer: data.tokenizer is not set and the model has none. "
                "Set data.tokenizer to a hub id, a folder, or tiny."
            )
        if self._tokenizer is None or given is not self._tokenizer_given:
            by_name = isinstance(given, str)
            known = load_tokenizer(given, setting="data.tokenizer") if by_name else given
            if known.eos_token_id is None:
                raise ValueError(
                    "The tokenizer has no end-of-sequence token, which ends each response. Set "
                    "data.tokenizer to one that has."
                )
            check_vocabulary(known, self._num_rows)
            _ = STYLES[self.prompt_style](known).stop_ids  # else refused
            self._tokenizer, self._tokenizer_given = known, given
        return self._tokenizer

    def _current_tokenizer(self) -> Any:
        """The one given or the model's; without a model, what was used last."""
        if self.tokenizer is not None:
            return self.tokenizer
        module = getattr(self.trainer, "lightning_module", None)
        return getattr(module, "tokenizer", self._tokenizer_given)

    @property
    def stop_ids(self) -> list[int]:
        """Tokens that end a written answer."""
        return self._encoder().style.stop_ids

    def response_ids(self, text: str, end: bool = False) -> list[int]:
        """Token ids of a response, as they follow a prompt; ``end`` adds what ends it."""
        return self._encoder().style.response(text, end=end)

    def _pad_id(self) -> int:
        return padding_id(self.text_tokenizer, self._num_rows)

    # --- loaders ---

    def train_dataloader(self) -> ResumableLoader | DataLoader[Example]:
        """The mixture, this rank's part, from where the trainer stands.

        Trainer(overfit_batches=...) gets the first records, batch_size at a time.
        """
        assert self._train is not None, "setup('fit') comes first"
        mixture = Mixture(self._train)
        if getattr(self.trainer, "overfit_batches", 0):
            return self._in_order(mixture, self._collator())
        sampler = MixtureSampler(
            self._sizes(),
            self._weights(),
            self.source_names,
            self.seed,
            self._planner(),
            stop=self.loading.stop,
            **self._ranks(),
        )
        return ResumableLoader(
            mixture,
            sampler,
            # A loader is often made before the trainer has restored where it stands.
            None if self.trainer is None else self._batches_trained_on,
            collate_fn=self._collator(),
            **self._loader_options(),
        )

    def _ranks(self) -> dict[str, int]:
        return getattr(self.trainer, "distributed_sampler_kwargs", None) or {}

    def _planner(self) -> BatchPlanner:
        """How records are made into batches now; lengths once there are records."""
        lengths, tokens = None, self.loading.tokens_per_batch
        if self._train is not None and (self.batching != "random" or tokens):
            exact = tokens is not None
            if exact not in self._lengths:
                self._lengths[exact] = np.concatenate([one.lengths(exact) for one in self._train])
            lengths = self._lengths[exact]
        return BatchPlanner(self.batching, self.batch_size, tokens, lengths)

    def _batches_trained_on(self) -> int:
        """Of this training, stops included; right once Lightning has restored its loops."""
        if self.trainer is None:
            return 0
        # Not `ready`: a batch that an exception has stopped comes again.
        progress: Any = self.trainer.fit_loop.epoch_loop.batch_progress.total
        return int(progress.processed)

    def val_dataloader(self) -> DataLoader[Example] | list[Any]:
        """The validation split of all sources; an empty list where there is none.

        Those whose answers are written stand first, so that few batches hold them all.
        """
        if not any(map(len, self._val)):
            return []
        examples = Mixture(self._val)
        first = self._answered(examples)
        order = [*first, *sorted(set(range(len(examples))) - set(first))]
        collator = ValidationCollator(
            self._collator(),
            PromptCollator(self._pad_id()),
            frozenset((one.record.source, one.record.index) for one in examples[first]),
        )
        return self._in_order(Subset(examples, order), collator)

    def _answered(self, examples: Mixture) -> list[int]:
        """Places of the validation records whose answers are written, the longest prompt first."""
        ends = np.cumsum([0, *map(len, self._val)])
        spans = zip(self.sources, ends[:-1].tolist(), ends[1:].tolist(), strict=True)
        # Any wording of a free text may be right, so there is nothing to compare.
        places = [p for s, start, end in spans if s.benchmark != "text" for p in range(start, end)]
        count = min(self.loading.val_generate, len(places))
        chosen = [places[round(i)] for i in np.linspace(0, len(places) - 1, count)]
        known = dict(zip(chosen, examples[chosen], strict=True))
        kept = [place for place in chosen if reference(known[place].record) is not None]
        return sorted(kept, key=lambda place: -len(known[place].prompt))

    def test_dataloader(self) -> DataLoader[Example]:
        """The prompts of the test sources, each once however many ranks, the longest first."""
        examples = self.test_examples
        lengths = [len(example.prompt) for example in examples]
        sampler = LengthSortedSampler(lengths, **self._ranks())
        return self._in_order(examples, PromptCollator(self._pad_id()), sampler=sampler)

    def predict_dataloader(self) -> DataLoader[Example]:
        """The prompts of the predict sources."""
        return self._in_order(self._prompts["predict"], PromptCollator(self._pad_id()))

    def _in_order(
        self, examples: Any, collator: Any, sampler: LengthSortedSampler | None = None
    ) -> DataLoader[Example]:
        return DataLoader(
            examples,
            shuffle=False,
            sampler=sampler,
            batch_size=self.batch_size,
            collate_fn=collator,
            **self._loader_options(),
        )

    def _collator(self) -> TrainCollator | PackedCollator:
        names = tuple(self.source_names)
        if self.batching == "packed":
            return PackedCollator(names)
        return TrainCollator(names, self._pad_id())

    def _loader_options(self) -> dict[str, Any]:
        return {
            "num_workers": self.loading.num_workers,
            "pin_memory": torch.cuda.is_available(),
            # Without its own generator a loader draws from the global one at each pass, and a
            # resumed run would draw other dropout masks than the run that never stopped.
            "generator": torch.Generator().manual_seed(self.seed),
        }

    # --- shares and state ---

    def _sizes(self) -> list[int]:
        """Training records of each source."""
        assert self._train is not None, "setup('fit') comes first"
        return [len(examples) for examples in self._train]

    def _weights(self) -> list[float]:
        """Each source's part of the training stream; they sum to 1."""
        sizes, temperature = self._sizes(), self.loading.temperature
        if temperature is not None:
            return shares_by_size(sizes, temperature)
        weights = [
            float(size) if source.weight is None else source.weight
            for source, size in zip(self.sources, sizes, strict=True)
        ]
        return [weight / sum(weights) for weight in weights]

    def examples_seen(self) -> dict[str, int]:
        """Examples of each source trained on so far, on all ranks; every rank must call this."""
        return self._counter.counts(self.trainer)

    def shares(self) -> dict[str, float]:
        """Each source's part of the examples trained on so far; every rank must call this."""
        seen = self.examples_seen()
        return {name: count / max(1, sum(seen.values())) for name, count in seen.items()}

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Counts what is trained on."""
        trainer = self.trainer
        if trainer is not None and trainer.training:
            self._log_shares()
            self._counter.add(batch["source"])
        return batch

    def _log_shares(self) -> None:
        assert self.trainer is not None
        step, interval = self.trainer.global_step, self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if len(self.sources) < 2:
            return  # the share of an only source tells nothing
        if interval and step % interval == 0 and step > self._logged_step:
            self._logged_step = step
            shares = {f"data/share/{name}": share for name, share in self.shares().items()}
            for logger in self.trainer.loggers:
                logger.log_metrics(shares, step=step)

    def teardown(self, stage: str) -> None:
        """After training, says what was trained on."""
        if stage != "fit" or self._train is None:
            return
        seen, shares = self.examples_seen(), self.shares()
        for name, weight in zip(self.source_names, self._weights(), strict=True):
            rank_zero_info(
                f"trained on {name}: {seen[name]} examples, share {shares[name]:.3f}, "
                f"weight {weight:.3f}"
            )

    def state_dict(self) -> dict[str, Any]:
        """What was trained on, and the settings that the order depends on."""
        return {
            "seen": self.examples_seen(),
            "order": self._order_settings(),
            "trained_on": self._trained_on,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on counting; warns if the order is not the one that the checkpoint was in."""
        # Checkpoints of earlier versions do not know it.
        before = state_dict.get("trained_on", [])
        if self.trainer is not None and self.trainer.state.fn != "fit":
            self._trained_on = before
            return
        self._trained_on = [*before, *(one for one in self._trained_on if one not in before)]
        self._counter.start(state_dict["seen"])
        # Checkpoints of earlier versions do not know every key.
        now, then = self._order_settings(), {"batching": "random", **state_dict["order"]}
        content, earlier = now.pop("content"), then.pop("content", {})
        # A digest of a file, which its first word tells, says nothing of one of records.
        others = [
            name
            for name, digest in content.items()
            if digest.split()[:1] == earlier.get(name, "").split()[:1] and digest != earlier[name]
        ]
        changed = [key for key in now if now[key] != then.get(key, now[key])]
        # A trainer goes back to a state before the first batch after a search for a batch size.
        follows = self.trainer is None or any(state_dict["seen"].values())
        if follows and (changed or others):
            was = ", ".join(
                [
                    *(f"{key} was {then.get(key)} and is {now[key]}" for key in changed),
                    *(f"source {name} holds other records" for name in others),
                ]
            )
            rank_zero_warn(
                f"The data differ from the checkpoint's: {was}. Training goes on, but not with "
                "the records that would have followed."
            )

    def _order_settings(self) -> dict[str, Any]:
        sizes = self._sizes() if self._train else []
        return {
            "sources": dict(zip(self.source_names, sizes, strict=False)),
            "weights": [source.weight for source in self.sources],
            "temperature": self.loading.temperature,
            "stop": self.loading.stop,
            "batch_size": self.batch_size,
            "tokens_per_batch": self.loading.tokens_per_batch,
            "batching": self.batching,
            "seed": self.seed,
            "lengths": self._planner().digest(),
            "content": self._content,
        }
