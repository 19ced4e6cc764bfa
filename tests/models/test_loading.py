from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from rosa_lightning.models import location, tiny
from rosa_lightning.models.loading import (
    context_length,
    load_base,
    load_skeleton,
    load_tokenizer,
)
from rosa_lightning.models.location import base_name, is_hub_id, whole_name
from tests.conftest import SMALL, build
from tests.hostile import KINDS, limited, put


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_base_is_loaded_in_the_dtype_asked_for_whatever_the_default(base_folder, dtype):
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = load_base(str(base_folder), dtype=dtype)
        assert torch.get_default_dtype() == torch.bfloat16
    finally:
        torch.set_default_dtype(torch.float32)
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, dtype)}


def test_a_tokenizer_without_padding_pads_with_its_end_token(base_folder, tmp_path):
    tokenizer = load_tokenizer(str(base_folder))
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path)).pad_token == "<eos>"
    assert load_tokenizer(str(tmp_path), for_training=False).pad_token is None


@pytest.mark.parametrize("load", [load_base, load_skeleton])
def test_remote_code_is_not_run_unless_asked_for(load, tmp_path):
    config = {"model_type": "strange", "auto_map": {"AutoConfig": "code.Config"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "code.py").write_text("raise SystemExit('remote code was run')")
    with pytest.raises(ValueError, match="could not be loaded"):
        load(str(tmp_path))


CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class Config(LlamaConfig):
    model_type = "own"

class Model(LlamaForCausalLM):
    config_class = Config
"""


def test_a_skeleton_runs_the_code_of_its_base_when_asked_to(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "c"))
    monkeypatch.syspath_prepend(str(tmp_path / "c"))
    # transformers registers the class for good.
    monkeypatch.setattr(transformers.MODEL_FOR_CAUSAL_LM_MAPPING, "_extra_content", {})
    config = transformers.LlamaConfig(**SMALL, dtype="float32").to_dict()
    places = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    (tmp_path / "code.py").write_text(CODE)
    (tmp_path / "config.json").write_text(
        json.dumps({**config, "model_type": "own", "auto_map": places})
    )
    for _ in range(2):
        model = load_skeleton(str(tmp_path), revision="abc", trust_remote_code=True)
        assert type(model).__name__ == "Model"
        assert all(weight.is_meta for weight in model.parameters())


def test_a_skeleton_needs_a_configuration_only_and_has_the_base_s_shapes(base_folder, tmp_path):
    whole = load_base(str(base_folder))
    whole.config.save_pretrained(tmp_path)
    empty = load_skeleton(str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    assert all(weight.is_meta for weight in empty.parameters())
    assert {n: (p.shape, p.dtype) for n, p in empty.named_parameters()} == {
        n: (p.shape, p.dtype) for n, p in whole.named_parameters()
    }
    assert not empty.training


@pytest.mark.parametrize("family", ["llama", "yarn", "llama3", "gemma3", "phi3", "neox"])
def test_a_skeleton_s_buffers_are_those_of_the_model(family, tmp_path):
    whole = build(family)
    whole.save_pretrained(tmp_path)
    expected = dict(load_base(str(tmp_path)).named_buffers())
    buffers = dict(load_skeleton(str(tmp_path)).named_buffers())
    assert buffers.keys() == expected.keys()
    assert expected
    assert all(torch.equal(buffers[name], expected[name]) for name in expected)


def test_a_skeleton_without_a_dtype_or_a_configuration_is_refused(tmp_path):
    transformers.LlamaConfig(**SMALL).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"does not say the data type .* Set model\.dtype"):
        load_skeleton(str(tmp_path))
    with pytest.raises(ValueError, match=r"configuration of base .* could not be loaded"):
        load_skeleton(str(tmp_path / "nothing"))


def test_a_base_with_code_of_its_own_and_a_missing_folder_say_how_to_mend_it(tmp_path):
    auto_map = {"AutoConfig": "c.C", "AutoModelForCausalLM": "m.M"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "new", "auto_map": auto_map}))
    with pytest.raises(ValueError, match=r"Set model\.trust_remote_code to true"):
        load_base(str(tmp_path))
    with pytest.raises(ValueError, match=r"/none' could not be loaded: there is no such folder\."):
        load_base(str(tmp_path / "none"))
    with pytest.raises(ValueError, match=r"'./none' could not be loaded: there is no such folder"):
        load_base("./none")


def test_a_damaged_base_and_one_that_lacks_weights_are_refused(base_folder, tmp_path):
    for name in ("cut", "partial"):
        shutil.copytree(base_folder, tmp_path / name)
    file = tmp_path / "cut" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"model of base .* could not be loaded"):
        load_base(str(tmp_path / "cut"))
    weights = load_file(tmp_path / "partial" / "model.safetensors")
    del weights["model.layers.1.self_attn.q_proj.weight"]
    save_file(weights, tmp_path / "partial" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks weights: model\.layers\.1\.self_attn\.q_proj"):
        load_base(str(tmp_path / "partial"))


def test_a_local_base_is_known_by_its_whole_path(base_folder, monkeypatch):
    monkeypatch.chdir(base_folder.parent)
    assert whole_name(base_folder.name) == str(base_folder)
    assert base_name(load_base(base_folder.name)) == str(base_folder)
    assert whole_name("tiny") == "tiny"
    assert whole_name("owner/model") == "owner/model"


PEAK = """
import sys
from rosa_lightning.models.loading import load_base
def resident(name):
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) / 1024
load_base("tiny")  # imports what a load needs
before = resident("VmRSS")
model = load_base(sys.argv[1], dtype=sys.argv[2])
peak = resident("VmHWM") - before  # not getrusage's, which begins with what the parent held
print(peak, sum(weight.nbytes for weight in model.parameters()) / 2**20)
"""


@pytest.mark.slow  # a process of its own, as a peak is of a whole process
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_a_base_is_loaded_without_a_second_copy_of_its_weights(tmp_path, dtype):
    model = build("llama", torch.bfloat16, hidden_size=512, vocab_size=64000, num_hidden_layers=8)
    model.save_pretrained(tmp_path)
    command = [sys.executable, "-c", PEAK, str(tmp_path), dtype]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    peak, weights = map(float, done.stdout.split()[-2:])
    assert weights > 100
    assert peak < 1.2 * weights


# Bases of strangers: no hang, no memory, one line.


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
    assert name in message(load, base)


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


@pytest.fixture
def unreachable(monkeypatch, tmp_path):
    """A hub that cannot be reached, and an empty cache of it."""

    def fail(api, *args, timeout=None, **options):
        patience.append(timeout)
        raise ConnectionError("no\nroute")

    patience: list[float] = []

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", fail)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    location._check_hub.cache_clear()
    return SimpleNamespace(cache=tmp_path, patience=patience)


def put_in_cache(cache: Path, *names: str, revision: str = "main", commit: str = "c0ffee") -> Path:
    """A repository ann/base in the hub's cache, with files of these names at a revision."""
    repository = cache / "models--ann--base"
    snapshot = repository / "snapshots" / commit
    for folder in (snapshot, repository / "refs"):
        folder.mkdir(parents=True, exist_ok=True)
    (repository / "refs" / revision).write_text(commit)
    for name in names:
        (snapshot / name).write_text("{}")
    return snapshot


def test_a_base_that_is_nowhere_is_said_at_once_where_the_hub_cannot_be_reached(unreachable):
    for load in (load_base, load_skeleton, load_tokenizer):
        with pytest.raises(ValueError, match=r"the hub cannot be reached \(no route\)") as caught:
            load("ann/base")
        assert "\n" not in str(caught.value)
    assert not huggingface_hub.constants.HF_HUB_OFFLINE


def test_a_cached_base_is_loaded_without_further_requests(unreachable, base):
    shutil.copytree(base, put_in_cache(unreachable.cache), dirs_exist_ok=True)
    with pytest.warns(UserWarning, match=r"be reached \(no route\), so ann/base is loaded"):
        load_base("ann/base")
    assert huggingface_hub.constants.HF_HUB_OFFLINE
    assert unreachable.patience == [5]


@pytest.mark.parametrize(
    ("revision", "held"), [(None, ()), ("v2", ("config.json", "model.safetensors"))]
)
def test_a_cache_without_the_base_at_its_revision_is_no_reason_to_go_offline(
    unreachable, revision, held
):
    put_in_cache(unreachable.cache, *held)  # empty, or of another revision
    with pytest.raises(ValueError, match="the hub cannot be reached"):
        load_base("ann/base", revision=revision)
    assert not huggingface_hub.constants.HF_HUB_OFFLINE
    assert unreachable.patience == [30]


def test_a_hub_has_longer_to_answer_where_weights_are_not_in_the_cache(unreachable):
    put_in_cache(unreachable.cache, "config.json")
    with pytest.warns(UserWarning, match="be reached"), pytest.raises(ValueError, match="loaded"):
        load_base("ann/base")
    assert unreachable.patience == [30]


def test_a_hub_that_answers_is_left_to_say_what_is_wrong(unreachable, monkeypatch):
    def refuse(api, *args, **options):
        raise huggingface_hub.errors.HFValidationError("no name")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", refuse)
    location._check_hub("ann/base", "main")
    assert not huggingface_hub.constants.HF_HUB_OFFLINE


def test_what_is_on_the_hub_is_told_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    assert is_hub_id("Qwen/Qwen3-0.6B")
    assert not any(map(is_hub_id, ("tiny", "smollm2", "mine", "/a/b", "a/b.gguf", "a/b/c")))
