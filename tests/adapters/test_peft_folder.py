"""Adapters that PEFT has saved: loaded as PEFT loads them, refused where they do not fit."""

import copy
import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from rosa_lightning.adapters.export import export_adapter
from rosa_lightning.adapters.files import load_adapter, read_metadata
from rosa_lightning.adapters.metadata import Conditions
from rosa_lightning.adapters.methods import FullFinetuning, apply_method
from rosa_lightning.adapters.peft_method import PeftMethod
from rosa_lightning.models.loading import load_base
from rosa_lightning.roae.inject import is_adapter_key
from rosa_lightning.roae.layer import RoAEConfig
from tests.adapters.test_methods import LINEAR, METHODS, batch

pytestmark = pytest.mark.filterwarnings(
    "ignore:Sparse invariant checks",  # of SHiRA
    "ignore:Model has `tie_word_embeddings=True`",
    "ignore:PEFT did not find any targets",
    "ignore:Setting `save_embedding_layers`",
    "ignore:Unsupported layer type",
    "ignore:Note that `r` is not used in AdaLora",
    "ignore:`is_gradient_checkpointing` is deprecated",
)
LORA = {"r": 4, "target_modules": LINEAR}
MORE = {
    "LoRA on the embedding": ("LoraConfig", {"r": 4, "target_modules": ["embed_tokens", "q_proj"]}),
    "LoRA with a norm": ("LoraConfig", {**LORA, "modules_to_save": ["input_layernorm"]}),
    "LoRA with tokens": ("LoraConfig", {**LORA, "trainable_token_indices": [5, 9]}),
    "LoRA, scale not whole": ("LoraConfig", {**LORA, "lora_alpha": 2.5}),
    "LoRA by a pattern": ("LoraConfig", {"r": 4, "target_modules": r".*\.[qk]_proj"}),
    "gaussian": ("LoraConfig", {**LORA, "init_lora_weights": "gaussian"}),
    "OLoRA": ("LoraConfig", {**LORA, "init_lora_weights": "olora"}),
    "LoKr": ("LoKrConfig", {"r": 4, "target_modules": LINEAR}),
    "HRA": ("HRAConfig", {"r": 4, "target_modules": LINEAR}),
    "FourierFT": ("FourierFTConfig", {"n_frequency": 50, "target_modules": ["q_proj"]}),
    "LN tuning": ("LNTuningConfig", {"target_modules": ["input_layernorm"]}),
}


@pytest.fixture(scope="module")
def base():
    return load_base("tiny")


def saved_by_peft(base, folder, name):
    """An adapter as PEFT trains and saves it, without a word of this package."""
    class_name, init_args = {**METHODS, **MORE}[name]
    config = getattr(peft, class_name)(task_type="CAUSAL_LM", **init_args)
    torch.manual_seed(3)
    model = peft.get_peft_model(copy.deepcopy(base), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape) * 0.02)
    model.save_pretrained(folder)


@pytest.mark.parametrize("name", [*METHODS, *MORE])
def test_a_folder_of_peft_loads_as_peft_loads_it(base, name, tmp_path):
    saved_by_peft(base, tmp_path, name)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, is_trainable=True)
    ours = copy.deepcopy(base)
    report = load_adapter(ours, tmp_path)
    ids = batch()["input_ids"]
    with torch.no_grad():
        wanted, found = theirs.eval()(ids).logits, ours.eval()(ids).logits
        before = copy.deepcopy(base).eval()(ids).logits
    assert torch.equal(found, wanted)
    assert not torch.allclose(found, before, atol=1e-3)
    assert report.num_trainable == theirs.get_nb_trainable_parameters()[0]
    for key, parameter in ours.named_parameters():
        assert parameter.requires_grad == is_adapter_key(key)
        assert not parameter.is_meta


def test_its_own_settings_are_those_of_the_folder(base, tmp_path):
    saved_by_peft(base, tmp_path, "DoRA")
    known = read_metadata(tmp_path)
    settings = {"r": 4, "use_dora": True, "target_modules": sorted(LINEAR)}
    assert known.method == PeftMethod("peft.LoraConfig", settings)
    assert known.base.base == base.config.name_or_path
    assert load_adapter(copy.deepcopy(base), tmp_path).config == known.method


def test_what_export_writes_remembers_its_base_and_conditions(base, tmp_path):
    model = copy.deepcopy(base)
    apply_method(model, PeftMethod("peft.LoraConfig", LORA))
    conditions = Conditions(prompt_style="alpaca", max_length=99)
    export_adapter(model, tmp_path / "out", "peft", trained=conditions)
    known = read_metadata(tmp_path / "out")
    assert (known.base.base, known.conditions) == ("tiny", conditions)
    other = copy.deepcopy(base)
    with torch.no_grad():
        other.model.layers[0].self_attn.q_proj.weight.add_(1)
    assert_refused(other, tmp_path / "out", r"trained on base 'tiny', and .*q_proj.weight differs")


def assert_refused(model, folder, message, config=None):
    """In one line, and the model is as it was."""
    state = {key: value.clone() for key, value in model.state_dict().items()}
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match=message) as caught:
        load_adapter(model, folder, config)
    assert "\n" not in str(caught.value)
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == flags
    assert not hasattr(model, "peft_config")


def test_settings_that_are_given_must_agree_but_for_dropout_and_chosen_modules(base, tmp_path):
    saved_by_peft(base, tmp_path, "LoRA")
    given = peft.LoraConfig(r=4, lora_dropout=0.5)  # PEFT chose, or would choose, the modules
    report = load_adapter(copy.deepcopy(base), tmp_path, given)
    assert report.config.init_args["lora_dropout"] == 0.5
    assert report.config.init_args["target_modules"] == sorted(LINEAR)
    refused = {
        r"trained with model\.peft\.init_args\.r=4, and its default is given": peft.LoraConfig(
            r=8, **TARGETS
        ),
        r"target_modules=\['down_proj'.* and \['q_proj'\]": peft.LoraConfig(
            r=4, target_modules=["q_proj"]
        ),
        r"class_path=peft\.LoraConfig, and peft\.OFTConfig is given": peft.OFTConfig(**TARGETS),
        r"class_path=peft\.LoraConfig, and model\.roae is given": RoAEConfig(),
        r"class_path=peft\.LoraConfig, and model\.finetune=full is given": FullFinetuning(),
    }
    for message, config in refused.items():
        assert_refused(copy.deepcopy(base), tmp_path, message, config)


TARGETS = {"target_modules": LINEAR}


def _settings(**changes):
    def damage(folder):
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return damage


def _weights(change):
    def damage(folder):
        path = folder / "adapter_model.safetensors"
        save_file(change(load_file(path)), path, {"format": "pt"})

    return damage


DAMAGES = {
    # Weights that would take terabytes.
    r"can't allocate memory|size mismatch": _settings(r=10**9),
    r"r='eight' does not fit": _settings(r="eight"),
    r"no method of the PEFT that is installed": _settings(peft_type="NEW"),
    r"rotations.*Upgrade PEFT|Unexpected keyword arguments \['rotations'\]": _settings(rotations=2),
    r"training loop must call it": _settings(peft_type="ADALORA", total_step=9),
    r"did not save what pissa_niter": _settings(init_lora_weights="pissa_niter_4"),
    r"lora_A.* is missing": _weights(lambda w: {k: v for k, v in w.items() if "layers.0" not in k}),
    r"other.* is unknown": _weights(lambda w: {**w, "other": torch.ones(1)}),
    r"size mismatch for .*layers\.0": _weights(lambda w: {k: v[:1] for k, v in w.items()}),
    r"not finite": _weights(lambda w: {k: v / 0 for k, v in w.items()}),
    r"pickled weights \(\.bin\), which are not read": lambda f: (
        f / "adapter_model.safetensors"
    ).rename(f / "adapter_model.bin"),
    r"adapter_model\.safetensors cannot be read": lambda f: (
        f / "adapter_model.safetensors"
    ).unlink(),
}


@pytest.mark.parametrize("message", DAMAGES)
def test_a_damaged_folder_is_refused_and_the_model_left_as_it_was(base, message, tmp_path):
    saved_by_peft(base, tmp_path, "LoRA")
    DAMAGES[message](tmp_path)
    assert_refused(copy.deepcopy(base), tmp_path, message)


def test_a_start_that_changes_the_base_is_undone_too(base, tmp_path):
    saved_by_peft(base, tmp_path, "PiSSA")
    _weights(lambda w: {k: v[:1] for k, v in w.items()})(tmp_path)
    assert_refused(copy.deepcopy(base), tmp_path, "size mismatch")
