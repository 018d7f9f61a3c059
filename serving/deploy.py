"""Putting a config on a Ray cluster, and taking it off: what `luthier serving` does after reading its arguments.

The application is detached: it outlives the process, and the submitted job, that deployed it. Deploying the same
name again updates it in place; a stream that runs finishes on its old replica.
"""

import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import ray
from ray import serve
from ray.exceptions import AuthenticationError
from ray.serve.api import RunTarget
from ray.serve.context import _get_global_client
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.schema import ApplicationStatus

import cluster
import serving
from cluster import env, models, registry, secret
from cluster.errors import AdapterNotFound, ConfigError, Fault, InputError, PlanError, RunFailed
from cluster.logs import error_in
from cluster.records import BaseModelRef
from cluster.session import check_address
from cluster.store import Store, open_store
from serving.app import REPLICA, build
from serving.calls import ReplicaStatus
from serving.config import ServingConfig
from serving.permits import Permits

_POLL_S = 0.5
_STATUS_TIMEOUT_S = 30.0


def join(address: str | None) -> None:
    """Connect to a running Ray cluster: `address`, else RAY_ADDRESS; never one that only happens to run here.

    Our packages travel along, so that nodes need not have them installed. Raises PlanError.
    """
    place = address or os.environ.get(env.RAY_ADDRESS)
    if not place:
        raise PlanError(f"which Ray cluster? give --address host:port, or set {env.RAY_ADDRESS}")
    check_address(place)
    os.environ[env.RAY_ADDRESS] = place  # threads of Serve's join by it, and it may name a dashboard
    logging.getLogger("ray.serve").setLevel(logging.WARNING)  # it tells of its own doings on the person's terminal
    packages = [str(Path(package.__file__ or "").parent) for package in (cluster, serving)]
    try:
        ray.init(address=place, runtime_env={"py_modules": packages}, log_to_driver=False, logging_level="warning")
    except (ConnectionError, RuntimeError, ValueError, AuthenticationError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise PlanError(
            f"cannot join the Ray cluster at {place} ({reason}); is it running, and do {env.RAY_AUTH_MODE}=token and "
            f"its token ({env.RAY_AUTH_TOKEN_PATH}) match?"
        ) from error


def deploy(config: ServingConfig, timeout_s: float, tell: Callable[[str], None]) -> str:
    """Deploy onto the cluster that this process has joined; returns the URL once it answers.

    Raises ConfigError, ModelError and LicenceRefused before anything is changed, RunFailed with the replica's reason
    when it cannot start, PlanError when it is still not up after `timeout_s`: the cluster then has too little, and goes
    on trying.
    """
    secret.load(config.secrets)
    store = open_store(config.store)
    permits = Permits.here(config)
    permits.check(None)
    base = models.pin(config.model, store, permits.base)
    permits = permits.with_base(models.artefacts(store, base))
    permits.check(None)
    for duty in permits.duties(None):
        tell(f"{config.name}: licence: {duty}")
    for warning in _warnings(config, store, base):
        tell(f"warning: {warning}")
    serve.start(http_options={"host": config.http.host, "port": config.http.port})
    _check_http(config)
    _check_other_applications(config)
    serve.run_many(
        [RunTarget(target=build(config, base, licences=permits), name=config.name, route_prefix="/")],
        wait_for_applications_running=False,
    )
    deadline = time.monotonic() + timeout_s
    _wait_until_running(config, deadline, tell)
    url = f"http://{config.http.host}:{config.http.port}"
    _wait_until_answers(f"{url}/healthz", deadline)
    return f"{url}/v1"


def _warnings(config: ServingConfig, store: Store, base: BaseModelRef) -> Iterator[str]:
    """What may be meant, since an adapter may be published later, and may be a slip of the pen."""
    if not registry.names(store):
        yield f"{config.store} holds no adapters, so {base.name} answers alone until one is published there"
    for name in config.adapters.pinned:
        try:
            record = registry.resolve(store, name)
        except (InputError, AdapterNotFound) as error:
            yield f"adapters.pinned: {error}; replicas look for it every {config.adapters.alias_refresh_s:g} s"
            continue
        if record.base != base:
            yield (
                f"adapters.pinned: {name} is for {record.base.name} at {record.base.revision}, and cannot be loaded on "
                f"{base.name} at {base.revision}"
            )


def status(name: str) -> tuple[str, list[ReplicaStatus]]:
    """The application's state in Serve's words, and what each live replica says. Raises ConfigError when unknown."""
    applications = serve.status().applications
    if name not in applications:
        raise ConfigError([Fault("serving", "name", f"no application {name!r}; there are: {', '.join(applications)}")])
    state, handle = applications[name].status.value, serve.get_deployment_handle(REPLICA, app_name=name)
    # In a loop of the router's own: Serve's throughput mode, where this shell has its variables, expects one of ours.
    if not handle.is_initialized:  # Serve keeps handles
        handle._init(_run_router_in_separate_loop=True)
    try:
        return state, handle.broadcast("status").results(timeout_s=_STATUS_TIMEOUT_S)
    except DeploymentUnavailableError:
        return state, []  # scaled to zero, or still starting


def applications() -> list[str]:
    """The names of what Serve runs on this cluster."""
    return list(serve.status().applications)


def shutdown(name: str | None) -> list[str]:
    """Remove one application, or all of them and Serve itself; running streams end first. Returns their names."""
    running = applications()
    if name is None:
        serve.shutdown()
        return running
    if name not in running:
        raise ConfigError([Fault("serving", "name", f"no application {name!r}; there are: {', '.join(running)}")])
    serve.delete(name)
    return [name]


def _check_http(config: ServingConfig) -> None:
    """Serve starts once on a cluster and only logs that it ignores another host or port; we refuse."""
    running = _get_global_client().http_config
    if (running.host, running.port) != (config.http.host, config.http.port):
        raise ConfigError(
            [
                Fault(
                    f"serving {config.name}",
                    "http",
                    f"Serve already listens on {running.host}:{running.port} in this cluster, not on "
                    f"{config.http.host}:{config.http.port}; use its address, or `luthier serving shutdown` first",
                )
            ]
        )


def _check_other_applications(config: ServingConfig) -> None:
    others = [name for name in applications() if name != config.name]
    if others:
        raise ConfigError(
            [
                Fault(
                    f"serving {config.name}",
                    "name",
                    f"{', '.join(others)} is served here already, and one endpoint serves one base; "
                    f"`luthier serving shutdown {others[0]}` first",
                )
            ]
        )


def _wait_until_running(config: ServingConfig, deadline: float, tell: Callable[[str], None]) -> None:
    told = ""
    while True:
        application = serve.status().applications[config.name]
        states = {name: each.status.value for name, each in application.deployments.items()}
        messages = [each.message for each in application.deployments.values() if each.message]
        news = ", ".join(f"{name} {state.lower()}" for name, state in states.items())
        if news != told:
            tell(f"{config.name}: {news}")
            told = news
        match application.status:
            case ApplicationStatus.RUNNING:
                return
            case ApplicationStatus.DEPLOY_FAILED | ApplicationStatus.UNHEALTHY:
                reason = error_in("\n".join(messages) or application.message) or "Serve gives no reason"
                raise RunFailed(f"{config.name} cannot be served: {reason}")
        if time.monotonic() > deadline:
            raise PlanError(
                f"{config.name} is not up yet ({news}); a replica takes {config.replicas.cpus:g} CPUs and "
                f"{config.replicas.gpus:g} GPUs, and the cluster has free: {_free()}. It goes on trying; "
                f"see `luthier serving status {config.name}`, or `luthier serving shutdown {config.name}`"
            )
        time.sleep(_POLL_S)


def _free() -> str:
    free = ray.available_resources()
    return f"{free.get('CPU', 0):g} CPUs, {free.get('GPU', 0):g} GPUs"


def _wait_until_answers(url: str, deadline: float) -> None:
    problem = ""
    while time.monotonic() < deadline:
        try:
            if httpx.get(url, trust_env=False).status_code == 200:
                return
        except httpx.HTTPError as error:
            problem = f": {error}"
        time.sleep(_POLL_S)
    raise RunFailed(f"the application runs, but {url} does not answer{problem}")
