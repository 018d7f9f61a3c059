"""Ray nodes as processes of this machine, behind Ray's real autoscaler: the cloud of a laptop and of the tests.

Ray's monitor on the head imports `LocalNodes`, asks it for nodes of a group, and takes away those that are idle, as it
does with a cloud. A node is a folder `nodes/<id>` with its process id and tags, so a provider that starts again, and
whoever ends the cluster, find every node there is.

Two things of a cloud that go wrong are here for drills, because they are what people forget to try:

    metadata      its address: each spot node has a watcher (`spot.py`) that asks it whether the node will be taken
    sold-out      a file with the groups, a line each, that this cloud has no capacity for: a launch of them fails
"""

import json
import os
import secrets
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from ray.autoscaler.node_launch_exception import NodeLaunchException
from ray.autoscaler.node_provider import NodeProvider
from ray.autoscaler.tags import (
    NODE_KIND_HEAD,
    NODE_KIND_WORKER,
    STATUS_UP_TO_DATE,
    TAG_RAY_NODE_KIND,
    TAG_RAY_NODE_NAME,
    TAG_RAY_NODE_STATUS,
    TAG_RAY_USER_NODE_TYPE,
)

from cluster import env, nodes, processes

HEAD = "head"
"""The head's id as a node of this cloud; it is started before the provider and never ended by it."""


class LocalNodes(NodeProvider):  # type: ignore[misc]  # Ray's base class has no types
    """Called by Ray's autoscaler, from several threads.

    `provider_config` has `folder` (of the cluster), `gcs_address`, and optionally `metadata`, the address of what
    answers as a cloud's metadata service, below which each spot node asks under its own id.
    """

    def __init__(self, provider_config: dict[str, Any], cluster_name: str) -> None:
        super().__init__(provider_config, cluster_name)
        self._folder = Path(provider_config["folder"])
        self._address: str = provider_config["gcs_address"]
        self._metadata: str | None = provider_config.get("metadata")
        (self._folder / "nodes").mkdir(exist_ok=True)

    def non_terminated_nodes(self, tag_filters: dict[str, str]) -> list[str]:
        found = {HEAD: self.node_tags(HEAD), **{node: self.node_tags(node) for node in self._alive()}}
        return [node for node, tags in found.items() if tag_filters.items() <= tags.items()]

    def is_running(self, node_id: str) -> bool:
        return node_id == HEAD or node_id in self._alive()

    def is_terminated(self, node_id: str) -> bool:
        return not self.is_running(node_id)

    def node_tags(self, node_id: str) -> dict[str, str]:
        if node_id == HEAD:
            kind = {TAG_RAY_NODE_KIND: NODE_KIND_HEAD, TAG_RAY_USER_NODE_TYPE: nodes.HEAD_GROUP}
            return {**kind, TAG_RAY_NODE_NAME: HEAD, TAG_RAY_NODE_STATUS: STATUS_UP_TO_DATE}
        tags: dict[str, str] = self._record(node_id)["tags"]
        return tags

    def external_ip(self, node_id: str) -> str:  # noqa: ARG002
        return processes.HOST

    def internal_ip(self, node_id: str) -> str:  # noqa: ARG002
        return processes.HOST

    def set_node_tags(self, node_id: str, tags: dict[str, str]) -> None:
        raise NotImplementedError("nodes start Ray themselves, so nothing updates them")

    def create_node_with_resources_and_labels(
        self,
        node_config: dict[str, Any],
        tags: dict[str, str],
        count: int,
        resources: dict[str, float],
        labels: dict[str, str],
    ) -> None:
        """Start `count` nodes of a group. Raises NodeLaunchException when the group is sold out."""
        group = tags[TAG_RAY_USER_NODE_TYPE]
        sold_out = self._folder / processes.SOLD_OUT
        if sold_out.exists() and group in sold_out.read_text().split():
            raise NodeLaunchException("InsufficientInstanceCapacity", f"no capacity for {group} in this zone", None)
        for _ in range(count):
            self._start(secrets.token_hex(8), tags, dict(resources), labels, spot=bool(node_config.get("spot")))

    def terminate_node(self, node_id: str) -> None:
        """Ask a node to end, and see to it in the background; the autoscaler must not wait."""
        threading.Thread(target=self._end, args=(node_id,), daemon=True).start()

    def _start(
        self, node_id: str, tags: dict[str, str], resources: dict[str, float], labels: dict[str, str], spot: bool
    ) -> None:
        folder = self._folder / "nodes" / node_id
        folder.mkdir()
        variables = {
            **os.environ,
            # By these the autoscaler knows a Ray node for the one that it has asked for.
            "RAY_CLOUD_INSTANCE_ID": node_id,
            "RAY_NODE_TYPE_NAME": tags[TAG_RAY_USER_NODE_TYPE],
            "RAY_OVERRIDE_LABELS": json.dumps(labels),
        }
        variables.pop(env.RAY_ADDRESS, None)
        node = processes.start_ray(
            folder,
            [f"--address={self._address}", *processes.shape(resources)],
            variables,
        )
        record = {
            "pid": node.pid,
            "born": processes.born(node.pid),
            "group": tags[TAG_RAY_USER_NODE_TYPE],
            "tags": {TAG_RAY_NODE_KIND: NODE_KIND_WORKER, TAG_RAY_NODE_NAME: node_id, **tags},
        }
        written = folder / "node.json.new"
        written.write_text(json.dumps(record))
        written.rename(folder / "node.json")
        if spot and self._metadata:
            self._watch(node_id, variables)

    def _watch(self, node_id: str, variables: dict[str, str]) -> None:
        """Start what waits for the notice that this spot node will be taken; it ends with the node."""
        command = ["-m", "cluster.spot", "aws", f"--metadata={self._metadata}/{node_id}", f"--gcs={self._address}"]
        with (self._folder / "nodes" / f"{node_id}.spot.log").open("wb") as log:
            subprocess.Popen(
                [sys.executable, *command],
                env=variables, stdout=log, stderr=log, stdin=subprocess.DEVNULL, cwd=processes.ROOT,
            )  # fmt: skip

    def _end(self, node_id: str) -> None:
        record = self._record(node_id)
        processes.end(record["pid"], record["born"], node_id)

    def _alive(self) -> list[str]:
        """The nodes whose process lives."""
        found = [file.parent.name for file in (self._folder / "nodes").glob("*/node.json")]
        return [node for node in found if self._lives(self._record(node))]

    @staticmethod
    def _lives(record: dict[str, Any]) -> bool:
        return bool(processes.born(record["pid"]) == record["born"])

    def _record(self, node_id: str) -> dict[str, Any]:
        record: dict[str, Any] = json.loads((self._folder / "nodes" / node_id / "node.json").read_text())
        return record
