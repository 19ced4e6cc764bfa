"""The file format of PEFT's LoRA: two files, and PEFT's rules for the names in them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from rosa_lightning.models.finite import check_weights
from rosa_lightning.utils.files import check_input, memory_bytes, read_text
from rosa_lightning.utils.strict_json import parse
from rosa_lightning.utils.text import one_line

T = TypeVar("T")

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; ValueError, in one line, if it cannot be read."""
    try:
        plain = parse(read_text(path))
        if not isinstance(plain, dict):
            raise ValueError("it holds no JSON object")
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path} cannot be read: {_one_line(error)}. Export the adapter again."
        ) from error
    return plain


def read_header(path: Path) -> dict[str, str]:
    """The metadata in the header of a safetensors file; errors as `read_tensors`."""
    return _read(path, lambda file: file.metadata() or {})


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU.

    Raises:
        ValueError: It is missing, damaged or larger than half of the memory, or a tensor holds
            something else than finite floating-point numbers.
    """
    tensors = _read(path, lambda file: {key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118
    try:
        check_weights(tensors)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return tensors


def _read(path: Path, read: Callable[[Any], T]) -> T:
    try:
        check_input(path)
        size, most = path.stat().st_size, memory_bytes() // 2
        if size > most:
            raise ValueError(f"it has {size:,} bytes, and at most {most:,} are read")
        with safe_open(path, framework="pt", device="cpu") as file:
            return read(file)
    except (SafetensorError, OSError, ValueError, MemoryError) as error:
        raise ValueError(
            f"{path} cannot be read: {_one_line(error)}. Give a folder with all files of the "
            "adapter, or export it again."
        ) from error


def _one_line(error: Exception) -> str:
    return one_line(error).rstrip(".") or type(error).__name__


def lora_config(
    model: nn.Module, *, rank: int, alpha: float, dropout: float, targets: list[str] | str
) -> dict[str, Any]:
    """What `peft.LoraConfig` needs, without the options that only some of its versions know."""
    base = getattr(model, "config", None)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        # As the base was loaded, which is what lets PEFT load it by itself. A shorter name than a
        # folder's path would be taken for a hub id, and so for somebody else's model.
        "base_model_name_or_path": getattr(base, "_name_or_path", None) or None,
        "revision": getattr(base, "_commit_hash", None),
        "inference_mode": True,
        "r": rank,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "lora_dropout": dropout,
        "target_modules": targets,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "init_lora_weights": True,
        "layers_to_transform": None,
        "layers_pattern": None,
        "rank_pattern": {},
        "alpha_pattern": {},
    }


def target_modules(adapted: set[str], modules: Iterable[str]) -> list[str] | str:
    """A ``target_modules`` that picks the adapted ones of a model's modules and no other.

    PEFT's rule for a list (`peft.tuners.tuners_utils.check_target_module_exists`): a module is
    picked by its path, or by any end of it that follows a dot. So last names where these pick no
    other module, and full paths for the others; one regular expression if a full path is the end
    of another module's.
    """
    taken = {end for path in modules if path not in adapted for end in _ends(path)}
    names = {path: path.rpartition(".")[2] for path in adapted}
    chosen = {path if name in taken else name for path, name in names.items()}
    if chosen & taken:
        return "|".join(re.escape(path) for path in sorted(adapted))
    return sorted(chosen)


def _ends(path: str) -> Iterator[str]:
    """A path and every end of it that follows a dot."""
    yield path
    while "." in path:
        path = path.partition(".")[2]
        yield path


def check_names(model: nn.Module, paths: Iterable[str]) -> None:
    """Refuse projections that PEFT would take for others when it loads the LoRA.

    For the sake of LoRA from before version 5 of `transformers`, which renamed modules and stacked
    experts, PEFT puts LoRA where the weights of that name would be loaded to, whatever module of
    that name the model has today (`peft.utils.transformers_weight_conversion`).
    """
    from transformers.conversion_mapping import (
        get_checkpoint_conversion_mapping,
        get_model_conversion_mapping,
    )
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    kind = getattr(getattr(model, "config", None), "model_type", None)
    get: Any = get_checkpoint_conversion_mapping
    if get(kind) is None:
        return
    steps: list[Any] = get_model_conversion_mapping(model)  # type: ignore[arg-type]
    renamings = [step for step in steps if isinstance(step, WeightRenaming)]
    sources = [
        s for step in steps if isinstance(step, WeightConverter) for s in step.source_patterns
    ]
    stacked = {source.split(".")[-2] for source in sources if ".experts.*." in source}
    stacked |= {"gate"} if stacked else set()
    for path in paths:
        key = f"{path}.lora_A.weight"
        renamed, _ = rename_source_key(key, renamings, [])
        if path.rpartition(".")[2] in stacked:
            name = path.rpartition(".")[2]
            what = f"takes LoRA on {name} of {type(model).__name__} for LoRA on its routed experts"
        elif not key.endswith(renamed):  # PEFT undoes the loss of a prefix
            what = f"renames {path} of {type(model).__name__} when it loads LoRA"
        else:
            continue
        raise ValueError(
            f"PEFT {what}, and this is on {path}. Take its target out of model.roae.targets to "
            "export as PEFT, or export with format merged or rosa."
        )
