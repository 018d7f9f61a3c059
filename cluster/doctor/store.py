"""Rules: what each node may do in the store, and whether it is the same for all."""

from collections.abc import Iterator, Sequence

from cluster.doctor.facts import Facts
from cluster.doctor.finding import Check, Finding, Level, Problem, fault, judged, warning
from cluster.doctor.report import Node

_SLOW_S = 1.0
_FIXES = {
    "StoreUnfit": "use a server that honours If-None-Match (AWS S3, Ceph, MinIO, R2), or a shared folder",
    "StoreDenied": "give the node's role, or the keys in the node's environment, the right to do so in this prefix; "
    "where a recipe has them as `secrets`, say --secret NAME=secret://… here",
    "ConfigError": "correct the address, or where the secret is kept on the node",
    "StoreUnreachable": "open the way from the node to the store, and check AWS_ENDPOINT_URL there",
    "ModuleNotFoundError": "pip install --constraint requirements.lock . on the node, or build its image anew",
}
_OTHER = "correct the store's address, or AWS_ENDPOINT_URL and the credentials of the node"


def operations(facts: Facts) -> Iterator[Finding]:
    if facts.store is None:
        yield Finding(Check.STORE, Level.NOT_CHECKED, "name it with --store")
        return

    def judge(node: Node) -> Iterator[Problem]:
        if node.store is None:
            yield fault("the node did not come to try it", "see `nodes answer`, and ask again")
            return
        slow = {what: seconds for what, seconds in node.store.done.items() if what != "open" and seconds > _SLOW_S}
        if node.store.error:
            yield fault(node.store.error, _FIXES.get(node.store.error_class, _OTHER))
        elif slow:
            what, seconds = max(slow.items(), key=lambda item: item[1])
            yield warning(
                f"{what} of a few bytes took {seconds:.1f} s",
                "put the store into the nodes' own region, and look at the way there",
            )

    yield from judged(Check.STORE, facts.answered, judge, _done)


def _done(nodes: Sequence[Node]) -> str:
    times = [time for node in nodes if node.store for what, time in node.store.done.items() if what != "open"]
    longest = f"; the longest took {max(times) * 1000:.0f} ms" if times else ""
    return f"create, create if absent, read, write, list, delete{longest}"


def shared(facts: Facts) -> Iterator[Finding]:
    """A folder that each node has for itself, or two endpoints, look well from each node alone."""
    if facts.store is None:
        return
    tried = [node for node in facts.answered if node.store and "list" in node.store.done]

    def judge(node: Node) -> Iterator[Problem]:
        if node.store and node.store.unseen:
            others = ", ".join(facts.name(each) for each in node.store.unseen)
            yield fault(
                f"what {others} wrote to {facts.store} is not there",
                "a folder must be on a file system that all nodes mount; AWS_ENDPOINT_URL must be the same everywhere",
            )

    if len(tried) > 1:
        yield from judged(Check.SHARED, tried, judge, "each node sees what the others wrote")
