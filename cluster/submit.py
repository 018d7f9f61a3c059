"""Handing a job to a cluster whose dashboard is all one can reach: checked first, sent once, followed to its end.

    look at what would be sent → ask the dashboard who it is → submit under an id of our own → follow

The id is made of the job's name, its user and a digest of what it does, so that submitting twice, by a second press of
a key or by a script that lost the answer, is one run. What ended without success may be submitted again as it is.
"""

import asyncio
import hashlib
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import aiohttp
import httpx

from cluster import env
from cluster.errors import ClusterSilent, PlanError, TokenRefused, VersionMismatch
from cluster.launch.spec import MARKET
from cluster.who import user

_TIMEOUT_S = 10.0  # without a word
_READ_S = 30.0  # for all of an answer
_AGAIN_S = (1.0, 2.0, 5.0, 10.0, 30.0)  # between looks at a cluster that does not answer
_HEARTBEAT_S = 20.0
_LOOKS = 3  # at the log of a job that is over: it lies on its driver's node, which leaves a cluster that scales

_RAYS_OWN = (env.RAY_ADDRESS, "RAY_API_SERVER_ADDRESS")

ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
"""Ray's states of a job that is over."""

OFF_SPOT = {MARKET: "!spot"}
"""Where a driver may run: a node that is taken away would take it along."""


@dataclass(frozen=True)
class Submission:
    """A job as it is handed over.

    Attributes:
        name: what the id begins with.
        command: the entry point, as a list of words.
        does: all that decides what the job does; the same again is the same job.
        cpus: what the driver itself asks for; above 0 it does not run on a head that offers none.
        metadata: shown by Ray's dashboard.
    """

    name: str
    command: Sequence[str]
    does: str
    cpus: float = 0.0
    metadata: dict[str, str] = field(default_factory=dict)

    def id(self, number: int = 1) -> str:
        """Of its first submission, or of the one that follows `number` − 1 which failed."""
        ours = hashlib.sha256(json.dumps([self.does, *self.command]).encode()).hexdigest()[:10]
        return "-".join([self.name, user(), ours, *([str(number)] if number > 1 else [])])

    def line(self, address: str, submission_id: str) -> str:
        """The plain `ray job submit` that does the same."""
        options = ["--address", address, "--submission-id", submission_id, "--working-dir", "."]
        if self.cpus:
            options += ["--entrypoint-num-cpus", f"{self.cpus:g}"]
            options += ["--entrypoint-label-selector", json.dumps(OFF_SPOT)]
        if self.metadata:
            options += ["--metadata-json", json.dumps(self.metadata)]
        plain = shlex.join(["ray", "job", "submit", *options, "--", *self.command])
        # Ray takes the variable before the option.
        other = os.environ.get(env.RAY_ADDRESS, address).rstrip("/") != address
        return f"{env.RAY_ADDRESS}={shlex.quote(address)} {plain}" if other else plain


class Cluster:
    """A cluster behind its dashboard, http://host:8265. Made only of what answers and fits: raises PlanError.

    Args:
        any_version: take one of another Ray or Python too; nothing that is pickled may go there.
    """

    def __init__(self, address: str, *, any_version: bool = False) -> None:
        if not address.startswith(("http://", "https://")):
            raise PlanError(f"{address!r} is not a dashboard; give http://host:8265")
        self.address = address.rstrip("/")
        # One for all, since each reads the machine's certificates; no connection is kept that a sleeping laptop loses.
        self._http = httpx.Client(timeout=_TIMEOUT_S, limits=httpx.Limits(max_keepalive_connections=0))
        self.ray, self.python = self._who()
        if not any_version:
            _compare("Ray", self.ray, version("ray"))
            _compare("Python", _minor(self.python), _minor(platform.python_version()))

    def submit(self, job: Submission, root: Path, *, again: bool = False) -> tuple[str, bool]:
        """Send it, unless it runs or has succeeded. Gives its id, and whether it was there already.

        Args:
            again: run once more what has succeeded.

        Raises:
            PlanError: the cluster refuses it.
        """
        number = 1
        while (found := self.status(job.id(number))) is not None:
            if found not in ("FAILED", "STOPPED") and not (again and found == "SUCCEEDED"):
                return job.id(number), True
            number += 1
        try:
            self._client().submit_job(
                entrypoint=shlex.join(job.command),
                submission_id=job.id(number),
                runtime_env={"working_dir": str(root)},
                metadata=job.metadata,
                entrypoint_num_cpus=job.cpus or None,
                entrypoint_label_selector=OFF_SPOT if job.cpus else None,
            )
        except RuntimeError as error:
            if "already exists" in str(error):
                return job.id(number), True  # somebody was quicker with the same
            raise PlanError(f"{self.address} refuses the job: {str(error).strip().splitlines()[-1]}") from None
        return job.id(number), False

    def status(self, submission_id: str) -> str | None:
        """Ray's state of a job; None when there is none of that id. Raises httpx.HTTPError."""
        found = self._job(submission_id)
        return found["status"] if found else None

    def log(self, submission_id: str) -> str:
        """What a job has printed. Raises httpx.HTTPError."""
        logs: str = json.loads(self.read(f"/api/jobs/{submission_id}/logs")).get("logs") or ""
        return logs

    def message(self, submission_id: str) -> str:
        """What Ray says of the state that a job is in. Raises httpx.HTTPError."""
        return str((self._job(submission_id) or {}).get("message") or "")

    def remove(self, submission_id: str) -> None:
        """End a job if it runs, and forget it if it has ended. Raises httpx.HTTPError."""
        job = f"{self.address}/api/jobs/{submission_id}"
        if self.status(submission_id) in ENDED:
            httpx.delete(job, headers=headers(), timeout=_TIMEOUT_S).raise_for_status()
        else:
            httpx.post(f"{job}/stop", headers=headers(), timeout=_TIMEOUT_S).raise_for_status()

    def follow(self, submission_id: str) -> int:
        """Print what the job prints, to its end. Gives the exit code of its driver.

        A connection that breaks, or a laptop that sleeps, is no end: it is asked again, and goes on where it was.
        """
        printed = failures = missed = 0
        while True:
            before = printed
            try:
                printed, is_whole = asyncio.run(self._tail(submission_id, printed))
                job = self._job(submission_id)
            except (aiohttp.ClientError, httpx.HTTPError) as error:
                if not failures:
                    why = str(error) or type(error).__name__
                    print(f"{self.address} does not answer ({why}); the job goes on, asking again", file=sys.stderr)
                time.sleep(_AGAIN_S[min(failures, len(_AGAIN_S) - 1)])
                failures += 1
                continue
            failures = 0
            is_over = job is None or job["status"] in ENDED
            has_log = job is not None and job["driver_node_id"] is not None  # it may have failed before it had a node
            if is_over and (is_whole or not has_log):
                break
            missed = missed + 1 if is_over and printed == before else 0
            if missed == _LOOKS:
                print("the rest of the log cannot be read: the node that has it may be gone", file=sys.stderr)
                break
            time.sleep(_AGAIN_S[0])  # it waits for its nodes, or the socket has broken
        if job and job["status"] == "SUCCEEDED":
            return 0
        why = f"{job['status']}: {job['message']}" if job else "the cluster knows it no longer"
        print(f"job {submission_id}: {why}", file=sys.stderr)
        return int(job.get("driver_exit_code") or 1) if job else 1

    def _ask(self, path: str) -> httpx.Response:
        return self._http.get(f"{self.address}{path}", headers=headers())

    def read(self, path: str, most_bytes: int | None = None) -> str:
        """What is there, or no more than its beginning. Raises httpx.HTTPError."""
        with self._http.stream("GET", f"{self.address}{path}", headers=headers()) as answer:
            answer.raise_for_status()
            text = bytearray()
            until = time.monotonic() + _READ_S
            for chunk in answer.iter_bytes():
                text += chunk
                if time.monotonic() > until:
                    raise httpx.ReadTimeout(f"{path} has not been read after {_READ_S:.0f} s")
                if most_bytes and len(text) >= most_bytes:
                    break
        return text.decode(errors="replace")

    async def _tail(self, submission_id: str, printed: int) -> tuple[int, bool]:
        """Print the log from its character `printed` on. Gives how far it came, and whether that is its end.

        Ray sends a log from its beginning whenever it is asked.
        """
        seen = 0
        url = f"{self.address}/api/jobs/{submission_id}/logs/tail"
        try:
            async with (
                aiohttp.ClientSession(headers=headers()) as session,
                # A connection that a sleeping laptop has lost is silent: only a heartbeat shows it.
                session.ws_connect(url, heartbeat=_HEARTBEAT_S) as socket,
            ):
                async for message in socket:
                    if message.type is aiohttp.WSMsgType.TEXT:
                        new = message.data[max(0, printed - seen) :]
                        seen += len(message.data)
                        if new:
                            print(new, end="", flush=True)
                            printed = seen
                # Ray closes it in order, too, when the node with the log is gone: then less comes than came before.
                return printed, socket.close_code == aiohttp.WSCloseCode.OK and seen >= max(printed, 1)
        except aiohttp.WSServerHandshakeError as error:
            if error.status != httpx.codes.NOT_FOUND:
                raise
            return printed, True  # a head that has restarted may know the job no longer

    def _job(self, submission_id: str) -> dict[str, Any] | None:
        answer = self._ask(f"/api/jobs/{submission_id}")
        if answer.status_code == httpx.codes.NOT_FOUND:
            return None
        answer.raise_for_status()
        found: dict[str, Any] = answer.json()
        return found

    def _who(self) -> tuple[str, str]:
        """Its Ray and its Python."""
        data = self._tells("/api/v0/cluster_metadata")["data"]
        return self._tells("/api/version")["ray_version"], data["pythonVersion"]

    def _tells(self, path: str) -> dict[str, Any]:
        """What Ray's dashboard answers there; whatever else answers in its place is none."""
        try:
            answer = self._ask(path)
        except httpx.TransportError as error:
            raise ClusterSilent(
                f"no answer from {self.address} ({error}); does the cluster run, and is its tunnel open "
                "(`luthier cluster dashboard NAME`)?"
            ) from None
        if answer.status_code in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
            raise TokenRefused(
                f"{self.address} refuses the token; set {env.RAY_AUTH_MODE}=token, and {env.RAY_AUTH_TOKEN_PATH} to "
                "the file with the cluster's token"
            )
        try:
            told = answer.raise_for_status().json()
        except (httpx.HTTPStatusError, ValueError):
            told = None
        if not isinstance(told, dict) or not told.keys() & {"ray_version", "data"}:
            raise ClusterSilent(f"{self.address} answers {answer.status_code}, and not as Ray's dashboard does")
        return told

    def _client(self) -> Any:
        from ray.job_submission import JobSubmissionClient

        # Ray's client takes these variables before the address that it is given.
        hidden = {name: os.environ.pop(name) for name in _RAYS_OWN if name in os.environ}
        try:
            return JobSubmissionClient(self.address, headers=headers())
        finally:
            os.environ.update(hidden)


def headers() -> dict[str, str]:
    """As Ray finds its token: the variable, the file it names, the file in the home folder."""
    if os.environ.get(env.RAY_AUTH_MODE) != "token":
        return {}
    token = os.environ.get(env.RAY_AUTH_TOKEN)
    if token is None:
        path = Path(os.environ.get(env.RAY_AUTH_TOKEN_PATH) or Path.home() / ".ray" / "auth_token")
        token = path.read_text() if path.exists() else ""
    return {"Authorization": f"Bearer {token.strip()}"} if token.strip() else {}


def _compare(what: str, theirs: str, ours: str) -> None:
    if theirs != ours:
        raise VersionMismatch(
            f"the cluster has {what} {theirs}, and this is {ours}; what one pickles, the other cannot read"
        )


def _minor(python: str) -> str:
    return ".".join(python.split(".")[:2])
