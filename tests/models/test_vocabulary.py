"""Tokenizers whose ids go beyond the embedding of the base."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rosa_lightning import ReasoningDataModule, RoSAModule
from tests.conftest import data_module, rosa_module, save_base, write_records
from tests.test_module import trainer

ROWS = 257
"""Rows of the base's embedding: the bytes and EOS."""


def tokenizer(*added: str) -> PreTrainedTokenizerFast:
    """One token a byte, EOS, and whatever was added to it later."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: number for number, token in enumerate([*alphabet, "<eos>"])}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>")
    made.add_tokens(list(added))
    return made


@pytest.fixture
def base(tmp_path) -> Path:
    """A base whose tokenizer has been given a padding token, and its embedding no row for it."""
    folder = save_base(tmp_path / "base", vocab_size=ROWS, pad_token_id=None)
    padded = tokenizer()
    padded.add_special_tokens({"pad_token": "[PAD]"})
    assert padded.pad_token_id == ROWS
    padded.save_pretrained(folder)
    return folder


def data(folder: Path, output: str = "It is {}.", **options) -> ReasoningDataModule:
    path = str(write_records(folder / "records.json", 24, output))
    settings = {"batching": "random", "batch_size": 6, "cache_dir": None, "val_fraction": 0.2}
    return data_module(
        **{"sources": [path], "test_sources": [path], "decontaminate": False, **settings, **options}
    )


def test_a_padding_token_without_a_row_is_not_needed(base, tmp_path):
    losses = []
    for share in (True, False):
        torch.manual_seed(0)
        module = rosa_module(str(base), share_prefix=share, max_new_tokens=3)
        own = trainer(tmp_path)
        own.fit(module, data(tmp_path, "{}"))
        losses.append(own.callback_metrics["train/loss"].item())
        assert "val/loss" in own.validate(module, data(tmp_path, "{}"), verbose=False)[0]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("evaluation", ["generate", "likelihood", "beams"])
def test_answers_are_found_without_a_row_for_padding(base, tmp_path, evaluation):
    from rosa_lightning.evaluation.evaluator import EvaluationConfig

    config = EvaluationConfig(
        protocols=("likelihood",) if evaluation == "likelihood" else ("generate",),
        num_beams=2 if evaluation == "beams" else 1,
    )
    path = str(write_records(tmp_path / "test.json", 5, "the correct answer is true", "true"))
    records = data(tmp_path, test_sources=[{"path": path, "task": "boolq"}])
    module = rosa_module(base, evaluation=config, max_new_tokens=3)
    assert trainer(tmp_path).test(module, records, verbose=False)


def test_padding_that_records_spell_is_text(base, tmp_path):
    run, records = trainer(tmp_path), data(tmp_path, "[PAD] {}")
    run.fit(RoSAModule(str(base)), records)
    assert run.global_step
    example = records._set.train[0][0]
    assert max(example.response) < ROWS  # five characters and no padding token
    assert len(example.response) > len("[PAD]")


def test_an_added_token_without_a_row_is_refused_where_it_is_used(base, tmp_path):
    own = tokenizer("<new>")
    trainer(tmp_path).fit(RoSAModule(str(base)), data(tmp_path, tokenizer=own))
    module = RoSAModule(str(base))
    with pytest.raises(ValueError, match=r"records, record 1: token '<new>' has the id 257"):
        trainer(tmp_path).fit(module, data(tmp_path, "<new> {}.", tokenizer=own))
    assert module.model is None  # before anything is loaded


@pytest.mark.parametrize("stage", ["fit", "test"])
def test_the_tokenizer_of_a_larger_model_is_refused(base, tmp_path, stage):
    module = RoSAModule(str(base))
    records = data(tmp_path, tokenizer="tiny")
    with pytest.raises(ValueError, match=r"vocabulary of \d+ tokens, but .* 257 rows"):
        getattr(trainer(tmp_path), stage)(module, records)
    assert module.model is None
