from __future__ import annotations

import io
import sys
import xml.etree.ElementTree as ET

import matplotlib as mpl
import numpy as np
import pytest
from PIL import Image

from rosa_lightning.inspection.charts import draw_charts
from rosa_lightning.inspection.history import Series


def line(*values: float, every: int = 10) -> Series:
    return Series(tuple(range(0, every * len(values), every)), values)


def selections(num_layers: int, num_selections: int) -> dict[str, Series]:
    rng = np.random.default_rng(0)
    scores = rng.random((num_layers, num_selections)) + 0.1
    run = {}
    for layer in range(num_layers):
        run[f"dls/score/{layer:02d}"] = line(*scores[layer])
        run[f"dls/active/{layer:02d}"] = line(*(scores[layer] > 0.6).astype(float))
    return run


def texts(content: bytes) -> list[str]:
    return [
        "".join(node.itertext()) for node in ET.fromstring(content).iter() if "text" in node.tag
    ]


def by_name(run: dict[str, Series], kind: str = "svg") -> dict[str, bytes]:
    return {picture.name: picture.content for picture in draw_charts(run, kind)}


def test_only_what_was_logged_is_drawn():
    assert list(by_name({"train/loss": line(2, 1), "other": line(1, 2)})) == ["loss"]


def test_losses_share_a_chart_and_are_told_apart():
    content = by_name({"train/loss": line(2, 1), "val/loss": line(3, 2)})["loss"]
    assert {"Loss", "train/loss", "val/loss", "optimizer step"} <= set(texts(content))


def test_each_target_has_its_charts_in_the_order_of_the_targets():
    run = {
        f"roae/{kind}/0{layer}/{target}": line(0, layer + 1)
        for kind in ("update_norm", "relative_update")
        for layer in range(2)
        for target in ("k", "q")
    }
    assert list(by_name(run)) == [
        "relative_update_q",
        "relative_update_k",
        "update_norm_q",
        "update_norm_k",
    ]
    assert {"layer 0", "layer 1"} <= set(texts(by_name(run)["update_norm_k"]))


def test_many_layers_are_a_map_with_a_scale_and_not_a_legend_of_many_lines():
    drawn = by_name(selections(num_layers=80, num_selections=5))
    assert not any(text.startswith("layer ") for text in texts(drawn["scores"]))
    assert {"layer", "gradient norm"} <= set(texts(drawn["scores"]))
    assert not any("$" in text for text in texts(drawn["scores"]))


@pytest.mark.parametrize("num_layers", [2, 80])
@pytest.mark.parametrize("num_selections", [1, 3])
def test_layers_are_drawn_whatever_their_number(num_layers, num_selections):
    drawn = by_name(selections(num_layers, num_selections), "png")
    assert list(drawn) == ["active_layers", "selection_counts", "scores"]
    for content in drawn.values():
        assert Image.open(io.BytesIO(content)).format == "PNG"


def test_a_selection_that_was_written_in_part_is_left_out_of_the_raster():
    whole = selections(num_layers=2, num_selections=3)
    part = {**whole, "dls/score/01": line(*whole["dls/score/01"].values[:2])}
    wanted = selections(num_layers=2, num_selections=3)
    short = {tag: line(*series.values[:2]) for tag, series in wanted.items()}
    assert by_name(part)["active_layers"] == by_name(short)["active_layers"]
    assert by_name(whole)["active_layers"] != by_name(short)["active_layers"]
    nothing = {**part, "dls/score/01": Series((7,), (1.0,))}
    assert "active_layers" not in by_name(nothing)


def test_counts_are_those_of_the_whole_run_where_it_logged_them():
    """A resumed run's folder holds only the rest of its selections."""
    run = {f"dls/active/0{layer}": line(1.0, 1.0) for layer in range(2)}
    few = by_name(run)["selection_counts"]
    run |= {f"dls/selection_count/0{layer}": line(39.0, 40.0) for layer in range(2)}
    many = by_name(run)["selection_counts"]
    assert "40" in texts(many)
    assert "40" not in texts(few)


def test_the_accuracy_on_an_only_task_is_drawn_once():
    one = by_name({"val/accuracy": line(0, 1), "val/accuracy/demo": line(0, 1)})["accuracy"]
    assert not any("demo" in text for text in texts(one))
    run = {"val/accuracy": line(0, 1), "val/accuracy/a": line(0, 0.5)}
    assert "accuracy/a" in texts(by_name(run)["accuracy"])


def test_a_tag_is_text_and_no_formula_and_no_markup():
    name = r"$\frac{1}$<b>&"
    run = {"val/accuracy": line(0, 1), f"val/accuracy/{name}": line(0, 0.5)}
    assert f"accuracy/{name}" in texts(by_name(run)["accuracy"])


def test_numbers_that_are_none_leave_a_gap():
    run = {"train/loss": line(2.0, float("nan"), float("inf"), 1.0)}
    assert by_name(run, "png")["loss"] != by_name({"train/loss": line(2.0, 1.5, 1.2, 1.0)}, "png")


def test_equal_runs_give_equal_files_and_the_users_settings_stay():
    before = dict(mpl.rcParams)
    run = {"train/loss": line(2, 1), **selections(2, 3)}
    assert by_name(run) == by_name(run)
    assert dict(mpl.rcParams) == before


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"rosa-lightning\[plots\]"):
        draw_charts({"train/loss": line(2, 1)}, "svg")
