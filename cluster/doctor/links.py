"""The way from node to node: a listener on a free port, and who connects to it. Runs on nodes; plain TCP."""

import socket
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from cluster.doctor.report import Link

_TIMEOUT_S = 3.0
_ROUNDS = 5
_STREAM_S = 0.3
_BLOCK = bytes(1 << 20)
_ECHO, _COUNT = b"E", b"C"
_AT_ONCE = 16

Target = tuple[str, str, int]
"""A node's id, address and port."""


def listen(address: str) -> int:
    """Listen on a free port until this process ends; returns the port. Raises OSError."""
    server = socket.create_server((address, 0), backlog=128)
    port: int = server.getsockname()[1]
    threading.Thread(target=_serve, args=(server,), daemon=True).start()
    return port


def reach(source: str, targets: Sequence[Target]) -> list[Link]:
    """The round trip to each."""
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return list(pool.map(lambda target: _reach(source, target), targets))


def stream(address: str, port: int) -> float | None:
    """Bits a second of one TCP stream, as the other end counts them; None when it breaks."""
    try:
        with socket.create_connection((address, port), _TIMEOUT_S) as way:
            begun = time.perf_counter()
            way.sendall(_COUNT)
            while time.perf_counter() - begun < _STREAM_S:
                way.sendall(_BLOCK)
            way.shutdown(socket.SHUT_WR)
            counted = int(way.makefile().readline())
            return counted * 8 / (time.perf_counter() - begun)
    except (OSError, ValueError):
        return None


def _reach(source: str, target: Target) -> Link:
    name, address, port = target
    trips = []
    try:
        with socket.create_connection((address, port), _TIMEOUT_S) as way:
            way.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            way.sendall(_ECHO)
            for _ in range(_ROUNDS):
                begun = time.perf_counter()
                way.sendall(b".")
                if way.recv(1) != b".":
                    raise OSError("the connection was closed")
                trips.append(time.perf_counter() - begun)
    except OSError as error:
        return Link(source, name, error=f"{address}:{port}: {error.strerror or error}")
    return Link(source, name, round_trip_s=min(trips))


def _serve(server: socket.socket) -> None:
    while True:
        way, _ = server.accept()
        threading.Thread(target=_answer, args=(way,), daemon=True).start()


def _answer(way: socket.socket) -> None:
    with way:
        try:
            way.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if way.recv(1) == _ECHO:
                while data := way.recv(1):
                    way.sendall(data)
                return
            counted = 0
            while data := way.recv(len(_BLOCK)):
                counted += len(data)
            way.sendall(f"{counted}\n".encode())
        except OSError:
            return  # whoever asked knows it too
