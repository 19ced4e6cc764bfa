from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, GraniteConfig

from rosa_lightning import RoAEConfig, inject_roae
from rosa_lightning.models.loading import enable_checkpointing
from rosa_lightning.training import loss as forward
from rosa_lightning.training.loss import LossComputer
from rosa_lightning.training.shared_prefix import rows_after_prefix
from rosa_lightning.training.speed import SpeedConfig
from tests.conftest import FAMILIES, SMALL, build, rosa_module
from tests.model_zoo.small import build_small, causal_models

RESTS = ((9, 3), (4, 2), (14, 7))
"""Tokens of each row after the beginning, and how many of them are the response."""


def batch_of(num_shared: int = 20, rests=RESTS, vocab: int = 96) -> dict[str, Any]:
    """Random rows with a common beginning, padded on the left."""
    start = torch.randint(3, vocab, (num_shared,))
    rows = [torch.cat([start, torch.randint(3, vocab, (length,))]) for length, _ in rests]
    width = max(map(len, rows))
    ids, mask = torch.zeros(2, len(rows), width, dtype=torch.long)
    labels = torch.full_like(ids, -100)
    for number, (row, (_, response)) in enumerate(zip(rows, rests, strict=True)):
        ids[number, width - len(row) :] = row
        mask[number, width - len(row) :] = 1
        labels[number, width - response :] = row[-response:]
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
        "labels": labels,
        "answer_mask": labels != -100,
        "num_label_positions": max(response for _, response in rests),
        "num_shared": num_shared,
        "task": ["boolq"] * len(rows),
    }


def single_rows(model, batch) -> Tensor:
    """The loss of each row alone and without padding, through the whole head; nothing of ours."""
    losses = []
    for row, labels in enumerate(batch["labels"]):
        kept = batch["attention_mask"][row].bool()
        logits = model(input_ids=batch["input_ids"][row][kept][None], use_cache=False).logits[0]
        wanted = labels[kept][1:]
        losses.append(F.cross_entropy(logits[:-1], wanted, reduction="none")[wanted != -100])
    return torch.cat(losses).mean()


def gradients(model, loss: Tensor) -> Tensor:
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    found = torch.autograd.grad(loss, weights, allow_unused=True)
    return torch.cat([loss.new_zeros(0), *(one.flatten() for one in found if one is not None)])


def adapted(model, **options):
    inject_roae(model, RoAEConfig(rank=4, **options))
    for name, weight in model.named_parameters():
        if name.endswith("roae_B"):
            torch.nn.init.normal_(weight, std=0.3)
    return model.train()


def granite():
    scales = {"logits_scaling": 7.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.4}
    config = GraniteConfig(**SMALL, **scales, attention_multiplier=0.2)
    return AutoModelForCausalLM.from_config(config)


def check(model, batch, **options) -> None:
    """Loss and gradients are those of single rows without padding."""
    wanted = single_rows(model, batch)
    found = LossComputer(model, SpeedConfig(**options)).loss(batch)
    assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    assert_close(gradients(model, found), gradients(model, wanted), rtol=1e-5, atol=1e-6)


class Widths:
    """Rows of what the head is given, and shapes of what the decoder is given, call by call."""

    def __init__(self, model) -> None:
        self.head, self.decoder = [], []
        head = model.get_output_embeddings()
        head.register_forward_pre_hook(lambda _, args: self.head.append(args[0].shape[:-1].numel()))
        embedding = model.get_input_embeddings()
        embedding.register_forward_pre_hook(
            lambda _, args: self.decoder.append(tuple(args[0].shape))
        )


HEADS = {
    "llama": lambda: build("llama"),
    "soft-capped": lambda: build("gemma2", final_logit_softcapping=2.0),
    "cohere": lambda: build("cohere", logit_scale=0.3),
    "granite": granite,
    "without logits_to_keep": lambda: build_small("GPTNeoXJapaneseConfig"),
}


@pytest.mark.parametrize("chunk", [None, 1, 5, 12, 100])
@pytest.mark.parametrize("kind", HEADS)
def test_the_head_alone_where_there_is_loss_gives_the_loss_of_the_whole(kind, chunk, said):
    model = adapted(HEADS[kind]()).eval()
    batch = batch_of()
    check(model, batch, share_prefix=False, loss_chunk=chunk)
    assert not said
    widths = Widths(model)
    run = LossComputer(model, SpeedConfig(share_prefix=False, loss_chunk=chunk))
    run.loss(batch)
    widths.head.clear()
    loss = run.loss(batch)
    # Not the 3 x 7 of the longest response, and never more than a chunk.
    assert max(widths.head) == min(12, chunk or 12)
    computed = len(widths.head)
    loss.backward()
    assert len(widths.head) == computed


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("tokens", [None, 40])
def test_a_head_that_trains_has_its_gradient_in_chunks_too(tied, tokens):
    model = build("llama", tie_word_embeddings=tied).requires_grad_()
    check(model, batch_of(), loss_chunk=5, microbatch_tokens=tokens)
    # Hooks see one gradient, that of the batch.
    seen = []
    model.lm_head.weight.register_hook(seen.append)
    batch = batch_of()
    (wanted,) = torch.autograd.grad(single_rows(model, batch), [model.lm_head.weight])
    seen.clear()
    model.lm_head.weight.grad = None
    LossComputer(model, SpeedConfig(loss_chunk=5)).loss(batch).backward()
    assert_close(model.lm_head.weight.grad, wanted, rtol=1e-5, atol=1e-6)
    assert len(seen) == 1


def test_under_a_gradient_scaler_no_gradient_is_taken_before_the_backward_pass(monkeypatch):
    model, batch = adapted(build("llama")), batch_of()
    run = LossComputer(model, SpeedConfig(loss_chunk=5))
    taken = []
    monkeypatch.setattr(forward, "sum_at_once", lambda *args: taken.append(args))
    with torch.autocast("cpu", torch.float16):
        run.loss(batch).backward()
    assert not taken


@pytest.mark.parametrize("tied", [False, True])
def test_by_default_logits_come_in_equal_chunks_that_fit(tied, monkeypatch):
    model, batch = build("llama", tie_word_embeddings=tied).requires_grad_(), batch_of()
    check(model, batch)
    widths, run = Widths(model), LossComputer(model)
    run.loss(batch)
    widths.head.clear()
    run.loss(batch)
    assert max(widths.head) == 12  # all of them fit
    monkeypatch.setattr(forward, "LOGITS_AT_ONCE", 5 * 4 * model.vocab_size)
    check(model, batch)
    check(model, batch, microbatch_tokens=40)
    widths.head.clear()
    run.loss(batch)
    assert [rows for rows in widths.head if rows > 1][-3:] == [4, 4, 4]


def test_by_default_gradients_that_come_later_are_of_all_logits_at_once(monkeypatch):
    model, batch = adapted(build("llama")), batch_of()
    monkeypatch.setattr(forward, "LOGITS_AT_ONCE", 1)
    widths, run = Widths(model), LossComputer(model, SpeedConfig(share_prefix=False))
    with torch.autocast("cpu", torch.float16):
        run.loss(batch).backward()
    assert widths.head[-1] == 12


@pytest.mark.parametrize("chunk", [None, 5])
@pytest.mark.parametrize("prompt_gradients", [True, False])
@pytest.mark.parametrize("num_shared", [0, 20])
def test_few_shapes_occur_and_loss_and_gradients_are_the_same(
    num_shared, prompt_gradients, chunk, monkeypatch
):
    model = adapted(build("llama"))
    options = SpeedConfig(loss_chunk=chunk, prompt_gradients=prompt_gradients)
    shapes = set()
    for rests in (RESTS, ((9, 3), (16, 8), (10, 4)), ((11, 2), (12, 7), (13, 9))):
        batch, run = batch_of(num_shared, rests), LossComputer(model, options)
        found = []
        for rounds_up in (False, True):
            monkeypatch.setattr(LossComputer, "_rounds_up", lambda *_, on=rounds_up: on)
            run.loss(batch)
            widths = Widths(model)
            loss = run.loss(batch)
            correct = run.score(batch).correct
            found.append((loss, gradients(model, loss), correct))
        assert_close(found[1][:2], found[0][:2], rtol=1e-5, atol=1e-6)
        assert found[1][2].equal(found[0][2])
        shapes |= {shape[1] for shape in widths.decoder if shape[0] > 1}
        assert chunk or widths.head[-1] in (24, 32)  # after prompts there are no more
    assert all(width % 8 == 0 for width in shapes)


@pytest.mark.parametrize("window", [34, 36])
@pytest.mark.parametrize("prompt_gradients", [True, False])
def test_columns_beyond_a_window_are_not_added(window, prompt_gradients, monkeypatch):
    """A batch of 34 columns, 20 of them shared, is run with 36 where the window holds these."""
    model, batch = adapted(build("mistral", sliding_window=window)), batch_of(20)
    run = LossComputer(model, SpeedConfig(prompt_gradients=prompt_gradients))
    if not prompt_gradients:
        wanted = run.loss(batch)
    monkeypatch.setattr(LossComputer, "_rounds_up", lambda *_: True)
    if prompt_gradients:
        wanted = single_rows(model, batch)
    assert_close(run.loss(batch), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_shapes_are_rounded_in_bfloat16_alone(autocast):
    model, batch = adapted(build("llama")), batch_of(0)
    run, widths = LossComputer(model), Widths(model)
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        run.loss(batch)
    assert widths.decoder[-1] == (3, 16 if autocast else 14)


def test_logits_of_all_tokens_where_that_is_asked_for():
    model, batch = adapted(build("llama")), batch_of()
    options = {"share_prefix": False, "supervised_only": False}
    check(model.eval(), batch, **options)
    widths = Widths(model)
    LossComputer(model, SpeedConfig(**options)).loss(batch)
    assert widths.head == [batch["input_ids"].numel()]
    with pytest.raises(ValueError, match="loss_chunk has no effect"):
        SpeedConfig(supervised_only=False, loss_chunk=4)


@pytest.mark.parametrize("family", ["llama", "gemma2", "neox"])
def test_after_the_last_attention_only_supervised_positions_are_computed(family):
    model, batch, counts = adapted(build(family)), batch_of(), []
    layers = (model.base_model.layers[0].mlp, model.base_model.layers[-1].mlp)
    run = LossComputer(model)
    run.loss(batch)
    for mlp in layers:
        mlp.register_forward_hook(lambda _mlp, args, _out: counts.append(args[0].shape[1]))
    run.loss(batch)
    # The beginning, then the rows.
    assert counts == [20, 20, 14, 12]


def test_a_last_block_that_looks_at_other_tokens_is_computed_whole(monkeypatch):
    model, batch = adapted(build("llama")), batch_of()
    mlp = model.base_model.layers[-1].mlp
    own = mlp.forward
    monkeypatch.setattr(mlp, "forward", lambda states: own(states + states.roll(1, dims=1)))
    check(model, batch, share_prefix=False)


@pytest.mark.parametrize("chunk", [None, 5])
def test_answers_are_scored_as_the_whole_head_scores_them(chunk):
    model = adapted(build("llama")).eval()
    batch = batch_of(rests=((9, 3), (8, 2), (14, 7), (6, 2)))
    for row, num in ((0, 3), (2, 7), (3, 2)):
        mask = batch["attention_mask"][row].bool()
        prompt = batch["input_ids"][row][mask][None, :-num]
        written = model.generate(prompt, max_new_tokens=num, do_sample=False, eos_token_id=95)
        batch["labels"][row, -num:] = batch["input_ids"][row, -num:] = written[0, -num:]
    batch["labels"][2, -1] = batch["input_ids"][2, -1] = 3 + (batch["labels"][2, -1] - 2) % 90
    batch["labels"][3, -2] = batch["input_ids"][3, -2] = 3 + (batch["labels"][3, -2] - 2) % 90
    batch["answer_mask"][3, -2] = False  # wrong, and no part of the answer
    with torch.inference_mode():
        scored = LossComputer(model, SpeedConfig(loss_chunk=chunk)).score(batch)
        last = model(input_ids=batch["input_ids"][3][batch["attention_mask"][3].bool()][None])
    fourth = bool(last.logits[0, -2].argmax() == batch["labels"][3, -1])
    assert scored.correct.tolist() == [True, False, False, fourth]
    assert scored.count == 14
    assert_close(scored.loss, single_rows(model, batch).detach(), rtol=1e-6, atol=1e-6)


def test_a_head_that_looks_at_other_positions_is_given_all_of_them(said):
    model = adapted(build("llama"))
    head = model.lm_head.forward
    model.lm_head.forward = lambda x: head(x + x.cumsum(1) * 0.1)
    whole = model.forward
    # Only all columns give what single rows give: padding adds to the sum.
    model.forward = lambda *args, logits_to_keep=0, **kwargs: whole(*args, **kwargs)
    batch = batch_of(rests=((9, 3), (9, 2)))
    check(model, {**batch, "num_label_positions": 28}, share_prefix=False)
    assert [line for line in said if "gives other logits" in line] == said
    assert len(said) == 1


# The shared beginning.


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        *((family, torch.float64) for family in FAMILIES),
        *((family, torch.float32) for family in ("llama", "gemma2")),
        *(
            pytest.param(family, torch.float32, marks=pytest.mark.slow)
            for family in FAMILIES
            if family not in ("llama", "gemma2")
        ),
    ],
)
def test_after_a_shared_prefix_loss_and_gradients_are_those_of_single_rows(family, dtype, said):
    model = adapted(build(family)).to(dtype)
    widths, batch = Widths(model), batch_of()
    run = LossComputer(model)
    run.loss(batch)
    widths.decoder.clear()
    widths.head.clear()
    run.loss(batch)
    assert widths.decoder == [(1, 20), (3, 14)]
    assert widths.head == [12]  # the prefix needs no logits
    assert not said
    check(model, batch)
    check(model, batch, loss_chunk=5)


def test_the_switch_and_batches_not_worth_it_compute_whole_rows(said):
    model = adapted(build("llama"))
    for batch, switch in (
        (batch_of(), False),
        (batch_of(num_shared=3), True),
        (batch_of(rests=RESTS[:1]), True),
    ):
        run, widths = LossComputer(model, SpeedConfig(share_prefix=switch)), Widths(model)
        run.loss(batch)
        assert widths.decoder[-1] == tuple(batch["input_ids"].shape)
        check(model, batch, share_prefix=switch)
    assert not said


def test_a_model_in_shards_is_run_once_over_whole_rows(said):
    model = adapted(build("llama"))
    run, widths, batch = LossComputer(model, SpeedConfig(loss_chunk=2)), Widths(model), batch_of()
    run.support.sharded = True
    assert_close(run.loss(batch), single_rows(model, batch), rtol=1e-6, atol=1e-6)
    assert widths.decoder[0] == (3, 34)
    assert len(said) == 2
    assert all("shards" in line for line in said)
    assert any("in spite of model.speed.loss_chunk" in line for line in said)


DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
FALL_BACKS = {
    "a window of 24": lambda: build("mistral", sliding_window=24),
    "keeps more than keys": lambda: build_small("Qwen3NextConfig"),
    "length of a text": lambda: build("llama", rope_parameters=DYNAMIC, max_position_embeddings=16),
    "counts positions by columns": lambda: build_small("RoFormerConfig"),
    "drop their keys and values": lambda: build("llama"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("reason", FALL_BACKS)
def test_what_cannot_be_shared_is_computed_whole_and_said_once(reason, said):
    model = adapted(FALL_BACKS[reason]())
    if "positions" in reason:
        model.eval()  # its dropout speaks first
    if reason == "drop their keys and values":
        enable_checkpointing(model)
    rests = [(9, 3), (9, 2), (9, 7)] if "length" in reason else RESTS
    batch = batch_of(rests=rests)  # without padding where that changes lengths
    check(model, batch)
    (line,) = said
    assert reason in line
    assert "\n" not in line
    run = LossComputer(model)
    run.loss(batch)
    run.loss(batch)
    assert len(said) == 2


@pytest.mark.parametrize(
    ("where", "value"),
    [("roae", {"dropout": 0.5}), ("base", {"attention_dropout": 0.5}), ("phi", {})],
)
def test_with_dropout_rows_are_whole_in_training_and_shared_in_evaluation(where, value, said):
    if where == "phi":
        model = adapted(build("phi", resid_pdrop=0.5))
    else:
        model = build("llama", **(value if where == "base" else {}))
        model = adapted(model, **(value if where == "roae" else {}))
    batch, run = batch_of(), LossComputer(model)
    # Two rows that are alike draw differently, also in what they share.
    batch = {k: v[:1].repeat(2, 1) if isinstance(v, Tensor) else v for k, v in batch.items()}
    states = []
    handle = model.model.layers[0].register_forward_hook(lambda *args: states.append(args[2]))
    run.loss(batch)
    last = states[-1] if isinstance(states[-1], Tensor) else states[-1][0]
    assert last.shape[:2] == batch["input_ids"].shape
    assert not torch.equal(last[0, 6:20], last[1, 6:20])
    handle.remove()
    assert len(said) == 1
    assert "0.5 would fall on all rows alike" in said[0]
    model.eval()
    widths = Widths(model)
    run.loss(batch)
    assert widths.decoder[-2:] == [(1, 20), (2, 14)]
    check(model, batch)


def test_a_model_whose_cache_is_without_gradients_computes_whole_rows(said, monkeypatch):
    model = adapted(build("llama"))

    def detached(*args):
        inputs = rows_after_prefix(*args)
        (cache,) = (value for value in inputs.values() if hasattr(value, "layers"))
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys.detach(), layer.values.detach()
        return inputs

    monkeypatch.setattr("rosa_lightning.training.shared_prefix.rows_after_prefix", detached)
    check(model, batch_of())
    assert "the gradients of LlamaForCausalLM differ" in said[0]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", causal_models())
def test_every_adapted_model_gives_the_loss_of_single_rows(name, said):
    try:
        model = build_small(name)
        inject_roae(model, RoAEConfig(rank=2))
    except Exception as error:
        pytest.skip(f"not adapted: {error}")
    for weight_name, weight in model.named_parameters():
        if weight_name.endswith("roae_B"):
            torch.nn.init.normal_(weight, std=0.3)
    batch, widths = batch_of(), Widths(model)
    wanted = single_rows(model.eval(), batch)
    found = LossComputer(model).loss(batch)
    assert_close(found, wanted, rtol=1e-6, atol=2e-6)
    a, b = gradients(model, found), gradients(model, wanted)
    assert (widths.decoder[-1] == (3, 14)) != any("shared prefix" in line for line in said)
    if (a - b).norm() >= 2e-5 * b.norm():
        # Single rows can be far from those in float64, too: small Gemma 4 by 5e-4.
        model.double()
        exact = gradients(model, single_rows(model, batch))
        assert (a - exact).norm() < min(1.5 * (b - exact).norm(), 1e-3 * exact.norm())


# Training.


def trained(folder, batches, **options) -> list[float]:
    """Losses over fixed batches, with the first layer frozen."""
    torch.manual_seed(0)
    # At a rate of 1e-2 and an eps of 1e-4 rounding alone grows to 0.05 within 100 steps.
    optimizer = partial(torch.optim.AdamW, lr=3e-3, eps=1e-3)
    module = rosa_module(str(folder), RoAEConfig(rank=4), optimizer=optimizer, **options)
    module.configure_model()
    module.train()
    for weight in module.model.model.layers[:1].parameters():
        weight.requires_grad_(False)
    weights = [weight for weight in module.parameters() if weight.requires_grad]
    stepper, losses = module.make_optimizer(weights), []
    for batch in batches:
        loss = module.loss(batch)
        stepper.zero_grad()
        loss.backward()
        stepper.step()
        losses.append(loss.item())
    return losses


def packed(batch) -> dict[str, Any]:
    """The same rows, laid end to end."""
    kept_BT = batch["attention_mask"].bool()
    names = ("input_ids", "attention_mask", "position_ids", "labels", "answer_mask")
    flat = {name: batch[name][kept_BT][None] for name in names}
    return {**flat, "row_lengths": kept_BT.sum(1), "task": batch["task"]}


@pytest.mark.slow
def test_a_hundred_steps_train_alike_with_each_lever_on_and_off(base_folder, monkeypatch):
    batches = [batch_of(vocab=250) for _ in range(4)] * 25
    plain = {"share_prefix": False, "recompute_activations": False}
    with monkeypatch.context() as patch:  # the head over all that is no padding
        patch.setattr(forward.head, "unsupported_reason", lambda *_: "switched off")
        patch.setattr(forward, "forward_arguments", lambda _: frozenset())
        wanted = trained(base_folder, batches, **plain)
    assert wanted[-1] < wanted[0] - 0.4
    ways = {
        "the head": trained(base_folder, batches, **plain),
        "the head in chunks": trained(base_folder, batches, **plain, loss_chunk=1),
        "activations made again": trained(base_folder, batches, share_prefix=False),
        "a shared beginning": trained(base_folder, batches),
        "shared, in chunks": trained(base_folder, batches, loss_chunk=5),
        "in parts": trained(base_folder, batches, microbatch_tokens=30),
        "checkpointing": trained(base_folder, batches, gradient_checkpointing=True),
        "packed": trained(base_folder, [packed(batch) for batch in batches]),
    }
    for way, losses in ways.items():
        worst = max(abs(a - b) for a, b in zip(losses, wanted, strict=True))
        assert worst < 1e-4, f"{way}: {worst}"
