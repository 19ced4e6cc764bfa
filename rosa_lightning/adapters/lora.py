"""RoAE as LoRA: the same function in the file format of PEFT, vLLM and llama.cpp.

RoAE before any norm is a LoRA whose B has zero rows where RoAE adds nothing. Several terms on one
fused projection are one LoRA: their A are stacked, and each has columns of B of its own.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from rosa_lightning.adapters.metadata import AdapterMetadata, Conditions
from rosa_lightning.adapters.peft_format import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    check_names,
    lora_config,
    read_header,
    read_json,
    read_tensors,
    target_modules,
)
from rosa_lightning.roae.inject import RoAEReport, roae_layers, roae_report
from rosa_lightning.roae.targets import AdaptedProjection
from rosa_lightning.utils.strict_json import parse


def write_lora(model: nn.Module, folder: Path, trained: Conditions | None = None) -> None:
    """Write the adapter of a model as a LoRA, with its metadata in the header of the weights.

    All modules have one rank, those of fewer terms filled up with zeros: PEFT reads a rank and an
    alpha for each module, but vLLM scales all by ``lora_alpha / r``, and llama.cpp each by
    ``lora_alpha`` over its own rank. Projections that training did not change are left out, unless
    it changed none.

    Args:
        model: A model that `inject_roae` has adapted, without terms after a norm.
        folder: An existing folder.
        trained: How it was trained.

    Raises:
        ValueError: The model carries no RoAE, or terms that PEFT would put elsewhere.
        OSError, SafetensorError: The disk is full, or refuses.
    """
    report = roae_report(model)
    check_names(model, dict.fromkeys(term.projection for term in report.projections))
    layers = dict(roae_layers(model))
    terms = terms_by_projection(report)
    changed = {
        path: on_path
        for path, on_path in terms.items()
        if any(layers[term.name].roae_B.any() for term in on_path)
    }
    terms = changed or terms
    most = max(map(len, terms.values()))
    rank = report.config.rank * most
    tensors: dict[str, Tensor] = {}
    for path, on_path in terms.items():
        first = layers[on_path[0].name].roae_A.detach()
        A = first.new_zeros((rank, first.shape[1]), device="cpu")
        B = first.new_zeros((on_path[0].num_rows, rank), device="cpu")
        for term, columns in zip(on_path, _columns(report.config.rank), strict=False):
            A[columns] = layers[term.name].roae_A.detach().cpu()
            B[list(term.rows), columns] = layers[term.name].roae_B.detach().cpu()
        tensors |= {_key(path, "A"): A, _key(path, "B"): B}
    # Layers inside a wrapped projection count too, which can only make names longer than needed.
    targets = target_modules(set(terms), (path for path, _ in model.named_modules()))
    config = lora_config(
        model,
        rank=rank,
        alpha=report.config.alpha * most,
        dropout=report.config.dropout,
        targets=targets,
    )
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
    known = AdapterMetadata.of(model, trained).to_dict()
    header = {"format": "pt", "roae": json.dumps(known.pop("roae"))}
    if "roae_conditions" in known:
        header["roae_conditions"] = json.dumps(known.pop("roae_conditions"))
    save_file(tensors, folder / WEIGHTS_FILE, {**header, "roae_origin": json.dumps(known)})


def lora_metadata(folder: Path) -> AdapterMetadata:
    """The metadata in a LoRA that `write_lora` has written.

    Raises:
        ValueError: It is damaged, or was made by something else.
    """
    path = folder / WEIGHTS_FILE
    header = read_header(path)
    if not {"roae", "roae_origin"} <= header.keys():
        raise ValueError(
            f"{folder} is a PEFT adapter that export has not written. To evaluate it, merge it "
            "into its base by PEFT (PeftModel.from_pretrained, merge_and_unload, save_pretrained) "
            "and set model.base to the merged folder."
        )
    try:
        known = {**parse(header["roae_origin"]), "roae": parse(header["roae"])}
        if "roae_conditions" in header:
            known["roae_conditions"] = parse(header["roae_conditions"])
        return AdapterMetadata.from_dict(known)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"the header of {path} cannot be read: {error}. Export the adapter again."
        ) from error


def lora_weights(folder: Path, report: RoAEReport) -> dict[str, Tensor]:
    """The RoAE weights in a LoRA that `write_lora` has written.

    Args:
        folder: The LoRA's.
        report: Of the model with RoAE of the LoRA's settings.

    Returns:
        A and B by their names in the model. Projections that the LoRA leaves out are missing.

    Raises:
        ValueError: It does not fit the model, or has been changed since.
    """
    settings, tensors = read_json(folder / CONFIG_FILE), read_tensors(folder / WEIGHTS_FILE)
    terms = terms_by_projection(report)
    paths = [path for path in terms if _key(path, "A") in tensors]
    rank, scale = report.config.rank, report.config.alpha / report.config.rank
    width = rank * max((len(terms[path]) for path in paths), default=1)
    unchanged = settings.get("r") == width and settings.get("lora_alpha") == scale * width
    if not unchanged or len(tensors) != 2 * len(paths):
        raise ValueError(
            f"{folder} does not hold what export wrote: other tensors, r or lora_alpha. "
            "Export the adapter again."
        )
    weights: dict[str, Tensor] = {}
    for path in paths:
        A, B = tensors[_key(path, "A")], tensors.get(_key(path, "B"), torch.empty(0))
        if B.shape != (terms[path][0].num_rows, width) or A.ndim != 2 or len(A) != width:
            raise ValueError(
                f"the LoRA on {path} has shapes {tuple(A.shape)} and {tuple(B.shape)}, which do "
                "not fit the model. Give the base that it was trained on."
            )
        for term, columns in zip(terms[path], _columns(rank), strict=False):
            weights[f"{term.name}.roae_A"] = A[columns]
            weights[f"{term.name}.roae_B"] = B[list(term.rows), columns]
            B[list(term.rows), columns] = 0
        if B.any():
            raise ValueError(
                f"the LoRA on {path} changes rows that RoAE leaves as they are, so it was trained "
                "further elsewhere. Merge it into its base by PEFT to evaluate it."
            )
    return weights


def terms_by_projection(report: RoAEReport) -> dict[str, list[AdaptedProjection]]:
    """The terms of each projection, in the order in which a LoRA stacks them."""
    terms: dict[str, list[AdaptedProjection]] = {}
    for term in report.projections:
        terms.setdefault(term.projection, []).append(term)
    return terms


def _columns(rank: int) -> list[slice]:
    """The columns of B of each term on a fused projection; there are three at most, q, k and v."""
    return [slice(start, start + rank) for start in range(0, 8 * rank, rank)]


def _key(path: str, part: str) -> str:
    """PEFT's name of a tensor."""
    return f"base_model.model.{path}.lora_{part}.weight"
