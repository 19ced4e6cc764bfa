from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft.tuners.tuners_utils import check_target_module_exists
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.testing import assert_close

from rosa_lightning.adapters import lora
from rosa_lightning.adapters.files import load_adapter
from rosa_lightning.adapters.lora import target_modules, write_lora
from rosa_lightning.adapters.reading import read_header
from rosa_lightning.models.loading import load_base
from rosa_lightning.roae.inject import inject_roae, is_adapter_key, roae_layers
from rosa_lightning.roae.layer import RoAEConfig
from rosa_lightning.roae.targets import select_projections
from tests.conftest import FAMILIES, build
from tests.model_zoo.small import build_small, causal_models

IDS = torch.arange(3, 12)[None]
ALL = ("q", "k", "v", "o", "gate", "up", "down")
WEIGHTS = "adapter_model.safetensors"

# Separate and fused, half-split and interleaved, partial, latent, with norms, with layers that do
# not rotate, and inside a vision-language model whose other half has a q_proj too.
MODELS = [
    *("llama", "qwen3", "gemma3", "phi3", "Glm4Config", "neox", "smollm3", "phi"),
    *("StableLmConfig", "DeepseekV3Config", "Gemma3Config"),
]


def base_of(name: str) -> nn.Module:
    """A small random model, always the same."""
    torch.manual_seed(0)
    return build(name) if name in FAMILIES else build_small(name)


def adapted(name: str, config: RoAEConfig, part: str = "") -> nn.Module:
    """The same model with RoAE that acts, or acts on the layers with this part in their name."""
    model = base_of(name)
    inject_roae(model, config)
    torch.manual_seed(1)
    for path, layer in roae_layers(model):
        if part in path:
            nn.init.normal_(layer.roae_B, std=0.1)
    return model


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {key: value for key, value in model.state_dict().items() if is_adapter_key(key)}


def in_peft(name: str, folder: Path) -> nn.Module:
    """What PEFT makes of a folder on a fresh base; its warnings are errors."""
    return peft.PeftModel.from_pretrained(base_of(name), folder).eval()


def loaded(name: str, folder: Path) -> nn.Module:
    load_adapter(model := base_of(name), folder)
    return model


def assert_there_and_back(name: str, model: nn.Module, folder: Path) -> None:
    """PEFT computes what the model does, and the weights come back bit for bit."""
    write_lora(model, folder)
    assert_close(logits(in_peft(name, folder)), logits(model), atol=1e-5, rtol=0)
    ours, theirs = weights(model), weights(loaded(name, folder))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("name", MODELS)
def test_peft_computes_what_we_do_and_weights_come_back_bit_for_bit(name, tmp_path):
    config = RoAEConfig(rank=3, alpha=5.0, low_freq_ratio=0.4, dropout=0.1)
    model = adapted(name, config)
    assert (logits(model) - logits(base_of(name))).abs().max() > 1e-4
    assert_there_and_back(name, model, tmp_path)
    assert load_adapter(base_of(name), tmp_path).config == config


@pytest.mark.parametrize("name", ["llama", "phi3", "neox"])
def test_every_target_is_exported_and_comes_back(name, tmp_path):
    targets = tuple(t for t in ALL if (name, t) != ("neox", "gate"))
    config = RoAEConfig(rank=2, alpha=4.0, targets=targets)
    assert_there_and_back(name, adapted(name, config), tmp_path)


def test_peft_saves_the_same_configuration_again(tmp_path):
    write_lora(adapted("llama", RoAEConfig(rank=4)), tmp_path)
    ours = json.loads((tmp_path / "adapter_config.json").read_text())
    in_peft("llama", tmp_path).save_pretrained(tmp_path / "theirs")
    theirs = json.loads((tmp_path / "theirs/adapter_config.json").read_text())
    assert {**theirs, "target_modules": sorted(theirs["target_modules"])} | ours == {
        **theirs,
        "target_modules": ours["target_modules"],
    }


def test_layers_that_were_never_selected_are_left_out_and_begin_anew(tmp_path):
    model = adapted("llama", RoAEConfig(rank=4, alpha=8.0), "layers.1.")
    write_lora(model, tmp_path)
    targets = [f"model.layers.1.self_attn.{t}_proj" for t in "kq"]
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == targets
    theirs = in_peft("llama", tmp_path)
    with_lora = {path for path, module in theirs.named_modules() if hasattr(module, "lora_A")}
    assert with_lora == {f"base_model.model.{path}" for path in targets}
    assert_close(logits(theirs), logits(model), atol=1e-5, rtol=0)
    assert torch.equal(logits(loaded("llama", tmp_path)), logits(model))


def test_terms_that_did_nothing_and_terms_placed_on_states_without_a_norm_go_too(tmp_path):
    assert_there_and_back("llama", adapted("llama", RoAEConfig(rank=4), "none"), tmp_path)
    # Of the terms on a fused projection, the outer one alone.
    assert_there_and_back("neox", adapted("neox", RoAEConfig(rank=4), "value"), tmp_path)
    assert_there_and_back("llama", adapted("llama", RoAEConfig(placement="state")), tmp_path)


def test_the_base_is_found_by_the_name_in_the_configuration(tmp_path):
    inject_roae(model := load_base("tiny"), RoAEConfig(rank=2))
    for _, layer in roae_layers(model):
        nn.init.normal_(layer.roae_B, std=0.2)
    write_lora(model, tmp_path)
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path)
    assert_close(logits(theirs), logits(model), atol=1e-5, rtol=0)


# LoRA from elsewhere.


def _further(tensors: dict[str, Tensor]) -> None:
    next(tensor for key, tensor in tensors.items() if "lora_B" in key)[0] = 1.0


def _more(tensors: dict[str, Tensor]) -> None:
    tensors["base_model.model.lm_head.weight"] = torch.ones(2)


def _wider(tensors: dict[str, Tensor]) -> None:
    for key, tensor in tensors.items():
        tensors[key] = torch.cat([tensor, tensor], 1)


CHANGED = {
    _further: "changes rows that RoAE leaves as they are",
    _more: "does not hold what export wrote",
    _wider: r"has shapes \(4, 128\) and \(64, 8\)",
}


def test_a_lora_that_was_changed_since_is_refused(tmp_path):
    write_lora(adapted("llama", RoAEConfig(rank=4)), tmp_path)
    path, settings = tmp_path / WEIGHTS, tmp_path / "adapter_config.json"
    header = read_header(path)
    for change, message in CHANGED.items():
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, tmp_path / "changed", header)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(lora, "WEIGHTS_FILE", "changed")
            with pytest.raises(ValueError, match=message):
                load_adapter(base_of("llama"), tmp_path)
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "lora_alpha": 3}))
    with pytest.raises(ValueError, match="does not hold what export wrote"):
        load_adapter(base_of("llama"), tmp_path)


# What PEFT would put elsewhere.


def peft_agrees(name: str, model: nn.Module, folder: Path) -> bool:
    """Whether PEFT computes what a model does whose export is refused."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lora, "check_names", lambda *_: None)
        write_lora(model, folder)
    try:
        theirs = logits(in_peft(name, folder))
    except (KeyError, RuntimeError, ValueError):
        return False
    return torch.allclose(theirs, logits(model), atol=1e-5)


# Laguna has shared experts that PEFT renames, too; the others have routed ones of the same names.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("LagunaConfig", r"PEFT takes LoRA on \w+ of Laguna"),
        ("AfmoeConfig", r"PEFT takes LoRA on \w+ of Afmoe"),
        ("DeepseekV3Config", r"PEFT takes LoRA on up_proj of Deepseek"),
    ],
)
def test_what_peft_would_take_for_other_modules_is_refused(name, message, tmp_path):
    targets = ("q", "up") if name.startswith("Deep") else ("q", "gate", "up")
    model = adapted(name, RoAEConfig(rank=2, alpha=4.0, targets=targets))
    with pytest.raises(ValueError, match=message) as caught:
        write_lora(model, tmp_path)
    assert "\n" not in str(caught.value)
    assert not peft_agrees(name, model, tmp_path)
    write_lora(adapted(name, RoAEConfig(rank=2)), tmp_path)


NAMES = st.sampled_from(["q", "k", "q_proj", "proj", "0", "1", "10", "layers", "attn"])
PATHS = st.lists(NAMES, min_size=1, max_size=4).map(".".join)


@given(st.sets(PATHS, min_size=1, max_size=12), st.data())
def test_target_modules_pick_the_adapted_modules_by_peft_s_own_rule(modules, data):
    adapted = data.draw(st.sets(st.sampled_from(sorted(modules)), min_size=1))
    config = peft.LoraConfig(target_modules=target_modules(adapted, modules))
    assert {path for path in modules if check_target_module_exists(config, path)} == adapted


def test_target_modules_are_names_where_these_suffice():
    layers = [f"layers.{i}.{name}" for i in range(12) for name in ("q", "k", "v")]
    picked = {path for path in layers if path.endswith(("q", "k"))}
    assert target_modules(picked, layers) == ["k", "q"]
    # Not even the full path tells these apart.
    assert target_modules({"a.q"}, ["a.q", "b.a.q"]) == r"a\.q"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("targets", [("q", "k"), ALL], ids=["qk", "all"])
@pytest.mark.parametrize("name", causal_models())
def test_every_model_that_is_adapted_goes_to_peft_and_back(name, targets, tmp_path):
    try:
        base = build_small(name)
        inject_roae(base_of(name), RoAEConfig(rank=2))
    except Exception as error:
        pytest.skip(str(error))
    wanted = RoAEConfig(targets=targets)
    terms, _ = select_projections(base, wanted, strict=False)
    held = tuple(target for target in targets if any(term.target == target for term in terms))
    model = adapted(name, RoAEConfig(rank=2, alpha=4.0, low_freq_ratio=0.5, targets=held))
    try:
        write_lora(model, tmp_path)
    except ValueError as error:
        if targets != ALL or not str(error).startswith("PEFT "):
            raise
        pytest.skip(str(error))
    assert_there_and_back(name, model, tmp_path)
