"""The data module: settings, stages, and what a Trainer sees of the mixture."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger

from rosa_lightning.data.records import load_records
from rosa_lightning.data.sources import Source
from rosa_lightning.tasks.records import TASKS
from tests import ranks
from tests.conftest import data_module
from tests.data.test_tokenization import byte_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore")

TOKENIZER = byte_tokenizer()
SIZES = {"a": 37, "b": 23, "c": 9}
WEIGHTS = {"a": 0.5, "b": 0.2, "c": 0.3}


class Recorder(LightningModule):
    """Trains nothing; notes which records it sees."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen, self.validated, self.noise = [], [], []
        self.tokenizer = TOKENIZER

    def training_step(self, batch, batch_idx):
        names = batch["source"].tolist()
        self.seen.append(list(zip(names, batch["index"].tolist(), strict=True)))
        self.noise.append(torch.rand(1).item())
        return self.weight.sum()

    def validation_step(self, batch, batch_idx):
        self.validated += batch["index"].tolist()

    def test_step(self, batch, batch_idx):
        pass

    def predict_step(self, batch, batch_idx):
        return [batch["prompt"], batch["source"], batch["index"].tolist(), batch["reference"]]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.0)


@pytest.fixture
def folder(tmp_path):
    for name, size in SIZES.items():
        rows = [
            {"instruction": f"{name} {n}?", "output": f"The answer is {n}.", "answer": n}
            for n in range(size)
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(text)
    return tmp_path


def sources(folder, weights=WEIGHTS):
    return [{"path": str(folder / f"{name}.jsonl"), "weight": w} for name, w in weights.items()]


def data(folder, **settings):
    defaults = {"sources": sources(folder), "batch_size": 4, "val_fraction": 0.1, "seed": 3}
    return data_module(**{**defaults, **settings})


def trainer(**options):
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "accelerator": "cpu",
        "num_sanity_val_steps": 0,
    }
    return Trainer(**{**quiet, **options})


def fit(data_module, ckpt_path=None, **options):
    module, a_trainer = Recorder(), trainer(**options)
    a_trainer.fit(module, datamodule=data_module, ckpt_path=ckpt_path)
    return module, a_trainer


# Settings.


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"batch_size": 0}, ValueError, "batch_size=0 is below 1"),
        ({"val_fraction": 1.0}, ValueError, r"val_fraction=1.0 is outside \[0, 1\)"),
        ({"prompt_style": "chatml"}, ValueError, "'chatml' is none of alpaca, chat, plain"),
        ({"stop": "never"}, ValueError, "stop='never' is none of total, first_exhausted, over"),
        ({"temperature": float("nan")}, ValueError, "temperature=nan is no number above 0"),
        ({"tokens_per_batch": 100}, ValueError, "tokens_per_batch=100 is below max_length=512"),
        (
            {"temperature": 2, "sources": [{"path": "a.json", "weight": 1}]},
            ValueError,
            r"temperature=2 sets the shares by size, but there are weights .* \(a\)",
        ),
        (
            {"test_sources": [{"path": "a.jsonl", "stream": True}]},
            ValueError,
            "a in data.test_sources has stream: true; only training sources",
        ),
        ({"sources": 5}, TypeError, "sources is 5; expected demo, a source or a list"),
        ({"sources": []}, ValueError, "data.sources names no source"),
        ({"test_sources": [{"path": "x/a"}, {"path": "y/a"}]}, ValueError, "are named 'a'"),
        (
            {"sources": [{"path": "a", "weight": 0}, {"path": "b", "weight": 0}]},
            ValueError,
            "weights in data.sources sum to zero",
        ),
        (
            {"sources": [{"path": "a", "weight": 1}, {"path": "b"}]},
            ValueError,
            r"some sources have a weight and others not \(b\)",
        ),
    ],
)
def test_setting_that_cannot_be_used_is_one_clear_line(settings, error, words):
    with pytest.raises(error, match=words) as caught:
        data_module(**settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("stage", ["test", "predict"])
def test_stage_without_sources_names_the_setting(folder, stage):
    with pytest.raises(ValueError, match=rf"data\.{stage}_sources"):
        data(folder, tokenizer=TOKENIZER).setup(stage)


def test_validation_without_held_out_records_names_the_setting(folder):
    with pytest.raises(ValueError, match=r"data\.val_fraction=0\.0"):
        data(folder, tokenizer=TOKENIZER, val_fraction=0.0).setup("validate")


def test_no_tokenizer_and_unknown_tokenizer_are_one_clear_line(folder):
    with pytest.raises(ValueError, match=r"data\.tokenizer is not set"):
        data(folder).setup("fit")
    with pytest.raises(ValueError, match=r"tokenizer of base 'no/such'.*data\.tokenizer") as caught:
        data(folder, tokenizer="no/such").setup("fit")
    assert "\n" not in str(caught.value)


# Reading.


def test_held_out_records_are_not_trained_on(folder):
    module, _ = fit(data(folder), max_epochs=4)
    trained_on = {pair for batch in module.seen for pair in batch}
    # A tenth of 37, 23 and 9, rounded.
    assert len(module.validated) / 4 == 4 + 2 + 1
    assert len(trained_on) == 37 + 23 + 9 - 7


def test_cut_records_are_counted_in_a_warning(folder):
    module = data(folder, tokenizer=TOKENIZER, max_length=22, prompt_style="plain")
    with pytest.warns(UserWarning, match=r"source a: 27 of 37 records .*data\.max_length=22"):
        module.setup("fit")


def test_setup_reads_once(folder):
    tested = sources(folder, {"a": None})
    module = data(folder, tokenizer=TOKENIZER, test_sources=tested, decontaminate=False)
    for stage in ("fit", "validate", "test"):
        module.setup(stage)
    for name in SIZES:
        (folder / f"{name}.jsonl").unlink()
    for stage in ("fit", "validate", "test"):
        module.setup(stage)
    assert len(module.test_dataloader().dataset) == 37


def contaminated(folder, **settings):
    """Tested on three questions of source a, in other spelling, one of b, and one of its own."""
    rows = ["A: 3?", "a 4", "a  5!", "b 7?", "z 1?"]
    text = "".join(json.dumps({"instruction": row, "answer": "1"}) + "\n" for row in rows)
    (folder / "asked.jsonl").write_text(text)
    tested = [{"path": str(folder / "asked.jsonl"), "task": "svamp"}]
    return data(folder, tokenizer=TOKENIZER, test_sources=tested, **settings)


@pytest.mark.parametrize("stage", ["fit", "validate"])
def test_test_questions_are_neither_trained_on_nor_validated_on(folder, stage, caplog):
    module = contaminated(folder, val_fraction=0.3)
    with caplog.at_level("INFO"):
        module.setup(stage)
    records = [example.record for source in module._set.train for example in source]
    asked = {
        record.instruction
        for record in [*records, *(ex.record for source in module._set.val for ex in source)]
    }
    everything = {f"{name} {n}?" for name, size in SIZES.items() for n in range(size)}
    assert asked == everything - {"a 3?", "a 4?", "a 5?", "b 7?"}
    assert "a: 3 of 37 records left out, whose questions are also in data.test_s" in caplog.text
    assert "b: 1 of 23 records left out" in caplog.text
    assert caplog.text.count("left out") == 2


def test_a_source_of_test_questions_alone_is_refused(folder):
    module = data(folder, tokenizer=TOKENIZER, test_sources=sources(folder, {"c": None}))
    with pytest.raises(ValueError, match=r"source c: .* all 9 records stand in data\.test_sources"):
        module.setup("fit")


@pytest.mark.parametrize("decontaminate", [True, False])
def test_contaminated_questions_are_those_that_were_trained_on(folder, decontaminate):
    module = contaminated(folder, decontaminate=decontaminate)
    module.setup("test")
    records, places = module.contaminated_records()  # nothing was left out of a training yet
    assert [record.index for record in records] == [1, 2, 3, 4]
    assert places == [source.path for source in module.sources]
    module.setup("fit")
    left = [record.index for record in module.contaminated_records()[0]]
    assert left == ([] if decontaminate else [1, 2, 3, 4])


def test_contamination_looks_at_the_records_that_were_drawn_for_the_training(folder):
    drawn = {"path": str(folder / "a.jsonl"), "max_examples": 5}
    tested = [{"path": str(folder / "a.jsonl"), "task": "svamp"}]
    settings = {"sources": [drawn], "test_sources": tested, "decontaminate": False}
    module = data(folder, tokenizer=TOKENIZER, val_fraction=0.0, split_seed=11, **settings)
    module.setup("test")
    module.setup("fit")
    trained = {example.record.index for source in module._set.train for example in source}
    assert len(trained) == 5
    assert {record.index for record in module.contaminated_records()[0]} == trained


def test_a_test_source_out_of_reach_is_warned_of_and_the_others_are_compared(folder, monkeypatch):
    module = contaminated(folder)
    module.test_sources.insert(0, Source(hub="a/b"))

    def unreachable(source, purpose="train", tasks=TASKS, seed=0, cache=None):
        if source.hub:
            raise OSError("No network.")
        return load_records(source, purpose, tasks, seed, cache)

    for reads in ("datamodule", "contamination"):
        monkeypatch.setattr(f"rosa_lightning.data.{reads}.load_records", unreachable)
    module.prepare_data()
    with pytest.warns(UserWarning, match=r"not compared with test source b, .* No network\."):
        module.setup("fit")
    assert len(module._set.train[0]) + len(module._set.val[0]) == 34
    module = data(folder, tokenizer=TOKENIZER, test_sources=[{"path": "none.json"}])
    with pytest.raises(OSError, match=r"none\.json"):
        module.setup("fit")


def test_task_names_cover_validation_and_test(folder):
    given = [{"path": str(folder / "a.jsonl"), "task": "svamp"}]
    tested = [Source(path="boolq.json")]
    module = data(folder, sources=given, test_sources=tested, decontaminate=False)
    fit(module, max_epochs=1)
    assert module.task_names == ["boolq", "svamp"]


def test_predict_sources_may_be_records_or_lines_of_text(folder):
    (folder / "ask.txt").write_text("One?\nTwo?\n")
    given = [str(folder / "ask.txt"), {"path": str(folder / "c.jsonl"), "name": "records"}]
    module = data(folder, predict_sources=given)
    (first, *_, last) = trainer().predict(Recorder(), datamodule=module)
    assert first[0] == ["One?", "Two?", "c 0?", "c 1?"]
    assert first[1] == ["ask", "ask", "records", "records"]
    assert first[2] == [1, 2, 1, 2]
    assert first[3] == [None, None, "0", "1"]
    assert last[2][-1] == 9


# Shares.


def test_shares_are_counted_logged_and_said(folder):
    module = data(folder)
    logger = CSVLogger(folder)
    fit(module, max_epochs=2, logger=logger, log_every_n_steps=5)
    assert {k: n / 124 for k, n in module.examples_seen().items()} == pytest.approx(
        WEIGHTS, abs=0.02
    )
    # One epoch has 62 records, and 62 * 0.3 = 18.6 of them of 8 in the training part of c.
    line = "c: 8 training records, 30 % of each epoch, so each is seen 2.3 times"
    assert line in module.training_summary()
    rows = Path(logger.log_dir, "metrics.csv").read_text().splitlines()
    assert rows[0].split(",") == ["step", "train/share/a", "train/share/b", "train/share/c"]
    assert [row.split(",")[0] for row in rows[1:]] == ["5", "10", "15", "20", "25", "30"]


def test_another_training_with_the_same_data_counts_and_begins_anew(folder):
    module = data(folder)
    first, _ = fit(module, max_steps=7)
    second, _ = fit(module, max_steps=7)
    assert first.seen == second.seen
    assert sum(module.examples_seen().values()) == 28


def test_training_on_without_a_checkpoint_goes_on_in_the_order(folder):
    straight, _ = fit(data(folder), max_epochs=2)
    module, a_trainer = fit(data(folder), max_epochs=1)
    a_trainer.fit_loop.max_epochs = 2
    a_trainer.fit(module, datamodule=a_trainer.datamodule)
    assert module.seen == straight.seen


# On disk.


def on_disk(folder, names="abc", suffix="jsonl"):
    given = [{"path": str(folder / f"{name}.{suffix}"), "weight": WEIGHTS[name]} for name in names]
    return [{**source, "stream": True} for source in given]


@pytest.mark.parametrize("settings", [{}, {"num_workers": 2}, {"seed": 4}, {"overlong": "drop"}])
def test_records_on_disk_are_those_in_memory_in_the_same_order(folder, settings):
    settings = {"max_length": 22, "prompt_style": "plain", "batching": "random", **settings}
    memory, _ = fit(data(folder, **settings), max_epochs=2)
    disk, _ = fit(data(folder, **settings, sources=on_disk(folder)), max_epochs=2)
    assert disk.seen == memory.seen
    assert disk.validated == memory.validated


def test_large_files_stay_on_disk_unless_told_otherwise(folder, monkeypatch):
    size = (folder / "a.jsonl").stat().st_size
    monkeypatch.setattr("rosa_lightning.data.rows._STREAM_FROM", size)
    given = [{"path": str(folder / f"{name}.jsonl")} for name in "abc"]
    given.append({"path": str(folder / "a.jsonl"), "name": "told", "stream": False})
    module = data(folder, sources=given, tokenizer=TOKENIZER)
    module.setup("fit")
    said = "\n".join(module.training_summary())
    assert re.findall(r"(\w+): \d+ training records, on disk", said) == ["a"]


# Resuming.


class SaveAt(Callback):
    """Saves one checkpoint, at the end of a batch, of an epoch, or of a validation."""

    def __init__(self, path, moment, number):
        self.path, self.moment, self.number, self.seen_then = path, moment, number, None

    def _save(self, a_trainer, moment):
        if moment == self.moment:
            self.number -= 1
            if self.number == 0:
                a_trainer.save_checkpoint(self.path)
                self.seen_then = len(a_trainer.lightning_module.seen)

    def on_train_batch_end(self, a_trainer, *_):
        self._save(a_trainer, "batch")

    def on_train_epoch_end(self, a_trainer, *_):
        self._save(a_trainer, "epoch")

    def on_validation_end(self, a_trainer, *_):
        self._save(a_trainer, "validation")


@pytest.mark.parametrize(
    ("moment", "number", "options"),
    [
        ("batch", 21, {"max_epochs": 2}),
        ("batch", 16, {"max_epochs": 2}),
        ("epoch", 1, {"max_epochs": 2}),
        ("validation", 1, {"max_epochs": 2, "val_check_interval": 5}),
        ("epoch", 1, {"max_steps": 15}),
        ("epoch", 2, {"max_epochs": 4, "limit_train_batches": 9}),
        ("batch", 12, {"max_epochs": 4, "limit_train_batches": 9}),
    ],
)
def test_resumed_run_sees_exactly_the_records_that_follow(folder, moment, number, options):
    path = str(folder / "saved.ckpt")
    save = SaveAt(path, moment, number)
    options = {"accumulate_grad_batches": 2, **options}
    straight_data, resumed_data = data(folder), data(folder)
    straight, _ = fit(straight_data, callbacks=[save], **options)
    resumed, _ = fit(resumed_data, ckpt_path=path, **options)
    assert save.seen_then
    assert resumed.seen == straight.seen[save.seen_then :]
    assert resumed_data.examples_seen() == straight_data.examples_seen()


def test_resuming_with_other_data_warns(folder):
    path = str(folder / "saved.ckpt")
    fit(data(folder), callbacks=[SaveAt(path, "batch", 3)], max_steps=5)
    with pytest.warns(UserWarning, match="differ from the checkpoint's: seed was 3 and is 4"):
        fit(data(folder, seed=4), ckpt_path=path, max_steps=5)


def test_overfit_batches_repeat_the_same_records(folder):
    module, _ = fit(data(folder), overfit_batches=3, max_epochs=2)
    assert len(module.seen) == 6
    assert module.seen[:3] == module.seen[3:]


MODES = {
    "random": {"batching": "random"},
    "length": {},
    "packed": {"batching": "packed"},
    "tokens": {"tokens_per_batch": 300, "max_length": 256},
    "packed tokens": {"batching": "packed", "tokens_per_batch": 300, "max_length": 256},
}


def on_two_ranks(folder):
    results = {}
    for mode, settings in MODES.items():
        module, trainer = fit(data(folder, **settings), strategy="ddp", devices=2, max_epochs=2)
        results[mode] = {"seen": module.seen, "trained_on": trainer.datamodule.examples_seen()}
    return results


def test_two_processes_share_the_mixture(folder):
    seen = ranks.launch(on_two_ranks, folder)
    for mode, settings in MODES.items():
        streams = [rank[mode]["seen"] for rank in seen]
        assert [len(batch) for batch in streams[0]] == [len(batch) for batch in streams[1]]
        turns = (zip(*batches, strict=True) for batches in zip(*streams, strict=True))
        joint = [pair for batches in turns for turn in batches for pair in turn]
        counted = Counter(source for source, _ in joint)
        expected = {"a": counted[0], "b": counted[1], "c": counted[2]}
        assert [rank[mode]["trained_on"] for rank in seen] == [expected] * 2
        alone = [
            pair for batch in fit(data(folder, **settings), max_epochs=2)[0].seen for pair in batch
        ]
        if mode == "random":
            assert joint == alone
        if "tokens" not in mode:  # two epochs of tokens need not end where two passes do
            assert Counter(joint) == Counter(alone)


def test_test_prompts_come_longest_first_and_each_once_whatever_the_number_of_ranks():
    from rosa_lightning.data.sampling import LengthSortedSampler

    lengths = [3, 9, 4, 9, 1, 7, 2]
    assert list(LengthSortedSampler(lengths)) == [1, 3, 5, 2, 0, 6, 4]
    for world in (2, 3, 8):
        shares = [list(LengthSortedSampler(lengths, world, rank)) for rank in range(world)]
        assert sorted(place for share in shares for place in share) == list(range(7))
        assert [len(LengthSortedSampler(lengths, world, rank)) for rank in range(world)] == [
            len(share) for share in shares
        ]
