from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from rosa_lightning.adapters.metadata import Origin, identify, origin_of
from rosa_lightning.models.loading import load_base
from rosa_lightning.roae.inject import inject_roae, remove_roae
from rosa_lightning.roae.layer import RoAEConfig
from rosa_lightning.roae.rope import PairTable
from rosa_lightning.roae.targets import AdaptedProjection
from tests.conftest import build, save_base

CONFIG = RoAEConfig(rank=2, targets=("q", "k", "v"))


def adapted(config=CONFIG, **changes):
    torch.manual_seed(0)
    model = build("gemma3", **changes)  # whose two layers rotate at frequencies of their own
    inject_roae(model, config)
    return model


def test_an_origin_goes_through_json():
    model = adapted()
    origin = origin_of(model)
    plain = json.loads(json.dumps(origin.to_dict()))
    assert Origin.from_dict(json.loads(json.dumps(origin.to_dict()))).to_dict() == origin.to_dict()
    assert len(plain["tables"]) == 3  # two rotations, and none for v
    assert len(plain["terms"]) == len(origin.terms) == 6
    origin.check_base(model)
    origin.check_rotation(model)
    origin.check_base(remove_roae(model))


def test_under_other_settings_the_terms_that_both_have_are_compared():
    origin = origin_of(adapted())
    for config in (replace(CONFIG, targets=("q", "o")), replace(CONFIG, low_freq_ratio=1.0)):
        origin.check_rotation(adapted(config))
    faster = [
        replace(term, table=replace(term.table, inv_freq=tuple(2 * f for f in term.table.inv_freq)))
        for term in origin.terms
    ]
    for config in (replace(CONFIG, targets=("q", "o")), replace(CONFIG, dropout=0.5)):
        with pytest.raises(ValueError, match=r"q_proj rotates other dimensions"):
            replace(origin, terms=tuple(faster)).check_rotation(adapted(config))


def test_terms_that_the_settings_do_not_make_are_refused():
    origin = origin_of(adapted())
    table = PairTable(32, (), ())
    elsewhere = AdaptedProjection(
        name="a", target="v", projection="model.layers.9.self_attn.v_proj", table=table
    )
    for terms in (origin.terms[1:], (*origin.terms, elsewhere), (elsewhere, *origin.terms[1:])):
        with pytest.raises(ValueError, match=rf"lists {len(terms)} terms, and its settings make 6"):
            replace(origin, terms=terms).check_rotation(adapted())
    moved = replace(origin.terms[0], low_pairs=(0, 1))
    with pytest.raises(ValueError, match="rotates other dimensions"):
        replace(origin, terms=(moved, *origin.terms[1:])).check_rotation(adapted())


def test_a_base_is_known_again_in_another_dtype(base_folder):
    first = identify(load_base(str(base_folder)), "one")
    for dtype in ("bfloat16", "float16"):
        identify(load_base(str(base_folder), dtype=dtype), "two").check(first.to_dict())


@pytest.mark.parametrize("changes", [{"seed": 1}, {"num_hidden_layers": 3}, {"hidden_size": 32}])
def test_another_base_is_refused_and_named(base_folder, tmp_path, changes):
    first = identify(load_base(str(base_folder)), "the first")
    other = identify(load_base(str(save_base(tmp_path / "other", **changes))), "the other")
    with pytest.raises(ValueError, match="'the first', and the base given, 'the other'"):
        other.check(first.to_dict())


def test_a_fine_tuned_copy_of_the_same_shape_is_another_base(base_folder):
    model = load_base(str(base_folder))
    first = identify(model, "base")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    with pytest.raises(ValueError, match="is another one"):
        identify(model, "tuned").check(first.to_dict())


def test_other_projections_in_a_deep_model_are_another_base():
    """Whatever the period of the layers' weights: no weight is left unseen."""
    model = build("llama", num_hidden_layers=32)
    first = identify(model, "base")
    torch.nn.init.normal_(model.model.layers[17].self_attn.k_proj.weight)
    with pytest.raises(ValueError, match=r"layers\.17\.self_attn\.k_proj\.weight differs"):
        identify(model, "merged").check(first.to_dict())
