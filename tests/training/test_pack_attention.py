"""Packs run row by row, against single rows, and the tokens that are run."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface

from rosa_lightning.data.collators import PackedCollator, TrainCollator
from rosa_lightning.models.loading import enable_checkpointing
from rosa_lightning.roae.tracing import watch_attention
from rosa_lightning.training import pack_attention
from rosa_lightning.training.compile import compile_layers
from rosa_lightning.training.loss import LossComputer
from rosa_lightning.training.pack_attention import Pack
from rosa_lightning.training.speed import SpeedConfig
from tests.conftest import build
from tests.training.test_loss import Widths, adapted, gradients, single_rows
from tests.training.test_packing import examples

TOKENS, SHARED = 43, 8
"""Of `examples`: in all, and those that need not be run again."""


def check(model, **options) -> LossComputer:
    """Loss and gradients of packed rows are those of single ones."""
    rows, run = examples(), LossComputer(model, SpeedConfig(**options))
    wanted = single_rows(model, TrainCollator(("a",), pad_id=0)(rows))
    found = run.loss(PackedCollator(("a",))(rows))
    # Norms are in float32 in a model of float64, too.
    assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    assert_close(gradients(model, found), gradients(model, wanted), rtol=1e-5, atol=1e-6)
    return run


def llama(**changes):
    return adapted(build("llama", torch.float64, **changes)).eval()


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=9), min_size=1, max_size=9))
def test_a_beginning_in_common_is_run_once(rows):
    rows = sorted(rows)
    shared = [0]
    for one, other in pairwise(rows):
        same = [a == b for a, b in zip(one, other, strict=False)]
        shared.append(min([*same, False].index(False), len(other) - 1))
    pack = Pack([*map(len, rows)], shared)
    ids_N = torch.tensor([i for row in rows for i in row])
    positions_N = torch.tensor([i for row in rows for i in range(len(row))])
    for field_N in (ids_N, positions_N):
        torch.testing.assert_close(field_N[pack.run_n][pack.place_N], field_N)
    # Every beginning once, and the last token of a row that is another's beginning again.
    beginnings = {tuple(row[: end + 1]) for row in rows for end in range(len(row))}
    again = sum(row == other[: len(row)] for other, row in pairwise(rows))
    assert len(pack.run_n) == len(beginnings) + again


def test_scores_are_computed_within_rows_alone():
    model, seen = llama(), []
    run, batch = LossComputer(model), PackedCollator(("a",))(examples())
    run.loss(batch)
    with watch_attention(lambda query, key: seen.append(query.shape[2] * key.shape[2])):
        run.loss(batch)
    lengths, shared = batch["row_lengths"], batch["shared_lengths"]
    assert sum(seen) == model.config.num_hidden_layers * int(((lengths - shared) * lengths).sum())


def test_a_pack_in_parts_runs_what_rows_share_once_in_each():
    model = llama()
    widths = Widths(model)
    check(model, microbatch_tokens=30)
    parts = [columns for _, columns in widths.decoder[-2:]]
    assert max(parts) <= 30
    assert TOKENS - SHARED <= sum(parts) < TOKENS


@pytest.mark.parametrize("options", [{"loss_chunk": 3}, {"supervised_only": False}])
def test_other_levers_go_with_it(options):
    check(llama(), **options)


def test_where_tokens_may_not_be_shared_rows_are_run_whole(said):
    model = llama()
    widths = Widths(model)
    check(model, share_prefix=False)
    assert widths.decoder[-1] == (1, TOKENS)
    assert not said
    model = llama(attention_dropout=0.1).train()
    widths = Widths(model)
    LossComputer(model).loss(PackedCollator(("a",))(examples()))
    assert widths.decoder[-1] == (1, TOKENS)
    assert "attention_dropout=0.1 would fall on all rows alike" in said[-1]


def checkpointed(model):
    enable_checkpointing(model)


def compiled(model):
    compile_layers(model, backend="eager")


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("change", [checkpointed, pytest.param(compiled, marks=pytest.mark.slow)])
def test_layers_that_cannot_run_row_by_row_see_all_pairs(change, said):
    model = llama()
    change(model)
    model.train()
    check(model)
    assert "packed rows are not run one by one" in said[0]


def test_a_row_longer_than_the_window_sees_all_pairs(said):
    check(adapted(build("mistral", torch.float64, sliding_window=18)).eval())
    assert "a window of 18 tokens is shorter than a row of 19" in said[0]


def test_kernels_that_keep_rows_apart_are_left_to_it():
    with (
        Pack([2], [0]).attending(),
        pytest.raises(ValueError, match="flash_attention_2 keeps rows apart"),
    ):
        AttentionInterface().get_interface("flash_attention_2", None)


# On CUDA, as far as a CPU can tell.


def by_definition(query, key, value, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa):
    """What the documentation of `varlen_attn` says; causal from the last token back."""
    assert window_size == (-1, 0)
    assert (max_q, max_k) == (int(cu_q.diff().max()), int(cu_k.diff().max()))
    assert enable_gqa
    outputs = []
    for (a, b), (c, d) in zip(pairwise(cu_q.tolist()), pairwise(cu_k.tolist()), strict=True):
        q, k, v = query[a:b], key[c:d], value[c:d]
        k, v = (one.repeat_interleave(q.shape[1] // one.shape[1], 1) for one in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) * scale
        sees = torch.arange(d - c) <= torch.arange(b - a)[:, None] + (d - c) - (b - a)
        weights = F.softmax(scores.masked_fill(~sees, float("-inf")), -1)
        outputs.append(torch.einsum("hqk,khd->qhd", weights, v))
    return torch.cat(outputs)


@pytest.mark.parametrize("family", ["llama", "gemma3", "glm"])
def test_all_rows_at_once_have_the_loss_and_gradients_of_single_rows(monkeypatch, family):
    monkeypatch.setattr(pack_attention, "varlen_dtype", lambda *_: torch.float64)
    monkeypatch.setattr(pack_attention, "varlen_attn", by_definition)
    model = adapted(build(family, torch.float64, attn_implementation="sdpa")).eval()
    widths = Widths(model)
    check(model)
    assert widths.decoder[-1] == (1, TOKENS - SHARED)


class Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def test_the_kernel_of_torch_takes_a_pack_by_its_shapes(monkeypatch):
    monkeypatch.setattr(pack_attention, "varlen_dtype", lambda *_: torch.bfloat16)
    model = build("llama", torch.bfloat16, attn_implementation="sdpa").to("meta")
    pack = Pack([7, 5, 9], [0, 3, 0], "meta")
    ids_1N = torch.zeros(1, 21, dtype=torch.int64, device="meta")
    with Operators() as operators:
        with pack.attending():
            logits = model(**pack.inputs({"input_ids": ids_1N, "position_ids": ids_1N})).logits
        logits.sum().backward()
    assert logits.shape[:2] == (1, 18)
    layers = model.config.num_hidden_layers
    for name in ("torch_attn::_varlen_attn", "torch_attn::_varlen_attn_backward"):
        assert operators.names.count(name) == layers
    for weight in model.parameters():
        assert weight.grad.shape == weight.shape
