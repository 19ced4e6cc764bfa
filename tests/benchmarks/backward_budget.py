"""Compare the share of the backward pass that a backward budget promises with measured times.

python tests/benchmarks/backward_budget.py

A random Llama of 12 layers, 256 wide, with RoAE on Q and K, trains on one thread under several
budgets. The time of the backward pass, as a share of that of a run in which all layers train, is
printed beside the budget and beside what `DynamicLayerSelection.backward_share` counts. Runs take
turns, a step each, so that whatever else the machine does meets all of them. Exits with 1 if a
measured share is off the counted one, or above the budget, by more than 5 %.
"""

from __future__ import annotations

import sys
import threading
import time

import torch
from lightning.pytorch import Callback, LightningModule
from timing import lightning_trainer, quiet, random_llama
from torch.utils.data import DataLoader

from rosa_lightning import DynamicLayerSelection, RoAEConfig, inject_roae

STEPS, INTERVAL = 200, 20
SHAPE = {"vocab_size": 512, "hidden_size": 256, "intermediate_size": 688}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 4}
RUNS = {
    "all layers": {"policy": "all"},
    "budget 0.75": {"backward_budget": 0.75},
    "budget 0.5": {"backward_budget": 0.5},
    "budget 0.3": {"backward_budget": 0.3},
    "budget 0.5, sample": {"backward_budget": 0.5, "policy": "sample"},
    "budget 0.5, all": {"backward_budget": 0.5, "policy": "all"},
}


class RandomLlama(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = random_llama(**SHAPE, **HEADS)
        inject_roae(self.model, RoAEConfig(rank=8))

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.model(input_ids=batch, labels=batch).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-3)


class Turns(Callback):
    """Lets several fits, each in its thread, take one step after another; times the backward."""

    def __init__(self, count: int) -> None:
        self.locks = [threading.Semaphore(int(index == 0)) for index in range(count)]
        self.seconds = [0.0] * count
        self.place = threading.local()

    def on_train_batch_start(self, *_: object) -> None:
        self.locks[self.place.index].acquire()

    def on_before_backward(self, *_: object) -> None:
        self.place.start = time.perf_counter()

    def on_after_backward(self, *_: object) -> None:
        self.seconds[self.place.index] += time.perf_counter() - self.place.start

    def on_train_batch_end(self, *_: object) -> None:
        self.locks[(self.place.index + 1) % len(self.locks)].release()


def fit(index: int, turns: Turns, module: RandomLlama, selection: DynamicLayerSelection) -> None:
    turns.place.index = index
    source = torch.Generator().manual_seed(1)
    batches = DataLoader(torch.randint(512, (STEPS, 2, 128), generator=source), batch_size=None)
    lightning_trainer(max_steps=STEPS, callbacks=[turns, selection]).fit(module, batches)


def main() -> int:
    torch.set_num_threads(1)
    quiet()
    turns = Turns(len(RUNS))
    shared = {"num_active": 0.25, "interval": INTERVAL}
    selections = [DynamicLayerSelection(**shared, **options) for options in RUNS.values()]
    threads = [
        # Models are built here: finding the projections patches functions of torch.
        threading.Thread(target=fit, args=(index, turns, RandomLlama(), selection), daemon=True)
        for index, selection in enumerate(selections)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wrong = 0
    print(f"{'run':20} {'budget':>6} {'counted':>8} {'measured':>9} {'ms a step':>10}")
    for name, selection, seconds in zip(RUNS, selections, turns.seconds, strict=True):
        counted, measured = selection.backward_share, seconds / turns.seconds[0]
        budget = selection.backward_budget
        wrong |= abs(measured / counted - 1) > 0.05 or measured > 1.05 * budget
        milliseconds = 1000 * seconds / STEPS
        print(f"{name:20} {budget:6.2f} {counted:8.3f} {measured:9.3f} {milliseconds:10.1f}")
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
