"""A run's life in the store: what happened to it, what state it is in, and how to ask it to stop.

Written by the driver and by rank 0, read by anybody, also when the cluster is gone. The states, and who moves a run
from one to the next, are in jobs/README.md. An event is one object under the next free number (create-if-absent), so
that two writers lose none.
"""

import getpass
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date, timedelta
from typing import Any
from uuid import uuid4

from cluster import keys, ledger, records
from cluster.errors import InputError, ObjectDamaged, ObjectExists, ObjectNotFound, StoreError
from cluster.ledger import Entry
from cluster.records import (
    ENDED,
    AttemptRecord,
    CheckpointManifest,
    CheckpointRef,
    EventKind,
    Heartbeat,
    Record,
    RunEvent,
    RunRecord,
    RunState,
    StopRequest,
)
from cluster.store import Store

HEARTBEAT_S = 10.0
FOLLOW_S = 2.0


@dataclass(frozen=True)
class Run:
    """A run as the store has it now."""

    record: RunRecord
    state: RunState
    events: list[RunEvent]


def tell(
    store: Store,
    run_id: str,
    text: str,
    state: RunState | None = None,
    *,
    kind: EventKind | None = None,
    step: int | None = None,
    evaluation_loss: float | None = None,
    steps_lost: int = 0,
    seconds_lost: float = 0.0,
) -> None:
    """Append an event to a run's log."""
    event = RunEvent(
        at=records.now(),
        state=state,
        kind=kind,
        text=text,
        step=step,
        evaluation_loss=evaluation_loss,
        steps_lost=steps_lost,
        seconds_lost=seconds_lost,
    )
    _append(store, keys.events_prefix(run_id), lambda number: keys.event(run_id, number), lambda _: event)


def begin_attempt(store: Store, run_id: str, first_step: int, world_size: int, micro_batch: int) -> int:
    """Take the next attempt's number."""

    def made(number: int) -> AttemptRecord:
        return AttemptRecord(
            number=number,
            id=uuid4().hex,
            first_step=first_step,
            world_size=world_size,
            micro_batch=micro_batch,
            at=records.now(),
        )

    return _append(store, keys.attempts_prefix(run_id), lambda number: keys.attempt(run_id, number), made)


def attempts(store: Store, run_id: str) -> list[AttemptRecord]:
    """All starts of a run's workers, in order."""
    return [records.read(store, item.key, AttemptRecord) for item in store.list(keys.attempts_prefix(run_id))]


def ask_to_stop(store: Store, run_id: str) -> int:
    """Leave a stop request. Returns how many there are now."""
    request = StopRequest(by=getpass.getuser(), at=records.now())
    prefix = keys.stop_requests_prefix(run_id)
    return _append(store, prefix, lambda number: keys.stop_request(run_id, number), lambda _: request)


def stop_requests(store: Store, run_id: str) -> int:
    """How many stop requests there are."""
    return sum(1 for _ in store.list(keys.stop_requests_prefix(run_id)))


def clear_stop_requests(store: Store, run_id: str) -> None:
    """Forget the stop requests: a stopped run goes on."""
    for item in list(store.list(keys.stop_requests_prefix(run_id))):
        store.delete(item.key)


def beat(store: Store, run_id: str, driver: str) -> None:
    """Say that the driver lives."""
    store.put(keys.heartbeat(run_id), Heartbeat(at=records.now(), driver=driver).to_bytes())


def driver_of(store: Store, run_id: str) -> str | None:
    """Which driver said last that it lives."""
    try:
        return records.read(store, keys.heartbeat(run_id), Heartbeat).driver
    except ObjectNotFound:
        return None


def ledger_entries(store: Store, record: RunRecord) -> list[Entry]:
    """What a run has held so far, from its first day to its driver's last one."""
    try:
        last = records.read(store, keys.heartbeat(record.run_id), Heartbeat).at
    except ObjectNotFound:
        last = record.created_at
    after = str(date.fromisoformat(last[:10]) + timedelta(days=1))  # the last entry may come after the last heartbeat
    return ledger.read_run(store, record.run_id, record.created_at[:10], after)


def find(store: Store, run_id: str) -> Run:
    """A run by its id. Raises InputError when there is none."""
    try:
        if not keys.is_name(run_id):
            raise ObjectNotFound(run_id)
        record = records.read(store, keys.run_record(run_id), RunRecord)
    except ObjectNotFound:
        raise InputError(
            f"no run {run_id!r} in {store.url}; `luthier jobs list --store {store.url}` shows them"
        ) from None
    events = read_events(store, run_id)
    return Run(record, records.run_state(store, run_id, events), events)


def checkpoint_steps(store: Store, run_id: str) -> list[int]:
    """The steps that have a committed checkpoint, in order."""
    prefix = keys.checkpoints_prefix(run_id)
    names = (item.key.removeprefix(prefix) for item in store.list(prefix))
    return sorted(int(name.split("/")[0]) for name in names if name.endswith("/manifest.json"))


def find_checkpoint(store: Store, reference: str) -> CheckpointRef:
    """The checkpoint that RUN (its newest) or RUN@STEP names. Raises InputError when there is none."""
    run_id, at, step = reference.partition("@")
    find(store, run_id)
    steps = checkpoint_steps(store, run_id)
    if not steps or (at and (not step.isdecimal() or int(step) not in steps)):
        have = f"it has {', '.join(map(str, steps))}" if steps else "it has none"
        raise InputError(f"from={reference}: no such checkpoint of run {run_id}; {have}")
    chosen = int(step) if step else steps[-1]
    try:
        _check_sizes(store, run_id, chosen)
    except StoreError as error:
        others = [str(each) for each in steps if each != chosen]
        have = f"name another: from={run_id}@{' or '.join(others)}" if others else "the run has no other"
        raise InputError(f"from={reference}: {error}; {have}") from error
    return CheckpointRef(run_id=run_id, step=chosen)


def _check_sizes(store: Store, run_id: str, step: int) -> None:
    """What can be seen of a checkpoint without reading it. Raises ObjectDamaged."""
    prefix = keys.checkpoint_prefix(run_id, step)
    sizes = {item.key.removeprefix(prefix): item.size for item in store.list(prefix)}
    for file in records.read(store, keys.checkpoint_manifest(run_id, step), CheckpointManifest).files:
        if sizes.get(file.file) != file.size:
            there = f"has {sizes[file.file]} bytes" if file.file in sizes else "is missing"
            raise ObjectDamaged(f"{store.url}/{prefix}{file.file} {there}, and its manifest says {file.size}")


def run_ids(store: Store) -> list[str]:
    """Every run that the store knows, by id."""
    found = {item.key.split("/")[1] for item in store.list(keys.runs_prefix()) if item.key.endswith("/run.json")}
    return sorted(found)


def read_events(store: Store, run_id: str) -> list[RunEvent]:
    """What happened to a run, in order."""
    return [records.read(store, item.key, RunEvent) for item in store.list(keys.events_prefix(run_id))]


def read_steps(store: Store, run_id: str) -> Iterator[dict[str, Any]]:
    """Every step of a run in order, each once: an attempt takes the place of all earlier ones from its start on."""
    starts = {attempt.number: attempt.first_step for attempt in attempts(store, run_id)}
    parts: dict[int, list[str]] = {number: [] for number in starts}
    for part in store.list(keys.metrics_prefix(run_id)):
        number = int(part.key.removeprefix(keys.metrics_prefix(run_id)).split("-")[0])
        parts[number].append(part.key)
    steps: dict[int, dict[str, Any]] = {}
    for number, first_step in sorted(starts.items()):
        steps = {step: line for step, line in steps.items() if step < first_step}
        for key in parts[number]:
            steps |= {line["step"]: line for line in _lines(store, key)}
    return (steps[number] for number in sorted(steps))


def described(store: Store, run_id: str) -> dict[str, Any]:
    """What a run was and where it came to, as flat names and values, to be compared with another's."""
    found = find(store, run_id)
    last = max(read_steps(store, run_id), key=lambda step: int(step["step"]), default=None)
    record = found.record.model_dump(mode="json", exclude={"run_id", "created_at"})
    return {
        **_flat(record),
        "state": found.state,
        "steps": last["step"] + 1 if last else 0,
        "loss": last["loss"] if last else None,
    }


def _flat(tree: dict[str, Any], above: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{above}{name}.") if isinstance(value, dict) else {f"{above}{name}": value}
    return flat


def follow(store: Store, run_id: str, wait: bool) -> Iterator[RunEvent]:
    """The events of a run, each once; with `wait` also those to come, until the run has ended or is lost."""
    told = 0
    while True:
        run = find(store, run_id)
        yield from run.events[told:]
        told = len(run.events)
        if not wait or run.state in (*ENDED, "lost"):
            return
        time.sleep(FOLLOW_S)


def _lines(store: Store, key: str) -> Iterator[dict[str, Any]]:
    for line in store.get(key).decode().splitlines():
        try:
            yield json.loads(line)
        except ValueError as error:
            raise ObjectDamaged(f"{store.url}/{key} holds a line that is no step: {error}") from error


def _append(store: Store, prefix: str, key: Callable[[int], str], made: Callable[[int], Record]) -> int:
    """Write under the next free number. Returns it."""
    number = sum(1 for _ in store.list(prefix)) + 1
    while True:
        try:
            store.create(key(number), made(number).to_bytes())
            return number
        except ObjectExists:
            number += 1
