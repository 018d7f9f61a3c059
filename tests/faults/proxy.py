"""A TCP proxy on loopback that makes a network go wrong, on command.

    with Proxy("127.0.0.1", server.port) as proxy:
        proxy.cut("down", after_bytes=5_000_000, times=3)     # three downloads break off
        …                                                     # clients use proxy.port
        assert proxy.fired == 3                               # the fault did happen

It runs in a thread of its own. Every command holds from its return on, for open connections too.
"""

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal

Direction = Literal["up", "down"]  # from the client to the server, and back


@dataclass
class _Cut:
    direction: Direction
    after_bytes: int
    left_bytes: int
    times: int | None
    reset: bool
    then: Callable[[], object] | None


class Proxy:
    """Forwards `port` on loopback to a server. `fired` counts the connections broken by `cut` so far."""

    def __init__(self, host: str, port: int) -> None:
        self._target = (host, port)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fault proxy")
        self._listener: asyncio.Server | None = None
        self._connections: dict[asyncio.Task[None], list[asyncio.StreamWriter]] = {}
        self._cut: _Cut | None = None
        self._swallow = False
        self._latency_s = 0.0
        self.port = 0
        self.fired = 0

    def __enter__(self) -> "Proxy":
        self._thread.start()
        self._do(self._listen())
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._do(self._refuse())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def cut(
        self,
        direction: Direction,
        after_bytes: int,
        times: int | None = 1,
        reset: bool = True,
        then: Callable[[], object] | None = None,
    ) -> None:
        """Let `after_bytes` pass in `direction`, counted over all connections, and break the one that sends the next.

        So often (None: always), counting anew each time; by a reset, or else by a plain close. `then` is called at
        the moment of the break, before the client can see it. An interim answer (100 Continue) does not count.
        """
        self._do(self._set(_Cut(direction, after_bytes, after_bytes, times, reset, then), False, 0.0))

    def lose_answer(self, times: int | None = 1, then: Callable[[], object] | None = None) -> None:
        """The server does what it was asked; the client never hears of it."""
        self.cut("down", 0, times, then=then)

    def lose_request(self, times: int | None = 1, then: Callable[[], object] | None = None) -> None:
        """The connection breaks before the server has heard anything."""
        self.cut("up", 0, times, then=then)

    def black_hole(self) -> None:
        """Connections are accepted and nothing ever comes back."""
        self._do(self._set(None, True, 0.0))

    def delay(self, latency_s: float) -> None:
        """Each piece of data, in either direction, comes later by `latency_s`."""
        self._do(self._set(None, False, latency_s))

    def refuse(self) -> None:
        """Break all connections and accept none."""
        self._do(self._refuse())

    def heal(self) -> None:
        """Forward everything again."""
        self._do(self._set(None, False, 0.0))
        self._do(self._listen())

    def _do(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout=30)

    async def _set(self, cut: _Cut | None, swallow: bool, latency_s: float) -> None:
        self._cut, self._swallow, self._latency_s = cut, swallow, latency_s

    async def _listen(self) -> None:
        if self._listener is None:
            self._listener = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
            self.port = self._listener.sockets[0].getsockname()[1]

    async def _refuse(self) -> None:
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        for writers in self._connections.values():
            _break(writers, reset=True)
        await asyncio.gather(*self._connections)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        writers = self._connections[task] = [writer]
        try:
            server_reader, server_writer = await asyncio.open_connection(*self._target)
            writers.append(server_writer)
            up = self._pump("up", reader, server_writer, writers)
            down = self._pump("down", server_reader, writer, writers)
            await asyncio.gather(up, down)
        except OSError:  # the client or the server has gone
            pass
        finally:
            _break(writers, reset=False)
            for each in writers:
                with contextlib.suppress(OSError):
                    await each.wait_closed()
            del self._connections[task]

    async def _pump(
        self,
        direction: Direction,
        source: asyncio.StreamReader,
        target: asyncio.StreamWriter,
        writers: list[asyncio.StreamWriter],
    ) -> None:
        while data := await source.read(1 << 16):
            if self._latency_s:
                await asyncio.sleep(self._latency_s)
            if self._swallow:
                continue
            passing, cut = self._spend(direction, data)
            target.write(passing)
            await target.drain()
            if cut is not None:
                if cut.then is not None:
                    cut.then()
                self.fired += 1
                _break(writers, cut.reset)
                return
        target.close()

    def _spend(self, direction: Direction, data: bytes) -> tuple[bytes, _Cut | None]:
        """What of `data` may pass, and the cut to make after it."""
        cut = self._cut
        if cut is None or cut.direction != direction or data.startswith(b"HTTP/1.1 100"):
            return data, None
        if len(data) <= cut.left_bytes:
            cut.left_bytes -= len(data)
            return data, None
        passing, cut.left_bytes = data[: cut.left_bytes], cut.after_bytes
        if cut.times is not None:
            cut.times -= 1
            if cut.times == 0:
                self._cut = None
        return passing, cut


def _break(writers: list[asyncio.StreamWriter], reset: bool) -> None:
    for writer in writers:
        if not reset:
            writer.close()
            continue
        if not writer.transport.is_closing():
            # Closing a socket that lingers for 0 s sends a reset instead of an end.
            raw = writer.get_extra_info("socket")
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()
