"""What W&B, MLflow, CSV and TensorBoard get of a run, as each of them reads it back."""

import csv
import json
import struct
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.metadata import (
    parse_experiment_plugin_data,
    parse_session_start_info_plugin_data,
)

from rosa_lightning import ReasoningDataModule
from rosa_lightning.cli.main import main
from rosa_lightning.data.settings import LoadingConfig
from rosa_lightning.inspection.charts import raster_figure
from rosa_lightning.inspection.loggers import RunBoard, log_picture, step_size
from rosa_lightning.inspection.report import read_run, write_report
from rosa_lightning.inspection.run_summary import next_commands

pytestmark = pytest.mark.filterwarnings("default")
PICTURES = {"layers_that_train", "layer_scores", "update_of_q", "update_of_k"}
CURVES = {
    *("train/loss", "train/lr", "train/examples_per_s", "val/loss", "weights/lowest_active"),
    *("weights/relative_update/q", "weights/relative_update/k"),
}


class Fails(Callback):
    def on_train_start(self, trainer, pl_module):
        raise ValueError("a defect")


def fit(folder: Path, base: Path, sources: list, *loggers: dict, more: Sequence[str] = ()) -> Path:
    """Train five steps in a folder; gives the one that the run has kept its files in."""
    settings = {
        "model": {"base": str(base), "roae": {"rank": 4}},
        "data": {"sources": sources, "batch_size": 4, "val_fraction": 0.1},
        "dls": {"num_active": 2, "interval": 2},
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
        "trainer": {
            "accelerator": "cpu",
            "max_steps": 5,
            "log_every_n_steps": 2,
            "val_check_interval": 2,
            "enable_progress_bar": False,
            "logger": [*loggers],
            "callbacks": [
                {"class_path": "rosa_lightning.RunMonitor"},
                {"class_path": "rosa_lightning.TokenThroughputMonitor"},
                *({"class_path": name} for name in more),
            ],
        },
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["rosa"])
        patch.setenv("WANDB_SILENT", "true")
        patch.setenv("WANDB_MODE", "offline")
        patch.chdir(folder)
        Path("given.yaml").write_text(yaml.safe_dump(settings))
        none = "--data.loading.val_generate=0"
        assert main(["fit", "--config", "given.yaml", none]) == 0
    (record,) = folder.rglob("run.json")
    return record.parent


@pytest.fixture(scope="module")
def services(base_folder, sources, tmp_path_factory) -> tuple[Path, Path]:
    """Where a run was started that logged to W&B, offline, and to MLflow; and the run's folder."""
    wandb = pytest.importorskip("wandb", reason="pip install wandb")
    pytest.importorskip("mlflow", reason="pip install mlflow")
    home = tmp_path_factory.mktemp("services")
    try:
        return home, fit(home, base_folder, sources, *at_services(home))
    finally:
        wandb.finish()


def at_services(home: Path) -> list[dict]:
    """Loggers of W&B, offline, and of MLflow with a local store."""
    store = {"tracking_uri": f"sqlite:///{home}/runs.db", "artifact_location": f"{home}/artifacts"}
    loggers = {"WandbLogger": {"offline": True, "save_dir": str(home)}, "MLFlowLogger": store}
    start = "lightning.pytorch.loggers."
    return [{"class_path": start + name, "init_args": args} for name, args in loggers.items()]


@pytest.fixture(scope="module")
def files(base_folder, sources, tmp_path_factory) -> dict[str, Path]:
    """The folders of a run that logged to TensorBoard and to CSV."""
    home = tmp_path_factory.mktemp("files")
    made = [
        {
            "class_path": f"lightning.pytorch.loggers.{name}Logger",
            "init_args": {"save_dir": str(home), "name": name},
        }
        for name in ("TensorBoard", "CSV")
    ]
    board = fit(home, base_folder, sources, *made)
    return {"TensorBoard": board, "CSV": home / "CSV" / "version_0"}


def test_what_logs_elsewhere_has_a_folder_for_each_run(services):
    home, folder = services
    assert folder.parent == home / "lightning_logs"  # the project
    names = {path.name for path in folder.iterdir()}
    assert {"config.yaml", "run.json", "layers.jsonl", "checkpoints"} <= names
    assert "learning rate 0.01" in write_report(str(folder)).read_text()


def test_mlflow_with_a_local_store_gets_settings_numbers_and_pictures(services):
    import mlflow

    home, folder = services
    client = mlflow.MlflowClient(f"sqlite:///{home}/runs.db")
    (experiment,) = client.search_experiments(filter_string="name = 'lightning_logs'")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert {name: run.data.params[name] for name in ("method", "rank", "learning_rate")} == {
        "method": "RoAE",
        "rank": "4",
        "learning_rate": "0.01",
    }
    assert not [name for name in run.data.params if "instantiator" in name]
    assert run.data.metrics.keys() >= CURVES
    logged = client.get_metric_history(run.info.run_id, "val/loss")
    record = json.loads((folder / "run.json").read_text())
    assert [one.value for one in logged] == [v["val/loss"] for v in record["validations"]]
    names = [Path(one.path).name for one in client.list_artifacts(run.info.run_id, "images")]
    assert {name.removeprefix("weights~").split("+")[0] for name in names} == PICTURES


def test_wandb_offline_gets_settings_numbers_and_pictures(services):
    home, folder = services
    (kept,) = (home / "wandb").glob(f"offline-run-*-{folder.name}")
    config, curves = read_wandb(kept / f"run-{folder.name}.wandb")
    assert (config["method"], config["rank"], config["learning_rate"]) == ("RoAE", 4, 0.01)
    assert "_instantiator" not in config
    assert curves >= CURVES
    names = [path.name for path in (kept / "files/media/images/weights").iterdir()]
    assert {name for name in PICTURES for kept in names if kept.startswith(name)} == PICTURES


def test_a_training_that_fails_leaves_no_run_of_its_own(services, base_folder, sources):
    import mlflow
    import wandb

    home, _ = services
    client = mlflow.MlflowClient(f"sqlite:///{home}/runs.db")

    def runs():
        (experiment,) = client.search_experiments(filter_string="name = 'lightning_logs'")
        return [one.info.run_id for one in client.search_runs([experiment.experiment_id])]

    def kept():
        return {one for one in home.rglob("*") if not one.is_symlink() and one.suffix != ".db"}

    before = runs(), kept()
    try:
        with pytest.raises(ValueError, match="a defect"):
            fit(home, base_folder, sources, *at_services(home), more=[f"{__name__}.Fails"])
        assert wandb.run is None
    finally:
        wandb.finish()
    assert (runs(), kept()) == before
    assert all(one.exists() for one in (home / "wandb").iterdir())  # no link leads nowhere


def read_wandb(path: Path) -> tuple[dict, set[str]]:
    """The configuration and the names of the curves in the file of an offline run."""
    from wandb.proto.wandb_internal_pb2 import Record

    config, curves = {}, set()
    for message in log_records(path.read_bytes()[7:], 7):
        record = Record.FromString(message)
        for update in (*record.run.config.update, *record.config.update):
            config[update.key] = json.loads(update.value_json)
        for item in record.history.item:
            curves.add(item.key or "/".join(item.nested_key))
    return config, curves


def log_records(content: bytes, start: int) -> Iterator[bytes]:
    """The records of a log in LevelDB's format: in blocks of 32 KiB, in parts where they end."""
    parts, at = b"", 0
    while at < len(content):
        left = 2**15 - (start + at) % 2**15
        if left < 7:  # too little for the head of a part
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", content[at : at + 7])
        parts += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def test_csv_gets_curves_in_its_table_and_pictures_beside_it(files):
    folder = files["CSV"]
    with (folder / "metrics.csv").open() as file:
        columns = set(next(csv.reader(file)))
    assert columns >= CURVES
    assert not [name for name in columns if name.startswith("layers/")]
    assert {path.stem for path in (folder / "pictures").glob("*.png")} == PICTURES
    assert yaml.safe_load((folder / "hparams.yaml").read_text())["learning_rate"] == 0.01
    assert set(read_run(folder)) >= CURVES


def test_tensorboard_opens_on_losses_and_speed_and_hparams_hold_settings_and_results(files):
    folder = files["TensorBoard"]
    log = EventAccumulator(str(folder))
    log.Reload()
    tags = log.Tags()
    assert set(tags["scalars"]) >= CURVES
    assert len(tags["scalars"]) < 25
    assert "epoch" not in tags["scalars"]  # also where the logger is given, as here
    # It shows groups in the order of the alphabet, and opens the first two.
    groups = sorted({tag.partition("/")[0] for tag in tags["scalars"] + tags["images"]})
    assert groups == ["train", "val", "weights"]
    assert {tag.removeprefix("weights/") for tag in tags["images"]} == PICTURES
    found = {tag: one.plugin_data.content for tag, one in log.summary_metadata.items()}
    start = parse_session_start_info_plugin_data(found["_hparams_/session_start_info"])
    settings = {k: one.string_value or one.number_value for k, one in start.hparams.items()}
    assert settings["method"] == "RoAE"
    assert settings["dls.interval"] == 2
    assert "_instantiator" not in settings
    assert settings == yaml.safe_load((folder / "hparams.yaml").read_text())
    assert read_run(folder)["layers/update_norm/q/03"].steps == (1, 3)
    experiment = parse_experiment_plugin_data(found["_hparams_/experiment"])
    metrics = {info.name.tag for info in experiment.metric_infos}
    assert {"train/loss", "val/loss", "train/examples_per_s"} <= metrics <= set(tags["scalars"])


def test_pictures_of_a_csv_run_are_those_that_were_drawn_last(tmp_path):
    figure = raster_figure([0], [3, 4], np.array([[True, False]]), np.array([[1.0, 0.5]]))
    loggers = [CSVLogger(tmp_path, name="", version="a"), RunBoard(tmp_path, "", "b")]
    for step in (1, 2):
        log_picture(loggers, "weights/layers_that_train", figure, step)
    assert len([*(tmp_path / "a" / "pictures").iterdir()]) == 1
    loggers[1].finalize("success")
    log = EventAccumulator(str(tmp_path / "b"), size_guidance={"images": 0})
    log.Reload()
    images = log.Images("weights/layers_that_train")
    assert [image.step for image in images] == [1, 2]
    assert images[0].width > 900


@pytest.mark.parametrize(
    ("given", "loading", "held"),
    [
        ({}, {}, (4 * 6, "examples")),
        ({"batching": "packed"}, {}, (4 * 6, "examples")),
        ({"batching": "best_fit"}, {}, (4 * 6, "packs")),
        ({}, {"tokens_per_batch": 900}, (900 * 6, "tokens")),
        ({"batching": "best_fit"}, {"tokens_per_batch": 900}, (3 * 6, "packs")),
    ],
)
def test_a_step_holds_all_batches_of_all_devices(given, loading, held):
    data = ReasoningDataModule(
        batch_size=4, max_length=300, loading=LoadingConfig(**loading), **given
    )
    trainer = SimpleNamespace(datamodule=data, accumulate_grad_batches=3, world_size=2)
    assert step_size(trainer) == held


def test_of_unknown_data_nothing_is_said_of_a_step():
    trainer = SimpleNamespace(datamodule=None, accumulate_grad_batches=3, world_size=2)
    assert step_size(trainer) is None
    trainer.datamodule = SimpleNamespace(batch_size=4)  # without our settings
    assert step_size(trainer) == (24, "examples")


def test_where_tensorboard_has_nothing_to_show_the_report_is_named(tmp_path):
    trainer = Trainer(logger=CSVLogger(tmp_path), enable_checkpointing=False)
    assert next_commands(trainer, None, tmp_path) == [f"python -m rosa_lightning report {tmp_path}"]
    (tmp_path / "events.out.tfevents.1").touch()
    (command,) = next_commands(trainer, None, tmp_path)
    assert command.startswith("tensorboard --logdir")


def test_a_test_adds_no_group_before_the_losses(tmp_path):
    board = RunBoard(tmp_path, "", "b")
    board.log_metrics({"epoch": 0, "test/accuracy": 0.5})
    board.log_metrics({"epoch": 0, "val/loss": 2.0}, step=3)
    board.finalize("success")
    log = EventAccumulator(str(tmp_path / "b"))
    log.Reload()
    assert log.Tags()["scalars"] == ["val/loss"]
