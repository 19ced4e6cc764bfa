"""The callback in projects that know nothing of this package: it needs no word from them."""

from __future__ import annotations

import shutil
from pathlib import Path

import peft
import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from rosa_lightning import DynamicLayerSelection, dls
from tests.blocked import without
from tests.conftest import build
from tests.dls.toys import fit

LAYERS = 4


class Classifier(LightningModule):
    """A plain transformer encoder, fully fine-tuned."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
        self.encoder = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
        self.head = nn.Linear(16, 2)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.cross_entropy(self.head(self.encoder(x).mean(1)), y)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01, weight_decay=0.5)


class LoraChat(LightningModule):
    """A PEFT LoRA model in somebody else's module."""

    def __init__(self) -> None:
        super().__init__()
        base = build("llama", num_hidden_layers=LAYERS).train()
        config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
        self.net = peft.get_peft_model(base, config)

    def training_step(self, batch, batch_idx):
        return self.net(input_ids=batch[0], labels=batch[0]).loss

    def configure_optimizers(self):
        trainable = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return torch.optim.AdamW(trainable, lr=0.01, weight_decay=0.5)


PROJECTS = {
    "encoder": (Classifier, lambda: (torch.randn(24, 5, 16), torch.randint(2, (24,)))),
    "lora": (LoraChat, lambda: (torch.randint(3, 96, (24, 6)),)),
}


class Watch(DynamicLayerSelection):
    """Notes what each optimizer step moved."""

    def on_train_start(self, trainer, pl_module):
        super().on_train_start(trainer, pl_module)
        self.moved, self.steps = [], []
        self.before = {n: p.detach().clone() for n, p in pl_module.named_parameters()}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        now = {n: p.detach().clone() for n, p in pl_module.named_parameters()}
        moved = [name for name, value in now.items() if not torch.equal(value, self.before[name])]
        self.moved.append(
            {int(part) for name in moved for part in name.split(".") if part.isdigit()}
        )
        self.steps.append(self.active)
        self.before = now


@pytest.mark.parametrize("project", PROJECTS)
def test_each_step_moves_the_selected_layers_and_no_other(project, tmp_path):
    make, data = PROJECTS[project]
    module = make()
    required = {name: p.requires_grad for name, p in module.named_parameters()}
    watch = Watch(num_active=2, interval=2, policy="sample", seed=1)
    fit(module, DataLoader(TensorDataset(*data()), batch_size=4), watch)
    assert watch.moved == [set(active) for active in watch.steps]
    assert [len(active) for active in watch.steps] == [2] * 6
    assert watch.num_selections == 3
    assert len(set(watch.steps)) > 1
    assert {name: p.requires_grad for name, p in module.named_parameters()} == required


class Encoder(Classifier):
    """Learns without labels."""

    def training_step(self, batch, batch_idx):
        return self.encoder(batch).square().mean()


def test_the_folder_copied_under_another_name_works_with_torch_and_lightning_alone(
    tmp_path, monkeypatch
):
    shutil.copytree(Path(dls.__file__).parent, tmp_path / "layer_selection")
    monkeypatch.syspath_prepend(tmp_path)
    loader = DataLoader(torch.randn(24, 5, 16), batch_size=4)
    missing = ("rosa_lightning", "transformers", "peft", "jsonargparse", "regex")
    with without(*missing, anew="layer_selection"):
        from layer_selection import DynamicLayerSelection, PolicyOptions

        options = PolicyOptions(always_active=[-1])
        own = DynamicLayerSelection(
            num_active=2, interval=2, policy="sample", policy_options=options
        )
        fit(Encoder(), loader, own)
    assert own.num_selections == 3
    assert len(own.active) == 2
    assert 3 in own.active
