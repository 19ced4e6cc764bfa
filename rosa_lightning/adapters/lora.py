"""RoAE as LoRA: the same function in the file format of PEFT, vLLM and llama.cpp.

RoAE before any norm is a LoRA whose B has zero rows where RoAE adds nothing. Several terms on one
fused projection are one LoRA: their A are stacked, and each has columns of B of its own.
"""

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from rosa_lightning.adapters.metadata import AdapterMetadata, Conditions
from rosa_lightning.adapters.reading import naming, read_header, read_json, read_tensors
from rosa_lightning.models.loading import hub_commit
from rosa_lightning.roae.inject import RoAEReport, roae_layers, roae_report
from rosa_lightning.roae.targets import AdaptedProjection
from rosa_lightning.utils.strict_json import parse

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_HEADER = ("roae", "roae_conditions")
"""Entries of the metadata that have a header entry of their own; ``roae_origin`` holds the rest."""


def write_lora(model: nn.Module, folder: Path, trained: Conditions | None = None) -> None:
    """Write the adapter of a model as a LoRA, with its metadata in the header of the weights.

    All modules have one rank, those of fewer terms filled up with zeros: PEFT reads a rank and an
    alpha for each module, but vLLM scales all by ``lora_alpha / r``, and llama.cpp each by
    ``lora_alpha`` over its own rank. Projections that training did not change are left out, unless
    it changed none.

    Raises:
        ValueError: The model carries no RoAE, or terms that PEFT would put elsewhere.
    """
    report = roae_report(model)
    config, layers = report.config, dict(roae_layers(model))
    terms = _by_projection(report)
    check_names(model, terms)
    changed = {
        path: on_path
        for path, on_path in terms.items()
        if any(layers[term.name].roae_B.any() for term in on_path)
    }
    terms = changed or terms
    most = max(map(len, terms.values()))
    tensors: dict[str, Tensor] = {}
    for path, on_path in terms.items():
        first = layers[on_path[0].name].roae_A.detach()
        A = first.new_zeros((config.rank * most, first.shape[1]), device="cpu")
        B = first.new_zeros((on_path[0].num_rows, config.rank * most), device="cpu")
        for term, columns in _with_columns(on_path, config.rank):
            A[columns] = layers[term.name].roae_A.detach().cpu()
            B[list(term.rows), columns] = layers[term.name].roae_B.detach().cpu()
        tensors |= {_key(path, "A"): A, _key(path, "B"): B}
    base, alpha = getattr(model, "config", None), config.alpha * most
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        # As the base was loaded, which is what lets PEFT load it by itself. A shorter name than a
        # folder's path would be taken for a hub id, and so for somebody else's model.
        "base_model_name_or_path": getattr(base, "name_or_path", None) or None,
        "revision": hub_commit(model),
        "inference_mode": True,
        "r": config.rank * most,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "lora_dropout": config.dropout,
        # Layers inside a wrapped projection count too, which can only make names longer.
        "target_modules": target_modules(set(terms), (path for path, _ in model.named_modules())),
    }
    (folder / CONFIG_FILE).write_text(json.dumps(settings, indent=2) + "\n")
    known = AdapterMetadata.of(model, trained).to_dict()
    header = {key: json.dumps(known.pop(key)) for key in _HEADER if key in known}
    header |= {"format": "pt", "roae_origin": json.dumps(known)}
    save_file(tensors, folder / WEIGHTS_FILE, header)


def holds_roae(folder: Path) -> bool:
    """Whether a folder in the format of PEFT holds RoAE as `write_lora` has written it."""
    path = folder / WEIGHTS_FILE
    return path.exists() and {"roae", "roae_origin"} <= read_header(path).keys()


def lora_metadata(folder: Path) -> AdapterMetadata:
    """The metadata in a LoRA that `write_lora` has written."""
    path = folder / WEIGHTS_FILE
    header = read_header(path)
    with naming(path):
        known = {key: parse(header[key]) for key in _HEADER if key in header}
        return AdapterMetadata.from_dict({**parse(header["roae_origin"]), **known})


def lora_weights(folder: Path, report: RoAEReport) -> dict[str, Tensor]:
    """The RoAE weights in a LoRA that `write_lora` has written, by their names in the model.

    Projections that the LoRA leaves out are missing. ValueError if it does not fit the model of the
    report, or has been changed since.
    """
    settings, tensors = read_json(folder / CONFIG_FILE), read_tensors(folder / WEIGHTS_FILE)
    terms, rank = _by_projection(report), report.config.rank
    paths = [path for path in terms if _key(path, "A") in tensors]
    most = max((len(terms[path]) for path in paths), default=1)
    width, alpha = rank * most, report.config.alpha * most
    unchanged = settings.get("r") == width and settings.get("lora_alpha") == alpha
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
        for term, columns in _with_columns(terms[path], rank):
            weights[f"{term.name}.roae_A"] = A[columns]
            weights[f"{term.name}.roae_B"] = B[list(term.rows), columns]
            B[list(term.rows), columns] = 0
        if B.any():
            raise ValueError(
                f"the LoRA on {path} changes rows that RoAE leaves as they are, so it was trained "
                "further elsewhere. Merge it into its base by PEFT to evaluate it."
            )
    return weights


def _by_projection(report: RoAEReport) -> dict[str, list[AdaptedProjection]]:
    """The terms of each projection, in the order in which a LoRA stacks them."""
    terms: dict[str, list[AdaptedProjection]] = {}
    for term in report.projections:
        terms.setdefault(term.projection, []).append(term)
    return terms


def _with_columns(
    terms: list[AdaptedProjection], rank: int
) -> Iterator[tuple[AdaptedProjection, slice]]:
    """The terms on one projection, each with its rows of A, which are its columns of B."""
    for i, term in enumerate(terms):
        yield term, slice(i * rank, (i + 1) * rank)


def _key(path: str, part: str) -> str:
    """PEFT's name of a tensor."""
    return f"base_model.model.{path}.lora_{part}.weight"


# PEFT's rules for names.


def target_modules(adapted: set[str], modules: Iterable[str]) -> list[str] | str:
    """A ``target_modules`` that picks the adapted ones of a model's modules and no other.

    PEFT's rule for a list (`peft.tuners.tuners_utils.check_target_module_exists`): a module is
    picked by its path, or by any end of it that follows a dot. So last names where these pick no
    other module, and full paths for the others; one regular expression if a full path is the end
    of another module's.
    """
    others = [path.split(".") for path in modules if path not in adapted]
    taken = {".".join(parts[start:]) for parts in others for start in range(len(parts))}
    names = {path: path.rpartition(".")[2] for path in adapted}
    chosen = {path if name in taken else name for path, name in names.items()}
    if chosen & taken:
        return "|".join(re.escape(path) for path in sorted(adapted))
    return sorted(chosen)


def check_names(model: nn.Module, paths: Iterable[str]) -> None:
    """Refuse projections that PEFT would take for others when it loads the LoRA.

    For the sake of LoRA from before version 5 of `transformers`, which renamed modules and stacked
    experts, PEFT puts LoRA where the weights of that name would be loaded to, whatever module of
    that name the model has today (`peft.utils.transformers_weight_conversion`).
    """
    from transformers import conversion_mapping as mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    kind: Any = getattr(getattr(model, "config", None), "model_type", None)
    if mapping.get_checkpoint_conversion_mapping(kind) is None:  # type: ignore[no-untyped-call]
        return
    steps: list[Any] = mapping.get_model_conversion_mapping(model)  # type: ignore[arg-type]
    renamings = [step for step in steps if isinstance(step, WeightRenaming)]
    converters = [step for step in steps if isinstance(step, WeightConverter)]
    sources = [source for step in converters for source in step.source_patterns]
    stacked = {source.split(".")[-2] for source in sources if ".experts.*." in source}
    stacked |= {"gate"} if stacked else set()
    for path in paths:
        key, name = f"{path}.lora_A.weight", path.rpartition(".")[2]
        renamed, _ = rename_source_key(key, renamings, [])
        if name in stacked:
            what = f"takes LoRA on {name} of {type(model).__name__} for LoRA on its routed experts"
        elif not key.endswith(renamed):  # PEFT undoes the loss of a prefix
            what = f"renames {path} of {type(model).__name__} when it loads LoRA"
        else:
            continue
        raise ValueError(
            f"PEFT {what}, and this is on {path}. Take its target out of model.roae.targets to "
            "export as PEFT, or export with format merged or rosa."
        )
