from __future__ import annotations

import os
import time
from functools import partial
from pathlib import Path

from lightning.pytorch import Trainer
from torch.optim import SGD

from rosa_lightning import DynamicLayerSelection, RoAEConfig
from rosa_lightning.utils import agreement
from tests import ranks
from tests.conftest import data_module, rosa_module, save_base, write_records
from tests.dls.toys import Batches, Toy, batches

SAME: dict = {
    "trainer": {"max_steps": 2, "accumulate_grad_batches": 1},
    "dls": {"num_active": 2, "interval": 2},
    "module": {"roae": {"rank": 4}},
    "lr": 1e-3,
    "data": {"batch_size": 4, "val_fraction": 0.1},
    "file": "a/numbers.json",
    "seed_everything": "0",
}

CASES: dict[str, tuple[dict, str]] = {
    "max_steps": ({"trainer": {"max_steps": 3}}, "trainer.max_steps (2 on rank 0, 3 on rank 1)"),
    "precision": ({"trainer": {"precision": "bf16-mixed"}}, "trainer.precision (32-true on"),
    "interval": (
        {"dls": {"num_active": 2, "interval": 3}},
        "DynamicLayerSelection.interval (2 on rank 0, 3 on rank 1)",
    ),
    "no selection": ({"dls": None}, 'trainer.callbacks (["DynamicLayerSelection'),
    "rank": ({"module": {"roae": {"rank": 8}}}, "model.roae.rank (4 on rank 0, 8 on rank 1)"),
    "lr": ({"lr": 2e-3}, "optimizer.lr (0.001 on rank 0, 0.002 on rank 1)"),
    # Which would broadcast on one rank alone.
    "decontamination": (
        {"data": {"batch_size": 4, "val_fraction": 0.1, "decontaminate": False}},
        "data.loading.decontaminate (true on rank 0, false on rank 1)",
    ),
    "seed": ({"seed_everything": "1"}, "seed_everything (0 on rank 0, 1 on rank 1)"),
    "another file": ({"file": "b/numbers.json"}, "numbers (validation) (4 records, "),
    "no file": ({"file": "c/numbers.json"}, "rank 1 failed: "),
    "release": ({"release": "2.0"}, "torch (1.0 on rank 0, 2.0 on rank 1)"),
}


def trainer_of(folder: Path, **options) -> Trainer:
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    options |= {"strategy": ranks.ddp(), "default_root_dir": folder, **dict.fromkeys(quiet, False)}
    return Trainer(accelerator="cpu", devices=2, **options)


def error_of(command, *parts) -> str:
    """The one error that a command ends with; nothing if it runs through."""
    try:
        command(*parts)
    except (ValueError, RuntimeError) as error:
        return str(error)
    return ""


def fit(folder: Path, changes: dict) -> str:
    given = SAME | changes
    os.environ["PL_GLOBAL_SEED"] = given["seed_everything"]
    agreement._release = lambda name: given.get("release", "1.0")
    module = rosa_module(
        str(folder / "base"),
        RoAEConfig(**given["module"]["roae"]),
        optimizer=partial(SGD, lr=given["lr"]),
    )
    data = data_module(
        sources=[{"path": str(folder / given["file"]), "task": "gsm8k"}],
        test_sources=[{"path": str(folder / "test.json"), "task": "gsm8k"}],
        cache_dir=None,
        **given["data"],
    )
    callbacks = [] if given["dls"] is None else [DynamicLayerSelection(**given["dls"])]
    trainer = trainer_of(folder, callbacks=callbacks, **given["trainer"])
    return error_of(trainer.fit, module, data)


def other(folder: Path, command: str, sources: dict) -> str:
    module = rosa_module(folder / "base", max_new_tokens=2)
    data = data_module(batch_size=4, cache_dir=None, **sources)
    return error_of(getattr(trainer_of(folder), command), module, data)


def foreign(dls: DynamicLayerSelection | None) -> str:
    mine = [batch.chunk(2)[ranks.rank()] for batch in batches(4, rows=4)]
    callbacks = [] if dls is None else [dls]
    trainer = trainer_of(Path(), max_epochs=1, callbacks=callbacks)
    return error_of(trainer.fit, Toy(), Batches(mine))


def of_two_ranks(folder: Path) -> dict:
    second = ranks.rank() == 1
    if not second:
        save_base(folder / "making")
        for name, number in (("a/numbers", 40), ("b/numbers", 40), ("test", 3), ("one", 1)):
            (folder / name).parent.mkdir(exist_ok=True)
            output = "{}" if name[0] != "b" else "{}."
            write_records(folder / f"{name}.json", number, output)
        (folder / "making").rename(folder / "base")
    while not (folder / "base").exists():
        time.sleep(0.05)
    seen = {name: fit(folder, changes if second else {}) for name, (changes, _) in CASES.items()}
    seen["all alike"] = fit(folder, {"dls": None})
    one = {"test_sources": [{"path": str(folder / "one.json"), "task": "gsm8k"}]}
    seen["one prompt"] = other(folder, "test", one)
    seen["one to predict"] = other(
        folder, "predict", {"predict_sources": [str(folder / "one.json")]}
    )
    missing = {"predict_sources": [str(folder / ("none" if second else "a") / "numbers.json")]}
    seen["no prompts"] = other(folder, "predict", missing)
    prompts = {"predict_sources": [str(folder / "a" / "numbers.json")]}
    seen["validate"] = other(folder, "validate", prompts | {"val_fraction": 0.1 + second / 10})
    seen["foreign"] = foreign(DynamicLayerSelection(interval=2 + second, layers="layers"))
    # The last, as the ranks go separate ways.
    seen["foreign without"] = foreign(None if second else DynamicLayerSelection(layers="lay*"))
    return seen


def test_ranks_that_disagree_end_in_one_line_that_names_what(tmp_path):
    first, second = ranks.launch(of_two_ranks, tmp_path)
    for name, (_, wanted) in CASES.items():
        assert wanted in first[name]
        assert second[name] == first[name]
        assert "\n" not in first[name]
    assert "c/numbers.json" in first["no file"]
    assert "numbers (training) (33 records, " in first["another file"]
    assert first["all alike"] == second["all alike"] == ""
    assert "test_sources hold 1 prompts for 2 processes" in first["one prompt"]
    assert "predict_sources hold 1 prompts for 2 processes" in second["one to predict"]
    assert "rank 1 failed: " in first["no prompts"] == second["no prompts"]
    assert "data.val_fraction (0.1 on rank 0, 0.2 on rank 1)" in first["validate"]
    assert first["foreign"] == second["foreign"]
    assert "DynamicLayerSelection.interval (2 on rank 0, 3 on rank 1)" in first["foreign"]
    assert "DynamicLayerSelection (missing on rank 1)" in first["foreign without"]
