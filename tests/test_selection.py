import math
from collections import Counter
from itertools import combinations, permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from rosa_lightning.selection import (
    find_layers,
    layer_scores,
    random_subset,
    resolve_indices,
    resolve_num_active,
    sample,
    select_layers,
    top_k,
)

score_lists = st.lists(st.one_of(st.just(0.0), st.floats(5e-324, 1e308)), min_size=1, max_size=12)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


@st.composite
def scores_and_count(draw):
    values = draw(score_lists)
    return values, draw(st.integers(1, len(values)))


def subset_probabilities(weights, num_active):
    """Chances of every subset when layers are drawn one after another, by enumeration."""
    chances = Counter()
    for order in permutations(range(len(weights)), num_active):
        left, chance = sum(weights), 1.0
        for index in order:
            chance *= weights[index] / left
            left -= weights[index]
        chances[tuple(sorted(order))] += chance
    return chances


def chi_square(counts, chances, draws):
    assert set(counts) <= {subset for subset, chance in chances.items() if chance > 0}
    return sum((counts[s] - draws * p) ** 2 / (draws * p) for s, p in chances.items() if p > 0)


# --- scores ---------------------------------------------------------------------------------


def test_score_is_the_norm_over_all_norm_gradients_of_a_layer():
    gradients = [[torch.randn(5, generator=generator(s)), torch.randn(3)] for s in range(4)]
    expected = [math.sqrt(sum(x * x for g in layer for x in g.tolist())) for layer in gradients]
    assert layer_scores(gradients).tolist() == pytest.approx(expected, rel=1e-14)


def test_score_is_divided_by_the_loss_scale():
    gradients = [[torch.tensor([3.0, 4.0])], [torch.tensor([0.0, 1.0])]]
    scaled = [[g * 65536 for g in layer] for layer in gradients]
    assert layer_scores(scaled, 65536.0).tolist() == [5.0, 1.0]


def test_low_precision_gradients_are_summed_without_overflow():
    gradients = [[torch.full((1000,), 60000.0, dtype=torch.float16)]]
    assert layer_scores(gradients).item() == pytest.approx(59999 * math.sqrt(1000), rel=1e-3)


def test_missing_gradients_count_as_zero():
    scores = layer_scores([[None, torch.ones(4)], [None], []])
    assert scores.tolist() == [2.0, 0.0, 0.0]
    assert scores.dtype == torch.float64


def test_non_finite_gradients_give_non_finite_scores():
    scores = layer_scores([[torch.tensor([math.nan])], [torch.tensor([math.inf])]])
    assert not scores.isfinite().any()


# --- top_k ----------------------------------------------------------------------------------


@given(scores_and_count())
def test_top_k_takes_the_highest_sorted_and_ties_by_index(case):
    values, count = case
    chosen = top_k(tensor(values), count)
    assert list(chosen) == sorted(set(chosen))
    assert len(chosen) == count
    for inside in chosen:
        for outside in set(range(len(values))) - set(chosen):
            assert (values[inside], -inside) > (values[outside], -outside)


@given(st.lists(st.floats(0, 1e6), min_size=2, max_size=10, unique=True), st.randoms())
def test_top_k_follows_a_permutation_of_distinct_scores(values, random):
    order = list(range(len(values)))
    random.shuffle(order)
    count = random.randint(1, len(values))
    permuted = top_k(tensor([values[index] for index in order]), count)
    assert {order[index] for index in permuted} == set(top_k(tensor(values), count))


# --- sample ---------------------------------------------------------------------------------


@given(scores_and_count(), st.floats(1e-300, 1e300), st.integers(0, 2**31))
@settings(deadline=None)
def test_sample_gives_a_sorted_subset_of_the_asked_size(case, temperature, seed):
    values, count = case
    chosen = sample(tensor(values), count, temperature, generator(seed))
    assert list(chosen) == sorted(set(chosen))
    assert len(chosen) == count
    positive = {index for index, value in enumerate(values) if value > 0}
    assert set(chosen) <= positive or positive <= set(chosen)


@pytest.mark.parametrize(
    ("values", "num_active", "temperature"),
    [
        ([1.0, 2.0, 3.0, 4.0], 1, 1.0),
        ([1.0, 2.0, 3.0, 4.0], 2, 1.0),
        ([5.0, 0.5, 1.0, 2.0, 0.1], 3, 2.0),
        ([1.0, 2.0, 3.0, 4.0], 2, 0.5),
        ([1e-300, 2e-300, 4e-300], 2, 1.0),
    ],
)
def test_sample_draws_subsets_as_often_as_enumeration_says(values, num_active, temperature):
    largest = max(values)
    weights = [(value / largest) ** (1 / temperature) for value in values]
    chances = subset_probabilities(weights, num_active)
    draws, source = 4000, generator(7)
    counts = Counter(sample(tensor(values), num_active, temperature, source) for _ in range(draws))
    freedom = len(chances) - 1
    # 0.999 quantile of chi-square, Wilson and Hilferty's approximation.
    limit = freedom * (1 - 2 / (9 * freedom) + 3.09 * math.sqrt(2 / (9 * freedom))) ** 3
    assert chi_square(counts, chances, draws) < limit


def test_sample_draws_zero_scores_last_and_evenly():
    source, counts = generator(3), Counter()
    for _ in range(3000):
        chosen = sample(tensor([0.0, 1e-320, 0.0, 5.0, 0.0]), 3, 1.0, source)
        assert {1, 3} <= set(chosen)
        counts[chosen] += 1
    chances = {(0, 1, 3): 1 / 3, (1, 2, 3): 1 / 3, (1, 3, 4): 1 / 3}
    assert chi_square(counts, chances, 3000) < 13.8


def test_sample_of_only_zero_scores_is_uniform():
    source = generator(4)
    counts = Counter(sample(torch.zeros(4), 2, 1.0, source) for _ in range(3000))
    chances = dict.fromkeys(combinations(range(4), 2), 1 / 6)
    assert chi_square(counts, chances, 3000) < 20.5


@given(st.lists(st.integers(0, 50), min_size=1, unique=True), st.data())
def test_sample_nears_top_k_as_the_temperature_falls(values, data):
    scores, count = tensor(values), data.draw(st.integers(1, len(values)))
    assert sample(scores, count, 1e-9, generator(1)) == top_k(scores, count)
    assert sample(scores, count, 1e-320, generator(1)) == top_k(scores, count)


def test_random_policies_leave_the_global_generator_alone():
    before = torch.get_rng_state()
    sample(torch.ones(4), 2, 1.0, generator())
    random_subset(4, 2, generator())
    assert torch.equal(torch.get_rng_state(), before)


@given(st.integers(0, 1000))
def test_equal_seeds_give_equal_draws(seed):
    one, two = generator(seed), generator(seed)
    scores = tensor([3.0, 1.0, 2.0, 5.0])
    assert [sample(scores, 2, 1.0, one) for _ in range(3)] == [
        sample(scores, 2, 1.0, two) for _ in range(3)
    ]


def test_every_draw_takes_the_same_amount_of_randomness():
    one, two = generator(), generator()
    sample(tensor([0.0, 0.0, 1.0]), 1, 1.0, one)
    sample(tensor([1.0, 2.0, 3.0]), 3, 5.0, two)
    assert torch.equal(one.get_state(), two.get_state())


def test_random_subset_is_uniform():
    source = generator(5)
    counts = Counter(random_subset(4, 2, source) for _ in range(3000))
    chances = dict.fromkeys(combinations(range(4), 2), 1 / 6)
    assert chi_square(counts, chances, 3000) < 20.5


@pytest.mark.parametrize("values", [[math.nan, 1.0], [math.inf, 1.0]])
def test_policies_refuse_scores_that_are_not_finite(values):
    with pytest.raises(ValueError, match="finite"):
        top_k(tensor(values), 1)
    with pytest.raises(ValueError, match="finite"):
        sample(tensor(values), 1, 1.0, generator())


def test_sample_refuses_negative_scores():
    with pytest.raises(ValueError, match=r"-2\.0"):
        sample(tensor([1.0, -2.0]), 1, 1.0, generator())


@pytest.mark.parametrize("count", [0, 3])
def test_policies_refuse_counts_outside_the_layers(count):
    with pytest.raises(ValueError, match=f"num_active={count}"):
        top_k(torch.ones(2), count)


# --- select_layers, counts and indices --------------------------------------------------------


def choose(policy, num_active=2, scores=(4.0, 1.0, 3.0, 2.0), **kwargs):
    return select_layers(policy, tensor(scores), num_active, generator=generator(), **kwargs)


def test_each_policy_gives_its_layers():
    assert choose("top_k") == (0, 2)
    assert choose("all") == (0, 1, 2, 3)
    assert choose("fixed", fixed_layers=(3, 1)) == (1, 3)
    assert choose("random") == random_subset(4, 2, generator())
    assert choose("sample", temperature=2.0) == sample(
        tensor([4.0, 1.0, 3.0, 2.0]), 2, 2.0, generator()
    )


@pytest.mark.parametrize("policy", ["top_k", "sample", "random"])
def test_always_active_layers_count_towards_the_number(policy):
    chosen = choose(policy, 2, always_active=(1,))
    assert 1 in chosen
    assert len(chosen) == 2
    assert choose(policy, 2, always_active=(1, 3)) == (1, 3)
    assert choose(policy, 4, always_active=(0, 1, 2, 3)) == (0, 1, 2, 3)


def test_always_active_layers_join_the_controls():
    assert choose("top_k", 2, always_active=(1,)) == (0, 1)
    assert choose("fixed", always_active=(0,), fixed_layers=(3,)) == (0, 3)


@pytest.mark.parametrize(
    ("given", "layers", "expected"),
    [(1, 4, 1), (4, 4, 4), (0.5, 12, 6), (0.5, 5, 3), (0.01, 12, 1), (1.0, 7, 7), (0.3, 10, 3)],
)
def test_num_active_is_a_count_or_a_fraction(given, layers, expected):
    assert resolve_num_active(given, layers) == expected


@given(st.floats(1e-9, 1.0), st.integers(1, 200))
def test_every_fraction_gives_between_one_and_all_layers(fraction, layers):
    count = resolve_num_active(fraction, layers)
    assert 1 <= count <= layers
    assert count == 1 or abs(count - fraction * layers) <= 0.5


@pytest.mark.parametrize("given", [0, -1, 0.0, -0.5, 1.5, math.nan, math.inf, True, "2", None])
def test_impossible_num_active_is_refused_with_the_mend(given):
    with pytest.raises(ValueError, match=r"num_active=.*fraction in \(0, 1\]"):
        resolve_num_active(given)


def test_num_active_above_the_layers_is_refused():
    assert resolve_num_active(9) == 9
    with pytest.raises(ValueError, match="num_active=9 is above the model's 8 layers"):
        resolve_num_active(9, 8)


def test_indices_may_count_from_the_end():
    assert resolve_indices("always_active", [-1, 0, 5], range(6)) == (0, 5)
    with pytest.raises(ValueError, match=r"always_active=\[6\].*cannot be selected"):
        resolve_indices("always_active", [6], range(6))


def test_indices_are_positions_among_all_layers_and_give_places_among_the_candidates():
    assert resolve_indices("fixed_layers", [-1, 2], (0, 2, 4)) == (1, 2)
    with pytest.raises(ValueError, match=r"fixed_layers=\[1\].*any of \[0, 2, 4\]"):
        resolve_indices("fixed_layers", [1], (0, 2, 4))


# --- finding layers ---------------------------------------------------------------------------


class WeightlessNorm(nn.Module):
    pass


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj = nn.Linear(4, 4)
        self.q_norm = nn.RMSNorm(2)
        # Modules of adapters inside the layers are no layers.
        self.adapters = nn.ModuleList([nn.Linear(4, 2), nn.Linear(2, 4)])


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(4)
        self.attention = Attention()
        self.post_attention_layernorm = nn.LayerNorm(4)


class Model(nn.Module):
    def __init__(self, num_layers=3):
        super().__init__()
        self.layers = nn.ModuleList([Block() for _ in range(num_layers)])


def test_the_only_stack_is_found_with_its_own_norms():
    root = nn.ModuleDict({"model": Model()})
    found = find_layers(root)
    block = root["model"].layers[1]
    assert [layer.name for layer in found] == [f"model.layers.{i}" for i in range(3)]
    assert found[1].norms == (block.input_layernorm.weight, block.post_attention_layernorm.weight)
    assert set(found[1].candidates.values()) == set(block.parameters())
    assert "model.layers.1.attention.q_proj.weight" in found[1].candidates


def test_only_parameters_that_train_are_candidates():
    root = Model()
    root.requires_grad_(False)
    for block in root.layers:
        block.attention.adapters.requires_grad_(True)
    names = set(find_layers(root)[0].candidates)
    adapters = "layers.0.attention.adapters"
    assert names == {f"{adapters}.{i}.{kind}" for i in (0, 1) for kind in ("weight", "bias")}


def test_patterns_choose_norms_and_candidates():
    (first, *_) = find_layers(Model(), norms="*.q_norm, post_*", trainable="*q_proj*,*.bias")
    assert [weight.numel() for weight in first.norms] == [2, 4]
    assert {name.removeprefix("layers.0.") for name in first.candidates} == {
        "attention.q_proj.weight",
        "attention.q_proj.bias",
        "attention.adapters.0.bias",
        "attention.adapters.1.bias",
        "post_attention_layernorm.bias",
    }


def test_two_stacks_are_listed_with_their_lengths():
    root = nn.ModuleDict({"encoder": Model(3), "decoder": Model(5)})
    with pytest.raises(ValueError, match=r"encoder.layers \(3 layers\), decoder.layers \(5 layers"):
        find_layers(root)
    assert len(find_layers(root, "decoder.layers")) == 5


def test_a_frozen_tower_and_lists_without_parameters_are_no_choice():
    root = nn.ModuleDict({"vision": Model(3), "language": Model(4), "metrics": nn.Module()})
    root["vision"].requires_grad_(False)
    root["metrics"].all = nn.ModuleList([nn.Identity(), nn.Identity()])
    assert next(layer.name for layer in find_layers(root)) == "language.layers.0"


def test_a_model_without_layers_is_told_so():
    with pytest.raises(ValueError, match=r"found 0.*layers="):
        find_layers(nn.Linear(2, 2))


def test_a_path_that_matches_nothing_names_the_nearest():
    root = nn.ModuleDict({"encoder": Model(), "decoder": Model()})
    with pytest.raises(ValueError, match=r"'encoder.layer' matches nothing.*encoder.layers"):
        find_layers(root, "encoder.layer")
    with pytest.raises(ValueError, match=r"matches nothing.*The model has none"):
        find_layers(nn.Linear(2, 2), "encoder.layers")


def test_a_path_to_something_else_is_refused():
    with pytest.raises(ValueError, match="is a Block; expected a ModuleList"):
        find_layers(Model(), "layers.0")


def test_a_sequential_of_layers_can_be_named():
    root = nn.ModuleDict({"blocks": nn.Sequential(Block(), Block())})
    assert [layer.name for layer in find_layers(root, "blocks")] == ["blocks.0", "blocks.1"]


def test_a_layer_whose_norms_have_no_weight_is_named():
    root = Model()
    root.layers[1].input_layernorm = WeightlessNorm()
    assert len(find_layers(root)[1].norms) == 1
    root.layers[1].post_attention_layernorm = WeightlessNorm()
    with pytest.raises(ValueError, match=r"Layer 'layers.1' has no norm weight.*attention.q_norm"):
        find_layers(root)


def test_a_layer_without_candidates_is_left_out():
    root = Model()
    root.layers[0].requires_grad_(False)
    found = find_layers(root)
    assert [layer.index for layer in found] == list(range(1, len(root.layers)))
    with pytest.raises(ValueError, match=r"nothing to train in 'layers'.*\*lora\*"):
        find_layers(root, trainable="*lora*")


def test_layers_that_share_a_parameter_are_refused():
    root = Model()
    root.layers[2].attention = root.layers[0].attention
    with pytest.raises(ValueError, match=r"'layers.2.attention.*also belongs to layer 'layers.0'"):
        find_layers(root)


def test_layers_wrapped_by_the_compiler_are_seen_through():
    root = Model()
    plain = find_layers(root)
    for index, block in enumerate(root.layers):
        root.layers[index] = torch.compile(block, backend="eager")
    assert find_layers(root) == plain
