"""RoAE as LoRA and LoRA as RoAE.

RoAE before any norm is a LoRA whose B is zero off its rows. Several terms on one fused projection
are one LoRA: their A stand one under another, and each has columns of B of its own.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, replace
from typing import Any, cast, get_args

import torch
from torch import Tensor, nn

from rosa_lightning.adapters.lora_fit import (
    check_modules,
    check_rows,
    narrowest_config,
    needed_columns,
)
from rosa_lightning.adapters.peft_format import (
    WEIGHTS_FILE,
    LoraFiles,
    LoraModule,
    lora_modules,
    target_modules,
)
from rosa_lightning.roae.geometry import read_geometry
from rosa_lightning.roae.inject import RoAEReport, roae_layers, roae_report
from rosa_lightning.roae.layer import RoAEConfig, RoAELinear, Target
from rosa_lightning.roae.targets import AdaptedProjection, select_projections
from rosa_lightning.utils.strict_json import parse

METADATA = "roae"
"""Entry of the weights' header that holds the RoAE settings, as JSON."""

_STACKED_EXPERTS = {
    "mixtral": ("gate", "w1", "w2", "w3"),
    "qwen2_moe": ("gate", "gate_proj", "up_proj", "down_proj"),
}
"""What each routed expert's projections were called where `transformers` now stacks them; PEFT
moves LoRA on any module of these names to the stacks, in models of these kinds."""


@torch.no_grad()
def to_lora(model: nn.Module) -> LoraFiles:
    """The terms of an adapted model as a plain LoRA.

    All modules have one rank, those of fewer terms filled up with zeros: PEFT reads a rank and an
    alpha for each module, but vLLM scales all by ``lora_alpha / r``, and llama.cpp each by
    ``lora_alpha`` over its own rank. Projections that no term has changed are left out, unless no
    term has changed any.

    Args:
        model: A model that `inject_roae` has adapted. It is not changed.

    Raises:
        ValueError: The model carries no RoAE, carries terms after a norm on Q and K, or carries
            terms that PEFT would put elsewhere.
    """
    report = roae_report(model)
    _check_no_norm(report)
    _check_names(model, dict.fromkeys(term.projection for term in report.projections))
    terms: dict[str, list[tuple[AdaptedProjection, RoAELinear]]] = {}
    layers = dict(roae_layers(model))
    for projection in report.projections:
        terms.setdefault(projection.projection, []).append((projection, layers[projection.name]))
    changed = {
        path: on_path
        for path, on_path in terms.items()
        if any(layer.roae_B.any() for _, layer in on_path)
    }
    terms = changed or terms
    most = max(map(len, terms.values()))
    tensors = {
        f"base_model.model.{path}.lora_{part}.weight": tensor
        for path, on_path in terms.items()
        for part, tensor in zip("AB", _stack(on_path, most), strict=True)
    }
    # Layers inside a wrapped projection count too, which can only make names longer than needed.
    targets = target_modules(set(terms), (path for path, _ in model.named_modules()))
    config = _peft_config(model, report.config, most, targets)
    metadata = {"format": "pt", METADATA: json.dumps(asdict(report.config))}
    return LoraFiles(config, tensors, metadata)


def _check_no_norm(report: RoAEReport) -> None:
    for term in report.projections:
        if term.norm:
            raise ValueError(
                f"placement=state adds the term after {term.norm}, and LoRA stands before any "
                "norm. Train with model.roae.placement=projection to export as PEFT."
            )


def _check_names(model: nn.Module, paths: Iterable[str]) -> None:
    """Refuse projections that PEFT would take for others when it loads the LoRA.

    For the sake of LoRA from before version 5 of `transformers`, which renamed and stacked modules,
    PEFT puts LoRA where the weights of that name would be loaded to, whatever module of that name
    the model has today (`peft.utils.transformers_weight_conversion`).
    """
    from transformers import conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    mapping = cast(Any, conversion_mapping)
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if mapping.get_checkpoint_conversion_mapping(kind) is None:
        return
    renamings = [
        step
        for step in mapping.get_model_conversion_mapping(model)
        if isinstance(step, WeightRenaming)
    ]
    # PEFT reads this private table. Without it, suspect every model with a mapping.
    stacked = getattr(mapping, "_MODEL_TO_CONVERSION_PATTERN", {kind: "qwen2_moe"}).get(kind)
    for path in paths:
        key = f"{path}.lora_A.weight"
        renamed, _ = rename_source_key(key, renamings, [])
        name = path.rpartition(".")[2]
        if stacked in _STACKED_EXPERTS and name in _STACKED_EXPERTS[stacked]:
            what = f"takes LoRA on {name} of {type(model).__name__} for LoRA on its routed experts"
        elif not key.endswith(renamed):  # PEFT undoes the loss of a prefix
            what = f"renames {path} of {type(model).__name__} when it loads LoRA"
        else:
            continue
        raise ValueError(
            f"PEFT {what}, and this is on {path}. Take its target out of model.roae.targets to "
            "export as PEFT, or export with format merged or rosa."
        )


def _stack(terms: list[tuple[AdaptedProjection, RoAELinear]], most: int) -> tuple[Tensor, Tensor]:
    """A (rank, inputs) and B (outputs, rank) of one projection, with room for ``most`` terms."""
    projection, layer = terms[0]
    width, num_inputs = layer.roae_A.shape
    A = layer.roae_A.new_zeros((most * width, num_inputs), device="cpu")
    B = layer.roae_B.new_zeros((projection.num_rows, most * width), device="cpu")
    for number, (_, layer) in enumerate(terms):
        columns = slice(number * width, (number + 1) * width)
        A[columns] = layer.roae_A.cpu()
        B[layer.rows, columns] = layer.roae_B.cpu()
    return A, B


def _peft_config(
    model: nn.Module, config: RoAEConfig, most: int, targets: list[str] | str
) -> dict[str, Any]:
    """What `peft.LoraConfig` needs, without the options that only some of its versions know."""
    base = getattr(model, "config", None)
    # As the base was loaded, which is what lets PEFT load it by itself. For a folder, the embedded
    # `tiny` among them, that holds on this machine alone; elsewhere, pass PEFT the base, as servers
    # do. A shorter name would be taken for a hub id, and so for somebody else's model.
    name = getattr(base, "_name_or_path", None) or None
    alpha = config.alpha * most
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": name,
        "revision": getattr(base, "_commit_hash", None),
        "inference_mode": True,
        "r": config.rank * most,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "lora_dropout": config.dropout,
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


def from_lora(
    model: nn.Module, files: LoraFiles, config: RoAEConfig | None = None
) -> tuple[RoAEConfig, dict[str, Tensor]]:
    """A LoRA as RoAE, for a base that carries none yet.

    What `to_lora` has made comes back bit for bit, under its own settings; only a projection that
    it left out begins anew. Any other LoRA is taken where its B is zero off the rows of RoAE:
    columns of B that are zero on a term's rows are dropped, and another scale than
    ``config.scale`` is folded into B. Where a term is narrower than ``config.rank``, rows of A are
    drawn as for a new term, always the same, and columns of B are zero.

    Args:
        model: The base. It is not changed.
        files: The LoRA.
        config: RoAE settings that must hold the LoRA. If not given, those that came with it, or
            else the narrowest that hold it: all targets it changes, the smallest
            ``low_freq_ratio`` and the smallest rank.

    Returns:
        The settings, and the RoAE weights by their names in a model adapted with these settings.

    Raises:
        ValueError: The LoRA is for another model, or does more than RoAE can with these settings;
            names the first module, and the row, head and dimension.
    """
    if any(True for _ in roae_layers(model)):
        raise ValueError(
            f"{type(model).__name__} carries RoAE already. Load the LoRA into a fresh base."
        )
    modules = lora_modules(files)
    measured = read_geometry(model)
    layers, _ = measured
    everything = RoAEConfig(low_freq_ratio=1.0, targets=get_args(Target))
    known, _ = select_projections(model, everything, measured, strict=False)
    check_modules(model, modules, known)
    own = own_config(files)
    is_own = own is not None and (config is None or replace(config, dropout=own.dropout) == own)
    config = config or own or narrowest_config(files, modules, layers, known)
    terms, _ = select_projections(model, config, measured)
    check_rows(modules, terms, layers, known, config)
    # Of its own, so that the same files always give the same weights.
    generator = torch.Generator().manual_seed(0)
    weights: dict[str, Tensor] = {}
    for i, term in enumerate(terms):
        before = sum(other.projection == term.projection for other in terms[:i])
        block = range(before * config.rank, (before + 1) * config.rank) if is_own else range(0)
        A, B = _weights(term, modules.get(term.projection), config, block, generator)
        weights |= {f"{term.name}.roae_A": A, f"{term.name}.roae_B": B}
    return config, weights


def own_config(files: LoraFiles) -> RoAEConfig | None:
    """The settings that `to_lora` has put into the header, if it made the files."""
    text = files.metadata.get(METADATA)
    if text is None:
        return None
    try:
        return RoAEConfig(**parse(text))
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"the RoAE settings in the header of {WEIGHTS_FILE} cannot be read: {error}"
        ) from error


def _weights(
    term: AdaptedProjection,
    module: LoraModule | None,
    config: RoAEConfig,
    block: range,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """A (rank, inputs) and B (rows, rank) of one term, from the columns of B that it needs.

    ``block`` is the columns that `to_lora` gave the term; empty if they must be found.
    """
    dtype = torch.promote_types(module.A.dtype if module else torch.float32, torch.float32)
    A = torch.empty(config.rank, term.in_features, dtype=dtype)
    nn.init.kaiming_uniform_(A, a=math.sqrt(5), generator=generator)
    B = torch.zeros(len(term.rows), config.rank, dtype=dtype)
    if module is None:
        return A, B
    columns = needed_columns(term, module)
    if set(columns) <= set(block) <= set(range(module.A.shape[0])):
        columns = list(block)
    if len(columns) > config.rank:
        raise ValueError(
            f"the LoRA on {term.projection} needs rank {len(columns)} for {term.target}, and "
            f"rank={config.rank} is given. Set model.roae.rank to at least {len(columns)}."
        )
    factor = module.scale / config.scale
    A[: len(columns)] = module.A[columns]
    B[:, : len(columns)] = module.B[list(term.rows)][:, columns]
    return A, B if math.isclose(factor, 1, rel_tol=1e-12) else B * factor
