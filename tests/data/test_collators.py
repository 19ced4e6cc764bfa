"""Token ids, batches, and the order in which records are trained on."""

import pickle
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.utils.data import SequentialSampler
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from rosa_lightning.data.collators import IGNORE_INDEX, PromptCollator, TrainCollator
from rosa_lightning.data.grouping import Grouping
from rosa_lightning.data.loading import Batched, MixtureSampler, ResumableLoader
from rosa_lightning.data.sampling import epoch_counts, epoch_order
from rosa_lightning.data.text_tokens import prompt_prefix
from rosa_lightning.data.tokenization import encode
from rosa_lightning.tasks.records import Record, prompt


def byte_tokenizer(*, adds="", merges=()):
    """A byte-level tokenizer; `adds` names what it puts around a text by default."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=259 + len(merges),
        special_tokens=special,
        initial_alphabet=sorted(alphabet),
        show_progress=False,
    )
    inner.train_from_iterator(list(merges) * 2, trainer)
    if adds:
        inner.post_processor = processors.TemplateProcessing(
            single=adds, special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


PLAIN = byte_tokenizer()
WITH_BOS = byte_tokenizer(adds="<s> $A")
WITH_BOTH = byte_tokenizer(adds="<s> $A </s>")
MERGING = byte_tokenizer(merges=["\n\n"])  # would merge across the border of prompt and response


def record(instruction="Say so", output="so", answer="so", task="text", source="a", index=1):
    return Record(instruction, "", output, answer, task, source, index)


def encode_one(given_record, tokenizer=PLAIN, **options):
    options = {"template": "plain", "max_length": 512, **options}
    (example,), count = encode([given_record], tokenizer, **options)
    return example, count


# Encoding.


@pytest.mark.parametrize(
    ("tokenizer", "prefix"), [(PLAIN, []), (WITH_BOS, [1]), (WITH_BOTH, [1]), (MERGING, [])]
)
def test_prompt_begins_with_what_the_tokenizer_adds_and_never_ends_with_eos(tokenizer, prefix):
    assert prompt_prefix(tokenizer) == prefix
    example, _ = encode_one(record(), tokenizer)
    assert tokenizer.decode(example.prompt) == "<s>" * len(prefix) + "Say so\n"


@pytest.mark.parametrize("tokenizer", [PLAIN, WITH_BOS, WITH_BOTH, MERGING])
@given(instruction=st.text(min_size=1), output=st.text(min_size=1))
def test_border_between_prompt_and_response_is_exact(tokenizer, instruction, output):
    example, count = encode_one(record(instruction, output), tokenizer, max_length=10_000)
    assert tokenizer.decode(example.prompt, skip_special_tokens=True) == f"{instruction}\n"
    assert example.response[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(example.response[:-1]) == output
    assert count.too_long == 0


def test_tokens_do_not_merge_across_the_border():
    merged = MERGING("Say so\n\nA", add_special_tokens=False)["input_ids"]
    assert "\n\n" in [MERGING.decode([token]) for token in merged]
    example, _ = encode_one(record(output="\nA"), MERGING)
    assert MERGING.decode(example.prompt) == "Say so\n"
    assert MERGING.decode(example.response) == "\nA</s>"


@pytest.mark.parametrize(
    ("output", "answer", "task", "span"),
    [
        ("the correct answer is true", "true", "boolq", "true</s>"),
        ("a\n#### 72", "72", "gsm8k", "72</s>"),
        ("é = 15. The answer is 15.", "15.0", "multiarith", "15.</s>"),
        ("72", "72", "demo", "72</s>"),
        ("The answer is 16 hours.", "16", "gsm8k", "The answer is 16 hours.</s>"),
        ("no answer", None, "text", "no answer</s>"),
    ],
)
def test_answer_begins_at_the_final_answer_or_else_at_the_response(output, answer, task, span):
    example, _ = encode_one(record(output=output, answer=answer, task=task))
    assert PLAIN.decode(example.response[example.answer :]) == span


def test_answer_begins_at_the_token_that_covers_its_first_character():
    tokenizer = byte_tokenizer(merges=[" true"])
    example, _ = encode_one(record(output="it is true", answer="true", task="boolq"), tokenizer)
    assert tokenizer.decode(example.response[example.answer :]).lstrip() == "true</s>"


def test_slow_tokenizers_take_the_whole_response_for_the_answer():
    tokenizer = ByT5Tokenizer()
    example, _ = encode_one(record(output="it is true", answer="true", task="boolq"), tokenizer)
    assert tokenizer.decode(example.response) == "it is true</s>"
    assert example.answer == 0


@given(
    size=st.integers(0, 40),
    reply=st.integers(1, 40),
    max_length=st.integers(8, 60),
    bos=st.booleans(),
)
def test_cut_records_keep_prefix_end_of_prompt_and_beginning_of_response(
    size, reply, max_length, bos
):
    text, output = "0123456789" * 4, "abcdefghij" * 4
    given_record = record(text[:size] or "?", output[:reply])
    asked = prompt(given_record, "plain")
    example, count = encode_one(given_record, WITH_BOS if bos else PLAIN, max_length=max_length)
    full = bos + len(asked) + reply + 1
    assert len(example.prompt) + len(example.response) == min(full, max_length)
    assert count.too_long == (full > max_length)
    assert example.prompt[0] == 1 or not bos
    kept = WITH_BOS.decode(example.prompt, skip_special_tokens=True)
    assert asked.endswith(kept)
    room = max_length - 1  # one token, BOS or the prompt's last, stays before the response
    assert count.responses_cut == (reply + 1 > room)
    answered = PLAIN.decode(example.response)
    assert answered == (output[:room] if reply + 1 > room else f"{output[:reply]}</s>")
    assert 0 <= example.answer < len(example.response)


def test_dropped_records_are_counted_and_left_out():
    records = [record("x" * size, index=size) for size in (5, 50, 6)]
    examples, count = encode(records, PLAIN, template="plain", max_length=20, overlong="drop")
    assert [example.record.index for example in examples] == [5, 6]
    assert (count.total, count.too_long, count.responses_cut) == (3, 1, 0)
    assert "1 of 3 records" in count.message("boolq", 20, "drop")


def test_prompts_to_answer_are_cut_and_never_dropped():
    example, count = encode_one(
        record("x" * 50 + "end"), WITH_BOS, max_length=8, overlong="drop", with_response=False
    )
    assert WITH_BOS.decode(example.prompt) == "<s>xxxend\n"
    assert len(example.response) == 0
    assert count.too_long == 1


def test_no_records_are_no_examples():
    assert encode([], PLAIN)[0] == []


def test_overlong_message_says_how_many_and_what_to_set():
    _, count = encode([record(), record("x" * 9), record(output="y" * 99)], PLAIN, max_length=8)
    assert count.message("boolq", 8, "cut") == (
        "source boolq: 3 of 3 records are longer than data.max_length=8 tokens and were cut "
        "(1 of them lost the end of their response); raise it or set data.overlong: drop."
    )


# Collation.

RECORDS = [
    record("One", "it is true", "true", "boolq", "a", 3),
    record("A longer one", "5", "5", "gsm8k", "b", 7),
]


def test_training_batch_is_right_aligned_with_loss_on_the_response_alone():
    examples, _ = encode(RECORDS, WITH_BOS, template="plain")
    batch = TrainCollator(("a", "b"), pad_id=0)(examples)
    texts = ["<s>One\nit is true</s>", "<s>A longer one\n5</s>"]
    lengths = [len(WITH_BOS(text, add_special_tokens=False)["input_ids"]) for text in texts]
    for row, (text, length) in enumerate(zip(texts, lengths, strict=True)):
        ids, labels = batch["input_ids"][row], batch["labels"][row]
        pad = max(lengths) - length
        assert WITH_BOS.decode(ids) == "<pad>" * pad + text
        assert batch["attention_mask"][row].tolist() == [0] * pad + [1] * length
        assert batch["position_ids"][row].tolist() == [0] * pad + list(range(length))
        on = labels != IGNORE_INDEX
        assert torch.equal(labels[on], ids[on])
        assert WITH_BOS.decode(labels[on]) == ["it is true</s>", "5</s>"][row]
        assert WITH_BOS.decode(ids[batch["answer_mask"][row]]) == ["true</s>", "5</s>"][row]
    assert batch["num_label_positions"] == len("it is true") + 1
    assert batch["source"].tolist() == [0, 1]
    assert batch["index"].tolist() == [3, 7]
    assert batch["task"] == ["boolq", "gsm8k"]
    whole = ["input_ids", "attention_mask", "position_ids", "labels", "source", "index"]
    assert {batch[name].dtype for name in whole} == {torch.int64}
    assert batch["answer_mask"].dtype == torch.bool


def test_prompt_batch_holds_prompts_alone_and_the_gold_answers():
    examples, _ = encode(RECORDS, PLAIN, template="plain", with_response=False)
    batch = PromptCollator(pad_id=0)(examples)
    assert PLAIN.batch_decode(batch["input_ids"], skip_special_tokens=True) == [
        "One\n",
        "A longer one\n",
    ]
    assert batch["attention_mask"].sum(1).tolist() == [4, 13]
    assert batch["attention_mask"][:, -1].tolist() == [1, 1]
    assert batch["position_ids"][:, -1].tolist() == [3, 12]
    assert batch["reference"] == ["true", "5"]
    assert batch["prompt"] == ["One", "A longer one"]
    assert batch["source"] == ["a", "b"]
    assert batch["index"].tolist() == [3, 7]


def test_examples_and_collators_can_be_sent_to_worker_processes():
    examples, _ = encode(RECORDS, PLAIN)
    collator = TrainCollator(("a", "b"), pad_id=0)
    copied = pickle.loads(pickle.dumps((examples, collator)))
    assert copied == (examples, collator)


# Order.

mixtures = st.lists(st.tuples(st.integers(1, 40), st.floats(0.05, 1)), min_size=1, max_size=5).map(
    lambda pairs: [list(column) for column in zip(*pairs, strict=True)]
)


def names_of(sizes):
    return [f"s{number}" for number in range(len(sizes))]


def source_of(order, sizes):
    return np.searchsorted(np.cumsum(sizes), order.numpy(), side="right")


@given(mixture=mixtures, total=st.integers(1, 300))
def test_counts_sum_to_the_total_and_are_within_one_of_their_shares(mixture, total):
    _, weights = mixture
    counts = epoch_counts(weights, total)
    assert sum(counts) == total
    for count, weight in zip(counts, weights, strict=True):
        assert abs(count - total * weight / sum(weights)) < 1 + 1e-6


def test_weights_in_proportion_to_the_sizes_see_every_record_once():
    sizes = [7, 11, 2]
    assert epoch_counts(sizes, sum(sizes)) == sizes
    order = epoch_order(sizes, sizes, names_of(sizes), 0, 0)
    assert sorted(order.tolist()) == list(range(20))


@given(mixture=mixtures, seed=st.integers(0, 3), epoch=st.integers(0, 4))
def test_every_prefix_of_an_epoch_is_mixed_as_the_whole_is(mixture, seed, epoch):
    sizes, weights = mixture
    total = sum(sizes)
    counts = epoch_counts(weights, total)
    which = source_of(epoch_order(sizes, counts, names_of(sizes), seed, epoch), sizes)
    assert np.bincount(which, minlength=len(sizes)).tolist() == counts
    for number, count in enumerate(counts):
        seen = np.cumsum(which == number)
        expected = np.arange(1, total + 1) * count / total
        others = sum(other > 0 for other in counts) - 1
        share = count / total
        assert np.abs(seen - expected).max() <= (1 - share) + share * others + 1e-6


@given(mixture=mixtures, seed=st.integers(0, 3), epochs=st.integers(1, 6))
def test_no_record_comes_again_before_all_of_its_source_have_come(mixture, seed, epochs):
    sizes, weights = mixture
    counts = epoch_counts(weights, sum(sizes))
    orders = [epoch_order(sizes, counts, names_of(sizes), seed, epoch) for epoch in range(epochs)]
    stream = torch.cat(orders)
    which = source_of(stream, sizes)
    for number, size in enumerate(sizes):
        mine = stream[torch.from_numpy(which == number)].tolist()
        for start in range(0, len(mine), size):
            piece = mine[start : start + size]
            assert len(set(piece)) == len(piece)


def test_order_depends_on_seed_and_epoch():
    sizes, counts = [20, 30], [25, 25]
    order = epoch_order(sizes, counts, ["a", "b"], 0, 0)
    assert torch.equal(order, epoch_order(sizes, counts, ["a", "b"], 0, 0))
    assert not torch.equal(order, epoch_order(sizes, counts, ["a", "b"], 1, 0))
    assert not torch.equal(order, epoch_order(sizes, counts, ["a", "b"], 0, 1))


def test_sources_take_turns_differently_in_each_epoch():
    turns = [
        source_of(epoch_order([20, 30], [25, 25], ["a", "b"], 0, epoch), [20, 30])
        for epoch in (0, 1)
    ]
    assert turns[0].tolist() != turns[1].tolist()


def sampler(num_replicas=1, rank=0, sizes=(20, 13), weights=(0.5, 0.5), batch_size=4):
    grouping = Grouping("random", batch_size)
    return MixtureSampler(sizes, weights, names_of(sizes), 0, grouping, num_replicas, rank)


@pytest.mark.parametrize("num_replicas", [2, 3, 4])
def test_ranks_together_follow_the_mixture_with_equally_many_records(num_replicas):
    ranks = [sampler(num_replicas, rank) for rank in range(num_replicas)]
    for epoch in (0, 1):
        for one in ranks:
            one.seek(epoch, 0)
        batches = [list(one) for one in ranks]
        assert {len(share) for share in batches} == {len(one) for one in ranks}
        shares = [[position for batch in share for position in batch] for share in batches]
        joint = [position for turn in zip(*shares, strict=True) for position in turn]
        whole = -(-33 // num_replicas) * num_replicas
        counts = epoch_counts([0.5, 0.5], whole)
        order = epoch_order([20, 13], counts, ["s0", "s1"], 0, epoch)
        assert joint == order.tolist()


def loader(**options):
    return ResumableLoader(
        Batched([range(33)]),  # type: ignore[list-item]
        sampler(),
        generator=torch.Generator(),
        collate_fn=list,
        **options,
    )


def passes(one, number):
    return [batch for _ in range(number) for batch in one]


def test_each_pass_is_the_next_epoch():
    counts = epoch_counts([0.5, 0.5], 33)
    orders = [epoch_order([20, 13], counts, ["s0", "s1"], 0, epoch) for epoch in range(3)]
    batches = passes(loader(), 3)
    assert [x for batch in batches for x in batch] == torch.cat(orders).tolist()
    assert len(loader()) == 9


@pytest.mark.parametrize(
    ("done", "num_workers"), [(0, 0), (1, 0), (8, 0), (9, 0), (13, 0), (13, 2)]
)
def test_loader_goes_on_from_its_saved_place(done, num_workers):
    expected = passes(loader(), 4)
    stopped = loader(num_workers=num_workers)
    stream = (batch for _ in range(4) for batch in stopped)
    seen = [next(stream) for _ in range(done)]
    state = stopped.state_dict()
    resumed = loader(num_workers=num_workers)
    resumed.load_state_dict(state)
    assert seen + passes(resumed, 2) == expected[: done + 18]


def test_loader_can_start_at_any_batch_of_the_training():
    expected = passes(loader(), 3)
    later = loader()
    later.seek(14)
    assert passes(later, 1) == expected[14:23]


def test_passes_cut_short_go_on_where_they_were_cut():
    expected, one = passes(loader(), 2), loader()
    found = [batch for _ in range(3) for batch, _ in zip(one, range(5), strict=False)]
    assert found[:5] == expected[:5]
    # zip asks for a sixth batch before it ends; a trainer does not.
    assert found[5:10] == expected[6:11]


def test_loader_takes_no_other_sampler():
    with pytest.raises(TypeError, match="takes a MixtureSampler, not a SequentialSampler"):
        ResumableLoader([1, 2], SequentialSampler([1, 2]))  # type: ignore[arg-type]


def test_no_global_random_generator_is_read():
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    passes(loader(), 2)
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]


def test_lightning_epochs_do_not_move_the_sampler():
    one = sampler()
    first = list(one)
    one.set_epoch(5)
    assert list(one) == first
