from __future__ import annotations

import copy
import json
import re
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import conversion_mapping

from rosa_lightning.adapters.lora import from_lora, to_lora
from rosa_lightning.adapters.peft_format import LoraFiles, read_lora
from tests.model_zoo.small import build_small, causal_models
from rosa_lightning.roae.inject import (
    check_adapter_keys,
    inject_roae,
    is_adapter_key,
    merge_roae,
    roae_layers,
)
from rosa_lightning.roae.layer import RoAEConfig
from rosa_lightning.roae.targets import select_projections
from tests.conftest import FAMILIES, build

IDS = torch.arange(3, 12)[None]
ALL = ("q", "k", "v", "o", "gate", "up", "down")

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


def adapted(name: str, config: RoAEConfig) -> nn.Module:
    """The same model with RoAE that acts."""
    model = base_of(name)
    inject_roae(model, config)
    torch.manual_seed(1)
    for _, layer in roae_layers(model):
        nn.init.normal_(layer.roae_B, std=0.1)
    return model


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {key: value for key, value in model.state_dict().items() if is_adapter_key(key)}


def write(files: LoraFiles, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(files.config))
    save_file(files.tensors, folder / "adapter_model.safetensors", files.metadata)
    return folder


def in_peft(name: str, files: LoraFiles, folder: Path) -> nn.Module:
    """What PEFT makes of the files on a fresh base; its warnings are errors."""
    return peft.PeftModel.from_pretrained(base_of(name), write(files, folder)).eval()


def loaded(name: str, config: RoAEConfig, tensors: dict[str, Tensor]) -> nn.Module:
    """A fresh base with imported RoAE."""
    model = base_of(name)
    inject_roae(model, config)
    check_adapter_keys(model, tensors)
    model.load_state_dict(tensors, strict=False)
    return model


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


# RoAE to LoRA.


@pytest.mark.parametrize("name", MODELS)
def test_peft_computes_what_we_do(name, tmp_path):
    model = adapted(name, RoAEConfig(rank=4, alpha=8.0))
    ours = logits(model)
    assert (ours - logits(base_of(name))).abs().max() > 1e-4
    files = to_lora(model)
    assert_close(logits(in_peft(name, files, tmp_path)), ours, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", MODELS)
def test_our_own_files_come_back_bit_for_bit(name, tmp_path):
    config = RoAEConfig(rank=3, alpha=5.0, low_freq_ratio=0.4, dropout=0.1)
    model = adapted(name, config)
    got, tensors = from_lora(base_of(name), read_lora(write(to_lora(model), tmp_path)))
    assert got == config
    assert same(tensors, weights(model))


@pytest.mark.parametrize("name", MODELS)
def test_our_files_without_their_header_come_back_as_the_same_function(name):
    model = adapted(name, RoAEConfig(rank=4, alpha=8.0, low_freq_ratio=0.5))
    files = replace(to_lora(model), metadata={})
    config, tensors = from_lora(base_of(name), files)
    assert (config.rank, config.scale, config.targets) == (4, 2.0, ("q", "k"))
    assert config.low_freq_ratio == 0.5
    assert torch.equal(logits(loaded(name, config, tensors)), logits(model))


@pytest.mark.parametrize("name", ["llama", "phi3", "neox", "DeepseekV3Config"])
def test_rows_of_b_are_zero_off_the_low_frequencies(name):
    model = base_of(name)
    report = inject_roae(model, RoAEConfig(rank=2))
    for _, layer in roae_layers(model):
        nn.init.ones_(layer.roae_B)
    for key, tensor in to_lora(model).tensors.items():
        path = key.removeprefix("base_model.model.").partition(".lora_")[0]
        rows = {row for p in report.projections if p.projection == path for row in p.rows}
        assert rows
        if key.endswith("lora_B.weight"):
            assert set(tensor.any(1).nonzero().flatten().tolist()) == rows


@pytest.mark.parametrize("name", ["llama", "phi3", "neox"])
def test_every_target_is_exported_and_comes_back(name, tmp_path):
    targets = tuple(t for t in ALL if (name, t) != ("neox", "gate"))
    config = RoAEConfig(rank=2, alpha=4.0, targets=targets)
    model = adapted(name, config)
    files = to_lora(model)
    assert_close(logits(in_peft(name, files, tmp_path)), logits(model), atol=1e-5, rtol=0)
    got, tensors = from_lora(base_of(name), read_lora(tmp_path))
    assert got == config
    assert same(tensors, weights(model))
    config, tensors = from_lora(base_of(name), replace(files, metadata={}))
    assert (config.rank, config.targets) == (2, targets)
    assert torch.equal(logits(loaded(name, config, tensors)), logits(model))


@pytest.mark.parametrize(("name", "terms"), [("llama", 1), ("phi3", 3), ("neox", 3)])
def test_vllm_and_llama_cpp_scale_every_module_as_we_do(name, terms):
    """The one divides by the configuration's rank, the other by each module's own."""
    model = adapted(name, RoAEConfig(rank=2, alpha=3.0, targets=("q", "k", "v", "o")))
    files = to_lora(model)
    assert files.config["r"] == 2 * terms
    assert files.config["lora_alpha"] == 3 * terms
    before = base_of(name).state_dict()
    after = merge_roae(model).state_dict()
    A = [key for key in files.tensors if ".lora_A." in key]
    assert 2 * len(A) == len(files.tensors)
    for key in A:
        B = files.tensors[key.replace("lora_A", "lora_B")].double()
        delta = B @ files.tensors[key].double() * files.config["lora_alpha"] / B.shape[1]
        assert B.shape[1] == files.config["r"]
        path = key.removeprefix("base_model.model.").replace("lora_A.", "")
        assert_close(before[path] + delta.float(), after[path], atol=1e-6, rtol=0)


def test_the_files_are_what_servers_take():
    files = to_lora(adapted("phi3", RoAEConfig(rank=4)))
    # vLLM: its PEFTHelper needs these three and refuses the rest.
    assert files.config["r"] == 8
    assert files.config["lora_alpha"] == 64
    assert files.config["target_modules"] == ["qkv_proj"]
    assert files.config["modules_to_save"] is None
    assert not files.config["use_dora"]
    assert not files.config["use_rslora"]
    assert files.config["bias"] == "none"
    # llama.cpp asks for this key, and vLLM reads names like this one.
    assert "base_model_name_or_path" in files.config
    name = re.compile(
        r"base_model\.model\.model\.layers\.\d\.self_attn\.qkv_proj\.lora_[AB]\.weight"
    )
    assert all(name.fullmatch(key) for key in files.tensors)
    assert files.metadata["format"] == "pt"
    assert all(isinstance(value, str) for value in files.metadata.values())


def test_the_configuration_is_the_one_peft_writes(tmp_path):
    model = adapted("llama", RoAEConfig(rank=4, alpha=8.0, dropout=0.1))
    model.config._name_or_path = "someone/llama"
    files = to_lora(model)
    theirs = peft.LoraConfig(
        r=4,
        lora_alpha=8,
        lora_dropout=0.1,
        target_modules=["k_proj", "q_proj"],
        task_type="CAUSAL_LM",
        base_model_name_or_path="someone/llama",
        inference_mode=True,
    )
    theirs.save_pretrained(tmp_path / "theirs")
    ours = peft.LoraConfig.from_pretrained(write(files, tmp_path / "ours"))
    assert ours.to_dict() == peft.LoraConfig.from_pretrained(tmp_path / "theirs").to_dict()
    saved = json.loads((tmp_path / "theirs/adapter_config.json").read_text())
    for key, value in files.config.items():
        assert saved[key] == value if key != "target_modules" else sorted(saved[key]) == value


def test_tensors_are_float32_copies_on_the_cpu():
    model = build("neox", torch.bfloat16)
    inject_roae(model, RoAEConfig(rank=4))
    files = to_lora(model)
    before = {key: tensor.clone() for key, tensor in files.tensors.items()}
    for _, layer in roae_layers(model):
        nn.init.normal_(layer.roae_A)
    for key, tensor in files.tensors.items():
        assert tensor.dtype == torch.float32
        assert tensor.device.type == "cpu"
        assert tensor.is_contiguous()
        assert not tensor.requires_grad
        assert torch.equal(tensor, before[key])


def test_layers_that_were_never_selected_are_left_out(tmp_path):
    model = base_of("llama")
    config = RoAEConfig(rank=4, alpha=8.0)
    inject_roae(model, config)
    for path, layer in roae_layers(model):
        if "layers.1." in path:
            nn.init.normal_(layer.roae_B)
    files = to_lora(model)
    targets = [f"model.layers.1.self_attn.{t}_proj" for t in "kq"]
    assert files.config["target_modules"] == targets
    theirs = in_peft("llama", files, tmp_path)
    lora = {path for path, module in theirs.named_modules() if hasattr(module, "lora_A")}
    assert lora == {f"base_model.model.{path}" for path in targets}
    assert_close(logits(theirs), logits(model), atol=1e-5, rtol=0)
    got, tensors = from_lora(base_of("llama"), files)
    assert got == config
    assert torch.equal(logits(loaded("llama", got, tensors)), logits(model))
    for key, value in weights(model).items():
        # The others begin anew, their A being of no effect.
        assert torch.equal(tensors[key], value) == (".1." in key or key.endswith("roae_B"))


def test_an_untrained_adapter_is_exported_whole():
    model = base_of("llama")
    inject_roae(model, RoAEConfig(rank=4))
    files = to_lora(model)
    assert len(files.tensors) == 8
    _, tensors = from_lora(base_of("llama"), files)
    assert same(tensors, weights(model))


def test_a_fused_projection_keeps_a_term_beside_one_that_did_nothing(tmp_path):
    model = base_of("neox")
    report = inject_roae(model, RoAEConfig(rank=4))
    for projection in report.projections:
        if projection.target == "k":
            nn.init.normal_(model.get_submodule(projection.name).roae_B)
    files = to_lora(model)
    _, tensors = from_lora(base_of("neox"), files)
    assert same(tensors, weights(model))
    assert_close(logits(in_peft("neox", files, tmp_path)), logits(model), atol=1e-5, rtol=0)


def test_terms_after_a_norm_are_refused_and_those_without_a_norm_are_not(tmp_path):
    model = adapted("qwen3", RoAEConfig(rank=4, placement="state"))
    with pytest.raises(ValueError, match=r"placement=state adds the term after .*q_norm") as error:
        to_lora(model)
    assert "\n" not in str(error.value)
    model = adapted("llama", RoAEConfig(rank=4, placement="state"))
    files = to_lora(model)
    assert_close(logits(in_peft("llama", files, tmp_path)), logits(model), atol=1e-5, rtol=0)
    assert from_lora(base_of("llama"), files)[0].placement == "state"


def test_a_model_without_roae_has_nothing_to_export():
    with pytest.raises(ValueError, match="carries no RoAE"):
        to_lora(base_of("llama"))


def test_what_peft_would_put_on_routed_experts_is_refused():
    model = adapted("DeepseekV3Config", RoAEConfig(rank=2, targets=("q", "up")))
    with pytest.raises(ValueError, match="PEFT takes LoRA on up_proj of Deepseek") as error:
        to_lora(model)
    assert "\n" not in str(error.value)


# LoRA to RoAE.


def trained(name: str, held: RoAEConfig | None, **options: Any) -> tuple[nn.Module, LoraFiles]:
    """A LoRA that PEFT has made, B random on all rows or on those that RoAE settings hold."""
    if held is not None:
        probe = base_of(name)
        report = inject_roae(probe, held)
        options.setdefault("target_modules", sorted({p.projection for p in report.projections}))
    base = base_of(name)
    torch.manual_seed(2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(base, peft.LoraConfig(**{"r": 4, "lora_alpha": 8, **options}))
    for path, module in model.named_modules():
        if not hasattr(module, "lora_B") or "default" not in module.lora_B:
            continue
        B = module.lora_B["default"].weight.data
        nn.init.normal_(B, std=0.1)
        if held is not None:
            place = path.removeprefix("base_model.model.")
            rows = [r for p in report.projections if p.projection == place for r in p.rows]
            B[[row for row in range(len(B)) if row not in rows]] = 0
    return model.eval(), saved(model)


def saved(model: nn.Module) -> LoraFiles:
    """What PEFT writes, read by us."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return read_lora(folder)


@pytest.mark.parametrize("ratio", [0.25, 0.5, 1.0])
@pytest.mark.parametrize("name", MODELS)
def test_a_lora_on_low_frequencies_is_found_to_be_one(name, ratio):
    held = RoAEConfig(low_freq_ratio=ratio)
    theirs, files = trained(name, held, lora_dropout=0.05)
    config, tensors = from_lora(base_of(name), files)
    wanted = RoAEConfig(
        rank=4, alpha=8.0, dropout=0.05, low_freq_ratio=config.low_freq_ratio, targets=("q", "k")
    )
    assert config == wanted
    ours = loaded(name, config, tensors)
    assert_close(logits(ours), logits(theirs), atol=1e-5, rtol=0)
    # No pair more than the LoRA holds.
    rows = [p.rows for p in inject_roae(base_of(name), config).projections]
    assert rows == [p.rows for p in inject_roae(base_of(name), held).projections]


def test_any_lora_on_q_and_k_is_roae_at_ratio_one():
    theirs, files = trained("llama", None, target_modules=["q_proj", "k_proj"])
    config, tensors = from_lora(base_of("llama"), files)
    assert config == RoAEConfig(rank=4, alpha=8.0, low_freq_ratio=1.0)
    assert torch.equal(logits(loaded("llama", config, tensors)), logits(theirs))


@pytest.mark.parametrize("name", ["llama", "phi3"])
def test_any_lora_on_all_projections_is_roae_on_all_targets(name):
    theirs, files = trained(name, None, target_modules="all-linear")
    config, tensors = from_lora(base_of(name), files)
    assert config == RoAEConfig(rank=4, alpha=8.0, low_freq_ratio=1.0, targets=ALL)
    assert_close(logits(loaded(name, config, tensors)), logits(theirs), atol=1e-5, rtol=0)


def test_terms_on_a_fused_projection_share_the_rows_of_a():
    _, files = trained("phi3", RoAEConfig())
    _, tensors = from_lora(base_of("phi3"), files)
    path = "model.layers.0.self_attn.qkv_proj"
    A = files.tensors[f"base_model.model.{path}.lora_A.weight"]
    assert torch.equal(tensors[f"{path}.roae_A"], A)
    assert torch.equal(tensors[f"{path}.base.roae_A"], A)


SCALED = {
    "ranks": {"r": 8, "rank_pattern": {"k_proj": 2, "layers.1.self_attn.q_proj": 3}},
    "alphas": {"alpha_pattern": {r".*\.0\.self_attn.*": 3}},
    "both": {"rank_pattern": {"q_proj": 6}, "alpha_pattern": {"k_proj": 5}},
    "stabilised": {"use_rslora": True, "rank_pattern": {"q_proj": 6}},
}


@pytest.mark.parametrize("name", SCALED)
def test_ranks_and_scales_of_single_modules_are_folded(name):
    targets = ["q_proj", "k_proj"]
    theirs, files = trained("llama", None, target_modules=targets, **SCALED[name])
    config, tensors = from_lora(base_of("llama"), files)
    ours = loaded("llama", config, tensors)
    assert_close(logits(ours), logits(theirs), atol=1e-5, rtol=0)
    wider = replace(config, rank=16, alpha=7.0, low_freq_ratio=1.0, targets=("k", "v", "q"))
    got, tensors = from_lora(base_of("llama"), files, wider)
    assert got == wider
    assert_close(logits(loaded("llama", got, tensors)), logits(theirs), atol=1e-5, rtol=0)


def test_training_goes_on_in_every_part_of_an_imported_adapter():
    theirs, files = trained("llama", RoAEConfig())
    wider = RoAEConfig(rank=6, alpha=12.0, low_freq_ratio=0.5)
    ours = loaded("llama", *from_lora(base_of("llama"), files, wider))
    assert_close(logits(ours), logits(theirs), atol=1e-5, rtol=0)
    for _ in range(2):
        ours.zero_grad()
        ours(input_ids=IDS).logits.square().mean().backward()
        with torch.no_grad():
            for _, layer in roae_layers(ours):
                # New columns of B move first, and then the new rows of A.
                layer.roae_B -= layer.roae_B.grad
    for _, layer in roae_layers(ours):
        assert (layer.roae_A.grad.abs().sum(1) > 0).all()
        assert (layer.roae_B.grad.abs().sum(0) > 0).all()
        assert (layer.roae_B.grad.abs().sum(1) > 0).all()


def test_the_same_files_give_the_same_weights_and_no_random_number_is_used_up():
    _, files = trained("llama", RoAEConfig())
    wider = RoAEConfig(rank=6)
    base = base_of("llama")
    _, first = from_lora(base, files, wider)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    _, second = from_lora(base, files, wider)
    assert torch.equal(torch.get_rng_state(), state)
    assert same(first, second)
    A = [tensor[4:] for key, tensor in first.items() if key.endswith("roae_A")]
    assert all(not torch.equal(A[0], other) for other in A[1:])


def test_half_precision_becomes_float32():
    _, files = trained("llama", RoAEConfig())
    half = {key: tensor.bfloat16() for key, tensor in files.tensors.items()}
    _, tensors = from_lora(base_of("llama"), replace(files, tensors=half))
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    path = "model.layers.0.self_attn.q_proj"
    exact = half[f"base_model.model.{path}.lora_A.weight"].float()
    assert torch.equal(tensors[f"{path}.roae_A"], exact)


def test_the_base_is_left_as_it_was():
    _, files = trained("llama", RoAEConfig())
    base = base_of("llama").train()
    before = copy.deepcopy(base.state_dict())
    from_lora(base, files)
    assert same(before, base.state_dict())
    assert base.training
    assert not any(True for _ in roae_layers(base))
    assert all(parameter.requires_grad for parameter in base.parameters())


def test_our_own_files_keep_their_weights_under_another_dropout_only():
    config = RoAEConfig(rank=4, alpha=8.0)
    model = base_of("neox")
    inject_roae(model, config)
    files = to_lora(model)
    given = replace(config, dropout=0.5)
    got, tensors = from_lora(base_of("neox"), files, given)
    assert got == given
    assert same(tensors, weights(model))
    # As for any LoRA, what does nothing begins anew.
    _, tensors = from_lora(base_of("neox"), files, replace(config, alpha=4.0))
    assert not same(tensors, weights(model))


@pytest.mark.parametrize("name", ["llama", "phi3"])
def test_our_own_files_fit_wider_settings(name):
    model = adapted(name, RoAEConfig(rank=4, alpha=8.0))
    wider = RoAEConfig(rank=5, alpha=7.0, low_freq_ratio=0.5, targets=("v", "q", "k"))
    config, tensors = from_lora(base_of(name), to_lora(model), wider)
    assert config == wider
    assert_close(logits(loaded(name, config, tensors)), logits(model), atol=1e-5, rtol=0)


def test_a_changed_alpha_in_the_configuration_counts():
    model = adapted("llama", RoAEConfig(rank=4, alpha=8.0))
    files = to_lora(model)
    halved = replace(files, config={**files.config, "lora_alpha": 4})
    config, tensors = from_lora(base_of("llama"), halved)
    assert config.alpha == 8.0
    for key, value in weights(model).items():
        factor = 0.5 if key.endswith("roae_B") else 1.0
        assert torch.equal(tensors[key], factor * value)


def test_a_damaged_header_is_refused():
    files = to_lora(adapted("llama", RoAEConfig()))
    for text in ("{", "[1]", '{"rank": 0}', '{"width": 3}'):
        with pytest.raises(ValueError, match="RoAE settings in the header"):
            from_lora(base_of("llama"), replace(files, metadata={"roae": text}))


def test_roae_is_not_imported_twice():
    model = adapted("llama", RoAEConfig())
    with pytest.raises(ValueError, match="carries RoAE already"):
        from_lora(model, to_lora(model))


def peft_agrees(name: str, model: nn.Module, folder: Path) -> bool:
    """Whether PEFT computes what a model does whose export is refused."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rosa_lightning.adapters.lora._check_names", lambda *_: None)
        files = to_lora(model)
    try:
        theirs = logits(in_peft(name, files, folder))
    except (KeyError, RuntimeError, ValueError):
        return False
    return torch.allclose(theirs, logits(model), atol=1e-5)


# Laguna has shared experts that PEFT renames, the other routed ones of the same names.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("LagunaConfig", r"PEFT renames model\.layers\.1\.mlp\.shared_experts\.\w+ of Laguna"),
        ("AfmoeConfig", r"PEFT takes LoRA on \w+ of Afmoe"),
    ],
)
def test_what_peft_would_take_for_other_modules_is_refused(name, message, tmp_path, monkeypatch):
    model = adapted(name, RoAEConfig(rank=2, alpha=4.0, targets=("q", "gate", "up")))
    with pytest.raises(ValueError, match=message) as caught:
        to_lora(model)
    assert "\n" not in str(caught.value)
    assert not peft_agrees(name, model, tmp_path)
    # Where transformers no longer has the table that only PEFT reads, still none goes out wrong.
    monkeypatch.delattr(conversion_mapping, "_MODEL_TO_CONVERSION_PATTERN")
    with pytest.raises(ValueError, match=r"^PEFT "):
        to_lora(model)
    to_lora(adapted(name, RoAEConfig(rank=2)))


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
    terms, _ = select_projections(base, RoAEConfig(targets=targets), strict=False)
    held = tuple(target for target in targets if any(term.target == target for term in terms))
    model = adapted(name, RoAEConfig(rank=2, alpha=4.0, low_freq_ratio=0.5, targets=held))
    try:
        files = to_lora(model)
    except ValueError as error:
        if targets != ALL or not str(error).startswith("PEFT "):
            raise
        assert not peft_agrees(name, model, tmp_path)
        return
    assert_close(logits(in_peft(name, files, tmp_path)), logits(model), atol=1e-5, rtol=0)
    _, tensors = from_lora(base, read_lora(tmp_path))
    assert same(tensors, weights(model))
    config, tensors = from_lora(base, replace(files, metadata={}))
    assert (config.rank, config.targets) == (2, held)
    assert torch.equal(logits(loaded(name, config, tensors)), logits(model))
