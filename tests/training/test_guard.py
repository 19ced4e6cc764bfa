"""Loss and gradients that are not finite: the run stops, or the step is left out."""

from __future__ import annotations

import copy
import math
import re
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision

from rosa_lightning import DynamicLayerSelection, RoAEConfig
from rosa_lightning.training.guard import StepGuard, check_clipping
from tests import ranks
from tests.conftest import rosa_module, save_base, write_records
from tests.test_module import data, module, trainer

LOSSES = {"loss nan": math.nan, "loss inf": math.inf}
GRADIENTS = {"gradient -inf": -math.inf, "gradient nan": math.nan, "gradient too large": 1e30}


class Faults(Callback):
    """Spoils what is named, at some batches; keeps what stood before and after each batch."""

    def __init__(self, fault: str, *at: int) -> None:
        self.fault, self.at = fault, at
        self.batch = 0
        self.records: list[list[int]] = []
        self.states: list[dict] = []

    def _state(self, trainer, pl_module) -> dict:
        optimizer = trainer.optimizers[0].state_dict()["state"]
        return copy.deepcopy({"weights": pl_module.state_dict(), "optimizer": optimizer})

    def setup(self, trainer, pl_module, stage) -> None:
        if stage == "fit" and self.fault in LOSSES:
            compute = pl_module.loss

            def spoilt(batch):
                loss = compute(batch)
                return loss * LOSSES[self.fault] if self.batch in self.at else loss

            pl_module.loss = spoilt

    def on_train_start(self, trainer, pl_module) -> None:
        self.batch = 0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self.records.append(batch["index"].tolist())
        self.states.append(self._state(trainer, pl_module))

    def on_after_backward(self, trainer, pl_module) -> None:
        if self.fault in GRADIENTS and self.batch in self.at:
            for name, parameter in pl_module.named_parameters():
                if name.endswith("layers.3.self_attn.q_proj.roae_B"):
                    parameter.grad.view(-1)[1] = GRADIENTS[self.fault]

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.batch += 1

    def on_exception(self, trainer, pl_module, exception) -> None:
        self.states.append(self._state(trainer, pl_module))


def same(one, other) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return torch.equal(torch.as_tensor(one), torch.as_tensor(other))


def numbers(message: str) -> set[int]:
    """The record numbers that a message names."""
    (listed,) = re.findall(r"on records ((?:[\d, ]+ of \w+(?:; )?)+)", message)
    return {int(number) for number in re.findall(r"\d+", listed)}


@pytest.mark.parametrize("fault", [*LOSSES, *GRADIENTS])
def test_a_run_stops_before_the_optimizer_takes_what_is_not_finite(
    fault, base_folder, sources, tmp_path
):
    faults = Faults(fault, 2)
    built = module(base_folder)
    with pytest.raises(ValueError, match=r"optimizer step 2 is not finite") as caught:
        trainer(tmp_path, max_steps=5, callbacks=[faults]).fit(built, data(sources))
    message = str(caught.value)
    assert "\n" not in message
    assert numbers(message) == set(faults.records[2])
    assert "numbers" in message or "labels" in message  # the sources
    assert "max_nonfinite_steps" in message
    if fault in LOSSES:
        assert re.search(rf"the loss is {LOSSES[fault]}", message)
    else:
        assert "the gradient of model.model.layers.3.self_attn.q_proj.roae_B is not" in message
    assert same(faults.states[-1], faults.states[2])
    assert all(weight.isfinite().all() for weight in built.state_dict().values())


@pytest.mark.filterwarnings("ignore:Optimizer step")
@pytest.mark.filterwarnings("ignore:Layer scores")
@pytest.mark.parametrize("fault", ["loss nan", "gradient nan"])
def test_a_step_left_out_changes_nothing_and_is_counted(fault, base_folder, sources, tmp_path):
    faults = Faults(fault, 1, 2)
    selection = DynamicLayerSelection(num_active=4, interval=2)
    built = module(base_folder, max_nonfinite_steps=2)
    logger = CSVLogger(tmp_path, version=0)
    options = {"max_steps": 4, "callbacks": [faults, selection], "logger": logger}
    run = trainer(tmp_path, **options)
    with pytest.warns(UserWarning, match=r"Optimizer step [12] is left out, [12] of .*=2"):
        run.fit(built, data(sources))
    assert run.global_step == 4
    assert same(faults.states[1], faults.states[2])
    assert same(faults.states[2], faults.states[3])
    assert not same(faults.states[0], faults.states[1])
    assert not same(built.state_dict(), faults.states[3]["weights"])
    lines = (tmp_path / "lightning_logs/version_0/metrics.csv").read_text().splitlines()
    column = lines[0].split(",").index("train/nonfinite_steps")
    cells = [line.split(",")[column] for line in lines[1:]]
    assert list(filter(None, cells)) == ["1", "2"]
    # A resumed run has as many left as the stopped one.
    run.save_checkpoint(tmp_path / "c.ckpt")
    again = module(base_folder, max_nonfinite_steps=2)
    options = {"max_steps": 8, "callbacks": [Faults(fault, 0), selection]}
    with pytest.raises(ValueError, match=r"step 4 is not finite, after 2 that were left out"):
        trainer(tmp_path, **options).fit(again, data(sources), ckpt_path=tmp_path / "c.ckpt")


@pytest.mark.filterwarnings("ignore:Optimizer step")
def test_scores_that_are_not_finite_select_nothing_and_say_so(base_folder, sources, tmp_path):
    selection = DynamicLayerSelection(num_active=1, interval=2)
    options = {"max_steps": 3, "callbacks": [Faults("loss nan", 0), selection]}
    built = module(base_folder, max_nonfinite_steps=1)
    with pytest.warns(UserWarning, match="Layer scores at step 0 are not finite"):
        trainer(tmp_path, **options).fit(built, data(sources))
    assert selection.num_selections == 2  # at steps 1 and 2
    assert all(math.isfinite(score) for score in selection.scores)


@pytest.mark.parametrize("fused", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore:Optimizer step")
def test_under_a_gradient_scaler_only_the_loss_counts(fused, base_folder, sources, tmp_path):
    def run(fault, *at, steps=0):
        plugin = MixedPrecision("16-mixed", "cpu")
        adam = partial(torch.optim.AdamW, lr=1e-3, fused=fused)
        built = module(base_folder, dtype="float16", max_nonfinite_steps=steps, optimizer=adam)
        faults = Faults(fault, *at)
        options = {"plugins": [plugin], "limit_val_batches": 0, "max_steps": 4}
        trainer(tmp_path, callbacks=[faults], **options).fit(built, data(sources))
        return faults.states, plugin.scaler.get_scale()

    states, scale = run("gradient -inf", 1)
    assert scale == 2**15
    assert same(states[1], states[2])  # skipped by the scaler
    with pytest.raises(ValueError, match="the loss is nan"):
        run("loss nan", 1)
    states, _ = run("loss nan", 1, steps=1)
    assert same(states[1], states[2])
    assert not same(states[2], states[3])


class SavesEveryBatch(Callback):
    def __init__(self, path: Path) -> None:
        self.path, self.content = path, b""

    def on_train_batch_end(self, trainer, *args) -> None:
        self.content = self.path.read_bytes() if self.path.exists() else b""
        trainer.save_checkpoint(self.path)


@pytest.mark.filterwarnings("ignore:Optimizer step")
@pytest.mark.parametrize("fault", ["loss nan", "gradient nan"])
def test_gradients_that_will_stop_the_run_are_not_saved(fault, base_folder, sources, tmp_path):
    """The checkpoint before them stays, and a resumed run has finite ones."""
    saves = SavesEveryBatch(tmp_path / "c.ckpt")
    options = {"max_steps": 3, "accumulate_grad_batches": 2, "limit_val_batches": 0}
    faults = Faults(fault, 2)
    run = trainer(tmp_path, callbacks=[faults, saves], **options)
    with pytest.raises(ValueError, match=r"step 1 is not finite") as caught:
        run.fit(module(base_folder), data(sources))
    assert numbers(str(caught.value)) == set(faults.records[2])
    assert saves.path.read_bytes() == saves.content
    again = trainer(tmp_path, **options)
    again.fit(module(base_folder), data(sources), ckpt_path=saves.path)
    assert again.global_step == 3


@pytest.mark.parametrize("value", [-1, -1e-9, math.nan])
def test_clipping_at_what_clips_nothing_is_refused(value, base_folder, sources, tmp_path):
    with pytest.raises(ValueError, match=r"gradient_clip_val=.*Set trainer\.gradient_clip_val"):
        trainer(tmp_path, gradient_clip_val=value).fit(module(base_folder), data(sources))
    for fine in (None, 0, 1e-9, 1, math.inf):
        check_clipping(fine)


def test_gradients_are_clipped_as_lightning_clips_them(base_folder, sources, tmp_path, monkeypatch):
    def trained():
        torch.manual_seed(0)
        built = module(base_folder)
        options = {"max_steps": 3, "limit_val_batches": 0, "gradient_clip_val": 0.01}
        trainer(tmp_path, **options).fit(built, data(sources))
        return built.state_dict()

    with monkeypatch.context() as patch:  # the norm that was checked is the only one computed
        patch.setattr("torch.nn.utils.clip_grad_norm_", None)
        found = trained()
    monkeypatch.setattr(StepGuard, "clip", lambda *_: False)
    assert same(found, trained())


# Several ranks: what one of them sees, all do.

FAULTY = 1


class OnOneRank(Faults):
    """Spoils the loss of one rank alone."""

    def setup(self, trainer, pl_module, stage) -> None:
        if ranks.rank() == FAULTY:
            super().setup(trainer, pl_module, stage)


def fit_on_ranks(folder, strategy, steps: int) -> dict:
    built = rosa_module(str(folder / "base"), RoAEConfig(rank=4), max_nonfinite_steps=steps)
    faults = OnOneRank("loss nan", 1)
    source = {"name": "numbers", "path": str(folder / "numbers.json"), "task": "gsm8k"}
    options = {"devices": 2, "strategy": strategy, "max_steps": 3, "limit_val_batches": 0}
    run = trainer(folder, callbacks=[faults], **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            run.fit(built, data([source]))
            error = ""
        except ValueError as refused:
            error = str(refused)
    parameters = [p.to_local() if hasattr(p, "to_local") else p for p in built.parameters()]
    finite = all(bool(p.isfinite().all()) for p in parameters)
    seen = {"error": error, "step": run.global_step, "finite": finite}
    return {**seen, "records": faults.records}


def on_each_strategy(folder) -> dict:
    strategies = {"ddp": ranks.ddp, "fsdp1": ranks.fsdp, "fsdp2": ranks.fsdp2}
    return {
        (name, steps): fit_on_ranks(folder, strategy(), steps)
        for name, strategy in strategies.items()
        for steps in (0, 1)
    }


@pytest.mark.slow
def test_all_ranks_stop_or_go_on_where_one_has_a_loss_that_is_not_finite(tmp_path):
    save_base(tmp_path / "base")
    write_records(tmp_path / "numbers.json", 40)
    seen = ranks.launch(on_each_strategy, tmp_path)
    for key in seen[0]:
        one, other = (rank[key] for rank in seen)
        assert one["error"] == other["error"], key
        assert [one["finite"], other["finite"]] == [True, True], key
        if key[1]:
            assert (one["error"], one["step"], other["step"]) == ("", 3, 3), key
        else:
            assert "on rank 1 the loss is nan" in one["error"], key
            assert "rank 0" not in one["error"], key
            assert numbers(one["error"]) == set(other["records"][1]), key
