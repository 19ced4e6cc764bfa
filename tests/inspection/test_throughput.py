from __future__ import annotations

import csv
import subprocess
import sys

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger
from torch.utils.flop_counter import FlopCounterMode

from rosa_lightning import (
    DynamicLayerSelection,
    ReasoningDataModule,
    RoAEConfig,
    RoSAModule,
    TokenThroughputMonitor,
    inject_roae,
)
from rosa_lightning.dls import PolicyOptions
from rosa_lightning.inspection import throughput
from rosa_lightning.inspection.throughput import (
    batch_counts,
    flops_per_token,
    head_flops,
    lowest_active,
    peak_mib,
    rates,
    uncounted,
)
from tests.conftest import build

RATES = [f"train/{name}_per_s" for name in ("examples", "tokens", "supervised_tokens")]


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: now[0])
    return now


class Ticking(Callback):
    """Lets every batch take two seconds and every validation a hundred; keeps what it saw."""

    def __init__(self, clock) -> None:
        self.clock, self.batches, self.shown = clock, [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self.clock[0] += 2
        self.batches.append(batch)

    def on_validation_epoch_start(self, trainer, pl_module) -> None:
        self.clock[0] += 100

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if trainer.progress_bar_callback:
            bar = trainer.progress_bar_callback
            self.shown.append(bar.get_metrics(trainer, pl_module))


def fit(base, sources, callbacks, **options) -> Trainer:
    settings = {
        "accelerator": "cpu",
        "logger": False,
        "callbacks": callbacks,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "num_sanity_val_steps": 0,
        "limit_val_batches": 0,
        "log_every_n_steps": 2,
        "max_steps": 4,
    }
    trainer = Trainer(**{**settings, **options})
    data = ReasoningDataModule(sources=sources, batch_size=3, max_length=256, val_fraction=0.1)
    trainer.fit(RoSAModule(str(base), RoAEConfig(rank=4)), data)
    return trainer


def logged(folder) -> dict[str, dict[int, float]]:
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    return {
        tag: {int(row["step"]): float(row[tag]) for row in rows if row[tag]}
        for tag in rows[0]
        if tag != "step"
    }


def test_figures_are_those_of_the_batches_and_the_seconds_between_two_logs(
    base_folder, sources, tmp_path, clock
):
    ticking = Ticking(clock)
    options = {"limit_val_batches": 1, "val_check_interval": 3, "accumulate_grad_batches": 2}
    logger = CSVLogger(tmp_path, name="", version="")
    fit(base_folder, sources, [ticking, TokenThroughputMonitor()], logger=logger, **options)
    log = logged(tmp_path)
    for step, batches in {1: ticking.batches[:4], 3: ticking.batches[4:]}.items():
        assert len(batches) == 4
        seconds = 8
        tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
        supervised = sum(int((batch["labels"] != -100).sum()) for batch in batches)
        assert log["train/examples_per_s"][step] == pytest.approx(12 / seconds)
        assert log["train/tokens_per_s"][step] == pytest.approx(tokens / seconds)
        assert log["train/supervised_tokens_per_s"][step] == pytest.approx(supervised / seconds)
        places = sum(batch["input_ids"].numel() for batch in batches)
        assert log["train/padding_share"][step] == pytest.approx(1 - tokens / places)
    assert 0 < log["train/padding_share"][1] < 1
    assert list(log["train/peak_mib"]) == [1, 3]
    assert log["train/peak_mib"][3] > 50
    assert "train/mfu" not in log  # of a CPU


def test_utilisation_is_the_operations_by_what_the_device_could_have_done(
    base_folder, sources, clock, monkeypatch
):
    asked = []

    def available(device, dtype):
        asked.append((device.type, dtype))
        return 1e9

    monkeypatch.setattr(throughput, "get_available_flops", available)
    monitor, ticking = TokenThroughputMonitor(), Ticking(clock)
    pick = DynamicLayerSelection(
        policy="fixed", policy_options=PolicyOptions(fixed_layers=[2, 3]), interval=1000
    )
    trainer = fit(base_folder, sources, [pick, monitor, ticking], log_every_n_steps=4)
    assert asked == [("cpu", torch.float32)]
    model = trainer.lightning_module.model
    blocks = list(model.model.layers)
    for block in blocks[:2]:  # as in the run, whose end thawed them
        block.requires_grad_(False)
    wanted = 0
    for batch in ticking.batches:
        wanted += int(batch["attention_mask"].sum()) * flops_per_token(blocks)
        wanted += int((batch["labels"] != -100).sum()) * head_flops(model)
    assert monitor.latest["train/mfu"] == pytest.approx(wanted / 8 / 1e9, rel=1e-5)


def test_the_progress_bar_shows_the_figures_from_the_first_log_on(base_folder, sources, clock):
    ticking = Ticking(clock)
    pick = DynamicLayerSelection(
        policy="fixed", policy_options=PolicyOptions(fixed_layers=[3]), interval=1000
    )
    monitor = TokenThroughputMonitor()
    callbacks = [pick, monitor, ticking, TQDMProgressBar()]
    fit(base_folder, sources, callbacks, enable_progress_bar=True, max_steps=3)
    assert "examples/s" not in ticking.shown[0]
    for items in ticking.shown[1:]:
        wanted = monitor.latest["train/examples_per_s"]
        assert items["examples/s"] == pytest.approx(wanted)


def test_a_packed_batch_counts_its_rows():
    batch = {
        "input_ids": torch.zeros(1, 9, dtype=torch.int64),
        "attention_mask": torch.ones(1, 9, dtype=torch.int64),
        "labels": torch.tensor([[-100, -100, 1, -100, 2, 3, -100, -100, 4]]),
        "row_lengths": torch.tensor([3, 3, 3]),
    }
    counts = {name: int(count) for name, count in batch_counts(batch).items()}
    assert counts == {"examples": 3, "tokens": 9, "supervised_tokens": 4, "positions": 9}
    assert rates(counts, 2.0) == {
        "train/examples_per_s": 1.5,
        "train/tokens_per_s": 4.5,
        "train/supervised_tokens_per_s": 2.0,
        "train/padding_share": 0.0,
    }


@pytest.fixture
def llama():
    model = build("llama", num_hidden_layers=4)
    inject_roae(model, RoAEConfig(rank=4))
    return model


@pytest.mark.parametrize("lowest", [0, 2])
def test_operations_are_those_that_torch_counts_in_products_with_weights(llama, lowest, ids_BT):
    blocks = list(llama.model.layers)
    for block in blocks[:lowest]:
        block.requires_grad_(False)
    assert lowest_active(blocks) == lowest
    counter = FlopCounterMode(display=False)
    with counter:
        llama(input_ids=ids_BT, labels=ids_BT).loss.backward()
    products = ("mm", "addmm")  # attention's own are batched, or of its kernel
    total = sum(
        count
        for operation, count in counter.get_flop_counts()["Global"].items()
        if str(operation).removeprefix("aten.") in products
    )
    counted = flops_per_token(blocks) + head_flops(llama)
    # What reads the input of the lowest layer computes no gradient of it.
    attention = blocks[lowest].self_attn
    spared = sum(getattr(attention, f"{p}_proj").weight.numel() for p in "qkv")
    spared += sum(getattr(attention, f"{p}_proj").roae_A.numel() for p in "qk")
    assert total == ids_BT.numel() * (counted - 2 * spared)


def test_mixtures_of_experts_and_packed_weights_are_not_counted(llama):
    assert uncounted(llama.model.layers) is None
    block = llama.model.layers[1]
    block.packed = torch.nn.Parameter(torch.zeros(2, 2, dtype=torch.uint8), requires_grad=False)
    assert uncounted(llama.model.layers) == "weights are packed"
    del block.packed
    block.experts = torch.nn.ModuleList([torch.nn.Linear(2, 2)])
    assert "some only" in str(uncounted(llama.model.layers))
    del block.experts
    block.experts = torch.nn.Parameter(torch.zeros(4, 2, 2))
    assert "three axes" in str(uncounted(llama.model.layers))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the system tells no such peak")
def test_the_peak_of_a_process_is_not_that_of_its_parent():
    held = torch.ones(2**29, dtype=torch.uint8)  # 512 MiB
    code = "import torch\nfrom rosa_lightning.inspection.throughput import peak_mib\n"
    code += "print(peak_mib(torch.device('cpu')))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(found.stdout) < peak_mib(torch.device("cpu")) - len(held) / 2**21
