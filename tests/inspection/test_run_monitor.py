from __future__ import annotations

import csv
import math
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.logger import Logger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from torch import nn

from rosa_lightning import (
    DynamicLayerSelection,
    ReasoningDataModule,
    RoAEConfig,
    RoSAModule,
    RunMonitor,
    TokenThroughputMonitor,
    inject_roae,
)
from rosa_lightning.dls import PolicyOptions
from rosa_lightning.inspection import run_monitor as monitor_module
from rosa_lightning.inspection.run_monitor import (
    dashboard,
    find_updates,
    update_norm,
    update_norms,
)
from rosa_lightning.roae.inject import roae_layers
from tests.conftest import build

NUM_LAYERS = 4  # of base_folder


def read(folder: Path) -> EventAccumulator:
    log = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0})
    log.Reload()
    return log


def series(log: EventAccumulator, tag: str) -> dict[int, float]:
    return {event.step: event.value for event in log.Scalars(tag)}


def tags(log: EventAccumulator, start: str) -> list[str]:
    return [tag for tag in log.Tags()["scalars"] if tag.startswith(start)]


def run_settings(logger, callbacks, **options) -> Trainer:
    settings = {
        "accelerator": "cpu",
        "logger": logger,
        "callbacks": callbacks,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "num_sanity_val_steps": 0,
        "limit_val_batches": 0,
        "log_every_n_steps": 3,
        "max_steps": 9,
    }
    return Trainer(**{**settings, **options})


def board(folder: Path, **options) -> TensorBoardLogger:
    return TensorBoardLogger(folder, name="", version="", default_hp_metric=False, **options)


def fit_rosa(base, sources, logger, callbacks, ckpt_path=None, **options):
    module = RoSAModule(str(base), RoAEConfig(rank=4))
    data = ReasoningDataModule(sources=sources, batch_size=2, max_length=256, val_fraction=0.1)
    trainer = run_settings(logger, callbacks, **options)
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return module, trainer


def selection(**options) -> DynamicLayerSelection:
    return DynamicLayerSelection(**{"num_active": 2, "interval": 2, "policy": "sample", **options})


@pytest.fixture(scope="module")
def rosa(base_folder, sources, tmp_path_factory):
    """One run with everything: the module after it, and what its event files say."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    # First among the callbacks, so that it sees the other's hooks before that ran them.
    callbacks = [RunMonitor(raster_interval=2), selection(), TokenThroughputMonitor()]
    module, _ = fit_rosa(base_folder, sources, board(folder), callbacks)
    return module, read(folder)


def test_the_share_of_backward_that_is_saved_follows_from_the_active_layers(rosa):
    _, log = rosa
    active = [series(log, f"dls/active/{layer:02d}") for layer in range(NUM_LAYERS)]
    wanted = {
        step: min(layer for layer in range(NUM_LAYERS) if active[layer][step]) / NUM_LAYERS
        for step in active[0]
    }
    assert series(log, "dls/backward_saved") == wanted
    assert list(wanted) == [0, 2, 4, 6, 8]
    assert len(set(wanted.values())) > 1


def test_counts_add_up_the_selections_of_each_layer(rosa):
    _, log = rosa
    for layer in range(NUM_LAYERS):
        active = series(log, f"dls/active/{layer:02d}")
        total = np.cumsum(list(active.values()))
        counts = series(log, f"dls/selection_count/{layer:02d}")
        assert counts == dict(zip(active, total, strict=True))


@torch.no_grad()
def test_update_norms_are_those_of_the_products_at_the_logged_step(rosa):
    module, log = rosa
    names = [f"{layer:02d}/{target}" for layer in range(NUM_LAYERS) for target in "qk"]
    assert tags(log, "roae/update_norm/") == [f"roae/update_norm/{name}" for name in names]
    layers = dict(zip(names, (layer for _, layer in roae_layers(module)), strict=True))
    for name, layer in layers.items():
        product = layer.scale * (layer.roae_B.double() @ layer.roae_A.double())
        logged = series(log, f"roae/update_norm/{name}")
        assert list(logged) == [2, 5, 8]
        # The run stopped with the step that was logged last.
        assert logged[8] == pytest.approx(float(product.norm()), rel=1e-6)
        relative = float(product.norm() / layer.weight[layer.rows].norm())
        assert series(log, f"roae/relative_update/{name}")[8] == pytest.approx(relative, rel=1e-5)
    assert max(series(log, f"roae/update_norm/{name}")[8] for name in names) > 0


def test_measurements_stand_at_the_steps_of_the_loss(rosa):
    _, log = rosa
    tag = "roae/update_norm/00/q"
    assert list(series(log, tag)) == list(series(log, "train/loss")) == [2, 5, 8]


def test_pictures_come_every_so_many_selections_and_at_the_end(rosa):
    _, log = rosa
    images = log.Images("dls/raster")
    # Selections at 0, 2, 4, 6, 8: after the second, the fourth, and the end.
    assert [image.step for image in images] == [2, 6, 8]


def test_the_layout_groups_the_tags_that_were_logged(rosa):
    _, log = rosa
    (event,) = log.Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    charts = {chart.title: chart for category in layout.category for chart in category.chart}
    assert [category.title for category in layout.category] == [
        "Training",
        "Layers",
        "RoAE",
        "Cost",
    ]
    logged = log.Tags()["scalars"]
    matches = {
        title: [tag for tag in logged for wanted in chart.multiline.tag if re.match(wanted, tag)]
        for title, chart in charts.items()
    }
    assert matches["Layer scores, gradient norm"] == tags(log, "dls/score/")
    assert matches["Update of k, Frobenius norm"] == [
        tag for tag in tags(log, "roae/update") if tag[-1] == "k"
    ]
    empty = [title for title, found in matches.items() if not found]
    # Nothing was validated, and the peak of the device is not known.
    assert empty == [
        "Accuracy of validation answers, share",
        "Model FLOPs utilisation, share of the peak",
    ]


def test_under_accumulation_selections_and_measurements_stand_at_optimizer_steps(
    base_folder, sources, tmp_path
):
    options = {"accumulate_grad_batches": 2, "max_steps": 6}
    callbacks = [selection(), RunMonitor()]
    fit_rosa(base_folder, sources, board(tmp_path), callbacks, **options)
    log = read(tmp_path)
    scored = series(log, "dls/score/00")
    assert list(series(log, "dls/backward_saved")) == list(scored) == [0, 2, 4]
    measured = log.Scalars("roae/update_norm/00/q")
    assert [event.step for event in measured] == [2, 5]


@pytest.mark.parametrize("monitor_first", [True, False])
def test_a_resumed_run_shows_new_selections_only_and_counts_the_old_ones(
    base_folder, sources, tmp_path, monitor_first
):
    def callbacks():
        both = [RunMonitor(), selection()]
        return both if monitor_first else both[::-1]

    _, first = fit_rosa(
        base_folder, sources, board(tmp_path / "a"), callbacks(), max_steps=5
    )  # selects at 0, 2, 4
    first.save_checkpoint(tmp_path / "stopped.ckpt")
    fit_rosa(
        base_folder,
        sources,
        board(tmp_path / "b"),
        callbacks(),
        ckpt_path=tmp_path / "stopped.ckpt",
    )
    log = read(tmp_path / "b")
    assert list(series(log, "dls/backward_saved")) == list(series(log, "dls/score/00")) == [6, 8]
    counts = [series(log, f"dls/selection_count/{layer:02d}")[8] for layer in range(NUM_LAYERS)]
    assert sum(counts) == 5 * 2
    assert [image.step for image in log.Images("dls/raster")] == [8]


def test_without_selection_only_the_adapters_are_shown(base_folder, sources, tmp_path):
    fit_rosa(base_folder, sources, board(tmp_path), [RunMonitor()], max_steps=3)
    log = read(tmp_path)
    assert not tags(log, "dls/")
    assert log.Tags()["images"] == []
    assert len(tags(log, "roae/update_norm/")) == 2 * NUM_LAYERS


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(3)
        self.map = nn.Linear(3, 3)

    def forward(self, x):
        return x + self.map(self.norm(x))


class Plain(LightningModule):
    """Twelve layers without RoAE; the first two and the last have nothing to train."""

    def __init__(self):
        super().__init__()
        self._blocks = nn.ModuleList([Block() for _ in range(12)])
        for index in (0, 1, 11):
            self._blocks[index].requires_grad_(False)

    def training_step(self, batch, batch_idx):
        for block in self._blocks:
            batch = block(batch)
        return batch.square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.01)

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.randn(12, 3), batch_size=2)


def fit_plain(logger, monitor=None, extra=(), **options) -> None:
    pick = selection(policy="fixed", policy_options=PolicyOptions(fixed_layers=[5, 10]))
    callbacks = [pick, monitor or RunMonitor(), *extra]
    run_settings(logger, callbacks, **{"max_steps": 6, **options}).fit(Plain())


def test_layers_with_nothing_to_train_count_among_those_that_backward_may_skip(tmp_path):
    fit_plain(board(tmp_path))
    log = read(tmp_path)
    assert series(log, "dls/backward_saved") == pytest.approx({0: 5 / 12, 2: 5 / 12, 4: 5 / 12})
    numbers = [tag.rpartition("/")[2] for tag in tags(log, "dls/selection_count/")]
    assert numbers == [f"{number:02d}" for number in range(2, 11)]
    assert not tags(log, "roae/")


def test_final_steps_of_all_layers_are_shown_where_they_begin(tmp_path):
    pick = selection(
        policy="fixed",
        policy_options=PolicyOptions(fixed_layers=[10]),
        interval=3,
        final_steps_all=2,
    )
    run_settings(board(tmp_path), [pick, RunMonitor()], max_steps=7).fit(Plain())
    log = read(tmp_path)
    assert series(log, "dls/backward_saved") == pytest.approx({0: 10 / 12, 3: 10 / 12, 5: 2 / 12})
    assert series(log, "dls/selection_count/10") == {0: 1, 3: 2, 5: 2}
    assert [image.step for image in log.Images("dls/raster")] == [5]


def test_a_second_fit_with_the_same_callback_starts_over(tmp_path):
    monitor = RunMonitor()
    fit_plain(board(tmp_path / "a"), monitor)
    fit_plain(board(tmp_path / "b"), monitor, max_steps=3)
    log = read(tmp_path / "b")
    assert list(series(log, "dls/backward_saved")) == [0, 2]
    assert [image.step for image in log.Images("dls/raster")] == [2]


class Stop(Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == 4:
            raise RuntimeError("stop here")


def test_a_fit_that_breaks_off_leaves_a_picture_of_what_there_was(tmp_path):
    with pytest.raises(RuntimeError, match="stop here"):
        fit_plain(board(tmp_path), extra=[Stop()])
    assert [image.step for image in read(tmp_path).Images("dls/raster")] == [2]


def test_csv_gets_the_same_scalars(tmp_path):
    fit_plain([board(tmp_path / "board"), CSVLogger(tmp_path, name="", version="csv")])
    with (tmp_path / "csv" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    log = read(tmp_path / "board")
    for tag in ("dls/backward_saved", "dls/selection_count/05"):
        written = {int(row["step"]): float(row[tag]) for row in rows if row[tag]}
        assert written == pytest.approx(series(log, tag), rel=1e-6)


class Recorder(Logger):
    """A logger as others write them: scalars and nothing else."""

    def __init__(self):
        super().__init__()
        self.metrics: dict[str, float] = {}

    @property
    def name(self):
        return "recorder"

    @property
    def version(self):
        return 0

    def log_hyperparams(self, params, *args, **kwargs):
        pass

    def log_metrics(self, metrics, step=None):
        self.metrics |= metrics


def test_any_logger_gets_the_scalars_and_no_picture(tmp_path):
    logger = Recorder()
    fit_plain(logger)
    assert {"dls/backward_saved", "dls/selection_count/02"} <= set(logger.metrics)
    assert all(isinstance(value, int | float) for value in logger.metrics.values())


@pytest.fixture
def measured(monkeypatch) -> list[str]:
    """What a monitor has measured."""
    seen: list[str] = []
    for name in ("find_updates", "raster_figure"):
        whole = getattr(monitor_module, name)

        def note(*args, name=name, whole=whole, **options):
            seen.append(name)
            return whole(*args, **options)

        monkeypatch.setattr(monitor_module, name, note)
    return seen


def test_nothing_is_measured_without_a_logger(measured, tmp_path):
    fit_plain(False)
    assert measured == []
    fit_plain(board(tmp_path))
    assert measured


def test_nothing_is_measured_but_on_the_first_rank(measured, tmp_path):
    pick = selection()
    other = SimpleNamespace(
        is_global_zero=False,
        loggers=[board(tmp_path)],
        callbacks=[pick],
        global_step=0,
        log_every_n_steps=1,
    )
    monitor = RunMonitor()
    monitor.on_train_start(other, nn.Identity())
    monitor.on_train_batch_start(other, nn.Identity(), None, 0)
    other.global_step = 1
    monitor.on_train_batch_end(other, nn.Identity(), None, None, 0)
    monitor.on_train_end(other, nn.Identity())
    assert list(tmp_path.iterdir()) == []
    assert measured == []


def test_sharded_adapters_are_left_out_and_that_is_said(monkeypatch, tmp_path):
    def refuse(_):
        raise ValueError("the strategy keeps adapter weights in shards")

    monkeypatch.setattr(monitor_module, "find_updates", refuse)
    said = []
    monkeypatch.setattr(monitor_module, "rank_zero_info", said.append)
    fit_plain(board(tmp_path))
    assert said == [
        "RoAE update norms are not shown: the strategy keeps adapter weights in shards."
    ]
    assert tags(read(tmp_path), "dls/backward_saved")


def test_a_loggers_prefix_stands_before_all_tags(tmp_path):
    fit_plain(board(tmp_path, prefix="a.b"))
    log = read(tmp_path)
    assert tags(log, "a.b-dls/backward_saved")
    assert log.Tags()["images"] == ["a.b-dls/raster"]
    patterns = [p for held in dashboard(True, [], "a.b").values() for _, (p, *_) in held.values()]
    matched = {tag for tag in log.Tags()["scalars"] for p in patterns if re.match(p, tag)}
    assert {"a.b-dls/backward_saved", "a.b-dls/score/05"} <= matched


def test_patterns_match_whole_tags():
    charts = dashboard(selects=True, targets=["q", "up"])
    (pattern,) = charts["RoAE"]["Update of up, Frobenius norm"][1]
    assert re.match(pattern, "roae/update_norm/07/up")
    assert not re.match(pattern, "roae/update_norm/07/upper")
    assert not re.match(pattern, "roae/relative_update/07/up")


def test_no_interval_draws_at_the_end_alone(tmp_path):
    fit_plain(board(tmp_path), RunMonitor(raster_interval=0))
    assert [image.step for image in read(tmp_path).Images("dls/raster")] == [4]


def test_a_negative_interval_is_refused():
    with pytest.raises(ValueError, match="raster_interval=-1 is below 0"):
        RunMonitor(raster_interval=-1)


def adapted(family: str, **options) -> nn.Module:
    """A model whose terms are all different from zero."""
    model = build(family)
    inject_roae(model, RoAEConfig(rank=3, alpha=12, **options))
    for _, term in roae_layers(model):
        nn.init.normal_(term.roae_B, std=0.3)
    return model


@torch.no_grad()
def test_the_norm_is_that_of_the_product():
    for _, term in roae_layers(adapted("llama")):
        product = term.scale * term.roae_B.double() @ term.roae_A.double()
        assert float(update_norm(term)) == pytest.approx(float(product.norm()), rel=1e-12)


def test_the_norm_is_that_of_what_merging_adds_to_the_weight():
    model = adapted("phi3")  # q and k are two terms on one fused projection
    updates = find_updates(model)
    assert [(update.layer, update.target) for update in updates] == [
        (0, "q"),
        (0, "k"),
        (1, "q"),
        (1, "k"),
    ]
    norms = dict(zip([(u.layer, u.target) for u in updates], update_norms(updates), strict=True))
    for number, layer in enumerate(model.model.layers):
        outer = layer.self_attn.qkv_proj
        before = outer.weight.detach().clone()
        inner = outer.base
        inner.merge()
        outer.merge()
        moved = float((outer.weight - before).double().norm())
        wanted = math.hypot(norms[number, "q"], norms[number, "k"])
        assert moved == pytest.approx(wanted, rel=1e-5)


def test_the_base_norm_is_that_of_the_rows_that_take_the_term():
    model = adapted("llama", low_freq_ratio=0.5)
    update = find_updates(model)[1]
    term = model.model.layers[0].self_attn.k_proj
    assert update.terms == (term,)
    # Half-split pairs of 16 dimensions a head: the slower half of the pairs is 4-7 and 12-15.
    rows = [head * 16 + dim for head in range(2) for dim in (4, 5, 6, 7, 12, 13, 14, 15)]
    assert update.base_norm == pytest.approx(float(term.weight[rows].norm()), rel=1e-5)


def test_a_term_after_a_norm_has_no_weight_to_be_compared_with():
    for update in find_updates(adapted("qwen3", placement="state")):
        assert update.base_norm is None
        assert update_norms([update])[0] > 0


def test_a_packed_weight_has_no_norm():
    model = adapted("llama")
    packed = nn.Parameter(torch.zeros(512, 1, dtype=torch.uint8), requires_grad=False)
    model.model.layers[1].self_attn.q_proj.base.weight = packed
    known = {(u.layer, u.target): u.base_norm is not None for u in find_updates(model)}
    assert known == {(0, "q"): True, (0, "k"): True, (1, "q"): False, (1, "k"): True}


def test_sharded_adapters_are_refused():
    model = adapted("llama")
    term = model.model.layers[0].self_attn.q_proj
    term.roae_B = nn.Parameter(term.roae_B.detach().flatten()[:5])  # as FSDP shows its piece
    with pytest.raises(ValueError, match="shards"):
        find_updates(model)


def test_a_model_without_roae_has_no_updates():
    assert find_updates(build("llama")) == []


def test_adapters_are_found_inside_another_module():
    outer = nn.ModuleDict({"policy": adapted("llama"), "value": nn.Linear(2, 2)})
    assert len(find_updates(outer)) == 4


def test_a_new_adapter_has_moved_nothing():
    model = build("llama")
    inject_roae(model, RoAEConfig(rank=3))
    assert update_norms(find_updates(model)) == [0.0] * 4
