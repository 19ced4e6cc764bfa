"""A base of a stranger: no hang, no memory, one line."""

from __future__ import annotations

import json
import pickle
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from rosa_lightning.models import tiny
from rosa_lightning.models.loading import (
    context_length,
    load_base,
    load_skeleton,
    load_tokenizer,
)
from tests.hostile import KINDS, limited, put


@pytest.fixture
def base(tmp_path) -> Path:
    return Path(shutil.copytree(tiny.folder(), tmp_path / "base"))


def message(load: Any, base: Path | str, **options: Any) -> str:
    with limited(), pytest.raises(ValueError, match="could not be loaded") as caught:
        load(str(base), **options)
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 1500
    return text


@pytest.mark.parametrize("load", [load_base, load_skeleton, context_length])
@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 1_000_000},
        {"num_hidden_layers": 10**18},
        {"hidden_size": 10**12},
        {"head_dim": 2**40},
        {"vocab_size": 2**60},
        {"num_attention_heads": 10**9},
        {"max_position_embeddings": 2**62},
        {"nested": {"deeper": [{"num_local_experts": 10**9}]}},
        {"layer_types": ["full_attention"] * 70_000},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_configuration_out_of_all_proportion_is_refused_before_it_is_built(base, load, changes):
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, **changes}))
    name = "num_local_experts" if "nested" in changes else next(iter(changes))
    assert (
        f"its configuration {'has a list' if name == 'layer_types' else 'says'} {name}"
        in message(load, base)
    )


@pytest.mark.parametrize("kind", KINDS[:3])
@pytest.mark.parametrize(
    ("name", "load"),
    [
        ("config.json", load_skeleton),
        ("generation_config.json", load_base),
        ("model.safetensors", load_base),
        ("tokenizer.json", load_tokenizer),
    ],
)
def test_what_is_no_file_is_named_at_once(base, kind, name, load):
    (base / name).unlink(missing_ok=True)
    put(kind, base / name)
    assert f"{name} is {kind}" in message(load, base)


@pytest.mark.parametrize(
    "text", ["[" * 50_000, '{"a": ' * 50_000, "7" * 5_000, "", "null", "[]", '"a"', "\x00"]
)
@pytest.mark.parametrize("load", [load_base, load_skeleton, context_length])
def test_a_configuration_that_is_none_is_one_line(base, load, text):
    (base / "config.json").write_text(text)
    assert str(base) in message(load, base)


class Code:
    def __reduce__(self):
        return print, ("run",)


def test_pickled_weights_run_no_code_and_are_one_line(base, capsys):
    (base / "model.safetensors").unlink()
    torch.save({"model.embed_tokens.weight": Code()}, base / "pytorch_model.bin")
    message(load_base, base)
    (base / "pytorch_model.bin").write_bytes(pickle.dumps({"a": Code()}))
    message(load_base, base)
    (base / "pytorch_model.bin").write_bytes(b"no weights")
    message(load_base, base)
    assert "run" not in capsys.readouterr().out


def test_pickled_weights_that_unpack_to_more_than_they_are_are_refused(base):
    (base / "model.safetensors").unlink()
    with zipfile.ZipFile(base / "pytorch_model.bin", "w", zipfile.ZIP_DEFLATED) as out:
        out.writestr("archive/data/0", bytes(2**24))
    assert "pytorch_model.bin has" in (found := message(load_base, base))
    assert "unpacks to 16,777,216" in found
