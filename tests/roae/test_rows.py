from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rosa_lightning.roae.rows import add_to_rows, find_blocks


def rows_of(blocks) -> list[int]:
    return [
        blocks.start + block * blocks.stride + row
        for block in range(blocks.count)
        for run in blocks.runs
        for row in range(*run)
    ]


@settings(max_examples=200)
@given(st.sets(st.integers(0, 40), min_size=1), st.integers(1, 8), st.integers(0, 5))
def test_any_rows_are_found_again_inside_the_projection(rows, num_heads, spare):
    wanted = sorted(rows)
    num_rows = wanted[-1] + 1 + spare
    blocks = find_blocks(wanted, num_rows, num_heads)
    assert rows_of(blocks) == wanted
    assert blocks.start >= 0
    assert blocks.start + blocks.count * blocks.stride <= num_rows


def test_heads_are_blocks_whether_alone_or_fused():
    # Four heads of 8; low dimensions 2, 3 and 6.
    alone = [8 * head + dim for head in range(4) for dim in (2, 3, 6)]
    assert find_blocks(alone, 32, 4).count == 4
    behind_others = [row + 64 for row in alone]
    blocks = find_blocks(behind_others, 128, 4)
    assert (blocks.start, blocks.count, blocks.stride) == (64, 4, 8)
    # Query, key and value of one head next to each other.
    by_head = [24 * head + 8 + dim for head in range(4) for dim in (2, 3, 6)]
    blocks = find_blocks(by_head, 96, 4)
    assert (blocks.count, blocks.stride, blocks.runs) == (4, 24, ((10, 12), (14, 15)))


def test_groups_of_query_heads_between_keys_are_blocks_of_several_heads():
    # Two groups of two query heads, a key and a value head, each of 8.
    rows = [
        32 * group + 8 * head + dim for group in range(2) for head in range(2) for dim in (6, 7)
    ]
    blocks = find_blocks(rows, 64, 4)
    assert (blocks.count, blocks.stride, blocks.runs) == (2, 32, ((6, 8), (14, 16)))


@settings(max_examples=50)
@given(st.sets(st.integers(0, 20), min_size=1), st.integers(1, 4))
def test_adding_equals_a_dense_scatter_forward_and_backward(rows, num_heads):
    wanted = sorted(rows)
    z = torch.randn(2, 3, 21, dtype=torch.float64, requires_grad=True)
    low = torch.randn(2, 3, len(wanted), dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 3, 21, dtype=torch.float64)
    scatter = torch.zeros(len(wanted), 21, dtype=torch.float64)
    scatter[torch.arange(len(wanted)), wanted] = 1
    dense = z + low @ scatter
    ours = add_to_rows(z * 1.0, low, find_blocks(wanted, 21, num_heads))
    assert torch.equal(ours, dense)
    for got, expected in zip(
        torch.autograd.grad((ours * weight).sum(), [z, low]),
        torch.autograd.grad((dense * weight).sum(), [z, low]),
        strict=True,
    ):
        assert torch.equal(got, expected)
