from __future__ import annotations

import math

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from rosa_lightning.dls.length import planned_steps
from rosa_lightning.training.schedule import WarmupCosine, lightning_scheduler
from tests.dls.test_callback import Batches, Endless, Toy, batches, fit


class Planned(Callback):
    def on_train_start(self, trainer, pl_module):
        self.steps = planned_steps(trainer)


def plan(loader, *callbacks, **options):
    watch = Planned()
    trainer = fit(Toy(), loader, watch, *callbacks, **options)
    return watch.steps, trainer.global_step


@pytest.mark.parametrize(
    ("options", "schedule"),
    [
        ({"max_epochs": 2}, None),
        ({"max_epochs": 2, "accumulate_grad_batches": 3}, None),
        ({"max_epochs": 3, "limit_train_batches": 2}, None),
        ({"max_epochs": 3, "max_steps": 4}, None),
        ({"max_epochs": -1, "max_steps": 9}, None),
        ({"max_epochs": 4}, {1: 2, 2: 3}),
        ({"max_epochs": 4, "max_steps": 11}, {1: 2, 2: 3}),
        ({"max_epochs": -1, "max_steps": 6}, {1: 2}),
    ],
)
def test_a_run_stops_at_the_step_that_was_planned(options, schedule):
    extra = [GradientAccumulationScheduler(schedule)] if schedule else []
    steps, stopped = plan(Batches(batches(7)), *extra, **options)
    assert steps == stopped


def test_a_run_of_unknown_length_is_endless_unless_its_steps_are_counted():
    assert plan(Endless(batches(3)), max_epochs=2) == (math.inf, 6)
    assert plan(Endless(batches(3)), max_epochs=5, max_steps=4) == (4, 4)


def test_a_schedule_takes_the_planned_length_and_refuses_an_unknown_one():
    class Scheduled(Toy):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
            schedule = lightning_scheduler(WarmupCosine(optimizer, warmup=0), self.trainer)
            return {"optimizer": optimizer, "lr_scheduler": schedule}

    scheduler = GradientAccumulationScheduler({1: 4})
    module = Scheduled()
    trainer = fit(module, batches(4), scheduler, max_epochs=3)
    assert module.lr_schedulers().total_steps == trainer.global_step == 6
    with pytest.raises(ValueError, match=r"schedule has no length.*trainer\.max_steps"):
        fit(Scheduled(), Endless(batches(4)), max_epochs=2)
