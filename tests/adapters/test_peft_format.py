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
from peft.utils.other import get_pattern_key
from safetensors.torch import save_file
from torch import nn

from rosa_lightning.adapters.peft_format import (
    lora_modules,
    pattern_value,
    read_lora,
    target_modules,
)
from rosa_lightning.utils.files import memory_bytes
from tests.hostile import limited, put

PATH = "model.layers.0.self_attn.q_proj"
A, B = (f"base_model.model.{PATH}.lora_{part}.weight" for part in "AB")
CONFIG = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
TENSORS = {A: torch.randn(4, 8), B: torch.randn(6, 4)}


@pytest.fixture
def folder(tmp_path):
    write(tmp_path)
    return tmp_path


def write(folder, config=None, tensors=None):
    (folder / "adapter_config.json").write_text(json.dumps({**CONFIG, **(config or {})}))
    save_file(tensors or TENSORS, folder / "adapter_model.safetensors", {"format": "pt"})


def test_a_folder_is_read_as_it_is(folder):
    files = read_lora(folder)
    assert files.config == CONFIG
    assert files.metadata == {"format": "pt"}
    assert all(torch.equal(files.tensors[key], tensor) for key, tensor in TENSORS.items())
    ((path, module),) = lora_modules(files).items()
    assert path == PATH
    assert module.scale == 2.0
    assert torch.equal(module.A, TENSORS[A])
    assert torch.equal(module.B, TENSORS[B])


@pytest.mark.filterwarnings("ignore:The following alpha_pattern keys did not match")
@pytest.mark.parametrize(
    ("options", "scale"),
    [
        ({"use_rslora": True}, 4.0),
        ({"r": 8, "rank_pattern": {"q_proj": 4}}, 2.0),
        ({"alpha_pattern": {r"layers\.\d+\.self_attn\.q_proj": 2, "q_proj": 16}}, 0.5),
        ({"alpha_pattern": {"k_proj": 2}, "use_dora": False, "modules_to_save": []}, 2.0),
    ],
)
def test_the_scale_is_that_of_peft(folder, options, scale):
    write(folder, options)
    assert lora_modules(read_lora(folder))[PATH].scale == scale
    attention = nn.ModuleDict({"self_attn": nn.ModuleDict({"q_proj": nn.Linear(8, 6)})})
    model = nn.ModuleDict({"model": nn.ModuleDict({"layers": nn.ModuleList([attention])})})
    theirs = peft.get_peft_model(model, peft.LoraConfig(**{**CONFIG, **options}))
    assert theirs.base_model.model.get_submodule(PATH).scaling["default"] == scale


OPTIONS = {
    "use_dora": True,
    "bias": "lora_only",
    "lora_bias": True,
    "modules_to_save": ["lm_head"],
    "target_parameters": ["experts.gate_up_proj"],
    "trainable_token_indices": [1],
    "layer_replication": [[0, 1]],
    "alora_invocation_tokens": [1],
    "init_lora_weights": "pissa_niter_4",
    "peft_type": "ADALORA",
}


@pytest.mark.parametrize("name", OPTIONS)
def test_what_is_no_plain_lora_is_refused_by_its_option(folder, name):
    write(folder, {name: OPTIONS[name]})
    wanted = OPTIONS[name] if name == "peft_type" else f"sets {name} to"
    with pytest.raises(ValueError, match=wanted) as error:
        read_lora(folder)
    assert "\n" not in str(error.value)
    assert str(folder) in str(error.value)


TYPES = {
    "rank_pattern": [["q_proj", 4]],
    "alpha_pattern": "q_proj",
    "lora_dropout": "x",
    "use_rslora": "false",
    "base_model_name_or_path": {"name": "llama"},
}


@pytest.mark.parametrize("name", TYPES)
def test_an_option_of_another_type_is_named(folder, name):
    write(folder, {name: TYPES[name]})
    with pytest.raises(ValueError, match=rf"adapter_config\.json sets {name} to") as error:
        read_lora(folder)
    assert "\n" not in str(error.value)


def test_options_that_are_null_are_as_if_left_out(folder):
    write(folder, dict.fromkeys([*TYPES, "target_modules", "revision"]))
    assert lora_modules(read_lora(folder))[PATH].scale == 2.0


def exchange(path: Path, kind: str) -> None:
    path.unlink()
    put(kind, path)


DAMAGES = {
    "no folder": (lambda f: f.rename(f.with_name("gone")), "holds no adapter_config.json"),
    "no config": (lambda f: (f / "adapter_config.json").unlink(), "holds no adapter_config.json"),
    "no weights": (
        lambda f: (f / "adapter_model.safetensors").unlink(),
        "holds no adapter_model.safetensors.$",
    ),
    "pickled": (
        lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"),
        "only adapter_model.bin. Load it with PEFT and save it again",
    ),
    "cut config": (
        lambda f: (f / "adapter_config.json").write_text('{"r": '),
        "adapter_config.json cannot be read",
    ),
    "binary config": (
        lambda f: (f / "adapter_config.json").write_bytes(b"\xff\xfe\x00"),
        "adapter_config.json cannot be read",
    ),
    "list for config": (
        lambda f: (f / "adapter_config.json").write_text("[]"),
        "holds no JSON object",
    ),
    "cut weights": (
        lambda f: (f / "adapter_model.safetensors").write_bytes(
            (f / "adapter_model.safetensors").read_bytes()[:-9]
        ),
        "adapter_model.safetensors cannot be read",
    ),
    "a pipe for config": (lambda f: exchange(f / "adapter_config.json", "a pipe"), "is a pipe"),
    "a device for config": (lambda f: exchange(f / "adapter_config.json", "a device"), "a device"),
    "a pipe for weights": (
        lambda f: exchange(f / "adapter_model.safetensors", "a pipe"),
        "holds no adapter_model.safetensors",
    ),
    "nested config": (
        lambda f: (f / "adapter_config.json").write_text('{"a":' * 50_000),
        "adapter_config.json cannot be read: is nested too deeply",
    ),
    "a name twice": (
        lambda f: (f / "adapter_config.json").write_text('{"r": 1, "r": 2}'),
        "adapter_config.json cannot be read: gives 'r' twice",
    ),
    "weights of holes": (
        lambda f: os.truncate(f / "adapter_model.safetensors", memory_bytes()),
        "adapter_model.safetensors cannot be read: it has .* bytes",
    ),
    "empty weights": (
        lambda f: (f / "adapter_model.safetensors").write_bytes(b""),
        "adapter_model.safetensors cannot be read",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_missing_or_damaged_file_is_named_in_one_line(folder, name):
    damage, message = DAMAGES[name]
    damage(folder)
    with limited(), pytest.raises(ValueError, match=message) as error:
        read_lora(folder)
    assert "\n" not in str(error.value)


WRONG = {
    "no B": ({A: TENSORS[A]}, {}, f"{PATH} has no lora_B.weight"),
    "no A": ({B: TENSORS[B]}, {}, f"{PATH} has no lora_A.weight"),
    "magnitude": (
        {**TENSORS, A.replace("lora_A.weight", "lora_magnitude_vector"): torch.ones(6)},
        {},
        "lora_magnitude_vector is neither",
    ),
    "head": (
        {**TENSORS, "base_model.model.lm_head.weight": torch.ones(2, 2)},
        {},
        "lm_head.weight is neither",
    ),
    "bare name": ({f"{PATH}.lora_A.weight": TENSORS[A]}, {}, "is neither"),
    "convolution": ({A: torch.ones(4, 8, 1, 1), B: TENSORS[B]}, {}, r"shape \(4, 8, 1, 1\)"),
    "integers": ({A: TENSORS[A].int(), B: TENSORS[B]}, {}, r"lora_A.weight has dtype torch.int32"),
    "truths": ({A: TENSORS[A], B: TENSORS[B] > 0}, {}, r"lora_B.weight has dtype torch.bool"),
    "no number": (
        {A: TENSORS[A], B: TENSORS[B].index_fill(0, torch.tensor(3), float("nan"))},
        {},
        "lora_B.weight holds values that are not finite",
    ),
    "too large": (
        {A: TENSORS[A].double() * 1e300, B: TENSORS[B]},
        {},
        "lora_A.weight holds values that are not finite in float32",
    ),
    "ranks": ({A: torch.ones(3, 8), B: TENSORS[B]}, {}, "rank 3 in lora_A.weight, 4 in"),
    "r": (TENSORS, {"r": 8}, "4 in lora_B.weight and 8 in adapter_config.json"),
    "r is text": (TENSORS, {"r": "4"}, "r='4', not a number above 0"),
    "alpha is 0": (TENSORS, {"lora_alpha": 0}, "lora_alpha=0, not a number above 0"),
    "alpha is too large": (TENSORS, {"lora_alpha": 10**400}, "lora_alpha=1000*, not a number"),
    "pattern": (TENSORS, {"rank_pattern": {"(": 4}}, r"has the pattern '\('"),
}


@pytest.mark.parametrize("name", WRONG)
def test_tensors_that_are_no_whole_lora_are_named(folder, name):
    tensors, config, message = WRONG[name]
    write(folder, config, tensors)
    with pytest.raises(ValueError, match=message) as error:
        read_lora(folder)
    assert "\n" not in str(error.value)


def test_a_file_without_tensors_is_refused(folder):
    save_file({}, folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="holds no LoRA"):
        read_lora(folder)


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


PATTERNS = st.dictionaries(
    st.one_of(
        PATHS, PATHS.map(lambda p: "^" + p), st.sampled_from([r"\d+\.q", ".*proj", "q|k", ".*"])
    ),
    st.integers(1, 64),
    max_size=5,
)


@given(PATTERNS, PATHS)
def test_patterns_are_read_as_peft_reads_them(patterns, path):
    theirs = patterns.get(get_pattern_key(patterns.keys(), path), 7)
    assert pattern_value(patterns, path, 7) == theirs


@pytest.mark.parametrize(
    "pattern", ["(.*)*(.*)*x", "(.*l){60}", "(a|b)+" * 99, "(a|aa)+b", "(?=x)y"]
)
def test_patterns_that_take_for_ever_are_refused_by_name(pattern):
    error = None
    with limited(5):
        try:
            assert pattern_value({pattern: 4}, "a" * 400, 7) in (4, 7)
        except ValueError as caught:
            error = caught
    assert error is None or repr(pattern[:50])[:-1] in str(error)


@pytest.mark.parametrize("patterns", [None, {}])
def test_without_patterns_the_default_holds(patterns):
    assert pattern_value(patterns, PATH, 7) == 7
