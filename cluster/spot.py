"""The watcher of a spot node: `python -m cluster.spot aws|gcp|azure`, beside Ray on each of them; or `pod`.

Clouds announce that they take a spot machine away, 30 s (Google, Azure) to two minutes (Amazon) before they do, to
whoever asks the machine's own metadata service; nothing in Ray asks. This does, and drains the node with the time that
is left: Ray then gives it no new work, and training saves its state and moves.

The services' answers, as their makers document them:

    aws    PUT /latest/api/token, GET /latest/meta-data/spot/instance-action    404, or {"action": …, "time": …}
    gcp    GET /computeMetadata/v1/instance/preempted               FALSE, or TRUE
    azure  GET /metadata/scheduledevents                               {"Events": [{"EventType": "Preempt", …}]}

Kubernetes hears these notices itself, and evicts the machine's pods: `pod` is what a worker's `preStop` hook runs. It
drains at once, and returns when Ray has left the node or the time is over; only then is Ray told to end.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpx

METADATA = {
    "aws": "http://169.254.169.254",
    "gcp": "http://metadata.google.internal",
    "azure": "http://169.254.169.254",
}

POLL_S = 2.0
_TIMEOUT_S = 2.0
_GCS_TIMEOUT_S = 10.0
POD = "pod"
POD_GRACE_S = 120
"""What the pods of workers ask of Kubernetes, from the eviction to their end; a machine that is taken may give less."""

_POD_MARGIN_S = 10.0  # for Ray's own end
_GOOGLES_NOTICE_S = 30.0  # Google says that it will be, not when; it is after so long


def aws(client: httpx.Client) -> float | None:
    """Seconds until this machine is taken, 0 at least; None when no notice was given. Raises httpx.HTTPError."""
    token = client.put("/latest/api/token", headers={"X-aws-ec2-metadata-token-ttl-seconds": "300"})
    token.raise_for_status()
    answer = client.get("/latest/meta-data/spot/instance-action", headers={"X-aws-ec2-metadata-token": token.text})
    if answer.status_code == httpx.codes.NOT_FOUND:
        return None
    answer.raise_for_status()
    return _seconds_until(datetime.fromisoformat(answer.json()["time"]))


def gcp(client: httpx.Client) -> float | None:
    """As `aws`."""
    answer = client.get("/computeMetadata/v1/instance/preempted", headers={"Metadata-Flavor": "Google"})
    answer.raise_for_status()
    return _GOOGLES_NOTICE_S if answer.text.strip() == "TRUE" else None


def azure(client: httpx.Client) -> float | None:
    """As `aws`. Events of the other machines of a scale set are in the answer too, so the name is compared."""
    headers = {"Metadata": "true"}
    answer = client.get("/metadata/scheduledevents", params={"api-version": "2020-07-01"}, headers=headers)
    answer.raise_for_status()
    events = [event for event in answer.json()["Events"] if event["EventType"] == "Preempt"]
    if not events:
        return None
    named = client.get(
        "/metadata/instance/compute/name", params={"api-version": "2021-02-01", "format": "text"}, headers=headers
    )
    named.raise_for_status()
    ours = [event for event in events if named.text in event["Resources"]]
    begins = [event["NotBefore"] for event in ours]  # empty once it has begun
    return min((_seconds_until(parsedate_to_datetime(each)) if each else 0.0 for each in begins), default=None)


CLOUDS: dict[str, Callable[[httpx.Client], float | None]] = {"aws": aws, "gcp": gcp, "azure": azure}


def watch(ask: Callable[[httpx.Client], float | None], metadata: str) -> float:
    """Ask until a notice comes; gives the seconds that are left. A service that does not answer is asked again."""
    is_told = False
    with httpx.Client(base_url=metadata, timeout=_TIMEOUT_S) as client:
        while True:
            try:
                left = ask(client)
            except (httpx.HTTPError, ValueError, KeyError) as error:
                if not is_told:
                    print(f"spot: {metadata} gives no answer to use ({error!r}); asking again", flush=True)
                is_told, left = True, None
            if left is not None:
                return left
            time.sleep(POLL_S)


def drain(gcs: str, left_s: float) -> bool:
    """Tell Ray that this node is about to go. Whether Ray has agreed; an idle node may have gone already."""
    from ray._raylet import GcsClient  # type: ignore[attr-defined]
    from ray.core.generated import autoscaler_pb2

    client = GcsClient(address=gcs)
    ours = _our_node(client)
    if ours is None:
        return False
    deadline_ms = int((time.time() + left_s) * 1000)
    agreed, why = client.drain_node(
        ours, autoscaler_pb2.DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION, "the cloud takes this machine", deadline_ms
    )
    print(f"spot: {ours}: {'drains' if agreed else why}, {left_s:.0f} s left", flush=True)
    return bool(agreed)


def leave(gcs: str, left_s: float) -> None:
    """Drain this node, and wait until it is empty and Ray has left it, or the time is over."""
    from ray._raylet import GcsClient  # type: ignore[attr-defined]

    until = time.monotonic() + left_s
    drain(gcs, left_s)
    client = GcsClient(address=gcs)
    while time.monotonic() < until and _our_node(client) is not None:
        time.sleep(POLL_S / 2)


def main() -> int:
    """Watch, drain, and end."""
    parser = argparse.ArgumentParser(prog="python -m cluster.spot", description=__doc__.partition("\n")[0])
    parser.add_argument("cloud", choices=(*CLOUDS, POD))
    parser.add_argument("--gcs", required=True, help="host:port of the head")
    parser.add_argument("--metadata", help="address of the metadata service; default: the cloud's own")
    given = parser.parse_args()
    if given.cloud == POD:
        leave(given.gcs, POD_GRACE_S - _POD_MARGIN_S)
        return 0
    left = watch(CLOUDS[given.cloud], given.metadata or METADATA[given.cloud])
    return 0 if drain(given.gcs, left) else 1


def _seconds_until(when: datetime) -> float:
    return max(0.0, (when - datetime.now(UTC)).total_seconds())


def _our_node(client: Any) -> str | None:
    """Ray's id of this machine's node, while it lives: by the id that the provider gave it, else by its name."""
    from ray.core.generated import gcs_pb2

    nodes = client.get_all_node_info(timeout=_GCS_TIMEOUT_S, state_filter=gcs_pb2.GcsNodeInfo.GcsNodeState.ALIVE)
    given, host = os.environ.get("RAY_CLOUD_INSTANCE_ID"), os.uname().nodename
    for each in nodes.values():
        if (each.instance_id == given) if given else (each.node_manager_hostname == host):
            return str(each.node_id.hex())
    return None


if __name__ == "__main__":
    sys.exit(main())
