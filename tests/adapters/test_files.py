from __future__ import annotations

import json
import os
import re
from dataclasses import replace

import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from rosa_lightning.adapters.export import export_adapter
from rosa_lightning.adapters.files import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    adapter_settings,
    load_adapter,
)
from rosa_lightning.adapters.peft_format import WEIGHTS_FILE as LORA_WEIGHTS_FILE
from rosa_lightning.adapters.peft_format import read_lora
from rosa_lightning.models.loading import load_base
from rosa_lightning.module import RoSAModule
from rosa_lightning.roae.inject import inject_roae, roae_layers
from rosa_lightning.roae.layer import RoAEConfig
from rosa_lightning.utils.files import memory_bytes
from tests.conftest import FAMILIES, build
from tests.hostile import limited, put

LINEAR = {"rope_type": "linear", "rope_theta": 1e4}
CONFIG = RoAEConfig(rank=4, alpha=6.0, low_freq_ratio=0.5, targets=("q", "k", "v"))


def trained(family="llama", config=CONFIG):
    model = fresh(family)
    inject_roae(model, config)
    for _, layer in roae_layers(model):
        nn.init.normal_(layer.roae_B)
    return model


def fresh(family="llama", **changes):
    """The base of `trained`, loaded anew."""
    torch.manual_seed(0)
    return build(family, **changes)


def unchanged(model, before):
    """Whether a model is what `before` says: modules, weights, and what requires a gradient."""
    modules, state, flags = before
    return (
        [(name, module.training) for name, module in model.named_modules()] == modules
        and all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
        and [p.requires_grad for p in model.parameters()] == flags
    )


def snapshot(model):
    state = {key: value.clone() for key, value in model.state_dict().items()}
    flags = [p.requires_grad for p in model.parameters()]
    return [(name, module.training) for name, module in model.named_modules()], state, flags


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_loads_on_a_fresh_base_bit_for_bit(family, tmp_path, ids_BT):
    model = trained(family, replace(CONFIG, targets=("q", "k")))
    expected = model(ids_BT).logits
    export_adapter(model, tmp_path / "out", "rosa")
    base = fresh(family)
    report = load_adapter(base, tmp_path / "out")
    assert torch.equal(base(ids_BT).logits, expected)
    assert report.config == replace(CONFIG, targets=("q", "k"))
    assert all(p.requires_grad == ("roae_" in name) for name, p in base.named_parameters())


def test_a_term_after_a_norm_loads_too(tmp_path, ids_BT):
    config = replace(CONFIG, placement="state", targets=("q", "k"))
    model = trained("qwen3", config)
    export_adapter(model, tmp_path / "out", "rosa")
    base = fresh("qwen3")
    assert load_adapter(base, tmp_path / "out").config.placement == "state"
    assert torch.equal(base(ids_BT).logits, model(ids_BT).logits)


def test_another_dtype_of_the_same_base_is_fine(tmp_path):
    model = trained()
    export_adapter(model, tmp_path / "out", "rosa")
    load_adapter(other := fresh(dtype=torch.bfloat16), tmp_path / "out")
    found, wanted = roae_layers(other), roae_layers(model)
    assert [path for path, _ in found] == [path for path, _ in wanted]
    for (_, one), (_, same) in zip(found, wanted, strict=True):
        assert torch.equal(one.roae_A, same.roae_A)
        assert torch.equal(one.roae_B, same.roae_B)


def test_the_folder_says_what_it_is(tmp_path):
    report = inject_roae(model := build("llama"), CONFIG)
    export_adapter(model, tmp_path / "out", "rosa")
    config = json.loads((tmp_path / "out" / CONFIG_FILE).read_text())
    assert config["package"].startswith("rosa-lightning ")
    assert config["base"]["base"] == "LlamaForCausalLM"
    assert config["base"]["revision"] is None
    assert config["roae"]["low_freq_ratio"] == 0.5
    for term, projection in zip(config["terms"], report.projections, strict=True):
        table = config["tables"][term["table"]]
        assert term["projection"] == projection.name
        assert tuple(table["inv_freq"]) == projection.table.inv_freq


def _damage_json(folder):
    (folder / CONFIG_FILE).write_text("{")


def _later_release(folder):
    path = folder / CONFIG_FILE
    path.write_text(path.read_text().replace('"format": 1', '"format": 2'))


def _cut_weights(folder):
    path = folder / WEIGHTS_FILE
    path.write_bytes(path.read_bytes()[:-50])


def _no_weights(folder):
    (folder / WEIGHTS_FILE).unlink()


def _high_rank(folder):
    """Of weights that would take 640 GB; those that are there are of another shape."""
    path = folder / CONFIG_FILE
    path.write_text(path.read_text().replace('"rank": 4', '"rank": 1000000000'))


def _higher_rank(folder):
    path = folder / CONFIG_FILE
    path.write_text(path.read_text().replace('"rank": 4', '"rank": 8'))


def _a_pipe(folder):
    _no_weights(folder)
    put("a pipe", folder / WEIGHTS_FILE)


def _a_device(folder):
    (folder / CONFIG_FILE).unlink()
    put("a device", folder / CONFIG_FILE)


def _nested(folder):
    (folder / CONFIG_FILE).write_text("[" * 50_000)


def _huge(folder):
    os.truncate(folder / WEIGHTS_FILE, memory_bytes())  # with holes, on no disk


def _no_adapter(folder):
    (folder / CONFIG_FILE).unlink()


def _another_name(folder):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / WEIGHTS_FILE)
    save_file({f"base_model.{key}": value for key, value in weights.items()}, folder / WEIGHTS_FILE)


DAMAGES = {
    _damage_json: r"roae_config\.json cannot be read \(JSONError",
    _later_release: r"is of format 2 \(written by rosa-lightning .*Install the release",
    _cut_weights: r"roae_adapter\.safetensors cannot be read",
    _no_weights: r"roae_adapter\.safetensors cannot be read",
    _high_rank: r"rank=1000000000 is above 64, the inputs of model\.layers\.0",
    _higher_rank: r"does not fit the model: .* has shape \(4, 64\), not \(8, 64\)",
    _a_pipe: r"roae_adapter\.safetensors is a pipe",
    _a_device: r"roae_config\.json is a device",
    _nested: r"roae_config\.json .*nested too deeply",
    _huge: r"roae_adapter\.safetensors cannot be read: it has .* bytes, and at most",
    _no_adapter: r"holds no adapter: neither roae_config\.json nor adapter_config\.json",
    _another_name: r"the adapter does not fit the model: model\.layers\.0.* is missing",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_refused_in_one_line_and_the_model_left_as_it_was(damage, tmp_path):
    export_adapter(trained(), tmp_path / "out", "rosa")
    damage(tmp_path / "out")
    base = fresh()
    base.lm_head.requires_grad_(False)
    base.train().model.layers[0].eval()
    before = snapshot(base)
    with limited(), pytest.raises(ValueError, match=DAMAGES[damage]) as caught:
        load_adapter(base, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert unchanged(base, before)


def _replace(*path_and_value):
    """A change of one entry of a configuration."""
    *path, last, value = path_and_value

    def change(config):
        holder = config
        for key in path:
            holder = holder[key]
        holder[last] = value
        return config

    return change


SHAPES = {
    "no object": lambda config: [config],
    "base is empty": _replace("base", {}),
    "base is text": _replace("base", "llama"),
    "samples are a list": _replace("base", "samples", [0.5]),
    "samples are text": _replace("base", "samples", {"lm_head.weight": ["a", "b"]}),
    "no tables": _replace("tables", []),
    "tables are null": _replace("tables", None),
    "a table before the first": _replace("terms", 0, "table", -1),
    "a frequency no float can hold": _replace("tables", 0, "inv_freq", [10**400]),
    "a frequency is null": _replace("tables", 0, "inv_freq", [None]),
    "a pair of three": _replace("tables", 0, "pairs", [[0, 1, 2]]),
    "fewer terms": lambda config: {**config, "terms": config["terms"][:-1]},
    "more terms": lambda config: {**config, "terms": config["terms"] + config["terms"][:1]},
    "a term without fields": _replace("terms", 0, {}),
    "terms are numbers": _replace("terms", [1, 2]),
    "roae is null": _replace("roae", None),
    "an unknown setting": _replace("roae", "width", 3),
    "alpha is null": _replace("roae", "alpha", None),
    "targets are null": _replace("roae", "targets", None),
}


@pytest.mark.parametrize("name", SHAPES)
def test_a_configuration_of_another_shape_is_refused_in_one_line(name, tmp_path):
    export_adapter(trained(), tmp_path / "out", "rosa")
    path = tmp_path / "out" / CONFIG_FILE
    path.write_text(json.dumps(SHAPES[name](json.loads(path.read_text()))))
    base = fresh()
    before = snapshot(base)
    with pytest.raises(ValueError, match=r"cannot be read|lists \d+ terms") as caught:
        load_adapter(base, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert "Export the adapter again" in str(caught.value)
    assert unchanged(base, before)


def test_whole_numbers_do_for_frequencies(tmp_path):
    even = {"rope_type": "default", "rope_theta": 1.0}  # every pair turns by one radian a token
    inject_roae(model := fresh(rope_parameters=even), CONFIG)
    export_adapter(model, tmp_path / "out", "rosa")
    path = tmp_path / "out" / CONFIG_FILE
    config = json.loads(path.read_text())
    config["tables"][0]["inv_freq"] = [round(f) for f in config["tables"][0]["inv_freq"]]
    assert {type(f) for f in config["tables"][0]["inv_freq"]} == {int}
    path.write_text(json.dumps(config))
    report = load_adapter(fresh(rope_parameters=even), tmp_path / "out")
    assert report.config == CONFIG


BAD_WEIGHTS = {
    "has dtype torch.int32": lambda weight: weight.int(),
    "has dtype torch.bool": lambda weight: weight > 0,
    r"not finite in float32 \(NaN or infinity\)": lambda weight: weight.fill_(float("nan")),
    "holds values that are not finite": lambda weight: weight.fill_(float("inf")),
}


@pytest.mark.parametrize("message", BAD_WEIGHTS)
@pytest.mark.parametrize("format", ["rosa", "peft"])
def test_weights_that_are_no_finite_floats_are_named(format, message, tmp_path):
    export_adapter(trained(), tmp_path / "out", format)
    (path,) = (tmp_path / "out").glob("*.safetensors")
    with safe_open(path, "pt") as file:
        weights, header = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
    broken = sorted(weights)[3]
    save_file({**weights, broken: BAD_WEIGHTS[message](weights[broken])}, path, header)
    base = fresh()
    before = snapshot(base)
    with pytest.raises(ValueError, match=rf"{re.escape(broken)} .*{message}") as caught:
        load_adapter(base, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert unchanged(base, before)


def test_a_lightning_module_is_told_to_pass_its_model(tmp_path):
    module = RoSAModule("tiny").eval()
    for function, arguments in ((load_adapter, ()), (export_adapter, ("rosa",))):
        with pytest.raises(ValueError, match=r"not the RoSAModule itself\. Pass module\.model"):
            function(module, tmp_path / "out", *arguments)
    assert list(tmp_path.iterdir()) == []


def test_settings_in_a_lora_that_would_take_all_memory_are_refused(tmp_path):
    export_adapter(trained(), tmp_path / "out", "peft")
    path = tmp_path / "out" / LORA_WEIGHTS_FILE
    with safe_open(path, "pt") as file:
        weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        header = file.metadata()
    header["roae"] = header["roae"].replace('"rank": 4', '"rank": 1000000000')
    save_file(weights, path, header)
    base = fresh()
    before = snapshot(base)
    with limited(), pytest.raises(ValueError, match="rank=1000000000 is above 64, the inputs of"):
        load_adapter(base, tmp_path / "out")
    assert unchanged(base, before)


def test_a_folder_knows_its_base(tmp_path):
    model = load_base("tiny")
    inject_roae(model, RoAEConfig(rank=2))
    for format in ("rosa", "peft"):
        export_adapter(model, tmp_path / format, format)
        assert adapter_settings(tmp_path / format) == ("tiny", None, RoAEConfig(rank=2))
    for folder, reason in ((tmp_path, "neither"), (tmp_path / "gone", "there is no such folder")):
        with pytest.raises(ValueError, match=rf"holds no adapter: {reason}.*roae_config\.json"):
            adapter_settings(folder)


FORMATS = pytest.mark.parametrize("format", ["rosa", "peft"])


@FORMATS
def test_another_base_is_refused_by_what_differs(format, tmp_path):
    export_adapter(trained(), tmp_path / "out", format)
    torch.manual_seed(1)
    other = build("llama")
    before = snapshot(other)
    with pytest.raises(ValueError, match=r"the adapter was trained on base .*weight differs"):
        load_adapter(other, tmp_path / "out")
    assert unchanged(other, before)


@pytest.mark.parametrize(
    ("format", "config"),
    [("rosa", None), ("peft", None), ("peft", replace(CONFIG, rank=5, low_freq_ratio=1.0))],
)
def test_the_same_weights_under_another_rotation_are_refused(format, config, tmp_path):
    export_adapter(trained(), tmp_path / "out", format)
    stretched = fresh(rope_parameters={**LINEAR, "factor": 4.0})
    before = snapshot(stretched)
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_proj rotates other dimensions"):
        load_adapter(stretched, tmp_path / "out", config)
    assert unchanged(stretched, before)
    load_adapter(fresh(), tmp_path / "out", config)


def test_a_header_that_was_damaged_is_refused(tmp_path):
    export_adapter(trained(), tmp_path / "out", "peft")
    files = read_lora(tmp_path / "out")
    for text in ("{", "[]", '{"base": {}, "tables": [], "terms": []}'):
        header = {**files.metadata, "roae_origin": text}
        save_file(files.tensors, tmp_path / "out" / LORA_WEIGHTS_FILE, header)
        with pytest.raises(ValueError, match=r"roae_origin in the header of .* cannot be read"):
            load_adapter(fresh(), tmp_path / "out")


def test_peft_loads_a_folder_that_remembers_its_base_and_the_base_by_its_name(tmp_path, ids_BT):
    model = load_base("tiny")
    inject_roae(model, RoAEConfig(rank=2))
    for _, layer in roae_layers(model):
        nn.init.normal_(layer.roae_B, std=0.2)
    export_adapter(model, tmp_path / "out", "peft")
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(theirs(ids_BT).logits, model(ids_BT).logits, atol=1e-5, rtol=0)


def test_a_lora_from_elsewhere_warns_of_the_name_of_another_base(tmp_path):
    model = trained()
    model.config._name_or_path = "someone/llama"
    export_adapter(model, tmp_path / "out", "peft")
    files = read_lora(tmp_path / "out")
    save_file(files.tensors, tmp_path / "out" / LORA_WEIGHTS_FILE)  # as PEFT saves it
    base = fresh()
    base.config._name_or_path = "someone/llama"
    load_adapter(base, tmp_path / "out")
    base = fresh()
    base.config._name_or_path = "another/llama"
    with pytest.warns(UserWarning, match="names someone/llama .* given is another/llama") as caught:
        load_adapter(base, tmp_path / "out")
    assert len(caught) == 1
    assert "\n" not in str(caught[0].message)


def test_a_model_that_carries_roae_already_is_refused_and_keeps_it(tmp_path, ids_BT):
    model = trained()
    export_adapter(model, tmp_path / "out", "rosa")
    expected = model(ids_BT).logits
    with pytest.raises(ValueError, match="carries RoAE already"):
        load_adapter(model, tmp_path / "out")
    assert torch.equal(model(ids_BT).logits, expected)


def test_settings_that_are_given_must_agree_but_for_the_dropout(tmp_path):
    export_adapter(trained(), tmp_path / "out", "rosa")
    report = load_adapter(fresh(), tmp_path / "out", replace(CONFIG, dropout=0.1))
    assert report.config.dropout == 0.1
    with pytest.raises(ValueError, match=r"model\.roae\.rank=4, and 8 is given"):
        load_adapter(fresh(), tmp_path / "out", replace(CONFIG, rank=8))
