"""Adapters that a replica is to hold whether anybody asks or not, by name: an alias that moves moves them.

They are looked up as often as the ingress looks up names, so that a pinned adapter's new version is loaded about when
the first request for it comes, and the old one stays until it is.
"""

import asyncio
import logging
from collections.abc import Sequence

from cluster.errors import LuthierError
from cluster.logs import pinned_line
from cluster.records import AdapterRecord
from serving.adapters import AdapterCache
from serving.resolver import Resolver

_log = logging.getLogger(__name__)


async def keep_pinned(names: Sequence[str], resolver: Resolver, adapters: AdapterCache, refresh_s: float) -> None:
    """Until cancelled. What cannot be looked up or loaded is logged, once for each reason, and tried again, and that it
    is there at last is logged too: `luthier why` reads it. The version that was there before stays pinned meanwhile."""
    pinned: dict[str, AdapterRecord] = {}
    said: dict[str, str] = {}
    while True:
        for name in names:
            try:
                record = await resolver.resolve(name)
                if record is not None and record != pinned.get(name):
                    await adapters.prefetch(record)
                    pinned[name] = record
                    adapters.pin(pinned.values())  # now: the next one's load must not evict it
                if name in pinned and said.pop(name, ""):
                    _log.warning(pinned_line(name))
            except Exception as error:  # the edge of a task that nobody awaits: it must go on
                if not isinstance(error, LuthierError):
                    _log.exception("%s could not be kept in the engine", name)
                if said.get(name) != str(error):
                    said[name] = str(error)
                    _log.warning(pinned_line(name, str(error)))
        await asyncio.sleep(refresh_s)
