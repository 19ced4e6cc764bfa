from __future__ import annotations

import gc
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.profiler import ProfilerActivity, profile

from rosa_lightning.adapters.methods import apply_method
from rosa_lightning.adapters.peft_method import PeftMethod
from rosa_lightning.inspection.memory import MemoryEstimate, estimate_memory, readable_size
from rosa_lightning.models.loading import enable_checkpointing, load_skeleton
from rosa_lightning.module import RoSAModule
from rosa_lightning.roae.inject import inject_roae
from rosa_lightning.roae.layer import RoAEConfig
from rosa_lightning.training.head import last_block, logits_at
from rosa_lightning.training.loss import LossComputer
from rosa_lightning.training.speed import SpeedConfig
from tests.conftest import build, rosa_module
from tests.model_zoo.small import build_small

LAYERS = "model.layers"
# bfloat16 takes a CPU several times as long.
DTYPES = ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)]


def slow(*values: Any) -> Any:
    """A case beside others that would show the same."""
    return pytest.param(*values, marks=pytest.mark.slow)


def running_total(work: Callable[[], Any]) -> tuple[list[int], Any]:
    """Bytes allocated since the start, after every allocation, by torch's own profiler."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = work()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return list(itertools.accumulate(event.nbytes() for event in events)), result


def make_batch(batch_size: int, length: int, response: int) -> dict[str, Any]:
    ids_BT = torch.randint(3, 90, (batch_size, length))
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[0, :2] = 0
    labels_BT = torch.full_like(ids_BT, -100)
    labels_BT[:, -response:] = ids_BT[:, -response:]
    return {
        "input_ids": ids_BT,
        "attention_mask": mask_BT,
        "position_ids": (mask_BT.cumsum(1) - 1).clamp(min=0),
        "labels": labels_BT,
        "answer_mask": labels_BT != -100,
        "num_label_positions": response,
    }


def bytes_of(tensors) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def halves() -> dict[int, int]:
    """Bytes of all tensors in bfloat16 that are alive and no weights of a module, by address."""
    gc.collect()
    found = (one for one in gc.get_objects() if type(one) is torch.Tensor)
    return {one.data_ptr(): one.nbytes for one in found if one.dtype == torch.bfloat16}


def measure(
    module: RoSAModule | LossComputer,
    batch_size: int,
    length: int,
    response: int,
    make_optimizer=torch.optim.AdamW,
    inactive: tuple[int, ...] = (),
    scoring: bool = False,
    autocast: torch.dtype | None = None,
) -> dict[str, int]:
    """What a real step takes, by the profiler and by summing real tensors."""
    batch = make_batch(batch_size, length, response)
    model = module.model
    adapters = [p for p in model.parameters() if p.requires_grad]
    optimizer = make_optimizer(adapters)
    others = halves()

    def loss():
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            return module.loss(batch)

    loss().backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        if any(name.startswith(f"{LAYERS}.{index}.") for index in inactive):
            parameter.requires_grad_(False).grad = None
        if scoring and name.startswith(LAYERS) and "layernorm" in name:
            parameter.requires_grad_(True)
    state = [v for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
    weights = bytes_of((*model.parameters(), *model.buffers()))
    inputs = [batch[name] for name in ("input_ids", "attention_mask", "position_ids", "labels")]
    # The profiler does not see that something older than itself is freed.
    optimizer.zero_grad()
    # Nor what the first step has made and later ones hold: weights in bfloat16.
    held = sum(size for address, size in halves().items() if address not in others)

    def two_steps():
        for _ in range(2):
            value = loss()
            optimizer.zero_grad()
            value.backward()
            del value
            optimizer.step()

    during_steps, _ = running_total(two_steps)
    gradients = bytes_of(p.grad for p in model.parameters() if p.grad is not None)
    during_forward, value = running_total(loss)
    del value
    vocabulary, width = model.lm_head.weight.shape
    return {
        "weights": weights,
        "gradients": gradients,
        "optimizer": bytes_of(state),
        # Of the head, the loss keeps the log-probabilities.
        "activations": held + during_forward[-1] - 4 * vocabulary * batch_size * response,
        "logits": max(head_alone(model, batch, width, autocast)),
        "peak": weights + bytes_of(state) + bytes_of(inputs) + held + max(during_steps),
    }


def head_alone(model, batch, width: int, autocast: torch.dtype | None) -> list[int]:
    keep = batch["num_label_positions"]
    shape = len(batch["labels"]), keep, width
    hidden = torch.randn(shape, dtype=model.lm_head.weight.dtype, requires_grad=True)

    def work():
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            logits = model.lm_head(hidden)
            labels = batch["labels"][:, -keep:]
            dtype = torch.promote_types(logits.dtype, torch.float32)
            loss = F.cross_entropy(logits.flatten(0, 1).to(dtype), labels.flatten())
        del logits
        loss.backward()

    return running_total(work)[0]


def check(estimate: MemoryEstimate, measured: dict[str, int]) -> None:
    for line in ("weights", "gradients", "optimizer"):
        assert getattr(estimate, line) == measured[line], line
    # Products may need room of their own: with AMX 70 KiB for a head as small as these.
    room = {"logits": 80 * 1024} if torch.cpu._is_amx_tile_supported() else {}
    for line, tolerance in {"activations": 0.03, "logits": 0.1, "peak": 0.1}.items():
        near = pytest.approx(measured[line], rel=tolerance, abs=room.get(line, 0))
        assert getattr(estimate, line) == near, line


def both(
    dtype: str,
    *shape: int,
    checkpointing: bool = False,
) -> tuple[RoSAModule, Callable[..., MemoryEstimate]]:
    """A base, real and adapted, and the estimate of the same from its configuration."""
    module = rosa_module("tiny", RoAEConfig(), dtype=dtype, gradient_checkpointing=checkpointing)
    module.configure_model()
    skeleton = load_skeleton("tiny", dtype=dtype)
    inject_roae(skeleton, RoAEConfig())
    if checkpointing:
        enable_checkpointing(skeleton)
    names = ("batch_size", "length", "response_length")
    return module, partial(estimate_memory, skeleton, **dict(zip(names, shape, strict=True)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(4, 64, 8), (16, 128, 100)])
def test_every_line_is_what_a_real_step_takes(dtype, shape):
    module, estimate = both(dtype, *shape)
    check(estimate(), measure(module, *shape))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inactive", [slow(()), (0, 1)])
def test_gradient_checkpointing_is_in_the_figures(dtype, inactive):
    module, estimate = both(dtype, 8, 128, 16, checkpointing=True)
    active = [index for index in range(4) if index not in inactive]
    measured = measure(module, 8, 128, 16, inactive=inactive)
    check(estimate(active_layers=active), measured)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inactive", [slow((0, 1)), (1, 3)])
def test_frozen_layers_save_what_they_save_in_a_real_step(dtype, inactive):
    module, estimate = both(dtype, 8, 128, 16)
    active = [index for index in range(4) if index not in inactive]
    check(estimate(active_layers=active), measure(module, 8, 128, 16, inactive=inactive))


def test_the_step_that_selects_takes_the_gradients_of_norms_as_well():
    module, estimate = both("float32", 8, 128, 16)
    check(estimate(scoring=True), measure(module, 8, 128, 16, scoring=True))


LORA = {"r": 4, "target_modules": ["q_proj", "v_proj", "up_proj", "down_proj"]}
METHODS = {
    "LoRA": {"peft": PeftMethod("peft.LoraConfig", LORA)},
    "DoRA": {"peft": PeftMethod("peft.LoraConfig", {**LORA, "use_dora": True})},
    "full": {"finetune": "full"},
}


@pytest.mark.parametrize(
    ("name", "inactive"),
    [
        ("LoRA", (0, 1)),
        ("DoRA", ()),
        ("full", (0, 1)),
        slow("LoRA", ()),
        slow("DoRA", (0, 1)),
        slow("full", ()),
    ],
)
def test_other_methods_take_what_they_take_in_a_real_step(name, inactive):
    shape = (8, 128, 16)
    module = RoSAModule("tiny", dtype="float32", **METHODS[name])
    module.configure_model()
    skeleton = load_skeleton("tiny", dtype="float32")
    apply_method(skeleton, module.method)
    names = ("batch_size", "length", "response_length")
    active = [index for index in range(4) if index not in inactive]
    estimate = estimate_memory(
        skeleton, **dict(zip(names, shape, strict=True)), active_layers=active
    )
    measured = measure(module, *shape, inactive=inactive)
    measured["logits"] = estimate.logits if name == "full" else measured["logits"]  # a weight's too
    check(estimate, measured)


@pytest.mark.parametrize("dtype", DTYPES[::-1])
def test_mixed_precision_is_in_the_figures(dtype):
    module, estimate = both(dtype, 8, 128, 16)
    measured = measure(module, 8, 128, 16, autocast=torch.bfloat16)
    check(estimate(autocast=torch.bfloat16), measured)


def test_mixed_precision_is_estimated_for_batches_in_parts():
    _, estimate = both("float32", 8, 128, 16)
    whole, parts = (
        estimate(autocast=torch.bfloat16, speed=SpeedConfig(microbatch_tokens=tokens))
        for tokens in (None, 256)
    )
    assert 0 < parts.activations < whole.activations


@pytest.mark.parametrize(
    "optimizer",
    [
        partial(torch.optim.SGD, lr=0.1),
        partial(torch.optim.AdamW, amsgrad=True),
    ],
)
def test_any_optimizer_s_state_is_measured(optimizer):
    module, estimate = both("float32", 4, 64, 8)
    measured = measure(module, 4, 64, 8, make_optimizer=optimizer)
    check(estimate(optimizer=optimizer), measured)


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "phi3", "neox", "cohere", "gemma3"])
@pytest.mark.parametrize("kernel", [slow("eager"), "default"])
def test_other_architectures_keep_what_the_profiler_sees(family, kernel):
    model = build(family, hidden_size=128, intermediate_size=256)
    if kernel == "eager":
        model.config._attn_implementation = kernel
    inject_roae(model, RoAEConfig(rank=4))
    estimate = estimate_memory(model, batch_size=4, length=100, response_length=10)
    batch = make_batch(4, 100, 10)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids")}
    inputs["use_cache"] = False
    places = torch.arange(400).view(4, 100)[:, -11:-1].flatten()
    block = last_block(model.train(), batch["input_ids"])
    assert block is not None

    def run() -> torch.Tensor:
        with LossComputer(model).saving():
            return logits_at(model, inputs, places, block)

    run().sum().backward()
    totals, logits_NV = running_total(run)
    logits = logits_NV.nbytes
    del logits_NV
    # A head that caps or scales its logits keeps some of them.
    assert estimate.activations == pytest.approx(totals[-1] - logits, abs=2 * logits, rel=0.03)
    assert estimate.activations > 20 * logits


@pytest.mark.parametrize(("scheme", "bits"), [("int8", 8), ("nf4", 4.127)])
def test_quantised_weights_are_counted_at_the_bits_of_their_format(scheme, bits):
    model = build("llama")
    inject_roae(model, RoAEConfig(rank=4))
    shape = {"batch_size": 2, "length": 20, "response_length": 4}
    whole, found = (estimate_memory(model, **shape, quantization=q) for q in (None, scheme))
    linear = [m.weight for m in model.model.modules() if isinstance(m, nn.Linear)]
    assert found.base[scheme] == pytest.approx(sum(w.numel() for w in linear) * bits / 8, rel=1e-3)
    assert whole.weights - found.weights == whole.peak - found.peak
    assert found.base["float32"] == whole.base["float32"] - bytes_of(linear)
    assert found.activations == whole.activations


@pytest.mark.parametrize(
    ("family", "dtype", "autocast"),
    [
        ("MixtralConfig", torch.float32, None),
        ("MixtralConfig", torch.bfloat16, torch.bfloat16),
        ("Qwen2MoeConfig", torch.float32, torch.bfloat16),
        slow("MixtralConfig", torch.bfloat16, None),
        slow("MixtralConfig", torch.float32, torch.bfloat16),
        slow("Qwen2MoeConfig", torch.float32, None),
        slow("Qwen2MoeConfig", torch.bfloat16, None),
        slow("Qwen2MoeConfig", torch.bfloat16, torch.bfloat16),
    ],
)
def test_experts_are_in_the_figures(family, dtype, autocast, caplog):
    model = build_small(family).to(dtype)
    inject_roae(model, RoAEConfig(rank=4))
    shape = {"batch_size": 4, "length": 100, "response_length": 10}
    estimate = estimate_memory(model, **shape, autocast=autocast)
    assert not caplog.records
    measured = measure(LossComputer(model.train()), 4, 100, 10, autocast=autocast)
    if torch.bfloat16 in (dtype, autocast):  # 40 positions are filled up to 64
        measured["logits"] *= 64 / 40
        measured["activations"] -= 4 * model.config.vocab_size * 24
        on_gpu = estimate_memory(model, **shape, autocast=autocast, device="cuda")
        assert on_gpu.logits < 0.7 * estimate.logits
    check(estimate, measured)


def test_chunks_of_logits_are_in_the_figures():
    module, estimate = both("float32", 8, 128, 60)
    whole = estimate()
    module.loss_computer.speed = SpeedConfig(loss_chunk=48)
    chunked = estimate(speed=SpeedConfig(loss_chunk=48))
    measured = measure(module, 8, 128, 60)
    assert chunked.peak == pytest.approx(measured["peak"], rel=0.1)
    assert chunked.logits < 0.3 * whole.logits
    assert chunked.peak < whole.peak


@pytest.mark.parametrize("scoring", [slow(False), True])
def test_parts_of_a_batch_are_in_the_figures(scoring):
    module, estimate = both("float32", 8, 128, 16)
    whole = estimate(scoring=scoring)
    module.loss_computer.speed = SpeedConfig(microbatch_tokens=400)  # 3, 3 and 2 rows
    module.loss_computer.reset()
    parts = estimate(scoring=scoring, speed=SpeedConfig(microbatch_tokens=400))
    measured = measure(module, 8, 128, 16, scoring=scoring)
    assert parts.peak == pytest.approx(measured["peak"], rel=0.05)
    assert parts.gradients == measured["gradients"]
    assert parts.activations < 0.45 * whole.activations


def test_prompts_without_a_graph_are_in_the_figures():
    module, estimate = both("float32", 8, 128, 16)
    whole = estimate()
    speed = SpeedConfig(prompt_gradients=False)
    module.loss_computer.speed = speed
    module.loss_computer.reset()
    cut = estimate(speed=speed)
    measured = measure(module, 8, 128, 16)
    assert cut.peak == pytest.approx(measured["peak"], rel=0.1)
    assert cut.activations < 0.4 * whole.activations


def test_weights_are_not_needed_and_not_touched():
    real = build("qwen3")
    inject_roae(real, RoAEConfig(rank=4))
    ids = torch.tensor([[3, 4, 5]])
    before = real(ids).logits
    estimate = estimate_memory(real, batch_size=2, length=20, response_length=4)
    assert torch.equal(real(ids).logits, before)
    assert not real.training
    assert all(p.grad is None and not isinstance(p, FakeTensor) for p in real.parameters())
    held = [v for module in real.modules() for v in vars(module).values()]
    assert not any(isinstance(value, FakeTensor) for value in held)
    assert not real.lm_head._forward_pre_hooks
    assert estimate.weights == bytes_of(real.parameters()) + bytes_of(real.buffers())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"response_length": 20}, "response_length=20 make no batch"),
        ({"active_layers": [2]}, r"active_layers=\[2\] names a layer that cannot be selected"),
        ({"active_layers": [1], "scoring": True}, "all layers take gradients"),
        ({"optimizer": torch.optim.Adafactor}, "fails on tensors without numbers: DataDependent"),
    ],
)
def test_what_cannot_be_estimated_is_refused_with_the_reason(changes, message):
    model = build("llama")
    inject_roae(model, RoAEConfig(rank=4))
    given = {"batch_size": 2, "length": 20, "response_length": 4, **changes}
    with pytest.raises(ValueError, match=message):
        estimate_memory(model, **given)
    assert not model.training
    assert not any(isinstance(parameter, FakeTensor) for parameter in model.parameters())


def test_sizes_have_three_digits():
    sizes = (1536, 1024**2, 512 * 1024**2, 70 * 1024**3)
    assert [*map(readable_size, sizes)] == ["1.50 KiB", "1.00 MiB", "512 MiB", "70.0 GiB"]
