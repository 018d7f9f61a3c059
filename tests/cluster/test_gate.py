"""The evaluation gate: no alias moves to a version that has not passed, by whatever way, and every way back is open."""

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from cluster import cli, evaluation, keys, registry
from cluster.errors import ConfigError, LuthierError, ReleaseRefused, exit_code
from cluster.evaluation import Against, EvaluationReport, Measure
from cluster.folder import FolderStore
from cluster.records import AdapterRecord, BaseModelRef, Requirement

BASE = BaseModelRef(name="tiny", revision="r1", licence="apache-2.0")
REQUIRED = Requirement.of(("loss", "regression"), {"loss": {"max_loss": 2.0}}, compares=True)
OTHER = Requirement.of(("loss",), {"loss": {"max_loss": 9.0}})


@pytest.fixture
def store(tmp_path: Path) -> FolderStore:
    return FolderStore(tmp_path / "store")


def publish(store: FolderStore, gate: Requirement | None = REQUIRED) -> AdapterRecord:
    """The next version of `support`."""
    number = len(registry.version_numbers(store, "support")) + 1
    with TemporaryDirectory() as name:
        (Path(name) / "adapter_model.safetensors").write_text(str(number))
        return registry.publish(store, "support", Path(name), BASE, f"run-{number}", 1, gate=gate)


def report(
    store: FolderStore,
    record: AdapterRecord,
    passed: bool = True,
    against: int | None = None,
    requirement: Requirement = REQUIRED,
    adapter: str | None = None,
) -> EvaluationReport:
    loss = Measure(
        suite="loss",
        name="loss",
        value=1.5 if passed else 3.25,
        bound="at most",
        threshold=2.0,
        passed=passed,
        samples=10,
    )
    return evaluation.add(
        store,
        EvaluationReport(
            name=record.name,
            version=record.version,
            number=0,
            adapter=adapter or record.digest,
            base=BASE,
            requirement=requirement,
            passed=passed,
            measures=(loss,),
            against=Against(version=against, digest="") if against else None,
            by="ada",
            created_at="",
        ),
    )


def stable(store: FolderStore) -> int | None:
    state = registry.alias_state(store, "support")
    return state.stable if state else None


Prepare = Callable[[FolderStore, AdapterRecord], object]
REFUSED: dict[str, tuple[Prepare, str]] = {
    "never evaluated": (lambda store, record: None, r"was not evaluated by what it must show \(loss, regression\)"),
    "failed": (lambda s, r: report(s, r, passed=False, against=1), "loss is 3.25, and at most 2 is required"),
    "failed after it had passed": (
        lambda s, r: (report(s, r, against=1), report(s, r, passed=False, against=1)),
        "loss is 3.25",
    ),
    "by another requirement": (lambda s, r: report(s, r, against=1, requirement=OTHER), "was not evaluated"),
    "other weights": (lambda s, r: report(s, r, against=1, adapter="0" * 64), "was not evaluated"),
    "compared with nothing": (lambda s, r: report(s, r), "compares it with no version, and version 1 is in stable now"),
    "compared with another": (lambda s, r: report(s, r, against=7), "compares it with version 7, and version 1 is"),
}


@pytest.mark.parametrize("alias", ["stable", "canary", "night"])
@pytest.mark.parametrize(("prepare", "why"), REFUSED.values(), ids=list(REFUSED))
def test_no_alias_moves_to_a_version_that_has_not_passed(
    store: FolderStore, alias: str, prepare: Prepare, why: str
) -> None:
    publish(store, gate=None)
    registry.set_alias(store, "support", "stable", 1, why="the first, which must show nothing")
    prepare(store, wanted := publish(store))
    with pytest.raises(ReleaseRefused, match=rf"(?s)support@2 may not become support@{alias}:.*{why}") as refused:
        registry.set_alias(store, "support", alias, 2, why="", percent=5)
    assert exit_code(refused.value) == 2
    assert "luthier jobs evaluate support@2" in str(refused.value)
    assert f"luthier cluster alias support@{alias} --version 2 --override-gate" in str(refused.value)
    assert len(registry.alias_history(store, "support")) == 1
    assert registry.resolve(store, "support@2") == wanted, "by its number it answers"
    report(store, wanted, against=1)
    registry.set_alias(store, "support", alias, 2, why="it has passed", percent=5)


def test_a_release_can_be_taken_back_whatever_its_reports_say(store: FolderStore) -> None:
    for number in (1, 2):
        report(store, publish(store), against=number - 1 or None)
        registry.set_alias(store, "support", "stable", number, why="passed")
    report(store, registry.record(store, "support", 1), passed=False, against=2)
    registry.set_alias(store, "support", "stable", 1, why="2 is bad")
    with pytest.raises(ReleaseRefused):
        registry.set_alias(store, "support", "canary", 1, why="it was stable, and never canary")
    registry.set_alias(store, "support", "stable", None, why="withdrawn")
    registry.set_alias(store, "support", "stable", 1, why="back")
    assert stable(store) == 1


def test_a_damaged_report_stops_a_release_and_no_way_back(store: FolderStore) -> None:
    for number in (1, 2, 3):
        report(store, publish(store), against=number - 1 or None)
        if number < 3:
            registry.set_alias(store, "support", "stable", number, why="passed")
    for number in (1, 3):
        store.put(keys.evaluation("support", number, 1), b"{")
    with pytest.raises(ReleaseRefused, match=r"a report cannot be read: .*is not a EvaluationReport"):
        registry.set_alias(store, "support", "stable", 3, why="better")
    assert "damaged" in luthier("adapters", "support", "--store", store.url)
    registry.set_alias(store, "support", "stable", 1, why="2 is bad")
    assert stable(store) == 1


def test_the_log_keeps_what_was_overridden(store: FolderStore) -> None:
    report(store, publish(store), passed=False)
    with pytest.raises(ConfigError, match="say --why"):
        registry.set_alias(store, "support", "stable", 1, why=" ", override_gate=True)
    registry.set_alias(store, "support", "stable", 1, why="the old one leaks", by="ada", override_gate=True)
    registry.set_alias(store, "support", "night", 1, why="the same", by="bob", override_gate=True)
    report(store, publish(store), against=1)
    registry.set_alias(store, "support", "night", 2, why="free", override_gate=True)
    overridden, again, free = registry.alias_history(store, "support")
    assert overridden.overridden == again.overridden == ("loss: loss is 3.25, and at most 2 is required",)
    assert (overridden.by, overridden.why) == ("ada", "the old one leaks")
    assert free.overridden == ()


def test_a_failed_report_that_comes_between_two_looks_counts(store: FolderStore) -> None:
    """The gate is asked again when another entry was faster: it judges the state that its own entry follows."""
    publish(store, gate=None)
    registry.set_alias(store, "support", "stable", 1, why="first")
    report(store, publish(store), against=1)
    publish(store, gate=None)

    class Slow(FolderStore):
        def create(self, key: str, data: bytes) -> None:
            if key == keys.alias_entry("support", 2):  # while 2 is compared with 1, somebody makes 3 stable
                registry.set_alias(store, "support", "stable", 3, why="faster")
            super().create(key, data)

    with pytest.raises(ReleaseRefused, match="compares it with version 1, and version 3 is in stable now"):
        registry.set_alias(Slow(Path(store.url.removeprefix("file://"))), "support", "stable", 2, why="slow")
    assert stable(store) == 3


ALIASES = ("stable", "canary", "night")
RARELY = st.integers(0, 5).map(lambda number: number == 0)
REPORT = st.tuples(st.just("report"), st.integers(1, 4), RARELY.map(lambda failed: not failed))
MOVE = st.tuples(st.just("move"), st.sampled_from((*ALIASES, "stable")), st.integers(1, 4), RARELY)
REMOVE = st.tuples(st.just("remove"), st.sampled_from(ALIASES))
MOVES = st.lists(
    st.one_of(REPORT, MOVE, REPORT, MOVE, REMOVE),
    min_size=6,
    max_size=16,
)


@settings(max_examples=60)
@given(st.tuples(*[RARELY] * 4), MOVES)
def test_no_history_has_an_alias_at_a_version_that_was_not_passed_overridden_or_there_before(
    require_nothing: tuple[bool, ...], moves: list[tuple[object, ...]]
) -> None:
    with TemporaryDirectory() as folder:
        store = FolderStore(Path(folder) / "store")
        free = {version for version, is_free in enumerate(require_nothing, start=1) if is_free}
        newest: dict[int, tuple[bool, int | None]] = {}  # by version: passed, and compared with
        held: set[tuple[str, int]] = set()
        for is_free in require_nothing:
            publish(store, None if is_free else REQUIRED)
        for move in moves:
            match move:
                case ("report", int(version), bool(passed)):
                    now = stable(store)
                    against = None if now == version else now
                    report(store, registry.record(store, "support", version), passed, against)
                    newest[version] = passed, against
                case ("move", str(alias), int(version), bool(override)):
                    passed, against = newest.get(version, (False, None))
                    fits = passed and stable(store) in (None, version, against)
                    now = stable(store)
                    lowered = version in free and now not in (None, version) and now not in free
                    passes = not lowered if version in free else fits
                    may = passes or (alias, version) in held or override
                    before = registry.alias_state(store, "support")
                    try:
                        entry = registry.set_alias(
                            store, "support", alias, version, why="a move", override_gate=override
                        )
                    except ReleaseRefused:
                        assert not may
                        assert registry.alias_state(store, "support") == before
                    else:
                        assert may
                        must_say = not (passes or (alias, version) in held)
                        assert bool(entry.overridden) == must_say
                        held.add((alias, version))
                case ("remove", str(alias)):
                    state = registry.alias_state(store, "support")
                    if state and alias in registry.alias_targets(state):
                        registry.set_alias(store, "support", alias, None, why="away")
        for entry in registry.alias_history(store, "support"):
            assert {(alias, version) for alias, version in registry.alias_targets(entry).items()} <= held


LESS = {
    "nothing at all": (None, "had to show loss, and this one need not"),
    "a suite less": (Requirement.of(("regression",), {"regression": {"max_worse": 0.1}}), "had to show loss, and"),
    "more loss": (
        Requirement.of(("loss", "regression"), {"loss": {"max_loss": 2.5}, "regression": {"max_worse": 0.1}}),
        "loss.max_loss of 2.0, and this one 2.5",
    ),
    "another figure": (
        Requirement.of(("loss", "regression"), {"loss": {"max_increase": 9}, "regression": {"max_worse": 0.1}}),
        "loss.max_loss of 2.0, and this one nothing of it",
    ),
    "a lower score": (
        Requirement.of(("loss", "regression"), {"loss": {"max_loss": 2.0}, "regression": {"max_worse": 0.2}}),
        "regression.max_worse of 0.1, and this one 0.2",
    ),
}


@pytest.mark.parametrize(("gate", "why"), LESS.values(), ids=list(LESS))
def test_who_follows_a_version_must_show_no_less_than_it_had_to(
    store: FolderStore, gate: Requirement | None, why: str
) -> None:
    settings = {"loss": {"max_loss": 2.0, "max_increase": None}, "regression": {"max_worse": 0.1, "prompts": ["a"]}}
    asked = Requirement.of(("loss", "regression"), settings)
    report(store, publish(store, asked), requirement=asked)
    registry.set_alias(store, "support", "stable", 1, why="it has passed")
    wanted = publish(store, gate)
    if gate:
        report(store, wanted, requirement=gate)
    with pytest.raises(ReleaseRefused, match=why):
        registry.set_alias(store, "support", "stable", 2, why="")
    entry = registry.set_alias(store, "support", "stable", 2, why="we ask less from now on", override_gate=True)
    assert why in entry.overridden[0]
    strict = Requirement.of(("loss", "regression", "safety"), {**settings, "loss": {"max_loss": 1.0}})
    report(store, publish(store, strict), requirement=strict)
    registry.set_alias(store, "support", "stable", 1, why="back")
    registry.set_alias(store, "support", "stable", 3, why="stricter")


def test_a_report_by_as_strict_a_recipe_promotes_what_must_show_nothing(store: FolderStore) -> None:
    report(store, publish(store))
    registry.set_alias(store, "support", "stable", 1, why="it has passed")
    wanted = publish(store, gate=None)
    registry.promote(store, wanted, report(store, wanted, against=1))
    assert stable(store) == 2


def luthier(*arguments: str, code: int = 0) -> str:
    """A command of the group `cluster` in this process: what it printed, and its error as `cli.run` tells it."""
    result = CliRunner().invoke(cli.app, arguments)
    if result.exception and not isinstance(result.exception, SystemExit | LuthierError):
        raise result.exception
    error = result.exception if isinstance(result.exception, LuthierError) else None
    assert (exit_code(error) if error else result.exit_code) == code, result.output
    return f"{result.output}{error or ''}"


def test_alias_and_promote_as_a_person_meets_them(store: FolderStore) -> None:
    at = ("--store", store.url)
    report(store, publish(store), passed=False)
    assert "loss is 3.25" in luthier("alias", "support@stable", "--version", "1", *at, code=2)
    refused = luthier("promote", "support@1", *at, code=2)
    assert "support@1 may not become support@stable" in refused
    assert "NO" in refused, "the report's table is shown all the same"
    assert stable(store) is None
    report(store, registry.record(store, "support", 1))
    assert "support@stable is version 1" in luthier("promote", "support@1", *at)
    publish(store)
    assert "passed (2)" in luthier("adapters", "support", *at)
    assert "required" in luthier("adapters", "support", *at)
    overriding = ("alias", "support@canary", "--version", "2", "--override-gate", *at)
    assert "--why" in luthier(*overriding, code=2)
    assert "not evaluated" in luthier(*overriding, "--why", "a trial for ten people")
    assert "a trial for ten people" in luthier("alias", "support", *at)
    luthier("promote", "support@canary", *at, code=2)
    report(store, registry.record(store, "support", 2), against=1)
    luthier("promote", "support@canary", "--why", "ten people liked it", *at)
    assert stable(store) == 2
    assert registry.alias_history(store, "support")[-1].why == "ten people liked it"


def test_promote_wants_a_report_even_of_what_must_show_nothing(store: FolderStore) -> None:
    publish(store, gate=None)
    assert "was never evaluated" in luthier("promote", "support@1", "--store", store.url, code=2)
    report(store, registry.record(store, "support", 1), passed=False)
    assert "loss is 3.25" in luthier("promote", "support@1", "--store", store.url, code=2)
    report(store, registry.record(store, "support", 1))
    luthier("promote", "support@1", "--store", store.url)
    assert stable(store) == 1


def test_one_function_alone_writes_the_alias_log() -> None:
    root = Path(__file__).parents[2]
    files = [path for package in ("cluster", "jobs", "serving", "scripts") for path in (root / package).rglob("*.py")]
    writers = {str(path.relative_to(root)) for path in files if "alias_entry(" in path.read_text()}
    readers = {"scripts/benchmarks/serve_cold.py"}
    assert writers - readers == {"cluster/keys.py", "cluster/registry.py"}
    assert (root / "cluster" / "registry.py").read_text().count("alias_entry(") == 1
    movers = {str(path.relative_to(root)) for path in files if "set_alias(" in path.read_text()}
    assert {path for path in movers if not path.startswith("scripts/")} == {
        "cluster/cli.py",
        "cluster/registry.py",
        "jobs/release.py",
    }
