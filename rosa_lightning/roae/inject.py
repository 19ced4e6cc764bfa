"""RoAE on a whole model: wrap the projections, freeze the base, merge; the adapter's state dict."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor, nn

from rosa_lightning.models.finite import check_weights
from rosa_lightning.models.quantization import (
    check_dequantizable,
    dequantize_model,
    dequantized_linear,
    dtype_of,
    is_quantized,
    num_parameters,
    quantized_modules,
    ready_four_bit_layers,
)
from rosa_lightning.roae.layer import RoAEConfig, RoAELinear, RoAENorm, RowBlocks, contiguous_runs
from rosa_lightning.roae.targets import AdaptedProjection, select_projections

_REPORT = "_roae_report"
"""Attribute under which an adapted model keeps what was done to it."""
ADAPTER_WEIGHTS = ("roae_A", "roae_B")
"""Names of the trainable parameters; all others belong to the base."""
PEFT_ADAPTER = "peft_adapter"
"""The name that an adapter of PEFT gets, which is a part of its weights' names."""


@dataclass(frozen=True)
class RoAEReport:
    """What `inject_roae` did."""

    config: RoAEConfig
    projections: tuple[AdaptedProjection, ...]
    """The terms, layer by layer in the model's order."""
    num_trainable: int
    num_total: int
    """All parameters of the adapted model."""
    notes: tuple[str, ...] = ()
    """What a layer does without, and why."""

    def __str__(self) -> str:
        """One line for people."""
        first = next((p for p in self.projections if p.adapted_pairs), None)
        dims = f", {len(first.dims)} of {first.table.head_dim} dimensions a head" if first else ""
        layers = ""
        if self.config.layer_ratio < 1:
            layers = f" of the last {len({p.layer for p in self.projections})} layers"
        return (
            f"RoAE on {len(self.projections)} projections{layers}{dims}; "
            f"{self.num_trainable:,} trainable "
            f"of {self.num_total:,} parameters "
            f"({100 * self.num_trainable / self.num_total:.2f} %)"
        )

    @property
    def remark(self) -> str:
        """What a norm after the terms does to them, in one line; empty where there is none."""
        through_norm = (p for p in self.projections if p.is_before_norm)
        if any(len(p.adapted_pairs) < len(p.table.pairs) for p in through_norm):
            return (
                "the norm on Q and K scales the other dimensions with the adapted ones; "
                "model.roae.placement=state adapts after it, for export as rosa only (docs/roae.md)"
            )
        return ""


def inject_roae(model: nn.Module, config: RoAEConfig) -> RoAEReport:
    """Freeze a causal language model and wrap its Q and K projections with RoAE, in place.

    Where Q and K stand in one fused projection, each has a term of its own on its own rows.

    Raises:
        ValueError: The model is adapted already, has no rotation that can be read or no room for
            what the configuration asks. The model is left as it was.
    """
    if any(True for _ in roae_layers(model)):
        raise ValueError(
            f"{type(model).__name__} carries RoAE already. Call merge_roae first, or load a fresh "
            "base."
        )
    ready_four_bit_layers(model)
    terms, notes = select_projections(model, config)
    model.requires_grad_(False)
    for term in terms:
        _wrap(model, term, config)
    trainable = sum(term.num_parameters for term in terms)
    report = RoAEReport(config, tuple(terms), trainable, num_parameters(model), tuple(notes))
    setattr(model, _REPORT, report)
    return report


def _wrap(model: nn.Module, term: AdaptedProjection, config: RoAEConfig) -> None:
    base = model.get_submodule(term.projection)
    layer = RoAELinear(
        base,
        in_features=term.in_features,
        blocks=RowBlocks.find(term.rows, term.num_rows, term.num_heads),
        config=config,
        defer=bool(term.norm),
        # A quantised projection may hold buffers alone.
        device=next(chain(base.parameters(), base.buffers())).device,
    ).train(base.training)
    model.set_submodule(term.projection, layer)
    if term.norm:
        blocks = RowBlocks(0, term.num_heads, term.table.head_dim, contiguous_runs(term.dims))
        norm = model.get_submodule(term.norm)
        layout = term.norm_layout
        model.set_submodule(term.norm, RoAENorm(norm, layer, layout=layout, blocks=blocks))


def roae_layers(model: nn.Module) -> Iterator[tuple[str, RoAELinear]]:
    """The wrapped projections of a model, with their dotted paths."""
    for name, module in model.named_modules():
        if isinstance(module, RoAELinear):
            yield name, module


def roae_report(model: nn.Module) -> RoAEReport:
    """What `inject_roae` did to a model; ValueError if it carries no RoAE."""
    report: RoAEReport | None = getattr(model, _REPORT, None)
    if report is None:
        raise ValueError(f"{type(model).__name__} carries no RoAE. Call inject_roae first.")
    return report


def merge_roae(model: nn.Module, *, dequantize: bool = False) -> nn.Module:
    """Fold every RoAE term into its projection, in float32, and unwrap; in place.

    Args:
        model: As `inject_roae` left it, trained or not.
        dequantize: Of a quantised base make a plain model, in the dtype of its configuration.

    Raises:
        ValueError: The model carries no RoAE, or weights cannot take it. It is left as it was.
    """
    roae_report(model)
    for _, layer in roae_layers(model):
        layer.check_mergeable(dequantize=dequantize)
    if dequantize:
        check_dequantizable(model)
    for _, wrapper in _outermost_wrappers(model):
        _merge_terms(wrapper, dtype_of(model))
    remove_roae(model)
    if dequantize:
        dequantize_model(model)
    return model


def _merge_terms(wrapper: nn.Module, dtype: torch.dtype) -> None:
    """Fold all terms of one projection; a quantised one becomes a plain one of a dtype."""
    terms = [module for module in wrapper.modules() if isinstance(module, RoAELinear)]
    base = innermost(wrapper)
    quantized = is_quantized(base)
    if quantized:
        terms[-1].base = dequantized_linear(cast(nn.Linear, base))
    for term in terms:
        term.merge()
    if quantized:
        terms[-1].base.to(dtype)


def remove_roae(model: nn.Module) -> nn.Module:
    """Unwrap every projection and norm and drop the terms, in place; the base stays frozen."""
    roae_report(model)
    for path, wrapper in _outermost_wrappers(model):
        model.set_submodule(path, innermost(wrapper))
    delattr(model, _REPORT)
    return model


@contextmanager
def merged(model: nn.Module, *, dequantize: bool = False) -> Iterator[nn.Module]:
    """The model merged for a ``with`` block; afterwards it is bit for bit as it was."""
    report, layers = roae_report(model), [layer for _, layer in roae_layers(model)]
    bases = [(layer, layer.base) for layer in layers]
    rows = [
        (layer.weight, layer.rows, layer.weight.detach()[layer.rows.to(layer.weight.device)])
        for layer in layers
        if not is_quantized(innermost(layer))
    ]
    replaced = [*_outermost_wrappers(model), *(quantized_modules(model) if dequantize else ())]
    settings = dict(vars(model)), dict(vars(getattr(model, "config", model)))
    try:
        yield merge_roae(model, dequantize=dequantize)
    finally:
        with torch.no_grad():
            for weight, index, values in rows:
                weight[index.to(weight.device)] = values
        for layer, base in bases:
            layer.base = base
        for path, module in replaced:
            model.set_submodule(path, module)
        # Without its quantization a model and its configuration lose some plain attributes.
        vars(model).update(settings[0])
        vars(getattr(model, "config", model)).update(settings[1])
        setattr(model, _REPORT, report)


def base_modules(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """All modules of the base, with the dotted paths that they have without RoAE."""
    module = innermost(module)
    yield path, module
    for name, child in module.named_children():
        yield from base_modules(child, f"{path}.{name}" if path else name)


def innermost(module: nn.Module) -> nn.Module:
    """The module of the base that stands within RoAE's, or the module itself."""
    while isinstance(module, RoAELinear | RoAENorm):
        module = module.base
    return module


def _outermost_wrappers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The RoAE layers that stand in no other, with their dotted paths: those of the base."""
    wrappers = [(p, m) for p, m in model.named_modules() if isinstance(m, RoAELinear | RoAENorm)]
    inner = {wrapper.base for _, wrapper in wrappers}
    return [(path, wrapper) for path, wrapper in wrappers if wrapper not in inner]


def is_adapter_key(key: str) -> bool:
    """Whether a state dict's key names a weight of RoAE, or of an adapter of PEFT."""
    parts = key.split(".")
    return parts[-1] in ADAPTER_WEIGHTS or PEFT_ADAPTER in parts


def check_adapter_keys(
    model: nn.Module, given: Mapping[str, Tensor], *, everything: bool = False
) -> None:
    """Check that a state dict holds the adapter's weights, or all, and no other, all finite."""
    state = model.state_dict()
    expected = {key: tuple(state[key].shape) for key in state if everything or is_adapter_key(key)}
    shapes = {key: tuple(getattr(value, "shape", ())) for key, value in given.items()}
    problems = [f"{key} is missing" for key in expected if key not in given]
    problems += [f"{key} is unknown" for key in given if key not in expected]
    problems += [
        f"{key} has shape {shapes[key]}, not {shape}"
        for key, shape in expected.items()
        if shapes.get(key, shape) != shape
    ]
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise ValueError(
            f"the adapter does not fit the model: {'; '.join(problems[:3])}{more}. Give the base "
            "and the settings under model that it was trained with."
        )
    check_weights(given)


def expect_adapters_alone(model: nn.Module, keys: Any) -> None:
    """A hook for `register_load_state_dict_post_hook`: the base's weights are not missing.

    The keys may begin with names of models around this one, as weight averaging has them.
    """
    parameters = model.named_parameters(remove_duplicate=False)  # second names are missing, too
    named = chain(parameters, model.named_buffers(remove_duplicate=False))
    ends = tuple(f".{name}" for name, _ in named if not is_adapter_key(name))
    keys.missing_keys[:] = [key for key in keys.missing_keys if not f".{key}".endswith(ends)]
