"""Quantised bases: load them (torchao, bitsandbytes), recognise their weights, dequantise them.

A weight is *packed* where its tensor is no plain float tensor: integers, float8, or a tensor type
of one of those libraries.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from inspect import signature
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers.utils.quantization_config import QuantizationConfigMixin

Quantization = Literal["int8", "llm_int8", "nf4", "fp4"]

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_LOGGERS = ("torchao", "torch.utils._pytree", "bitsandbytes.autograd._functions")
_SAID_ON_IMPORT = ("Failed to load", "Skipping import of cpp extensions", "<enum '")
"""How lines begin that these libraries log whenever they are imported, used or not."""


class _OnceAndOfUse(logging.Filter):
    """Leaves out what libraries log whenever they are imported, and repeats nothing."""

    def __init__(self) -> None:
        super().__init__()
        self._said: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether to show a line."""
        message = record.getMessage()
        is_new = message not in self._said
        self._said.add(message)
        return is_new and not message.startswith(_SAID_ON_IMPORT)


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """For the time of a call that may import them, let these libraries log what is of use, once.

    transformers imports torchao with any model.
    """
    own = _OnceAndOfUse()
    for name in _LOGGERS:
        logging.getLogger(name).addFilter(own)
    try:
        yield
    finally:
        for name in _LOGGERS:
            logging.getLogger(name).removeFilter(own)


def quantization_config(name: Quantization, dtype: torch.dtype) -> QuantizationConfigMixin:
    """What `transformers` needs to quantise the linear layers of a model while it loads them.

    There is no int4 of torchao: its kernels have no backward pass. `nf4` and `fp4` have one.

    Args:
        name: ``int8`` is torchao's weight-only scheme, one scale a row; ``llm_int8`` is that of
            Dettmers et al. (2022); ``nf4`` and ``fp4`` are four bits as in QLoRA (Dettmers et al.,
            2023), block scales quantised too.
        dtype: Of the base, in which the four-bit kernels compute.

    Raises:
        ImportError: The library behind it is not installed, or too old for `transformers`.
    """
    from transformers import BitsAndBytesConfig, TorchAoConfig, utils

    for library in ("torchao",) if name == "int8" else ("bitsandbytes", "accelerate"):
        if not getattr(utils, f"is_{library}_available")():
            raise ImportError(
                f"model.quantization={name} needs {library}, which is not installed or too old. "
                "Install it with: pip install 'rosa-lightning[quantization]'"
            )
    if name == "int8":
        from torchao.quantization import Int8WeightOnlyConfig

        # Before 0.18 another version was the default. The inductor settings are process-wide, and
        # in older versions include the precision of all float32 products.
        return TorchAoConfig(Int8WeightOnlyConfig(version=2, set_inductor_config=False))
    if name == "llm_int8":
        return BitsAndBytesConfig(load_in_8bit=True)  # type: ignore[no-untyped-call]
    return BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True,
        bnb_4bit_quant_type=name,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def is_packed(weight: Tensor) -> bool:
    """Whether a tensor holds quantised values."""
    own_type = type(weight).__module__.partition(".")[0] != "torch"
    return own_type or weight.dtype not in _FLOATS


def is_quantized(module: nn.Module) -> bool:
    """Whether a module holds a packed weight, or is a linear layer with its weight in buffers."""
    own = dict(module.named_parameters(recurse=False))
    if "weight" in own:
        return is_packed(own["weight"])
    return hasattr(module, "out_features") and not any(True for _ in module.children())


def quantized_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All modules with a packed weight of their own, with their dotted paths."""
    return ((path, module) for path, module in model.named_modules() if is_quantized(module))


def num_parameters(model: nn.Module) -> int:
    """Number of weights of a model, however they are packed."""
    total = sum(parameter.numel() for parameter in model.parameters())
    for _, layer in quantized_modules(model):
        if isinstance(layer, nn.Linear):
            total += layer.in_features * layer.out_features - layer.weight.numel()
    return total


def ready_four_bit_layers(model: nn.Module) -> None:
    """Prepare bitsandbytes' four-bit layers for training on a CPU, or refuse them.

    From 0.49 on its CPU kernels take each row of a weight to begin a new block of scales, whether
    it does or not: ValueError where rows are no whole number of blocks. And on CPUs with bfloat16
    instructions an evaluation repacks the weights for good, and their product has no gradient.
    """
    modules: dict[str, Any] = dict(model.named_modules())
    layers = {path: m for path, m in modules.items() if hasattr(m, "support_avx512bf16_for_cpu")}
    for path, layer in layers.items():
        width, block = layer.in_features, layer.weight.blocksize
        if layer.weight.device.type == "cpu" and width % block:
            raise ValueError(
                f"{path}: on a CPU bitsandbytes computes wrong values where a row ({width}) is no "
                f"whole number of blocks ({block}). Set model.quantization to int8, or use a GPU."
            )
    for layer in layers.values():
        layer.support_avx512bf16_for_cpu = False
        layer.state_dict()  # packs an evaluated one the usual way again


def check_trainable(model: nn.Module) -> None:
    """Raise ValueError for a base that is quantised in a way that has no backward pass."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not quantizer.is_trainable:
        method = quantizer.quantization_config.quant_method
        raise ValueError(
            f"the base is quantised ({getattr(method, 'value', method)}) in a way that has no "
            "backward pass, so nothing can be trained on it. Give model.base an unquantised base, "
            "and model.quantization int8 or nf4."
        )


def check_dequantizable(model: nn.Module) -> None:
    """Raise ValueError for the first packed weight of a model that cannot be dequantised."""
    for path, module in quantized_modules(model):
        if not isinstance(module, nn.Linear) or _dequantize(module) is None:
            raise ValueError(
                f"{path} ({type(module).__name__}) is quantised in a way that cannot be undone "
                "here. Load the base unquantised and merge into that."
            )


def dequantize_model(model: nn.Module) -> None:
    """Replace every quantised layer by a plain linear one, in the dtype of the configuration.

    Call `check_dequantizable` first.
    """
    dtype = dtype_of(model)
    for path, module in list(quantized_modules(model)):
        model.set_submodule(path, dequantized_linear(cast(nn.Linear, module)).to(dtype))
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(model)


def dtype_of(model: nn.Module) -> torch.dtype:
    """The dtype of a model's plain weights."""
    configured: torch.dtype | None = getattr(getattr(model, "config", None), "dtype", None)
    plain = (weight.dtype for weight in model.parameters() if not is_packed(weight))
    return configured or next(plain)


@torch.no_grad()
def dequantized_linear(module: nn.Linear) -> nn.Linear:
    """A plain linear layer with the values of a quantised one, in float32 and frozen."""
    has_bias = module.bias is not None
    with torch.device("meta"):
        linear = nn.Linear(module.in_features, module.out_features, bias=has_bias)
    dequantize = cast(Callable[[], Tensor], _dequantize(module))
    linear.weight = nn.Parameter(dequantize().float(), requires_grad=False)
    if has_bias:
        linear.bias = nn.Parameter(module.bias.float(), requires_grad=False)
    return linear.train(module.training)


def _dequantize(module: nn.Linear) -> Callable[[], Tensor] | None:
    """What gives the weight (out, in) that a quantised layer stands for; None if nothing does."""
    weight, library = module.weight, type(module.weight).__module__.partition(".")[0]
    if library == "torchao" and "output_dtype" in signature(weight.dequantize).parameters:
        return partial(cast(Any, weight).dequantize, output_dtype=torch.float32)
    if library == "bitsandbytes":
        from transformers.integrations.bitsandbytes import dequantize_bnb_weight

        state = getattr(module, "state", None)
        return partial(dequantize_bnb_weight, cast(nn.Parameter, weight), state)
    return None
