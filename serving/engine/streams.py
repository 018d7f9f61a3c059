"""The stream that an engine hands out: its events cross from the engine's thread into the asyncio loop that asked."""

import asyncio
from collections.abc import Callable, Iterable
from concurrent.futures import Future

from serving.engine.protocol import TokenEvent


class EventStream:
    """The events of one request, for one consumer in the loop that submitted it (a TokenStream)."""

    def __init__(self, request_id: str, loop: asyncio.AbstractEventLoop, cancel: Callable[[str], None]) -> None:
        self.request_id = request_id
        self.loop = loop
        self._cancel = cancel
        self._events: asyncio.Queue[TokenEvent] = asyncio.Queue()
        self._is_over = False

    def put(self, events: Iterable[TokenEvent]) -> None:
        """Add events; in the stream's own loop only."""
        for event in events:
            self._events.put_nowait(event)

    def __aiter__(self) -> "EventStream":
        return self

    async def __anext__(self) -> TokenEvent:
        if self._is_over:
            raise StopAsyncIteration
        try:
            event = await self._events.get()
        except asyncio.CancelledError:
            await self.aclose()
            raise
        self._is_over = event.finish_reason is not None
        return event

    async def aclose(self) -> None:
        """Cancel the request if it still runs; no event comes after this."""
        if not self._is_over:
            self._is_over = True
            self._cancel(self.request_id)


def settle(done: "Future[None]", error: BaseException | None) -> None:
    """Answer whoever waits, unless they went away."""
    if not done.set_running_or_notify_cancel():
        return
    if error is None:
        done.set_result(None)
    else:
        done.set_exception(error)
