"""`ReasoningDataModule`: several sources, one training stream."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from copy import copy
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader

from rosa_lightning.data.batches import Batching, BatchPlanner
from rosa_lightning.data.contamination import questions_of, trained_questions, training_of
from rosa_lightning.data.encoding import Encoder, Example, checked_tokenizer
from rosa_lightning.data.loaders import Loaders
from rosa_lightning.data.prompts import StyleName
from rosa_lightning.data.records import load_records
from rosa_lightning.data.sampling import Mixture, MixtureSampler, ResumableLoader, report_packs
from rosa_lightning.data.settings import (
    CHECKED,
    LoadingConfig,
    agree_on_data,
    agree_on_settings,
    check_settings,
)
from rosa_lightning.data.sources import (
    SETTINGS,
    Purpose,
    SourceLike,
    TaskLike,
    TokenizerLike,
    purpose_of,
    source_list,
    weighted_sources,
)
from rosa_lightning.data.text_info import TextInfo
from rosa_lightning.data.tokenization import cache_folder, count_cut_prompts
from rosa_lightning.data.training_set import (
    SampleCounter,
    TrainingSet,
    order_changes,
    read_training_set,
)
from rosa_lightning.models.vocabulary import padding_id
from rosa_lightning.tasks.custom import with_own_tasks
from rosa_lightning.tasks.records import Record, scored_as
from rosa_lightning.utils.agreement import several_ranks, together

_DEFAULT_LOADING = LoadingConfig()


class ReasoningDataModule(LightningDataModule):
    """Mixes data sources by weight into one training stream; evaluates on others.

    The order is a function of seed and epoch alone, and a run that is resumed in the middle of an
    epoch goes on with the very record that would have followed.

    Args:
        sources: What to train on: a source or a list of them, each its fields, a path, or demo.
            Weights are relative; all have one or none has. Files from 256 MiB on stay on disk.
        test_sources: What `test` answers: a source or a list of them.
        predict_sources: What `predict` answers: a source without outputs or a list of them; a .txt
            file holds one prompt a line.
        tasks: Tasks of your own, which sources name, each a mapping: name; format (label, letter,
            number or text); labels, the answers, for the first two; aliases; response, its wording
            with {answer}; prompt, with the rows' fields in braces; answer, the answer's field.
        tokenizer: Hub id or folder of the tokenizer, or tiny, or from Python an object; by default
            the model's own.
        batch_size: Records a batch, on each device; with best_fit, packs.
        batching: Records of a training batch: length puts those of like length together, random
            takes them as they follow one another, packed lays them end to end, without padding,
            best_fit fills packs of max_length tokens so, as few as it can.
        max_length: Longest record, in tokens, prompt and response together.
        prompt_style: Text around the instruction: alpaca, as LLM-Adapters has it; chat, the
            tokenizer's own chat template; or plain.
        val_fraction: Part of each source to validate on, at least one record; 0 for none.
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
        """Checks the settings; files are read in `setup`."""
        super().__init__()
        self.batch_size, self.batching, self.max_length = batch_size, batching, max_length
        self.prompt_style, self.val_fraction, self.seed = prompt_style, val_fraction, seed
        self.loading = loading
        check_settings({key: getattr(self, key) for key in CHECKED})
        self.tasks: Any = tasks
        self.sources: Any = sources
        self.test_sources: Any = test_sources
        self.predict_sources: Any = predict_sources
        self.tokenizer = tokenizer
        self._counter = SampleCounter(self.source_names)
        self._trained_on: list[dict[str, Any]] = []  # a training each, resumed ones too
        self.cut_prompts: dict[str, int] = {}
        """Prompts of each test and predict source that lost their beginning."""
        self._set = TrainingSet()
        self._prompts: dict[str, list[Example]] = {}
        self._read_as: dict[str, dict[str, Any]] = {}  # each stage's settings when it was read
        self._loaded: Any = None  # the tokenizer as given, and as loaded
        self._last_given: Any = None
        self.num_embeddings: int | None = None
        """Rows of the embedding that the batches are for, if there is no trainer to ask."""

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute. A setting is checked, and what follows from it will follow."""
        if name in CHECKED and "num_embeddings" in vars(self):  # else __init__ checks
            check_settings({key: getattr(self, key) for key in CHECKED} | {name: value})
        if name == "tasks" and not isinstance(value, Mapping):
            value = with_own_tasks(value)
        elif name in SETTINGS.values():
            value = source_list(name, value, self.tasks)
        if name == "sources":
            value = weighted_sources(value, self.loading.temperature)
        elif name == "loading" and "sources" in vars(self):
            weighted_sources(self.sources, value.temperature)
        elif name == "prompt_style":
            self._loaded = None  # the tokenizer may lack this style
        super().__setattr__(name, value)

    @property
    def longest_rows(self) -> int:
        """Records of max_length tokens that a training batch may have."""
        return (self.loading.tokens_per_batch or 0) // self.max_length or self.batch_size

    @property
    def source_names(self) -> list[str]:
        """Names of the training sources, which a batch's `source` indexes."""
        return [source.label for source in self.sources]

    @property
    def task_names(self) -> list[str]:
        """What validation and test may score, sorted; complete after `setup`."""
        held = zip(self.sources, self._set.val, strict=False)  # none before setup
        met = [*self.test_sources, *(source for source, examples in held if len(examples))]
        return sorted({scored_as(source.benchmark, source.label) for source in met})

    @property
    def test_examples(self) -> list[Example]:
        """The prompts of the test sources in their order, after `setup("test")`."""
        return self._prompts.get("test", [])

    def training_summary(self) -> list[str]:
        """Lines for people on what is trained and validated on, after `setup`."""
        return self._set.summary(self.source_names, self._shares(), self.loading.stop)

    def contaminated_records(self) -> tuple[list[Record], list[str]]:
        """The test records whose question was trained on, and the sources that were compared."""
        trainings = self._trained_on or [self._training()]
        return trained_questions(trainings, [e.record for e in self.test_examples], self.tasks)

    def _training(self) -> dict[str, Any]:
        choice = self.loading.choice_seed(self.seed)
        return training_of(self.sources, choice, self._set.left_out)

    def prepare_data(self) -> None:
        """Fetches hub data sets once a node, so that the ranks find them in the cache."""
        state = getattr(self.trainer, "state", None)
        purpose = purpose_of(getattr(state, "fn", None) or "fit")
        for source in filter(lambda one: one.hub, getattr(self, SETTINGS[purpose])):
            load_records(source, purpose, self.tasks)
        if purpose == "train" and self.loading.decontaminate:
            for source in filter(lambda one: one.hub, self.test_sources):
                with suppress(OSError):  # `setup` warns
                    load_records(source, "audit", self.tasks)

    def setup(self, stage: str) -> None:
        """Reads and tokenizes what the stage needs; once, until a setting of that changes."""
        agree_on_settings(self.trainer)
        purpose = purpose_of(stage)
        key = f"data.{SETTINGS[purpose]}"
        if not getattr(self, SETTINGS[purpose]):  # before anything is loaded
            raise ValueError(
                f"There is nothing to {purpose}: {key} names no source. Set it, such as "
                f"{key}: [{{path: FILE.jsonl}}]."
            )
        with together("loading of the tokenizer"):
            settings = self._settings_to_read()
        if self._read_as.get(purpose) != settings:
            self._read_training() if purpose == "train" else self._read_prompts(purpose)
            self._read_as[purpose] = settings
        if several_ranks():
            self._compare_ranks(purpose)
        if stage == "fit" and self._batches_trained_on() == 0:
            # Another training. One that is resumed loads its state after this.
            self._counter.start()
        if stage == "validate" and not any(map(len, self._set.val)):
            raise ValueError(
                f"There is nothing to validate on: data.val_fraction={self.val_fraction} selects "
                "no record. Set data.val_fraction, or name more data in data.sources."
            )

    def _compare_ranks(self, purpose: Purpose) -> None:
        examples: Mapping[str, Sequence[Example]] = self._set.named(self.source_names)
        if purpose != "train":
            examples = {f"data.{SETTINGS[purpose]}": self._prompts[purpose]}
        world = 0 if purpose == "train" else getattr(self.trainer, "world_size", 1)
        agree_on_data(examples, lambda: self._planner().digest(), least=world)

    def agreed_settings(self) -> dict[str, Any]:
        """What all ranks must have in common, by configuration key; data are seen by content."""
        own = {f"data.{name}": getattr(self, name) for name in CHECKED if name != "loading"}
        for name in SETTINGS.values():
            own[f"data.{name}"] = [
                asdict(replace(source, path=source.path and Path(source.path).name))
                for source in getattr(self, name)
            ]
        return own | self.loading.agreed()

    def _settings_to_read(self) -> dict[str, Any]:
        """The settings that decide what is read, as they are now; lists may change in place."""
        names = (*SETTINGS.values(), "tasks", "max_length", "prompt_style", "seed", "val_fraction")
        loading = ("overlong", "cache_dir", "decontaminate", "loss_turns", "split_seed")
        found = {name: copy(getattr(self, name)) for name in names}
        found |= {name: getattr(self.loading, name) for name in loading}
        return {**found, "tokenizer": self._given_tokenizer()}

    def _read_prompts(self, purpose: Purpose) -> None:
        key, sources = f"data.{SETTINGS[purpose]}", getattr(self, SETTINGS[purpose])
        found: list[Example] = []
        with together(f"reading of {key}"):
            encoder = self.encoder(with_response=False)
            for source in sources:
                examples = encoder(
                    load_records(source, purpose, self.tasks, self.loading.choice_seed(self.seed))
                )
                self.cut_prompts[source.label] = count_cut_prompts(source.label, examples, encoder)
                found += examples
        self._prompts[purpose] = found

    def _read_training(self) -> None:
        cache = cache_folder(self.loading.cache_dir)
        choice = self.loading.choice_seed(self.seed)
        compared = self.loading.decontaminate and bool(self.test_sources)
        with together("reading of data.sources"):
            records: Any = {
                source.label: load_records(source, "train", self.tasks, choice, cache)
                for source in self.sources
            }
            tested = questions_of(self.test_sources, self.tasks) if compared else frozenset()
        if compared and self.trainer is not None and self.trainer.world_size > 1:
            # A rank that did not reach the hub would train on other records than the rest.
            tested = self.trainer.strategy.broadcast(tested)
        with together("tokenization of data.sources"):
            self._set = read_training_set(
                records, tested, self.encoder(), cache, self.val_fraction, choice
            )
        if self._counter.names != self.source_names:
            self._counter = SampleCounter(self.source_names)
        self._trained_on = [self._training()]
        self._set.warn_of_unused(self.source_names, self._shares(), self.loading.stop)

    def encoder(self, with_response: bool = True) -> Encoder:
        """What makes token ids of records."""
        text = (self.text_tokenizer, self.prompt_style, self.max_length)
        loading = self.loading
        return Encoder(*text, loading.overlong, with_response, self._num_rows, loading.loss_turns)

    @property
    def _num_rows(self) -> int | None:
        """Rows of the base's embedding, if they are known."""
        module = getattr(self.trainer, "lightning_module", None)
        return getattr(module, "num_embeddings", self.num_embeddings)

    @property
    def text_tokenizer(self) -> Any:
        """The tokenizer that texts are encoded with, loaded at first use; else ValueError."""
        given = self._given_tokenizer()
        if self._loaded is None or self._loaded[0] is not given:
            checked = checked_tokenizer(given, self.prompt_style, self._num_rows)
            self._loaded, self._last_given = (given, checked), given
        return self._loaded[1]

    def _given_tokenizer(self) -> Any:
        """The setting or the model's; without a model, what was used last."""
        if self.tokenizer is not None:
            return self.tokenizer
        module = getattr(self.trainer, "lightning_module", None)
        return getattr(module, "tokenizer", self._last_given)

    @property
    def text_info(self) -> TextInfo:
        """What a model is told of the texts; complete after `setup`."""
        style = self.encoder().style
        return TextInfo(
            tasks=self.tasks,
            task_names=self.task_names or TextInfo.task_names,
            prompt_style=self.prompt_style,
            max_length=self.max_length,
            tokenizer_name=self.tokenizer if isinstance(self.tokenizer, str) else None,
            tokenizer=self.text_tokenizer,
            stop_ids=style.stop_ids,
            next_prompt=style.next_prompt,
            encode_response=lambda text, end: style.response(text, end=end),
            test_examples=self.test_examples,
            cut_prompts=self.cut_prompts,
        )

    def _loaders(self) -> Loaders:
        how = (self.batching, self.batch_size, self.seed, self.loading)
        pad_id = padding_id(self.text_tokenizer, self._num_rows)
        return Loaders(*how, tuple(self.source_names), pad_id)

    def train_dataloader(self) -> ResumableLoader | DataLoader[Example]:
        """The mixture from where the trainer stands; with `overfit_batches` the first records."""
        assert self._set.train, "setup('fit') comes first"
        mixture = Mixture(self._set.train)
        if getattr(self.trainer, "overfit_batches", 0):
            return self._loaders().first(mixture)
        mixed = (self._set.sizes, self._shares(), self.source_names, self.seed, self._planner())
        sampler = MixtureSampler(*mixed, stop=self.loading.stop, **self._ranks())
        if self.batching == "best_fit":
            report_packs(sampler, self.trainer)
        # A loader is often made before the trainer has restored where it stands.
        position = None if self.trainer is None else self._batches_trained_on
        return self._loaders().training(mixture, sampler, position)

    def _planner(self) -> BatchPlanner:
        batches = (self.batching, self.batch_size, self.loading.tokens_per_batch)
        return self._set.planner(*batches, self.max_length)

    def _ranks(self) -> dict[str, Any]:
        return getattr(self.trainer, "distributed_sampler_kwargs", None) or {}

    def _batches_trained_on(self) -> int:
        """Of this training, stops included; right once Lightning has restored its loops."""
        if self.trainer is None:
            return 0
        # Not `ready`: a batch that an exception has stopped comes again.
        progress: Any = self.trainer.fit_loop.epoch_loop.batch_progress.total
        return int(progress.processed)

    def val_dataloader(self) -> DataLoader[Example] | list[Any]:
        """The validation split of all sources, records whose answers are written first."""
        if not any(map(len, self._set.val)):
            return []
        return self._loaders().validation(self._set.val, [one.benchmark for one in self.sources])

    def test_dataloader(self) -> DataLoader[Example]:
        """The prompts of the test sources, each once however many ranks, the longest first."""
        return self._loaders().prompts(self.test_examples, self._ranks())

    def predict_dataloader(self) -> DataLoader[Example]:
        """The prompts of the predict sources."""
        return self._loaders().prompts(self._prompts["predict"])

    def _shares(self) -> list[float]:
        return self._set.shares([one.weight for one in self.sources], self.loading.temperature)

    def examples_seen(self) -> dict[str, int]:
        """Examples of each source trained on so far, on all ranks; every rank must call this."""
        return self._counter.counts(self.trainer)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Counts what is trained on."""
        trainer = self.trainer
        if trainer is not None and trainer.training:
            self._counter.log(trainer)
            self._counter.add(batch["source"])
        return batch

    def state_dict(self) -> dict[str, Any]:
        """What was trained on, and the settings that the order depends on."""
        seen, order = self.examples_seen(), self._order_settings()
        return {"seen": seen, "order": order, "trained_on": self._trained_on}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on counting; warns if the order is not the one that the checkpoint was in."""
        before = state_dict.get("trained_on", [])  # which the first versions did not write
        if self.trainer is not None and self.trainer.state.fn != "fit":
            self._trained_on = before
            return
        self._trained_on = [*before, *(one for one in self._trained_on if one not in before)]
        self._counter.start(state_dict["seen"])
        changed = order_changes(self._order_settings(), state_dict["order"])
        # A trainer goes back to a state before the first batch after a search for a batch size.
        follows = self.trainer is None or any(state_dict["seen"].values())
        if follows and changed:
            rank_zero_warn(
                f"The data differ from the checkpoint's: {', '.join(changed)}. Training goes on, "
                "but not with the records that would have followed."
            )

    def _order_settings(self) -> dict[str, Any]:
        loading = ("temperature", "stop", "tokens_per_batch", "split_seed")
        return {
            "sources": dict(zip(self.source_names, self._set.sizes, strict=False)),
            "weights": [source.weight for source in self.sources],
            **{name: getattr(self, name) for name in ("batch_size", "batching", "seed")},
            **{name: getattr(self.loading, name) for name in loading},
            "lengths": self._planner().digest(),
            "pack": self.max_length if self.batching == "best_fit" else None,
            "content": self._set.content,
        }
