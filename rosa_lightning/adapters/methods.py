"""What trains in a base: RoAE, a method of PEFT, or all of its weights.

The rest of the package asks three things of a method: put it on a base (`apply_method`), which
weights are its own (`is_adapter_key`), and is it the one of a checkpoint (`check_same_method`).
`peft_folder` reads and writes what PEFT saves.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rosa_lightning.adapters.fingerprint import BaseFingerprint, fingerprint
from rosa_lightning.adapters.peft_method import DROPOUTS, PeftMethod
from rosa_lightning.models.quantization import is_quantized, num_parameters
from rosa_lightning.roae.inject import PEFT_ADAPTER, RoAEReport, inject_roae, is_adapter_key
from rosa_lightning.roae.layer import RoAEConfig
from rosa_lightning.utils.text import one_line

if TYPE_CHECKING:
    from peft import PeftConfig

_CHOSEN_BY_PEFT = ("target_modules", "feedforward_modules")
"""Settings that PEFT fills in by the type of the model where they are not given."""


@dataclass(frozen=True)
class FullFinetuning:
    """All weights train, in float32."""


Method = RoAEConfig | PeftMethod | FullFinetuning


def as_method(given: Any) -> Method:
    """A method, or a configuration of PEFT, as a method."""
    return given if isinstance(given, RoAEConfig | FullFinetuning) else PeftMethod.of(given)


_APPLIED = "_trained_by"
"""Attribute of a model with what `apply_method` did, where it was not RoAE, and the fingerprint of
the base."""


@dataclass(frozen=True)
class MethodReport:
    """What `apply_method` did where it was not RoAE."""

    config: Method
    name: str
    """Such as LoraConfig, or full fine-tuning."""
    num_adapted: int
    """Modules with trained weights."""
    num_trainable: int
    num_total: int

    def __str__(self) -> str:
        """One line for people."""
        return (
            f"{self.name} on {self.num_adapted} modules; {self.num_trainable:,} trainable of "
            f"{self.num_total:,} parameters ({100 * self.num_trainable / self.num_total:.2f} %)"
        )


def apply_method(
    model: nn.Module, method: Method, weights: Mapping[str, Tensor] | None = None
) -> RoAEReport | MethodReport:
    """Put a method on a base, in place, with its trained weights in float32.

    Args:
        model: A fresh base.
        method: What trains.
        weights: Of an adapter of PEFT, by the names that PEFT saves them under; by default the
            method's own start.

    Raises:
        ValueError: The model, the method or the weights do not allow it; says why. But for full
            fine-tuning the model is left as it was.
    """
    if isinstance(method, RoAEConfig):
        return inject_roae(model, method)
    base = fingerprint(model)
    if isinstance(method, FullFinetuning):
        model.requires_grad_(True).float()
        report = _report(model, method, "Full fine-tuning")
    else:
        config = method.config()
        name = type(config).__name__.removesuffix("Config")
        with _undone_on_error(model, method.changes_base):
            model.requires_grad_(False)
            _inject(model, config, fixed=method.changes_base, empty=weights is not None)
            if weights is not None:
                _load(model, weights)
            _train_in_float32(model, name)
            report = _report(model, method, name)
    vars(model)[_APPLIED] = (report, base)
    return report


def _inject(model: nn.Module, config: PeftConfig, *, fixed: bool, empty: bool) -> None:
    """Add the layers, with the same start each time (``fixed``), or none, to be loaded next."""
    from peft import inject_adapter_in_model

    on_meta = any(parameter.is_meta for parameter in model.parameters())
    devices = range(torch.cuda.device_count())
    with torch.random.fork_rng(devices, enabled=fixed), warnings.catch_warnings():
        if fixed:
            torch.manual_seed(0)
        # It asks transformers for an attribute by its older name.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
        shared = getattr(config, "trainable_token_indices", None)  # by embedding and head
        low_memory = on_meta or (empty and not fixed and not shared)
        try:
            inject_adapter_in_model(config, model, PEFT_ADAPTER, low_cpu_mem_usage=low_memory)
        except (ValueError, TypeError, RuntimeError) as error:
            raise ValueError(
                f"{type(config).__name__} cannot be put on {type(model).__name__}: "
                f"{one_line(error)} Correct model.peft.init_args."
            ) from error


def _load(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Fill an adapter of PEFT."""
    from peft import set_peft_model_state_dict

    empty = any(p.is_meta for n, p in model.named_parameters() if is_adapter_key(n))
    try:
        keys: Any = set_peft_model_state_dict(
            model,
            {key.removeprefix(SAVED_PREFIX): value for key, value in weights.items()},
            PEFT_ADAPTER,
            low_cpu_mem_usage=empty,
        )
    except (KeyError, RuntimeError, ValueError) as error:
        reason = f"{error.args[0]} is missing" if isinstance(error, KeyError) else one_line(error)
        raise ValueError(f"the adapter does not fit the model: {reason}. {_GIVE_BASE}") from error
    named = dict(model.named_parameters(remove_duplicate=False))  # second names are missing, too
    there = {parameter for key, parameter in named.items() if key not in keys.missing_keys}
    missing = [k for k in keys.missing_keys if is_adapter_key(k) and named.get(k) not in there]
    problems = [f"{key} is missing" for key in missing]
    problems += [f"{key} is unknown" for key in keys.unexpected_keys]
    if problems:
        raise ValueError(
            f"the adapter does not fit the model: {'; '.join(problems[:3])}. {_GIVE_BASE}"
        )


SAVED_PREFIX = "base_model.model."
"""Begins the names under which PEFT saves weights: `PeftModel` stands around the model there."""
_GIVE_BASE = "Give the base that it was trained on, and a folder as PEFT saved it."


def _train_in_float32(model: nn.Module, name: str) -> None:
    """Cast what a method of PEFT trains; ValueError if that is more than checkpoints hold."""
    for key, parameter in model.named_parameters():
        if parameter.requires_grad and not is_adapter_key(key):
            raise ValueError(
                f"{name} trains {key} of the base too, which checkpoints of an adapter do not "
                "hold. Take what says so out of model.peft.init_args, such as bias."
            )
        if parameter.requires_grad and parameter.is_floating_point():
            parameter.data = parameter.data.float()


@contextmanager
def _undone_on_error(model: nn.Module, changes_weights: bool) -> Iterator[None]:
    """Leave a model as it was where putting a method of PEFT on it fails."""
    modules = dict(model.named_modules())
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    kept = [(p, p.detach().clone()) for p in model.parameters()] if changes_weights else []
    try:
        yield
    except BaseException:
        for path, module in modules.items():  # outer ones first
            if path and model.get_submodule(path) is not module:
                model.set_submodule(path, module)
        for parameter, required_grad in flags:
            parameter.requires_grad_(required_grad)
        for parameter, values in kept:
            parameter.data = values
        vars(model).pop("peft_config", None)
        raise


def _report(model: nn.Module, method: Method, name: str) -> MethodReport:
    modules = {adapted_module(n) for n, p in model.named_parameters() if p.requires_grad}
    num_trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return MethodReport(method, name, len(modules), num_trainable, num_parameters(model))


def adapted_module(name: str) -> str:
    """The module that a weight belongs to or, as a weight of PEFT, is added to; dotted paths."""
    owner = name.rpartition(".")[0]
    return (
        owner.partition(f".{PEFT_ADAPTER}")[0].rpartition(".")[0] if is_adapter_key(name) else owner
    )


def method_to_dict(method: Method) -> dict[str, Any]:
    """A method as plain values, under the key that a configuration has it by."""
    if isinstance(method, RoAEConfig):
        return {"roae": asdict(method)}
    return {"peft": asdict(method)} if isinstance(method, PeftMethod) else {"finetune": "full"}


def method_from_dict(plain: Mapping[str, Any]) -> Method:
    """From `method_to_dict`; without any of its keys a mapping raises KeyError."""
    if plain.get("finetune") == "full":
        return FullFinetuning()
    if plain.get("peft") is not None:
        return PeftMethod.of(plain["peft"])
    return RoAEConfig(**plain["roae"])


def check_same_method(trained: Method, given: Method) -> None:
    """Raise ValueError where a setting other than dropout differs from the training's.

    It would make the same weights another function. Modules that PEFT chose need not be given.
    """
    then, now = _flat(trained), _flat(given)
    for key in [*then, *(key for key in now if key not in then)]:
        group, _, name = key.rpartition(".")
        chosen = name in _CHOSEN_BY_PEFT and key not in now and type(trained) is type(given)
        if then.get(key) != now.get(key) and name not in DROPOUTS and not chosen:
            if type(trained) is not type(given):
                names = f"{_title(trained)}, and {_title(given)} is given"
            else:
                names = "{}={}, and {} is given".format(
                    key, *(one.get(key, "its default") for one in (then, now))
                )
            raise ValueError(
                f"the adapter was trained with {names}. Leave {group} out, or set it to what the "
                "adapter was trained with."
            )


def _title(method: Method) -> str:
    if isinstance(method, PeftMethod):
        return f"model.peft.class_path={method.class_path}"
    return "model.roae" if isinstance(method, RoAEConfig) else "model.finetune=full"


def _flat(method: Method) -> dict[str, Any]:
    if isinstance(method, RoAEConfig):
        return {f"model.roae.{name}": value for name, value in asdict(method).items()}
    if isinstance(method, FullFinetuning):
        return {"model.finetune": "full"}
    own = {f"model.peft.init_args.{name}": value for name, value in method.init_args.items()}
    return {"model.peft.class_path": method.class_path, **own}


def trained_otherwise(model: nn.Module) -> Method | None:
    """The method that `apply_method` has put on a model; None for RoAE, and for none."""
    applied = vars(model).get(_APPLIED)
    return None if applied is None else applied[0].config


def method_report(model: nn.Module) -> MethodReport:
    """What `apply_method` did to a model where `trained_otherwise` is not None."""
    report: MethodReport = vars(model)[_APPLIED][0]
    return report


def base_before(model: nn.Module) -> BaseFingerprint:
    """The fingerprint of the base on which a method of PEFT was put."""
    base: BaseFingerprint = vars(model)[_APPLIED][1]
    return base


@contextmanager
def as_plain(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """The weights of a plain model, the adapter merged for a ``with`` block.

    Within it the model computes with them; afterwards it is bit for bit as it was.
    """
    if isinstance(trained_otherwise(model), FullFinetuning):
        yield model.state_dict()
        return
    from peft.tuners.tuners_utils import BaseTunerLayer

    configs: Any = model.peft_config
    config = configs[PEFT_ADAPTER]
    for name in ("modules_to_save", "trainable_token_indices"):
        if getattr(config, name, None):
            raise ValueError(
                f"an adapter with {name} cannot be merged here. Export with format peft, and merge "
                "with merge_and_unload of PEFT."
            )
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    bases: list[Any] = [layer.base_layer for layer in layers]
    if any(isinstance(base, nn.Embedding) for base in bases):
        raise ValueError(
            "an adapter on the embedding cannot be merged here, since the head may share its "
            "weights. Export with format peft, and merge with merge_and_unload of PEFT."
        )
    if any(is_quantized(base) for base in bases):
        raise ValueError(
            "an adapter of PEFT on a quantised base cannot be merged. Set model.quantization to "
            "null, or export with format peft."
        )
    kept = [(p, p.detach().clone()) for base in bases for p in base.parameters()]
    try:
        for layer in layers:
            layer.merge(safe_merge=True)
        state = model.state_dict()
        own = {key: value for key, value in state.items() if not is_adapter_key(key)}
        yield {key.replace(".base_layer.", "."): value for key, value in own.items()}
    finally:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that unmerging is inexact: what it leaves is replaced
            for layer in layers:
                layer.unmerge()
            for parameter, values in kept:
                parameter.copy_(values)
