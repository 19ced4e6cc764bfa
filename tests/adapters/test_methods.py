"""Methods of PEFT in place: against PEFT's own models, with every speed lever on and off."""

import copy

import peft
import pytest
import torch
import transformers

from rosa_lightning.adapters.export import export_adapter
from rosa_lightning.adapters.methods import (
    FullFinetuning,
    apply_method,
    check_same_method,
    method_from_dict,
    method_to_dict,
)
from rosa_lightning.adapters.peft_folder import write_peft
from rosa_lightning.adapters.peft_method import PeftMethod
from rosa_lightning.models.loading import load_base
from rosa_lightning.module import RoSAModule
from rosa_lightning.roae.inject import is_adapter_key
from rosa_lightning.roae.layer import RoAEConfig
from rosa_lightning.training.loss import LossComputer
from rosa_lightning.training.speed import SpeedConfig

LINEAR = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
pytestmark = pytest.mark.filterwarnings(
    "ignore:Sparse invariant checks",  # of SHiRA
    "ignore:Model has `tie_word_embeddings=True`",
)
METHODS = {
    "LoRA": ("LoraConfig", {"r": 4, "target_modules": LINEAR}),
    "rsLoRA": ("LoraConfig", {"r": 4, "target_modules": LINEAR, "use_rslora": True}),
    "DoRA": ("LoraConfig", {"r": 4, "target_modules": LINEAR, "use_dora": True}),
    "PiSSA": ("LoraConfig", {"r": 4, "target_modules": LINEAR, "init_lora_weights": "pissa"}),
    "OFT": ("OFTConfig", {"r": 0, "oft_block_size": 16, "target_modules": LINEAR}),
    "SHiRA": ("ShiraConfig", {"r": 4, "target_modules": LINEAR}),
    "MiSS": ("MissConfig", {"r": 4, "target_modules": LINEAR}),
    "IA3": (
        "IA3Config",
        {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    ),
}
SLOW = SpeedConfig(share_prefix=False, microbatch_tokens=None, recompute_activations=False)


def method(name):
    class_name, init_args = METHODS[name]
    return PeftMethod(f"peft.{class_name}", init_args)


@pytest.fixture(scope="module")
def base():
    return load_base("tiny")


def trained(base, name):
    """A model with the method, its weights moved away from their start."""
    model = copy.deepcopy(base)
    report = apply_method(model, method(name))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(noise * 0.02)
    return model, report


def batch():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 300, (6, 48), generator=generator)
    ids[:, :30] = ids[0, :30]  # a prefix that can be shared
    labels = ids.clone()
    labels[:, :40] = -100
    return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize("name", METHODS)
def test_peft_loads_what_is_written(base, name, tmp_path):
    model, report = trained(base, name)
    write_peft(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    ids = batch()["input_ids"]
    with torch.no_grad():
        wanted, found = model.eval()(ids).logits, theirs.eval()(ids).logits
        before = base.eval()(ids).logits
    assert torch.allclose(found, wanted, atol=2e-4)
    assert not torch.allclose(before, wanted, atol=1e-2)
    config = peft.PeftConfig.from_pretrained(tmp_path)
    model_of_peft = peft.get_peft_model(copy.deepcopy(base), config)
    assert report.num_trainable == model_of_peft.get_nb_trainable_parameters()[0]


@pytest.mark.parametrize("name", METHODS)
def test_only_its_own_weights_train_and_are_named(base, name):
    model, _ = trained(base, name)
    for key, parameter in model.named_parameters():
        assert parameter.requires_grad == is_adapter_key(key)
        assert parameter.dtype == torch.float32


@pytest.mark.parametrize("name", METHODS)
def test_speed_levers_leave_loss_and_gradients(base, name):
    model, _ = trained(base, name)
    found = []
    for speed in (SLOW, SpeedConfig(microbatch_tokens=150)):
        loss = LossComputer(model.train(), speed).loss(batch())
        loss.backward()
        grads = {k: p.grad.clone() for k, p in model.named_parameters() if p.requires_grad}
        found.append((loss.item(), grads))
        model.zero_grad()
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    for key, gradient in found[0][1].items():
        difference = (gradient - found[1][1][key]).norm()
        assert difference <= 2e-5 * gradient.norm(), key


def test_a_start_that_changes_the_base_is_the_same_again(base):
    states = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        model = copy.deepcopy(base)
        init_args = {**METHODS["PiSSA"][1], "init_lora_weights": "pissa_niter_4"}
        apply_method(model, PeftMethod("peft.LoraConfig", init_args))
        states.append(model.state_dict())
    assert all(torch.equal(states[0][key], value) for key, value in states[1].items())


def test_full_finetuning(base):
    model = copy.deepcopy(base).bfloat16()
    report = apply_method(model, FullFinetuning())
    assert report.num_trainable == report.num_total == sum(p.numel() for p in model.parameters())
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    "of", [RoAEConfig(rank=3), PeftMethod("peft.LoraConfig", {"r": 3}), FullFinetuning()]
)
def test_a_method_as_plain_values(of):
    assert method_from_dict(method_to_dict(of)) == of
    check_same_method(of, of)
    with pytest.raises(ValueError, match="was trained with"):
        check_same_method(of, PeftMethod("peft.LoraConfig", {"r": 4}))


def test_an_object_of_peft_is_its_class_and_arguments():
    given = peft.LoraConfig(r=3, target_modules=["q_proj", "k_proj"], lora_dropout=0.1)
    found = PeftMethod.of(given)
    assert found.init_args == {
        "r": 3,
        "target_modules": ["k_proj", "q_proj"],
        "lora_dropout": 0.1,
    }
    assert found.config().target_modules == given.target_modules
    other = PeftMethod(found.class_path, {**found.init_args, "lora_dropout": 0.0})
    check_same_method(found, other)  # dropout is free


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"class_path": "peft.PrefixTuningConfig", "init_args": {"num_virtual_tokens": 4}},
            "input",
        ),
        ({"class_path": "peft.AdaLoraConfig", "init_args": {"total_step": 10}}, "training loop"),
        (
            {"class_path": "peft.LoraConfig", "init_args": {"rank": 3}},
            r"rank: peft.LoraConfig takes no .*It takes r, target",
        ),
        ({"class_path": "peft.LoraConfig", "loraalpha": 3}, "Did you mean lora_alpha"),
        (
            {"class_path": "peft.LoraConfig", "init_args": {"target_modules": 3}},
            r"target_modules=3 does not fit peft.LoraConfig, which takes .*list\[str\], str",
        ),
        ({"class_path": "peft.LoraConfig", "init_args": {"target_modules": [3]}}, "does not fit"),
        ({"class_path": "peft.LoraConfig", "init_args": {"r": 3.5}}, "r=3.5 does not fit"),
        (
            {
                "class_path": "peft.LoraConfig",
                "init_args": {"target_modules": LINEAR, "bias": "all"},
            },
            "of the base too",
        ),
        ({"class_path": "os.system"}, "no configuration of PEFT"),
        ({"class_path": "LoraKonfig"}, "no configuration of PEFT"),
        ({"r": 3}, "no method of PEFT"),
        (
            {"class_path": "peft.LoraConfig", "init_args": {"target_modules": ["nowhere"]}},
            "cannot be put on LlamaForCausalLM",
        ),
        (
            {"class_path": "peft.VeraConfig", "init_args": {"target_modules": ["q_proj"]}},
            "shared state",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused(base, given, message):
    with pytest.raises(ValueError, match=message):
        apply_method(copy.deepcopy(base), PeftMethod.of(given))


@pytest.mark.parametrize("name", [*METHODS, "full"])
def test_the_merged_model_is_plain_and_computes_the_same(base, name, tmp_path):
    if name == "full":
        model = copy.deepcopy(base)
        apply_method(model, FullFinetuning())
        torch.nn.init.normal_(model.model.layers[0].self_attn.q_proj.weight, std=0.1)
    else:
        model, _ = trained(base, name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    report = export_adapter(model, tmp_path / "merged", "merged")
    assert report.merged.divergence < 1e-6
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert plain.state_dict().keys() == base.state_dict().keys()
    ids = batch()["input_ids"]
    with torch.no_grad():
        found, wanted = plain.eval()(ids).logits, model.eval()(ids).logits
    assert torch.allclose(found, wanted, atol=2e-4)


def test_formats_that_cannot_hold_it_are_refused(base, tmp_path):
    model, _ = trained(base, "LoRA")
    with pytest.raises(ValueError, match="Set format to peft or merged"):
        export_adapter(model, tmp_path / "rosa", "rosa")
    full = copy.deepcopy(base)
    apply_method(full, FullFinetuning())
    with pytest.raises(ValueError, match=r"all weights\. Set format to merged"):
        export_adapter(full, tmp_path / "peft", "peft")
    export_adapter(model, tmp_path / "peft", "peft")
    assert (tmp_path / "peft" / "adapter_config.json").exists()


def test_exports_that_would_lose_something_are_refused(base, tmp_path):
    for init_args, format in (
        ({"modules_to_save": ["norm"]}, "merged"),
        ({"target_modules": ["embed_tokens"]}, "merged"),
        ({"init_lora_weights": "pissa_niter_4"}, "peft"),
    ):
        model = copy.deepcopy(base)
        settings = {**METHODS["LoRA"][1], **init_args}
        apply_method(model, PeftMethod("peft.LoraConfig", settings))
        with pytest.raises(ValueError, match="Export with format"):
            export_adapter(model, tmp_path / "out", format)
        assert not (tmp_path / "out").exists()


def test_arguments_that_peft_takes_pass():
    more = {"lora_alpha": 2.5, "init_lora_weights": "pissa_niter_4", "rank_pattern": {"q_proj": 2}}
    settings = {"class_path": "peft.LoraConfig", "init_args": {"target_modules": "all-linear"}}
    assert PeftMethod.of({**settings, "init_args": more}).config().lora_alpha == 2.5
    assert PeftMethod.of({**settings, "r": 3}).config().r == 3  # as a command line nests it


def test_one_configuration_has_one_spelling():
    given = peft.LoraConfig(r=3, target_modules=["q_proj", "k_proj"], task_type="CAUSAL_LM")
    init_args = {"r": 3, "target_modules": ["q_proj", "k_proj"]}
    assert PeftMethod.of(given) == PeftMethod.of(
        {"class_path": "peft.LoraConfig", "init_args": init_args}
    )


@pytest.mark.parametrize("name", ["LoRA", "DoRA", "OFT", "MiSS", "IA3"])
def test_a_method_trains_on_a_quantised_base_as_in_peft(name, tmp_path):
    pytest.importorskip("torchao")
    found = []
    for owner in ("ours", "theirs"):
        base = load_base("tiny", quantization="int8", device=torch.device("cpu"))
        torch.manual_seed(0)
        if owner == "ours":
            apply_method(base, method(name))
            model = base
        else:
            class_name, init_args = METHODS[name]
            config = getattr(peft, class_name)(task_type="CAUSAL_LM", **init_args)
            model = peft.get_peft_model(base, config)
        trained = [p for p in model.parameters() if p.requires_grad]
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in trained:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
        loss = model(**batch()).loss
        loss.backward()
        found.append((loss, [parameter.grad for parameter in trained]))
        if owner == "ours":
            with pytest.raises(ValueError, match="quantised base cannot be merged"):
                export_adapter(model, tmp_path / "merged", "merged")
            export_adapter(model, tmp_path / "out", "peft")
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_a_start_that_changes_a_quantised_base_is_refused_before_it_is_loaded(monkeypatch):
    monkeypatch.setattr("rosa_lightning.adapted.load_base", lambda *_, **__: pytest.fail("loaded"))
    module = RoSAModule("tiny", peft=method("PiSSA"), quantization="int8")
    with pytest.raises(ValueError, match=r"pissa changes the base's weights, which model\.quant"):
        module.configure_model()
