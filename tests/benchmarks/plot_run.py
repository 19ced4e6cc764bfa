"""Draw a run from its TensorBoard events: loss, accuracy, and which layers trained when.

python tests/benchmarks/plot_run.py lightning_logs/version_0 run.png   (needs the extra `dev`)
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib as mpl
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

mpl.use("Agg")
import matplotlib.pyplot as plt


def series(log: EventAccumulator, tag: str) -> tuple[list[int], list[float]]:
    events = log.Scalars(tag)
    return [event.step for event in events], [event.value for event in events]


def draw(run: Path, out: Path) -> None:
    events = next(run.glob("events.out.tfevents.*"))
    log = EventAccumulator(str(events), size_guidance={"scalars": 0})
    log.Reload()
    tags = log.Tags()["scalars"]
    figure, (loss, accuracy, layers) = plt.subplots(1, 3, figsize=(12, 3.2), layout="constrained")

    loss.plot(*series(log, "train/loss"), color="tab:blue", label="train/loss", linewidth=1)
    loss.plot(*series(log, "val/loss"), color="tab:orange", label="val/loss", marker="o")
    loss.set(
        title="Loss", xlabel="optimizer step", ylabel="nats per response token", ylim=(0, None)
    )
    loss.legend(frameon=False)

    steps, values = series(log, "val/accuracy")
    accuracy.plot(steps, [100 * value for value in values], color="tab:green", marker="o")
    accuracy.set(
        title="Accuracy on held-out problems", xlabel="optimizer step", ylabel="exact match, %"
    )
    accuracy.set_ylim(0, 100)
    accuracy.grid(alpha=0.3)

    active = [tag for tag in tags if tag.startswith("dls/active/")]
    selections, _ = series(log, active[0])
    last = max(series(log, "train/loss")[0])
    for row, tag in enumerate(active):
        _, chosen = series(log, tag)
        ends = [*selections[1:], max(last, selections[-1] + 1)]
        for start, end, value in zip(selections, ends, chosen, strict=True):
            layers.barh(row, end - start, left=start, color="tab:purple" if value else "#eeeeee")
    layers.set(title="Layers that train", xlabel="optimizer step", ylabel="layer")
    layers.set_yticks(range(len(active)))
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(f"usage: {sys.argv[0]} RUN_FOLDER OUT.png")
    draw(Path(sys.argv[1]), Path(sys.argv[2]))
