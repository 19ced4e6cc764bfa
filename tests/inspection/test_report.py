from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from PIL import Image

from rosa_lightning import (
    DynamicLayerSelection,
    ReasoningDataModule,
    RoAEConfig,
    RoSAModule,
    RunMonitor,
    ThroughputMonitor,
)
from rosa_lightning.inspection import report
from rosa_lightning.inspection.report import write_report

CHARTS = {
    "loss",
    "accuracy",
    "learning_rate",
    "active_layers",
    "selection_counts",
    "scores",
    "backward_saved",
    "relative_update_q",
    "relative_update_k",
    "update_norm_q",
    "update_norm_k",
    "examples",
    "tokens",
    "padding",
    "memory",
}


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
            ThroughputMonitor(),
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
    trainer.fit(RoSAModule(str(base_folder), RoAEConfig(rank=4)), data)
    (folder / "board" / "config.yaml").write_text("model:\n  base: <script>alert('x')</script>\n")
    return {name: folder / name for name in ("board", "csv")}


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
        self.text += data


@pytest.mark.parametrize("kind", ["board", "csv"])
def test_the_page_shows_everything_whichever_logger_wrote_it(runs, kind, tmp_path):
    page = Reader(write_report(str(runs[kind]), output=str(tmp_path / "r.html")).read_text())
    images = [attributes for tag, attributes in page.elements if tag == "img"]
    assert len(images) == len(CHARTS)
    for attributes in images:
        head, _, data = str(attributes["src"]).partition(",")
        assert head in ("data:image/svg+xml;base64", "data:image/png;base64")
        assert base64.b64decode(data, validate=True)
    for tag in ("dls/score/00", "roae/update_norm/03/k", "val/accuracy/boolq", "train/lr"):
        assert tag in page.text


def test_the_page_needs_nothing_but_itself(runs, tmp_path):
    source = write_report(str(runs["board"]), output=str(tmp_path / "r.html")).read_text()
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


def test_pictures_go_into_a_folder(runs, tmp_path):
    folder = write_report(str(runs["board"]), output=str(tmp_path / "new" / "r"), format="png")
    assert {path.stem for path in folder.iterdir()} == CHARTS
    for path in folder.iterdir():
        assert path.suffix == ".png"
        assert Image.open(io.BytesIO(path.read_bytes())).format == "PNG"


def test_reports_go_into_the_run_by_default_and_replace_earlier_ones(runs):
    run = runs["csv"]
    assert write_report(str(run)) == run / "report.html"
    (run / "report.html").write_text("old")
    write_report(str(run))
    assert (run / "report.html").read_text().startswith("<!DOCTYPE html>")
    assert write_report(str(run), format="png") == run / "report"
    assert write_report(str(run), format="png") == run / "report"
    assert not list(run.rglob(".*"))


def test_a_report_that_cannot_be_written_leaves_the_earlier_one(runs, monkeypatch):
    page = write_report(str(runs["board"]))
    before = page.read_bytes()

    def full(path, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        write_report(str(runs["board"]))
    assert page.read_bytes() == before
    assert not list(page.parent.glob(".*"))


def test_numbers_at_the_top_are_those_logged(runs):
    page = Reader(write_report(str(runs["csv"])).read_text())
    rows = page.text.split("All ")[0]
    last = (runs["csv"] / "metrics.csv").read_text()
    assert "Logged up to optimizer step 4." in rows
    assert re.search(r"train/loss\s*\d", rows)
    assert "dls/score/00" not in rows
    assert "dls/score/00" in last


@pytest.mark.parametrize(
    ("name", "format", "match"),
    [("folder", "html", "is a folder. Name a file"), ("file", "png", "is a file; png writes")],
)
def test_an_output_of_the_other_kind_is_refused(runs, tmp_path, name, format, match):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match=match):
        write_report(str(runs["csv"]), output=str(tmp_path / name), format=format)
    assert (tmp_path / "file").read_text() == "mine"
    assert list((tmp_path / "folder").iterdir()) == []


def test_what_is_no_run_is_refused_and_nothing_is_written(tmp_path):
    for run, match in ((tmp_path / "none", "is no folder"), (tmp_path, "holds no logged number")):
        with pytest.raises(ValueError, match=match):
            write_report(str(run))
    assert list(tmp_path.iterdir()) == []


def test_numbers_are_short():
    numbers = (0.123456, 12345.6, 0.0, 1e-7, float("nan"))
    assert [report._number(number) for number in numbers] == [
        "0.1235",
        "12,346",
        "0",
        "1e-07",
        "nan",
    ]
