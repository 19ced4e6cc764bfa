from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from conftest import FAMILIES, build
from torch import nn

from rosa_lightning.adapter import CONFIG_FILE, WEIGHTS_FILE, load_adapter
from rosa_lightning.export import export_adapter
from rosa_lightning.roae import RoAEConfig
from rosa_lightning.surgery import inject_roae, roae_layers

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
    export_adapter(trained(), tmp_path / "out", "rosa")
    load_adapter(fresh(dtype=torch.bfloat16), tmp_path / "out")


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


def _no_adapter(folder):
    (folder / CONFIG_FILE).unlink()


def _another_name(folder):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / WEIGHTS_FILE)
    save_file({f"base_model.{key}": value for key, value in weights.items()}, folder / WEIGHTS_FILE)


DAMAGES = {
    _damage_json: r"roae_config\.json cannot be read \(JSONDecodeError",
    _later_release: r"is of format 2 \(written by rosa-lightning .*Install the release",
    _cut_weights: r"roae_adapter\.safetensors cannot be read",
    _no_weights: r"roae_adapter\.safetensors cannot be read",
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
    with pytest.raises(ValueError, match=DAMAGES[damage]) as caught:
        load_adapter(base, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert unchanged(base, before)


def test_another_base_is_refused_by_what_differs(tmp_path):
    export_adapter(trained(), tmp_path / "out", "rosa")
    torch.manual_seed(1)
    other = build("llama")
    before = snapshot(other)
    with pytest.raises(ValueError, match=r"the adapter was trained on base .*weight differs"):
        load_adapter(other, tmp_path / "out")
    assert unchanged(other, before)


def test_the_same_weights_under_another_rotation_are_refused(tmp_path):
    export_adapter(trained(), tmp_path / "out", "rosa")
    stretched = fresh(rope_parameters={**LINEAR, "factor": 4.0})
    before = snapshot(stretched)
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_proj rotates other dimensions"):
        load_adapter(stretched, tmp_path / "out")
    assert unchanged(stretched, before)


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
