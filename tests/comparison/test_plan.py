"""Overrides, learning rates and ranks of a comparison."""

import math

import pytest

from rosa_lightning.comparison.plan import (
    ComparisonConfig,
    Run,
    best_learning_rate,
    nested,
    next_learning_rate,
)


def test_dotted_keys_become_mappings_and_keys_within_values_stay():
    pattern = {"model.layers.0": 8}
    overrides = {
        "model.peft": {"class_path": "peft.LoraConfig", "init_args": {"rank_pattern": pattern}},
        "model": {"speed": {"compile": True}},
        "dls.policy": "all",
    }
    assert nested(overrides) == {
        "model": {"peft": overrides["model.peft"], "speed": {"compile": True}},
        "dls": {"policy": "all"},
    }


def test_a_learning_rate_at_the_edge_is_said_and_extended():
    losses = {1e-4: 1.2, 1e-3: 0.9, 4e-3: 0.8}
    best = best_learning_rate(losses)
    assert (best.value, best.at_edge) == (4e-3, True)
    assert next_learning_rate(losses) == pytest.approx(16e-3)
    assert next_learning_rate({1e-4: 0.5, 1e-3: 0.9}) == pytest.approx(1e-5)
    assert next_learning_rate({1e-4: 1.2, 1e-3: 0.9, 4e-3: 1.0}) is None


def test_a_method_may_have_rates_and_seeds_of_its_own():
    rates = {"comparison.learning_rates": [1e-5]}
    own = {**rates, "comparison": {"seeds": [1, 2]}, "dls.policy": "all"}
    config = ComparisonConfig(methods={"A": {}, "B": own}, learning_rates=[1e-3, 1e-2], seeds=[1])
    assert config.of("A", "learning_rates") == [1e-3, 1e-2]
    assert (config.of("B", "learning_rates"), config.of("B", "seeds")) == ([1e-5], [1, 2])
    assert config.overrides("B") == {"dls": {"policy": "all"}}


def test_runs_that_failed_or_diverged_are_no_choice():
    assert best_learning_rate({1e-3: None, 1e-2: math.nan, 1e-1: 2.0}).value == 1e-1
    assert best_learning_rate({1e-3: None, 1e-2: math.nan}) is None
    assert next_learning_rate({1e-3: None}) is None


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"methods": {}}, "methods is empty"),
        ({"reference": "C"}, "none of the methods: A, B"),
        ({"methods": {"A": {"comparison.test": False}}}, "A sets comparison.test.*learning_rates"),
        ({"methods": {"A": {"comparison.seeds": []}}}, "seeds of A="),
        ({"methods": {"A": {"optimizer": {"init_args": {"lr": 1.0}}}}}, "learning_rates"),
        (
            {"methods": {"A": {"trainer.val_check_interval": 7}}},
            "A sets trainer.val_check_interval",
        ),
        ({"learning_rates": []}, "learning_rates"),
        ({"seeds": [1, 1]}, "seeds"),
        ({"max_steps": 3, "train_seconds": 4.0}, "Leave one of them out"),
    ],
)
def test_a_plan_that_cannot_be(changed, message):
    given = {"methods": {"A": {}, "B": {}}} | changed
    with pytest.raises(ValueError, match=message):
        ComparisonConfig(**given)


def test_folders_of_runs(tmp_path):
    run = Run("LoRA (q, k)", 1e-3, 2)
    assert run.folder(tmp_path) == tmp_path / "LoRA--q--k-" / "lr-0.001-seed-2"
