"""The HTTP side: routes in, Calls to replicas, answers and streams out. Everything about Ray and HTTP meets here.

    parse ▸ resolve the model ▸ call a replica ▸ wait for Accepted ▸ only now send a status ▸ the rest

So whatever a replica refuses still gets its own status code, and a stream that has begun can only fail as an event.
When the client goes away Serve cancels the handler; `finally` passes that on to the replica.
"""

import asyncio
import json
import logging
import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from contextvars import Context
from typing import Any

import grpc  # type: ignore[import-untyped]
from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import DeploymentStatus, ReplicaState
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from cluster import metrics, secret
from cluster.errors import LuthierError, NotServing, Overloaded
from cluster.gauges import counter
from cluster.records import AdapterRecord, BaseModelRef
from cluster.store import open_existing
from serving import page, scrape
from serving.answers import Answer, ChatAnswer, CompletionAnswer, Json
from serving.calls import Accepted, Call, ChoiceEvent
from serving.config import ServingConfig
from serving.engine.pace import Pace
from serving.permits import Permits
from serving.protocol import ChatRequest, CompletionRequest, HttpError, describe, describe_status, parse
from serving.resolver import Resolver, ServedModel

ADAPTER_HEADER = "x-luthier-adapter"
DIGEST_HEADER = "x-luthier-digest"
QUANTIZATION_HEADER = "x-luthier-quantization"

_READY_TIMEOUT_S = 5.0
_MAX_GRPC_BYTES = 2**21  # of a request; Serve's servers take messages of 4 MiB

_log = logging.getLogger(__name__)


class Ingress:
    """One process that speaks HTTP. Made by Serve, which runs the ASGI application that this gives it."""

    def __init__(
        self,
        config: ServingConfig,
        base: BaseModelRef,
        replicas: DeploymentHandle[Any],
        licences: Permits | None = None,
    ) -> None:
        secret.load(config.secrets)
        self._base = base
        self._quantization = config.quantization
        self._replicas = replicas
        self._may_be_none = config.replicas.min == 0
        self._permits = licences or Permits.here(config)
        refresh_s = config.adapters.alias_refresh_s
        self._resolver = Resolver(open_existing(config.store), base, refresh_s, self._prefetch, self._permits.check)
        self._requests = counter(metrics.REQUESTS)
        self._pace = Pace()  # in calls answered

    def __serve_build_asgi_app__(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/", self.page),
                Route("/v1/chat/completions", self.chat, methods=["POST"]),
                Route("/v1/completions", self.completions, methods=["POST"]),
                Route("/v1/models", self.models),
                Route("/v1/models/{model}", self.model),
                Route("/healthz", self.healthz),
                Route("/readyz", self.readyz),
                Route("/metrics", self.metrics),
            ],
            exception_handlers={HTTPException: _refuse_route, LuthierError: _refuse, Exception: _refuse},
        )

    async def page(self, request: Request) -> Response:  # noqa: ARG002 - Starlette's signature, as below
        """GET /: chat with any of the models, in a browser."""
        return page.response()

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        return await self._answer(request, ChatRequest)

    async def completions(self, request: Request) -> Response:
        """POST /v1/completions."""
        return await self._answer(request, CompletionRequest)

    async def models(self, request: Request) -> Response:  # noqa: ARG002
        """GET /v1/models: the base and every adapter that a request may name."""
        listed = [self._model(model) for model in await self._resolver.models()]
        return JSONResponse({"object": "list", "data": listed})

    async def model(self, request: Request) -> Response:
        """GET /v1/models/{model}: any name that a request may use, versions included."""
        return JSONResponse(self._model(await self._resolver.model(request.path_params["model"])))

    async def healthz(self, request: Request) -> Response:  # noqa: ARG002
        """This process is up."""
        return JSONResponse({"status": "ok"})

    async def readyz(self, request: Request) -> Response:  # noqa: ARG002
        """A replica answers; where there may be none, that the next request would start one."""
        if self._may_be_none and await asyncio.to_thread(self._sleeps):
            return JSONResponse({"ready": True, "model": self._base.name})
        try:
            is_alive = await asyncio.wait_for(_result(self._replicas.ready.remote()), _READY_TIMEOUT_S)
        except (TimeoutError, RayError, RayServeException):
            is_alive = False
        return JSONResponse({"ready": is_alive, "model": self._base.name}, 200 if is_alive else 503)

    async def metrics(self, request: Request) -> Response:  # noqa: ARG002
        """Prometheus text of the whole cluster."""
        return PlainTextResponse(await scrape.scrape(), media_type=scrape.CONTENT_TYPE)

    async def _answer(self, request: Request, kind: type[ChatRequest] | type[CompletionRequest]) -> Response:
        record: AdapterRecord | None = None
        try:
            body = await request.body()
            wanted = parse(body, kind)
            record = await self._resolver.resolve(wanted.model)
            response = await self._call(wanted, record, is_large=len(body) > _MAX_GRPC_BYTES)
        except Exception as error:  # the edge: whatever it was, the client gets OpenAI's shape
            response = _render(error)
        self._count(record, response.status_code)
        return response

    async def _call(
        self, wanted: ChatRequest | CompletionRequest, record: AdapterRecord | None, is_large: bool
    ) -> Response:
        is_chat = isinstance(wanted, ChatRequest)
        call = Call(
            id=f"{'chatcmpl' if is_chat else 'cmpl'}-{uuid.uuid4().hex}",
            base=self._base,
            quantization=self._quantization,
            prompts=wanted.prompts,
            adapter=record,
            n=wanted.n,
            params=wanted.params,
            max_tokens=wanted.limit,
            stream=wanted.stream,
        )
        answer = (ChatAnswer if is_chat else CompletionAnswer)(
            id=call.id,
            created=int(time.time()),
            model=wanted.model,
            wants_logprobs=call.params.logprobs is not None,
            includes_usage=wanted.stream_options is not None and wanted.stream_options.include_usage,
        )
        pieces = self._pieces(call, is_large)
        accepted = await anext(pieces)
        assert isinstance(accepted, Accepted), "a replica says first that it accepts"
        answer.usage.prompt_tokens = accepted.prompt_tokens
        if call.stream:
            return _EventStream(_stream(answer, len(call.prompts) * call.n, pieces), self._headers(record))
        async with aclosing(pieces):
            events = [event async for piece in pieces if not isinstance(piece, Accepted) for event in piece]
        return JSONResponse(answer.whole(events), headers=self._headers(record))

    async def _pieces(self, call: Call, is_large: bool) -> AsyncGenerator[Accepted | list[ChoiceEvent], None]:
        """What a replica answers. Raises what it raised; leaving early cancels the call there."""
        digest = call.adapter.digest if call.adapter else ""
        # What is not given by reference goes over gRPC, which costs less than Ray's objects do (README.md).
        replicas = self._replicas.options(stream=True, multiplexed_model_id=digest, _by_reference=is_large)
        response = replicas.generate.remote(call)
        try:
            async for piece in response:
                yield piece
            self._pace.did(1)
        except RayTaskError as error:
            raise error.cause from None
        except BackPressureError as error:
            queued = int(error.args[0])  # Ray 2.60 gives it no other name
            raise Overloaded(f"{queued} requests wait already; try again soon", self._pace.wait_s(queued)) from None
        except (RayError, RayServeException, grpc.RpcError) as error:
            _log.warning("call %s lost its replica: %s", call.id, error)
            raise NotServing("the replica that answered was lost; send the request again") from None
        finally:
            response.cancel()  # no effect once it has ended

    def _sleeps(self) -> bool:
        """No replica runs, because nobody asks. A call to find out would wake one."""
        deployment = serve.status().applications[self._replicas.app_name].deployments[self._replicas.deployment_name]
        failed = deployment.status in (DeploymentStatus.UNHEALTHY, DeploymentStatus.DEPLOY_FAILED)
        return not failed and not deployment.replica_states.get(ReplicaState.RUNNING)

    async def _prefetch(self, record: AdapterRecord) -> None:
        """Have the replica load an adapter that will get the next request for it."""
        # Not in the context of the request that happened to see the move: Serve would give both calls one id, and its
        # router, when both wait, forgets one of them for ever.
        await asyncio.create_task(self._load_ahead(record), context=Context())

    async def _load_ahead(self, record: AdapterRecord) -> None:
        try:
            await self._replicas.options(multiplexed_model_id=record.digest).prefetch.remote(record)
        except (RayError, RayServeException) as error:  # the first request will meet it too, and say so
            _log.warning("%s@%s was not loaded ahead: %s", record.name, record.version, error)

    def _headers(self, record: AdapterRecord | None) -> dict[str, str]:
        """Which weights answer: an adapter's version and digest, or the base and its revision; how it is quantised."""
        held = {QUANTIZATION_HEADER: self._quantization} if self._quantization else {}
        if record is None:
            return {ADAPTER_HEADER: self._base.name, DIGEST_HEADER: self._base.revision, **held}
        return {ADAPTER_HEADER: f"{record.name}@{record.version}", DIGEST_HEADER: record.digest, **held}

    def _model(self, model: ServedModel) -> Json:
        shown: Json = {"id": model.id, "object": "model", "created": model.created, "owned_by": "luthier"}
        if self._quantization is not None:
            shown["quantization"] = self._quantization  # of the base, on which the adapters stand too
        shown |= self._permits.shown(model.id, model.adapter)
        if model.adapter is None:
            return {**shown, "digest": self._base.revision}
        version = f"{model.adapter.name}@{model.adapter.version}"
        return {**shown, "parent": self._base.name, "adapter": version, "digest": model.adapter.digest}

    def _count(self, record: AdapterRecord | None, status: int) -> None:
        adapter = f"{record.name}@{record.version}" if record else ""
        self._requests.inc(1, {"model": self._base.name, "adapter": adapter, "code": str(status)})


async def _result(response: Any) -> bool:
    return bool(await response)


async def _stream(
    answer: Answer, choices: int, pieces: AsyncGenerator[Accepted | list[ChoiceEvent], None]
) -> AsyncGenerator[bytes, None]:
    """Server-sent events, ended by [DONE], or by an error that OpenAI's clients raise."""
    async with aclosing(pieces):
        try:
            for index in range(choices):
                for chunk in answer.opening(index):
                    yield _event(chunk)
            async for piece in pieces:
                for chunk in answer.chunks(piece) if not isinstance(piece, Accepted) else ():
                    yield _event(chunk)
            for chunk in answer.closing():
                yield _event(chunk)
            yield b"data: [DONE]\n\n"
        except LuthierError as error:
            yield _event(describe(error).body)


def _event(data: Json) -> bytes:
    return b"data: " + json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


class _EventStream(StreamingResponse):
    """A streamed answer whose source is closed whatever happens, at once and not when it is collected."""

    def __init__(self, events: AsyncGenerator[bytes, None], headers: dict[str, str]) -> None:
        super().__init__(events, headers={**headers, "cache-control": "no-cache"}, media_type="text/event-stream")
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._events):
            await super().__call__(scope, receive, send)


def _render(error: Exception) -> Response:
    described = describe(error)
    if described.status >= 500:
        _log.error("a request failed", exc_info=error)
    return _respond(described)


def _respond(error: HttpError) -> Response:
    return JSONResponse(error.body, error.status, error.headers)


async def _refuse(request: Request, error: Exception) -> Response:  # noqa: ARG001
    return _render(error)


async def _refuse_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    refused = describe_status(error.status_code, error.detail, request.url.path)
    return JSONResponse(refused.body, refused.status, dict(error.headers or {}))
