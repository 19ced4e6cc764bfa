"""Methods of a comparison against its reference: over seeds, and question by question."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rosa_lightning.comparison.statistics import holm, mcnemar, paired_bootstrap, paired_t
from rosa_lightning.utils.files import open_input, read_lines

Answers = dict[tuple[Any, ...], bool]
"""Whether an answer is right, by protocol, source, task, number and prompt of the question."""


def paired_tests(
    rows: Mapping[str, Mapping[str, Any]], reference: str, root: Path
) -> list[dict[str, Any]]:
    """Every method against the reference: validation loss over seeds, answers over questions.

    P-values are corrected together, as Holm (1979), for each metric.

    Args:
        rows: The methods' results, as ``comparison.json`` has them under ``methods``.
        reference: A name among them.
        root: The comparison's folder, with the runs' ``predictions.jsonl``.
    """
    theirs = _by_seed(rows.get(reference, {}))
    found: list[dict[str, Any]] = []
    for name, row in rows.items():
        if name == reference:
            continue
        ours = _by_seed(row)
        seeds = sorted(ours.keys() & theirs.keys())
        about = {"method": name, "reference": reference, "seeds": seeds}
        if len(seeds) > 1:
            losses = [[runs[seed]["val_loss"] for seed in seeds] for runs in (ours, theirs)]
            found.append({**about, "metric": "val_loss", **paired_t(*losses)._asdict()})
        tested = [s for s in seeds if "tasks" in ours[s] and "tasks" in theirs[s]]
        if tested:
            pairs = [[_answers(root, runs[s]) for s in tested] for runs in (ours, theirs)]
            found += [{**about, "seeds": tested, **row} for row in compare_answers(*pairs)]
    for metric in {row["metric"] for row in found}:
        of_metric = [row for row in found if row["metric"] == metric]
        for row, p in zip(of_metric, holm([row["p"] for row in of_metric]), strict=True):
            row["p_holm"] = p
    return found


def _by_seed(row: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    return {run["seed"]: run for run in row.get("runs", []) if run["status"] == "finished"}


def compare_answers(ours: Sequence[Answers], theirs: Sequence[Answers]) -> list[dict[str, Any]]:
    """Differences of accuracy by protocol and task, and over all questions, paired by question.

    Args:
        ours: The answers of one run for each seed.
        theirs: Of the other method, of the same seeds.

    Raises:
        ValueError: They answered different questions.
    """
    for a, b in zip(ours, theirs, strict=True):
        if a.keys() != b.keys():
            only = len(a.keys() ^ b.keys())
            raise ValueError(
                f"the two answered different questions: {only} were answered by one alone. Test "
                "both on the same data.test_sources, with the same protocols."
            )
    groups: dict[tuple[str, str], list[tuple[Any, ...]]] = {}
    for key in ours[0]:
        for task in (key[2], "all"):
            groups.setdefault((key[0], task), []).append(key)
    rows = []
    for (protocol, task), keys in groups.items():
        # A question's value is its mean over the seeds, so that questions are what is drawn.
        values = [
            [sum(run[key] for run in runs) / len(runs) for key in keys] for runs in (ours, theirs)
        ]
        row = {
            "metric": f"{protocol}/{task}",
            "n": len(keys),
            **paired_bootstrap(*values)._asdict(),
        }
        if len(ours) == 1:
            row["p_mcnemar"] = mcnemar(*([run[0][key] for key in keys] for run in (ours, theirs)))
        rows.append(row)
    return rows


def _answers(root: Path, result: Mapping[str, Any]) -> Answers:
    return read_answers(root / result["folder"] / "predictions.jsonl")


def read_answers(path: Path) -> Answers:
    """Which answers of a ``predictions.jsonl`` are right."""
    with open_input(path) as file:
        items = [json.loads(line) for line in read_lines(file, path)]
    names = ("protocol", "source", "task", "index", "prompt")
    return {tuple(item.get(name) for name in names): item["correct"] for item in items}
