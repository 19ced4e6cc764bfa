from __future__ import annotations

import copy
import io
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn

from rosa_lightning.adapters.resume_checks import check_entries, check_states_fit
from rosa_lightning.cli.main import main
from tests.conftest import write_records


@pytest.fixture(scope="module")
def checkpoint(base_folder, tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    """A checkpoint of a training as users run it, its path and its content."""
    folder = tmp_path_factory.mktemp("run")
    argv, sys.argv = sys.argv, ["rosa"]
    assert main(["fit", *arguments(base_folder, folder, steps=1)]) == 0
    sys.argv = argv
    (path,) = folder.rglob("*.ckpt")
    return path, torch.load(path, weights_only=True)


def arguments(base_folder: Path, folder: Path, steps: int) -> list[str]:
    source = folder / "r.json"
    if not source.exists():
        write_records(source, 12)
    quiet = ("logger", "enable_progress_bar", "enable_model_summary")
    return [
        *("--model.base", str(base_folder), "--model.roae.rank", "2", "--data.batch_size", "4"),
        *("--data.sources", str(source), "--data.val_fraction", "0.2"),
        *("--data.loading.cache_dir", "null"),
        *("--trainer.accelerator", "cpu", "--trainer.max_steps", str(steps)),
        *(word for name in quiet for word in (f"--trainer.{name}", "false")),
        *("--trainer.default_root_dir", str(folder), "--trainer.log_every_n_steps", "1"),
    ]


def shapes(content: dict[str, Any]) -> list[tuple[int, ...]]:
    return [tuple(value.shape) for value in content["state_dict"].values()]


def a_trainer() -> Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return Trainer(accelerator="cpu", enable_model_summary=False, **quiet)


def check(content: dict[str, Any]) -> None:
    """Check a checkpoint as a training does that goes on from it."""
    check_entries(content, a_trainer(), content["state_dict"].keys())
    weights = [nn.Parameter(torch.zeros(shape)) for shape in shapes(content)]
    check_states_fit(content, a_run(torch.optim.AdamW(weights)))


def changed(content: dict[str, Any], path: str, *value: Any) -> dict[str, Any]:
    """A copy with another value at a path, or without it."""
    content = copy.deepcopy(content)
    place: Any = content
    *rest, last = [int(key) if key.isdigit() else key for key in path.split("/")]
    for key in rest:
        place = place[key]
    if value:
        place[last] = value[0]
    else:
        del place[last]
    return content


def test_what_was_written_passes(checkpoint):
    content = checkpoint[1]
    check(content)
    for dropped in ("rosa/nonfinite_steps", "ReasoningDataModule/trained_on", "rosa/conditions"):
        older = changed(content, dropped)
        check(older)


OPTIMIZERS = sorted(
    name
    for name, kind in vars(torch.optim).items()
    if isinstance(kind, type) and kind is not torch.optim.Optimizer
)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_any_optimizer_of_torch_remembers_passes(checkpoint, name):
    weights = [nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(2, 2))]
    optimizer = getattr(torch.optim, name)(weights)
    for weight in weights:
        grad = torch.ones_like(weight)
        weight.grad = grad.to_sparse() if name == "SparseAdam" else grad
    optimizer.step(lambda: torch.tensor(1.0))
    state = torch.load(saved(optimizer.state_dict()), weights_only=True)
    content = changed(checkpoint[1], "optimizer_states", [state])
    check_states_fit(content, a_run(optimizer))
    forgotten = changed(content, "optimizer_states/0/state", {})
    if state["state"]:
        with pytest.raises(ValueError, match="state is empty after 1 steps"):
            check_states_fit(forgotten, a_run(optimizer))
    else:
        check_states_fit(forgotten, a_run(optimizer))


def saved(content: Any) -> io.BytesIO:
    torch.save(content, file := io.BytesIO())
    file.seek(0)
    return file


def test_states_that_a_strategy_has_taken_from_shards_are_not_missed(checkpoint, tmp_path):
    content = changed(checkpoint[1], "optimizer_states")
    run = SimpleNamespace(ckpt_path=tmp_path, fit_loop=a_trainer().fit_loop)
    run.datamodule = None
    check_entries(content, run, content["state_dict"].keys())
    run.ckpt_path = tmp_path / "a file"
    with pytest.raises(ValueError, match="holds no entry optimizer_states"):
        check_entries(content, run, content["state_dict"].keys())


MISSING = ["epoch", "global_step", "loops", "callbacks", "optimizer_states", "lr_schedulers"]
WRONG = {
    "rosa/rng": [None, [{}]],
    "rosa/rng/0/torch": [torch.zeros(3)],
    "rosa/rng/0/python": [[3, [1, 2], None]],
    "rosa/rng/0/numpy": ["x"],
    "rosa/gradients": [[], [{"no such weight": torch.zeros(2)}]],
    "rosa/nonfinite_steps": ["many"],
    "loops": [[]],
    "loops/fit_loop": [None, {}],
    "loops/fit_loop/epoch_progress": [3],
    "loops/fit_loop/epoch_progress/total/completed": ["two"],
    "loops/fit_loop/epoch_loop.batch_progress/is_last_batch": [3],
    "callbacks/DynamicLayerSelection": [{}, 5],
    "optimizer_states/0": ["x"],
    "optimizer_states/0/state": [[]],
    "optimizer_states/0/state/15": [None],
    "optimizer_states/0/state/15/exp_avg": [torch.zeros(7)],
    "optimizer_states/0/param_groups": [[3]],
    "optimizer_states/0/param_groups/0/lr": ["0.1"],
    "lr_schedulers/0": [None],
    "lr_schedulers/0/last_epoch": ["x"],
    "lr_schedulers/0/_last_lr": [["x"]],
    "ReasoningDataModule": [{}, "x"],
    "ReasoningDataModule/seen": [{}, {"demo": "x"}],
    "ReasoningDataModule/order": [None],
    "ReasoningDataModule/trained_on": [[1]],
    "global_step": [10**15, 1.5],
    "epoch": [None],
}


@pytest.mark.parametrize("name", MISSING)
def test_an_entry_that_is_missing_is_named(checkpoint, name):
    with pytest.raises(ValueError, match=f"holds no entry {name}"):
        check(changed(checkpoint[1], name))


@pytest.mark.parametrize("path", WRONG)
def test_an_entry_that_holds_something_else_is_named(checkpoint, path):
    before = torch.get_rng_state()
    for value in WRONG[path]:
        entry = path.partition("/")[0]
        with pytest.raises(ValueError, match=f"the checkpoint's entry {entry}") as caught:
            check(changed(checkpoint[1], path, value))
        assert "\n" not in str(caught.value)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("rosa/rng/0/python", "entry rosa.rng"),
        ("optimizer_states/0/state/15/exp_avg", "optimizer_states[0].state.15 lacks exp_avg"),
    ],
)
def test_a_training_that_goes_on_from_it_ends_in_one_line(
    checkpoint, base_folder, tmp_path, monkeypatch, capsys, path, words
):
    monkeypatch.setattr(sys, "argv", ["rosa"])
    torch.save(changed(checkpoint[1], path), tmp_path / "damaged.ckpt")
    given = arguments(base_folder, tmp_path, steps=2)
    assert main(["fit", *given, "--ckpt_path", str(tmp_path / "damaged.ckpt")]) == 1
    (line,) = [one for one in capsys.readouterr().err.splitlines() if one.startswith("error: ")]
    assert words in line


def a_run(optimizer: torch.optim.Optimizer, schedulers: int = 1) -> Any:
    """As much of a trainer as is looked at."""
    schedule = SimpleNamespace(scheduler=torch.optim.lr_scheduler.ConstantLR(optimizer))
    return SimpleNamespace(optimizers=[optimizer], lr_scheduler_configs=[schedule] * schedulers)


def test_states_are_compared_with_those_they_are_restored_to(checkpoint):
    content = checkpoint[1]
    weights = [nn.Parameter(torch.zeros(shape)) for shape in shapes(content)]
    adam = a_run(torch.optim.AdamW(weights))
    check_states_fit(content, adam)
    group = "optimizer_states/0/param_groups/0"
    for path, value, entry in [
        ("optimizer_states", content["optimizer_states"] * 2, "optimizer_states holds 2 states"),
        ("optimizer_states/0/state", {}, r"optimizer_states\[0\].state is empty after 1 steps"),
        ("lr_schedulers", [], "lr_schedulers holds 0 states"),
        ("lr_schedulers", [{}], r"lr_schedulers\[0\] lacks last_epoch"),
        (f"{group}/eps", "x", "param_groups.eps is 'x', and no number"),
        (f"{group}/weight_decay", None, "param_groups.weight_decay is None, and no number"),
        (f"{group}/betas", 0.9, "param_groups.betas is 0.9, and no tuple"),
    ]:
        with pytest.raises(ValueError, match=f"the checkpoint's entry .*{entry}"):
            check_states_fit(changed(content, path, value), adam)
