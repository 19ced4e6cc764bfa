from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
import torch
from lightning.fabric.utilities.load import _lazy_load
from safetensors.torch import load_file, save_file

from rosa_lightning import RoSAModule
from rosa_lightning.models.finite import check_states, check_weights
from rosa_lightning.models.loading import load_base
from tests.test_module import data, module, trainer


@pytest.fixture
def checkpoint(base_folder, sources, tmp_path) -> Path:
    run = trainer(tmp_path, max_steps=1)
    run.fit(module(base_folder), data(sources))
    run.save_checkpoint(tmp_path / "c.ckpt")
    return tmp_path / "c.ckpt"


def spoil(path: Path, change) -> str:
    """Change the second weight of a checkpoint; returns its name."""
    saved = torch.load(path, weights_only=True)
    name = list(saved["state_dict"])[1]
    saved["state_dict"][name] = change(saved["state_dict"][name])
    torch.save(saved, path)
    return name


def ending_in(value: float):
    return lambda weight: torch.cat([weight[:-1], torch.full_like(weight[-1:], value)])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (ending_in(math.nan), "not finite"),
        (ending_in(-math.inf), "not finite"),
        (lambda weight: ending_in(1e300)(weight.double()), "not finite in float32"),
        (lambda weight: weight.int(), "has dtype torch.int32"),
        (lambda weight: weight > 0, "has dtype torch.bool"),
        (lambda weight: weight.to(torch.complex64), "has dtype torch.complex64"),
        (lambda weight: "a string", r"is no tensor|has shape \(\)"),
    ],
)
def test_a_checkpoint_whose_weights_are_no_finite_floats_is_refused(
    checkpoint, base_folder, sources, tmp_path, change, message
):
    name = spoil(checkpoint, change)
    with pytest.raises(ValueError, match=rf"{name} .*{message}"):
        RoSAModule.load_from_checkpoint(checkpoint)
    with pytest.raises(ValueError, match=rf"{name} .*{message}"):
        trainer(tmp_path).fit(module(base_folder), data(sources), ckpt_path=checkpoint)


def test_a_checkpoint_whose_optimizer_remembers_nan_is_refused(
    checkpoint, base_folder, sources, tmp_path
):
    saved = torch.load(checkpoint, weights_only=True)
    saved["optimizer_states"][0]["state"][1]["exp_avg"].view(-1)[0] = math.nan
    torch.save(saved, checkpoint)
    with pytest.raises(ValueError, match=r"optimizer_states\.0\.state\.1\.exp_avg .*holds NaN"):
        trainer(tmp_path).fit(module(base_folder), data(sources), ckpt_path=checkpoint)


def spoilt_base(base_folder: Path, folder: Path, name: str, value: float, dtype=None) -> Path:
    shutil.copytree(base_folder, folder)
    file = folder / "model.safetensors"
    weights = load_file(file)
    if dtype is not None:
        weights = {key: weight.to(dtype) for key, weight in weights.items()}
    weights[name].view(-1)[-1] = value
    save_file(weights, file, {"format": "pt"})
    return folder


@pytest.mark.parametrize("name", ["model.layers.2.mlp.up_proj.weight", "model.norm.weight"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_base_with_nan_or_infinity_is_refused_by_the_weight(
    base_folder, tmp_path, name, value, dtype
):
    folder = spoilt_base(base_folder, tmp_path / "base", name, value, dtype)
    with pytest.raises(ValueError, match=rf"base .* holds NaN or infinity in {name}"):
        load_base(str(folder), dtype=str(dtype).partition(".")[2])


def test_a_base_too_large_for_the_data_type_is_refused(base_folder, tmp_path):
    name = "model.norm.weight"
    folder = spoilt_base(base_folder, tmp_path / "base", name, 1e38, torch.bfloat16)
    with pytest.raises(ValueError, match=rf"{name} \(torch\.float16\).*model\.dtype"):
        load_base(str(folder), dtype="float16")


def test_saving_refuses_adapters_that_are_not_finite_and_keeps_the_older_file(
    base_folder, sources, tmp_path
):
    built = module(base_folder)
    run = trainer(tmp_path, max_steps=1)
    run.fit(built, data(sources))
    run.save_checkpoint(tmp_path / "c.ckpt")
    before = (tmp_path / "c.ckpt").read_bytes()
    name = list(built.state_dict())[3]
    with torch.no_grad():
        dict(built.named_parameters())[name].view(-1)[0] = math.nan
    with pytest.raises(ValueError, match=rf"{name} holds values that are not finite"):
        run.save_checkpoint(tmp_path / "c.ckpt")
    assert (tmp_path / "c.ckpt").read_bytes() == before


@pytest.mark.parametrize("value", [0.5, math.nan])
def test_tensors_that_are_read_at_first_use_are_looked_at_too(value, tmp_path):
    """Lightning reads a whole checkpoint so for FSDP1."""
    weights = {"a": torch.ones(3), "b": torch.tensor([1.0, value])}
    torch.save({"state_dict": weights, "states": [{"state": {0: weights}}]}, tmp_path / "c.ckpt")
    lazy = _lazy_load(tmp_path / "c.ckpt")
    if value == 0.5:
        check_weights(lazy["state_dict"])
        check_states(lazy["states"])
        return
    with pytest.raises(ValueError, match=r"^b holds values that are not finite"):
        check_weights(lazy["state_dict"])
    with pytest.raises(ValueError, match=r"optimizer_states\.0\.state\.0\.b .*holds NaN"):
        check_states(lazy["states"])
