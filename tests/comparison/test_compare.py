"""A comparison from its plan to its results, with trainings of numbers alone, and a real one."""

import json

import pytest
import yaml

from rosa_lightning.adapters.methods import apply_method
from rosa_lightning.adapters.peft_method import PeftMethod
from rosa_lightning.cli.compare import _with_rank
from rosa_lightning.cli.main import main
from rosa_lightning.comparison import compare
from rosa_lightning.comparison.compare import Comparison, Method, summary
from rosa_lightning.comparison.plan import ComparisonConfig
from rosa_lightning.comparison.runner import RunFailedError
from rosa_lightning.models.loading import load_base
from rosa_lightning.roae.inject import PEFT_ADAPTER
from rosa_lightning.roae.layer import RoAEConfig


class Display:
    def __init__(self):
        self.ended = []

    def begin(self, run): ...

    def at(self, step, steps): ...

    def end(self, run, result):
        self.ended.append((run.method, run.learning_rate, run.seed))


def record(loss, seconds=10.0):
    return {
        "status": "finished",
        "step": 4,
        "train_seconds": seconds,
        "examples": 40,
        "peak_mib": 100.0,
        "backward_share": 1.0,
        "trainable_parameters": 8,
        "checkpoint": None,
        "validations": [
            {"step": 2, "val/loss": loss + 1},
            {"step": 4, "val/loss": loss},
        ],
    }


@pytest.fixture
def trained(monkeypatch):
    """Trainings whose loss is a function of method, rate and seed; what was asked of them."""
    asked = []

    def fit(base, overrides, folder, progress):
        rate, seed = overrides["optimizer"]["init_args"]["lr"], overrides["seed_everything"]
        asked.append((folder.parent.name, rate, seed, overrides["trainer"]["max_steps"]))
        if folder.parent.name == "broken":
            raise RunFailedError("exit status 1: it diverged")
        best = {"a": 1e-2, "b": 1e-3}.get(folder.parent.name, 1e-3)
        return record(abs(rate - best) * 100 + 0.1 * seed, 2.0 * overrides["trainer"]["max_steps"])

    monkeypatch.setattr(compare, "fit", fit)
    return asked


def comparison(folder, names=("a", "b"), **given):
    config = ComparisonConfig(
        **{
            "methods": {name: {} for name in names},
            "learning_rates": [1e-3, 3e-3, 1e-2],
            "seeds": [0, 1],
            "max_steps": 4,
            "test": False,
            "folder": str(folder),
            **given,
        }
    )
    methods = [Method(name, {}, 4, 8) for name in names]
    return Comparison(config, methods, 100, Display())


def test_each_method_takes_its_best_rate_for_all_seeds(trained, tmp_path):
    content = comparison(tmp_path).run()
    a, b = content["methods"]["a"], content["methods"]["b"]
    assert (a["learning_rate"], a["at_edge"]) == (1e-2, True)
    assert (b["learning_rate"], b["at_edge"]) == (1e-3, True)
    assert [run["val_loss"] for run in a["runs"]] == pytest.approx([0.0, 0.1])
    assert len(trained) == 2 * 3 + 2  # three rates with the first seed, one with the second
    assert content == json.loads((tmp_path / "comparison.json").read_text())
    assert {test["metric"] for test in content["tests"]} == {"val_loss"}


def test_a_method_with_rates_and_seeds_of_its_own(trained, tmp_path):
    own = {"comparison.learning_rates": [1e-3], "comparison.seeds": [0]}
    content = comparison(tmp_path, methods={"a": {}, "b": own}).run()
    assert len(content["methods"]["b"]["grid"]) == len(content["methods"]["b"]["runs"]) == 1
    assert [run["seed"] for run in content["methods"]["a"]["runs"]] == [0, 1]
    assert {(rate, seed) for name, rate, seed, _ in trained if name == "b"} == {(1e-3, 0)}


def test_it_goes_on_with_what_is_left(trained, tmp_path):
    first = comparison(tmp_path, seeds=[0])
    first.run()
    done = len(trained)
    later = comparison(tmp_path)
    later.run()
    assert trained[done:] == [("a", 1e-2, 1, 4), ("b", 1e-3, 1, 4)]
    assert len(later.display.ended) == 8  # what was done is shown too


def test_a_failed_run_is_a_row(trained, tmp_path):
    content = comparison(tmp_path, ("broken", "b"), reference="b").run()
    broken = content["methods"]["broken"]
    assert broken["learning_rate"] is None
    assert {run["error"] for run in broken["grid"]} == {"exit status 1: it diverged"}
    assert len(content["methods"]["b"]["runs"]) == 2


def test_other_settings_in_the_same_folder_are_refused(trained, tmp_path):
    comparison(tmp_path).run()
    with pytest.raises(ValueError, match="with other settings"):
        comparison(tmp_path, max_steps=8).run()


def test_a_run_that_was_killed_is_tried_again(trained, tmp_path, monkeypatch):
    def killed(*_):
        raise RunFailedError("exit status -9: ", killed=True)

    with monkeypatch.context() as patched:
        patched.setattr(compare, "fit", killed)
        rows = comparison(tmp_path, ("a",)).run()["methods"]["a"]["grid"]
        assert {row["status"] for row in rows} == {"failed"}
    assert comparison(tmp_path, ("a",)).run()["methods"]["a"]["learning_rate"] == 1e-2


def test_a_grid_is_extended_beyond_its_edge(trained, tmp_path):
    rates = [1e-4, 3e-4, 1e-3, 3e-3]
    content = comparison(tmp_path, ("a",), learning_rates=rates, extend_grid=True).run()
    found = content["methods"]["a"]
    assert found["learning_rate"] == pytest.approx(9e-3)
    assert not found["at_edge"]
    assert [row["learning_rate"] for row in found["grid"]] == pytest.approx([*rates, 9e-3, 27e-3])


def test_equal_time_gives_as_many_steps_as_it_allows(trained, tmp_path):
    comparison(tmp_path, ("a",), max_steps=None, train_seconds=50.0).run()
    assert trained[-1][3] == 25  # two seconds a step


def test_the_best_validation_counts_and_a_diverged_run_has_none():
    assert summary(record(0.5))["val_loss"] == 0.5
    found = summary(record(float("nan")))
    assert (found["status"], found["val_loss"]) == ("diverged", None)


@pytest.mark.parametrize(
    "method",
    [
        RoAEConfig(rank=4, alpha=8.0),
        PeftMethod("peft.LoraConfig", {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}),
        PeftMethod(
            "peft.LoraConfig",
            {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "use_rslora": True},
        ),
    ],
)
def test_another_rank_has_the_same_scale(method):
    def scale(of):
        model = load_base("tiny")
        apply_method(model, of)
        module = model.get_submodule("model.layers.0.self_attn.q_proj")
        return module.scale if isinstance(of, RoAEConfig) else module.scaling[PEFT_ADAPTER]

    assert scale(_with_rank(method, 16)) == pytest.approx(scale(method))


def test_extending_takes_two_rates(tmp_path):
    with pytest.raises(ValueError, match="two learning rates"):
        comparison(tmp_path, learning_rates=[1e-3], extend_grid=True)


def test_a_measurement_of_time_that_fails_is_a_row(tmp_path, trained):
    content = comparison(tmp_path, ("broken",), max_steps=None, train_seconds=9.0).run()
    assert content["methods"]["broken"]["grid"][0]["status"] == "failed"


@pytest.mark.slow
def test_the_command_compares_methods_of_the_embedded_base(tmp_path, capsys):
    lora = {"class_path": "peft.LoraConfig", "init_args": {"r": 2, "target_modules": ["q_proj"]}}
    plan = {
        "folder": str(tmp_path / "compared"),
        "methods": {"LoRA": {"model.peft": lora, "dls.policy": "all"}, "RoSA": {}},
        "trainable_parameters": 10_000,
        "learning_rates": [1e-2],
        "max_steps": 4,
    }
    file = tmp_path / "plan.yaml"
    file.write_text(yaml.safe_dump({"comparison": plan, "trainer": {"val_check_interval": 2}}))
    tests = json.dumps([{"name": "demo", "path": "DEMO", "max_examples": 4}])
    demo = str(tmp_path / "demo.jsonl")
    rows = [{"instruction": f"How many? {n}", "output": "3", "answer": "3"} for n in range(4)]
    (tmp_path / "demo.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["compare", "--config", "configs/tiny.yaml", "--config", str(file)]
    command += [f"--data.test_sources={tests.replace('DEMO', demo)}", "--data.val_fraction=0.01"]
    assert main(command) == 0
    content = json.loads((tmp_path / "compared" / "comparison.json").read_text())
    for method in content["methods"].values():
        assert abs(method["trainable_parameters"] / 10_000 - 1) < 0.3
        assert method["runs"][0]["trainable_parameters"] == method["trainable_parameters"]
    assert (tmp_path / "compared" / "report.html").exists()
    folders = [str(tmp_path / "compared" / m / "lr-0.01-seed-0") for m in ("LoRA", "RoSA")]
    assert main(["compare", *folders]) == 0
    assert "generate/demo" in capsys.readouterr().out
    assert main(command) == 0  # all is done: nothing is trained
