"""All that the store has of one run, put together for a report: what was done, what was lost, what came of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from cluster import keys, ledger, records, registry
from cluster.errors import ObjectNotFound
from cluster.ledger import Entry, in_words
from cluster.records import AdapterRecord, AttemptRecord, CheckpointManifest, RunEvent
from cluster.store import Store
from jobs import runs
from jobs.chart import Mark, MarkKind, Span
from jobs.runs import Run


@dataclass(frozen=True)
class History:
    """One run. `steps` are its metrics lines, each step once; `checkpoints` those that the store still has."""

    store_url: str
    run: Run
    attempts: list[AttemptRecord]
    steps: list[dict[str, Any]]
    checkpoints: list[CheckpointManifest]
    published: list[AdapterRecord]
    entries: list[Entry]

    @property
    def done(self) -> int:
        """How many steps were done."""
        return self.steps[-1]["step"] + 1 if self.steps else 0


def read(store: Store, run_id: str) -> History:
    """Raises InputError when there is no such run; ObjectDamaged."""
    run = runs.find(store, run_id)
    publish = run.record.recipe.get("publish")
    # A full fine-tune becomes a model revision, and has no adapter versions.
    versions = registry.versions(store, publish["name"]) if publish else []
    return History(
        store_url=store.url,
        run=run,
        attempts=runs.attempts(store, run_id),
        steps=list(runs.read_steps(store, run_id)),
        checkpoints=_checkpoints(store, run_id),
        published=[version for version in versions if version.run_id == run_id],
        entries=runs.ledger_entries(store, run.record),
    )


def _checkpoints(store: Store, run_id: str) -> list[CheckpointManifest]:
    found = []
    for step in runs.checkpoint_steps(store, run_id):
        try:
            found.append(records.read(store, keys.checkpoint_manifest(run_id, step), CheckpointManifest))
        except ObjectNotFound:  # a run that goes on collects its old ones
            continue
    return found


def marks(history: History) -> list[Mark]:
    """What the charts show, by step. What happened between two attempts stands where the steps before it ended.

    An attempt that goes on at once, with nothing lost, needs no mark beside the one that says why.
    """
    events = history.run.events
    found = [
        Mark(kind, _step_of(number, events, history.done), event.text)
        for number, event in enumerate(events)
        if (kind := _kind(event))
    ]
    why = {mark.step for mark in found if mark.kind != "attempt"}
    found = [mark for mark in found if mark.kind != "attempt" or mark.step not in why]
    found += [Mark("checkpoint", each.step, f"{_size(each):,} bytes") for each in history.checkpoints]
    return sorted(found, key=lambda mark: mark.step)


def lost(events: Sequence[RunEvent]) -> list[Span]:
    """The steps that were done, lost and done again."""
    return [
        Span(event.step, event.step + event.steps_lost)
        for event in events
        if event.step is not None and event.steps_lost
    ]


def evaluations(history: History) -> list[tuple[int, float | None]]:
    """(steps done, evaluation loss), in order; of a step that was done again, what was measured last."""
    found = {
        event.step: event.evaluation_loss
        for event in history.run.events
        if event.kind == "evaluation" and event.step is not None
    }
    return sorted(found.items())


def totals(history: History) -> dict[str, str]:
    """The run in figures, by what they are."""
    steps, events = history.steps, history.run.events
    seconds = sum(step["step_s"] for step in steps)
    tokens = sum(step["tokens"] for step in steps)
    waited, stalled = (sum(step[key] for step in steps) for key in ("data_wait_s", "checkpoint_stall_s"))
    again = sum(event.steps_lost for event in events)
    wall = _seconds(events[0].at, events[-1].at) if events else 0.0
    losses = [step["loss"] for step in steps if step["loss"] is not None]
    measured = evaluations(history)
    return {
        "steps done": f"{history.done:,}",
        "last training loss": f"{losses[-1]:.4f}" if losses else "none",
        "last evaluation loss": f"{measured[-1][1]:.4f}" if measured else "not measured",
        "samples": f"{steps[-1]['samples_seen']:,}" if steps else "0",
        "tokens": f"{tokens:,}, of which {sum(step['supervised_tokens'] for step in steps):,} supervised",
        "time in steps": f"{span(seconds)}, {tokens / seconds:,.0f} tokens/s" if seconds else "none",
        "from the first event to the last": span(wall),
        "waiting for data": _share(waited, seconds),
        "standing still for checkpoints": _share(stalled, seconds),
        "cost so far": in_words(ledger.total(history.entries)) if history.entries else "nothing in the ledger",
        "workers were held for": span(ledger.total(history.entries).held_ms / 1000),
        "done again": f"{again:,} steps, {span(sum(event.seconds_lost for event in events))}" if again else "nothing",
    }


def span(seconds: float) -> str:
    """A length of time, for people."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def _share(part: float, whole: float) -> str:
    return f"{span(part)}, {100 * part / whole:.1f} % of the time in steps" if whole else "none"


def _kind(event: RunEvent) -> MarkKind | None:
    if event.kind == "attempt":
        return "attempt" if event.step else None  # a first start is no event of interest
    if event.kind in ("failure", "memory", "move", "skipped"):
        return event.kind
    return "failure" if event.state == "failed" else "stop" if event.state == "stopped" else None


def _step_of(number: int, events: Sequence[RunEvent], done: int) -> int:
    """After how many steps an event was: its own word, else what the next attempt says, else the end."""
    own = events[number].step
    if own is not None:
        return own
    following = next((event for event in events[number:] if event.kind == "attempt"), None)
    return following.step + following.steps_lost if following and following.step is not None else done


def _size(checkpoint: CheckpointManifest) -> int:
    return sum(file.size for file in checkpoint.files)


def _seconds(first: str, last: str) -> float:
    return (datetime.fromisoformat(last) - datetime.fromisoformat(first)).total_seconds()
