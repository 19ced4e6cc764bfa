from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.testing import assert_close

from rosa_lightning.dls import DynamicLayerSelection
from tests import ranks
from tests.dls.toys import (
    TOY,
    Batches,
    Block,
    Checkpointed,
    Recorder,
    Saves,
    Toy,
    assert_same,
    batches,
    count_backwards,
    fit,
    flags,
    highest,
    reference,
    sampler,
    select,
)

JOINT = batches(7, rows=8)
"""Of every batch, each rank gets one half."""


def mine() -> list[torch.Tensor]:
    return [batch.chunk(ranks.WORLD)[ranks.rank()] for batch in JOINT]


def parallel_fit(module, strategy, *callbacks, **options):
    return fit(module, Batches(mine()), *callbacks, strategy=strategy, devices=2, **options)


class RankRecorder(Recorder):
    """A rank's part of the parameters, between steps; all of them under FSDP1."""

    def on_train_start(self, trainer, pl_module):
        self.step = trainer.global_step
        self.snap(trainer.strategy.model)

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        pass

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step > self.step:
            self.on_train_start(trainer, pl_module)

    def on_train_end(self, trainer, pl_module):
        pass

    def snap(self, model):
        self.active.append(self.dls.active)
        self.scores.append(self.dls.scores)
        with FullyShardedDataParallel.summon_full_params(model):
            parameters = {plain(name): p for name, p in model.named_parameters()}
            self.sharded = {name for name, p in parameters.items() if isinstance(p, DTensor)}
            self.parameters.append({name: part(p).clone() for name, p in parameters.items()})

    def whole(self) -> list[dict[str, torch.Tensor]]:
        """The parameters after every step, of which FSDP2 splits the first axis among ranks."""
        if not self.sharded:
            return self.parameters
        parts: list = [None] * ranks.WORLD
        torch.distributed.all_gather_object(parts, self.parameters)
        return [
            {
                n: torch.cat([one[n] for one in step]) if n in self.sharded else step[0][n]
                for n in step[0]
            }
            for step in zip(*parts, strict=True)
        ]


def part(parameter: torch.Tensor) -> torch.Tensor:
    return (parameter.to_local() if isinstance(parameter, DTensor) else parameter).detach()


def plain(name: str) -> str:
    return name.replace("_fsdp_wrapped_module.", "").removeprefix("module.")


def required(module) -> dict[str, bool]:
    return {plain(name): flag for name, flag in flags(module).items()}


def followed(module, dls, strategy, *callbacks, **options) -> dict:
    """What a rank saw of a run: the selections, scores and parameters after every step."""
    recorder = RankRecorder(dls)
    before = required(module)
    parallel_fit(module, strategy, dls, recorder, *callbacks, **options)
    assert required(module) == before
    return {
        "active": recorder.active,
        "scores": recorder.scores,
        "parameters": recorder.whole(),
        "seen": [
            int(torch.stack([(a == b).all() for a in mine()]).nonzero()) for b in recorder.seen
        ],
        "counts": dls.selection_counts,
    }


def refusal(**options) -> str:
    with pytest.raises(ValueError, match="DDP expects") as error:
        parallel_fit(Toy(), ranks.ddp(**options), DynamicLayerSelection())
    return str(error.value)


RUNS = {
    "adapters": {"accumulate_grad_batches": 1, "max_epochs": 2},
    "full": {"accumulate_grad_batches": 1, "max_epochs": 2},
    "accumulated": {"accumulate_grad_batches": 3, "max_epochs": 2},
}


def assert_ranks_agree(seen: list[dict]) -> None:
    for name in RUNS:
        first, second = (rank[name] for rank in seen)
        assert first["active"] == second["active"]
        assert first["scores"] == second["scores"]
        for one, other in zip(first["parameters"], second["parameters"], strict=True):
            assert_same(one, other)


def assert_as_one_process(seen: dict) -> None:
    for name, options in RUNS.items():
        history = reference(
            Toy(train_norms=name == "full"),
            JOINT,
            layers=TOY[0],
            norms=TOY[1],
            choose=highest(2),
            interval=2,
            epochs=options["max_epochs"],
            accumulate=options["accumulate_grad_batches"],
        )
        run = seen[name]
        assert len(run["parameters"]) == len(history) + 1 >= 7
        assert sum(run["counts"]) == len(history[::2]) * 2
        for step, (active, parameters) in enumerate(history, start=1):
            assert run["active"][step] == active
            for key, value in parameters.items():
                assert_close(run["parameters"][step][key], value, rtol=0, atol=1e-6)


CLIPPED = {"gradient_clip_val": 0.05, "max_epochs": 2}
SHARING = {
    "num_active": 2,
    "interval": 2,
    "always_active": [4],
    "score_smoothing": 0.5,
    "score_normalization": "sqrt_size",
    "backward_budget": 0.85,
    "final_steps_all": 2,
}


def clipped(strategy, module, mode="reset") -> dict:
    """Clipping, activation checkpointing, a budget and scores with a memory together."""
    dls = select(**SHARING, optimizer_state=mode)
    built = module()
    counts = count_backwards([layer.down for layer in built.layers])
    seen = followed(built, dls, strategy(), **CLIPPED)
    return seen | {"entered": counts, "state": dls.state_dict()}


def assert_clipped_as_one_process(seen: dict) -> None:
    dls, module = select(**SHARING), Checkpointed()
    counts = count_backwards([layer.down for layer in module.layers])
    alone = RankRecorder(dls)
    fit(module, JOINT, dls, alone, **CLIPPED)
    assert seen["active"] == alone.active
    assert seen["entered"] == counts
    # Scores differ in the last bits, and so do what is earned and carried over.
    for key in ("spent", "counted_steps", "selection_counts", "num_selections"):
        assert seen["state"][key] == dls.state_dict()[key]
    assert len(set(alone.active)) >= 4
    for one, other in zip(seen["parameters"], alone.parameters, strict=True):
        for name, value in other.items():
            assert_close(one[name], value, rtol=0, atol=1e-6)


def runs(strategy, module=Toy) -> dict:
    return {
        name: followed(
            module(train_norms=name == "full"),
            DynamicLayerSelection(num_active=2, interval=2),
            strategy(),
            **options,
        )
        for name, options in RUNS.items()
    }


class SavesAt(Saves):
    """Checkpoints after some optimizer steps, the first in the middle of an accumulation."""

    def __init__(self, folder, steps):
        super().__init__(folder)
        self.steps = steps

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == 0 and trainer.current_epoch == 0:
            # Scoring goes on; what is saved of the norms must not depend on it.
            trainer.save_checkpoint(self.folder / "inside")
        if trainer.global_step > self.step:
            self.step = trainer.global_step
            if self.step in self.steps:
                trainer.save_checkpoint(self.folder / f"{self.step}")


BUDGETED = {
    "policy": "top_k",
    "backward_budget": 0.7,
    "score_smoothing": 0.5,
    "score_normalization": "running_mean",
    "final_steps_all": 2,
}


def resumes(folder, strategy, module=Toy, **changes) -> dict:
    """A run that goes through, and what becomes of it from two of its checkpoints."""
    options = {"accumulate_grad_batches": 2, "max_epochs": 3}
    folder.mkdir(exist_ok=True)
    dls = sampler(num_active=1, **changes)
    straight = followed(module(), dls, strategy(), SavesAt(folder, (2, 5)), **options)
    straight["share"] = dls.backward_share
    seen = {"straight": straight}
    for step in (2, 5):  # between selections; in the second epoch of four steps
        torch.manual_seed(step)
        again = module(lr=7.0)
        with torch.no_grad():
            for parameter in again.parameters():
                parameter.add_(1.0)
        dls = sampler(num_active=1, seed=77, **changes)
        path = folder / f"{step}"
        seen[step] = followed(again, dls, strategy(), ckpt_path=path, **options)
        seen[step]["share"] = dls.backward_share
    return seen


def assert_resumed_exactly(seen: dict) -> None:
    straight = seen["straight"]
    assert len(straight["parameters"]) == 13
    for step in (2, 5):
        run = seen[step]
        assert run["active"] == straight["active"][step:]
        assert run["scores"] == straight["scores"][step:]
        assert run["counts"] == straight["counts"]
        assert run["share"] == straight["share"]
        assert run["seen"] == straight["seen"][-len(run["seen"]) :]
        for one, other in zip(run["parameters"], straight["parameters"][step:], strict=True):
            assert_same(one, other)
    # Some layer was never active before the checkpoint: its moments are those of no step.
    assert len({layer for active in straight["active"][1:3] for layer in active}) < 5


class OwnDraws(DynamicLayerSelection):
    """Draws other layers on each rank, though all ranks were given the same settings."""

    def on_train_start(self, trainer, pl_module):
        super().on_train_start(trainer, pl_module)
        self._selector._generator.manual_seed(ranks.rank())


def on_ddp(folder) -> dict:
    torch.manual_seed(ranks.rank())  # no help from equal generators
    seen = runs(ranks.ddp)
    seen["resumed"] = resumes(folder, ranks.ddp)
    seen["clipped"] = clipped(ranks.ddp, Checkpointed, mode="free")
    other = OwnDraws(num_active=2, interval=1, policy="random")
    seen["disagreeing"] = followed(Toy(), other, ranks.ddp(gradient_as_bucket_view=True))
    seen["errors"] = {refusal(find_unused_parameters=False), refusal(static_graph=True)}
    return seen


def test_under_ddp_training_equals_one_process_on_the_joint_batch(tmp_path):
    seen = ranks.launch(on_ddp, tmp_path)
    assert_ranks_agree(seen)
    assert_as_one_process(seen[0])
    assert_resumed_exactly(seen[0]["resumed"])
    assert_clipped_as_one_process(seen[0]["clipped"])
    assert seen[0]["disagreeing"]["active"] == seen[1]["disagreeing"]["active"]
    assert len(set(seen[0]["disagreeing"]["active"])) > 2
    for rank in seen:
        (error,) = rank["errors"]
        assert "Leave static_graph out" in error


class FullyShardedToy(Toy):
    def configure_model(self):
        if not hasattr(self.head, "unshard"):
            for module in (*self.layers, self.head):
                mesh = self.device_mesh["data_parallel"]
                fully_shard(module, mesh=mesh, reshard_after_forward=True)


class FullyShardedCheckpointed(Checkpointed, FullyShardedToy):
    pass


def on_fsdp2(folder) -> dict:
    torch.manual_seed(ranks.rank())
    seen = runs(ranks.fsdp2, FullyShardedToy)
    seen["clipped"] = clipped(ranks.fsdp2, FullyShardedCheckpointed)
    for kind, shards in (("sharded", True), ("full", False)):
        strategy = partial(ranks.fsdp2, save_distributed_checkpoint=shards)
        seen[f"resumed {kind}"] = resumes(folder / kind, strategy, FullyShardedToy)
    return seen


def test_under_fsdp2_training_equals_one_process_on_the_joint_batch(tmp_path):
    seen = ranks.launch(on_fsdp2, tmp_path)
    assert_ranks_agree(seen)
    assert_as_one_process(seen[0])
    assert_clipped_as_one_process(seen[0]["clipped"])
    assert_resumed_exactly(seen[0]["resumed sharded"])
    assert_resumed_exactly(seen[0]["resumed full"])


STRATEGIES = {
    "ddp": (ranks.ddp, Toy),
    "fsdp2 sharded": (ranks.fsdp2, FullyShardedToy),
    "fsdp2 full": (partial(ranks.fsdp2, save_distributed_checkpoint=False), FullyShardedToy),
    "fsdp1 full": (partial(ranks.fsdp, auto_wrap_policy={Block}), Toy),
}


def under_a_budget(folder) -> dict:
    torch.manual_seed(ranks.rank())
    return {
        name: resumes(folder / name, strategy, module, **BUDGETED)
        for name, (strategy, module) in STRATEGIES.items()
    }


@pytest.mark.slow
def test_under_a_budget_every_strategy_resumes_exactly(tmp_path):
    first, second = ranks.launch(under_a_budget, tmp_path)
    for name in STRATEGIES:
        assert_resumed_exactly(first[name])
        straight, other = first[name]["straight"], second[name]["straight"]
        assert straight["active"] == other["active"]
        assert straight["share"] == other["share"] <= 0.7 + 1e-9
        lowest = [min(active) for active in straight["active"][1:-2]]
        assert len(set(lowest)) >= 2
        assert straight["active"][-1] == tuple(range(5))


class NormsLast(Toy):
    """So that the second rank's shards hold the norms, and the first rank decides."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        for block in self.layers:
            block._modules["norm"] = block._modules.pop("norm")


def on_fsdp1(folder) -> dict:
    torch.manual_seed(ranks.rank())
    strategy = partial(ranks.fsdp, auto_wrap_policy={Block})
    seen = runs(strategy, NormsLast)
    sized = select(num_active=2, interval=2, score_normalization="sqrt_size")
    seen["sized"] = followed(NormsLast(), sized, strategy(), **RUNS["adapters"])
    for kind in ("sharded", "full"):
        sharding = partial(strategy, state_dict_type=kind)
        seen[f"resumed {kind}"] = resumes(folder / kind, sharding)
    return seen


@pytest.mark.slow
def test_under_fsdp1_training_equals_one_process_on_the_joint_batch(tmp_path):
    seen = ranks.launch(on_fsdp1, tmp_path)
    assert_ranks_agree(seen)
    assert_as_one_process(seen[0])
    # Norms of one size rank as they do without it, wherever their pieces lie.
    assert seen[0]["sized"]["active"] == seen[0]["adapters"]["active"]
    assert_resumed_exactly(seen[0]["resumed sharded"])
    assert_resumed_exactly(seen[0]["resumed full"])
