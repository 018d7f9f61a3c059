"""What Ray's autoscaler does, read where the dashboard shows it: its log, the log of Ray's GCS, the cluster's status.

Its state has no REST of its own. The log begins with its config, which holds what each group offers and how many
there may be; a launch is told there when it succeeds and when it fails, with the cloud's own words. When the process
dies nothing says so, and the status goes on as if it lived: only the GCS counts how often it has reported, and writes
that down once a minute.
"""

import ast
import re
from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any

import yaml

from cluster.why.facts import NodeGroup

_CONFIG_V2 = re.compile(r"Using Autoscaling Config: \n(.*?)\n(?=\n?\d{4}-\d\d-\d\d )", re.DOTALL)
_CONFIG_V1 = re.compile(r"StandardAutoscaler: (\{.*\})\n")
_TIME = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"
_LAUNCH = re.compile(rf"^({_TIME})?.*(Launched|Failed to launch) \d+ nodes of type (\S+?)[.:](?: (.*))?$", re.MULTILINE)
_NOW = re.compile(rf"Autoscaler status: ({_TIME})")
_STARTING = re.compile(r"^ (?:(\S+), (\d+) launching|\S+: (\S+),.*)$")
_COUNTED = re.compile(r"^\s*AutoscalerStateService.grpc_server.ReportAutoscalingState - (\d+) total", re.MULTILINE)
_ON_ONE_NODE = re.compile(r"^ (.*) \(STRICT_PACK\): \d+\+ pending placement groups", re.MULTILINE)
_BUNDLES = re.compile(r"(\{.*?\}) \* (\d+)")
_SECTION = "Main service Event stats:"
_FRESH = timedelta(seconds=60)
"""Ray asks a cloud again within seconds while somebody waits, so a refusal that is older was of another's wish."""


def groups(log: str) -> dict[str, NodeGroup] | None:
    """What the autoscaler may start, from the beginning of its log; None while the config is not there."""
    config = _config(log)
    if config is None:
        return None
    head = config.get("head_node_type")
    return {
        name: NodeGroup(
            resources={key: float(value) for key, value in (kind.get("resources") or {}).items()},
            most=int(kind.get("max_workers") or 0),
            labels=dict(kind.get("labels") or {}),
        )
        for name, kind in config.get("available_node_types", {}).items()
        if name != head or kind.get("max_workers")  # on premises they are of one kind
    }


def failed(log: str, status: str) -> dict[str, str]:
    """Why the last launch of a group failed, from the end of the log; a later one that succeeds takes it away.

    Not what failed long before the status was asked for, whose first line has the same clock's time.
    """
    found: dict[str, str] = {}
    now = _NOW.search(status)
    for at, how, group, why in _LAUNCH.findall(log):
        found.pop(group, None)
        is_old = now and at and datetime.fromisoformat(now[1]) - datetime.fromisoformat(at) > _FRESH
        if how != "Launched" and not is_old:
            found[group] = why
    return found


def starting(status: str) -> dict[str, int]:
    """How many nodes of each group have been asked for and are not there, from the formatted status."""
    _, _, after = status.partition("\nPending:\n")
    found: dict[str, int] = {}
    for line in after.splitlines():
        if not line.startswith(" "):
            break
        match = _STARTING.match(line)
        if match:
            group, count = match[1] or match[3], int(match[2] or 1)
            found[group] = found.get(group, 0) + count
    return found


def on_one_node(status: str) -> list[list[dict[str, float]]]:
    """The bundles of each placement group that waits for one node to hold it whole; its list tells no strategy."""
    return [
        [ast.literal_eval(bundle) for bundle, count in _BUNDLES.findall(shape) for _ in range(int(count))]
        for shape in _ON_ONE_NODE.findall(status)
    ]


def is_alive(gcs_log: str) -> bool | None:
    """Whether it has reported between the last two countings of the GCS; None while there are not two that know of it.

    The older autoscaler (v1) does not report there.
    """
    counted = [int(found[1]) for section in gcs_log.split(_SECTION)[1:] if (found := _COUNTED.search(section))]
    return counted[-1] > counted[-2] if len(counted) > 1 else None


def _config(log: str) -> Mapping[str, Any] | None:
    config: Mapping[str, Any] | None = None
    if found := _CONFIG_V2.search(log):
        config = yaml.safe_load(found[1])
    elif found := _CONFIG_V1.search(log):
        config = ast.literal_eval(found[1])
    return config
