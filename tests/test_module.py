from __future__ import annotations

import math
import shutil
import weakref
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from rosa_lightning import ReasoningDataModule, RoAEConfig, RoSAModule
from rosa_lightning.roae.inject import is_adapter_key
from tests.conftest import rosa_module, save_base


def trainer(tmp_path: Path, **options) -> Trainer:
    quiet = ("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing")
    settings = {"default_root_dir": tmp_path, "accelerator": "cpu", "max_steps": 2}
    settings |= {**dict.fromkeys(quiet, False), "num_sanity_val_steps": 0, "log_every_n_steps": 1}
    return Trainer(**{**settings, **options})


def data(sources, **options) -> ReasoningDataModule:
    return ReasoningDataModule(
        **{"sources": sources, "batch_size": 4, "max_length": 256, "val_fraction": 0.1, **options}
    )


def module(base_folder: Path, **options) -> RoSAModule:
    options = {"max_new_tokens": 8, **options}  # a base of random weights ends no answer
    return rosa_module(str(base_folder), RoAEConfig(rank=4), **options)


def randomise(built: RoSAModule) -> RoSAModule:
    built.configure_model()
    for name, parameter in built.named_parameters():
        if name.endswith("roae_B"):
            torch.nn.init.normal_(parameter, std=0.5)
    return built


@pytest.fixture
def batch(base_folder, sources):
    datamodule = data(sources, tokenizer=str(base_folder))
    datamodule.setup("fit")
    return next(iter(datamodule.train_dataloader()))


def one_row_loss(model, batch) -> torch.Tensor:
    """Sum over rows, each alone and without padding, through the whole head."""
    losses = []
    for row in range(len(batch["labels"])):
        mask = batch["attention_mask"][row].bool()
        ids, labels = batch["input_ids"][row][mask], batch["labels"][row][mask]
        logits = model(input_ids=ids[None]).logits[0]
        losses.append(
            F.cross_entropy(logits[:-1], labels[1:], reduction="none")[labels[1:] != -100]
        )
    return torch.cat(losses).mean()


def test_the_training_loss_is_that_of_single_unpadded_rows(base_folder, batch):
    built = randomise(module(base_folder))
    assert_close(built.loss(batch), one_row_loss(built.model, batch))


def test_answer_tokens_are_right_where_greedy_generation_writes_them(base_folder, tmp_path):
    """Three answers as the model writes them itself; in two more one token differs."""
    built = randomise(module(base_folder)).eval()
    prompts = torch.randint(3, 256, (5, 11))
    written = built.model.generate(
        prompts, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=257
    )
    written[3, -1] = (written[3, -1] + 1) % 256
    written[4, -4] = (written[4, -4] + 1) % 256
    labels = written.clone()
    labels[:, :-4] = -100
    batch = {
        "input_ids": written,
        "attention_mask": torch.ones_like(written),
        "position_ids": torch.arange(15).expand(5, -1),
        "labels": labels,
        "answer_mask": labels != -100,
        "num_label_positions": 4,
        "task": ["all"] * 5,
    }
    loader = DataLoader([batch], batch_size=None)
    metrics = trainer(tmp_path).validate(built, loader, verbose=False)[0]
    assert metrics["val/answer_tokens_given_rationale"] == pytest.approx(3 / 5)


@pytest.mark.filterwarnings("ignore:You passed .*16-mixed")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_train_in_float32_and_the_base_keeps_its_dtype(
    precision, dtype, base_folder, sources, tmp_path
):
    built = module(base_folder, dtype=dtype)
    run = trainer(tmp_path, precision=precision)
    built.configure_model()
    before = {name: parameter.detach().clone() for name, parameter in built.named_parameters()}
    run.fit(built, data(sources))
    for name, parameter in built.named_parameters():
        if is_adapter_key(name):
            assert parameter.dtype == torch.float32
        else:
            assert parameter.dtype == getattr(torch, dtype)
            assert torch.equal(parameter, before[name])
    moments = run.optimizers[0].state.values()
    assert {state["exp_avg"].dtype for state in moments} == {torch.float32}
    assert any(not torch.equal(before[key], value) for key, value in built.named_parameters())


class Casts(TorchDispatchMode):
    """Follows the copies that are made of a base's weights in another dtype."""

    def __init__(self, built: RoSAModule) -> None:
        super().__init__()
        weights = (p for name, p in built.named_parameters() if not is_adapter_key(name))
        self.weights = {weight.untyped_storage().data_ptr() for weight in weights}
        self.copies: list[weakref.ref[torch.Tensor]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        is_copy = func is torch.ops.aten._to_copy.default
        if is_copy and args[0].untyped_storage().data_ptr() in self.weights:
            self.copies.append(weakref.ref(out))
        return out

    def alive(self) -> int:
        return sum(copy() is not None for copy in self.copies)


@pytest.mark.filterwarnings("ignore:You passed .*16-mixed")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed", "bf16-true"])
def test_no_copy_of_a_bfloat16_base_is_made_in_training(precision, base_folder, sources, tmp_path):
    built = module(base_folder, dtype="bfloat16")
    built.configure_model()
    with Casts(built) as casts:
        trainer(tmp_path, precision=precision).fit(built, data(sources))
    assert len(casts.copies) == 0


def test_autocast_keeps_copies_of_what_trains_and_none_of_the_frozen_base(base_folder, batch):
    built = module(base_folder, dtype="float32")
    built.configure_model()
    with Casts(built) as casts, torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        built.loss(batch)
        assert len(casts.copies) > 8  # each product needs one
        assert casts.alive() == 0
        # Where weights do require gradients, they are kept until autocast ends.
        built.model.requires_grad_(True)
        with torch.enable_grad():
            built.loss(batch)
        assert casts.alive() > 8


def test_a_training_that_ends_lets_go_of_copies_of_the_base(base_folder, sources, tmp_path):
    built = module(base_folder, dtype="float32")
    built.configure_model()
    alive: list[int] = []

    class Look(Callback):
        def on_train_batch_end(self, *_) -> None:
            alive.append(casts.alive())

    with Casts(built) as casts:
        run = trainer(tmp_path, precision="bf16-mixed", callbacks=[Look()], max_steps=3)
        run.fit(built, data(sources))
    assert alive[-1] > 8
    assert casts.alive() == 0


def test_16_mixed_trains_with_a_loss_scale(base_folder, sources, tmp_path):
    """Lightning turns 16-mixed into bf16-mixed on a CPU, unless it is given the plugin itself."""
    plugin = MixedPrecision("16-mixed", "cpu")
    built = module(base_folder, dtype="float16")
    run = trainer(tmp_path, plugins=[plugin], limit_val_batches=0, max_steps=3)
    run.fit(built, data(sources))
    assert plugin.scaler.get_scale() > 1
    changed = [p for n, p in built.named_parameters() if n.endswith("roae_B") and p.any()]
    assert changed
    assert {p.dtype for p in changed} == {torch.float32}


def test_64_true_casts_everything_and_says_so_once(base_folder, sources, tmp_path, caplog):
    built = module(base_folder)
    with caplog.at_level("INFO"):
        run = trainer(tmp_path, precision="64-true")
        run.validate(built, data(sources), verbose=False)
        run.fit(built, data(sources))
    assert {parameter.dtype for parameter in built.parameters()} == {torch.float64}
    assert caplog.text.count("64-true") == 1


def test_a_checkpoint_holds_the_adapters_without_the_base_and_gives_the_same_model(
    base_folder, sources, tmp_path
):
    built = module(base_folder)
    run = trainer(tmp_path)
    run.fit(built, data(sources))
    run.save_checkpoint(tmp_path / "c.ckpt")
    saved = torch.load(tmp_path / "c.ckpt", weights_only=True)
    adapters = {name for name, _ in built.named_parameters() if is_adapter_key(name)}
    assert set(saved["state_dict"]) == set(built.state_dict()) == adapters
    assert (saved["rosa"]["base"], saved["rosa"]["revision"]) == (str(base_folder), None)
    loaded = RoSAModule.load_from_checkpoint(tmp_path / "c.ckpt")
    assert loaded.roae == built.roae
    assert_close(loaded.state_dict(), built.state_dict(), rtol=0, atol=0)


@pytest.fixture(scope="module")
def saved_once(base_folder, sources, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    run = trainer(folder, max_steps=1)
    run.fit(module(base_folder), data(sources))
    run.save_checkpoint(folder / "c.ckpt")
    return folder / "c.ckpt"


@pytest.fixture
def checkpoint(saved_once, tmp_path) -> Path:
    return Path(shutil.copy(saved_once, tmp_path))


def test_a_checkpoint_of_another_base_is_refused(checkpoint, tmp_path):
    other = save_base(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match=r"trained on base .* is another one.*Set model\.base"):
        RoSAModule.load_from_checkpoint(checkpoint, base=str(other))


def test_the_same_base_under_another_name_or_dtype_is_accepted(checkpoint, base_folder, tmp_path):
    moved = tmp_path / "moved"
    moved.symlink_to(base_folder)
    loaded = RoSAModule.load_from_checkpoint(checkpoint, base=str(moved), dtype="bfloat16")
    assert loaded.base == str(moved)


def first_of(saved):
    return next(iter(saved["state_dict"]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda saved: saved["state_dict"].pop(first_of(saved)), "is missing"),
        (lambda saved: saved["state_dict"].update({"x": torch.ones(1)}), "x is unknown"),
        (lambda saved: saved["state_dict"].update({first_of(saved): torch.ones(1)}), "has shape"),
        (lambda saved: saved.pop("rosa"), "holds no RoSA adapter"),
    ],
)
def test_what_does_not_fit_in_a_checkpoint_is_named(checkpoint, change, message):
    saved = torch.load(checkpoint, weights_only=True)
    change(saved)
    torch.save(saved, checkpoint)
    with pytest.raises(ValueError, match=message):
        RoSAModule.load_from_checkpoint(checkpoint)


@pytest.mark.parametrize(
    ("roae", "message"),
    [
        ({"rank": 2}, r"model\.roae\.rank=4, and 2 is given"),
        ({"rank": 4, "alpha": 320.0}, r"roae\.alpha=32.0, and 320.0 is given"),
    ],
)
def test_other_settings_of_the_same_weights_are_refused(checkpoint, roae, message):
    with pytest.raises(ValueError, match=message):
        RoSAModule.load_from_checkpoint(checkpoint, roae=roae)


def test_dropout_may_be_changed_after_training(checkpoint):
    loaded = RoSAModule.load_from_checkpoint(checkpoint, roae={"rank": 4, "dropout": 0.5})
    assert loaded.roae.dropout == 0.5


def test_loaders_without_a_data_module_are_validated_on(base_folder, sources, tmp_path):
    built = module(base_folder)
    datamodule = data(sources, tokenizer=str(base_folder))
    datamodule.setup("validate")
    metrics = trainer(tmp_path).validate(built, datamodule.val_dataloader(), verbose=False)[0]
    assert {"val/loss", "val/accuracy", "val/accuracy/boolq"} <= set(metrics)


class Recorder(Callback):
    """The loss and the learning rate after each batch."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.rates: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.losses.append(trainer.callback_metrics["train/loss"].item())
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


def trained(base_folder, sources, tmp_path, batching):
    # Steps of Adam's full size would make much of rounding.
    slow = partial(torch.optim.AdamW, lr=1e-4)
    recorder, built = Recorder(), randomise(module(base_folder, optimizer=slow))
    run = trainer(tmp_path, max_steps=16, callbacks=[recorder])  # an epoch
    run.fit(built, data(sources, batching=batching))
    return recorder.losses, run.callback_metrics


def test_packed_rows_train_and_validate_as_padded_rows_do(base_folder, sources, tmp_path):
    torch.manual_seed(1)
    padded, expected = trained(base_folder, sources, tmp_path, "random")
    torch.manual_seed(1)
    packed, found = trained(base_folder, sources, tmp_path, "packed")
    assert packed == pytest.approx(padded, abs=1e-4)
    for name in ("val/loss", "val/accuracy", "val/accuracy/boolq", "val/accuracy/gsm8k"):
        assert found[name].item() == pytest.approx(expected[name].item(), abs=1e-4)


def test_the_default_schedule_warms_up_and_decays_over_the_trainers_steps(
    base_folder, sources, tmp_path
):
    recorder = Recorder()
    options = {"max_steps": 20, "max_epochs": 10, "accumulate_grad_batches": 2}
    run = trainer(tmp_path, **options, callbacks=[recorder], limit_val_batches=0)
    run.fit(module(base_folder), data(sources))
    # The rate after each second micro-batch is that of the next step; 5 % of 20 steps warm up.
    after = recorder.rates[1::2]
    wanted = [1e-3 * 0.5 * (1 + math.cos(math.pi * (step - 1) / 19)) for step in range(1, 21)]
    assert after == pytest.approx(wanted)


def test_predict_returns_a_record_for_each_prompt(base_folder, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Say 1.\nSay 2.\nSay 3.\n")
    built = module(base_folder, max_new_tokens=4)
    datamodule = ReasoningDataModule(predict_sources=[str(prompts)], batch_size=2)
    batches = trainer(tmp_path).predict(built, datamodule)
    records = [record for batch in batches for record in batch]
    assert [record["prompt"] for record in records] == ["Say 1.", "Say 2.", "Say 3."]
    keys = {"source", "index", "task", "prompt", "input", "response", "answer"}
    assert set(records[0]) == keys
    assert all(isinstance(record["response"], str) for record in records)


def test_gradient_checkpointing_keeps_the_gradients_and_spares_the_frozen_layers(
    base_folder, batch
):
    gradients, entered = [], []
    for checkpointing in (False, True):
        torch.manual_seed(3)
        built = randomise(
            module(base_folder, gradient_checkpointing=checkpointing, share_prefix=False)
        )
        layers = built.model.model.layers
        for parameter in layers[:2].parameters():
            parameter.requires_grad_(False)
        built.loss(batch)  # the first tries out what the model can do
        count: list[int] = []
        layers[0].mlp.register_forward_hook(lambda *_, count=count: count.append(1))
        built.loss(batch).backward()
        gradients.append([p.grad for p in built.parameters() if p.requires_grad])
        entered.append(len(count))
    for plain, checkpointed in zip(*gradients, strict=True):
        assert_close(plain, checkpointed)
    # A recomputation of the lowest layer would be a second forward.
    assert entered == [1, 1]


def test_deepspeed_is_refused_in_one_line(base_folder, monkeypatch):
    module = RoSAModule(str(base_folder))
    strategy = DeepSpeedStrategy.__new__(DeepSpeedStrategy)
    module.trainer = SimpleNamespace(strategy=strategy)
    with pytest.raises(ValueError, match=r"under DeepSpeedStrategy, .* trainer\.strategy to ddp"):
        module.configure_model()


def test_a_default_device_of_the_trainer_s_does_not_reach_the_loading(base_folder):
    """Lightning builds a module with its device as the default one."""
    module = RoSAModule(str(base_folder))
    with torch.device("meta"):
        module.configure_model()
    assert {tensor.device.type for tensor in module.model.state_dict().values()} == {"cpu"}
