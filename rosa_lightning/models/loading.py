"""Load the frozen base model and its tokenizer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from rosa_lightning.models import tiny
from rosa_lightning.models.base_files import check_base_files, check_files
from rosa_lightning.models.finite import check_base
from rosa_lightning.models.quantization import Quantization, quantization_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from transformers.utils.quantization_config import QuantizationConfigMixin

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


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
        base: Hub id, folder, or ``tiny`` for the embedded model.
        revision: Branch, tag or commit on the hub.
        dtype: Of the weights; ``auto`` is what the base says of itself.
        attn_implementation: ``eager``, ``sdpa``, ``flash_attention_2``, ...; None lets
            `transformers` choose.
        trust_remote_code: Run Python code that comes with the base.
        quantization: Quantise its linear layers while loading; None leaves them as they are. See
            `quantization_config`.
        device: Where to quantise; by default the CPU.

    Raises:
        ValueError: It cannot be loaded, lacks weights, holds NaN or infinity, or is quantised
            already; says why in one line.
        ImportError: The library that quantises is missing.
    """
    from transformers import AutoModelForCausalLM

    source = {"revision": revision or "main", "trust_remote_code": trust_remote_code}
    with _one_line_errors(base, "model", "model.base"):
        check_base_files(_location(base), revision or "main")
    settings: dict[str, Any] = {}
    if quantization is not None:  # None, given on, would undo a quantization of the base's own
        settings["quantization_config"] = _quantizer(base, quantization, dtype, source)
        if device is not None and device.type != "cpu":
            settings["device_map"] = {"": device}
    with _one_line_errors(base, "model", "model.base"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            _location(base),
            dtype=dtype,
            attn_implementation=attn_implementation,
            output_loading_info=True,
            **source,
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
    return model


def _quantizer(
    base: str, quantization: Quantization, dtype: Dtype, source: dict[str, Any]
) -> QuantizationConfigMixin:
    """What to quantise a base with, which must not be quantised already."""
    from transformers import AutoConfig

    with _one_line_errors(base, "configuration", "model.base"):
        config = AutoConfig.from_pretrained(_location(base), **source)
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            f"base {base!r} is quantised already, so model.quantization={quantization} cannot be "
            "had. Take model.quantization out to load the base as it is."
        )
    own_dtype: torch.dtype = config.dtype or torch.float32
    return quantization_config(
        quantization, own_dtype if dtype == "auto" else getattr(torch, dtype)
    )


def load_skeleton(
    base: str,
    *,
    revision: str | None = None,
    dtype: Dtype = "auto",
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """A base from its configuration alone: `inject_roae` measures it, but it cannot be run.

    Parameters are on the meta device: shapes and data types without numbers. What `transformers`
    computes, such as rotary frequencies, is there.

    Args:
        base: As for `load_base`; a folder needs its ``config.json`` only.
        revision: As for `load_base`.
        dtype: Likewise; ``auto`` is what the configuration says.
        attn_implementation: Likewise.
        trust_remote_code: Likewise.

    Raises:
        ValueError: It cannot be loaded, or does not say its data type.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM

    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    with _one_line_errors(base, "configuration", "model.base"):
        check_base_files(_location(base), revision or "main")
        config = AutoConfig.from_pretrained(_location(base), revision=revision or "main", **options)
    named = config.dtype or config.get_text_config().dtype if dtype == "auto" else dtype
    if named is None:
        raise ValueError(
            f"the configuration of base {base!r} does not say the data type of its weights. Set "
            "model.dtype to float32, bfloat16 or float16."
        )
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        options["code_revision"] = revision  # code that comes with the base, and not newer code
    make: Any = AutoModelForCausalLM.from_config
    with _one_line_errors(base, "model", "model.base"), torch.device("meta"):
        model: PreTrainedModel = make(
            config, dtype=named, attn_implementation=attn_implementation, **options
        )
    _compute_constants(model)
    model.eval()  # type: ignore[no-untyped-call]
    return model


def _compute_constants(model: PreTrainedModel) -> None:
    """Make real what no training changes: buffers, and parameters born frozen (position tables)."""
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.zeros_like(buffer, device="cpu")
        for name, weight in module._parameters.items():
            if weight is not None and not weight.requires_grad:
                real = torch.zeros_like(weight, device="cpu")
                module._parameters[name] = nn.Parameter(real, requires_grad=False)
    # transformers computes them where it initialises weights, which on meta does nothing.
    model.initialize_weights()  # type: ignore[no-untyped-call]


def context_length(base: str, **options: Any) -> int | None:
    """Most tokens that a base reads, by its configuration; None if that does not say.

    Arguments and errors as `load_base`.
    """
    return _positive(base, "max_position_embeddings", **options)


def vocabulary_size(base: str, **options: Any) -> int | None:
    """Rows of a base's embedding, by its configuration; None if that does not say.

    Arguments and errors as `load_base`.
    """
    return _positive(base, "vocab_size", **options)


def _positive(
    base: str, name: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> int | None:
    """A number above 0 of a base's configuration."""
    from transformers import AutoConfig

    with _one_line_errors(base, "configuration", "model.base"):
        check_base_files(_location(base), revision or "main")
        config = AutoConfig.from_pretrained(
            _location(base), revision=revision or "main", trust_remote_code=trust_remote_code
        )
    value = getattr(config.get_text_config(), name, None)
    return value if isinstance(value, int) and value > 0 else None


def load_tokenizer(
    base: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    setting: str = "model.base",
    for_training: bool = True,
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a base; arguments and errors as `load_base`.

    ``setting`` is the configuration key that an error names. ``for_training`` makes sure of a
    padding token; else the tokenizer is as the base has it.
    """
    from transformers import AutoTokenizer

    with _one_line_errors(base, "tokenizer", setting):
        check_files(_location(base))
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            _location(base), revision=revision or "main", trust_remote_code=trust_remote_code
        )
    if for_training and tokenizer.pad_token_id is None:
        # Padding is masked everywhere, so any token will do.
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def enable_checkpointing(model: PreTrainedModel) -> None:
    """Compute activations again in the backward pass, without reentering autograd."""
    # transformers 5.23 renamed it; the older name warns there.
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": False})
    # Enabling may make the embeddings' output require a gradient, and so the backward pass of
    # every frozen layer necessary.
    model.disable_input_require_grads()  # type: ignore[no-untyped-call]


def base_name(model: nn.Module) -> str:
    """What a loaded base is called: hub id, folder, or ``tiny``; its class if it has no name."""
    name = str(getattr(getattr(model, "config", None), "_name_or_path", "") or "")
    return "tiny" if name == str(tiny.folder()) else whole_name(name) or type(model).__name__


def whole_name(base: str) -> str:
    """What a base is called from any working folder: a local one goes by its whole path."""
    is_folder = base not in ("", "tiny") and Path(base).is_dir()
    return str(Path(base).resolve()) if is_folder else base


def has_tokenizer(base: str, revision: str | None = None) -> bool:
    """Whether a base comes with a tokenizer, one that can be read or not."""
    from transformers.utils.hub import cached_file

    return any(
        cached_file(
            _location(base),
            name,
            revision=revision or "main",
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        for name in ("tokenizer_config.json", "tokenizer.json", "tokenizer.model", "vocab.json")
    )


def _location(base: str) -> str:
    return str(tiny.folder()) if base == "tiny" else base


@contextmanager
def _one_line_errors(base: str, what: str, setting: str) -> Iterator[None]:
    """Turn the loaders' long and varied errors into one line."""
    try:
        yield
    except Exception as error:  # of pickle, tokenizers and others, whatever a damaged file leads to
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        # Mostly the rest is advice, but after a colon the reason goes on.
        reason = " ".join(lines if lines and lines[0].endswith(":") else lines[:1])[:1000]
        if not isinstance(error, OSError | ValueError | ImportError):
            reason = f"{type(error).__name__}: {reason}".rstrip(": ")
        mend = (
            f"Set {setting} to a folder with a causal language model, to a hub id that can be "
            "reached, or to tiny."
        )
        if "trust_remote_code" in str(error):
            reason = "it comes with Python code of its own."
            mend = "Set model.trust_remote_code to true if you have read that code and trust it."
        elif Path(base).is_absolute() and not Path(base).exists():
            reason = "there is no such folder."
        raise ValueError(f"the {what} of base {base!r} could not be loaded: {reason} {mend}") from (
            error
        )
