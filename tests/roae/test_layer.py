from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from rosa_lightning.roae.layer import RoAEConfig, RoAELinear, RoAENorm, RowBlocks

LOW_ROWS = [head * 8 + dim for head in range(3) for dim in (2, 3, 6)]
BLOCKS = RowBlocks.find(LOW_ROWS, 24, 3)


def layer(bias: bool = False, dtype: torch.dtype = torch.float32, **config) -> RoAELinear:
    base = nn.Linear(12, 24, bias=bias).to(dtype).requires_grad_(False)
    config = RoAEConfig(**{"rank": 4, "alpha": 8.0, **config})
    return RoAELinear(base, in_features=12, blocks=BLOCKS, config=config)


def with_random_term(made: RoAELinear) -> RoAELinear:
    nn.init.normal_(made.roae_B)
    return made


def dense_reference(made: RoAELinear, x: torch.Tensor) -> torch.Tensor:
    """z + scale * S B A x, with S as an explicit 0/1 matrix, in float64."""
    scatter = torch.zeros(24, 9, dtype=torch.float64)
    scatter[LOW_ROWS, torch.arange(9)] = 1
    update = 2.0 * scatter @ made.roae_B.double() @ made.roae_A.double()
    bias = None if made.bias is None else made.bias.double()
    return F.linear(x.double(), made.weight.double() + update, bias)


@pytest.mark.parametrize("bias", [False, True])
def test_outputs_and_gradients_equal_those_of_the_formula_with_a_dense_scatter(bias):
    made = with_random_term(layer(bias))
    x, weights = torch.randn(2, 5, 12, requires_grad=True), torch.randn(2, 5, 24)
    outputs = made(x), dense_reference(made, x)
    assert_close(outputs[0].double(), outputs[1], atol=1e-5, rtol=1e-5)
    inputs = [x, made.roae_A, made.roae_B]
    got, wanted = (torch.autograd.grad((out * weights).sum(), inputs) for out in outputs)
    for ours, theirs in zip(got, wanted, strict=True):
        assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("rows", [LOW_ROWS, range(24)], ids=["some", "all"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_are_float32_and_take_float32_gradients_on_a_half_precision_base(dtype, rows):
    base, blocks = nn.Linear(12, 24).to(dtype).requires_grad_(False), RowBlocks.find(rows, 24, 3)
    made = RoAELinear(base, in_features=12, blocks=blocks, config=RoAEConfig(rank=4))
    with_random_term(made)
    out = made(torch.randn(2, 5, 12, dtype=dtype))
    out.float().sum().backward()
    assert out.dtype == dtype
    assert made.roae_A.dtype == made.roae_B.dtype == torch.float32
    assert made.roae_A.grad.dtype == torch.float32


@pytest.mark.parametrize("rows", [LOW_ROWS, range(24)], ids=["some", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inside_autocast_the_term_is_computed_in_the_autocast_dtype(rows, dtype):
    base = nn.Linear(12, 24, bias=False).to(dtype).requires_grad_(False)
    blocks, config = RowBlocks.find(rows, 24, 3), RoAEConfig(rank=4, alpha=8.0)
    made = with_random_term(RoAELinear(base, in_features=12, blocks=blocks, config=config))
    x, weights = torch.randn(2, 5, 12, requires_grad=True), torch.randn(2, 5, 24)
    inputs = [x, made.roae_A, made.roae_B]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, read = made(x), made.reduced(x)
    found = [out, *torch.autograd.grad((out * weights).sum(), inputs)]
    assert out.dtype == read.dtype == torch.bfloat16
    assert made.reduced(x.bfloat16()).dtype == torch.float32
    delta = 2.0 * made.roae_B @ made.roae_A
    exact = x @ base.weight.float().T
    exact[..., list(rows)] += x @ delta.T
    wanted = [exact, *torch.autograd.grad((exact * weights).sum(), inputs)]
    for one, other in zip(found, wanted, strict=True):
        assert 1e-5 < (one - other).norm() / other.norm() < 0.01


@pytest.mark.parametrize("shape", [(12,), (3, 12), (0, 5, 12), (2, 0, 12)])
@pytest.mark.parametrize("rows", [LOW_ROWS, range(24)], ids=["some", "all"])
def test_inputs_of_any_number_of_rows_are_taken(rows, shape):
    base, blocks = nn.Linear(12, 24).requires_grad_(False), RowBlocks.find(rows, 24, 3)
    made = RoAELinear(base, in_features=12, blocks=blocks, config=RoAEConfig(rank=4))
    out = with_random_term(made)(torch.randn(shape, requires_grad=True))
    assert out.shape == (*shape[:-1], 24)
    out.sum().backward()
    assert made.roae_B.grad.shape == made.roae_B.shape


def test_a_frozen_term_holds_nothing_of_its_input():
    made, x = with_random_term(layer()), torch.randn(640, 12, requires_grad=True)
    held = []
    hooks = (lambda tensor: held.append(tensor.numel()) or tensor, lambda tensor: tensor)
    for trains in (True, False):
        made.roae_A.requires_grad_(trains)
        made.roae_B.requires_grad_(trains)
        held.clear()
        with torch.autograd.graph.saved_tensors_hooks(*hooks):
            made(x)
        assert (640 * 4 in held) == trains


def test_dropout_acts_on_the_term_in_training_only():
    made = with_random_term(layer(dropout=0.5))
    x = torch.ones(2, 5, 12)
    assert not torch.equal(made.train()(x), made(x))
    assert torch.equal(made.eval()(x), made(x))


@pytest.mark.parametrize(
    ("name", "values"),
    {
        "rank": [0, True, 2.0, 2**31],
        "low_freq_ratio": [0.0, 1.5, "0.5"],
        "layer_ratio": [0.0, 1.5, "0.5"],
        "alpha": [0.0, float("nan"), 10**400, None, 1e-300],
        "dropout": [1.0, [0.1]],
        "targets": [None, "qk", [["q"]], ("w",), (), ("q", "q")],
        "placement": ["somewhere"],
    }.items(),
)
def test_a_setting_out_of_range_is_refused_in_one_line(name, values):
    for value in values:
        with pytest.raises(ValueError, match=rf"^{name}=.*Set model\.roae\.{name}") as error:
            RoAEConfig(**{name: value})
        assert "\n" not in str(error.value)


def fused() -> RoAELinear:
    """Terms on queries and keys of three heads of 8, fused with values head by head."""
    made: nn.Module = nn.Linear(12, 72, bias=False).requires_grad_(False)
    for start in (0, 8):
        rows = [24 * head + start + dim for head in range(3) for dim in (2, 3, 6)]
        blocks, config = RowBlocks.find(rows, 72, 3), RoAEConfig(rank=4, alpha=8.0)
        made = RoAELinear(made, in_features=12, blocks=blocks, config=config)
        nn.init.normal_(made.roae_B)
    return made


def test_two_terms_on_a_fused_projection_change_their_own_rows_alone():
    made = fused()
    x = torch.randn(2, 5, 12)
    with torch.no_grad():
        change = made(x) != made.base.base(x)
    wanted = {24 * head + start + dim for head in range(3) for start in (0, 8) for dim in (2, 3, 6)}
    assert set(change.flatten(0, 1).all(0).nonzero().flatten().tolist()) == wanted
    assert set(change.flatten(0, 1).any(0).nonzero().flatten().tolist()) == wanted


LAYOUTS = {
    "THD": lambda z: z.unflatten(-1, (3, 8)),
    "HTD": lambda z: z.unflatten(-1, (3, 8)).transpose(1, 2),
    "T(HD)": lambda z: z,
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tokens", [1, 3, 5])
def test_a_deferred_term_is_added_after_the_norm_to_the_same_dimensions(layout, tokens):
    arrange = LAYOUTS[layout]
    config = RoAEConfig(rank=4, alpha=8.0)
    base = nn.Linear(12, 24, bias=False)
    made = RoAELinear(base, in_features=12, config=config, defer=True, blocks=BLOCKS)
    with_random_term(made)
    norm = nn.RMSNorm(24 if layout == "T(HD)" else 8)
    after = RoAENorm(norm, made, layout=layout, blocks=BLOCKS)
    x = torch.randn(2, tokens, 12, requires_grad=True)
    scatter = torch.zeros(24, 9)
    scatter[LOW_ROWS, torch.arange(9)] = 1
    term = 2.0 * x @ made.roae_A.T @ made.roae_B.T @ scatter.T
    wanted = norm(arrange(base(x))) + arrange(term)
    got = after(arrange(made(x)))
    assert_close(got, wanted)
    weights = torch.randn_like(wanted)
    inputs = [x, made.roae_A, made.roae_B, base.weight, norm.weight]
    for ours, theirs in zip(
        torch.autograd.grad((got * weights).sum(), inputs),
        torch.autograd.grad((wanted * weights).sum(), inputs),
        strict=True,
    ):
        assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


class _Normed(nn.Module):
    def __init__(self, layout: str) -> None:
        super().__init__()
        self.arrange = LAYOUTS[layout]
        options = {"in_features": 12, "blocks": BLOCKS, "config": RoAEConfig(rank=4), "defer": True}
        self.proj = RoAELinear(nn.Linear(12, 24), **options)
        norm = nn.RMSNorm(24 if layout == "T(HD)" else 8)
        self.norm = RoAENorm(norm, self.proj, layout=layout, blocks=BLOCKS)
        with_random_term(self.proj)

    def forward(self, x):
        return self.norm(self.arrange(self.proj(x)))


def of_a_view() -> RoAELinear:
    parts = nn.Linear(12, 24).requires_grad_(False), nn.Unflatten(-1, (24, 1)), nn.Flatten(-2)
    base, config = nn.Sequential(*parts), RoAEConfig(rank=4)
    return with_random_term(RoAELinear(base, in_features=12, blocks=BLOCKS, config=config))


MADE = {
    "some rows": lambda: with_random_term(layer()),
    "fused": fused,
    "a view": of_a_view,
    **{layout: partial(_Normed, layout) for layout in LAYOUTS},
}


@pytest.mark.parametrize("make", MADE.values(), ids=MADE.keys())
def test_forward_and_backward_compile_without_a_graph_break(make):
    made = make()
    compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 5, 12, requires_grad=True)
    inputs = [x, *(p for name, p in made.named_parameters() if "roae" in name)]
    wanted = torch.autograd.grad(made(x).sin().sum(), inputs)
    got = torch.autograd.grad(compiled(x).sin().sum(), inputs)
    for ours, theirs in zip(got, wanted, strict=True):
        assert_close(ours, theirs)


# --- rows as blocks -------------------------------------------------------------------------------


@settings(max_examples=200)
@given(st.sets(st.integers(0, 40), min_size=1), st.integers(1, 8), st.integers(0, 5))
def test_any_rows_are_found_again_inside_the_projection(rows, num_heads, spare):
    wanted = sorted(rows)
    num_rows = wanted[-1] + 1 + spare
    blocks = RowBlocks.find(wanted, num_rows, num_heads)
    assert blocks.rows == wanted
    assert blocks.start >= 0
    assert blocks.start + blocks.count * blocks.stride <= num_rows


def test_groups_of_query_heads_between_keys_are_blocks_of_several_heads():
    # Two groups of two query heads, a key and a value head, each of 8.
    rows = [
        32 * group + 8 * head + dim for group in range(2) for head in range(2) for dim in (6, 7)
    ]
    blocks = RowBlocks.find(rows, 64, 4)
    assert (blocks.count, blocks.stride, blocks.runs) == (2, 32, ((6, 8), (14, 16)))


@settings(max_examples=50)
@given(st.sets(st.integers(0, 20), min_size=1), st.integers(1, 4), st.booleans())
@example({*range(21)}, 1, True)
@example({*range(21)}, 1, False)
def test_adding_equals_a_dense_scatter_forward_and_backward(rows, num_heads, contiguous):
    wanted = sorted(rows)
    f64 = {"dtype": torch.float64, "requires_grad": True}
    z, x, B = (
        torch.randn(2, 3, 21, **f64),
        torch.randn(2, 3, 4, **f64),
        torch.randn(len(rows), 4, **f64),
    )
    weight = torch.randn(2, 3, 21, dtype=torch.float64)
    scatter = torch.zeros(len(wanted), 21, dtype=torch.float64)
    scatter[torch.arange(len(wanted)), wanted] = 1
    dense = z + 0.3 * x @ B.T @ scatter
    changed = z * 1.0 if contiguous else (z * 1.0).transpose(0, 1).contiguous().transpose(0, 1)
    assert changed.is_contiguous() == contiguous
    ours = RowBlocks.find(wanted, 21, num_heads).add(changed, x, B, 0.3)
    assert_close(ours, dense)
    # Second derivatives, too.
    for _ in range(2):
        got, expected = (
            torch.autograd.grad((out.square() * weight).sum(), [z, x, B], create_graph=True)
            for out in (ours, dense)
        )
        for one, other in zip(got, expected, strict=True):
            assert_close(one, other)
        ours, dense = (torch.cat([grad.flatten() for grad in grads]) for grads in (got, expected))
        weight = torch.randn_like(ours)
