"""The table and the page of a comparison."""

import base64
import io
import re

from rich.console import Console

from rosa_lightning.comparison.report import (
    comparison_table,
    pareto_front,
    table_rows,
    task_rows,
    write_report,
)


def run(seed, loss, **other):
    return {
        "seed": seed,
        "status": "finished",
        "val_loss": loss,
        "learning_rate": 1e-3,
        "train_seconds": 100.0,
        "examples_per_s": 8.0,
        "peak_mib": 1000.0,
        "backward_share": 0.5,
        "trainable_parameters": 800,
        **other,
    }


def content():
    task = {"task": "gsm8k", "protocol": "generate", "n": 50, "accuracy": 0.5}
    failed = {**run(0, None), "status": "failed", "error": "loss is not <finite>"}
    about = {"rank": 4, "trainable_parameters": 800, "overrides": {}, "at_edge": False}
    return {
        "reference": "LoRA",
        "config": {"learning_rates": [1e-3, 1e-2], "seeds": [0, 1]},
        "base": {"tasks": [{**task, "accuracy": 0.1}]},
        "methods": {
            "LoRA": {
                **about,
                "learning_rate": 1e-3,
                "grid": [run(0, 0.9), run(0, 1.2, learning_rate=1e-2)],
                "runs": [run(0, 0.9, tasks=[task]), run(1, 1.1)],
            },
            "RoSA": {
                **about,
                "at_edge": True,
                "learning_rate": 1e-2,
                "grid": [],
                "runs": [run(0, 0.8, train_seconds=50.0), run(1, 0.7)],
            },
            "Broken": {**about, "learning_rate": None, "grid": [failed], "runs": []},
        },
        "tests": [
            {"method": "RoSA", "metric": "val_loss", "mean": -0.25, "low": -0.5, "high": 0.1}
            | {"p": 0.04, "p_holm": 0.08, "reference": "LoRA"},
            {"method": "RoSA", "metric": "generate/all", "mean": 0.02, "low": -0.1, "high": 0.1}
            | {"p": 0.4, "p_holm": 0.8, "n": 50, "reference": "LoRA"},
        ],
        "versions": {"torch": "2"},
    }


def test_rows_by_loss_with_failed_ones_last():
    rows = table_rows(content())
    assert [row[0] for row in rows] == ["RoSA", "LoRA", "Broken"]
    assert rows[0][2] == "0.01 (edge)"
    assert rows[0][3] == "0.7500 ± 0.0707"
    assert rows[0][4] == "-0.2500 (-0.5000 to +0.1000)"
    assert rows[1][4] == "reference"
    assert rows[2][3] == "loss is not <finite>"


def test_tasks_of_base_and_methods():
    heading, rows = task_rows(content())
    assert heading == ["Method", "gsm8k (generate, n=50)"]
    assert ["base", "10.0 %"] in rows
    assert ["LoRA", "50.0 %"] in rows


def test_the_front_has_what_nothing_else_beats():
    assert pareto_front([(3, 1.0), (1, 2.0), (2, 2.5), (2, 1.5)]) == [(1, 2.0), (2, 1.5), (3, 1.0)]


def test_page_and_table(tmp_path):
    write_report(content(), tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    images = re.findall(r"svg\+xml;base64,([^\"]+)", page)
    assert len(images) == 3
    assert all(b"</svg>" in base64.b64decode(image) for image in images)
    assert "loss is not &lt;finite&gt;" in page
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(comparison_table(content()))
    assert "0.7500 ± 0.0707" in console.export_text()
