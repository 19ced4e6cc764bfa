"""The loaders of what is trained on, validated on, and answered."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils.data import DataLoader, Subset

from rosa_lightning.data import collators
from rosa_lightning.data.batches import Batching
from rosa_lightning.data.encoding import Example
from rosa_lightning.data.sampling import (
    LengthSortedSampler,
    Mixture,
    MixtureSampler,
    ResumableLoader,
    answered_first,
)
from rosa_lightning.data.settings import LoadingConfig


@dataclass(frozen=True)
class Loaders:
    """Makes the loaders of `ReasoningDataModule`, by its settings of those names."""

    batching: Batching
    batch_size: int
    seed: int
    loading: LoadingConfig
    source_names: tuple[str, ...]
    pad_id: int
    """Token to pad with."""

    def training(
        self, examples: Mixture, sampler: MixtureSampler, position: Callable[[], int] | None
    ) -> ResumableLoader:
        """The mixture in the sampler's order; ``position`` as `ResumableLoader` asks for it."""
        options = self.loading.options(self.seed)
        return ResumableLoader(examples, sampler, position, collate_fn=self._collator(), **options)

    def first(self, examples: Mixture) -> DataLoader[Example]:
        """Training batches of the records as they lie."""
        return self._loader(examples, self._collator())

    def validation(self, held: Sequence[Any], tasks: Sequence[str]) -> DataLoader[Example]:
        """The records held out of each source, those first whose answers are written."""
        examples = Mixture(held)
        first = answered_first(held, tasks, self.loading.val_generate)
        order = [*first, *sorted(set(range(len(examples))) - set(first))]
        collator = collators.ValidationCollator(
            self._collator(),
            collators.PromptCollator(self.pad_id),
            frozenset((one.record.source, one.record.index) for one in examples[first]),
        )
        return self._loader(Subset(examples, order), collator)

    def prompts(
        self, examples: Sequence[Example], ranks: Mapping[str, Any] | None = None
    ) -> DataLoader[Example]:
        """Prompts in their order; dealt to ranks each once, and the longest first."""
        sampler = None
        if ranks is not None:
            sampler = LengthSortedSampler([len(example.prompt) for example in examples], **ranks)
        return self._loader(examples, collators.PromptCollator(self.pad_id), sampler)

    def _loader(self, examples: Any, collator: Any, sampler: Any = None) -> DataLoader[Example]:
        options = self.loading.options(self.seed) | {"batch_size": self.batch_size}
        return DataLoader(examples, sampler=sampler, collate_fn=collator, **options)

    def _collator(self) -> collators.TrainCollator | collators.PackedCollator:
        if self.batching in ("packed", "best_fit"):
            return collators.PackedCollator(self.source_names)
        return collators.TrainCollator(self.source_names, self.pad_id)
