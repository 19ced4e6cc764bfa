"""What trains in a base: RoAE, a method of PEFT, or all of its weights.

The rest of the package asks four things of a method: put it on a base (`apply_method`), which
weights are its own (`is_adapter_key`), is it the one of a checkpoint (`check_same_method`), and how
it is saved for others (`write_peft`).
"""

from __future__ import annotations

import importlib
import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from rosa_lightning.models.quantization import num_parameters
from rosa_lightning.roae.inject import PEFT_ADAPTER, RoAEReport, inject_roae, is_adapter_key
from rosa_lightning.roae.layer import RoAEConfig

if TYPE_CHECKING:
    from peft import PeftConfig

_INSTALL = "pip install 'rosa-lightning[peft]'"
_NEEDS_DATA = ("eva", "corda", "lora_ga")
"""Values of ``init_lora_weights`` that PEFT computes from training data, by calls of its own."""
_NEEDS_CALLS = ("ADALORA", "XLORA")
"""Methods of PEFT whose training loop must call them."""
_DROPOUTS = ("lora_dropout", "module_dropout")
"""Settings that may differ between two trainings of the same weights."""


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
        path, init_args = given["class_path"], dict(given.get("init_args") or {})
        found = _configuration_class(path)
        return cls(_short(found, path), _changed(found, init_args))

    def config(self) -> PeftConfig:
        """The configuration that PEFT takes.

        Raises:
            ImportError: PEFT is missing.
            ValueError: No configuration of PEFT, arguments that it does not take, or a method that
                cannot be trained in place.
        """
        made = _configuration_class(self.class_path)
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
    set_by_peft = {"peft_type", "peft_version", "auto_mapping", "task_type"}
    if settings.get("init_lora_weights") != "loftq":
        set_by_peft.add("loftq_config")
    plain = {name: _plain(value) for name, value in settings.items() if name not in set_by_peft}
    return {k: v for k, v in plain.items() if k not in defaults or defaults[k] != v}


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    value = getattr(value, "value", value)
    named = isinstance(value, set | list) and all(isinstance(one, str) for one in value)
    return sorted(value) if named else value


def _check_supported(config: PeftConfig) -> None:
    name = getattr(config.peft_type, "value", config.peft_type)
    reason = ""
    if config.is_prompt_learning or config.is_adaption_prompt:
        reason = "it adds tokens to the input, not weights to layers"
    elif name in _NEEDS_CALLS:
        reason = "its training loop must call it"
    elif (start := getattr(config, "init_lora_weights", None)) in _NEEDS_DATA:
        reason = f"init_lora_weights={start} computes its start from data"
    if reason:
        raise ValueError(
            f"{type(config).__name__} cannot be trained here: {reason}. Set model.peft to another "
            "method, such as peft.LoraConfig."
        )


@dataclass(frozen=True)
class FullFinetuning:
    """All weights train, in float32."""


Method = RoAEConfig | PeftMethod | FullFinetuning


_METHOD = "_trained_by"
"""Attribute of a model with the method that `apply_method` has put on it, where it is not RoAE."""


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


def apply_method(model: nn.Module, method: Method) -> RoAEReport | MethodReport:
    """Put a method on a base, in place, with its trained weights in float32.

    Raises:
        ValueError: The model or the method does not allow it; says why.
    """
    if isinstance(method, RoAEConfig):
        return inject_roae(model, method)
    vars(model)[_METHOD] = method
    if isinstance(method, FullFinetuning):
        model.requires_grad_(True).float()
        return _report(model, method, "Full fine-tuning")
    config = method.config()
    model.requires_grad_(False)
    try:
        _inject(model, config)
    except (ValueError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{type(config).__name__} cannot be put on {type(model).__name__}: {reason} Correct "
            "model.peft.init_args."
        ) from error
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not is_adapter_key(name):
            raise ValueError(
                f"{type(config).__name__} trains {name} of the base too, which checkpoints of an "
                "adapter do not hold. Take what says so out of model.peft.init_args, such as bias."
            )
        if parameter.requires_grad and parameter.is_floating_point():
            parameter.data = parameter.data.float()
    return _report(model, method, type(config).__name__.removesuffix("Config"))


def _inject(model: nn.Module, config: PeftConfig) -> None:
    from peft import inject_adapter_in_model

    start = getattr(config, "init_lora_weights", True)
    # These starts change the base's weights, so a resumed run must draw them again.
    fixed = isinstance(start, str) and start != "gaussian"
    with torch.random.fork_rng(devices=[], enabled=fixed), warnings.catch_warnings():
        if fixed:
            torch.manual_seed(0)
        # It asks transformers for an attribute by its older name.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
        on_meta = any(parameter.is_meta for parameter in model.parameters())
        inject_adapter_in_model(config, model, PEFT_ADAPTER, low_cpu_mem_usage=on_meta)


def _report(model: nn.Module, method: Method, name: str) -> MethodReport:
    trained = {n.rpartition(".")[0]: p for n, p in model.named_parameters() if p.requires_grad}
    modules = {path.partition(f".{PEFT_ADAPTER}")[0].rpartition(".")[0] or path for path in trained}
    num_trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return MethodReport(method, name, len(modules), num_trainable, num_parameters(model))


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

    It would make the same weights another function.
    """
    then, now = _flat(trained), _flat(given)
    for key in [*then, *(key for key in now if key not in then)]:
        name = key.rpartition(".")[2]
        if then.get(key) != now.get(key) and name != "dropout" and name not in _DROPOUTS:
            raise ValueError(
                f"the adapter was trained with {key}={then.get(key)}, and {now.get(key)} is given. "
                f"Leave {key.rpartition('.')[0]} out, or set it to what the adapter was trained "
                "with."
            )


def _flat(method: Method) -> dict[str, Any]:
    if isinstance(method, RoAEConfig):
        return {f"model.roae.{name}": value for name, value in asdict(method).items()}
    if isinstance(method, FullFinetuning):
        return {"model.finetune": "full"}
    own = {f"model.peft.init_args.{name}": value for name, value in method.init_args.items()}
    return {"model.peft.class_path": method.class_path, **own}


def trained_otherwise(model: nn.Module) -> Method | None:
    """The method that `apply_method` has put on a model; None for RoAE, and for none."""
    return vars(model).get(_METHOD)


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


def write_peft(model: nn.Module, folder: Path, base: str) -> None:
    """Write a method of PEFT as PEFT itself saves it, into an existing folder."""
    from peft import get_peft_model_state_dict

    configs: Any = model.peft_config
    config = configs[PEFT_ADAPTER]
    if str(getattr(config, "init_lora_weights", "")).startswith("pissa_niter"):
        raise ValueError(
            "PEFT would draw the start of pissa_niter anew, and so load other weights. Export with "
            "format merged, or train with init_lora_weights pissa."
        )
    config.base_model_name_or_path = base
    state = get_peft_model_state_dict(model, adapter_name=PEFT_ADAPTER, save_embedding_layers=False)
    weights = {f"base_model.model.{k}": v.detach().cpu().contiguous() for k, v in state.items()}
    config.save_pretrained(folder)
    about = {"format": "pt", "base": json.dumps(base)}
    save_file(weights, folder / "adapter_model.safetensors", about)
