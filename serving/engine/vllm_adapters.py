"""The adapters that vLLM serves: each under its digest, from links of our own, and the same ones after every restart.

No name ever stands for other weights. vLLM reads an adapter's files whenever it likes (it may drop one that was not
used for long), and the node's download cache may remove them meanwhile: so each has links here as long as its name.
"""

import asyncio
import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import aiohttp

from cluster.errors import AdapterRefused, NotServing, Overloaded, RequestError
from serving.engine.vllm_api import BASE_NAME
from serving.engine.vllm_command import VllmOptions
from serving.engine.vllm_server import VllmServer
from serving.engine.vllm_zero import ZERO_NAME, write_zero_adapter

_RETRY_AFTER_S = 10


class VllmAdapters:
    """Changes them in the engine's asyncio loop, one at a time; `loaded` and `has` are for any thread."""

    def __init__(self, model: Path, options: VllmOptions, current: Callable[[], VllmServer | None]) -> None:
        """`current` is vLLM if it serves, None while it is being restarted; it raises Overloaded once it never will."""
        self.base = BASE_NAME if options.num_gpus else ZERO_NAME  # what answers without an adapter (vllm_zero.py)
        self._model = model
        self._max_adapters = options.max_adapters
        self._current = current
        self._links: dict[str, Path] = {}  # by digest; replaced, not changed, so that any thread may read it
        self._leaving: dict[str, asyncio.Event] = {}  # set when it has left
        self._changing = asyncio.Lock()
        self._is_warm = False

    @property
    def loaded(self) -> tuple[str, ...]:
        """Digests, in the order of loading."""
        return tuple(self._links)

    def has(self, digest: str) -> bool:
        """Whether requests may begin with it."""
        return digest in self._links and digest not in self._leaving

    async def restore(self, server: VllmServer) -> None:
        """Give a vLLM that has just started what the one before had. Raises AdapterRefused, RequestError,
        aiohttp.ClientError."""
        self._is_warm = False
        if self.base == ZERO_NAME:
            zero = server.private / ZERO_NAME
            if not zero.exists():
                write_zero_adapter(self._model, zero)
            await server.load(ZERO_NAME, zero)
        await server.warm_up(self.base)
        async with self._changing:
            for digest, links in self._links.items():
                await self._serve(server, digest, links)

    async def load(self, digest: str, folder: Path) -> None:
        """Serve the adapter of a folder. Raises AdapterRefused, and Overloaded when there is no place or no vLLM."""
        while digest in self._leaving:
            await self._leaving[digest].wait()
        async with self._changing:
            if digest in self._links:
                return
            server = self._current()
            if server is None:
                raise NotServing("vLLM is being restarted", _RETRY_AFTER_S)
            if len(self._links) >= self._max_adapters:
                raise Overloaded(f"all {self._max_adapters} adapter slots are taken; unload one first")
            links = Path(tempfile.mkdtemp(dir=server.private)) / "adapter"
            try:
                await asyncio.to_thread(shutil.copytree, folder, links, copy_function=_link)
                await self._serve(server, digest, links)
            except (AdapterRefused, RequestError, aiohttp.ClientError) as error:
                await asyncio.to_thread(shutil.rmtree, links)
                if isinstance(error, aiohttp.ClientError):
                    raise NotServing("vLLM went away while it loaded an adapter", _RETRY_AFTER_S) from error
                raise AdapterRefused(str(error).replace(str(links), str(folder))) from error
            self._links = {**self._links, digest: links}

    def retire(self, digest: str) -> bool:
        """From now on `has` says no, and `unload` is to follow once no request runs with it. False: it is not here."""
        if digest in self._links:
            self._leaving.setdefault(digest, asyncio.Event())
        return digest in self._links

    async def unload(self, digest: str) -> None:
        """Forget one that was retired. Raises Overloaded when vLLM is given up."""
        try:
            async with self._changing:
                if digest not in self._links:
                    return  # another call has done it
                server = self._current()
                if server is not None:
                    with contextlib.suppress(aiohttp.ClientError):  # it has just ended, and comes back without this one
                        await server.unload(digest)
                links = self._links[digest]
                self._links = {name: kept for name, kept in self._links.items() if name != digest}
        finally:
            left = self._leaving.pop(digest, None)
            if left is not None:
                left.set()
        await asyncio.to_thread(shutil.rmtree, links)

    async def _serve(self, server: VllmServer, digest: str, links: Path) -> None:
        """Raises AdapterRefused, RequestError when vLLM cannot use it after all, and aiohttp.ClientError."""
        await server.load(digest, links)
        if not self._is_warm:
            await server.warm_up(digest)
            self._is_warm = True


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copyfile(source, target)
