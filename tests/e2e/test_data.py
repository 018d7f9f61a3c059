"""Data checked and prepared by real Ray tasks: killed in the middle, asked for again, refused; and a million rows."""

import json
import multiprocessing
import os
import random
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster import keys
from cluster.config import load
from cluster.errors import DataError
from cluster.nodes import LocalCluster
from cluster.place import ClusterConfig
from cluster.session import joined
from cluster.store import Store, open_store
from jobs.data import prepare, prepared
from jobs.data.card import Card
from jobs.data.request import make_request
from jobs.data.rules import Balance, Duplicates, Rules
from scripts.benchmarks.data_planted import personal
from tests.e2e.submit import ROOT, start, until, write_rows

SHARED_DATA = ROOT.parent / "shared" / "data"
RULES = """
personal: {do: mask}
duplicates: {near: remove}
leakage: {near: remove}
rows_per_part: 50
"""


class Elsewhere:
    """Prepares in a process of its own: this one may have been in another Ray, and keeps that one's token."""

    def __init__(self, pool: Executor) -> None:
        self._pool = pool

    def check(self, *given: Any) -> Card:
        return self._pool.submit(prepare.check, *given).result()

    def prepare(self, *given: Any) -> Card:
        return self._pool.submit(prepare.prepare, *given).result()


_JOINED = ExitStack()


def _join(address: str, variables: dict[str, str]) -> None:
    os.environ.pop("RAY_AUTH_TOKEN", None)
    os.environ |= variables
    _JOINED.enter_context(joined(ClusterConfig(name="here", address=address, memory_gb_per_worker=1), 1))


@pytest.fixture(scope="module")
def elsewhere(ray_cluster: LocalCluster) -> Iterator[Elsewhere]:
    token = {name: ray_cluster.environment()[name] for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH")}
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, _join, (ray_cluster.address, token)) as pool:
        yield Elsewhere(pool)


def chat(asked: str, answered: str, **more: object) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}], **more}


WORDS = sorted(set(re.findall("[a-z]{3,}", (ROOT / "LICENSE").read_text())))


def sentence(draw: random.Random, length: int = 40) -> str:
    return " ".join(draw.choices(WORDS, k=length))


def planted(folder: Path) -> tuple[Path, Path]:
    """2,000 rows and 20 held out, with 100 exact and 100 near duplicates, 15 leaks of either kind, 50 addresses."""
    draw = random.Random(7)
    rows = [chat(sentence(draw), sentence(draw), topic="ab"[number % 4 == 0]) for number in range(1_735)]
    held = [chat(sentence(draw), sentence(draw)) for _ in range(20)]
    again = [json.loads(json.dumps(row)) for row in [*rows[:200], *held[:15], *held[5:20]]]
    for row in [*again[100:200], *again[215:]]:
        words = row["messages"][1]["content"].split()
        words[draw.randrange(len(words))] = "another"
        row["messages"][1]["content"] = " ".join(words)
    for row in again[200:]:
        row["topic"] = "b"
    for number, row in enumerate(rows[300:350]):
        row["messages"][0]["content"] += f" or write to person{number}@example.com"  # type: ignore[index]
    shuffled = [*rows, *again]
    tail = shuffled[1_735:]
    draw.shuffle(tail)
    return write_rows(folder / "rows.jsonl", [*rows, *tail]), write_rows(folder / "held.jsonl", held)


def parts(store: Store, digest: str) -> dict[str, int]:
    """When each finished part was written, in nanoseconds."""
    folder = Path(store.url.removeprefix("file://"))
    ends = {item.key for item in store.list(keys.prepared_parts_prefix(digest)) if item.key.endswith(".arrow")}
    return {key: (folder / key).stat().st_mtime_ns for key in ends}


def test_a_killed_preparation_goes_on_where_it_was_and_ends_as_a_calm_one(
    ray_cluster: LocalCluster, elsewhere: Elsewhere, tmp_path: Path
) -> None:
    train, held = planted(tmp_path)
    rules = tmp_path / "rules.yaml"
    rules.write_text(RULES)
    licences = prepared.licences_of([str(train), str(held)])
    request, paths = make_request([(str(train), train)], [(str(held), held)], load(rules, Rules), None, licences)
    store = open_store(f"file://{tmp_path}/killed")
    killed = start(
        ray_cluster,
        *("jobs", "data", "prepare", str(train), "--evaluation", str(held)),
        *("--rules", str(rules), "--store", store.url),
    )
    until(lambda: len(parts(store, request.digest)) >= 5, killed)
    killed.kill()
    killed.communicate()
    finished = parts(store, request.digest)
    assert 5 <= len(finished) < 41
    assert not store.exists(keys.prepared_card(request.digest))
    elsewhere.check(request, paths, store)
    assert parts(store, request.digest).items() >= finished.items(), "no finished part was written again"
    again = elsewhere.prepare(request, paths, store)

    calm = elsewhere.prepare(request, paths, open_store(f"file://{tmp_path}/calm"))
    assert [file.sha256 for file in again.files] == [file.sha256 for file in calm.files]
    assert again.found == calm.found
    assert parts(store, request.digest) == {}

    assert elsewhere.prepare(request, paths, store) == again, "asked for again, it is found, with when it was made"

    counts = {check: found.counts.get("removed", 0) for check, found in again.found.items()}
    counts.pop("personal")
    assert counts == {"duplicates": 100, "near duplicates": 100, "leakage": 15, "near leakage": 15}
    assert again.found["personal"].counts == {"mended": 50}
    assert (again.before.rows, again.after.rows) == (1_965, 1_735)
    files, evaluation = prepared.fetch(again, store)
    text = "".join(path.read_text() for _, path in files)
    assert text.count("\n") == 1_735
    assert "<EMAIL>" in text
    assert "@example.com" not in text
    assert "@example.com" not in again.model_dump_json()
    assert sum(path.read_text().count("\n") for _, path in evaluation) == 20


def test_groups_are_balanced(elsewhere: Elsewhere, tmp_path: Path) -> None:
    train, _ = planted(tmp_path)
    rules = Rules(balance=Balance(by="topic", do="down", seed=5), duplicates=Duplicates(exact="off"))
    store = open_store(f"file://{tmp_path}/store")
    card = elsewhere.prepare(*make_request([("rows", train)], [], rules), store)
    files, _ = prepared.fetch(card, store)
    rows = [json.loads(line)["topic"] for _, path in files for line in path.read_text().splitlines()]
    counts = Counter(rows)
    assert counts == card.after.groups
    assert counts["a"] == pytest.approx(counts["b"], rel=0.15)
    assert card.before.groups["a"] > 2 * card.before.groups["b"]


def test_what_a_rule_refuses_ends_with_file_and_line(
    ray_cluster: LocalCluster, elsewhere: Elsewhere, tmp_path: Path
) -> None:
    rows: list[object] = [chat(f"Question {number}?", f"Answer {number}.") for number in range(9)]
    path = write_rows(tmp_path / "bad.jsonl", rows)
    path.write_text(path.read_text().replace('"Answer 4."', "4,"))
    store = f"file://{tmp_path}/store"
    failed = start(ray_cluster, "jobs", "data", "prepare", str(path), "--store", store)
    output = failed.communicate()[0]
    assert failed.returncode == 2, output
    assert "1 of 9 rows are refused by data.rules" in output
    assert f"{path}:5: format: not JSON" in output
    rows[2] = rows[1]
    request, paths = make_request(
        [("twice.jsonl", write_rows(tmp_path / "twice.jsonl", rows))], [], Rules(duplicates=Duplicates(exact="refuse"))
    )
    with pytest.raises(DataError, match=r"twice\.jsonl:3: duplicates: says the same as twice\.jsonl:2"):
        elsewhere.prepare(request, paths, open_store(store))


def test_a_prepared_set_holds_none_of_the_planted_values(elsewhere: Elsewhere, tmp_path: Path) -> None:
    """English, Chinese, and a copy of the Alpaca set where it lies beside the checkout; by the rules that ship."""
    sets = {"en": personal(5, 300, "en"), "zh": personal(5, 300, "zh")}
    alpaca = SHARED_DATA / "alpaca_en_demo.json"
    if alpaca.exists():
        texts = [f"{row['instruction']} {row['output']}" for row in json.loads(alpaca.read_text())]
        sets["alpaca"] = personal(5, len(texts), "en", texts)
    files = [
        (name, write_rows(tmp_path / f"{name}.jsonl", [chat("Say it again.", planted.text) for planted in some]))
        for name, some in sets.items()
    ]
    values = {planted.text[start:end] for some in sets.values() for planted in some for start, end, _ in planted.spans}
    store = open_store(f"file://{tmp_path}/store")
    card = elsewhere.prepare(*make_request(files, [], load(ROOT / "configs/policy/data.yaml", Rules)), store)
    kept = [json.loads(line) for _, path in prepared.fetch(card, store)[0] for line in path.read_text().splitlines()]
    texts = "\n".join(row["messages"][1]["content"] for row in kept) + card.model_dump_json()
    assert [value for value in values if value in texts] == []
    # Values alone may repeat between rows, and rows may hold several of a kind: counted are rows and kinds.
    told = sum(found.counts["mended"] for name, found in card.found.items() if name in ("personal", "secrets"))
    planted_kinds = sum(len({kind for *_, kind in planted.spans}) for some in sets.values() for planted in some)
    assert 0.95 * planted_kinds <= told <= 1.05 * planted_kinds


MILLION = 1_000_000


def write_million(path: Path) -> dict[str, int]:
    """Half a gigabyte of chats; of each hundred one exact duplicate, one near duplicate, one e-mail address."""
    draw = random.Random(11)
    told: Counter[str] = Counter()
    with path.open("w") as file:
        for number in range(MILLION):
            asked, answered = sentence(draw, 30), sentence(draw, 45)
            match number % 100:
                case 0:
                    first = asked, answered
                case 97:
                    asked, answered = first
                    told["duplicates"] += 1
                case 98:
                    asked, answered = first[0], f"{first[1]} altogether"
                    told["near duplicates"] += 1
                case 99:
                    asked = f"{asked} person{number}@example.com"
                    told["personal"] += 1
            file.write(json.dumps(chat(asked, answered)) + "\n")
    return dict(told)


class Memory(threading.Thread):
    """The most resident memory of a process and all that it started, looked at twice a second."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        super().__init__(daemon=True)
        self._root = psutil.Process(process.pid)
        self.most: Counter[str] = Counter()

    def run(self) -> None:
        while self._root.is_running() and self._root.status() != psutil.STATUS_ZOMBIE:
            now: Counter[str] = Counter()
            for process in [self._root, *self._root.children(recursive=True)]:
                try:
                    memory, name = process.memory_full_info(), process.name()
                except psutil.Error:
                    continue
                is_ours = process == self._root or name.startswith("ray::")
                kind = "driver" if process == self._root else "worker" if is_ours else "ray"
                now[f"largest {kind}"] = max(now[f"largest {kind}"], memory.rss)
                now["driver and workers"] += memory.pss if is_ours else 0
                now["all, Ray's own included"] += memory.pss
            for name, size in now.items():
                self.most[name] = max(self.most[name], size)
            time.sleep(0.5)


@pytest.mark.long
@pytest.mark.timeout(3000)
def test_a_million_rows_in_bounded_memory_through_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "million.jsonl"
    planted_rows = write_million(path)
    store = open_store(f"file://{tmp_path}/store")
    progress = tmp_path / "progress"
    command = [
        *(sys.executable, "-m", "jobs", "data", "prepare", str(path), "--store", store.url, "--json"),
        *("--rules", "configs/policy/data.yaml"),
    ]
    variables = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}

    def run() -> "subprocess.Popen[str]":
        with progress.open("w") as file:
            return subprocess.Popen(command, cwd=ROOT, env=variables, stdout=subprocess.PIPE, stderr=file, text=True)

    def finished() -> int:
        return sum(item.key.endswith(".arrow") for item in store.list(keys.prepared_sets_prefix()))

    began = time.monotonic()
    killed = run()
    memory = Memory(killed)
    memory.start()
    until(lambda: finished() >= 30, killed)
    killed.kill()
    killed.communicate()
    before = finished()
    spent = time.monotonic() - began
    began = time.monotonic()
    again = run()
    rest = Memory(again)
    rest.start()
    output = again.communicate()[0]
    said = progress.read_text()
    assert again.returncode == 0, said[-4000:]
    seconds = time.monotonic() - began
    card = json.loads(output)
    rate = (MILLION - before * 5_000) / seconds
    peaks = ", ".join(f"{name} {size / 2**20:,.0f} MiB" for name, size in (memory.most | rest.most).items())
    print(f"\n{path.stat().st_size / 2**20:,.0f} MiB; {spent:.0f} s to the kill at part {before}, then {seconds:.0f} s")
    print(f"{rate:,.0f} rows/s after it; {peaks}")
    print("\n".join(line for line in said.splitlines() if line.startswith("data:")))
    assert f"{before:,} parts were examined before" in said
    assert {name: sum(card["found"][name]["counts"].values()) for name in planted_rows} == planted_rows
    assert card["after"]["rows"] == MILLION - planted_rows["duplicates"] - planted_rows["near duplicates"]
    assert max((memory.most | rest.most).values()) < 2 * 2**30
