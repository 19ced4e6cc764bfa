from __future__ import annotations

import json
import os
import resource

import pytest
import torch
import transformers
from torch import nn

from rosa_lightning.adapters.export import export_adapter
from rosa_lightning.roae.inject import inject_roae, roae_layers
from rosa_lightning.roae.layer import RoAEConfig
from tests.conftest import FAMILIES, SMALL, build, byte_tokenizer
from tests.model_zoo.small import build_small


def adapted(family="llama", config=None, **changes):
    model = build(family, **changes)
    inject_roae(model, config or RoAEConfig(rank=4))
    for _, layer in roae_layers(model):
        nn.init.normal_(layer.roae_B, std=0.2)
    return model


def plain(folder, **options):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_merged_folder_loads_without_this_package(family, tmp_path, ids_BT):
    model = adapted(family)
    expected = model(ids_BT).logits
    report = export_adapter(model, tmp_path / "out", "merged")
    merged = plain(tmp_path / "out")
    assert type(merged) is type(model)
    torch.testing.assert_close(merged(ids_BT).logits, expected, atol=1e-5, rtol=1e-5)
    assert report.merged.divergence < 1e-8
    assert report.rounding is None
    assert not any("roae" in key for key in merged.state_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_base_is_folded_in_float32_and_cast_once(dtype, tmp_path):
    model = adapted(dtype=dtype)
    export_adapter(model, tmp_path / "out", "merged")
    merged = plain(tmp_path / "out")
    assert merged.dtype == dtype
    for path, layer in roae_layers(model):
        exact = layer.base.weight.double()
        exact[layer.rows] += layer.scale * layer.roae_B.double() @ layer.roae_A.double()
        rounded = exact.float().to(dtype)
        found = merged.get_submodule(path).weight
        # float32 may round the exact sum the other way, which the cast sees but rarely.
        assert (found == rounded).float().mean() > 0.999
        torch.testing.assert_close(found, rounded, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_the_model_that_is_exported_stays_as_it_was(tmp_path, ids_BT):
    model = adapted("phi3", dtype=torch.bfloat16).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modules = [name for name, _ in model.named_modules()]
    for format in ("rosa", "peft", "merged"):
        export_adapter(model, tmp_path / format, format)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert [name for name, _ in model.named_modules()] == modules
    assert model.training
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {key for key in before if "roae_" in key}


def test_large_models_are_written_in_shards(tmp_path, ids_BT):
    model = adapted()
    export_adapter(model, tmp_path / "out", "merged", max_shard_size="0.1 mb")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    torch.testing.assert_close(
        plain(tmp_path / "out")(ids_BT).logits, model(ids_BT).logits, atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("format", ["peft", "rosa", "merged"])
def test_the_tokenizer_comes_along_with_its_chat_template(format, tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for turn in messages %}{{ turn.content }}{% endfor %}"
    export_adapter(adapted(vocab_size=258), tmp_path / "out", format, tokenizer=tokenizer)
    found = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert found("ab").input_ids == byte_tokenizer()("ab").input_ids
    assert found.chat_template == tokenizer.chat_template


def test_generation_settings_come_along_as_they_are(tmp_path):
    model = adapted(vocab_size=258)
    model.generation_config.temperature = 0.9  # and no sampling: transformers refuses to save it
    export_adapter(model, tmp_path / "out", "merged")
    stored = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert stored["temperature"] == model.generation_config.temperature == 0.9
    assert not stored.get("do_sample")


@pytest.mark.parametrize("format", ["peft", "merged"])
def test_a_term_after_a_norm_cannot_leave(format, tmp_path):
    model = adapted("qwen3", RoAEConfig(rank=4, placement="state"))
    with pytest.raises(ValueError, match="placement=state adds the term after a norm"):
        export_adapter(model, tmp_path / "out", format)
    assert list(tmp_path.iterdir()) == []


def test_wrong_arguments_are_named(tmp_path):
    model = adapted()
    with pytest.raises(ValueError, match="carries no RoAE"):
        export_adapter(build("llama"), tmp_path / "out")
    with pytest.raises(ValueError, match=r"format='gguf' is unknown\. Set one of peft, rosa"):
        export_adapter(model, tmp_path / "out", "gguf")
    with pytest.raises(ValueError, match="exists already"):
        export_adapter(model, tmp_path)
    for size in ("5XB", "5", "0GB", "0.0GB", "1.2.3GB", "-1GB", "GB", 5):
        with pytest.raises(ValueError, match="is no size of a file"):
            export_adapter(model, tmp_path / "out", "merged", max_shard_size=size)
    merged_only = {"max_shard_size": "5GB", "dequantize": True}
    for name, value in merged_only.items():
        message = f"{name} is an option of format merged, and format is peft"
        with pytest.raises(ValueError, match=message):
            export_adapter(model, tmp_path / "out", "peft", **{name: value})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["Emu3Config", "MllamaConfig"])
def test_what_loads_a_merged_folder_is_said_where_the_auto_class_does_not(name, tmp_path):
    model = build_small(name)
    inject_roae(model, RoAEConfig(rank=2))
    for _, layer in roae_layers(model):
        nn.init.normal_(layer.roae_B, std=0.2)
    report = export_adapter(model, tmp_path / "out", "merged")
    with pytest.raises(ValueError, match="Unrecognized configuration"):
        plain(tmp_path / "out")
    own = type(model).__name__
    assert f"AutoModelForCausalLM does not load it, transformers.{own}.from_pretrained" in str(
        report
    )
    ids_BT = torch.arange(3, 12)[None]
    merged = getattr(transformers, own).from_pretrained(tmp_path / "out").eval()
    logits = merged(input_ids=ids_BT, use_cache=False).logits
    expected = model(input_ids=ids_BT, use_cache=False).logits
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    assert export_adapter(adapted(), tmp_path / "llama", "merged").notes == ()


@pytest.mark.parametrize("format", ["peft", "rosa", "merged"])
def test_a_full_disk_or_a_folder_that_cannot_be_made_leaves_nothing_behind(format, tmp_path):
    model = adapted(**{**SMALL, "hidden_size": 256})
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"file/out cannot be written: .*Make room, or give"):
        export_adapter(model, tmp_path / "file" / "out", format)
    (tmp_path / "file").unlink()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(OSError, match=r"out cannot be written: .*Make room, or") as caught:
            export_adapter(model, tmp_path / "out", format)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == []
    assert len(list(roae_layers(model))) == 4  # adapted still
