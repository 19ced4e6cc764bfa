"""How near a merged model is to the adapted one, beside what rounding does to the base anyway.

Axes: N tokens, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from rosa_lightning.models import tiny
from rosa_lightning.roae.inject import roae_layers
from rosa_lightning.utils.modules import in_mode

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_ROWS, _TOKENS = 4, 64
_HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Agreement:
    """Of two models on the same tokens."""

    num_tokens: int
    greedy: float
    """Share of the tokens after which both choose the same token."""
    divergence: float
    """Mean Kullback-Leibler divergence of the second from the first, in nats."""

    def __str__(self) -> str:
        """A few words for people."""
        return f"{100 * self.greedy:.1f} % of greedy tokens agree, KL {self.divergence:.2g} nats"


def agreement(first_NV: Tensor, second_NV: Tensor) -> Agreement:
    """Compare logits, shape (N, V)."""
    same_N = first_NV.argmax(-1) == second_NV.argmax(-1)
    log_p_NV, log_q_NV = (logits.double().log_softmax(-1) for logits in (first_NV, second_NV))
    kl = nn.functional.kl_div(log_q_NV, log_p_NV, log_target=True, reduction="batchmean")
    return Agreement(len(same_N), same_N.double().mean().item(), max(0.0, kl.item()))


def sample_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> Tensor:
    """Token ids to compare models on, four rows of 64: English text; without a tokenizer random."""
    embeddings = cast(nn.Embedding, model.get_input_embeddings())
    vocabulary = embeddings.weight.shape[0]
    if tokenizer is not None:
        lines = (tiny.folder() / "demo_test.jsonl").read_text().splitlines()[:40]
        text = " ".join(json.loads(line)["instruction"] for line in lines)
        size = _ROWS * _TOKENS
        # Not with `truncation`, which a fast tokenizer would keep, and save with the model.
        ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"][:size])
        if len(ids) == size and ids.max() < vocabulary:
            return ids.view(_ROWS, _TOKENS)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocabulary, (_ROWS, _TOKENS), generator=generator)


@torch.no_grad()
def logits_on(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Logits after each token, in float32 on the CPU, shape (N, V)."""
    with in_mode(model, training=False):
        logits: Tensor = model(input_ids=ids.to(model.device), use_cache=False).logits
    return logits.float().cpu().flatten(0, 1)


def rounding_of_base(model: PreTrainedModel, ids: Tensor) -> Agreement | None:
    """The base in its own dtype against itself in float32; None where that is not half precision.

    Without its adapter; where all weights were trained, with these. One layer at a time is cast, so
    it takes no second model in memory.
    """
    if model.dtype not in _HALF:
        return None
    with _without_adapter(model):
        rounded_NV = logits_on(model, ids)
        with _in_float32(model):
            return agreement(logits_on(model, ids), rounded_NV)


@contextmanager
def _without_adapter(model: nn.Module) -> Iterator[None]:
    kept = [(layer.roae_B, layer.roae_B.detach().clone()) for _, layer in roae_layers(model)]
    layers: list[Any] = [m for m in model.modules() if hasattr(m, "enable_adapters")]
    layers = [one for one in layers if hasattr(one, "base_layer")]  # of PEFT
    flags = [(p, p.requires_grad) for p in model.parameters()]  # which PEFT changes
    try:
        for weight, _ in kept:
            weight.data.zero_()
        for layer in layers:
            layer.enable_adapters(False)
        yield
    finally:
        for weight, values in kept:
            weight.data.copy_(values)
        for layer in layers:
            layer.enable_adapters(True)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


@contextmanager
def _in_float32(model: nn.Module) -> Iterator[None]:
    """Let each layer compute in float32, cast when it is reached and back afterwards."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    blocks = [block for one in lists for block in one]
    inside = {module for block in blocks for module in block.modules()}
    others = [m for m in model.modules() if m not in inside and [*m.parameters(False)]]
    cast_by: dict[nn.Module, list[tuple[nn.Parameter, torch.dtype]]] = {}

    def widen(module: nn.Module, _: Any) -> None:
        found = [(p, p.dtype) for p in module.parameters() if p.dtype in _HALF]
        cast_by[module] = found
        for parameter, _dtype in found:
            parameter.data = parameter.data.float()

    def narrow(module: nn.Module, *_: Any) -> None:
        for parameter, dtype in cast_by.pop(module):
            parameter.data = parameter.data.to(dtype)

    with ExitStack() as hooks:
        for module in (*blocks, *others):
            hooks.enter_context(module.register_forward_pre_hook(widen))
            hooks.enter_context(module.register_forward_hook(narrow, always_call=True))
        yield
