from __future__ import annotations

import random
from functools import partial

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing import assert_close

import rosa_lightning.adapted
from rosa_lightning import DynamicLayerSelection, RoAEConfig, RoSAModule, inject_roae, merge_roae
from rosa_lightning.models.loading import enable_checkpointing
from rosa_lightning.training.compile import compile_layers
from tests import ranks
from tests.conftest import build
from tests.test_module import data, module, trainer

pytestmark = [
    # The compiler looks at the gradient of every input, and uses torch's own deprecated names.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
]


@pytest.fixture(autouse=True)
def _no_graphs_of_other_tests():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def adapted(family: str = "llama", checkpointing: bool = False, **changes) -> nn.Module:
    torch.manual_seed(0)
    model = build(family, **changes)
    inject_roae(model, RoAEConfig(rank=4))
    for name, parameter in model.named_parameters():
        if name.endswith("roae_B"):
            nn.init.normal_(parameter, std=0.3)
    if checkpointing:
        enable_checkpointing(model)
    return model.train()


def select(model: nn.Module, active: set[int], scoring: bool = False) -> None:
    """What a selection, or a step that scores, makes of the layers."""
    for index, layer in enumerate(model.model.layers):
        for name, parameter in layer.named_parameters():
            train = "roae" in name and index in active
            parameter.requires_grad_((scoring and ("roae" in name or "norm" in name)) or train)


def gradients(model: nn.Module, rows: int = 3, tokens: int = 11) -> dict[str, torch.Tensor]:
    """Of one padded batch, which depends on its shape alone."""
    ids = torch.randint(3, 96, (rows, tokens), generator=torch.Generator().manual_seed(tokens))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    (logits[:, -4:] * mask[:, -4:, None]).square().mean().backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("checkpointing", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_all_graphs_are_met_within_three_selections_and_none_after(checkpointing):
    model = adapted(checkpointing=checkpointing, num_hidden_layers=6)
    counter = CompileCounterWithBackend("eager")
    compile_layers(model, backend=counter)
    draw, seen = random.Random(0), []
    for _ in range(20):
        select(model, set(), scoring=True)
        gradients(model, draw.randint(2, 5), draw.randint(12, 40))
        select(model, set(draw.sample(range(6), 3)))
        gradients(model, draw.randint(2, 5), draw.randint(12, 40))
        seen.append(counter.frame_count)
    assert seen[2] == seen[-1]
    # Input, adapter and norms with gradients or without.
    assert seen[-1] <= 6


MORE = [pytest.param(name, marks=pytest.mark.slow) for name in ("gemma2", "cohere", "phi3", "neox")]


@pytest.mark.parametrize("family", ["qwen3", *MORE])
def test_layers_of_a_family_compile_whole_and_give_the_same_gradients(family):
    model = adapted(family)
    wanted = gradients(model)
    # A graph break raises: layers are compiled with fullgraph=True.
    compile_layers(model, backend="eager")
    got = gradients(model)
    assert wanted.keys() == got.keys()
    for name, gradient in wanted.items():
        assert_close(got[name], gradient, atol=1e-6, rtol=1e-4)


def test_evaluation_and_cached_steps_run_uncompiled():
    model = adapted()
    keys = list(model.state_dict())
    counter = CompileCounterWithBackend("eager")
    compile_layers(model, backend=counter)
    assert list(model.state_dict()) == keys
    ids = torch.randint(3, 96, (2, 9))
    with torch.no_grad():
        model(input_ids=ids, use_cache=True)
        model.eval()
        model(input_ids=ids)
        model.generate(input_ids=ids, max_new_tokens=3)
    assert counter.frame_count == 0
    # What is merged in place is compiled as it is now.
    wanted = model(input_ids=ids).logits
    assert_close(merge_roae(model).train()(input_ids=ids, use_cache=False).logits, wanted)
    assert counter.frame_count > 0


@pytest.fixture
def quick(monkeypatch):
    """Compile with a backend that takes no time, and count the graphs."""
    counter = CompileCounterWithBackend("eager")
    stand_in = partial(compile_layers, backend=counter)
    monkeypatch.setattr(rosa_lightning.adapted, "compile_layers", stand_in)
    return counter


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_compiled_run_resumes_and_ends_like_one_that_is_not(
    quick, base_folder, sources, tmp_path, checkpointing
):
    ends = []
    for name, compile, path in (("plain", False, 0), ("straight", True, 0), ("resumed", True, 2)):
        torch.manual_seed(0)
        built = module(base_folder, gradient_checkpointing=checkpointing, compile=compile)
        saver = ModelCheckpoint(
            tmp_path / name, "{step}", every_n_train_steps=2, save_top_k=-1, monitor=None
        )
        run = trainer(
            tmp_path,
            max_steps=5,
            limit_val_batches=1,
            enable_checkpointing=True,
            callbacks=[saver, DynamicLayerSelection(num_active=2, interval=2)],
        )
        start = str(tmp_path / "straight" / f"step={path}.ckpt") if path else None
        run.fit(built, data(sources), ckpt_path=start)
        ends.append({n: p for n, p in built.named_parameters() if p.is_floating_point()})
    plain, straight, resumed = ends
    assert quick.frame_count > 0
    for name, value in plain.items():
        assert_close(straight[name], value, atol=1e-5, rtol=1e-4)
        assert torch.equal(resumed[name], straight[name])
    loaded = RoSAModule.load_from_checkpoint(tmp_path / "straight" / "step=4.ckpt")
    assert loaded.speed.compile


def test_models_in_shards_and_layers_that_are_recomputed_are_refused():
    strategy = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1)
    with pytest.raises(ValueError, match="compile=true does not go with ModelParallel"):
        compile_layers(adapted(), strategy)
    with pytest.raises(ValueError, match=r"gradient_checkpointing do not go together: .* Set one"):
        compile_layers(adapted(checkpointing=True))


@pytest.mark.slow
def test_inductor_gives_the_same_gradients_whatever_is_selected():
    model, reference = adapted(), adapted()
    compile_layers(model)
    for scoring, active, tokens in ((True, {0, 1}, 15), (False, {1}, 21), (False, {0}, 30)):
        select(model, active, scoring)
        select(reference, active, scoring)
        got, wanted = gradients(model, tokens=tokens), gradients(reference, tokens=tokens)
        assert got.keys() == wanted.keys()
        for name, gradient in wanted.items():
            assert_close(got[name], gradient, atol=1e-5, rtol=1e-3)


def under_ddp(folder) -> list[dict[str, torch.Tensor]]:
    from tests.distributed import test_sharding

    rosa_lightning.adapted.compile_layers = partial(compile_layers, backend="eager")
    return [
        test_sharding.run("ddp", folder / on, "float32", "--model.speed.compile", on)["adapters"]
        for on in ("false", "true")
    ]


@pytest.mark.slow
def test_compiled_layers_train_alike_on_two_processes(tmp_path):
    for seen in ranks.launch(under_ddp, tmp_path):
        plain, compiled = seen
        assert_close(compiled, plain, atol=1e-5, rtol=1e-4)
