"""What a comparison shows, in sentences: who is better than the reference, and what is open."""

from collections.abc import Mapping, Sequence
from typing import Any

from rosa_lightning.comparison.plan import mean_losses
from rosa_lightning.comparison.statistics import difference

LEVEL = 0.05
"""P-value, corrected as Holm (1979), below which a difference counts."""
_MOST = 3
"""Methods of a sentence that come with their numbers; the table has them all."""
Test = Mapping[str, Any]


def verdict(content: Mapping[str, Any]) -> list[str]:
    """Sentences on a finished comparison, from the content of ``comparison.json``."""
    reference = content["reference"]
    losses = mean_losses(content)
    lines = _on_loss(losses, reference, content["tests"])
    metrics = dict.fromkeys(test["metric"] for test in content["tests"])
    for metric in metrics:
        protocol, _, task = metric.partition("/")
        if task == "all":
            tests = _of(content["tests"], metric)
            about = f"Accuracy ({protocol}, {tests[0]['n']:,} questions)"
            lines += _sorted_out(about, reference, tests, metric)
    lines += _on_forgetting(content.get("forgetting", {}))
    at_edge = [name for name in losses if content["methods"][name]["at_edge"]]
    if at_edge:
        lines.append(
            f"Best at the edge of the learning rates, so a better one may lie beyond: "
            f"{', '.join(at_edge)}."
        )
    return lines


def _on_loss(losses: Mapping[str, float], reference: str, tests: Sequence[Test]) -> list[str]:
    if not losses:
        return ["No run has come to its end."]
    best = min(losses, key=lambda name: losses[name])
    line = f"Lowest validation loss: {best}, {losses[best]:.4f} nats per response token"
    if reference in losses and best != reference:
        line += f", {losses[reference] - losses[best]:.4f} below {reference}"
    tested = _of(tests, "val_loss")
    lines = _sorted_out("Validation loss", reference, tested, "val_loss")
    untested = [name for name in losses if name not in {t["method"] for t in tested} | {reference}]
    if untested:
        lines.append(
            f"Not tested, as that takes two seeds or more beside {reference}: "
            f"{', '.join(untested)}."
        )
    return [f"{line}.", *lines]


def _sorted_out(about: str, reference: str, tests: Sequence[Test], metric: str) -> list[str]:
    """Who is better, who is worse, and of whom neither is shown."""
    sign = -1 if metric == "val_loss" else 1
    groups: dict[str, list[Test]] = {"better": [], "worse": [], "open": []}
    for test in sorted(tests, key=lambda one: -sign * one["mean"]):
        side = "better" if sign * test["mean"] > 0 else "worse"
        groups[side if test["p_holm"] < LEVEL else "open"].append(test)
    lines = [
        f"{about}: {side} than {reference}: {_listed(groups[side], metric)}."
        for side in ("better", "worse")
        if groups[side]
    ]
    if groups["open"]:
        lines.append(
            f"{about}: not decided against {reference} (p of at least {LEVEL}): "
            f"{', '.join(test['method'] for test in groups['open'])}."
        )
    return lines


def _on_forgetting(forgetting: Mapping[str, Mapping[str, Test]]) -> list[str]:
    changes = [
        {"method": name, **found["text_loss"]}
        for name, found in forgetting.items()
        if "text_loss" in found
    ]
    changes.sort(key=lambda one: one["mean"])
    sides = {
        "falls": [one for one in changes if one["high"] < 0],
        "rises": [one for one in changes if one["low"] > 0],
    }
    return [
        f"Loss on general text {side} against the base: {_listed(found, 'text_loss')}."
        for side, found in sides.items()
        if found
    ]


def _of(tests: Sequence[Test], metric: str) -> list[Test]:
    return [test for test in tests if test["metric"] == metric]


def _listed(tests: Sequence[Test], metric: str) -> str:
    unit = "" if metric.endswith("_loss") else " points"
    named = [f"{one['method']} {difference(one, metric, unit)}" for one in tests[:_MOST]]
    return ", ".join([*named, *(test["method"] for test in tests[_MOST:])])
