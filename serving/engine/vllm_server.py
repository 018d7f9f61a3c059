"""One run of vLLM's API server: a process group of its own, in its own environment, behind a socket that is ours alone.

    this process ─stdin pipe─▶ guard.py ─▶ vLLM's API server ─▶ its engine core ─▶ its workers

It listens on a Unix socket in a folder that only this user can enter. (With a port, anybody on the node could use it:
vLLM's API key does not guard all of its routes.) Its output goes to this process's stderr, line by line, and the last
lines are kept for error messages. guard.py ends the group when this process dies, however it dies.
"""

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import sys
import tempfile
from collections import deque
from collections.abc import AsyncGenerator
from http import HTTPStatus
from pathlib import Path

import aiohttp

from cluster.errors import AdapterRefused, ModelError, RequestError
from serving.engine import guard
from serving.engine.protocol import GenerationRequest, SamplingParams
from serving.engine.vllm_api import Chunk, Json, completion_body, error_message, read_chunk
from serving.engine.vllm_command import VllmOptions, command, environment

_START_POLL_S = 0.25
_HEALTH_INTERVAL_S = 5.0
_HEALTH_TIMEOUT = aiohttp.ClientTimeout(total=30.0)
_MAX_SILENT_CHECKS = 3
_STOP_GRACE_S = 10.0
_TAIL_LINES = 400  # an error, its tracebacks in three processes, and their shutting down
_QUOTED_LINES = 8
# The first sampled request, and the first with an adapter, compile for up to tens of seconds.
_WARM_UPS = (SamplingParams(max_tokens=2, temperature=0), SamplingParams(max_tokens=2, top_p=0.9, top_k=5, logprobs=1))
_ERROR = re.compile(r"\b\w+(Error|Exception): .*")


class VllmServer:
    """A running vLLM; used from one asyncio loop. It starts once and stops once: make another to restart."""

    def __init__(self, folder: Path, options: VllmOptions, private: Path) -> None:
        """`private` is a folder that only we can enter; guard.py removes it should we die. Nothing runs yet."""
        self.private = private
        self._temporary = Path(tempfile.mkdtemp(dir=private))
        self.socket = self._temporary / "api"
        self._command = command(folder, options, self.socket)
        self._environment = environment(os.environ, options, self._temporary)
        self._start_timeout_s = options.start_timeout_s
        self._session: aiohttp.ClientSession | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._reader: asyncio.Task[None] | None = None
        self._tail: deque[str] = deque(maxlen=_TAIL_LINES)

    async def start(self) -> None:
        """Begin to run, and return when it answers. Raises ModelError with the last lines of its log."""
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-I",
            guard.__file__,
            str(self.private),
            *self._command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env=self._environment,
            cwd=self._temporary,
            start_new_session=True,
        )
        self._reader = asyncio.create_task(self._read_output(self._process))
        # A connection is used once: one that waits here for the next request may be closed there just then. An answer
        # takes what it takes: a server that hangs is found by its health.
        self._session = aiohttp.ClientSession(
            "http://vllm",
            connector=aiohttp.UnixConnector(str(self.socket), limit=0, force_close=True),
            timeout=aiohttp.ClientTimeout(total=None),
        )
        try:
            async with asyncio.timeout(self._start_timeout_s):
                while not await self._is_healthy():
                    if self._process.returncode is not None:
                        raise ModelError(f"vLLM does not start: {await self._last_words()}")
                    await asyncio.sleep(_START_POLL_S)
        except TimeoutError:
            words = "\n".join(self._tail)
            raise ModelError(
                f"vLLM does not answer within {self._start_timeout_s:g} s; it said last:\n{words}"
            ) from None

    async def ended(self) -> str:
        """Wait until it does not serve any more: its process has ended, or it stopped answering. Says which."""
        assert self._process is not None
        exited = asyncio.ensure_future(self._process.wait())
        silent = 0
        try:
            while silent < _MAX_SILENT_CHECKS:
                await asyncio.wait({exited}, timeout=_HEALTH_INTERVAL_S)
                if exited.done():
                    return f"its process has ended; {await self._last_words()}"
                silent = 0 if await self._is_healthy() else silent + 1
        finally:
            exited.cancel()
        return f"it did not answer {silent} health checks in a row"

    async def stop(self) -> None:
        """End the whole group, politely first, and remove its files. A second call does nothing."""
        if self._process is not None:
            _signal_group(self._process.pid, signal.SIGTERM)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_STOP_GRACE_S):
                    await self._process.wait()
            _signal_group(self._process.pid, signal.SIGKILL)
            await self._process.wait()
        if self._reader is not None:
            await self._reader
        if self._session is not None:
            await self._session.close()
        await asyncio.to_thread(shutil.rmtree, self._temporary, ignore_errors=True)

    async def complete(self, body: Json) -> AsyncGenerator[Chunk, None]:
        """The chunks of an answer; closing the generator ends the request there. Raises aiohttp.ClientError."""
        async with self._open_session.post("/v1/completions", json=body) as response:
            if response.status != HTTPStatus.OK:
                yield Chunk(error=await _reason(response))
                return
            pending = b""
            async for data in response.content.iter_any():
                *lines, pending = (pending + data).split(b"\n")
                for line in lines:
                    event = line.strip().removeprefix(b"data: ")
                    if event and event != b"[DONE]":
                        yield read_chunk(json.loads(event), body["logprobs"])

    async def refusal(self, body: Json) -> str | None:
        """Why it does not answer a request; None when it has. Raises aiohttp.ClientError."""
        # Not as a stream: refusing those puts three tracebacks into its log.
        async with self._open_session.post("/v1/completions", json={**body, "stream": False}) as response:
            return None if response.status == HTTPStatus.OK else await _reason(response)

    async def warm_up(self, model: str) -> None:
        """A greedy and a sampled answer by a model. Raises RequestError with vLLM's reason, aiohttp.ClientError."""
        for params in _WARM_UPS:
            body = completion_body(GenerationRequest("warm-up", [0], model, params), ())
            async with contextlib.aclosing(self.complete(body)) as chunks:
                async for chunk in chunks:
                    if chunk.error is not None:
                        raise RequestError(chunk.error)

    async def load(self, name: str, folder: Path) -> None:
        """Serve the adapter of a folder under a name. Raises AdapterRefused with vLLM's reason, aiohttp.ClientError."""
        body = {"lora_name": name, "lora_path": str(folder)}
        async with self._open_session.post("/v1/load_lora_adapter", json=body) as response:
            if response.status != HTTPStatus.OK:
                raise AdapterRefused(f"vLLM refuses adapter {name}: {await _reason(response)}")

    async def unload(self, name: str) -> None:
        """Forget a name; its memory goes to the next adapter. Raises aiohttp.ClientError."""
        async with self._open_session.post("/v1/unload_lora_adapter", json={"lora_name": name}) as response:
            response.raise_for_status()

    @property
    def _open_session(self) -> aiohttp.ClientSession:
        assert self._session is not None, "it was not started"
        if self._session.closed:
            raise aiohttp.ClientConnectionError("it was stopped")
        return self._session

    async def _is_healthy(self) -> bool:
        try:
            async with self._open_session.get("/health", timeout=_HEALTH_TIMEOUT) as response:
                return response.status == HTTPStatus.OK
        except (aiohttp.ClientError, TimeoutError):
            return False

    async def _read_output(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        pending = b""
        while data := await process.stdout.read(2**16):
            *lines, pending = (pending + data).split(b"\n")
            for line in lines:
                text = line.decode(errors="replace")
                self._tail.append(text)
                print(f"vllm: {text}", file=sys.stderr, flush=True)

    async def _last_words(self) -> str:
        """The last lines of its output, once all of them have come."""
        assert self._reader is not None
        await asyncio.wait({self._reader}, timeout=_STOP_GRACE_S)  # the pipe closes with the last of the group
        return self.said()

    def said(self) -> str:
        """The errors in the last lines of its output, each with what explains it; the first is the cause of others."""
        lines = [line for line in self._tail if " WARNING " not in line and line.strip()]
        quoted: dict[str, None] = {}
        for place, line in enumerate(lines):
            if match := _ERROR.search(line):
                quoted |= dict.fromkeys([match[0], *lines[place + 1 : place + 3]])
        chosen = list(quoted)[:_QUOTED_LINES] or lines[-_QUOTED_LINES:]
        return "it said (more in this process's log):\n  " + "\n  ".join(chosen)


async def _reason(response: aiohttp.ClientResponse) -> str:
    content = await response.read()
    try:
        return error_message(json.loads(content))
    except ValueError:
        return f"HTTP {response.status}: {content[:200].decode(errors='replace')}"


def _signal_group(leader: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):  # nothing of it is left
        os.killpg(leader, number)
