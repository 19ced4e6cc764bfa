"""Small modules, loaders and recorders, and a plain training loop to compare selection with."""

import math
from dataclasses import fields

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

from rosa_lightning.dls import DynamicLayerSelection, PolicyOptions

WIDTH = 6


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, WIDTH)
        self.down = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Toy(LightningModule):
    """A stack of blocks that learns a fixed random map; norms frozen unless trained."""

    def __init__(self, num_layers=5, lr=0.05, train_norms=False, optimizer=torch.optim.AdamW):
        super().__init__()
        torch.manual_seed(1)
        self.layers = nn.ModuleList([Block() for _ in range(num_layers)])
        self.head = nn.Linear(WIDTH, 2)
        for block in self.layers:
            block.norm.requires_grad_(train_norms)
        self.lr, self.optimizer = lr, optimizer

    def loss(self, batch):
        x = batch
        for layer in self.layers:
            x = layer(x)
        return (self.head(x) - batch[:, :2].sin() * 2).square().mean()

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def configure_optimizers(self):
        decay = {"weight_decay": 0.5} if self.optimizer is torch.optim.AdamW else {}
        trained = [p for p in self.parameters() if p.requires_grad]
        return self.optimizer(trained, lr=self.lr, **decay)


class TinyLlama(Toy):
    """A frozen Llama whose queries and keys train."""

    def __init__(self, num_layers=4):
        super().__init__(1)
        del self.layers, self.head
        sizes = {"vocab_size": 17, "hidden_size": 16, "intermediate_size": 24}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
        config = LlamaConfig(num_hidden_layers=num_layers, **sizes, **heads)
        self.model = LlamaForCausalLM(config).requires_grad_(False)
        for layer in self.model.model.layers:
            layer.self_attn.q_proj.requires_grad_(True)
            layer.self_attn.k_proj.requires_grad_(True)

    def loss(self, batch):
        ids = (batch.abs() * 100).long() % 17
        return self.model(input_ids=ids, labels=ids).loss


class Batches:
    """A loader that says where it is, so that a resumed run goes on there."""

    def __init__(self, batches):
        self.batches = batches
        self.position = 0

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        start, self.position = self.position % len(self.batches), 0
        for index in range(start, len(self.batches)):
            self.position = index + 1
            yield self.batches[index]

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


def batches(count, rows=4):
    source = torch.Generator().manual_seed(2)
    return [torch.randn(rows, WIDTH, generator=source) for _ in range(count)]


def select(**options):
    """The callback, with the options of policies among the others."""
    names = {field.name for field in fields(PolicyOptions)} & options.keys()
    picked = {name: options.pop(name) for name in names}
    return DynamicLayerSelection(policy_options=PolicyOptions(**picked), **options)


class Recorder(Callback):
    """Parameters, gradients, active layers and scores after every optimizer step."""

    def __init__(self, dls=None):
        self.dls = dls
        self.active, self.scores, self.parameters, self.grads, self.seen = [], [], [], [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen.append(batch)

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.grads.append({n: p.grad for n, p in pl_module.named_parameters()})

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        self.snap(pl_module)

    def on_train_end(self, trainer, pl_module):
        self.snap(pl_module)

    def snap(self, pl_module):
        self.parameters.append({n: p.detach().clone() for n, p in pl_module.named_parameters()})
        if self.dls is not None:
            self.active.append(self.dls.active)
            self.scores.append(self.dls.scores)


def fit(module, data, *callbacks, ckpt_path=None, **options):
    trainer = Trainer(
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **{"enable_checkpointing": False, "logger": False, "max_epochs": 1} | options,
    )
    loader = Batches(data) if isinstance(data, list) else data
    trainer.fit(module, loader, ckpt_path=ckpt_path)
    return trainer


def record(module, dls, data, extra=(), **options):
    recorder = Recorder(dls)
    # Callbacks run in order: the recorder sees what the selection has left.
    recorder.trainer = fit(module, data, dls, recorder, *extra, **options)
    return recorder


def trained(run):
    """The layers whose weights had a gradient at each optimizer step."""
    return [
        [index for index in range(5) if grads[f"layers.{index}.up.weight"] is not None]
        for grads in run.grads
    ]


def reference(
    module, data, *, layers, norms, choose, interval, epochs, accumulate, warmup=0, forgets=True
):
    """Dynamic layer selection as a plain loop: every gradient, then a step on the chosen."""
    trained = {n: p for n, p in module.named_parameters() if p.requires_grad}
    norms = [[module.get_parameter(f"{layer}.{norm}") for norm in norms] for layer in layers]
    optimizer = module.configure_optimizers()
    probes = [norm for layer in norms for norm in layer]
    required = [norm.requires_grad for norm in probes]
    active, history = tuple(range(len(layers))), []
    windows = [data[i : i + accumulate] for i in range(0, len(data), accumulate)]
    for step, window in enumerate(windows * epochs):
        previous, wanted = active, [*trained.values(), *probes]
        for norm in probes:
            norm.requires_grad_(True)
        total = None
        for batch in window:
            grads = torch.autograd.grad(module.loss(batch) / accumulate, wanted)
            total = grads if total is None else [a + b for a, b in zip(total, grads, strict=True)]
        for norm, flag in zip(probes, required, strict=True):
            norm.requires_grad_(flag)
        gradient = dict(zip(wanted, total, strict=True))
        if step >= warmup and (step - warmup) % interval == 0:
            scores = [
                math.sqrt(sum(gradient[n].square().sum().item() for n in layer)) for layer in norms
            ]
            active = choose(scores)
        for name, parameter in trained.items():
            layer = next((i for i, path in enumerate(layers) if name.startswith(f"{path}.")), None)
            if forgets and layer in set(active) - set(previous):
                # As before its first step.
                optimizer.state.pop(parameter, None)
            parameter.grad = gradient[parameter] if layer is None or layer in active else None
        optimizer.step()
        history.append((active, {n: p.detach().clone() for n, p in module.named_parameters()}))
    return history


def highest(count):
    def choose(scores):
        return tuple(sorted(sorted(range(len(scores)), key=lambda i: -scores[i])[:count]))

    return choose


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


TOY = ([f"layers.{i}" for i in range(5)], ["norm.weight"])


LLAMA = (
    [f"model.model.layers.{i}" for i in range(4)],
    ["input_layernorm.weight", "post_attention_layernorm.weight"],
)


def count_backwards(modules):
    """How often the backward enters each module from above, counted as training goes on."""
    counts = [0] * len(modules)

    def counter(index):
        def count(gradient):
            counts[index] += 1

        def watch(module, inputs, output):
            if output.requires_grad:
                output.register_hook(count)

        return watch

    for index, module in enumerate(modules):
        module.register_forward_hook(counter(index))
    return counts


class Checkpointed(Toy):
    def loss(self, batch):
        x = batch
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False)
        return (self.head(x) - batch[:, :2].sin() * 2).square().mean()


class Saves(Callback):
    """A checkpoint after every optimizer step, from where ModelCheckpoint would write it."""

    def __init__(self, folder):
        self.folder, self.step = folder, 0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step > self.step:
            self.step = trainer.global_step
            trainer.save_checkpoint(self.folder / f"{self.step}.ckpt")


def sampler(**changes):
    options = {"num_active": 2, "interval": 3, "policy": "sample", "seed": 5} | changes
    return select(**options)


def flags(module):
    return {name: parameter.requires_grad for name, parameter in module.named_parameters()}
