"""The curves of a run: which there are, what their tags are called, and how they are drawn."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import get_args

from rosa_lightning.roae.layer import Target


@dataclass(frozen=True)
class Series:
    """The values logged under one tag."""

    steps: tuple[int, ...]
    """Optimizer steps, ascending, each once."""
    values: tuple[float, ...]


Run = Mapping[str, Series]


def as_run(logged: Mapping[str, Mapping[int, float]]) -> Run:
    """Series from values by tag and step, in the order of tags; tags without values have none."""
    found = {tag: logged[tag] for tag in sorted(logged, key=_in_order) if logged[tag]}
    return {tag: Series(*zip(*sorted(found[tag].items()), strict=True)) for tag in found}


def _in_order(tag: str) -> list[str | int]:
    """Alphabetical, and layer 100 behind layer 99."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", tag)]


@dataclass(frozen=True)
class Chart:
    """Lines over the optimizer steps, one for each tag that matches."""

    section: str
    title: str
    unit: str
    tags: str
    """Pattern of whole tags. Its group, if it has one, names the line."""
    axis: str = "from zero"
    """``from zero``, or ``share`` for 0 to 1."""
    layers: bool = False
    """Whether there is a line for each layer."""
    log: bool = False
    """Whether a map of many layers has a logarithmic scale."""


_SPEED, UPDATES = "Speed and memory", "Layers and updates"
"""Sections of charts."""
CURVES = (
    Chart("Training", "Loss", "nats per response token", "((?:train|val)/loss)"),
    Chart("Training", "Accuracy of validation answers", "share", "(val/accuracy.*)", "share"),
    Chart("Training", "Learning rate", "", "train/lr"),
    Chart(_SPEED, "Examples", "per second", "train/examples_per_s"),
    Chart(_SPEED, "Tokens", "per second", "(train/(?:supervised_)?tokens_per_s)"),
    Chart(_SPEED, "Padding", "share of the batches", "train/padding_share", "share"),
    Chart(_SPEED, "Model FLOPs utilisation", "share of the peak", "train/mfu", "share"),
    Chart(_SPEED, "Peak memory", "MiB", "train/peak_mib"),
    Chart(
        *(UPDATES, "Update relative to the frozen weights"),
        *("ratio of Frobenius norms", "weights/relative_update/(.+)"),
    ),
    Chart(UPDATES, "Lowest layer that trains", "layer", "weights/lowest_active"),
    Chart(
        *(UPDATES, "Mean share of a full backward pass so far", ""),
        *("weights/backward_share", "share"),
    ),
)
NAMES = {
    "train/loss": "training loss",
    "val/loss": "validation loss",
    "val/accuracy": "validation accuracy",
    "val/answer_tokens_given_rationale": "answer tokens right, given the rationale",
    "val/format_failures": "validation answers that state none",
    "test/accuracy": "test accuracy",
    "train/lr": "learning rate",
    "train/nonfinite_steps": "steps left out, not finite",
    "train/examples_per_s": "examples per second",
    "train/tokens_per_s": "tokens per second",
    "train/supervised_tokens_per_s": "response tokens per second",
    "train/padding_share": "share of padding",
    "train/mfu": "model FLOPs utilisation",
    "train/peak_mib": "peak memory, MiB",
    "weights/lowest_active": "lowest layer that trains",
    "weights/num_active": "layers that train",
    "weights/backward_share": "share of a full backward pass",
}
"""What tags are called on pages for people."""
_STARTS = {
    "val/accuracy/": "validation accuracy",
    "test/accuracy/": "test accuracy",
    "train/share/": "share of source",
    "weights/relative_update/": "relative update of",
    "weights/update_norm/": "update norm of",
}
_MAPS = re.compile(r"layers/(score|update_norm/.+|relative_update/.+)/\d+")
_MAP_TITLES = {
    "score": ("Layer scores", "gradient norm"),
    "relative_update": ("Update of {}, relative to the frozen weight", "ratio of Frobenius norms"),
    "update_norm": ("Update of {}", "Frobenius norm"),
}


def name_of(tag: str) -> str:
    """A tag in words."""
    for start, words in _STARTS.items():
        if tag.startswith(start):
            return f"{words} {tag.removeprefix(start)}"
    return NAMES.get(tag, tag)


def layer_charts(run: Run) -> dict[str, Chart]:
    """Charts of layers over steps that the run has numbers for, by measure and target."""
    order = {target: position for position, target in enumerate(get_args(Target))}

    def place(measure: str) -> tuple[int, int, str]:
        kind, _, target = measure.partition("/")
        return [*_MAP_TITLES].index(kind), order.get(target, len(order)), target

    charts = {}
    for measure in sorted({m[1] for tag in run if (m := _MAPS.fullmatch(tag))}, key=place):
        kind, _, target = measure.partition("/")
        title, unit = _MAP_TITLES[kind]
        about = (UPDATES, title.format(target), unit, rf"layers/{re.escape(measure)}/(\d+)")
        charts[measure] = Chart(*about, layers=True, log=kind == "score")
    return charts
