"""Settings that change after construction: what was derived from them follows, or an error says."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.tuner import Tuner

import rosa_lightning.adapted
from rosa_lightning import (
    DynamicLayerSelection,
    EvaluationConfig,
    ReasoningDataModule,
    RoAEConfig,
    RoSAModule,
)
from rosa_lightning.training.speed import SpeedConfig
from tests.conftest import data_module, rosa_module, write_records
from tests.integration.test_resume import same

pytestmark = pytest.mark.filterwarnings("ignore")


class Model(RoSAModule):
    """A model that notes how many rows it trains on, without callbacks."""

    def __init__(self, **settings):
        super().__init__("tiny", RoAEConfig(rank=4), **settings)
        self.rows = []

    def training_step(self, batch, batch_idx):
        self.rows.append(len(batch["source"]))
        return super().training_step(batch, batch_idx)


def trainer(tmp_path, **options):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    quiet |= {"accelerator": "cpu", "enable_checkpointing": False, "limit_val_batches": 0}
    return Trainer(default_root_dir=tmp_path, **{**quiet, "max_steps": 2, **options})


@pytest.fixture
def data(sources):
    return data_module(sources=sources, batch_size=4, max_length=128)


def first_batch(data):
    data.setup("fit")
    return next(iter(data.train_dataloader()))


@pytest.mark.filterwarnings("error:The data differ")
def test_the_tuner_trains_each_trial_on_the_batch_size_that_it_tries(data, tmp_path):
    module, data.batch_size = Model(), 2  # where the tuner begins
    run = trainer(tmp_path)
    found = Tuner(run).scale_batch_size(
        module, datamodule=data, init_val=2, max_trials=3, steps_per_trial=1
    )
    assert module.rows == [2, 4, 8]
    assert data.batch_size == found
    module.rows.clear()
    run.fit(module, datamodule=data)
    assert max(module.rows) == found


def test_what_is_known_of_a_base_follows_it(base_folder):
    module = RoSAModule("tiny")
    before = module.num_embeddings, module.tokenizer
    module.base = str(base_folder)
    assert module.num_embeddings == 258 != before[0]
    assert module.tokenizer is not before[1]
    other = module.tokenizer
    module.roae = RoAEConfig(rank=2)
    module.attn_implementation = "eager"
    assert module.tokenizer is other


@pytest.mark.parametrize(
    "given",
    [
        ((torch.bfloat16,), {}),
        ((torch.bfloat16, True), {}),
        (("cpu", torch.float16), {"non_blocking": True}),
        ((torch.zeros(1, dtype=torch.bfloat16),), {}),
        ((), {"dtype": torch.bfloat16, "device": "cpu"}),
    ],
)
def test_moving_a_module_casts_nothing_but_to_float64(given):
    module = RoSAModule("tiny", dtype="float32")
    module.configure_model()
    args, kwargs = given
    assert {p.dtype for p in module.to(*args, **kwargs).parameters()} == {torch.float32}
    like = torch.zeros(1, dtype=torch.float64)
    assert {p.dtype for p in module.to(like).parameters()} == {torch.float64}


def test_an_error_of_a_data_module_is_not_taken_for_silence(tmp_path):
    class Broken(ReasoningDataModule):
        @property
        def text_info(self):
            raise AttributeError("broken on the way")

    module = RoSAModule("tiny")
    module.trainer = trainer(tmp_path)
    module.trainer.datamodule = Broken()
    with pytest.raises(AttributeError, match="broken on the way"):
        module.text_info()


def test_a_command_reads_its_data_and_its_tokenizer_once(data, tmp_path, monkeypatch):
    """Also where it validates first."""
    calls = []
    places = {"_read_training": ReasoningDataModule, "load_tokenizer": rosa_lightning.adapted}
    for name, place in places.items():
        monkeypatch.setattr(place, name, counted(getattr(place, name), calls))
    module, run = rosa_module("tiny", RoAEConfig(rank=2), max_new_tokens=2), trainer(tmp_path)
    run.validate(module, datamodule=data, verbose=False)
    run.fit(module, datamodule=data)
    assert sorted(calls) == ["_read_training", "load_tokenizer"]


def counted(function, calls):
    def count(*args, **kwargs):
        calls.append(function.__name__)
        return function(*args, **kwargs)

    return count


CHANGES = {
    "batch_size": 3,
    "tokens_per_batch": 300,
    "batching": "packed",
    "max_length": 64,
    "prompt_style": "plain",
    "overlong": "drop",
    "val_fraction": 0.3,
    "seed": 5,
    "stop": "oversample",
    "temperature": 2.0,
    "tokenizer": "tiny",
}


def put(data, name, value):
    if hasattr(data, name):
        setattr(data, name, value)
    else:
        data.loading = replace(data.loading, **{name: value})


@pytest.mark.parametrize("name", CHANGES)
def test_a_data_module_whose_setting_changed_is_one_made_with_it(name, tmp_path, base_folder):
    source = [{"path": str(write_records(tmp_path / "a.json", 40)), "task": "gsm8k"}]
    longer = write_records(tmp_path / "b.json", 20, "So long a text says: {}." + " Yes." * 5)
    source.append({"path": str(longer), "task": "svamp"})
    settings = {"sources": source, "batch_size": 8, "max_length": 256}
    settings |= {"tokenizer": str(base_folder), "cache_dir": None}
    changed, made = data_module(**settings), data_module(**{**settings, name: CHANGES[name]})
    first_batch(changed)
    put(changed, name, CHANGES[name])
    ours, theirs = first_batch(changed), first_batch(made)
    assert same(ours, theirs)
    assert changed.state_dict() == made.state_dict()
    assert len(changed.val_dataloader()) == len(made.val_dataloader())


def test_sources_that_change_are_read_anew(data, sources):
    data.tokenizer = "tiny"
    first_batch(data)
    data.sources = [{**sources[0], "weight": None, "name": "alone"}]
    assert data.source_names == ["alone"]
    assert set(first_batch(data)["source"].tolist()) == {0}
    assert data.examples_seen() == {"alone": 0}
    data.sources = sources[:1]
    data.sources += data_module(sources=sources[1:]).sources
    data.setup("fit")
    assert len(data.state_dict()["order"]["sources"]) == 2


def test_settings_that_cannot_be_used_are_refused_when_they_are_set(data):
    for name, value, words in (
        ("batch_size", 0, "batch_size=0 is below 1"),
        ("tokens_per_batch", 5, "is below max_length=128"),
        ("prompt_style", "chatml", "is none of"),
        ("sources", [], "names no source"),
        ("temperature", 2, "temperature=2 sets the shares"),
    ):
        with pytest.raises(ValueError, match=words):
            put(data, name, value)
    module = Model()
    for name in ("loss_chunk", "microbatch_tokens"):
        with pytest.raises(ValueError, match=name):
            module.speed = replace(module.speed, **{name: 0})
    with pytest.raises(ValueError, match="max_new_tokens"):
        module.evaluation = EvaluationConfig(max_new_tokens=0)


def test_a_model_runs_with_the_settings_of_the_moment(data, tmp_path):
    module = Model()
    run = trainer(tmp_path)
    run.fit(module, datamodule=data)
    for name, value in (
        ("share_prefix", False),
        ("loss_chunk", 3),
        ("recompute_activations", False),
        ("microbatch_tokens", 64),
    ):
        module.speed = replace(module.speed, **{name: value})
        assert getattr(module.loss_computer.speed, name) == value
        assert module.hparams["speed"][name] == value
    heads = []
    module.model.lm_head.register_forward_hook(lambda *call: heads.append(call[1][0].shape))
    batch = first_batch(data)
    with torch.no_grad():
        module.loss(batch)  # finds out what it can leave out
        heads.clear()
        module.loss(batch)
    assert max(shape[-2] for shape in heads) <= 3


def test_what_a_model_is_built_with_follows_before_and_is_read_only_after(base_folder):
    module = RoSAModule("nowhere", RoAEConfig(rank=4))
    module.base, module.roae, module.base_dtype = "tiny", RoAEConfig(rank=2), "bfloat16"
    module.configure_model()
    assert module.hparams["base"] == "tiny"
    assert module.hparams["roae"]["rank"] == 2
    assert module.hparams["dtype"] == "bfloat16"
    assert next(module.model.parameters()).dtype == torch.bfloat16
    for name, value in (
        ("base", str(base_folder)),
        ("roae", RoAEConfig(rank=8)),
        ("base_dtype", "float32"),
        ("quantization", "int8"),
        ("speed", SpeedConfig(compile=True)),
        ("adapter", "folder"),
    ):
        with pytest.raises(
            AttributeError, match=f"{name} cannot be changed to .* a new RoSAModule"
        ):
            setattr(module, name, value)
        setattr(module, name, getattr(module, name))  # nothing changes


def test_settings_of_a_selection_hold_from_the_next_fit_on(data, tmp_path):
    dls = DynamicLayerSelection(num_active=1, interval=1)
    dls.num_active = 2

    class Meddle(Callback):
        def on_train_batch_start(self, trainer, *_):
            with pytest.raises(AttributeError, match="interval cannot be changed while a fit runs"):
                dls.interval = 5

    trainer(tmp_path, callbacks=[dls, Meddle()]).fit(Model(), datamodule=data)
    assert len(dls.active) == 2
    dls.interval = 0
    with pytest.raises(ValueError, match="interval=0"):
        trainer(tmp_path, callbacks=[dls]).fit(Model(), datamodule=data)
