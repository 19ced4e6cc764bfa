"""What is checked of a configuration before anything is made of it: numbers, and what it calls."""

import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from jsonargparse import Namespace
from lightning.pytorch.cli import ReduceLROnPlateau
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from rosa_lightning.cli.names import GROUPS
from rosa_lightning.utils.errors import ConfigurationError

_LEAST = {
    "accumulate_grad_batches": (1, "1 takes a step after each batch"),
    "check_val_every_n_epoch": (1, "null counts val_check_interval over all epochs"),
    "log_every_n_steps": (0, "0 logs nothing"),
    "max_steps": (-1, "-1 goes on to max_epochs"),
    "min_steps": (0, "null asks for none"),
    "min_epochs": (0, "null asks for none"),
    "num_sanity_val_steps": (-1, "-1 takes all batches, 0 none"),
    "gradient_clip_val": (0, "null clips nothing"),
}
"""The least that a setting can be, and what a special value means."""
ONE_SELECTION = (
    "trainer.callbacks holds DynamicLayerSelection, which every fit has. Take it out of "
    "trainer.callbacks and give its settings as dls: {num_active: 0.5, interval: 100}; its "
    "former argument moments is dls.optimizer_state, and dls.policy: all trains every layer."
)
_OF_A_BASE = (
    *("base", "revision", "dtype", "quantization", "trust_remote_code"),
    *("adapter", "roae", "peft", "finetune"),
)
_OF_A_STEP = (
    *("model.attn_implementation", "model.speed.gradient_checkpointing"),
    *("data.batch_size", "data.loading.tokens_per_batch"),
)
VISIBLE_KEYS: dict[str, tuple[str, ...]] = {
    "chat": (
        *(f"model.{name}" for name in _OF_A_BASE),
        *("model.evaluation.max_new_tokens", "data.tokenizer", "trainer.accelerator"),
    ),
    "export": tuple(f"model.{name}" for name in _OF_A_BASE),
    "inspect": (
        *(f"model.{name}" for name in _OF_A_BASE),
        *(*_OF_A_STEP, "data.max_length", "data.sources", "trainer.precision", "dls.num_active"),
    ),
    "audit": (
        *("model.base", "model.revision", "model.trust_remote_code", "model.adapter"),
        *("data.sources", "data.test_sources", "data.tokenizer", "data.prompt_style"),
        *("data.max_length", "data.loading.decontaminate"),
    ),
    "compare": ("model.", "data.", "dls.", "optimizer", "lr_scheduler", "trainer."),
    "report": (),
}
"""The keys of a training that mean something to such a command, or how they begin."""
_MADE: dict[str, tuple[type, ...]] = {
    "optimizer": (Optimizer,),
    "lr_scheduler": (LRScheduler, ReduceLROnPlateau),
}
"""What the settings that are called later must make."""


def check_trainer_settings(trainer: Mapping[str, Any]) -> None:
    """Refuse numbers that lead to a division by zero, to silence, or to nothing.

    Raises:
        ConfigurationError: Names the setting, and what it can be.
    """
    for key, (least, special) in _LEAST.items():
        value = trainer.get(key)
        if isinstance(value, int | float) and not value >= least:  # NaN is none either
            raise ConfigurationError(
                f"trainer.{key}={value} is below {least}. Set trainer.{key}; {special}."
            )
    interval = trainer.get("val_check_interval")
    if isinstance(interval, int | float) and interval == 0:
        raise ConfigurationError(
            f"trainer.val_check_interval={interval} is no interval. Set it to a number of batches "
            "or a share of an epoch; trainer.limit_val_batches: 0 leaves validation out."
        )


def check_accelerator(name: Any) -> None:
    """Raise ConfigurationError for a GPU where there is none."""
    if str(name).lower() in ("gpu", "cuda") and not torch.accelerator.is_available():
        raise ConfigurationError(
            f"trainer.accelerator={name}: torch {torch.__version__} finds no GPU here. Set "
            "trainer.accelerator to cpu or auto, or install a driver and a build of torch that fit."
        )


def check_groups(values: Any) -> None:
    """Raise ConfigurationError for a value where a group of settings belongs, as ``model: 2``.

    The values are those of a configuration file, of one command or by commands.
    """
    for settings in (values, *(values.values() if isinstance(values, dict) else ())):
        for group in GROUPS:
            value = settings
            for name in group.split("."):
                value = value.get(name, {}) if isinstance(value, dict) else {}
            if not isinstance(value, dict):
                raise ConfigurationError(
                    f"{group} is {value!r}; expected a mapping of its settings. Write {group}: and "
                    "its settings below it, indented, one a line, or leave it out."
                )


def check_classes(config: Mapping[str, Any]) -> None:
    """Refuse a ``class_path`` that is no class, or not one of the kind that its setting makes.

    jsonargparse checks most; it would call any function that stands where a callable is expected.
    The configuration is that of a command, parsed: what it names has been imported.

    Raises:
        ConfigurationError: Names the setting and the class.
    """
    for key, kinds in _MADE.items():
        made = _class_path(config.get(key))
        if made and not (inspect.isclass(found := named(made)) and issubclass(found, kinds)):
            names = " or ".join(f"{kind.__module__}.{kind.__qualname__}" for kind in kinds)
            raise ConfigurationError(
                f"{key}.class_path={made} is no subclass of {names}. Set {key} to one, such as "
                f"{'torch.optim.AdamW' if key == 'optimizer' else 'ConstantLR'}."
            )
    for key, value in _entries(config).items():
        _check_no_function(key, value)


def check_optimizer(make: Callable[[list[Any]], Any]) -> None:
    """Make an optimizer of one weight, to find wrong arguments before anything is loaded.

    Raises:
        ConfigurationError: It cannot be made.
    """
    try:
        # A matrix, as adapters are: some optimizers, such as Muon, take nothing else.
        make([torch.nn.Parameter(torch.zeros(1, 1))])
    except (ValueError, TypeError) as error:
        raise ConfigurationError(
            f"the optimizer cannot be made: {error}. Correct optimizer.init_args."
        ) from error


def _check_no_function(key: str, value: Any) -> None:
    if isinstance(value, list | tuple):
        for inner in value:
            _check_no_function(key, inner)
    elif isinstance(value, Mapping | Namespace):
        path = _class_path(value)
        found = named(path) if path else None
        if found is not None and not inspect.isclass(found):
            raise ConfigurationError(
                f"{key}: class_path={path} is no class. A configuration names classes, and calls "
                "no functions."
            )
        for name, inner in _entries(value).items():
            _check_no_function(f"{key}.{name}", inner)


def _entries(value: Any) -> Mapping[str, Any]:
    return vars(value) if isinstance(value, Namespace) else value


def _class_path(value: Any) -> str | None:
    path = value.get("class_path") if isinstance(value, Mapping | Namespace) else None
    return path if isinstance(path, str) else None


def named(path: str) -> Any:
    """What an import path names, if its module is loaded; None otherwise. Imports nothing."""
    parts = path.split(".")
    for size in range(len(parts), 0, -1):
        if (found := sys.modules.get(".".join(parts[:size]))) is not None:
            for name in parts[size:]:
                found = getattr(found, name, None)
            return found
    return None
