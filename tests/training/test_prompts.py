from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, seed_everything
from torch import Tensor, nn
from torch.testing import assert_close

import rosa_lightning.adapted
from rosa_lightning import DynamicLayerSelection, RoAEConfig, RoSAModule
from rosa_lightning.models.loading import enable_checkpointing, load_base
from rosa_lightning.training.loss import LossComputer
from rosa_lightning.training.speed import SpeedConfig
from tests import ranks
from tests.conftest import FAMILIES, build, data_module
from tests.distributed.test_sharding import reference
from tests.distributed.test_sharding import run as run_configured
from tests.integration.test_settings import trainer
from tests.model_zoo.small import build_small
from tests.training.test_loss import (
    Widths,
    adapted,
    batch_of,
    gradients,
    packed,
    single_rows,
)

CUT = {"prompt_gradients": False}


@contextmanager
def cut_before(model: nn.Module, column: int):
    """Within it, no gradient passes through what a layer computes for tokens before a column.

    Each projection's output is detached there, and each layer's, so that neither what these tokens
    are nor what others read of them is trained.
    """

    def cut(_module, _args, output):
        states = output[0] if isinstance(output, tuple) else output
        if states.ndim != 3:  # norms of single heads
            return output
        states = torch.cat([states[:, :column].detach(), states[:, column:]], dim=1)
        return (states, *output[1:]) if isinstance(output, tuple) else states

    layers = next(m for m in model.modules() if isinstance(m, nn.ModuleList))
    parts = [part for layer in layers for part in layer.modules() if hasattr(part, "weight")]
    handles = [part.register_forward_hook(cut) for part in [*parts, *layers]]
    yield
    for handle in handles:
        handle.remove()


def cut_rows(model, batch) -> Tensor:
    """The loss of each row alone and without padding, its prompt cut off; nothing of ours."""
    losses = []
    for row, labels in enumerate(batch["labels"]):
        kept = batch["attention_mask"][row].bool()
        wanted = labels[kept][1:]
        first = int((wanted != -100).int().argmax())
        with cut_before(model, first):
            ids = batch["input_ids"][row][kept][None]
            logits = model(input_ids=ids, use_cache=False).logits[0]
        losses.append(F.cross_entropy(logits[:-1], wanted, reduction="none")[wanted != -100])
    return torch.cat(losses).mean()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_is_the_same_and_its_gradient_that_of_rows_cut_after_their_prompt(family, said):
    model = adapted(build(family))
    for num_shared in (20, 2):
        batch = batch_of(num_shared)
        wanted = cut_rows(model, batch)
        whole = single_rows(model, batch)
        assert_close(wanted, whole)
        wanted_gradient = gradients(model, wanted)
        assert not torch.allclose(wanted_gradient, gradients(model, whole), rtol=0.01)
        for options in (
            {},
            {"supervised_only": False},
            {"loss_chunk": 5},
            {"microbatch_tokens": 40},
        ):
            found = LossComputer(model, SpeedConfig(**CUT, **options)).loss(batch)
            assert_close(found, wanted, rtol=1e-6, atol=1e-6)
            assert_close(gradients(model, found), wanted_gradient, rtol=1e-4, atol=1e-6)
    assert not said


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_on_a_quantised_base_gradients_are_those_of_cut_rows(dtype, base_folder):
    pytest.importorskip("torchao")
    model = adapted(load_base(str(base_folder), dtype=dtype, quantization="int8"))
    batch = batch_of()
    found, wanted = LossComputer(model, SpeedConfig(**CUT)).loss(batch), cut_rows(model, batch)
    near = 1e-4 if dtype == "float32" else 0.1
    both = gradients(model, found), gradients(model, wanted)
    assert abs(found - wanted) < 0.01 * wanted
    assert (both[0] - both[1]).norm() < near * both[1].norm()
    assert (gradients(model, single_rows(model, batch)) - both[1]).norm() > 0.3 * both[1].norm()


def test_prompts_and_responses_are_run_at_their_own_widths():
    model = adapted(build("llama"))
    widths = Widths(model)
    run = LossComputer(model, SpeedConfig(**CUT))
    run.loss(batch_of())
    widths.decoder.clear()
    # What is shared once, 6 more tokens of the longest prompt, 7 labels and the token before.
    run.loss(batch_of())
    assert widths.decoder == [(1, 20), (3, 6), (3, 8)]
    # A row that is all response but for its first token.
    batch = batch_of(num_shared=0, rests=[(5, 4), (5, 4)])
    found = run.loss(batch)
    assert widths.decoder[-1] == (2, 5)
    assert_close(found, cut_rows(model, batch), rtol=1e-5, atol=1e-5)


def test_what_the_graph_holds_follows_the_response():
    model = adapted(build("llama"))

    def held(options, prompt):
        sizes = []
        hooks = (lambda x: sizes.append(x.numel()) or x, lambda x: x)
        run = LossComputer(
            model, SpeedConfig(share_prefix=False, recompute_activations=False, **options)
        )
        with torch.autograd.graph.saved_tensors_hooks(*hooks):
            run.loss(batch_of(0, rests=[(prompt, 5)] * 2))
            sizes.clear()
            run.loss(batch_of(0, rests=[(prompt, 5)] * 2))
        return sum(sizes)

    assert held({}, 90) > 2 * held({}, 25)
    assert held(CUT, 90) < 2 * held(CUT, 25)
    assert held(CUT, 90) < held({}, 90) / 2


def test_evaluation_runs_whole_rows():
    model, batch = adapted(build("llama")).eval(), batch_of()
    run, widths = LossComputer(model, SpeedConfig(share_prefix=False, **CUT)), Widths(model)
    run.loss(batch)
    widths.decoder.clear()
    assert_close(run.loss(batch), single_rows(model, batch), rtol=1e-6, atol=1e-6)
    assert widths.decoder[0] == (3, 34)


def test_rows_without_a_label_add_nothing():
    model = adapted(build("llama"))
    batch = batch_of(0, rests=[(9, 3), (12, 2), (14, 7)])
    kept = {k: v[[0, 2]] if isinstance(v, Tensor) else v for k, v in batch.items()}
    batch["labels"][1] = -100
    run = LossComputer(model, SpeedConfig(**CUT))
    found, wanted = run.loss(batch), cut_rows(model, kept)
    assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    assert_close(gradients(model, found), gradients(model, wanted), rtol=1e-5, atol=1e-6)


def test_short_first_batches_and_windows_that_fit_are_run():
    model = adapted(build("mistral", sliding_window=24))
    batch = batch_of(0, rests=[(5, 2), (4, 1)])
    found = LossComputer(model, SpeedConfig(**CUT)).loss(batch)
    assert_close(found, cut_rows(model, batch), rtol=1e-6, atol=1e-6)


def test_a_gap_between_prompt_and_response_counts_in_a_window():
    model = adapted(build("mistral", sliding_window=24))
    # 20 columns, but 17 of the longest prompt and 16 of the longest response.
    batch = batch_of(0, rests=[(20, 2), (20, 15)])
    with pytest.raises(ValueError, match="window of 24 tokens is shorter than the 33 columns"):
        LossComputer(model, SpeedConfig(**CUT)).loss(batch)


REFUSED = {
    "a window of 24 tokens": lambda: build("mistral", sliding_window=24),
    "keeps more than keys": lambda: build_small("Qwen3NextConfig"),
    "counts positions by columns": lambda: build_small("RoFormerConfig"),
    "drop their keys and values": lambda: build("llama"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("reason", REFUSED)
def test_what_cannot_be_cut_is_refused_in_one_line(reason):
    model = adapted(REFUSED[reason]())
    if "drop" in reason:
        enable_checkpointing(model)
    run = LossComputer(model, SpeedConfig(**CUT))
    for _ in range(2):
        with pytest.raises(ValueError, match=reason) as error:
            run.loss(batch_of())
    assert "Set model.speed.prompt_gradients: true." in str(error.value)
    assert "\n" not in str(error.value)


def test_models_in_shards_and_packed_rows_are_refused():
    run = LossComputer(adapted(build("llama")), SpeedConfig(**CUT))
    with pytest.raises(ValueError, match="packed rows stand in one row"):
        run.loss(packed(batch_of()))
    run.reset()
    run.support.sharded = True
    with pytest.raises(ValueError, match="shards"):
        run.loss(batch_of())


@pytest.mark.filterwarnings("ignore")
def test_packed_batches_are_refused_before_the_base_is_loaded(sources, tmp_path, monkeypatch):
    monkeypatch.setattr(rosa_lightning.adapted, "load_base", None)
    module = RoSAModule("tiny", RoAEConfig(rank=4), speed=SpeedConfig(**CUT))
    data = data_module(sources=sources, batching="packed", max_length=128)
    with pytest.raises(
        ValueError, match="prompt_gradients=false cannot be kept with batching=pack"
    ):
        trainer(tmp_path).fit(module, datamodule=data)


@pytest.mark.parametrize("name", ["compile", "gradient_checkpointing"])
def test_levers_that_exclude_each_other_are_told_at_once(name):
    with pytest.raises(ValueError, match=f"prompt_gradients=false and {name}=true"):
        SpeedConfig(prompt_gradients=False, **{name: True})


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_run_that_selects_layers_resumes_bit_for_bit(precision, sources, tmp_path):
    class Keep(Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 2 and not path.exists():
                trainer.save_checkpoint(path)

    def trained(ckpt_path=None, **speed):
        seed_everything(0)
        module = RoSAModule("tiny", RoAEConfig(rank=4), speed=SpeedConfig(**speed))
        callbacks = [DynamicLayerSelection(num_active=2, interval=1), Keep()]
        run = trainer(tmp_path, max_steps=4, callbacks=callbacks, precision=precision)
        data = data_module(sources=sources, batch_size=4, max_length=128)
        run.fit(module, datamodule=data, ckpt_path=ckpt_path)
        return module.state_dict()

    path = tmp_path / "two.ckpt"
    whole = trained(**CUT)
    resumed = trained(path, **CUT)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    through_all = trained()
    assert not all(torch.equal(whole[name], through_all[name]) for name in whole)


def under_ddp(folder) -> dict:
    return run_configured("ddp", folder, "float32", "--model.speed.prompt_gradients", "false")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_two_ranks_train_as_one_process_on_the_joint_batch(tmp_path):
    runs = ranks.launch(under_ddp, tmp_path)
    cut, through_all = (
        reference(runs, dtype="float32", speed=SpeedConfig(**speed)) for speed in (CUT, {})
    )
    for run in runs:
        assert_close(run["adapters"], cut, rtol=0, atol=1e-6)
    assert not all(torch.allclose(cut[name], through_all[name], atol=1e-5) for name in cut)
