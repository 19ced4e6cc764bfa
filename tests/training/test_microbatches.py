from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch import Callback, seed_everything
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from rosa_lightning import DynamicLayerSelection, ReasoningDataModule
from rosa_lightning.training.loss import LossComputer
from rosa_lightning.training.microbatches import microbatches
from rosa_lightning.training.recompute import MemoryTracker
from rosa_lightning.training.speed import SpeedConfig
from tests import ranks
from tests.conftest import FAMILIES, build, rosa_module
from tests.model_zoo.small import build_small
from tests.test_module import trainer
from tests.training.test_loss import (
    HEADS,
    Widths,
    adapted,
    batch_of,
    check,
    gradients,
    packed,
    single_rows,
)

RESTS = ((9, 3), (4, 2), (14, 7), (5, 1), (4, 3), (12, 2))
"""Tokens of each row after the beginning, and how many of them are the response."""


def rows_of(batch: dict[str, Any]) -> list[tuple[list[int], ...]]:
    """Ids, positions and labels of each row, without padding."""
    names = ("input_ids", "position_ids", "labels")
    if "row_lengths" in batch:
        split = [batch[name][0].split(batch["row_lengths"].tolist()) for name in names]
        assert batch["attention_mask"].all()
    else:
        kept_BT = batch["attention_mask"].bool()
        split = [[r[k] for r, k in zip(batch[n], kept_BT, strict=True)] for n in names]
    return [tuple(part.tolist() for part in row) for row in zip(*split, strict=True)]


def best_split(lengths: list[int], size, most: int) -> tuple[int, int]:
    """By trying all: as few groups as can be, and how large the largest must be."""
    found = []
    for cuts in range(2 ** (len(lengths) - 1)):
        groups = [[lengths[0]]]
        for number, length in enumerate(lengths[1:]):
            if cuts >> number & 1:
                groups.append([])
            groups[-1].append(length)
        sizes = [size(group) for group in groups]
        if all(n <= most or len(g) == 1 for n, g in zip(sizes, groups, strict=True)):
            found.append((len(groups), max(n for n in sizes)))
    return min(found)


@given(
    rests=st.lists(st.tuples(st.integers(2, 30), st.just(1)), min_size=1, max_size=7),
    num_tokens=st.integers(1, 250),
    num_shared=st.sampled_from([0, 12]),
    pack=st.booleans(),
)
def test_parts_hold_every_row_once_and_are_few_and_small(rests, num_tokens, num_shared, pack):
    batch = batch_of(num_shared=12, rests=rests)
    batch, num_shared = (packed(batch), 0) if pack else (batch, num_shared)

    def size(lengths: list[int]) -> int:
        if pack:
            return sum(lengths)
        return num_shared + len(lengths) * (max(lengths) - num_shared)

    parts = microbatches(batch, num_tokens, num_shared)
    assert sorted(row for part in parts for row in rows_of(part)) == sorted(rows_of(batch))
    lengths = [[len(ids) for ids, _, _ in rows_of(part)] for part in parts]
    whole = [len(ids) for ids, _, _ in rows_of(batch)]
    wanted = best_split(whole if pack else sorted(whole, reverse=True), size, num_tokens)
    assert (len(parts), max(map(size, lengths))) == wanted
    assert (parts == [batch]) == (len(parts) == 1)
    for part in parts:
        if not pack:
            assert part["attention_mask"][:, 0].any()
            assert part["attention_mask"][:, -1].all()


KINDS = (*FAMILIES, "soft-capped", "without logits_to_keep", "experts")


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_in_parts_has_the_loss_and_the_gradients_of_its_rows(kind):
    if kind == "experts":
        model = adapted(build_small("MixtralConfig"))
    else:
        model = adapted(HEADS[kind]() if kind in HEADS else build(kind)).eval()
    batch = batch_of(rests=RESTS)
    check(model, batch, microbatch_tokens=70, share_prefix=kind != "llama")


def test_a_packed_batch_is_taken_in_parts_of_whole_rows():
    model, batch = adapted(build("llama")), batch_of(rests=RESTS)
    wanted = single_rows(model, batch)
    run, widths = LossComputer(model, SpeedConfig(microbatch_tokens=70)), Widths(model)
    run.loss(packed(batch))
    widths.decoder.clear()
    found = run.loss(packed(batch))
    assert len(widths.decoder) == 3
    assert all(width <= 70 for _, width in widths.decoder)
    assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert_close(gradients(model, found), gradients(model, wanted), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num_tokens", [1, 40, 70, 110, 300, None, "auto"])
def test_no_more_tokens_are_run_at_once_than_wanted(num_tokens):
    model, batch = adapted(build("llama")), batch_of(rests=RESTS)  # 6 x 34 tokens
    speed = SpeedConfig(share_prefix=False, microbatch_tokens=num_tokens)
    run = LossComputer(model, speed)
    run.loss(batch)  # tries things out
    widths = Widths(model)
    run.loss(batch).backward()
    sizes = [rows * width for rows, width in widths.decoder]
    wanted = {1: 6, 40: 6, 70: 3, 110: 2}.get(num_tokens, 1)
    assert len(sizes) == wanted
    assert wanted == 1 or max(sizes) <= max(num_tokens, 34)
    # Nothing is differentiated, so nothing is held, and the batch can be run whole.
    widths.decoder.clear()
    with torch.no_grad():
        run.loss(batch)
    assert widths.decoder == [(6, 34)]


def test_the_graphs_of_parts_are_never_alive_together():
    model, batch = adapted(build("llama")), batch_of(rests=RESTS)
    peaks = {}
    for num_tokens in (None, 40):
        speed = SpeedConfig(share_prefix=False, microbatch_tokens=num_tokens)
        run = LossComputer(model, speed)
        run.loss(batch)
        with MemoryTracker(model.parameters()) as live:
            before = live.now
            run.loss(batch).backward()
        model.zero_grad()
        peaks[num_tokens] = live.peak - before
    assert peaks[40] < 0.3 * peaks[None]


def test_a_loss_in_parts_goes_on_into_any_graph_and_backward_twice():
    model, batch = adapted(build("llama")), batch_of(rests=RESTS)
    wanted = gradients(model, single_rows(model, batch))
    loss = 3 * LossComputer(model, SpeedConfig(microbatch_tokens=40)).loss(batch)
    loss.backward(retain_graph=True)
    loss.backward()
    found = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    assert_close(found, 6 * wanted, rtol=1e-5, atol=1e-5)


def test_rows_without_loss_are_no_part():
    model, batch = adapted(build("llama")), batch_of(rests=RESTS)
    batch["labels"][3:] = -100
    check(model, batch, microbatch_tokens=40)
    batch["labels"][:] = -100
    with pytest.raises(ValueError, match="6 rows has no token that carries loss"):
        LossComputer(model, SpeedConfig(microbatch_tokens=40)).loss(batch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_autocast_the_gradients_are_those_of_the_parts_one_by_one(dtype):
    model, batch = adapted(build("llama", dtype=dtype)), batch_of(rests=RESTS)
    own = nn.Parameter(torch.randn(model.config.hidden_size, model.config.hidden_size) / 8)

    def in_float32(module, args, out: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return out + (out.float() @ own).to(out.dtype)

    model.get_input_embeddings().register_forward_hook(in_float32)
    trained = [own, *(p for p in model.parameters() if p.requires_grad)]
    run = LossComputer(model, SpeedConfig(microbatch_tokens=70, share_prefix=False))
    for _ in range(2):  # tries things out at first
        with torch.autocast("cpu", torch.bfloat16):
            loss = run.loss(batch)
    found = torch.autograd.grad(loss, trained)
    for part in microbatches(batch, 70):
        share = (part["labels"] != -100).sum() / (batch["labels"] != -100).sum()
        with torch.autocast("cpu", torch.bfloat16):
            one = run.loss(part) * share
        one.backward()
    for grad, weight in zip(found, trained, strict=True):
        assert_close(grad, weight.grad, rtol=1e-5, atol=1e-6)


def with_a_hook(run: LossComputer) -> None:
    weight = next(weight for weight in run.model.parameters() if weight.requires_grad)
    weight.register_hook(lambda gradient: 2 * gradient)


def reentrant(run: LossComputer) -> None:
    for layer in run.model.model.layers:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=True)
    run.model.enable_input_require_grads()


OBSTACLES = {
    "shards": lambda run: setattr(run.support, "sharded", True),
    "16-mixed": lambda run: None,
    "hooks on parameters": with_a_hook,
    "reentrant": reentrant,
}


@pytest.mark.parametrize("why", OBSTACLES)
def test_where_parts_would_be_wrong_a_batch_is_run_whole(why, said):
    model, batch = adapted(build("llama")), batch_of(rests=RESTS)
    widths = Widths(model)
    run = LossComputer(model, SpeedConfig(share_prefix=False, microbatch_tokens=40))
    OBSTACLES[why](run)
    for _ in range(2):
        with torch.autocast("cpu", torch.float16, enabled=why == "16-mixed"):
            loss = run.loss(batch)
    assert widths.decoder[-1] == (6, 34)
    loss.backward()
    (about,) = [line for line in said if "run whole" in line]
    assert why in about


@pytest.mark.parametrize("num_tokens", [0, -1, True, 2048.0, "2048", "automatic"])
def test_parts_of_nothing_are_refused(base_folder, num_tokens):
    with pytest.raises(ValueError, match=r"whole number .*\. Set model\.speed\.microbatch_tokens"):
        rosa_module(str(base_folder), microbatch_tokens=num_tokens)


# --- several processes ----------------------------------------------------------------------


class NormGradients(Callback):
    """Keeps what selection scores by, before it does so."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def on_after_backward(self, trainer, pl_module) -> None:
        weights = (p for n, p in pl_module.named_parameters() if "norm" in n)
        self.seen += [weight.grad.clone() for weight in weights if weight.grad is not None]


def adapters_after(num_tokens: int | None, folder) -> tuple[list[Tensor], list[Tensor], int]:
    """What a run over the demonstration data trains, on two ranks whose parts differ in number."""
    seed_everything(0)
    module = rosa_module("tiny", microbatch_tokens=num_tokens, share_prefix=False)
    data = ReasoningDataModule(batch_size=4)
    dls, norms = DynamicLayerSelection(num_active=2, interval=2), NormGradients()
    options = {"devices": 2, "strategy": ranks.ddp(), "max_steps": 3, "limit_val_batches": 0}
    run = trainer(folder, callbacks=[norms, dls], **options)
    module.configure_model()
    widths = Widths(module.model)
    run.fit(module, data)
    trained = [p.detach().clone() for n, p in module.named_parameters() if "roae" in n]
    return trained, norms.seen, len(widths.decoder)


def both_ways(folder) -> dict[str, Any]:
    return {"whole": adapters_after(None, folder), "parts": adapters_after(150, folder)}


@pytest.mark.slow
def test_two_ranks_train_in_parts_as_with_whole_batches(tmp_path):
    seen = ranks.launch(both_ways, tmp_path)
    for rank in seen:
        whole, scores, num_passes = rank["whole"]
        parts, scores_in_parts, num_parts = rank["parts"]
        assert num_parts > num_passes
        assert scores
        assert_close(scores_in_parts, scores, rtol=1e-3, atol=1e-6)
        assert_close(parts, whole, rtol=1e-3, atol=1e-5)
    assert_close(seen[0]["parts"][0], seen[1]["parts"][0], rtol=0, atol=0)
