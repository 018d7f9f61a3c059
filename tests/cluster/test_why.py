"""One cause for everything that may be wrong, whatever could be read; and the root of it where several things are."""

from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import ClusterSilent, PlanError, TokenRefused, VersionMismatch
from cluster.why import explain, room
from cluster.why.facts import (
    ACTORS,
    GROUPS_UNREAD,
    TASKS,
    Application,
    Autoscaler,
    Facts,
    Job,
    Node,
    NodeGroup,
    PlacementGroup,
    Run,
    Work,
)
from cluster.why.finding import Cause

SMALL = {"small": NodeGroup({"CPU": 1}, most=2)}
HEAD = Node("head", is_head=True)
FIRST, SECOND = (Node(name, group="small", total={"CPU": 1, "memory": 2e9}) for name in ("first", "second"))
JOB = Job("train", "01")
WAITING = Work("actor", "Worker", "PENDING_CREATION", "01", resources={"CPU": 1})
IN_USE = tuple(Work("actor", "Other", "ALIVE", "02", node.id, resources={"CPU": 1}) for node in (FIRST, SECOND))
ALIVE = Autoscaler(SMALL, is_alive=True)
HELD = PlacementGroup("pg", "CREATED", "kept", "03", ({"CPU": 1}, {"CPU": 1}), ("first", "second"))
FULL = Facts(jobs=(JOB, Job("other", "02")), nodes=(HEAD, FIRST, SECOND), works=(WAITING, *IN_USE), autoscaler=ALIVE)
EMPTY = Facts(jobs=(JOB,), nodes=(HEAD,), works=(WAITING,), autoscaler=ALIVE)

SEEDED = {
    "silent": (Facts(refused=ClusterSilent("no answer")), Cause.SILENT),
    "token": (Facts(refused=TokenRefused("no")), Cause.TOKEN),
    "version": (Facts(refused=VersionMismatch("2.59")), Cause.VERSION),
    "disk": (replace(EMPTY, nodes=(replace(HEAD, disk=0.97),)), Cause.DISK),
    "environment of a job": (
        Facts(jobs=(Job("bad", "", "FAILED", "no such package", "RUNTIME_ENV_SETUP_FAILURE"),)),
        Cause.ENVIRONMENT,
    ),
    "environment of a task": (
        replace(EMPTY, works=(Work("task", "f", "FAILED", "01", death="RUNTIME_ENV_SETUP_FAILED: no"),)),
        Cause.ENVIRONMENT,
    ),
    "replica": (Facts(applications=(Application("app", "DEPLOYING", reason="ModelError: gone"),)), Cause.REPLICA),
    "too large": (replace(EMPTY, works=(replace(WAITING, resources={"CPU": 2}),)), Cause.INFEASIBLE),
    "of another kind": (replace(EMPTY, works=(replace(WAITING, resources={"CPU": 1, "GPU": 1}),)), Cause.INFEASIBLE),
    "workers of no label": (
        replace(EMPTY, works=(), groups=(PlacementGroup("pg", "PENDING", "", "01", ({"CPU": 1},), (), {"x": "y"}),)),
        Cause.INFEASIBLE,
    ),
    "together too large for any node": (
        replace(
            EMPTY, works=(), groups=(PlacementGroup("pg", "PENDING", "", "01", ({"CPU": 1},) * 2, on_one_node=True),)
        ),
        Cause.INFEASIBLE,
    ),
    "of no label": (
        replace(EMPTY, works=(replace(WAITING, selector={"market": "!in(a, b)", "x": "y"}),)),
        Cause.INFEASIBLE,
    ),
    "dead": (replace(EMPTY, autoscaler=replace(ALIVE, is_alive=False)), Cause.AUTOSCALER),
    "dead before it ever reported": (
        replace(
            EMPTY, autoscaler=Autoscaler(SMALL, error="Traceback (most recent call last):\n  …\nImportError: no x")
        ),
        Cause.AUTOSCALER,
    ),
    "warned before it ever reported": (
        replace(EMPTY, autoscaler=Autoscaler(SMALL, error="x.py:3: DeprecationWarning: y")),
        Cause.NOTHING,
    ),
    "held": (replace(FULL, works=(WAITING,), groups=(HELD,)), Cause.HELD),
    "sold out": (replace(EMPTY, autoscaler=replace(ALIVE, failed={"small": "no capacity"})), Cause.CAPACITY),
    "full": (FULL, Cause.CAP),
    "full without autoscaler": (replace(FULL, autoscaler=None), Cause.CAP),
    "too many at once": (
        replace(EMPTY, works=(), groups=(PlacementGroup("pg", "PENDING", "", "01", ({"CPU": 1},) * 3),)),
        Cause.CAP,
    ),
    "asks for nothing": (
        replace(EMPTY, works=(Work("actor", "Worker", "ALIVE", "01", "head", is_busy=True),)),
        Cause.FORGOTTEN,
    ),
    "helps itself while its workers are coming": (
        replace(
            EMPTY,
            works=(Work("actor", "Board", "ALIVE", "01", "head", is_busy=True),),
            groups=(PlacementGroup("pg", "PENDING", "", "01", ({"CPU": 1},)),),
        ),
        Cause.NOTHING,
    ),
    "no adapter": (Facts(applications=(Application("app", "RUNNING", missing={"skill": "none"}),)), Cause.ADAPTER),
    "pinned by an actor": (
        replace(EMPTY, nodes=(HEAD, FIRST), works=(Work("actor", "Idle", "ALIVE", "01", "first"),)),
        Cause.PINNED,
    ),
    "pinned by an object": (
        replace(EMPTY, nodes=(HEAD, replace(FIRST, pinned_bytes=10**6)), works=()),
        Cause.PINNED,
    ),
    "failed": (Facts(asked=frozenset(["x"]), jobs=(Job("x", status="FAILED", message="exit code 1"),)), Cause.FAILED),
    "lost": (Facts(asked=frozenset(["x"]), run=Run("x", "lost", "step 3")), Cause.LOST),
    "busy": (
        replace(FULL, works=(replace(IN_USE[0], ray_id="01", is_busy=True),)),
        Cause.NOTHING,
    ),
    "coming": (replace(EMPTY, autoscaler=replace(ALIVE, starting={"small": 1})), Cause.NOTHING),
    "sold out, and asked for again, as many as there may be": (
        replace(EMPTY, autoscaler=replace(ALIVE, starting={"small": 2}, failed={"small": "no capacity"})),
        Cause.CAPACITY,
    ),
    "one group has refused another job, and the other has yet to be asked": (
        replace(EMPTY, autoscaler=Autoscaler({**SMALL, "more": SMALL["small"]}, {}, {"small": "none"})),
        Cause.NOTHING,
    ),
    "sold out, and the other group is not asked": (
        replace(EMPTY, autoscaler=Autoscaler({**SMALL, "more": SMALL["small"]}, {"small": 1}, {"small": "none"})),
        Cause.CAPACITY,
    ),
    "on demand instead of spot": (
        replace(EMPTY, autoscaler=Autoscaler({**SMALL, "more": SMALL["small"]}, {"more": 1}, {"small": "none"})),
        Cause.NOTHING,
    ),
    "its last node is still coming": (
        replace(
            FULL, nodes=(HEAD, FIRST), works=(WAITING, IN_USE[0]), autoscaler=replace(ALIVE, starting={"small": 1})
        ),
        Cause.NOTHING,
    ),
    "placed in a moment": (replace(FULL, works=(WAITING,)), Cause.NOTHING),
    "nothing at all": (Facts(), Cause.NOTHING),
    "too little is known": (replace(EMPTY, unread=(TASKS,)), Cause.SILENT),
    "a log is missing": (replace(EMPTY, unread=("monitor.err",)), Cause.NOTHING),
}


@pytest.mark.parametrize("name", SEEDED)
def test_each_cause_is_named(name: str) -> None:
    facts, cause = SEEDED[name]
    finding = explain(facts)
    assert finding.cause is cause, finding
    assert finding.evidence
    assert bool(finding.fix) == (cause is not Cause.NOTHING)


FULL_DISK = replace(SECOND, disk=0.99)
ROOTS = {
    "a shape that nothing has, before the autoscaler that is dead": (
        replace(EMPTY, works=(replace(WAITING, resources={"GPU": 1}),), autoscaler=replace(ALIVE, is_alive=False)),
        Cause.INFEASIBLE,
    ),
    "a dead autoscaler, before the capacity that it could not find": (
        replace(EMPTY, autoscaler=Autoscaler(SMALL, failed={"small": "none"}, is_alive=False)),
        Cause.AUTOSCALER,
    ),
    "what is held for nobody, before the cap that it makes felt": (SEEDED["held"][0], Cause.HELD),
    "a group that runs is no held one": (
        replace(FULL, works=(WAITING, *(replace(each, group="pg") for each in IN_USE)), groups=(HELD,)),
        Cause.CAP,
    ),
    "a held one that would not help is not the cause": (
        replace(FULL, groups=(replace(HELD, bundles=({"memory": 1e9},), nodes=("first",)),)),
        Cause.CAP,
    ),
    "a full disk, before the environment that could not be written to it": (
        replace(SEEDED["environment of a job"][0], nodes=(replace(HEAD, disk=0.99),)),
        Cause.DISK,
    ),
    "what has ended well needs no cluster": (
        Facts(refused=ClusterSilent("no answer"), run=Run("x", "succeeded", "done")),
        Cause.NOTHING,
    ),
    "a full disk is none of a job that runs elsewhere": (
        replace(FULL, asked=frozenset(["other", "02"]), works=IN_USE[:1], nodes=(HEAD, FIRST, FULL_DISK)),
        Cause.NOTHING,
    ),
    "a full disk where a job runs": (
        replace(FULL, asked=frozenset(["other", "02"]), works=IN_USE[1:], nodes=(HEAD, FIRST, FULL_DISK)),
        Cause.DISK,
    ),
    "a full disk where a job may get its place": (
        replace(FULL, asked=frozenset(["train", "01"]), works=(WAITING,), nodes=(HEAD, FULL_DISK)),
        Cause.DISK,
    ),
    "what runs is not known, so that nothing is held for nobody": (
        replace(SEEDED["held"][0], unread=(ACTORS,)),
        Cause.CAP,
    ),
    "nor is a node pinned by an object": (
        replace(SEEDED["pinned by an object"][0], unread=(TASKS,)),
        Cause.SILENT,
    ),
    "another's trouble is none of a job that runs": (
        replace(FULL, asked=frozenset(["other", "02"])),
        Cause.NOTHING,
    ),
    "what has succeeded needs nothing": (
        replace(FULL, asked=frozenset(["train"]), jobs=(replace(JOB, status="SUCCEEDED"),)),
        Cause.NOTHING,
    ),
    "an old failure is not why a cluster rests": (
        Facts(jobs=(Job("new", status="SUCCEEDED"), Job("old", status="FAILED", error="RUNTIME_ENV_SETUP_FAILURE"))),
        Cause.NOTHING,
    ),
    "without the autoscaler's config nothing is called too large": (
        replace(EMPTY, autoscaler=Autoscaler(), unread=(GROUPS_UNREAD,)),
        Cause.NOTHING,
    ),
}


@pytest.mark.parametrize("name", ROOTS)
def test_the_root_is_named_where_several_things_are_wrong(name: str) -> None:
    facts, cause = ROOTS[name]
    assert explain(facts).cause is cause


def test_a_driver_that_was_killed_is_said_to_have_been() -> None:
    message = "Job entrypoint command failed with exit code 137, last available logs (truncated):\nstep 3\nKilled\n"
    job = Job("x", status="FAILED", message=message, last_line="Killed")
    evidence = explain(Facts(asked=frozenset(["x"]), jobs=(job,))).evidence
    assert evidence == "job x: Job entrypoint command failed with exit code 137; it said last: Killed"


def test_a_driver_that_waits_is_called_one() -> None:
    driver = replace(WAITING, name="JobSupervisor", ray_id="train", resources={"CPU": 9})
    assert explain(replace(EMPTY, works=(driver,))).evidence.startswith("the driver of job train asks for 9 CPU, ")
    evidence = explain(replace(EMPTY, works=(replace(driver, resources={}),))).evidence
    assert evidence == "the driver of job train is starting; job train is running"


NAMES = st.sampled_from(["", "a", "b", "01", "!x", "in(a,b)", "\n"])
AMOUNTS = st.dictionaries(st.sampled_from(["CPU", "GPU", "memory", "node:a"]), st.sampled_from([0.0, 0.5, 1.0, 8.0]))
LABELS = st.dictionaries(NAMES, NAMES)
GROUPS = st.builds(NodeGroup, AMOUNTS, st.integers(0, 3), LABELS)
STATES = st.sampled_from(
    ["ALIVE", "PENDING", "PENDING_CREATION", "RUNNING", "FAILED", "SUCCEEDED", "CREATED", "DEAD", "new"]
)
FACTS = st.builds(
    Facts,
    refused=st.none() | st.sampled_from([PlanError("no"), TokenRefused("no")]),
    asked=st.none() | st.frozensets(NAMES),
    run=st.none() | st.builds(Run, NAMES, st.sampled_from(["running", "lost", "failed", "stopped"]), NAMES),
    jobs=st.lists(st.builds(Job, NAMES, NAMES, STATES, NAMES, NAMES), max_size=3).map(tuple),
    works=st.lists(
        st.builds(
            Work, st.sampled_from(["actor", "task"]), NAMES, STATES, NAMES, NAMES, NAMES, AMOUNTS, LABELS, st.booleans()
        ),
        max_size=4,
    ).map(tuple),
    groups=st.lists(
        st.builds(
            PlacementGroup, NAMES, STATES, NAMES, NAMES, st.lists(AMOUNTS, max_size=3).map(tuple),
            st.lists(NAMES, max_size=3).map(tuple),
        ),
        max_size=3,
    ).map(tuple),
    nodes=st.lists(
        st.builds(Node, NAMES, st.booleans(), NAMES, AMOUNTS, LABELS, st.floats(0, 1), st.integers(0, 2)), max_size=3
    ).map(tuple),
    autoscaler=st.none()
    | st.builds(
        Autoscaler, st.dictionaries(NAMES, GROUPS), st.dictionaries(NAMES, st.integers(0, 2)),
        st.dictionaries(NAMES, NAMES), st.none() | st.booleans(), NAMES,
    ),
    applications=st.lists(
        st.builds(Application, NAMES, STATES, NAMES, st.dictionaries(NAMES, NAMES)), max_size=2
    ).map(tuple),
    unread=st.lists(NAMES, max_size=1).map(tuple),
)  # fmt: skip


@given(facts=FACTS, left_out=st.sets(st.sampled_from([field.name for field in fields(Facts)])))
def test_there_is_one_answer_whatever_is_known(facts: Facts, left_out: set[str]) -> None:
    known = Facts(**{field.name: getattr(facts, field.name) for field in fields(Facts) if field.name not in left_out})
    finding = explain(known)
    assert finding.evidence
    assert bool(finding.fix) == (finding.cause is not Cause.NOTHING)
    groups = known.autoscaler.groups.values() if known.autoscaler else ()
    places = [*(node.total for node in known.nodes), *(group.resources for group in groups if group.most)]
    if finding.cause is Cause.INFEASIBLE and not any(work.selector for work in known.works):
        asked = [work.resources for work in known.works] + [each for group in known.groups for each in group.bundles]
        assert any(not any(room.is_fit(each, place) for place in places) for each in asked)
