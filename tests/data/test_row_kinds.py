"""What rows of each kind become."""

import json

import pytest

from rosa_lightning.data.records import load_records
from rosa_lightning.data.sources import Source, as_source
from rosa_lightning.tasks.records import Turn

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "And 3 + 3?"},
    {"role": "assistant", "content": "It is 6."},
]
TURNS = tuple(Turn(turn["role"], turn["content"]) for turn in TALK[:-1])
ROLES = {"system": "system", "user": "human", "assistant": "gpt"}
SHARED = [{"from": ROLES[turn["role"]], "value": turn["content"]} for turn in TALK]


@pytest.fixture
def read(tmp_path):
    """Reads one row from a file."""

    def read(row, purpose="train", stream=None, **fields):
        path = tmp_path / "a.jsonl"
        path.write_text(json.dumps(row))
        source = Source(path=str(path), stream=stream, **fields)
        (record,) = load_records(source, purpose)
        return record

    return read


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "row",
    [
        {"messages": TALK},
        {"conversations": SHARED},
        {"conversations": TALK, "id": 3},
        {"messages": TALK[1:], "system": "Be brief."},
        {"messages": json.dumps(TALK)},
        {"messages": {key: [turn[key] for turn in TALK] for key in ("role", "content")}},
        {"messages": [*TALK, {"role": "user", "content": "Thanks"}]},
        {"messages": [{**t, "content": [{"type": "text", "text": t["content"]}]} for t in TALK]},
    ],
)
def test_conversations_in_every_spelling_are_the_same(read, row, stream):
    record = read(row, stream=stream)
    assert record.turns == TURNS
    assert (record.instruction, record.output, record.answer) == ("And 3 + 3?", "It is 6.", None)


@pytest.mark.parametrize(
    "row",
    [
        {"messages": TALK[1:3]},
        {"conversations": SHARED[1:3]},
        {"instruction": "What is 2 + 2?", "input": "", "output": "4"},
        {"prompt": "What is 2 + 2?", "completion": "4"},
        {"prompt": "What is 2 + 2?", "response": "4", "score": 1.5},
    ],
)
def test_a_question_and_its_reply_are_one_exchange_for_any_prompt_style(read, row):
    record = read(row)
    assert (record.instruction, record.input, record.output) == ("What is 2 + 2?", "", "4")
    assert record.turns == ()


def test_a_system_prompt_makes_a_conversation_of_an_exchange(read):
    row = {"instruction": "Add.", "input": "2, 2", "output": "4", "system": "Be brief."}
    assert read(row).turns == (Turn("system", "Be brief."), Turn("user", "Add.\n2, 2"))
    columns = {"system": "persona", "prompt": "q", "response": "a"}
    record = read({"persona": "Be brief.", "q": "Why?", "a": "So."}, columns=columns)
    assert record.turns == (Turn("system", "Be brief."), Turn("user", "Why?"))


def test_columns_stand_for_fields_and_the_others_are_not_read(read):
    row = {"question": "What is 2 + 2?", "text": "4", "answer": "no GSM8K", "gold": 4}
    columns = {"prompt": "question", "response": "text", "answer": "gold"}
    record = read(row, columns=columns, task="gsm8k")
    assert (record.instruction, record.output, record.answer) == ("What is 2 + 2?", "4", "4")
    assert read(row, "test", columns=columns, task="gsm8k").answer == "4"
    other = read(row, stream=True, columns={"prompt": "question", "response": "answer"})
    assert other.output == "no GSM8K"  # kept apart from what other columns gave


def test_calls_of_tools_as_text_and_what_they_give_are_turns(read):
    turns = [
        {"from": "human", "value": "How warm is it?"},
        {"from": "function_call", "value": '{"name": "weather"}'},
        {"from": "observation", "value": "21"},
        {"from": "gpt", "value": "21 degrees."},
    ]
    assert [turn.role for turn in read({"conversations": turns}).turns] == [
        *("user", "assistant", "tool"),
    ]


def test_plain_text_is_all_output(read):
    record = read({"text": "Once upon a time."})
    assert record.is_text
    assert record.output == "Once upon a time."


def test_a_test_or_prediction_asks_the_turn_that_awaits_a_reply(read):
    waiting = {"messages": TALK[:-1]}
    assert read(waiting, "predict").instruction == "And 3 + 3?"
    assert read(waiting, "predict").turns == TURNS
    assert read({**waiting, "answer": 6}, "test", task="gsm8k").turns == TURNS
    assert read({"messages": TALK}, "test", task="gsm8k").turns == TURNS
    # Trained on as far as it has replies.
    assert read(waiting).output == read({**waiting, "answer": 6}).output == "4"


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"a": 1, "b": 2}, ["has the fields a, b", "messages", "prompt, response", "columns:"]),
        ({"messages": []}, ["'messages' is empty", "role: user"]),
        ({"messages": "a"}, ["'messages' is not JSON"]),
        ({"messages": 3}, ["'messages' is a number"]),
        ({"messages": [1]}, ["turn 1 is a number", "role and content"]),
        ({"messages": [{"role": "user"}]}, ["turn 1 has no 'content' but role"]),
        ({"messages": [{"role": "bot", "content": "a"}]}, ["turn 1 is of 'bot'", "human"]),
        ({"messages": [{"role": "user", "content": None}]}, ["content is nothing"]),
        ({"messages": [{**TALK[2], "tool_calls": [{}]}]}, ["turn 1 has 'tool_calls'", "as text"]),
        ({"messages": [*TALK[:2], {**TALK[2], "weight": 0}]}, ["turn 3 has 'weight'"]),
        ({"messages": TALK[2:3]}, ["no user's turn before a reply"]),
        ({"messages": TALK[:2]}, ["'messages' has no reply", "training needs a response"]),
        ({"messages": [TALK[1], {"role": "assistant", "content": "\ud800"}]}, ["\\ud800", "half"]),
        ({"prompt": "a"}, ["'response' is missing"]),
        ({"prompt": " ", "completion": "b"}, ["'prompt' is empty"]),
        ({"text": " "}, ["'text' is empty"]),
        ({"text": 3}, ["'text' is a number"]),
    ],
)
def test_what_is_no_row_is_named_with_what_is_known(read, row, words):
    with pytest.raises(ValueError, match="record 1") as caught:
        read(row)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert "\n" not in str(caught.value)


def test_plain_text_asks_nothing(read):
    for purpose in ("test", "predict"):
        with pytest.raises(ValueError, match=r"plain text .*asks nothing"):
            read({"text": "Once upon a time."}, purpose)


@pytest.mark.parametrize(
    ("columns", "error", "words"),
    [
        ({"promt": "q"}, ValueError, ["'promt' (did you mean prompt?)"]),
        ({"prompt": 3}, TypeError, ["prompt: 3", "name of a column"]),
        ({}, TypeError, ["columns {}"]),
        (["q"], TypeError, ["columns ['q']"]),
    ],
)
def test_wrong_columns_are_refused_before_anything_is_read(columns, error, words):
    with pytest.raises(error) as caught:
        as_source({"path": "nowhere.jsonl", "columns": columns})
    assert all(word in str(caught.value) for word in words)


def test_a_column_that_is_not_there_is_named(read):
    with pytest.raises(ValueError, match=r"no column 'q'.*It has question"):
        read({"question": "a"}, columns={"prompt": "q", "response": "question"})
    as_source({"path": "a.jsonl", "task": "piqa", "columns": {"sol1": "first"}})
