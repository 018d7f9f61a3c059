"""All rules, in the order in which their findings are shown."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from cluster.doctor import closed, described, fabric, machines, store, versions
from cluster.doctor.facts import Facts
from cluster.doctor.finding import Check, Finding, Level


@dataclass(frozen=True)
class Rule:
    """What it says of the facts, where there is what it `needs`: the cluster's answer, or a node's.

    Only one that is optional may say nothing.
    """

    check: Check
    find: Callable[[Facts], Iterator[Finding]]
    needs: str = "visit"
    is_optional: bool = False


RULES: Sequence[Rule] = (
    Rule(Check.ANSWER, closed.answers, needs=""),
    Rule(Check.TOKEN, closed.dashboard_token, needs=""),
    Rule(Check.TOKEN, closed.ports_token),
    Rule(Check.TOKEN_FILE, closed.own_token_file, needs="", is_optional=True),
    Rule(Check.TOKEN_FILE, closed.token_files),
    Rule(Check.DASHBOARD, closed.dashboard),
    Rule(Check.PORTS, closed.ports),
    Rule(Check.RIGHTS, closed.rights),
    Rule(Check.HEAD, closed.head),
    Rule(Check.USAGE, closed.usage),
    Rule(Check.RAY, versions.ray_and_python, needs="answer"),
    Rule(Check.PACKAGES, versions.packages),
    Rule(Check.IMAGE, versions.image, is_optional=True),
    Rule(Check.NODES, machines.nodes, needs="answer"),
    Rule(Check.CLOCKS, machines.clocks),
    Rule(Check.DISK, machines.disk),
    Rule(Check.SHARED_MEMORY, machines.shared_memory),
    Rule(Check.MEMORY, machines.memory),
    Rule(Check.GPUS, machines.gpus),
    Rule(Check.STORE, store.operations),
    Rule(Check.SHARED, store.shared, is_optional=True),
    Rule(Check.LINKS, fabric.links),
    Rule(Check.MTU, fabric.mtu),
    Rule(Check.NCCL, fabric.nccl),
    Rule(Check.RDMA, fabric.rdma),
    Rule(Check.FILE, described.nodes),
)


def examine(facts: Facts) -> list[Finding]:
    """Every finding. A check whose facts are not there says so, rather than nothing."""
    found: list[Finding] = []
    for rule in RULES:
        if rule.needs and facts.refused:
            found.append(Finding(rule.check, Level.NOT_CHECKED, "the cluster did not answer"))
        elif rule.needs == "visit" and not facts.answered:
            found.append(Finding(rule.check, Level.NOT_CHECKED, "no node has answered"))
        else:
            said = list(rule.find(facts))
            if not said and not rule.is_optional:
                said = [Finding(rule.check, Level.NOT_CHECKED, "the nodes that would know it did not answer")]
            found += said
    return found
