from __future__ import annotations

import numpy as np
import pytest

from rosa_lightning.inspection import raster
from rosa_lightning.inspection.raster import colours, draw_raster

LEFT, TOP = raster.MARGINS["left"], raster.MARGINS["top"]


def cells(picture, num_layers, num_selections, row, column):
    """The colour in the middle of each cell, layers from the bottom up."""
    rows = [TOP + (num_layers - 1 - layer) * row + row // 3 for layer in range(num_layers)]
    columns = [LEFT + selection * column + column // 3 for selection in range(num_selections)]
    return picture[np.ix_(rows, columns)]


def is_blue(colour):
    return int(colour[2]) - int(colour[0]) > 40


def test_each_selection_is_a_column_and_each_layer_a_row_from_the_bottom_up():
    active = np.array([[True, False], [False, True], [True, False]])
    picture = draw_raster([0, 100, 200], [0, 1], active, np.ones((3, 2)))
    found = cells(picture, num_layers=2, num_selections=3, row=30, column=48)
    blue = [[is_blue(found[layer, s]) for layer in range(2)] for s in range(3)]
    assert blue == active.tolist()


def test_a_higher_score_is_darker_in_active_and_in_frozen_layers():
    shades = colours(np.array([[True, True, False, False]]), np.array([[4.0, 1.0, 3.0, 0.0]])).sum(
        -1
    )[0]
    assert shades[0] < shades[1]
    assert shades[2] < shades[3]


def test_scores_that_are_all_zero_are_drawn():
    assert np.isfinite(colours(np.array([[True, False]]), np.zeros((1, 2)))).all()


def test_what_is_no_score_is_drawn_like_zero_and_hides_no_other():
    active = np.array([[True, True, False, False]])
    drawn = colours(active, np.array([[2.0, np.nan, 1.0, np.inf]]))
    assert (drawn == colours(active, np.array([[2.0, 0.0, 1.0, 0.0]]))).all()


def test_many_selections_share_columns_by_their_average():
    """Active in every second selection: each column is as blue as any other, half-way to grey."""
    active = (np.arange(2560) % 2 == 0)[:, None] & np.ones((1, 2), bool)
    picture = draw_raster(range(0, 25600, 10), [0, 1], active, np.ones((2560, 2)))
    line = picture[TOP + 5, LEFT : LEFT + 640].astype(int)
    dark, grey = raster.ACTIVE[1], raster.IDLE[1]
    assert np.abs(line - (dark + grey) / 2).max() <= 1


@pytest.mark.parametrize("num_layers", [2, 80])
@pytest.mark.parametrize("num_selections", [1, 3, 2000])
def test_every_size_gives_a_picture_that_fits_a_screen(num_layers, num_selections):
    active = np.ones((num_selections, num_layers), bool)
    scores = np.ones((num_selections, num_layers))
    picture = draw_raster(range(num_selections), range(num_layers), active, scores)
    height, width, depth = picture.shape
    assert (picture.dtype, depth) == (np.uint8, 3)
    assert 240 < width < 900
    assert 100 < height < 800
    inside = picture[TOP:-50, LEFT : LEFT + min(640, 48 * num_selections)]
    assert (inside[2::8, :, 2].astype(int) - inside[2::8, :, 0] > 40).mean() > 0.5


def test_the_picture_is_no_wider_than_asked():
    picture = draw_raster(range(900), [0, 1], np.ones((900, 2), bool), np.ones((900, 2)), 360)
    assert picture.shape[1] == LEFT + 360 + raster.MARGINS["right"]
