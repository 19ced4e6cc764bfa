from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rosa_lightning.roae.rope import PairTable, read_pair_table


def rotation(pairs: list[tuple[int, int]], angles: list[float], dim: int, scale: float = 1.0):
    """An oracle written with explicit 2 x 2 rotation matrices."""

    def rotate(x_NTD: Tensor) -> Tensor:
        out = x_NTD.clone()
        for t in range(x_NTD.shape[1]):
            for (a, b), angle in zip(pairs, angles, strict=True):
                c, s = math.cos(t * angle), math.sin(t * angle)
                out[:, t, a] = x_NTD[:, t, a] * c - x_NTD[:, t, b] * s
                out[:, t, b] = x_NTD[:, t, a] * s + x_NTD[:, t, b] * c
        return out * scale

    assert dim >= 2 * len(pairs)
    return rotate


@st.composite
def layouts(draw):
    dim = 2 * draw(st.integers(1, 8))
    dims = draw(st.permutations(range(dim)))
    count = draw(st.integers(1, dim // 2))
    pairs = [tuple(sorted(dims[2 * i : 2 * i + 2])) for i in range(count)]
    # From half a turn per token down to a wavelength of a hundred million tokens.
    exponents = draw(
        st.lists(
            st.floats(-7, 0.4), min_size=count, max_size=count, unique_by=lambda e: round(e, 2)
        )
    )
    scale = draw(st.sampled_from([1.0, 1.37]))
    return dim, pairs, [10**e for e in exponents], scale


@given(layouts())
def test_any_layout_of_pairs_is_read_back_with_its_angles(layout):
    dim, pairs, angles, scale = layout
    table = read_pair_table(rotation(pairs, angles, dim, scale), dim)
    expected = sorted(zip(pairs, angles, strict=True))
    assert table.pairs == tuple(pair for pair, _ in expected)
    assert table.inv_freq == pytest.approx([angle for _, angle in expected], rel=1e-4)


@given(layouts(), st.floats(0.01, 1))
def test_low_frequency_dims_are_those_of_the_slowest_pairs(layout, ratio):
    dim, pairs, angles, scale = layout
    table = read_pair_table(rotation(pairs, angles, dim, scale), dim)
    count = max(1, round(ratio * len(pairs)))
    slowest = sorted(zip(angles, pairs, strict=True))[:count]
    dims = table.dims_of(table.low_frequency_pairs(ratio))
    assert dims == tuple(sorted(d for _, pair in slowest for d in pair))


def test_a_dimension_that_is_not_rotated_is_in_no_pair():
    table = read_pair_table(rotation([(1, 2)], [0.5], 6), 6)
    assert table.rotated_dims == (1, 2)


def test_no_rotation_gives_an_empty_table_and_no_low_frequencies():
    table = read_pair_table(lambda x: x, 4)
    assert table.pairs == table.low_frequency_pairs(0.5) == ()


def test_equal_frequencies_are_taken_from_the_later_pair():
    table = PairTable(6, ((0, 3), (1, 4), (2, 5)), (0.1, 0.1, 0.1))
    assert table.low_frequency_pairs(1 / 3) == (2,)


def _three_cycle(x_NTD: Tensor) -> Tensor:
    out = x_NTD.clone()
    out[:, 1] = 0.8 * x_NTD[:, 1] + 0.6 * x_NTD[:, 1].roll(1, dims=-1)
    return out


@pytest.mark.parametrize(
    ("rotate", "reason"),
    [
        (_three_cycle, "does not turn into"),
        (lambda x: x.flip(-1), "position 0"),
        (lambda x: torch.cat([x[:, :1], torch.ones_like(x[:, 1:]) / 2], 1), "turn"),
    ],
)
def test_what_is_no_turning_of_pairs_is_refused(rotate, reason):
    with pytest.raises(ValueError, match=reason):
        read_pair_table(rotate, 3)
