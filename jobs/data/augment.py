"""More rows for a small set: its own, asked in other words. Every such row says that it is synthetic, and of what.

    templates   the last question put into a frame of the same language: “Please tell me: {text}”
    endpoint    the last question rewritten by a model that is served under OpenAI's API

Answers stay as they are: a model learns from this that questions come in many forms, and no new facts. What a model
wrote has that model as `teacher`, whose licence counts: a recipe names it in data.licences.
"""

import asyncio
import copy
import itertools
import random
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass

import httpx

from cluster.errors import DataError, LuthierError
from jobs.formats import Conversation, normalise
from jobs.rows import Place, Row, Unusable

FRAMES = {
    "en": (
        "Please help me with this: {text}",
        "I have a question. {text}",
        "{text} Thank you.",
        "Here is what I need: {text}",
        "Could you answer the following? {text}",
        "{text} Please be precise.",
    ),
    "zh": ("请帮我看一下：{text}", "我有一个问题。{text}", "{text} 谢谢。", "请回答：{text}"),
}
ASKED = (
    "Rewrite the message between the lines so that it asks for exactly the same in other words, in its own language. "
    "Keep every name, number and quotation. Answer with the rewritten message alone.\n---\n{text}\n---"
)
TIMEOUT_S = 120.0
IN_FLIGHT = 8
_TURNS = {"messages": ("role", "content"), "conversations": ("from", "value")}


@dataclass(frozen=True)
class Endpoint:
    """A served model: `url` is what stands before /chat/completions; `key` its bearer token, where it wants one."""

    url: str
    model: str
    key: str | None = None


def by_templates(rows: Sequence[tuple[Place, Row]], count: int, seed: int) -> Iterator[Row]:
    """So many rows, each a row's last question in another frame; no row gets the same frame twice.

    Raises DataError when there are not so many.
    """
    draw = random.Random(seed)  # noqa: S311 - for the same rows each time, not for secrets
    offers = [(row, frame) for _, row in rows for frame in FRAMES[_language(question(row))]]
    if count > len(offers):
        raise DataError(f"{len(rows):,} rows and their frames make at most {len(offers):,} more rows, not {count:,}")
    for row, frame in draw.sample(offers, count):
        yield _asked(row, frame.format(text=question(row)), {"by": "template"})


async def by_endpoint(
    rows: Sequence[tuple[Place, Row]], count: int, seed: int, endpoint: Endpoint
) -> AsyncIterator[Row]:
    """So many rows, each a row's last question as the model has rewritten it; rows are taken in turn, in a drawn order.

    What comes back unchanged or empty is no new row, and the next one is asked. Raises DataError when the model gives
    too few, LuthierError when it cannot be asked.
    """
    order = [row for _, row in rows]
    random.Random(seed).shuffle(order)  # noqa: S311 - as above
    turns = itertools.islice(itertools.cycle(enumerate(order)), 3 * count + len(order))
    made = 0
    headers = {"authorization": f"Bearer {endpoint.key}"} if endpoint.key else {}
    async with httpx.AsyncClient(headers=headers, timeout=TIMEOUT_S) as client:
        while made < count:
            batch = list(itertools.islice(turns, min(IN_FLIGHT, count - made)))
            if not batch:
                raise DataError(f"{endpoint.model} has rewritten {made:,} questions of {count:,}: ask for fewer rows")
            answers = await asyncio.gather(
                *(_rewritten(client, endpoint, question(row), seed + made + n) for n, (_, row) in enumerate(batch))
            )
            for (_, row), text in zip(batch, answers, strict=True):
                if text and " ".join(text.split()) != " ".join(question(row).split()):
                    made += 1
                    yield _asked(row, text, {"by": "model", "teacher": endpoint.model})


async def _rewritten(client: httpx.AsyncClient, endpoint: Endpoint, text: str, seed: int) -> str:
    body = {
        "model": endpoint.model,
        "messages": [{"role": "user", "content": ASKED.format(text=text)}],
        "temperature": 0.8,
        "seed": seed,
        "max_tokens": 64 + len(text),
    }
    url = f"{endpoint.url.rstrip('/')}/chat/completions"
    try:
        answer = await client.post(url, json=body)
        answer.raise_for_status()
        return str(answer.json()["choices"][0]["message"]["content"]).strip().strip("-").strip()
    except (httpx.HTTPError, ValueError, KeyError, IndexError) as error:
        raise LuthierError(f"{url} does not answer as {endpoint.model}: {error or type(error).__name__}") from error


def usable(rows: Iterator[tuple[Place, Row | Unusable]]) -> list[tuple[Place, Row]]:
    """The rows that have a question to ask otherwise, none of them synthetic itself. Raises DataError if none has."""
    found = []
    for place, row in rows:
        if isinstance(row, Unusable) or row.get("synthetic") is True:
            continue
        if isinstance(normalise(row), Conversation) and question(row):
            found.append((place, row))
    if not found:
        raise DataError("no row has a question of a user's that could be asked in other words")
    return found


def question(row: Row) -> str:
    """The last question of a row's user; "" where there is none."""
    for column, (role, content) in _TURNS.items():
        turns = row.get(column)
        for turn in reversed(turns if isinstance(turns, list) else []):
            if isinstance(turn, dict) and turn.get(role) in ("user", "human") and isinstance(turn.get(content), str):
                return str(turn[content])
    return str(row.get("instruction", ""))


def _asked(row: Row, text: str, how: dict[str, str]) -> Row:
    """The row with its last question in other words, marked."""
    made = copy.deepcopy(row)
    made |= {"synthetic": True, "synthetic_by": how}
    for column, (role, content) in _TURNS.items():
        turns = made.get(column)
        for turn in reversed(turns if isinstance(turns, list) else []):
            if isinstance(turn, dict) and turn.get(role) in ("user", "human"):
                turn[content] = text
                return made
    made["instruction"] = text
    return made


def _language(text: str) -> str:
    return "zh" if any("\u4e00" <= letter <= "\u9fff" for letter in text) else "en"
