from __future__ import annotations

import base64
import json
import math
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch.utils.tensorboard import SummaryWriter

from rosa_lightning import (
    DynamicLayerSelection,
    ReasoningDataModule,
    RoAEConfig,
    RunMonitor,
    RunRecorder,
    TokenThroughputMonitor,
)
from rosa_lightning.inspection.curves import Series
from rosa_lightning.inspection.report import read_run, write_report
from tests.conftest import rosa_module
from tests.hostile import limited, put

NUM_CHARTS = 17


@pytest.fixture(scope="module")
def runs(base_folder, sources, tmp_path_factory) -> dict[str, Path]:
    """The folders of one run that logged to TensorBoard and to CSV."""
    folder = tmp_path_factory.mktemp("runs")
    trainer = Trainer(
        accelerator="cpu",
        logger=[
            TensorBoardLogger(folder, name="", version="board"),
            CSVLogger(folder, name="", version="csv"),
        ],
        callbacks=[
            DynamicLayerSelection(num_active=2, interval=2),
            RunMonitor(),
            TokenThroughputMonitor(),
            RunRecorder(),
        ],
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        num_sanity_val_steps=0,
        val_check_interval=2,
        log_every_n_steps=1,
        max_steps=5,
    )
    data = ReasoningDataModule(sources=sources, batch_size=2, max_length=256, val_fraction=0.1)
    trainer.fit(rosa_module(base_folder, RoAEConfig(rank=4), max_new_tokens=2), data)
    # Numbers of the layers lie in the run's folder, that of the first logger.
    (folder / "csv" / "layers.jsonl").write_bytes((folder / "board" / "layers.jsonl").read_bytes())
    (folder / "board" / "config.yaml").write_text("model:\n  base: <script>alert('x')</script>\n")
    return {name: folder / name for name in ("board", "csv")}


@pytest.fixture(scope="module")
def pages(runs) -> dict[str, str]:
    """The report of each folder."""
    return {
        name: write_report(str(run), output=str(run.parent / f"{name}.html")).read_text()
        for name, run in runs.items()
    }


class Reader(HTMLParser):
    """Elements with their attributes, and all text."""

    def __init__(self, page: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += f"{data} "


@pytest.mark.parametrize("kind", ["board", "csv"])
def test_the_page_shows_everything_whichever_logger_wrote_it(pages, kind):
    page = Reader(pages[kind])
    images = [attributes for tag, attributes in page.elements if tag == "img"]
    assert len(images) == NUM_CHARTS
    for attributes in images:
        head, _, data = str(attributes["src"]).partition(",")
        assert head == "data:image/svg+xml;base64"
        assert base64.b64decode(data, validate=True)
    for tag in ("layers/score/00", "layers/update_norm/k/03", "learning rate", "train/lr"):
        assert tag in page.text


def test_the_page_needs_nothing_but_itself(pages):
    source = pages["board"]
    page = Reader(source)
    assert not {tag for tag, _ in page.elements} & {"script", "link", "iframe", "object"}
    addresses = [v for _, a in page.elements for k, v in a.items() if k in ("src", "href")]
    assert addresses
    assert all(str(address).startswith("data:") for address in addresses)
    assert not re.search(r"https?://|url\(|@import", source)


def test_what_users_wrote_is_shown_as_text(runs, tmp_path):
    run = tmp_path / "<i>run"
    run.mkdir()
    for file in runs["board"].iterdir():
        (run / file.name).write_bytes(file.read_bytes())
    page = Reader(write_report(str(run)).read_text())
    assert not {"script", "i"} & {tag for tag, _ in page.elements}
    assert "base: <script>alert('x')</script>" in page.text
    assert "Run <i>run" in page.text


def log(folder: Path, values: dict[str, dict[int, float]]) -> None:
    with SummaryWriter(str(folder)) as writer:
        for tag, logged in values.items():
            for step, value in logged.items():
                writer.add_scalar(tag, value, step)


def test_event_files_come_back_as_series_sorted_by_tag_and_step(tmp_path):
    log(tmp_path, {"b/x": {0: 1.0, 10: 0.5}, "a": {7: 3.0}})
    assert read_run(tmp_path) == {"a": Series((7,), (3.0,)), "b/x": Series((0, 10), (1.0, 0.5))}
    assert list(read_run(tmp_path)) == ["a", "b/x"]


def test_of_a_step_that_was_logged_again_after_a_resume_the_later_value_counts(tmp_path):
    log(tmp_path, {"loss": {0: 9.0, 10: 8.0, 20: 7.0}})
    (first,) = tmp_path.iterdir()
    first.rename(tmp_path / "events.out.tfevents.1000.host.0")
    log(tmp_path, {"loss": {10: 6.0, 30: 5.0}})
    assert read_run(tmp_path)["loss"] == Series((0, 10, 20, 30), (9.0, 6.0, 7.0, 5.0))


def test_metrics_csv_comes_back_with_its_holes(tmp_path):
    logger = CSVLogger(tmp_path, name="", version="run")
    logger.log_metrics({"loss": 2.5}, step=0)
    logger.log_metrics({"val/loss": math.nan}, step=4)
    logger.log_metrics({"loss": 1.5, "note": "some, text"}, step=9)
    logger.save()
    run = read_run(tmp_path / "run")
    assert run["loss"] == Series((0, 9), (2.5, 1.5))
    assert run["val/loss"].steps == (4,)
    assert math.isnan(run["val/loss"].values[0])
    assert set(run) == {"loss", "val/loss"}


@pytest.mark.parametrize("logger", [TensorBoardLogger, CSVLogger])
def test_a_prefix_of_the_logger_is_left_out(tmp_path, logger):
    logger = logger(tmp_path, name="", version="run", prefix="my-px")
    logger.log_metrics({"train/loss": 2.5, "weights/num_active": 1.0, "epoch": 0}, step=3)
    logger.save()
    assert set(read_run(tmp_path / "run")) == {"train/loss", "weights/num_active", "epoch"}


@pytest.mark.parametrize(
    "tags", [{"f-one", "f-two"}, {"train/loss-val/a"}, {"a-train/loss", "b-train/loss"}]
)
def test_hyphens_of_other_projects_stay(tmp_path, tags):
    log(tmp_path, {tag: {0: 1.0} for tag in tags})
    assert set(read_run(tmp_path)) == tags


def test_what_is_no_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="missing is no folder"):
        read_run(tmp_path / "missing")
    log(tmp_path, {"loss": {0: 1.0}})
    with pytest.raises(ValueError, match="is a folder"):
        write_report(str(tmp_path), output=str(tmp_path))


def test_of_a_folder_of_runs_the_newest_with_numbers_is_shown(tmp_path):
    with pytest.raises(ValueError, match="holds no logged number"):
        write_report(str(tmp_path))
    for age, name in ((300, "version_0"), (200, "version_1"), (100, "version_2")):
        if name == "version_2":  # of a run that has logged nothing
            (tmp_path / name).mkdir()
            (tmp_path / name / "events.out.tfevents.1.host").write_bytes(b"no events")
        else:
            log(tmp_path / name, {"loss": {0: 1.0}})
        (file,) = (tmp_path / name).iterdir()
        os.utime(file, (1e9 - age, 1e9 - age))
    assert write_report(str(tmp_path)) == tmp_path / "version_1" / "report.html"


RECORD = {
    "status": "finished",
    "settings": {"base": "org/model", "method": "LoRA", "r": 8, "learning_rate": 0.001},
    "started": "2026-03-01T10:00:00+00:00",
    "written": "2026-03-01T11:30:05+00:00",
    "step": 1200,
    "train_seconds": 3600.0,
    "examples": 19200,
    "peak_mib": 2048.0,
    "trainable_parameters": 1000,
    "total_parameters": 200000,
    "checkpoint": "/runs/a/checkpoints/step=800.ckpt",
    "validations": [
        {"step": 400, "val/loss": 0.9},
        {"step": 800, "val/loss": 0.5, "val/accuracy": 0.75},
        {"step": 1200, "val/loss": 0.6},
    ],
}


def test_what_was_trained_and_its_best_checkpoint_are_said_first(tmp_path):
    log(tmp_path, {"train/loss": {0: 1.0}})
    (tmp_path / "run.json").write_text(json.dumps(RECORD))
    text = Reader(write_report(str(tmp_path)).read_text()).text
    shown = " ".join(text.split())
    for words in (
        "Base org/model Method LoRA Parameters 1,000 of 200,000 train (0.50 %)",
        "Settings r 8, learning rate 0.001",
        "Best validation loss 0.5, accuracy 75.0 % at step 800",
        "Checkpoint /runs/a/checkpoints/step=800.ckpt",
        "Started 2026-03-01 10:00 UTC Duration 1:30:05, of which 1:00:00 in training",
        "Speed 5.333 examples per second, 2,048 MiB at most",
        "training loss 1 1 1 1 1",
    ):
        assert words in shown


def test_tests_of_the_runs_checkpoints_are_shown_and_those_of_others_are_not(tmp_path):
    for name, checkpoint in {"version_1": "version_0", "version_2": "elsewhere"}.items():
        path = tmp_path / name / "results.json"
        path.parent.mkdir()
        score = {"task": f"of {checkpoint}", "protocol": "generate", "accuracy": 0.25, "n": 1319}
        score |= {"interval": [0.22, 0.28], "contaminated": 0}
        model = f"org/model + {tmp_path}/{checkpoint}/checkpoints/best.ckpt"
        path.write_text(json.dumps({"model": model, "complete": True, "results": [score]}))
    log(tmp_path / "version_0", {"train/loss": {0: 1.0}})
    shown = " ".join(Reader(write_report(str(tmp_path / "version_0")).read_text()).text.split())
    assert "best.ckpt of version_0 generate 25.0 (22.0 to 28.0) 1,319 0" in shown
    assert "of elsewhere" not in shown


@pytest.mark.parametrize(
    "content", ["[]", "{", '{"settings": 3, "validations": [{"step": "x"}], "step": []}']
)
def test_a_record_that_is_none_is_left_out(tmp_path, content):
    log(tmp_path, {"train/loss": {0: 1.0}})
    (tmp_path / "run.json").write_text(content)
    (tmp_path / "results.json").write_text(content)
    (tmp_path / "layers.jsonl").write_text(
        f'{content}\n{{"step": 1, "tag": "score", "values": {{"x": 2}}}}\n'
        '{"step": 2, "tag": "score", "values": {"1": 2}}\n{"step": 3, "ta'
    )
    write_report(str(tmp_path))
    assert read_run(tmp_path)["layers/score/01"] == Series((2,), (2.0,))


def test_layers_are_in_the_order_of_their_numbers(tmp_path):
    log(tmp_path, {"train/loss": {0: 1.0}})
    row = {"step": 1, "tag": "score", "values": {str(layer): 1.0 for layer in (100, 9, 99, 11)}}
    (tmp_path / "layers.jsonl").write_text(json.dumps(row) + "\n")
    found = [tag.rpartition("/")[2] for tag in read_run(tmp_path) if tag.startswith("layers/")]
    assert found == ["09", "11", "99", "100"]


# Folders of strangers.


@pytest.mark.parametrize("name", ["metrics.csv", "events.out.tfevents.1.host", "a.tfevents.b"])
def test_what_is_no_file_is_named_at_once(tmp_path, name):
    log(tmp_path, {"loss": {0: 1.0}})
    put("a pipe", tmp_path / name)
    with limited(), pytest.raises(OSError, match=f"{name} is a pipe"):
        read_run(tmp_path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("step,loss,é\n1,2,3\n".encode("latin-1"), r"metrics\.csv is not UTF-8"),
        (b"step,loss\n1," + b"7" * 200_000, r"metrics\.csv is no table .*field larger than"),
        (b"step,loss\n1,\r2\n", r"metrics\.csv is no table"),
        (b"", "holds no logged number"),
        (b"step,loss\n-1,1\n" + b"9" * 300 + b",1\n", "holds no logged number"),
        (b"step\n1,2,3\n", "holds no logged number"),
    ],
)
def test_a_table_that_is_none_is_one_line(tmp_path, content, words):
    (tmp_path / "metrics.csv").write_bytes(content)
    with limited(), pytest.raises(ValueError, match=words) as caught:
        read_run(tmp_path)
    assert "\n" not in str(caught.value)
