"""A comparison from its plan to its results, with trainings of numbers alone, and a real one."""

import json
from pathlib import Path
from typing import ClassVar

import pytest
import yaml

from rosa_lightning.cli.main import main
from rosa_lightning.comparison.compare import Comparison, summary
from rosa_lightning.comparison.plan import ComparisonConfig, Method
from rosa_lightning.comparison.runner import RunFailedError, Runner
from rosa_lightning.utils.files import file_digest


class Display:
    def __init__(self):
        self.ended = []

    def begin(self, kind, run): ...

    def at(self, step, steps): ...

    def end(self, kind, run, result, *, known=False):
        self.ended.append((kind, run.method, known))


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


class Trainings(Runner):
    """Trainings whose loss is a function of method, rate and seed; what was asked of them."""

    asked: ClassVar[list[tuple[str, float, int, int]]] = []

    def fit(self, folder, progress):
        overrides = yaml.safe_load((folder / "overrides.yaml").read_text())
        rate, seed = overrides["optimizer"]["init_args"]["lr"], overrides["seed_everything"]
        self.asked.append((folder.parent.name, rate, seed, overrides["trainer"]["max_steps"]))
        if folder.parent.name == "broken":
            raise RunFailedError("exit status 1: it diverged")
        best = {"a": 1e-2, "b": 1e-3}.get(folder.parent.name, 1e-3)
        return record(abs(rate - best) * 100 + 0.1 * seed, 2.0 * overrides["trainer"]["max_steps"])

    def text_loss(self, folder, ckpt_path, texts, progress):
        found = {"loss": 2.0, "tokens": 4, "texts": file_digest(texts), "by_text": [[8.0, 4]]}
        (folder / "text_loss.json").write_text(json.dumps(found))
        return found


@pytest.fixture
def trained(monkeypatch):
    monkeypatch.setattr(Trainings, "asked", [])
    return Trainings.asked


def comparison(folder, names=("a", "b"), others=None, **given):
    others = others or {}
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
    return Comparison(config, methods, 100, Trainings(folder / "shared.yaml"), Display(), **others)


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


def test_all_runs_validate_on_the_same_records(trained, tmp_path):
    comparison(tmp_path, others={"split_seed": 7}).run()
    runs = [yaml.safe_load(path.read_text())["data"] for path in tmp_path.rglob("overrides.yaml")]
    assert {(run["seed"], run["loading"]["split_seed"]) for run in runs} == {(0, 7), (1, 7)}


def test_it_goes_on_with_what_is_left(trained, tmp_path):
    first = comparison(tmp_path, seeds=[0])
    first.run()
    done = len(trained)
    later = comparison(tmp_path)
    later.run()
    assert trained[done:] == [("a", 1e-2, 1, 4), ("b", 1e-3, 1, 4)]
    assert [known for *_, known in later.display.ended] == 6 * [True] + 2 * [False]


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
        patched.setattr(Trainings, "fit", killed)
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


def test_extending_takes_two_rates(tmp_path):
    with pytest.raises(ValueError, match="two learning rates"):
        comparison(tmp_path, learning_rates=[1e-3], extend_grid=True)


def test_a_measurement_of_time_that_fails_is_a_row(tmp_path, trained):
    content = comparison(tmp_path, ("broken",), max_steps=None, train_seconds=9.0).run()
    assert content["methods"]["broken"]["grid"][0]["status"] == "failed"


def test_general_text_is_added_to_a_comparison_that_is_done(trained, tmp_path):
    before = comparison(tmp_path).run()
    done = len(trained)
    texts = tmp_path / "general_text.jsonl"
    for content in ("one", "another"):  # other texts are read anew
        texts.write_text(json.dumps({"text": content}))
        after = comparison(tmp_path, others={"texts": texts}).run()
        kept = {run["text_loss"]["texts"] for m in after["methods"].values() for run in m["runs"]}
        assert kept == {after["base"]["text_loss"]["texts"]} == {file_digest(texts)}
    assert len(trained) == done
    assert after["forgetting"]["a"]["text_loss"]["mean"] == 0.0
    losses = [[run["val_loss"] for run in m["runs"]] for m in after["methods"].values()]
    assert losses == [[run["val_loss"] for run in m["runs"]] for m in before["methods"].values()]


def test_settings_written_in_another_way_are_the_same(trained, tmp_path):
    """As where a release has added a key, whose default stands in what is written now."""

    def whole(files):
        texts = [file.read_text() if isinstance(file, Path) else file for file in files[1:]]
        given = yaml.safe_load("".join(texts))
        return json.dumps({"new": {"key": 0}, **given}, sort_keys=True)

    comparison(tmp_path, ("a",)).run()
    done = len(trained)
    config = ComparisonConfig(
        methods={"a": {}},
        learning_rates=[1e-3, 3e-3, 1e-2],
        seeds=[0, 1],
        max_steps=4,
        test=False,
        folder=str(tmp_path),
    )
    runner = Trainings(tmp_path / "shared.yaml", whole)
    Comparison(config, [Method("a", {"new.key": 0}, 4, 8)], 100, runner, Display()).run()
    assert len(trained) == done
    with pytest.raises(ValueError, match="other settings"):
        Comparison(config, [Method("a", {"new.key": 1}, 4, 8)], 100, runner, Display()).run()


SGD = "--comparison.methods={SGD: {optimizer: {class_path: torch.optim.SGD}}}"
CHECKPOINTS = "lightning.pytorch.callbacks.ModelCheckpoint"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--trainer.callbacks+=rosa_lightning.RunRecorder"], "Take it out of trainer.callbacks"),
        ([f"--trainer.callbacks={CHECKPOINTS}"], "a comparison needs the best checkpoint"),
        ([f"--trainer.callbacks+={CHECKPOINTS}", "--trainer.callbacks.dirpath=a"], "has a dirpath"),
        (["--trainer.val_check_interval=0.5"], "is no number of optimizer steps"),
        (["--trainer.val_check_interval=3"], "end without a validation"),
        # An optimizer of a method's own has no learning rate but the comparison's.
        ([SGD, "--trainer.val_check_interval=3"], "end without a validation"),
        (["--comparison.max_steps=null", "--trainer.max_steps=-1"], "the runs have no end"),
        (["--comparison.reference=none"], "is none of the methods"),
        (["--comparison=null"], "nothing to compare is given"),
        (["one_run"], "1 folders of tests are given"),
    ],
)
def test_a_plan_that_cannot_be_run_is_a_wrong_configuration_and_leaves_nothing(
    given, words, tmp_path, capsys
):
    plan = {"methods": {"RoSA": {}}, "folder": str(tmp_path / "made"), "max_steps": 80}
    command = ["compare", "--config", "configs/tiny.yaml", f"--comparison={json.dumps(plan)}"]
    try:
        status = main([*command, *given])
    except SystemExit as ending:  # of the parser
        status = ending.code
    assert status == 2
    assert words in capsys.readouterr().err
    assert not [*tmp_path.iterdir()]


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
    command += ["--data.loading.split_seed=5"]
    assert main(command) == 0
    made = [yaml.safe_load(one.read_text()) for one in tmp_path.rglob("lr-*/overrides.yaml")]
    assert [run["data"]["loading"]["split_seed"] for run in made] == [5, 5]
    content = json.loads((tmp_path / "compared" / "comparison.json").read_text())
    for method in content["methods"].values():
        assert abs(method["trainable_parameters"] / 10_000 - 1) < 0.3
        assert method["runs"][0]["trainable_parameters"] == method["trainable_parameters"]
    assert (tmp_path / "compared" / "report.html").exists()
    folders = [str(tmp_path / "compared" / m / "lr-0.01-seed-0") for m in ("LoRA", "RoSA")]
    assert main(["compare", *folders]) == 0
    assert "generate/demo" in capsys.readouterr().out
    assert main(command) == 0  # all is done: nothing is trained
