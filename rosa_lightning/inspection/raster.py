"""A picture of which layers trained when.

Drawn on Pillow, which TensorBoard brings along, so that a plain installation shows it.

Axes: S selections, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Colours = NDArray[np.float64]

# Light to dark, by score; red, green, blue.
ACTIVE = np.array([[158, 202, 225], [8, 81, 156]], float)
IDLE = np.array([[247, 247, 247], [200, 200, 200]], float)
INK, SOFT, RULE = (40, 40, 40), (120, 120, 120), (190, 190, 190)

HEIGHT = 480
"""Pixels that the rows share, as far as their least and greatest height allow."""
MARGINS = {"left": 46, "top": 68, "right": 128, "bottom": 42}
FONT_SIZE = 13


def draw_raster(
    steps: Sequence[int],
    layers: Sequence[int],
    active_SL: NDArray[np.bool_],
    scores_SL: NDArray[np.float64],
    max_width: int = 640,
) -> NDArray[np.uint8]:
    """Draw a column for each selection and a row for each layer, the lowest layer at the bottom.

    Active layers are blue, others grey, both darker the nearer a layer's score is to the highest
    of its selection. Selections that share a column are averaged. Bars at the right say how often
    each layer was active.

    Args:
        steps: Optimizer step of each selection, ascending, at least one.
        layers: Number of each layer, ascending.
        active_SL: Whether a layer was selected.
        scores_SL: The scores, at least zero.
        max_width: Pixels of all columns together; more selections than that share columns.

    Returns:
        The picture, (height, width, 3), in red, green and blue.
    """
    cells_LS3 = colours(active_SL, scores_SL).transpose(1, 0, 2)[::-1]
    row = int(np.clip(HEIGHT // len(layers), 8, 30))
    width = min(max_width, 48 * len(steps))
    plot = _stretch(cells_LS3, width, row)
    left, top = MARGINS["left"], MARGINS["top"]
    size = (
        left + max(width, 240) + MARGINS["right"],
        top + plot.shape[0] + MARGINS["bottom"],
    )
    image = Image.new("RGB", size, "white")
    image.paste(Image.fromarray(plot.round().astype(np.uint8)), (left, top))
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(size=FONT_SIZE)
    _legend(draw, font, left)
    _layer_axis(draw, font, layers, row)
    _step_axis(draw, font, steps, width, top + plot.shape[0])
    _bars(draw, font, active_SL.mean(0), row, left + width + 14)
    return np.asarray(image)


def colours(active_SL: NDArray[np.bool_], scores_SL: NDArray[np.float64]) -> Colours:
    """Red, green and blue of each cell, 0 to 255, shape (S, L, 3); what is no score is light."""
    scores_SL = np.nan_to_num(scores_SL, posinf=0.0)
    highest = scores_SL.max(1, keepdims=True)
    share_SL1 = (scores_SL / np.where(highest > 0, highest, 1))[..., None]
    active, idle = (light + share_SL1 * (dark - light) for light, dark in (ACTIVE, IDLE))
    mixed: Colours = np.where(active_SL[..., None], active, idle)
    return mixed


def _stretch(cells_LS3: Colours, width: int, row: int) -> Colours:
    """Cells to pixels: columns that fill the width, rows of a height, thin white lines between."""
    count = cells_LS3.shape[1]
    if count <= width:
        edges = np.linspace(0, width, count + 1).round().astype(int)
        plot = np.repeat(cells_LS3, np.diff(edges), axis=1)
        if width >= 6 * count:
            plot[:, edges[1:] - 1] = 255
    else:
        edges = np.linspace(0, count, width + 1).round().astype(int)
        sums = np.add.reduceat(cells_LS3, edges[:-1], axis=1)
        plot = sums / np.diff(edges)[None, :, None]
    plot = np.repeat(plot, row, axis=0)
    plot[row - 1 :: row] = 255
    return plot


def _legend(draw: ImageDraw.ImageDraw, font: Any, left: int) -> None:
    draw.text((left, 4), "Layers that train", fill=INK, font=ImageFont.load_default(size=15))
    x, y = left, 33
    for colour, text in ((ACTIVE, "active"), (IDLE, "frozen")):
        for end in colour:
            draw.rectangle((x, y - 5, x + 10, y + 5), fill=_fill(end), outline=RULE)
            x += 10
        draw.text((x + 5, y), text, fill=INK, font=font, anchor="lm")
        x += 62
    draw.text((x, y), "darker: higher score", fill=SOFT, font=font, anchor="lm")


def _layer_axis(draw: ImageDraw.ImageDraw, font: Any, layers: Sequence[int], row: int) -> None:
    left, bottom = MARGINS["left"], MARGINS["top"] + row * len(layers)
    every = _every(FONT_SIZE + 2, row)
    for index in range(0, len(layers), every):
        y = bottom - index * row - row / 2
        draw.text((left - 6, y), str(layers[index]), fill=INK, font=font, anchor="rm")
    draw.text((left - 6, MARGINS["top"] - 6), "layer", fill=SOFT, font=font, anchor="rs")


def _step_axis(
    draw: ImageDraw.ImageDraw, font: Any, steps: Sequence[int], width: int, bottom: int
) -> None:
    left = MARGINS["left"]
    every = _every(draw.textlength(str(steps[-1]), font=font) + 20, width / len(steps))
    for index in range(0, len(steps), every):
        x = left + (index + 0.5) * width / len(steps)
        draw.line((x, bottom, x, bottom + 4), fill=SOFT)
        draw.text((x, bottom + 7), str(steps[index]), fill=INK, font=font, anchor="ma")
    draw.text((left, bottom + 24), "optimizer step", fill=SOFT, font=font)


def _every(room: float, size: float) -> int:
    """The smallest of 1, 2, 5, 10, 20, ... of things of a size that leave a label its room."""
    power = 1
    while True:
        for every in (power, 2 * power, 5 * power):
            if every * size >= room:
                return every
        power *= 10


def _bars(
    draw: ImageDraw.ImageDraw, font: Any, shares: NDArray[np.float64], row: int, x: int
) -> None:
    length, bottom = 52, MARGINS["top"] + row * len(shares)
    draw.text((x, MARGINS["top"] - 6), "how often", fill=SOFT, font=font, anchor="ls")
    for index, share in enumerate(shares):
        y = bottom - (index + 1) * row
        draw.rectangle((x, y, x + length, y + row - 2), fill=_fill(IDLE[0]))
        if share > 0:
            draw.rectangle((x, y, x + length * share, y + row - 2), fill=_fill(ACTIVE.mean(0)))
        if row >= FONT_SIZE + 2:
            text = f"{100 * share:.0f} %"
            draw.text((x + length + 6, y + row / 2), text, fill=INK, font=font, anchor="lm")


def _fill(colour: NDArray[np.float64]) -> tuple[int, ...]:
    return tuple(int(value) for value in colour.round())
