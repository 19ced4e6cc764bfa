from __future__ import annotations

import math
import re
from pathlib import Path

import peft
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
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
from rosa_lightning.adapters.methods import FullFinetuning, apply_method
from rosa_lightning.adapters.peft_method import PeftMethod
from rosa_lightning.dls import PolicyOptions
from rosa_lightning.inspection.report import read_run
from rosa_lightning.inspection.run_monitor import dashboard
from rosa_lightning.inspection.updates import find_updates, measure_updates
from rosa_lightning.roae.inject import roae_layers
from tests.conftest import build

NUM_LAYERS = 4  # of base_folder


def read(folder: Path) -> EventAccumulator:
    log = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0})
    log.Reload()
    return log


def series(log: EventAccumulator, tag: str) -> dict[int, float]:
    return {event.step: event.value for event in log.Scalars(tag)}


def layers(folder: Path, measure: str) -> dict[str, dict[int, float]]:
    """Values of a measure by layer and step."""
    start = f"layers/{measure}/"
    return {
        tag.removeprefix(start): dict(zip(one.steps, one.values, strict=True))
        for tag, one in read_run(folder).items()
        if tag.startswith(start)
    }


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
    """One run with everything: the module after it, and its folder."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    # First among the callbacks, so that it sees the other's hooks before that ran them.
    callbacks = [RunMonitor(raster_interval=2), selection(), TokenThroughputMonitor()]
    module, _ = fit_rosa(base_folder, sources, board(folder), callbacks)
    return module, folder


@torch.no_grad()
def test_update_norms_are_those_of_the_products_at_the_logged_step(rosa):
    module, folder = rosa
    found = dict(
        zip(
            [(f"{layer:02d}", target) for layer in range(NUM_LAYERS) for target in "qk"],
            (layer for _, layer in roae_layers(module)),
            strict=True,
        )
    )
    for target in "qk":
        norms, relative = (
            layers(folder, f"{m}/{target}") for m in ("update_norm", "relative_update")
        )
        moved, frozen = [], []
        for number in norms:
            layer = found[number, target]
            product = layer.scale * (layer.roae_B.double() @ layer.roae_A.double())
            assert list(norms[number]) == [2, 5, 8]
            # The run stopped with the step that was logged last.
            assert norms[number][8] == pytest.approx(float(product.norm()), rel=1e-6)
            base = layer.weight[layer.rows]
            assert relative[number][8] == pytest.approx(
                float(product.norm() / base.norm()), rel=1e-5
            )
            moved.append(product.flatten())
            frozen.append(base.flatten())
        assert len(moved) == NUM_LAYERS
        # The curve is that of all layers as if they were one weight.
        total = float(torch.cat(moved).norm() / torch.cat(frozen).norm())
        curve = series(read(folder), f"weights/relative_update/{target}")
        assert curve[8] == pytest.approx(total, rel=1e-5)
        assert total > 0


def test_pictures_come_every_so_many_selections_and_at_the_end(rosa):
    log = read(rosa[1])
    names = ("layer_scores", "layers_that_train", "update_of_k", "update_of_q")
    assert sorted(log.Tags()["images"]) == [f"weights/{name}" for name in names]
    # Selections at 0, 2, 4, 6, 8: after the second, the fourth, and the end.
    assert [image.step for image in log.Images("weights/layers_that_train")] == [2, 6, 8]


def test_the_layout_groups_the_tags_that_were_logged(rosa):
    log = read(rosa[1])
    (event,) = log.Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    charts = {chart.title: chart for category in layout.category for chart in category.chart}
    sections = ["Training", "Speed and memory", "Layers and updates"]
    assert [part.title for part in layout.category] == sections
    logged = log.Tags()["scalars"]
    matches = {
        title: [tag for tag in logged for wanted in chart.multiline.tag if re.match(wanted, tag)]
        for title, chart in charts.items()
    }
    assert matches["Update relative to the frozen weights, ratio of Frobenius norms"] == [
        f"weights/relative_update/{target}" for target in "qk"
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
    lowest = series(read(tmp_path), "weights/lowest_active")
    assert list(layers(tmp_path, "score")["00"]) == list(lowest) == [0, 2, 4]
    assert list(layers(tmp_path, "update_norm/q")["00"]) == [2, 5]


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
    counts = layers(tmp_path / "b", "selections")
    assert [list(one) for one in counts.values()] == [[6, 8]] * NUM_LAYERS
    assert sum(one[8] for one in counts.values()) == 5 * 2
    log = read(tmp_path / "b")
    assert [image.step for image in log.Images("weights/layers_that_train")] == [8]


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


def fit_plain(logger, *extra) -> None:
    pick = selection(
        policy="fixed",
        policy_options=PolicyOptions(fixed_layers=[5, 10]),
        final_steps_all=1,
    )
    run_settings(logger, [pick, RunMonitor(), *extra], max_steps=6).fit(Plain())


def test_what_trains_is_shown_by_the_numbers_of_the_layers(tmp_path):
    fit_plain(board(tmp_path))
    active = layers(tmp_path, "active")
    assert list(active) == [f"{number:02d}" for number in range(2, 11)]
    at = {step: [int(n) for n in active if active[n][step]] for step in active["02"]}
    # All layers in the final step.
    assert at == {0: [5, 10], 2: [5, 10], 4: [5, 10], 5: [*range(2, 11)]}
    assert not [tag for tag in read_run(tmp_path) if "update" in tag]


class Stop(Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == 4:
            raise RuntimeError("stop here")


def test_a_fit_that_breaks_off_leaves_a_picture_of_what_there_was(tmp_path):
    with pytest.raises(RuntimeError, match="stop here"):
        fit_plain(board(tmp_path), Stop())
    assert [image.step for image in read(tmp_path).Images("weights/layers_that_train")] == [3]


def test_charts_find_tags_behind_a_loggers_prefix(tmp_path):
    fit_plain(board(tmp_path, prefix="a.b"))
    log = read(tmp_path)
    patterns = [p for held in dashboard().values() for _, (p, *_) in held.values()]
    matched = {tag for tag in log.Tags()["scalars"] for p in patterns if re.match(p, tag)}
    assert matched == {"a.b-weights/lowest_active", "a.b-weights/backward_share"}


def adapted(family: str, **options) -> nn.Module:
    """A model whose terms are all different from zero."""
    model = build(family)
    inject_roae(model, RoAEConfig(rank=3, alpha=12, **options))
    for _, term in roae_layers(model):
        nn.init.normal_(term.roae_B, std=0.3)
    return model


def test_the_norm_is_that_of_what_merging_adds_to_the_weight():
    model = adapted("phi3")  # q and k are two terms on one fused projection
    norms = measure_updates(find_updates(model))
    for number, layer in enumerate(model.model.layers):
        outer = layer.self_attn.qkv_proj
        before = outer.weight.detach().clone()
        inner = outer.base
        inner.merge()
        outer.merge()
        moved = float((outer.weight - before).double().norm())
        wanted = math.hypot(*(norms[f"update_norm/{target}"].by_layer[number] for target in "qk"))
        assert moved == pytest.approx(wanted, rel=1e-5)


def test_sharded_adapters_are_refused():
    model = adapted("llama")
    term = model.model.layers[0].self_attn.q_proj
    term.roae_B = nn.Parameter(term.roae_B.detach().flatten()[:5])  # as FSDP shows its piece
    with pytest.raises(ValueError, match="shards"):
        find_updates(model)


METHODS_OF_PEFT = {
    "LoRA": peft.LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj", "down_proj"]),
    "DoRA": peft.LoraConfig(r=3, use_dora=True, target_modules=["q_proj", "down_proj"]),
    "OFT": peft.OFTConfig(r=0, oft_block_size=8, target_modules=["q_proj", "down_proj"]),
    "IA3": peft.IA3Config(
        target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
}


@pytest.mark.parametrize("name", METHODS_OF_PEFT)
def test_the_norm_of_a_method_of_peft_is_that_of_what_the_module_computes(name):
    """Oracle: the module's own output on unit vectors, less that of the frozen one."""
    model = build("llama")
    apply_method(model, PeftMethod.of(METHODS_OF_PEFT[name]))
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    norms = measure_updates(find_updates(model))
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert sum(len(one.by_layer) for one in norms.values()) == 2 * 2 * len(model.model.layers)
    for number, layer in enumerate(model.model.layers):
        for path in ("self_attn.q_proj", "mlp.down_proj"):
            module = layer.get_submodule(path)
            weight = module.get_base_layer().weight
            unit = torch.eye(weight.shape[1])
            with torch.no_grad():
                change = (module(unit) - module.get_base_layer()(unit)).norm()
            moved = norms[f"update_norm/{path}"].by_layer[number]
            assert moved == pytest.approx(float(change), rel=1e-4)
            relative = norms[f"relative_update/{path}"].by_layer[number]
            assert relative == pytest.approx(float(change / weight.norm()), rel=1e-4)


def test_where_updates_cannot_be_had_the_reason_is_told():
    model = build("llama")
    apply_method(model, FullFinetuning())
    with pytest.raises(ValueError, match="keeps no copy of the base"):
        find_updates(model)
