"""Rules: who may come in, and what a job may do. They hold a live cluster to what `cluster/launch` promises."""

from collections import Counter
from collections.abc import Iterator, Sequence
from ipaddress import ip_address

from cluster import env
from cluster.doctor.facts import Facts
from cluster.doctor.finding import Check, Finding, Level, Problem, fault, judged, warning
from cluster.doctor.report import Node, Socket
from cluster.launch.spec import Kubernetes, OnPremises

_REFUSED = (401, 403)
_START = "set RAY_AUTH_MODE=token, and a token file, for every `ray start`, and start the cluster anew"
HERE = "here"


def answers(facts: Facts) -> Iterator[Finding]:
    if facts.refused:
        fix = "start the cluster, open its tunnel (`luthier cluster dashboard NAME`), or name its token's file"
        yield Finding(Check.ANSWER, Level.FAULT, str(facts.refused), fix)
    else:
        yield Finding(Check.ANSWER, Level.OK, f"{facts.address} answers")


def dashboard_token(facts: Facts) -> Iterator[Finding]:
    """What the dashboard says to those who may not come in."""
    for whom, status in (("no token", facts.without_token), ("a wrong token", facts.with_wrong_token)):
        if status is None:
            yield Finding(Check.TOKEN, Level.NOT_CHECKED, f"a request with {whom} had no answer")
        elif status not in _REFUSED:
            yield Finding(Check.TOKEN, Level.FAULT, f"the dashboard answers a request with {whom} ({status})", _START)
        else:
            yield Finding(Check.TOKEN, Level.OK, f"the dashboard refuses a request with {whom} ({status})")


def ports_token(facts: Facts) -> Iterator[Finding]:
    """What every other port of Ray says to somebody without a token."""

    def judge(node: Node) -> Iterator[Problem]:
        said = node.said
        if said.variables.get(env.RAY_AUTH_MODE) != "token":
            mode = said.variables.get(env.RAY_AUTH_MODE)
            yield fault(f"Ray was started {f'with RAY_AUTH_MODE={mode}' if mode else 'without RAY_AUTH_MODE'}", _START)
        # By kind of process: ports differ from node to node.
        for process in sorted({each.process for each in said.sockets if each.answers == "open"}):
            yield fault(f"the {process} answers without a token", _START)
        if not said.sockets:
            yield Problem(Level.NOT_CHECKED, "no port of Ray's processes was found", "")

    yield from judged(Check.TOKEN, facts.answered, judge, _asked)


def _asked(nodes: Sequence[Node]) -> str:
    asked = Counter[str](each.answers for node in nodes for each in node.said.sockets)
    told = {"refuses": "refuse", "metrics": "show metrics alone", "unknown": "speak a protocol that was not tried"}
    seen = ", ".join(f"{asked[answer]} {words}" for answer, words in told.items() if asked[answer])
    return f"RAY_AUTH_MODE=token; of Ray's {asked.total()} ports, asked without it, {seen}"


def token_files(facts: Facts) -> Iterator[Finding]:
    def judge(node: Node) -> Iterator[Problem]:
        file, user = node.said.token_file, node.said.user
        if file.mode is None:
            if not node.said.has_token_variable:
                yield fault(f"no token file {file.path}", "put the cluster's token there, with mode 0600")
        elif file.mode & 0o077:
            yield _readable(file.path, file.mode)
        elif file.owner not in (user, 0):
            yield fault(f"{file.path} belongs to user {file.owner}, Ray is {user}", f"chown {user} {file.path}")

    yield from judged(Check.TOKEN_FILE, facts.answered, judge, "nobody else may read it")


def own_token_file(facts: Facts) -> Iterator[Finding]:
    """The laptop's."""
    mine = facts.here.token_file
    if mine and mine.mode is not None and mine.mode & 0o077:
        problem = _readable(mine.path, mine.mode)
        yield Finding(Check.TOKEN_FILE, problem.level, problem.seen, problem.fix, (HERE,))
    elif mine and mine.mode is not None:
        yield Finding(Check.TOKEN_FILE, Level.OK, f"mode {mine.mode:04o}", nodes=(HERE,))


def dashboard(facts: Facts) -> Iterator[Finding]:
    """On the head's loopback, so that one comes to it through SSH or the Kubernetes API alone."""
    found = [] if facts.head is None else [each for each in facts.head.said.sockets if each.process == "dashboard"]
    pages = [each for each in found if each.answers in ("refuses", "open")]
    beyond = [each for each in pages if not each.is_loopback]
    if not pages:
        yield Finding(Check.DASHBOARD, Level.NOT_CHECKED, "no port of the dashboard was found on the head")
    elif beyond:
        where = ", ".join(f"{each.address}:{each.port}" for each in beyond)
        # In a RayJob or RayService the operator must reach it, behind the network policy.
        in_pods = facts.place and isinstance(facts.place.provider, Kubernetes)
        fix = "start the head with --dashboard-host=127.0.0.1, and reach it through `luthier cluster dashboard NAME`"
        yield Finding(
            Check.DASHBOARD, Level.WARNING if in_pods else Level.FAULT, f"it listens on {where}", fix, ("head",)
        )
    else:
        yield Finding(Check.DASHBOARD, Level.OK, ", ".join(f"{each.address}:{each.port}" for each in pages))


def ports(facts: Facts) -> Iterator[Finding]:
    """Ray's ports take whoever reaches them, and Prometheus' have no token: the network has to keep others out."""

    def judge(node: Node) -> Iterator[Problem]:
        beyond = [each for each in node.said.sockets if not each.is_loopback]
        public = [address for address in _addresses(node) if ip_address(address).is_global]
        reached = [
            each
            for each in beyond
            for address, open_ports in facts.reached.items()
            if address in _addresses(node) and each.port in open_ports
        ]
        let_in = "let in nothing but the cluster itself: its security group, firewall or network policy"
        if public and reached:
            yield fault(
                f"{public[0]} is a public address, and {_named(reached)} can be reached there from here", let_in
            )
        elif public and beyond:
            seen = f"{public[0]} is a public address, and {_named(beyond)} listen on it; from here they do not answer"
            yield warning(seen, f"{let_in}; better, give nodes private addresses")
        elif any(each.answers == "metrics" for each in reached):
            seen = f"{_named(reached)} can be reached from here without the tunnel; metrics are shown without a token"
            yield warning(seen, let_in)

    yield from judged(Check.PORTS, facts.answered, judge, f"no public address; {_from_here(facts)}")


def rights(facts: Facts) -> Iterator[Finding]:
    """A job is whoever Ray runs as."""
    provider = facts.place.provider if facts.place else None
    in_containers = provider is not None and not isinstance(provider, OnPremises)

    def judge(node: Node) -> Iterator[Problem]:
        if in_containers and node.said.capabilities:
            seen = f"the container has the kernel's capabilities {node.said.capabilities:#x}"
            yield warning(seen, "start it with --cap-drop=ALL, as `luthier cluster files NAME` writes it")
        elif node.said.user == 0 and not facts.is_one_machine:
            yield warning("Ray runs as root, and so does every job", "start Ray as a user of its own")

    alone, fine = "one machine: jobs run as the user that started Ray", "no root, no more than a user may do"
    yield from judged(Check.RIGHTS, facts.answered, judge, alone if facts.is_one_machine else fine)


def head(facts: Facts) -> Iterator[Finding]:
    """Where a job takes the head down, the cluster goes with it."""
    if facts.head is None:
        return
    offers = [f"{facts.head.resources[name]:g} {name}" for name in ("CPU", "GPU") if facts.head.resources.get(name)]
    if facts.is_one_machine:
        yield Finding(Check.HEAD, Level.OK, "one machine: its head may work")
    elif offers:
        seen = f"the head offers {' and '.join(offers)} to jobs, which can take the whole cluster down"
        fix = "start it with --num-cpus=0 --num-gpus=0, and set driver_cpus: 1 in configs/clusters/NAME.yaml"
        yield Finding(Check.HEAD, Level.WARNING, seen, fix, ("head",))
    else:
        yield Finding(Check.HEAD, Level.OK, "no CPU and no GPU of the head is for jobs")


def usage(facts: Facts) -> Iterator[Finding]:
    if facts.head is None:
        return
    wanted = bool(facts.place and facts.place.provider and facts.place.provider.usage_stats)
    if facts.head.said.usage_stats and not wanted:
        fix = "start the head with RAY_USAGE_STATS_ENABLED=0 or --disable-usage-stats"
        yield Finding(Check.USAGE, Level.FAULT, "Ray reports to its makers, and nobody asked it to", fix, ("head",))
    else:
        yield Finding(Check.USAGE, Level.OK, "sent, as the cluster's file says" if wanted else "none are sent")


def _readable(path: str, mode: int) -> Problem:
    return fault(f"{path} has mode {mode:04o}: others on that machine may read it", f"chmod 600 {path}")


def _addresses(node: Node) -> set[str]:
    return {node.address, *(each.address for each in node.said.interfaces if each.address)}


def _named(found: list[Socket]) -> str:
    return ", ".join(sorted({f"{each.process} {each.port}" for each in found}))


def _from_here(facts: Facts) -> str:
    if facts.here.machine in {node.said.machine for node in facts.answered}:
        return "this machine is one of them, so what others reach was not tried"
    if any(facts.reached.values()):
        return "this machine is in their network, and reaches ports that ask for the token"
    return "this machine reaches no port but through the tunnel"
