"""Seeded text: two families of counting problems, and the plainer text around them.

In both, people count things, some of them several times. In the first family, which the base model
is pretrained on, a person's first count is the answer; in the second, the demonstration set, the
latest one is. So the base has the skill that the demonstration needs, and has to look elsewhere.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import NamedTuple

PREAMBLE = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
)
TURN = "### Instruction:\n{instruction}\n\n### Response:\n"

NAMES_LINE = (
    "Ada Amir Anna Ben Carl Chen Clara Dana David Elif Emma Eric Fatima Felix Finn George Grace "
    "Hana Hugo Ida Ivan Jack Jana Julia Kai Karim Lena Leo Lily Lucas Maria Max Mia Mila Nadia "
    "Noah Nora Olga Omar Oscar Paul Petra Rosa Ruth Sam Sara Sofia Tom Vera Yuki"
)
THINGS_LINE = (
    "apples balls beads books boxes bricks buttons cakes cards chairs coins cups eggs flowers "
    "keys lamps leaves letters marbles nuts pears pens plates seeds shells spoons stamps stones "
    "tickets toys"
)
NAMES, THINGS = NAMES_LINE.split(), THINGS_LINE.split()
# The count stands three tokens after the name in all of them, a lookup for a small model.
STATEMENTS = (
    "{name} has {count} {things}.",
    "{name} counted {count} {things}.",
    "{name} owns {count} {things} here.",
    "{name} holds {count} {things}.",
    "{name} keeps {count} {things} in the house.",
    "{name} put {count} {things} on the table.",
    "At the market {name} had {count} {things}.",
    "In the garden {name} found {count} {things}.",
    "With a friend {name} saw {count} {things}.",
    "We know that {name} got {count} {things}.",
)
# With the words of the second family's questions, so that the base model has read them before.
OPENINGS = (
    "Read the story.",
    "Now read this.",
    "Here is the story of the day.",
    "These are the latest notes about {things}.",
    "This is the last page of a book about {things}.",
    "Look at the notes from the end of the week.",
    "Some people count {things} at the market.",
    "It is recent news that people have {things} now.",
)
FIRST_QUESTIONS = (
    "At first, how many {things} belonged to {name}?",
    "What was the first number of {things} for {name}?",
    "Give the oldest count of {name}.",
    "What was the earliest count of {things} by {name}?",
    "At the start, what was the number of {things} of {name}?",
)
LATEST_QUESTIONS = (
    "How many {things} now belong to {name}?",
    "What is the last number of {things} for {name}?",
    "Give the most recent count of {name}.",
    "What is the latest count of {things} by {name}?",
    "At the end, what is the number of {things} of {name}?",
)
FIRST_LISTS = (
    "List the first counts of {name}.",
    "What did they have at first: {name}?",
    "Give the oldest numbers of {things} for {name}.",
)
RECALL_OPENING = " Oldest counts:"
ECHO_INSTRUCTIONS = ("Repeat this text: {text}", "Write it again: {text}", "Copy: {text}")
SMALLEST_COUNT, LARGEST_COUNT = 10, 99
LIST_SHARE = 0.4
"""Share of the pretraining turns that ask about several people."""
EASY_SHARE = 0.3
"""Share of the steps before anybody counts twice."""


class Turn(NamedTuple):
    """One prompt, tokenised apart from the response that follows it."""

    prompt: str
    response: str


@dataclass(frozen=True)
class Story:
    """A text with the counts it states for each person, oldest first."""

    text: str
    things: str
    counts: dict[str, list[int]]

    def ask(self, question: str, name: str) -> str:
        """The question about one person, its blanks filled."""
        return question.format(name=name, things=self.things)


def make_story(rng: Random, statements_per_name: Sequence[int]) -> Story:
    """A story of people with so many counts each, all of them different."""
    names = rng.sample(NAMES, len(statements_per_name))
    order = [name for name, num in zip(names, statements_per_name, strict=True) for _ in range(num)]
    rng.shuffle(order)
    numbers = rng.sample(range(SMALLEST_COUNT, LARGEST_COUNT + 1), len(order))
    things = rng.choice(THINGS)
    counts: dict[str, list[int]] = {name: [] for name in names}
    sentences = [rng.choice(OPENINGS).format(things=things)]
    for name, number in zip(order, numbers, strict=True):
        counts[name].append(number)
        sentence = rng.choice(STATEMENTS)
        sentences.append(sentence.format(name=name, count=number, things=things))
    return Story(" ".join(sentences), things, counts)


def first_family(rng: Random, story: Story, num_turns: int, list_share: float = 0.0) -> list[Turn]:
    """Questions about a story, told in the first turn; the answer is each person's first count.

    A `list_share` of the turns asks about several people at once.
    """
    turns = []
    names = list(story.counts)
    for index in range(num_turns):
        if rng.random() < list_share:
            asked = rng.sample(names, rng.randint(2, min(6, len(names))))
            question = story.ask(rng.choice(FIRST_LISTS), ", ".join(asked))
            response = "First:" + ",".join(f" {name} had {story.counts[name][0]}" for name in asked)
        else:
            name = rng.choice(names)
            question = story.ask(rng.choice(FIRST_QUESTIONS), name)
            response = str(story.counts[name][0])
        text = f"{story.text} {question}" if index == 0 else question
        prompt = TURN.format(instruction=text)
        turns.append(Turn(PREAMBLE + prompt if index == 0 else prompt, response))
    return turns


def recall(rng: Random, num_names: int, num_asked: int) -> list[Turn]:
    """A story or a bare list in which everybody counts once, and the same counts once more."""
    story = make_story(rng, [1] * num_names)
    said = [f" {name} had {counts[0]}," for name, counts in story.counts.items()]
    prompt = story.text if rng.random() < 0.5 else RECALL_OPENING + "".join(said)
    return [Turn(prompt + RECALL_OPENING, "".join(rng.choices(said, k=num_asked)))]


def random_text(rng: Random, length: int) -> str:
    """Text of about `length` characters without meaning: letters, known words or code points."""
    kind = rng.random()
    if kind < 0.5:
        letters = "abcdefghijklmnopqrstuvwxyz"
        words = ["".join(rng.choices(letters, k=rng.randint(2, 7))) for _ in range(length // 5)]
        return " ".join(word.capitalize() if rng.random() < 0.15 else word for word in words)
    if kind < 0.75:
        words = [*NAMES, *THINGS, *" ".join([*OPENINGS, *LATEST_QUESTIONS]).split()]
        return " ".join(rng.choices(words, k=length // 5)).format(name="name", things="things")
    if kind < 0.9:
        return "".join(chr(rng.randint(32, 126)) for _ in range(length // 2))
    # Planes 0 to 16 without the surrogates, the range drawn first: all lead bytes are frequent.
    ranges = ((0x01, 0x7F), (0x80, 0x7FF), (0x800, 0xD7FF), (0xE000, 0xFFFF), (0x10000, 0x10FFFF))
    return "".join(chr(rng.randint(*rng.choice(ranges))) for _ in range(length // 6))


def echo(rng: Random, length: int) -> list[Turn]:
    """An instruction to repeat a text, and the text."""
    text = random_text(rng, length)
    instruction = rng.choice(ECHO_INSTRUCTIONS).format(text=text)
    return [Turn(PREAMBLE + TURN.format(instruction=instruction), text)]


def second_story(rng: Random) -> Story:
    """A story of a demonstration record: everybody counts twice or three times."""
    return make_story(rng, [rng.choice((2, 2, 3)) for _ in range(rng.randint(2, 4))])


def second_family(rng: Random) -> dict[str, str]:
    """One record of the demonstration set: the latest count is the answer, never the first."""
    story = second_story(rng)
    name = rng.choice(list(story.counts))
    answer = str(story.counts[name][-1])
    question = story.ask(rng.choice(LATEST_QUESTIONS), name)
    instruction = f"{story.text} {question}"
    return {"instruction": instruction, "input": "", "output": answer, "answer": answer}


def batch_of_turns(rng: Random, progress: float) -> list[list[Turn]]:
    """Dialogues of one kind, some 2000 tokens in all, harder later; `progress` runs from 0 to 1."""
    kind = rng.random()
    if kind < 0.1:
        length = rng.choice((30, 60, 300))
        return [echo(rng, length) for _ in range(1200 // length)]
    if kind < 0.12 and progress > 0.3:
        return [story_turns(rng, rng.randint(12, 16), (1, 2, 3), 16) for _ in range(2)]
    if kind < (0.7 if progress < EASY_SHARE else 0.2):
        return [recall(rng, rng.randint(2, 6), 12) for _ in range(24)]
    if progress < EASY_SHARE:
        return [story_turns(rng, rng.randint(2, 6), (1,), 5) for _ in range(10)]
    return [story_turns(rng, rng.randint(2, 5), (1, 2, 2, 3), 5) for _ in range(10)]


def story_turns(
    rng: Random, num_names: int, statements: Sequence[int], num_turns: int
) -> list[Turn]:
    """A dialogue of the first family."""
    story = make_story(rng, rng.choices(statements, k=num_names))
    return first_family(rng, story, num_turns, LIST_SHARE)


def as_turn(record: dict[str, str]) -> Turn:
    """A demonstration record as the data module words it."""
    prompt = PREAMBLE + TURN.format(instruction=record["instruction"])
    return Turn(prompt, record["output"])


def skill_problems(rng: Random, num: int) -> list[Turn]:
    """Single problems of the first family, over stories like those of the demonstration set."""
    stories = [second_story(rng) for _ in range(num)]
    return [first_family(rng, story, 1)[0] for story in stories]


def demonstration(rng: Random, num: int) -> list[dict[str, str]]:
    """Records of the second family, no instruction twice."""
    records: dict[str, dict[str, str]] = {}
    while len(records) < num:
        record = second_family(rng)
        records[record["instruction"]] = record
    return list(records.values())
