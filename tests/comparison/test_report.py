"""The table and the page of a comparison."""

import base64
import io
import re
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from rosa_lightning.comparison.figures import figures, pareto_front, spread_out
from rosa_lightning.comparison.report import (
    accuracy,
    comparison_tables,
    cost,
    forgotten,
    quality,
    sections,
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
        "steps": 50,
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
    rows = quality(content()).rows
    assert [row[0] for row in rows] == ["RoSA", "LoRA", "Broken"]
    assert rows[0][1:] == [
        *("0.01 (edge)", "0.7500 ± 0.0707", "-0.2500 (-0.5000 to +0.1000)", "0.08"),
    ]
    assert rows[1][3] == "reference"
    assert rows[2][2] == "failed"
    assert cost(content()).rows[0] == ["RoSA", "800", "50", "75", "8.00", "1,000", "0.50"]
    assert cost(content()).rows[2] == ["Broken", "800", "", "", "", "", ""]


def test_tasks_of_base_and_methods():
    found = accuracy(content())
    assert found.heading == ("Method", "gsm8k (generate, n=50)")
    assert ["base", "10.0 %"] in found.rows
    assert ["LoRA", "50.0 %"] in found.rows


def test_what_was_forgotten():
    change = {"base": 2.5, "n": 40, "mean": 0.5, "low": 0.25, "high": 0.75, "p": 0.001}
    questions = {"base": 0.25, "n": 60, "mean": -0.05, "low": -0.1, "high": 0.02, "p": 0.3}
    found = {"LoRA": {"text_loss": change, "untrained/generate": questions}}
    section = forgotten({**content(), "forgetting": found})
    assert section.rows == [
        ["LoRA", "+0.5000 (+0.2500 to +0.7500)", "-5.0 (-10.0 to +2.0)"],
    ]
    assert section.notes == (
        "The base: 2.5000 nats per token over 40 texts.",
        "The base: 25.0 % of 60 questions (generate).",
    )


def test_test_questions_in_the_training_data():
    data = {
        "tests": [{"source": "svamp", "questions": 60, "exact": 2, "near": 1}],
        "training": [{"source": "gsm8k", "records": 7473, "left_out": 3}],
    }
    section = sections({**content(), "data": data})[-1]
    assert section.rows == [["svamp", "60", "2", "1"]]
    assert "3 of 7,473 records of gsm8k" in section.notes[0]


@given(
    places=st.lists(st.floats(0, 1), min_size=1, max_size=30).map(sorted),
    least=st.floats(0.001, 0.2),
)
def test_labels_are_spread_out_in_their_order(places, least):
    found = spread_out(places, least)
    gaps = [b - a for a, b in pairwise(found)]
    assert all(0 <= place <= 1 for place in found)
    wanted = least if len(places) * least < 1 else 1 / len(places)
    assert all(gap >= wanted - 1e-9 for gap in gaps)


def test_labels_with_room_stay():
    assert spread_out([0.2, 0.5, 0.9], 0.05) == [0.2, 0.5, 0.9]


def test_the_front_has_what_nothing_else_beats():
    assert pareto_front([(3, 1.0), (1, 2.0), (2, 2.5), (2, 1.5)]) == [(1, 2.0), (2, 1.5), (3, 1.0)]


def test_the_label_of_a_point_with_room_is_at_its_height():
    compared = content()
    for method in compared["methods"].values():
        for one in method["runs"]:
            one["val_loss"] += 5
    found = figures(compared)["Validation loss against training time"]
    svg = base64.b64decode(found).decode()
    points = re.findall(r'id="PathCollection_\d+".*?<use [^>]*? y="([\d.]+)"', svg, re.DOTALL)
    for name, y in zip(("LoRA", "RoSA"), points, strict=True):
        label = re.search(rf' y="([\d.]+)"[^>]*>{name}<', svg)
        assert abs(float(label[1]) - float(y)) < 6  # points; the label's is its baseline


def many(number):
    """A comparison of many methods."""
    found = content()
    about = found["methods"]["LoRA"]
    for place in range(number):
        losses = [0.9 + 0.001 * place, 0.91 + 0.001 * place]
        runs = [run(seed, loss, train_seconds=90.0 + place) for seed, loss in enumerate(losses)]
        grid = [run(0, losses[0]), run(0, losses[0] + 1, learning_rate=1e-2)]
        found["methods"][f"Method {place}"] = {**about, "grid": grid, "runs": runs}
    return found


def test_page_and_tables(tmp_path):
    write_report(content(), tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    images = re.findall(r"svg\+xml;base64,([^\"]+)", page)
    assert len(images) == 2  # all have as many parameters
    assert all(b"</svg>" in base64.b64decode(image) for image in images)
    assert "loss is not &lt;finite&gt;" in page


@pytest.mark.parametrize("width", [80, 100, 160])
def test_no_name_and_no_number_of_a_table_is_torn(width):
    console = Console(width=width, record=True, file=io.StringIO())
    found = content()
    found["methods"]["Diverging"] = found["methods"].pop("Broken")
    found["methods"]["RoSA"]["learning_rate"] = 3e-3
    found["tests"][0]["p_holm"] = 0.0576
    console.print(comparison_tables(found))
    text = console.export_text()
    assert re.search(r"^ RoSA +0.003 \(edge\) +0.7500 ± 0.0707 ", text, re.M)
    assert {"Diverging", "LoRA", "-0.2500", "0.0576"} <= set(text.split())
    assert "…" not in text


def test_a_page_of_many_methods_names_each_in_every_figure(tmp_path):
    write_report(many(25), tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    for image in re.findall(r"svg\+xml;base64,([^\"]+)", page):
        svg = base64.b64decode(image).decode()
        places = {float(place) for place in re.findall(r'y="([-\d.]+)"[^>]*>Method \d+<', svg)}
        assert len(places) == 25
        assert min(b - a for a, b in pairwise(sorted(places))) > 8  # points: no two overlap
