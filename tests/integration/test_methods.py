"""Methods of PEFT and full fine-tuning in the engine: trained, resumed, selected, evaluated."""

import re
from pathlib import Path

import peft
import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from transformers import AutoModelForCausalLM

from rosa_lightning import DynamicLayerSelection, ReasoningDataModule, RoSAModule
from rosa_lightning.cli.main import main
from rosa_lightning.models.loading import load_base, load_tokenizer
from rosa_lightning.roae.inject import is_adapter_key

TINY = str(Path(__file__).parents[2] / "configs" / "tiny.yaml")

LINEAR = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
LORA = {"class_path": "peft.LoraConfig", "init_args": {"r": 4, "target_modules": LINEAR}}
DROPPED = {**LORA, "init_args": {**LORA["init_args"], "lora_dropout": 0.1}}
PISSA = {**LORA, "init_args": {**LORA["init_args"], "init_lora_weights": "pissa"}}
SHIRA = {"class_path": "peft.ShiraConfig", "init_args": {"r": 4, "target_modules": LINEAR}}
WAYS = {
    "LoRA": {"peft": LORA},
    "LoRA with dropout": {"peft": DROPPED},
    "PiSSA": {"peft": PISSA},
    "SHiRA": {"peft": SHIRA},
    "full": {"finetune": "full"},
}
pytestmark = pytest.mark.filterwarnings(
    "ignore:Sparse invariant checks",  # of SHiRA
    "ignore:Model has `tie_word_embeddings=True`",
)


def fit(folder, way, steps, ckpt_path=None, **selection):
    """A training with layers selected, and its module."""
    seed_everything(0, verbose=False)
    module = RoSAModule("tiny", **way)
    data = ReasoningDataModule(sources="demo", batch_size=4, max_length=256)
    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps,
        logger=False,
        default_root_dir=folder,
        limit_val_batches=1,
        val_check_interval=2,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=[
            DynamicLayerSelection(**{"num_active": 0.5, "interval": 2, **selection}),
            ModelCheckpoint(folder, filename="{step}", save_top_k=-1, every_n_train_steps=3),
        ],
    )
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return module, trainer


DROPS = pytest.param("LoRA with dropout", marks=pytest.mark.slow)


@pytest.mark.parametrize("way", ["LoRA", DROPS, "PiSSA", "SHiRA", "full"])
def test_a_resumed_run_ends_with_the_same_weights(way, tmp_path):
    whole, _ = fit(tmp_path / "whole", WAYS[way], 6)
    resumed, _ = fit(tmp_path / "rest", WAYS[way], 6, tmp_path / "whole" / "step=3.ckpt")
    ours, theirs = whole.state_dict(), resumed.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    fresh = RoSAModule("tiny", **WAYS[way])
    fresh.configure_model()
    assert any(not torch.equal(value, ours[key]) for key, value in fresh.state_dict().items())


@pytest.mark.parametrize("way", ["LoRA", "full"])
def test_a_checkpoint_holds_what_trains(way, tmp_path):
    module, trainer = fit(tmp_path, WAYS[way], 3)
    state = torch.load(tmp_path / "step=3.ckpt", weights_only=True)["state_dict"]
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    assert trained <= state.keys()
    assert way == "full" or all(map(is_adapter_key, state))
    loaded = RoSAModule.load_from_checkpoint(tmp_path / "step=3.ckpt")
    assert loaded.method == module.method
    results = [trainer.validate(one, trainer.datamodule, verbose=False) for one in (module, loaded)]
    assert results[0] == results[1]


def test_another_method_is_refused(tmp_path):
    fit(tmp_path, WAYS["LoRA"], 3)
    with pytest.raises(ValueError, match=r"was trained with model.peft.class_path=peft.LoraConfig"):
        fit(tmp_path / "other", WAYS["SHiRA"], 6, tmp_path / "step=3.ckpt")
    with pytest.raises(ValueError, match=r"model.peft"):
        fit(tmp_path / "other", {}, 6, tmp_path / "step=3.ckpt")


def test_selection_freezes_the_layers_of_any_method(tmp_path):
    module, trainer = fit(tmp_path, WAYS["LoRA"], 3)
    selection = next(c for c in trainer.callbacks if isinstance(c, DynamicLayerSelection))
    assert len(selection.active) == 2
    assert module.report.num_trainable == 34304


OUTSIDE = {
    **LORA["init_args"],
    "target_modules": ["q_proj", "embed_tokens"],
    "modules_to_save": ["input_layernorm"],
}


PARTS, FULL = {"peft": {**LORA, "init_args": OUTSIDE}}, {"finetune": "full"}


@pytest.mark.parametrize(
    ("way", "state"),
    [
        (PARTS, "reset"),
        (FULL, "free"),
        pytest.param(PARTS, "free", marks=pytest.mark.slow),
        pytest.param(FULL, "reset", marks=pytest.mark.slow),
    ],
)
def test_what_trains_outside_the_layers_goes_on_and_frozen_layers_stand(way, state, tmp_path):
    """One selection: what it leaves out stays as it was, trained norms too."""
    module, trainer = fit(tmp_path, way, 3, interval=100, optimizer_state=state)
    selection = next(c for c in trainer.callbacks if isinstance(c, DynamicLayerSelection))
    seed_everything(0, verbose=False)
    start = RoSAModule("tiny", **way)
    start.configure_model()
    before, held = dict(start.named_parameters()), trainer.optimizers[0].state
    assert len(selection.active) == 2
    kinds = {True: 0, False: 0, None: 0}
    for name, parameter in module.named_parameters():
        if not before[name].requires_grad:
            continue
        number = re.search(r"\.layers\.(\d+)\.", name)
        active = None if number is None else int(number[1]) in selection.active
        kinds[active] += 1
        moved = not torch.equal(parameter, before[name])
        assert moved == (active is not False), name
        assert (parameter in held) == (active is not False), name
        if active is not False:
            assert held[parameter]["step"] == 3
    assert all(kinds.values())


def test_a_pattern_narrows_what_is_selected(tmp_path):
    """`trainable` leaves what it does not match training in every layer."""
    module, trainer = fit(tmp_path, WAYS["LoRA"], 3, interval=100, trainable="*lora_B*")
    selection = next(c for c in trainer.callbacks if isinstance(c, DynamicLayerSelection))
    held = trainer.optimizers[0].state
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            number = int(re.search(r"\.layers\.(\d+)\.", name)[1])
            trains = "lora_A" in name or number in selection.active
            assert (parameter in held) == trains, name


def test_wrong_arguments_are_found_before_the_base_is_loaded(monkeypatch, capsys):
    monkeypatch.setattr("rosa_lightning.adapted.load_base", lambda *_, **__: pytest.fail("loaded"))
    wrong = {"r=x": "r='x' does not fit", "rank=3": "takes no such argument", "r=3.5": "does not"}
    for given, message in wrong.items():
        name, value = given.split("=")
        own = ["--model.peft.class_path=peft.LoraConfig", f"--model.peft.init_args.{name}={value}"]
        assert main(["fit", "--config", TINY, "--trainer.logger=false", *own]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.startswith("error: ")
        assert error.count("\n") == 1


def test_every_command_goes_on_from_an_adapter_of_peft(tmp_path, monkeypatch, capsys):
    """Oracle: the answers of the same adapter merged by PEFT into a plain base."""
    monkeypatch.chdir(tmp_path)
    base = load_base("tiny")
    settings = {"r": 4, "target_modules": LINEAR, "use_dora": True}
    theirs = peft.get_peft_model(base, peft.LoraConfig(**settings))
    torch.manual_seed(0)
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    theirs.save_pretrained("lora")
    theirs.merge_and_unload().save_pretrained("merged")
    load_tokenizer("tiny").save_pretrained("merged")
    common = ["--config", TINY, "--trainer.logger=false", "--trainer.limit_predict_batches=1"]
    common += ["--trainer.enable_progress_bar=false", "--model.evaluation.max_new_tokens=8"]
    adapter, predict = ["--model.adapter=lora"], ["--data.predict_sources=demo", "--data.limit=8"]
    answers = []
    for model in (adapter, ["--model.base=merged", "--model.roae.rank=1"]):
        assert main(["predict", *common, *predict[:1], *model]) == 0
        answers.append(Path("predictions.jsonl").read_text())
    assert answers[0] == answers[1]
    # Trained on with the settings of the folder; a checkpoint then needs no folder.
    step = ["--trainer.max_steps=1", "--trainer.default_root_dir=run", "--dls.policy=all"]
    assert main(["fit", *common, *step, *adapter, "--trainer.limit_val_batches=0"]) == 0
    (checkpoint,) = Path("run").rglob("*.ckpt")
    state = torch.load(checkpoint, weights_only=True)
    assert state["rosa"]["peft"]["init_args"] == {**settings, "target_modules": sorted(LINEAR)}
    assert main(["export", "--config", TINY, *adapter, "--output=out", "--format=merged"]) == 0
    plain = AutoModelForCausalLM.from_pretrained("merged").state_dict()
    for key, value in AutoModelForCausalLM.from_pretrained("out").state_dict().items():
        torch.testing.assert_close(value, plain[key])
    capsys.readouterr()
    contradicting = "--model.peft={class_path: peft.MissConfig, init_args: {r: 4}}"
    assert main(["fit", *common, *step, *adapter, contradicting]) == 1
    assert "class_path=peft.LoraConfig, and peft.MissConfig is given" in capsys.readouterr().err
    module = RoSAModule("tiny", adapter="lora", finetune="full")
    with pytest.raises(ValueError, match=r"and model\.finetune=full is given"):
        module.configure_model()
