from __future__ import annotations

import xml.etree.ElementTree as ET

import numpy as np
import pytest

from rosa_lightning.inspection.charts import draw_charts, raster_colours, raster_figure
from rosa_lightning.inspection.curves import Series, name_of


def line(*values: float, every: int = 10) -> Series:
    return Series(tuple(range(0, every * len(values), every)), values)


def selections(num_layers: int, num_selections: int) -> dict[str, Series]:
    rng = np.random.default_rng(0)
    scores = rng.random((num_layers, num_selections)) + 0.1
    run = {}
    for layer in range(num_layers):
        run[f"layers/score/{layer:02d}"] = line(*scores[layer])
        run[f"layers/active/{layer:02d}"] = line(*(scores[layer] > 0.6).astype(float))
        run[f"layers/selections/{layer:02d}"] = line(*(scores[layer] > 0.6).cumsum().astype(float))
    return run


def texts(content: bytes) -> list[str]:
    return [
        "".join(node.itertext()) for node in ET.fromstring(content).iter() if "text" in node.tag
    ]


def drawn(run: dict[str, Series]) -> dict[str, bytes]:
    return {title: svg for charts in draw_charts(run).values() for title, svg in charts.items()}


def test_each_target_has_its_charts_in_the_order_of_the_targets():
    run = {
        f"layers/{kind}/{target}/0{layer}": line(0, layer + 1)
        for kind in ("update_norm", "relative_update")
        for layer in range(2)
        for target in ("mlp.down_proj", "k", "q")
    }
    relative = "Update of {}, relative to the frozen weight"
    titles = [form.format(t) for form in (relative, "Update of {}") for t in "qk?"]
    assert list(drawn(run)) == [title.replace("?", "mlp.down_proj") for title in titles]
    assert {"layer 0", "layer 1"} <= set(texts(drawn(run)["Update of k"]))


def test_many_layers_are_a_map_with_a_scale_and_not_a_legend_of_many_lines():
    shown = texts(drawn(selections(num_layers=80, num_selections=5))["Layer scores"])
    assert not any(text.startswith("layer ") or "$" in text for text in shown)
    assert {"layer", "gradient norm"} <= set(shown)


@pytest.mark.parametrize("num_layers", [2, 80])
@pytest.mark.parametrize("num_selections", [1, 2000])
def test_layers_are_drawn_whatever_their_number(num_layers, num_selections):
    charts = draw_charts(selections(num_layers, num_selections))["Layers and updates"]
    often = "How often each layer was selected"
    assert list(charts) == ["Layers that train", often, "Layer scores"]


def test_of_a_single_selection_bars_are_drawn_and_not_a_stripe():
    shown = texts(drawn(selections(num_layers=80, num_selections=1))["Layer scores"])
    assert "layer, at step 0" in shown


def test_what_has_not_moved_has_no_chart():
    run = {f"layers/update_norm/q/{layer:02d}": line(0.0, 0.0) for layer in range(30)}
    assert not drawn(run)


def test_axes_of_scores_begin_at_zero():
    scores = {f"layers/score/0{layer}": line(5.0, 5.5 + layer) for layer in range(3)}
    labels = texts(drawn(scores)["Layer scores"])
    assert "0" in labels
    assert not any(label.startswith("\N{MINUS SIGN}") for label in labels)


def test_steps_are_whole_numbers_where_there_is_one_alone():
    labels = texts(drawn({"train/lr": Series((9,), (5e-4,))})["Learning rate"])
    assert "9" in labels
    assert not any(label.startswith(("8.", "9.")) for label in labels)


def test_the_accuracy_on_an_only_task_is_drawn_once():
    title = "Accuracy of validation answers"
    one = drawn({"val/accuracy": line(0, 1), "val/accuracy/demo": line(0, 1)})[title]
    assert not any("demo" in text for text in texts(one))
    two = drawn({"val/accuracy": line(0, 1), "val/accuracy/a": line(0, 0.5)})[title]
    assert {"validation accuracy", "validation accuracy a"} <= set(texts(two))


def test_a_tag_is_text_and_no_formula_and_no_markup():
    tag = r"val/accuracy/$\frac{1}$<b>&"
    run = {"val/accuracy": line(0, 1), tag: line(0, 0.5)}
    assert name_of(tag) in texts(drawn(run)["Accuracy of validation answers"])
    assert name_of(tag).endswith(r"$\frac{1}$<b>&")


def test_each_selection_is_a_column_and_each_layer_a_row_from_the_bottom_up():
    active = np.array([[True, False], [False, True], [True, False]])
    figure = raster_figure([0, 100, 200], [3, 4], active, np.ones((3, 2)))
    (axes,) = figure.axes
    (image,) = axes.images
    colours_LS3 = image.get_array()
    assert (colours_LS3[..., 2] - colours_LS3[..., 0] > 0.15).T.tolist() == active.tolist()
    assert image.origin == "lower"
    labels = axes.xaxis.get_major_formatter(), axes.yaxis.get_major_formatter()
    assert [labels[0](i) for i in range(4)] == ["0", "100", "200", ""]
    assert [labels[1](i) for i in (-1, 0, 1, 1.5)] == ["", "3", "4", ""]


def test_a_higher_score_is_darker_in_active_and_in_frozen_layers():
    active = np.array([[True, True, False, False]])
    shades = raster_colours(active, np.array([[4.0, 1.0, 3.0, np.nan]])).sum(-1)[:, 0]
    assert shades[0] < shades[1]
    assert shades[2] < shades[3]
