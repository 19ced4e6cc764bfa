"""What a comparison is said to show."""

import pytest

from rosa_lightning.comparison.verdict import verdict


def method(*losses, at_edge=False):
    runs = [{"status": "finished", "val_loss": loss, "seed": s} for s, loss in enumerate(losses)]
    return {"runs": runs, "grid": [], "at_edge": at_edge}


def against(name, mean, p, metric="val_loss", **other):
    reach = abs(mean) / 2 if p < 0.05 else 2 * abs(mean)
    return {
        "method": name,
        "metric": metric,
        "mean": mean,
        "low": mean - reach,
        "high": mean + reach,
        "p": p,
        "p_holm": p,
        **other,
    }


@pytest.fixture
def content():
    methods = {"LoRA": method(1.0, 1.0), "A": method(0.9, 0.9), "B": method(1.2, 1.2)}
    return {
        "reference": "LoRA",
        "methods": {**methods, "C": method(0.99, 0.99, at_edge=True), "D": method()},
        "tests": [against("A", -0.1, 0.01), against("B", 0.2, 0.02), against("C", -0.01, 0.4)],
    }


def test_who_is_better_who_is_worse_and_what_is_open(content):
    assert verdict(content) == [
        "Lowest validation loss: A, 0.9000 nats per response token, 0.1000 below LoRA.",
        "Validation loss: better than LoRA: A -0.1000 (-0.1500 to -0.0500).",
        "Validation loss: worse than LoRA: B +0.2000 (+0.1000 to +0.3000).",
        "Validation loss: not decided against LoRA (p of at least 0.05): C.",
        "Best at the edge of the learning rates, so a better one may lie beyond: C.",
    ]


def test_one_seed_decides_nothing(content):
    lines = verdict({**content, "tests": []})
    assert lines[1].startswith("Not tested, as that takes two seeds or more")
    assert lines[1].endswith(": A, B, C.")


def test_higher_accuracy_is_better(content):
    tests = [
        against("A", -0.1, 0.01, "generate/all", n=60),
        against("B", 0.1, 0.01, "generate/all", n=60),
    ]
    lines = verdict({**content, "tests": tests})
    about = "Accuracy (generate, "
    assert [line for line in lines if line.startswith(about)] == [
        f"{about}60 questions): better than LoRA: B +10.0 points (+5.0 to +15.0).",
        f"{about}60 questions): worse than LoRA: A -10.0 points (-15.0 to -5.0).",
    ]


def test_forgetting_is_said(content):
    change = {"mean": 0.5, "low": 0.25, "high": 0.75}
    lines = verdict({**content, "forgetting": {"A": {"text_loss": change}, "B": {}}})
    assert "Loss on general text rises against the base: A +0.5000 (+0.2500 to +0.7500)." in lines


def test_nothing_is_finished(content):
    methods = {name: method() for name in content["methods"]}
    assert verdict({**content, "methods": methods, "tests": []}) == ["No run has come to its end."]
