"""Compare ways of selecting layers on the demonstration of configs/tiny.yaml, in random order.

python tests/benchmarks/selection_policies.py policies
python tests/benchmarks/selection_policies.py optimizer_state

Prints one line of a table for each way: validation loss after 40, 80, 120 and 160 steps (mean over
seeds 0 to 2, lowest and highest), the mean share of a full backward, and the seconds of training,
without validation, on one thread. Seconds are processor time: other programs change them little.
"""

from __future__ import annotations

import sys
import time
from functools import partial
from statistics import mean

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from timing import lightning_trainer, quiet

from rosa_lightning import DynamicLayerSelection, ReasoningDataModule, RoAEConfig, RoSAModule
from rosa_lightning.dls import PolicyOptions

SEEDS = (0, 1, 2)
POLICIES = {
    "top_k, the paper's": {},
    "top_k, running_mean": {"policy_options": PolicyOptions(score_normalization="running_mean")},
    "top_k, smoothing 0.5": {"policy_options": PolicyOptions(score_smoothing=0.5)},
    "sample": {"policy": "sample"},
    "threshold, share 0.5": {
        "policy": "threshold",
        "policy_options": PolicyOptions(score_share=0.5),
    },
    "random": {"policy": "random"},
    "fixed, the upper half": {
        "policy": "fixed",
        "policy_options": PolicyOptions(fixed_layers=[2, 3]),
    },
    "all": {"policy": "all"},
    "top_k, backward_budget 0.75": {"backward_budget": 0.75},
    "top_k, backward_budget 0.5": {"backward_budget": 0.5},
    "all, backward_budget 0.5": {"policy": "all", "backward_budget": 0.5},
}
STATES = {
    "keep": {"optimizer_state": "keep"},
    "keep, twice the learning rate": {"optimizer_state": "keep", "lr": 6e-3},
    "reset": {"optimizer_state": "reset"},
    "reset, half the learning rate": {"optimizer_state": "reset", "lr": 1.5e-3},
    "free": {"optimizer_state": "free"},
    "keep, interval 5": {"optimizer_state": "keep", "interval": 5},
    "reset, interval 5": {"optimizer_state": "reset", "interval": 5},
}
TABLES = {
    "policies": POLICIES,
    "optimizer_state": {name: {"policy": "random", **one} for name, one in STATES.items()},
}


class Watch(Callback):
    """Validation losses, and the time that training alone has taken."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.seconds = 0.0

    def on_train_batch_start(self, *_: object) -> None:
        self.start = time.process_time()

    def on_train_batch_end(self, *_: object) -> None:
        self.seconds += time.process_time() - self.start

    def on_validation_end(self, trainer: Trainer, *_: object) -> None:
        self.losses.append(float(trainer.callback_metrics["val/loss"]))


def run(seed: int, lr: float = 3e-3, **options: object) -> tuple[list[float], float, float]:
    seed_everything(seed, verbose=False)
    module = RoSAModule("tiny", RoAEConfig(rank=16, alpha=32.0, low_freq_ratio=0.5))
    module.make_optimizer = partial(torch.optim.AdamW, lr=lr, weight_decay=0.0)
    selection = DynamicLayerSelection(**{"num_active": 0.5, "interval": 20, **options})
    watch = Watch()
    trainer = lightning_trainer(
        max_steps=160,
        max_epochs=1,
        val_check_interval=40,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        callbacks=[watch, selection],
    )
    data = ReasoningDataModule(sources="demo", batch_size=16, batching="random", val_fraction=0.05)
    trainer.fit(module, data)
    return watch.losses, selection.backward_share, watch.seconds


def main(table: str) -> None:
    torch.set_num_threads(1)
    quiet()
    print("| selection | 40 | 80 | 120 | 160 | backward | seconds |\n|---|---|---|---|---|---|---|")
    for name, options in TABLES[table].items():
        losses, shares, seconds = zip(*(run(seed, **options) for seed in SEEDS), strict=True)
        cells = [
            f"{mean(column):.3f} ({min(column):.3f} to {max(column):.3f})"
            for column in zip(*losses, strict=True)
        ]
        cells += [f"{mean(shares):.2f}", f"{mean(seconds):.1f}"]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] not in TABLES:
        sys.exit(f"usage: {sys.argv[0]} {' | '.join(TABLES)}")
    main(sys.argv[1])
