"""Reading Facts from a laptop that reaches the dashboard alone: by its REST, and by one job that visits nodes."""

import json
import os
import platform
import re
import shutil
import socket
import tempfile
import time
import tomllib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import version
from ipaddress import ip_address
from pathlib import Path
from uuid import uuid4

import httpx
from packaging.requirements import Requirement
from pydantic import TypeAdapter

import cluster
from cluster import env
from cluster.doctor import probe
from cluster.doctor.facts import Facts, Here
from cluster.doctor.report import MARK, Node, TokenFile, Visit
from cluster.errors import ClusterSilent, PlanError, TokenRefused
from cluster.launch.release import ROOT, Release
from cluster.place import ClusterConfig
from cluster.submit import ENDED, Cluster, Submission

_TIMEOUT_S = 10.0
_POLL_S = 0.2
_START_S = 90.0
"""What a job may take to unpack its working directory and to start its driver, beside the probes' own time."""

_PHASES = 6
"""A node that does not answer is found out in the first, so that later ones are short."""

_REACH_TIMEOUT_S = 1.0
_REACHED_NODES = 16
_VISIT = TypeAdapter(Visit)


def gather(
    address: str,
    place: ClusterConfig | None = None,
    store: str | None = None,
    secrets: Mapping[str, str] | None = None,
    timeout_s: float = 30.0,
) -> Facts:
    """What can be known about a cluster now.

    Args:
        place: what its file says.
        store: tried from every node.
        secrets: variables that nodes read before they open the store; see secret.py.
        timeout_s: what a node may take for one answer.

    Raises:
        PlanError: the address is none of a dashboard.
        InputError: luthier does not run from a checkout.
    """
    facts = Facts(address, _here(), place=place, store=store)
    facts = replace(
        facts,
        without_token=_status(address, {}),
        with_wrong_token=_status(address, {"Authorization": f"Bearer {uuid4().hex}"}),
    )
    try:
        there = Cluster(address, any_version=True)
    except (ClusterSilent, TokenRefused) as error:
        return replace(facts, refused=error)
    facts = replace(facts, ray=there.ray, python=there.python)
    try:
        visit = _visit(there, store, secrets or {}, timeout_s)
    except (httpx.HTTPError, ConnectionError, PlanError, _NoVisit) as error:
        return replace(facts, no_visit=str(error) or type(error).__name__)
    return replace(facts, visit=visit, reached=_reached(visit.nodes, facts.here.machine))


class _NoVisit(Exception):
    """The job ended without its line, or not at all."""


def _here() -> Here:
    release = Release.read()
    locked = dict(re.findall(r"^([A-Za-z0-9_.-]+)==(\S+)$", release.lock.read_text(), re.MULTILINE))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = [Requirement(each) for each in project["dependencies"]]
    watched = set(probe.PACKAGES) - {"ray"}  # Ray has a check of its own
    return Here(
        ray=version("ray"),
        python=release.python,
        luthier=cluster.__version__,
        locked={name.lower().replace("_", "-"): number for name, number in locked.items()},
        ranges={each.name: str(each.specifier) for each in needed if each.name in watched},
        token_file=_token_file(),
        user=os.geteuid(),
        machine=probe.machine() if platform.system() == "Linux" else "",
    )


def _token_file() -> TokenFile | None:
    if os.environ.get(env.RAY_AUTH_MODE) != "token" or env.RAY_AUTH_TOKEN in os.environ:
        return None
    return probe.token_file(os.environ.get(env.RAY_AUTH_TOKEN_PATH))


def _status(address: str, headers: dict[str, str]) -> int | None:
    try:
        return httpx.get(f"{address.rstrip('/')}/api/jobs/", headers=headers, timeout=_TIMEOUT_S).status_code
    except (httpx.HTTPError, httpx.InvalidURL):
        return None


def _visit(there: Cluster, store: str | None, secrets: Mapping[str, str], timeout_s: float) -> Visit:
    """Submit the job, with nothing but our ground in its working directory; forget it when it has answered."""
    asked = json.dumps({"timeout_s": timeout_s, "store": store, "secrets": dict(secrets)})
    job = Submission("doctor", ["python", "-m", "cluster.doctor", asked], does=uuid4().hex)
    with tempfile.TemporaryDirectory(prefix="luthier-doctor-") as folder:
        source = Path(cluster.__file__).parent
        shutil.copytree(source, Path(folder) / "cluster", ignore=shutil.ignore_patterns("__pycache__", "*.md"))
        submission, _ = there.submit(job, Path(folder))
    try:
        deadline = time.monotonic() + _START_S + _PHASES * timeout_s
        while (status := there.status(submission)) not in ENDED:
            if time.monotonic() > deadline:
                raise _NoVisit(
                    f"job {submission} is {status} after {_START_S + _PHASES * timeout_s:g} s (`luthier why`)"
                )
            time.sleep(_POLL_S)
        log = there.log(submission)
        lines = [line for line in log.splitlines() if line.startswith(MARK)]
        if not lines:
            said = [line for line in log.strip().splitlines() if line.strip()] or [there.message(submission)]
            raise _NoVisit(f"job {submission} has {status}: {said[-1]}")
        return _VISIT.validate_json(lines[-1].removeprefix(MARK))
    finally:
        with suppress(httpx.HTTPError):  # it is over, whether or not Ray forgets it
            there.remove(submission)


def _reached(nodes: tuple[Node, ...], machine: str) -> dict[str, tuple[int, ...]]:
    """Which of Ray's ports take a connection from here; not tried on this machine itself, where all do."""
    ways = [
        (address, each.port)
        for node in nodes[:_REACHED_NODES]
        if node.report and node.report.machine != machine
        for address in sorted({node.address, *(other.address for other in node.report.interfaces if other.address)})
        if not ip_address(address).is_loopback
        for each in node.report.sockets
        if not each.is_loopback
    ]
    with ThreadPoolExecutor(64) as pool:
        taken = list(pool.map(_connects, ways))
    found: dict[str, tuple[int, ...]] = {}
    for (address, port), is_open in zip(ways, taken, strict=True):
        if is_open:
            found[address] = (*found.get(address, ()), port)
    return found


def _connects(way: tuple[str, int]) -> bool:
    try:
        socket.create_connection(way, _REACH_TIMEOUT_S).close()
    except OSError:
        return False
    return True
