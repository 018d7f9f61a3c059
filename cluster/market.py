"""Spot or on-demand: `python -m cluster.market`, beside Ray's autoscaler on the head.

Spot groups have the higher priority, so Ray asks for them first. Where the cloud has none, Ray asks for the same again
for ever, though on-demand nodes of the same shape could be had. This looks at the launches that failed; a spot group
that one failed for is closed for a while (its `max_workers` in the autoscaler's own file becomes what it has), so that
Ray takes the on-demand group. Then it is open again, and if that fails too, closed for twice as long.

What to close is a pure function of what has failed; Ray reads its file again before each of its decisions.
"""

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from cluster.launch.spec import MARKET

FIRST_S = 60.0
LONGEST_S = 900.0
POLL_S = 2.0


@dataclass(frozen=True)
class Group:
    """What is known of a spot group.

    Attributes:
        failed_at: the newest failed launch that was seen, by the autoscaler's clock.
        closed_until: before then it is closed.
        closed_s: for how long it was closed last; 0 when its last launch did not fail.
    """

    failed_at: float = 0.0
    closed_until: float = 0.0
    closed_s: float = 0.0


def seen(group: Group, now: float, failed_at: float) -> Group:
    """What is known of a group after a look.

    Args:
        failed_at: when its newest failed launch failed; 0 when none did.
    """
    if failed_at <= group.failed_at:
        return group
    if now < group.closed_until:
        return replace(group, failed_at=failed_at)  # it was under way when the group was closed
    # A failure soon after it was opened again means that nothing has changed; later than that, it is a new shortage.
    is_same = group.closed_s and now < group.closed_until + FIRST_S
    closed_s = min(2 * group.closed_s, LONGEST_S) if is_same else FIRST_S
    return Group(failed_at, now + closed_s, closed_s)


def limited(config: Mapping[str, Any], closed: Mapping[str, int]) -> dict[str, Any]:
    """The autoscaler's file with no new nodes for some groups; those that they have, stay.

    Args:
        config: with the limits that the cluster was made with.
        closed: how many nodes each closed group has.
    """
    kinds = {
        name: kind | {"max_workers": min(kind["max_workers"], closed[name])} if name in closed else kind
        for name, kind in config["available_node_types"].items()
    }
    return {**config, "available_node_types": kinds}


def spot_groups(config: Mapping[str, Any]) -> list[str]:
    """Names of the groups whose nodes may be taken away."""
    kinds: dict[str, dict[str, Any]] = config["available_node_types"]
    return [name for name, kind in kinds.items() if kind.get("labels", {}).get(MARKET) == "spot"]


def watch(path: Path, gcs: str) -> None:
    """Look, and write the file whenever what is closed has changed; for ever."""
    from ray.autoscaler.v2.sdk import get_cluster_status
    from ray.exceptions import RpcError

    config = yaml.safe_load(path.read_text())
    groups = {name: Group() for name in spot_groups(config)}
    written = config
    while True:
        time.sleep(POLL_S)
        try:
            status = get_cluster_status(gcs)
        except RpcError as error:
            print(f"market: the head does not answer ({error})", flush=True)
            continue
        now = time.time()
        failures = {launch.ray_node_type_name: launch.failed_ts_s or 0 for launch in status.failed_launches}
        have = Counter(node.ray_node_type_name for node in (*status.active_nodes, *status.idle_nodes))
        groups = {name: seen(group, now, failures.get(name, 0)) for name, group in groups.items()}
        wanted = limited(config, {name: have[name] for name, group in groups.items() if now < group.closed_until})
        if wanted != written:
            _replace(path, wanted)
            print(f"market: {_said(groups, now)}", flush=True)
            written = wanted


def main() -> int:
    """Watch until somebody ends it."""
    parser = argparse.ArgumentParser(prog="python -m cluster.market", description=__doc__.partition("\n")[0])
    parser.add_argument("--config", required=True, type=Path, help="the autoscaler's file, on the head")
    parser.add_argument("--gcs", required=True, help="host:port of the head")
    given = parser.parse_args()
    watch(given.config, given.gcs)
    return 0


def _replace(path: Path, config: Mapping[str, Any]) -> None:
    """In one step, for Ray may read at any time."""
    new = path.with_suffix(".new")
    new.write_text(json.dumps(config))
    new.rename(path)


def _said(groups: Mapping[str, Group], now: float) -> str:
    return "; ".join(
        f"{name} is closed for {each.closed_until - now:.0f} s" if now < each.closed_until else f"{name} is open"
        for name, each in groups.items()
    )


if __name__ == "__main__":
    sys.exit(main())
