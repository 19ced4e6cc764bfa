from __future__ import annotations

import math
import sys
import weakref

import peft
import pytest
import torch
import transformers
from torch import nn
from torch.testing import assert_close

from rosa_lightning.models.loading import enable_checkpointing
from rosa_lightning.roae.inject import (
    check_adapter_keys,
    inject_roae,
    is_adapter_key,
    merge_roae,
    roae_layers,
)
from rosa_lightning.roae.layer import RoAEConfig, RoAELinear
from tests.conftest import FAMILIES, SMALL, build
from tests.model_zoo.small import build_small

SEPARATE = [family for family in FAMILIES if family not in ("phi3", "neox", "persimmon")]
"""Families whose parts the oracle below calls by name."""


def randomise(model: nn.Module) -> None:
    for _, layer in roae_layers(model):
        nn.init.normal_(layer.roae_B)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_new_adapter_leaves_logits_bit_for_bit_unchanged(family, dtype, ids_BT):
    model = build(family, dtype)
    before, kernel = model(ids_BT).logits, model.config._attn_implementation
    inject_roae(model.train(), RoAEConfig(rank=4))
    assert (model.config._attn_implementation, model.training) == (kernel, True)
    assert torch.equal(model.eval()(ids_BT).logits, before)


def _rotated_queries(model, layer_index: int, row: torch.Tensor, positions: list[int]):
    """Query states (positions, head_dim) of the first head for one projection output.

    Shares nothing with the package: it calls the model's rotary module and its
    ``apply_rotary_pos_emb`` by name.
    """
    attention = model.model.layers[layer_index].self_attn
    code = sys.modules[type(attention).__module__]
    args = [row[None, None], torch.tensor([positions])]
    if type(model.config).__name__ == "Gemma3TextConfig":
        args.append(model.config.layer_types[layer_index])
    cos, sin = (value.double() for value in model.model.rotary_emb(*args))
    head = row.view(1, -1, 1, attention.head_dim)[:, :1].expand(-1, -1, len(positions), -1)
    width = cos.shape[-1]
    rotated, _ = code.apply_rotary_pos_emb(head[..., :width], head[..., :width], cos, sin)
    return torch.cat([rotated, head[..., width:]], -1)[0, 0]


def _frequencies(model, layer_index: int) -> torch.Tensor:
    """Radians per token of each dimension from q(p+s) + q(p-s) = 2 cos(s theta) q(p).

    Rotations are computed in float32 by the models, so a slow pair shows only over a long step:
    the step grows as long as it stays below half a turn.
    """
    row = torch.randn(model.model.layers[layer_index].self_attn.q_proj.weight.shape[0]).double()
    theta = None
    for step in (1, 20, 400, 8000, 160000):
        q = _rotated_queries(model, layer_index, row, [step * k for k in range(9)])
        middle = q[1:-1]
        cosine = ((q[2:] + q[:-2]) * middle).sum(0) / (2 * middle.square().sum(0))
        estimate = cosine.clamp(-1, 1).arccos() / step
        theta = estimate if theta is None else torch.where(theta * step < 2.0, estimate, theta)
    return theta


@pytest.mark.parametrize("family", SEPARATE)
def test_the_slowest_dimensions_by_the_recurrence_of_rotations_change_and_no_others(family):
    model = build(family)
    report = inject_roae(model, RoAEConfig(rank=2, low_freq_ratio=0.25))
    randomise(model)
    assert len(report.projections) == (2 if family == "smollm3" else 4)
    for projection in report.projections:
        theta = _frequencies(model, int(projection.name.split(".")[2]))
        rotated = [dim for dim in range(len(theta)) if float(theta[dim]) > 1e-8]
        count = 2 * max(1, round(0.25 * len(rotated) / 2))
        slowest = sorted(rotated, key=lambda dim: float(theta[dim]))[:count]
        assert projection.dims == tuple(sorted(slowest))
        for pair, frequency in zip(projection.table.pairs, projection.table.inv_freq, strict=True):
            both = [float(theta[dim]) for dim in pair]
            assert both == pytest.approx([frequency] * 2, rel=1e-3)
        layer = model.get_submodule(projection.name)
        x = torch.randn(3, 7, layer.roae_A.shape[1])
        changed = (layer(x) != layer.base(x)).unflatten(-1, (projection.num_heads, -1))
        assert changed[..., list(projection.dims)].all()
        assert changed.any((0, 1, 2)).sum() == count


@pytest.mark.parametrize(
    "family", ["llama", "qwen3", "cohere", "gemma3", "phi", "phi3", "neox", "persimmon"]
)
def test_merging_keeps_the_logits_and_leaves_a_plain_model(family, ids_BT):
    model = build(family)
    before_keys = set(model.state_dict())
    inject_roae(model, RoAEConfig(rank=4))
    for _, layer in roae_layers(model):
        nn.init.normal_(layer.roae_B, std=0.02)
    before = model(ids_BT).logits
    merge_roae(model)
    assert_close(model(ids_BT).logits, before, atol=1e-4, rtol=1e-4)
    assert set(model.state_dict()) == before_keys
    assert not any(isinstance(module, RoAELinear) for module in model.modules())


def lora_on_everything(model, modules: list[str], ours) -> nn.Module:
    """A PEFT LoRA with the same weights, its B zero where ours has no row."""
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=modules)
    theirs = peft.get_peft_model(model, config)
    for name, layer in roae_layers(ours):
        lora = theirs.get_submodule(f"base_model.model.{name}")
        lora.lora_A["default"].weight.data = layer.roae_A.data.clone()
        wide = torch.zeros_like(lora.lora_B["default"].weight)
        wide[layer.rows] = layer.roae_B.data
        lora.lora_B["default"].weight.data = wide
    return theirs.eval()


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi"])
def test_at_ratio_one_every_target_is_lora_forward_and_backward(family, ids_BT):
    ours, base = build(family), build(family)
    base.load_state_dict(ours.state_dict())
    targets = ("q", "k", "v", "o", "up", "down", *(() if family == "phi" else ("gate",)))
    config = RoAEConfig(rank=4, alpha=8.0, low_freq_ratio=1.0, targets=targets)
    report = inject_roae(ours, config)
    randomise(ours)
    modules = sorted({name.rpartition(".")[2] for name, _ in roae_layers(ours)})
    assert len(modules) == len(targets) == len(report.projections) / 2
    theirs = lora_on_everything(base, modules, ours)
    outputs = ours(ids_BT).logits, theirs(ids_BT).logits
    assert_close(*outputs, atol=1e-4, rtol=1e-4)
    for logits in outputs:
        logits.square().mean().backward()
    for name, layer in roae_layers(ours):
        lora = theirs.get_submodule(f"base_model.model.{name}")
        wide = lora.lora_B["default"].weight.grad
        assert_close(layer.roae_A.grad, lora.lora_A["default"].weight.grad, atol=1e-4, rtol=1e-3)
        assert_close(layer.roae_B.grad, wide[layer.rows], atol=1e-4, rtol=1e-3)
        # Partial rotary: only the rotated half of a head of 16 is a row of q and k.
        partial = family == "phi" and name.endswith(("q_proj", "k_proj"))
        assert len(layer.rows) == len(wide) // (2 if partial else 1)


def test_targets_of_fused_projections_are_their_own_rows():
    model = build("phi3")
    names = ("q", "k", "v", "gate", "up", "down", "o")
    report = inject_roae(model, RoAEConfig(rank=4, low_freq_ratio=1.0, targets=names))
    rows = {p.target: p.rows for p in report.projections if ".0." in p.name}
    # Four query heads, two key heads and two value heads of 16; a feed-forward width of 96.
    assert rows == {
        "q": tuple(range(64)),
        "k": tuple(range(64, 96)),
        "v": tuple(range(96, 128)),
        "gate": tuple(range(96)),
        "up": tuple(range(96, 192)),
        "down": tuple(range(64)),
        "o": tuple(range(64)),
    }


def test_a_target_that_no_layer_has_is_refused_by_name():
    model = build("phi")
    with pytest.raises(ValueError, match="PhiForCausalLM: gate can be adapted in no layer"):
        inject_roae(model, RoAEConfig(targets=("q", "gate")))
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("family", ["qwen3", "gemma3", "olmo2", "persimmon"])
def test_placement_state_adds_after_the_norm_on_low_dimensions_alone(family, ids_BT):
    model = build(family)
    before = model(ids_BT).logits
    report = inject_roae(model, RoAEConfig(rank=4, placement="state"))
    assert torch.equal(model(ids_BT).logits, before)
    assert len(report.projections) == 4
    randomise(model)
    seen = {}

    def keep(norm, args, output, name):
        seen[name] = output.detach() - norm.base(args[0])

    for projection in report.projections:
        norm = model.get_submodule(projection.norm)
        norm.register_forward_hook(
            lambda norm, args, output, name=projection.norm: keep(norm, args, output, name)
        )
    model(ids_BT).logits.sum().backward()
    for projection in report.projections:
        change, dim = seen[projection.norm], projection.table.head_dim
        if change.shape[-1] != dim:
            change = change.unflatten(-1, (-1, dim))
        # Every head and every token moves in the low dimensions, and in no other.
        assert set(change.flatten(0, -2).any(0).nonzero().flatten().tolist()) == set(
            projection.dims
        )
        assert (change[..., list(projection.dims)] != 0).all()
        layer = model.get_submodule(projection.name)
        assert layer.deferred is None
        assert layer.roae_A.grad.abs().sum() > 0
        assert layer.roae_B.grad.abs().sum() > 0


def _first_queries(model: nn.Module, ids_BT: torch.Tensor) -> torch.Tensor:
    """What comes out of the norm on Q in the first layer, as (..., head_dim)."""
    seen = []
    attention = model.model.layers[0].self_attn
    hook = attention.q_norm.register_forward_hook(lambda norm, args, out: seen.append(out))
    model(ids_BT)
    hook.remove()
    return seen[0].reshape(*seen[0].shape[:2], -1, attention.head_dim)


@pytest.mark.parametrize("family", ["qwen3", "gemma3", "olmo2"])
@torch.no_grad()
def test_a_norm_after_the_term_scales_the_fast_dimensions_by_one_factor(family, ids_BT):
    model = build(family)
    frozen = _first_queries(model, ids_BT)
    inject_roae(model, RoAEConfig(rank=4, low_freq_ratio=0.25))
    randomise(model)
    pairs = frozen.shape[-1] // 2
    fast = [dim for dim in range(2 * pairs) if dim % pairs < 3 * pairs // 4]
    factor = (_first_queries(model, ids_BT) / frozen)[..., fast]
    assert_close(factor, factor[..., :1].expand_as(factor))
    assert (factor - 1).abs().mean() > 0.05


@pytest.mark.parametrize(
    ("family", "settings", "is_said"),
    [
        ("qwen3", {}, True),
        ("gemma3", {"dims": "high"}, True),
        ("qwen3", {"placement": "state"}, False),
        ("qwen3", {"low_freq_ratio": 1.0}, False),  # there are no other dimensions
        ("qwen3", {"targets": ("v", "up")}, False),
        ("llama", {}, False),
    ],
)
def test_a_report_says_when_a_norm_takes_the_term_to_other_dimensions(family, settings, is_said):
    report = inject_roae(build(family), RoAEConfig(rank=4, **settings))
    assert bool(report.remark) is is_said
    assert "\n" not in f"{report}{report.remark}"


def test_placement_state_refuses_to_merge_and_changes_nothing(ids_BT):
    model = build("qwen3")
    inject_roae(model, RoAEConfig(rank=4, placement="state"))
    randomise(model)
    before = model(ids_BT).logits
    with pytest.raises(ValueError, match="placement=state"):
        merge_roae(model)
    assert torch.equal(model(ids_BT).logits, before)


def test_placement_state_is_refused_where_the_norm_comes_after_the_rotation():
    config = transformers.NanoChatConfig(**{**SMALL, "num_key_value_heads": 2})
    model = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match=r"q_norm comes after the rotation.*projection"):
        inject_roae(model, RoAEConfig(placement="state"))
    inject_roae(model, RoAEConfig(placement="projection"))


def test_a_fused_projection_holds_one_term_inside_the_other_and_merges_both():
    model = build("neox")
    report = inject_roae(model, RoAEConfig(rank=4))
    q, k = report.projections[:2]
    assert (q.name, k.name) == (
        "gpt_neox.layers.0.attention.query_key_value.base",
        "gpt_neox.layers.0.attention.query_key_value",
    )
    # Heads of 16, half of it rotated: pairs (i, i + 4), the slowest being (3, 7).
    assert q.rows == tuple(48 * head + dim for head in range(4) for dim in (3, 7))
    assert k.rows == tuple(48 * head + 16 + dim for head in range(4) for dim in (3, 7))
    merge_roae(model)
    assert not any(True for _ in roae_layers(model))
    assert isinstance(model.gpt_neox.layers[0].attention.query_key_value, nn.Linear)


def test_only_adapters_take_gradients(ids_BT):
    model = build("llama")
    report = inject_roae(model, RoAEConfig(rank=4))
    randomise(model)
    model(ids_BT).logits.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == is_adapter_key(name)
        assert (parameter.grad is not None) == is_adapter_key(name)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert report.num_trainable == trainable
    assert report.num_total == sum(p.numel() for p in model.parameters())


def test_the_report_says_what_stands_where():
    report = inject_roae(build("llama"), RoAEConfig(rank=4, low_freq_ratio=0.25))
    names = [f"model.layers.{i}.self_attn.{t}_proj" for i in range(2) for t in "qk"]
    assert [p.name for p in report.projections] == names
    q, k = report.projections[:2]
    # Eight pairs a head of 16, base 10000: frequency i is 10000 ** (-i / 8).
    assert q.frequencies == pytest.approx((10000 ** (-7 / 8), 10000 ** (-6 / 8)), rel=1e-4)
    assert (q.dims, q.num_heads, k.num_heads) == ((6, 7, 14, 15), 4, 2)
    assert "4 of 16 dimensions a head" in str(report)


@pytest.mark.parametrize(("dims", "pairs"), [("low", (6, 7)), ("high", (0, 1)), ("all", range(8))])
def test_controls_adapt_other_dimensions(dims, pairs):
    model = build("llama")
    ids = torch.arange(12).view(1, 12)
    projection = model.get_submodule("model.layers.0.self_attn.q_proj")
    states = torch.randn(1, 3, projection.in_features)
    before = projection(states)
    report = inject_roae(model, RoAEConfig(rank=4, low_freq_ratio=0.25, dims=dims))
    for name, parameter in model.named_parameters():
        if name.endswith("roae_B"):
            torch.nn.init.normal_(parameter)
    moved = (model.get_submodule("model.layers.0.self_attn.q_proj")(states) != before).any((0, 1))
    expected = {head * 16 + d for head in range(4) for i in pairs for d in (i, i + 8)}
    assert set(moved.nonzero().flatten().tolist()) == expected
    assert report.projections[0].dims == tuple(sorted(d for i in pairs for d in (i, i + 8)))
    assert model(ids).logits.isfinite().all()


def test_random_dimensions_are_one_draw_for_each_layer_and_seed():
    def dims(seed):
        config = RoAEConfig(rank=2, low_freq_ratio=0.5, dims="random", dims_seed=seed)
        return [p.dims for p in inject_roae(build("llama"), config).projections]

    first = dims(0)
    assert first == dims(0)
    assert first[0] == first[1]  # q and k of a layer
    assert first[0] != first[2]  # another layer
    assert first != dims(1)
    assert all(len(one) == 8 for one in first)


@pytest.mark.parametrize(("ratio", "adapted"), [(1.0, 4), (0.5, 2), (0.3, 1), (0.01, 1)])
def test_a_share_of_the_layers_is_adapted_from_the_last_on(ratio, adapted, ids_BT):
    model = build("llama", num_hidden_layers=4)
    layers, expected = model.model.layers, [False] * (4 - adapted) + [True] * adapted
    report = inject_roae(model, RoAEConfig(rank=2, layer_ratio=ratio, targets=("q", "v", "down")))
    of_layers = [{n for n, _ in roae_layers(layer)} for layer in layers]
    assert list(map(bool, of_layers)) == expected
    assert report.num_trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert ("of the last" in str(report)) == (ratio < 1)
    states = model(ids_BT, output_hidden_states=True).hidden_states
    assert [state.requires_grad for state in states[1:]] == expected  # no backward below


def test_the_slowest_pairs_of_a_half_precision_model_are_told_apart():
    model = build(
        "llama", torch.bfloat16, rope_parameters={"rope_type": "default", "rope_theta": 1e7}
    )
    report = inject_roae(model, RoAEConfig(rank=4))
    wanted = [math.exp(-i / 8 * math.log(1e7)) for i in range(8)]
    assert report.projections[0].table.inv_freq == pytest.approx(wanted, rel=1e-5)


def test_a_model_without_rope_is_refused_by_name_and_left_as_it_was():
    sizes = {"vocab_size": 96, "n_embd": 64, "n_layer": 2, "n_head": 4}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))
    keys = set(model.state_dict())
    with pytest.raises(ValueError, match=r"GPT2LMHeadModel .*Give a RoPE model") as error:
        inject_roae(model, RoAEConfig())
    assert "\n" not in str(error.value)
    assert set(model.state_dict()) == keys
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_adapting_twice_and_merging_a_plain_model_are_refused():
    model = build("llama")
    with pytest.raises(ValueError, match="carries no RoAE"):
        merge_roae(model)
    inject_roae(model, RoAEConfig())
    with pytest.raises(ValueError, match="carries RoAE already"):
        inject_roae(model, RoAEConfig())


def test_adapter_keys_that_do_not_fit_are_named():
    model = build("llama")
    inject_roae(model, RoAEConfig(rank=4))
    good = {key: value for key, value in model.state_dict().items() if is_adapter_key(key)}
    check_adapter_keys(model, good)
    key = next(iter(good))
    with pytest.raises(ValueError, match=f"{key} is missing"):
        check_adapter_keys(model, {k: v for k, v in good.items() if k != key})
    with pytest.raises(ValueError, match=r"lm_head\.weight is unknown"):
        check_adapter_keys(model, {**good, "lm_head.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match=f"{key} has shape"):
        check_adapter_keys(model, {**good, key: torch.zeros(1)})


def test_routed_experts_take_no_term_and_the_report_says_so():
    # Shared experts are projections; routed ones are one parameter for all experts.
    report = inject_roae(build_small("Qwen2MoeConfig"), RoAEConfig(rank=4, targets=("q", "up")))
    ups = {p.name.partition("layers.0.")[2] for p in report.projections if p.target == "up"}
    assert "mlp.shared_expert.up_proj" in ups
    assert any("no term on up: its routed experts" in note for note in report.notes)
    with pytest.raises(ValueError, match=r"up can be adapted in no layer.*routed experts"):
        inject_roae(build_small("MixtralConfig"), RoAEConfig(rank=4, targets=("up",)))


def test_a_projection_or_weight_that_two_layers_share_is_refused():
    for shared in ("q_proj", "k_proj.weight"):
        model = build("llama")
        first, second = (layer.self_attn for layer in model.model.layers)
        if shared == "q_proj":
            second.q_proj = first.q_proj
        else:
            second.k_proj.weight = first.k_proj.weight
        with pytest.raises(ValueError, match=rf"self_attn\.{shared} stands in several places"):
            inject_roae(model, RoAEConfig(rank=4))


def test_a_layer_that_takes_its_keys_from_another_has_a_term_on_its_queries_alone():
    config = transformers.Gemma3nTextConfig(
        **{**SMALL, "num_hidden_layers": 4, "intermediate_size": [96] * 4, "head_dim": 16},
        layer_types=["sliding_attention", "full_attention"] * 2,
        num_kv_shared_layers=2,
        vocab_size_per_layer_input=96,
        hidden_size_per_layer_input=8,
        laurel_rank=4,
        activation_sparsity_pattern=[0.0] * 4,
    )
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    report = inject_roae(model, RoAEConfig(rank=4))
    targets = {i: [p.target for p in report.projections if f".{i}." in p.name] for i in range(4)}
    assert targets == {0: ["q", "k"], 1: ["q", "k"], 2: ["q"], 3: ["q"]}
    assert [note.partition(": ")[0] for note in report.notes] == [
        f"model.layers.{i}.self_attn" for i in (2, 3)
    ]


# --- what a step keeps and runs through -----------------------------------------------------------


def graph_leaves(loss) -> set[torch.Tensor]:
    """The parameters that the backward of a loss reaches."""
    found, seen, waiting = set(), set(), [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        found |= {node.variable} if hasattr(node, "variable") else set()
        waiting += [next_node for next_node, _ in node.next_functions]
    return found


class Saved:
    def __init__(self, tensor):
        self.tensor = tensor


def kept_by_layer(model, **inputs) -> tuple[list[int], torch.Tensor]:
    """Bytes of activations that each layer keeps for the backward pass, and a loss."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    # Alive while autograd holds them: a checkpoint saves the input of a frozen layer for a moment.
    held = [weakref.WeakSet() for _ in model.model.layers]
    inside: list[int] = []

    def pack(tensor):
        saved = Saved(tensor)
        if inside and tensor.untyped_storage().data_ptr() not in weights:
            held[inside[-1]].add(saved)
        return saved

    handles = []
    for index, layer in enumerate(model.model.layers):
        enter = layer.register_forward_pre_hook(lambda *_, index=index: inside.append(index))
        handles += [enter, layer.register_forward_hook(lambda *_: inside.clear())]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        loss = model(**inputs, use_cache=False).logits.square().mean()
    for handle in handles:
        handle.remove()
    storages = [{saved.tensor.untyped_storage() for saved in layer} for layer in held]
    sizes = [{storage.data_ptr(): storage.nbytes() for storage in layer} for layer in storages]
    return [sum(layer.values()) for layer in sizes], loss


def adapters_of(layers) -> set[torch.Tensor]:
    return {p for name, p in layers.named_parameters() if is_adapter_key(name)}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_nothing_below_the_lowest_active_layer_is_kept_or_run_again(ids_BT, checkpointing):
    model = build("llama", num_hidden_layers=4).train()
    inject_roae(model, RoAEConfig(rank=4))
    if checkpointing:
        enable_checkpointing(model)
    layers = model.model.layers
    layers[:2].requires_grad_(False)
    runs, outputs = [0] * 4, []
    for index, layer in enumerate(layers):

        def count(module, args, index=index):
            runs[index] += 1

        layer.mlp.register_forward_pre_hook(count)
        layer.register_forward_hook(lambda *found: outputs.append(found[-1]))
    kept, loss = kept_by_layer(model, input_ids=ids_BT)
    assert kept[:2] == [0, 0]
    assert min(kept[2:]) > 0
    assert [output.requires_grad for output in outputs] == [False, False, True, True]
    assert graph_leaves(loss) == adapters_of(layers[2:])
    loss.backward()
    assert runs == ([1, 1, 2, 2] if checkpointing else [1, 1, 1, 1])
