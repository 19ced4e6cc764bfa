"""Best-fit packing."""

import csv
import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger

from rosa_lightning import RoSAModule
from rosa_lightning.data.batches import best_fit
from tests.conftest import data_module

CAPACITY = 40


def naive_best_fit(lengths, capacity):
    rooms = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms[rooms.index(min(fitting))] -= length
        else:
            rooms.append(capacity - length)
    return rooms


@given(lengths=st.lists(st.integers(1, CAPACITY), max_size=60))
def test_bins_hold_each_item_once_and_are_as_few_as_a_plain_search_finds(lengths):
    bins = best_fit(lengths, CAPACITY)
    assert sorted(item for some in bins for item in some) == list(range(len(lengths)))
    room = [CAPACITY - sum(lengths[item] for item in some) for some in bins]
    assert sorted(room) == sorted(naive_best_fit(lengths, CAPACITY))
    # 11/9 of the fewest there can be, and 6/9 (Dosa 2007 for first fit; best fit likewise).
    assert len(bins) <= 11 / 9 * math.ceil(sum(lengths) / CAPACITY) * 2 + 1


def module_of(tmp_path, **settings):
    path = tmp_path / "a.jsonl"
    if not path.exists():
        rows = [{"instruction": f"Say {n}.", "output": "so " * (n % 17 + 1)} for n in range(120)]
        path.write_text("\n".join(map(json.dumps, rows)))
    return data_module(
        sources=[str(path)],
        tokenizer="tiny",
        prompt_style="plain",
        max_length=64,
        cache_dir=None,
        **{"val_fraction": 0, **settings},
    )


def test_a_batch_of_packs_has_the_loss_of_its_records_one_by_one(tmp_path):
    module = RoSAModule("tiny")
    module.configure_model()
    data = module_of(tmp_path, batching="best_fit", batch_size=3)
    data.num_embeddings = module.num_embeddings
    data.setup("fit")
    single = module_of(tmp_path, batching="random", batch_size=1)
    single.setup("fit")
    alone = {int(batch["index"]): batch for batch in single.train_dataloader()}
    seen = []
    for batch in data.train_dataloader():
        assert batch["input_ids"].shape[1] <= 3 * 64
        seen += batch["index"].tolist()
        with torch.no_grad():
            found = module.loss(batch)
            rows = [alone[index] for index in batch["index"].tolist()]
            counts = torch.tensor([int((row["labels"][:, 1:] >= 0).sum()) for row in rows])
            losses = torch.stack([module.loss(row) for row in rows])
        torch.testing.assert_close(found, (losses * counts).sum() / counts.sum())
    assert sorted(seen) == list(range(1, 121))


def test_how_full_packs_are_is_said_and_logged_once(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("rosa_lightning.data.sampling.rank_zero_info", said.append)
    logger = CSVLogger(tmp_path)
    trainer = Trainer(
        logger=logger,
        max_steps=3,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        log_every_n_steps=1,
    )
    data = module_of(tmp_path, batching="best_fit", batch_size=2, val_fraction=0.05)
    trainer.fit(RoSAModule("tiny"), data)
    (line,) = said
    with open(Path(logger.log_dir) / "metrics.csv") as file:
        logged = [row["train/pack_fill"] for row in csv.DictReader(file)]
    (fill,) = (float(value) for value in logged if value)
    assert 0.9 < fill <= 1
    assert line.startswith("114 records in ")
    assert f"packs of 64 tokens, which are {fill:.1%} full" in line


def test_tokens_per_batch_says_how_many_packs_a_batch_has(tmp_path):
    data = module_of(tmp_path, batching="best_fit", batch_size=1, tokens_per_batch=200)
    data.setup("fit")
    sizes = [batch["input_ids"].shape[1] for batch in data.train_dataloader()]
    assert max(sizes) <= 3 * 64
    assert sum(sizes[:-1]) / len(sizes[:-1]) > 0.9 * 3 * 64


@pytest.mark.parametrize(("now", "warns"), [(64, False), (72, True)])
def test_a_resumed_run_warns_of_packs_of_another_size(tmp_path, now, warns, recwarn):
    before = module_of(tmp_path, batching="best_fit")
    before.setup("fit")
    after = module_of(tmp_path, batching="best_fit")
    after.max_length = now
    after.setup("fit")
    state = before.state_dict()
    state["seen"] = {"a": 3}
    after.load_state_dict(state)
    assert any("pack was 64 and is 72" in str(one.message) for one in recwarn) == warns
