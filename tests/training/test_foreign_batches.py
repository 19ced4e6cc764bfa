"""Batches with the fields of transformers; the oracle is the loss that a model of it returns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close
from torch.utils.data import DataLoader
from transformers import DataCollatorForSeq2Seq

from rosa_lightning import RoSAModule
from rosa_lightning.training.loss import LossComputer
from rosa_lightning.training.speed import SpeedConfig
from tests.conftest import build, byte_tokenizer
from tests.test_module import trainer
from tests.training.test_loss import adapted, gradients

TOKENIZER = byte_tokenizer()
TEXTS = [
    ("What is 2 + 2? It is ", "4"),
    ("What is 2? ", "The number 2, which is even."),
    ("A", "B"),
]
MODEL = adapted(build("llama", vocab_size=258)).eval()


def features(texts=TEXTS) -> list[dict[str, Any]]:
    """Rows as users make them: the prompt's labels are masked."""
    rows = []
    for prompt, response in texts:
        asked, replied = (TOKENIZER(text)["input_ids"] for text in (prompt, response))
        ids = [*asked, *replied, TOKENIZER.eos_token_id]
        labels = [-100] * len(asked) + ids[len(asked) :]
        rows.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels})
    return rows


def collated(side: str = "right", texts=TEXTS, **options) -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.padding_side = side
    return DataCollatorForSeq2Seq(tokenizer, **options)(features(texts))


def check(batch: Any, model=MODEL, **options: Any) -> None:
    """Loss and gradients are those of the model's own forward."""
    names = ("input_ids", "attention_mask", "labels", "position_ids")
    wanted = model(**{name: batch[name] for name in names if name in batch}, use_cache=False).loss
    found = LossComputer(model, SpeedConfig(**options)).loss(batch)
    assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    assert_close(gradients(model, found), gradients(model, wanted), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"share_prefix": False}, {"microbatch_tokens": 40}])
@pytest.mark.parametrize("side", ["right", "left"])
def test_loss_of_a_collated_batch_is_that_of_transformers(side, options):
    check(collated(side), **options)
    check(collated(side, pad_to_multiple_of=16), **options)
    check(dict(collated(side)), **options)


@settings(max_examples=25)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 30), st.integers(1, 9)), min_size=1, max_size=5),
    shared=st.integers(0, 25),
    side=st.sampled_from(["left", "right"]),
    most=st.sampled_from([None, 16, 50]),
)
def test_loss_is_that_of_transformers_whatever_the_rows(lengths, shared, side, most):
    generator = torch.Generator().manual_seed(sum(map(sum, lengths)))
    start = torch.randint(3, 250, (shared,), generator=generator).tolist()
    rows = []
    for asked, replied in lengths:
        own = torch.randint(3, 250, (asked + replied + 1,), generator=generator).tolist()
        ids = start + own
        labels = [-100] * (len(ids) - replied) + ids[len(ids) - replied :]
        rows.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels})
    tokenizer = byte_tokenizer()
    tokenizer.padding_side = side
    batch = DataCollatorForSeq2Seq(tokenizer)(rows)
    wanted = MODEL(**batch, use_cache=False).loss
    found = LossComputer(MODEL, SpeedConfig(microbatch_tokens=most)).loss(batch)
    assert_close(found, wanted, rtol=1e-6, atol=1e-6)


def test_positions_of_ones_own_are_kept():
    texts = [("An instruction for all of the rows: ", reply) for reply in ("a", "bb", "c" * 9)]
    batch = collated("right", texts)
    places = torch.arange(batch["input_ids"].shape[1])[None].expand_as(batch["input_ids"])
    check({**batch, "position_ids": places * 3})


def test_first_token_is_not_predicted_from_padding():
    """Whole texts with loss: `transformers` is right where they are padded on the right."""
    left, right = collated("left"), collated("right")
    for batch in (left, right):
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    wanted = MODEL(**right, use_cache=False).loss
    for batch in (left, right):
        assert_close(LossComputer(MODEL).loss(batch), wanted, rtol=1e-6, atol=1e-6)


def test_scores_are_those_of_the_whole_response():
    batch = collated("right")
    scored = LossComputer(MODEL).score(batch)
    assert_close(scored.loss, MODEL(**batch, use_cache=False).loss, rtol=1e-6, atol=1e-6)
    assert scored.count == int((batch["labels"] != -100).sum())
    logits = MODEL(**batch, use_cache=False).logits[:, :-1].argmax(-1)
    labels = batch["labels"][:, 1:]
    assert torch.equal(scored.correct, ((logits == labels) | (labels == -100)).all(1))
    batch["labels"][:, 1:] = torch.where(labels == -100, labels, logits)
    assert LossComputer(MODEL).score(batch).correct.all()


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_plain_loader_trains_and_validates(base_folder, tmp_path, side):
    tokenizer = byte_tokenizer()
    tokenizer.padding_side = side
    collator = DataCollatorForSeq2Seq(tokenizer)
    loader = DataLoader(features(TEXTS * 2), batch_size=3, collate_fn=collator)
    module = RoSAModule(str(base_folder))
    run = trainer(tmp_path)
    run.fit(module, loader, loader)
    module.model.eval()
    with torch.no_grad():
        losses = [(module.model(**batch).loss, (batch["labels"] != -100).sum()) for batch in loader]
    wanted = sum(loss * count for loss, count in losses) / sum(count for _, count in losses)
    (metrics,) = run.validate(module, loader, verbose=False)
    assert metrics["val/loss"] == pytest.approx(float(wanted), rel=1e-5)


def with_a_hole(batch):
    mask = batch["attention_mask"].index_fill(1, torch.tensor(3), 0)
    return {**batch, "attention_mask": mask}


def starting_again(batch):
    ids = batch["input_ids"]
    positions = torch.arange(ids.shape[1]).expand(3, -1) % 8
    return {"input_ids": ids, "labels": ids, "position_ids": positions}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda b: {"input_ids": b["input_ids"]}, "lacks labels; it has input_ids"),
        (lambda b: {"x": 1}, "lacks input_ids and labels; it has x"),
        (lambda b: (b["input_ids"], b["labels"]), "a batch is a tuple"),
        (lambda b: {**b, "labels": b["labels"][:, 1:]}, "labels of a batch is of torch.int64"),
        (lambda b: {**b, "labels": b["labels"].float()}, "labels of a batch is of torch.float32"),
        (lambda b: {**b, "labels": b["labels"].tolist()}, "labels of a batch is a list"),
        (lambda b: {**b, "labels": b["input_ids"]}, "train on padding, in row 0 first"),
        (lambda b: {**b, "input_ids": b["input_ids"] + 5}, "token id 261, but .* rows 0 to 257"),
        (lambda b: {**b, "input_ids": b["input_ids"] - 300}, "token id -"),
        (with_a_hole, "in the midst of row 0"),
        (starting_again, "start again within a row"),
        (lambda b: {**b, "labels": b["labels"] * 0 - 100}, "no token that carries loss"),
    ],
)
def test_what_cannot_be_trained_on_is_named_in_one_line(change, words):
    with pytest.raises(ValueError, match=words) as caught:
        LossComputer(MODEL).loss(change(collated("right")))
    assert "\n" not in str(caught.value)
