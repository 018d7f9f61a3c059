"""The job that `luthier cluster doctor` submits: it asks a probe on every node, and has them measure each other.

    python -m cluster.doctor '{"timeout_s": 20, "store": "s3://…", "secrets": {…}}'

It takes no CPU and no GPU, so that it runs beside whatever else does, and prints one line that begins with MARK.
"""

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any
from uuid import uuid4

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.doctor import links
from cluster.doctor.report import MARK, Link, Node, Report, StoreReport, Visit
from cluster.keys import probe_key

_CLOCK_ROUNDS = 5
_STREAMS = 16
"""So many links' speed is measured, one after the other."""


class Probe:
    """What is asked of a node. An actor, so that its start is in no measurement."""

    def clock(self) -> float:
        return time.time()

    def report(self, is_head: bool) -> Report:
        import ray._private.worker as worker

        from cluster.doctor import probe

        session: str = worker._global_node.get_session_dir_path()
        return probe.report(session, ray.get_runtime_context().gcs_address, is_head)

    def listen(self, address: str) -> int:
        return links.listen(address)

    def reach(self, source: str, targets: Sequence[links.Target]) -> list[Link]:
        return links.reach(source, targets)

    def stream(self, address: str, port: int) -> float | None:
        return links.stream(address, port)

    def write_to_store(self, url: str, secrets: Mapping[str, str], key: str) -> StoreReport:
        from cluster.doctor.store_probe import StoreProbe  # it imports the store, for which a package may be missing

        self._store = StoreProbe(url, secrets, key)
        return self._store.write()

    def look_into_store(self, keys: Mapping[str, str]) -> StoreReport:
        return self._store.look(keys)

    def delete_from_store(self) -> StoreReport:
        return self._store.delete()


class Visitor:
    """Asks all probes the same at once. Whoever fails, or takes longer than `timeout_s`, is asked no more."""

    def __init__(self, nodes: Sequence[Node], timeout_s: float) -> None:
        self._timeout_s = timeout_s
        make: Any = ray.remote(num_cpus=0)(Probe)
        self.actors: dict[str, Any] = {
            node.id: make.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False)).remote()
            for node in nodes
        }
        self.problems: dict[str, str] = {}

    def ask(self, call: Callable[[str, Any], Any]) -> dict[str, Any]:
        """What each node answers to `call(id, actor)`."""
        asked = {call(name, actor): name for name, actor in self.actors.items() if name not in self.problems}
        done, late = ray.wait(list(asked), num_returns=len(asked), timeout=self._timeout_s) if asked else ([], [])
        for reference in late:
            self.problems[asked[reference]] = f"no answer within {self._timeout_s:g} s"
        answers = {}
        for reference in done:
            try:
                answers[asked[reference]] = ray.get(reference)
            except ray.exceptions.RayError as error:
                self.problems[asked[reference]] = _last_line(error)
        return answers

    def ask_one(self, name: str, call: Callable[[Any], Any]) -> Any:
        """What one node answers; None when it does not."""
        try:
            return ray.get(call(self.actors[name]), timeout=self._timeout_s) if name not in self.problems else None
        except ray.exceptions.RayError as error:
            self.problems[name] = _last_line(error)
            return None


def main() -> None:
    asked = json.loads(sys.argv[1])
    ray.init(log_to_driver=False)
    print(MARK + json.dumps(asdict(visit(**asked))), flush=True)


def visit(timeout_s: float, store: str | None, secrets: Mapping[str, str]) -> Visit:
    """Everything that is known from inside of the cluster."""
    nodes = [_node(each) for each in ray.nodes() if each["Alive"]]
    visitor = Visitor(nodes, timeout_s)
    heads = {node.id for node in nodes if node.is_head}
    reports = visitor.ask(lambda name, probe: probe.report.remote(name in heads))
    clocks = {name: clock for name in reports if (clock := _clock(name, visitor)) is not None}
    found_links = _links([node for node in nodes if node.id in reports], visitor)
    stored = _store(store, secrets, visitor) if store else {}
    return Visit(
        tuple(
            replace(
                node,
                report=reports.get(node.id),
                problem=visitor.problems.get(node.id, ""),
                clock_s=clocks[node.id][0] if node.id in clocks else None,
                clock_error_s=clocks[node.id][1] if node.id in clocks else 0.0,
                store=stored.get(node.id),
            )
            for node in nodes
        ),
        tuple(found_links),
    )


def _node(found: Mapping[str, Any]) -> Node:
    return Node(
        id=found["NodeID"],
        address=found["NodeManagerAddress"],
        is_head="node:__internal_head__" in found["Resources"],
        resources={name: value for name, value in found["Resources"].items() if not name.startswith("node:")},
        labels=found["Labels"],
    )


def _clock(name: str, visitor: Visitor) -> tuple[float, float] | None:
    """Its offset, and how wrong that may be: half of the shortest round trip (Cristian's algorithm)."""
    measured = []
    for _ in range(_CLOCK_ROUNDS):
        begun = time.time()
        theirs = visitor.ask_one(name, lambda probe: probe.clock.remote())
        ended = time.time()
        if theirs is None:
            return None
        measured.append(((ended - begun) / 2, theirs - (begun + ended) / 2))
    error, offset = min(measured)
    return offset, error


def _links(nodes: Sequence[Node], visitor: Visitor) -> list[Link]:
    """Round trips from each to each; the speed around a ring, so that each node sends once and receives once."""
    if len(nodes) < 2:
        return []
    addresses = {node.id: node.address for node in nodes}
    ports = visitor.ask(lambda name, probe: probe.listen.remote(addresses[name]))
    targets = [(name, addresses[name], port) for name, port in ports.items()]
    answers = visitor.ask(
        lambda name, probe: probe.reach.remote(name, [target for target in targets if target[0] != name])
    )
    found = {(link.source, link.target): link for answer in answers.values() for link in answer}
    for source, (target, address, port) in list(zip(ports, targets[1:] + targets[:1], strict=True))[:_STREAMS]:
        link = found.get((source, target))
        if link and not link.error:
            found[source, target] = replace(link, bits_per_s=visitor.ask_one(source, _stream_to(address, port)))
    return list(found.values())


def _stream_to(address: str, port: int) -> Callable[[Any], Any]:
    return lambda probe: probe.stream.remote(address, port)


def _store(url: str, secrets: Mapping[str, str], visitor: Visitor) -> dict[str, StoreReport]:
    """In three steps, each on all nodes at once: write one's own, look for the others', delete one's own."""
    keys = {name: probe_key(uuid4().hex) for name in visitor.actors}
    reports = visitor.ask(lambda name, probe: probe.write_to_store.remote(url, secrets, keys[name]))
    written = {name: keys[name] for name, report in reports.items() if not report.error}
    reports |= visitor.ask(lambda _, probe: probe.look_into_store.remote(written))
    finished = visitor.ask(lambda _, probe: probe.delete_from_store.remote())
    late = {name: replace(reports[name], error=visitor.problems[name]) for name in reports.keys() - finished.keys()}
    return finished | late


def _last_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
