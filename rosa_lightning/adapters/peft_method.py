"""A method of PEFT by its configuration's class and arguments, checked before a base is loaded."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentError, ArgumentParser

if TYPE_CHECKING:
    from peft import PeftConfig

_INSTALL = "pip install 'rosa-lightning[peft]'"
_NEEDS_DATA = ("eva", "corda", "lora_ga")
"""Values of ``init_lora_weights`` that PEFT computes from training data, by calls of its own."""
_NEEDS_CALLS = ("ADALORA", "XLORA")
"""Methods of PEFT whose training loop must call them."""
DROPOUTS = ("dropout", "lora_dropout", "module_dropout")
"""Settings that may differ between two trainings of the same weights."""
_SET_BY_PEFT = {
    *("peft_type", "peft_version", "auto_mapping", "task_type"),
    *("base_model_name_or_path", "revision", "inference_mode"),
}
"""Entries of a configuration that say nothing of the method."""


@dataclass(frozen=True)
class PeftMethod:
    """A method of PEFT, by its configuration's class and arguments.

    Args:
        class_path: Such as ``peft.LoraConfig``.
        init_args: Its arguments; without ``target_modules`` PEFT chooses them by the model's type.
    """

    class_path: str
    init_args: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, given: Any) -> PeftMethod:
        """Of a mapping with those two, or a `peft.PeftConfig`; ValueError for anything else."""
        if isinstance(given, PeftMethod):
            return given
        if is_dataclass(given) and not isinstance(given, type):
            path = f"{type(given).__module__}.{type(given).__qualname__}"
            kind: Any = type(given)
            return cls(_short(kind, path), _changed(kind, asdict(given)))
        if not (isinstance(given, Mapping) and isinstance(given.get("class_path"), str)):
            raise ValueError(
                f"model.peft={given!r} is no method of PEFT. Set class_path, such as "
                "peft.LoraConfig, and init_args."
            )
        # The command line adds all defaults.
        init_args = {k: v for k, v in given.items() if k not in ("class_path", "init_args")}
        # The command line leaves out init_args where each is set by itself.
        path, init_args = given["class_path"], {**(given.get("init_args") or {}), **init_args}
        found = _configuration_class(path)
        return cls(_short(found, path), _changed(found, init_args))

    @property
    def changes_base(self) -> bool:
        """Whether its start changes the base's weights; a resumed run must draw it again."""
        start = self.init_args.get("init_lora_weights", True)
        return isinstance(start, str) and start not in ("gaussian", "eva", "orthogonal")

    def config(self) -> PeftConfig:
        """The configuration that PEFT takes.

        Raises:
            ImportError: PEFT is missing.
            ValueError: No configuration of PEFT, arguments that it does not take, or a method that
                cannot be trained in place.
        """
        made = _configuration_class(self.class_path)
        _check_arguments(made, self.class_path, self.init_args)
        settings = {"task_type": "CAUSAL_LM", **self.init_args}
        if "random_seed" in (f.name for f in fields(made)):  # of what is not trained, nor saved
            settings = {"random_seed": 0, **settings}
        try:
            config: PeftConfig = made(**settings)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{self.class_path} does not take these model.peft.init_args: {error}"
            ) from error
        _check_supported(config)
        return config


def _configuration_class(path: str) -> type[PeftConfig]:
    try:
        import peft
    except ImportError as error:
        raise ImportError(f"model.peft needs PEFT, which is missing. Run {_INSTALL}.") from error
    module, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module or "peft"), name)
    except (ImportError, AttributeError, ValueError):
        found = None
    if not (isinstance(found, type) and issubclass(found, peft.PeftConfig)):
        raise ValueError(
            f"model.peft.class_path={path} is no configuration of PEFT. Name one, such as "
            "peft.LoraConfig."
        )
    return found


def _short(kind: type[PeftConfig], path: str) -> str:
    """A configuration's path as PEFT offers it, so that it has one spelling."""
    import peft

    return f"peft.{kind.__name__}" if getattr(peft, kind.__name__, None) is kind else path


def _changed(kind: type[PeftConfig], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that are not a configuration's defaults, as plain values."""
    defaults: dict[str, Any] = {}
    for one in fields(kind):
        made = one.default if one.default_factory is MISSING else one.default_factory()
        defaults[one.name] = _plain(made)
    left_out = set(_SET_BY_PEFT)
    if settings.get("init_lora_weights") != "loftq":
        left_out.add("loftq_config")
    plain = {name: _plain(value) for name, value in settings.items() if name not in left_out}
    return {k: v for k, v in plain.items() if k not in defaults or defaults[k] != v}


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    value = getattr(value, "value", value)
    named = isinstance(value, set | list) and all(isinstance(one, str) for one in value)
    return sorted(value) if named else value


def _check_arguments(kind: type[PeftConfig], path: str, init_args: Mapping[str, Any]) -> None:
    """Check names and types, which PEFT does late or not at all."""
    known = [one.name for one in fields(kind) if one.init and one.name not in _SET_BY_PEFT]
    for name in init_args:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            meant = f"Did you mean {near[0]}?" if near else f"It takes {', '.join(known)}."
            raise ValueError(f"model.peft.init_args.{name}: {path} takes no such argument. {meant}")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind)
    kinds = {one.name: str(one.type).replace("typing.", "") for one in fields(kind)}
    for name, value in init_args.items():
        # Literals in PEFT are not all that it takes, and a scale can be any number.
        free = isinstance(value, str) and "Literal" in kinds[name]
        if free or (isinstance(value, float) and "alpha" in name):
            continue
        try:
            parser.parse_object({name: value})
        except ArgumentError as error:
            raise ValueError(
                f"model.peft.init_args.{name}={value!r} does not fit {path}, which takes "
                f"{kinds[name]}. Correct it."
            ) from error


def _check_supported(config: PeftConfig) -> None:
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    name: Any = getattr(config.peft_type, "value", config.peft_type)
    reason = ""
    if config.is_prompt_learning or config.is_adaption_prompt:
        reason = "it adds tokens to the input, not weights to layers"
    elif name in _NEEDS_CALLS:
        reason = "its training loop must call it"
    elif (start := getattr(config, "init_lora_weights", None)) in _NEEDS_DATA:
        reason = f"init_lora_weights={start} computes its start from data"
    elif getattr(PEFT_TYPE_TO_TUNER_MAPPING.get(name), "uses_shared_state", False):
        reason = "it keeps shared state outside the layers"
    if reason:
        raise ValueError(
            f"{type(config).__name__} cannot be trained here: {reason}. Set model.peft to another "
            "method, such as peft.LoraConfig."
        )
