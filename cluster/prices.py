"""What an hour of what a job holds costs, and where that figure is from: the cluster's file, else the dated table.

A GPU's price covers the cores of its worker, as clouds sell them. Of list prices the highest is taken: it is a large
cloud's plain on-demand one, and a limit in money that counts with less would be overrun. A spot node without a price of
its own counts as if it were on demand, for the same reason. What has no price is unknown, and never free.
"""

from collections.abc import Iterable, Mapping
from decimal import Decimal

from cluster.gpus import find_gpu
from cluster.launch.spec import ACCELERATOR, MARKET
from cluster.ledger import Holder, Line, Price, Resource
from cluster.place import ClusterConfig

SPOT = "spot"
RESOURCES: tuple[Resource, ...] = ("GPU", "CPU")


def gpu_price(cluster: ClusterConfig, market: str | None) -> Price | None:
    """Of one GPU for an hour; None when it is not known. Raises PlanError for a type that the table does not have."""
    own, place = cluster.prices, f"prices of cluster {cluster.name}"
    if market == SPOT and own.gpu_spot is not None:
        return _price(own.gpu_spot, f"{place}: gpu_spot")
    instead = ", since no spot price is known" if market == SPOT else ""
    if own.gpu is not None:
        return _price(own.gpu, f"{place}: gpu{instead}")
    listed = find_gpu(cluster.gpu).prices if cluster.gpu else ()
    if not listed:
        return None
    dearest = max(listed, key=lambda each: each.usd_per_hour)
    basis = f"{cluster.gpu}: {dearest.offer}, list price read on {dearest.read_on} at {dearest.source}{instead}"
    return _price(dearest.usd_per_hour, basis)


def cpu_price(cluster: ClusterConfig) -> Price | None:
    """Of one core for an hour; None when it is not known."""
    own = cluster.prices.cpu
    return None if own is None else _price(own, f"prices of cluster {cluster.name}: cpu")


def unknown(cluster: ClusterConfig) -> list[str]:
    """The keys of a cluster's file without which something that a job may hold there has no price."""
    missing = []
    if cluster.accelerator == "gpu" and gpu_price(cluster, None) is None:
        missing.append("cluster.prices.gpu")
    if (cluster.accelerator == "cpu" or cluster.driver_cpus) and cpu_price(cluster) is None:
        missing.append("cluster.prices.cpu")
    return missing


def lines(
    holder: Holder, held: Iterable[tuple[Mapping[str, float], Mapping[str, str]]], cluster: ClusterConfig
) -> list[Line]:
    """What is held, by resource, GPU type and market.

    Args:
        held: of each worker, or of the driver: its resources by Ray's names, and the labels of its node.
    """
    amounts: dict[tuple[Resource, str | None, str | None, bool], Decimal] = {}
    for resources, labels in held:
        has_gpu = resources.get("GPU", 0.0) > 0
        kind = (labels.get(ACCELERATOR) or cluster.gpu) if has_gpu else None
        for resource in RESOURCES:
            if each := resources.get(resource, 0.0):
                what = (resource, kind, labels.get(MARKET), has_gpu)
                amounts[what] = amounts.get(what, Decimal(0)) + Decimal(str(each))
    found = []
    for (resource, kind, market, has_gpu), amount in amounts.items():
        price = gpu_price(cluster, market) if has_gpu else cpu_price(cluster)
        if price and has_gpu and resource == "CPU":
            price = Price(usd_per_hour=Decimal(0), basis="in the price of its worker's GPU")
        found.append(Line(holder=holder, resource=resource, type=kind, market=market, amount=amount, price=price))
    return found


def _price(usd_per_hour: float, basis: str) -> Price:
    return Price(usd_per_hour=Decimal(str(usd_per_hour)), basis=basis)
