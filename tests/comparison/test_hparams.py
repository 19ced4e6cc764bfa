"""TensorBoard's HParams of a run, as TensorBoard reads them."""

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.metadata import (
    parse_experiment_plugin_data,
    parse_session_start_info_plugin_data,
)

from rosa_lightning.comparison.hparams import EVENTS, write_experiment, write_run
from rosa_lightning.comparison.plan import Method

RESULT = {
    "learning_rate": 1e-3,
    "seed": 2,
    "trainable_parameters": 800,
    "steps": 50,
    "val_loss": 0.75,
    "val_accuracy": None,
    "train_seconds": 12.5,
    "peak_mib": None,
    "backward_share": 1.0,
}
TASKS = [{"protocol": "generate", "task": "svamp", "accuracy": 0.25, "n": 60}]


def read(folder):
    """What TensorBoard finds: contents by tag, and the scalars."""
    log = EventAccumulator(str(folder))
    log.Reload()
    found = {tag: one.plugin_data.content for tag, one in log.summary_metadata.items()}
    return found, {tag: log.Scalars(tag)[-1] for tag in log.Tags()["scalars"]}


def settings(found):
    start = parse_session_start_info_plugin_data(found["_hparams_/session_start_info"])
    return {name: one.string_value or one.number_value for name, one in start.hparams.items()}


def test_settings_of_a_run_and_what_came_of_them(tmp_path):
    result = RESULT | {"tasks": TASKS, "text_loss": {"loss": 2.5}}
    write_run(tmp_path, Method("LoRA (q, k)", {}, 4, 800), result)
    found, scalars = read(tmp_path)
    assert settings(found) == {
        "method": "LoRA (q, k)",
        "rank": 4,
        "learning_rate": 1e-3,
        "seed": 2,
        "trainable_parameters": 800,
        "steps": 50,
    }
    assert {tag: event.value for tag, event in scalars.items()} == {
        "result/val_loss": 0.75,
        "result/train_seconds": 12.5,
        "result/backward_share": 1.0,
        "result/text_loss": 2.5,
        "result/generate/svamp": 0.25,
    }
    assert {event.step for event in scalars.values()} == {50}


def test_they_are_written_anew_when_there_is_more(tmp_path):
    method = Method("full fine-tuning", {}, None, 800)
    write_run(tmp_path, method, RESULT)
    first = (tmp_path / EVENTS).read_bytes()
    write_run(tmp_path, method, RESULT)
    assert (tmp_path / EVENTS).read_bytes() == first
    write_run(tmp_path, method, RESULT | {"tasks": TASKS})
    found, scalars = read(tmp_path)
    assert "rank" not in settings(found)
    assert scalars["result/generate/svamp"].value == pytest.approx(0.25)
    assert len([*tmp_path.iterdir()]) == 1


def test_the_experiment_has_the_settings_and_metrics_of_all_runs_and_no_other(tmp_path):
    failed = {"status": "failed", "learning_rate": 1e-3, "seed": 0, "val_loss": None}
    rows = {
        "A": {"rank": None, "grid": [failed, RESULT], "runs": []},
        "B": {"rank": 4, "grid": [], "runs": [RESULT | {"tasks": TASKS}]},
    }
    write_experiment(tmp_path, rows)
    found, scalars = read(tmp_path)
    assert not scalars
    experiment = parse_experiment_plugin_data(found["_hparams_/experiment"])
    assert {info.name.tag for info in experiment.metric_infos} == {
        *("result/val_loss", "result/train_seconds", "result/backward_share"),
        "result/generate/svamp",
    }
    assert {info.name for info in experiment.hparam_infos} == {
        *("method", "rank", "learning_rate", "seed", "trainable_parameters", "steps"),
    }


def test_a_run_that_failed_has_none(tmp_path):
    failed = {"status": "failed", "learning_rate": 1e-3, "seed": 0, "val_loss": None}
    write_run(tmp_path, Method("A", {}, 4, 8), failed)
    assert not [*tmp_path.iterdir()]
