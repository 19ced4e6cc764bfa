from __future__ import annotations

import contextlib
import io
import pickle
from functools import partial
from importlib.resources import files
from pathlib import Path
from shutil import copy

import pytest
import torch
from lightning.pytorch import Callback, seed_everything
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.testing import assert_close
from torch.utils.data import DataLoader

from rosa_lightning import DynamicLayerSelection, RoAEConfig, RoSAModule, inject_roae
from rosa_lightning.cli.main import main
from rosa_lightning.roae.inject import is_adapter_key
from rosa_lightning.training import sharding
from rosa_lightning.training.schedule import WarmupCosine
from tests import ranks
from tests.conftest import FAMILIES, build
from tests.distributed.test_dls import plain
from tests.test_module import trainer

CONFIGS = Path(__file__).parents[2] / "configs"
STRATEGIES = {
    "ddp": "ddp",
    "fsdp1 full": "{class_path: tests.ranks.CPUFSDPStrategy}",
    "fsdp1 sharded": "{class_path: tests.ranks.CPUFSDPStrategy, "
    "init_args: {state_dict_type: sharded}}",
    "fsdp2 sharded": "ModelParallelStrategy",
    "fsdp2 full": "{class_path: lightning.pytorch.strategies.ModelParallelStrategy, "
    "init_args: {save_distributed_checkpoint: false}}",
}
STEPS = 6


class Watch(Callback):
    """Keeps what a run trained on and what came of it."""

    last: Watch

    def __init__(self) -> None:
        Watch.last = self
        self.batches, self.active = [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self.batches.append({k: v for k, v in batch.items() if k != "source"})

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        (dls,) = (c for c in trainer.callbacks if isinstance(c, DynamicLayerSelection))
        self.active.append(dls.active)

    def on_train_end(self, trainer, pl_module) -> None:
        parameters = dict(pl_module.named_parameters())
        self.dtypes = {plain(n): (p.dtype, is_adapter_key(n)) for n, p in parameters.items()}
        self.local = sum(
            (p.to_local() if isinstance(p, DTensor) else p).numel() for p in parameters.values()
        )
        with FullyShardedDataParallel.summon_full_params(pl_module):
            whole = {
                plain(n): (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
                for n, p in pl_module.named_parameters()
            }
        self.adapters = {n: p for n, p in whole.items() if is_adapter_key(n)}
        self.trained = self.adapters or whole


def arguments(dtype: str) -> list[str]:
    """The demonstration's configuration, for a few steps on two processes."""
    settings = {
        "model.dtype": dtype,
        "data.batch_size": 4,
        "optimizer.eps": 0.001,  # small differences of small gradients stay small
        "lr_scheduler": "rosa_lightning.WarmupCosine",
        "lr_scheduler.total_steps": STEPS,
        "trainer.devices": 2,
        "trainer.max_steps": STEPS,
        "trainer.gradient_clip_val": 0.05,
        "trainer.limit_val_batches": 2,
        "trainer.val_check_interval": 3,
        "trainer.accumulate_grad_batches": 1,
        "trainer.enable_progress_bar": False,
        "trainer.enable_model_summary": False,
        "dls.num_active": 2,
        "dls.interval": 2,
        "dls.policy": "sample",
    }
    saves = {"every_n_train_steps": 1, "save_top_k": -1, "filename": "{step}"}
    callbacks = [
        {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": saves},
        {"class_path": "tests.distributed.test_sharding.Watch"},
    ]
    given = [str(word) for key, value in settings.items() for word in (f"--{key}", value)]
    return ["--config", str(CONFIGS / "tiny.yaml"), *given, f"--trainer.callbacks={callbacks}"]


def run(name: str, folder: Path, dtype: str, *more: str) -> dict:
    common = [*arguments(dtype), "--trainer.default_root_dir", str(folder)]
    strategy = ["--trainer.logger=false", "--trainer.strategy", STRATEGIES[name]]
    assert main(["fit", *common, *strategy, *more]) == 0
    watch = Watch.last
    kept = ("batches", "active", "adapters", "dtypes", "local")
    return {key: getattr(watch, key) for key in kept}


def no_loading(*args, **kwargs):
    raise AssertionError("only rank 0 loads the base")


def on_every_strategy(folder: Path) -> dict:
    import rosa_lightning.adapted

    if ranks.rank():
        rosa_lightning.adapted.load_base = no_loading
    seen = {}
    for name in STRATEGIES:
        place = folder / name.replace(" ", "_")
        straight = run(name, place, "bfloat16")
        (path,) = place.rglob("step=3.ckpt")
        resumed = run(name, place / "resumed", "bfloat16", "--ckpt_path", str(path))
        seen[name] = {"straight": straight, "resumed": resumed, "path": path}
    for name in ("ddp", "fsdp1 full", "fsdp2 sharded"):
        seen[name]["float32"] = run(name, folder / f"{name[:5]}32", "float32")
    seen["codes"] = [full_run(name, folder) for name in ("fsdp1 full", "fsdp2 sharded")]
    seen["refused"] = [
        fails(folder, "fsdp2 full", "fit", "--ckpt_path", str(misnamed(seen, folder))),
        fails(folder, "fsdp1 full", "test"),
    ]
    return seen


def full_run(name: str, folder: Path) -> int:
    """The full configuration on the embedded base, activations computed again."""
    settings = {
        "model.base": "tiny",
        "model.speed.gradient_checkpointing": "true",
        "data.sources": "demo",
        "data.test_sources": "null",
        "data.batch_size": 2,
        "trainer.accelerator": "cpu",
        "trainer.devices": 2,
        "trainer.max_steps": 2,
        "trainer.limit_val_batches": 1,
        "trainer.strategy": STRATEGIES[name],
        "trainer.default_root_dir": folder / "full" / name[:5],
    }
    given = [str(word) for key, value in settings.items() for word in (f"--{key}", value)]
    return main(["fit", "--config", str(CONFIGS / "rosa.yaml"), *given])


def misnamed(seen: dict, folder: Path) -> Path:
    """A checkpoint of which one key is wrong."""
    saved = torch.load(seen["fsdp2 full"]["path"], weights_only=True)
    saved["state_dict"]["model.other"] = saved["state_dict"].popitem()[1]
    path = folder / f"misnamed{ranks.rank()}.ckpt"
    torch.save(saved, path)
    return path


def fails(folder: Path, name: str, command: str, *more: str) -> str:
    """The one line that a run ends with."""
    given = [*arguments("float32"), "--trainer.strategy", STRATEGIES[name], *more]
    error = io.StringIO()
    with contextlib.redirect_stderr(error):
        place = ["--trainer.logger=false", "--trainer.default_root_dir", str(folder / "refused")]
        assert main([command, *given, *place]) == 1
    return error.getvalue().strip().splitlines()[-1]


class Joint(RoSAModule):
    """Trains on what all ranks trained on; on whole rows, if wanted, as models in shards do."""

    whole_rows = False

    def on_fit_start(self):
        super().on_fit_start()
        self.loss_computer.support.sharded = self.whole_rows

    def training_step(self, batch, batch_idx):
        return torch.stack([self.loss(one) for one in batch]).mean()

    def on_train_batch_end(self, outputs, batch, batch_idx):
        pass


def reference(
    runs: list[dict], *, whole_rows: bool = False, dtype: str = "bfloat16", **options
) -> dict[str, torch.Tensor]:
    """What one process trains on what all ranks trained on."""
    seed_everything(0)
    roae = RoAEConfig(rank=16, alpha=32.0, low_freq_ratio=0.5)
    optimizer = partial(torch.optim.AdamW, lr=3e-3, weight_decay=0.0, eps=1e-3)
    schedule = partial(WarmupCosine, total_steps=STEPS)
    module = Joint("tiny", roae, dtype=dtype, **options)
    module.make_optimizer, module.make_lr_scheduler = optimizer, schedule
    module.whole_rows = whole_rows
    pairs = list(zip(*(rank["batches"] for rank in runs), strict=True))
    dls = DynamicLayerSelection(num_active=2, interval=2, policy="sample")
    limits = {"max_steps": STEPS, "limit_val_batches": 0, "gradient_clip_val": 0.05}
    run = trainer(Path(), callbacks=[dls], **limits)
    run.fit(module, DataLoader(pairs, batch_size=None))
    return {n: p.detach() for n, p in module.named_parameters() if is_adapter_key(n)}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
def test_the_shipped_configurations_train_alike_under_every_strategy(tmp_path):
    seen = ranks.launch(on_every_strategy, tmp_path)
    runs = [rank["ddp"]["straight"] for rank in seen]
    references = {
        whole_rows: reference(runs, whole_rows=whole_rows) for whole_rows in (False, True)
    }
    for name in STRATEGIES:
        expected = references["fsdp" in name]
        straight, resumed = seen[0][name]["straight"], seen[0][name]["resumed"]
        assert straight["active"] == seen[1][name]["straight"]["active"]
        assert len(set(straight["active"])) > 1
        assert straight["adapters"].keys() == expected.keys()
        for key, value in straight["adapters"].items():
            # FSDP2 computes on views of other alignment, which bfloat16 rounds otherwise.
            near = 2e-4 if "fsdp2" in name else 1e-6
            assert_close(value, expected[key], rtol=0, atol=near, msg=f"{name} {key}")
            assert torch.equal(value, seen[1][name]["straight"]["adapters"][key])
            assert torch.equal(value, resumed["adapters"][key]), f"{name} {key}"
        assert resumed["active"] == straight["active"][3:]
        assert set(straight["dtypes"].values()) == {(torch.float32, True), (torch.bfloat16, False)}
        total = sum(rank[name]["straight"]["local"] for rank in seen)
        whole = sum(rank["ddp"]["straight"]["local"] for rank in seen)
        assert (total < 0.6 * whole) == (name != "ddp")
    for name in ("fsdp1 full", "fsdp2 sharded"):
        for key, value in seen[0][name]["float32"]["adapters"].items():
            plain_value = seen[0]["ddp"]["float32"]["adapters"][key]
            assert_close(value, plain_value, rtol=0, atol=1e-6, msg=f"{name} {key}")
    for rank in seen:
        assert rank["codes"] == [0, 0]
        assert "model.other is unknown" in rank["refused"][0]
        assert "FSDPStrategy cannot write answers" in rank["refused"][1]
    for name in ("ddp", "fsdp1 full", "fsdp2 full"):
        saved = torch.load(seen[0][name]["path"], weights_only=True)["state_dict"]
        assert saved.keys() == expected.keys()
        RoSAModule.load_from_checkpoint(seen[0][name]["path"])
    for name in ("fsdp1 sharded", "fsdp2 sharded"):
        size = sum(path.stat().st_size for path in seen[0][name]["path"].iterdir())
        assert size < 2_000_000


def after_norms(folder: Path) -> dict:
    given = ["--model.base", str(folder / "base"), "--model.roae.placement", "state"]
    kinds = [(name, "float32") for name in ("ddp", "fsdp1 full", "fsdp2 sharded")]
    kinds += [(name, "bfloat16") for name in ("ddp", "fsdp2 sharded")]
    return {kind: run(kind[0], folder / "-".join(kind), kind[1], *given) for kind in kinds}


@pytest.mark.slow
def test_terms_after_norms_train_alike_under_every_strategy(tmp_path):
    build("qwen3", vocab_size=822, max_position_embeddings=512).save_pretrained(tmp_path / "base")
    tiny = files("rosa_lightning") / "models" / "tiny"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        copy(tiny / name, tmp_path / "base")
    for seen in ranks.launch(after_norms, tmp_path):
        for (_, dtype), found in seen.items():
            wanted, near = seen["ddp", dtype]["adapters"], 1e-6 if dtype == "float32" else 2e-4
            assert_close(found["adapters"], wanted, rtol=0, atol=near)
            assert any(value.any() for name, value in wanted.items() if name.endswith("roae_B"))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_travels_without_its_values(family):
    model = build(family)
    inject_roae(model, RoAEConfig(rank=2))
    message = sharding.pickle_without_values((model,))
    assert len(message) < 300_000
    (received,) = pickle.loads(message)
    assert repr(received) == repr(model)
    sent = dict(model.named_parameters(remove_duplicate=False))
    for name, weight in received.named_parameters(remove_duplicate=False):
        assert weight.is_meta
        found, wanted = ((w.shape, w.dtype, w.requires_grad) for w in (weight, sent[name]))
        assert found == wanted
    assert len(list(received.parameters())) == len(list(model.parameters()))  # ties are kept
    for name, buffer in model.named_buffers():
        assert torch.equal(received.get_buffer(name), buffer)
