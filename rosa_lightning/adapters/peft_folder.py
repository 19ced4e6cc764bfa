"""Folders in which PEFT saves a method of its own: read, also where others wrote them, and written.

RoAE in the format of PEFT is in `lora`.
"""

import json
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

from rosa_lightning.adapters.fingerprint import BaseFingerprint, fingerprint
from rosa_lightning.adapters.lora import CONFIG_FILE, WEIGHTS_FILE
from rosa_lightning.adapters.metadata import AdapterMetadata, Conditions
from rosa_lightning.adapters.methods import (
    SAVED_PREFIX,
    Method,
    MethodReport,
    apply_method,
    base_before,
    check_same_method,
)
from rosa_lightning.adapters.peft_method import DROPOUTS, PeftMethod
from rosa_lightning.adapters.reading import naming, read_header, read_json, read_tensors
from rosa_lightning.roae.inject import PEFT_ADAPTER
from rosa_lightning.utils.strict_json import parse

_BASE, _CONDITIONS = "rosa_base", "rosa_conditions"
"""Entries of the weights' header, in folders that this package wrote."""


def write_peft(model: nn.Module, folder: Path, trained: Conditions | None = None) -> None:
    """Write a method of PEFT as PEFT itself saves it, into an existing folder."""
    from peft import get_peft_model_state_dict

    configs: Any = model.peft_config
    config = configs[PEFT_ADAPTER]
    if _starts_anew(config):
        raise ValueError(
            "PEFT would draw the start of pissa_niter anew, and so load other weights. Export with "
            "format merged, or train with init_lora_weights pissa."
        )
    known = base_before(model)
    # As the base was loaded, which is what lets PEFT load it by itself.
    base: Any = getattr(model, "config", None)
    config.base_model_name_or_path = getattr(base, "name_or_path", None) or None
    config.revision = known.revision
    state = get_peft_model_state_dict(model, adapter_name=PEFT_ADAPTER, save_embedding_layers=False)
    weights = {
        f"{SAVED_PREFIX}{key}": value.detach().cpu().contiguous() for key, value in state.items()
    }
    config.save_pretrained(folder)
    about = {"format": "pt", _BASE: json.dumps(asdict(known))}
    if trained is not None:
        about[_CONDITIONS] = json.dumps(trained.to_dict())
    save_file(weights, folder / WEIGHTS_FILE, about)


def _starts_anew(config: Any) -> bool:
    """Whether PEFT draws numbers that the adapter's base is left with, and does not save them."""
    return str(getattr(config, "init_lora_weights", "")).startswith("pissa_niter")


def peft_metadata(folder: Path) -> AdapterMetadata:
    """What a folder of PEFT says of itself; its base is known by name alone where others wrote it.

    Raises:
        ImportError: PEFT is missing.
        ValueError: It is damaged, or of a method that cannot be had here.
    """
    method, settings = _read_method(folder)
    path = folder / WEIGHTS_FILE
    if not path.exists() and path.with_suffix(".bin").exists():
        raise ValueError(
            f"{folder} holds pickled weights (.bin), which are not read since they may hold code. "
            "Save the adapter with PEFT again, as safetensors."
        )
    header = read_header(path)
    base, revision = settings.get("base_model_name_or_path") or "", settings.get("revision")
    known = BaseFingerprint(base=str(base), revision=revision, samples={})
    conditions = None
    with naming(path):
        if _BASE in header:
            plain = {"base": parse(header[_BASE]), "peft": asdict(method)}
            known = AdapterMetadata.from_dict(plain).base
        if _CONDITIONS in header:
            conditions = Conditions.from_dict(parse(header[_CONDITIONS]))
    return AdapterMetadata(base=known, method=method, conditions=conditions)


def _read_method(folder: Path) -> tuple[PeftMethod, dict[str, Any]]:
    path = folder / CONFIG_FILE
    settings = read_json(path)
    settings.pop("runtime_config", None)
    kind = settings.get("peft_type")
    try:
        from peft import PeftConfig
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    except ImportError as error:
        raise ImportError(
            f"{folder} is an adapter of PEFT, which is missing. Run "
            "pip install 'rosa-lightning[peft]'."
        ) from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what it takes; what it leaves out is an error
        warnings.filterwarnings("error", "Unexpected keyword arguments", UserWarning)
        with naming(path):
            if kind not in PEFT_TYPE_TO_CONFIG_MAPPING:
                raise ValueError(f"peft_type={kind!r} is no method of the PEFT that is installed")
            try:
                config: Any = PeftConfig.from_peft_type(**settings)  # type: ignore[no-untyped-call]
            except UserWarning as error:
                raise ValueError(f"{error}") from error
        if getattr(config, "init_lora_weights", None) == "eva":
            config.init_lora_weights = True  # the weights are there, and the base is as it was
        if _starts_anew(config):
            raise ValueError(
                f"{folder}: PEFT did not save what pissa_niter made of the base. Merge the adapter "
                "where it was trained, or save it with path_initial_model_for_weight_conversion."
            )
        method = PeftMethod.of(config)
        try:
            method.config()
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from error
    return method, settings


def load_peft(model: nn.Module, folder: Path, given: Method | None) -> MethodReport:
    """Put an adapter of PEFT on a fresh base; `load_adapter` says what is checked."""
    metadata = peft_metadata(folder)
    method = metadata.method
    assert isinstance(method, PeftMethod), "that is what it reads"
    if given is not None:
        check_same_method(method, given)
    if metadata.base.samples:
        fingerprint(model).check(metadata.base)
    if isinstance(given, PeftMethod):
        kept = {key: one for key, one in method.init_args.items() if key not in DROPOUTS}
        free = {key: one for key, one in given.init_args.items() if key in DROPOUTS}
        method = replace(method, init_args={**kept, **free})
    report = apply_method(model, method, read_tensors(folder / WEIGHTS_FILE))
    assert isinstance(report, MethodReport), "no RoAE was put on it"
    return report
