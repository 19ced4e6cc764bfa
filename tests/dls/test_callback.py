import math
from contextlib import nullcontext

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

from rosa_lightning.dls.callback import DynamicLayerSelection

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
        parameters = [p for p in self.parameters() if p.requires_grad]
        if self.optimizer is torch.optim.AdamW:
            return torch.optim.AdamW(parameters, lr=self.lr, weight_decay=0.5)
        return self.optimizer(parameters, lr=self.lr)


class LowRank(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base = base
        self.down = nn.Parameter(torch.randn(2, base.in_features) * 0.3)
        self.up = nn.Parameter(torch.randn(base.out_features, 2) * 0.3)

    def forward(self, x):
        return self.base(x) + x @ self.down.T @ self.up.T


class TinyLlama(Toy):
    """A frozen Llama with low-rank terms on its queries and keys."""

    def __init__(self, num_layers=4):
        super().__init__(1)
        del self.layers, self.head
        config = LlamaConfig(
            vocab_size=17,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=num_layers,
            num_attention_heads=2,
            num_key_value_heads=2,
        )
        self.model = LlamaForCausalLM(config).requires_grad_(False)
        for layer in self.model.model.layers:
            layer.self_attn.q_proj = LowRank(layer.self_attn.q_proj)
            layer.self_attn.k_proj = LowRank(layer.self_attn.k_proj)

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


class Endless(Batches):
    """Does not know its length."""

    __len__ = None


def batches(count, rows=4):
    source = torch.Generator().manual_seed(2)
    return [torch.randn(rows, WIDTH, generator=source) for _ in range(count)]


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
    loader = data if isinstance(data, Batches) else Batches(data)
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


def windows_of(data, epochs, accumulate):
    for _ in range(epochs):
        for start in range(0, len(data), accumulate):
            yield data[start : start + accumulate]


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
    for step, window in enumerate(windows_of(data, epochs, accumulate)):
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


# --- the same as a plain loop -------------------------------------------------------------------


TOY = ([f"layers.{i}" for i in range(5)], ["norm.weight"])
LLAMA = (
    [f"model.model.layers.{i}" for i in range(4)],
    ["input_layernorm.weight", "post_attention_layernorm.weight"],
)


@pytest.mark.parametrize(
    ("build", "parts"),
    [
        (Toy, TOY),
        (lambda: Toy(train_norms=True), TOY),
        (TinyLlama, LLAMA),
    ],
    ids=["adapters", "full", "llama"],
)
@pytest.mark.parametrize(("accumulate", "warmup"), [(1, 0), (2, 3)])
@pytest.mark.parametrize("moments", ["keep", "reset", "free"])
def test_training_equals_a_plain_loop_over_the_selected_layers(
    build, parts, accumulate, warmup, moments
):
    data = batches(7)
    dls = DynamicLayerSelection(num_active=2, interval=2, warmup_steps=warmup, moments=moments)
    run = record(build(), dls, data, max_epochs=3, accumulate_grad_batches=accumulate)
    history = reference(
        build(),
        data,
        layers=parts[0],
        norms=parts[1],
        choose=highest(2),
        interval=2,
        epochs=3,
        accumulate=accumulate,
        warmup=warmup,
        forgets=moments != "keep",
    )
    # The recorder's first snapshot is from before the first step.
    assert len(run.parameters) == len(history) + 1
    assert len({active for active, _ in history}) >= 2
    assert dls.num_selections >= 3
    for step, (active, parameters) in enumerate(history, start=1):
        assert run.active[step] == active
        assert_same(run.parameters[step], parameters)


def test_all_layers_active_equals_training_without_the_callback():
    data = batches(6)
    free, dls = Toy(), DynamicLayerSelection(policy="all", interval=2)
    fit(free, data)
    held = Toy()
    record(held, dls, data)
    assert_same(free.state_dict(), held.state_dict())
    assert dls.num_selections == 3


def test_the_choice_of_fixed_layers_holds_for_the_whole_run():
    dls = DynamicLayerSelection(policy="fixed", fixed_layers=[1, -1], interval=2)
    run = record(Toy(), dls, batches(5))
    assert set(run.active[1:]) == {(1, 4)}
    assert dls.selection_counts == (0, 3, 0, 0, 3)


@pytest.mark.parametrize("policy", ["sample", "random"])
def test_drawn_layers_depend_on_the_seed_and_not_on_the_global_generator(policy):
    histories = []
    for seed, noise in [(0, 5), (0, 6), (1, 5)]:
        module = Toy()
        torch.manual_seed(noise)
        before = torch.get_rng_state()
        dls = DynamicLayerSelection(num_active=2, interval=1, policy=policy, seed=seed)
        histories.append(record(module, dls, batches(8)).active)
        assert torch.equal(torch.get_rng_state(), before)
    assert histories[0] == histories[1] != histories[2]


# --- freezing -----------------------------------------------------------------------------------


def test_frozen_layers_have_no_gradient_and_stay_bit_identical_under_weight_decay():
    run = record(Toy(), DynamicLayerSelection(num_active=2, interval=2), batches(8))
    for step, grads in enumerate(run.grads):
        before, after, active = run.parameters[step], run.parameters[step + 1], run.active[step + 1]
        for name, grad in grads.items():
            if name.startswith("layers."):
                trains = int(name.split(".")[1]) in active and "norm" not in name
                assert (grad is not None) == trains
                assert torch.equal(before[name], after[name]) != trains


def test_zero_gradients_instead_of_none_would_have_moved_them():
    weight = nn.Parameter(torch.ones(3))
    weight.grad = torch.zeros(3)
    torch.optim.AdamW([weight], lr=0.1, weight_decay=0.5).step()
    assert weight.max() < 1


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


def test_backward_stops_below_the_lowest_active_layer():
    module = Toy()
    counts = count_backwards(module.layers)
    dls = DynamicLayerSelection(policy="fixed", fixed_layers=[3], interval=4)
    record(module, dls, batches(8))
    assert counts == [2, 2, 2, 8, 8]


class Checkpointed(Toy):
    def loss(self, batch):
        x = batch
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False)
        return (self.head(x) - batch[:, :2].sin() * 2).square().mean()


def test_backward_stops_under_activation_checkpointing_too():
    module, options = Checkpointed(), {"policy": "fixed", "fixed_layers": [3, 4], "interval": 4}
    counts = count_backwards([layer.down for layer in module.layers])
    run = record(module, DynamicLayerSelection(**options), batches(8))
    assert counts == [2, 2, 2, 8, 8]
    plain = record(Toy(), DynamicLayerSelection(**options), batches(8))
    assert_same(run.parameters[-1], plain.parameters[-1])


# The compiler looks at the gradient of every input.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_layers_are_frozen_and_thawed_alike():
    plain, compiled = Toy(3), Toy(3)
    for layer in compiled.layers:
        layer.compile(backend="eager")
    record(plain, DynamicLayerSelection(num_active=1, interval=2), batches(6))
    record(compiled, DynamicLayerSelection(num_active=1, interval=2), batches(6))
    assert_same(plain.state_dict(), compiled.state_dict())


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_selection_follows_the_precision(precision):
    """Against the plain loop, under autocast or with everything in bfloat16."""
    kind = torch.bfloat16 if precision == "bf16-true" else torch.float32

    class Cast(Toy):
        def loss(self, batch):
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
                return super().loss(batch)

    data = batches(6)
    run = record(Toy(), DynamicLayerSelection(num_active=2, interval=2), data, precision=precision)
    history = reference(
        Cast().to(kind),
        [batch.to(kind) for batch in data],
        layers=TOY[0],
        norms=TOY[1],
        choose=highest(2),
        interval=2,
        epochs=1,
        accumulate=1,
    )
    for step, (active, parameters) in enumerate(history, start=1):
        assert run.active[step] == active
        assert_same(run.parameters[step], parameters)


class Grouped(Toy):
    """A group for the head and two for the layers, each with its own rate and decay."""

    def configure_optimizers(self):
        first, rest = self.layers[:2], self.layers[2:]
        groups = [
            {
                "params": [p for p in part.parameters() if p.requires_grad],
                "lr": lr,
                "weight_decay": w,
            }
            for part, lr, w in ((self.head, 0.01, 0.0), (rest, 0.05, 0.3), (first, 0.02, 0.6))
        ]
        return torch.optim.AdamW(groups)


def test_several_parameter_groups_keep_their_settings():
    data = batches(6)
    run = record(Grouped(), DynamicLayerSelection(num_active=2, interval=2), data)
    history = reference(
        Grouped(),
        data,
        layers=TOY[0],
        norms=TOY[1],
        choose=highest(2),
        interval=2,
        epochs=1,
        accumulate=1,
    )
    for step, (active, parameters) in enumerate(history, start=1):
        assert run.active[step] == active
        assert_same(run.parameters[step], parameters)


# The compiler looks at the gradient of every input.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_module_compiled_as_a_whole_trains_alike():
    plain, compiled = Toy(3), Toy(3)
    record(plain, DynamicLayerSelection(num_active=1, interval=2), batches(6))
    dls = DynamicLayerSelection(num_active=1, interval=2)
    fit(torch.compile(compiled, backend="eager"), batches(6), dls)
    assert dls.num_selections == 3
    assert_same(plain.state_dict(), compiled.state_dict())


# --- moments ------------------------------------------------------------------------------------


class HeldBytes(Callback):
    """Memory of the optimizer's state for each layer, after every step."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        state = trainer.optimizers[0].state
        self.seen.append(
            [
                sum(
                    value.untyped_storage().nbytes()
                    for parameter in layer.parameters()
                    if parameter in state
                    for value in state[parameter].values()
                )
                for layer in pl_module.layers
            ]
        )


def test_freed_moments_take_memory_only_for_the_layers_that_train():
    held = {}
    for moments in ("free", "reset"):
        dls = DynamicLayerSelection(num_active=2, interval=2, policy="random", moments=moments)
        watch = HeldBytes()
        run = record(Toy(), dls, batches(8), extra=[watch])
        held[moments] = watch.seen
        active = run.active[1:]
    assert len(set(active)) > 2
    # Two moments and a step count of float32 for each of two weights and two biases.
    one_layer = 4 * (2 * 2 * (WIDTH * WIDTH + WIDTH) + 4)
    for layers, sizes in zip(active, held["free"], strict=True):
        assert sizes == [one_layer if index in layers else 0 for index in range(5)]
    # What is kept grows to whatever ever trained.
    assert sum(held["reset"][-1]) == one_layer * len(set().union(*active))


class Eager(Toy):
    def configure_optimizers(self):
        return torch.optim.Adagrad([p for p in self.parameters() if p.requires_grad], lr=0.1)


@pytest.mark.parametrize("moments", ["reset", "free"])
def test_an_optimizer_whose_state_cannot_be_forgotten_is_refused_at_start(moments):
    with pytest.raises(ValueError, match=r"Adagrad.*Set moments='keep'") as error:
        fit(Eager(), batches(2), DynamicLayerSelection(moments=moments))
    assert "\n" not in str(error.value)
    fit(Eager(), batches(2), DynamicLayerSelection(moments="keep"))


# --- a budget -----------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["top_k", "sample", "threshold", "random", "all"])
def test_the_backward_enters_as_many_layers_as_the_budget_allows(policy):
    module = Toy()
    counts = count_backwards([layer.down for layer in module.layers])
    dls = DynamicLayerSelection(num_active=2, interval=5, policy=policy, backward_budget=0.6)
    run = record(module, dls, batches(10), max_epochs=4)
    assert sum(counts) / (5 * 40) == pytest.approx(dls.backward_share)
    assert 0.5 < dls.backward_share <= 0.6 + 1e-9
    assert len({min(active) for active in run.active}) >= 2
    # Policies that draw reach every layer sooner or later, the others soon.
    assert all(dls.selection_counts) or policy in ("sample", "random")


def test_warm_up_and_final_steps_are_paid_for_within_the_budget():
    dls = DynamicLayerSelection(
        num_active=2, interval=5, backward_budget=0.6, warmup_steps=4, final_steps_all=3
    )
    run = record(Toy(), dls, batches(10), max_epochs=4)
    assert dls.backward_share <= 0.6 + 1e-9
    full = [len(layers) == 5 for layers in trained(run)]
    assert full == [True] * 4 + [False] * 33 + [True] * 3


class StepCosts(Callback):
    """The share of the layers that the backward of each optimizer step has entered."""

    def __init__(self, counts):
        self.counts, self.seen, self.micro_batches, self.step = counts, [], 0, 0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.micro_batches += 1
        if trainer.global_step > self.step:
            self.step = trainer.global_step
            self.seen.append(sum(self.counts) / (self.micro_batches * len(self.counts)))
            self.counts[:], self.micro_batches = [0] * len(self.counts), 0


@pytest.mark.parametrize("max_steps", [-1, 28])
def test_a_budget_holds_where_the_accumulation_changes_between_epochs(max_steps):
    module = Toy()
    costs = StepCosts(count_backwards([layer.down for layer in module.layers]))
    dls = DynamicLayerSelection(
        num_active=2, interval=5, backward_budget=0.6, warmup_steps=2, final_steps_all=3
    )
    scheduler = GradientAccumulationScheduler({0: 1, 1: 2, 2: 3})
    options = {"max_epochs": 6, "max_steps": max_steps}
    run = record(module, dls, batches(10), [scheduler, costs], **options)
    # 10 steps, 5, and 4 in each epoch after that; the last of these has one batch.
    steps = 31 if max_steps == -1 else min(31, max_steps)
    assert len(costs.seen) == steps
    full = [len(layers) == 5 for layers in trained(run)]
    assert full == [True] * 2 + [False] * (steps - 5) + [True] * 3
    assert sum(costs.seen) / steps == pytest.approx(dls.backward_share)
    assert 0.5 < dls.backward_share <= 0.6 + 1e-9


def test_a_budget_holds_where_nobody_knows_the_length():
    module = Toy()
    costs = StepCosts(count_backwards([layer.down for layer in module.layers]))
    dls = DynamicLayerSelection(num_active=2, interval=5, backward_budget=0.6)
    run = record(module, dls, Endless(batches(10)), [costs], max_epochs=4)
    assert len({min(active) for active in run.active}) >= 2
    assert sum(costs.seen) / 40 == pytest.approx(dls.backward_share)
    assert dls.backward_share <= 0.6 + 1e-9


def test_selections_that_fail_are_paid_for():
    module = Overflows({5, 10, 20})
    counts = count_backwards([layer.down for layer in module.layers])
    dls = DynamicLayerSelection(num_active=2, interval=5, policy="all", backward_budget=0.6)
    with pytest.warns(UserWarning, match="not finite"):
        record(module, dls, batches(10), max_epochs=6, plugins=[ScaledLoss(4.0)])
    assert dls.num_selections == 9
    assert sum(counts) / (5 * 60) == pytest.approx(dls.backward_share)
    assert dls.backward_share <= 0.6 + 1e-9


def test_a_budget_that_leaves_nothing_is_refused_before_training():
    for options, message in (
        ({"interval": 1}, "leaves nothing"),
        ({"always_active": [0]}, "leaves nothing"),
        ({"warmup_steps": 30}, "cannot be kept in a run of 40 optimizer steps.*at least 83"),
    ):
        dls = DynamicLayerSelection(**({"interval": 5, "backward_budget": 0.6} | options))
        with pytest.raises(ValueError, match=rf"backward_budget=0\.6 {message}"):
            record(Toy(), dls, batches(40))
    dls = DynamicLayerSelection(backward_budget=0.6)
    with pytest.raises(ValueError, match=r"in a run of 1 optimizer steps.*fast_dev_run"):
        record(Toy(), dls, batches(40), fast_dev_run=True)


# --- time ---------------------------------------------------------------------------------------


class Times(Callback):
    def __init__(self, dls):
        self.dls, self.batches, self.steps = dls, [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if self.dls.num_selections > len(self.batches):
            self.batches.append(batch_idx + 1)
            self.steps.append(trainer.global_step - 1)


def times(dls, data, extra=(), **options):
    watch = Times(dls)
    fit(Toy(), data, dls, watch, *extra, **options)
    return watch


def test_a_window_of_micro_batches_is_selected_once_at_its_end():
    dls = DynamicLayerSelection(num_active=2, interval=1)
    assert times(dls, batches(8), accumulate_grad_batches=3).batches == [3, 6, 8]


def test_the_accumulation_may_change_between_epochs():
    dls = DynamicLayerSelection(num_active=2, interval=1)
    scheduler = GradientAccumulationScheduler({0: 1, 1: 3})
    assert times(dls, batches(4), [scheduler], max_epochs=2).batches == [1, 2, 3, 4, 3, 4]


def test_selections_count_optimizer_steps_across_epochs():
    dls = DynamicLayerSelection(num_active=2, interval=4, warmup_steps=2)
    watch = times(dls, batches(5), max_epochs=6, accumulate_grad_batches=2)
    assert watch.steps == [2, 6, 10, 14]


def test_a_limited_and_an_overfitted_run_select_too():
    dls = DynamicLayerSelection(num_active=2, interval=2)
    assert times(dls, batches(8), limit_train_batches=3, max_epochs=2).steps == [0, 2, 4]


@pytest.mark.filterwarnings("ignore:You requested to overfit")
def test_a_run_that_overfits_selects_by_its_few_batches():
    dls = DynamicLayerSelection(num_active=2, interval=2)
    assert times(dls, batches(8), overfit_batches=3, max_epochs=2).steps == [0, 2, 4]


def test_all_layers_train_during_the_warm_up():
    dls = DynamicLayerSelection(num_active=1, interval=3, warmup_steps=2)
    run = record(Toy(), dls, batches(4))
    assert [len(active) for active in run.active[1:]] == [5, 5, 1, 1]
    assert run.scores[2] is None
    assert len(run.scores[3]) == 5


def test_all_layers_train_in_the_final_steps():
    dls = DynamicLayerSelection(num_active=1, interval=3, final_steps_all=2)
    run = record(Toy(), dls, batches(4), max_epochs=2)
    assert [len(layers) for layers in trained(run)] == [1] * 6 + [5] * 2
    assert dls.num_selections == 2


def test_final_steps_count_windows_of_micro_batches():
    dls = DynamicLayerSelection(num_active=1, interval=3, final_steps_all=1)
    run = record(Toy(), dls, batches(7), max_epochs=2, accumulate_grad_batches=3)
    assert [len(layers) for layers in trained(run)] == [1] * 5 + [5]


@pytest.mark.parametrize("max_epochs", [-1, 2])
def test_final_steps_of_a_run_without_an_end_are_refused(max_epochs):
    dls = DynamicLayerSelection(final_steps_all=2)
    with pytest.raises(ValueError, match=r"final_steps_all=2.*trainer\.max_steps"):
        fit(Toy(), Endless(batches(4)), dls, max_epochs=max_epochs)


class SkipsLoss(Toy):
    def __init__(self, skipped):
        super().__init__()
        self.skipped = skipped

    def training_step(self, batch, batch_idx):
        return None if batch_idx in self.skipped else super().training_step(batch, batch_idx)


@pytest.mark.filterwarnings("ignore:.*`training_step` returned `None`")
def test_a_last_micro_batch_without_loss_still_ends_in_a_selection():
    dls = DynamicLayerSelection(num_active=2, interval=10)
    run = record(SkipsLoss({1}), dls, batches(4), accumulate_grad_batches=2)
    assert [len(active) for active in run.active[1:]] == [2, 2]
    assert sum(grad is not None for name, grad in run.grads[0].items() if "up.weight" in name) == 2


@pytest.mark.filterwarnings("ignore:.*`training_step` returned `None`")
def test_a_step_without_any_gradient_keeps_the_layers_and_the_next_one_selects():
    dls = DynamicLayerSelection(num_active=2, interval=10)
    with pytest.warns(UserWarning, match="no norm weight got a gradient"):
        run = record(SkipsLoss({0}), dls, batches(3))
    assert [len(active) for active in run.active] == [5, 5, 2, 2]


# --- scores -------------------------------------------------------------------------------------


@pytest.mark.parametrize("train_norms", [False, True])
def test_scores_hold_nothing_of_earlier_windows(train_norms):
    dls = DynamicLayerSelection(num_active=2, interval=2)
    module = Toy(lr=0.0, train_norms=train_norms, optimizer=torch.optim.SGD)
    run = record(module, dls, batches(1) * 8, accumulate_grad_batches=2)
    assert dls.num_selections == 2
    assert run.scores[1] == run.scores[3]


class CutsEpochShort(Toy):
    def on_train_batch_start(self, batch, batch_idx):
        return -1 if (self.current_epoch, batch_idx) == (0, 1) else None


def test_scores_hold_nothing_of_a_window_that_was_never_finished():
    first, second = batches(2)
    dls = DynamicLayerSelection(num_active=2)
    module = CutsEpochShort(lr=0.0, optimizer=torch.optim.SGD)
    fit(module, [first, second], dls, max_epochs=2, accumulate_grad_batches=2)
    whole = DynamicLayerSelection(num_active=2)
    fit(Toy(lr=0.0, optimizer=torch.optim.SGD), [first, second], whole, accumulate_grad_batches=2)
    assert dls.num_selections == whole.num_selections == 1
    assert dls.scores == whole.scores


class ScaledLoss(MixedPrecision):
    """A loss scaler without half precision, so that nothing but the scale differs."""

    def __init__(self, scale):
        super().__init__("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale))

    def forward_context(self):
        return nullcontext()


def test_scores_do_not_depend_on_the_loss_scale():
    seen = []
    for plugins in [[], [ScaledLoss(2.0)], [ScaledLoss(2.0**16)]]:
        dls = DynamicLayerSelection(num_active=2, interval=2)
        run = record(Toy(), dls, batches(6), plugins=plugins)
        seen.append((run.scores, run.active))
    # Powers of two: scaling loses no bit.
    assert seen[0] == seen[1] == seen[2]


def test_scores_are_taken_before_clipping_and_clipping_sees_only_what_trains():
    free = record(Toy(), DynamicLayerSelection(num_active=2), batches(1))
    clipped = record(Toy(), DynamicLayerSelection(num_active=2), batches(1), gradient_clip_val=0.01)
    assert clipped.scores == free.scores
    # Recorded before clipping, the gradients are clipped in place.
    total = torch.stack([g.norm() for g in clipped.grads[0].values() if g is not None]).norm()
    assert total.item() == pytest.approx(0.01, rel=1e-3)


class Overflows(Toy):
    def __init__(self, steps):
        super().__init__(optimizer=torch.optim.SGD)
        self.steps = steps

    def loss(self, batch):
        return super().loss(batch) * (math.inf if self.global_step in self.steps else 1.0)


def test_scores_that_are_not_finite_keep_the_previous_layers():
    dls = DynamicLayerSelection(num_active=2, interval=2, policy="random")
    with pytest.warns(UserWarning, match="scores at step 2 are not finite") as warned:
        run = record(Overflows({2, 4}), dls, batches(6))
    assert sum("finite" in str(warning.message) for warning in warned) == 1
    assert len(set(run.active[1:])) == 1
    assert run.scores[1] == run.scores[6]
    assert dls.num_selections == 1
    frozen = set(range(5)) - set(run.active[3])
    assert all(run.grads[2][f"layers.{index}.up.weight"] is None for index in frozen)
    assert all(run.grads[2][f"layers.{index}.norm.weight"] is None for index in range(5))


def test_without_a_finite_score_all_layers_train_and_the_next_step_scores():
    dls = DynamicLayerSelection(num_active=2, interval=100)
    with pytest.warns(UserWarning, match="not finite"):
        run = record(Overflows({0, 1}), dls, batches(4), plugins=[ScaledLoss(4.0)])
    assert [len(active) for active in run.active] == [5, 5, 5, 2, 2]
    # The scaler has skipped the steps that overflowed.
    assert_same(run.parameters[0], run.parameters[2])


# --- left as found ------------------------------------------------------------------------------


class Fails(Toy):
    def training_step(self, batch, batch_idx):
        if batch_idx == 5:
            assert all(p.requires_grad for p in self.layers.parameters() if p.ndim == 2)
            raise RuntimeError("in the middle")
        return super().training_step(batch, batch_idx)


def flags(module):
    return {name: parameter.requires_grad for name, parameter in module.named_parameters()}


@pytest.mark.parametrize("build", [Toy, lambda: Toy(train_norms=True), TinyLlama])
def test_after_fit_everything_requires_gradients_as_before(build):
    module = build()
    before = flags(module)
    record(module, DynamicLayerSelection(num_active=1, interval=3), batches(5))
    assert flags(module) == before


def test_an_exception_in_a_scoring_step_leaves_the_model_as_found():
    module = Fails()
    before = flags(module)
    dls = DynamicLayerSelection(num_active=1, interval=2)
    with pytest.raises(RuntimeError, match="in the middle"):
        record(module, dls, batches(8), accumulate_grad_batches=2)
    assert flags(module) == before
    assert all(block.norm.weight.grad is None for block in module.layers)
    assert len(dls.active) == 1


def test_a_second_fit_starts_afresh():
    dls = DynamicLayerSelection(num_active=2, interval=4, policy="sample")
    one = record(Toy(), dls, batches(5))
    two = record(Toy(), dls, batches(5))
    assert one.active[1:] == two.active[1:]
    assert_same(one.parameters[-1], two.parameters[-1])


def test_a_second_fit_of_one_trainer_selects_at_its_first_step():
    module, dls = Toy(), DynamicLayerSelection(num_active=2, interval=4)
    loader = Batches(batches(5))
    trainer = record(module, dls, loader).trainer
    trainer.fit_loop.max_epochs = 2
    before = dls.selection_counts
    trainer.fit(module, loader)
    assert trainer.global_step == 10
    # Steps 5 (the first of this fit) and 8.
    assert (sum(before), dls.num_selections) == (4, 2)


def test_a_second_fit_has_a_budget_of_its_own():
    module = Toy()
    counts = count_backwards([layer.down for layer in module.layers])
    dls = DynamicLayerSelection(num_active=2, interval=5, backward_budget=0.6, warmup_steps=2)
    loader = Batches(batches(20))
    trainer = record(module, dls, loader).trainer
    first = sum(counts)
    assert first / (5 * 20) == pytest.approx(dls.backward_share)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, loader)
    assert (sum(counts) - first) / (5 * 20) == pytest.approx(dls.backward_share)
    # It selects at once and then at the steps at which it would have, so once more than planned.
    assert 0.4 < dls.backward_share <= 0.6 + 1 / 20


# --- resume -------------------------------------------------------------------------------------


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
    return DynamicLayerSelection(**options)


REMEMBERING = {
    "policy": "top_k",
    "backward_budget": 0.8,
    "score_smoothing": 0.5,
    "score_normalization": "running_mean",
    "warmup_steps": 1,
    "final_steps_all": 2,
}


@pytest.mark.parametrize("changes", [{}, REMEMBERING, {"moments": "free"}, {"moments": "keep"}])
@pytest.mark.parametrize("train_norms", [False, True])
@pytest.mark.parametrize(
    "step", [2, 5, *(pytest.param(n, marks=pytest.mark.slow) for n in (4, 6, 7, 11))]
)
def test_a_resumed_run_ends_like_one_that_never_stopped(tmp_path, step, train_norms, changes):
    options = {"accumulate_grad_batches": 2, "max_epochs": 3}
    data = batches(7)
    straight, dls = Toy(train_norms=train_norms), sampler(**changes)
    recorder = Recorder(dls)
    fit(straight, data, dls, recorder, Saves(tmp_path), **options)

    module, resumed_dls = Toy(train_norms=train_norms), sampler(seed=77, **changes)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(1.0)
    again = Recorder(resumed_dls)
    path = tmp_path / f"{step}.ckpt"
    fit(module, data, resumed_dls, again, ckpt_path=path, **options)

    assert [id(batch) for batch in again.seen] == [id(b) for b in recorder.seen[-len(again.seen) :]]
    # The resumed run's first snapshot is the state that it was given.
    assert again.active == recorder.active[step:]
    assert again.scores == recorder.scores[step:]
    for one, other in zip(again.parameters, recorder.parameters[step:], strict=True):
        assert_same(one, other)
    assert resumed_dls.selection_counts == dls.selection_counts
    assert resumed_dls.backward_share == dls.backward_share


def test_a_run_resumed_inside_a_scoring_window_selects_at_its_end(tmp_path):
    class SavesInside(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 2:
                trainer.save_checkpoint(tmp_path / "inside.ckpt")

    data, options = batches(4), {"accumulate_grad_batches": 2}
    fit(Toy(), data, sampler(interval=1), SavesInside(), **options)
    dls, module = sampler(interval=1), Toy()
    recorder = Recorder(dls)
    fit(module, data, dls, recorder, ckpt_path=tmp_path / "inside.ckpt", **options)
    assert len(recorder.seen) == 1
    assert dls.num_selections == 2
    trained = [
        index for index in range(5) if recorder.grads[0][f"layers.{index}.up.weight"] is not None
    ]
    assert tuple(trained) == dls.active
    assert flags(module) == flags(Toy())


def test_a_fit_after_a_resumed_one_starts_afresh(tmp_path):
    fit(Toy(), batches(4), sampler(), Saves(tmp_path))
    dls = sampler()
    fit(Toy(), batches(4), dls, ckpt_path=tmp_path / "2.ckpt")
    again, fresh = record(Toy(), dls, batches(4)), record(Toy(), sampler(), batches(4))
    assert again.active[1:] == fresh.active[1:]
    assert again.scores == fresh.scores


def test_moments_stay_with_their_layer_when_another_is_active(tmp_path):
    module, dls = Toy(), sampler(num_active=1, interval=1)
    fit(module, batches(4), dls, Saves(tmp_path))
    before = moments(module)

    again = Toy(lr=0.0)
    other = sampler(num_active=1, interval=1, policy="fixed", fixed_layers=[dls.active[0] - 1])
    watch = Moments()
    fit(again, batches(4), other, watch, ckpt_path=tmp_path / "4.ckpt", max_epochs=2)
    assert_same(watch.at_start, before)


class Moments(Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if not hasattr(self, "at_start"):
            self.at_start = moments(pl_module)


def moments(module):
    optimizer = module.optimizers(use_pl_optimizer=False)
    return {
        name: optimizer.state[parameter]["exp_avg"].clone()
        for name, parameter in module.named_parameters()
        if parameter in optimizer.state
    }


def test_the_state_is_plain_and_survives_a_weights_only_file(tmp_path):
    dls = sampler()
    assert dls.state_dict() == {}
    record(Toy(), dls, batches(5))
    state = dls.state_dict()
    torch.save(state, tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    other = sampler()
    other.load_state_dict(loaded)
    assert other.active == ()
    again = other.state_dict()
    assert torch.equal(again.pop("generator"), state.pop("generator"))
    assert again == state
    assert state["layers"] == [f"layers.{index}" for index in range(5)]
    assert state["num_selections"] == 2
    assert sum(state["selection_counts"]) == 4


def test_a_checkpoint_of_other_layers_is_refused_by_name(tmp_path):
    saved = sampler()
    record(Toy(5), saved, batches(2))
    record(Toy(4), sampler(), batches(2)).trainer.save_checkpoint(tmp_path / "c.ckpt")
    checkpoint = torch.load(tmp_path / "c.ckpt", weights_only=True)
    checkpoint["callbacks"]["DynamicLayerSelection"] = saved.state_dict()
    torch.save(checkpoint, tmp_path / "c.ckpt")
    with pytest.raises(ValueError, match=r"5 layers, layers.0 to layers.4; this model has 4"):
        fit(Toy(4), batches(2), sampler(), ckpt_path=tmp_path / "c.ckpt", max_epochs=2)


# --- wrong set-ups ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_active": 0}, "num_active=0"),
        ({"num_active": 1.5}, r"num_active=1\.5"),
        ({"num_active": -2}, "num_active=-2"),
        ({"interval": 0}, "interval=0"),
        ({"policy": "topk"}, "policy='topk' is unknown.*top_k, sample"),
        ({"temperature": 0.0}, r"temperature=0\.0"),
        ({"temperature": math.nan}, "temperature=nan"),
        ({"warmup_steps": -1}, "warmup_steps=-1"),
        ({"final_steps_all": -1}, "final_steps_all=-1"),
        ({"score_share": 0.0}, r"score_share=0\.0 is outside \(0, 1\]"),
        ({"score_smoothing": 1.0}, r"score_smoothing=1\.0 is outside \[0, 1\)"),
        ({"score_normalization": "mean"}, "score_normalization='mean' is unknown.*running_mean"),
        ({"backward_budget": 0.0}, r"backward_budget=0\.0 is outside \(0, 1\]"),
        ({"backward_budget": 1.5}, r"backward_budget=1\.5 is outside"),
        ({"moments": "forget"}, "moments='forget' is unknown.*keep, reset, free"),
        (
            {"policy": "fixed", "fixed_layers": [1], "backward_budget": 0.5},
            "backward_budget=0.5 has nothing to share",
        ),
        ({"interval": 2.5}, r"interval=2\.5 is a float. Set a whole number"),
        ({"interval": True}, "interval=True is a bool"),
        ({"interval": "a"}, "interval='a' is a str"),
        ({"warmup_steps": 0.5}, r"warmup_steps=0\.5 is a float"),
        ({"final_steps_all": 1.5}, r"final_steps_all=1\.5 is a float"),
        ({"seed": "x"}, "seed='x' is a str"),
        ({"temperature": "x"}, "temperature='x' is a str. Set a number"),
        ({"backward_budget": None}, "backward_budget=None is a NoneType"),
        ({"always_active": 3}, "always_active=3 is a int. Set a list of layers"),
        ({"always_active": ["a"]}, "always_active='a' is a str. Set whole numbers"),
        ({"policy": "fixed", "fixed_layers": [True]}, "fixed_layers=True is a bool"),
        ({"layers": 3}, "layers=3 is a int"),
        ({"norms": ["*ln"]}, r"norms=\['\*ln'\] is a list"),
        ({"policy": "fixed"}, "needs fixed_layers"),
        ({"fixed_layers": [1]}, "needs fixed_layers"),
    ],
)
def test_impossible_arguments_are_refused_at_construction(options, message):
    with pytest.raises(ValueError, match=message) as error:
        DynamicLayerSelection(**options)
    assert "\n" not in str(error.value)


class Manual(Toy):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False


class PartOptimizer(Toy):
    def configure_optimizers(self):
        return torch.optim.SGD([*self.layers[0].parameters(), *self.head.parameters()], lr=0.1)


def test_a_state_that_a_validation_loaded_does_not_reach_a_fresh_fit(tmp_path):
    module, dls = Toy(), DynamicLayerSelection(num_active=2, interval=1)
    record(module, dls, batches(3))
    state = dls.state_dict()
    again = DynamicLayerSelection(num_active=2, interval=1)
    again.load_state_dict(state)
    record(Toy(), again, batches(2))
    assert again.num_selections == 2


def test_layers_in_which_nothing_trains_are_passed_over():
    """As in a model with layers without rotation, which carry no adapter."""
    module = Toy()
    module.layers[1].requires_grad_(False)
    dls = DynamicLayerSelection(num_active=2, interval=1, policy="fixed", fixed_layers=[0, -1])
    record(module, dls, batches(2))
    assert dls.num_layers == 4
    assert dls.active == (0, 4)
    assert not any(p.requires_grad for p in module.layers[1].parameters())


class NoOptimizer(Toy):
    def configure_optimizers(self):
        return None


def quasi_newton():
    return Toy(optimizer=torch.optim.LBFGS)


@pytest.mark.filterwarnings("ignore:.*`LightningModule.configure_optimizers` returned `None`")
@pytest.mark.parametrize(
    ("build", "options", "message"),
    [
        (Toy, {"num_active": 6}, "num_active=6 is above the model's 5 layers"),
        (Toy, {"layers": "layer"}, "layers='layer' matches nothing.*Nearest: layers"),
        (Toy, {"trainable": "*lora*"}, r"nothing to train in 'layers'.*\*lora\*"),
        (Toy, {"norms": "*ln*"}, "'layers.0' has no norm weight.*inside it: norm"),
        (Toy, {"always_active": [5]}, r"always_active=\[5\].*cannot be selected"),
        (Toy, {"num_active": 1, "always_active": [0, 1]}, "Raise num_active"),
        (Manual, {}, "optimizes manually.*automatic_optimization=True"),
        (PartOptimizer, {}, r"lacks layers\.1\.up\.weight.* and 13 more.*Build it over all"),
        (NoOptimizer, {}, "optimizer lacks"),
        (quasi_newton, {}, "LBFGS.*AdamW"),
    ],
)
def test_wrong_set_ups_are_refused_before_training(build, options, message):
    module = build()
    before = flags(module)
    with pytest.raises(ValueError, match=message) as error:
        record(module, DynamicLayerSelection(**options), batches(2))
    assert "\n" not in str(error.value)
    assert flags(module) == before


class Validated(Toy):
    def validation_step(self, batch, batch_idx):
        pytest.fail("validated before the settings were checked")


@pytest.mark.parametrize("options", [{"num_active": 6}, {"layers": "layer"}])
def test_what_the_model_cannot_have_is_refused_before_the_first_validation(options):
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        max_epochs=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=[DynamicLayerSelection(**options)],
    )
    with pytest.raises(ValueError, match=r"num_active=6|layers='layer'"):
        trainer.fit(Validated(), Batches(batches(2)), Batches(batches(1)))


class SkipsLayer(Toy):
    """Layer 1 takes part in no forward, and nothing but layers trains."""

    def __init__(self):
        super().__init__()
        self.head.requires_grad_(False)

    def loss(self, batch):
        x = batch
        for layer in (self.layers[0], *self.layers[2:]):
            x = layer(x)
        return self.head(x).square().mean()


@pytest.mark.parametrize("interval", [1, 2])
def test_active_layers_that_no_forward_runs_through_are_named(interval):
    module = SkipsLayer()
    before = flags(module)
    dls = DynamicLayerSelection(policy="fixed", fixed_layers=[1], interval=interval)
    if interval == 1:  # every step scores, with the gradients of all layers
        record(module, dls, batches(3))
    else:
        with pytest.raises(ValueError, match=r"active layers \[1\] took no part.*fixed_layers"):
            record(module, dls, batches(3))
    assert flags(module) == before


class TwoTowers(Toy):
    """Two lists of layers in one module."""

    def __init__(self):
        super().__init__()
        self.tower = nn.ModuleList([Block() for _ in range(3)])
        for block in self.tower:
            block.norm.requires_grad_(False)

    def loss(self, batch):
        x = batch
        for layer in self.tower:
            x = layer(x)
        return super().loss(x)


def both():
    return [
        DynamicLayerSelection(layers="layers", num_active=2, interval=2, policy="sample", seed=3),
        DynamicLayerSelection(layers="tow*", num_active=1, interval=3, policy="sample", seed=4),
    ]


def test_two_lists_of_layers_are_selected_from_by_a_callback_each(tmp_path):
    data, selections, run = batches(9), both(), Recorder()
    straight = TwoTowers()
    fit(straight, data, *selections, run, Saves(tmp_path), logger=CSVLogger(tmp_path, "log", "0"))
    for name, count in (("layers", 2), ("tower", 1)):
        blocks = range(len(getattr(straight, name)))
        for grads in run.grads:
            assert sum(grads[f"{name}.{i}.up.weight"] is not None for i in blocks) == count
    logged = (tmp_path / "log" / "0" / "metrics.csv").read_text()
    assert "dls/score/04" in logged
    assert "dls/tower/score/02" in logged

    resumed, again = TwoTowers(), both()
    fit(resumed, data, *again, ckpt_path=tmp_path / "4.ckpt")
    assert [dls.active for dls in again] == [dls.active for dls in selections]
    for name, parameter in straight.named_parameters():
        assert torch.equal(parameter, resumed.get_parameter(name))


def test_two_callbacks_for_one_list_are_refused():
    module = TwoTowers()
    before = flags(module)
    with pytest.raises(ValueError, match=r"Two DynamicLayerSelection callbacks.*'layers\.0'"):
        fit(module, batches(2), both()[0], DynamicLayerSelection(layers="l*s"))
    assert flags(module) == before


# --- seen and configured ------------------------------------------------------------------------


def test_every_selection_reaches_every_logger(tmp_path):
    loggers = [CSVLogger(tmp_path, name, "0") for name in ("one", "two")]
    dls = DynamicLayerSelection(num_active=2, interval=2)
    run = record(Toy(), dls, batches(5), logger=loggers, log_every_n_steps=5)
    for logger in loggers:
        logger.save()
        header, *lines = (tmp_path / logger.name / "0" / "metrics.csv").read_text().splitlines()
        rows = [dict(zip(header.split(","), line.split(","), strict=True)) for line in lines]
        assert [int(row["step"]) for row in rows] == [0, 2, 4]
        for row in rows:
            active, scores = run.active[int(row["step"]) + 1], run.scores[int(row["step"]) + 1]
            assert float(row["dls/num_active"]) == 2
            assert float(row["dls/lowest_active"]) == min(active)
            for index in range(5):
                assert float(row[f"dls/score/{index:02}"]) == scores[index]
                assert float(row[f"dls/active/{index:02}"]) == (index in active)


def test_the_beginning_of_the_final_steps_reaches_every_logger(tmp_path):
    logger = CSVLogger(tmp_path, "one", "0")
    dls = DynamicLayerSelection(num_active=1, interval=3, final_steps_all=2)
    run = record(Toy(), dls, batches(7), logger=logger)
    logger.save()
    header, *lines = (tmp_path / "one" / "0" / "metrics.csv").read_text().splitlines()
    rows = [dict(zip(header.split(","), line.split(","), strict=True)) for line in lines]
    assert [int(row["step"]) for row in rows] == [0, 3, 5]
    assert [int(float(row["dls/num_active"])) for row in rows] == [1, 1, 5]
    assert float(rows[-1]["dls/lowest_active"]) == 0
    assert [len(layers) for layers in trained(run)] == [1] * 5 + [5] * 2


def test_properties_tell_the_selection():
    dls = DynamicLayerSelection(num_active=3, interval=2)
    assert (dls.active, dls.scores, dls.num_layers, dls.num_selections) == ((), None, 0, 0)
    record(Toy(), dls, batches(4))
    assert dls.num_layers == 5
    assert len(dls.active) == 3
    assert len(dls.scores) == 5
    assert dls.num_selections == 2
    assert sum(dls.selection_counts) == 6
    with pytest.raises(AttributeError):
        dls.active = (0,)


def test_a_plain_transformer_encoder_is_selected_without_naming_anything():
    class Classifier(Toy):
        def __init__(self):
            super().__init__(1)
            layer = nn.TransformerEncoderLayer(WIDTH, 2, 8, dropout=0.0, batch_first=True)
            del self.layers
            self.encoder = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)

        def loss(self, batch):
            return (self.head(self.encoder(batch[None]))[0] - batch[:, :2]).square().mean()

    dls = DynamicLayerSelection(num_active=2, interval=2)
    run = record(Classifier(), dls, batches(4))
    assert dls.state_dict()["layers"] == [f"encoder.layers.{index}" for index in range(4)]
    for index in range(4):
        name = f"encoder.layers.{index}.norm1.weight"
        moved = not torch.equal(run.parameters[0][name], run.parameters[1][name])
        assert moved == (index in run.active[1])


def test_the_command_line_knows_every_argument(capsys):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(DynamicLayerSelection, "dls")
    parsed = parser.parse_args(["--dls.num_active=4", "--dls.always_active=[-1]"]).dls
    assert DynamicLayerSelection(**vars(parsed)).rules.num_active == 4
    assert parser.parse_args(["--dls.num_active=0.25"]).dls.num_active == 0.25
    with pytest.raises(Exception, match="topk"):
        parser.parse_args(["--dls.policy=topk"])
    parser.print_help()
    text = " ".join(capsys.readouterr().out.split())
    assert "Optimizer steps from one selection to the next." in text
    assert "Seed of the callback's own random generator" in text
