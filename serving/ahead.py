"""What a new replica loads before anybody asks it, one adapter after another, while it has room:

    what the other replicas are asked for, the most wanted first ▸ what is stable and no replica holds

and again every REPEAT_S while it has room: for what has become stable since, and for what a replica held that has gone,
as those do that an update replaces. The second step leaves each replica its part of what is stable, so that those that
start together fill up evenly; they go through it in different orders (rendezvous hashing, as in routing.py), so that
they seldom load the same adapter twice. Nothing depends on any of it: what is not here is loaded when it is asked for.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from cluster.errors import LuthierError
from cluster.records import AdapterRecord, BaseModelRef
from serving.adapters import ITS_OWN_FAULT, AdapterCache
from serving.demand import Stock, Wanted, most_wanted
from serving.resolver import Resolver
from serving.routing import weight

REPEAT_S = 30.0

_ASK_TIMEOUT_S = 10.0

_log = logging.getLogger(__name__)
Ask = Callable[[], Awaitable[list[Stock]]]


async def load_ahead(cache: AdapterCache, base: BaseModelRef, names: Resolver, min_replicas: int) -> None:
    """In a replica, beside its requests, until cancelled. What cannot be looked up or loaded is logged."""
    is_new, failed = True, set[str]()
    while True:
        try:
            if cache.has_place:
                async with _all_replicas() as ask:
                    if is_new:
                        is_new = False
                        await warm(cache, most_wanted(await ask(), base), failed)
                    models = await names.models()
                    stable = [each.adapter for each in models if each.adapter and each.id == each.adapter.name]
                    await fill(cache, stable, ask, serve.get_replica_context().replica_tag, min_replicas, failed)
        except Exception as error:  # the edge of a task that nobody awaits: what is not here is loaded when asked for
            _log.warning("adapters are not loaded ahead: %s: %s", type(error).__name__, error)
        await asyncio.sleep(REPEAT_S)


async def warm(cache: AdapterCache, wanted: Sequence[Wanted], failed: set[str]) -> None:
    """Load what is wanted, until there is no room: what requests bring in meanwhile is not evicted for it.

    Args:
        failed: digests that are passed over, because they could not be loaded by their own fault; more are added.
    """
    total = sum(each.requests for each in wanted)
    for each in wanted:
        cache.expect(each.record, each.requests / total)
    for each in wanted:
        if not await _load(cache, each.record, failed):
            return


async def fill(
    cache: AdapterCache,
    stable: Sequence[AdapterRecord],
    ask: Ask,
    replica: str,
    min_replicas: int,
    failed: set[str],
) -> None:
    """Load what no replica holds, until this one, named `replica`, has its part of `stable` or no more room."""
    others = await ask()
    part = -(-len(stable) // max(min_replicas, len(others), 1))
    for record in sorted(stable, key=lambda each: -weight(each.digest, replica)):
        if len(cache.digests) >= part:
            return
        if _is_held(record, cache, others):
            continue
        others = await ask()
        if not _is_held(record, cache, others) and not await _load(cache, record, failed):
            return


def _is_held(record: AdapterRecord, cache: AdapterCache, others: Sequence[Stock]) -> bool:
    return record.digest in cache.digests or any(record.digest in each.holds for each in others)


async def _load(cache: AdapterCache, record: AdapterRecord, failed: set[str]) -> bool:
    """Whether there is room for more."""
    if record.digest in failed:
        return True
    try:
        return await cache.load_into_room(record)
    except Exception as error:  # whatever one adapter has, the next one is to be tried
        if isinstance(error, LuthierError) and not isinstance(error, ITS_OWN_FAULT):
            raise  # the store's doing, or this node's: the next one would meet it too, and later all may be well
        failed.add(record.digest)
        what = f"{type(error).__name__}: {error}"
        _log.warning("%s@%d is not loaded ahead of requests: %s", record.name, record.version, what)
        return True


@asynccontextmanager
async def _all_replicas() -> AsyncIterator[Ask]:
    """Asks each replica of this deployment that is up, this one too once Serve says that it is."""
    place = serve.get_replica_context()
    # In a thread, because it asks the controller and waits.
    replicas = await asyncio.to_thread(serve.get_deployment_handle, place.deployment, place.app_name)

    async def ask() -> list[Stock]:
        try:
            answers = replicas.broadcast("stock")
            return [
                each
                for each in await answers.results_async(timeout_s=_ASK_TIMEOUT_S, return_exceptions=True)
                if isinstance(each, Stock)
            ]
        except (TimeoutError, RayError, RayServeException) as error:
            _log.info("no other replica says which adapters it has: %s", error)
            return []

    try:
        yield ask
    finally:
        await replicas.shutdown_async()  # or it reports to the controller for as long as this process lives
