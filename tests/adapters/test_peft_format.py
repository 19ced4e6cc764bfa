from __future__ import annotations

import json
import os
from pathlib import Path

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft.tuners.tuners_utils import check_target_module_exists
from safetensors.torch import save_file

from rosa_lightning.adapters.peft_format import (
    read_header,
    read_json,
    read_tensors,
    target_modules,
)
from rosa_lightning.utils.files import memory_bytes
from tests.hostile import KINDS, limited, put


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("read", [read_json, read_header, read_tensors])
def test_what_is_no_regular_file_is_refused_in_one_line(tmp_path, kind, read):
    path = put(kind, tmp_path / "it")
    with limited(), pytest.raises(ValueError, match=f"it cannot be read: .*is {kind}") as error:
        read(path)
    assert "\n" not in str(error.value)


def test_json_that_is_damaged_is_refused(tmp_path):
    texts = ('{"r": ', "[]", '{"a":' * 50_000, '{"r": 1, "r": 2}')
    for text in texts:
        (tmp_path / "it").write_text(text)
        with limited(), pytest.raises(ValueError, match="it cannot be read: "):
            read_json(tmp_path / "it")
    (tmp_path / "it").write_text(json.dumps({"r": 4}))
    assert read_json(tmp_path / "it") == {"r": 4}


def _holes(path: Path) -> None:
    os.truncate(path, memory_bytes())  # on no disk


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.unlink(),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:-9]),
        _holes,
    ],
)
def test_tensors_that_are_damaged_are_refused(tmp_path, damage):
    path = tmp_path / "it"
    save_file({"a": torch.ones(3)}, path, {"format": "pt"})
    assert read_tensors(path)["a"].tolist() == [1, 1, 1]
    assert read_header(path) == {"format": "pt"}
    damage(path)
    with limited(), pytest.raises(ValueError, match=r"it cannot be read: .*export it again") as one:
        read_tensors(path)
    assert "\n" not in str(one.value)


BAD = {
    "has dtype torch.int32": torch.ones(3).int(),
    r"not finite in float32 \(NaN or infinity\)": torch.tensor([1, float("nan")]),
    "holds values that are not finite": torch.tensor([1e300], dtype=torch.double),
}


@pytest.mark.parametrize("message", BAD)
def test_tensors_that_are_no_finite_floats_are_named(message, tmp_path):
    save_file({"a": torch.ones(2), "b": BAD[message]}, tmp_path / "it")
    with pytest.raises(ValueError, match=f"it: b .*{message}"):
        read_tensors(tmp_path / "it")


NAMES = st.sampled_from(["q", "k", "q_proj", "proj", "0", "1", "10", "layers", "attn"])
PATHS = st.lists(NAMES, min_size=1, max_size=4).map(".".join)


@given(st.sets(PATHS, min_size=1, max_size=12), st.data())
def test_target_modules_pick_the_adapted_modules_by_peft_s_own_rule(modules, data):
    adapted = data.draw(st.sets(st.sampled_from(sorted(modules)), min_size=1))
    targets = target_modules(adapted, modules)
    config = peft.LoraConfig(target_modules=targets)
    assert {path for path in modules if check_target_module_exists(config, path)} == adapted


def test_target_modules_are_names_where_these_suffice():
    layers = [f"layers.{i}.{name}" for i in range(12) for name in ("q", "k", "v")]
    picked = {path for path in layers if path.endswith(("q", "k"))}
    assert target_modules(picked, layers) == ["k", "q"]
    # Layer 1 and not 11, whose path is no longer.
    some = {path for path in picked if path != "layers.11.q"}
    assert target_modules(some, layers) == ["k", *sorted(some - {p for p in some if p[-1] == "k"})]
    # Not even the full path tells these apart.
    assert target_modules({"a.q"}, ["a.q", "b.a.q"]) == r"a\.q"
