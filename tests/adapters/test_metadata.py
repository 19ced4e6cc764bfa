from __future__ import annotations

import shutil

import pytest
import torch

from rosa_lightning.adapters.fingerprint import fingerprint
from rosa_lightning.adapters.metadata import (
    AdapterMetadata,
    Conditions,
    contradictions,
    tokenizer_digest,
)
from rosa_lightning.models.loading import load_base
from rosa_lightning.roae.inject import inject_roae
from rosa_lightning.roae.layer import RoAEConfig
from tests.conftest import build, byte_tokenizer, save_base


def test_metadata_goes_through_plain_values_and_ignores_what_later_releases_add():
    inject_roae(model := build("gemma3"), RoAEConfig(rank=2))
    conditions = Conditions(prompt_style="chat", max_length=8, precision="32-true", dtype="auto")
    metadata = AdapterMetadata.of(model, conditions)
    plain = {**metadata.to_dict(), "later": object()}
    assert AdapterMetadata.from_dict(plain) == metadata
    assert Conditions.from_dict({**conditions.to_dict(), "later": object()}) == conditions


def test_a_base_is_known_again_in_another_dtype_and_another_base_is_refused(base_folder, tmp_path):
    first = fingerprint(load_base(str(base_folder)), "the first")
    for dtype in ("bfloat16", "float16"):
        fingerprint(load_base(str(base_folder), dtype=dtype)).check(first)
    for i, changes in enumerate([{"seed": 1}, {"num_hidden_layers": 3}, {"hidden_size": 32}]):
        other = fingerprint(load_base(str(save_base(tmp_path / f"{i}", **changes))), "the other")
        with pytest.raises(ValueError, match="'the first', and the base given, 'the other'"):
            other.check(first)


def test_other_projections_in_a_deep_model_are_another_base():
    model = build("llama", num_hidden_layers=32)
    first = fingerprint(model, "base")
    torch.nn.init.normal_(model.model.layers[17].self_attn.k_proj.weight)
    with pytest.raises(ValueError, match=r"layers\.17\.self_attn\.k_proj\.weight differs"):
        fingerprint(model, "merged").check(first)


def test_equal_precisions_by_other_names_contradict_nothing():
    for now, then in [("32", "32-true"), (None, "32-true"), ("bf16", "bf16-mixed"), (16, "16")]:
        assert not contradictions({"trainer.precision": then}, {"trainer.precision": now}, "it")
    trained = {"model.quantization": None, "data.tokenizer": "a"}
    (line,) = contradictions(trained, {"model.quantization": "int8", "data.tokenizer": "b"}, "it")
    assert line.startswith("model.quantization is int8, and it was trained with null")


def test_tokenizers_are_told_apart_by_what_they_do():
    plain, chat, more = byte_tokenizer(), byte_tokenizer(), byte_tokenizer()
    chat.chat_template = "{{ messages }}"
    more.add_tokens(["<think>"])
    assert tokenizer_digest(byte_tokenizer()) == tokenizer_digest(plain)
    assert len({tokenizer_digest(one) for one in (plain, chat, more)}) == 3
    before = tokenizer_digest(plain)
    plain.chat_template = "{{ messages }}"
    assert tokenizer_digest(plain) == tokenizer_digest(chat) != before


def test_the_commit_of_a_base_from_the_hub_is_remembered(base_folder, tmp_path, monkeypatch):
    commit, cached = "0123456789abcdef" * 2 + "01234567", tmp_path / "models--org--base"
    shutil.copytree(base_folder, cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    found = fingerprint(load_base("org/base"))
    assert (found.base, found.revision) == ("org/base", commit)
    assert fingerprint(load_base(str(base_folder))).revision is None
