"""Batches of examples."""

import pickle

import torch

from rosa_lightning.data.collators import IGNORE_INDEX, PromptCollator, TrainCollator
from rosa_lightning.data.encoding import Encoder
from tests.data.test_tokenization import PLAIN, WITH_BOS, record

RECORDS = [
    record("One", "it is true", "true", "boolq", "a", 3),
    record("A longer one", "5", "5", "gsm8k", "b", 7),
]


def test_training_batch_is_right_aligned_with_loss_on_the_response_alone():
    examples = Encoder(WITH_BOS, "plain")(RECORDS)
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
    examples = Encoder(PLAIN, "plain", with_response=False)(RECORDS)
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
    examples = Encoder(PLAIN)(RECORDS)
    collator = TrainCollator(("a", "b"), pad_id=0)
    copied = pickle.loads(pickle.dumps((examples, collator)))
    assert copied == (examples, collator)
