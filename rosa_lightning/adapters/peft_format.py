"""A LoRA as PEFT keeps it: a folder of two files, and PEFT's rules for the names in them."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import regex
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rosa_lightning.models.finite import check_weights
from rosa_lightning.utils.files import check_input, memory_bytes, read_text
from rosa_lightning.utils.strict_json import parse

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

_KEY = re.compile(r"base_model\.model\.(?P<path>.+)\.lora_(?P<part>[AB])\.weight")
"""PEFT's name of a tensor: where the module stands in the base, and which factor it is."""

_NO_PLAIN_LORA = (
    *("use_dora", "lora_bias", "modules_to_save", "trainable_token_indices", "target_parameters"),
    *("layer_replication", "alora_invocation_tokens", "use_qalora", "use_bdlora", "arrow_config"),
    *("kasa_config", "monteclora_config"),
)
"""Options that make the adapted model another function than that of plain LoRA."""

_TYPES: dict[str, tuple[type, ...]] = {
    "base_model_name_or_path": (str,),
    "revision": (str,),
    "rank_pattern": (dict,),
    "alpha_pattern": (dict,),
    "lora_dropout": (int, float),
    "use_rslora": (bool,),
}
"""What the options that are read must be, unless they are null."""

_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Values of ``init_lora_weights`` that change the base's own weights."""


_MATCH_SECONDS = 1.0
"""The longest that matching a pattern against one name may take."""


@dataclass(frozen=True)
class LoraModule:
    """LoRA on one module, whose output grows by ``scale * B (A x)``."""

    A: Tensor
    """Shape (rank, inputs)."""
    B: Tensor
    """Shape (outputs, rank)."""
    scale: float
    """lora_alpha / rank, or lora_alpha / sqrt(rank) where the rank is stabilised."""


@dataclass(frozen=True)
class LoraFiles:
    """The contents of an adapter's folder."""

    config: dict[str, Any]
    """What ``adapter_config.json`` holds."""
    tensors: dict[str, Tensor]
    """What ``adapter_model.safetensors`` holds, by PEFT's names; on the CPU, contiguous."""
    metadata: dict[str, str]
    """The header of ``adapter_model.safetensors``, which PEFT and servers pass over."""


def read_lora(folder: str | Path) -> LoraFiles:
    """Read an adapter's folder and check that it holds plain LoRA.

    Raises:
        ValueError: A file is missing or damaged, or holds what RoAE cannot; says what.
    """
    folder = Path(folder)
    config = _read_config(folder)
    _check_options(folder, config)
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        raise ValueError(
            f"{folder} holds no {WEIGHTS_FILE}"
            + (", only adapter_model.bin. Load it with PEFT and save it again." if pickled else ".")
        )
    files = LoraFiles(config, *read_tensors(path))
    try:
        lora_modules(files)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    return files


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file, on the CPU, and its header's metadata.

    No tensor has more bytes than the file, which must fit into memory.

    Raises:
        ValueError: It is missing, damaged, no regular file or too large.
    """
    try:
        check_input(path)
        size, most = path.stat().st_size, memory_bytes() // 2
        if size > most:
            raise ValueError(f"it has {size:,} bytes, and at most {most:,} are read.")
        with safe_open(path, framework="pt", device="cpu") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            return tensors, file.metadata() or {}
    except (SafetensorError, OSError, ValueError, MemoryError) as error:
        raise ValueError(f"{path} cannot be read: {_one_line(error)}") from error


def write_lora(files: LoraFiles, folder: Path) -> None:
    """Write both files into a folder that exists.

    Raises:
        OSError, SafetensorError: The disk is full, or refuses.
    """
    (folder / CONFIG_FILE).write_text(json.dumps(files.config, indent=2) + "\n")
    save_file(files.tensors, folder / WEIGHTS_FILE, files.metadata)


def lora_modules(files: LoraFiles) -> dict[str, LoraModule]:
    """The LoRA of each module, by the module's dotted path in the base.

    Raises:
        ValueError: A tensor is no factor of a LoRA, lacks its other half, has not the rank that
            the configuration says, or holds something else than finite floating-point numbers.
    """
    check_weights(files.tensors)
    factors: dict[str, dict[str, Tensor]] = {}
    for key, tensor in files.tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise ValueError(
                f"{key} is neither lora_A.weight nor lora_B.weight of a module, and RoAE holds "
                "plain LoRA on projections alone."
            )
        factors.setdefault(match["path"], {})[match["part"]] = tensor
    if not factors:
        raise ValueError(f"{WEIGHTS_FILE} holds no LoRA.")
    return {path: _module(path, both, files.config) for path, both in factors.items()}


def _module(path: str, factors: dict[str, Tensor], config: dict[str, Any]) -> LoraModule:
    for part in "AB":
        if part not in factors:
            raise ValueError(f"{path} has no lora_{part}.weight.")
        if factors[part].ndim != 2:
            raise ValueError(
                f"lora_{part}.weight of {path} is no matrix, but has shape "
                f"{tuple(factors[part].shape)}."
            )
    rank = pattern_value(config.get("rank_pattern"), path, config.get("r", 8))
    alpha = pattern_value(config.get("alpha_pattern"), path, config.get("lora_alpha", 8))
    for name, value in (("r", rank), ("lora_alpha", alpha)):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not (number and 0 < value <= sys.float_info.max):
            raise ValueError(f"{CONFIG_FILE} gives {path} {name}={value!r}, not a number above 0.")
    A, B = factors["A"], factors["B"]
    if not A.shape[0] == B.shape[1] == rank:
        raise ValueError(
            f"{path} has rank {A.shape[0]} in lora_A.weight, {B.shape[1]} in lora_B.weight and "
            f"{rank} in {CONFIG_FILE}."
        )
    stabilised = bool(config.get("use_rslora"))
    return LoraModule(A, B, alpha / (math.sqrt(rank) if stabilised else rank))


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    try:
        config = parse(read_text(path))
    except FileNotFoundError as error:
        raise ValueError(f"{folder} holds no {CONFIG_FILE}, so it is no PEFT adapter.") from error
    except (OSError, ValueError) as error:  # not text, or no JSON
        raise ValueError(f"{path} cannot be read: {_one_line(error)}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds no JSON object.")
    return config


def _check_options(folder: Path, config: dict[str, Any]) -> None:
    """Refuse what is no LoRA, and LoRA that computes something else than ``scale * B (A x)``."""
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ValueError(f"{folder} holds a {kind} adapter; RoAE takes LORA alone.")
    options = {name: config.get(name) for name in _NO_PLAIN_LORA if config.get(name)}
    if config.get("bias", "none") != "none":
        options["bias"] = config["bias"]
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.startswith(_CHANGE_THE_BASE):
        options["init_lora_weights"] = init
    for name, types in _TYPES.items():
        value = config.get(name)
        if value is not None and type(value) not in types:
            raise ValueError(
                f"{folder / CONFIG_FILE} sets {name} to {repr(value)[:80]}, which is no "
                f"{' or '.join(kind.__name__ for kind in types)}. Set it as PEFT writes it."
            )
    for name, value in options.items():
        raise ValueError(
            f"{folder} is no plain LoRA: {CONFIG_FILE} sets {name} to {repr(value)[:80]}, which "
            "RoAE cannot hold."
        )


def pattern_value(patterns: Mapping[str, Any] | None, path: str, default: Any) -> Any:
    """What ``rank_pattern`` or ``alpha_pattern`` gives a module: the first that matches its end.

    As `peft.utils.other.get_pattern_key`, with a limit on time: `re` takes exponentially long for
    some patterns, so that an adapter from elsewhere could hang its reader.
    """
    for pattern, value in (patterns or {}).items():
        try:
            if regex.match(rf"(.*\.)?({pattern})$", path, timeout=_MATCH_SECONDS):
                return value
        except (regex.error, TimeoutError, RecursionError, MemoryError) as error:
            raise ValueError(
                f"{CONFIG_FILE} has the pattern {pattern[:60]!r}, which cannot be matched against "
                f"{path} ({_one_line(error)}). Name the modules instead."
            ) from error
    return default


def target_modules(adapted: set[str], modules: Iterable[str]) -> list[str] | str:
    """A ``target_modules`` that picks the adapted modules of a model and no other.

    PEFT's rule for a list (`peft.tuners.tuners_utils.check_target_module_exists`): a module is
    picked by its path, or by any end of it that follows a dot.

    Args:
        adapted: Dotted paths of the adapted modules.
        modules: Dotted paths of all modules, the adapted among them.

    Returns:
        Last names where these pick no other module, and full paths for the others; one regular
        expression if a full path is the end of another module's.
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


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
