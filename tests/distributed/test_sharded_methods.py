"""Methods of PEFT and full fine-tuning in shards: trained and resumed as under DDP."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from rosa_lightning.cli.main import main
from rosa_lightning.training.loss import LossComputer
from tests import ranks
from tests.distributed.test_sharding import STRATEGIES, Watch, arguments, fails

_LORA = "r: 4, target_modules: [q_proj, k_proj, v_proj, up_proj, down_proj]"
WAYS = {
    "LoRA": f"--model.peft={{class_path: peft.LoraConfig, init_args: {{{_LORA}}}}}",
    "SHiRA": f"--model.peft={{class_path: peft.ShiraConfig, init_args: {{{_LORA}}}}}",
    "full": "--model.finetune=full",
}
RUNS = [
    *(("LoRA", name, "float32") for name in ("ddp", "fsdp1 full", "fsdp2 sharded", "fsdp2 full")),
    *(("SHiRA", name, "float32") for name in ("ddp", "fsdp2 sharded")),
    *(("full", name, "float32") for name in ("ddp", "fsdp1 full", "fsdp2 sharded")),
    *(("LoRA", name, "bfloat16") for name in ("ddp", "fsdp2 sharded")),
]


def run(way: str, name: str, dtype: str, folder: Path, *more: str) -> dict:
    given = [*arguments(dtype), WAYS[way], "--trainer.logger=false"]
    given += ["--trainer.default_root_dir", str(folder), "--trainer.strategy", STRATEGIES[name]]
    assert main(["fit", *given, *more]) == 0
    watch = Watch.last
    return {key: getattr(watch, key) for key in ("active", "trained", "local")}


def on_every_strategy(folder: Path) -> dict:
    # Models in shards run as written, and rounding in bfloat16 grows with the steps.
    LossComputer._look = lambda computer, ids_BT: None
    seen = {}
    for number, kind in enumerate(RUNS):
        place = folder / str(number)
        seen[kind] = {"straight": run(*kind, place)}
        (path,) = place.rglob("step=3.ckpt")
        more = ("--ckpt_path", str(path))
        seen[kind] |= {"resumed": run(*kind, place / "resumed", *more), "path": path}
    bfloat16 = ("--model.dtype", "bfloat16", WAYS["LoRA"])
    seen["refused"] = fails(folder, "fsdp1 full", "fit", *bfloat16)
    return seen


@pytest.mark.slow
def test_other_methods_train_alike_under_every_strategy(tmp_path):
    """Oracle: DDP, which is compared with a single process elsewhere."""
    seen = ranks.launch(on_every_strategy, tmp_path, 1800)
    for kind in RUNS:
        way, name, dtype = kind
        expected = seen[0][way, "ddp", dtype]
        straight, resumed = seen[0][kind]["straight"], seen[0][kind]["resumed"]
        assert straight["active"] == expected["straight"]["active"]
        assert len(set(straight["active"])) > 1
        assert straight["trained"].keys() == expected["straight"]["trained"].keys()
        near = 1e-6 if dtype == "float32" else 2e-4
        for key, value in straight["trained"].items():
            assert_close(
                value,
                expected["straight"]["trained"][key],
                rtol=0,
                atol=near,
                msg=lambda m, at=(kind, key): f"{at}: {m}",
            )
            assert torch.equal(value, seen[1][kind]["straight"]["trained"][key])
            assert torch.equal(value, resumed["trained"][key]), f"{kind} {key}"
        total, whole = (
            sum(r[k]["straight"]["local"] for r in seen) for k in (kind, (way, "ddp", dtype))
        )
        assert (total < 0.6 * whole) == (name != "ddp")
    for rank in seen:
        assert "joins the weights of a unit in one data type" in rank["refused"]
        assert "Set trainer.strategy to ModelParallelStrategy" in rank["refused"]
    kinds = ("LoRA", "ddp", "float32"), ("LoRA", "fsdp2 full", "float32")
    states = [torch.load(seen[0][kind]["path"], weights_only=True)["state_dict"] for kind in kinds]
    assert states[0].keys() == states[1].keys()
