from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from rosa_lightning.adapters.metadata import Origin, TrainedTerm, origin_of
from rosa_lightning.roae.inject import inject_roae, remove_roae
from rosa_lightning.roae.layer import RoAEConfig
from rosa_lightning.roae.rope import PairTable
from tests.conftest import build

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
    assert Origin.from_dict(plain) == origin
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
    elsewhere = TrainedTerm("a", "v", "model.layers.9.self_attn.v_proj", "", table, ())
    for terms in (origin.terms[1:], (*origin.terms, elsewhere), (elsewhere, *origin.terms[1:])):
        with pytest.raises(ValueError, match=rf"lists {len(terms)} terms, and its settings make 6"):
            replace(origin, terms=terms).check_rotation(adapted())
    moved = replace(origin.terms[0], low_pairs=(0, 1))
    with pytest.raises(ValueError, match="rotates other dimensions"):
        replace(origin, terms=(moved, *origin.terms[1:])).check_rotation(adapted())
