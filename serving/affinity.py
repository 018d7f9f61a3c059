"""Tells Serve which adapters this replica holds, so that its router prefers the replicas that have one.

Serve routes by `multiplexed_model_id`, but only @serve.multiplexed advertises ids, and we do not use that (see
adapters.py). The two names below are private in Ray 2.60, hence this file: it is the only door to them, and
tests/serving/test_http.py holds it to what it promises. Without it every answer is the same, only loaded more often.
"""

from collections.abc import Iterable

from ray import serve
from ray.serve._private.common import RequestRoutingInfo
from ray.serve.context import _get_global_client


def advertise(digests: Iterable[str]) -> None:
    """Replace what this replica advertises. Returns at once; the routers know within Serve's long poll."""
    info = RequestRoutingInfo(replica_id=serve.get_replica_context().replica_id, multiplexed_model_ids=list(digests))
    _get_global_client().record_request_routing_info(info)
