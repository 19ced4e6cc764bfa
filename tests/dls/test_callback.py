import math
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from torch import nn

from rosa_lightning.dls.callback import total_optimizer_steps
from tests.dls.toys import (
    LLAMA,
    TOY,
    Batches,
    Block,
    Checkpointed,
    Recorder,
    Saves,
    TinyLlama,
    Toy,
    assert_same,
    batches,
    count_backwards,
    fit,
    flags,
    highest,
    record,
    reference,
    sampler,
    select,
    trained,
)


def assert_equals_loop(run, module, data, interval=2, **options):
    """Each step of a run against the plain loop: the same layers, bit for bit the same weights."""
    plain = {"interval": interval, "epochs": 1, "accumulate": 1, "choose": highest(2)} | options
    layers, norms = TOY if isinstance(module, Toy) and hasattr(module, "layers") else LLAMA
    history = reference(module, data, layers=layers, norms=norms, **plain)
    # The recorder's first snapshot is from before the first step.
    assert len(run.parameters) == len(history) + 1
    for step, (active, parameters) in enumerate(history, start=1):
        assert run.active[step] == active
        assert_same(run.parameters[step], parameters)


@pytest.mark.parametrize(
    "build", [Toy, partial(Toy, train_norms=True), TinyLlama], ids=["adapters", "full", "llama"]
)
@pytest.mark.parametrize(("accumulate", "warmup"), [(1, 0), (2, 3)])
@pytest.mark.parametrize("mode", ["keep", "reset", "free"])
def test_training_equals_a_plain_loop_over_the_selected_layers(build, accumulate, warmup, mode):
    data = batches(7)
    dls = select(num_active=2, interval=2, warmup_steps=warmup, optimizer_state=mode)
    run = record(build(), dls, data, max_epochs=3, accumulate_grad_batches=accumulate)
    options = {"epochs": 3, "accumulate": accumulate, "warmup": warmup}
    assert_equals_loop(run, build(), data, forgets=mode != "keep", **options)
    assert dls.num_selections >= 3
    assert len(set(run.active[1:])) >= 2


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_selection_follows_the_precision(precision):
    """Against the plain loop, under autocast or with everything in bfloat16."""
    kind = torch.bfloat16 if precision == "bf16-true" else torch.float32

    class Cast(Toy):
        def loss(self, batch):
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
                return super().loss(batch)

    data = batches(6)
    run = record(Toy(), select(num_active=2, interval=2), data, precision=precision)
    assert_equals_loop(run, Cast().to(kind), [batch.to(kind) for batch in data])


@pytest.mark.parametrize("policy", ["sample", "random"])
def test_drawn_layers_depend_on_the_seed_and_not_on_the_global_generator(policy):
    histories = []
    for seed, noise in [(0, 5), (0, 6), (1, 5)]:
        module = Toy()
        torch.manual_seed(noise)
        before = torch.get_rng_state()
        dls = select(num_active=2, interval=1, policy=policy, seed=seed)
        histories.append(record(module, dls, batches(8)).active)
        assert torch.equal(torch.get_rng_state(), before)
    assert histories[0] == histories[1] != histories[2]


@pytest.mark.parametrize("build", [Toy, Checkpointed])
def test_backward_stops_below_the_lowest_active_layer(build):
    module = build()
    counts = count_backwards([layer.down for layer in module.layers])
    record(module, select(policy="fixed", fixed_layers=[3, 4], interval=4), batches(8))
    assert counts == [2, 2, 2, 8, 8]


# The compiler looks at the gradient of every input.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("whole", [False, True])
def test_compiled_layers_are_frozen_and_thawed_alike(whole):
    plain, compiled = Toy(3), Toy(3)
    record(plain, select(num_active=1, interval=2), batches(6))
    dls = select(num_active=1, interval=2)
    if whole:
        fit(torch.compile(compiled, backend="eager"), batches(6), dls)
    else:
        for layer in compiled.layers:
            layer.compile(backend="eager")
        fit(compiled, batches(6), dls)
    assert dls.num_selections == 3
    assert_same(plain.state_dict(), compiled.state_dict())


def test_the_policy_all_trains_as_without_the_callback_whatever_the_set_up():
    data, free, held = batches(6), Toy(), Toy()
    fit(free, data)
    dls = select(policy="all")
    record(held, dls, data)
    assert_same(free.state_dict(), held.state_dict())
    assert (dls.num_selections, dls.state_dict()) == (0, {})
    fit(Manual(), data, select(policy="all"))
    fit(nothing_repeated(), data, select(policy="all"))


def nothing_repeated():
    module = Toy(1)
    module.layers.requires_grad_(False)
    return module


@pytest.mark.parametrize("policy", ["top_k", "sample", "threshold", "random", "all"])
def test_the_backward_enters_as_many_layers_as_the_budget_allows(policy):
    module = Toy()
    counts = count_backwards([layer.down for layer in module.layers])
    dls = select(num_active=2, interval=5, policy=policy, backward_budget=0.6)
    run = record(module, dls, batches(10), max_epochs=4)
    assert sum(counts) / (5 * 40) == pytest.approx(dls.backward_share)
    assert 0.5 < dls.backward_share <= 0.6 + 1e-9
    assert len({min(active) for active in run.active}) >= 2
    # Policies that draw reach every layer sooner or later, the others soon.
    assert all(dls.selection_counts) or policy in ("sample", "random")


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
    dls = select(num_active=2, interval=5, backward_budget=0.6, warmup_steps=2, final_steps_all=3)
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


class Times(Callback):
    def __init__(self, dls):
        self.dls, self.batches, self.steps = dls, [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if self.dls.num_selections > len(self.batches):
            self.batches.append(batch_idx + 1)
            self.steps.append(trainer.global_step - 1)


@pytest.mark.filterwarnings("ignore:You requested to overfit")
@pytest.mark.parametrize(
    ("selection", "options", "schedule", "steps", "batches_seen"),
    [
        ({"interval": 1}, {"accumulate_grad_batches": 3}, None, [0, 1, 2], [3, 6, 8]),
        ({"interval": 1}, {"max_epochs": 2}, {0: 3, 1: 4}, [0, 1, 2, 3, 4], [3, 6, 8, 4, 8]),
        (
            {"interval": 4, "warmup_steps": 2},
            {"max_epochs": 6, "accumulate_grad_batches": 3},
            *(None, [2, 6, 10, 14], [8, 3, 6, 8]),
        ),
        ({"interval": 2}, {"limit_train_batches": 3, "max_epochs": 2}, None, [0, 2, 4], [1, 3, 2]),
        ({"interval": 2}, {"overfit_batches": 3, "max_epochs": 2}, None, [0, 2, 4], [1, 3, 2]),
    ],
)
def test_selections_count_optimizer_steps_and_end_windows_of_micro_batches(
    selection, options, schedule, steps, batches_seen
):
    dls = select(num_active=2, **selection)
    watch = Times(dls)
    extra = [GradientAccumulationScheduler(schedule)] if schedule else []
    fit(Toy(), batches(8), dls, watch, *extra, **options)
    assert (watch.steps, watch.batches) == (steps, batches_seen)


class Total(Callback):
    def on_train_start(self, trainer, pl_module):
        self.steps = total_optimizer_steps(trainer)


@pytest.mark.parametrize(
    ("options", "schedule"),
    [
        ({"max_epochs": 2, "accumulate_grad_batches": 3}, None),
        ({"max_epochs": 3, "limit_train_batches": 2}, None),
        ({"max_epochs": -1, "max_steps": 9}, None),
        ({"max_epochs": 4}, {1: 2, 2: 3}),
        ({"max_epochs": 4, "max_steps": 11}, {1: 2, 2: 3}),
        ({"max_epochs": -1, "max_steps": 6}, {1: 2}),
    ],
)
def test_a_run_stops_at_the_step_that_was_planned(options, schedule):
    extra, total = [GradientAccumulationScheduler(schedule)] if schedule else [], Total()
    trainer = fit(Toy(), batches(7), total, *extra, **options)
    assert total.steps == trainer.global_step


class Endless(Batches):
    """Does not know its length."""

    __len__ = None


def test_a_run_of_unknown_length_is_endless_unless_its_steps_are_counted():
    for options, steps in (({"max_epochs": 2}, math.inf), ({"max_epochs": 5, "max_steps": 4}, 4)):
        total = Total()
        fit(Toy(), Endless(batches(3)), total, **options)
        assert total.steps == steps


@pytest.mark.parametrize("max_epochs", [-1, 2])
def test_final_steps_of_a_run_without_an_end_are_refused(max_epochs):
    dls = select(final_steps_all=2)
    with pytest.raises(ValueError, match=r"final_steps_all=2.*trainer\.max_steps"):
        fit(Toy(), Endless(batches(4)), dls, max_epochs=max_epochs)


class SkipsLoss(Toy):
    def __init__(self, skipped):
        super().__init__()
        self.skipped = skipped

    def training_step(self, batch, batch_idx):
        return None if batch_idx == self.skipped else super().training_step(batch, batch_idx)


@pytest.mark.filterwarnings("ignore:.*`training_step` returned `None`")
def test_a_step_selects_whatever_micro_batch_had_no_loss_and_not_without_any_gradient():
    run = record(SkipsLoss(1), select(num_active=2), batches(4), accumulate_grad_batches=2)
    assert [len(layers) for layers in trained(run)] == [2, 2]
    with pytest.warns(UserWarning, match="no norm weight got a gradient"):
        run = record(SkipsLoss(0), select(num_active=2), batches(3))
    assert [len(active) for active in run.active] == [5, 5, 2, 2]  # the next step selects


@pytest.mark.parametrize("train_norms", [False, True])
def test_scores_hold_nothing_of_earlier_windows(train_norms):
    dls = select(num_active=2, interval=2)
    module = Toy(lr=0.0, train_norms=train_norms, optimizer=torch.optim.SGD)
    run = record(module, dls, batches(1) * 8, accumulate_grad_batches=2)
    assert dls.num_selections == 2
    assert run.scores[1] == run.scores[3]


class ScaledLoss(MixedPrecision):
    """A loss scaler without half precision, so that nothing but the scale differs."""

    def __init__(self, scale):
        super().__init__("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale))

    def forward_context(self):
        return nullcontext()


def test_scores_do_not_depend_on_the_loss_scale():
    seen = []
    for plugins in [[], [ScaledLoss(2.0)], [ScaledLoss(2.0**16)]]:
        dls = select(num_active=2, interval=2)
        run = record(Toy(), dls, batches(6), plugins=plugins)
        seen.append((run.scores, run.active))
    # Powers of two: scaling loses no bit.
    assert seen[0] == seen[1] == seen[2]


class Overflows(Toy):
    def loss(self, batch):
        return super().loss(batch) * (math.inf if self.global_step in (2, 4) else 1.0)


def test_scores_that_are_not_finite_keep_the_previous_layers():
    dls = select(num_active=2, interval=2, policy="random")
    with pytest.warns(UserWarning, match="scores at step 2 are not finite") as warned:
        run = record(Overflows(optimizer=torch.optim.SGD), dls, batches(6))
    assert sum("finite" in str(warning.message) for warning in warned) == 1
    assert len(set(run.active[1:])) == 1
    assert run.scores[1] == run.scores[6]
    assert dls.num_selections == 1
    assert trained(run)[2] == list(run.active[3])
    assert all(run.grads[2][f"layers.{index}.norm.weight"] is None for index in range(5))


def test_a_second_fit_has_a_budget_of_its_own():
    module = Toy()
    counts = count_backwards([layer.down for layer in module.layers])
    dls = select(num_active=2, interval=5, backward_budget=0.6, warmup_steps=2)
    loader = Batches(batches(20))
    trainer = record(module, dls, loader).trainer
    first = sum(counts)
    assert first / (5 * 20) == pytest.approx(dls.backward_share)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, loader)
    assert (sum(counts) - first) / (5 * 20) == pytest.approx(dls.backward_share)
    # It selects at once and then at the steps at which it would have, so once more than planned.
    assert 0.4 < dls.backward_share <= 0.6 + 1 / 20


REMEMBERING = {
    "policy": "top_k",
    "backward_budget": 0.8,
    "score_smoothing": 0.5,
    "score_normalization": "running_mean",
    "warmup_steps": 1,
    "final_steps_all": 2,
}


@pytest.mark.parametrize(
    "changes", [{}, REMEMBERING, {"optimizer_state": "free"}, {"optimizer_state": "keep"}]
)
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


@pytest.mark.parametrize(
    "options",
    [
        {"num_active": 1.5},
        {"interval": 0},
        {"interval": 2.5},
        {"interval": True},
        {"policy": "topk"},
        {"warmup_steps": -1},
        {"temperature": math.nan},
        {"temperature": "x"},
        {"score_share": 0.0},
        {"score_smoothing": 1.0},
        {"score_normalization": "mean"},
        {"backward_budget": None},
        {"optimizer_state": "forget"},
        {"always_active": 3},
        {"always_active": ["a"]},
        {"norms": ["*ln"]},
    ],
)
def test_settings_out_of_range_are_refused_at_construction(options):
    (name,) = options
    with pytest.raises(ValueError, match=rf"^{name}=.* is out of range. Set .*\.$"):
        select(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy": "fixed"}, "needs fixed_layers"),
        ({"fixed_layers": [1]}, "needs fixed_layers"),
        ({"policy": "fixed", "fixed_layers": [1], "backward_budget": 0.5}, "nothing to share"),
    ],
)
def test_settings_that_contradict_each_other_are_refused_at_construction(options, message):
    with pytest.raises(ValueError, match=message):
        select(**options)


class Manual(Toy):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False


class PartOptimizer(Toy):
    def configure_optimizers(self):
        return torch.optim.SGD([*self.layers[0].parameters(), *self.head.parameters()], lr=0.1)


@pytest.mark.parametrize(
    ("build", "options", "message"),
    [
        (Toy, {"num_active": 6}, "num_active=6 .* at most the model's 5"),
        (Toy, {"layers": "layer"}, "layers='layer' matches 0.*such as layers"),
        (Toy, {"trainable": "*lora*"}, r"nothing to train in 'layers'.*\*lora\*"),
        (Toy, {"norms": "*ln*"}, "'layers.0' has no norm weight.*inside it: norm"),
        (Toy, {"always_active": [5]}, r"always_active=\[5\].*cannot be selected"),
        (Toy, {"num_active": 1, "always_active": [0, 1]}, "Raise num_active"),
        (Manual, {}, "optimizes manually.*automatic_optimization=True"),
        (PartOptimizer, {}, r"lacks layers\.1\.up\.weight.* and 13 more.*Build it over all"),
        (partial(Toy, optimizer=torch.optim.LBFGS), {}, "LBFGS.*AdamW"),
        (partial(Toy, optimizer=torch.optim.Adagrad), {}, "Adagrad.*optimizer_state='keep'"),
    ],
)
def test_wrong_set_ups_are_refused_before_training(build, options, message):
    module = build()
    before = flags(module)
    with pytest.raises(ValueError, match=message) as error:
        record(module, select(**options), batches(2))
    assert "\n" not in str(error.value)
    assert flags(module) == before


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
    dls = select(policy="fixed", fixed_layers=[1], interval=interval)
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
        select(layers="layers", num_active=2, interval=2, policy="sample", seed=3),
        select(layers="tow*", num_active=1, interval=3, policy="sample", seed=4),
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
    assert {"weights/lowest_active", "weights/tower/lowest_active"} <= {*logged.split(",")}

    resumed, again = TwoTowers(), both()
    fit(resumed, data, *again, ckpt_path=tmp_path / "4.ckpt")
    assert [dls.active for dls in again] == [dls.active for dls in selections]
    for name, parameter in straight.named_parameters():
        assert torch.equal(parameter, resumed.get_parameter(name))


def test_two_callbacks_for_one_list_are_refused():
    module = TwoTowers()
    before = flags(module)
    with pytest.raises(ValueError, match=r"Two DynamicLayerSelection callbacks.*'layers\.0'"):
        fit(module, batches(2), both()[0], select(layers="l*s"))
    assert flags(module) == before


class Fails(Toy):
    def training_step(self, batch, batch_idx):
        if batch_idx == 5:
            assert all(p.requires_grad for p in self.layers.parameters() if p.ndim == 2)
            raise RuntimeError("in the middle")
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("build", [Toy, partial(Toy, train_norms=True), TinyLlama, Fails])
def test_however_a_fit_ends_everything_requires_gradients_as_before(build):
    module, dls = build(), select(num_active=1, interval=2)
    before = flags(module)
    ends = pytest.raises(RuntimeError, match="in the middle") if build is Fails else nullcontext()
    with ends:  # of Fails: in a scoring step
        record(module, dls, batches(8), accumulate_grad_batches=2)
    assert flags(module) == before
    assert all(p.grad is None for name, p in module.named_parameters() if not before[name])
    assert len(dls.active) == 1


def test_a_second_fit_starts_afresh_after_a_resumed_one_too(tmp_path):
    dls = sampler()
    one = record(Toy(), dls, batches(5), extra=[Saves(tmp_path)])
    fit(Toy(), batches(5), dls, ckpt_path=tmp_path / "2.ckpt")
    two = record(Toy(), dls, batches(5))
    assert one.active[1:] == two.active[1:]
    assert_same(one.parameters[-1], two.parameters[-1])


def test_the_state_is_plain_and_names_the_layers(tmp_path):
    dls, other = sampler(), sampler()
    assert dls.state_dict() == {}
    record(Toy(), dls, batches(5))
    state = dls.state_dict()
    torch.save(state, tmp_path / "state.pt")
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    again = other.state_dict()
    assert torch.equal(again.pop("generator"), state.pop("generator"))
    assert again == state
    assert state["layers"] == [f"layers.{index}" for index in range(5)]
    record(Toy(4), sampler(), batches(2)).trainer.save_checkpoint(tmp_path / "c.ckpt")
    checkpoint = torch.load(tmp_path / "c.ckpt", weights_only=True)
    checkpoint["callbacks"]["DynamicLayerSelection"] = dls.state_dict()
    torch.save(checkpoint, tmp_path / "c.ckpt")
    with pytest.raises(ValueError, match=r"5 layers, layers.0 to layers.4; this model has 4"):
        fit(Toy(4), batches(2), sampler(), ckpt_path=tmp_path / "c.ckpt", max_epochs=2)


def test_every_selection_and_the_final_steps_reach_every_logger(tmp_path):
    loggers = [CSVLogger(tmp_path, name, "0") for name in ("one", "two")]
    dls = select(num_active=1, interval=3, warmup_steps=1, final_steps_all=2)
    run = record(Toy(), dls, batches(7), logger=loggers, log_every_n_steps=5)
    assert [len(layers) for layers in trained(run)] == [5] + [1] * 4 + [5] * 2
    for logger in loggers:
        logger.save()
        header, *lines = (tmp_path / logger.name / "0" / "metrics.csv").read_text().splitlines()
        rows = [dict(zip(header.split(","), line.split(","), strict=True)) for line in lines]
        assert [int(row["step"]) for row in rows] == [1, 4, 5]
        assert [float(row["weights/num_active"]) for row in rows] == [1, 1, 5]
        lowest = [float(row["weights/lowest_active"]) for row in rows]
        assert (lowest[0], lowest[2]) == (min(run.active[2]), min(run.active[6]))
