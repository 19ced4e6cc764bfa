"""What a model card says of a run: its data, its settings, and the results of its tests."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from rosa_lightning.adapters.card import CardDetails, markdown_table
from rosa_lightning.adapters.fingerprint import weights_digest
from rosa_lightning.data.datamodule import ReasoningDataModule
from rosa_lightning.data.sources import Source
from rosa_lightning.dls.callback import DynamicLayerSelection
from rosa_lightning.inspection.run_facts import finished_tests, score_cells
from rosa_lightning.inspection.run_record import RunRecorder
from rosa_lightning.tasks.records import TASKS
from rosa_lightning.utils.files import read_text
from rosa_lightning.utils.text import one_line

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

_TRAINER = ("precision", "accumulate_grad_batches", "gradient_clip_val", "strategy")
"""Settings of the trainer that a card names."""
_DLS = ("policy", "num_active", "interval", "backward_budget", "optimizer_state")
"""Settings of DLS that a card names."""
_DATA = ReasoningDataModule.__name__
"""Entry of a checkpoint with what was trained on."""
Results = list[dict[str, Any]]


def run_card(ckpt_path: str, checkpoint: Mapping[str, Any], details: CardDetails) -> CardDetails:
    """Details with what a checkpoint, its run's files, and finished tests beside that run tell.

    What they do not tell, or not in a form that can be read, is unknown on the card. Settings are
    found in the folder of the checkpoint's run, and tests in the folders beside that.
    """
    run = next((one for one in Path(ckpt_path).absolute().parents[:2] if _config(one)), None)
    results = [] if run is None else _results(run, checkpoint["state_dict"])
    try:
        return replace(
            details,
            data=_data(checkpoint, results),
            training=_training(checkpoint, {} if run is None else _config(run)),
            results=_results_table(results),
            datasets=tuple(dict.fromkeys(one.hub for one in _sources(checkpoint) if one.hub)),
            scores=tuple(map(_score, results)),
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        rank_zero_warn(
            f"the model card says nothing of the training: what {ckpt_path} says of it cannot be "
            f"read ({type(error).__name__}: {one_line(error, 100)})."
        )
        return details


def _config(folder: Path) -> dict[str, Any]:
    """The configuration of a run; empty where there is none that can be read."""
    with suppress(OSError, ValueError, yaml.YAMLError):
        found = yaml.safe_load(read_text(folder / "config.yaml"))
        return found if isinstance(found, dict) else {}
    return {}


def _results(run: Path, weights: Mapping[str, Tensor]) -> Results:
    """The rows of finished tests of the same weights, the newest of each task and protocol."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    digest = weights_digest(weights)
    for test in finished_tests(run):
        norm, known = test.get("adapter_norm"), test.get("weights_digest")  # first versions: a norm
        of_norm = isinstance(norm, float) and math.isclose(norm, _norm(weights), rel_tol=1e-6)
        if known == digest or (known is None and of_norm):
            found |= {(one["protocol"], one["task"]): one for one in test["results"]}
    return list(found.values())


def _norm(weights: Mapping[str, Tensor]) -> float:
    return sum(float(weights[key].float().norm()) for key in weights if not key.endswith("roae_A"))


def _sources(checkpoint: Mapping[str, Any]) -> list[Source]:
    """What was trained on, as far as our data module has read it."""
    trainings = checkpoint.get(_DATA, {}).get("trained_on", ())
    known = [field.name for field in fields(Source)]
    return [
        Source(**{name: value for name, value in one.items() if name in known})
        for training in trainings
        for one in training["sources"]
    ]


def _data(checkpoint: Mapping[str, Any], results: Results) -> str:
    """The sources, how much of each was seen, and what of the tests stood in them."""
    sources, state = _sources(checkpoint), checkpoint.get(_DATA, {})
    if not sources:
        return "Not known: the checkpoint does not say what it was trained on."
    sizes, seen = state["order"]["sources"], state["seen"]
    by_name = {source.label: source for source in sources}
    rows = [
        (
            name,
            _place(one),
            *(f"{found[name]:,}" if name in found else "" for found in (sizes, seen)),
        )
        for name, one in by_name.items()
    ]
    parts = [markdown_table(("Source", "From", "Records", "Examples trained on"), rows)]
    left_out = {digest for one in state["trained_on"] for digest in one["left_out"]}
    if left_out:
        text = "were found in these data; the records that hold them were not trained on."
        parts.append(f"{len(left_out):,} questions of test sources {text}")
    counted = [one for one in results if one.get("contaminated") is not None]
    if counted:
        tests = {one["task"]: one for one in counted}.values()
        held = ", ".join(f"{one['task']} {one['contaminated']:,} of {one['n']:,}" for one in tests)
        parts.append(f"Test questions that were trained on (contamination): {held}.")
    else:
        reason = "a test could not count it" if results else "no test was found beside the run"
        parts.append(f"Contamination by test questions is not known: {reason}.")
    return "\n\n".join(parts)


def _place(source: Source) -> str:
    """Where a source's records are from; of a file its name alone."""
    if source.hub is None:
        return "file " + Path(str(source.path)).name
    at = f" at {source.revision}" if source.revision else ""
    subset = f", {source.subset}" if source.subset else ""
    link = f"[{source.hub}](https://huggingface.co/datasets/{source.hub})"
    return f"{link}{at}{subset}, split {source.split}"


def _training(checkpoint: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """Settings and figures of a training, from its checkpoint and its configuration."""
    state, steps = checkpoint.get(_DATA, {}), checkpoint["global_step"]
    seen = sum(state.get("seen", {}).values())  # on all devices, in all batches of a step
    size = f" of {round(seen / steps, 1):,g} examples, on average" if seen and steps else ""
    rows = [("steps", f"{steps:,}{size}")]
    made = {key: config.get(key) for key in ("optimizer", "lr_scheduler")}
    rows += [(key, _called(one)) for key, one in made.items() if isinstance(one, dict)]
    about = checkpoint["rosa"].get("conditions") or {}
    batching = state.get("order", {}).get("batching")
    lengths = {"data.max_length": about.get("max_length"), "data.batching": batching}
    rows += [(key, str(value)) for key, value in lengths.items() if value is not None]
    rows += _settings("trainer", config, _TRAINER)
    speed = checkpoint.get("hyper_parameters", {}).get("speed", {})
    if isinstance(speed, Mapping) and speed.get("prompt_gradients") is False:
        rows.append(("gradients", "through responses alone (model.speed.prompt_gradients: false)"))
    callbacks = checkpoint.get("callbacks", {})
    selections = [k for k in callbacks if k.startswith(DynamicLayerSelection.__name__)]
    for selection in (one for key in selections if (one := callbacks[key]).get("num_selections")):
        rows += _settings("dls", config, _DLS)
        layers = [name.rpartition(".")[2] for name in selection["layers"]]
        counts = zip(layers, selection["selection_counts"], strict=True)
        shown = ", ".join(f"{layer} ({count})" for layer, count in counts if count)
        rows.append(("layers", f"times selected, of {selection['num_selections']}: {shown}"))
    if "seed_everything" in config:
        rows.append(("seed_everything", str(config["seed_everything"])))
    recorded = callbacks.get(RunRecorder.__name__, {})
    if last := [one for one in recorded.get("validations", ()) if "val/loss" in one]:
        rows.append(("val/loss", f"{last[-1]['val/loss']:.4g} after step {last[-1]['step']:,}"))
    rows.append(("software", f"rosa-lightning {checkpoint['rosa'].get('version')}"))
    return markdown_table(("", ""), rows)


def _settings(group: str, config: Mapping[str, Any], names: Sequence[str]) -> list[tuple[str, str]]:
    own = config.get(group) or {}
    plain = {name: own.get(name) for name in names}
    return [(f"{group}.{k}", str(v)) for k, v in plain.items() if isinstance(v, str | int | float)]


def _called(made: Mapping[str, Any]) -> str:
    """A class and its arguments."""
    given = {k: v for k, v in (made.get("init_args") or {}).items() if v is not None}
    return f"{made.get('class_path')}({', '.join(f'{k}={v}' for k, v in given.items())})"


def _results_table(results: Results) -> str:
    if not results:
        return "No finished test of these weights was found beside the run."
    names = ("Task", "Protocol", "Accuracy, % (95 % interval)", "Questions", "Trained on")
    return markdown_table(names, map(score_cells, results))


def _score(row: Mapping[str, Any]) -> EvalResult:
    """A row of the results for a card's metadata."""
    from huggingface_hub import EvalResult

    task = TASKS.get(row["task"])
    return EvalResult(
        task_type="text-generation",
        dataset_type=(task.hub if task else None) or row["task"],
        dataset_name=row["task"],
        # Tasks may share a data set, and the hub joins results that agree in all of these.
        dataset_config=(task.subset if task else None) or row["task"],
        dataset_split=task.split if task else None,
        metric_type="accuracy",
        metric_value=row["accuracy"],
        metric_name=f"accuracy, protocol {row['protocol']}",
        metric_args={"interval_95": [*row["interval"]], "n": row["n"]},
    )
