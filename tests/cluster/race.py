"""Many writers of one key: processes, each with its own copy of the store, and threads in each."""

import multiprocessing
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.synchronize import Barrier
from typing import Any

from cluster.errors import ObjectExists
from cluster.store import Store

PROCESSES = 4
THREADS = 4


def race(store: Store, keys: list[str]) -> dict[str, list[bytes]]:
    """All PROCESSES × THREADS writers create every key at the same moment; the bytes of the winners by key."""
    context = multiprocessing.get_context("spawn")
    start, results = context.Barrier(PROCESSES * THREADS), context.Queue()
    processes = [
        context.Process(target=_compete, args=(store, keys, start, results, number)) for number in range(PROCESSES)
    ]
    for process in processes:
        process.start()
    won: dict[str, list[bytes]] = {key: [] for key in keys}
    for _ in processes:
        for key, data in results.get(timeout=60):
            won[key].append(data)
    for process in processes:
        process.join()
        process.close()
    results.close()
    results.join_thread()
    return won


def _compete(store: Store, keys: list[str], start: Barrier, results: Any, process: int) -> None:
    def writer(thread: int) -> list[tuple[str, bytes]]:
        won = []
        for key in keys:
            data = f"{key} by process {process}, thread {thread}\n".encode() * 2000
            start.wait(timeout=60)
            try:
                store.create(key, data)
            except ObjectExists:
                continue
            won.append((key, data))
        return won

    with ThreadPoolExecutor(THREADS) as pool:
        results.put([win for wins in pool.map(writer, range(THREADS)) for win in wins])
