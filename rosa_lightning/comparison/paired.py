"""Methods against the reference, and against the base: over seeds, questions and texts."""

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from rosa_lightning.comparison.statistics import holm, mcnemar, paired_bootstrap, paired_t
from rosa_lightning.inspection.text_loss import TEXT_LOSS
from rosa_lightning.tasks.records import scored_as
from rosa_lightning.utils.files import open_input, read_lines, read_text

Answers = dict[tuple[Any, ...], bool]
"""Whether an answer is right, by protocol, source, task, number and prompt of the question."""
Texts = Sequence[tuple[float, int]]
"""The loss of each text, summed over its tokens, and their number."""


def paired_tests(
    rows: Mapping[str, Mapping[str, Any]], reference: str, root: Path
) -> list[dict[str, Any]]:
    """Every method against the reference: over seeds, over questions, and over general texts.

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
        read = [s for s in seeds if "text_loss" in ours[s] and "text_loss" in theirs[s]]
        if read:
            texts = [[_texts(root, runs[s]) for s in read] for runs in (ours, theirs)]
            found.append({**about, "seeds": read, "metric": "text_loss", **compare_texts(*texts)})
    for metric in {row["metric"] for row in found}:
        of_metric = [row for row in found if row["metric"] == metric]
        for row, p in zip(of_metric, holm([row["p"] for row in of_metric]), strict=True):
            row["p_holm"] = p
    return found


def forgetting(
    rows: Mapping[str, Mapping[str, Any]],
    base: Mapping[str, Any],
    root: Path,
    trained: Collection[str],
) -> dict[str, dict[str, Any]]:
    """What training changed of what the base could do, for each method, by metric.

    ``text_loss``: the loss on general texts, in nats per token. ``untrained/<protocol>``: the
    accuracy on the questions of tasks that were not trained on, as a share. Each has the ``base``'s
    value beside the difference from it.

    Args:
        rows: The methods' results, as for `paired_tests`.
        base: The result of the base.
        root: The comparison's folder.
        trained: The tasks that were trained on.
    """
    found: dict[str, dict[str, Any]] = {name: {} for name in rows}
    for name, row in rows.items():
        runs = list(_by_seed(row).values())
        read = [run for run in runs if "text_loss" in run]
        if read and "text_loss" in base:
            texts = [_texts(root, run) for run in read], [_texts(root, base)] * len(read)
            value = {"base": base["text_loss"]["loss"], **compare_texts(*texts)}
            found[name]["text_loss"] = value
        tested = [_untrained(_answers(root, run), trained) for run in runs if "tasks" in run]
        if tested and "tasks" in base and tested[0]:
            before = _untrained(_answers(root, base), trained)
            for change in compare_answers(tested, [before] * len(tested)):
                protocol, _, task = change.pop("metric").partition("/")
                right = [value for key, value in before.items() if key[0] == protocol]
                if task == "all":
                    value = {"base": sum(right) / len(right), **change}
                    found[name][f"untrained/{protocol}"] = value
    return {name: changes for name, changes in found.items() if changes}


def _untrained(answers: Answers, trained: Collection[str]) -> Answers:
    return {key: value for key, value in answers.items() if key[2] not in trained}


def compare_texts(ours: Sequence[Texts], theirs: Sequence[Texts]) -> dict[str, Any]:
    """Difference of the loss in nats per token, paired by text.

    A text counts for its number of tokens. Its loss is the mean over the seeds, of each of which
    both have the losses of a run; ValueError if these are of different texts.
    """
    tokens = [[number for _, number in texts] for texts in (*ours, *theirs)]
    if any(one != tokens[0] for one in tokens):
        raise ValueError(
            "the losses on general text are of different texts, or other tokens. Remove the "
            "files text_loss.json, and run the comparison again."
        )
    counted = [place for place, number in enumerate(tokens[0]) if number]
    weights = [tokens[0][place] for place in counted]
    values = [
        [
            sum(texts[place][0] for texts in runs) / len(runs) / number
            for place, number in zip(counted, weights, strict=True)
        ]
        for runs in (ours, theirs)
    ]
    return {"n": len(counted), **paired_bootstrap(*values, weights=weights)._asdict()}


def _by_seed(row: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    return {run["seed"]: run for run in row.get("runs", []) if run["status"] == "finished"}


def compare_answers(ours: Sequence[Answers], theirs: Sequence[Answers]) -> list[dict[str, Any]]:
    """Differences of accuracy by protocol and task, and over all questions, paired by question.

    Both have the answers of a run for each seed; ValueError if these are to different questions.
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
        for task in (scored_as(key[2], key[1]), "all"):
            groups.setdefault((key[0], task), []).append(key)
    rows = []
    for (protocol, task), keys in groups.items():
        # A question's value is its mean over the seeds, so that questions are what is drawn.
        values = [
            [sum(run[key] for run in runs) / len(runs) for key in keys] for runs in (ours, theirs)
        ]
        row = {"metric": f"{protocol}/{task}", "n": len(keys)}
        row |= paired_bootstrap(*values)._asdict()
        if len(ours) == 1:
            row["p_mcnemar"] = mcnemar(*([run[0][key] for key in keys] for run in (ours, theirs)))
        rows.append(row)
    return rows


def _answers(root: Path, result: Mapping[str, Any]) -> Answers:
    return read_answers(root / result["folder"] / "predictions.jsonl")


def _texts(root: Path, result: Mapping[str, Any]) -> Texts:
    found = json.loads(read_text(root / result["folder"] / TEXT_LOSS))
    return [(total, number) for total, number in found["by_text"]]


def read_answers(path: Path) -> Answers:
    """Which answers of a ``predictions.jsonl`` are right."""
    with open_input(path) as file:
        items = [json.loads(line) for line in read_lines(file, path)]
    names = ("protocol", "source", "task", "index", "prompt")
    return {tuple(item.get(name) for name in names): item["correct"] for item in items}
