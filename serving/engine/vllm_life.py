"""vLLM's life: it is started, watched, and started again whenever it ends, a few times in a row and no more.

starting ─▶ serving ─▶ it ends, or stops answering ─▶ restarting ─▶ serving …
                                                          └─ too often ─▶ given up
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from concurrent.futures import Future

import aiohttp

from cluster.errors import AdapterRefused, ModelError, RequestError
from serving.engine.vllm_server import VllmServer

_MAX_RESTARTS = 5  # in a row; the wait before each is twice the one before
_FIRST_BACKOFF_S = 1.0
_STEADY_S = 600.0  # after this long of serving, the next end counts as the first

_log = logging.getLogger(__name__)


class VllmLife:
    """One vLLM after the other, in an asyncio loop."""

    def __init__(
        self,
        make: Callable[[], VllmServer],
        restore: Callable[[VllmServer], Awaitable[None]],
        tell: Callable[[str | None], None],
    ) -> None:
        """`restore` gives one that has just started what it is to serve; `tell` hears None when it then serves, and
        why not when it does not any more."""
        self._make = make
        self._restore = restore
        self._tell = tell
        self.server = make()

    async def run(self, ready: "Future[None]") -> str:
        """Start, then restart it whenever it ends; `ready` is done once it serves. Returns why it is given up. Raises
        ModelError when it does not start at all."""
        await self._bring_up()
        ready.set_result(None)
        loop = asyncio.get_running_loop()
        failures, began = 0, loop.time()
        why = await self.server.ended()
        while True:
            self._tell("vLLM has ended, and is being restarted")
            failures = 1 if loop.time() - began > _STEADY_S else failures + 1
            _log.error("vLLM failed (%d in a row): %s", failures, why)
            await self.server.stop()
            if failures > _MAX_RESTARTS:
                return f"vLLM failed {failures} times in a row; {why}"
            await asyncio.sleep(_FIRST_BACKOFF_S * 2 ** (failures - 1))
            began, self.server = loop.time(), self._make()
            try:
                await self._bring_up()
                why = await self.server.ended()
            except ModelError as error:
                why = str(error)

    async def _bring_up(self) -> None:
        """Raises ModelError."""
        await self.server.start()
        try:
            await self._restore(self.server)
        except (AdapterRefused, RequestError, aiohttp.ClientError) as error:
            raise ModelError(f"vLLM has started, but fails at once: {error}; {self.server.said()}") from error
        self._tell(None)  # nothing was awaited: what waited for the restoration to end comes after this
