from __future__ import annotations

import math

import pytest
import torch
from jsonargparse import Namespace

from rosa_lightning.cli.configuration import (
    check_classes,
    check_groups,
    check_optimizer,
    check_trainer_settings,
)
from rosa_lightning.utils.errors import ConfigurationError


@pytest.mark.parametrize(
    "trainer",
    [
        {"accumulate_grad_batches": 0},
        {"accumulate_grad_batches": -1},
        {"val_check_interval": 0},
        {"val_check_interval": 0.0},
        {"check_val_every_n_epoch": 0},
        {"log_every_n_steps": -1},
        {"max_steps": -2},
        {"gradient_clip_val": -1.0},
        {"gradient_clip_val": math.nan},
        {"num_sanity_val_steps": -2},
    ],
)
def test_numbers_that_lightning_would_take_and_stumble_over_are_refused(trainer):
    ((key, value),) = trainer.items()
    with pytest.raises(ConfigurationError, match=f"trainer.{key}={value} "):
        check_trainer_settings(trainer)


def test_special_values_are_taken():
    check_trainer_settings({"max_steps": -1, "gradient_clip_val": None, "val_check_interval": 0.5})
    check_trainer_settings({"check_val_every_n_epoch": None, "num_sanity_val_steps": -1})


@pytest.mark.parametrize("value", [2, None, "x", [], True])
@pytest.mark.parametrize("group", ["model", "model.roae", "model.evaluation", "data", "trainer"])
def test_a_value_in_place_of_a_group_is_refused(group, value):
    first, _, second = group.partition(".")
    values = {first: {second: value} if second else value}
    for given in (values, {"fit": values}):
        with pytest.raises(ConfigurationError, match=f"{group} is "):
            check_groups(given)
    check_groups({"model": {"roae": {"rank": 2}}, "trainer": {}, "seed_everything": 1})


def test_a_configuration_calls_classes_of_the_right_kind_alone():
    import shutil
    import subprocess  # loaded, as what a configuration names is

    assert shutil
    assert subprocess
    for path in ("subprocess.call", "subprocess.Popen", "shutil.rmtree", "torch.nn.Linear"):
        spec = Namespace(class_path=path, init_args=Namespace())
        for key in ("optimizer", "lr_scheduler"):
            with pytest.raises(ConfigurationError, match=f"{key}.class_path={path}"):
                check_classes({key: spec})
    nested = {"trainer": {"plugins": [{"class_path": "shutil.rmtree", "init_args": {}}]}}
    with pytest.raises(ConfigurationError, match=r"trainer.plugins: class_path=shutil.rmtree"):
        check_classes(nested)
    for key, path in [
        ("optimizer", "torch.optim.SGD"),
        ("lr_scheduler", "lightning.pytorch.cli.ReduceLROnPlateau"),
        ("lr_scheduler", "rosa_lightning.WarmupCosine"),
    ]:
        check_classes({key: Namespace(class_path=path, init_args=Namespace())})


def test_an_optimizer_for_matrices_alone_is_taken():
    check_optimizer(torch.optim.Muon)
    with pytest.raises(ConfigurationError, match="cannot be made: Invalid learning rate: -1"):
        check_optimizer(lambda parameters: torch.optim.SGD(parameters, lr=-1))
