from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from rosa_lightning.adapters.export import export_adapter
from rosa_lightning.adapters.files import CONFIG_FILE, WEIGHTS_FILE, load_adapter, read_metadata
from rosa_lightning.adapters.lora import WEIGHTS_FILE as LORA_WEIGHTS_FILE
from rosa_lightning.adapters.reading import read_header
from rosa_lightning.models.loading import load_base
from rosa_lightning.module import RoSAModule
from rosa_lightning.roae.inject import inject_roae, roae_layers
from rosa_lightning.roae.layer import RoAEConfig
from tests.conftest import FAMILIES, build

CONFIG = RoAEConfig(rank=4, alpha=6.0, low_freq_ratio=0.5, targets=("q", "k", "v"))
FORMATS = pytest.mark.parametrize("format", ["rosa", "peft"])


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


def assert_refused(model, folder, message, config=None):
    """In one line, and the model is as it was: modules, weights, and what requires a gradient."""
    state = {key: value.clone() for key, value in model.state_dict().items()}
    modules = [(name, module.training) for name, module in model.named_modules()]
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match=message) as caught:
        load_adapter(model, folder, config)
    assert "\n" not in str(caught.value)
    assert [(name, module.training) for name, module in model.named_modules()] == modules
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == flags


@FORMATS
@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_loads_on_a_fresh_base_bit_for_bit(family, format, tmp_path, ids_BT):
    model = trained(family, replace(CONFIG, targets=("q", "k")))
    expected = model(ids_BT).logits
    export_adapter(model, tmp_path / "out", format)
    base = fresh(family)
    report = load_adapter(base, tmp_path / "out")
    assert torch.equal(base(ids_BT).logits, expected)
    assert report.config == replace(CONFIG, targets=("q", "k"))
    assert all(p.requires_grad == ("roae_" in name) for name, p in base.named_parameters())


def test_a_term_after_a_norm_and_another_dtype_of_the_base_load_too(tmp_path, ids_BT):
    config = replace(CONFIG, placement="state", targets=("q", "k"))
    model = trained("qwen3", config)
    export_adapter(model, tmp_path / "out", "rosa")
    base = fresh("qwen3")
    assert load_adapter(base, tmp_path / "out").config.placement == "state"
    assert torch.equal(base(ids_BT).logits, model(ids_BT).logits)
    load_adapter(other := fresh("qwen3", dtype=torch.bfloat16), tmp_path / "out")
    for (_, one), (_, same) in zip(roae_layers(other), roae_layers(model), strict=True):
        assert torch.equal(one.roae_A, same.roae_A)
        assert torch.equal(one.roae_B, same.roae_B)


@FORMATS
def test_settings_that_are_given_must_agree_but_for_the_dropout(format, tmp_path):
    export_adapter(trained(), tmp_path / "out", format)
    report = load_adapter(fresh(), tmp_path / "out", replace(CONFIG, dropout=0.5))
    assert report.config.dropout == 0.5
    message = r"trained with model\.roae\.alpha=6\.0, and 7\.0 is given"
    assert_refused(fresh(), tmp_path / "out", message, replace(CONFIG, alpha=7.0))


def _config(before, after):
    def damage(folder):
        path = folder / CONFIG_FILE
        path.write_text(path.read_text().replace(before, after))

    return damage


def _other_names(folder):
    weights = load_file(folder / WEIGHTS_FILE)
    save_file({f"base_model.{key}": value for key, value in weights.items()}, folder / WEIGHTS_FILE)


DAMAGES = {
    r"roae_config\.json cannot be read: is not JSON": _config("}", ""),
    r"is of format 3 \(written by rosa-lightning .*Install": _config('"format": 2', '"format": 3'),
    r"roae_adapter\.safetensors cannot be read": lambda f: (f / WEIGHTS_FILE).unlink(),
    # Weights that would take 640 GB.
    r"rank=1000000000 is above 64": _config('"rank": 4', '"rank": 1000000000'),
    r"has shape \(4, 64\), not \(8, 64\)": _config('"rank": 4', '"rank": 8'),
    r"holds no adapter: neither .* is there": lambda f: (f / CONFIG_FILE).unlink(),
    r"the adapter does not fit the model: model\.layers\.0.* is missing": _other_names,
}


@pytest.mark.parametrize("message", DAMAGES)
def test_a_damaged_folder_is_refused_and_the_model_left_as_it_was(message, tmp_path):
    export_adapter(trained(), tmp_path / "out", "rosa")
    DAMAGES[message](tmp_path / "out")
    base = fresh()
    base.lm_head.requires_grad_(False)
    base.train().model.layers[0].eval()
    assert_refused(base, tmp_path / "out", message)


SHAPES = {
    "base": [{}, "llama"],
    "base/samples": [[0.5], {"lm_head.weight": ["a", "b"]}],
    "rotation": [[1.0], {"a": [10**400]}],
    "roae": [None],
    "roae/width": [3],
    "roae/alpha": [None],
    "roae_conditions": [[1], {"max_length": "long"}],
}


@pytest.mark.parametrize("path", SHAPES)
def test_a_configuration_of_another_shape_is_refused(path, tmp_path):
    export_adapter(trained(), tmp_path / "out", "rosa")
    file = tmp_path / "out" / CONFIG_FILE
    *holders, last = path.split("/")
    for value in SHAPES[path]:
        config = json.loads(file.read_text())
        (config[holders[0]] if holders else config)[last] = value
        file.write_text(json.dumps(config))
        assert_refused(fresh(), tmp_path / "out", "cannot be read.*or export it again")


def test_a_lightning_module_is_told_to_pass_its_model(tmp_path):
    module = RoSAModule("tiny").eval()
    for function, arguments in ((load_adapter, ()), (export_adapter, ("rosa",))):
        with pytest.raises(ValueError, match=r"not the RoSAModule itself\. Pass module\.model"):
            function(module, tmp_path / "out", *arguments)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_knows_its_base(tmp_path):
    model = load_base("tiny")
    inject_roae(model, RoAEConfig(rank=2))
    for format in ("rosa", "peft"):
        export_adapter(model, tmp_path / format, format)
        known = read_metadata(tmp_path / format)
        assert (known.base.base, known.base.revision) == ("tiny", None)
        assert known.roae == RoAEConfig(rank=2)
    with pytest.raises(ValueError, match=r"holds no adapter: there is no such folder"):
        read_metadata(tmp_path / "gone")


@FORMATS
def test_another_base_or_another_rotation_of_the_same_weights_is_refused(format, tmp_path):
    export_adapter(trained(), tmp_path / "out", format)
    torch.manual_seed(1)
    message = r"the adapter was trained on base .*weight differs"
    assert_refused(build("llama"), tmp_path / "out", message)
    longer = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
    for other in (longer, {"rope_type": "default", "rope_theta": 1e6}):
        message = r"layers\.0\.self_attn\.q_proj rotates other dimensions"
        assert_refused(fresh(rope_parameters=other), tmp_path / "out", message)


@pytest.mark.parametrize("entry", ["roae", "roae_origin"])
def test_a_header_that_was_damaged_is_refused(entry, tmp_path):
    export_adapter(trained(), tmp_path / "out", "peft")
    path = tmp_path / "out" / LORA_WEIGHTS_FILE
    tensors, header = load_file(path), read_header(path)
    for text in ("{", "[]", '{"base": {}, "tables": [], "terms": []}'):
        save_file(tensors, path, {**header, entry: text})
        assert_refused(fresh(), tmp_path / "out", "adapter_model.safetensors cannot be read")
