"""RoAE needs no Lightning: a fresh interpreter that cannot import it adapts, trains and merges."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("lightning", "pytorch_lightning"):
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Block())

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from rosa_lightning import RoAEConfig, inject_roae, merge_roae

sizes = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
model = LlamaForCausalLM(LlamaConfig(vocab_size=40, **sizes))
report = inject_roae(model, RoAEConfig(rank=2))
ids = torch.arange(12)[None]
model(input_ids=ids, labels=ids).loss.backward()
assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
assert len(report.projections) == 4
merge_roae(model)
"""


def test_roae_adapts_trains_and_merges_where_lightning_cannot_be_imported():
    command = [sys.executable, "-c", SCRIPT]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
