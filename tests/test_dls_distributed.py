from __future__ import annotations

import ranks
import torch
from test_dls import (
    TOY,
    Batches,
    Recorder,
    Toy,
    assert_same,
    batches,
    fit,
    flags,
    highest,
    reference,
)
from torch.testing import assert_close

from rosa_lightning.dls import DynamicLayerSelection

JOINT = batches(7, rows=8)
"""Of every batch, each rank gets one half."""


def mine() -> list[torch.Tensor]:
    return [batch.chunk(ranks.WORLD)[ranks.rank()] for batch in JOINT]


def parallel_fit(module, strategy, *callbacks, **options):
    return fit(module, Batches(mine()), *callbacks, strategy=strategy, devices=2, **options)


def followed(module, dls, strategy, *callbacks, **options) -> dict:
    """What a rank saw of a run: the selections, scores and parameters after every step."""
    recorder = Recorder(dls)
    before = flags(module)
    parallel_fit(module, strategy, dls, recorder, *callbacks, **options)
    assert flags(module) == before
    return {
        "active": recorder.active,
        "scores": recorder.scores,
        "parameters": recorder.parameters,
        "seen": [
            int(torch.stack([(a == b).all() for a in mine()]).nonzero()) for b in recorder.seen
        ],
        "counts": dls.selection_counts,
    }


def refusal(module, strategy) -> str:
    try:
        parallel_fit(module, strategy, DynamicLayerSelection())
    except ValueError as error:
        return str(error)
    return ""


RUNS = {
    "adapters": {"accumulate_grad_batches": 1, "max_epochs": 2},
    "full": {"accumulate_grad_batches": 1, "max_epochs": 2},
    "accumulated": {"accumulate_grad_batches": 3, "max_epochs": 4},
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
        assert len(run["parameters"]) == len(history) + 1 >= 13
        assert sum(run["counts"]) == len(history[::2]) * 2
        for step, (active, parameters) in enumerate(history, start=1):
            assert run["active"][step] == active
            for key, value in parameters.items():
                assert_close(run["parameters"][step][key], value, rtol=0, atol=1e-6)


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


def on_ddp(folder) -> dict:
    torch.manual_seed(ranks.rank())  # no help from equal generators
    seen = runs(ranks.ddp)
    other = DynamicLayerSelection(num_active=2, interval=1, policy="random", seed=ranks.rank())
    seen["disagreeing"] = followed(Toy(), other, ranks.ddp(gradient_as_bucket_view=True))
    seen["errors"] = [
        refusal(Toy(), ranks.ddp(find_unused_parameters=False)),
        refusal(Toy(), ranks.ddp(static_graph=True)),
    ]
    return seen


def test_under_ddp_training_equals_one_process_on_the_joint_batch(tmp_path):
    seen = ranks.launch("test_dls_distributed:on_ddp", tmp_path)
    assert_ranks_agree(seen)
    assert_as_one_process(seen[0])
    assert seen[0]["disagreeing"]["active"] == seen[1]["disagreeing"]["active"]
    assert len(set(seen[0]["disagreeing"]["active"])) > 2
    for rank in seen:
        unused, static = rank["errors"]
        assert "find_unused_parameters=True" in unused
        assert "Leave static_graph out" in static
        assert "\n" not in unused + static
