"""The Serve application of a config: ingresses in front, replicas behind."""

from dataclasses import asdict

from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, RequestRouterConfig
from ray.serve.request_router import RequestRouter

from cluster.records import BaseModelRef
from serving.adapters import HALF_LIFE
from serving.autoscale import Settings, TokenPolicy
from serving.config import ServingConfig
from serving.ingress import Ingress
from serving.permits import Permits
from serving.replica import Replica
from serving.router import AdapterRouter

INGRESS = "ingress"
REPLICA = "replica"

_INGRESS_MAX_ONGOING = 10_000
"""Open requests of one ingress: no limit of ours. What is too much is refused by the replicas' own queues."""

_START_ATTEMPTS = 3
"""How often a replica may fail to start before the deployment has failed. Serve's 20 hide a wrong model for minutes."""


_LOAD_INTERVAL_S = 1.0
"""How often replicas and ingresses tell Serve's controller of their load. Serve's own 10 s are most of a burst; Ray
2.60 calls the setting deprecated, in favour of environment variables that it does not read."""

_LOOK_BACK_S = 3.0
"""Over which Serve averages the requests in front of the replicas. The policy takes the newest of all else."""


def build(
    config: ServingConfig,
    base: BaseModelRef,
    router: type[RequestRouter] = AdapterRouter,
    half_life: float = HALF_LIFE,
    licences: Permits | None = None,
) -> Application:
    """Bind the deployments. `base` is the pinned model that both sides speak of; `router` sends calls to replicas, and
    `half_life` says how long those remember what was asked for when they evict adapters (adapters.py). `licences` is
    what may be answered with; by the policy found here if not given.

    Raises LicenceRefused when the base may not be served.
    """
    permits = licences or Permits.here(config)
    permits.check(None)
    replicas = config.replicas
    replica = serve.deployment(
        Replica,
        name=REPLICA,
        max_ongoing_requests=replicas.max_ongoing,
        max_queued_requests=replicas.max_queued,
        autoscaling_config=_autoscaling(config),
        request_router_config=RequestRouterConfig(request_router_class=router),
        max_surge_percent=replicas.max_surge_percent,
        graceful_shutdown_timeout_s=replicas.drain_timeout_s,
        max_constructor_retry_count=_START_ATTEMPTS,
        ray_actor_options={"num_cpus": replicas.cpus, "num_gpus": replicas.gpus},
    )
    ingress = serve.deployment(
        serve.ingress()(Ingress),
        name=INGRESS,
        num_replicas=config.http.ingresses,
        max_ongoing_requests=_INGRESS_MAX_ONGOING,
        max_surge_percent=100,
        graceful_shutdown_timeout_s=replicas.drain_timeout_s,
        ray_actor_options={"num_cpus": config.http.cpus},
    )
    return ingress.bind(config, base, replica.bind(config, base, half_life), licences=permits)


def _autoscaling(config: ServingConfig) -> AutoscalingConfig:
    """Our policy with delays of its own, so that Serve adds none."""
    replicas = config.replicas
    settings = Settings(
        target_ttft_s=replicas.target_ttft_s,
        catch_up_s=replicas.catch_up_s,
        downscale_delay_s=replicas.downscale_delay_s,
        max_running=config.engine.max_running,
    )
    return AutoscalingConfig(
        min_replicas=replicas.min,
        max_replicas=replicas.max,
        upscale_delay_s=0.0,
        downscale_delay_s=0.0,
        metrics_interval_s=_LOAD_INTERVAL_S,
        look_back_period_s=_LOOK_BACK_S,
        policy=AutoscalingPolicy(policy_function=TokenPolicy, policy_kwargs=asdict(settings)),
    )
