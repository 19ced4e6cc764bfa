from __future__ import annotations

import sys
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

from rosa_lightning.roae.inject import inject_roae, roae_layers
from rosa_lightning.roae.layer import RoAEConfig, RoAELinear
from tests.model_zoo.small import build_small, causal_models

# One of each kind: separate and fused by parts, by head and by group; half-split and interleaved;
# partial; latent; with norms; with experts; with layers of other kinds; without the attention
# interface; inside a vision-language model.
FAST = [
    *("Llama", "Qwen3", "Gemma3Text", "Phi3", "GPTNeoX", "Falcon", "Glm4", "Cohere2", "Olmo2"),
    *("DeepseekV3", "GptOss", "Llama4Text", "GPTJ", "CodeGen", "GPTNeoXJapanese", "RoFormer"),
    *("SmolLM3", "Qwen3Next", "Persimmon", "Moshi", "Gemma3", "Qwen2Moe"),
]
REFUSED = {
    "GPT2": "rotates neither Q nor K",
    "OPT": "rotates neither Q nor K",
    "Bloom": "rotates neither Q nor K",
    "Mamba": "has no attention",
}
MODELS = [
    pytest.param(name, marks=[] if name.removesuffix("Config") in FAST else pytest.mark.slow)
    for name in causal_models()
]
RATIO = 0.25


@contextmanager
def caught_states(layers: dict[nn.Module, str]):
    """Queries and keys of every attention module, wherever they meet; nothing of the package."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    states: dict[str, list[Tensor]] = {}

    def interface(module, query, key, *args, **kwargs):
        if module in layers:
            states[layers[module]] = [query.double(), key.double()]
        kwargs.pop("softcap", None)  # nothing after the states matters here
        return sdpa_attention_forward(module, query, key, *args, **kwargs)

    AttentionInterface.register("sdpa", interface)
    # Some kinds of attention ask for the eager kernel, which cannot be registered.
    configs = [(c, c._attn_implementation) for m in layers if (c := getattr(m, "config", None))]
    for config, _ in configs:
        config._attn_implementation = "sdpa"
    try:
        with products_of([m for m in layers if not uses_interface(m)], layers, states):
            yield states
    finally:
        AttentionInterface.register("sdpa", sdpa_attention_forward)
        for config, kernel in configs:
            config._attn_implementation = kernel


@contextmanager
def products_of(modules: list[nn.Module], layers: dict[nn.Module, str], states):
    """Where modules multiply by hand: 9 queries and 9 keys of 4 heads of 16 dimensions."""
    running: list[nn.Module] = []

    def watched(function, first):
        def call(*args, **kwargs):
            query, key = args[first], args[first + 1]
            if running and query.shape[-2:] == (9, 16) and key.shape[-2:] == (16, 9):
                both = query.reshape(-1, 4, 9, 16), key.mT.reshape(-1, 4, 9, 16)
                states[layers[running[-1]]] = [one.double() for one in both]
            return function(*args, **kwargs)

        return call

    def dot_product(query, key, *args, **kwargs):
        if running:
            states[layers[running[-1]]] = [query.double(), key.double()]
        return torch.ops.aten.scaled_dot_product_attention(query, key, *args, **kwargs)

    with ExitStack() as stack:
        for module in modules:
            begin, end = lambda m, _: running.append(m), lambda *_: running.pop() and None
            stack.enter_context(module.register_forward_pre_hook(begin))
            stack.enter_context(module.register_forward_hook(end))
        if modules:
            stack.enter_context(patch("torch.matmul", watched(torch.matmul, 0)))
            stack.enter_context(patch("torch.baddbmm", watched(torch.baddbmm, 1)))
            function = "torch.nn.functional.scaled_dot_product_attention"
            stack.enter_context(patch(function, dot_product))
        yield


def uses_interface(module: nn.Module) -> bool:
    return hasattr(sys.modules[type(module).__module__], "ALL_ATTENTION_FUNCTIONS")


@contextmanager
def constant_projections(model: nn.Module, vectors: dict[str, Tensor]):
    """Every named projection answers with one vector at all positions."""

    def constant(vector: Tensor):
        return lambda _, __, out: vector.to(out.dtype).expand(out.shape).contiguous()

    with ExitStack() as stack:
        for path, vector in vectors.items():
            hook = model.get_submodule(path).register_forward_hook(constant(vector))
            stack.enter_context(hook)
        yield


def states_at(model, layers, vectors, positions: list[int]) -> dict[str, list[Tensor]]:
    ids = torch.arange(3, 3 + len(positions))[None]
    with torch.no_grad(), caught_states(layers) as states, constant_projections(model, vectors):
        model(input_ids=ids, position_ids=torch.tensor([positions]), use_cache=False)
    return states


def frequencies(model, layers, vectors) -> dict[str, list[Tensor]]:
    """Radians per token of each dimension from q(p+s) + q(p-s) = 2 cos(s theta) q(p), (heads, D).

    Rotations are computed in float32 by the models, so a slow pair shows only over a long step:
    the step grows as long as it stays below half a turn, and as long as the model has positions.
    A dimension that never moves is NaN.
    """
    theta: dict[str, list[Tensor]] = {}
    for step in (1, 4, 15, 200, 2000, 20000, 200000):
        try:
            states = states_at(model, layers, vectors, [step * k for k in range(9)])
        except (IndexError, RuntimeError) as error:
            if "out of" not in str(error):  # the positions that the model has
                raise
            break
        for layer, kinds in states.items():
            for kind, q_HTD in enumerate(one[0] for one in kinds):
                middle = q_HTD[:, 1:-1]
                both = q_HTD[:, 2:] + q_HTD[:, :-2]
                cosine = (both * middle).sum(1) / (2 * middle.square().sum(1))
                estimate = cosine.clamp(-1, 1).arccos() / step
                if step == 1:
                    still = (q_HTD == q_HTD[:, :1]).all(1)
                    estimate[still] = float("nan")
                    theta.setdefault(layer, []).append(estimate)
                else:
                    old = theta[layer][kind]
                    theta[layer][kind] = torch.where(old * step < 2.0, estimate, old)
    return theta


def slowest(theta_D: Tensor) -> tuple[int, ...]:
    rotated = [dim for dim in range(len(theta_D)) if not theta_D[dim].isnan()]
    count = 2 * max(1, round(RATIO * len(rotated) / 2))
    return tuple(sorted(sorted(rotated, key=lambda dim: float(theta_D[dim]))[:count]))


def outermost(report, model) -> dict[str, RoAELinear]:
    """The layers that stand in the place of a projection, several terms of one taken together."""
    paths = {p.name for p in report.projections}
    return {
        path: model.get_submodule(path)
        for path in paths
        if path.rpartition(".base")[0] not in paths
    }


def far_from_zero(size: int) -> Tensor:
    """Random values whose turning is not lost in rounding."""
    return torch.randn(size).sign() * (0.5 + torch.rand(size))


def check_low_frequencies(model, report) -> None:
    layers = {model.get_submodule(p.layer): p.layer for p in report.projections}
    vectors = {
        path: far_from_zero(layer(torch.zeros(1, 1, layer.roae_A.shape[1])).shape[-1])
        for path, layer in outermost(report, model).items()
    }
    theta = frequencies(model, layers, vectors)
    assert set(theta) == set(layers.values())
    for layer, kinds in theta.items():
        for kind, target in enumerate("qk"):
            dims = [p.dims for p in report.projections if (p.layer, p.target) == (layer, target)]
            for theta_D in kinds[kind]:
                assert [slowest(theta_D)] * len(dims) == dims


def check_rows_become_those_dimensions(model, report) -> None:
    """Change the chosen rows of the projections, and see which dimensions of the states change."""
    layers = {model.get_submodule(p.layer): p.layer for p in report.projections}
    norms = [m for a in layers for m in a.modules() if "norm" in type(m).__name__.lower()]
    before, after = {}, {}
    for path, layer in outermost(report, model).items():
        width = layer(torch.zeros(1, 1, layer.roae_A.shape[1])).shape[-1]
        before[path] = torch.randn(width)
        after[path] = before[path].clone()
    for projection in report.projections:
        path = projection.name
        while path not in after:
            path = path.rpartition(".base")[0]
        after[path][list(projection.rows)] += 1
    with ExitStack() as stack:
        for norm in norms:
            stack.enter_context(patch.object(norm, "forward", lambda x, *_, **__: x))
        positions = list(range(9))
        old = states_at(model, layers, before, positions)
        new = states_at(model, layers, after, positions)
    for layer in old:
        for kind, target in enumerate("qk"):
            dims = [p.dims for p in report.projections if (p.layer, p.target) == (layer, target)]
            changed = (new[layer][kind] != old[layer][kind])[0, :, 0]
            for head in changed if dims else []:
                assert tuple(head.nonzero().flatten().tolist()) == dims[0]


def check_only_low_rows_change(model, report) -> None:
    for projection in report.projections:
        layer = model.get_submodule(projection.name)
        nn.init.normal_(layer.roae_B)
        x = torch.randn(3, 7, layer.roae_A.shape[1], dtype=torch.float64)
        # One product alone: two of them may differ in the last bit, by how their memory lies.
        outputs = []
        handle = layer.base.register_forward_hook(lambda _, __, z, to=outputs: to.append(z.clone()))
        delta = layer(x) - outputs[0]
        handle.remove()
        rest = [row for row in range(delta.shape[-1]) if row not in projection.rows]
        assert (delta[..., list(projection.rows)] != 0).all()
        assert (delta[..., rest] == 0).all()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_is_adapted_is_adapted_right(name):
    try:
        model = build_small(name)
    except Exception as error:
        pytest.skip(f"cannot be built here: {error}")
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        before = model(input_ids=ids, use_cache=False).logits
        try:
            report = inject_roae(model, RoAEConfig(rank=2, low_freq_ratio=RATIO))
        except ValueError as error:
            refusal = str(error)
        if not any(True for _ in roae_layers(model)):
            assert type(model).__name__ in refusal
            assert "\n" not in refusal
            pytest.skip(refusal)
        assert torch.equal(model(input_ids=ids, use_cache=False).logits, before)
        check_low_frequencies(model, report)
        check_rows_become_those_dimensions(model, report)
        check_only_low_rows_change(model.double(), report)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", REFUSED)
def test_a_family_without_rope_is_refused_with_its_reason(family):
    model = build_small(f"{family}Config")
    with pytest.raises(ValueError, match=f"{type(model).__name__} .*{REFUSED[family]}"):
        inject_roae(model, RoAEConfig(rank=2))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", FAST)
def test_in_half_precision_the_same_dimensions_are_chosen(family):
    whole, half = build_small(f"{family}Config"), build_small(f"{family}Config").bfloat16()
    config = RoAEConfig(rank=2)
    wanted = [(p.name, p.rows) for p in inject_roae(whole, config).projections]
    assert [(p.name, p.rows) for p in inject_roae(half, config).projections] == wanted


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_at_least_85_of_the_installed_models_are_adapted():
    others = {}
    for name in causal_models():
        try:
            inject_roae(build_small(name), RoAEConfig(rank=2))
        except Exception as error:  # it cannot be built here, or is refused
            others[name] = " ".join(str(error).split())[:200]
    assert len(causal_models()) - len(others) >= 85, others
