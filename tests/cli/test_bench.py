from __future__ import annotations

import builtins
import sys

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint

from rosa_lightning import DynamicLayerSelection, ReasoningDataModule, RoAEConfig, RoSAModule
from rosa_lightning.cli.bench import (
    FROZEN,
    LORA,
    OURS,
    Turns,
    frozen_base,
    padded,
    plain_lora,
    rows_of,
    run_bench,
)
from rosa_lightning.dls import PolicyOptions
from rosa_lightning.roae.inject import roae_layers
from tests.cli.test_commands import run


@pytest.fixture(autouse=True)
def _as_a_command(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["rosa"])
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def data(sources) -> ReasoningDataModule:
    return ReasoningDataModule(sources=sources, batch_size=3, max_length=256, val_fraction=0.1)


@pytest.fixture
def seen(monkeypatch):
    """What each method trained on, and the module that was configured."""
    found: dict[str, list] = {"rows": [], "frozen": [], "steps": [], "module": []}
    lora, frozen, end = Turns.train_lora, Turns.pass_frozen, Turns.on_train_batch_end

    def train_lora(self, parts, trainer):
        found["rows"].append(parts)
        before = [p.clone() for p in self.lora.parameters() if p.requires_grad]
        lora(self, parts, trainer)
        after = [p for p in self.lora.parameters() if p.requires_grad]
        found["moved"] = any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))

    def pass_frozen(self, batches, trainer):
        found["frozen"].append(list(batches))
        frozen(self, batches, trainer)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        found["steps"].append(trainer.global_step)
        found["module"] = [pl_module]
        end(self, trainer, pl_module, outputs, batch, batch_idx)

    monkeypatch.setattr(Turns, "train_lora", train_lora)
    monkeypatch.setattr(Turns, "pass_frozen", pass_frozen)
    monkeypatch.setattr(Turns, "on_train_batch_end", on_train_batch_end)
    return found


def records(rows) -> list[tuple[int, ...]]:
    return sorted(tuple(ids.tolist()) for ids, _ in rows)


def test_all_methods_train_on_the_same_records_in_every_round(base_folder, data, seen):
    pick = DynamicLayerSelection(
        policy="fixed", policy_options=PolicyOptions(fixed_layers=[2, 3]), interval=1000
    )
    left_out = [EarlyStopping("val/loss"), LearningRateMonitor(), ModelCheckpoint()]
    settings = {"accelerator": "cpu", "callbacks": [pick, *left_out], "max_steps": 1}
    module = RoSAModule(str(base_folder), RoAEConfig(rank=4))
    bench = run_bench(module, data, settings, steps=3, rounds=2)
    assert len(bench.rounds) == 2
    assert all(len(times) == 2 and min(times) > 0 for times in bench.seconds.values())
    assert list(bench.seconds) == [OURS, LORA, FROZEN]
    assert bench.lowest == [2] * 6
    assert len(seen["steps"]) == 2 + 6  # a warm-up before
    for parts, batches in zip(seen["rows"], seen["frozen"], strict=True):
        ours = [row for batch in batches for row in rows_of(batch)]
        theirs = [row for part in parts for row in part]
        assert records(theirs) == records(ours)
        assert len(parts) == len(batches)
    assert seen["moved"]
    last = seen["frozen"][-1]
    assert bench.rounds[-1]["examples"] == 9
    assert bench.rounds[-1]["tokens"] == sum(int(b["attention_mask"].sum()) for b in last)


def test_the_lora_is_on_all_five_targets_and_trains_alone(base_folder):
    lora = plain_lora(RoSAModule(str(base_folder)))
    trained = {name for name, p in lora.named_parameters() if p.requires_grad}
    ends = {name.split(".lora_")[0].rpartition(".")[2] for name in trained}
    assert ends == {"q_proj", "k_proj", "v_proj", "up_proj", "down_proj"}
    assert len(trained) == 4 * 5 * 2
    shapes = {p.shape[0] for name, p in lora.named_parameters() if "lora_A" in name}
    assert shapes == {16}


def test_the_frozen_base_is_the_base_with_a_backward_down_to_its_first_layer(base_folder, data):
    frozen = frozen_base(RoSAModule(str(base_folder), RoAEConfig(rank=4)))
    assert not list(roae_layers(frozen))
    assert not any(p.requires_grad for p in frozen.parameters())
    data.tokenizer = str(base_folder)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    reached = []
    first = frozen.model.model.layers[0]
    first.register_full_backward_hook(lambda *_: reached.append(0))
    loss = frozen.loss(batch)
    adapted = RoSAModule(str(base_folder), RoAEConfig(rank=4))
    assert torch.equal(loss, adapted.loss(batch))
    loss.backward()
    assert reached


def test_rows_come_back_from_padded_and_from_packed_batches():
    ids = [torch.tensor([5, 6, 7]), torch.tensor([8, 9])]
    labels = [torch.tensor([-100, -100, 7]), torch.tensor([-100, 9])]
    left = {
        "input_ids": torch.tensor([[5, 6, 7], [0, 8, 9]]),
        "attention_mask": torch.tensor([[1, 1, 1], [0, 1, 1]]),
        "labels": torch.tensor([[-100, -100, 7], [-100, -100, 9]]),
    }
    packed = {
        "input_ids": torch.cat(ids)[None],
        "labels": torch.cat(labels)[None],
        "row_lengths": torch.tensor([3, 2]),
    }
    for batch in (left, packed):
        for (a, b), c, d in zip(rows_of(batch), ids, labels, strict=True):
            assert torch.equal(a, c)
            assert torch.equal(b, d)
    right = padded(list(zip(ids, labels, strict=True)))
    assert right["input_ids"].tolist() == [[5, 6, 7], [8, 9, 0]]
    assert right["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert right["labels"].tolist() == [[-100, -100, 7], [-100, 9, -100]]


def command(base_folder, *more: str) -> list[str]:
    demo = ["--data.batch_size", "2", "--data.max_length", "1024", "--trainer.accelerator", "cpu"]
    return ["bench", "--model.base", str(base_folder), *demo, *more]


@pytest.mark.filterwarnings("ignore:data.max_length=1024 is beyond the 512 tokens")
def test_the_command_prints_ratios_and_the_machine_and_keeps_nothing(base_folder, capsys, tmp_path):
    status, printed, _ = run(capsys, *command(base_folder, "--steps", "1", "--rounds", "1"))
    assert status == 0
    for text in (OURS, LORA, FROZEN, "examples/s", "tokens/s", f"torch {torch.__version__}"):
        assert text in " ".join(printed.split())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("option", ["steps", "rounds"])
def test_counts_below_one_are_refused_before_anything_is_loaded(capsys, option):
    status, _, errors = run(capsys, *command("nowhere", f"--{option}", "0"))
    assert status == 2
    assert len(errors) == 1
    assert option in errors[0]


def test_without_peft_the_extra_is_named(base_folder, capsys, monkeypatch):
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name == "peft":
            raise ImportError("No module named 'peft'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    status, _, errors = run(capsys, *command(base_folder))
    assert status == 1
    (error,) = errors
    assert "pip install 'rosa-lightning[bench]'" in error
