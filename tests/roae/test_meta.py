from __future__ import annotations

import copy
import logging
import re
import resource
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from torch._subclasses.fake_tensor import FakeTensor

from rosa_lightning.models.loading import load_skeleton
from rosa_lightning.roae.inject import RoAEReport, inject_roae, roae_layers
from rosa_lightning.roae.layer import RoAEConfig
from rosa_lightning.roae.tracing import fake_tensors, run_on_meta
from rosa_lightning.utils.modules import replaced_tensors
from tests.conftest import build
from tests.model_zoo.small import build_small, causal_models

EVERY = ("q", "k", "v", "o", "gate", "up", "down")
# Separate and fused, interleaved, latent, with norms, experts, tied weights, kinds of layers, a
# table of positions kept as a weight.
FAST = [
    *("Llama", "Qwen3", "Gemma3Text", "Phi3", "GPTNeoX", "Glm4", "Cohere2", "DeepseekV3"),
    *("GptOss", "GPTJ", "RoFormer", "SmolLM3", "Qwen2Moe", "Qwen3Next"),
]
MODELS = [
    pytest.param(name, marks=[] if name.removesuffix("Config") in FAST else pytest.mark.slow)
    for name in causal_models()
]


def skeleton(config: transformers.PreTrainedConfig, folder: Path, **options: str):
    config.save_pretrained(folder)
    return load_skeleton(str(folder), **{"dtype": "float32", **options})


def report_on(model: torch.nn.Module, targets: tuple[str, ...]) -> RoAEReport | None:
    """The report with as many of the targets as the model has; None if it is refused."""
    while targets:
        try:
            return inject_roae(model, RoAEConfig(rank=2, targets=targets))
        except ValueError as error:
            found = re.search(r": (\w+) can be adapted in no layer", str(error))
            targets = tuple(t for t in targets if found and t != found[1])
    return None


def frequencies(report: RoAEReport) -> list[float]:
    return [f for p in report.projections if p.table for f in p.table.inv_freq]


def without_frequencies(report: RoAEReport | None) -> RoAEReport | None:
    if report is None:
        return None
    bare = [replace(p, table=p.table and replace(p.table, inv_freq=())) for p in report.projections]
    return replace(report, projections=tuple(bare))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("targets", [("q", "k"), EVERY], ids=["qk", "every"])
def test_a_skeleton_is_adapted_as_the_model_with_its_weights_is(name, targets, tmp_path):
    try:
        real = build_small(name)
    except Exception as error:
        pytest.skip(f"cannot be built here: {error}")
    try:
        empty = skeleton(real.config, tmp_path)
    except ValueError as error:
        pytest.skip(f"its text model alone is no base: {error}")
    expected, found = report_on(real, targets), report_on(empty, targets)
    assert without_frequencies(found) == without_frequencies(expected)
    if expected is not None:
        # To float32's rounding: a model on the meta device may take another way to them.
        assert frequencies(found) == pytest.approx(frequencies(expected), rel=1e-5)
        shapes = {name: weight.shape for name, weight in real.named_parameters()}
        assert {name: weight.shape for name, weight in empty.named_parameters()} == shapes
        assert all(layer.roae_B.is_meta for _, layer in roae_layers(empty))


def test_no_two_outputs_are_alike_and_the_global_generator_is_left_alone(tmp_path):
    empty = skeleton(build("llama").config, tmp_path)
    state = torch.get_rng_state()
    with torch.no_grad(), run_on_meta(empty):
        logits = empty(torch.tensor([[3, 4]])).logits
    assert logits.isfinite().all()
    assert len(logits.flatten().unique()) == logits.numel()
    assert torch.equal(torch.get_rng_state(), state)


def test_buffers_on_the_meta_device_are_refused():
    with torch.device("meta"):
        empty = build("llama")
    with pytest.raises(ValueError, match=r"rotary_emb.* is on the meta device.*load_skeleton"):
        inject_roae(empty, RoAEConfig(rank=2))


def test_replaced_tensors_keep_ties_and_come_back():
    model = build("llama", tie_word_embeddings=True)
    before = dict(model.named_parameters(remove_duplicate=False))
    seen = []

    with replaced_tensors(model, lambda tensor: seen.append(tensor) or copy.copy(tensor)):
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert model.lm_head.weight is not before["lm_head.weight"]
    assert len({id(tensor) for tensor in seen}) == len(seen)
    after = dict(model.named_parameters(remove_duplicate=False))
    assert all(after[path] is weight for path, weight in before.items())


@pytest.mark.parametrize("num_layers", [2, pytest.param(80, marks=pytest.mark.slow)])
def test_a_model_of_70_billion_parameters_takes_next_to_no_memory(num_layers, tmp_path):
    config = transformers.LlamaConfig(
        vocab_size=128256,
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=num_layers,
        num_attention_heads=64,
        num_key_value_heads=8,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    empty = skeleton(config, tmp_path, dtype="bfloat16")
    report = inject_roae(empty, RoAEConfig(rank=16, low_freq_ratio=0.25, targets=("q", "k", "up")))
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    weights = sum(2 * weight.numel() for weight in empty.parameters())
    assert weights > num_layers * 1.7e9
    assert grown < 0.1 * weights
    assert grown < 1e9
    rows = {"q": 64 * 32, "k": 8 * 32, "up": 28672}
    per_layer = sum(16 * (8192 + count) for count in rows.values())
    assert report.num_trainable == num_layers * per_layer
    assert [p.dims for p in report.projections if p.target == "q"] == [
        (*range(48, 64), *range(112, 128))
    ] * num_layers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_multiplied_with_their_experts_and_back_in_any_dtype(dtype):
    with fake_tensors():
        # Widths that the kernels of GPUs refuse.
        rows_ND = torch.empty(10, 6, dtype=dtype, requires_grad=True)
        experts_EFD = torch.empty(4, 7, 6, dtype=dtype)
        offsets_E = torch.empty(4, dtype=torch.int32)
        out_NF = torch.nn.functional.grouped_mm(rows_ND, experts_EFD.mT, offs=offsets_E)
        out_NF.sum().backward()
    assert isinstance(out_NF, FakeTensor)
    assert (out_NF.shape, out_NF.dtype) == ((10, 7), dtype)
    assert (rows_ND.grad.shape, rows_ND.grad.dtype) == ((10, 6), dtype)


def test_errors_are_raised_and_not_logged(caplog):
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    logger.addHandler(caplog.handler)
    with pytest.raises(RuntimeError), fake_tensors():
        torch.empty(2, 3) @ torch.empty(2, 3)
    logger.error("as before")
    logger.removeHandler(caplog.handler)
    assert [record.message for record in caplog.records] == ["as before"]
