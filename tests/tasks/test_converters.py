"""Rows with the fields of the hub's data sets, in the words of LLM-Adapters."""

from __future__ import annotations

import json
import re

import pytest

from rosa_lightning.data.records import load_records
from rosa_lightning.data.sources import Source
from rosa_lightning.tasks.registry import TASKS

QUESTION = "Please choose the correct answer to the question: "
ARC = {
    "id": "Mercury_7220990",
    "question": "Which factor will most likely cause a fever?",
    "choices": {"text": ["rest", "bacteria", "viruses", "food"], "label": ["A", "B", "C", "D"]},
    "answerKey": "B",
}
ARC_RECORD = (
    QUESTION + "Which factor will most likely cause a fever?\n\nAnswer1: rest Answer2: bacteria "
    "Answer3: viruses Answer4: food\n\nAnswer format: answer1/answer2/answer3/answer4",
    "the correct answer is answer2",
    "answer2",
)

# For each benchmark a row as its hub data set has it, and what becomes of it.
ROWS = {
    "boolq": (
        {"question": "is it so", "answer": True, "passage": "It is so, say some."},
        (
            "Please answer the following question with true or false, question: is it so?\n\n"
            "Answer format: true/false",
            "the correct answer is true",
            "true",
        ),
    ),
    "piqa": (
        {"goal": "Boil butter", "sol1": "Pour it on a plate", "sol2": "Use a jar", "label": 1},
        (
            "Please choose the correct solution to the question: Boil butter\n\nSolution1: Pour it "
            "on a plate\n\nSolution2: Use a jar\n\nAnswer format: solution1/solution2",
            "the correct answer is solution2",
            "solution2",
        ),
    ),
    "social_i_qa": (
        {
            "context": "Carson moved.",
            "question": "How would you describe Carson?",
            "answerA": "mobile",
            "answerB": "anxious",
            "answerC": "lonely",
            "label": "1",
        },
        (
            QUESTION + "Carson moved. How would you describe Carson?\n\nAnswer1: mobile Answer2: "
            "anxious Answer3: lonely\n\nAnswer format: answer1/answer2/answer3",
            "the correct answer is answer1",
            "answer1",
        ),
    ),
    "hellaswag": (
        {
            "activity_label": "Roof shingle removal",
            "ctx": "A man is sitting on a roof. he",
            "endings": [
                "is using wrap to wrap a pair of skis.",
                "is ripping level tiles off.",
                "is holding a rubik's cube.",
                "starts pulling up roofing on a roof.",
            ],
            "label": "3",
        },
        (  # as in LLM-Adapters' hellaswag/test.json, to the letter
            "Please choose the correct ending to complete the given sentence: Roof shingle "
            "removal: A man is sitting on a roof. he\n\nEnding1: is using wrap to wrap a pair of "
            "skis. Ending2: is ripping level tiles off. Ending3: is holding a rubik's cube. "
            "Ending4: starts pulling up roofing on a roof.\n\n"
            "Answer format: ending1/ending2/ending3/ending4",
            "the correct answer is ending4",
            "ending4",
        ),
    ),
    "winogrande": (
        {"sentence": "Ann beat Eve as _ ran.", "option1": "Ann", "option2": "Eve", "answer": "1"},
        (
            "Please choose the correct answer to fill in the blank to complete the given sentence: "
            "Ann beat Eve as _ ran.\n\nOption1: Ann Option2: Eve Answer format: option1/option2",
            "the correct answer is option1",
            "option1",
        ),
    ),
    "arc_easy": (ARC, ARC_RECORD),
    "arc_challenge": (
        {**ARC, "choices": {**ARC["choices"], "label": ["1", "2", "3", "4"]}, "answerKey": "2"},
        ARC_RECORD,
    ),
    "openbookqa": (
        {
            "question_stem": "The sun is responsible for",
            "choices": {"text": ["a", "b", "c", "d"], "label": ["A", "B", "C", "D"]},
            "answerKey": "D",
        },
        (
            QUESTION + "The sun is responsible for\n\nAnswer1: a Answer2: b Answer3: c Answer4: d"
            "\n\nAnswer format: answer1/answer2/answer3/answer4",
            "the correct answer is answer4",
            "answer4",
        ),
    ),
    "multiarith": (
        {"question": " How many are 3 and 4? ", "final_ans": "7"},
        (" How many are 3 and 4? ", "The answer is 7.", "7"),
    ),
    "gsm8k": (
        {"question": "How many clips?", "answer": "48/2 = <<48/2=24>>24\n#### 24"},
        ("How many clips?", "48/2 = <<48/2=24>>24\n#### 24", "24"),
    ),
    "addsub": (
        {"input": "Ada had 3 . How many now ?", "output_answer": "3"},
        ("Ada had 3 . How many now ?", "The answer is 3.", "3"),
    ),
    "aqua": (
        {
            "question": "What is M divided so? ",
            "options": ["A)D/(M-3)", "B)MD/3", "C)3", "D)4", "E)None of these"],
            "rationale": "We divide.\n",
            "correct": "B",
        },
        (
            "What is M divided so? Answer Choices: (A) D/ (M-3)  (B) MD/3 (C) 3 (D) 4 "
            "(E) None of these",
            "We divide.\nThe answer is (B).",
            "B",
        ),
    ),
    "singleeq": (
        {"input": "How long?", "output_program": "", "output_answer": "0.7", "split": "test"},
        ("How long?", "The answer is 0.7.", "0.7"),
    ),
    "svamp": (
        {
            "Body": "He had 32 crackers. ",
            "Question": "How many did each eat?",
            "Answer": "8.0",
        },
        ("He had 32 crackers. How many did each eat?", "The answer is 8.", "8.0"),
    ),
    "mawps": (
        {
            "question": "How many pencils?",
            "chain": '<gadget id="calculator">1_000</gadget>\n<result>1_000</result>',
            "result": "1_000",
            "result_float": 1000.0,
        },
        ("How many pencils?", "The answer is 1000.", "1000.0"),
    ),
}


@pytest.fixture
def records(tmp_path):
    """Reads rows as those of a task's data set."""

    def read(task, rows, purpose="train"):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        return load_records(Source(path=str(path), task=task), purpose)

    return read


def test_every_benchmark_has_a_row_here():
    assert set(ROWS) == {name for name, task in TASKS.items() if task.group != "other"}


@pytest.mark.parametrize("purpose", ["train", "test"])
@pytest.mark.parametrize("task", ROWS)
def test_hub_rows_become_records_in_the_fields_words(records, task, purpose):
    row, (instruction, output, answer) = ROWS[task]
    (found,) = records(task, [row], purpose)
    assert (found.instruction, found.input) == (instruction, "")
    assert (found.output, found.answer) == (output, answer)


@pytest.mark.parametrize(
    ("task", "hidden"),
    [
        ("piqa", {"label": -1}),
        ("social_i_qa", {"label": ""}),
        ("hellaswag", {"label": ""}),
        ("winogrande", {"answer": ""}),
        ("boolq", {"answer": None}),
        ("openbookqa", {"answerKey": ""}),
    ],
)
def test_rows_without_a_gold_answer_are_refused_by_name(records, task, hidden):
    row = {**ROWS[task][0], **hidden}
    for purpose in ("train", "test"):
        with pytest.raises(ValueError, match=rf"rows.jsonl, record 2 \(task {task}") as caught:
            records(task, [ROWS[task][0], row], purpose)
        ((field, value),) = hidden.items()
        assert f"{field} is {value!r}" in str(caught.value)
    (asked,) = records(task, [row], "predict")
    assert (asked.answer, asked.output) == (None, "")


@pytest.mark.parametrize(
    ("task", "change", "words"),
    [
        ("piqa", {"label": "x"}, "the gold answer is 'x'"),
        ("hellaswag", {"label": "7"}, "the gold answer is 'ending8'; its prompt asks for one of"),
        ("arc_easy", {"answerKey": "E"}, "the gold answer is 'E'"),
        ("arc_easy", {"choices": {"text": ["a", "b"], "label": ["A", "A"]}}, "a label twice"),
        ("arc_easy", {"choices": None}, "is no row of arc_easy (allenai/ai2_arc)"),
        ("svamp", {"Answer": "many"}, "the gold answer is 'many'; its prompt asks for a number"),
    ],
)
def test_rows_that_cannot_be_judged_are_named(records, task, change, words):
    with pytest.raises(ValueError, match="record 1") as caught:
        records(task, [{**ROWS[task][0], **change}], "test")
    assert words in str(caught.value)
    assert task in str(caught.value)
    with pytest.raises(ValueError, match="record 1"):  # the response is made of the answer
        records(task, [{**ROWS[task][0], **change}], "train")


def test_a_row_with_too_few_fields_is_told_which_there_are(records):
    with pytest.raises(ValueError, match=r"fields goal, sol1; .* piqa's goal, sol1, sol2, label"):
        records("piqa", [{"goal": "a", "sol1": "b"}])


# --- the field's files, taken apart to hub rows and put together again -------------------------


def parts(pattern: str, text: str) -> tuple[str, ...]:
    found = re.fullmatch(pattern, text, re.DOTALL)
    assert found, text
    return found.groups()


def keyed(record: dict[str, str], field: str) -> dict[str, object]:
    pattern = re.escape(QUESTION) + r"(.*)\n\nAnswer1: (.*)\n\nAnswer format: [\w/]*"
    question, rest = parts(pattern, record["instruction"])
    texts = re.split(r" Answer\d: ", rest)
    labels = list("ABCDE")[: len(texts)]
    key = labels[int(record["answer"][-1]) - 1]
    return {field: question, "choices": {"text": texts, "label": labels}, "answerKey": key}


def boolq(record):
    pattern = r".*, question: (.*)\?\n\nAnswer format: true/false"
    (question,) = parts(pattern, record["instruction"])
    return {"question": question, "answer": record["answer"] == "true", "passage": "left out"}


def piqa(record):
    pattern = r".*? question: (.*?)\n\nSolution1: (.*?)\n\nSolution2: (.*)\n\nAnswer format: .*"
    goal, first, second = parts(pattern, record["instruction"])
    return {"goal": goal, "sol1": first, "sol2": second, "label": int(record["answer"][-1]) - 1}


def social_i_qa(record):
    pattern = r".*? question: (.*\S) (\S.*)\n\nAnswer1: (.*) Answer2: (.*) Answer3: (.*)\n\n.*"
    names = ("context", "question", "answerA", "answerB", "answerC")
    row = dict(zip(names, parts(pattern, record["instruction"]), strict=True))
    return {**row, "label": record["answer"][-1]}


def winogrande(record):
    pattern = r".*? sentence: (.*)\n\nOption1: (.*) Option2: (.*) Answer format: .*"
    names = ("sentence", "option1", "option2")
    row = dict(zip(names, parts(pattern, record["instruction"]), strict=True))
    return {**row, "answer": record["answer"][-1]}


TAKEN_APART = {
    "boolq": boolq,
    "piqa": piqa,
    "social_i_qa": social_i_qa,
    "winogrande": winogrande,
    "arc_easy": lambda record: keyed(record, "question"),
    "arc_challenge": lambda record: keyed(record, "question"),
    "openbookqa": lambda record: keyed(record, "question_stem"),
}


@pytest.mark.parametrize("task", TAKEN_APART)
def test_the_wording_is_that_of_the_fields_files(records, real_data, task):
    rows = json.loads((real_data / "test" / f"{task}.json").read_text("utf-8"))
    made = records(task, [TAKEN_APART[task](row) for row in rows], "train")
    for row, record in zip(rows, made, strict=True):
        assert (record.instruction, record.input) == (row["instruction"], row["input"])
        assert (record.output, record.answer) == (row["output"], row["answer"])


def test_aqua_questions_are_worded_as_in_the_fields_file(records, real_data):
    rows = json.loads((real_data / "test" / "aqua.json").read_text("utf-8"))
    hub = []
    for row in rows:
        question, listed = parts(r"(.*) Answer Choices: (.*)", row["instruction"])
        options = (" " + listed).replace(") ", ")").replace(" (", "(").split("(")
        letters = [option[0] for option in options if re.match("[A-E]\\)", option)]
        assert letters == list("ABCDE")
        # Parentheses within an option go back to the option that they stand in.
        texts = re.split(r"\((?=[A-E]\))", "(".join(options))[1:]
        hub.append(
            {"question": question, "options": texts, "rationale": "", "correct": row["answer"]}
        )
    for row, record in zip(rows, records("aqua", hub), strict=True):
        assert record.instruction == row["instruction"]
        assert record.answer == row["answer"]
