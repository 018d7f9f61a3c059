"""The Serve application of a config: ingresses in front, replicas behind."""

from ray import serve
from ray.serve import Application
from ray.serve.config import RequestRouterConfig
from ray.serve.request_router import RequestRouter

from cluster.records import BaseModelRef
from serving.config import ServingConfig
from serving.ingress import Ingress
from serving.replica import Replica
from serving.router import AdapterRouter

INGRESS = "ingress"
REPLICA = "replica"

_INGRESS_MAX_ONGOING = 10_000
"""Open requests of one ingress: no limit of ours. What is too much is refused by the replicas' own queues."""

_START_ATTEMPTS = 3
"""How often a replica may fail to start before the deployment has failed. Serve's 20 hide a wrong model for minutes."""


def build(config: ServingConfig, base: BaseModelRef, router: type[RequestRouter] = AdapterRouter) -> Application:
    """Bind the deployments. `base` is the pinned model that both sides speak of; `router` sends calls to replicas."""
    replicas = config.replicas
    replica = serve.deployment(
        Replica,
        name=REPLICA,
        max_ongoing_requests=replicas.max_ongoing,
        max_queued_requests=replicas.max_queued,
        autoscaling_config={
            "min_replicas": replicas.min,
            "max_replicas": replicas.max,
            "target_ongoing_requests": replicas.target_ongoing,
            "upscale_delay_s": replicas.upscale_delay_s,
            "downscale_delay_s": replicas.downscale_delay_s,
        },
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
    return ingress.bind(config, base, replica.bind(config, base))
