"""Settings of `ReasoningDataModule`: the less common ones, checks of all, agreement of ranks."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, get_args

import torch
from lightning.pytorch import Trainer

from rosa_lightning.data.batches import Batching
from rosa_lightning.data.encoding import Example, LossTurns, Overlong
from rosa_lightning.data.prompts import STYLES
from rosa_lightning.data.sampling import Stop
from rosa_lightning.data.tokenization import tokens_digest
from rosa_lightning.utils.agreement import RanksError, agree, configuration, several_ranks, together
from rosa_lightning.utils.stopping import Stopping


@dataclass(frozen=True, kw_only=True)
class LoadingConfig:
    """How records are chosen, mixed, cut and loaded."""

    temperature: float | None = None
    """Shares in proportion to size**(1 / temperature), in place of weights: 1 mixes by size, more
    draws the shares together."""
    stop: Stop = "total"
    """Where an epoch ends: total, after as many records as there are; first_exhausted, when the
    first source has given as many as it has; oversample, when every one has."""
    decontaminate: bool = True
    """Leave out training records whose question is one of test_sources, compared in lower case
    without punctuation. How many is printed."""
    overlong: Overlong = "cut"
    """What becomes of records beyond max_length: cut the prompt's beginning, of a conversation by
    whole turns, or drop the record. Plain text is split."""
    loss_turns: LossTurns = "all"
    """Replies of a conversation that carry loss: all, or the last."""
    tokens_per_batch: int | None = None
    """Most tokens of a training batch, padding counted, on each device, in place of batch_size;
    batches of short records then have more of them, and each counts for less. Validation, test and
    predict keep to batch_size."""
    val_generate: int = 32
    """Validation records whose answers each validation writes, for val/accuracy; 0 writes none.
    They are spread evenly over the sources whose task has answers to compare."""
    split_seed: int | None = None
    """Chooses the validation records and those of max_examples; by default data.seed, which then
    decides the order alone."""
    num_workers: int = 0
    """Processes that prepare batches; 0 prepares them in the main process."""
    cache_dir: str | None = "auto"
    """Folder that keeps tokenised training data, and the records of large sources, for the next
    run; auto is rosa_lightning in the user's cache folder (XDG_CACHE_HOME), null keeps nothing."""

    def choice_seed(self, seed: int) -> int:
        """What chooses records, where ``seed`` is that of their order."""
        return seed if self.split_seed is None else self.split_seed

    def options(self, seed: int) -> dict[str, Any]:
        """Options of every `DataLoader`."""
        # Without its own generator a loader draws from the global one at each pass, and a resumed
        # run would draw other dropout masks than the run that never stopped.
        generator = torch.Generator().manual_seed(seed)
        pins = torch.cuda.is_available()
        return {"num_workers": self.num_workers, "pin_memory": pins, "generator": generator}

    def agreed(self) -> dict[str, Any]:
        """What all ranks must have in common, by configuration key."""
        own = {"num_workers", "cache_dir"}
        return {f"data.loading.{k}": v for k, v in asdict(self).items() if k not in own}


CHECKED = (
    *("batch_size", "max_length", "prompt_style", "batching", "val_fraction", "seed", "loading"),
)
"""The settings that `check_settings` takes."""
_LEAST = {"batch_size": 1, "max_length": 8, "loading.val_generate": 0, "loading.num_workers": 0}
_CHOICES = {
    "prompt_style": tuple(STYLES),
    "batching": get_args(Batching),
    "loading.stop": get_args(Stop),
    "loading.overlong": get_args(Overlong),
    "loading.loss_turns": get_args(LossTurns),
}


def check_settings(given: Mapping[str, Any]) -> None:
    """Raise ValueError for a setting that is out of bounds, or two that do not go together."""
    loading: LoadingConfig = given["loading"]
    values = {**given, **{f"loading.{key}": value for key, value in vars(loading).items()}}
    for key, least in _LEAST.items():
        if values[key] < least:
            raise ValueError(
                f"{key}={values[key]} is below {least}. Set data.{key} to at least {least}."
            )
    for key, choices in _CHOICES.items():
        if values[key] not in choices:
            raise ValueError(
                f"{key}={values[key]!r} is none of {', '.join(choices)}. Set data.{key}."
            )
    seed, val_fraction = values["seed"], values["val_fraction"]
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed={seed} has more than 64 bits. Set another data.seed.")
    if not 0 <= val_fraction < 1:
        raise ValueError(
            f"val_fraction={val_fraction} is outside [0, 1). Set data.val_fraction; 0.02 "
            "validates on 2 of 100 records, 0 on none."
        )
    temperature, tokens = loading.temperature, loading.tokens_per_batch
    if temperature is not None and not (type(temperature) in (int, float) and temperature > 0):
        raise ValueError(
            f"loading.temperature={temperature!r} is no number above 0. Set "
            "data.loading.temperature; 1 mixes by size, null leaves shares to the weights."
        )
    if tokens is not None and tokens < values["max_length"]:
        raise ValueError(
            f"tokens_per_batch={tokens} is below max_length={values['max_length']}, so some record "
            "may fit into no batch. Raise data.loading.tokens_per_batch, or lower data.max_length."
        )


def agree_on_settings(trainer: Trainer | None) -> None:
    """Compare the ranks before any does what the others might not, a broadcast say."""
    if trainer is None or not several_ranks():
        return
    if (stopping := Stopping.of(trainer)) is not None:
        stopping.agree(trainer)
    else:
        agree("settings", configuration(trainer))


def agree_on_data(
    examples: Mapping[str, Sequence[Example]], lengths: Callable[[], str | None], *, least: int
) -> None:
    """Raise RanksError where ranks read other data, or have fewer examples than needed.

    ``examples`` go by source or setting, ``lengths`` gives a digest of the training records'
    lengths. ``least`` is the number of processes, which would wait for one without an example; 0
    asks for none.
    """
    with together("comparison of the data"):
        found = {k: f"{len(v)} records, {tokens_digest(v)}" for k, v in examples.items()}
        found["lengths of the records"] = str(lengths())
    agree("data", found)
    for key, own in examples.items() if least else ():
        if len(own) < least:
            raise RanksError(
                f"{key} hold {len(own)} prompts for {least} processes; each needs one. Set "
                f"trainer.devices and trainer.num_nodes to {len(own)} processes or fewer."
            )
