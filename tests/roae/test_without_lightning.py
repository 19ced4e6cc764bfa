"""RoAE needs no Lightning: imported anew where that fails, it adapts, trains and merges."""

from __future__ import annotations

import torch

from tests.blocked import without
from tests.conftest import build


def test_roae_adapts_trains_and_merges_where_lightning_cannot_be_imported():
    model = build("llama")
    with without("lightning", "pytorch_lightning", anew="rosa_lightning"):
        from rosa_lightning import RoAEConfig, inject_roae, merge_roae

        report = inject_roae(model, RoAEConfig(rank=2))
        ids = torch.arange(12)[None]
        model(input_ids=ids, labels=ids).loss.backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        assert len(report.projections) == 4
        merge_roae(model)
