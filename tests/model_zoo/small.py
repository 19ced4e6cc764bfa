"""Every causal language model of the installed `transformers`, built small."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

SMALL: dict[str, Any] = {
    # Widths and depths, by the names in use.
    **dict.fromkeys(["hidden_size", "n_embd", "d_model"], 64),
    **dict.fromkeys(["intermediate_size", "n_inner", "d_ff", "ffn_dim", "ffn_hidden_size"], 96),
    **dict.fromkeys(["encoder_ffn_dim", "decoder_ffn_dim", "hidden_dim"], 96),
    **dict.fromkeys(["num_hidden_layers", "n_layer", "n_layers", "num_layers"], 2),
    **dict.fromkeys(["encoder_layers", "decoder_layers"], 2),
    **dict.fromkeys(["num_attention_heads", "n_head", "n_heads", "num_heads"], 4),
    **dict.fromkeys(["encoder_attention_heads", "decoder_attention_heads"], 4),
    **dict.fromkeys(["num_key_value_heads", "num_kv_heads"], 2),
    **dict.fromkeys(["head_dim", "kv_channels", "v_head_dim", "global_head_dim"], 16),
    **dict.fromkeys(["rotary_dim", "qk_rope_head_dim", "qk_nope_head_dim"], 8),
    **dict.fromkeys(["q_lora_rank", "kv_lora_rank"], 24),
    # Experts.
    **dict.fromkeys(["moe_intermediate_size", "shared_expert_intermediate_size"], 32),
    **dict.fromkeys(["num_local_experts", "num_experts", "n_routed_experts"], 4),
    **dict.fromkeys(["num_experts_per_tok", "moe_topk"], 2),
    **dict.fromkeys(["n_group", "topk_group", "n_shared_experts"], 1),
    # Rows that do not shrink with the rest, and parts that a model of two layers has no use for.
    **dict.fromkeys(["index_head_dim", "indexer_head_dim", "indexer_budget"], 16),
    **dict.fromkeys(["index_n_heads", "indexer_n_heads"], 4),
    **dict.fromkeys(["indexer_compress_ratio"], 2),
    **dict.fromkeys(["attn_layer_period"], 2),
    **dict.fromkeys(["num_kv_shared_layers", "hidden_size_per_layer_input"], 0),
    "indexer_kv_heads": 1,
    "attn_layer_indices": [1],
    "attn_layer_offset": 1,
    # Tokens.
    **dict.fromkeys(["vocab_size", "vocab_size_per_layer_input"], 96),
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""Sizes of a small model, by the names that configurations give them."""

REPEATS = 1
"""How often the kinds of layers that a configuration lists follow one another."""

_OPTIONAL = {
    *("head_dim", "num_key_value_heads", "num_experts_per_tok", "topk_group", "n_group"),
    *("n_routed_experts", "num_local_experts", "n_shared_experts", "attn_layer_indices"),
    *("indexer_head_dim", "indexer_budget", "indexer_n_heads", "indexer_kv_heads"),
    "indexer_compress_ratio",
}
"""Sizes that some configurations leave open, though their models need them."""

_ATTEMPTS: tuple[dict[str, Any], ...] = (
    {},
    {"head_dim": None},
    {"num_experts_per_tok": 1},
    {"v_head_dim": None, "head_dim": None},
    {"num_heads": None, "head_dim": None},
    {"head_dim": 8},
    {"hidden_size_per_layer_input": 8},
    {"attention": "attention"},
    {"layer_types": ["mamba", "hybrid", "mamba", "hybrid"]},
    {"layer_types": ["conv", "full_attention"]},
    {"layer_types": None, "num_hidden_layers": 4},
)
"""Changes to ``SMALL``, tried in order until a model runs; None leaves the default in place."""

_MAX_PARAMETERS = 30_000_000


def causal_models() -> dict[str, tuple[type[Any], str]]:
    """Configuration and model class of every causal language model installed, by configuration."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    return {
        config.__name__: (config, getattr(model, "__name__", str(model)))
        for config, model in MODEL_FOR_CAUSAL_LM_MAPPING.items()
    }


def build_small(name: str) -> nn.Module:
    """A small random model in evaluation mode that has run once, by its configuration's class name.

    Raises:
        Exception: Whatever the model's own code raised at the first attempt.
    """
    first: Exception | None = None
    for changes in _ATTEMPTS:
        try:
            with _quiet():
                return _build({**SMALL, **changes}, causal_models()[name][0])
        except Exception as error:
            first = first or error
    assert first is not None
    raise first


def _build(sizes: dict[str, Any], config_class: type[Any]) -> nn.Module:
    from transformers import AutoModelForCausalLM

    from_config: Any = AutoModelForCausalLM.from_config
    config = _small_config(config_class, sizes)
    with torch.device("meta"):
        empty = from_config(config)
    count = sum(parameter.numel() for parameter in empty.parameters())
    if count > _MAX_PARAMETERS:
        raise ValueError(f"it keeps {count:,} parameters when its known sizes are made small.")
    torch.manual_seed(0)
    model: nn.Module = from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        model(input_ids=torch.arange(3, 12)[None], use_cache=False)
    return model


def _small_config(config_class: type[Any], sizes: dict[str, Any]) -> Any:
    """A configuration with every size that it knows made small, and those inside it too."""
    default = config_class()
    given = {
        name: size
        for name, size in sizes.items()
        if size is not None and _is_size(default, name, sizes)
    }
    if hasattr(default, "kv_lora_rank") and "num_key_value_heads" in given:
        # Latent attention has one key a query.
        given["num_key_value_heads"] = sizes["num_attention_heads"]
    types = getattr(default, "layer_types", None)
    if sizes.get("layer_types"):
        given["layer_types"] = sizes["layer_types"] * REPEATS
        given["num_hidden_layers"] = len(given["layer_types"])
    elif types and "layer_types" not in sizes:
        # Each kind of layer once, attention among them.
        kinds = list(dict.fromkeys(types))
        if not any(
            kind.endswith(("attention", "hybrid")) for kind in set(kinds) - {"linear_attention"}
        ):
            kinds.append(sizes.get("attention", "full_attention"))
        given["layer_types"] = (kinds if len(kinds) > 1 else kinds * 2) * REPEATS
        given["num_hidden_layers"] = len(given["layer_types"])
    for name, inner in getattr(config_class, "sub_configs", {}).items():
        if getattr(default, name, None) is not None:
            kind = type(getattr(default, name)) if inner.__name__ == "AutoConfig" else inner
            given[name] = _small_config(kind, sizes).to_dict()
    return config_class(**given)


def _is_size(config: Any, name: str, sizes: dict[str, Any]) -> bool:
    """Whether a configuration has this size and lets it be set."""
    if name == "head_dim" and sizes[name] == SMALL[name] and hasattr(config, "qk_rope_head_dim"):
        return False  # there it is the rotated slice's size, and follows it
    if isinstance(getattr(type(config), name, None), property):
        return False
    try:
        value = getattr(config, name)
    except Exception:  # a size that differs from layer to layer
        return False
    known = isinstance(value, int | list) and not isinstance(value, bool)
    return known or (value is None and name in _OPTIONAL and hasattr(config, name))


@contextmanager
def _quiet() -> Iterator[None]:
    """No warnings about random weights and missing kernels."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity(50)  # not even errors: the caller raises or reports them
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
