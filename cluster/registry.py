"""The adapter registry: immutable versions, and aliases that move by appending to a log.

    publish     claim the next version (create-if-absent), write the files, write record.json last
    resolve     `name` (its stable alias), `name@7`, `name@canary`
    set_alias   append the next numbered entry; two at once get two entries, in some order, none lost; to a version that
                must pass an evaluation only when it has, or when the alias held it before (evaluation.py)

A claim without a record is a publisher that died or has not finished: it is never listed, and its number is
never given again. Publishing the same bytes of the same run twice gives the same version.
"""

import getpass
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from cluster import evaluation, keys, records
from cluster.errors import (
    AdapterNotFound,
    ConfigError,
    Fault,
    ObjectDamaged,
    ObjectExists,
    ObjectNotFound,
    ReleaseRefused,
)
from cluster.evaluation import EvaluationReport
from cluster.records import AdapterRecord, AliasEntry, Artefact, BaseModelRef, Canary, Requirement, RunRecord
from cluster.store import Store

STABLE = "stable"
CANARY = "canary"


@dataclass(frozen=True)
class Reference:
    """A parsed adapter reference: a name, and a version number or an alias."""

    name: str
    version: int | None
    alias: str | None


def parse(text: str) -> Reference:
    """Parse `name`, `name@7`, `name@alias`. Raises ConfigError."""
    name, at, selector = text.partition("@")
    if not keys.is_name(name) or (at and not keys.is_name(selector)):
        raise ConfigError([Fault(f"adapter {text!r}", "", "write name, name@7 or name@alias, in lower case")])
    if selector.isdecimal() and selector != str(int(selector)):  # two spellings of one version would be two models
        raise ConfigError([Fault(f"adapter {text!r}", "", f"write {name}@{int(selector)}")])
    if not at:
        return Reference(name, None, STABLE)
    return Reference(name, int(selector), None) if selector.isdecimal() else Reference(name, None, selector)


def publish(
    store: Store,
    name: str,
    folder: Path,
    base: BaseModelRef,
    run_id: str,
    step: int,
    metrics: dict[str, float] | None = None,
    artefacts: tuple[Artefact, ...] = (),
    gate: Requirement | None = None,
    run: RunRecord | None = None,
) -> AdapterRecord:
    """Make the adapter in `folder` the next version of `name`. Its content is checked by the caller.

    Args:
        folder: holds adapter_model.safetensors, adapter_config.json and NOTICE.
        metrics: figures of the run that are worth reading beside the version.
        artefacts: what it was made from, with the licences of that.
        gate: what it must show before an alias may point at it.
        run: the run's record, whose digests and parent the version keeps.
    """
    if name == base.name:
        raise ConfigError([Fault(f"adapter name {name!r}", "", "is the base model's own name; choose another")])
    if not keys.is_name(name):
        raise ConfigError([Fault(f"adapter name {name!r}", "", "use lower case letters, digits, '.', '_' and '-'")])
    paths = sorted(path for path in folder.iterdir() if path.is_file())
    files = tuple(records.describe_file(path, path.name) for path in paths)
    digest = records.digest_of(file for file in files if file.file.startswith("adapter_"))
    for number in version_numbers(store, name):
        with suppress(ObjectDamaged):  # an old record that cannot be read must not stop new versions
            earlier = record(store, name, number)
            if (earlier.run_id, earlier.step, earlier.digest) == (run_id, step, digest):
                return earlier
    version = _claim(store, name, run_id)
    for path in paths:
        store.upload(path, keys.adapter_file(name, version, path.name))
    made = AdapterRecord(
        name=name,
        version=version,
        digest=digest,
        files=files,
        base=base,
        run_id=run_id,
        step=step,
        metrics=metrics or {},
        created_at=records.now(),
        artefacts=artefacts,
        gate=gate,
        digests=run.digests if run else None,
        parent=run.parent if run else None,
    )
    store.create(keys.adapter_record(name, version), made.to_bytes())
    return made


def _claim(store: Store, name: str, run_id: str) -> int:
    """Take the next free version number; every claim, finished or not, keeps its number for ever."""
    taken = [version for version, _ in _version_files(store, name)]
    version = max(taken, default=0) + 1
    while True:
        try:
            store.create(keys.adapter_file(name, version, "claim"), run_id.encode())
            return version
        except ObjectExists:
            version += 1


def _version_files(store: Store, name: str) -> list[tuple[int, str]]:
    found = []
    for item in store.list(keys.adapter_prefix(name)):
        version, _, file = item.key.removeprefix(keys.adapter_prefix(name)).partition("/")
        if version.isdecimal():
            found.append((int(version), file))
    return found


def version_numbers(store: Store, name: str) -> list[int]:
    """The committed versions of an adapter, in order."""
    return sorted(version for version, file in _version_files(store, name) if file == "record.json")


def versions(store: Store, name: str) -> list[AdapterRecord]:
    """The records of all committed versions, in order."""
    return [record(store, name, version) for version in version_numbers(store, name)]


def names(store: Store) -> list[str]:
    """Every adapter that has a committed version."""
    found = set()
    for item in store.list(keys.adapters_prefix()):
        match = re.fullmatch(r"adapters/([^/]+)/\d+/record\.json", item.key)
        if match:
            found.add(match[1])
    return sorted(found)


def record(store: Store, name: str, version: int) -> AdapterRecord:
    """The record of one version. Raises AdapterNotFound."""
    try:
        return records.read(store, keys.adapter_record(name, version), AdapterRecord)
    except ObjectNotFound:
        have = ", ".join(map(str, version_numbers(store, name)))
        hint = f"its versions: {have}" if have else f"adapters here: {', '.join(names(store)) or 'none'}"
        raise AdapterNotFound(f"no adapter {name}@{version} in {store.url}; {hint}") from None


def resolve(store: Store, reference: str) -> AdapterRecord:
    """The version that a reference stands for now. Raises AdapterNotFound, ConfigError."""
    wanted = parse(reference)
    if wanted.version is not None:
        return record(store, wanted.name, wanted.version)
    state = alias_state(store, wanted.name)
    version = alias_targets(state).get(wanted.alias or STABLE) if state else None
    if version is None:
        have = ", ".join(sorted(alias_targets(state))) if state else ""
        hint = f"its aliases: {have}" if have else f"adapters here: {', '.join(names(store)) or 'none'}"
        raise AdapterNotFound(f"no alias {wanted.alias} of adapter {wanted.name} in {store.url}; {hint}")
    return record(store, wanted.name, version)


def alias_targets(state: AliasEntry) -> dict[str, int]:
    """Alias to version, for every alias that is set."""
    targets = dict(state.others)
    if state.stable is not None:
        targets[STABLE] = state.stable
    if state.canary is not None:
        targets[CANARY] = state.canary.version
    return targets


def alias_history(store: Store, name: str) -> list[AliasEntry]:
    """The alias log of an adapter, oldest first."""
    return [records.read(store, item.key, AliasEntry) for item in store.list(keys.aliases_prefix(name))]


def alias_state(store: Store, name: str) -> AliasEntry | None:
    """What the aliases of an adapter are now: the last entry of its log."""
    entries = [item.key for item in store.list(keys.aliases_prefix(name))]
    return records.read(store, entries[-1], AliasEntry) if entries else None


def set_alias(
    store: Store,
    name: str,
    alias: str,
    version: int | None,
    why: str,
    by: str = "",
    percent: int = 0,
    override_gate: bool = False,
    report: EvaluationReport | None = None,
) -> AliasEntry:
    """Point an alias at a version, or remove it with None.

    Args:
        percent: for `canary` alone: the share of the name's traffic that it answers.
        by: who; the user of this process when empty.
        override_gate: move it although the version has not passed its evaluation; the log keeps what was overridden.
        report: what a version that need not show anything is promoted by.

    Raises:
        AdapterNotFound: no such version.
        ReleaseRefused: the version must pass an evaluation and has not, or has less to pass than the one in `stable`;
            and this alias has never held it.
    """
    if not keys.is_name(name):
        raise ConfigError([Fault(f"adapter {name!r}", "", "write the adapter's name, in lower case")])
    if not keys.is_name(alias) or alias.isdecimal():
        raise ConfigError([Fault(f"alias {alias!r}", "", "use lower case letters, digits and '-', not a number")])
    if override_gate and not why.strip():
        raise ConfigError([Fault(f"alias {name}@{alias}", "", "say --why the gate is overridden: the log keeps it")])
    wanted = None if version is None else record(store, name, version)
    if wanted is None:
        resolve(store, f"{name}@{alias}")
    if alias == CANARY and not 0 <= percent <= 100:
        raise ConfigError([Fault(f"alias {name}@{alias}", "", f"percent {percent}: give 0 to 100")])

    def change(state: AliasEntry, entries: list[str]) -> AliasEntry:
        overridden: tuple[str, ...] = ()
        if wanted is not None:  # judged on the very state that the next entry follows
            reasons = evaluation.refusals(store, wanted, state.stable, report)
            if reasons and not _has_held(store, entries, alias, wanted.version):
                if not override_gate:
                    raise _refusal(store, wanted, alias, reasons)
                overridden = reasons
        if alias == STABLE:
            changed: dict[str, object] = {"stable": version}
        elif alias == CANARY:
            changed = {"canary": None if version is None else Canary(version=version, percent=percent)}
        else:
            others = {key: value for key, value in state.others.items() if key != alias}
            changed = {"others": others if version is None else {**others, alias: version}}
        return state.model_copy(update={**changed, "overridden": overridden})

    return _append(store, name, change, by or getpass.getuser(), why)


def promote(
    store: Store, wanted: AdapterRecord, report: EvaluationReport | None, alias: str = STABLE, why: str = ""
) -> AliasEntry:
    """Point an alias at a version because of its report, whether or not the version requires one.

    Raises ReleaseRefused: also where `set_alias` would let it pass.
    """
    state = alias_state(store, wanted.name)
    requirement = wanted.gate or (report.requirement if report else None)
    if requirement:
        reasons = evaluation.judge(report, wanted.version, requirement, state.stable if state else None)
    else:
        reasons = ("it was never evaluated, and none is required: `luthier jobs evaluate` it with a --recipe",)
    if reasons:
        raise _refusal(store, wanted, alias, reasons)
    assert report
    said = why or f"promoted by its report {report.number}"
    return set_alias(store, wanted.name, alias, wanted.version, said, report=report)


def _refusal(store: Store, wanted: AdapterRecord, alias: str, reasons: tuple[str, ...]) -> ReleaseRefused:
    head = f"{wanted.name}@{wanted.version} may not become {wanted.name}@{alias}:"
    return ReleaseRefused("\n  ".join([head, *reasons, evaluation.way_out(wanted, alias, store.url)]))


def _has_held(store: Store, entries: list[str], alias: str, version: int) -> bool:
    """Whether an alias was at a version in any of these entries of its log; the newest are looked at first."""
    for entry in reversed(entries):
        with suppress(ObjectDamaged):  # one that cannot be read tells nothing, and must not hide the others
            if alias_targets(records.read(store, entry, AliasEntry)).get(alias) == version:
                return True
    return False


def _append(
    store: Store, name: str, change: Callable[[AliasEntry, list[str]], AliasEntry], by: str, why: str
) -> AliasEntry:
    """Apply `change` to the last entry and write it under the next number, again until nobody was faster.

    Args:
        change: from the last entry and the keys of all, the next one.
    """
    while True:
        entries = [item.key for item in store.list(keys.aliases_prefix(name))]
        state = records.read(store, entries[-1], AliasEntry) if entries else AliasEntry(by="", why="", at="")
        number = int(entries[-1].removesuffix(".json").rpartition("/")[2]) + 1 if entries else 1
        entry = change(state, entries).model_copy(update={"by": by, "why": why, "at": records.now()})
        try:
            store.create(keys.alias_entry(name, number), entry.to_bytes())
            return entry
        except ObjectExists:
            continue
