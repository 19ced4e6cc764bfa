"""The validation split."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from rosa_lightning import ReasoningDataModule
from rosa_lightning.data.contamination import normalized_question
from rosa_lightning.data.settings import LoadingConfig
from rosa_lightning.data.training_set import validation_split
from rosa_lightning.tasks.records import Record


def record(instruction, source="s", index=1, context=""):
    return Record(instruction, context, "output", None, "text", source, index)


@given(
    sources=st.lists(
        st.lists(st.integers(0, 30), max_size=60).map(lambda n: [f"Question {i}?" for i in n]),
        min_size=1,
        max_size=4,
    ),
    fraction=st.floats(0, 0.99),
    seed=st.integers(0, 5),
)
def test_equal_questions_stay_on_one_side_and_every_source_keeps_records(sources, fraction, seed):
    records = [[record(text) for text in texts] for texts in sources]
    masks = validation_split(records, fraction, seed)
    sides = [set(), set()]
    for texts, mask in zip(sources, masks, strict=True):
        assert len(mask) == len(texts)
        assert not texts or not mask.all()
        for text, held in zip(texts, mask, strict=True):
            sides[int(held)].add(text)
    assert not sides[0] & sides[1]


@given(size=st.integers(2, 300), fraction=st.floats(0, 0.9), seed=st.integers(0, 3))
def test_fraction_of_different_questions_is_exact(size, fraction, seed):
    (mask,) = validation_split([[record(f"Question {n}?") for n in range(size)]], fraction, seed)
    wanted = min(size - 1, max(1, round(size * fraction))) if fraction else 0
    assert mask.sum() == wanted


def test_split_depends_on_seed_and_question_and_not_on_order():
    records = [record(f"Question {n}?") for n in range(100)]
    (mask,), (backwards,) = (validation_split([some], 0.1, 0) for some in (records, records[::-1]))
    assert np.array_equal(mask, backwards[::-1])
    assert not np.array_equal(mask, validation_split([records], 0.1, 1)[0])
    # As earlier versions chose.
    assert np.flatnonzero(mask).tolist() == [3, 8, 17, 20, 25, 40, 49, 73, 84, 96]


def test_questions_that_differ_in_case_and_punctuation_are_equal():
    first, second = record("What is  2 + 2?"), record("what is 2, 2")
    assert normalized_question(first) == normalized_question(second) == "what is 2 2"
    assert normalized_question(record("What is 2?", context="Now")) == "what is 2 now"
    assert len({normalized_question(record(text)) for text in ["你好", "再见", "+", "-"]}) == 4


def test_the_split_seed_keeps_the_validation_records_while_the_seed_changes_the_order(
    sources,
):
    def read(seed, split_seed):
        loading = LoadingConfig(split_seed=split_seed, cache_dir=None)
        data = ReasoningDataModule(sources=sources, seed=seed, val_fraction=0.2, loading=loading)
        data.tokenizer = "tiny"
        data.setup("fit")
        held = [batch["input_ids"].tolist() for batch in data.val_dataloader()]
        first = next(iter(data.train_dataloader()))["input_ids"].tolist()
        return held, first

    (held, first), (other_held, other_first) = read(0, 5), read(1, 5)
    assert held == other_held
    assert first != other_first
    alone = [read(seed, None)[0] for seed in (0, 1)]
    assert held != alone[0] != alone[1] != held
