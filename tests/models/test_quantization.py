"""RoAE on a base whose linear layers are quantised, against plain models of the same values.

bitsandbytes computes on a CPU too; where it or torchao is missing, its tests are skipped.
"""

from __future__ import annotations

import copy
import logging
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.data import DataLoader
from transformers import utils

from rosa_lightning import (
    ReasoningDataModule,
    RoAEConfig,
    RoSAModule,
    WarmupCosine,
    inject_roae,
    merge_roae,
)
from rosa_lightning.adapters.export import export_adapter
from rosa_lightning.adapters.files import load_adapter
from rosa_lightning.adapters.fingerprint import fingerprint
from rosa_lightning.models.loading import load_base
from rosa_lightning.models.quantization import quiet_libraries, ready_four_bit_layers
from rosa_lightning.roae.inject import is_adapter_key, roae_layers
from tests.conftest import FAMILIES, SMALL, rosa_module, save_base
from tests.test_module import trainer

needs_torchao = pytest.mark.skipif(
    not utils.is_torchao_available(), reason="torchao is not installed"
)
needs_bitsandbytes = [
    pytest.mark.skipif(
        not (utils.is_bitsandbytes_available() and utils.is_accelerate_available()),
        reason="bitsandbytes or accelerate is not installed",
    ),
    # transformers imports more of torch than bitsandbytes needs.
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated"),
]
INT8 = pytest.param("int8", marks=needs_torchao)
SCHEMES = [INT8, *(pytest.param(s, marks=needs_bitsandbytes) for s in ("llm_int8", "nf4", "fp4"))]
CONFIG = RoAEConfig(rank=4, low_freq_ratio=0.25)

SWEPT = {
    **{name: FAMILIES[name] for name in ("llama", "qwen3", "phi3", "neox", "gemma3")},
    "glm4": ("Glm4Config", {"head_dim": 32}),
}


def by_hand(module: nn.Module) -> Tensor:
    """The weight that a quantised layer stands for, from what its library documents, in float32."""
    weight = module.weight
    if type(weight).__name__ == "Int8Tensor":
        return weight.qdata.float() * weight.scale
    import bitsandbytes

    if type(weight).__name__ == "Int8Params":
        scale = weight.SCB if weight.SCB is not None else module.state.SCB
        return weight.data.float() * scale[:, None] / 127
    return bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state).float()


def packed(model: nn.Module) -> dict[str, nn.Module]:
    kinds = ("Int8Tensor", "Int8Params", "Params4bit")
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and type(module.weight).__name__ in kinds
    }


def twin_of(model: nn.Module, folder: Path) -> nn.Module:
    """A float32 model that holds the values of a quantised one."""
    twin = load_base(str(folder), dtype="float32")
    with torch.no_grad():
        for path, module in packed(model).items():
            twin.get_submodule(path).weight.copy_(by_hand(module))
    return twin


def randomise(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(5)
    for _, layer in roae_layers(model):
        for weight in (layer.roae_A, layer.roae_B):
            with torch.no_grad():
                weight.copy_(0.2 * torch.randn(weight.shape, generator=generator))
    return model


def gradients(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(input_ids=ids, labels=ids, use_cache=False).loss.float().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def bits(model: nn.Module) -> dict[str, Tensor]:
    """All that the base holds, packed weights as they are stored."""
    return {
        name: copy.deepcopy(getattr(parameter, "qdata", parameter.detach()))
        for name, parameter in model.named_parameters()
        if not is_adapter_key(name)
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A Llama of four layers; its rows are whole numbers of bitsandbytes' blocks."""
    return save_base(tmp_path_factory.mktemp("base"), intermediate_size=128)


@pytest.fixture(scope="module", params=list(SWEPT))
def family(request, tmp_path_factory) -> Path:
    name, special = SWEPT[request.param]
    config = getattr(transformers, name)(**{**SMALL, "intermediate_size": 128, **special})
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(3, 96, (2, 9))


# --- loading ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_linear_layers_but_the_head_are_quantised_and_nothing_else(scheme, dtype, folder):
    plain = load_base(str(folder), dtype=dtype)
    model = load_base(str(folder), dtype=dtype, quantization=scheme)
    linears = {path for path, m in plain.named_modules() if isinstance(m, nn.Linear)} - {"lm_head"}
    assert set(packed(model)) == linears
    others = dict(model.named_parameters())
    for name, weight in plain.named_parameters():
        if name.removesuffix(".weight") in linears:
            error = by_hand(model.get_submodule(name.removesuffix(".weight"))) - weight
            assert 0 < error.abs().max() < 0.2 * weight.abs().max()
        else:
            assert torch.equal(others[name], weight)


@pytest.mark.parametrize(
    ("name", "library"),
    [("int8", "torchao"), ("nf4", "bitsandbytes"), ("llm_int8", "accelerate")],
)
def test_a_missing_library_is_named_with_its_extra(name, library, folder, monkeypatch):
    for one in ("torchao", "bitsandbytes", "accelerate"):
        monkeypatch.setattr(utils, f"is_{one}_available", lambda one=one: one != library)
    with pytest.raises(ImportError, match=rf"{name} needs {library}.*lightning\[quant") as error:
        load_base(str(folder), quantization=name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_base_that_was_saved_quantised_loads_as_it_is(scheme, folder, tmp_path, ids):
    model = load_base(str(folder), quantization=scheme)
    model.save_pretrained(tmp_path / "q")
    again = load_base(str(tmp_path / "q"))
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert len(inject_roae(again, CONFIG).projections) == 8
    with pytest.raises(ValueError, match=r"quantised already.*Take model\.quantization out"):
        load_base(str(tmp_path / "q"), quantization=scheme)


# --- adapting -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_quantised_model_is_adapted_where_the_plain_one_is(scheme, dtype, family, ids):
    plain = load_base(str(family), dtype=dtype)
    model = load_base(str(family), dtype=dtype, quantization=scheme)
    ready_four_bit_layers(model)
    with torch.no_grad():
        before = model(ids).logits
        report = inject_roae(model, CONFIG)
        assert report == inject_roae(plain, CONFIG)
        assert torch.equal(model(ids).logits, before)
        for projection in report.projections:
            layer = model.get_submodule(projection.name)
            nn.init.normal_(layer.roae_B)
            x = torch.randn(2, 5, layer.roae_A.shape[1], dtype=getattr(torch, dtype))
            changed = (layer(x) != layer.base(x)).flatten(0, 1).any(0).nonzero().flatten()
            assert set(changed.tolist()) == set(projection.rows)
            assert layer.roae_A.dtype == layer.roae_B.dtype == torch.float32
            assert layer(x).dtype == layer.base(x).dtype == x.dtype


# float32: the same products in another order.
@pytest.mark.parametrize("scheme", SCHEMES)
def test_gradients_are_those_of_a_plain_base_with_the_same_values(scheme, family, ids):
    model = load_base(str(family), dtype="float32", quantization=scheme)
    twin = twin_of(model, family)
    for one in (model, twin):
        inject_roae(one, CONFIG)
        randomise(one.train())
    ours, theirs = gradients(model, ids), gradients(twin, ids)
    assert ours.keys() == theirs.keys()
    assert len(ours) == 2 * len(list(roae_layers(model)))
    for name in ours:
        assert ours[name].any()
        assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-5 * theirs[name].abs().max())


@pytest.mark.parametrize("scheme", SCHEMES[2:])
def test_an_evaluation_does_not_cost_four_bit_layers_their_gradient(scheme, folder, ids):
    """On CPUs with bfloat16 instructions bitsandbytes repacks the weights that it evaluates."""
    model = load_base(str(folder), dtype="float32", quantization=scheme)
    twin = twin_of(model, folder)
    model.requires_grad_(False)(ids)
    for one in (model, twin):
        inject_roae(one, CONFIG)
        randomise(one)
        with torch.no_grad():
            one.eval()(ids)
    ours, theirs = gradients(model.train(), ids), gradients(twin.train(), ids)
    for name in ours:  # block scales were rounded to bfloat16 on the way
        assert (ours[name] - theirs[name]).norm() < 0.1 * theirs[name].norm()


@pytest.mark.parametrize("scheme", SCHEMES[2:])
def test_four_bit_rows_of_broken_blocks_are_right_or_refused(scheme, tmp_path, ids):
    """From 0.49 on bitsandbytes dequantises them wrongly on a CPU."""
    path = save_base(tmp_path, hidden_size=96, head_dim=16)
    model = load_base(str(path), quantization=scheme)
    if not torch.allclose(model(ids).logits, load_base(str(path))(ids).logits, atol=0.2):
        with pytest.raises(ValueError, match="q_proj: on a CPU"):
            inject_roae(model, CONFIG)


class BufferLinear(nn.Module):
    """A linear layer that keeps its weight in buffers of other names, as those of GPTQ do."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().amax() / 127
        self.register_buffer("qweight", (linear.weight.detach() / scale).round().to(torch.int32))
        self.register_buffer("scales", scale)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.qweight.to(x.dtype) * self.scales.to(x.dtype))


def test_layers_with_their_weights_in_buffers_are_adapted_and_not_merged(folder, ids):
    config = RoAEConfig(rank=4, targets=("q", "k", "o", "up"))
    plain = load_base(str(folder), dtype="bfloat16")
    model = load_base(str(folder), dtype="bfloat16")
    for path in [path for path, m in model.named_modules() if "proj" in path]:
        model.set_submodule(path, BufferLinear(model.get_submodule(path)))
    remembered = fingerprint(plain, "plain")
    remembered.check(fingerprint(model, "packed"))
    fingerprint(model, "packed").check(remembered)
    assert inject_roae(model, config).projections == inject_roae(plain, config).projections
    assert all(g.any() for g in gradients(randomise(model.train()), ids).values())
    with pytest.raises(ValueError, match="the base is quantised"):
        merge_roae(model)
    with pytest.raises(ValueError, match=r"q_proj\.base \(BufferLinear\).*cannot be undone"):
        merge_roae(model, dequantize=True)
    assert len(list(roae_layers(model))) == 16


# --- merging ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_dequantised_merge_is_the_fold_by_hand(scheme, dtype, family, tmp_path, ids):
    model = load_base(str(family), dtype=dtype, quantization=scheme)
    twin = twin_of(model, family)
    report = inject_roae(model, CONFIG)
    randomise(model)
    with torch.no_grad():
        for p in report.projections:
            layer = model.get_submodule(p.name)
            delta = CONFIG.scale * layer.roae_B @ layer.roae_A
            twin.get_submodule(p.projection).weight[list(p.rows)] += delta
    plain = load_base(str(family), dtype=dtype)
    plain.load_state_dict(twin.state_dict())
    before = model(ids).logits
    with pytest.raises(ValueError, match="dequantize=True"):
        merge_roae(model)
    assert torch.equal(model(ids).logits, before)
    assert merge_roae(model, dequantize=True) is model
    assert_close(model(ids).logits, plain(ids).logits)
    assert {name for name, _ in model.named_parameters()} == dict(plain.named_parameters()).keys()
    for name, weight in model.named_parameters():
        assert weight.dtype == getattr(torch, dtype)
        assert_close(weight, plain.get_parameter(name), rtol=0, atol=1e-7)  # rounded once
        assert not weight.requires_grad
    assert type(model.get_submodule(report.projections[0].projection)) is nn.Linear
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in (tmp_path / "config.json").read_text()
    assert torch.equal(load_base(str(tmp_path))(ids).logits, model(ids).logits)


# --- knowing the base again ---------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_base_is_known_again_quantised_or_not(scheme, family):
    quantized = fingerprint(load_base(str(family), quantization=scheme), "quantised")
    for dtype in ("float32", "bfloat16"):
        plain = fingerprint(load_base(str(family), dtype=dtype), "plain")
        plain.check(quantized)
        quantized.check(plain)


# --- training -----------------------------------------------------------------------------------


def module(folder: Path, scheme: str | None = "int8", **options) -> RoSAModule:
    return rosa_module(
        str(folder),
        RoAEConfig(rank=4, low_freq_ratio=0.5),
        quantization=scheme,
        optimizer=partial(torch.optim.AdamW, lr=1e-2),
        **options,
    )


@pytest.fixture
def batches(folder, sources) -> DataLoader:
    """One batch, eight times."""
    data = ReasoningDataModule(
        sources=sources, batch_size=4, val_fraction=0.1, tokenizer=str(folder)
    )
    data.setup("fit")
    return DataLoader([next(iter(data.train_dataloader()))] * 8, batch_size=None)


def loss_of(built: RoSAModule, batches: DataLoader) -> float:
    with torch.no_grad():
        return float(built.loss(next(iter(batches))))


@pytest.mark.filterwarnings("ignore:You passed .*16-mixed")
@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16"])
@pytest.mark.parametrize(
    "precision",
    # On a CPU, 16-mixed is bf16-mixed.
    ["32-true", "bf16-mixed", pytest.param("16-mixed", marks=pytest.mark.slow), "bf16-true"],
)
@pytest.mark.parametrize("scheme", SCHEMES[:3])
def test_adapters_train_in_float32_and_the_base_stays(
    scheme, precision, dtype, folder, batches, tmp_path
):
    built = module(folder, scheme, dtype=dtype)
    built.configure_model()
    before, start = bits(built), loss_of(built, batches)
    trainer(tmp_path, precision=precision, max_steps=8).fit(built, batches, batches)
    assert loss_of(built, batches) < start - 0.01
    assert {p.dtype for n, p in built.named_parameters() if is_adapter_key(n)} == {torch.float32}
    after = bits(built)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@needs_torchao
def test_a_run_goes_on_after_a_stop_as_if_there_had_been_none(folder, batches, tmp_path):
    schedule = partial(WarmupCosine, total_steps=16)
    whole = module(folder, lr_scheduler=schedule)
    torch.manual_seed(1)
    trainer(tmp_path, max_epochs=2, max_steps=-1).fit(whole, batches, batches)
    torch.manual_seed(1)
    first, stopped = (
        trainer(tmp_path, max_epochs=1, max_steps=-1),
        module(folder, lr_scheduler=schedule),
    )
    first.fit(stopped, batches, batches)
    first.save_checkpoint(tmp_path / "c.ckpt")
    resumed = module(folder, lr_scheduler=schedule)
    trainer(tmp_path, max_epochs=2, max_steps=-1).fit(
        resumed, batches, batches, ckpt_path=tmp_path / "c.ckpt"
    )
    for name, weight in whole.named_parameters():
        if is_adapter_key(name):
            assert torch.equal(weight, resumed.get_parameter(name))


@needs_torchao
def test_an_adapter_of_a_quantised_base_loads_on_the_plain_one(folder, batches, tmp_path):
    built = module(folder)
    run = trainer(tmp_path, limit_val_batches=0)
    run.fit(built, batches, batches)
    run.save_checkpoint(tmp_path / "c.ckpt")
    assert (tmp_path / "c.ckpt").stat().st_size < 200_000
    again = RoSAModule.load_from_checkpoint(tmp_path / "c.ckpt")
    assert again.quantization == "int8"
    assert loss_of(again, batches) == loss_of(built, batches)
    plain = RoSAModule.load_from_checkpoint(tmp_path / "c.ckpt", quantization=None)
    assert not packed(plain)
    assert loss_of(plain, batches) == pytest.approx(loss_of(built, batches), abs=0.01)
    other = save_base(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match="is another one"):
        RoSAModule.load_from_checkpoint(tmp_path / "c.ckpt", base=str(other))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_data_parallel_training_takes_a_quantised_base(scheme, folder, batches):
    built = module(folder, scheme)
    built.configure_model()
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    try:
        parallel = torch.nn.parallel.DistributedDataParallel(built)
        ids = next(iter(batches))["input_ids"]
        parallel(ids, labels=ids).loss.backward()
    finally:
        torch.distributed.destroy_process_group()
    layers = [layer for _, layer in roae_layers(built)]
    assert all(layer.roae_B.grad.any() for layer in layers)


@needs_torchao
def test_a_base_without_a_backward_pass_is_refused_when_it_is_to_be_trained(
    folder, batches, tmp_path
):
    built = module(folder)
    built.configure_model()
    built.model.hf_quantizer.quantization_config.quant_type = object()
    run = trainer(tmp_path)
    with pytest.raises(ValueError, match=r"\(torchao\) in a way that has no backward") as error:
        run.fit(built, batches, batches)
    assert "\n" not in str(error.value)


@needs_torchao
def test_a_quantised_base_leaves_merged_when_told_to_dequantise(tmp_path, ids):
    model = load_base(str(save_base(tmp_path / "base")), quantization="int8").eval()
    inject_roae(model, CONFIG)
    randomise(model)
    expected = model(ids).logits
    with pytest.raises(ValueError, match=r"the base is quantised.* --dequantize true"):
        export_adapter(model, tmp_path / "refused", "merged")
    assert not (tmp_path / "refused").exists()
    export_adapter(model, tmp_path / "out", "merged", dequantize=True)
    assert torch.equal(model(ids).logits, expected)
    assert model.config.quantization_config is not None
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert getattr(plain.config, "quantization_config", None) is None
    assert_close(plain(ids).logits, expected, atol=1e-4, rtol=1e-4)
    for format in ("peft", "rosa"):
        export_adapter(model, tmp_path / format, format)
        other = load_base(str(tmp_path / "base"), quantization="int8").eval()
        load_adapter(other, tmp_path / format)
        assert torch.equal(other(ids).logits, expected)


def test_what_libraries_log_on_import_is_left_out_and_nothing_is_said_twice(caplog):
    logger = logging.getLogger("torchao")
    lines = ["Failed to load _C.so: of another torch", "said of use", "said of use"]

    def said():
        caplog.clear()
        for line in lines:
            logger.warning(line)
        return [record.message for record in caplog.records]

    with quiet_libraries():
        assert said() == ["said of use"]
    assert said() == lines  # what a user's program logs is its own matter
    assert not logger.filters


def test_loading_a_base_logs_nothing_that_is_said_on_import(base_folder, caplog, monkeypatch):
    def imported(*args, **options):
        logging.getLogger("torchao").warning("Failed to load _C.so: of another torch")
        return original(*args, **options)

    original = transformers.AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", imported)
    load_base(str(base_folder))
    assert not caplog.records
