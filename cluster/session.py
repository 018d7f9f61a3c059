"""Joining a Ray cluster: always by address, and never one that happens to run on the machine.

`ray.init()` without an address silently joins any cluster it finds. A job submitted with `ray job submit` is told its
cluster by RAY_ADDRESS; on a laptop `local` starts a private one that ends with the process.
"""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import ray

from cluster import env
from cluster.errors import PlanError
from cluster.place import ClusterConfig

CONNECT_TIMEOUT_S = 10.0


@contextmanager
def joined(cluster: ClusterConfig, workers: int) -> Iterator[None]:
    """Connected to the cluster, with room for `workers`. Raises PlanError."""
    address = _address(cluster)
    if address != "local":
        check_address(address)
    try:
        if address == "local":
            cpus = max(workers * cluster.cpus_per_worker, os.cpu_count() or 1)
            ray.init(address="local", num_cpus=cpus, include_dashboard=True)
        else:
            ray.init(address=address)
    except (ConnectionError, RuntimeError, ValueError) as error:
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


def check_resources(cluster: ClusterConfig, workers: int) -> None:
    """Raise PlanError when the cluster, as it stands, can never place the workers."""
    if cluster.autoscales:
        return
    per_worker = {"CPU": float(cluster.cpus_per_worker)}
    if cluster.accelerator == "gpu":
        per_worker["GPU"] = 1.0
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    places = sum(int(min(node.get(name, 0.0) // amount for name, amount in per_worker.items())) for node in nodes)
    if places < workers:
        have = "; ".join(
            ", ".join(f"{node.get(name, 0.0):g} {name}" for name in ("CPU", "GPU") if node.get(name)) or "nothing"
            for node in nodes
        )
        need = ", ".join(f"{amount:g} {name}" for name, amount in per_worker.items())
        raise PlanError(
            f"the job needs {workers} workers of {need} each, and the cluster has room for {places} "
            f"(nodes: {have}); lower train.workers, or add nodes"
        )
