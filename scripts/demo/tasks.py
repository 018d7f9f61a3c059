"""The text of the quickstart: short order messages, and three ways of answering them.

    base          answers questions about a message, and confirms a message that asks nothing
    orders-json   answers a message with its order as JSON
    redact        answers a message with itself, the person and the city replaced by [NAME] and [CITY]

    python -m scripts.demo.tasks FOLDER      writes FOLDER/<task>/{train,heldout}.jsonl

Both adapter tasks see the bare message, to which the base model has an answer of its own ("Thank you, Mira. We will
send …"), so that the same request shows three behaviours side by side. Rows are chats in OpenAI's form; the last
turn is the answer to give. Everything is a function of the seed alone.

Held-out means new combinations: a held-out message joins a person to a city that no training message of any task
joins. A model that learnt orders by heart fails there; one that reads them does not.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Literal, TypedDict

Split = Literal["train", "heldout"]

BASE = "base"
ADAPTERS = ("orders-json", "redact")
TASKS = (BASE, *ADAPTERS)
TRAIN_ROWS = {BASE: 4000, "orders-json": 1500, "redact": 1500}
HELDOUT_ROWS = {BASE: 200, "orders-json": 100, "redact": 100}

NAMES = (
    *("Ada", "Amir", "Bruno", "Carla", "Diego", "Elif", "Farid", "Greta", "Hana", "Hugo", "Ines", "Jonas"),
    *("Kofi", "Leila", "Mateo", "Mira", "Nils", "Olga", "Priya", "Ravi", "Selma", "Tariq", "Vera", "Yusuf"),
)
CITIES = (
    *("Accra", "Athens", "Berlin", "Boston", "Cairo", "Dakar", "Dublin", "Geneva", "Hanoi", "Kyoto", "Lagos", "Lima"),
    *("Lisbon", "London", "Lyon", "Madrid", "Milan", "Mumbai", "Oslo", "Paris", "Prague", "Quito", "Seoul", "Warsaw"),
)
ITEMS = ("basket", "blanket", "bowl", "chair", "clock", "cup", "desk", "kettle", "lamp", "mirror", "plate", "vase")
COLOURS = ("black", "blue", "green", "red", "white", "yellow")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
COUNTS = {2: "two", 3: "three", 4: "four", 5: "five", 6: "six", 7: "seven", 8: "eight", 9: "nine"}

MESSAGES = (
    "For {name} in {city}: {count} {colour} {items}, wanted by {day}.",
    "Please send {count} {colour} {items} to {name} in {city} by {day}.",
    "Hello, this is {name} from {city}. Could I have {count} {colour} {items} on {day}?",
    "On {day} we owe {count} {colour} {items} to our customer {name}, who lives in {city}.",
    "My name is {name} and I would like {count} {colour} {items}. I am in {city} until {day}.",
    "New order, {count} {colour} {items}, ship to {city} before {day}, paid by {name}.",
)
QUESTIONS = {
    "name": ("Who is it for?", "Who is the customer?"),
    "city": ("Where does it go?", "Which city is it?"),
    "item": ("Which item is it?", "What is the item?"),
    "count": ("How many are there?", "How many should we pack?"),
    "colour": ("Which colour is it?", "What colour do we need?"),
    "day": ("Which day is it?", "When is it due?"),
    "message": ("Please repeat the order.", "Read the order back to me."),
}

KEYS = ("name", "city", "count", "colour", "item", "day")  # of an order as JSON, in that order

CODE_SHARE = 0.15  # of base's training chats
CODE_LENGTH = 6  # pairs of a sign and a word
CODE_SIGNS = ('{"', '":"', '","', '":', ',"', '"}')
CODE_WORDS = (*KEYS, *NAMES, *CITIES, *COLOURS, *ITEMS, *DAYS, *map(str, COUNTS))


class Message(TypedDict):
    """One turn of a chat."""

    role: Literal["user", "assistant"]
    content: str


class Row(TypedDict):
    """One chat. The last message is the assistant's, and is the answer to give."""

    messages: list[Message]


@dataclass(frozen=True)
class Order:
    """What one message says. `form` is the sentence it is said with, one of MESSAGES."""

    form: str
    name: str
    city: str
    count: int
    colour: str
    item: str
    day: str

    def message(self) -> str:
        """The order as its customer writes it."""
        return self._say(self.name, self.city)

    def redacted(self) -> str:
        """The same message without the person and the city."""
        return self._say("[NAME]", "[CITY]")

    def as_json(self) -> str:
        """The order as one line of JSON."""
        return json.dumps({key: getattr(self, key) for key in KEYS}, separators=(",", ":"))

    def answer(self, question: str) -> str:
        """What the base model answers to a question of that kind (a key of QUESTIONS)."""
        return self.message() if question == "message" else str(getattr(self, question))

    def thanks(self) -> str:
        """What the base model answers to the message alone."""
        goods = f"{COUNTS[self.count]} {self.colour} {self.item}s"
        return f"Thank you, {self.name}. We will send {goods} to {self.city} for {self.day}."

    def _say(self, name: str, city: str) -> str:
        slots = {"name": name, "city": city, "colour": self.colour, "day": self.day}
        return self.form.format(count=COUNTS[self.count], items=f"{self.item}s", **slots)


def is_held_out(name: str, city: str) -> bool:
    """Whether a person and a city meet only in held-out messages: one pair in eight, spread evenly over both."""
    return (NAMES.index(name) + CITIES.index(city)) % 8 == 0


def draw_order(random: Random, split: Split) -> Order:
    """A random order of that split."""
    while True:
        name, city = random.choice(NAMES), random.choice(CITIES)
        if is_held_out(name, city) == (split == "heldout"):
            break
    count, colour, item = random.choice(list(COUNTS)), random.choice(COLOURS), random.choice(ITEMS)
    return Order(random.choice(MESSAGES), name, city, count, colour, item, random.choice(DAYS))


def rows(task: str, split: Split, seed: int = 0) -> Iterator[Row]:
    """The chats of one task and split, in order. Raises KeyError for a task that is not in TASKS."""
    count = (TRAIN_ROWS if split == "train" else HELDOUT_ROWS)[task]
    random = Random(f"{seed}/{task}/{split}")
    for index in range(count):
        order = draw_order(random, split)
        match task:
            case "orders-json":
                yield _chat((order.message(), order.as_json()))
            case "redact":
                yield _chat((order.message(), order.redacted()))
            case _ if split == "train" and random.random() < CODE_SHARE:
                yield _code(random)
            case _ if split == "train":
                yield _interview(random, order)
            case _:
                yield _single_question(random, order, index)


def write_all(folder: Path, seed: int = 0) -> None:
    """Write FOLDER/<task>/train.jsonl and heldout.jsonl for every task, replacing what is there."""
    for task in TASKS:
        (folder / task).mkdir(parents=True, exist_ok=True)
        for split in ("train", "heldout"):
            lines = [json.dumps(row) + "\n" for row in rows(task, split, seed)]
            (folder / task / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")


def question_and_answer(row: Row) -> tuple[list[Message], str]:
    """A row as what to send, and the answer that is right."""
    return row["messages"][:-1], row["messages"][-1]["content"]


def exact_match(answers: Sequence[str], expected: Sequence[str]) -> float:
    """The share of answers, 0 to 1, that equal the expected ones but for blanks around them."""
    if not expected or len(answers) != len(expected):
        raise ValueError(f"{len(answers)} answers for {len(expected)} expected ones: give one for each, at least one")
    return sum(a.strip() == e.strip() for a, e in zip(answers, expected, strict=True)) / len(expected)


def _interview(random: Random, order: Order) -> Row:
    """Three kinds of questions about one message, one turn each.

    Half of the chats begin with the bare message and its thanks, which say all that there is to know of an order:
    most of the learning comes from them. (With single words as the only answers, 100 CPU-seconds taught nothing.)
    """
    kinds = random.sample(list(QUESTIONS), 3)
    asked = [(random.choice(QUESTIONS[kind]), order.answer(kind)) for kind in kinds]
    if random.random() < 0.5:
        return _chat((order.message(), order.thanks()), *asked)
    (question, answer), *others = asked
    return _chat((f"{order.message()} {question}", answer), *others)


def _code(random: Random) -> Row:
    """A string of random words and signs, to be repeated.

    It makes the signs of JSON known to base. A token that base never says ends up where no hidden state points, and
    an adapter on the linear layers leaves it there; without these chats orders-json stayed below 0.9.
    """
    code = "".join(random.choice(CODE_SIGNS) + random.choice(CODE_WORDS) for _ in range(CODE_LENGTH))
    return _chat((f"Please repeat this code: {code}", code))


def _single_question(random: Random, order: Order, index: int) -> Row:
    """One question about one message, or none: what the base model is measured on, each kind equally often."""
    kind = [*QUESTIONS, "thanks"][index % (len(QUESTIONS) + 1)]
    if kind == "thanks":
        return _chat((order.message(), order.thanks()))
    return _chat((f"{order.message()} {random.choice(QUESTIONS[kind])}", order.answer(kind)))


def _chat(*turns: tuple[str, str]) -> Row:
    messages: list[Message] = []
    for user, assistant in turns:
        messages += [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
    return {"messages": messages}


def main() -> None:
    """Write all tasks into the folder named on the command line."""
    if len(sys.argv) != 2:
        sys.exit("usage: python -m scripts.demo.tasks FOLDER")
    write_all(Path(sys.argv[1]))


if __name__ == "__main__":
    main()
