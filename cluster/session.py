"""Joining a Ray cluster: always by address, and never one that happens to run on the machine.

`ray.init()` without an address silently joins any cluster it finds. A job submitted with `ray job submit` is told its
cluster by RAY_ADDRESS; on a laptop `local` starts a private one that ends with the process.
"""

import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import ray
import ray._private.state
from ray.core.generated import gcs_pb2
from ray.exceptions import AuthenticationError
from ray.util.placement_group import PlacementGroup

from cluster import env
from cluster.errors import PlanError
from cluster.place import ClusterConfig
from cluster.secret import load_in_workers

CONNECT_TIMEOUT_S = 10.0

SHARED_PLACES = 8
"""Workers that a private cluster takes on a machine of fewer cores: enough to try what many do."""


@contextmanager
def joined(
    cluster: ClusterConfig, workers: int, most: int | None = None, secrets: Mapping[str, str] | None = None
) -> Iterator[None]:
    """Connected to the cluster, with room for `workers`; a private one has it for `most`. Raises PlanError.

    Args:
        secrets: variables that each process of the job reads where it runs; see secret.py.
    """
    address = _address(cluster)
    if address != "local":
        check_address(address)
    environment = load_in_workers(secrets or {})
    try:
        if address == "local":
            places = min(most or workers, SHARED_PLACES)
            cpus = max(places * cluster.cpus_per_worker, os.cpu_count() or 1)
            ray.init(address="local", num_cpus=cpus, include_dashboard=True, runtime_env=environment)
        else:
            ray.init(address=address, runtime_env=environment)
    except (ConnectionError, RuntimeError, ValueError, AuthenticationError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise PlanError(
            f"cannot join the Ray cluster at {address} ({reason}); is it running, and do {env.RAY_AUTH_MODE}=token and "
            f"its token ({env.RAY_AUTH_TOKEN_PATH}) match?"
        ) from error
    try:
        check_resources(cluster, workers)
        yield
    finally:
        ray.shutdown()


def check_address(address: str) -> None:
    """Raise PlanError for an address that cannot be joined: Ray itself would try for minutes before it says so."""
    if address.startswith(("http://", "https://")):
        raise PlanError(f"{address} is a dashboard, for `ray job submit`; to join the cluster give host:6379")
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise PlanError(f"{address!r} is no Ray address: write local, auto or host:6379")
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise PlanError(
            f"cannot join the Ray cluster at {address} ({error.strerror or error}); is it running there?"
        ) from None


def _address(cluster: ClusterConfig) -> str:
    if cluster.address != "auto":
        return cluster.address
    given = os.environ.get(env.RAY_ADDRESS)
    if not given:
        raise PlanError(
            f"cluster {cluster.name} has address: auto, and {env.RAY_ADDRESS} is not set: submit the job with "
            "`ray job submit`, or choose a cluster with address: local"
        )
    return given


def room(cluster: ClusterConfig) -> int:
    """How many more workers the cluster can take now, on nodes that are not about to go."""
    free = ray._private.state.available_resources_per_node()
    going = draining()
    return sum(_places(resources, cluster) for node, resources in free.items() if node not in going)


def capacity(cluster: ClusterConfig) -> int:
    """How many workers the cluster could take if it did nothing else, on nodes that are not about to go."""
    return sum(_places(resources, cluster) for resources in nodes())


def draining() -> dict[str, float | None]:
    """The nodes that are being drained, and in how many seconds each will be gone, where that is known.

    Ray has no public function for it; this is the one that its own Train and Serve use.
    """
    found: dict[str, int] = ray._private.state.state.get_draining_nodes()
    return {node: max(0.0, deadline / 1000 - time.time()) if deadline else None for node, deadline in found.items()}


@dataclass(frozen=True)
class Placement:
    """A placement group of this driver's job that has its place: since when, and on each node what it holds there.

    `since_ms` is in milliseconds since 1970, by the clock of the head.
    """

    id: str
    since_ms: int
    bundles: tuple[tuple[str, Mapping[str, float]], ...]


def placements() -> list[Placement]:
    """What this driver's job holds by placement groups, as Ray Train does for its workers.

    Ray's public function knows neither whose a group is nor since when it has its place.
    """
    ours = ray.get_runtime_context().get_job_id()
    found = []
    for data in ray._private.state.state._connect_and_get_accessor().get_placement_group_table():
        group = gcs_pb2.PlacementGroupTableData.FromString(data)
        since_ms = group.placement_group_final_bundle_placement_timestamp_ms
        if group.creator_job_id.hex() == ours and since_ms:
            bundles = [(bundle.node_id.hex(), dict(bundle.unit_resources)) for bundle in group.bundles]
            found.append(Placement(group.placement_group_id.hex(), since_ms, tuple(bundles)))
    return found


def labels() -> dict[str, Mapping[str, str]]:
    """The labels of all nodes that are or were in the cluster, by node."""
    return {node["NodeID"]: node.get("Labels", {}) for node in ray.nodes()}


def _places(resources: dict[str, float], cluster: ClusterConfig) -> int:
    return int(min(resources.get(name, 0.0) // amount for name, amount in per_worker(cluster).items()))


def nodes() -> list[dict[str, float]]:
    """What each node offers when it is empty, except those that are about to go."""
    going = draining()
    return [node["Resources"] for node in ray.nodes() if node["Alive"] and node["NodeID"] not in going]


def per_worker(cluster: ClusterConfig) -> dict[str, float]:
    """What one worker needs, by Ray's names."""
    return {"CPU": float(cluster.cpus_per_worker), **({"GPU": 1.0} if cluster.accelerator == "gpu" else {})}


def release_places() -> None:
    """Give back what this job has reserved, once its workers have ended.

    Ray Train 2.60 forgets the placement group of workers that fail before they have formed their process group: the
    next ones would wait for places that nobody uses.
    """
    ours = ray.get_runtime_context().get_job_id()
    for group in ray.util.placement_group_table().values():
        if group["placement_group_id"].endswith(ours) and group["state"] != "REMOVED":  # an id ends with its job's
            group_id = ray.PlacementGroupID(bytes.fromhex(group["placement_group_id"]))
            ray.util.remove_placement_group(PlacementGroup(group_id))


def check_resources(cluster: ClusterConfig, workers: int) -> None:
    """Raise PlanError when the cluster, as it stands, can never place the workers."""
    if cluster.autoscales:
        return
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    places = sum(_places(node, cluster) for node in alive)
    if places < workers:
        have = "; ".join(
            ", ".join(f"{node.get(name, 0.0):g} {name}" for name in ("CPU", "GPU") if node.get(name)) or "nothing"
            for node in alive
        )
        need = ", ".join(f"{amount:g} {name}" for name, amount in per_worker(cluster).items())
        raise PlanError(
            f"the job needs {workers} workers of {need} each, and the cluster has room for {places} "
            f"(nodes: {have}); lower train.workers, or add nodes"
        )
