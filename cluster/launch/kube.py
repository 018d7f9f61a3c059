"""KubeRay manifests from the same `provider` section: RayCluster, RayJob, RayService, and their network policy.

Written for KubeRay 1.7 and its CRDs `ray.io/v1`. Pods run as an ordinary user without capabilities, only the head
gets a Kubernetes token (for the autoscaler beside it; the operator binds it to a role of its own namespace), and the
operator makes the cluster's token as a Kubernetes secret.

A RayCluster's dashboard listens on loopback: `kubectl port-forward` reaches it, nothing else does. In a RayJob and a
RayService the operator itself speaks to the dashboard, so there it listens in the pod's network; the network policy
lets the operator in, and the token is asked for.
"""

import shlex
from pathlib import PurePath
from typing import Any

import yaml

from cluster import env, spot
from cluster.launch.release import Release
from cluster.launch.spec import HeadPod, Kubernetes, PodGroup

KUBERAY = "1.7.0"
"""The version whose CRDs the tests check against."""

CLUSTER_LABEL = "luthier.io/cluster"
DASHBOARD_PORT = 8265
SERVE_PORT = 8000

Manifest = dict[str, Any]

_LOOPBACK = "127.0.0.1"
_POD = "0.0.0.0"  # noqa: S104 - inside the pod's network, behind the network policy and the token


def ray_cluster(name: str, provider: Kubernetes, release: Release) -> Manifest:
    """A cluster that stays, for `ray job submit`."""
    return _manifest("RayCluster", name, provider, _cluster_spec(name, provider, release, _LOOPBACK))


def ray_job(name: str, provider: Kubernetes, release: Release, recipe: str, store: str | None) -> Manifest:
    """A cluster for one training run, which goes when the run has ended. `recipe` is a path in the image."""
    overrides = [f"cluster={name}", *([f"store={store}"] if store else [])]
    return _manifest(
        "RayJob",
        name,
        provider,
        {
            "entrypoint": shlex.join(["python", "-m", "jobs.train", recipe, *overrides]),
            "entrypointNumCpus": 1,  # the head has none, so the driver runs on a worker
            "submissionMode": "K8sJobMode",
            "submitterPodTemplate": _submitter(name, provider),
            "submitterConfig": {"backoffLimit": 2},
            "backoffLimit": 0,  # the run itself goes on after a loss; another cluster would begin a second run
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": 600,
            "rayClusterSpec": _cluster_spec(name, provider, release, _POD),
        },
    )


def ray_service(name: str, provider: Kubernetes, release: Release, config: str, store: str | None) -> Manifest:
    """A cluster that serves one config of `configs/serving`, whose path in the image is given."""
    arguments = {"config": config, "overrides": [f"store={store}"] if store else []}
    application = {
        "name": PurePath(config).stem,
        "route_prefix": "/",
        "import_path": "serving.service:application",
        "args": arguments,
    }
    serve = {
        "proxy_location": "EveryNode",
        "http_options": {"host": _POD, "port": SERVE_PORT},
        "applications": [application],
    }
    return _manifest(
        "RayService",
        name,
        provider,
        {
            "serveConfigV2": yaml.safe_dump(serve, sort_keys=False),
            "rayClusterConfig": _cluster_spec(name, provider, release, _POD),
        },
    )


def network_policy(name: str, provider: Kubernetes) -> Manifest:
    """Who may speak to the pods: they themselves, the operator, and, to what is served, the namespace."""
    own = {"podSelector": {"matchLabels": {CLUSTER_LABEL: name}}}
    operator = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": provider.operator_namespace}}}
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": _metadata(name, provider),
        "spec": {
            **own,
            "policyTypes": ["Ingress"],
            "ingress": [
                {"from": [own]},
                {"from": [operator], "ports": [_tcp(DASHBOARD_PORT), _tcp(SERVE_PORT)]},
                {"from": [{"podSelector": {}}], "ports": [_tcp(SERVE_PORT)]},
            ],
        },
    }


def _tcp(port: int) -> Manifest:
    return {"protocol": "TCP", "port": port}


def _manifest(kind: str, name: str, provider: Kubernetes, spec: Manifest) -> Manifest:
    return {"apiVersion": "ray.io/v1", "kind": kind, "metadata": _metadata(name, provider), "spec": spec}


def _metadata(name: str, provider: Kubernetes) -> Manifest:
    return {"name": name, "namespace": provider.namespace, "labels": {CLUSTER_LABEL: name}}


def _cluster_spec(name: str, provider: Kubernetes, release: Release, dashboard_host: str) -> Manifest:
    return {
        "rayVersion": release.ray,
        "authOptions": {"mode": "token"},
        "enableInTreeAutoscaling": True,
        "autoscalerOptions": {
            "version": "v2",
            "idleTimeoutSeconds": round(provider.idle_minutes * 60),
            "securityContext": _container_security(),
        },
        "headGroupSpec": {
            "serviceType": "ClusterIP",
            "rayStartParams": {"num-cpus": "0", "num-gpus": "0", "dashboard-host": dashboard_host},
            "template": _head_pod(name, provider, provider.head),
        },
        "workerGroupSpecs": [_workers(name, provider, *item) for item in provider.groups.items()],
    }


def _head_pod(name: str, provider: Kubernetes, head: HeadPod) -> Manifest:
    ports = {"gcs": 6379, "dashboard": DASHBOARD_PORT, "client": 10001, "serve": SERVE_PORT}
    container = _container("ray-head", provider, {"cpu": str(head.cpus), "memory": _gib(head.memory_gb)})
    container["ports"] = [{"name": port_name, "containerPort": port} for port_name, port in ports.items()]
    return _pod(name, provider, container)


def _workers(name: str, provider: Kubernetes, group_name: str, group: PodGroup) -> Manifest:
    resources = {"cpu": str(group.cpus), "memory": _gib(group.memory_gb)}
    if group.gpus:
        resources["nvidia.com/gpu"] = str(group.gpus)
    container = _container("ray-worker", provider, resources)
    # Whoever ends the pod (a machine that is taken, an eviction), training saves and moves before Ray is told to end.
    leave = f'exec python -m cluster.spot {spot.POD} --gcs "$RAY_ADDRESS"'  # KubeRay sets it
    container["lifecycle"] = {"preStop": {"exec": {"command": ["sh", "-c", leave]}}}
    template = _pod(name, provider, container)
    template["spec"] |= {
        "terminationGracePeriodSeconds": spot.POD_GRACE_S,
        "automountServiceAccountToken": False,
        **({"serviceAccountName": provider.worker_account} if provider.worker_account else {}),
        **({"nodeSelector": group.node_selector} if group.node_selector else {}),
        **({"tolerations": list(group.tolerations)} if group.tolerations else {}),
    }
    return {
        "groupName": group_name,
        "replicas": group.min,
        "minReplicas": group.min,
        "maxReplicas": group.max,
        "priority": group.priority,
        "labels": group.node_labels,
        "rayStartParams": {"num-cpus": str(group.cpus), "num-gpus": str(group.gpus)},
        "template": template,
    }


def _submitter(name: str, provider: Kubernetes) -> Manifest:
    """The pod that runs `ray job submit`. It needs no secret; its label lets it through the network policy."""
    container = _container("ray-job-submitter", provider, {"cpu": "500m", "memory": "512Mi"}, secrets=())
    template = _pod(name, provider, container)
    template["spec"] |= {"restartPolicy": "Never", "automountServiceAccountToken": False}
    return template


def _pod(name: str, provider: Kubernetes, container: Manifest) -> Manifest:
    pulling = [{"name": secret} for secret in provider.pull_secrets]
    return {
        "metadata": {"labels": {CLUSTER_LABEL: name}},
        "spec": {
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": 1000,
                "runAsGroup": 1000,
                "fsGroup": 1000,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "containers": [container],
            # Kubernetes gives a pod 64 MiB of shared memory, and Ray's objects live in it.
            "volumes": [{"name": "shared-memory", "emptyDir": {"medium": "Memory"}}],
            **({"imagePullSecrets": pulling} if pulling else {}),
        },
    }


def _container(
    role: str, provider: Kubernetes, resources: dict[str, str], secrets: tuple[str, ...] | None = None
) -> Manifest:
    """`secrets`: those whose keys become variables; not given: the provider's."""
    variables = [{"secretRef": {"name": secret}} for secret in (provider.secrets if secrets is None else secrets)]
    return {
        "name": role,
        "image": provider.image,
        "resources": {"requests": resources, "limits": resources},
        "env": [
            {"name": "RAY_USAGE_STATS_ENABLED", "value": str(int(provider.usage_stats))},
            {"name": env.LUTHIER_IMAGE, "value": provider.image},
            # In a pod Ray tells of a disk that is always empty, and `luthier why` would never see a full one.
            {"name": "RAY_DASHBOARD_ENABLE_K8S_DISK_USAGE", "value": "1"},
        ],
        **({"envFrom": variables} if variables else {}),
        "volumeMounts": [{"name": "shared-memory", "mountPath": "/dev/shm"}],  # noqa: S108
        "securityContext": _container_security(),
    }


def _container_security() -> Manifest:
    return {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


def _gib(gigabytes: float) -> str:
    return f"{round(gigabytes * 1024)}Mi"
